r"""log p(x) of a flow, by carrying a sample to the noise and adding up the divergence on the way.

In a chart, $y = x/c$ obeys $dy/ds = f(y, s)$ and (Chen et al. 2018)

$$ \log p_y(y_1) = \log p_y(y_0) - \int_{s_0}^{s_1} \operatorname{tr}\frac{\partial f}{\partial y}\,ds,
   \qquad \log p_x = \log p_y - D\log c . $$

$f$ is a combination of ẑ and ε̂, hence $f = k_x x + k_o\,o(x)$ with two known numbers (`flowsolve.predictions`), and

$$ \operatorname{tr}\frac{\partial f}{\partial y}
   = c\,\Bigl(k_x D + k_o \operatorname{tr}\frac{\partial o}{\partial x}\Bigr): $$

the linear part is exact, and only the trace of the network's own Jacobian is estimated, in the same pass that gives its
value. State and log-determinant are integrated together; each has its own norm in the step control, so that D numbers
of state do not drown the one of the density.

At the noise end the density is the prior's, $N(0, \text{prior\_std}^2)$, unless another is given. On a path whose noise
end keeps signal (VP, VE, EDM) that is the model one samples from, not the exact marginal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowsolve import charts
from flowsolve._arguments import check_flow, check_gradient, check_grid, check_solver, state
from flowsolve._batch import Context, per_sample, rows
from flowsolve.charts import Chart
from flowsolve.drivers import Ask
from flowsolve.flow import Flow
from flowsolve.integrate import passed
from flowsolve.likelihood import trace as traces
from flowsolve.noise import Noise
from flowsolve.ode import trajectory
from flowsolve.planning import estimates, plan
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive
from flowsolve.solvers.base import Query, SlopeSolver, Solver, charted, scaled
from flowsolve.streaming import Chunk

__all__ = ["LogProb", "Reading", "log_prob"]


@dataclass(frozen=True)
class LogProb:
    """Log-densities, one entry a sample.

    Attributes:
        log_prob: nats, shape (B,); NaN for a sample whose solve failed.
        stderr: standard error of log_prob from the trace probes, shape (B,): 0 with the exact trace, NaN with a single
            probe, which cannot tell.
        nfe: network evaluations of each sample, int64 of shape (B,).
        latent: the state at the noise end, shape (B, *S).
        solution: how the solve went.
    """

    log_prob: Tensor
    stderr: Tensor
    nfe: Tensor
    latent: Tensor
    solution: Solution


def log_prob(
    flow: Flow,
    x: Tensor,
    *,
    solver: Solver,
    trace: str = "hutchinson",
    probes: int = 1,
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    cond: Mapping[str, Any] | None = None,
    batch: int | None = None,
    progress: bool = False,
    throw: bool = True,
    grad: bool | None = None,
    gradient: str = "direct",
) -> LogProb:
    """The log-density that a flow gives to x, in nats.

    Args:
        flow: the flow; autograd must see through its network.
        x: the state at interval[0], shape (B, *S).
        solver: a Runge–Kutta solver, adaptive or on a fixed grid.
        trace: "hutchinson", or "exact" (D backward passes an evaluation).
        probes: Hutchinson probes a sample, in one pass; two or more give a standard error.
        seed: key of the probes.
        samples: the global numbers of the samples, by default 0 … B−1.
        nfe: evaluations to spend, exactly, on a fixed grid; the most a sample may spend with an adaptive solver.
        grid: spacing of a fixed grid; see `flowsolve.sample`.
        chart: the chart to integrate in, by default "straight".
        interval: flow times (from data, to noise), by default from the data end of the network's window to 0.
        prior: log-density (B, *S) → (B,) of the state at interval[1], by default that of N(0, prior_std²).
        cond: passed to the network; tensors whose first dimension is B are taken per sample.
        batch: the most samples the network sees at a time, by default all; see `flowsolve.sample`.
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails.
        grad: record gradients; by default only if x requires them. True also serves parameters.
        gradient: "direct" or "checkpoint" (memory of O(√steps)); see `flowsolve.gradients`.

    Returns:
        A `LogProb`.

    Raises:
        SolverError: a sample failed and throw is True.
        ValueError: bad times, grid, chart, trace or budget, or an estimate that does not exist on the interval.
        TypeError: a solver that is not a Runge–Kutta solver.

    Examples:
        >>> mixture = fs.problems.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], std=0.3, dtype=torch.float64)
        >>> x = mixture.sample(3, seed=0)
        >>> solver = fs.solvers.Dopri5(1e-8, 1e-8)
        >>> out = fs.log_prob(mixture.flow(fs.paths.CondOT()), x, solver=solver, trace="exact")
        >>> torch.allclose(out.log_prob, mixture.log_prob(x), atol=1e-6)
        True
    """
    check_flow(flow, cond)
    x = state(x)
    graph = torch.is_grad_enabled() and (x.requires_grad if grad is None else grad)
    reading = Reading(
        flow, interval, solver=solver, trace=trace, probes=probes, seed=seed, nfe=nfe, grid=grid, chart=chart,
        prior=prior, gradient=gradient, graph=graph,
    )  # fmt: skip
    noise = Noise.for_batch(seed, len(x), samples)
    with torch.set_grad_enabled(graph):
        found: LogProb = passed(reading, Chunk(x, dict(cond or {}), noise.samples), batch, progress)
    if throw:
        found.solution.raise_on_failure()
    return found


class Reading:
    """A likelihood, planned once for any number of batches; a `flowsolve.streaming.Job`.

    Args: those of `log_prob`; graph keeps derivatives.
    """

    def __init__(
        self,
        flow: Flow,
        interval: tuple[float, float] | None = None,
        *,
        solver: Solver,
        trace: str = "hutchinson",
        probes: int = 1,
        seed: int = 0,
        nfe: int | None = None,
        grid: Any = None,
        chart: str | Chart | None = None,
        prior: Callable[[Tensor], Tensor] | None = None,
        gradient: str = "direct",
        graph: bool = False,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        check_solver(solver)
        if not isinstance(solver, SlopeSolver):
            raise TypeError(f"solver is {solver!r}; log_prob needs a Runge–Kutta solver such as Dopri5() or RK4()")
        if gradient == "adjoint":
            raise ValueError("log_prob has no adjoint: it would take third derivatives; use gradient='checkpoint'")
        check_gradient(gradient, solver)
        path = flow.path
        start, end = interval or (path.window[1], 0.0)
        if not 0.0 <= end < start <= path.window[1]:
            raise ValueError(
                f"interval = {(start, end)!r}; expected times that fall from data to noise, within the network's "
                f"window [0, {path.window[1]:g}]"
            )
        if prior is None and end != 0.0:
            raise ValueError(f"the interval ends at t = {end:g}, where the density is not the prior's; give prior=…")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("log_prob differentiates the network, which inference_mode forbids; use no_grad instead")
        self.flow, self.start, self.end = flow, start, end
        self.gradient = gradient
        self.seed, self.prior, self.shared = seed, prior, dict(shared or {})
        self.mode, self.graph = gradient if graph else "direct", graph
        self.trace = traces.resolve(trace, probes)
        self.ruler = charts.CHARTS["straight"] if chart is None else charts.resolve(chart)
        for t in (start, end):
            self.ruler.require(path, t)
        self.budget, self.grid = estimates(nfe, flow), None
        if solver.chooses_steps:
            check_grid(grid, solver)
            for t in (start, end):
                flow.require(t, "the interval")
        else:
            steps = plan(solver, flow, (start, end), grid, self.budget, self.ruler)
            clock = [self.ruler.clock(path, t) for t in steps.times]
            self.grid = list(zip(clock, clock[1:], steps.evaluations, strict=False))
        self.shape: tuple[int, ...] = ()  # of a sample, learnt from the first
        self.solver = self._controlled(solver)

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The joint state (B, D + probes): y, and log-determinants that start at 0."""
        x = state(chunk.x)
        shape = tuple(x.shape[1:])
        if self.shape not in ((), shape):
            raise ValueError(f"samples of shape {shape} follow some of shape {self.shape}; expected one shape")
        self.shape = shape
        probes = self.trace.draw(x.detach(), Noise(self.seed, chunk.samples))
        context = Context({"cond": {**self.shared, **chunk.cond}, "probes": probes}, len(x))
        first = rows(x) / self.ruler.scale(self.flow.path.at(self.start))
        return torch.cat((first, first.new_zeros(len(x), self.trace.count)), 1), context

    def _controlled(self, solver: Solver) -> Solver:
        """The solver with norms of their own for the state and its log-determinants, whichever is larger."""
        if not isinstance(solver, Adaptive):
            return solver
        inner, probes = solver.norm, self.trace.count

        def norm(e: Tensor) -> Tensor:
            return torch.maximum(inner(e[:, :-probes].reshape(-1, *self.shape)), e[:, -probes:].abs().amax(1))

        return replace(solver, norm=norm)

    def ode(self) -> tuple[float, float, Ask, int | None]:
        """The joint ODE in the chart: start, end, right-hand side and budget."""
        path, ruler = self.flow.path, self.ruler
        return ruler.clock(path, self.start), ruler.clock(path, self.end), self.field, self.budget

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve of a whole batch."""
        start, end, ask, budget = self.ode()
        assert isinstance(self.solver, SlopeSolver)
        _, solution = trajectory(
            y, start, [end], ask, context, solver=self.solver, intervals=self.grid, budget=budget, mode=self.mode,
            functions=[self.flow.net], progress=progress,
        )  # fmt: skip
        return solution

    def leave(self, solution: Solution, context: Context) -> LogProb:
        """log p from the log-determinants and the density of the latent."""
        path, ruler, size = self.flow.path, self.ruler, math.prod(self.shape)
        logdets = solution.x[:, size:]
        latent = solution.x[:, :size].reshape(-1, *self.shape) * ruler.scale(path.at(self.end))
        base = normal_log_prob(latent, path.prior_std) if self.prior is None else self.prior(latent)
        change = size * math.log(ruler.scale(path.at(self.end)) / ruler.scale(path.at(self.start)))
        value = base + logdets.mean(1) + change
        arrived = ruler.clock(path, self.end)
        reached = torch.where(solution.t == arrived, self.end, torch.as_tensor(ruler.time(path, solution.t)))
        solution = replace(solution, x=latent, t=reached, nfe=solution.nfe * self.flow.nfe_per_call)
        value = torch.where(solution.ok.to(value.device), value, float("nan"))
        return LogProb(value, self.trace.stderr(logdets.detach()), solution.nfe, latent, solution)

    def field(self, query: Query, context: Any) -> Tensor:
        """dy/ds beside the divergence, once a probe, from one network call."""
        path, chart, size, graph = self.flow.path, self.ruler, math.prod(self.shape), self.graph
        outer = charted(query.about(query.x[:, :1]), chart, path)
        t, point = outer.t, outer.point
        assert point is not None
        c = chart.scale(point)
        with torch.enable_grad():
            x = scaled(c, query.x[:, :size].reshape(-1, *self.shape))
            x = x if graph else x.detach()
            x = x if x.requires_grad else x.requires_grad_()
            estimate = self.flow.read(x, self.flow.call(x, t, **context["cond"]), point)
            row = chart.row(point, query.t)
            k_x, k_o = (per_sample(k, query.x) for k in estimate.coefficients(*row))
            trace = self.trace(estimate.output, x, context["probes"], graph)
            divergence = per_sample(c, query.x) * (k_x * size + k_o * trace)
            out = torch.cat((rows(estimate.combine(*row)), divergence), 1)
        return out if graph else out.detach()


def normal_log_prob(x: Tensor, std: float) -> Tensor:
    """log N(x; 0, std² I), summed over all but the first dimension."""
    x = rows(x)
    return -0.5 * (x / std).square().sum(1) - x.shape[1] * (math.log(std) + 0.5 * math.log(2.0 * math.pi))
