r"""Runge–Kutta on a fixed grid, in any chart and on any ODE.

A full step costs the tableau's evaluations. A budget of N evaluations is spent to the last one: what does not fill
whole steps goes into at most three first steps of Euler, Heun, Kutta's third-order method or RK4 (1 to 4 evaluations),
placed at the noise, where in the straight chart the field is smoothest. They are of one order less than the method if
the count allows, which keeps its order of convergence: RK4 spends 41 = 3·3 + 8·4. A step's share of the grid is its
share of the evaluations.

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


def _compose(total: int, sizes: list[int]) -> list[int] | None:
    """The fewest numbers from `sizes`, rising, that add up to a total; None if none do."""
    best: list[list[int] | None] = [[]]
    for n in range(1, total + 1):
        ways = [[*w, size] for size in sizes if size <= n and (w := best[n - size]) is not None]
        best.append(min(ways, key=len) if ways else None)
    found = best[total]
    return None if found is None else sorted(found)


@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit Runge–Kutta method on a fixed grid."""

    tableau: ClassVar[Tableau]

    def __init_subclass__(cls) -> None:
        if "tableau" in vars(cls):
            cls.evaluations = cls.tableau.evaluations

    def schedule(self, nfe: int) -> list[int]:
        """Whole steps, after shorter ones that spend what is left over without costing the order if that can be."""
        order = self.tableau.order
        for least in range(order - 1, 0, -1):  # a few steps of one order less keep the global order
            sizes = [n for n, t in SHORTER.items() if t.order >= least]
            for full in range(nfe // self.evaluations, -1, -1):
                first = _compose(nfe - full * self.evaluations, sizes)
                if first is not None and len(first) <= 3:
                    return first + [self.evaluations] * full
        return [1] * nfe

    def method(self, evaluations: int) -> Tableau:
        """The tableau of a step of so many evaluations."""
        return self.tableau if evaluations == self.evaluations else SHORTER[evaluations]

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a node c = 1 is among the stages asked for."""
        return 1.0 in self.method(evaluations).c[:evaluations]

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """The chart must be finite at every node, and the estimate exist where it is asked for."""
        (chart or CHARTS["straight"]).require(flow.path, t)
        super().require(flow, chart, t, asks=asks)

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
        tableau = self.method(evaluations)
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
