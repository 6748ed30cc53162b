"""Levels on an interval, and codes of an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsolve.transforms.base import Transform, channels, numbers

__all__ = ["Latent", "Range"]


@dataclass(frozen=True)
class Range(Transform):
    """The levels side by side on an interval: x = lo + (hi − lo) v/L.

    Attributes:
        lo: lower end of the first cell.
        hi: upper end of the last cell.
        levels: L, if it belongs to the data once and for all (17 for scikit-learn's digits).
        centred: levels 0 and L−1 lie on lo and hi instead: x = lo + (hi − lo) (v − ½)/(L − 1), so that the integer k
            itself, the centre of its cell, is at lo + (hi − lo) k/(L − 1).

    Examples:
        >>> middles = torch.tensor([[0, 255]]) + 0.5
        >>> fs.transforms.Range(-1, 1).forward(middles)
        tensor([[-0.9961,  0.9961]])
        >>> fs.transforms.Range(-1, 1, centred=True).forward(middles)
        tensor([[-1.0000,  1.0000]])
    """

    lo: float = -1.0
    hi: float = 1.0
    levels: int | None = None
    centred: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise ValueError(f"the range ({self.lo!r}, {self.hi!r}); expected finite numbers with low < high")
        self.count()

    def _affine(self, levels: int | None) -> tuple[float, float]:
        """Slope and the state at v = 0."""
        count = self.count(levels)
        slope = (self.hi - self.lo) / (count - 1 if self.centred else count)
        return slope, self.lo - 0.5 * slope if self.centred else self.lo

    def forward(self, values: Tensor, levels: int | None = None) -> Tensor:
        slope, start = self._affine(levels)
        return start + slope * values

    def inverse(self, x: Tensor, levels: int | None = None) -> Tensor:
        slope, start = self._affine(levels)
        return (x - start) / slope

    def log_slope(self, values: Tensor, levels: int | None = None) -> Tensor:
        return torch.full((), math.log(self._affine(levels)[0]), dtype=values.dtype, device=values.device)

    def ends(self, levels: int | None = None) -> tuple[float, float]:
        slope, start = self._affine(levels)
        return start, start + slope * self.count(levels) if self.centred else self.hi


@dataclass(frozen=True)
class Latent:
    """The state is a scaled code of an autoencoder, x = (code − shift)·scale, not an image.

    Such a flow has a density of codes, and no bits per dimension of pixels: the code of an image is not the image, the
    decoder is not invertible, and what it adds to the likelihood is no part of the flow. `bits_per_dim` says so.

    Attributes:
        scale: the factor (0.18215 of Stable Diffusion's autoencoder), a number or one a channel.
        shift: what is subtracted first, a number or one a channel.
    """

    scale: float | Sequence[float]
    shift: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            object.__setattr__(self, name, numbers(getattr(self, name)))
        scales, shifts = (v if isinstance(v, tuple) else (v,) for v in (self.scale, self.shift))
        if not all(math.isfinite(s) and s != 0.0 for s in scales) or not all(map(math.isfinite, shifts)):
            raise ValueError(f"scale = {self.scale!r}, shift = {self.shift!r}; expected finite numbers, scale not 0")

    def forward(self, code: Tensor) -> Tensor:
        """The state of a code."""
        return (code - channels(self.shift, code, self)) * channels(self.scale, code, self)

    def inverse(self, x: Tensor) -> Tensor:
        """The code of a state, for the decoder."""
        return x / channels(self.scale, x, self) + channels(self.shift, x, self)

    def pixels(self, x: Tensor, levels: int | None = None) -> Tensor:
        """Raises ValueError: a code is decoded first."""
        raise ValueError(
            f"the flow models codes of an autoencoder ({self!r}); decode them: decoder(flow.transform.inverse(x))"
        )

    def ends(self, levels: int | None = None) -> tuple[float, float]:
        """Codes have no range: (−∞, ∞)."""
        return -math.inf, math.inf
