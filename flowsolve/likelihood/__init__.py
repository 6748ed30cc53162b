"""Likelihood: log-densities, along a curve or by an ODE; bits per dimension of integer images; variational bounds."""

from flowsolve.likelihood.bits import BitsPerDim, bits_per_dim
from flowsolve.likelihood.dequantize import Dequantizer, FlowDequantizer, TruncatedNormal, Uniform
from flowsolve.likelihood.elbo import VariationalBound, variational_bound
from flowsolve.likelihood.log_prob import LogProb, log_prob, sample_log_prob
from flowsolve.likelihood.trace import Exact, Hutchinson, HutchPP, Trace, XTrace

__all__ = [
    "BitsPerDim", "Dequantizer", "Exact", "FlowDequantizer", "HutchPP", "Hutchinson", "LogProb", "Trace",
    "TruncatedNormal", "Uniform", "VariationalBound", "XTrace", "bits_per_dim", "log_prob", "sample_log_prob",
    "variational_bound",
]  # fmt: skip
