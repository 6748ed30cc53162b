r"""Recorded adaptive solves: an attempt of all samples is one CUDA graph, and the host only looks on.

An attempt consists of the stages with their network calls, the error norm, the decision of every sample whether its
step is accepted, and the choice of its next step: the same arithmetic as in `flowsolve.kernels.control`, here on
tensors of the device in float64. Everything that an adaptive solve carries (`AdaptiveState`) lies in static buffers, so
that an attempt can be replayed any number of times. A sample that has ended makes no more steps: its columns stay what
they are.

The host reads the counts after some attempts, takes the samples that have ended out of the buffers, and puts waiting
ones in their places; the first step of newcomers is chosen outside the graph, by two calls of the network. How many
attempts lie between two looks is a matter of time alone: a look costs what a dozen small kernels do, and an attempt in
vain costs all of its network calls.

A sample's result is that of the eager solve but for rounding: step sizes and decisions are the same functions, with
logarithms and exponentials rounded to float32 in both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import take
from flowsolve.capture import Record, Recording, filled, recorded, require_cuda, split
from flowsolve.drivers import Ask, bar
from flowsolve.flow import Flow
from flowsolve.kernels import Law, Steered, control
from flowsolve.pursuit import Arrivals, Finished, answered
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Status
from flowsolve.solvers.base import Nodes, run
from flowsolve.solvers.runge_kutta import ask_stages

__all__ = ["Attempt", "pursue"]

PATIENCE = 1e-3  # seconds of attempts between two looks
MOST = 8  # attempts between two looks


class Attempt:
    """An attempt as a function of tensors alone: [y, slope, real, counts, *context], the first four in place.

    Args:
        solver: the solver.
        ask: answers queries for dy/ds.
        end: where the solve ends.
        budget: the most evaluations a sample may cost.
        tree: a context, whose tensors will be replaced by those of the call.
        device: where the tensors will be.
    """

    def __init__(
        self, solver: Adaptive, ask: Ask, end: float, budget: int | None, tree: Any, device: torch.device
    ) -> None:
        self.solver, self.ask, self.end, self.budget, self.tree = solver, ask, end, budget, tree
        self.law = Law(*solver.law.tolist())
        later = solver.pair.later
        self.later = torch.from_numpy(later.copy()).to(device).unsqueeze(1)
        self.last = [i for i, c in enumerate(later.tolist()) if c == 1.0]  # stages at the end of the step, to the bit

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """One attempt of every sample; returns nothing."""
        y, slope, real, counts, *tensors = inputs
        pair, tree = self.solver.pair, filled(self.tree, tensors)
        running = counts[control.STATUS] == control.RUNNING
        h, s_next = self._aim(real, running)
        table = real[control.S] + self.later * h
        for i in self.last:
            table[i] = s_next
        slopes = Steered(y, h)
        slopes.append(slope)
        stages = ask_stages(pair, Nodes(table), None, slopes, 1)
        ahead = run(stages, lambda query: self.ask(query, tree))
        accepted, real_after, counts_after = self._judge(self._error(ahead, slopes), real, counts, h, s_next, running)
        chosen = accepted.reshape(-1, *[1] * (y.ndim - 1))
        new, steep = torch.where(chosen, ahead, y), torch.where(chosen, slopes[-1], slope)
        for mine, after in ((y, new), (slope, steep), (real, real_after), (counts, counts_after)):
            mine.copy_(after)
        return []

    def _aim(self, real: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes and ends of the next steps; `flowsolve.kernels.control.aim`."""
        s, planned = real[control.S], real[control.H]
        left = self.end - s
        arrives = planned.abs() * 1.000001 >= left.abs()
        h = torch.where(arrives, left, planned)
        return torch.where(running, h, 0.0), torch.where(running, torch.where(arrives, self.end, s + planned), s)

    def _error(self, ahead: Tensor, slopes: Steered) -> Tensor:
        """The error of each sample in units of the tolerance."""
        solver = self.solver
        norms = [
            _rounded(slopes.error_norm(None, stages, weights, ahead, solver.atol, solver.rtol, solver.norm))
            for stages, weights in solver.pair.errors
        ]
        if len(norms) == 1:
            return norms[0]
        e5, e3 = norms
        both = e5 * e5 / (e5 * e5 + 0.01 * e3 * e3).sqrt()
        return torch.where((e5 == 0.0) & (e3 == 0.0), 0.0, both)

    def _judge(
        self, error: Tensor, real: Tensor, counts: Tensor, h: Tensor, s_next: Tensor, running: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What becomes of the attempt: `flowsolve.kernels.control.judge`, and the budget."""
        rule, (_, planned, last, before) = self.law, real.unbind()
        tried = counts[control.ACCEPTED] + counts[control.REJECTED]
        accepted, finite, arrives = error <= 1.0, torch.isfinite(error), s_next == self.end
        logs = _rounded(torch.where(finite, error, 1.0).clamp_min(control.FINEST).log())
        gain = rule.safety * _rounded((-rule.beta1 * logs - rule.beta2 * last - rule.beta3 * before).exp())
        gain = torch.minimum(gain, torch.where(tried == 0, rule.first_factor, rule.max_factor))
        loss = (rule.safety * _rounded((-rule.elementary * logs).exp())).clamp_max(1.0)
        factor = torch.where(finite, torch.where(accepted, gain, loss).clamp_min(rule.min_factor), 0.1)
        factor = torch.where(counts[control.STREAK] > 0, factor.clamp_max(1.0), factor)
        size = (h * factor).abs()
        size = torch.where(accepted & arrives, torch.maximum(size, planned.abs()), size).clamp_max(rule.max_step)
        stuck = size <= control.RESOLUTION * real[control.S].abs().clamp_min(abs(self.end))
        stuck = stuck | (~accepted & (size < rule.min_step))
        size = size.clamp_min(rule.min_step)

        accepted = accepted & running
        after = torch.stack(
            (
                torch.where(accepted, s_next, real[control.S]),
                torch.where(running, torch.copysign(size, h), planned),
                torch.where(accepted, logs.clamp_min(control.LEAST), last),
                torch.where(accepted, last, before),
            )
        )
        rejected = running & ~accepted
        streak = torch.where(accepted, 0, counts[control.STREAK] + rejected)
        spent = counts[control.NFE] + running * int(rule.nfe)
        tried = tried + running
        status = counts[control.STATUS]
        for where, verdict in (
            (tried >= rule.max_steps, Status.MAX_STEPS),
            (streak >= rule.max_rejections, Status.MAX_REJECTIONS),
            (stuck & finite, Status.UNDERFLOW),
            (stuck & ~finite, Status.NONFINITE),
            (accepted & arrives, Status.SUCCESS),
        ):
            status = torch.where(running & where, int(verdict), status)
        if self.budget is not None:
            short = (status == control.RUNNING) & (spent + int(rule.nfe) > self.budget)
            status = torch.where(short, int(Status.BUDGET), status)
        tally = (counts[control.ACCEPTED] + accepted, counts[control.REJECTED] + rejected, streak, spent, status)
        return accepted, after, torch.stack(tally)


def pursue(
    flow: Flow,
    key: Any,
    solver: Adaptive,
    arrivals: Arrivals,
    start: float,
    end: float,
    ask: Ask,
    *,
    width: int,
    budget: int | None = None,
    progress: bool = False,
    total: int | None = None,
    record: Record = Recording,
) -> Iterator[Finished]:
    """What `flowsolve.pursuit.pursue` does, by replays of a recorded attempt.

    Args:
        flow: whose recordings are kept.
        key: what decides the recording, beside solver, end, budget and shapes.
        record: makes a recording.

    The other arguments are those of `flowsolve.pursuit.pursue`.
    """
    least = solver.begin_nfe + solver.attempt_nfe
    if budget is not None and budget < least:
        raise ValueError(f"a budget of {budget} evaluations; {type(solver).__name__} needs {least} to take one step")
    first = arrivals(width)
    if first is None:
        return
    (y, context), slots = first, len(first[0])
    if record is Recording:
        require_cuda(y)
    state = _begun(solver, y, context, start, end, ask)
    tensors, constants = split(context.tree)
    inputs = [*_buffers(state), *(v.to(y.device) for v in tensors)]
    attempt = Attempt(solver, ask, end, budget, context.tree, y.device)
    whole = key, solver, start < end, end, budget, constants
    with recorded(flow, whole, attempt, inputs, record) as replay, bar(progress, total, "sample") as tick:
        replay.fill(inputs)
        ids, entered, gone, spent = np.arange(slots), slots, 0, 0
        attempts = 1
        while (ids >= 0).any():
            begun = time.perf_counter()
            for _ in range(attempts):
                replay.replay()
            counts: NDArray[np.int64] = replay.inputs[3].cpu().numpy()
            each = (time.perf_counter() - begun) / attempts
            attempts = min(MOST, max(1, round(PATIENCE / max(each, 1e-9))))
            leaving = np.flatnonzero((counts[control.STATUS] != control.RUNNING) & (ids >= 0))
            if not len(leaving):
                continue
            gone, spent = gone + len(leaving), spent + int(counts[control.NFE, leaving].sum())
            tick(len(leaving), nfe=spent / gone)
            reached = replay.inputs[2][control.S].cpu().numpy()[leaving]
            yield Finished(ids[leaving], take(replay.inputs[0], leaving), reached, counts[:, leaving], [])
            ids[leaving] = -1
            free = np.flatnonzero(ids < 0)
            if (more := arrivals(len(free))) is not None:
                fresh, whose = more
                places = free[: len(fresh)]
                index = torch.from_numpy(places).to(y.device)
                entering = _buffers(_begun(solver, fresh, whose, start, end, ask))
                for mine, new, axis in zip(replay.inputs, entering, (0, 0, 1, 1), strict=False):
                    mine.index_copy_(axis, index, new)
                context = context.placed(places, whose)
                for mine, given in zip(replay.inputs[4:], split(context.tree)[0], strict=True):
                    mine.copy_(given)
                ids[places] = np.arange(entered, entered + len(fresh))
                entered += len(fresh)


def _begun(solver: Adaptive, y: Tensor, context: Any, start: float, end: float, ask: Ask) -> AdaptiveState:
    """Newcomers whose first step is chosen."""
    state: AdaptiveState = answered(solver.begin(y, start, end), context, ask)[0]
    return state


def _buffers(state: AdaptiveState) -> list[Tensor]:
    """What an adaptive solve carries, all of it on the device."""
    device = state.y.device
    return [
        state.y.contiguous(), state.slope.contiguous(), torch.from_numpy(state.real).to(device),
        torch.from_numpy(state.counts).to(device),
    ]  # fmt: skip


def _rounded(v: Tensor) -> Tensor:
    """Numbers to the precision of float32, as float64."""
    return v.float().double()
