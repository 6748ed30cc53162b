r"""`sample` and `encode`: a flow, a solver, and the direct driver between them.

Arguments are checked before the first evaluation: the grid is laid out (`flowsolve.planning`), and every node where
the network will be asked must have an estimate. Then a driver of `flowsolve.drivers` takes over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowsolve._arguments import check_flow, check_interval, device_of, shape_of, state
from flowsolve._surroundings import eager, within
from flowsolve.brownian import named
from flowsolve.charts import Chart
from flowsolve.conditioning import settled
from flowsolve.flow import Flow
from flowsolve.grids import Final
from flowsolve.noise import START, Noise, Seed
from flowsolve.passage import Passage
from flowsolve.planning import at_least, span
from flowsolve.snapshot import Callback, Snapshot
from flowsolve.solution import Solution
from flowsolve.solvers import auto
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Solver
from flowsolve.streaming import Chunk, Job, stream

__all__ = ["encode", "integrate", "passed", "recording", "sample"]


def sample(
    flow: Flow,
    shape: Sequence[int] | None = None,
    *,
    solver: Solver | Auto | str = "auto",
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    start: Tensor | None = None,
    interval: tuple[float, float] | None = None,
    final: str | Final = "path",
    seed: Seed = 0,
    noise: str = "fresh",
    samples: Sequence[int] | Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
    capture: bool | str = False,
    t_eval: Sequence[float] | None = None,
    callback: Callback | None = None,
    resume: Snapshot | None = None,
) -> Solution:
    """Sample a flow: carry noise at interval[0] to the state at interval[1].

    Args:
        flow: the flow.
        shape: shape (B, *S) of the noise to start from; or give `start`.
        solver: a solver of `flowsolve.solvers`, or "auto" for a choice by path and budget (`flowsolve.solvers.Auto`),
            which brings its own grid.
        nfe: evaluations to spend, exactly, on a fixed grid; the most a sample may spend with an adaptive solver. Where
            an estimate costs more at some times than at others (guidance within an interval), a fixed grid takes as
            many estimates as that pays for.
        grid: for fixed-grid solvers: "uniform" (the default), "log_snr", "karras", or another spacing of
            `flowsolve.grids`, by name or itself; or explicit flow times, or values in another coordinate, `grids.At`.
        chart: for Runge–Kutta solvers: "straight" (the default), "data", "noise", "trig" or "native".
        start: the state at interval[0], as the path scales it, instead of fresh noise.
        interval: flow times (from, to); by default (0, 1), or what `grids.At` or `grids.Timesteps` says.
        final: what becomes of the last stretch: "path" (to the end of the interval), "sigma_min" (stop at
            σ/α = 0.002), "denoise" (and return ẑ there) or "tweedie" (α ẑ); or a `grids.Final`. Its evaluation
            is one of nfe.
        seed: key of all noise, initial and in the steps; or a list of them, one a sample: a sample is the same
            wherever its seed is.
        noise: what the steps draw: "fresh" noise for each interval, or the increments of a "brownian" path, which is
            the same for any number of steps (`flowsolve.brownian`).
        samples: the global numbers of the samples, by default 0 … B−1: sample n is the same in any batch. With a list
            of seeds, by default all 0.
        cond: the network's keyword arguments, tensors or what it takes as it is. A tensor whose first dimension is B
            has a row a sample, any other is shared by all; see `flowsolve.shared` and `flowsolve.per_sample`.
        device: where to start from noise; by default where the network is.
        dtype: dtype of the state to start from, by default float32; half precisions are raised to it.
        batch: the most samples the network sees at a time, by default all. With an adaptive solver a sample that
            finishes makes room for the next, so that batches stay full (`flowsolve.streaming`).
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails; otherwise its status says so.
        grad: record gradients; by default only if `start` requires them.
        gradient: how: "direct", "checkpoint" (memory of O(√steps)) or "adjoint"; see `flowsolve.gradients`.
        capture: on CUDA, without gradients: record the solve as a CUDA graph the first time, or each attempt of an
            adaptive one, and replay it from then on (`flowsolve.capture`). "auto" records where it can and only once
            the same solve was made four times, compares the first replay with the solve, and warns where they differ.
        t_eval: flow times at which to keep the state, as `trajectory`: nodes of a fixed grid, or any times with an
            adaptive solver.
        callback: on a fixed grid: is shown a `flowsolve.Snapshot` after every step.
        resume: a snapshot of a solve by the same solver and grid, to go on from instead of a start.

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
    if sum(v is not None for v in (shape, start, resume)) != 1:
        raise ValueError(
            "give one of shape=(B, *S), to start from noise, start=x, to start from a state, and resume=, to go on "
            "from a snapshot"
        )
    check_flow(flow, cond)
    kind = named(noise)
    method, grid = auto.resolve(solver, grid, flow.path, at_least(nfe, flow))
    whose = "the interval"
    if interval is None:
        steps = (at_least(nfe, flow) or 0) - Final.resolve(final).evaluations
        interval, whose = span(grid, flow.path, max(steps, 0)), f"the interval of grid={grid!r}"
    check_interval(interval)
    if resume is not None:
        start, drawn = resume.x, kind(resume.seed, resume.samples)
    elif start is None:
        if interval[0] != 0.0:
            raise ValueError(
                f"{whose} starts at t = {interval[0]:g}, where the state holds signal as well as noise; give "
                f"start= a state at that time, for example path.interpolate(data, noise, {interval[0]:g})"
            )
        dtype = torch.float32 if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype = {dtype}; expected a floating-point dtype")
        blank = state(torch.empty(shape_of(shape), device=device or device_of(flow.net), dtype=dtype))
        drawn = kind.for_batch(seed, blank.shape[0], samples)
        start = drawn.normal(START, 0, blank) * flow.path.prior_std
    else:
        if device is not None or dtype is not None:
            raise TypeError(
                "device= and dtype= place fresh noise; a start given has its own (move it with start.to(…))"
            )
        drawn = kind.for_batch(seed, state(start).shape[0], samples)
    return integrate(
        flow, start, interval, solver=method, nfe=nfe, grid=grid, chart=chart, final=final, noise=drawn, cond=cond,
        batch=batch, progress=progress, throw=throw, grad=grad, gradient=gradient, capture=capture, t_eval=t_eval,
        callback=callback, resume=resume,
    )  # fmt: skip


