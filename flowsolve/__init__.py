"""Numerical ODE and SDE solvers for generative flows.

Names are imported when they are first asked for: `flowsolve --help` and `flowsolve.__version__` do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowsolve._version import __version__

if TYPE_CHECKING:
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
        sde,
        solvers,
        training,
        transforms,
        tuning,
    )
    from flowsolve.conditioning import per_sample, shared
    from flowsolve.events import Event
    from flowsolve.flow import Flow
    from flowsolve.integrate import encode, sample
    from flowsolve.inversion import RoundTrip, round_trip
    from flowsolve.likelihood import bits_per_dim, variational_bound
    from flowsolve.likelihood.log_prob import log_prob, sample_log_prob
    from flowsolve.ode import solve
    from flowsolve.predictions import Estimate, Prediction, Row
    from flowsolve.sde import solve_sde
    from flowsolve.snapshot import Snapshot
    from flowsolve.solution import Solution, SolverError
    from flowsolve.solvers import Status
    from flowsolve.tuning import tune

_HOME = {
    "events": ("Event",),
    "conditioning": ("per_sample", "shared"),
    "flow": ("Flow",),
    "integrate": ("encode", "sample"),
    "inversion": ("RoundTrip", "round_trip"),
    "likelihood": ("bits_per_dim", "log_prob", "sample_log_prob", "variational_bound"),
    "ode": ("solve",),
    "predictions": ("Estimate", "Prediction", "Row"),
    "sde": ("solve_sde",),
    "snapshot": ("Snapshot",),
    "solution": ("Solution", "SolverError"),
    "solvers": ("Status",),
    "tuning": ("tune",),
}
"""Module → the public names that it holds; every other name of `__all__` is a module itself."""

__all__ = [
    "Estimate",
    "Event",
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
    "sde",
    "shared",
    "solve",
    "solve_sde",
    "solvers",
    "training",
    "transforms",
    "tune",
    "tuning",
    "variational_bound",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOME.items() if name in names), None)
    try:
        module = import_module(f"{__name__}.{home or name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    found = globals()[name] = module if home is None else getattr(module, name)  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
