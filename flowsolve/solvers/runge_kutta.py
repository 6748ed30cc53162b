r"""Runge–Kutta on a fixed grid, in any chart and on any ODE.

A full step costs the tableau's evaluations. A budget of N evaluations is spent to the last one: what does not fill
whole steps goes into first steps of lower order (Euler for 1, Heun for 2, Kutta's third-order method for 3, RK4 for
4), placed at the noise, where in the straight chart the field is smoothest. A step's share of the grid is its share of
the evaluations, so a step of low order is a short one.

On a flow the default chart is the straight one: there Euler is DDIM, and the field is finite at both ends.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowsolve._batch import per_sample
from flowsolve.charts import CHARTS, Chart
from flowsolve.flow import Flow
from flowsolve.paths import Path
from flowsolve.solvers.base import Query, Solver, State, Step, Stepper, in_chart, inverse, scaled
from flowsolve.solvers.tableaus import CLASSIC4, EULER, HEUN, KUTTA3, MIDPOINT, Tableau

__all__ = ["RK4", "Euler", "Heun", "Midpoint", "RungeKutta"]

SHORTER = {t.evaluations: t for t in (EULER, HEUN, KUTTA3, CLASSIC4)}


def advance(y: Tensor, h: Any, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """y + h Σ w_i k_i, with h a float or one number a sample."""
    if isinstance(h, Tensor):
        return y + per_sample(h, y) * weighted(weights, slopes) if slopes else y
    for w, k in zip(weights, slopes, strict=False):
        if w != 0.0:
            y = torch.add(y, k, alpha=h * w)
    return y


def weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Σ w_i k_i over the slopes at hand."""
    terms = [(w, k) for w, k in zip(weights, slopes, strict=False) if w != 0.0]
    total = terms[0][0] * terms[0][1]
    for w, k in terms[1:]:
        total = torch.add(total, k, alpha=w)
    return total


def stages(
    tableau: Tableau, y: Tensor, s: Any, s_next: Any, h: Any, slopes: list[Tensor], count: int
) -> Generator[Query, Tensor, Tensor]:
    """Ask for the first `count` slopes of a step, append those not yet there, and return the last stage's state.

    A node with c = 1 sits at s_next to the bit.
    """
    stage = y
    for i in range(len(slopes), count):
        node = s if i == 0 else s_next if tableau.c[i] == 1.0 else s + tableau.c[i] * h
        stage = advance(y, h, tableau.a[i], slopes)
        slopes.append((yield Query(stage, node)))
    return stage


@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit Runge–Kutta method on a fixed grid."""

    tableau: ClassVar[Tableau]

    def __init_subclass__(cls) -> None:
        if "tableau" in vars(cls):
            cls.evaluations = cls.tableau.evaluations

    def schedule(self, nfe: int) -> list[int]:
        """Whole steps, after steps of lower order that spend what is left over."""
        full, rest = divmod(nfe, self.evaluations)
        first = []
        while rest:
            first.append(min(rest, max(SHORTER)))
            rest -= first[-1]
        return first[::-1] + [self.evaluations] * full

    def require(self, flow: Flow, chart: Chart | None, t: float, *, last: bool) -> None:
        """The estimate and the chart must exist at every node; at the last one only for a step that asks there."""
        chart = chart or CHARTS["straight"]
        chart.require(flow.path, t)
        if not last or (self.evaluations > 1 and t <= flow.path.window[1]):
            flow.require(t)

    def on(self, path: Path, chart: Chart | None) -> Stepper:
        """The step function of this solver on a path, in a chart (by default the straight one)."""
        ruler = chart or CHARTS["straight"]

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            y = scaled(inverse(ruler.scale(path.at(t))), state.x)
            inner = self.stride(y, ruler.clock(path, t), ruler.clock(path, t_next), evaluations)
            y = yield from in_chart(inner, ruler, path)
            return state.advance(scaled(ruler.scale(path.at(t_next)), y))

        return step

    def step(self, state: State, t: float, t_next: float, evaluations: int) -> Step:
        """One step of a plain ODE from t to t_next."""
        return state.advance((yield from self.stride(state.x, t, t_next, evaluations)))

    def stride(self, y: Tensor, s: float, s_next: float, evaluations: int) -> Generator[Query, Tensor, Tensor]:
        """y at s_next from y at s, by exactly that many evaluations."""
        tableau = self.tableau if evaluations == self.evaluations else SHORTER[evaluations]
        slopes: list[Tensor] = []
        yield from stages(tableau, y, s, s_next, s_next - s, slopes, evaluations)
        return advance(y, s_next - s, tableau.b, slopes)


@dataclass(frozen=True)
class Euler(RungeKutta):
    """Euler's method, order 1. In the straight, data and noise charts it is DDIM."""

    tableau = EULER


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """The explicit midpoint rule, order 2, 2 evaluations a step."""

    tableau = MIDPOINT


@dataclass(frozen=True)
class Heun(RungeKutta):
    """Heun's method (the explicit trapezoid), order 2, 2 evaluations a step."""

    tableau = HEUN


@dataclass(frozen=True)
class RK4(RungeKutta):
    """Kutta's classical method, order 4, 4 evaluations a step."""

    tableau = CLASSIC4
