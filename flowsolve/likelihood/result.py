"""What a likelihood returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowsolve.solution import Solution

__all__ = ["LogProb", "one_shape"]


@dataclass(frozen=True)
class LogProb:
    """Log-densities, one entry a sample.

    Attributes:
        log_prob: nats, shape (B,); NaN for a sample whose solve failed.
        stderr: standard error of log_prob from the trace probes, shape (B,): 0 with the exact trace, NaN from a single
            probe, which cannot tell.
        error: estimate of the solver's own error of log_prob in nats, shape (B,): what halving the nodes of the curve
            changes, a bound in most cases; NaN where the solver does not tell (Runge–Kutta: compare two tolerances).
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


def one_shape(x: Tensor, known: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a sample of x, which is that of the samples before, if there were any."""
    shape = tuple(x.shape[1:])
    if known not in ((), shape):
        raise ValueError(f"samples of shape {shape} follow some of shape {known}; expected one shape")
    return shape
