"""What a likelihood returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flowsolve.solution import Solution

__all__ = ["LogProb", "one_shape"]

RESOLUTION = 0.01
"""Bits per dimension to which published likelihoods are compared."""


@dataclass(frozen=True)
class LogProb:
    """Log-densities, one entry a sample.

    Attributes:
        log_prob: nats, shape (B,); NaN for a sample whose solve failed.
        stderr: standard error of log_prob from the trace probes, shape (B,): 0 with the exact trace, NaN from a single
            probe, which cannot tell.
        error: estimate of the solver's own error of log_prob in nats, shape (B,), too large in most cases; NaN where
            the solver does not tell (Runge–Kutta: compare two tolerances).
        nfe: network evaluations of each sample, int64 of shape (B,).
        latent: the state at the noise end, shape (B, *S).
        x: the state at the data end, shape (B, *S).
        solution: how the solve went; its x is the state that the solve arrived at.
    """

    log_prob: Tensor
    stderr: Tensor
    error: Tensor
    nfe: Tensor
    latent: Tensor
    x: Tensor
    solution: Solution

    @property
    def converged(self) -> Tensor:
        """Whether `error` is below 0.01 bits per dimension, to which papers compare, shape (B,); True where it is NaN.

        Where it is not, give more evaluations (`nfe=`). If `error` falls slowly as they double, the field is rough, and
        neither the density nor its error is to be trusted: use `solver=Dopri5(rtol, atol)` at two tolerances.
        """
        size = max(1, math.prod(self.x.shape[1:]))
        return ~(self.error > RESOLUTION * size * math.log(2.0))


def one_shape(x: Tensor, known: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a sample of x, which is that of the samples before, if there were any."""
    shape = tuple(x.shape[1:])
    if known not in ((), shape):
        raise ValueError(f"samples of shape {shape} follow some of shape {known}; expected one shape")
    return shape
