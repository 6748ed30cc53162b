r"""How integer images become the state a flow models: declared once on the flow, `Flow(..., transform=...)`.

An image of D integers $k \in \{0, …, L-1\}^D$ occupies, in **levels**, the cell $k + [0, 1)^D$. A transform carries a
point $v = k + u$ of it to the state $x = T(v)$, number by number and monotonically, so that a density $p$ of states
gives the integers the probability

$$ P(k) = \int_{[0,1)^D} p\bigl(T(k+u)\bigr)\,\bigl|\det T'(k+u)\bigr|\,du . $$

$\log|\det T'|$ is all there is between nats of the state and bits of the integers; no constant such as 7 or 8 is
written down anywhere. For a transform of slope $\Delta$ it is $D\log\Delta$, and the offset is $-\log_2\Delta$ bits a
dimension:

| transform | $T(v)$ | offset, bits/dim |
|---|---|---|
| `Range(0, 1)`, 256 levels | $v/256$ | 8 |
| `Range(-1, 1)`, 256 levels | $2v/256 - 1$ | 7 |
| `Range(-1, 1, levels=32)` (5 bits) | $2v/32 - 1$ | 4 |
| `Range(-1, 1, levels=17)` | $2v/17 - 1$ | $\log_2 17 - 1 = 3.087$ |
| `Range(-1, 1, centred=True)`, 256 levels | $2(v-\tfrac12)/255 - 1$ | $\log_2 255 - 1 = 6.994$ |
| `Range(0, 1).then(Normalize(mean, std))` | $(v/256 - m)/s$ | $8 + \overline{\log_2 s}$ |
| `Range(0, 1).then(Logit(alpha))` | $\operatorname{logit}(\alpha + (1-2\alpha)v/256)$ | differs from image to image |

`centred` is the map $2k/255 - 1$ of images that are scaled and never dequantised: the levels 0 and L−1 lie *on* the
ends of the range, and each cell reaches half a level to either side. It differs from the plain one by up to half a
level, which is nothing to the eye and everything to a likelihood.

The logit of squeezed data is that of RealNVP (Dinh et al. 2017) and MAF (Papamakarios et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowsolve._batch import rows

__all__ = ["Chain", "Elementwise", "Latent", "Logit", "Map", "Normalize", "Range", "Transform"]

LEVELS = 256  # of 8-bit images, where nothing else is said


class Map(Protocol):
    """A strictly monotonic map of each number of a state, behind the `Range` of a `Chain`."""

    def forward(self, y: Tensor) -> Tensor:
        """The mapped numbers, shape (B, *S)."""
        ...

    def inverse(self, x: Tensor) -> Tensor:
        """What `forward` maps to x, shape (B, *S)."""
        ...

    def log_slope(self, y: Tensor) -> Tensor:
        """log|dx/dy| of each number at y; a shape that broadcasts to (B, *S)."""
        ...


class Transform:
    """Integer levels to states and back, number by number. `levels` is their number if the transform fixes it."""

    levels: int | None = None

    def forward(self, values: Tensor, levels: int | None = None) -> Tensor:
        """The state at a point of a cell.

        Args:
            values: v = k + u with integers k and u in [0, 1), floating, shape (B, *S).
            levels: L, if the transform does not fix it; 256 if nothing does.
        """
        raise NotImplementedError

    def inverse(self, x: Tensor, levels: int | None = None) -> Tensor:
        """v = k + u of a state of shape (B, *S); outside [0, L) for a state that no image has."""
        raise NotImplementedError

    def log_slope(self, values: Tensor, levels: int | None = None) -> Tensor:
        """log|dx/dv| of each number, a shape that broadcasts to (B, *S)."""
        raise NotImplementedError

    def log_det(self, values: Tensor, levels: int | None = None) -> Tensor:
        """log|det T'(v)| of each sample, shape (B,)."""
        return rows(self.log_slope(values, levels).expand(values.shape)).sum(1)

    def ends(self, levels: int | None = None) -> tuple[float, float]:
        """Lowest and highest state that an image can have."""
        raise NotImplementedError

    def pixels(self, x: Tensor, levels: int | None = None) -> Tensor:
        """The image of a state: the level whose cell holds each number, uint8 where that suffices, else int32.

        Args:
            x: states of shape (B, *S), such as `Solution.x`; what lies beyond the levels becomes the first or the last.
            levels: L, as for `forward`.

        Raises:
            ValueError: a state that is not finite.
        """
        count = self.count(levels)
        bad = ~rows(x.isfinite()).all(1)
        if bool(bad.any()):
            raise ValueError(f"samples {_few(bad)} are not finite and have no image; leave them out: x[solution.ok]")
        k = self.inverse(_wide(x), levels).floor().clamp(0, count - 1)
        return k.to(torch.uint8 if count <= 256 else torch.int32)

    def count(self, levels: int | None = None) -> int:
        """L: the levels given, those the transform fixes, or 256.

        Raises:
            ValueError: both say it and they differ, or there are less than 2.
        """
        if levels is not None and self.levels is not None and levels != self.levels:
            raise ValueError(f"levels = {levels}, but the flow's transform {self!r} fixes {self.levels}; drop levels=")
        count = next((n for n in (levels, self.levels) if n is not None), LEVELS)
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise ValueError(f"levels = {count!r}; expected an integer of at least 2")
        return count

    def then(self, *maps: Map) -> Chain:
        """This transform with more maps behind it."""
        return Chain(self, *maps)


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
            value = getattr(self, name)
            if isinstance(value, Tensor | Sequence):  # hashable, and nobody's to change
                object.__setattr__(self, name, tuple(float(v) for v in value))
        numbers = self.std if isinstance(self.std, tuple) else (self.std,)
        if not all(math.isfinite(s) and s > 0 for s in numbers):
            raise ValueError(f"std = {self.std!r}; expected finite numbers > 0")

    @property
    def channels(self) -> int:
        """How many channels there are numbers for; 1 if the same serve any number of them."""
        return max(len(v) if isinstance(v, tuple) else 1 for v in (self.mean, self.std))

    def forward(self, y: Tensor) -> Tensor:
        """(y − mean)/std."""
        return (y - _channels(self.mean, y)) / _channels(self.std, y)

    def inverse(self, x: Tensor) -> Tensor:
        """mean + std·x."""
        return _channels(self.mean, x) + _channels(self.std, x) * x

    def log_slope(self, y: Tensor) -> Tensor:
        """−log std."""
        return -_channels(self.std, y).log()


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


