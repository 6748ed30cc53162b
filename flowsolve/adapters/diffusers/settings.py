"""A scheduler's own options, and how they stand in its configuration: as JSON, {"class": "UniPC", "order": 3, …}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowsolve import grids, solvers
from flowsolve.grids import At, Final, Grid
from flowsolve.solvers import Auto, Solver, names, registry

__all__ = ["INSTALL", "NOTE", "OPTIONS", "from_json", "merged", "named", "require_saveable", "to_json", "write_note"]

OPTIONS = ("solver", "grid", "chart", "final", "seed")
INSTALL = "pip install 'flowsolve[diffusers]', or in a copy of its repository pip install '.[diffusers]'"
"""In a saved configuration: what the scheduler needs. (Not where it lies on the machine that saved it.)"""
NOTE = "FLOWSOLVE.md"
TEXT = """\
# A scheduler of flowsolve

`model_index.json` of the pipeline that this folder belongs to names `{module}`. Install it,

    {install}

and import it before the pipeline is loaded, since diffusers imports no other package by itself:

    from flowsolve.adapters.diffusers import Scheduler

Without flowsolve the pipeline opens with diffusers' own scheduler, whose configuration this folder holds as well: in
`model_index.json`, write

    "scheduler": ["diffusers", "{name}"]
"""
"""Beside a saved configuration, for whoever opens it without this package: diffusers' error names the module alone."""
UNSAVED = "unsaved"
"""In a configuration, in the place of an option that has no JSON: why."""


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


def merged(
    given: Mapping[str, Any], live: Mapping[str, Any], before: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A scheduler's options, and the same as JSON.

    Args:
        given: what the caller gives; None where nothing.
        live: those of the scheduler that it is made from, if that is one of ours.
        before: those in the configuration, as JSON.

    Raises:
        ValueError: an option that the configuration could not hold.
    """
    options: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for option in OPTIONS:
        value = live.get(option) if given[option] is None else given[option]
        if value is None:
            said[option] = before.get(option, "auto" if option == "solver" else None)
            if isinstance(said[option], dict) and UNSAVED in said[option]:
                raise ValueError(f"the {option} of this configuration is not in it ({said[option][UNSAVED]}); give it")
            options[option] = from_json(said[option])
            continue
        options[option] = value
        try:
            said[option] = to_json(value)
        except TypeError as error:
            said[option] = {UNSAVED: str(error)}
    return options, said


def require_saveable(said: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that has no JSON, such as η as a function."""
    for option, value in said.items():
        if isinstance(value, dict) and UNSAVED in value:
            raise ValueError(f"the {option} cannot be saved: {value[UNSAVED]}")


def write_note(folder: Path, module: str, scheduler: str) -> None:
    """Say beside a saved configuration what it needs, and what diffusers' own scheduler of it is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(module=module, name=scheduler, install=INSTALL)
    (folder / NOTE).write_text(text, encoding="utf-8")


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
    found = registry.find(name) or getattr(solvers, name, None) or getattr(grids, name, None)
    good = isinstance(found, type) and (
        issubclass(found, Solver | Auto | Final | At | Grid | solvers.Controller) or hasattr(found, "times")
    )
    return found if good else None
