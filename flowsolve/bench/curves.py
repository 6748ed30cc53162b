r"""NFE against error: how far from the flow's true endpoint a solver lands, for what it costs.

All solvers start from the same noise and are compared with one converged reference of the same ODE,

$$ \text{RMSE} = \sqrt{\tfrac1{BD}\textstyle\sum\|x - x_{\text{ref}}\|^2} . $$

On data with several modes a few samples on the border between two of them rule the RMSE, so the median over samples of
the per-sample root mean square is recorded beside it.

The reference is RK4 on a fine fixed grid: networks whose time enters by a sinusoidal embedding ripple a little in time,
with periods down to 2π table entries, and only a grid that resolves them is converged. A second one with half the steps
checks it: their distance bounds the reference's own error from above, and with it what the curves can resolve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowsolve import solvers
from flowsolve.flow import Flow
from flowsolve.integrate import sample
from flowsolve.kernels import rms
from flowsolve.solvers import Auto, Solver

__all__ = ["Curve", "Reference", "nfe_error_curves", "reference"]


@dataclass(frozen=True)
class Reference:
    """A converged endpoint.

    Attributes:
        x: the endpoints, shape (B, *S).
        uncertainty: RMSE between this reference and one with half the evaluations.
        nfe: evaluations it took.
    """

    x: Tensor
    uncertainty: float
    nfe: int


@dataclass
class Curve:
    """One solver's points: mean NFE, RMSE, and the median of the per-sample root mean square error."""

    name: str
    nfe: list[float] = field(default_factory=list)
    rmse: list[float] = field(default_factory=list)
    median: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The curve as plain values."""
        return asdict(self)


def reference(flow: Flow, shape: Sequence[int], *, seed: int = 0, nfe: int = 512) -> Reference:
    """The endpoints of the flow from the noise of a seed, by RK4 with nfe evaluations."""
    fine, coarse = (sample(flow, shape, solver=solvers.RK4(), nfe=n, seed=seed).x for n in (nfe, nfe // 2))
    return Reference(fine, float((fine - coarse).double().square().mean().sqrt()), nfe)


def nfe_error_curves(
    flow: Flow,
    target: Reference,
    fixed: dict[str, Solver | Auto],
    budgets: Sequence[int],
    adaptive: dict[str, Callable[[float], Solver]],
    tolerances: Sequence[float],
    *,
    seed: int = 0,
    grid: Any = "uniform",
) -> list[Curve]:
    """Errors of solvers against a reference from the same noise.

    Args:
        flow: the flow.
        target: `reference` of the same seed.
        fixed: fixed-grid solvers by name, run at every budget; or `Auto`, with grid=None.
        budgets: numbers of evaluations.
        adaptive: by name, functions from a tolerance to a solver.
        tolerances: their tolerances.
        seed: seed of the noise.
        grid: spacing of the fixed grids.
    """
    shape = target.x.shape
    curves = []
    for name, solver in fixed.items():
        curve = Curve(name)
        for nfe in budgets:
            if isinstance(solver, Auto) or nfe >= solver.evaluations:
                _add(curve, target, sample(flow, shape, solver=solver, nfe=nfe, grid=grid, seed=seed))
        curves.append(curve)
    for name, make in adaptive.items():
        curve = Curve(name)
        for tolerance in tolerances:
            _add(curve, target, sample(flow, shape, solver=make(tolerance), seed=seed))
        curves.append(curve)
    return curves


def _add(curve: Curve, target: Reference, solution: Any) -> None:
    errors = rms((solution.x - target.x).double())
    curve.nfe.append(float(solution.nfe.double().mean()))
    curve.rmse.append(float(errors.square().mean().sqrt()))
    curve.median.append(float(torch.median(errors)))
