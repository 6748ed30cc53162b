"""Solvers as text, for command lines and configurations: a name, and options behind a colon.

    unipc   unipc:order=2   dopri5:rtol=1e-4,atol=1e-4   churn:inner=heun,churn=40

Names are those of the classes, in any case and without punctuation; `+` is `p`, so that dpm-solver++ is `DPMSolverPP`.
Grids as text are in `flowsolve.grids.names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowsolve import solvers
from flowsolve._spelling import known, parsed, plain
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Solver

__all__ = ["SOLVERS", "solver"]

ABSTRACT = ("Solver", "EstimateSolver", "RungeKutta", "Adaptive")

SOLVERS: Mapping[str, Any] = {
    plain(name): made
    for name in solvers.__all__
    if isinstance(made := getattr(solvers, name), type) and issubclass(made, Solver | Auto) and name not in ABSTRACT
}
"""Plain name → class."""


def solver(text: str) -> Solver | Auto:
    """A solver from its name and options.

    Raises:
        ValueError: an unknown name, option or value.

    Examples:
        >>> from flowsolve.solvers import names
        >>> names.solver("dpm-solver++:order=3").order
        3
    """
    name, options = parsed(text)
    if plain(name) not in SOLVERS:
        listed = ", ".join(sorted(made.__name__ for made in SOLVERS.values()))
        raise ValueError(f"solver = {name!r} is not known; expected one of {listed}, with options as in unipc:order=2")
    made = SOLVERS[plain(name)]
    known(made, name, options)
    if isinstance(options.get("inner"), str):
        options["inner"] = solver(options["inner"])
    try:
        return made(**options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"solver {text!r} has a value of the wrong kind: {error}") from error
