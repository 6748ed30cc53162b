r"""Runge–Kutta on a fixed grid, in any chart and on any ODE.

A full step costs the tableau's evaluations. A budget of N evaluations is spent to the last one: what does not fill
whole steps goes into at most three first steps of Euler, Heun, Kutta's third-order method or RK4 (1 to 4 evaluations),
placed at the noise, where in the straight chart the field is smoothest. They are of one order less than the method if
the count allows, which keeps its order of convergence: RK4 spends 41 = 3·3 + 8·4. A step's share of the grid is its
share of the evaluations.

On a flow the default chart is the straight one: there Euler is DDIM, and the field is finite at both ends.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import take
from flowsolve._surroundings import within
from flowsolve.charts import CHARTS, Chart
from flowsolve.flow import Flow
from flowsolve.kernels import Slopes
from flowsolve.paths import Path
from flowsolve.solvers.base import Nodes, Query, SlopeSolver, State, Step, Stepper, in_chart, inverse, scaled
from flowsolve.solvers.tableaus import CLASSIC4, EULER, HEUN, KUTTA3, MIDPOINT, RALSTON, Tableau

__all__ = [
    "RK4",
    "Euler",
    "Heun",
    "Midpoint",
    "Ralston",
    "RungeKutta",
    "Stride",
    "ask_stages",
    "completed",
    "look",
]

Vector = NDArray[np.float64]

SHORTER = {t.evaluations: t for t in (EULER, HEUN, KUTTA3, CLASSIC4)}


class Stride(NamedTuple):
    """A step that was made: what its interpolant is made of.

    Attributes:
        tableau: the method.
        y: the state before, shape (B, *S).
        slopes: the slopes at hand, in the order of the stages.
        ahead: the state after.
        s, s_next: times: floats, or float64 arrays of shape (B,).
        h: signed size: a float, or a float64 array of shape (B,).
    """

    tableau: Tableau
    y: Tensor
    slopes: Sequence[Tensor]
    ahead: Tensor
    s: Any
    s_next: Any
    h: Any

    @property
    def missing(self) -> int:
        """The slopes that the interpolant still has to ask for."""
        return len(self.tableau.dense) - len(self.slopes)


def ask_stages(tableau: Tableau, nodes: Nodes, h: Any, slopes: Slopes, first: int) -> Generator[Query, Tensor, Tensor]:
    """Ask for the slopes of the stages from `first` on, append them, and return the last stage's state.

    Args:
        nodes: their times.
        h: signed sizes of the step, shape (B,); None for slopes that know them.
        slopes: the state before the step, and the slopes at hand.
    """
    rows, append, advance, stage = tableau.rows, slopes.append, slopes.advance, slopes.y
    for i in range(len(nodes.table)):
        stage = advance(h, *rows[first + i])
        append((yield Query(stage, None, nodes, i)))
    return stage


def add_up(y: Tensor, h: float, terms: Sequence[tuple[int, float]], slopes: Sequence[Tensor]) -> Tensor:
    """y + h Σ w_j k_j with one h for all samples: a plain sum, cheaper to launch than any kernel."""
    (j, w), *others = terms
    total = y.add(slopes[j], alpha=h * w)
    if total.requires_grad or within() is not None:
        for j, w in others:
            total = total.add(slopes[j], alpha=h * w)
    else:
        for j, w in others:
            total.add_(slopes[j], alpha=h * w)
    return total


def look(stride: Stride, rows: NDArray[np.int64] | None, theta: Any) -> Generator[Query, Tensor, Tensor]:
    """The state within a step, at s + θ h.

    Args:
        rows: the samples to look at, in rising order and possibly repeated; None for all.
        theta: one θ for each of them, float64; or a float for all.
    """
    where = None if rows is None else np.unique(rows, return_inverse=True)[1]
    slopes, h = yield from completed(stride, rows)
    if where is not None and len(where) != len(slopes.y):
        slopes, h = _gathered(partial(take, index=where), slopes.y, slopes.tensors), h[where]
    return slopes.advance(h, np.arange(len(slopes)), stride.tableau.weights(np.atleast_1d(theta)))


def completed(stride: Stride, rows: NDArray[np.int64] | None) -> Generator[Query, Tensor, tuple[Slopes, Vector]]:
    """The slopes that a step's interpolant needs, the missing ones asked for, and its sizes; of some samples."""
    tableau, y, given, _, s, s_next, h = stride
    pick: Callable[[Tensor], Tensor] = _same
    if rows is not None:
        unique = np.unique(rows)
        pick = partial(take, index=unique)
        s, s_next, h = s[unique], s_next[unique], h[unique]
    h = np.atleast_1d(h)
    slopes = _gathered(pick, y, given)
    if stride.missing:
        c = tableau.nodes[len(slopes) : len(tableau.dense)]
        table = s + c[:, None] * h
        table[c == 1.0] = s_next
        yield from ask_stages(
            tableau, Nodes(np.tile(table, (1, len(slopes.y) // table.shape[1]))), h, slopes, len(slopes)
        )
    return slopes, h


def _same(v: Tensor) -> Tensor:
    return v


def _gathered(pick: Callable[[Tensor], Tensor], y: Tensor, tensors: Sequence[Tensor]) -> Slopes:
    """The state and slopes of some samples."""
    chosen = Slopes(pick(y))
    for k in tensors:
        chosen.append(pick(k))
    return chosen


def _compose(total: int, sizes: list[int]) -> list[int] | None:
    """The fewest numbers from `sizes`, rising, that add up to a total; None if none do."""
    best: list[list[int] | None] = [[]]
    for n in range(1, total + 1):
        ways = [[*w, size] for size in sizes if size <= n and (w := best[n - size]) is not None]
        best.append(min(ways, key=len) if ways else None)
    found = best[total]
    return None if found is None else sorted(found)


@dataclass(frozen=True)
class RungeKutta(SlopeSolver):
    """An explicit Runge–Kutta method on a fixed grid; a subclass names its tableau.

    Examples:
        >>> class SSPRK3(fs.solvers.RungeKutta):  # Shu and Osher 1988
        ...     tableau = fs.solvers.Tableau(
        ...         "ssprk3", 3, c=(0.0, 1.0, 0.5), a=((), (1.0,), (0.25, 0.25)), b=(1 / 6, 1 / 6, 2 / 3)
        ...     )
        >>> sol = fs.solve(lambda t, y: -y, torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, solver=SSPRK3(), nfe=300)
        >>> round(float(sol.x), 7)  # 1/e = 0.3678794…
        0.3678794
    """

    tableau: ClassVar[Tableau]

    def __init_subclass__(cls) -> None:
        if "tableau" in vars(cls):
            cls.evaluations = cls.tableau.evaluations

    @property
    def order(self) -> int:
        """The order of the tableau."""
        return self.tableau.order

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
        (chart or CHARTS[self.ruler]).require(flow.path, t)
        super().require(flow, chart, t, asks=asks)

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path, in a chart (by default the straight one)."""
        ruler = chart or CHARTS[self.ruler]

        def ends(t: float, t_next: float) -> tuple[Any, ...]:
            before, after = ruler.scale(path.at(t)), ruler.scale(path.at(t_next))
            return inverse(before), ruler.clock(path, t), ruler.clock(path, t_next), after

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            inward, s, s_next, outward = path.remembered((ruler, t, t_next), lambda: ends(t, t_next))
            inner = self.stride(scaled(inward, state.x), s, s_next, evaluations)
            y = (yield from in_chart(inner, ruler, path)).ahead
            return state.advance(scaled(outward, y))

        return step

    def step(self, state: State, t: float, t_next: float, evaluations: int) -> Step:
        """One step of a plain ODE from t to t_next."""
        return state.advance((yield from self.stride(state.x, t, t_next, evaluations)).ahead)

    def stride(self, y: Tensor, s: float, s_next: float, evaluations: int) -> Generator[Query, Tensor, Stride]:
        """The step from y at s to s_next, by exactly that many evaluations."""
        made: list[Stride] = []

        def keep(i: int, x: Tensor, stride: Stride) -> Generator[Query, Any, None]:
            made.append(stride)
            yield from ()

        yield from self.sweep([(s, s_next, evaluations)], y, 0, 1, (0,), keep)
        return made[0]

    def sweep(
        self,
        intervals: Sequence[tuple[float, float, int]],
        y: Tensor,
        first: int,
        last: int,
        visited: Container[int],
        visit: Callable[[int, Tensor, Stride], Generator[Query, Any, None]],
    ) -> Generator[Query, Tensor, Tensor]:
        """The strides of intervals first … last − 1, in one loop that is cheap beside a small field.

        Args:
            intervals: (s, s_next, evaluations) of the whole grid.
            y: the state where the first of them begins.
            visited: the intervals after which to visit.
            visit: is given an interval's number, the state at its end, and its stride.
        """
        made, tableau = 0, self.tableau
        for i in range(first, last):
            before, (s, s_next, evaluations) = y, intervals[i]
            if evaluations != made:
                tableau = self.method(evaluations)
                made, stages, total = evaluations, tableau.sums[:evaluations], tableau.total
            h, slopes = s_next - s, []
            for c, terms in stages:
                if not terms:
                    slopes.append((yield Query(y, s)))
                    continue
                if len(terms) == 1:
                    ((j, w),) = terms
                    y = before.add(slopes[j], alpha=h * w)
                else:
                    y = add_up(before, h, terms, slopes)
                # A node c = 1 sits at s_next to the bit.
                slopes.append((yield Query(y, s if c == 0.0 else s_next if c == 1.0 else s + c * h)))
            y = add_up(before, h, total, slopes) if made > 1 else before.add(slopes[0], alpha=h)
            if i in visited:
                yield from visit(i, y, Stride(tableau, before, slopes, y, s, s_next, h))
        return y

    def times(self, intervals: Sequence[tuple[float, float, int]]) -> list[float]:
        """The times that steps (s, s_next, evaluations) ask about, in order."""
        nodes = {n: self.method(n).c[:n] for n in {n for _, _, n in intervals}}
        return [
            s if c == 0.0 else s_next if c == 1.0 else s + c * (s_next - s)
            for s, s_next, n in intervals
            for c in nodes[n]
        ]


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
class Ralston(RungeKutta):
    """Ralston's method, order 2 with the least bound on its local error, 2 evaluations a step."""

    tableau = RALSTON


@dataclass(frozen=True)
class RK4(RungeKutta):
    """Kutta's classical method, order 4, 4 evaluations a step."""

    tableau = CLASSIC4
