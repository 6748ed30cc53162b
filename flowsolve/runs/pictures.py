r"""Samples as pictures, by the transform the flow declares: levels, PNG files and grids of them, and arrays of them.

A state becomes the level whose cell holds it, and an integer the middle of its cell (`flowsolve.transforms`). Picture
files have 256 shades: of L levels, level k is shade $255k/(L-1)$, rounded, and a shade is read as the nearest level.
With 256 levels they are the same. A flow of codes (`Latent`) has no pictures.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.runs.files import replacing
from flowsolve.runs.images import pillow
from flowsolve.transforms import Latent, Transform

__all__ = ["is_image", "levels", "save_arrays", "save_grid", "save_png", "shades", "states"]

SHADES = 256
TILE = 64
"""The least size of an image in a grid: what an eye can read on a screen."""


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are grey or RGB images (C, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def levels(flow: Flow, shape: Sequence[int]) -> int | None:
    """How many levels the pixels of samples have; None where these are no pictures."""
    return flow.transform.count() if is_image(shape) and isinstance(flow.transform, Transform) else None


def states(flow: Flow, images: Tensor, count: int | None = None, *, shaded: bool = False) -> Tensor:
    """Integer images as the flow's states, float32: the middle of each level's cell.

    Args:
        flow: the flow; its transform says where the levels are.
        images: integers of shape (N, *S).
        count: how many levels they have, where the data say so.
        shaded: they are of a picture file, of 256 shades.

    Raises:
        ValueError: a flow of codes, or integers that are no levels.
        TypeError: images that are not integers.
    """
    transform = flow.transform
    if isinstance(transform, Latent):
        raise ValueError(
            f"the flow models codes of an autoencoder ({transform!r}), and these are images; encode them and begin "
            "with fs.sample(flow, start=…) or fs.encode(flow, flow.transform.forward(codes))"
        )
    if images.is_floating_point() or images.dtype == torch.bool:
        raise TypeError(f"the images are {images.dtype}; expected integers 0 … {transform.count(count) - 1}")
    count = transform.count(count)
    k = (images.double() * ((count - 1) / (SHADES - 1))).round() if shaded else images.double()
    if k.numel() and not 0 <= float(k.min()) <= float(k.max()) < count:
        raise ValueError(
            f"the images run from {int(images.min())} to {int(images.max())}; expected the levels 0 … {count - 1} of "
            f"{transform!r}"
        )
    return transform.forward(k + 0.5, count).float()


def shades(image: Tensor, count: int) -> Tensor:
    """Levels as the uint8 shades of a picture file."""
    if count == SHADES:
        return image.to(torch.uint8)
    return (image.double() * ((SHADES - 1) / (count - 1))).round().to(torch.uint8)


def save_png(file: Path, image: Tensor) -> None:
    """A uint8 image of shape (C, H, W) as a PNG file."""
    picture = pillow().fromarray(_last(image))
    replacing(file, lambda beside: picture.save(beside))


def save_grid(file: Path, images: Tensor, columns: int | None = None) -> None:
    """uint8 images of shape (N, C, H, W), row by row, small ones enlarged by a whole factor."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    factor = max(1, -(-TILE // max(height, width)))
    big = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    sheet = torch.full(
        (channels, rows * (height * factor + 2) + 2, columns * (width * factor + 2) + 2), 255, device="cpu"
    )
    sheet = sheet.to(torch.uint8)
    for i, image in enumerate(big):
        y, x = (i // columns) * (height * factor + 2) + 2, (i % columns) * (width * factor + 2) + 2
        sheet[:, y : y + height * factor, x : x + width * factor] = image
    save_png(file, sheet)


def _last(image: Tensor) -> Any:
    """(H, W) or (H, W, 3)."""
    return (
        image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
        if image.shape[0] == 1
        else (image.permute(1, 2, 0).contiguous().numpy())
    )


def save_arrays(file: Path, arrays: dict[str, tuple[tuple[int, ...], Any, Iterable[bytes]]]) -> None:
    """A .npz file from arrays given as shape, dtype and their bytes in pieces; the same bytes make the same file."""

    def write(beside: Path) -> None:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (shape, dtype, pieces) in arrays.items():
                entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: no time of day in the file
                with archive.open(entry, "w", force_zip64=True) as stream:
                    header = {
                        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                        "fortran_order": False,
                        "shape": shape,
                    }
                    np.lib.format.write_array_header_1_0(stream, header)
                    for piece in pieces:
                        stream.write(piece)

    replacing(file, write)
