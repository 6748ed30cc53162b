"""The manifest, run.json: what a run is, so that it is never continued as another.

Settings and versions must be the same whenever a run goes on; what is noted beside them (where the checkpoint lay, the
command) may differ. A run with no finished batch has nothing to protect: its first process writes the manifest anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowsolve.runs.errors import RunError
from flowsolve.runs.files import naming, write_json
from flowsolve.runs.ranks import Rank

__all__ = ["NAME", "begin"]

NAME = "run.json"
PATIENCE = 60.0
"""Seconds that other ranks give rank 0 to replace the manifest of a run that never began."""


def begin(out: Path, record: Mapping[str, Any], rank: Rank, *, resume: bool, begun: Callable[[], bool]) -> None:
    """Write the manifest of a new run, or make sure that it is the one that is there.

    Args:
        out: the run's directory, made if it is not there.
        record: {"task": …, "settings": …, "versions": …, "notes": …}, of plain values.
        rank: this process.
        resume: go on with a run that is there.
        begun: whether any batch is finished.

    Raises:
        FileExistsError: the directory holds something else, or a run and resume is False.
        RunError: it holds a run with other settings, or batches of a run that nothing names.
    """
    record = json.loads(json.dumps(record))
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    file = out / NAME
    if not file.exists():
        if begun():
            raise RunError(
                f"{out} holds finished batches and no {NAME} that says of which run; put it back, or choose another "
                "directory",
                out,
            )
        others = sorted(p.name for p in out.iterdir() if not p.name.endswith(NAME) and p.name != "parts")
        if others:
            raise FileExistsError(
                f"{out} is not empty and holds no run (there is {others[0]}); choose another directory"
            )
        if _created(file, record):
            return
    elif not resume and rank.number == 0:
        raise FileExistsError(f"{out} holds a run already; choose another directory, or resume it")
    deadline = time.monotonic() + PATIENCE
    while changed := list(_differences(_read(file, out), record)):
        if begun() or time.monotonic() > deadline:
            raise RunError(
                f"the run in {out} was begun with other settings ({'; '.join(changed)}); restore them to go on, or "
                "choose another directory",
                out,
            )
        if rank.number == 0:
            write_json(file, record)
        else:
            time.sleep(0.2)


def _created(file: Path, record: Any) -> bool:
    """Write the manifest unless another process has just done so."""
    beside = file.with_name(f".{os.getpid()}.{os.urandom(4).hex()}.{NAME}")
    try:
        write_json(beside, record)
        with naming(file):
            os.link(beside, file)
    except FileExistsError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    return True


def _read(file: Path, out: Path) -> Any:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is not valid JSON ({error}); choose another directory", out) from error
    if not isinstance(found, dict):
        raise RunError(f"{file} holds a {type(found).__name__}, and no run; choose another directory", out)
    return found


def _differences(old: Any, new: Any) -> Iterator[str]:
    """`name: old → new` for every setting that is not the same."""
    if old.get("task") != new["task"]:
        yield from _compare("task", old.get("task"), new["task"])
        return
    for part in ("settings", "versions"):
        yield from _compare("", old.get(part), new[part])


def _compare(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _compare(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{name}: {json.dumps(old, ensure_ascii=False)} → {json.dumps(new, ensure_ascii=False)}"
