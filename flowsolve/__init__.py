"""Numerical ODE and SDE solvers for generative flows."""

from flowsolve import (
    adapters,
    batching,
    charts,
    grids,
    guidance,
    kernels,
    likelihood,
    paths,
    predictions,
    problems,
    runs,
    solvers,
    training,
    transforms,
)
from flowsolve._version import __version__
from flowsolve.conditioning import per_sample, shared
from flowsolve.flow import Flow
from flowsolve.integrate import encode, sample
from flowsolve.inversion import RoundTrip, round_trip
from flowsolve.likelihood import bits_per_dim, log_prob, sample_log_prob, variational_bound
from flowsolve.ode import solve
from flowsolve.predictions import Estimate, Prediction, Row
from flowsolve.snapshot import Snapshot
from flowsolve.solution import Solution, SolverError
from flowsolve.solvers import Status

__all__ = [
    "Estimate",
    "Flow",
    "Prediction",
    "RoundTrip",
    "Row",
    "Snapshot",
    "Solution",
    "SolverError",
    "Status",
    "__version__",
    "adapters",
    "batching",
    "bits_per_dim",
    "charts",
    "encode",
    "grids",
    "guidance",
    "kernels",
    "likelihood",
    "log_prob",
    "paths",
    "per_sample",
    "predictions",
    "problems",
    "round_trip",
    "runs",
    "sample",
    "sample_log_prob",
    "shared",
    "solve",
    "solvers",
    "training",
    "transforms",
    "variational_bound",
]
