"""A flow carried over an interval of flow time: the plan of a solve, made once, for any number of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowsolve import charts
from flowsolve._arguments import check_gradient, check_grid, check_solver, state
from flowsolve._batch import Context, choose, rows
from flowsolve.capture import captured, require_cuda
from flowsolve.charts import Chart
from flowsolve.drivers import Ask, march, stepped
from flowsolve.flow import Flow
from flowsolve.noise import Noise
from flowsolve.ode import trajectory
from flowsolve.planning import estimates, plan, within
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Status
from flowsolve.solvers.base import ForeignSDE, Query, SlopeSolver, Solver, State, Stepper, inverse, scaled, slope_in
from flowsolve.streaming import Chunk

__all__ = ["Passage", "estimator"]


def estimator(flow: Flow) -> Ask:
    """The function that answers a query for the estimate at (x, t), by one call of the network."""

    def answer(query: Query, context: Any) -> Any:
        if query.point is None:
            return flow.estimate(query.x, query.t, **context["cond"])
        return flow.read(query.x, flow.call(query.x, query.t, **context["cond"]), query.point)

    return answer


class Passage:
    """A solve of a flow over an interval, in either direction; a `flowsolve.streaming.Job`.

    Adaptive solves, and adjoints on a fixed grid, run as the plain ODE that the flow is in a chart; other solves on a
    fixed grid in steps of flow time, because solvers of estimates know no chart.

    Where the path ends beyond the times its network knows, the solve ends at the edge of them, and one more estimate
    there closes the gap.

    Args: those of `flowsolve.sample`.
    """

    def __init__(
        self,
        flow: Flow,
        interval: tuple[float, float],
        *,
        solver: Solver,
        nfe: int | None = None,
        grid: Any = None,
        chart: str | Chart | None = None,
        seed: int = 0,
        gradient: str = "direct",
        capture: bool = False,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        check_solver(solver)
        check_gradient(gradient, solver)
        self.flow, self.solver, self.seed, self.gradient = flow, solver, seed, gradient
        self.shared, self.capture = dict(shared or {}), capture
        self.chart = None if chart is None else charts.resolve(chart)
        self.estimate: Any = estimator(flow)
        path, (start, end) = flow.path, interval
        budget = estimates(nfe, flow)
        self.grid: Sequence[tuple[float, float, int]] = ()
        if solver.chooses_steps:
            check_grid(grid, solver)
            closing = start <= path.window[1] < end
            last = path.window[1] if closing else end
            for t in (start, last):
                within(path, t)
                if not isinstance(solver, ForeignSDE):
                    flow.require(t, "the interval")
            if isinstance(solver, ForeignSDE):
                solver.check(flow, self.chart, start, last)
            self.budget = None if budget is None else budget - closing
        else:
            steps = plan(solver, flow, interval, grid, budget, self.chart)
            closing, last = steps.closing, steps.times[-2] if steps.closing else end
            self.grid, self.budget = tuple(steps.intervals[:-1] if closing else steps.intervals), None
        self.start, self.last, self.end = start, last, end if closing else None
        self.charted = isinstance(solver, SlopeSolver) and (solver.chooses_steps or gradient == "adjoint")
        if capture and (solver.chooses_steps or gradient != "direct"):
            raise TypeError(
                f"capture=True records a solve on a fixed grid without gradients, not {solver!r} with "
                f"gradient={gradient!r}; give a solver with adaptive=False or without control of its steps, and nfe=…"
            )
        if self.charted:
            self.ruler = self.chart or charts.CHARTS["straight"]
            for t in (start, last):
                self.ruler.require(path, t)

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """States in the coordinates of the solve, and their conditioning."""
        x = state(chunk.x)
        context = Context({"cond": {**self.shared, **chunk.cond}, "samples": chunk.samples}, len(x))
        return (scaled(inverse(self.ruler.scale(self.flow.path.at(self.start))), x) if self.charted else x), context

    def ode(self) -> tuple[float, float, Ask, int | None]:
        """The flow as an ODE in the chart: start, end, right-hand side and budget."""
        path, ruler = self.flow.path, self.ruler
        ask = slope_in(ruler, path, self.estimate)
        return ruler.clock(path, self.start), ruler.clock(path, self.last), ask, self.budget

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve of a whole batch."""
        path = self.flow.path
        mode = self.gradient if torch.is_grad_enabled() else "direct"
        if self.charted:
            start, end, ask, budget = self.ode()
            clock = None
            if not self.solver.chooses_steps:
                clock = [(self.ruler.clock(path, a), self.ruler.clock(path, b), n) for a, b, n in self.grid]
            assert isinstance(self.solver, SlopeSolver)
            _, solution = trajectory(
                y, start, [end], ask, context, solver=self.solver, intervals=clock, budget=budget, mode=mode,
                functions=[self.flow.net], progress=progress,
            )  # fmt: skip
            return solution
        noise = Noise(self.seed, context.tree["samples"])
        if isinstance(self.solver, ForeignSDE):
            x, nfe, status = self.solver.diffuse(
                lambda query: self.estimate(query, context.tree), path, y, self.start, self.last, self.budget, noise
            )
            zero = torch.zeros_like(nfe)
            return Solution(x, nfe, status, zero, zero, torch.full_like(nfe, self.last, dtype=torch.float64))
        if self.capture:
            require_cuda(y)
            return captured(self, y, context.tree["cond"], context.tree["samples"])
        _, solution = march(
            stepped(self.stepper(), self.grid), State(y, noise), self.grid, self.estimate, context.tree,
            start=self.start, segments=mode == "checkpoint", progress=progress,
        )  # fmt: skip
        return solution

    def stepper(self) -> Stepper:
        """The step function in flow time."""
        return self.solver.on(self.flow.path, self.chart)

    def key(self) -> Any:
        """Equal for plans that make the same steps."""
        return self.solver, self.grid, self.chart, self.start, self.last, self.end

    def leave(self, solution: Solution, context: Context) -> Solution:
        """The solution in flow time, at the end of the interval."""
        path = self.flow.path
        if self.charted:
            arrived, clock = self.ruler.clock(path, self.last), solution.t
            reached = torch.where(clock == arrived, self.last, torch.as_tensor(self.ruler.time(path, clock)))
            solution = replace(solution, x=scaled(self.ruler.scale(path.at(reached)), solution.x), t=reached)
        if self.end is not None and not self.capture:
            solution = self._closed(solution, context, self.end)
        return replace(solution, nfe=solution.nfe * self.flow.nfe_per_call)

    def _closed(self, solution: Solution, context: Context, end: float) -> Solution:
        """Take the samples that arrived at the window's edge to the end, with the estimate at the edge."""
        if not len(solution.x):
            return replace(solution, t=torch.full_like(solution.t, end))
        there = self.flow.path.at(end)
        closed = self.estimate(Query(solution.x, self.last), context.tree).combine(there.alpha, there.sigma)
        finite = torch.isfinite(rows(closed.detach())).all(1).cpu()
        return replace(
            solution,
            x=choose(solution.ok, closed, solution.x),
            t=torch.where(solution.ok, end, solution.t),
            status=torch.where(solution.ok & ~finite, int(Status.NONFINITE), solution.status),
            nfe=solution.nfe + 1,
        )
