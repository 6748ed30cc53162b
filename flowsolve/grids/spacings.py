"""Spacings by formulas, in flow time and in the log-SNR; see `flowsolve.grids` for the table of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolve.grids.base import fractions
from flowsolve.grids.quantile import beta_quantile
from flowsolve.paths import Path

__all__ = ["WINDOW", "Beta", "Karras", "LogSNR", "Polyexponential", "Quadratic", "Uniform"]

WINDOW = (-math.log(80.0), -math.log(0.002))


@dataclass(frozen=True)
class Uniform:
    """Equal steps of flow time."""

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        return fractions(start, end, steps)


@dataclass(frozen=True)
class Quadratic:
    """Distances of flow time from the data end that grow like squares: dense near the data.

    DDIM's quadratic sub-sequences of a table, τ_i = ⌊c i²⌋, without the floor and over the whole interval (the official
    code stops at 0.8 of the table): Song, Meng & Ermon 2021, appendix D.2.
    """

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        if end < start:
            return self.times(path, end, start, steps)[::-1]
        n = steps  # 1 − (1 − i/n)² = i (2n − i)/n²
        return [start, *((start * (n - i) ** 2 + end * i * (2 * n - i)) / n**2 for i in range(1, n)), end]


@dataclass(frozen=True)
class Beta:
    """Equal quantiles of a Beta(a, b) distribution of the time from the data end: dense at both ends for a, b < 1.

    Lee et al. 2024, "Beta sampling is all you need" (a = b = 0.6), as in ComfyUI: quantiles of the time step. diffusers
    takes them of σ instead. a < 1 puts steps near the data, b < 1 near the noise.
    """

    a: float = 0.6
    b: float = 0.6

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            if not 0.0 < value <= 100.0:
                raise ValueError(f"{name} = {value!r}; expected 0 < {name} <= 100 (0.6 is the paper's, 1 is uniform)")

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        if end < start:
            return self.times(path, end, start, steps)[::-1]
        shares = (
            beta_quantile(i, steps - i, self.b, self.a) for i in range(1, steps)
        )  # of 1 − x: a and b trade places
        return [start, *(start * rest + end * share for share, rest in shares), end]


@dataclass(frozen=True)
class LogSNR:
    """Equal steps of the log-SNR λ, within `window` where λ is infinite at an end of the interval.

    In σ/α = e^(−λ) a geometric sequence, which k-diffusion and diffusers call exponential.
    """

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

    def __post_init__(self) -> None:
        _check_rho(self.rho)

    def _place(self, lo: float, hi: float, steps: int) -> list[float]:
        first, last = math.exp(-lo / self.rho), math.exp(-hi / self.rho)
        return [lo, *(-self.rho * math.log(r) for r in fractions(first, last, steps)[1:-1]), hi]


@dataclass(frozen=True)
class Polyexponential(LogSNR):
    """Distances of λ from the data end that grow like u^ρ, within `window` where λ is infinite at an end.

    ρ = 1, k-diffusion's default, is `LogSNR`; ρ > 1 is denser near the data, ρ < 1 near the noise.
    """

    rho: float = 1.0

    def __post_init__(self) -> None:
        _check_rho(self.rho)

    def _place(self, lo: float, hi: float, steps: int) -> list[float]:
        left = [(1.0 - i / steps) ** self.rho for i in range(1, steps)]
        return [lo, *(lo * r + hi * (1.0 - r) for r in left), hi]


def _check_rho(rho: float) -> None:
    if not (math.isfinite(rho) and rho > 0.0):
        raise ValueError(f"rho = {rho!r}; expected a finite number > 0")
