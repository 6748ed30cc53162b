"""Solvers and grids as JSON, {"class": "UniPC", "order": 3, …}, for a scheduler's configuration; solvers by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from flowsolve import grids, solvers
from flowsolve.grids import At, Final, Grid
from flowsolve.solvers import Auto, Solver, names

__all__ = ["from_json", "named", "to_json"]


def named(solver: Any) -> Any:
    """A solver from its name and options (`flowsolve.solvers.names`), or itself.

    Raises:
        ValueError: an unknown name, option or value.
        TypeError: something that is no solver.
    """
    if isinstance(solver, str):
        return names.solver(solver)
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {solver.__name__}; pass an instance, {solver.__name__}()")
    if not isinstance(solver, Solver | Auto):
        raise TypeError(f"solver is a {type(solver).__name__}; expected a name, or a solver such as solvers.UniPC(3)")
    return solver


def to_json(value: Any) -> Any:
    """A solver, a grid, a policy or a plain value as JSON.

    Raises:
        TypeError: a function among its settings, or a class that is not one of the package's.
    """
    if isinstance(value, At):
        return {"class": "At", value.coordinate: list(value.values)}
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if _class(name) is not type(value):
            raise TypeError(f"{value!r} is not of flowsolve's own classes and cannot be saved by its name")
        return {"class": name, **{f.name: to_json(getattr(value, f.name)) for f in fields(value) if f.init}}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(v) for v in value]
    try:
        json.dumps(value)
    except TypeError:
        raise TypeError(f"{value!r} has no JSON, so what it is a setting of cannot be saved; give a number") from None
    return value


def from_json(value: Any) -> Any:
    """What `to_json` was given; lists become tuples.

    Raises:
        ValueError: a class that is not known.
    """
    if isinstance(value, list | tuple):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    found = _class(str(value.get("class")))
    if found is None:
        raise ValueError(f"{value.get('class')!r} is not a solver, grid or policy of flowsolve; expected one of those")
    return found(**{k: from_json(v) for k, v in value.items() if k != "class"})


def _class(name: str) -> type[Any] | None:
    """A class of solvers, grids or policies by its name."""
    found = getattr(solvers, name, None) or getattr(grids, name, None)
    good = isinstance(found, type) and (
        issubclass(found, Solver | Auto | Final | At | Grid | solvers.Controller) or hasattr(found, "times")
    )
    return found if good else None
