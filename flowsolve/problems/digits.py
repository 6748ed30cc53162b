r"""The 8×8 handwritten digits of scikit-learn: a real image problem small enough for one core.

1,797 grey images of 8×8 pixels with the 17 integer levels 0 … 16 (the test part of UCI's *Optical Recognition
of Handwritten Digits*, Alpaydin & Kaynak 1998, as `sklearn.datasets.load_digits` ships it; nothing is
downloaded).

**Split.** Image $i$ is ranked by the SHA-256 digest of its index written in decimal; the first 300 in that
order are held out and the other 1,497 are for training. The split hangs on no library's random generator.

**Levels.** An integer $k$ becomes $x = 2\,(k + u)/17 - 1$ with $u$ uniform on $[0, 1)$, so that level $k$
owns an interval of width $2/17$ and the density of $x$ bounds the probability of the integers
(Theis, van den Oord & Bethge 2016):

$$ \log_2 P(k) \ge \mathbb E_u\,\log_2\bigl[p(x)\,(2/17)^{64}\bigr]. $$
"""

from __future__ import annotations

from hashlib import sha256
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowsolve._batch import hosted
from flowsolve._optional import require
from flowsolve.transforms import Range

__all__ = ["HELD_OUT", "LEVELS", "TRANSFORM", "Digits", "dequantize", "load", "quantize"]

LEVELS = 17
HELD_OUT = 300
TRANSFORM = Range(-1.0, 1.0, levels=LEVELS)
"""Levels to states, as flows of digits declare it."""


class Digits(NamedTuple):
    """Images, uint8 of shape (N, 1, 8, 8) with levels 0 … 16, and their labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor


def load(split: Literal["train", "held_out", "all"] = "train") -> Digits:
    """The digits of one part of the fixed split: "train" (1,497), "held_out" (300) or "all" (1,797), in file
    order.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an unknown split.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split = {split!r}; expected 'train', 'held_out' or 'all'")
    bunch = require("sklearn.datasets", "train", "the digits data set").load_digits()
    images = hosted(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = hosted(bunch.target).to(torch.int64)
    if split == "all":
        return Digits(images, labels)
    ranked = sorted(range(len(images)), key=lambda i: sha256(str(i).encode()).digest())
    keep = torch.tensor(sorted(ranked[HELD_OUT:] if split == "train" else ranked[:HELD_OUT]), device="cpu")
    return Digits(images[keep], labels[keep])


def dequantize(images: Tensor, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x = 2 (k + u)/17 − 1 with fresh uniform u: integer levels of shape (N, *S) to floats in [−1, 1).

    Raises:
        TypeError: images are not integers.
        ValueError: a level outside 0 … 16.
    """
    if images.dtype.is_floating_point or images.dtype.is_complex or images.dtype == torch.bool:
        raise TypeError(f"images have dtype {images.dtype}; expected the integer levels 0 … {LEVELS - 1}")
    if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < LEVELS:
        raise ValueError(f"levels run from {int(images.min())} to {int(images.max())}; expected 0 … {LEVELS - 1}")
    place = generator.device if generator is not None else images.device
    u = torch.rand(images.shape, generator=generator, device=place, dtype=dtype).to(images.device)
    return 2.0 * (images.to(dtype) + u) / LEVELS - 1.0


def quantize(x: Tensor) -> Tensor:
    """The level whose interval holds x, uint8, clamped to 0 … 16; the inverse of `dequantize`."""
    return (0.5 * (x + 1.0) * LEVELS).floor().clamp(0, LEVELS - 1).to(torch.uint8)
