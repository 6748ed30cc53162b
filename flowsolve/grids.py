r"""Grids: the times at which a solver steps, and what each step costs.

A `Grid` is a strictly monotone sequence of flow times in [0, 1] with the number of network evaluations that each of
its intervals will cost, so the NFE of a solve is known before it starts. A *spacing* places the nodes:

* `Uniform`: equal steps of flow time;
* `LogSNR`: equal steps of $\lambda = \log(\alpha/\sigma)$ (Lu et al. 2022);
* `Karras(rho)`: equal steps of $\tilde\sigma^{1/\rho}$ with $\tilde\sigma = \sigma/\alpha = e^{-\lambda}$
  (Karras et al. 2022);
* any sequence of times: themselves.

Nodes are computed as exact fractions of the interval, never by accumulation, and its ends are kept to the bit. Where
$\lambda$ is infinite at an end of the interval, `LogSNR` and `Karras` place their nodes in a finite window
(by default EDM's, $\tilde\sigma$ from 80 to 0.002) and the outermost steps go from its edge to the exact end: steps
like any other, counted like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from flowsolve.paths import Path

__all__ = ["Grid", "Karras", "LogSNR", "Spacing", "Uniform", "resolve"]

WINDOW = (-math.log(80.0), -math.log(0.002))


@dataclass(frozen=True)
class Grid:
    """Times t_0, …, t_n and the network evaluations that each of the n steps costs.

    Attributes:
        times: flow times, strictly monotone.
        evaluations: estimates that each step asks for.
        closing: whether the last step leaves the window of times that the network knows, and is to be taken with the
            estimate at its edge, x' = α' ẑ + σ' ε̂, whatever the solver.

    Raises:
        ValueError: fewer than two times, a time outside [0, 1] or not finite, or times that are not strictly monotone.
    """

    times: tuple[float, ...]
    evaluations: tuple[int, ...]
    closing: bool = False

    def __post_init__(self) -> None:
        times = self.times
        if len(times) < 2:
            raise ValueError(f"a grid needs at least 2 times, got {list(times)}")
        for i, t in enumerate(times):
            if not (math.isfinite(t) and 0.0 <= t <= 1.0):
                raise ValueError(f"grid time {i} is {t!r}; expected flow times in [0, 1], noise at 0 and data at 1")
        rising = times[-1] > times[0]
        for i, (a, b) in enumerate(pairwise(times)):
            if (b <= a) if rising else (b >= a):
                raise ValueError(
                    f"grid times {i} and {i + 1} are {a!r} and {b!r}; expected strictly "
                    f"{'increasing' if rising else 'decreasing'} times (fewer steps, or another spacing)"
                )
        if len(self.evaluations) != self.steps:
            raise ValueError(f"{self.steps} steps but {len(self.evaluations)} evaluation counts")

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """Estimates that a solve on this grid asks for, per sample."""
        return sum(self.evaluations)

    @property
    def intervals(self) -> list[tuple[float, float, int]]:
        """(t, t_next, evaluations) of each step."""
        return list(zip(self.times, self.times[1:], self.evaluations, strict=False))


class Spacing(Protocol):
    """Anything that places n steps on an interval of a path."""

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end, both included exactly."""
        ...


def fractions(start: float, end: float, steps: int) -> list[float]:
    """start + (end − start) i/steps for i = 0 … steps, as exact as float64 allows, with the ends to the bit."""
    return [start, *((start * (steps - i) + end * i) / steps for i in range(1, steps)), end]


@dataclass(frozen=True)
class Uniform:
    """Equal steps of flow time."""

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        return fractions(start, end, steps)


@dataclass(frozen=True)
class LogSNR:
    """Equal steps of the log-SNR λ, within `window` where λ is infinite at an end of the interval."""

    window: tuple[float, float] = WINDOW

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        if end < start:
            return self.times(path, end, start, steps)[::-1]
        open_start = path.at(start).alpha == 0.0
        open_end = path.at(end).sigma == 0.0
        lo = self.window[0] if open_start else path.log_snr(start)
        hi = self.window[1] if open_end else path.log_snr(end)
        nodes = steps + 1 - open_start - open_end  # log-SNRs to place, finite ends included
        if not lo < hi:
            raise ValueError(
                f"the log-SNR window {self.window} leaves nothing of the interval [{start:g}, {end:g}], whose "
                f"log-SNRs run from {path.log_snr(start):.4g} to {path.log_snr(end):.4g}; widen it"
            )
        if nodes <= 0:
            return [start, end]
        placed = [0.5 * (lo + hi)] if nodes == 1 and steps > 1 else self._place(lo, hi, max(nodes - 1, 1))[:nodes]
        inner = [path.time(lam) for lam in placed]
        inner = inner if open_start else inner[1:]
        inner = inner if open_end else inner[:-1]
        return [start, *inner, end]

    def _place(self, lo: float, hi: float, steps: int) -> list[float]:
        return fractions(lo, hi, steps)


@dataclass(frozen=True)
class Karras(LogSNR):
    """Equal steps of (σ/α)^(1/ρ), within `window` (in λ) where σ/α is 0 or infinite at an end of the interval."""

    rho: float = 7.0

    def _place(self, lo: float, hi: float, steps: int) -> list[float]:
        first, last = math.exp(-lo / self.rho), math.exp(-hi / self.rho)
        return [lo, *(-self.rho * math.log(r) for r in fractions(first, last, steps)[1:-1]), hi]


SPACINGS: dict[str, Spacing] = {"uniform": Uniform(), "log_snr": LogSNR(), "karras": Karras()}


def resolve(grid: str | Spacing | Sequence[float] | Tensor) -> Spacing | list[float]:
    """A spacing by its name, itself, or a list of explicit times."""
    if isinstance(grid, str):
        if grid not in SPACINGS:
            names = ", ".join(SPACINGS)
            raise ValueError(f"grid = {grid!r} is not known; expected one of {names}, a spacing, or explicit times")
        return SPACINGS[grid]
    if hasattr(grid, "times"):
        return grid
    if not hasattr(grid, "__iter__"):
        raise TypeError(f"grid is a {type(grid).__name__}; expected a name, a spacing or a sequence of times")
    return [float(t) for t in grid]
