r"""Spacings that are dense where the noise is about as large as the data.

On images, as on mixtures, most of what a path does happens within a few units of log-SNR about the level where noise
and data are of one size; on both sides the field is flat. These spacings take equal steps of a bounded function of λ
that is steepest there. Being bounded it reaches ends where λ is infinite, without a window.

| spacing | equal steps of | density of nodes in λ |
|---|---|---|
| `Logistic(kappa)` | $\alpha/(\kappa\alpha+\sigma)$ | $\operatorname{sech}^2\tfrac12(\lambda+\log\kappa)$ |
| `Arctan(center, width)` | $\arctan\frac{\lambda - c}{w}$ | $1/(1 + (\frac{\lambda-c}{w})^2)$ |

The first is the clock of the form $\hat z - \kappa\hat\varepsilon$ (`flowsolve.solvers.exponential`). `Logistic(1)` is
uniform in the straight clock; on the straight path `Logistic(kappa)` is the uniform grid with the resolution shift κ
(Esser et al. 2024): a shift says how large the data are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolve.paths import Path

__all__ = ["Arctan", "Logistic"]

FAR = 700.0


@dataclass(frozen=True)
class _Warped:
    """Equal steps of a bounded increasing function of λ.

    Attributes:
        since: λ where the second node sits if the first has α = 0; None lets the function place it.
        until: λ of the last node before the end, where the end lies beyond it; None for the edge of the times that the
            network knows (a table's entry 0).
    """

    since: float | None = None
    until: float | None = None

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        if end < start:
            return self.times(path, end, start, steps)[::-1]
        edge = path.window[1] if self.until is None else min(path.window[1], path.time(self.until))
        first, last = start, edge if start < edge < end and steps > 1 else end
        tail = [end] if last < end else []
        if self.since is not None and steps > 1 + len(tail) and path.at(start).alpha == 0.0:
            first = path.time(self.since) if start < path.time(self.since) < last else start
        head = [start] if first > start else []
        inner = steps - len(head) - len(tail)
        a, b = self._forth(path.log_snr(first)), self._forth(path.log_snr(last))
        placed = [path.time(self._back((a * (inner - i) + b * i) / inner)) for i in range(1, inner)]
        return [*head, first, *placed, last, *tail]

    def _forth(self, log_snr: float) -> float:
        raise NotImplementedError

    def _back(self, u: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Logistic(_Warped):
    """Equal steps of α/(κα + σ), as of the logistic function of λ + log κ."""

    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.kappa < math.inf:
            raise ValueError(f"kappa = {self.kappa!r}; expected a finite number > 0, about the size of the data")

    def _forth(self, log_snr: float) -> float:
        return 1.0 / (self.kappa + math.exp(min(-log_snr, FAR)))

    def _back(self, u: float) -> float:
        return -math.log(max(1.0 / u - self.kappa, math.exp(-FAR)))


@dataclass(frozen=True)
class Arctan(_Warped):
    """Equal steps of arctan((λ − center)/width)."""

    center: float = 0.0
    width: float = 2.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center) and 0.0 < self.width < math.inf):
            raise ValueError(f"center = {self.center!r}, width = {self.width!r}; expected finite numbers, width > 0")

    def _forth(self, log_snr: float) -> float:
        if abs(log_snr) > FAR:  # the path's own way of saying infinite
            return math.copysign(0.5 * math.pi, log_snr)
        return math.atan((log_snr - self.center) / self.width)

    def _back(self, u: float) -> float:
        return self.center + self.width * math.tan(u)
