r"""Adaptive steps for SDEs: every sample on its own dyadic grid, along its own Brownian path.

**Steps** of a solve over [t0, t1] are nodes of the dyadic tree: node k of level l is the step from t0 + k h to
t0 + (k + 1) h with h = (t1 − t0) 2⁻ˡ. Its (W, H) is that of the sample's path (`flowsolve.sde.tree`), read off by going
down from the root, with the law of (W, H) on the halves of a node given the whole, ξ and η the node's normals:

$$ W_{1,2} = \tfrac12 W \pm \bigl(\tfrac32 H + Z\bigr), \qquad H_{1,2} = \tfrac14 H - \tfrac12 Z \pm \tfrac12 N, \qquad
   Z = \tfrac14\sqrt h\,\xi, \quad N = \sqrt{h/12}\;\eta . $$

A rejected step looks at the path more closely, and what it has seen stays as it is: the path was there before it was
looked at, so that no step is rejected into a better path (Gaines & Lyons 1997).

**Errors** are estimated by doubling: a step against its two halves, of which the finer result goes on. With y and y'
before and after, the norm (the root mean square) of a sample's difference in units of atol + rtol·max(|y|, |y'|) must
not exceed 1. A scheme of strong order γ has local errors of order q = γ + ½, which a level divides by 2^q: a step that
fails with error e goes down ⌈log₂(e)/q⌉ levels, at least one and at most four, and one whose error would have been
below ½ at twice the length is followed by a step of the level above, where the tree has one that begins there.

An attempt costs three steps. Where the order is ½, the doubled step does not tell the error: schemes of strong order 1
or more are asked for. Samples have their own times, levels and statuses, none depends on its batch. Those that have
finished are evaluated along with the others.

**Gradients** are those of the accepted steps, which are made once more, recorded (not counted among evaluations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowsolve._batch import rows, send
from flowsolve._surroundings import bare, eager
from flowsolve.kernels import host, rms
from flowsolve.noise import TREE
from flowsolve.sde.motion import BrownianPath, Drive
from flowsolve.sde.problem import Problem
from flowsolve.sde.schemes import Scheme
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Status

__all__ = ["Control", "pursue"]

DEEPEST = 40
AT_ONCE = 1 << 17  # numbers drawn of several levels at a time
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Control:
    """What steps must meet.

    Attributes:
        rtol, atol: the tolerances.
        level: the level at which samples begin, and that they do not leave upwards: 2^level steps at least.
        max_steps: attempts (accepted and rejected) a sample may make.
        norm: of a sample's scaled difference, (B, *S) to (B,).
    """

    rtol: float
    atol: float
    level: int = 4
    max_steps: int = 100_000
    norm: Callable[[Tensor], Tensor] = rms


@dataclass(frozen=True)
class _Nodes:
    """A node of the tree for each sample, on the host.

    Attributes:
        level, index: int64 of shape (B,).
    """

    level: Integers
    index: Integers

    def half(self, second: int) -> _Nodes:
        """The first or second half of each."""
        return _Nodes(self.level + 1, 2 * self.index + second)


@eager
def pursue(
    p: Problem,
    scheme: Scheme,
    y: Tensor,
    path: BrownianPath,
    control: Control,
    looks: Sequence[float] = (),
    mode: str = "direct",
) -> tuple[list[Tensor], Solution]:
    """The states at some times, and the solution at the end of the path's interval.

    Args:
        p: the SDE.
        scheme: the scheme.
        y: the state at path.t0, (B, *S).
        path: the Brownian paths.
        control: tolerances and limits.
        looks: rising times to look at.
        mode: how gradients are recorded, if autograd does: "direct" or "checkpoint".
    """
    if not bare():
        raise NotImplementedError("adaptive steps within torch.func or forward-mode derivatives; give steps=, a grid")
    start = y.new_full((len(y), *[1] * (y.ndim - 1)), path.t0)
    walk = _Walk(p, scheme, path, p.begin(start, y, scheme.kind), control)
    with torch.no_grad():
        states, solution, taken = walk.search(y.detach(), looks)
    p.counting = False
    if torch.is_grad_enabled() and (y.requires_grad or _recorded(p, start, y)):
        states, final = walk.again(y, taken, looks, mode)
        solution = replace(solution, x=final)
    return states, solution


def _recorded(p: Problem, t: Tensor, y: Tensor) -> bool:
    """Whether f or g depends on something that requires a gradient."""
    found = p.f(t, y), p.g(t, y)
    return any(isinstance(v, Tensor) and v.requires_grad for v in found)


class _Walk:
    """Steps of samples with nodes of their own."""

    def __init__(self, p: Problem, scheme: Scheme, path: BrownianPath, like: Tensor, control: Control) -> None:
        self.p, self.scheme, self.path, self.like, self.control = p, scheme, path, like, control
        self.area = scheme.area(p.noise_type)
        self.span, self.cost = path.t1 - path.t0, 0

    def search(self, y: Tensor, looks: Sequence[float]) -> tuple[list[Tensor], Solution, list[_Nodes]]:
        """The states at some times, the solution, and the accepted steps: of each sample the j-th in the j-th entry.

        A sample that has ended before the j-th has the level −1 there.
        """
        seen, extra = self._begun(y, looks), np.zeros(len(y), dtype=np.int64)
        count, control = len(y), self.control
        level = np.full(count, control.level)
        index, attempts, accepted = (np.zeros(count, dtype=np.int64) for _ in range(3))
        status = np.full(count, int(Status.RUNNING))
        gained = 2.0 ** (self.scheme.order(self.p.noise_type) + 0.5)
        trail: list[tuple[NDArray[np.bool_], _Nodes]] = []
        while (running := status == int(Status.RUNNING)).any():
            nodes = _Nodes(np.where(running, level, control.level), np.where(running, index, 0))
            whole, first, second = self._halved(nodes)
            before = self.p.calls
            full = self._step(y, nodes, whole)
            half = self._step(y, nodes.half(0), first)
            ahead = self._step(half, nodes.half(1), second)
            self.cost = self.cost or (self.p.calls - before) // 3
            scale = control.atol + control.rtol * torch.maximum(y.abs(), ahead.abs())
            difference = (full - ahead).abs()
            error = host(control.norm(torch.where(difference == 0.0, 0.0, difference / scale))).astype(np.float64)
            finite = np.isfinite(error) & torch.isfinite(rows(ahead)).all(1).cpu().numpy()
            good = running & finite & (error <= 1.0)
            for i, (a, b) in enumerate(((y, half), (half, ahead))):
                extra += self._look(a, b, nodes.half(i), good, looks, seen)
            y = torch.where(_column(torch.from_numpy(good), y), ahead, y)
            trail.append((good, nodes))
            attempts += running
            accepted += good
            with np.errstate(all="ignore"):
                down = np.clip(np.ceil(np.log(error) / np.log(gained)), 1, 4)
            down = np.where(finite, down, 2).astype(np.int64)
            index = np.where(good, index + 1, np.where(running, index << np.where(good, 0, down), index))
            level = np.where(running & ~good, level + down, level)
            done = good & (index == 1 << level)
            up = good & ~done & (level > control.level) & (index % 2 == 0) & (error * gained < 0.5)
            level, index = np.where(up, level - 1, level), np.where(up, index // 2, index)
            status[running & (attempts >= control.max_steps)] = int(Status.MAX_STEPS)
            deep = running & ~good & (level >= DEEPEST)
            status[deep] = np.where(finite, int(Status.UNDERFLOW), int(Status.NONFINITE))[deep]
            status[done] = int(Status.SUCCESS)
        reached = self.path.t0 + self.span * index / 2.0**level
        reached[status == int(Status.SUCCESS)] = self.path.t1
        nfe = torch.from_numpy(3 * attempts + extra) * self.cost
        made, lost, ended = (torch.from_numpy(v) for v in (accepted, attempts - accepted, status))
        solution = Solution(y, nfe, ended, made, lost, torch.from_numpy(reached))
        return seen, solution, _packed(trail, int(accepted.max(initial=0)))

    def again(
        self, y: Tensor, taken: Sequence[_Nodes], looks: Sequence[float], mode: str
    ) -> tuple[list[Tensor], Tensor]:
        """The states at some times and at the end, by the accepted steps."""
        seen = self._begun(y, looks)
        chunk = max(1, math.isqrt(len(taken))) if mode == "checkpoint" else max(1, len(taken))

        def through(first: int, last: int, y: Tensor, *seen: Tensor) -> tuple[Tensor, ...]:
            found = list(seen)
            for nodes in taken[first:last]:
                live = nodes.level >= 0
                shown = _Nodes(np.where(live, nodes.level, 0), np.where(live, nodes.index, 0))
                for part in (shown.half(0), shown.half(1)):
                    ahead = self._step(y, part, self._at(part))
                    self._look(y, ahead, part, live, looks, found)
                    y = torch.where(_column(torch.from_numpy(live), y), ahead, y)
            return (y, *found)

        for first in range(0, len(taken), chunk):
            last = min(len(taken), first + chunk)
            if mode == "checkpoint":
                y, *seen = checkpoint(through, first, last, y, *seen, use_reentrant=False)
            else:
                y, *seen = through(first, last, y, *seen)
        return seen, y

    def _begun(self, y: Tensor, looks: Sequence[float]) -> list[Tensor]:
        """The states at some times, as known at the start."""
        return [y if t == self.path.t0 else torch.full_like(y, torch.nan) for t in looks]

    def _look(
        self,
        y: Tensor,
        ahead: Tensor,
        nodes: _Nodes,
        live: NDArray[np.bool_],
        looks: Sequence[float],
        found: list[Tensor],
    ) -> Integers:
        """Fill in the states at the times that lie in a step; how many shorter steps each sample made for that."""
        made = np.zeros(len(y), dtype=np.int64)
        h = self.span / 2.0**nodes.level
        start = self.path.t0 + nodes.index * h
        end = np.where(nodes.index + 1 == 1 << nodes.level, self.path.t1, start + h)
        for i, t in enumerate(looks):
            at, inside = live & (end == t), live & (start < t) & (t < end)
            if at.any():
                found[i] = torch.where(_column(torch.from_numpy(at), y), ahead, found[i])
            if inside.any():
                w, area = self._at(nodes)
                width = np.where(inside, t - start, h)
                for begin in np.unique(start[inside]).tolist():
                    index = torch.from_numpy(np.flatnonzero(inside & (start == begin)))
                    some = BrownianPath(self.path.t0, self.path.t1, self.path.noise.select(index))
                    index = send(index, y)
                    v, k = some.drive(begin, t, self.like[index], self.area)
                    w = w.index_copy(0, index, v)
                    area = area if area is None or k is None else area.index_copy(0, index, k)
                part = self._moved(y, start, np.where(inside, t, end), width, (w, area))
                found[i] = torch.where(_column(torch.from_numpy(inside), y), part, found[i])
                made += inside
        return made

    def _step(self, y: Tensor, nodes: _Nodes, drive: Drive) -> Tensor:
        """Each sample's step over its node."""
        h = self.span / 2.0**nodes.level
        start = self.path.t0 + nodes.index * h
        end = np.where(nodes.index + 1 == 1 << nodes.level, self.path.t1, start + h)
        return self._moved(y, start, end, h, drive)

    def _moved(self, y: Tensor, start: Any, end: Any, h: Any, drive: Drive) -> Tensor:
        table = torch.from_numpy(np.stack((start, end, h)))
        t, t_next, self.p.width = send(table, y, y.dtype).reshape(3, -1, *[1] * (y.ndim - 1)).unbind(0)
        try:
            return self.scheme.step(self.p, (y,), t, t_next, drive)[0]
        finally:
            self.p.width = None

    def _at(self, nodes: _Nodes) -> Drive:
        """(W, H) of each sample's node."""
        return self._descended(nodes)[0]

    def _halved(self, nodes: _Nodes) -> tuple[Drive, Drive, Drive]:
        """(W, H) of each sample's node and of its halves."""
        (w, area), rest = self._descended(nodes)
        assert area is not None
        z, n, area0 = rest
        half, turn = 0.5 * w, 1.5 * area0 + z
        common = 0.25 * area0 - 0.5 * z
        return (w, area), (half + turn, common + n), (half - turn, common - n)

    def _descended(self, nodes: _Nodes) -> tuple[Drive, tuple[Tensor, Tensor, Tensor]]:
        """(W, H) of each sample's node; and Z, N/2 and H there, for its halves."""
        noise, like, deepest = self.path.noise, self.like, int(nodes.level.max())
        root = math.sqrt(self.span)
        first = noise.own(TREE, np.repeat(np.array([[0], [1]], dtype=np.int64), len(like), 1), like)
        w, area = first[0] * root, first[1] * (root / math.sqrt(12.0))
        kept = torch.zeros_like(w), torch.zeros_like(w)
        levels = np.arange(deepest + 1)[:, None]
        above = np.maximum(nodes.level - levels, 0)
        addresses = 2 * ((1 << np.minimum(levels, nodes.level)) + (nodes.index >> above))
        down = levels < nodes.level
        sign = np.where(down, 1.0 - 2.0 * ((nodes.index >> np.maximum(above - 1, 0)) & 1), 0.0)
        moves = send(torch.from_numpy(np.stack((down.astype(np.float64), sign))), like, like.dtype)
        moves = moves.reshape(2, deepest + 1, -1, *[1] * (like.ndim - 1))
        many = max(1, AT_ONCE // max(1, 2 * like.numel()))
        for begin in range(0, deepest + 1, many):
            some = addresses[begin : begin + many]
            xi, eta = noise.own(TREE, np.concatenate((some, some + 1)), like).chunk(2)
            for j in range(len(some)):
                level = begin + j
                h = self.span / 2.0**level
                z, n = xi[j] * (0.25 * math.sqrt(h)), eta[j] * (0.5 * math.sqrt(h / 12.0))
                goes, side = moves[0, level].bool(), moves[1, level]
                here = send(torch.from_numpy(nodes.level == level), like).reshape(goes.shape)
                kept = torch.where(here, z, kept[0]), torch.where(here, n, kept[1])
                w = torch.where(goes, 0.5 * w + side * (1.5 * area + z), w)
                area = torch.where(goes, 0.25 * area - 0.5 * z + side * n, area)
        return (w, area), (*kept, area)


def _packed(trail: Sequence[tuple[NDArray[np.bool_], _Nodes]], most: int) -> list[_Nodes]:
    """Accepted steps, each sample's one after the other, −1 as level where a sample has no more."""
    if not trail:
        return []
    count = len(trail[0][0])
    level, index = np.full((most, count), -1, dtype=np.int64), np.zeros((most, count), dtype=np.int64)
    place = np.zeros(count, dtype=np.int64)
    for good, nodes in trail:
        who = np.flatnonzero(good)
        level[place[who], who], index[place[who], who] = nodes.level[who], nodes.index[who]
        place[who] += 1
    return [_Nodes(a, b) for a, b in zip(level, index, strict=True)]


def _column(mask: Tensor, y: Tensor) -> Tensor:
    """A mask of samples, ready to choose between states."""
    return send(mask, y).reshape(-1, *[1] * (y.ndim - 1))
