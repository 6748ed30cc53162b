r"""Planning: the steps of a fixed-grid solve, laid out and checked before anything is computed.

A budget of N evaluations is spent to the last one (`Solver.schedule`), and a step's share of the grid is its share of
the evaluations: the spacing lays out N steps, and a step that costs m of them spans m.

Where a path ends beyond the times its network knows (`Path.window`: a discrete table's clean end), a grid with nodes or
stages there goes to the window's edge instead, and one step x' = α' ẑ + σ' ε̂ with the estimate at the edge closes the
gap. A final policy (`grids.Final`) ends the grid earlier, and keeps back the estimate that it asks for.

A budget counts network evaluations. Where every estimate costs the same number of them, it buys a number of estimates.
Where the cost depends on time (`Flow.cost`: guidance within an interval of noise levels), what a grid costs is known
when it is laid out: its steps are made once, without a network, to see when they ask (`costs`), and of the grids that
the budget pays for, the one with the most estimates is taken (`afford`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flowsolve import grids
from flowsolve._batch import hosted
from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.grids import At, Grid, Spacing, Timesteps, share
from flowsolve.noise import Noise
from flowsolve.paths import Path
from flowsolve.pursuit import Metered
from flowsolve.solvers.base import EstimateSolver, Query, Solver, State, run

__all__ = [
    "afford",
    "allowance",
    "at_least",
    "costs",
    "estimates",
    "given",
    "laid",
    "plan",
    "share",
    "span",
    "unit",
    "varies",
    "whole",
    "within",
]

T = TypeVar("T")


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
    if solver.own_times and end < start:
        raise ValueError(f"{solver!r} has times of its own, on the way to the data, and no way back; use another")
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
    counts = solver.fill(path, times)
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
        steps = solver.plan(path, interval, spacing, nfe)
        if not (beyond and steps.times[-2] > edge):
            return steps
    if nfe < 2:
        raise ValueError(
            f"nfe = {nfe}; expected at least 2 with {type(solver).__name__} on {path!r}: one estimate is for the "
            f"closing step from the window's edge t = {edge:g}"
        )
    steps = solver.plan(path, (start, edge), spacing, nfe - 1)
    return Grid((*steps.times, end), (*steps.evaluations, 1), closing=True)


def within(path: Path, t: float) -> None:
    """Raise ValueError unless the network may be asked at flow time t."""
    edge = path.window[1]
    if t > edge:
        raise ValueError(
            f"the network would be asked at t = {t:g}, beyond the times it knows, [0, {edge:g}] on {path!r}; only the "
            "last time of a grid on the way to the data may lie there"
        )


def whole(nfe: int | None) -> int | None:
    """A budget as given, if it is one."""
    if nfe is None:
        return None
    count = index(nfe) if hasattr(nfe, "__index__") and not isinstance(nfe, bool) else 0
    if count < 1:
        raise ValueError(f"nfe = {nfe!r}; expected an integer >= 1")
    return count


def estimates(nfe: int | None, flow: Flow) -> int | None:
    """The estimates that a budget of network evaluations buys, each of which costs the same.

    Raises:
        ValueError: a budget that is no whole number of them, or a flow whose cost depends on time.
    """
    nfe = whole(nfe)
    if varies(flow):
        raise ValueError(
            f"the evaluations that an estimate costs depend on time here ({flow!r}), which this solve does not count; "
            "drop the interval of the guidance, or its scale's dependence on time"
        )
    if nfe is None:
        return None
    if nfe % flow.nfe_per_call:
        raise ValueError(f"nfe = {nfe} is not a multiple of the {flow.nfe_per_call} evaluations an estimate costs here")
    return nfe // flow.nfe_per_call


def varies(flow: Flow) -> bool:
    """Whether the evaluations that an estimate costs depend on time."""
    return flow.nfe_range[0] != flow.nfe_range[1]


def unit(flow: Flow) -> int:
    """Network evaluations for each that a driver counts: it counts estimates where all cost the same."""
    return 1 if varies(flow) else flow.nfe_per_call


def at_least(nfe: int | None, flow: Flow) -> int | None:
    """The estimates that a budget of network evaluations buys wherever they are."""
    if not varies(flow):
        return estimates(nfe, flow)
    nfe = whole(nfe)
    return None if nfe is None else nfe // flow.nfe_range[1]


def allowance(nfe: int | None, flow: Flow, ruler: Chart, last: float | None = None) -> int | Metered | None:
    """What a sample may spend in an adaptive solve in a chart, in estimates where they all cost the same.

    Args:
        nfe: the most network evaluations.
        flow: the flow.
        ruler: the chart.
        last: where an estimate is asked for after the steps, which is one of them.

    Raises:
        ValueError: nothing is left for the steps.
    """
    budget = whole(nfe)
    if budget is None:
        return None
    kept = 0 if last is None else flow.cost(last)
    if budget <= kept:
        count = "one" if kept == 1 else kept
        raise ValueError(
            f"nfe = {nfe}; expected at least {kept + max(1, flow.nfe_range[0])}: {count} of them for the final step"
        )
    if not varies(flow):
        return (estimates(nfe, flow) or 0) - (last is not None)

    def price(times: NDArray[np.float64]) -> NDArray[np.int64]:
        total: NDArray[np.int64] = flow.cost(hosted(ruler.time(flow.path, torch.from_numpy(times)))).sum(0)
        return total

    return Metered(budget - kept, price, flow.nfe_range[1])


def laid(
    solver: Solver,
    flow: Flow,
    interval: tuple[float, float],
    grid: Any,
    nfe: int | None,
    chart: Chart | None,
    spare: int = 0,
) -> tuple[Grid, list[int]]:
    """The grid that a budget of network evaluations pays for, and what each of its steps costs of them.

    What comes after the steps proper, `spare` estimates or the closing one, is the last of the costs.

    Raises:
        ValueError: as `plan`; a budget that explicit times contradict.
    """

    def lay(count: int | None) -> tuple[tuple[Grid, list[int]], int]:
        steps = plan(solver, flow, interval, grid, count, chart, spare)
        spent = costs(solver, flow, steps.intervals[: steps.steps - steps.closing], chart)
        if steps.closing or spare:
            spent.append(flow.cost(steps.times[-1 - steps.closing]))
        return (steps, spent), sum(spent)

    if not varies(flow):
        return lay(estimates(nfe, flow))[0]
    if nfe is not None and given(grid, flow.path) is None:
        return afford(nfe, flow, lay)
    made, cost = lay(None)
    if nfe not in (None, cost):
        raise ValueError(
            f"the budget is {nfe} evaluations, but {solver!r} spends {cost} on the times given; drop nfe= or grid="
        )
    return made


def costs(solver: Solver, flow: Flow, steps: Sequence[tuple[float, float, int]], chart: Chart | None) -> list[int]:
    """The network evaluations of each step (t, t_next, estimates) of a grid."""
    if not varies(flow):
        return [n * flow.nfe_per_call for _, _, n in steps]
    step, spent = solver.on(flow.path, chart, steps), []
    state = State(torch.zeros(1, 1, dtype=torch.float64, device="cpu"), Noise.for_batch(0, 1))
    total = 0

    def nothing(query: Query) -> Any:
        """An estimate of a network that returns 0."""
        nonlocal total
        total += flow.cost(query.t)
        return flow.read(query.x, torch.zeros_like(query.x), query.point or flow.path.at(query.t))

    tried = len(steps)
    if isinstance(solver, EstimateSolver):  # a step of one estimate asks where it starts
        tried = max((i + 1 for i, (_, _, n) in enumerate(steps) if n > 1), default=0)
    for interval in steps[:tried]:
        before = total
        state = run(step(state, *interval), nothing)
        spent.append(total - before)
    return spent + [flow.cost(t) for t, _, _ in steps[tried:]]


def afford(nfe: int | None, flow: Flow, lay: Callable[[int], tuple[T, int]]) -> T:
    """Of what can be laid out with so many estimates, the one with the most that a budget pays for.

    Args:
        nfe: the budget, in network evaluations, and the most estimates that are tried.
        flow: what says how much an estimate costs at least and at most.
        lay: from a number of estimates, what is laid out with them and its cost.

    Raises:
        ValueError: the budget pays for nothing, or nothing can be laid out.
    """
    least, most = flow.nfe_range
    budget = whole(nfe) or 0
    count, refused, dearest = budget // max(1, least), None, 0
    while count > 0:
        try:
            made, cost = lay(count)
        except ValueError as error:
            refused, count = refused or error, count - 1
            continue
        if cost <= budget:
            return made
        # With one estimate less the others move a little: at most two evaluations dear may be gone at once.
        dearest, count = cost, count - max(1, (cost - budget) // (2 * most))
    if refused is not None:
        raise refused
    raise ValueError(
        f"nfe = {nfe}; expected at least {dearest or most}: an estimate of {flow!r} costs {least} to {most} evaluations"
    )
