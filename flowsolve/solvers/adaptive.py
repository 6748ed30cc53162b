r"""Adaptive Runge–Kutta: every sample has its own time, its own step size and its own fate.

Error norms never mix samples, so what happens to one does not depend on its batch mates. An attempt advances all
samples of a batch by their own steps; each is then accepted or rejected on its own. Times, step sizes and errors live
on the host in float64; the states live on the device, and one read of the error norms a step is all that is waited for.

The error of one attempt, in units of the tolerance, is

$$ e = \Bigl\|\, \frac{h\sum_i (b_i-\hat b_i) k_i}{\text{atol} + \text{rtol}\cdot\max(|y|, |y'|)} \,\Bigr\|, $$

by default the root mean square over the numbers of one sample. A method with two companions, of orders 5 and 3 beside
its 8, uses $e_5^2 / \sqrt{e_5^2 + 0.01\,e_3^2}$, which is of order $h^8$ (Hairer, Nørsett & Wanner II.10). An attempt
whose error is not finite is retried with a tenth of the step; a step below the resolution of float64 time, or below
`min_step`, ends the sample with a status that says which of the two it was. A step that fails its error test is never
accepted.

The first step follows Hairer, Nørsett & Wanner II.4: the slope at the start (which the first step needs anyway) and
one more evaluation.

The default tolerance is 1e-5, relative and absolute: what flows are commonly sampled with (Song et al. 2021). State it
where accuracy matters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import per_sample, take
from flowsolve._surroundings import within
from flowsolve.kernels import Law, Slopes, aim, control, host, judge, rms, twin
from flowsolve.solvers.base import Nodes, Query
from flowsolve.solvers.controllers import PI, Controller
from flowsolve.solvers.runge_kutta import RungeKutta, Stride, ask_stages
from flowsolve.solvers.tableaus import BOSH3, DOP853, DOPRI5, EULER, TSIT5, Tableau

__all__ = ["Adaptive", "AdaptiveState", "Attempt", "Bosh3", "Dopri5", "Dopri8", "Status", "Tsit5"]

Vector = NDArray[np.float64]
Count = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Status(IntEnum):
    """How a sample's solve ended."""

    RUNNING = -1
    SUCCESS = 0
    NONFINITE = 1
    UNDERFLOW = 2
    BUDGET = 3
    MAX_STEPS = 4
    MAX_REJECTIONS = 5
    EVENT = 6


@dataclass(frozen=True)
class AdaptiveState:
    """What an adaptive solve carries: y and slope on the device; on the host, a column for each sample.

    Attributes:
        y: state, shape (B, *S).
        slope: dy/ds at (y, s), shape (B, *S).
        real: float64 of shape (4, B); rows s, h and the logs of the last two errors (`flowsolve.kernels.control`).
        counts: int64 of shape (5, B); rows accepted, rejected, rejections in a row, evaluations, status.
    """

    y: Tensor
    slope: Tensor
    real: Vector
    counts: Count

    def __len__(self) -> int:
        return len(self.real[0])

    @property
    def s(self) -> Vector:
        """Time reached."""
        row: Vector = self.real[control.S]
        return row

    @property
    def h(self) -> Vector:
        """Signed size of the next step."""
        row: Vector = self.real[control.H]
        return row

    @property
    def accepted(self) -> Count:
        """Accepted steps."""
        row: Count = self.counts[control.ACCEPTED]
        return row

    @property
    def rejected(self) -> Count:
        """Rejected steps."""
        row: Count = self.counts[control.REJECTED]
        return row

    @property
    def nfe(self) -> Count:
        """Evaluations spent."""
        row: Count = self.counts[control.NFE]
        return row

    @property
    def status(self) -> Count:
        """A `Status` for each sample."""
        row: Count = self.counts[control.STATUS]
        return row

    def select(self, index: Count) -> AdaptiveState:
        """Some samples, by position."""
        return AdaptiveState(take(self.y, index), take(self.slope, index), self.real[:, index], self.counts[:, index])

    def joined(self, other: AdaptiveState) -> AdaptiveState:
        """The samples of this state and then those of the other."""
        return AdaptiveState(
            torch.cat((self.y, other.y)),
            torch.cat((self.slope, other.slope)),
            np.concatenate((self.real, other.real), 1),
            np.concatenate((self.counts, other.counts), 1),
        )

    def mark(self, where: Mask, status: Status) -> AdaptiveState:
        """This state with another status for some samples."""
        if not where.any():
            return self
        counts = self.counts.copy()
        counts[control.STATUS, where] = int(status)
        return replace(self, counts=counts)

    def charge(self, index: Count, evaluations: int | Count) -> AdaptiveState:
        """This state with evaluations added to some samples."""
        counts = self.counts.copy()
        counts[control.NFE, index] += evaluations
        return replace(self, counts=counts)


