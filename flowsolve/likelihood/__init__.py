"""Likelihood: log-densities of a flow, along a curve or by an ODE, and bits per dimension of integer images."""

from flowsolve.likelihood.bits import BitsPerDim, bits_per_dim
from flowsolve.likelihood.log_prob import LogProb, log_prob, sample_log_prob
from flowsolve.likelihood.trace import Exact, Hutchinson, HutchPP, Trace, XTrace

__all__ = [
    "BitsPerDim", "Exact", "HutchPP", "Hutchinson", "LogProb", "Trace", "XTrace", "bits_per_dim", "log_prob",
    "sample_log_prob",
]  # fmt: skip
