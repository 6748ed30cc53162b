r"""The driver of adaptive solvers: samples leave the batch as they finish, and waiting ones take their places.

None is evaluated longer than it needs. The two evaluations that choose a newcomer's first step ride along with the
first two of the others' next attempt, so the network sees one nearly full batch and no small ones. What an evaluation
cost (`Query.cost`) is charged to each sample; where costs differ (`Metered`) an attempt is priced before it is made.

With `segments`, gradients of n attempts need the memory of O(√n) (`flowsolve.drivers`). Segments grow by one attempt
each, so that n need not be known, and a repeated attempt is decided by the errors noted the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowsolve._batch import Context, take
from flowsolve.drivers import Ask, bar
from flowsolve.kernels import control
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Attempt, Status
from flowsolve.solvers.base import Query
from flowsolve.solvers.runge_kutta import Stride, look

__all__ = ["Arrivals", "Finished", "Follower", "Metered", "answered", "collect", "pursue", "resident"]

Count = NDArray[np.int64]
Look = tuple[Count, Count, Tensor]
RUNNING = control.RUNNING


class Finished(NamedTuple):
    """Samples that have left, and what was looked at since the last ones did.

    Attributes:
        ids: their numbers, in the order of arrival.
        y: their last states, shape (n, *S).
        s: the times they reached.
        counts: accepted and rejected steps, rejections in a row, evaluations and status (`AdaptiveState.counts`).
        looks: (positions in `stops`, ids, states) of interior stops passed.
    """

    ids: Count
    y: Tensor
    s: NDArray[np.float64]
    counts: Count
    looks: list[Look]


@dataclass(frozen=True)
class Metered:
    """A budget of evaluations that do not all cost the same.

    Attributes:
        limit: the most that a sample may cost.
        price: what each sample's queries at times (m, B) of the solve's clock will cost, int64 of shape (B,).
        most: the most that one of them costs.
    """

    limit: int
    price: Callable[[NDArray[np.float64]], Count]
    most: int


Arrivals = Callable[[int], tuple[Tensor, Context] | None]
"""Up to n waiting samples, their states and context; None when there are no more."""


class Follower(Protocol):
    """What goes along with an adaptive solve (`flowsolve.dense`, `flowsolve.events`)."""

    def attempted(self, ids: Count, attempt: Attempt, context: Context, ask: Ask) -> Attempt:
        """An attempt of the samples of these numbers, as it is to count."""
        ...

    def strode(self, stride: Stride, context: Context) -> Generator[Query, Tensor, None]:
        """A step of all samples on a fixed grid, whose times and size are arrays."""
        ...


def resident(y: Tensor, context: Context) -> Arrivals:
    """Arrivals for a batch that is there as a whole."""
    waiting = iter([(y, context)])
    return lambda n: next(waiting, None)


@dataclass(frozen=True)
class _Batch:
    """Samples under way: their state, context, numbers, and how many stops each has passed."""

    state: AdaptiveState
    context: Context
    ids: Count
    passed: Count

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Count) -> _Batch:
        return _Batch(self.state.select(index), self.context.select(index), self.ids[index], self.passed[index])

    def joined(self, other: _Batch) -> _Batch:
        return _Batch(
            self.state.joined(other.state),
            self.context.joined(other.context),
            np.concatenate((self.ids, other.ids)),
            np.concatenate((self.passed, other.passed)),
        )


class _Round(NamedTuple):
    """A batch after one or more attempts, what its samples passed, and whether any of them has ended."""

    batch: _Batch
    looks: list[Look]
    ended: bool


@dataclass(frozen=True)
class _Pursuit:
    """An adaptive solve: what one round of it does to a batch. The arguments are those of `pursue`."""

    solver: Adaptive
    start: float
    end: float
    ask: Ask
    stops: NDArray[np.float64]
    budget: int | Metered | None
    watcher: Callable[[Attempt, Context], None] | None
    followers: Sequence[Follower] = ()

    @property
    def lookup(self) -> int:
        """The most queries that looking at the stops within a step may take."""
        return len(self.solver.pair.dense) - self.solver.pair.stages if len(self.stops) else 0

    @property
    def least(self) -> int:
        """A budget that suffices for one step."""
        queries = self.solver.begin_nfe + self.solver.attempt_nfe + self.lookup
        return queries * self.budget.most if isinstance(self.budget, Metered) else queries

    def spent(self, state: AdaptiveState) -> NDArray[np.bool_]:
        """Which samples are under way and cannot afford another attempt."""
        running, budget = state.status == RUNNING, self.budget
        if isinstance(budget, Metered):
            need = budget.price(self.solver.ahead(state, self.end)) + self.lookup * budget.most
            short: NDArray[np.bool_] = state.nfe + need > budget.limit
        else:
            short = state.nfe + self.solver.attempt_nfe + self.lookup > (budget or 0)
        spent: NDArray[np.bool_] = running & short
        return spent

    def enter(self, y: Tensor, state: AdaptiveState, context: Context, first: int) -> _Round:
        """Newcomers whose first step is chosen, numbered from `first`."""
        ids, passed = np.arange(first, first + len(state)), np.zeros(len(state), dtype=np.int64)
        looks: list[Look] = []
        if len(self.stops) and self.stops[0] == self.start:
            looks.append((passed, ids, y))
            passed = passed + 1
        return _Round(_Batch(state, context, ids, passed), looks, bool((state.status != RUNNING).any()))

    def beginning(self, y: Tensor, context: Context) -> Generator[Query, Tensor, AdaptiveState]:
        """The choice of newcomers' first steps."""
        if context.columns is not None:
            return self.solver.begin(y, self.start, self.end, context.columns)
        return self.solver.begin(y, self.start, self.end)

    def attempt(self, batch: _Batch, errors: NDArray[np.float64] | None = None) -> Generator[Query, Tensor, Attempt]:
        """The next attempt of a batch."""
        if batch.context.columns is not None:
            return self.solver.attempt(batch.state, self.end, errors, batch.context.columns)
        return self.solver.attempt(batch.state, self.end, errors)

    def settle(self, batch: _Batch, attempt: Attempt) -> _Round:
        """The batch after an attempt."""
        if self.watcher is not None:
            self.watcher(attempt, batch.context)
        for follower in self.followers:
            attempt = follower.attempted(batch.ids, attempt, batch.context, self.ask)
        state, passed, ended = attempt.state, batch.passed, attempt.ended > 0
        looks: list[Look] = []
        if len(self.stops):
            sign = 1.0 if self.end >= self.start else -1.0
            passed = np.searchsorted(sign * self.stops, sign * state.s, side="right")
            state, looks = self.look(batch, attempt, passed)
        if self.budget is not None:
            spent = self.spent(state)
            state, ended = state.mark(spent, Status.BUDGET), ended or bool(spent.any())
        return _Round(_Batch(state, batch.context, batch.ids, passed), looks, ended)

    def look(self, batch: _Batch, attempt: Attempt, passed: Count) -> tuple[AdaptiveState, list[Look]]:
        """The states at the stops that an attempt's accepted steps passed, and the batch's state with that paid for."""
        state, stride = attempt.state, attempt.stride
        looks: list[Look] = []
        rows = np.repeat(np.arange(len(state)), passed - batch.passed)
        if not len(rows):
            return state, looks
        stops = np.concatenate([np.arange(a, b) for a, b in zip(batch.passed, passed, strict=True)])
        exact = self.stops[stops] == state.s[rows]
        if exact.any():
            looks.append((stops[exact], batch.ids[rows[exact]], take(state.y, rows[exact])))
        if not exact.all():
            inside, at = rows[~exact], stops[~exact]
            theta = (self.stops[at] - stride.s[inside]) / stride.h[inside]
            unique = np.unique(inside)
            values, extra = answered(look(stride, inside, theta), batch.context.select(unique), self.ask)
            looks.append((at, batch.ids[inside], values))
            state = state.charge(unique, stride.missing + extra)
        return state, looks

    def segment(self, batch: _Batch, length: int) -> _Round:
        """Up to `length` attempts of a batch that is running as a whole, with a graph that is remade when needed."""
        tape: list[NDArray[np.float64]] = []
        made: list[Any] = []

        def through(y: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
            now = _Round(replace(batch, state=replace(batch.state, y=y, slope=slope)), [], False)
            kept: list[Look] = []
            for i in range(length):
                errors = tape[i] if i < len(tape) else None
                attempt = _charged(*answered(self.attempt(now.batch, errors), batch.context, self.ask))
                if errors is None:
                    tape.append(attempt.error)
                now = self.settle(now.batch, attempt)
                kept += now.looks
                if now.ended:
                    break
            if not made:
                made.append(now._replace(looks=kept))
            return now.batch.state.y, now.batch.state.slope, *(values for _, _, values in kept)

        y, slope, *values = checkpoint(through, batch.state.y, batch.state.slope, use_reentrant=False)
        after, kept, ended = made[0]
        made[0] = None  # the graph made on the way is not to be kept alive
        looks = [(at, ids, v) for (at, ids, _), v in zip(kept, values, strict=True)]
        return _Round(replace(after, state=replace(after.state, y=y, slope=slope)), looks, ended)


def pursue(
    solver: Adaptive,
    arrivals: Arrivals,
    start: float,
    end: float,
    ask: Ask,
    *,
    width: int,
    stops: Sequence[float] = (),
    budget: int | Metered | None = None,
    segments: bool = False,
    watcher: Callable[[Attempt, Context], None] | None = None,
    followers: Sequence[Follower] = (),
    progress: bool = False,
    total: int | None = None,
) -> Iterator[Finished]:
    """Run an adaptive solver from start to end, each sample with its own steps, and yield samples as they finish.

    Args:
        arrivals: where samples come from.
        width: the most samples that are under way at a time.
        stops: times between start and end to look at, in order.
        budget: the most evaluations a sample may cost.
        segments: throw away and remake the graph of O(√n) attempts at a time; for a resident batch.
        watcher: is shown every attempt.
        followers: go along, and may end samples.
        total: the number of samples to come, for the progress bar.

    Raises:
        ValueError: a budget that does not suffice for one step.
    """
    pursuit = _Pursuit(solver, start, end, ask, np.asarray(stops, dtype=np.float64), budget, watcher, followers)
    limit = budget.limit if isinstance(budget, Metered) else budget
    if limit is not None and limit < pursuit.least:
        raise ValueError(
            f"a budget of {limit} evaluations; {type(solver).__name__} needs {pursuit.least} to take one step"
        )
    batch: _Batch | None = None
    entered, finished, spent, length, exhausted = 0, 0, 0, 1, False
    with bar(progress, total, "sample") as tick:
        while True:
            fresh = None
            if not exhausted and (batch is None or len(batch) < width):
                fresh = arrivals(width - (0 if batch is None else len(batch)))
                exhausted = fresh is None
            rounds: list[_Round] = []
            if batch is None:
                if fresh is None:
                    return
                begun = _begun(*answered(pursuit.beginning(*fresh), fresh[1], ask))
            elif fresh is None:
                if segments:
                    rounds.append(pursuit.segment(batch, length))
                    length += 1
                else:
                    attempt = _charged(*answered(pursuit.attempt(batch), batch.context, ask))
                    rounds.append(pursuit.settle(batch, attempt))
            else:
                pairs = [(pursuit.attempt(batch), batch.context), (pursuit.beginning(*fresh), fresh[1])]
                attempted, entering = _convoy(pairs, ask)
                rounds.append(pursuit.settle(batch, _charged(*attempted)))
                begun = _begun(*entering)
            if fresh is not None:
                rounds.append(pursuit.enter(fresh[0], begun, fresh[1], entered))
                entered += len(fresh[0])
            batch = reduce(_Batch.joined, [r.batch for r in rounds])
            looks = [look for r in rounds for look in r.looks]
            if any(r.ended for r in rounds):
                state, done = batch.state, batch.state.status != RUNNING
                leaving = np.flatnonzero(done)
                whole = len(leaving) == len(done)
                finished, spent = finished + len(leaving), spent + int(state.nfe[leaving].sum())
                tick(len(leaving), nfe=spent / finished)
                y, left = state.y if whole else take(state.y, leaving), batch.ids[leaving]
                batch = None if whole else batch.select(np.flatnonzero(~done))
                yield Finished(left, y, state.s[leaving], state.counts[:, leaving], looks)
            elif looks:
                state = batch.state
                yield Finished(batch.ids[:0], state.y[:0], state.s[:0], state.counts[:, :0], looks)


def _charged(attempt: Attempt, extra: Any) -> Attempt:
    """An attempt with what its evaluations cost beyond one each."""
    if isinstance(extra, int):
        return attempt
    return attempt._replace(state=attempt.state.charge(np.arange(len(attempt.state)), extra))


def _begun(state: AdaptiveState, extra: Any) -> AdaptiveState:
    """Newcomers with what their evaluations cost beyond one each."""
    return state if isinstance(extra, int) else state.charge(np.arange(len(state)), extra)


def answered(generator: Generator[Query, Tensor, Any], context: Context, ask: Ask) -> tuple[Any, Any]:
    """The result of a generator whose queries belong to samples with one context; what they cost beyond one each."""
    tree, extra = context.tree, 0
    try:
        query = next(generator)
        while True:
            answer = ask(query, tree)
            extra = extra + (query.cost - 1)
            query = generator.send(answer)
    except StopIteration as stop:
        return stop.value, extra


def _convoy(parts: Sequence[tuple[Generator[Query, Tensor, Any], Context]], ask: Ask) -> list[tuple[Any, Any]]:
    """Run generators side by side, each query of one joined with the query of the others.

    Returns:
        For each its result, and what its queries cost beyond one each.
    """
    results: list[Any] = [None] * len(parts)
    extras: list[Any] = [0] * len(parts)
    waiting = {i: next(generator) for i, (generator, _) in enumerate(parts)}
    while waiting:
        queries, contexts = list(waiting.values()), [parts[i][1] for i in waiting]
        if len(queries) == 1:
            answers, costs = [ask(queries[0], contexts[0].tree)], [queries[0].cost]
        else:
            joint = Query(torch.cat([q.x for q in queries]), torch.cat([q.t for q in queries]))
            answer = ask(joint, reduce(Context.joined, contexts).tree)
            sizes = [len(q.x) for q in queries]
            answers = list(answer.split(sizes))
            same = isinstance(joint.cost, int)
            costs = [joint.cost] * len(queries) if same else np.split(joint.cost, np.cumsum(sizes)[:-1])
        for i, answer, cost in zip(list(waiting), answers, costs, strict=True):
            extras[i] = extras[i] + (cost - 1)
            try:
                waiting[i] = parts[i][0].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
                del waiting[i]
    return list(zip(results, extras, strict=True))


def collect(parts: Sequence[Finished], y: Tensor, stops: int) -> tuple[Tensor | None, Solution]:
    """What `pursue` yielded for a whole batch, in its order.

    Args:
        y: the states at the start.
        stops: the number of stops.

    Returns:
        The states at the stops, (T, B, *S), NaN where a sample did not get there (None without stops), and the solution
        at the end, whose times are the solver's clock.
    """
    count = y.shape[0]
    ids = np.concatenate([p.ids for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    order = np.argsort(ids)
    sorted_already = bool((order == np.arange(count)).all())

    states = [p.y for p in parts if len(p.ids)]
    x = states[0] if len(states) == 1 else torch.cat(states)
    x = x if sorted_already else take(x, order)
    counts = torch.from_numpy(np.concatenate([p.counts for p in parts], 1)[:, order])
    reached = torch.from_numpy(np.concatenate([p.s for p in parts])[order])
    solution = Solution(
        x, counts[control.NFE], counts[control.STATUS], counts[control.ACCEPTED], counts[control.REJECTED], reached
    )
    if not stops:
        return None, solution
    looks = [entry for p in parts for entry in p.looks]
    table = y.new_full((stops * count, *y.shape[1:]), torch.nan)
    if looks:
        flat = np.concatenate([at * count + who for at, who, _ in looks])
        index = torch.from_numpy(flat).to(y.device)
        table = table.index_copy(0, index, torch.cat([v for _, _, v in looks]))
    return table.unflatten(0, (stops, count)), solution
