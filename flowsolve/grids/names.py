"""Spacings by their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowsolve.grids.base import Grid, Spacing
from flowsolve.grids.explicit import At
from flowsolve.grids.spacings import Beta, Karras, LogSNR, Polyexponential, Quadratic, Uniform
from flowsolve.grids.tables import Timesteps
from flowsolve.grids.warped import Arctan, Logistic

__all__ = ["SPACINGS", "resolve"]

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
