r"""The arithmetic of step control on the host: where each sample's next step goes, and what becomes of it.

Samples are columns. `real` has the rows s (time reached), h (signed size of the next step), and the logs of the errors
of the last two accepted steps; `counts` has the rows accepted, rejected, rejections in a row, evaluations, status.

Logarithms and exponentials are rounded to float32: libraries differ in their last bits, and a step must have the same
size whichever of them computed it.

A `Law` is a controller's formula with its limits as plain numbers, so that compiled code can follow it
(`flowsolve.solvers.controllers` has the formula). Statuses are the numbers of `flowsolve.solvers.Status`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Law", "Verdict", "aim", "judge", "rounded"]

Vector = NDArray[np.float64]
Count = NDArray[np.int64]

S, H, LAST, BEFORE = range(4)
ACCEPTED, REJECTED, STREAK, NFE, STATUS = range(5)
RUNNING, SUCCESS, NONFINITE, UNDERFLOW, BUDGET, MAX_STEPS, MAX_REJECTIONS = range(-1, 6)

RESOLUTION = 16.0 * float(np.finfo(np.float64).eps)  # of time, relative
FINEST = 1e-10  # an error of 0 tells the controller no more than this
LEAST = math.log(1e-4)  # nor is one below this remembered


class Law(NamedTuple):
    """A controller's formula and all limits, in the order in which the compiled twin reads them.

    Attributes:
        safety, min_factor, max_factor, first_factor: see `flowsolve.solvers.Controller`.
        beta1, beta2, beta3: exponents of the last three errors.
        elementary: the exponent after a rejection.
        min_step, max_step, max_steps, max_rejections: see `flowsolve.solvers.Adaptive`.
        nfe: evaluations of an attempt.
    """

    safety: float
    min_factor: float
    max_factor: float
    first_factor: float
    beta1: float
    beta2: float
    beta3: float
    elementary: float
    min_step: float
    max_step: float
    max_steps: float
    max_rejections: float
    nfe: float


class Verdict(NamedTuple):
    """What became of an attempt.

    Attributes:
        accepted: which samples accepted the step, bool of shape (B,).
        passed: how many did.
        ended: how many samples are no longer running.
        real, counts: the columns afterwards.
    """

    accepted: NDArray[np.bool_]
    passed: int
    ended: int
    real: Vector
    counts: Count


def aim(real: Vector, s_end: float, c: Vector) -> tuple[Vector, Vector, Vector]:
    """(h, s_next, nodes) of the next attempt: sizes and ends of shape (B,), and the times s + c h, (m, B).

    A step that would nearly reach s_end is stretched to it, one that would pass it is cut. Ends are kept to the bit.
    """
    s, planned = real[S], real[H]
    left = s_end - s
    arrives = np.abs(planned) * 1.000001 >= np.abs(left)
    h = np.where(arrives, left, planned)
    s_next = np.where(arrives, s_end, s + planned)
    nodes = s + c[:, None] * h
    nodes[c == 1.0] = s_next
    return h, s_next, nodes


def judge(error: Vector, real: Vector, counts: Count, h: Vector, s_next: Vector, s_end: float, law: Vector) -> Verdict:
    """Accept or reject the attempted step of each sample, plan its next one, and end it where a limit is met.

    Args:
        error: errors in units of the tolerance, shape (B,).
        real, counts: the columns before.
        h, s_next: sizes and ends of the steps.
        s_end: the end of the solve.
        law: a `Law` as an array.
    """
    rule = Law(*law.tolist())
    accepted, finite = error <= 1.0, np.isfinite(error)
    arrives = s_next == s_end
    logs = rounded(np.log(np.maximum(np.where(finite, error, 1.0), FINEST)))
    gain = rule.safety * rounded(np.exp(-rule.beta1 * logs - rule.beta2 * real[LAST] - rule.beta3 * real[BEFORE]))
    first = counts[ACCEPTED] + counts[REJECTED] == 0
    gain = np.minimum(gain, np.where(first, rule.first_factor, rule.max_factor))
    loss = np.minimum(rule.safety * rounded(np.exp(-rule.elementary * logs)), 1.0)
    factor = np.where(finite, np.maximum(np.where(accepted, gain, loss), rule.min_factor), 0.1)
    factor = np.where(counts[STREAK] > 0, np.minimum(factor, 1.0), factor)
    size = np.abs(h * factor)
    # A step cut short to arrive says nothing against the size that was planned.
    size = np.where(accepted & arrives, np.maximum(size, np.abs(real[H])), size)
    size = np.minimum(size, rule.max_step)
    # A step below the resolution of time would not advance it, even if it were accepted.
    stuck = size <= RESOLUTION * np.maximum(np.abs(real[S]), abs(s_end))
    stuck |= ~accepted & (size < rule.min_step)
    size = np.maximum(size, rule.min_step)

    after = np.stack(
        (
            np.where(accepted, s_next, real[S]),
            np.copysign(size, h),
            np.where(accepted, np.maximum(logs, LEAST), real[LAST]),
            np.where(accepted, real[LAST], real[BEFORE]),
        )
    )
    tally = counts.copy()
    tally[ACCEPTED] += accepted
    tally[REJECTED] += ~accepted
    tally[STREAK] = np.where(accepted, 0, counts[STREAK] + 1)
    tally[NFE] += int(rule.nfe)
    status = tally[STATUS]
    status[tally[ACCEPTED] + tally[REJECTED] >= rule.max_steps] = MAX_STEPS
    status[tally[STREAK] >= rule.max_rejections] = MAX_REJECTIONS
    status[stuck & finite] = UNDERFLOW
    status[stuck & ~finite] = NONFINITE
    status[accepted & arrives] = SUCCESS
    return Verdict(accepted, int(accepted.sum()), int((status != RUNNING).sum()), after, tally)


def rounded(v: Vector) -> Vector:
    """Numbers to the precision of float32."""
    return v.astype(np.float32).astype(np.float64)
