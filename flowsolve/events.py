r"""Events: where along a solution a function g(t, y) passes through zero.

At the end of every accepted step g is compared with what it was at its beginning. A change of sign, or an arrival at 0,
is an event; leaving 0 is none, so that a solve may start where another one's event ended it. Its time solves

$$ g\bigl(\tau,\, y(\tau)\bigr) = 0 $$

on the step's interpolant, by Chandrupatla's method (bisection and inverse quadratic interpolation): in its bracket to
the resolution of time, each sample for itself. So the time is as exact as the solution between steps is. Two events
of one function within one step are missed, as everywhere; limit `max_step` where that may be.

**Derivatives.** The time of an event is a function of everything that the solution depends on, given implicitly. With
$\dot g = \partial_t g + \partial_y g \cdot f$, which must not vanish (a crossing, not a touch),

$$ d\tau = -\frac{\partial_y g\, dy + d_\theta g}{\dot g}, \qquad dy(\tau) = dy|_\tau + f\, d\tau . $$

Both follow from two steps of the chord iteration $e \leftarrow e - g/\dot g$ from the time that was found, with
$\tau = \bar\tau + e$ and y moved by the midpoint rule (`flowsolve.gradients`): the value is that of $\bar\tau$, and its
first and second derivatives are the exact ones. It costs five evaluations an event, if gradients are recorded.

Sources: Chandrupatla 1997; Chen, Amos & Nickel 2021 (events of neural ODEs).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import Context, take
from flowsolve.dense import within
from flowsolve.drivers import Ask
from flowsolve.gradients import nudged
from flowsolve.gradients import shift as fixed
from flowsolve.kernels import Slopes, control, host
from flowsolve.pursuit import answered
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Attempt, Status
from flowsolve.solvers.base import Query
from flowsolve.solvers.runge_kutta import Stride, completed

__all__ = ["Event", "Occurrences", "Watch", "root"]

Count = NDArray[np.int64]
Vector = NDArray[np.float64]
Value = Callable[[Tensor, Tensor, Any], Tensor]
"""g of states (n, *S) and times (n,), given what belongs to the samples (`Context.tree`)."""


@dataclass(frozen=True)
class Event:
    """Where g(t, y) passes through zero.

    Attributes:
        g: a function of what f is given, g(t, y, *args), with a number a sample: shape (B,), or (B, 1, …); one number
            with batched=False.
        direction: > 0 for passages from negative to positive only, as the solve goes; < 0 for the others; 0 for both.
        terminal: whether a sample ends there; a number n ends it at its n-th.
    """

    g: Callable[..., Any]
    direction: float = 0.0
    terminal: bool | int = True

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise TypeError(f"g is a {type(self.g).__name__}; expected a function g(t, y) whose zeros are the events")
        if self.terminal is not True and self.terminal is not False and not self.terminal >= 1:
            raise ValueError(f"terminal = {self.terminal!r}; expected True, False, or a number of events")

    @property
    def limit(self) -> int:
        """How many of them a sample may meet."""
        return int(self.terminal) or 2**62


class Occurrences(NamedTuple):
    """Where one event was met, by sample and then by time.

    Attributes:
        sample: positions in the batch, int64 of shape (n,).
        t: times, float64 of shape (n,), differentiable.
        y: states there, as f knows them, with n as the first dimension; differentiable.
    """

    sample: Tensor
    t: Tensor
    y: Any


class Watch:
    """Looks for events along a solve of a batch; a `flowsolve.dense.Follower`.

    Args:
        events: what is looked for.
        values: their g, one each.
        count: the number of samples.
        ask: dy/ds for a query.
    """

    def __init__(self, events: Sequence[Event], values: Sequence[Value], count: int, ask: Ask) -> None:
        self.events, self.values, self.ask = events, values, ask
        self.last = np.full((len(events), count), np.nan)
        self.left = np.array([[e.limit] * count for e in events])
        self.ended = np.full(count, np.nan)
        self.final: dict[int, tuple[int, int]] = {}  # a sample: where in `found` the event is that ended it
        self.found: list[list[tuple[Count, Tensor, Tensor]]] = [[] for _ in events]

    def attempted(self, ids: Count, attempt: Attempt, context: Context, ask: Ask) -> Attempt:
        """See `Follower`."""
        fired = self._fired(ids, attempt.stride, attempt.accepted, context)
        if not fired.any():
            return attempt
        rows, stride = np.flatnonzero(fired.any(0)), attempt.stride
        (slopes, h), extra = answered(completed(stride, rows), context.select(rows), ask)
        more = stride.missing + extra
        ends, y, spent = self._settled(ids, rows, fired[:, rows], stride, slopes, h, context)
        state = attempt.state
        state = state.charge(rows, more + spent)
        over = ~np.isnan(ends)
        if over.any():
            places = rows[over]
            real, counts = state.real.copy(), state.counts.copy()
            real[control.S, places] = ends[over]
            counts[control.STATUS, places] = int(Status.EVENT)
            index = torch.from_numpy(places).to(state.y.device)
            assert y is not None
            state = replace(state, y=state.y.index_copy(0, index, y), real=real, counts=counts)
        return attempt._replace(state=state, ended=attempt.ended + int(over.sum()))

    def strode(self, stride: Stride, context: Context) -> Generator[Query, Tensor, None]:
        """See `Follower`."""
        ids = np.arange(len(stride.y))
        fired = self._fired(ids, stride, np.isnan(self.ended), context)
        if fired.any():
            rows = np.flatnonzero(fired.any(0))
            slopes, _ = yield from completed(stride, None)
            chosen = Slopes(take(slopes.y, rows))
            for k in slopes.tensors:
                chosen.append(take(k, rows))
            self._settled(ids, rows, fired[:, rows], stride, chosen, stride.h[rows], context)

    def _fired(self, ids: Count, stride: Stride, accepted: NDArray[np.bool_], context: Context) -> NDArray[np.bool_]:
        """Which events happened in a step, (E, n)."""
        before = self.last[:, ids]
        if np.isnan(before).any():
            before = np.where(np.isnan(before), self._all(stride.y, stride.s, context), before)
        after = self._all(stride.ahead, stride.s_next, context)
        self.last[:, ids] = np.where(accepted, after, before)
        a, b = np.sign(before), np.sign(after)
        way = np.array([np.sign(e.direction) for e in self.events])[:, None]
        crossed: NDArray[np.bool_] = (a * b <= 0) & (a != 0) & ((way == 0) | (way == -a)) & accepted
        return crossed

    def _all(self, y: Tensor, s: Vector, context: Context) -> Vector:
        """All g, (E, n)."""
        with torch.no_grad():
            times = torch.from_numpy(np.ascontiguousarray(s))
            found: Vector = host(torch.stack([value(y, times, context.tree) for value in self.values]))
        return found

    def _settled(
        self, ids: Count, rows: Count, fired: NDArray[np.bool_], stride: Stride, slopes: Slopes, h: Vector,
        context: Context,
    ) -> tuple[Vector, Tensor | None, Count]:  # fmt: skip
        """Find the events of some rows, and note those that count.

        Returns:
            Where each row ends (NaN if it goes on), the states of those that do, and evaluations spent, one a row.
        """
        s, tableau = stride.s[rows], stride.tableau
        theta = np.full(fired.shape, np.inf)

        def at(mine: Count, place: Vector) -> Tensor:
            picked = [take(k, mine) for k in slopes.tensors]
            return within(take(slopes.y, mine), picked, tableau, h[mine], torch.from_numpy(place))

        for e, value in enumerate(self.values):
            mine = np.flatnonzero(fired[e])
            if len(mine):
                tree = context.select(rows[mine]).tree

                def g(place: Vector, mine: Count = mine, tree: Any = tree, value: Value = value) -> Vector:
                    with torch.no_grad():
                        times = torch.from_numpy(s[mine] + place * h[mine])
                        found: Vector = host(value(at(mine, place), times, tree))
                    return found

                theta[e, mine] = root(g, len(mine))
        who = ids[rows]
        self.left[:, who] -= fired
        over = fired & (self.left[:, who] <= 0)
        ends = np.where(over, theta, np.inf).min(0)
        ended, spent = np.isfinite(ends), np.zeros(len(rows), dtype=np.int64)
        states: dict[int, Tensor] = {}
        for e, value in enumerate(self.values):
            mine = np.flatnonzero(fired[e] & (theta[e] <= ends))
            if not len(mine):
                continue
            place = theta[e, mine]
            tau, y, cost = implicit(
                value, self.ask, at(mine, place), torch.from_numpy(s[mine] + place * h[mine]),
                context.select(rows[mine]).tree,
            )  # fmt: skip
            spent[mine] += cost
            self.found[e].append((who[mine], tau, y))
            for k, row in enumerate(mine.tolist()):
                if ended[row] and theta[e, row] == ends[row]:
                    states.setdefault(row, y[k])
                    self.final.setdefault(int(who[row]), (e, len(self.found[e]) - 1))
        there = np.where(ended, s + ends * h, np.nan) if ended.any() else np.full(len(rows), np.nan)
        self.ended[who[ended]] = there[ended]
        y_end = torch.stack([states[r] for r in np.flatnonzero(ended).tolist()]) if ended.any() else None
        return there, y_end, spent

    def occurrences(self, unpack: Callable[[Tensor], Any], blank: Tensor) -> tuple[Occurrences, ...]:
        """What was found, one an event."""
        out = []
        for parts in self.found:
            if not parts:
                none = torch.zeros(0, dtype=torch.float64, device="cpu")
                out.append(Occurrences(none.long(), none, unpack(blank[:0])))
                continue
            who, t, y = np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts]), [p[2] for p in parts]
            order = np.argsort(who, kind="stable")
            index = torch.from_numpy(order)
            out.append(Occurrences(torch.from_numpy(who[order]), t[index], unpack(take(torch.cat(y), order))))
        return tuple(out)

    def cut(self, states: Tensor, stops: Sequence[float]) -> Tensor:
        """States at stops, (T, B, *S), NaN behind the events that ended the samples."""
        sign = 1.0 if stops[-1] >= stops[0] else -1.0
        beyond = sign * np.asarray(stops)[:, None] > sign * self.ended  # NaN is not
        mask = torch.from_numpy(beyond).to(states.device)
        return torch.where(mask.reshape(*mask.shape, *[1] * (states.ndim - 2)), torch.nan, states)

    def closed(self, solution: Solution) -> Solution:
        """The solution, in which samples end where their events ended them."""
        if not self.final:
            return solution
        x, t, status = solution.x, solution.t.clone(), solution.status.clone()
        for e, parts in enumerate(self.found):
            for k, (who, tau, y) in enumerate(parts):
                mine = np.array([j for j, i in enumerate(who.tolist()) if self.final.get(i) == (e, k)], dtype=np.int64)
                if len(mine):
                    here = torch.from_numpy(who[mine])
                    t = t.index_copy(0, here, tau[torch.from_numpy(mine)])
                    x = x.index_copy(0, here.to(x.device), take(y, mine))
                    status[here] = int(Status.EVENT)
        return replace(solution, x=x, t=t, status=status)


def implicit(value: Value, ask: Ask, y: Tensor, times: Tensor, tree: Any) -> tuple[Tensor, Tensor, int]:
    """The time of an event and the state there, with their derivatives; and what they cost in evaluations.

    Args:
        value: g.
        y: the states at the times, as functions of what they depend on.
        times: the times found.
    """
    if not torch.is_grad_enabled():
        return times, y, 0
    g = value(y, times, tree)
    if not (g.requires_grad or y.requires_grad):
        return times, y, 0
    here, now = y.detach().requires_grad_(), times.clone().requires_grad_()
    along, ahead = torch.autograd.grad(value(here, now, tree).sum(), (here, now), allow_unused=True)
    rate = (
        torch.zeros_like(g)
        if along is None
        else (along * ask(Query(y.detach(), times), tree).detach()).flatten(1).sum(1)
    )
    if ahead is not None:
        rate = rate + ahead.to(rate)
    rate = rate.detach()
    e = _change(g) / -rate
    moved = nudged(ask, y, times, e, tree)
    e = e - _change(value(moved, times + e.to("cpu", torch.float64), tree)) / rate
    e = fixed(e + 0.0)
    return times + e.to("cpu", torch.float64), nudged(ask, y, times, e, tree), 5


def _change(v: Tensor) -> Tensor:
    """0, with the derivatives of v."""
    return v - v.detach()


def root(g: Callable[[Vector], Vector], count: int) -> Vector:
    """Zeros in [0, 1] of functions whose signs differ at its ends, one each: Chandrupatla's method.

    Args:
        g: their values, one place each.
    """
    x1, x2 = np.ones(count), np.zeros(count)
    f1, f2 = g(x1), g(x2)
    x3, f3, t = x2.copy(), f2.copy(), np.full(count, 0.5)
    done = (f1 == 0.0) | (f2 == 0.0)
    fine = 2.0 * np.finfo(np.float64).eps
    for _ in range(100):
        if done.all():
            break
        x = np.where(done, x1, x1 + t * (x2 - x1))
        f = np.where(done, f1, g(x))
        same = np.sign(f) == np.sign(f1)
        x3, f3 = np.where(same, x1, x2), np.where(same, f1, f2)
        x2, f2 = np.where(same | done, x2, x1), np.where(same | done, f2, f1)
        x1, f1 = np.where(done, x1, x), np.where(done, f1, f)
        best = np.where(np.abs(f1) < np.abs(f2), x1, x2)
        with np.errstate(all="ignore"):
            least = (fine * np.abs(best) + 1e-16) / np.abs(x2 - x1)
            done |= (least > 0.5) | (f1 == 0.0) | (f2 == 0.0)
            xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
            curved = (phi**2 < xi) & ((1.0 - phi) ** 2 < 1.0 - xi)
            step = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
            t = np.clip(
                np.where(curved & np.isfinite(step), step, 0.5), np.minimum(least, 0.5), 1.0 - np.minimum(least, 0.5)
            )
    found: Vector = np.where(np.abs(f1) <= np.abs(f2), x1, x2)
    return found
