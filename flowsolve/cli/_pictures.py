"""What `flowsolve train` trains on: integer images, their number of levels, their classes, and a fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NAMES", "Pictures", "Split", "pictures"]

NAMES = ("digits",)
SHARE, MOST = 10, 1000
"""One image in ten is held out, and no more than so many."""


@dataclass(frozen=True)
class Split:
    """Integer images of shape (N, C, H, W), and their classes, int64 of shape (N,), where there are some."""

    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Pictures:
    """A data set with its split.

    Attributes:
        train: what is trained on.
        held_out: what is not; may be empty.
        levels: the integers are 0 … levels − 1.
        classes: the names of the classes; empty without them.
    """

    train: Split
    held_out: Split
    levels: int
    classes: tuple[str, ...]


def pictures(data: str, *, levels: int | None = None, classes: bool = False) -> Pictures:
    """The images of a name, a folder, or an array file.

    Args:
        data: "digits", a folder of PNG or JPEG files, .npy, .npz or .npz:KEY.
        levels: of the integers; by default as the data say, else 256.
        classes: want classes: the digits, the folders that the files lie in, or the array `labels` of a .npz file.

    Raises:
        ValueError: an unknown name, images that cannot be read or differ in shape, integers beyond the levels, or no
            classes where they are wanted.
    """
    from flowsolve.problems import digits

    if data == "digits":
        parts = [digits.load("train"), digits.load("held_out")]
        train, held = (Split(p.images, p.labels if classes else None) for p in parts)
        names = tuple(map(str, range(10))) if classes else ()
        return Pictures(train, held, _levels(train.images, levels or digits.LEVELS), names)
    images, labels, names, own = _read(data, classes)
    order = sorted(range(len(images)), key=lambda i: sha256(str(i).encode()).digest())
    held_count = min(len(images) // SHARE, MOST)
    rows = [sorted(order[held_count:]), sorted(order[:held_count])]
    train, held = (Split(images[r], None if labels is None else labels[r]) for r in rows)
    return Pictures(train, held, _levels(images, levels or own or 256), names)


def _read(data: str, classes: bool) -> tuple[Tensor, Tensor | None, tuple[str, ...], int | None]:
    """Images, labels, the names of the classes, and the levels that the data say."""
    import torch

    from flowsolve.runs.data import open_data

    try:
        source = open_data(data)
    except FileNotFoundError:
        raise ValueError(
            f"data = {data!r} is not known; expected one of {', '.join(NAMES)}, a folder of images, a .npy or .npz file"
        ) from None
    found: list[Tensor] = []
    for i in range(source.count or 0):
        item = source.read(i)
        if isinstance(item, Exception):
            raise item
        if item.dtype.is_floating_point or item.ndim != 3:
            raise ValueError(
                f"{source.origin(i)} is {item.dtype} of shape {tuple(item.shape)}; expected integers (C, H, W)"
            )
        if found and item.shape != found[0].shape:
            raise ValueError(
                f"{source.origin(i)} has shape {tuple(item.shape)}; expected that of {source.origin(0)}, "
                f"{tuple(found[0].shape)}: crop or resize them to one size"
            )
        found.append(item)
    images = torch.stack(found)
    if not classes:
        return images, None, (), source.levels
    labels, names = _classes(data, source, len(images))
    return images, labels, names, source.levels


def _classes(data: str, source: Any, count: int) -> tuple[Tensor, tuple[str, ...]]:
    """A class for each image: the folder that it lies in, or the array `labels` beside it."""
    import numpy as np
    import torch

    from flowsolve.runs.arrays import chosen, mapped

    file, _ = chosen(data)
    if Path(data).is_dir():
        folders = [Path(source.name(i)).parts[0] if "/" in source.name(i) else None for i in range(count)]
        if None in folders:
            loose = source.origin(folders.index(None))
            raise ValueError(f"{loose} lies in no folder of its own; with classes, expected {data}/CLASS/FILE")
        names = tuple(sorted({str(f) for f in folders}))
        return torch.tensor([names.index(str(f)) for f in folders], device="cpu"), names
    if file.suffix == ".npz":
        held = np.asarray(mapped(file, "labels", dims=1))
        if held.shape != (count,) or held.dtype.kind not in "iu" or int(held.min()) < 0:
            raise ValueError(
                f"{file}: labels have shape {held.shape} and dtype {held.dtype}; expected {count} integers from 0 on"
            )
        return torch.from_numpy(held.astype(np.int64)), tuple(map(str, range(int(held.max()) + 1)))
    raise ValueError(f"{data} has no classes; expected a folder of folders, or a .npz file with an array 'labels'")


def _levels(images: Tensor, levels: int) -> int:
    """The levels, if the images keep to them."""
    low, high = int(images.min()), int(images.max())
    if low < 0 or high >= levels:
        raise ValueError(f"the images run from {low} to {high}; expected 0 … {levels - 1} ({levels} levels)")
    return levels
