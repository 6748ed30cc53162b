"""Array files: memory-mapped, and with the channels where a network has them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["LAYOUTS", "mapped", "planes"]

LAYOUTS = ("auto", "nchw", "nhwc")
CHANNELS = (1, 3)
KEYS = ("images", "arr_0", "data", "x")


def mapped(file: Path, key: str = "") -> Any:
    """The array of a .npy or .npz file, memory-mapped unless it is compressed.

    Raises:
        ValueError: a file that is truncated or holds no array, or several without a key that chooses.
    """
    try:
        if file.suffix == ".npy":
            return _whole(np.load(file, mmap_mode="r", allow_pickle=False))
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if not key:
            key = next((k for k in KEYS if k in names), names[0] if len(names) == 1 else "")
        if key not in names:
            raise ValueError(f"it holds the arrays {', '.join(names) or 'none'}; choose one as {file}:KEY")
        return _whole(_stored(file, f"{key}.npy"))
    except (ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"{file} cannot be read as an array: {error}") from error


def _whole(array: Any) -> Any:
    if array.ndim < 2:
        raise ValueError(f"its shape is {array.shape}; expected (N, *S), an entry an image")
    return array


def _stored(file: Path, member: str) -> Any:
    """An array of a zip file: mapped where it lies if it is not compressed, otherwise unpacked."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(member)
        with archive.open(info) as stream:
            if info.compress_type != zipfile.ZIP_STORED:
                return np.lib.format.read_array(stream, allow_pickle=False)
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            inside = stream.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects; expected integers")
        with file.open("rb") as raw:
            raw.seek(info.header_offset + 26)  # of a local header: the lengths of the name and of the extra field
            name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
        start = info.header_offset + 30 + name + extra + inside
    order: Any = "F" if fortran else "C"
    return np.memmap(file, dtype, "r", start, shape, order)


def planes(shape: tuple[int, ...], layout: str = "auto") -> Callable[[Tensor], Tensor]:
    """What makes an item of an array of this shape (C, H, W): from (C, H, W), (H, W, C) or (H, W); else as it is."""
    if len(shape) == 3:
        return lambda x: x.unsqueeze(0)
    if len(shape) != 4:
        return lambda x: x
    if layout == "auto":
        first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
        if first == last:
            raise ValueError(
                f"an array of shape {shape} may be (N, C, H, W) or (N, H, W, C); set layout='nchw' or 'nhwc' (--layout)"
            )
        layout = "nchw" if first else "nhwc"
    return (lambda x: x) if layout == "nchw" else (lambda x: x.permute(2, 0, 1).contiguous())
