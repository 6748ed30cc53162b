r"""Transforms of ẑ, applied once, after whatever guidance there is.

With $\hat z' = f(\hat z)$ the noise estimate is $\hat\varepsilon' = (x - \alpha\hat z')/\sigma$, so that
$x = \alpha\hat z' + \sigma\hat\varepsilon'$ stays true and no solver sees a difference. At σ = 0 the state is the data,
$\hat z = x/\alpha$ whatever f says, and the estimate stays as it is.

**Dynamic thresholding** (Saharia et al. 2022), for data in [−1, 1]: let s be the p-quantile of $|\hat z|$ over the
numbers of a sample, at least 1; then $\hat z' = \operatorname{clip}(\hat z, -s, s)/s$. Other ranges [lo, hi] are
mapped to that one and back. Between order statistics the quantile is interpolated linearly, as `torch.quantile` does
(which takes 16 million numbers at most).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve.flow import Flow
from flowsolve.guidance.base import STRAIGHT, Guided, moved, require_flow, straight
from flowsolve.predictions import Row

__all__ = ["Clip", "Threshold", "Transformed"]

DATA = Row(1.0, 0.0)


@dataclass(frozen=True)
class Clip:
    """Clipping to a range.

    Attributes:
        low, high: its ends.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Clip({self.low!r}, {self.high!r}); expected low < high")

    def __call__(self, data: Tensor) -> Tensor:
        """clip(ẑ, low, high)."""
        return data.clamp(self.low, self.high)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022); see `flowsolve.guidance.transforms`.

    Attributes:
        quantile: p, in (0, 1].
        low, high: the range of the data.
        most: the largest s, in half ranges; inf for no limit.
    """

    quantile: float = 0.995
    low: float = -1.0
    high: float = 1.0
    most: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile <= 1.0:
            raise ValueError(f"quantile = {self.quantile!r}; expected a share in (0, 1]")
        if not self.low < self.high:
            raise ValueError(f"low = {self.low!r}, high = {self.high!r}; expected low < high, the range of the data")
        if not self.most >= 1.0:
            raise ValueError(f"most = {self.most!r}; expected a number >= 1")

    def __call__(self, data: Tensor) -> Tensor:
        """clip(ẑ, −s, s)/s, in the units in which the range is [−1, 1]."""
        middle, half = 0.5 * (self.low + self.high), 0.5 * (self.high - self.low)
        unit = (data - middle) / half
        s = quantile(rows(unit).abs(), self.quantile).clamp(1.0, self.most)
        s = s.reshape(-1, *[1] * (data.ndim - 1))
        return middle + half * (torch.minimum(torch.maximum(unit, -s), s) / s)


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of each row of (B, D), shape (B,), with linear interpolation."""
    place = share * (values.shape[1] - 1)
    below = math.floor(place)
    top = values.topk(values.shape[1] - below, dim=1).values
    low = top[:, -1]
    return low if place == below else torch.lerp(low, top[:, -2], place - below)


class Transformed(Guided):
    """A flow whose data estimate goes through a function.

    Args:
        flow: the flow, guided or not.
        function: from ẑ of shape (B, *S) to the same shape, sample by sample: `Threshold(…)`, `Clip(…)` or your own.

    Raises:
        TypeError: no flow, or no function.
        ValueError: in a solve, a function that returns another shape.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0, 1.0], [1.0, -1.0]], std=0.4).flow(fs.paths.CondOT())
        >>> clipped = fs.guidance.Transformed(flow, fs.guidance.Clip(-1.0, 1.0))
        >>> sol = fs.sample(clipped, (8, 2), solver=fs.solvers.DDIM(), nfe=9)
        >>> bool((sol.x.abs() <= 1.0 + 1e-6).all())
        True
    """

    def __init__(self, flow: Flow, function: Callable[[Tensor], Tensor]) -> None:
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"function is {function!r}; expected a function of ẑ, such as Threshold(0.995)")
        require_flow(flow)
        super().__init__(flow, STRAIGHT, flow.nfe_range)
        self.function = function

    def call(self, x: Tensor, t: float | Tensor, *, clock: Callable[[Any], Any] | None = None, **cond: Any) -> Tensor:
        """The output at (x, t) in the straight row, in x's dtype (float32 at least)."""
        point = self.path.at(t)
        found = self.base.read(x, self.base.call(x, t, clock=clock, **cond), point)
        data = found.data
        made = self.function(data)
        if not isinstance(made, Tensor) or made.shape != data.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"the function of ẑ returned {got} for {tuple(data.shape)}; expected the same shape")
        return moved(straight(self.base, x, found.output, point), point, DATA, made.to(data.dtype) - data)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        return {"function": self.function}

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", repr(self.function))
        return f"Transformed({self.base!r}, {name})"
