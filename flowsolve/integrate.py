r"""`sample` and `encode`: a flow, a solver, and the direct driver between them.

Arguments are checked before the first evaluation: the grid is laid out (`flowsolve.planning`), and every node where
the network will be asked must have an estimate. Then a driver of `flowsolve.drivers` takes over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowsolve import charts
from flowsolve._arguments import (
    check_flow,
    check_gradient,
    check_grid,
    check_interval,
    check_solver,
    device_of,
    shape_of,
    state,
)  # fmt: skip
from flowsolve._batch import Context, choose, rows
from flowsolve.charts import Chart
from flowsolve.drivers import Ask, march
from flowsolve.flow import Flow
from flowsolve.noise import START, Noise
from flowsolve.ode import trajectory
from flowsolve.paths import Path
from flowsolve.planning import estimates, plan, within
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Status
from flowsolve.solvers.base import Query, SlopeSolver, Solver, State, inverse, scaled, slope_in

__all__ = ["encode", "estimator", "integrate", "sample"]


def sample(
    flow: Flow,
    shape: Sequence[int] | None = None,
    *,
    solver: Solver,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    start: Tensor | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
) -> Solution:
    """Sample a flow: carry noise at interval[0] to the state at interval[1].

    Args:
        flow: the flow.
        shape: shape (B, *S) of the noise to start from; or give `start`.
        solver: a solver of `flowsolve.solvers`.
        nfe: evaluations to spend, exactly, on a fixed grid; the most a sample may spend with an adaptive solver.
        grid: for fixed-grid solvers: "uniform" (the default), "log_snr", "karras", a spacing, or explicit flow times.
        chart: for Runge–Kutta solvers: "straight" (the default), "data", "noise", "trig" or "native".
        start: the state at interval[0], as the path scales it, instead of fresh noise.
        interval: flow times (from, to).
        seed: key of all noise, initial and in the steps.
        samples: the global numbers of the samples, by default 0 … B−1: sample n is the same in any batch.
        cond: passed to the network; tensors whose first dimension is B are taken per sample.
        device: where to start from noise; by default where the network is.
        dtype: dtype of the state to start from, by default float32; half precisions are raised to it.
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails; otherwise its status says so.
        grad: record gradients; by default only if `start` requires them.
        gradient: how: "direct", "checkpoint" (memory of O(√steps)) or "adjoint"; see `flowsolve.gradients`.

    Returns:
        A `Solution`; its x has the state's dtype, float32 at least.

    Raises:
        SolverError: a sample failed and throw is True. The error carries the whole solution.
        ValueError: bad times, grid, chart or budget, or an estimate that does not exist at a node.
        TypeError: bad solver or options.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> sol = fs.sample(flow, shape=(4, 1), solver=fs.solvers.Heun(), nfe=20, seed=0)
        >>> sol.x.shape, sol.nfe
        (torch.Size([4, 1]), tensor([20, 20, 20, 20]))
        >>> again = fs.sample(flow, shape=(1, 1), solver=fs.solvers.Heun(), nfe=20, seed=0, samples=[2])
        >>> torch.allclose(again.x[0], sol.x[2])  # a sample is the same in any batch
        True
    """
    if (shape is None) == (start is None):
        raise ValueError("give either shape=(B, *S), to start from noise, or start=x, to start from a state")
    check_flow(flow, cond)
    check_interval(interval)
    if start is None:
        if interval[0] != 0.0:
            raise ValueError(
                f"the interval starts at t = {interval[0]:g}, where the state holds signal as well as noise; give "
                f"start= a state at that time, for example path.interpolate(data, noise, {interval[0]:g})"
            )
        dtype = torch.float32 if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype = {dtype}; expected a floating-point dtype")
        blank = state(torch.empty(shape_of(shape), device=device or device_of(flow.net), dtype=dtype))
        noise = Noise.for_batch(seed, blank.shape[0], samples)
        start = noise.normal(START, 0, blank) * flow.path.prior_std
    else:
        if device is not None or dtype is not None:
            raise TypeError(
                "device= and dtype= place fresh noise; a start given has its own (move it with start.to(…))"
            )
        noise = Noise.for_batch(seed, state(start).shape[0], samples)
    return integrate(
        flow, start, interval, solver=solver, nfe=nfe, grid=grid, chart=chart, noise=noise, cond=cond,
        progress=progress, throw=throw, grad=grad, gradient=gradient,
    )  # fmt: skip


def encode(
    flow: Flow,
    x: Tensor,
    *,
    solver: Solver,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
) -> Solution:
    """Carry data back to noise along the probability-flow ODE: the reverse of `sample` over the same interval.

    Args:
        flow: the flow.
        x: the state at interval[0], shape (B, *S).
        interval: flow times (from, to), by default from the data end of the network's window to 0. (On a discrete
            table that is entry 0, not the clean end; sample over (0, window end) to return to the same x.)

    The other arguments, the result and the errors are those of `sample`; a solver that draws noise is refused.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> x, solver = torch.tensor([[0.9], [-1.1]], dtype=torch.float64), fs.solvers.Dopri5(1e-9, 1e-9)
        >>> noise = fs.encode(flow, x, solver=solver).x
        >>> torch.allclose(fs.sample(flow, start=noise, solver=solver).x, x, atol=1e-7)
        True
    """
    check_flow(flow, cond)
    interval = interval or (flow.path.window[1], 0.0)
    check_interval(interval)
    return integrate(
        flow, x, interval, solver=solver, nfe=nfe, grid=grid, chart=chart, cond=cond, progress=progress,
        throw=throw, grad=grad, gradient=gradient,
    )  # fmt: skip


def integrate(
    flow: Flow,
    x: Tensor,
    interval: tuple[float, float],
    *,
    solver: Solver,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    noise: Noise | None = None,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
) -> Solution:
    """Solve a flow over an interval of flow time in either direction; `sample` and `encode` without their defaults."""
    ruler = None if chart is None else charts.resolve(chart)
    check_solver(solver)
    check_gradient(gradient, solver)
    x = state(x)
    budget = estimates(nfe, flow)
    context = Context(dict(cond or {}), x.shape[0])
    answer = estimator(flow)
    path, (start, end) = flow.path, interval
    with _gradients(x, grad):
        mode = gradient if torch.is_grad_enabled() else "direct"
        if solver.chooses_steps:
            check_grid(grid, solver)
            closing = start <= path.window[1] < end
            last = path.window[1] if closing else end
            left = None if budget is None else budget - closing
            for t in (start, last):
                within(path, t)
                flow.require(t, "the interval")
            solution = _charted(flow, x, [start, last], solver, ruler, context, mode, left, None, progress)
        else:
            steps = plan(solver, flow, interval, grid, budget, ruler)
            closing, last = steps.closing, steps.times[-2]
            intervals = steps.intervals[:-1] if closing else steps.intervals
            if mode == "adjoint":
                times = steps.times[:-1] if closing else steps.times
                counts = [n for _, _, n in intervals]
                solution = _charted(flow, x, times, solver, ruler, context, mode, None, counts, progress)
            else:
                begin, segments = State(x, noise=noise), mode == "checkpoint"
                _, solution = march(
                    solver.on(path, ruler), begin, intervals, answer, context.tree, start=start, segments=segments,
                    progress=progress,
                )  # fmt: skip
        if closing:
            solution = _close(solution, path, last, end, answer, context)
    solution = replace(solution, nfe=solution.nfe * flow.nfe_per_call)
    return solution.raise_on_failure() if throw else solution


def estimator(flow: Flow) -> Ask:
    """The function that answers a query for the estimate at (x, t), by one call of the network."""

    def answer(query: Query, context: Any) -> Any:
        if query.point is None:
            return flow.estimate(query.x, query.t, **context)
        return flow.read(query.x, flow.call(query.x, query.t, **context), query.point)

    return answer


def _charted(
    flow: Flow,
    x: Tensor,
    times: Sequence[float],
    solver: Solver,
    chart: Chart | None,
    context: Context,
    mode: str,
    budget: int | None,
    counts: Sequence[int] | None,
    progress: bool,
) -> Solution:
    """A solve of a flow as the plain ODE it is in a chart: adaptive, or on the grid of times with those step costs."""
    assert isinstance(solver, SlopeSolver)
    path, ruler = flow.path, chart or charts.CHARTS["straight"]
    for t in (times[0], times[-1]):
        ruler.require(path, t)
    clock = [ruler.clock(path, t) for t in times]
    _, solution = trajectory(
        scaled(inverse(ruler.scale(path.at(times[0]))), x),
        clock[0],
        [clock[-1]],
        slope_in(ruler, path, estimator(flow)),
        context,
        solver=solver,
        intervals=None if counts is None else list(zip(clock, clock[1:], counts, strict=False)),
        budget=budget,
        mode=mode,
        functions=[flow.net],
        progress=progress,
    )
    reached = torch.where(solution.t == clock[-1], times[-1], torch.as_tensor(ruler.time(path, solution.t)))
    return replace(solution, x=scaled(ruler.scale(path.at(reached)), solution.x), t=reached)


def _close(solution: Solution, path: Path, edge: float, end: float, ask: Ask, context: Context) -> Solution:
    """Take the samples that arrived at the window's edge to the end, with the estimate at the edge."""
    there = path.at(end)
    closed = ask(Query(solution.x, edge), context.tree).combine(there.alpha, there.sigma)
    finite = torch.isfinite(rows(closed.detach())).all(1).cpu()
    return replace(
        solution,
        x=choose(solution.ok, closed, solution.x),
        t=torch.where(solution.ok, end, solution.t),
        status=torch.where(solution.ok & ~finite, int(Status.NONFINITE), solution.status),
        nfe=solution.nfe + 1,
    )


@contextmanager
def _gradients(x: Tensor, grad: bool | None) -> Iterator[None]:
    """Record gradients if asked to, or, by default, if the input requires them."""
    wanted = x.requires_grad if grad is None else grad
    with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
        yield
