"""Image files as integers, read in full and checked. A file of more pixels than Pillow's limit is not unpacked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._optional import require
from flowsolve.runs.errors import ItemError

__all__ = ["EXTENSIONS", "header", "integers"]

EXTENSIONS = (".png", ".jpg", ".jpeg")
MODES = {"L": 1, "RGB": 3}


def pillow() -> Any:
    """PIL.Image."""
    return require("PIL.Image", "runs", "reading and writing images")


def integers(file: Path) -> Tensor | ItemError:
    """An image file as uint8 of shape (C, H, W), or why it cannot be used.

    Decoders take a damaged file for an image more readily than they say: a PNG's checksums are verified first.
    """
    image = pillow()
    try:
        with _opened(file) as opened:
            if opened.format == "PNG":
                opened.verify()
        with _opened(file) as opened:
            if opened.mode not in MODES:
                return ItemError(
                    str(file), f"it is of mode {opened.mode}; expected L (grey) or RGB of 8 bits: convert it"
                )
            pixels = np.array(opened)
    except (image.DecompressionBombError, image.DecompressionBombWarning):
        most = f"{image.MAX_IMAGE_PIXELS:,} (PIL.Image.MAX_IMAGE_PIXELS)"
        return ItemError(
            str(file), f"it claims more pixels than {most}: raise that if you trust it, or make it smaller"
        )
    except Exception as error:  # decoders raise whatever their format's code meets
        return ItemError(str(file), f"it cannot be read as an image ({_said(error, file)}): truncated or corrupt")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def header(file: Path) -> tuple[int, ...] | None:
    """The shape (C, H, W) that a file says it has, if it says so."""
    try:
        with _opened(file) as opened:
            return (MODES[opened.mode], opened.height, opened.width) if opened.mode in MODES else None
    except ImportError:
        raise
    except Exception:  # as above
        return None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An image whose header was read; of too many pixels, an error where Pillow would only warn."""
    image = pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("error", image.DecompressionBombWarning)
        opened = image.open(file)
    with opened:
        yield opened


def _said(error: Exception, file: Path) -> str:
    text = str(error).replace(f" {str(file)!r}", "") or type(error).__name__
    return text.strip().rstrip(".")
