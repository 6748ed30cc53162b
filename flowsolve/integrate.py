r"""`sample`, `encode` and `solve`: a flow or an ODE, a solver, and the direct driver between them.

Arguments are checked before the first evaluation: the grid is laid out (`flowsolve.planning`), and every node where
the network will be asked must have an estimate. Then a driver of `flowsolve.drivers` takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowsolve import charts, grids
from flowsolve._arguments import check_flow, check_grid, check_interval, check_solver, device_of, shape_of, state
from flowsolve._batch import choose, per_sample, rows, select
from flowsolve.charts import Chart
from flowsolve.drivers import Ask, march, pursue
from flowsolve.flow import Flow
from flowsolve.noise import START, Noise
from flowsolve.paths import Path
from flowsolve.planning import estimates, plan, share, whole, within
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, Status
from flowsolve.solvers.base import Query, Solver, State, in_chart, inverse, scaled
from flowsolve.solvers.runge_kutta import RungeKutta

__all__ = ["encode", "integrate", "sample", "solve"]


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
        progress=progress, throw=throw, grad=grad,
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
        throw=throw, grad=grad,
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
) -> Solution:
    """Solve a flow over an interval of flow time in either direction; `sample` and `encode` without their defaults."""
    ruler = None if chart is None else charts.resolve(chart)
    check_solver(solver)
    x = state(x)
    budget = estimates(nfe, flow)

    def answer(query: Query, index: Tensor | None) -> Any:
        return flow.estimate(query.x, query.t, **select(cond or {}, x.shape[0], index))

    path, (start, end) = flow.path, interval
    with _gradients(x, grad):
        if isinstance(solver, Adaptive) and solver.adaptive:
            check_grid(grid, solver)
            closing = start <= path.window[1] < end
            last = path.window[1] if closing else end
            ruler = ruler or charts.CHARTS["straight"]
            left = None if budget is None else budget - closing
            solution = _adaptive(flow, x, start, last, solver, ruler, left, answer, progress)
        else:
            steps = plan(solver, flow, interval, grid, budget, ruler)
            closing, last = steps.closing, steps.times[-2]
            intervals = steps.intervals[:-1] if closing else steps.intervals
            begin = State(x, noise=noise)
            _, solution = march(solver.on(path, ruler), begin, intervals, answer, start=start, progress=progress)
        if closing:
            solution = _close(solution, path, last, end, answer)
    solution = replace(solution, nfe=solution.nfe * flow.nfe_per_call)
    return solution.raise_on_failure() if throw else solution


def solve(
    f: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t0: float,
    t1: float,
    *,
    solver: Solver,
    nfe: int | None = None,
    t_eval: Sequence[float] | Tensor | None = None,
    batched: bool = True,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve any ODE dy/dt = f(t, y) from t0 to t1, in either direction.

    Args:
        f: the right-hand side. Its t is a tensor that broadcasts against y: 0-dimensional on a fixed grid, of shape
            (B, 1, …, 1) in an adaptive solve, where every sample has its own time.
        y0: initial state; (B, *S), or any shape with batched=False.
        t0, t1: the interval.
        solver: a Runge–Kutta solver.
        nfe: evaluations to spend on equal steps, or the most a sample may spend with an adaptive solver.
        t_eval: times at which to return the state, strictly monotone from t0 towards t1; they must be nodes of a fixed
            grid, and adaptive steps land on them.
        batched: the first axis of y0 numbers independent samples; False makes y0 one system with one step size and
            0-dimensional t.
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails.

    Returns:
        A `Solution`, with x of y0's shape, or (T, *y0.shape) with t_eval. Gradients flow if autograd records them.

    Raises:
        SolverError: a sample failed and throw is True.
        ValueError, TypeError: bad times, budget, solver, or shape of f's result.

    Examples:
        >>> y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> sol = fs.solve(lambda t, y: -2 * t * y, y0, 0.0, 1.0, solver=fs.solvers.Dopri5(1e-8, 1e-8))
        >>> torch.allclose(sol.x, y0 * torch.tensor(-1.0, dtype=torch.float64).exp(), atol=1e-7)
        True
    """
    check_solver(solver)
    if not isinstance(solver, RungeKutta):
        raise TypeError(f"{solver!r} works on flows only; a plain ODE needs a Runge–Kutta solver such as Dopri5()")
    t0, t1 = float(t0), float(t1)
    nfe = whole(nfe)
    stops = _stops(t0, t1, t_eval)
    single = y0.ndim == 0 or not batched
    y = state(y0.unsqueeze(0) if single else y0)

    def answer(query: Query, index: Tensor | None) -> Tensor:
        x, t = (query.x[0] if single else query.x), query.t
        if isinstance(t, Tensor):
            time = per_sample(t, query.x).reshape(()) if single else per_sample(t, query.x)
        else:
            time = torch.full((), t, dtype=x.dtype, device=x.device)
        slope = f(time, x)
        if not isinstance(slope, Tensor) or slope.shape != x.shape:
            got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
            raise ValueError(f"f(t, y) returned {got} for y of shape {tuple(x.shape)}; expected the same shape")
        return (slope.unsqueeze(0) if single else slope).to(query.x.dtype)

    if isinstance(solver, Adaptive) and solver.adaptive:
        kept, solution = pursue(solver, y, t0, stops, answer, budget=nfe, progress=progress)
    else:
        if nfe is None:
            raise ValueError(f"{type(solver).__name__} steps on a fixed grid: give nfe=…")
        counts = solver.schedule(nfe)
        times = share(grids.fractions(t0, t1, nfe), counts)
        intervals = list(zip(times, times[1:], counts, strict=False)) if t0 != t1 else []
        keep = _nodes(times, stops)
        kept, solution = march(solver.step, State(y), intervals, answer, start=t0, keep=keep, progress=progress)
    x = torch.stack([k[0] if single else k for k in kept])
    if t_eval is None:
        solution = replace(solution, x=x[-1])
    else:
        solution = replace(solution, x=x, t_eval=torch.tensor(stops, dtype=torch.float64))
    return solution.raise_on_failure() if throw else solution


