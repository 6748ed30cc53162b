"""Data sets of integer images, by item number: a folder, an array file, a name, a torch Dataset, an iterator.

| data | items | name of an item |
|---|---|---|
| folder, or one image file | PNG and JPEG files of grey or RGB images, in the order of their paths | its path |
| `.npy`, `.npz`, `.npz:KEY` | integers (N, C, H, W), (N, H, W, C), (N, H, W); mapped unless compressed | its number |
| `digits`, `digits:held_out`, `digits:train` | scikit-learn's 8×8 digits | its number |
| tensor, array, torch Dataset | integers (C, H, W), alone or first in a tuple | its number |
| iterator, DataLoader | batches (n, C, H, W), alone or first in a tuple; the same ones each time | its number |

An item that cannot be read is an `ItemError` that names it, returned in its place so that the others can go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import hosted
from flowsolve.runs.arrays import LAYOUTS, chosen, mapped, planes
from flowsolve.runs.errors import ItemError
from flowsolve.runs.images import EXTENSIONS, header, integers

__all__ = ["Batch", "Data", "Folder", "Items", "Stream", "levelled", "open_data"]

WHITE = 255
"""The lightest shade of a picture file."""

Item = Tensor | ItemError
Batch = tuple[int, int, list[Item]]
"""The number of a batch, the number of its first item, and its items."""


class Data:
    """Images in a fixed order.

    Attributes:
        count: how many; None where only the end of an iterator will tell.
        levels: the number of integer levels, where the data say so.
        identity: what makes it the same data set, as plain values.
        shaded: whether they are picture files, of 256 shades whatever the levels of what they show.
        indexed: whether `read` can be called, in any order.
    """

    count: int | None
    levels: int | None = None
    shaded = False
    identity: dict[str, Any]
    indexed = True

    def name(self, index: int) -> str:
        """What an item is called."""
        return f"image {index}"

    def origin(self, index: int) -> str:
        """Where it is, for a message."""
        return self.name(index)

    def read(self, index: int) -> Item:
        """One image of shape (C, H, W), or why there is none."""
        raise TypeError("an iterator cannot be read by number")

    def shape(self) -> tuple[int, ...] | None:
        """The shape of the first image that can be read."""
        images = (self.read(i) for i in range(self.count or 0))
        return next((tuple(x.shape) for x in images if isinstance(x, Tensor)), None)

    def batches(self, size: int, wanted: Callable[[int], bool]) -> Iterator[Batch]:
        """The wanted batches of `size` items each (the last may be smaller)."""
        count = self.count or 0
        for number in filter(wanted, range(-(-count // size))):
            first = number * size
            yield number, first, [self.read(i) for i in range(first, min(count, first + size))]


class Folder(Data):
    """Image files below a directory, in the order of their paths; or those listed."""

    shaded = True

    def __init__(self, root: Path, limit: int | None = None, files: Sequence[Path] | None = None) -> None:
        found = (p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
        self.root = root
        self.names = sorted(p.relative_to(root).as_posix() for p in (found if files is None else files))[:limit]
        self.count = len(self.names)
        if not self.count:
            held = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
            raise ValueError(f"{root} holds no images; expected files {', '.join(EXTENSIONS)}, found {held}")
        listed = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:16]
        self.identity = {"kind": "images", "count": self.count, "names": listed}

    def name(self, index: int) -> str:
        return self.names[index]

    def origin(self, index: int) -> str:
        return str(self.root / self.names[index])

    def read(self, index: int) -> Item:
        return integers(self.root / self.names[index])

    def shape(self) -> tuple[int, ...] | None:
        return next((s for name in self.names if (s := header(self.root / name)) is not None), None)


class Levelled(Folder):
    """Picture files of data with fewer levels than a file has shades, which were spread over them: k to 255·k/(L−1)."""

    shaded = False

    def __init__(self, folder: Folder, levels: int) -> None:
        self.root, self.names, self.count, self.levels = folder.root, folder.names, folder.count, levels
        self.identity = {**folder.identity, "shades": levels}

    def read(self, index: int) -> Item:
        item = super().read(index)
        if not isinstance(item, Tensor):
            return item
        levels = _level_of(item, self.identity["shades"])
        return levels.to(item.dtype) if levels is not None else ItemError(self.origin(index), "it has other shades now")


def levelled(source: Data, levels: int) -> Data:
    """The data as levels: a folder holds shades if all of its images have none but those of levels, and one has more
    than there are levels.
    """
    if not isinstance(source, Folder) or levels > WHITE:
        return source
    beyond = False
    for item in map(source.read, range(len(source.names))):
        if not isinstance(item, Tensor) or not item.numel():
            continue
        if item.dtype != torch.uint8 or _level_of(item, levels) is None:
            return source
        beyond = beyond or int(item.max()) >= levels
    return Levelled(source, levels) if beyond else source


def _level_of(image: Tensor, levels: int) -> Tensor | None:
    """The levels of which an image has the shades; None if it has others."""
    found = (image.double() * ((levels - 1) / WHITE)).round()
    return found if bool(((found * (WHITE / (levels - 1))).round() == image).all()) else None


class Items(Data):
    """A sequence of images: a tensor, an array, a torch Dataset."""

    def __init__(
        self, items: Any, kind: str, limit: int | None = None, layout: str = "auto", levels: int | None = None
    ) -> None:
        self.items, self.levels = items, levels
        self.count = len(items) if limit is None else min(limit, len(items))
        if not self.count:
            raise ValueError(f"the {kind} is empty; expected images")
        shape = getattr(items, "shape", None)
        self.place = planes(tuple(shape), layout) if shape is not None else lambda x: x
        self.identity = {"kind": kind, "count": self.count}
        if shape is not None:
            self.identity |= {"shape": list(shape[1:]), "dtype": str(items.dtype)}

    def read(self, index: int) -> Item:
        item = self.items[index]
        while isinstance(item, tuple | list):
            item = item[0]
        if hasattr(item, "getbands"):  # of PIL
            pixels = torch.from_numpy(np.array(item))
            return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return signed(self.place(item if isinstance(item, Tensor) else torch.from_numpy(_native(np.array(item)))))


def _native(array: Any) -> Any:
    """An array as torch takes it: in this machine's byte order, without unsigned integers wider than a byte."""
    wide = array.dtype.kind == "u" and array.dtype.itemsize > 1
    return array.astype(np.int64) if wide else array.astype(array.dtype.newbyteorder("="), copy=False)


