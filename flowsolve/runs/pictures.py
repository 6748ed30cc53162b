"""Samples as pictures: pixels, PNG files and grids of them, and arrays written piece by piece."""

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

__all__ = ["data", "is_image", "pixels", "save_arrays", "save_grid", "save_png"]

LEVELS = 256
TILE = 32
"""The least size of an image in a grid."""


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are grey or RGB images (C, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def pixels(flow: Flow, x: Tensor) -> Tensor:
    """Images as uint8: the level whose cell holds x, of 256 on the flow's data range."""
    low, high = flow.data_range
    return ((x.double().cpu() - low) * (LEVELS / (high - low))).floor().clamp(0, LEVELS - 1).to(torch.uint8)


def data(flow: Flow, images: Tensor, levels: int) -> Tensor:
    """Integer images as data, float32: the middle of each level's cell."""
    if images.is_floating_point() or images.dtype == torch.bool:
        raise TypeError(f"the images are {images.dtype}; expected integers 0 … {levels - 1}")
    low, high = flow.data_range
    return (low + (images.double() + 0.5) * ((high - low) / levels)).float()


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
    sheet = torch.full((channels, rows * (height * factor + 2) + 2, columns * (width * factor + 2) + 2), 255)
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
