r"""Adaptive Runge–Kutta: every sample has its own time, its own step size and its own fate.

Error norms never mix samples, so what happens to one does not depend on its batch mates. An attempt advances all
samples of a batch by their own steps; each is then accepted or rejected on its own. Times, step sizes and errors live
on the host in float64; the states live on the device, and one read of the error norms a step is all that is waited for.

The error of one attempt, in units of the tolerance, is

$$ e = \Bigl\|\, \frac{h\sum_i (b_i-\hat b_i) k_i}{\text{atol} + \text{rtol}\cdot\max(|y|, |y'|)} \,\Bigr\|, $$

by default the root mean square over the numbers of one sample. An attempt whose error is not finite is retried with a
tenth of the step; a step below the resolution of float64 time ends the sample with a status that says which of the two
it was. A step that fails its error test is never accepted.

The first step follows Hairer, Nørsett & Wanner II.4: the slope at the start (which the first step needs anyway) and
one more evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from flowsolve._batch import choose, rows
from flowsolve.solvers.base import Query
from flowsolve.solvers.controllers import PI
from flowsolve.solvers.runge_kutta import RungeKutta, advance, stages
from flowsolve.solvers.tableaus import DOPRI5

__all__ = ["Adaptive", "AdaptiveState", "Dopri5", "Status", "rms"]


class Status(IntEnum):
    """How a sample's solve ended."""

    RUNNING = -1
    SUCCESS = 0
    NONFINITE = 1
    UNDERFLOW = 2
    BUDGET = 3
    MAX_STEPS = 4


def rms(x: Tensor) -> Tensor:
    """The root mean square of each sample: (B, *S) to (B,)."""
    return rows(x).square().mean(1).sqrt()


