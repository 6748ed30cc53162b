"""The solvers measured, each behind one call, and how the evaluations they ask for are counted.

A peer that is not installed is left out, and the record says so.
"""

from __future__ import annotations

import importlib
import math
import platform
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.kernels import cpu

__all__ = ["Counted", "available", "diffrax_solver", "facts", "scalar_field", "torchode_solve"]

PEERS = ("torchdiffeq", "torchode", "diffrax", "scipy")
Vector = NDArray[np.float64]


@cache
def available(name: str) -> ModuleType | None:
    """A peer's module, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name == "diffrax":
                importlib.import_module("jax").config.update("jax_enable_x64", True)
            return importlib.import_module(name)
        except ImportError:
            return None


def facts() -> dict[str, Any]:
    """What `flowsolve.bench.record.environment` leaves out: the peers and the processor."""
    names = [*(n for n in PEERS if available(n)), "numba", *(["jax"] if available("diffrax") else [])]
    return {
        "peers": {name: version(name) for name in names},
        "absent": [name for name in PEERS if not available(name)],
        "cpu": _processor(),
        "system": platform.platform(),
        "numba_threaded": cpu.THREADED,
    }


def _processor() -> str:
    """The processor's name and its caches, as Linux tells them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    name = told.get("model name", platform.processor())
    return f"{name}, family {told.get('cpu family')}, model {told.get('model')}, cache {told.get('cache size')}"


class Counted:
    """A field that counts its calls and the rows it was given.

    Args:
        f: (t, y) → dy/dt.
    """

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        self.f, self.calls, self.rows = f, 0, 0

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(y)
        return self.f(t, y)


def torchode_solve(f: Any, y0: Tensor, t1: float, method: str, tolerance: float, max_steps: int | None = None) -> Any:
    """torchode's solution of dy/dt = f(t, y) from t = 0, y0 of shape (B, D), under its integral controller."""
    to = available("torchode")
    assert to is not None
    term = to.ODETerm(f, with_stats=False)
    controller = to.IntegralController(tolerance, tolerance, term=term)
    solver = to.AutoDiffAdjoint(getattr(to, method)(term), controller, max_steps=max_steps)
    start = torch.zeros(len(y0), dtype=y0.dtype)
    return solver.solve(to.InitialValueProblem(y0=y0, t_start=start, t_end=torch.full_like(start, t1)))


def diffrax_solver(field: Any, method: str, *, count: Callable[[], None] | None = None) -> Callable[..., Vector]:
    """A compiled (y0, t1, tolerance) ↦ y(t1) by diffrax, for a field on lists of numbers.

    Args:
        field: (t, y, functions) → list, as in `sections.problems`.
        count: is called from within the compiled loop at every evaluation.
    """
    dfx, jax = available("diffrax"), importlib.import_module("jax")
    assert dfx is not None

    def f(t: Any, y: Any, args: Any) -> Any:
        if count is not None:
            jax.debug.callback(count)
        return jax.numpy.stack(field(t, list(y), jax.numpy))

    @jax.jit
    def solve(y0: Any, t1: Any, tolerance: Any) -> Any:
        found = dfx.diffeqsolve(
            dfx.ODETerm(f), getattr(dfx, method)(), 0.0, t1, None, y0, max_steps=None,
            stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        )  # fmt: skip
        return found.ys[-1]

    def end(y0: Any, t1: float, tolerance: float) -> Vector:
        y = np.asarray(solve(jax.numpy.asarray(y0), t1, tolerance))
        jax.effects_barrier()
        return y

    return end


def scalar_field(field: Any) -> Callable[[Any, Tensor], Tensor]:
    """A field on lists of numbers for a solver whose state is one system: a tensor of shape (D,) or (1, D)."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(field(float(t), y.flatten().tolist(), math), dtype=y.dtype).reshape(y.shape)

    return f
