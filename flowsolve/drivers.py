r"""The drivers: they run the steps of a solver and answer its queries by a function.

A driver counts every evaluation, by what the answer cost (`Query.cost`), notices values that are not finite, keeps a
failed sample from disturbing the others, and shows progress.

* `march` goes through a fixed grid. It reads nothing back from the device before the end: one number a sample and step
  (at most 16 steps of a solve) is set aside there, and tells where a sample stopped being finite.
* `pursue` runs an adaptive solver. Samples leave the batch as they finish, so that none is evaluated longer than it
  needs, and waiting ones take their places: the two evaluations that choose a newcomer's first step ride along with the
  first two of the others' next attempt, so the network sees one nearly full batch and no small ones.

With `segments`, gradients of n steps need the memory of O(√n): the graph of a segment is thrown away and made again
when it is needed (`torch.utils.checkpoint`). Adaptive segments grow by one attempt each, so that n need not be known,
and a repeated attempt is decided by the errors noted the first time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowsolve._batch import Context, take
from flowsolve._optional import require
from flowsolve.kernels import control, largest
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Attempt, Status
from flowsolve.solvers.base import Query, State, Stepper
from flowsolve.solvers.runge_kutta import Stride, look

__all__ = [
    "Arrivals",
    "Ask",
    "Finished",
    "Metered",
    "checks",
    "collect",
    "march",
    "pursue",
    "resident",
    "settle",
    "stepped",
]

CHECKS = 16
Count = NDArray[np.int64]
Watch = Mapping[int, Sequence[float]]
Visit = Callable[[int, Any, Stride | None], Generator[Query, Any, None]]
"""What to do after a step: its number, what is carried on, and the step itself where its interpolant is at hand."""
Travel = Callable[[Any, int, int, Container[int], Visit], Generator[Query, Any, Any]]
"""From what is carried at one node to what is at another, (state, first, last, visited, visit), visiting on the way."""
Look = tuple[Count, Count, Tensor]
RUNNING = control.RUNNING


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
                bar(1)

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
    with _bar(progress, steps, "step") as bar:
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
    count = len(x)
    whole = torch.zeros(count, dtype=torch.int64)
    t, status = torch.full((count,), start, dtype=torch.float64), whole + Status.SUCCESS
    if magnitudes is not None:
        bad = ~torch.isfinite(magnitudes).cpu()
        ends = torch.tensor(checked, dtype=torch.float64)
        failed = bad.any(0)
        t = torch.where(failed, ends[bad.int().argmax(0)], ends[-1])
        status = torch.where(failed, int(Status.NONFINITE), status)
    return Solution(x, whole + calls, status, whole + steps, whole, t)


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

    def beginning(self, y: Tensor) -> Generator[Query, Tensor, AdaptiveState]:
        """The choice of newcomers' first steps."""
        return self.solver.begin(y, self.start, self.end)

    def attempt(self, batch: _Batch, errors: NDArray[np.float64] | None = None) -> Generator[Query, Tensor, Attempt]:
        """The next attempt of a batch."""
        return self.solver.attempt(batch.state, self.end, errors)

    def settle(self, batch: _Batch, attempt: Attempt) -> _Round:
        """The batch after an attempt."""
        if self.watcher is not None:
            self.watcher(attempt, batch.context)
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
            values, extra = _answered(look(stride, inside, theta), batch.context.select(unique), self.ask)
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
                attempt = _charged(*_answered(self.attempt(now.batch, errors), batch.context, self.ask))
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
        total: the number of samples to come, for the progress bar.

    Raises:
        ValueError: a budget that does not suffice for one step.
    """
    pursuit = _Pursuit(solver, start, end, ask, np.asarray(stops, dtype=np.float64), budget, watcher)
    limit = budget.limit if isinstance(budget, Metered) else budget
    if limit is not None and limit < pursuit.least:
        raise ValueError(
            f"a budget of {limit} evaluations; {type(solver).__name__} needs {pursuit.least} to take one step"
        )
    batch: _Batch | None = None
    entered, finished, spent, length, exhausted = 0, 0, 0, 1, False
    with _bar(progress, total, "sample") as bar:
        while True:
            fresh = None
            if not exhausted and (batch is None or len(batch) < width):
                fresh = arrivals(width - (0 if batch is None else len(batch)))
                exhausted = fresh is None
            rounds: list[_Round] = []
            if batch is None:
                if fresh is None:
                    return
                begun = _begun(*_answered(pursuit.beginning(fresh[0]), fresh[1], ask))
            elif fresh is None:
                if segments:
                    rounds.append(pursuit.segment(batch, length))
                    length += 1
                else:
                    attempt = _charged(*_answered(pursuit.attempt(batch), batch.context, ask))
                    rounds.append(pursuit.settle(batch, attempt))
            else:
                pairs = [(pursuit.attempt(batch), batch.context), (pursuit.beginning(fresh[0]), fresh[1])]
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
                bar(len(leaving), nfe=spent / finished)
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


def _answered(generator: Generator[Query, Tensor, Any], context: Context, ask: Ask) -> tuple[Any, Any]:
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


@contextmanager
def _bar(show: bool, total: int | None, unit: str) -> Iterator[Callable[..., Any]]:
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
