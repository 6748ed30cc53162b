r"""Streams: more samples than the network is to see at a time, from memory or from an iterator.

A `Job` says how samples become the state of an ODE and back: sampling, encoding and likelihood are three jobs. `stream`
runs one over chunks of samples, of any sizes, and yields a result for each chunk in order, as soon as it is complete.

* An adaptive solver keeps `width` samples under way. One that finishes leaves, a waiting one enters, and the network
  sees a nearly full batch until the source runs dry (`flowsolve.pursuit.pursue`). A result is the same, to rounding, as
  that of a sample alone.
* On a fixed grid all samples cost the same: chunks are cut and joined to batches of `width`.

Chunks are drawn from the source only when there is room, so a data set larger than memory passes through; what waits is
the results of chunks behind one that is not complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import Context, take
from flowsolve.conditioning import rows_of, settled
from flowsolve.pursuit import Arrivals, Finished, collect
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive
from flowsolve.solvers.base import Solver

__all__ = ["Chunk", "Job", "cut", "join", "numbered", "stream"]


class Chunk(NamedTuple):
    """Samples on their way in.

    Attributes:
        x: shape (n, *S).
        cond: what is passed to the network, every tensor marked with whose it is (`flowsolve.conditioning`).
        samples: the global number of each sample, int64 of shape (n,).
    """

    x: Tensor
    cond: Any
    samples: Tensor


class Job(Protocol):
    """What is done with each sample."""

    @property
    def solver(self) -> Solver:
        """The solver."""
        ...

    @property
    def gradient(self) -> str:
        """How gradients are recorded, if autograd does (`flowsolve.gradients`)."""
        ...

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The states at the start of the solve, shape (n, …), and what belongs to them."""
        ...

    def pursuer(self, arrivals: Arrivals, **options: Any) -> Iterator[Finished]:
        """The adaptive solve of samples that come and go (`flowsolve.pursuit.pursue`)."""
        ...

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve of a whole batch."""
        ...

    def leave(self, solution: Solution, context: Context) -> Any:
        """The result, from the solution of the solve."""
        ...


@dataclass
class _Open:
    """A chunk that is not complete: its samples are numbers first … first + size − 1 of the stream."""

    first: int
    y: Tensor
    context: Context
    parts: list[Finished]
    missing: int


def stream(
    job: Job, chunks: Iterable[Chunk], width: int, *, progress: bool = False, total: int | None = None
) -> Iterator[Any]:
    """Run a job over chunks of samples with at most `width` of them at a time, and yield a result for each chunk.

    Args:
        job: what is done.
        chunks: the samples.
        width: the most samples the network sees at a time.
        progress: show a progress bar with the mean NFE (needs tqdm).
        total: the number of samples to come, for the progress bar.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"batch = {width!r}; expected an integer >= 1, the most samples the network sees at a time")
    if job.gradient != "direct":
        raise ValueError(f"gradient={job.gradient!r} needs the batch as a whole; drop batch={width}")
    sizes: deque[int] = deque()
    pieces = _pieces(iter(chunks), width, sizes)
    if isinstance(job.solver, Adaptive) and job.solver.adaptive:
        return _regrouped(_refilled(job, pieces, width, progress, total), sizes)
    return _regrouped(_rebatched(job, pieces, width, progress), sizes)


def _pieces(chunks: Iterator[Chunk], width: int, sizes: deque[int]) -> Iterator[Chunk]:
    """The chunks, cut to at most `width` samples each; their sizes are noted."""
    for chunk in chunks:
        sizes.append(len(chunk.x))
        if len(chunk.x) <= width:
            yield chunk
            continue
        for index in np.split(np.arange(len(chunk.x)), range(width, len(chunk.x), width)):
            yield Chunk(take(chunk.x, index), rows_of(chunk.cond, index), take(chunk.samples, index))


def _regrouped(results: Iterator[Any], sizes: deque[int]) -> Iterator[Any]:
    """Results of other sizes, as one for each chunk."""
    held: list[Any] = []
    for result in results:
        held.append(result)
        while sizes and sum(len(r.nfe) for r in held) >= sizes[0]:
            size, whole = sizes.popleft(), held[0] if len(held) == 1 else join(held)
            yield cut(whole, 0, size)
            held = [cut(whole, size, len(whole.nfe))]