class Attempt(NamedTuple):
    """What became of one attempted step.

    Attributes:
        state: the state after it.
        stride: the step itself, for those that accepted it.
        accepted: which samples did, bool of shape (B,).
        ended: how many samples are no longer running.
        error: the error of each in units of the tolerance.
    """

    state: AdaptiveState
    stride: Stride
    accepted: Mask
    ended: int
    error: Vector


@dataclass(frozen=True)
class Adaptive(RungeKutta):
    """An embedded Runge–Kutta pair with per-sample step control; a subclass names its tableau.

    Attributes:
        rtol: tolerance relative to the state.
        atol: absolute tolerance, in units of the state (of y = x/c in a chart).
        adaptive: False runs the tableau on a fixed grid.
        first_step: size of the first step; None chooses it for one evaluation.
        min_step: size below which a step ends its sample, in units of the clock; 0 stops at the resolution of time.
        max_step: largest step.
        max_steps: attempts (accepted and rejected) a sample may make.
        max_rejections: rejections in a row that end a sample.
        controller: the step-size controller.
        norm: norm of the scaled error of each sample, (B, *S) to (B,): `rms`, `largest` or your own.
    """

    pair: ClassVar[Tableau]
    """The tableau with the slope at the end of the step as its last stage."""

    rtol: float = 1e-5
    atol: float = 1e-5
    adaptive: bool = True
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = float("inf")
    max_steps: int = 10_000
    max_rejections: int = 100
    controller: Controller = field(default_factory=PI)
    norm: Callable[[Tensor], Tensor] = rms

    def __init_subclass__(cls) -> None:
        if "tableau" in vars(cls):
            if not cls.tableau.error:
                raise TypeError(f"{cls.tableau.name} has no embedded companion to estimate errors with")
            cls.pair = cls.tableau.completed
        super().__init_subclass__()

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "min_step"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} = {value!r}; expected a finite number >= 0")
        if self.rtol == self.atol == 0.0:
            raise ValueError("rtol and atol are both 0, which no step can meet; give at least one of them > 0")
        for name in ("first_step", "max_step", "max_steps", "max_rejections"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value!r}; expected a number > 0")
        if not self.min_step <= self.max_step:
            raise ValueError(f"min_step = {self.min_step!r} exceeds max_step = {self.max_step!r}")

    @property
    def chooses_steps(self) -> bool:
        """Whether steps are adaptive."""
        return self.adaptive

    def tolerances(self, y: Tensor, own: Vector | None = None) -> tuple[Any, Any]:
        """(atol, rtol): numbers, or tensors that broadcast against the state."""
        if own is None:
            return self.atol, self.rtol
        rtol, atol = (per_sample(torch.from_numpy(np.ascontiguousarray(v)), y) for v in own[:2])
        return atol, rtol

    def begin(
        self, y: Tensor, s: float, s_end: float, own: Vector | None = None
    ) -> Generator[Query, Tensor, AdaptiveState]:
        """Ask for the first slope, choose the first step of each sample, and return the state at s (s ≠ s_end).

        Args:
            own: rtol, atol and first step of each sample (NaN to choose it), (3, B).
        """
        count = y.shape[0]
        start = np.full(count, s)
        slope = yield Query(y, torch.from_numpy(start))
        span = s_end - s
        sign, longest = (1.0 if span >= 0 else -1.0), min(abs(span), self.max_step)
        if self.first_step is not None:
            h = np.full(count, self.first_step)
            finite = np.isfinite(host(self.norm(slope.detach())))
        else:
            with torch.no_grad():
                atol, rtol = self.tolerances(y, own)
                scale = twin.scale(y.abs(), atol, rtol)
                if isinstance(atol, Tensor) or atol == 0.0:  # what is 0 has no scale yet, and no say in the first step
                    scale = torch.where((y == 0.0) & (atol == 0.0), torch.inf, scale)
                d0, d1 = control.rounded(host(torch.stack((self.norm(y / scale), self.norm(slope / scale)))))
            finite = np.isfinite(d1)
            with np.errstate(all="ignore"):  # samples that are not finite are ended below
                h0 = np.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
                h0 = np.clip(np.where(np.isfinite(h0), h0, 1e-6), control.RESOLUTION * max(abs(s), abs(s_end)), longest)
            slopes = Slopes(y)
            slopes.append(slope)
            euler = slopes.advance(sign * h0, *EULER.solution)
            ahead = yield Query(euler, torch.from_numpy(start + sign * h0))
            with torch.no_grad(), np.errstate(all="ignore"):
                d2 = control.rounded(host(self.norm((ahead - slope) / scale))) / h0
                most = np.maximum(d1, np.where(np.isnan(d2), np.inf, d2))
                root = control.rounded((0.01 / most) ** (1.0 / (self.pair.error_order + 1)))
                h = np.where(most <= 1e-15, np.maximum(h0 * 1e-3, 1e-6), root)
                h = np.minimum(100.0 * h0, np.where(h > 0.0, h, h0))
        if own is not None:
            h = np.where(np.isnan(own[2]), h, own[2])
        real, counts = np.zeros((4, count)), np.zeros((5, count), dtype=np.int64)
        real[control.S], real[control.H] = s, sign * np.clip(h, min(self.min_step, longest), longest)
        counts[control.NFE] = self.begin_nfe
        counts[control.STATUS] = np.where(finite, int(Status.RUNNING), int(Status.NONFINITE))
        return AdaptiveState(y, slope, real, counts)

    def attempt(
        self, state: AdaptiveState, s_end: float, errors: Vector | None = None, own: Vector | None = None
    ) -> Generator[Query, Tensor, Attempt]:
        """One attempted step of every sample towards s_end; each is accepted or rejected on its own.

        Args:
            errors: the errors of an attempt that was made before and is now repeated: they decide again.
            own: as for `begin`.
        """
        pair = self.pair
        h, s_next, nodes = aim(state.real, s_end, pair.later)
        slopes = Slopes(state.y)
        slopes.append(state.slope)
        ahead = yield from ask_stages(pair, Nodes(nodes), h, slopes, 1)
        if errors is None:
            errors = self._error(ahead, h, slopes) if own is None else self._error(ahead, h, slopes, own)
        return self._judged(state, s_end, h, s_next, slopes, ahead, errors)

    def ahead(self, state: AdaptiveState, s_end: float) -> Vector:
        """The times that the next attempt asks about, (m, B)."""
        return aim(state.real, s_end, self.pair.later)[2]

    def _judged(
        self,
        state: AdaptiveState,
        s_end: float,
        h: Vector,
        s_next: Vector,
        slopes: Slopes,
        ahead: Tensor,
        error: Vector,
    ) -> Attempt:
        """What becomes of an attempt whose last slope is the one at its end."""
        accepted, passed, ended, real, counts = judge(error, state.real, state.counts, h, s_next, s_end, self.law)
        y = slopes.merge(accepted, passed, ahead, state.y)
        slope = slopes.merge(accepted, passed, slopes[-1], state.slope)
        stride = Stride(self.pair, state.y, slopes.tensors, ahead, state.s, s_next, h)
        return Attempt(AdaptiveState(y, slope, real, counts), stride, accepted, ended, error)

    @cached_property
    def law(self) -> Vector:
        """The controller's formula and all limits; see `flowsolve.kernels.Law`."""
        c, k = self.controller, self.pair.error_order + 1
        beta1, beta2, beta3 = (beta / k for beta in c.betas)
        return np.array(
            Law(
                c.safety,
                c.min_factor,
                c.max_factor,
                c.first_factor,
                beta1,
                beta2,
                beta3,
                1.0 / k,
                self.min_step,
                self.max_step,
                self.max_steps,
                self.max_rejections,
                self.attempt_nfe,
            )
        )

    def _error(self, ahead: Tensor, h: Vector, slopes: Slopes, own: Vector | None = None) -> Vector:
        """The error of an attempt in units of the tolerance: the one read of a step."""
        atol, rtol = self.tolerances(ahead, own)
        norms = [
            slopes.error_norm(h, stages, weights, ahead, atol, rtol, self.norm) for stages, weights in self.pair.errors
        ]
        if len(norms) == 1:
            return control.rounded(host(norms[0]))
        if within() is not None:  # what vmap maps is combined before the worst of it is taken
            e5, e3 = (e.double() for e in norms)
            joined = e5 * e5 / (e5 * e5 + 0.01 * e3 * e3).sqrt()
            return control.rounded(host(torch.where((e5 == 0.0) & (e3 == 0.0), 0.0, joined)))
        e5, e3 = control.rounded(host(torch.stack(norms)))
        with np.errstate(all="ignore"):
            both: Vector = e5 * e5 / np.sqrt(e5 * e5 + 0.01 * e3 * e3)
        return np.where((e5 == 0.0) & (e3 == 0.0), 0.0, both)

    @property
    def begin_nfe(self) -> int:
        """Evaluations spent before the first step."""
        return 1 if self.first_step is not None else 2

    @property
    def attempt_nfe(self) -> int:
        """Evaluations of one attempted step."""
        return int(self.pair.stages - 1)


@dataclass(frozen=True)
class Bosh3(Adaptive):
    """Bogacki and Shampine's pair of orders 3 and 2: 3 evaluations a step, for loose tolerances."""

    tableau = BOSH3


@dataclass(frozen=True)
class Dopri5(Adaptive):
    """Dormand and Prince's pair of orders 5 and 4: 6 evaluations a step."""

    tableau = DOPRI5


@dataclass(frozen=True)
class Tsit5(Adaptive):
    """Tsitouras' pair of orders 5 and 4: 6 evaluations a step, with smaller errors than Dopri5's as a rule."""

    tableau = TSIT5


@dataclass(frozen=True)
class Dopri8(Adaptive):
    """Hairer's dop853, order 8 with companions of orders 5 and 3: 12 evaluations a step, for tight tolerances."""

    tableau = DOP853