@dataclass(frozen=True)
class AdaptiveState:
    """What an adaptive solve carries: tensors with one row a sample, y and slope on the device, the rest on the host.

    Attributes:
        y: state, shape (B, *S).
        slope: dy/ds at (y, s), shape (B, *S).
        s: time reached, float64.
        h: signed size of the next step, float64.
        error: error of the last accepted step in units of the tolerance, float64.
        accepted: accepted steps.
        rejected: rejected steps.
        nfe: evaluations spent.
        status: a `Status`.
    """

    y: Tensor
    slope: Tensor
    s: Tensor
    h: Tensor
    error: Tensor
    accepted: Tensor
    rejected: Tensor
    nfe: Tensor
    status: Tensor

    def select(self, index: Tensor) -> AdaptiveState:
        """The rows of some samples, by position."""
        return AdaptiveState(*(v.index_select(0, index.to(v.device)) for v in self._rows()))

    def put(self, index: Tensor, rows: AdaptiveState) -> AdaptiveState:
        """This state with the rows at those positions replaced."""
        pairs = zip(self._rows(), rows._rows(), strict=True)
        return AdaptiveState(*(v.index_copy(0, index.to(v.device), r) for v, r in pairs))

    def mark(self, where: Tensor, status: Status) -> AdaptiveState:
        """This state with another status for some samples."""
        return replace(self, status=torch.where(where, int(status), self.status))

    def _rows(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class Adaptive(RungeKutta):
    """An embedded Runge–Kutta pair with per-sample step control.

    Attributes:
        rtol: tolerance relative to the state.
        atol: absolute tolerance, in units of the state (of y = x/c in a chart).
        adaptive: False runs the tableau on a fixed grid.
        first_step: size of the first step; None chooses it for one evaluation.
        max_step: largest step, in units of the clock.
        max_steps: attempts (accepted and rejected) a sample may make.
        controller: the step-size controller.
        norm: norm of the scaled error of each sample, (B, *S) to (B,).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    adaptive: bool = True
    first_step: float | None = None
    max_step: float = float("inf")
    max_steps: int = 10_000
    controller: PI = field(default_factory=PI)
    norm: Callable[[Tensor], Tensor] = rms

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not (cls.tableau.fsal and cls.tableau.error):
            raise TypeError(f"{cls.tableau.name} has no embedded pair whose last stage is the next step's first")

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} = {value!r}; expected a finite tolerance >= 0")
        if self.rtol == self.atol == 0.0:
            raise ValueError("rtol and atol are both 0, which no step can meet; give at least one of them > 0")
        for name in ("first_step", "max_step", "max_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value!r}; expected a number > 0")

    def begin(self, y: Tensor, s: float, s_end: float) -> Generator[Query, Tensor, AdaptiveState]:
        """Ask for the first slope, choose the first step of each sample, and return the state at s (s ≠ s_end)."""
        count = y.shape[0]
        slope = yield Query(y, torch.full((count,), s, dtype=torch.float64))
        span, nfe = s_end - s, 1
        sign = 1.0 if span >= 0 else -1.0
        if self.first_step is not None:
            h = torch.full((count,), self.first_step, dtype=torch.float64)
            finite = torch.isfinite(_host(self.norm(slope.detach())))
        else:
            with torch.no_grad():
                scale = self._scale(y.abs())
                d0, d1 = _host(torch.stack((self.norm(y / scale), self.norm(slope / scale))))
            finite = torch.isfinite(d1)
            h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).nan_to_num_(nan=1e-6)
            h0 = h0.clamp(max=min(abs(span), self.max_step))
            ahead = yield Query(advance(y, sign * h0, (1.0,), (slope,)), s + sign * h0)
            nfe += 1
            with torch.no_grad():
                d2 = _host(self.norm((ahead - slope) / scale)).nan_to_num_(nan=float("inf")) / h0
            most = torch.maximum(d1, d2)
            root = (0.01 / most) ** (1.0 / (self.tableau.error_order + 1))
            h = torch.where(most <= 1e-15, torch.maximum(h0 * 1e-3, torch.tensor(1e-6)), root)
            h = torch.minimum(100.0 * h0, torch.where(h > 0.0, h, h0))
        whole = torch.zeros(count, dtype=torch.int64)
        return AdaptiveState(
            y=y,
            slope=slope,
            s=torch.full((count,), s, dtype=torch.float64),
            h=sign * h.clamp(max=min(abs(span), self.max_step)),
            error=torch.ones(count, dtype=torch.float64),
            accepted=whole,
            rejected=whole,
            nfe=whole + nfe,
            status=torch.where(finite, whole + Status.RUNNING, whole + Status.NONFINITE),
        )

    def attempt(self, state: AdaptiveState, s_end: float) -> Generator[Query, Tensor, AdaptiveState]:
        """One attempted step of every sample towards s_end; each is accepted or rejected on its own."""
        tableau, y, s = self.tableau, state.y, state.s
        left = s_end - s
        arrives = state.h.abs() * 1.000001 >= left.abs()
        h = torch.where(arrives, left, state.h)
        s_next = torch.where(arrives, s_end, s + h)

        slopes = [state.slope]
        ahead = yield from stages(tableau, y, s, s_next, h, slopes, tableau.stages)

        with torch.no_grad():
            local = advance(torch.zeros_like(y), h, tableau.error, slopes)
            scale = self._scale(torch.maximum(y.abs(), ahead.abs()))
            error = _host(self.norm(local / scale))
        finite = torch.isfinite(error)
        accepted = finite & (error <= 1.0)
        factor = self.controller.factor(error, state.error, accepted, tableau.error_order + 1)
        proposal = h * torch.where(finite, factor, 0.1)
        # A step cut short to arrive says nothing against the size that was planned.
        proposal = torch.where(accepted & arrives & (proposal.abs() < state.h.abs()), state.h, proposal)
        proposal = proposal.clamp(-self.max_step, self.max_step)

        smallest = 16.0 * torch.finfo(torch.float64).eps * torch.maximum(s.abs(), torch.tensor(abs(s_end)))
        stuck = proposal.abs() <= smallest  # an accepted step that small does not advance time either
        made = state.accepted + state.rejected + 1
        status = torch.where(made >= self.max_steps, int(Status.MAX_STEPS), state.status)
        status = torch.where(stuck, torch.where(finite, int(Status.UNDERFLOW), int(Status.NONFINITE)), status)
        status = torch.where(accepted & arrives, int(Status.SUCCESS), status)

        return replace(
            state,
            y=choose(accepted, ahead, y),
            slope=choose(accepted, slopes[-1], state.slope),
            s=torch.where(accepted, s_next, s),
            h=proposal,
            error=torch.where(accepted, error.clamp_min(1e-4), state.error),
            accepted=state.accepted + accepted,
            rejected=state.rejected + ~accepted,
            nfe=state.nfe + self.attempt_nfe,
            status=status,
        )

    def _scale(self, size: Tensor) -> Tensor:
        """The tolerance of each number; kept from 0, so that a number that is 0 and stays 0 has no error."""
        return (self.atol + self.rtol * size).clamp_min(torch.finfo(size.dtype).tiny)

    @property
    def begin_nfe(self) -> int:
        """Evaluations spent before the first step."""
        return 1 if self.first_step is not None else 2

    @property
    def attempt_nfe(self) -> int:
        """Evaluations of one attempted step."""
        return self.tableau.stages - 1


def _host(v: Tensor) -> Tensor:
    return v.detach().to("cpu").to(torch.float64)


@dataclass(frozen=True)
class Dopri5(Adaptive):
    """Dormand and Prince's pair of orders 5 and 4: 6 evaluations a step, accepted or rejected for each sample."""

    tableau = DOPRI5
