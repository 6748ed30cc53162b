"""Maps of the numbers of a state, for a `Chain`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from flowsolve.transforms.base import channels, numbers

__all__ = ["Elementwise", "Logit", "Normalize"]


@dataclass(frozen=True)
class Normalize:
    """(y − mean)/std, numbers or one for each channel (the dimension after the batch), as torchvision's.

    Attributes:
        mean: one number, or C of them.
        std: one number > 0, or C of them.
    """

    mean: float | Sequence[float]
    std: float | Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, numbers(getattr(self, name)))
        stds = self.std if isinstance(self.std, tuple) else (self.std,)
        if not all(math.isfinite(s) and s > 0 for s in stds):
            raise ValueError(f"std = {self.std!r}; expected finite numbers > 0")

    @property
    def channels(self) -> int:
        """How many channels there are numbers for; 1 if the same serve any number of them."""
        return max(len(v) if isinstance(v, tuple) else 1 for v in (self.mean, self.std))

    def forward(self, y: Tensor) -> Tensor:
        """(y − mean)/std."""
        return (y - channels(self.mean, y, self)) / channels(self.std, y, self)

    def inverse(self, x: Tensor) -> Tensor:
        """mean + std·x."""
        return channels(self.mean, x, self) + channels(self.std, x, self) * x

    def log_slope(self, y: Tensor) -> Tensor:
        """−log std."""
        return -channels(self.std, y, self).log()


@dataclass(frozen=True)
class Logit:
    """logit(α + (1 − 2α) y) for y in [0, 1], so behind `Range(0, 1)`: states on all of the line.

    Attributes:
        alpha: how far the ends are kept from 0 and 1.
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 0.5:
            raise ValueError(f"alpha = {self.alpha!r}; expected 0 <= alpha < 0.5")

    def forward(self, y: Tensor) -> Tensor:
        """The logit."""
        s = self.alpha + (1.0 - 2.0 * self.alpha) * y
        return s.log() - (-s).log1p()

    def inverse(self, x: Tensor) -> Tensor:
        """(sigmoid(x) − α)/(1 − 2α)."""
        return (x.sigmoid() - self.alpha) / (1.0 - 2.0 * self.alpha)

    def log_slope(self, y: Tensor) -> Tensor:
        """log(1 − 2α) − log s(1 − s)."""
        s = self.alpha + (1.0 - 2.0 * self.alpha) * y
        return math.log(1.0 - 2.0 * self.alpha) - s.log() - (-s).log1p()


@dataclass(frozen=True)
class Elementwise:
    """A strictly monotonic function of your own, of each number.

    Attributes:
        function: y → x, shape (B, *S).
        inverted: x → y.
        log_derivative: y → log|dx/dy| of each number.

    Examples:
        >>> cubic = fs.transforms.Elementwise(lambda y: y**3, lambda x: x ** (1 / 3), lambda y: (3 * y**2).log())
        >>> transform = fs.transforms.Range(1, 2).then(cubic)
        >>> transform.forward(torch.tensor([[128.0]]))  # 1.5³
        tensor([[3.3750]])
    """

    function: Callable[[Tensor], Tensor]
    inverted: Callable[[Tensor], Tensor]
    log_derivative: Callable[[Tensor], Tensor]

    def forward(self, y: Tensor) -> Tensor:
        """function(y)."""
        return self.function(y)

    def inverse(self, x: Tensor) -> Tensor:
        """inverted(x)."""
        return self.inverted(x)

    def log_slope(self, y: Tensor) -> Tensor:
        """log_derivative(y)."""
        return self.log_derivative(y)