def _refilled(job: Job, chunks: Iterator[Chunk], width: int, progress: bool, total: int | None) -> Iterator[Any]:
    opened: deque[_Open] = deque()
    waiting: list[tuple[Tensor, Context]] = []
    drawn = 0

    def arrivals(n: int) -> tuple[Tensor, Context] | None:
        nonlocal drawn
        while sum(len(y) for y, _ in waiting) < n and (chunk := next(chunks, None)) is not None:
            y, context = job.enter(chunk)
            opened.append(_Open(drawn, y, context, [], len(y)))
            drawn += len(y)
            if len(y):
                waiting.append((y, context))
        taken, found = 0, []
        while waiting and taken < n:
            y, context = waiting.pop(0)
            here = min(len(y), n - taken)
            if here < len(y):
                rest = np.arange(here, len(y))
                waiting.insert(0, (y[here:], context.select(rest)))
                y, context = y[:here], context.select(np.arange(here))
            found.append((y, context))
            taken += here
        if not found:
            return None
        contexts = [context for _, context in found]
        joined = contexts[0]
        for context in contexts[1:]:
            joined = joined.joined(context)
        return torch.cat([y for y, _ in found]) if len(found) > 1 else found[0][0], joined

    def complete() -> Iterator[Any]:
        while opened and not opened[0].missing:
            chunk = opened.popleft()
            if len(chunk.y):
                parts = [p._replace(ids=p.ids - chunk.first) for p in chunk.parts]
                _, solution = collect(parts, chunk.y, 0)
            else:
                solution = _nothing(chunk.y)
            yield job.leave(solution, chunk.context)

    for part in job.pursuer(arrivals, width=width, progress=progress, total=total):
        for chunk in opened:
            mine = np.flatnonzero((part.ids >= chunk.first) & (part.ids < chunk.first + len(chunk.y)))
            if len(mine):
                whole = len(mine) == len(part.ids)
                y = part.y if whole else take(part.y, mine)
                chunk.parts.append(Finished(part.ids[mine], y, part.s[mine], part.counts[:, mine], []))
                chunk.missing -= len(mine)
        yield from complete()
    yield from complete()


def _rebatched(job: Job, chunks: Iterator[Chunk], width: int, progress: bool) -> Iterator[Any]:
    """Results for batches of `width`, joined from the chunks."""
    y: Tensor | None = None
    context: Context | None = None
    for chunk in chunks:
        more, its = job.enter(chunk)
        y, context = (more, its) if y is None or context is None else (torch.cat((y, more)), context.joined(its))
        while len(y) >= width:
            part = context.select(np.arange(width))
            yield job.leave(job.run(y[:width], part, progress), part)
            y, context = y[width:], context.select(np.arange(width, len(y)))
    if y is not None and context is not None:
        yield job.leave(job.run(y, context, progress) if len(y) else _nothing(y), context)


def _nothing(y: Tensor) -> Solution:
    whole = torch.zeros(0, dtype=torch.int64)
    return Solution(y, whole, whole, whole, whole, torch.zeros(0, dtype=torch.float64))


def numbered(chunks: Iterable[Any], cond: Mapping[str, Any]) -> Iterator[Chunk]:
    """Chunks from tensors, or pairs (x, cond), with their samples numbered in order, and what they share (`common`)."""
    first = 0
    for item in chunks:
        x, own = item if isinstance(item, tuple) else (item, {})
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise TypeError(
                f"the source gave a {type(item).__name__}; expected tensors of shape (n, *S), or pairs of one and the "
                "network's keyword arguments"
            )
        numbers = torch.arange(first, first + len(x))
        yield Chunk(x, {**rows_of(cond, numbers), **settled(own, len(x))}, numbers)
        first += len(x)


def cut(result: Any, first: int, last: int) -> Any:
    """Samples first … last − 1 of a result whose fields have one entry a sample."""
    changes: dict[str, Any] = {}
    for f in fields(result):
        value = getattr(result, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = value[first:last]
        elif is_dataclass(value):
            changes[f.name] = cut(value, first, last)
    return replace(result, **changes)


def join(results: Sequence[Any]) -> Any:
    """Results of the same kind as one."""
    changes: dict[str, Any] = {}
    for f in fields(results[0]):
        values = [getattr(r, f.name) for r in results]
        if isinstance(values[0], Tensor):
            changes[f.name] = torch.cat(values)
        elif is_dataclass(values[0]):
            changes[f.name] = join(values)
    return replace(results[0], **changes)
