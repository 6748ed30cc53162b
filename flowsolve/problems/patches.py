r"""Patches of 32 × 32 pixels of photographs: natural images, with structure at every scale, and no download.

The photographs ship with scikit-image (astronaut, coffee, rocket, motorcycle; held out: chelsea), scikit-learn (flower;
held out: china) and matplotlib (grace_hopper). Each is also shrunk 2 and 3 times by a box filter. A patch is a square
of one of them, flipped or not; its label is the number of its photograph in `TRAIN`.

**Split.** Photographs are trained on or held out as a whole: patches of one photograph resemble each other.

**Levels.** An integer $k$ of 0 … 255 becomes $x = 2\,(k + u)/256 - 1$ with $u$ uniform on $[0, 1)$, so that the density
of $x$ bounds the probability of the integers (Theis, van den Oord & Bethge 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowsolve._optional import require
from flowsolve.transforms import Range

__all__ = [
    "HELD_OUT",
    "SHRUNK",
    "SIZE",
    "TRAIN",
    "TRANSFORM",
    "Patches",
    "dequantize",
    "draw",
    "lattice",
    "photographs",
]

SIZE = 32
SHRUNK = (1, 2, 3)
TRAIN = ("astronaut", "coffee", "rocket", "motorcycle", "flower", "grace_hopper")
HELD_OUT = ("chelsea", "china")
TRANSFORM = Range(-1.0, 1.0)
"""Levels to states, as flows of patches declare it."""

Split = Literal["train", "held_out"]


class Patches(NamedTuple):
    """Images, uint8 of shape (N, 3, 32, 32), and the number of the photograph that each is of, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor


def photographs(split: Split = "train") -> list[list[Tensor]]:
    """Each photograph of a part of the split at each scale of `SHRUNK`, uint8 of shape (3, H, W).

    Raises:
        ImportError: scikit-image, scikit-learn or matplotlib is not installed.
        ValueError: an unknown split.
    """
    names = {"train": TRAIN, "held_out": HELD_OUT}.get(split)
    if names is None:
        raise ValueError(f"split = {split!r}; expected 'train' or 'held_out'")
    return [[_shrunk(_photograph(name), k) for k in SHRUNK] for name in names]


def draw(photos: Sequence[Sequence[Tensor]], count: int, generator: torch.Generator) -> Patches:
    """Patches at random: a photograph, a scale, a place and a flip are each uniform, and independent.

    Args:
        photos: what `photographs` returned.
        count: N.
        generator: a generator of the host.
    """
    u = torch.rand(count, 4, generator=generator, dtype=torch.float64, device="cpu")
    labels = torch.randint(len(photos), (count,), generator=generator, device="cpu")
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8, device="cpu")
    for i, (label, (a, b, c, d)) in enumerate(zip(labels.tolist(), u.tolist(), strict=True)):
        photo = photos[label][int(a * len(SHRUNK))]
        patch = _cut(photo, int(b * (photo.shape[1] - SIZE + 1)), int(c * (photo.shape[2] - SIZE + 1)))
        images[i] = patch.flip(-1) if d < 0.5 else patch
    return Patches(images, labels)


def lattice(photos: Sequence[Sequence[Tensor]], count: int) -> Patches:
    """Patches that no generator chooses: of each photograph and scale alike, on a lattice of places in golden ratio.

    Args:
        photos: what `photographs` returned.
        count: N.
    """
    golden = (5.0**0.5 - 1.0) / 2.0
    images, labels = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8, device="cpu"), []
    for i in range(count):
        label, k = i % len(photos), i // len(photos)
        photo = photos[label][k % len(SHRUNK)]
        row, column = (k * golden) % 1.0, (k + 0.5) / -(-count // len(photos))
        images[i] = _cut(photo, int(row * (photo.shape[1] - SIZE + 1)), int(column * (photo.shape[2] - SIZE + 1)))
        labels.append(label)
    return Patches(images, torch.tensor(labels, dtype=torch.int64, device="cpu"))


def dequantize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x = 2 (k + u)/256 − 1 with fresh uniform u: uint8 levels to float32 in [−1, 1).

    Raises:
        TypeError: images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images have dtype {images.dtype}; expected the levels 0 … 255 as uint8")
    place = generator.device if generator is not None else images.device
    u = torch.rand(images.shape, generator=generator, device=place, dtype=torch.float32).to(images.device)
    return 2.0 * (images.to(torch.float32) + u) / 256.0 - 1.0


def _cut(photo: Tensor, row: int, column: int) -> Tensor:
    return photo[:, row : row + SIZE, column : column + SIZE]


@cache
def _photograph(name: str) -> Tensor:
    """A photograph by name, uint8 of shape (3, H, W)."""
    if name in ("flower", "china"):
        picture = require("sklearn.datasets", "bench", "a photograph").load_sample_image(f"{name}.jpg")
    elif name == "grace_hopper":
        folder = Path(require("matplotlib", "bench", "a photograph").get_data_path())
        with require("PIL.Image", "bench", "a photograph").open(folder / "sample_data" / "grace_hopper.jpg") as file:
            picture = np.asarray(file.convert("RGB"))
    elif name == "motorcycle":
        picture = require("skimage.data", "bench", "a photograph").stereo_motorcycle()[0]
    else:
        picture = getattr(require("skimage.data", "bench", "a photograph"), name)()
    return torch.from_numpy(np.array(picture[..., :3])).permute(2, 0, 1).contiguous()


def _shrunk(photo: Tensor, k: int) -> Tensor:
    """Means of blocks of k × k, rounded to levels."""
    if k == 1:
        return photo
    _, h, w = photo.shape
    blocks = photo[:, : h // k * k, : w // k * k].double().unflatten(2, (-1, k)).unflatten(1, (-1, k))
    shrunk: Tensor = blocks.mean((2, 4)).round().to(torch.uint8)
    return shrunk