def encode(
    flow: Flow,
    x: Tensor,
    *,
    solver: Solver | Auto | str = "auto",
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    cond: Mapping[str, Any] | None = None,
    batch: int | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
    t_eval: Sequence[float] | None = None,
    callback: Callback | None = None,
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
    method, grid = auto.resolve(solver, grid, flow.path, at_least(nfe, flow))
    interval = interval or (flow.path.window[1], 0.0)
    check_interval(interval)
    return integrate(
        flow, x, interval, solver=method, nfe=nfe, grid=grid, chart=chart, cond=cond, batch=batch, progress=progress,
        throw=throw, grad=grad, gradient=gradient, t_eval=t_eval, callback=callback,
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
    final: str | Final = "path",
    noise: Noise | None = None,
    cond: Mapping[str, Any] | None = None,
    batch: int | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
    capture: bool | str = False,
    t_eval: Sequence[float] | None = None,
    callback: Callback | None = None,
    resume: Snapshot | None = None,
) -> Solution:
    """Solve a flow over an interval of flow time in either direction; `sample` and `encode` without their defaults."""
    x = state(x)
    noise = noise or Noise.for_batch(0, len(x))
    passage = Passage(
        flow,
        interval,
        solver=solver,
        nfe=nfe,
        grid=grid,
        chart=chart,
        seed=noise.seed,
        noise=type(noise),
        gradient=gradient,
        capture=capture,
        final=final,
        t_eval=t_eval,
        callback=callback,
        resume=resume,
    )
    if batch is not None and (callback or resume or t_eval is not None):
        raise ValueError(
            "t_eval=, callback= and resume= are of one batch; drop batch=, or sample batch by batch with samples="
        )
    chunk = Chunk(x, settled(cond, len(x)), noise.samples)
    with recording(x, grad):
        solution: Solution = passed(passage, chunk, batch, progress)
    return solution.raise_on_failure() if throw else solution


def passed(job: Job, chunk: Chunk, batch: int | None, progress: bool) -> Any:
    """The result of a job for one chunk, as one batch or with at most `batch` samples under way at a time."""
    if batch is None:
        y, context = job.enter(chunk)
        return job.leave(job.run(y, context, progress), context)
    return _streamed(job, chunk, batch, progress)


@eager
def _streamed(job: Job, chunk: Chunk, batch: int, progress: bool) -> Any:
    (result,) = stream(job, [chunk], batch, progress=progress, total=len(chunk.x))
    return result


@contextmanager
def recording(x: Tensor, grad: bool | None) -> Iterator[None]:
    """Record gradients if asked to, or, by default, if the input requires them or torch.func may ask for any."""
    wanted = (x.requires_grad or within() is not None) if grad is None else grad
    with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
        yield
