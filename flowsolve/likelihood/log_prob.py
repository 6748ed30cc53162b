r"""log p(x) of a flow: what is asked for, and which of two methods answers.

| solver | method | evaluations |
|---|---|---|
| "auto", exponential steps, DDIM | the integral of $d\log p$ along the solver's states (`curve`) | a number, 16 to 64 |
| Runge–Kutta, and bridges | one ODE for state and log-determinant (`joint`) | as tolerance or grid have it |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowsolve import charts
from flowsolve._arguments import check_flow, check_solver, device_of, shape_of, state
from flowsolve._batch import Whose
from flowsolve._surroundings import bare
from flowsolve.charts import Chart
from flowsolve.conditioning import settled
from flowsolve.flow import Flow
from flowsolve.integrate import passed
from flowsolve.likelihood import prior as priors
from flowsolve.likelihood import trace as traces
from flowsolve.likelihood.along import Along, automatic
from flowsolve.likelihood.joint import Joint
from flowsolve.likelihood.prior import Prior
from flowsolve.likelihood.result import LogProb
from flowsolve.likelihood.trace import Trace
from flowsolve.noise import START, Noise
from flowsolve.solvers.base import EstimateSolver, SlopeSolver, Solver
from flowsolve.solvers.exponential import refuse_chart
from flowsolve.solvers.names import solver as named
from flowsolve.streaming import Chunk

__all__ = ["LogProb", "falling", "log_prob", "reading", "sample_log_prob"]


def log_prob(
    flow: Flow,
    x: Tensor,
    *,
    solver: Solver | str = "auto",
    trace: str | Trace = "hutchinson",
    probes: int | None = None,
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    prior: Prior = None,
    repeats: int | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    cond: Mapping[str, Any] | None = None,
    batch: int | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
    capture: bool = False,
) -> LogProb:
    """The log-density that a flow gives to x, in nats.

    Args:
        flow: the flow; autograd must see through its network, in reverse or in forward mode.
        x: the state at interval[0], shape (B, *S).
        solver: "auto", exponential multistep along a curve; another solver that draws no noise; or a Runge–Kutta
            solver, adaptive or on a fixed grid.
        trace: "hutchinson", "exact" (D products with the Jacobian an evaluation), "hutch++", "xtrace", or a `Trace`.
        probes: products with the Jacobian an evaluation; by default 1 for Hutchinson's estimator. Two or more tell the
            standard error.
        seed: key of the probes.
        samples: the global numbers of the samples, by default 0 … B−1.
        nfe: evaluations to spend, exactly, along a curve (48 by default) or on a fixed grid; the most a sample may
            spend with an adaptive solver.
        grid: spacing of a curve or a fixed grid; see `flowsolve.sample`.
        chart: of a Runge–Kutta solver, by default "straight".
        interval: flow times (from data, to noise), by default from the data end of the network's window to 0.
        prior: the density of the state at interval[1]: "normal" (the default) N(0, prior_std²), "marginal"
            (`flowsolve.likelihood.prior`), or a function (B, *S) → (B,).
        repeats: along a curve: how many of nfe are second looks; by default up to 3.
        tolerance: with an adaptive solver: the absolute tolerance of log p in nats, instead of its atol.
        verify: compare a product with the Jacobian with a difference of outputs, once, on one sample (5 or 9 passes of
            it beside nfe), and refuse a network of which autograd sees only a part.
        cond: the network's keyword arguments, tensors or what it takes as it is. A tensor whose first dimension is B
            has a row a sample, any other is shared by all; see `flowsolve.shared` and `flowsolve.per_sample`.
        batch: the most samples the network sees at a time, by default all; see `flowsolve.sample`.
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails.
        grad: record gradients; by default only if x requires them. True also serves parameters.
        gradient: "direct", or for Runge–Kutta solvers "checkpoint" (memory of O(√steps)); see `flowsolve.gradients`.
        capture: on CUDA, without gradients: record an evaluation and its products with the Jacobian (or an attempt of
            an adaptive solver) as a CUDA graph, and replay it from then on (`flowsolve.capture`).

    Returns:
        A `LogProb`.

    Raises:
        SolverError: a sample failed and throw is True.
        ValueError: bad times, grid, chart, trace or budget, or an estimate that does not exist on the interval.
        TypeError: a solver that draws noise, or options that do not go with it.

    Examples:
        >>> mixture = fs.problems.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], std=0.3, dtype=torch.float64)
        >>> x = mixture.sample(3, seed=0)
        >>> out = fs.log_prob(mixture.flow(fs.paths.CondOT()), x, nfe=64, trace="exact")
        >>> torch.allclose(out.log_prob, mixture.log_prob(x), atol=1e-3)
        True
        >>> solver = fs.solvers.Dopri5(1e-8, 1e-8)
        >>> out = fs.log_prob(mixture.flow(fs.paths.CondOT()), x, solver=solver, trace="exact")
        >>> torch.allclose(out.log_prob, mixture.log_prob(x), atol=1e-6)
        True
    """
    check_flow(flow, cond)
    x = _differentiable(state(x))
    ends = falling(flow, interval)
    graph = _recorded(x, grad)
    job = reading(
        flow, ends, solver=solver, trace=trace, probes=probes, seed=seed, nfe=nfe, grid=grid, chart=chart,
        prior=prior, repeats=repeats, tolerance=tolerance, verify=verify, gradient=gradient, graph=graph,
        capture=capture,
    )  # fmt: skip
    noise = Noise.for_batch(seed, len(x), samples)
    return _found(job, Chunk(x, _given(cond, len(noise.samples)), noise.samples), batch, progress, throw, graph)


def falling(flow: Flow, interval: tuple[float, float] | None) -> tuple[float, float]:
    """An interval from data to noise, by default the whole.

    Raises:
        ValueError: times that do not fall, or lie outside the network's window.
    """
    last = flow.path.window[1]
    start, end = interval or (last, 0.0)
    if not 0.0 <= end < start <= last:
        raise ValueError(
            f"interval = {(start, end)!r}; expected times that fall from data to noise, within the network's window "
            f"[0, {last:g}]"
        )
    return start, end


def sample_log_prob(
    flow: Flow,
    shape: Sequence[int] | None = None,
    *,
    start: Tensor | None = None,
    solver: Solver | str = "auto",
    trace: str | Trace = "hutchinson",
    probes: int | None = None,
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    prior: Prior = None,
    repeats: int | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
    capture: bool = False,
) -> LogProb:
    """Samples with the log-density that the flow gives to them, in one pass.

    Args:
        shape: shape (B, *S) of the noise to start from, that of `flowsolve.sample` for the same seed; or give `start`.
        start: the state at interval[0].
        interval: flow times (from noise, to data), by default 0 and the data end of the network's window.
        device, dtype: of fresh noise.

    The other arguments, the result (its x are the samples) and the errors are those of `log_prob`.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> made = fs.sample_log_prob(flow, (4, 1), solver=fs.solvers.Dopri5(1e-6, 1e-6), trace="exact")
        >>> again = fs.log_prob(flow, made.x, solver=fs.solvers.Dopri5(1e-6, 1e-6), trace="exact")
        >>> torch.allclose(made.log_prob, again.log_prob, atol=1e-3)
        True
    """
    check_flow(flow, cond)
    if (shape is None) == (start is None):
        raise ValueError("give one of shape=(B, *S), to start from noise, and start=x, to start from a state")
    begin, end = interval or (0.0, flow.path.window[1])
    if not 0.0 <= begin < end <= flow.path.window[1]:
        raise ValueError(
            f"interval = {(begin, end)!r}; expected times that rise from noise to data, within the network's window "
            f"[0, {flow.path.window[1]:g}]"
        )
    if start is None:
        blank = state(torch.empty(shape_of(shape), device=device or device_of(flow.net), dtype=dtype))
        noise = Noise.for_batch(seed, len(blank), samples)
        x = noise.normal(START, 0, blank) * flow.path.prior_std
    else:
        x = _differentiable(state(start))
        noise = Noise.for_batch(seed, len(x), samples)
    graph = _recorded(x, grad)
    job = reading(
        flow, (begin, end), solver=solver, trace=trace, probes=probes, seed=seed, nfe=nfe, grid=grid, chart=chart,
        prior=prior, repeats=repeats, tolerance=tolerance, verify=verify, gradient=gradient, graph=graph,
        capture=capture,
    )  # fmt: skip
    return _found(job, Chunk(x, _given(cond, len(noise.samples)), noise.samples), batch, progress, throw, graph)


def reading(
    flow: Flow,
    interval: tuple[float, float],
    *,
    solver: Solver | str = "auto",
    trace: str | Trace = "hutchinson",
    probes: int | None = None,
    seed: int = 0,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    prior: Prior = None,
    repeats: int | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    gradient: str = "direct",
    graph: bool = False,
    capture: bool = False,
) -> Along | Joint:
    """The job that answers, planned once for any number of batches. The arguments are those of `log_prob`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("log_prob differentiates the network, which inference_mode forbids; use no_grad instead")
    for caveat in flow.caveats:
        warnings.warn(caveat, UserWarning, stacklevel=3)
    method: Any = solver
    if isinstance(solver, str):
        method = automatic(nfe) if solver == "auto" else named(solver)
    check_solver(method)
    estimator = traces.resolve(trace, probes, verify)
    known = priors.resolve(prior, min(interval))
    if isinstance(method, SlopeSolver):
        if repeats is not None:
            raise TypeError(f"repeats={repeats!r} is for a likelihood along a curve, not for {method!r}; drop it")
        return Joint(
            flow, interval, solver=method, trace=estimator, prior=known, seed=seed, nfe=nfe, grid=grid, chart=chart,
            tolerance=tolerance, gradient=gradient, graph=graph, capture=capture,
        )  # fmt: skip
    if not isinstance(method, EstimateSolver) or method.random:
        raise TypeError(
            f"solver is {method!r}; a likelihood is of the ODE: give a Runge–Kutta solver, or one of estimates that "
            "draws no noise"
        )
    refuse_chart(method, None if chart is None else charts.resolve(chart))
    if tolerance is not None:
        raise TypeError(f"tolerance={tolerance!r} goes with an adaptive Runge–Kutta solver, not with {method!r}")
    if gradient != "direct":
        raise TypeError(f"gradient={gradient!r} needs a Runge–Kutta solver; a curve has gradient='direct' only")
    return Along(
        flow, interval, solver=method, trace=estimator, prior=known, seed=seed, nfe=nfe, grid=grid, repeats=repeats,
        graph=graph, capture=capture,
    )  # fmt: skip