class Chain(Transform):
    """A transform and maps behind it, applied in order; log-slopes add.

    Args:
        first: what the levels meet first, as a rule a `Range`.
        *maps: `Normalize`, `Logit`, `Elementwise`, or any `Map`.
    """

    def __init__(self, first: Transform, *maps: Map) -> None:
        if not isinstance(first, Transform):
            raise TypeError(f"first is {first!r}; a chain starts with a transform of levels such as Range(0, 1)")
        for m in maps:
            if not all(callable(getattr(m, name, None)) for name in ("forward", "inverse", "log_slope")):
                raise TypeError(f"{m!r} is no map; expected forward, inverse and log_slope, such as Normalize or Logit")
        self.first, self.maps = first, maps
        self.levels = first.levels

    def __repr__(self) -> str:
        return f"{self.first!r}.then({', '.join(map(repr, self.maps))})"

    def forward(self, values: Tensor, levels: int | None = None) -> Tensor:
        x = self.first.forward(values, levels)
        for m in self.maps:
            x = m.forward(x)
        return x

    def inverse(self, x: Tensor, levels: int | None = None) -> Tensor:
        for m in reversed(self.maps):
            x = m.inverse(x)
        return self.first.inverse(x, levels)

    def log_slope(self, values: Tensor, levels: int | None = None) -> Tensor:
        x, total = self.first.forward(values, levels), self.first.log_slope(values, levels)
        for m in self.maps:
            total = total + m.log_slope(x)
            x = m.forward(x)
        return total

    def ends(self, levels: int | None = None) -> tuple[float, float]:
        reached = torch.tensor([self.first.ends(levels)], dtype=torch.float64).T
        reached = reached.expand(2, max((getattr(m, "channels", 1) for m in self.maps), default=1))
        for m in self.maps:
            reached = m.forward(reached)
        return float(reached.min()), float(reached.max())


@dataclass(frozen=True)
class Latent:
    """The state is a scaled code of an autoencoder, x = (code − shift)·scale, not an image.

    Such a flow has a density of codes, and no bits per dimension of pixels: the code of an image is not the image, the
    decoder is not invertible, and what it adds to the likelihood is no part of the flow. `bits_per_dim` says so.

    Attributes:
        scale: the factor (0.18215 of Stable Diffusion's autoencoder).
        shift: what is subtracted first, a number.
    """

    scale: float
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale != 0.0 and math.isfinite(self.shift)):
            raise ValueError(f"scale = {self.scale!r}, shift = {self.shift!r}; expected finite numbers, scale not 0")

    def forward(self, code: Tensor) -> Tensor:
        """The state of a code."""
        return (code - self.shift) * self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """The code of a state, for the decoder."""
        return x / self.scale + self.shift

    def pixels(self, x: Tensor, levels: int | None = None) -> Tensor:
        """Raises ValueError: a code is decoded first."""
        raise ValueError(
            f"the flow models codes of an autoencoder ({self!r}); decode them: decoder(flow.transform.inverse(x))"
        )

    def ends(self, levels: int | None = None) -> tuple[float, float]:
        """Codes have no range: (−∞, ∞)."""
        return -math.inf, math.inf


def _channels(numbers: float | Sequence[float], like: Tensor) -> Tensor:
    """One number, or one a channel, in a shape that broadcasts to (B, C, …)."""
    c = torch.as_tensor(numbers, dtype=like.dtype, device=like.device)
    if c.ndim == 0:
        return c
    if like.ndim < 2 or like.shape[1] != len(c):
        raise ValueError(f"{len(c)} channels of Normalize met states of shape {tuple(like.shape)}; expected (B, C, …)")
    return c.reshape(-1, *[1] * (like.ndim - 2))


def _wide(x: Tensor) -> Tensor:
    """x in float64, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _few(mask: Tensor) -> str:
    """The first of the numbers at which a mask of shape (B,) is true."""
    which = mask.nonzero().flatten().tolist()
    return ", ".join(map(str, which[:5])) + (f", … ({len(which)} of {len(mask)})" if len(which) > 5 else "")
