"""Benchmarks: what a solver costs and how wrong it is, measured, recorded and drawn."""

from flowsolve.bench.curves import Curve, nfe_error_curves, reference
from flowsolve.bench.record import environment

__all__ = ["Curve", "environment", "nfe_error_curves", "reference"]