def _differentiable(x: Tensor) -> Tensor:
    """States that autograd takes, which are no inference tensors; with numbers, which have a density."""
    if x.ndim > 1 and not math.prod(x.shape[1:]):
        raise ValueError(f"samples of shape {tuple(x.shape[1:])} have no numbers, and no density")
    return x.clone() if x.is_inference() else x


def _given(cond: Mapping[str, Any] | None, count: int) -> dict[str, Any]:
    """The conditioning as autograd takes it too."""
    marked: dict[str, Any] = tree_map(
        lambda v: (
            Whose(v.value.clone(), v.own)
            if isinstance(v, Whose) and isinstance(v.value, Tensor) and v.value.is_inference()
            else v
        ),
        settled(cond, count),
    )
    return marked


def _recorded(x: Tensor, grad: bool | None) -> bool:
    """Whether to keep derivatives: if asked to, or, by default, if x requires them or what surrounds us may ask."""
    if not bare():
        return grad is None or grad
    return torch.is_grad_enabled() and (x.requires_grad if grad is None else grad)


def _found(job: Along | Joint, chunk: Chunk, batch: int | None, progress: bool, throw: bool, graph: bool) -> LogProb:
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        found: LogProb = passed(job, chunk, batch, progress)
    if throw:
        found.solution.raise_on_failure()
    return found
