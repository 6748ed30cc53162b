"""Adapters: checkpoints of other packages, read as flows."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from flowsolve.flow import Flow

__all__ = ["BUNDLED", "bundled", "load"]

BUNDLED = ("digits-ddpm", "digits-condot")


def load(source: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Flow:
    """A checkpoint as a `Flow`, with its path, prediction and clock read from its own configuration.

    Args:
        source: a diffusers directory, with unet/ and scheduler/ inside.
        device: where the network is put; by default the host.
        dtype: the network's floating dtype; by default float32.

    Raises:
        FileNotFoundError: no such directory, or a file is missing in it.
        ValueError: the directory holds something that is not supported.
        ImportError: the package that wrote the checkpoint is not installed.
    """
    from flowsolve.adapters import diffusers

    return diffusers.load(source, device=device, dtype=dtype)


def bundled(name: str) -> Path:
    """The directory of a checkpoint that ships with the package: "digits-ddpm" or "digits-condot".

    Both are UNets on scikit-learn's 8×8 digits, trained by `examples/train_digits.sh`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled checkpoint {name!r}; expected one of {', '.join(BUNDLED)}")
    return Path(str(files("flowsolve.problems"))) / "checkpoints" / name
