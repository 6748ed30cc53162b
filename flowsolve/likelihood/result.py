"""What a likelihood returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowsolve.solution import Solution

__all__ = ["LogProb", "one_shape", "student"]

RESOLUTION = 0.01
"""Bits per dimension to which published likelihoods are compared."""


@dataclass(frozen=True)
class LogProb:
    """Log-densities, one entry a sample.

    Attributes:
        log_prob: nats, shape (B,); NaN for a sample whose solve failed.
        stderr: standard error of log_prob from the trace probes, shape (B,): 0 with the exact trace, NaN from a single
            probe, which cannot tell, and from XTrace.
        error: estimate of the solver's own error of log_prob in nats, shape (B,), too large in most cases; NaN where
            the solver does not tell (Runge–Kutta: compare two tolerances).
        nfe: network evaluations of each sample, int64 of shape (B,).
        latent: the state at the noise end, shape (B, *S).
        x: the state at the data end, shape (B, *S).
        solution: how the solve went; its x is the state that the solve arrived at.
        estimates: of the trace, whose spread is stderr: one a probe for Hutchinson's.
    """

    log_prob: Tensor
    stderr: Tensor
    error: Tensor
    nfe: Tensor
    latent: Tensor
    x: Tensor
    solution: Solution
    estimates: int = 1

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The ends of a confidence interval for log_prob over the draws of the probes, nats, two of shape (B,).

        log_prob ± q · stderr, with q of Student's t for as many degrees of freedom as there are estimates less one (two
        probes have one, where 1 × stderr covers half, not two thirds). NaN from a single estimate; the solver's `error`
        is no part of it.

        Args:
            level: the probability that it covers, within (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level = {level!r}; expected a probability between 0 and 1, such as 0.95")
        half = self.stderr * (student(level, self.estimates - 1) if self.estimates > 1 else 1.0)
        return self.log_prob - half, self.log_prob + half

    @property
    def converged(self) -> Tensor:
        """Whether `error` is below 0.01 bits per dimension, to which papers compare, shape (B,); True where it is NaN.

        Where it is not, give more evaluations (`nfe=`). If `error` falls slowly as they double, the field is rough, and
        neither the density nor its error is to be trusted: use `solver=Dopri5(rtol, atol)` at two tolerances.
        """
        size = max(1, math.prod(self.x.shape[1:]))
        return ~(self.error > RESOLUTION * size * math.log(2.0))


def student(level: float, freedom: int) -> float:
    """q with P(|T| ≤ q) = level for Student's t: with T = √ν tan θ its density is proportional to cos^{ν−1} θ."""
    x, w = np.polynomial.legendre.leggauss(64)

    def within(theta: float) -> float:
        return float(0.5 * theta * (w @ np.cos(0.5 * theta * (x + 1.0)) ** (freedom - 1)))

    low, high, whole = 0.0, 0.5 * math.pi, within(0.5 * math.pi)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if within(middle) < level * whole else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def one_shape(x: Tensor, known: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a sample of x, which is that of the samples before, if there were any."""
    shape = tuple(x.shape[1:])
    if known not in ((), shape):
        raise ValueError(f"samples of shape {shape} follow some of shape {known}; expected one shape")
    return shape
