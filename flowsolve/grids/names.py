"""Spacings by their names; as text with options, `karras:rho=5`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from flowsolve._spelling import known, parsed
from flowsolve.grids.base import Grid, Spacing
from flowsolve.grids.explicit import At
from flowsolve.grids.spacings import Beta, Karras, LogSNR, Polyexponential, Quadratic, Uniform
from flowsolve.grids.tables import Timesteps
from flowsolve.grids.warped import Arctan, Logistic

__all__ = ["SPACINGS", "grid", "resolve"]

SPACINGS: dict[str, Spacing] = {
    "uniform": Uniform(),
    "log_snr": LogSNR(),
    "karras": Karras(),
    "quadratic": Quadratic(),
    "polyexponential": Polyexponential(),
    "beta": Beta(),
    "logistic": Logistic(),
    "arctan": Arctan(),
    "leading": Timesteps("leading"),
    "trailing": Timesteps("trailing"),
    "linspace": Timesteps("linspace"),
}


def resolve(grid: str | Spacing | At | Grid | Sequence[float] | Tensor) -> Spacing | At | list[float]:
    """A spacing by its name, itself, `At`, or a list of explicit times."""
    if isinstance(grid, str):
        if grid not in SPACINGS:
            names = ", ".join(SPACINGS)
            raise ValueError(f"grid = {grid!r} is not known; expected one of {names}, a spacing, or explicit times")
        return SPACINGS[grid]
    if isinstance(grid, At):
        return grid
    if isinstance(grid, Grid):
        return list(grid.times)
    if isinstance(grid, type):
        raise TypeError(f"grid is the class {grid.__name__}; pass an instance, {grid.__name__}(…)")
    if hasattr(grid, "times"):
        return grid
    if not hasattr(grid, "__iter__"):
        raise TypeError(f"grid is a {type(grid).__name__}; expected a name, a spacing or a sequence of times")
    return [float(t) for t in grid]


def grid(text: str) -> Any:
    """A spacing from its name and options, or explicit flow times from numbers between commas.

    Raises:
        ValueError: an unknown name, option or value.

    Examples:
        >>> from flowsolve.grids import names
        >>> names.grid("karras:rho=5").rho, names.grid("0,0.5,1")
        (5, [0.0, 0.5, 1.0])
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        name, options = parsed(text)
    if name not in SPACINGS:
        listed = ", ".join(SPACINGS)
        raise ValueError(f"grid = {name!r} is not known; expected one of {listed}, or flow times as in 0,0.5,1")
    made: Any = SPACINGS[name]
    known(type(made), name, options)
    return replace(made, **options) if options else made
