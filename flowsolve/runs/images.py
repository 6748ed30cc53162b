"""Image files as integers, read in full and checked."""

from __future__ import annotations

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
        with image.open(file) as opened:
            if opened.format == "PNG":
                opened.verify()
        with image.open(file) as opened:
            if opened.mode not in MODES:
                return ItemError(
                    str(file), f"it is of mode {opened.mode}; expected L (grey) or RGB of 8 bits: convert it"
                )
            pixels = np.array(opened)
    except Exception as error:  # decoders raise whatever their format's code meets
        return ItemError(str(file), f"it cannot be read as an image ({_said(error, file)}): truncated or corrupt")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def header(file: Path) -> tuple[int, ...] | None:
    """The shape (C, H, W) that a file says it has, if it says so."""
    try:
        with pillow().open(file) as opened:
            return (MODES[opened.mode], opened.height, opened.width) if opened.mode in MODES else None
    except ImportError:
        raise
    except Exception:  # as above
        return None


def _said(error: Exception, file: Path) -> str:
    text = str(error).replace(f" {str(file)!r}", "") or type(error).__name__
    return text.strip().rstrip(".")
