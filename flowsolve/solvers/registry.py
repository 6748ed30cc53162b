"""The registry of solvers: one name a class, for text, JSON, fingerprints, schedulers and the command line.

A solver of another package becomes known by `register`:

    @fs.solvers.register
    @dataclass(frozen=True)
    class Mine(fs.solvers.EstimateSolver): ...

Then `"mine"` and `"mine:order=3"` name it wherever a solver may be given as text, a diffusers `Scheduler` saves and
loads it, and long runs know it by its name.
"""

from __future__ import annotations

from typing import Any, TypeVar

from flowsolve._spelling import plain
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Solver

__all__ = ["REGISTERED", "find", "name_of", "register"]

Kind = TypeVar("Kind", bound=type[Any])

REGISTERED: dict[str, type[Any]] = {}
"""Plain name (lower case, no punctuation) → class."""


def register(kind: Kind) -> Kind:
    """Make a class of solvers known by its name; returns the class, so that it serves as a decorator.

    Args:
        kind: a subclass of `Solver`, itself a frozen dataclass.

    Raises:
        TypeError: something else.
        ValueError: a name that another class has, in any case and without punctuation.
    """
    if not (isinstance(kind, type) and issubclass(kind, Solver | Auto) and "__dataclass_params__" in vars(kind)):
        raise TypeError(
            f"register was given {kind!r}; expected a subclass of flowsolve.solvers.Solver, itself a dataclass"
        )
    settings: Any = vars(kind)["__dataclass_params__"]
    if not settings.frozen:
        raise TypeError(f"{kind.__name__} can be changed; expected a frozen dataclass, @dataclass(frozen=True)")
    name = plain(kind.__name__)
    known = REGISTERED.setdefault(name, kind)
    if known is not kind and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"{kind.__name__} is the name of {known.__module__}.{known.__qualname__} already; give the class another"
        )
    REGISTERED[name] = kind  # a class that is defined anew, in a notebook, takes its own place
    return kind


def find(name: str) -> type[Any] | None:
    """The class of a name, in any case and without punctuation; None if there is none."""
    return REGISTERED.get(plain(name))


def name_of(kind: type[Any]) -> str:
    """The name of a class of solvers: its own if that is registered, otherwise with its module."""
    return kind.__name__ if find(kind.__name__) is kind else f"{kind.__module__}.{kind.__qualname__}"
