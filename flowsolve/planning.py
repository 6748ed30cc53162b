r"""Planning: the steps of a fixed-grid solve, laid out and checked before anything is computed.

A budget of N evaluations is spent to the last one (`Solver.schedule`), and a step's share of the grid is its share of
the evaluations: the spacing lays out N steps, and a step that costs m of them spans m.

Where a path ends beyond the times its network knows (`Path.window`: a discrete table's clean end), a grid with nodes or
stages there goes to the window's edge instead, and one step x' = α' ẑ + σ' ε̂ with the estimate at the edge closes the
gap. A final policy (`grids.Final`) ends the grid earlier, and keeps back the estimate that it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

from flowsolve import grids
from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.grids import At, Grid, Spacing, Timesteps
from flowsolve.paths import Path
from flowsolve.solvers.base import Solver

__all__ = ["estimates", "given", "plan", "share", "span", "whole", "within"]


def plan(
    solver: Solver,
    flow: Flow,
    interval: tuple[float, float],
    grid: Any = None,
    nfe: int | None = None,
    chart: Chart | None = None,
    spare: int = 0,
) -> Grid:
    """The grid on which a fixed-grid solver will spend exactly nfe estimates, validated before anything is computed.

    Args:
        spare: estimates of the budget that are for what comes after the grid.

    Raises:
        ValueError: neither nfe nor explicit times, a budget that contradicts them, times that are not a grid or not on
            the interval, a solver that draws noise on the way to the noise, or a node where the estimate or the chart
            does not exist.
    """
    start, end = interval
    if end < start and solver.random:
        raise ValueError(f"{solver!r} draws noise and has no way back from data to noise; use eta=0 or an ODE solver")
    times = grids.resolve("uniform" if grid is None else grid)
    if isinstance(times, At):
        times = _snapped(times.on(flow.path), interval)
    if isinstance(times, list):
        steps = _given(solver, flow.path, interval, times, nfe, spare)
    else:
        if nfe is not None and nfe <= spare:
            raise ValueError(f"nfe = {nfe}; expected at least {spare + 1}: {spare} of them for the final step")
        steps = _spaced(solver, flow.path, interval, times, None if nfe is None else nfe - spare)
    body = steps.intervals[: steps.steps - steps.closing]
    asked = {t for t, _, _ in steps.intervals} | {after for _, after, n in body if solver.asks_at_end(n)}
    for t in steps.times[: len(steps.times) - steps.closing]:
        if t in asked:
            within(flow.path, t)
        solver.require(flow, chart, t, asks=t in asked)
    return steps


def given(grid: Any, path: Path) -> float | None:
    """The last of explicit times, in whatever coordinate; None for a spacing. Takes what `grids.resolve` gave."""
    times = grid.on(path) if isinstance(grid, At) else grid
    return times[-1] if isinstance(times, list) and times else None


def span(grid: Any, path: Path, steps: int | None) -> tuple[float, float]:
    """The interval of a solve to the data whose interval is not given: the grid's, if it has one of its own."""
    placed = grids.SPACINGS.get(grid) if isinstance(grid, str) else grid
    if isinstance(placed, At):
        return placed.span(path)
    if isinstance(placed, Timesteps) and steps:
        return placed.span(path, steps)
    return (0.0, 1.0)


def _snapped(times: list[float], interval: tuple[float, float]) -> list[float]:
    """Times whose ends are those of the interval to the bit, where they are to rounding."""
    ends = [b if abs(a - b) < 1e-9 else a for a, b in zip((times[0], times[-1]), interval, strict=True)]
    return [ends[0], *times[1:-1], ends[1]]


def _given(
    solver: Solver, path: Path, interval: tuple[float, float], times: list[float], nfe: int | None, spare: int
) -> Grid:
    """The grid of explicit times."""
    if not times:
        raise ValueError("grid= is empty; expected at least 2 times")
    if (times[0], times[-1]) != tuple(interval):
        raise ValueError(
            f"the times given run from {times[0]!r} to {times[-1]!r}, the interval from {interval[0]!r} to "
            f"{interval[1]!r}; give interval= the same ends"
        )
    counts = [solver.evaluations] * (len(times) - 1)
    closing = solver.evaluations > 1 and times[-1] > path.window[1]
    if closing:
        counts[-1] = 1
    steps = Grid(tuple(times), tuple(counts), closing)
    if nfe not in (None, steps.nfe + spare):
        also = f" and the final step {spare}" if spare else ""
        raise ValueError(
            f"the budget is {nfe} estimates, but {solver!r} spends {steps.nfe} on the {steps.steps} steps given{also}; "
            "drop nfe= or grid="
        )
    return steps


def _spaced(solver: Solver, path: Path, interval: tuple[float, float], spacing: Spacing, nfe: int | None) -> Grid:
    """The grid on which a spacing lays out a budget."""
    start, end = interval
    edge = path.window[1]
    if nfe is None:
        raise ValueError(f"{type(solver).__name__} steps on a fixed grid: give nfe=… or explicit times as grid=…")
    beyond = start < edge < end
    if not (beyond and solver.evaluations > 1):
        counts = solver.schedule(nfe)
        times = share(spacing.times(path, start, end, nfe), counts)
        if not (beyond and times[-2] > edge):
            return Grid(tuple(times), tuple(counts))
    if nfe < 2:
        raise ValueError(
            f"nfe = {nfe}; expected at least 2 with {type(solver).__name__} on {path!r}: one estimate is for the "
            f"closing step from the window's edge t = {edge:g}"
        )
    counts = solver.schedule(nfe - 1)
    times = share(spacing.times(path, start, edge, nfe - 1), counts)
    return Grid((*times, end), (*counts, 1), closing=True)


def within(path: Path, t: float) -> None:
    """Raise ValueError unless the network may be asked at flow time t."""
    edge = path.window[1]
    if t > edge:
        raise ValueError(
            f"the network would be asked at t = {t:g}, beyond the times it knows, [0, {edge:g}] on {path!r}; only the "
            "last time of a grid on the way to the data may lie there"
        )


def share(times: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The ends of steps that cost `counts`, on a grid with a step for each evaluation: dear steps are long."""
    if len(times) != sum(counts) + 1:
        raise ValueError(f"the spacing gave {len(times)} times for {sum(counts)} steps; expected {sum(counts) + 1}")
    return [times[i] for i in accumulate(counts, initial=0)]


def whole(nfe: int | None) -> int | None:
    """A budget as given, if it is one."""
    if nfe is None:
        return None
    count = index(nfe) if hasattr(nfe, "__index__") and not isinstance(nfe, bool) else 0
    if count < 1:
        raise ValueError(f"nfe = {nfe!r}; expected an integer >= 1")
    return count


def estimates(nfe: int | None, flow: Flow) -> int | None:
    """The estimates that a budget of network evaluations buys."""
    nfe = whole(nfe)
    if nfe is None:
        return None
    if nfe % flow.nfe_per_call:
        raise ValueError(f"nfe = {nfe} is not a multiple of the {flow.nfe_per_call} evaluations an estimate costs here")
    return nfe // flow.nfe_per_call
