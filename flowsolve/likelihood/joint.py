r"""The likelihood by one ODE for state and log-determinant together, for every Runge–Kutta solver.

In a chart, $y = x/c$ obeys $dy/ds = f(y, s)$ and (Chen et al. 2018)

$$ \log p_y(y_1) = \log p_y(y_0) - \int_{s_0}^{s_1} \operatorname{tr}\frac{\partial f}{\partial y}\,ds,
   \qquad \log p_x = \log p_y - D\log c . $$

$f$ is a combination of ẑ and ε̂, hence $f = k_x x + k_o\,o(x)$ with two known numbers (`flowsolve.predictions`), and

$$ \operatorname{tr}\frac{\partial f}{\partial y}
   = c\,\Bigl(k_x D + k_o \operatorname{tr}\frac{\partial o}{\partial x}\Bigr): $$

the linear part is exact, and only the trace of the network's own Jacobian is estimated, in the same pass that gives its
value. In the step control state and log-determinant have norms of their own, so that D numbers of state do not drown
the one of the density, and the latter may have a tolerance of its own: it is carried as $\kappa\log\det$ with
$\kappa$ = atol/tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowsolve import attempts, charts
from flowsolve._arguments import check_gradient, check_grid, state
from flowsolve._batch import Context, hosted, per_sample, rows
from flowsolve.capture import Record, Recording, refuse_foreign, require_cuda
from flowsolve.charts import Chart
from flowsolve.drivers import Ask
from flowsolve.flow import Flow
from flowsolve.likelihood.prior import MARGINAL, Prior, marginal_log_prob, normal_log_prob
from flowsolve.likelihood.result import LogProb, one_shape
from flowsolve.likelihood.trace import Trace, estimated, of_noise
from flowsolve.likelihood.visible import verify
from flowsolve.noise import Noise
from flowsolve.ode import trajectory
from flowsolve.planning import allowance, laid, unit, varies
from flowsolve.pursuit import Arrivals, Finished, Metered, collect, pursue, resident
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive
from flowsolve.solvers.base import Query, SlopeSolver, Solver, charted, scaled
from flowsolve.streaming import Chunk

__all__ = ["Joint", "recorder"]


def recorder(flow: Flow, graph: bool, solver: Solver) -> Record:
    """What records a likelihood.

    Raises:
        TypeError: the likelihood is one that cannot be recorded.
    """
    refuse_foreign(solver)
    if graph:
        raise TypeError("capture=True records no derivatives; drop it, or grad=True")
    if type(flow).call is not Flow.call:
        raise TypeError(f"capture=True records the likelihood of a network's own flow, not of {flow!r}; drop it")
    return Recording


class Joint:
    """The log-density of states, or of the samples it makes, by a Runge–Kutta solver; a `flowsolve.streaming.Job`.

    Args:
        flow: the flow.
        interval: flow times from and to. From data to noise: the density of given states. From noise to data: states
            at the noise become samples.
        solver: adaptive or on a fixed grid.
        trace: the estimator.
        prior: what `flowsolve.likelihood.prior.resolve` gave.
        seed: key of the probes.
        nfe, grid, chart: as for `flowsolve.sample`.
        tolerance: absolute tolerance of log p in nats for an adaptive solver, instead of its atol.
        gradient: "direct" or "checkpoint".
        graph: keep derivatives.
        capture: record on CUDA: an attempt of an adaptive solve, or an evaluation of one on a grid.
    """

    def __init__(
        self,
        flow: Flow,
        interval: tuple[float, float],
        *,
        solver: SlopeSolver,
        trace: Trace,
        prior: Prior,
        seed: int = 0,
        nfe: int | None = None,
        grid: Any = None,
        chart: str | Chart | None = None,
        tolerance: float | None = None,
        gradient: str = "direct",
        graph: bool = False,
        capture: bool = False,
    ) -> None:
        if gradient == "adjoint":
            raise ValueError("log_prob has no adjoint: it would take third derivatives; use gradient='checkpoint'")
        check_gradient(gradient, solver)
        self.record = recorder(flow, graph, solver) if capture else None
        self.flow, (self.start, self.end) = flow, interval
        self.samples = self.start < self.end
        self.gradient, self.seed, self.prior = gradient, seed, prior
        self.mode, self.graph, self.trace = gradient if graph else "direct", graph, trace
        self.ruler = charts.CHARTS["straight"] if chart is None else charts.resolve(chart)
        path = flow.path
        for t in interval:
            self.ruler.require(path, t)
        self.counted = varies(flow)
        self.budget: int | Metered | None = None
        self.grid: list[tuple[float, float, int]] | None = None
        last = None
        if prior == MARGINAL:
            last = min(interval)
            flow.require(last, "the prior")
        if solver.chooses_steps:
            check_grid(grid, solver)
            for t in interval:
                flow.require(t, "the interval")
            self.budget = allowance(nfe, flow, self.ruler, last)
        else:
            steps, _ = laid(solver, flow, interval, grid, nfe, self.ruler, int(last is not None))
            clock = [self.ruler.clock(path, t) for t in steps.times]
            self.grid = list(zip(clock, clock[1:], steps.evaluations, strict=False))
        self.weight = 1.0
        if tolerance is not None:
            if not isinstance(solver, Adaptive) or not solver.adaptive or not solver.atol > 0.0:
                raise TypeError(f"tolerance={tolerance!r} goes with an adaptive solver with atol > 0, not {solver!r}")
            if not 0.0 < tolerance < math.inf:
                raise ValueError(f"tolerance = {tolerance!r}; expected nats > 0")
            self.weight = solver.atol / tolerance
        self.shape: tuple[int, ...] = ()  # of a sample, learnt from the first
        self.solver = self._controlled(solver)

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The joint state (B, D + count): y, and log-determinants that start at 0."""
        x = state(chunk.x)
        self.shape = one_shape(x, self.shape)
        verify(self.flow, self.trace, chunk, (self.start, self.end))
        probes = self.trace.draw(x.detach(), Noise(self.seed, chunk.samples))
        # What the solve sets out from is kept: the other end of a sample.
        cond = self.flow.conditioned(chunk.cond, len(x))
        tree = {"cond": cond, "probes": probes, "begin": x}
        first = rows(x) / self.ruler.scale(self.flow.path.at(self.start))
        return torch.cat((first, first.new_zeros(len(x), self.trace.count)), 1), Context(tree, len(x))

    def _controlled(self, solver: SlopeSolver) -> Solver:
        """The solver with norms of their own for the state and its log-determinants, whichever is larger."""
        if not isinstance(solver, Adaptive):
            return solver
        inner, probes = solver.norm, self.trace.count

        def norm(e: Tensor) -> Tensor:
            return torch.maximum(inner(e[:, :-probes].reshape(-1, *self.shape)), e[:, -probes:].abs().amax(1))

        return replace(solver, norm=norm)

    def ode(self) -> tuple[float, float, Ask, int | Metered | None]:
        """The joint ODE in the chart: start, end, right-hand side and budget."""
        path, ruler = self.flow.path, self.ruler
        return ruler.clock(path, self.start), ruler.clock(path, self.end), self.field, self.budget

    def pursuer(self, arrivals: Arrivals, **options: Any) -> Iterator[Finished]:
        """The adaptive solve of samples that come and go, recorded or not."""
        start, end, ask, budget = self.ode()
        assert isinstance(self.solver, Adaptive)
        if self.record is None:
            return pursue(self.solver, arrivals, start, end, ask, budget=budget, **options)
        flow, solver = self.flow, self.solver
        assert not isinstance(budget, Metered)
        key = self.trace, self.ruler.settings, self.weight, self.shape, flow.net, flow.path, flow.prediction, flow.clock
        return attempts.pursue(flow, key, solver, arrivals, start, end, ask, budget=budget, **options)

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve of a whole batch."""
        if self.record is not None:
            require_cuda(y)
            if self.solver.chooses_steps:
                parts = list(self.pursuer(resident(y, context), width=len(y), progress=progress, total=len(y)))
                return collect(parts, y, 0)[1]
        start, end, ask, budget = self.ode()
        assert isinstance(self.solver, SlopeSolver)
        _, solution = trajectory(
            y, start, [end], ask, context, solver=self.solver, intervals=self.grid, budget=budget, mode=self.mode,
            functions=self.flow.nets, progress=progress,
        )  # fmt: skip
        return solution

    def leave(self, solution: Solution, context: Context) -> LogProb:
        """log p from the log-determinants and the density of the latent."""
        path, ruler, size, tree = self.flow.path, self.ruler, math.prod(self.shape), context.tree
        logdets = solution.x[:, size:] / self.weight
        there = solution.x[:, :size].reshape(-1, *self.shape) * ruler.scale(path.at(self.end))
        latent, sample = (tree["begin"], there) if self.samples else (there, tree["begin"])
        nfe, noise_end = solution.nfe, min(self.start, self.end)
        base = self._base(latent, noise_end, tree)
        if self.prior == MARGINAL:
            nfe = nfe + (self.flow.cost(noise_end) if self.counted else 1)
        sign = -1.0 if self.samples else 1.0
        change = size * math.log(ruler.scale(path.at(noise_end)) / ruler.scale(path.at(max(self.start, self.end))))
        values = base + sign * logdets + change
        arrived = ruler.clock(path, self.end)
        reached = torch.where(solution.t == arrived, self.end, hosted(ruler.time(path, solution.t)))
        solution = replace(solution, x=there, t=reached, nfe=nfe * unit(self.flow))
        value = torch.where(solution.ok.to(values.device), values.mean(1), math.nan)
        unknown = torch.full_like(value.detach(), math.nan)
        stderr = self.trace.stderr(values.detach())
        return LogProb(value, stderr, unknown, solution.nfe, latent, sample, solution, self.trace.count)

    def _base(self, latent: Tensor, t: float, tree: Any) -> Tensor:
        """log p at the noise end, (B, 1) or (B, count)."""
        if callable(self.prior):
            return self.prior(latent).unsqueeze(1)
        if self.prior != MARGINAL:
            return normal_log_prob(latent, self.flow.path.prior_std).unsqueeze(1)
        point = self.flow.path.at(t)
        estimate, trace = estimated(self.flow, self.trace, latent, t, point, tree, self.graph, self.record)
        return marginal_log_prob(rows(estimate.noise), of_noise(estimate, trace), float(point.sigma))

    def field(self, query: Query, context: Any) -> Tensor:
        """dy/ds beside the divergence, once a probe, from one network call."""
        path, chart, size = self.flow.path, self.ruler, math.prod(self.shape)
        outer = charted(query.about(query.x[:, :1]), chart, path)
        point = outer.point
        assert point is not None
        if self.counted:
            query.cost = self.flow.cost(outer.t)
        c = chart.scale(point)
        x = scaled(c, query.x[:, :size].reshape(-1, *self.shape))
        record = None if self.solver.chooses_steps else self.record  # an attempt is recorded as a whole
        estimate, trace = estimated(self.flow, self.trace, x, outer.t, point, context, self.graph, record)
        row = chart.row(point, query.t)
        k_x, k_o = (per_sample(k, query.x) for k in estimate.coefficients(*row))
        divergence = per_sample(c, query.x) * self.weight * (k_x * size + k_o * trace)
        out = torch.cat((rows(estimate.combine(*row)), divergence), 1)
        return out if self.graph else out.detach()
