"""Files that are whole or absent: written beside their place and moved there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowsolve.runs.ranks import Rank

__all__ = ["naming", "replacing", "write_json"]


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give an OSError the file's name: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from error


def replacing(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a temporary file, then move it to its place in one step; nothing is left if it fails.

    Its name is this rank's, so that what a kill leaves there is written over when the work is done again.
    """
    beside = file.with_name(f".rank-{Rank.here().number:05d}.{file.name}")  # writers choose formats by the suffix
    try:
        with naming(file):
            write(beside)
            os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, record: Any) -> None:
    """A JSON file in UTF-8; NaN becomes null."""
    text = json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replacing(file, lambda beside: beside.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
