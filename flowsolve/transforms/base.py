"""What a transform of levels answers, and transforms with maps behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowsolve._batch import rows

__all__ = ["Chain", "Map", "Transform"]

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
        reached = torch.tensor([self.first.ends(levels)], dtype=torch.float64, device="cpu").T
        reached = reached.expand(2, max((getattr(m, "channels", 1) for m in self.maps), default=1))
        for m in self.maps:
            reached = m.forward(reached)
        return float(reached.min()), float(reached.max())


def numbers(value: Any) -> Any:
    """A number as it is; several as a tuple, hashable and nobody's to change."""
    return tuple(float(v) for v in value) if isinstance(value, Tensor | Sequence) else value


def channels(value: float | Sequence[float], like: Tensor, whose: Any) -> Tensor:
    """One number, or one a channel, in a shape that broadcasts to (B, C, …)."""
    c = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if c.ndim == 0:
        return c
    if like.ndim < 2 or like.shape[1] != len(c):
        kind = type(whose).__name__
        raise ValueError(f"{len(c)} channels of {kind} met states of shape {tuple(like.shape)}; expected (B, C, …)")
    return c.reshape(-1, *[1] * (like.ndim - 2))


def _wide(x: Tensor) -> Tensor:
    """x in float64, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _few(mask: Tensor) -> str:
    """The first of the numbers at which a mask of shape (B,) is true."""
    which = mask.nonzero().flatten().tolist()
    return ", ".join(map(str, which[:5])) + (f", … ({len(which)} of {len(mask)})" if len(which) > 5 else "")
