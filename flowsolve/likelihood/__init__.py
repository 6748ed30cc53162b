"""Likelihood: log-densities by the instantaneous change of variables, and bits per dimension of integer images."""

from flowsolve.likelihood.bits import BitsPerDim, bits_per_dim
from flowsolve.likelihood.log_prob import LogProb, log_prob

__all__ = ["BitsPerDim", "LogProb", "bits_per_dim", "log_prob"]
