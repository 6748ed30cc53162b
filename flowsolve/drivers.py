r"""The drivers: they run the steps of a solver and answer its queries by a function.

A driver counts every evaluation, by what the answer cost (`Query.cost`), notices values that are not finite, keeps a
failed sample from disturbing the others, and shows progress.

`march` goes through a fixed grid. It reads nothing back from the device before the end: one number a sample and step
(at most 16 steps of a solve) is set aside there, and tells where a sample stopped being finite. The driver of adaptive
solvers is `flowsolve.pursuit`.

With `segments`, gradients of n steps need the memory of O(√n): the graph of a segment is thrown away and made again
when it is needed (`torch.utils.checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowsolve._optional import require
from flowsolve._surroundings import array
from flowsolve.kernels import largest
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Status
from flowsolve.solvers.base import Query, State, Stepper
from flowsolve.solvers.runge_kutta import Stride, look

__all__ = ["Ask", "bar", "checks", "march", "settle", "stepped"]

CHECKS = 16
Watch = Mapping[int, Sequence[float]]
Visit = Callable[[int, Any, Stride | None], Generator[Query, Any, None]]
"""What to do after a step: its number, what is carried on, and the step itself where its interpolant is at hand."""
Travel = Callable[[Any, int, int, Container[int], Visit], Generator[Query, Any, Any]]
"""From what is carried at one node to what is at another, (state, first, last, visited, visit), visiting on the way."""


class Ask(Protocol):
    """Answers a query."""

    def __call__(self, query: Query, context: Any, /) -> Any:
        """The answer that the step expects: a slope, or for `march` with a solver of estimates an estimate.

        Args:
            query: the query.
            context: what belongs to its samples (`Context.tree`).
        """
        ...


def stepped(step: Stepper, intervals: Sequence[tuple[float, float, int]]) -> Travel:
    """How a step function travels along intervals, carrying a `State`."""

    def travel(
        state: State, first: int, last: int, visited: Container[int], visit: Visit
    ) -> Generator[Query, Any, State]:
        for i in range(first, last):
            state = yield from step(state, *intervals[i])
            if i in visited:
                yield from visit(i, state, None)
        return state

    return travel


def march(
    travel: Travel,
    state: State | Tensor,
    intervals: Sequence[tuple[float, float, int]],
    ask: Ask,
    context: Any,
    *,
    start: float,
    watch: Watch | None = None,
    segments: bool = False,
    observer: Callable[[int, Any], None] | None = None,
    progress: bool = False,
) -> tuple[list[Tensor], Solution]:
    """Travel from start through the intervals (t, t_next, evaluations) of a fixed grid.

    Args:
        travel: `stepped`, or a Runge–Kutta solver's `sweep`.
        state: what is carried at the start: a `State` with `stepped`, the state itself with a `sweep`.
        watch: for some intervals by number, the times within (t, t_next] to look at; with a `sweep`.
        segments: throw away and remake the graph of √n steps at a time.
        observer: is shown the number of each step and what is carried on after it.

    Returns:
        The states at the times watched, in order, and the solution at the last node.
    """
    steps, nodes, watch = len(intervals), checks(len(intervals)), watch or {}
    calls, seen, magnitudes, checked = 0, [], [], []
    counting = True
    visited: Container[int] = range(steps) if progress or observer else nodes | watch.keys()

    def through(state: State | Tensor, first: int, last: int) -> tuple[Any, ...]:
        """From what is carried at one node to what is at another, with what was looked at on the way."""
        nonlocal calls
        looks: list[Tensor] = []

        def visit(i: int, carried: Any, stride: Stride | None) -> Generator[Query, Any, None]:
            t, t_next, _ = intervals[i]
            x = carried.x if isinstance(carried, State) else carried
            for stop in watch.get(i, ()):
                if stop == t_next or stride is None:
                    looks.append(x)
                else:
                    looks.append((yield from look(stride, None, (stop - t) / (t_next - t))))
            if counting and i in nodes:
                magnitudes.append(largest(x.detach()))
                checked.append(t_next)
            if counting and observer is not None:
                observer(i, carried)
            if counting and progress:
                tick(1)

        generator, made = travel(state, first, last, visited, visit), 0
        try:
            query = next(generator)
            while True:
                answer = ask(query, context)
                made += query.cost
                query = generator.send(answer)
        except StopIteration as stop:
            state = stop.value
        calls += made * counting
        return state, *looks

    length = max(1, math.isqrt(steps)) if segments else max(1, steps)
    with bar(progress, steps, "step") as tick:
        for first in range(0, steps, length):
            last = min(steps, first + length)
            if segments:
                state, *looks = checkpoint(through, state, first, last, use_reentrant=False)
            else:
                state, *looks = through(state, first, last)
            seen += looks
        counting = False  # from here on only gradients may call

    x = state.x if isinstance(state, State) else state
    return seen, settle(x, torch.stack(magnitudes) if magnitudes else None, checked, start, calls, steps)


def checks(steps: int) -> frozenset[int]:
    """The steps of a march after which to look whether all is finite: the last, and at most 16 in all."""
    every = -(-steps // CHECKS) if steps else 1
    return frozenset(i for i in range(steps) if (i + 1) % every == 0 or i + 1 == steps)


def settle(
    x: Tensor, magnitudes: Tensor | None, checked: Sequence[float], start: float, calls: int, steps: int
) -> Solution:
    """The solution of a march that ended in x.

    Args:
        magnitudes: the largest number of each sample at some nodes, (n, B): the one read of a march.
        checked: the times of those nodes.
        start: the time at which the march began.
        calls: evaluations made.
        steps: steps made.
    """
    # In numpy, which starts no threads: on a machine with many cores they cost more than all of this.
    count = len(x)
    t, status = np.full(count, start if magnitudes is None else checked[-1]), np.full(count, int(Status.SUCCESS))
    if magnitudes is not None:
        bad = ~np.isfinite(array(magnitudes))
        if bad.any():
            failed = bad.any(0)
            t[failed] = np.asarray(checked)[bad.argmax(0)[failed]]
            status[failed] = int(Status.NONFINITE)
    nfe, accepted, rejected, ended, reached = (
        torch.from_numpy(v)
        for v in (np.full(count, calls), np.full(count, steps), np.zeros(count, dtype=np.int64), status, t)
    )
    return Solution(x, nfe, ended, accepted, rejected, reached)


@contextmanager
def bar(show: bool, total: int | None, unit: str) -> Iterator[Callable[..., Any]]:
    """A function that advances a progress bar and may note the mean NFE beside it, or does nothing."""
    if not show:
        yield lambda n, nfe=None: None
        return
    with require("tqdm", extra="cli", purpose="progress bars").tqdm(total=total, unit=unit) as bar:

        def advance(n: int, nfe: float | None = None) -> None:
            if nfe is not None:
                bar.set_postfix_str(f"mean NFE {nfe:.1f}", refresh=False)
            bar.update(n)

        yield advance