class Stream(Data):
    """Batches of images from an iterator, cut to the run's batches. It is gone through again whenever a run goes on."""

    indexed = False

    def __init__(self, chunks: Iterable[Any], limit: int | None = None) -> None:
        self.chunks, self.limit = chunks, limit
        self.count = None
        self.identity = {"kind": "iterator", "limit": limit}

    def batches(self, size: int, wanted: Callable[[int], bool]) -> Iterator[Batch]:
        held: list[Item] = []
        number = total = 0
        for item in self._items():
            held.append(item)
            total += 1
            if len(held) == size:
                if wanted(number):
                    yield number, number * size, held
                held, number = [], number + 1
        self.count = total
        if held and wanted(number):
            yield number, number * size, held

    def _items(self) -> Iterator[Tensor]:
        total = 0
        for chunk in self.chunks:
            while isinstance(chunk, tuple | list):
                chunk = chunk[0]
            if not isinstance(chunk, Tensor | np.ndarray) or chunk.ndim < 2:
                raise TypeError(
                    f"the iterator gave a {type(chunk).__name__}; expected batches of images, tensors of shape "
                    "(n, C, H, W), alone or first in a tuple"
                )
            for item in hosted(chunk):
                if total == self.limit:
                    return
                total += 1
                yield signed(item)


def signed(image: Tensor) -> Tensor:
    """An image in a dtype that torch computes with."""
    return image.to(torch.int64) if image.dtype in (torch.uint16, torch.uint32) else image


def open_data(data: Any, *, limit: int | None = None, layout: str = "auto") -> Data:
    """The images of a folder, a file, a name or an object; see `flowsolve.runs.data`.

    Args:
        data: what to open.
        limit: the first so many items only.
        layout: of arrays of four dimensions, "nchw" or "nhwc"; "auto" goes by which of them can be channels.

    Raises:
        FileNotFoundError: no such file and no such name.
        ValueError: nothing in it, or an array whose layout cannot be told.
        TypeError: an object that gives no images.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}; expected at least 1")
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if isinstance(data, str | Path):
        return _named(data, limit, layout)
    if isinstance(data, Tensor | np.ndarray):
        return Items(data, "array", limit, layout)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Items(data, "dataset", limit)
    if isinstance(data, Iterable):
        return Stream(data, limit)
    raise TypeError(f"data is a {type(data).__name__}; expected a path, a tensor, a torch Dataset or an iterator")


def _named(data: str | Path, limit: int | None, layout: str) -> Data:
    text, path = str(data), Path(data)
    if path.is_dir():
        return Folder(path, limit)
    path, key = chosen(text)
    if path.is_file():
        if path.suffix.lower() in EXTENSIONS:
            return Folder(path.parent, limit, [path])
        if path.suffix in (".npy", ".npz"):
            return Items(mapped(path, key, limit), "array", limit, layout)
        raise ValueError(
            f"{path} is not of a known kind; expected a folder of images, {', '.join(EXTENSIONS)}, .npy or .npz"
        )
    name, _, split = text.partition(":")
    if name == "digits":
        from flowsolve.problems import digits

        images = digits.load(split or "all").images  # type: ignore[arg-type]
        return Items(images, text, limit, "nchw", digits.LEVELS)
    raise FileNotFoundError(
        f"there is no {text!r}; expected a folder of images, an image, a .npy or .npz file, or one of the names "
        "digits, digits:train, digits:held_out"
    )
