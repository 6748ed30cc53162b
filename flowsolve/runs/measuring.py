r"""Bits per dimension of a data set.

Each image has a row: its number, name and digest, its bits/dim, the evaluations it cost, and how it ended. The mean
over the images and its standard error, $s/\sqrt N$, are those of the rows; the error contains the spread of the images,
of the dequantisation and of the trace probes. What an image's own figure errs by, as far as `BitsPerDim` knows it, is
in its row: the error of the probes, that of the draws, and the solver's estimate of its own, which is no random one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowsolve._arguments import device_of
from flowsolve.conditioning import common, rows_of
from flowsolve.flow import Flow
from flowsolve.likelihood import bits_per_dim
from flowsolve.likelihood.bits import level_count
from flowsolve.likelihood.dequantize import Dequantizer
from flowsolve.runs.data import Data, Item, levelled, open_data
from flowsolve.runs.engine import Task, check_batch, environment, execute, threads
from flowsolve.runs.errors import ItemError, RunError, keeping
from flowsolve.runs.networks import event_shape, placed
from flowsolve.runs.parts import Parts, Row
from flowsolve.runs.progress import Progress
from flowsolve.runs.ranks import Rank
from flowsolve.runs.report import needed, report
from flowsolve.runs.settings import digest, fingerprint, spell
from flowsolve.solution import SolverError
from flowsolve.solvers.base import Solver
from flowsolve.transforms import Transform

__all__ = ["nll"]

CHECKED = 32
"""Finished images that are read again, and compared with their digests, when a run goes on."""

ERRORS = ("probe_stderr", "draw_stderr", "solver_error")
"""Columns for what `BitsPerDim` says of an image's own errors; null where it cannot tell."""


