r"""The engine: numbered batches, each finished once, whoever computes it and however often it is stopped.

Item i belongs to batch ⌊i/B⌋ for good, and all noise is addressed by item. What a batch computes is then a function of
the settings and its number alone, to the last bit: the same whether one process works or many, and in whatever order.
A process computes the batches that are its own (`flowsolve.runs.ranks`) and not finished in any part file, and commits
each before the next (`flowsolve.runs.parts`). The process that commits the last batch of all sees that nothing is
missing, and makes the final files; nobody waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowsolve.bench import record
from flowsolve.runs.errors import ItemError, RunError, keeping
from flowsolve.runs.manifest import begin
from flowsolve.runs.parts import Part, Parts, Row
from flowsolve.runs.progress import Progress
from flowsolve.runs.ranks import Rank
from flowsolve.runs.settings import versions

__all__ = ["Task", "check_batch", "environment", "execute", "threads"]

PARTS = "parts"
POLICIES = ("stop", "skip")


class Task:
    """What is computed.

    Attributes:
        name: of the command.
        settings: what decides the results, as plain values.
        columns: name → SQLite type of what is kept of an item; "nfe" is among them.
        value: the column whose mean the progress bar shows; None for none.
        error: the column of the solver's own error of it; None for none.
    """

    name: str
    settings: dict[str, Any]
    columns: Mapping[str, str]
    value: str | None = None
    error: str | None = None

    @property
    def batches(self) -> int | None:
        """How many batches there are; None if only the end will tell."""
        raise NotImplementedError

    def resumed(self, known: Parts, out: Path) -> None:
        """Raise RunError unless what is finished belongs to this task."""

    def work(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """The rows of the wanted batches, in order."""
        raise NotImplementedError


def execute(
    task: Task,
    out: Path,
    *,
    rank: Rank,
    resume: bool,
    bar: Progress,
    notes: Mapping[str, Any],
) -> Parts | None:
    """Compute what is missing of this process's share.

    Args:
        task: what is computed.
        out: the run's directory.
        rank: this process.
        resume: go on with a run that is there.
        bar: is told what is finished.
        notes: kept in the manifest beside what decides the results.

    Returns:
        All parts, if with this share nothing is missing; None while other processes have work to do.

    Raises:
        RunError: an item cannot be used, a part cannot be written, or the run has other settings. What was finished
            is kept.
        FileExistsError: the directory is in use.
    """
    folder = out / PARTS
    manifest = {"task": task.name, "settings": task.settings, "versions": versions(), "notes": dict(notes)}
    begin(out, manifest, rank, resume=resume, begun=lambda: bool(Parts(folder).where))
    with keeping(out):
        folder.mkdir(exist_ok=True)
    with keeping(out), Part(folder, rank.number, task.columns) as part, bar:
        known = Parts(folder)
        task.resumed(known, out)
        names = ["idx", *task.columns]
        shown = [names.index(name) if name else None for name in (task.value, "nfe", task.error)]
        bar.resumed(known.rows(f"{task.value or 'NULL'}, nfe, {task.error or 'NULL'}", rank.mine))
        since = time.perf_counter()
        try:
            for number, rows in task.work(lambda b: rank.mine(b) and b not in known.where):
                part.commit(number, rows, time.perf_counter() - since)
                since = time.perf_counter()
                bar.advance([None if i is None else row[i] for i in shown] for row in rows)
        except ItemError as error:
            raise RunError(
                f"{error}. The {bar.finished} results so far are kept in {out}. Mend it and start the run again to go "
                "on, or leave such items out with on_error='skip' (--on-error skip)",
                out,
            ) from error
    parts = Parts(folder)
    total = task.batches
    return parts if total is not None and parts.complete(total) else None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads: their number decides how sums on the host are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_batch(batch: int, on_error: str) -> None:
    """Raise ValueError unless the options of the engine can be."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch = {batch!r}; expected an integer >= 1, the items of a batch")
    if on_error not in POLICIES:
        raise ValueError(f"on_error = {on_error!r}; expected one of {', '.join(POLICIES)}")


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, for a report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {**record.environment(), "device": name}
