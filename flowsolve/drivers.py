r"""The direct drivers: they run the steps of a solver and answer its queries by a function.

A driver counts every evaluation, notices values that are not finite, keeps a failed sample from disturbing the others,
and shows progress.

* `march` goes through a fixed grid. It reads nothing back from the device before the end: one number a sample and step
  is set aside there, and tells where a sample stopped being finite.
* `pursue` runs an adaptive solver. Samples leave the batch as they finish, so that none is evaluated longer than it
  needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve._optional import require
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Status
from flowsolve.solvers.base import Query, State, Stepper, run

__all__ = ["Ask", "march", "pursue"]


class Ask(Protocol):
    """Answers a query for the samples at some positions of the batch (None: all of them)."""

    def __call__(self, query: Query, index: Tensor | None) -> Any:
        """The answer that the step expects: a slope, or an estimate."""
        ...


def march(
    step: Stepper,
    state: State,
    intervals: Sequence[tuple[float, float, int]],
    ask: Ask,
    *,
    start: float,
    keep: Collection[int] = (),
    progress: bool = False,
) -> tuple[list[Tensor], Solution]:
    """Step from start through the intervals (t, t_next, evaluations) of a fixed grid.

    Returns:
        The states at the nodes numbered in `keep`, and the solution at the last node.
    """
    count, calls = state.x.shape[0], 0

    def answer(query: Query) -> Any:
        nonlocal calls
        calls += 1
        return ask(query, None)

    kept = [state.x] if 0 in keep else []
    largest: list[Tensor] = []  # of each sample, NaN if there is one: a reduction a step, read at the end
    with _bar(progress, len(intervals), "step") as bar:
        for i, interval in enumerate(intervals):
            state = run(step(state, *interval), answer)
            largest.append(torch.linalg.vector_norm(rows(state.x.detach()), torch.inf, dim=1))
            if i + 1 in keep:
                kept.append(state.x)
            bar(1)

    whole = torch.zeros(count, dtype=torch.int64)
    t, status = torch.full((count,), start, dtype=torch.float64), whole + Status.SUCCESS
    if intervals:
        bad = ~torch.isfinite(torch.stack(largest)).cpu()
        ends = torch.tensor([end for _, end, _ in intervals], dtype=torch.float64)
        failed = bad.any(0)
        t = torch.where(failed, ends[bad.int().argmax(0)], ends[-1])
        status = torch.where(failed, int(Status.NONFINITE), status)
    return kept, Solution(state.x, whole + calls, status, whole + len(intervals), whole, t)


def pursue(
    solver: Adaptive,
    y: Tensor,
    start: float,
    stops: Sequence[float],
    ask: Ask,
    *,
    translate: Callable[[Any], Any] = lambda inner: inner,
    budget: int | None = None,
    progress: bool = False,
) -> tuple[list[Tensor], Solution]:
    """Run an adaptive solver from start through every stop, each sample with its own steps.

    Args:
        translate: turns the solver's generators into those whose queries `ask` answers (a chart).
        budget: the most evaluations a sample may cost.

    Returns:
        The states at the stops, and the solution at the last; its times are the solver's clock.

    Raises:
        ValueError: a budget that does not suffice for one step.
    """
    least = solver.begin_nfe + solver.attempt_nfe
    if budget is not None and budget < least:
        raise ValueError(f"a budget of {budget} evaluations; {type(solver).__name__} needs {least} to take one step")
    count = y.shape[0]
    if count == 0 or start == stops[-1]:
        whole = torch.zeros(count, dtype=torch.int64)
        t = torch.full((count,), start, dtype=torch.float64)
        return [y] * len(stops), Solution(y, whole, whole + Status.SUCCESS, whole, whole, t)
    kept: list[Tensor] = []
    with _bar(progress, count * len(stops), "sample") as bar:
        state = run(translate(solver.begin(y, start, stops[-1])), lambda query: ask(query, None))
        for stop in stops:
            state = state.mark((state.status == Status.SUCCESS) & (state.s != stop), Status.RUNNING)
            state = state.mark((state.status == Status.RUNNING) & (state.s == stop), Status.SUCCESS)
            state = _reach(solver, state, stop, translate, ask, budget, bar)
            kept.append(state.y)
    return kept, Solution(state.y, state.nfe, state.status, state.accepted, state.rejected, state.s)


def _reach(
    solver: Adaptive,
    whole: AdaptiveState,
    stop: float,
    translate: Callable[[Any], Any],
    ask: Ask,
    budget: int | None,
    bar: Callable[[int], Any],
) -> AdaptiveState:
    """Attempt steps until every sample has reached the stop or failed; those that have are no longer evaluated."""
    batch, index = whole, torch.arange(whole.status.shape[0])
    positions: Tensor | None = None
    while True:
        if budget is not None:
            spent = (batch.status == Status.RUNNING) & (batch.nfe + solver.attempt_nfe > budget)
            batch = batch.mark(spent, Status.BUDGET)
        running = batch.status == Status.RUNNING
        if not bool(running.all()):
            bar(int((~running).sum()))
            whole = batch if positions is None else whole.put(index, batch)
            left = torch.nonzero(running).flatten()
            if not len(left):
                return whole
            batch, index = batch.select(left), index[left]
            positions = index
        batch = run(translate(solver.attempt(batch, stop)), partial(ask, index=positions))


@contextmanager
def _bar(show: bool, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """A function that advances a progress bar, or does nothing."""
    if not show:
        yield lambda n: None
        return
    with require("tqdm", extra="cli", purpose="progress bars").tqdm(total=total, unit=unit) as bar:
        yield bar.update
