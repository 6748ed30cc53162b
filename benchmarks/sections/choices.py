r"""Our solvers and grids that the comparison tries, and the rule `auto`.

**Grids.** On a mixture, and on images, most happens within a few units of log-SNR about the level where the noise is as
large as the data, and the field is flat on both sides. Two spacings put the steps there, with tails that reach ends
where λ is infinite without a window of λ to choose:

| spacing | equal steps of | density in λ |
|---|---|---|
| `Blend(kappa)` | $\alpha/(\kappa\alpha + \sigma)$, the clock of ẑ − κ ε̂ | $1/\cosh^2((\lambda + \log\kappa)/2)$ |
| `Bell(center, width)` | $\arctan((\lambda - c)/w)$ | $1/(1 + ((\lambda - c)/w)^2)$ |

`Blend(1)` is uniform in the straight clock; `Blend(kappa)` on the straight path is the uniform grid shifted by κ (Esser
et al. 2024), so that SD3's shift is a statement about the size of the data. Both end at `until` with their last
evaluation if it is given, and start with λ = `since` after a first step from an infinite one.

**Solvers.** The blend ẑ − κ ε̂ measures the state by κα + σ: the scale of the data plus that of the noise, which for
data of that size is as near to the exact solution as a linear form comes. In names, "blend" has κ = 0.3 and "low blend"
κ = 0.1; a number is the order of the predictor, "c" a corrector with as many nodes besides the end of the step, "λ" a
polynomial in the log-SNR instead of the clock of the form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowsolve.paths import Path
from flowsolve.solvers import IPNDM, Multistep

__all__ = ["Bell", "Blend", "Choice", "auto", "candidates"]

FAR = 700.0


@dataclass(frozen=True)
class _Warped:
    """Equal steps of a bounded function of λ, written as pairs of functions by subclasses.

    Attributes:
        since: λ of the second node where the first has λ = −∞; None for none.
        until: λ of the last evaluation but where the window of the network ends before; None for none.
    """

    since: float | None = None
    until: float | None = None

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        edge = min(end, path.window[1])
        first = start
        head, tail = [], []
        if self.since is not None and path.at(start).alpha == 0.0 and steps > 2:
            first = path.time(self.since)
            head = [start]
        if edge < end or (self.until is not None and path.log_snr(edge) > self.until):
            edge = edge if self.until is None else min(edge, path.time(self.until))
            tail = [end]
        inner = steps - len(head) - len(tail)
        a, b = self._forth(path.log_snr(first)), self._forth(path.log_snr(edge))
        placed = [path.time(self._back((a * (inner - i) + b * i) / inner)) for i in range(1, inner)]
        return [*head, first, *placed, edge, *tail]

    def _forth(self, lam: float) -> float:
        raise NotImplementedError

    def _back(self, u: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Blend(_Warped):
    """Equal steps of α/(κα + σ)."""

    kappa: float = math.exp(-1.0)

    def _forth(self, lam: float) -> float:
        return 1.0 / (self.kappa + math.exp(min(-lam, FAR)))

    def _back(self, u: float) -> float:
        return -math.log(1.0 / u - self.kappa)


@dataclass(frozen=True)
class Bell(_Warped):
    """Equal steps of arctan((λ − center)/width)."""

    center: float = 1.0
    width: float = 2.5

    def _forth(self, lam: float) -> float:
        return math.atan((lam - self.center) / self.width) if abs(lam) < FAR else math.copysign(0.5 * math.pi, lam)

    def _back(self, u: float) -> float:
        return self.center + self.width * math.tan(u)


@dataclass(frozen=True)
class Choice:
    """A solver on a grid.

    Attributes:
        solver: a solver.
        grid: a spacing.
        name: both, in words.
    """

    solver: Any
    grid: Any
    name: str


SOLVERS: dict[str, Callable[[], Any]] = {
    "blend 2c": lambda: Multistep(2, 0.3, 2, variable="clock"),
    "blend 2c λ": lambda: Multistep(2, 0.3, 2),
    "blend 3c": lambda: Multistep(3, 0.3, 3, variable="clock"),
    "blend 3c λ": lambda: Multistep(3, 0.3, 3),
    "blend 4c λ": lambda: Multistep(4, 0.3, 4),
    "low blend 2c λ": lambda: Multistep(2, 0.1, 2, rule="bh2"),
    "data 2c λ": lambda: Multistep(2, "data", 2),
    "straight 3c λ": lambda: Multistep(3, "straight", 3),
    "straight iPNDM2": lambda: IPNDM(2, "straight"),
    "straight iPNDM3": lambda: IPNDM(3, "straight"),
    "noise iPNDM3": lambda: IPNDM(3),
}


def _grids(path: Path) -> dict[str, Any]:
    if path.at(0.0).alpha > 0.0:
        return {
            "blend": Blend(),
            "blend to 3.8": Blend(until=3.8),
            "bell 1, 1.5": Bell(width=1.5),
            "bell 1, 1.5 to 3.8": Bell(width=1.5, until=3.8),
            "bell 0, 2.5": Bell(center=0.0),
            "bell 0, 2.5 to 3.8": Bell(center=0.0, until=3.8),
            "bell 0, 5": Bell(center=0.0, width=5.0),
            "bell 0.5, 5": Bell(center=0.5, width=5.0),
            "bell 1, 4": Bell(width=4.0),
            "bell 1, 4 to 3.8": Bell(width=4.0, until=3.8),
        }
    return {
        "blend": Blend(),
        "blend -2 to 3": Blend(since=-2.0, until=3.0),
        "blend -3 to 5": Blend(since=-3.0, until=5.0),
        "bell 1, 1.5": Bell(width=1.5),
        "bell 1, 2.5 -3 to 5": Bell(since=-3.0, until=5.0),
        "bell 0, 2.5 -4.4 to 6.2": Bell(center=0.0, since=-4.4, until=6.2),
    }


def candidates(path: Path) -> list[Choice]:
    """The pairs that are tried on a path: those that won somewhere when all solvers were tried on all grids."""
    pairs = BOUNDED_PAIRS if path.at(0.0).alpha > 0.0 else OPEN_PAIRS
    spacings = _grids(path)
    return [
        Choice(SOLVERS[solver](), spacings[grid], f"{solver} | {grid}")
        for solver, names in pairs.items()
        for grid in names
    ]


BOUNDED_PAIRS = {
    "blend 2c": ("blend to 3.8", "bell 1, 1.5 to 3.8", "bell 0, 2.5"),
    "blend 3c": ("bell 1, 1.5", "blend to 3.8"),
    "blend 3c λ": ("bell 1, 1.5", "bell 0, 2.5", "bell 1, 4 to 3.8", "bell 1, 4", "blend"),
    "blend 4c λ": ("bell 1, 1.5", "bell 0, 2.5", "bell 1, 4 to 3.8", "bell 1, 4"),
    "low blend 2c λ": ("bell 0, 5", "bell 0.5, 5", "bell 1, 4 to 3.8", "bell 0, 2.5 to 3.8"),
    "data 2c λ": ("blend to 3.8", "bell 1, 4 to 3.8"),
    "straight 3c λ": ("bell 0, 2.5",),
    "straight iPNDM2": ("bell 1, 4 to 3.8", "bell 0, 2.5"),
    "straight iPNDM3": ("bell 1, 4 to 3.8",),
    "noise iPNDM3": ("bell 1, 4 to 3.8", "blend to 3.8"),
}
OPEN_PAIRS = {
    "blend 2c": ("blend", "blend -2 to 3", "blend -3 to 5", "bell 1, 1.5", "bell 1, 2.5 -3 to 5"),
    "blend 2c λ": ("bell 1, 1.5",),
    "blend 3c": ("blend", "blend -3 to 5", "bell 1, 2.5 -3 to 5", "bell 0, 2.5 -4.4 to 6.2"),
    "blend 3c λ": ("bell 1, 1.5", "bell 1, 2.5 -3 to 5", "bell 0, 2.5 -4.4 to 6.2"),
    "blend 4c λ": ("bell 0, 2.5 -4.4 to 6.2",),
    "straight 3c λ": ("bell 1, 2.5 -3 to 5", "bell 0, 2.5 -4.4 to 6.2"),
    "straight iPNDM2": ("blend -2 to 3", "bell 1, 1.5"),
    "straight iPNDM3": ("bell 1, 1.5", "bell 1, 2.5 -3 to 5"),
}


def auto(path: Path, nfe: int) -> Choice:
    """The solver and grid for a path and a budget.

    | path | budget | solver | grid |
    |---|---|---|---|
    | α > 0 at the noise | to 7 | low blend 2c λ | bell 1, 4 to 3.8 |
    | | 8 to 12 | low blend 2c λ | bell 0.5, 5 |
    | | 13 to 29 | blend 3c λ | bell 1, 4 |
    | | from 30 | blend 4c λ | bell 1, 4 |
    | α = 0 at the noise | to 9 | blend 2c λ | bell 1, 1.5 |
    | | 10 to 15 | blend 3c λ | bell 1, 2.5 −3 to 5 |
    | | from 16 | blend 3c | bell 0, 2.5 −4.4 to 6.2 |
    """
    rules = BOUNDED_RULES if path.at(0.0).alpha > 0.0 else OPEN_RULES
    solver, grid = next((solver, grid) for most, solver, grid in rules if nfe <= most)
    return Choice(SOLVERS[solver](), _grids(path)[grid], f"auto: {solver} | {grid}")


BOUNDED_RULES = (
    (7, "low blend 2c λ", "bell 1, 4 to 3.8"),
    (12, "low blend 2c λ", "bell 0.5, 5"),
    (29, "blend 3c λ", "bell 1, 4"),
    (math.inf, "blend 4c λ", "bell 1, 4"),
)
OPEN_RULES = (
    (9, "blend 2c λ", "bell 1, 1.5"),
    (15, "blend 3c λ", "bell 1, 2.5 -3 to 5"),
    (math.inf, "blend 3c", "bell 0, 2.5 -4.4 to 6.2"),
)
