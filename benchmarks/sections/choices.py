r"""Our solvers and grids that the comparison tries.

**Grids.** `bell` is `flowsolve.grids.Arctan` and `blend` is `flowsolve.grids.Logistic`, both dense where noise and data
are of one size. In names, "to 3.8" is the log-SNR of the last evaluation, and "-3 to 5" those of the second and last.

**Solvers.** The blend ẑ − κ ε̂ measures the state by κα + σ: the scale of the data plus that of the noise, which for
data of that size is as near to the exact solution as a linear form comes. In names, "blend" has κ = 0.3 and "low blend"
κ = 0.1; a number is the order of the predictor, "c" a corrector with as many nodes besides the end of the step, "λ" a
polynomial in the log-SNR instead of the clock of the form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from flowsolve.grids import Arctan, Logistic
from flowsolve.paths import Path
from flowsolve.solvers import DEIS, IPNDM, Auto, DPMSolverPP, Multistep, UniPC

__all__ = ["Choice", "auto", "candidates", "plain", "wide"]

bell = partial(Arctan, center=1.0, width=2.5)
blend = partial(Logistic, kappa=math.exp(-1.0))


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
            "blend": blend(),
            "blend to 3.8": blend(until=3.8),
            "bell 1, 1.5": bell(width=1.5),
            "bell 1, 1.5 to 3.8": bell(width=1.5, until=3.8),
            "bell 0, 2.5": bell(center=0.0),
            "bell 0, 2.5 to 3.8": bell(center=0.0, until=3.8),
            "bell 0, 5": bell(center=0.0, width=5.0),
            "bell 0.5, 5": bell(center=0.5, width=5.0),
            "bell 1, 4": bell(width=4.0),
            "bell 1, 4 to 3.8": bell(width=4.0, until=3.8),
        }
    return {
        "blend": blend(),
        "blend -2 to 3": blend(since=-2.0, until=3.0),
        "blend -3 to 5": blend(since=-3.0, until=5.0),
        "bell 1, 1.5": bell(width=1.5),
        "bell 1, 2.5 -3 to 5": bell(since=-3.0, until=5.0),
        "bell 0, 2.5 -4.4 to 6.2": bell(center=0.0, since=-4.4, until=6.2),
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


def plain(path: Path) -> list[Choice]:
    """The named solvers on the named grids, as a careful user would try them."""
    named: dict[str, Any] = {
        "DEIS 2": DEIS(2),
        "DEIS 3": DEIS(3),
        "DPM-Solver++ 2": DPMSolverPP(2),
        "DPM-Solver++ 3": DPMSolverPP(3),
        "UniPC 2": UniPC(2),
        "UniPC 3": UniPC(3),
        "UniPC 3 noise": UniPC(3, form="noise"),
    }
    return [Choice(s, g, f"{name} | {g}") for name, s in named.items() for g in ("log_snr", "karras", "uniform")]


def wide(path: Path) -> list[Choice]:
    """Pairs that won on one problem or another of `sections/fields.py`, most of which has structure at every scale."""
    rows = BOUNDED_WIDE if path.at(0.0).alpha > 0.0 else OPEN_WIDE
    return [_named(*row) for row in rows]


def _named(order: int, form: Any, corrected: bool, variable: str, rule: str, *places: float | None) -> Choice:
    center, width, since, until = places
    assert center is not None
    assert width is not None
    solver = Multistep(order, form, order if corrected else 0, variable=variable, rule=rule)
    ends = "".join(f" {word} {v:g}" for word, v in (("from", since), ("to", until)) if v is not None)
    words = f"{form} {order}{'c' if corrected else ''}{' λ' if variable == 'log_snr' else ''} {rule}"
    return Choice(solver, Arctan(since, until, center, width), f"{words} | bell {center:g}, {width:g}{ends}")


OPEN_WIDE: tuple[tuple[Any, ...], ...] = (
    (2, 0.5, True, "log_snr", "exact", -1.0, 4.2, -2.0, 3.0),
    (2, 1.0, True, "log_snr", "exact", 0.0, 2.5, -2.0, 3.0),
    (3, 0.5, False, "clock", "exact", 0.5, 1.5, -2.0, None),
    (2, 0.3, True, "log_snr", "exact", 2.0, 2.5, -2.0, 3.0),
    (2, 0.7, True, "log_snr", "exact", 0.0, 4.0, -3.0, 4.1),
    (2, 0.2, True, "log_snr", "bh2", 0.0, 6.0, -2.5, 5.0),
    (2, 0.2, True, "log_snr", "exact", -1.0, 4.0, -3.0, 5.0),
    (2, 0.1, True, "log_snr", "bh2", 2.0, 10.0, -3.0, 3.8),
    (2, 0.2, True, "log_snr", "bh2", 2.0, 6.0, -3.5, 5.0),
    (2, 0.1, True, "clock", "exact", 0.0, 2.5, -2.0, 5.6),
    (4, 0.3, True, "log_snr", "exact", 0.0, 4.0, -4.0, 5.6),
    (4, 0.3, True, "clock", "exact", 0.5, 2.5, -3.5, 6.2),
    (4, 1.0, True, "clock", "exact", 0.5, 2.5, -4.0, 4.4),
    (4, 0.5, True, "clock", "exact", -1.0, 6.0, -4.0, 5.6),
)
BOUNDED_WIDE: tuple[tuple[Any, ...], ...] = (
    (3, 0.5, True, "log_snr", "exact", -1.0, 6.0, None, 3.0),
    (3, 1.0, True, "log_snr", "exact", 1.0, 4.0, None, 3.0),
    (3, 0.2, True, "log_snr", "exact", 1.0, 6.0, None, 3.0),
    (2, 0.3, False, "log_snr", "exact", 2.0, 4.0, None, 5.0),
    (2, 0.2, True, "log_snr", "exact", 1.5, 6.0, None, 3.8),
    (2, 0.2, True, "log_snr", "exact", 0.0, 4.0, None, None),
    (2, 0.2, True, "log_snr", "bh2", 2.0, 6.0, None, 5.6),
    (4, 0.2, True, "log_snr", "exact", 0.0, 4.0, None, 5.0),
    (4, 0.5, True, "log_snr", "exact", 0.0, 6.0, None, 5.6),
    (4, 1.0, True, "log_snr", "exact", 0.5, 6.0, None, None),
    (4, 0.5, True, "log_snr", "exact", 0.0, 2.5, None, 5.0),
)


def auto(path: Path, nfe: int) -> Choice:
    """What `solver="auto"` chooses."""
    return Choice(*Auto().choose(path, nfe), "auto")
