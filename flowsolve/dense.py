r"""The solution of an ODE as a function of time, and the steps that it is made of.

Each accepted step from s to s + h brings its interpolant (`flowsolve.solvers.tableaus`),

$$ y(s + \theta h) = y + h\textstyle\sum_i b_i(\theta)\,k_i , \qquad 0 \le \theta \le 1 , $$

and `Dense` is these, pieced together for every sample: continuous, and as exact between the ends of steps as the
method's interpolant, whose order is the method's or less. It keeps the state and the slopes of all steps, so its memory
is that of a solve that records gradients. It is differentiable in whatever the solve is, and in the time asked at.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import Context, hosted, send, take
from flowsolve.drivers import Ask, Travel, Visit
from flowsolve.pursuit import Follower, answered
from flowsolve.solvers.adaptive import Attempt
from flowsolve.solvers.base import Query
from flowsolve.solvers.runge_kutta import RungeKutta, Stride, completed
from flowsolve.solvers.tableaus import Tableau

__all__ = ["Dense", "Follower", "Recorder", "followed", "within"]

Count = NDArray[np.int64]
Vector = NDArray[np.float64]


def followed(
    solver: RungeKutta, intervals: Sequence[tuple[float, float, int]], followers: Sequence[Follower], context: Context
) -> Travel:
    """How a solver travels along a fixed grid with followers."""

    def travel(
        y: Tensor, first: int, last: int, visited: Container[int], visit: Visit
    ) -> Generator[Query, Tensor, Tensor]:
        def both(i: int, x: Tensor, stride: Stride) -> Generator[Query, Any, None]:
            s, s_next, h = (np.full(len(x), v) for v in (stride.s, stride.s_next, stride.h))
            for follower in followers:
                yield from follower.strode(stride._replace(s=s, s_next=s_next, h=h), context)
            if i in visited:
                yield from visit(i, x, stride)

        return (yield from solver.sweep(intervals, y, first, last, range(first, last), both))

    return travel


class Piece(NamedTuple):
    """A step of some samples, with what its interpolant needs.

    Attributes:
        ids: their numbers.
        s, h: where it begins and its signed size, float64.
        until: how far it holds (an event may end it early).
        y: the states before.
        slopes: one tensor a stage.
        tableau: the method.
    """

    ids: Count
    s: Vector
    h: Vector
    until: Vector
    y: Tensor
    slopes: Sequence[Tensor]
    tableau: Tableau


def within(y: Tensor, slopes: Sequence[Tensor], tableau: Tableau, h: Vector, theta: Tensor) -> Tensor:
    """y + h Σ b_i(θ) k_i for a θ a row, float64 on the host; differentiable in all tensors."""
    weights = theta.new_zeros(len(theta), len(tableau.dense))
    for power in range(max(map(len, tableau.dense)), 0, -1):
        column = [row[power - 1] if power <= len(row) else 0.0 for row in tableau.dense]
        weights = (weights + torch.tensor(column, dtype=theta.dtype, device=theta.device)) * theta[:, None]
    table = send(weights * torch.from_numpy(h).to(theta)[:, None], y, y.dtype)
    for w, k in zip(table.unbind(1), slopes, strict=True):
        y = torch.addcmul(y, w.reshape(-1, *[1] * (y.ndim - 1)), k)
    return y


class Recorder:
    """Keeps the pieces of a solve, in the order in which they were made."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def attempted(self, ids: Count, attempt: Attempt, context: Context, ask: Ask) -> Attempt:
        """See `Follower`."""
        rows = np.flatnonzero(attempt.accepted)
        if not len(rows):
            return attempt
        (slopes, h), extra = answered(completed(attempt.stride, rows), context.select(rows), ask)
        state = attempt.state
        self.pieces.append(
            Piece(ids[rows], attempt.stride.s[rows], h, state.s[rows], slopes.y, slopes.tensors, attempt.stride.tableau)
        )
        if attempt.stride.missing:
            state = state.charge(rows, attempt.stride.missing + extra)
        return attempt._replace(state=state)

    def strode(self, stride: Stride, context: Context) -> Generator[Query, Tensor, None]:
        """See `Follower`."""
        slopes, _ = yield from completed(stride, None)
        ids = np.arange(len(stride.y))
        self.pieces.append(Piece(ids, stride.s, stride.h, stride.s_next, stride.y, slopes.tensors, stride.tableau))