def _adaptive(
    flow: Flow,
    x: Tensor,
    start: float,
    end: float,
    solver: Adaptive,
    chart: Chart,
    budget: int | None,
    ask: Ask,
    progress: bool,
) -> Solution:
    """An adaptive solve of a flow in a chart."""
    path = flow.path
    for t in (start, end):
        within(path, t)
        chart.require(path, t)
        flow.require(t, "the interval")
    s_end = chart.clock(path, end)
    _, solution = pursue(
        solver,
        scaled(inverse(chart.scale(path.at(start))), x),
        chart.clock(path, start),
        [s_end],
        ask,
        translate=lambda inner: in_chart(inner, chart, path),
        budget=budget,
        progress=progress,
    )
    reached = torch.where(solution.t == s_end, end, torch.as_tensor(chart.time(path, solution.t)))
    return replace(solution, x=scaled(chart.scale(path.at(reached)), solution.x), t=reached)


def _close(solution: Solution, path: Path, edge: float, end: float, ask: Ask) -> Solution:
    """Take the samples that arrived at the window's edge to the end, with the estimate at the edge."""
    there = path.at(end)
    closed = ask(Query(solution.x, edge), None).combine(there.alpha, there.sigma)
    finite = torch.isfinite(rows(closed.detach())).all(1).cpu()
    return replace(
        solution,
        x=choose(solution.ok, closed, solution.x),
        t=torch.where(solution.ok, end, solution.t),
        status=torch.where(solution.ok & ~finite, int(Status.NONFINITE), solution.status),
        nfe=solution.nfe + 1,
    )


def _stops(t0: float, t1: float, t_eval: Sequence[float] | Tensor | None) -> list[float]:
    if t_eval is None:
        return [t1]
    stops = [float(t) for t in t_eval]
    sign = 1.0 if t1 >= t0 else -1.0
    line = [sign * t for t in (t0, *stops, t1)]
    if not stops or any(b < a for a, b in pairwise(line)) or len(set(stops)) < len(stops):
        raise ValueError(f"t_eval = {stops}; expected strictly monotone times from t0 = {t0:g} towards t1 = {t1:g}")
    return stops


def _nodes(times: Sequence[float], stops: Sequence[float]) -> set[int]:
    """The positions of the stops in a grid of times."""
    span = abs(times[-1] - times[0])
    keep = set()
    for stop in stops:
        i = min(range(len(times)), key=lambda j: abs(times[j] - stop))
        if abs(times[i] - stop) > 1e-9 * span:
            raise ValueError(
                f"t_eval asks for t = {stop:g}, which is not a node of the {len(times) - 1} equal steps that nfe "
                "gives; choose nfe so that it is, or an adaptive solver"
            )
        keep.add(i)
    return keep


@contextmanager
def _gradients(x: Tensor, grad: bool | None) -> Iterator[None]:
    """Record gradients if asked to, or, by default, if the input requires them."""
    wanted = x.requires_grad if grad is None else grad
    with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
        yield
