"""Solvers and grids as text: a name, and options behind a colon.

    unipc   unipc:order=2   dopri5:rtol=1e-4,atol=1e-4   churn:inner=heun,churn=40   log_snr   karras:rho=5   0,0.4,1

Names are those of the classes, in any case and without punctuation; `+` is `p`, so that dpm-solver++ is `DPMSolverPP`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from flowsolve import grids, solvers
from flowsolve.solvers import Auto, Solver

__all__ = ["SOLVERS", "grid", "solver"]

ABSTRACT = ("Solver", "EstimateSolver", "RungeKutta", "Adaptive")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().replace("+", "p") if c.isalnum())


SOLVERS: Mapping[str, Any] = {
    _plain(name): made
    for name in solvers.__all__
    if isinstance(made := getattr(solvers, name), type) and issubclass(made, Solver | Auto) and name not in ABSTRACT
}
"""Plain name → class."""


def solver(text: str) -> Solver | Auto:
    """A solver from its name and options.

    Raises:
        ValueError: an unknown name, option or value.

    Examples:
        >>> fs.runs.names.solver("dpm-solver++:order=3").order
        3
    """
    name, options = _parsed(text)
    if _plain(name) not in SOLVERS:
        known = ", ".join(sorted(made.__name__ for made in SOLVERS.values()))
        raise ValueError(f"solver {name!r} is not known; expected one of {known}, with options as in unipc:order=2")
    made = SOLVERS[_plain(name)]
    _check(made, name, options)
    if isinstance(options.get("inner"), str):
        options["inner"] = solver(options["inner"])
    try:
        return made(**options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"solver {text!r} has a value of the wrong kind: {error}") from error


def grid(text: str) -> Any:
    """A spacing from its name and options, or explicit flow times from numbers between commas.

    Raises:
        ValueError: an unknown name, option or value.
    """
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError:
        name, options = _parsed(text)
    else:
        return times
    if name not in grids.SPACINGS:
        known = ", ".join(grids.SPACINGS)
        raise ValueError(f"grid {name!r} is not known; expected one of {known}, or flow times as in 0,0.5,1")
    made: Any = grids.SPACINGS[name]
    _check(type(made), name, options)
    return replace(made, **options) if options else made


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of `name:key=value,…`."""
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{part!r} in {text!r} is no option; expected name:key=value,key=value")
        options[key.strip()] = _value(value.strip())
    return name.strip(), options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check(made: Any, name: str, options: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(made) if f.init]
    for key in options:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; expected one of {', '.join(known) or 'none'}")