class Dense:
    """A solution as a function of time, `sol.dense(t)`, and its steps; see `flowsolve.dense`.

    Attributes:
        t0: where the solve began, float64 of shape (B,).
        t1: where each sample ended, float64 of shape (B,).
        sign: the direction of time.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        y0: Tensor,
        t0: Vector,
        t1: Vector,
        limit: Vector,
        unpack: Callable[[Tensor, int], Any],
        *,
        single: bool = False,
        clock: tuple[Vector, Vector] | None = None,
    ) -> None:
        self.pieces, self._y0, self._unpack, self._single = list(pieces), y0, unpack, single
        count = len(y0)
        zero, one = np.zeros(count), np.ones(count)
        self._origin, self._span = clock or (zero, one)  # t = origin + span · (time of the solve)
        self.t0, self.t1 = (torch.from_numpy(self._origin + self._span * v) for v in (t0, t1))
        self._start, self._end, self._limit = t0, t1, limit
        self.sign = -1.0 if any((p.h < 0).any() for p in self.pieces) else 1.0
        whose = [p.ids for p in self.pieces]
        ids = np.concatenate(whose) if whose else np.zeros(0, dtype=np.int64)
        piece = np.repeat(np.arange(len(whose)), [len(w) for w in whose])
        row = np.concatenate([np.arange(len(w)) for w in whose]) if whose else ids
        order = np.argsort(ids, kind="stable")
        self._piece, self._row = piece[order], row[order]
        self._first = np.searchsorted(ids[order], np.arange(count + 1))
        until = np.concatenate([p.until for p in self.pieces]) if whose else np.zeros(0)
        self._until = until[order]

    def __call__(self, t: Any) -> Any:
        """The state at a time, as f knows it.

        Args:
            t: a number; times (T,); or times (B, T), a row a sample.

        Returns:
            The state at t; with more times behind a first dimension T.

        Raises:
            ValueError: times outside the interval of the solve, or NaN. (Where a sample failed or met an event that
                ends it, its state beyond is NaN.)
        """
        times = hosted(t, torch.float64).to("cpu")
        count, flat = len(self._y0), times.ndim == 0
        if times.ndim > 2 or (times.ndim == 2 and len(times) != count):
            raise ValueError(f"t has shape {tuple(times.shape)}; expected a time, (T,), or (B, T) with B = {count}")
        table = times.reshape(1, -1).expand(count, -1) if times.ndim < 2 else times
        span = torch.from_numpy(self._span)[:, None]
        clock = (table - torch.from_numpy(self._origin)[:, None]) / torch.where(span == 0.0, 1.0, span)
        shape = clock.shape
        found = self._at(np.repeat(np.arange(count), shape[1]), clock.reshape(-1), table.detach().numpy())
        states = found.unflatten(0, tuple(shape)).transpose(0, 1)
        return self._unpack(states[0], 0) if flat else self._unpack(states, 1)

    def steps(self, sample: int = 0) -> tuple[Tensor, Any]:
        """The accepted steps of a sample: their ends, float64 of shape (n + 1,), and the states there.

        The states have the sample's shape behind a first dimension n + 1.
        """
        ends = self._until[self._first[sample] : self._first[sample + 1]]
        clock = np.concatenate(([self._start[sample]], ends))
        who = np.full(len(clock), sample)
        states = self._at(who, torch.from_numpy(clock), None).unsqueeze(1)
        t = torch.from_numpy(self._origin[sample] + self._span[sample] * clock)
        whole = self._unpack(states, 1)
        if self._single:
            return t, whole
        return t, torch.utils._pytree.tree_map(lambda v: v.squeeze(1), whole)

    def on_clock(self, origin: Vector, span: Vector) -> Dense:
        """The same in times origin + span · (time of the solve)."""
        return Dense(
            self.pieces, self._y0, self._start, self._end, self._limit, self._unpack, single=self._single,
            clock=(origin, span),
        )  # fmt: skip

    def extended(self, pieces: Sequence[Piece], t1: Vector, limit: float) -> Dense:
        """The same start with all these pieces."""
        far = np.full(len(t1), limit)
        return Dense(pieces, self._y0, self._start, t1, far, self._unpack, single=self._single)

    def _at(self, who: Count, clock: Tensor, asked: Any) -> Tensor:
        """The states of samples at times of the solve, one each."""
        now = clock.detach().numpy()
        low, high = self.sign * self._start[who], self.sign * self._limit[who]
        slack = 1e-12 * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
        outside = ~((self.sign * now >= low - slack) & (self.sign * now <= high + slack))
        if asked is not None and outside.any():
            first = np.flatnonzero(outside)[0]
            i = who[first]
            ends = [float(self._origin[i] + self._span[i] * v) for v in (self._start[i], self._limit[i])]
            raise ValueError(
                f"t = {np.asarray(asked).reshape(-1)[first]:g} lies outside the interval of the solve, from "
                f"{ends[0]:g} to {ends[1]:g}"
            )
        place = np.empty(len(who), dtype=np.int64)
        for i in np.unique(who):
            mine, (a, b) = who == i, self._first[i : i + 2]
            k = np.searchsorted(self.sign * self._until[a:b], self.sign * now[mine] - slack[mine])
            place[mine] = np.where(b > a, a + np.minimum(k, max(b - a - 1, 0)), -1)
        beyond = self.sign * now > self.sign * self._end[who] + slack
        out = take(self._y0, who)
        index = np.where((place >= 0) & ~beyond, self._piece[np.maximum(place, 0)] if len(self._piece) else -1, -1)
        if beyond.any():
            mask = send(torch.from_numpy(beyond), out).reshape(-1, *[1] * (out.ndim - 1))
            out = torch.where(mask, torch.nan, out)
        parts, rows = [], []
        for j in np.unique(index[index >= 0]):
            mine, piece = np.flatnonzero(index == j), self.pieces[j]
            row = self._row[place[mine]]
            here = torch.from_numpy(mine)
            theta = (clock[here] - torch.from_numpy(piece.s[row])) / torch.from_numpy(piece.h[row])
            gathered = [take(k, row) for k in piece.slopes]
            parts.append(within(take(piece.y, row), gathered, piece.tableau, piece.h[row], theta))
            rows.append(here)
        if not parts:
            return out
        return out.index_copy(0, send(torch.cat(rows), out), torch.cat(parts))
