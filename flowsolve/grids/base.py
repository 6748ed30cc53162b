"""What a grid is, and what places one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from flowsolve.paths import Path

__all__ = ["Grid", "Spacing", "fractions", "share"]


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


def share(times: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The ends of steps that cost `counts`, on a grid with a step for each evaluation: dear steps are long."""
    if len(times) != sum(counts) + 1:
        raise ValueError(f"the spacing gave {len(times)} times for {sum(counts)} steps; expected {sum(counts) + 1}")
    return [times[i] for i in accumulate(counts, initial=0)]


def fractions(start: float, end: float, steps: int) -> list[float]:
    """start + (end − start) i/steps for i = 0 … steps, as exact as float64 allows, with the ends to the bit."""
    return [start, *((start * (steps - i) + end * i) / steps for i in range(1, steps)), end]
