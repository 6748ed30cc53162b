r"""Planning: the steps of a fixed-grid solve, laid out and checked before anything is computed.

A budget of N evaluations is spent to the last one (`Solver.schedule`), and a step's share of the grid is its share of
the evaluations: the spacing lays out N steps, and a step that costs m of them spans m.

Where a path ends beyond the times its network knows (`Path.window`: a discrete table's clean end), a grid with nodes or
stages there goes to the window's edge instead, and one step x' = α' ẑ + σ' ε̂ with the estimate at the edge closes the
gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from flowsolve import grids
from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.grids import Grid
from flowsolve.solvers.base import Solver

__all__ = ["estimates", "plan", "share", "whole"]


def plan(
    solver: Solver,
    flow: Flow,
    interval: tuple[float, float],
    grid: Any = "uniform",
    nfe: int | None = None,
    chart: Chart | None = None,
) -> Grid:
    """The grid on which a fixed-grid solver will spend exactly nfe estimates, validated before anything is computed.

    Raises:
        ValueError: neither nfe nor explicit times, a budget that contradicts them, times that are not a grid or not on
            the interval, a solver that draws noise on the way to the noise, or a node where the estimate or the chart
            does not exist.
    """
    start, end = interval
    if end < start and solver.random:
        raise ValueError(f"{solver!r} draws noise and has no way back from data to noise; use eta=0 or an ODE solver")
    edge = flow.path.window[1]
    spacing = grids.resolve(grid)
    if isinstance(spacing, list):
        if spacing[:1] + spacing[-1:] != [start, end]:
            raise ValueError(
                f"the times given run from {spacing[0]!r} to {spacing[-1]!r}, the interval from {start!r} to {end!r}; "
                "give interval= the same ends"
                if spacing
                else "grid= is empty; expected at least 2 times"
            )
        counts = [solver.evaluations] * (len(spacing) - 1)
        closing = solver.evaluations > 1 and spacing[-1] > edge
        if closing:
            counts[-1] = 1
        steps = Grid(tuple(spacing), tuple(counts), closing)
        if nfe is not None and nfe != steps.nfe:
            raise ValueError(
                f"nfe = {nfe} but {solver!r} spends {steps.nfe} estimates on the {steps.steps} steps given; drop one"
            )
    else:
        if nfe is None:
            raise ValueError(f"{type(solver).__name__} steps on a fixed grid: give nfe=… or explicit times as grid=…")
        counts = solver.schedule(nfe)
        times = share(spacing.times(flow.path, start, end, nfe), counts)
        closing = start < edge < end and (solver.evaluations > 1 or times[-2] > edge)
        if closing:
            if nfe < 2:
                raise ValueError(f"nfe = {nfe}; expected at least 2 with {type(solver).__name__} on {flow.path!r}")
            counts = solver.schedule(nfe - 1)
            times, counts = [*share(spacing.times(flow.path, start, edge, nfe - 1), counts), end], [*counts, 1]
        steps = Grid(tuple(times), tuple(counts), closing)
    for i, t in enumerate(steps.times):
        last = i == steps.steps
        if closing and last:
            break
        if t > edge and not last:
            raise ValueError(
                f"the grid asks the network at t = {t:g}, beyond its window [0, {edge:g}] on {flow.path!r}; only the "
                "last time may lie there"
            )
        solver.require(flow, chart, t, last=last)
    return steps


def share(times: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The ends of steps that cost `counts`, on a grid with a step for each evaluation: dear steps are long."""
    return [times[i] for i in accumulate(counts, initial=0)]


def whole(nfe: int | None) -> int | None:
    """A budget as given, if it is one."""
    if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1):
        raise ValueError(f"nfe = {nfe!r}; expected an integer >= 1")
    return nfe


def estimates(nfe: int | None, flow: Flow) -> int | None:
    """The estimates that a budget of network evaluations buys."""
    if whole(nfe) is None:
        return None
    assert nfe is not None
    if nfe % flow.nfe_per_call:
        raise ValueError(f"nfe = {nfe} is not a multiple of the {flow.nfe_per_call} evaluations an estimate costs here")
    return nfe // flow.nfe_per_call
