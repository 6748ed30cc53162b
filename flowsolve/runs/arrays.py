"""Array files: memory-mapped, and with the channels where a network has them.

A compressed array cannot be mapped; it is unpacked, no further than the items that are asked for, and only after what
its header claims was compared with what there is (`flowsolve._bounds`).
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowsolve._bounds import opened_zip

__all__ = ["LAYOUTS", "chosen", "mapped", "planes"]

LAYOUTS = ("auto", "nchw", "nhwc")
CHANNELS = (1, 3)
KEYS = ("images", "arr_0", "data", "x")
UNPACKED, RATIO = 2**30, 100
"""What is unpacked may have so many bytes, or so many times those in the file: images are far from either."""
PIECE = 2**20


def chosen(text: str) -> tuple[Path, str]:
    """A file, and the key of `FILE.npz:KEY`; "" for none."""
    file, _, key = text.rpartition(":") if not Path(text).exists() and ".npz:" in text else (text, "", "")
    return Path(file), key


def mapped(file: Path, key: str = "", limit: int | None = None, dims: int = 2) -> Any:
    """The array of a .npy or .npz file, memory-mapped unless it is compressed.

    Args:
        file: the file.
        key: which of several arrays.
        limit: how many items are wanted, at least so many of which are returned if there are.
        dims: the fewest dimensions it may have: 2 for images, 1 for their labels.

    Raises:
        ValueError: a file that is truncated or holds no array, or several without a key that chooses.
    """
    try:
        if file.suffix == ".npy":
            return _whole(np.load(file, mmap_mode="r", allow_pickle=False), dims)
        with opened_zip(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if not key:
            key = next((k for k in KEYS if k in names), names[0] if len(names) == 1 else "")
        if key not in names:
            raise ValueError(f"it holds the arrays {', '.join(names) or 'none'}; choose one as {file}:KEY")
        return _whole(_member(file, f"{key}.npy", limit), dims)
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"{file} cannot be read as an array: {error}") from error


def _whole(array: Any, dims: int) -> Any:
    if array.dtype.names or array.dtype.kind not in "iufb":
        raise ValueError(f"it holds {array.dtype}; expected integers")
    if array.ndim < dims:
        raise ValueError(f"its shape is {array.shape}; expected (N, *S), an entry an image")
    return array


def _member(file: Path, member: str, limit: int | None) -> Any:
    """An array of a zip file: mapped where it lies if it is not compressed, otherwise unpacked."""
    with opened_zip(file) as archive:
        info = archive.getinfo(member)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise ValueError("it is packed as numpy does not pack; expected the file of np.savez")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            inside = stream.tell()
            if dtype.hasobject:
                raise ValueError("it holds Python objects; expected integers")
            claimed = math.prod(shape) * dtype.itemsize
            if inside + claimed != info.file_size:
                held = info.file_size - inside
                raise ValueError(f"an array of shape {shape} has {claimed:,} bytes, and there are {held:,}")
            if info.compress_type != zipfile.ZIP_STORED:
                packed = min(info.compress_size, file.stat().st_size)
                return _unpacked(stream, shape, fortran, dtype, limit, packed)
        with file.open("rb") as raw:
            raw.seek(info.header_offset + 26)  # of a local header: the lengths of the name and of the extra field
            name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
        start = info.header_offset + 30 + name + extra + inside
    order: Any = "F" if fortran else "C"
    return np.memmap(file, dtype, "r", start, shape, order)


def _unpacked(stream: Any, shape: tuple[int, ...], fortran: bool, dtype: Any, limit: int | None, packed: int) -> Any:
    """The first items of an array, or all of one whose items are not one after the other."""
    if limit is not None and shape and not fortran:
        shape = (min(limit, shape[0]), *shape[1:])
    size = math.prod(shape) * dtype.itemsize
    if size > max(UNPACKED, RATIO * packed):
        raise ValueError(
            f"it would unpack {packed:,} bytes to {size:,}; expected at most {UNPACKED:,}, or {RATIO} times what is "
            "there. Save it with np.savez, which can be mapped, or give a limit"
        )
    flat, at = np.empty(size, np.uint8), 0
    while at < size:
        piece = stream.read(min(PIECE, size - at))
        if not piece:
            raise ValueError(f"it ends after {at:,} of {size:,} bytes")
        flat[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    stream.read(1)  # at the end its checksum is compared
    return flat.view(dtype).reshape(shape, order="F" if fortran else "C")


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