def nll(
    flow: Flow,
    data: Any,
    out: str | Path,
    *,
    solver: Solver | str = "auto",
    batch: int = 64,
    limit: int | None = None,
    layout: str = "auto",
    bits: int | None = None,
    levels: int | None = None,
    dequantize: str | Dequantizer = "uniform",
    importance: int = 1,
    draws: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    cpu_threads: int = 1,
    on_error: str = "stop",
    resume: bool = True,
    progress: bool = False,
    plot: bool = True,
    parquet: bool = False,
    notes: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Bits per dimension of every image of a data set, kept as they are found.

    Args:
        flow: the flow.
        data: a path, a name, a tensor, a torch Dataset or an iterator; see `flowsolve.runs.data`.
        out: the run's directory: of results.sqlite, report.json and report.png at the end.
        solver: "auto", 48 evaluations along a curve unless nfe= says otherwise, or another that `flowsolve.log_prob`
            takes.
        batch: images of a batch: what the network sees at a time, and what a kill can cost.
        limit: the first so many images only.
        layout: of arrays, "nchw" or "nhwc".
        bits: bit depth; by default what the flow's transform fixes, else what the data say, else 8.
        levels: number of levels instead.
        dequantize: see `flowsolve.bits_per_dim`.
        importance: see `flowsolve.bits_per_dim`.
        draws: see `flowsolve.bits_per_dim`.
        seed: key of the dequantisation and of the trace probes.
        device: where to compute, by default where the network is; "cuda" is that of LOCAL_RANK.
        cpu_threads: threads of torch in a process. Their number decides how sums are rounded, so it is a setting like
            any other; processes (torchrun) use more cores without changing a bit.
        on_error: what becomes of an image that cannot be read or solved: "stop" the run, or "skip" it and note why.
        resume: go on with the run that is in `out`, if there is one.
        progress: show a progress bar (rank 0).
        plot: draw report.png (needs matplotlib).
        parquet: write results.parquet too (needs pyarrow).
        notes: kept in the manifest.
        **options: passed to `flowsolve.bits_per_dim` (trace, probes, nfe, grid, chart, repeats,
            tolerance, prior, interval, …).

    Returns:
        The report, as in report.json; None where other processes have not finished yet, of which the last makes it.

    Raises:
        RunError: an image cannot be used and on_error is "stop", a file cannot be written, or `out` holds a run with
            other settings. What was finished is kept, and the same call goes on from there.
        FileExistsError: `out` is in use.
        ValueError: bad options, images that the flow does not take, or a flow of codes, which has no bits
            per dimension.
    """
    check_batch(batch, on_error)
    needed(plot, parquet)  # before the work, not after it
    rank, out = Rank.here(), Path(out)
    flow = placed(flow, rank.device(device))
    source = open_data(data, limit=limit, layout=layout)
    count = _levels(flow, source, bits, levels)
    task = _Reading(flow, levelled(source, count), batch, on_error, count)
    task.options = dict(
        solver=solver, dequantize=dequantize, importance=importance, draws=draws, seed=seed,
        **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    task.cond = common(options.get("cond"), (source.count, batch))
    task.settings = {
        "flow": fingerprint(flow),
        "data": task.source.identity,
        "shape": spell(task.shape),
        "levels": task.levels,
        "batch": batch,
        **{name: spell(value) for name, value in task.options.items()},
        "device": device_of(flow.net).type,
        "threads": cpu_threads,
    }
    share = None
    if source.count is not None:
        share = sum(min(batch, source.count - b * batch) for b in filter(rank.mine, range(task.batches or 0)))
    name = "nll" if rank.world == 1 else f"nll, rank {rank.number} of {rank.world}"
    bar = Progress(name, share, unit="bpd", show=progress and rank.number == 0)
    with threads(cpu_threads):
        parts = execute(task, out, rank=rank, resume=resume, bar=bar, notes=notes or {})
        if parts is None:
            return None
        machine = environment(device_of(flow.net))
        with keeping(out):
            return report(parts, out, task.settings, source, machine, columns=task.columns, plot=plot, parquet=parquet)


def _levels(flow: Flow, source: Data, bits: int | None, levels: int | None) -> int:
    """How many levels there are, as the caller, the flow's transform and the data say."""
    if bits is not None or levels is not None or source.levels is None:
        return level_count(flow, bits, levels)
    fixed = flow.transform.levels if isinstance(flow.transform, Transform) else None
    if fixed not in (None, source.levels):
        raise ValueError(
            f"the data have {source.levels} levels, but the flow's transform {flow.transform!r} fixes {fixed}; "
            "give data that the flow models, or declare its transform="
        )
    return level_count(flow, None, source.levels)


class _Reading(Task):
    """The task."""

    name = "nll"
    value = "bpd"
    error = "solver_error"
    columns: Mapping[str, str] = {
        **dict(name="TEXT", digest="TEXT", bpd="REAL", nfe="INTEGER", status="TEXT", error="TEXT"),
        **dict.fromkeys(ERRORS, "REAL"),
    }
    options: dict[str, Any]
    cond: dict[str, Any]
    verified = False

    def __init__(self, flow: Flow, source: Data, batch: int, on_error: str, levels: int) -> None:
        self.flow, self.source, self.batch, self.on_error, self.levels = flow, source, batch, on_error, levels
        self.device = device_of(flow.net)
        known = event_shape(flow)
        self.shape = known or source.shape()
        self.whose = "what the checkpoint takes" if known else "that of the others"

    @property
    def batches(self) -> int | None:
        """How many there are, as soon as it is known."""
        return None if self.source.count is None else -(-self.source.count // self.batch)

    def resumed(self, known: Parts, out: Path) -> None:
        """Read some of the finished images again: they must be what they were."""
        if not self.source.indexed or not known.where:
            return
        rows = [row for row in known.rows("idx, name, digest") if row[2] is not None]
        for index, name, was in rows[:: max(1, len(rows) // CHECKED)]:
            item = self.source.read(index)
            if isinstance(item, Tensor) and digest(item) != was:
                raise RunError(
                    f"{name} has changed since its result was written in {out}: the data are not the same; restore "
                    "them, or choose another directory",
                    out,
                )

    def work(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """The rows of each wanted batch; an image that has none is stepped over or ends the run."""
        for number, first, items in self.source.batches(self.batch, wanted):
            yield number, self._rows(first, items)

    def _rows(self, first: int, items: list[Item]) -> list[Row]:
        checked = {index: self._checked(index, item) for index, item in enumerate(items, first)}
        for item in checked.values():
            if isinstance(item, ItemError) and self.on_error == "stop":
                raise item
        found = self._solved({index: item for index, item in checked.items() if isinstance(item, Tensor)})
        rows: list[Row] = []
        for index, item in checked.items():
            head = (index, self.source.name(index))
            if isinstance(item, ItemError):
                rows.append((*head, None, None, None, "unusable", item.reason, *[None] * len(ERRORS)))
            else:
                rows.append((*head, digest(item), *found[index]))
        return rows

    def _solved(self, images: dict[int, Tensor]) -> dict[int, Row]:
        """What a row says of each image's solve: bits/dim, evaluations, status, what went wrong, its errors."""
        if not images:
            return {}
        x = torch.stack(list(images.values())).to(self.device)
        call = dict(levels=self.levels, samples=list(images), **self.options)
        call["cond"] = rows_of(self.cond, list(images))
        call.setdefault("verify", not self.verified)
        failed: dict[int, str] = {}
        try:
            found = bits_per_dim(self.flow, x, **call)
        except SolverError as error:
            failed = {i: f"the solve {error.solution.messages[i]}" for i in error.samples}
            self._stop(images, failed)
            found = bits_per_dim(self.flow, x, throw=False, **call)
        self.verified = True
        values = found.bpd.tolist()
        failed |= {i: f"bits/dim is {v}" for i, v in enumerate(values) if not math.isfinite(v) and i not in failed}
        self._stop(images, failed)
        errors = [[v if math.isfinite(v) else None for v in getattr(found, name).tolist()] for name in ERRORS]
        return {
            index: (None, nfe, "failed", failed[i], *[None] * len(ERRORS))
            if i in failed
            else (bpd, nfe, "success", None, *own)
            for i, (index, bpd, nfe, *own) in enumerate(zip(images, values, found.nfe.tolist(), *errors, strict=True))
        }

    def _stop(self, images: dict[int, Tensor], failed: dict[int, str]) -> None:
        """Raise the first failure, if the run stops at one."""
        if failed and self.on_error == "stop":
            i = min(failed)
            raise ItemError(self.source.origin(list(images)[i]), failed[i])

    def _checked(self, index: int, item: Item) -> Item:
        """An image of the shape and levels of the others, or what is wrong with it."""
        if isinstance(item, ItemError):
            return item
        name = self.source.origin(index)
        if self.shape is None:
            self.shape = tuple(item.shape)
        if tuple(item.shape) != self.shape:
            return ItemError(name, f"its shape is {_size(item.shape)}; expected {_size(self.shape)}, {self.whose}")
        if not item.is_floating_point() and item.dtype != torch.bool and item.numel():
            low, high = int(item.min()), int(item.max())
            if low < 0 or high >= self.levels:
                return ItemError(name, f"its levels run from {low} to {high}; expected 0 … {self.levels - 1}")
        return item


def _size(shape: Any) -> str:
    """C×H×W."""
    return "×".join(str(n) for n in shape)
