"""A flow carried over an interval of flow time: the plan of a solve, made once, for any number of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowsolve import attempts, charts, grids
from flowsolve._arguments import check_gradient, check_grid, check_solver, state
from flowsolve._batch import Context, choose, hosted, rows
from flowsolve._surroundings import plain
from flowsolve.capture import agrees, captured, hopeless, pays, prove, proven, refuse_foreign, require_cuda
from flowsolve.charts import Chart
from flowsolve.drivers import Ask, march, stepped
from flowsolve.estimating import Estimator
from flowsolve.flow import Flow, clocked
from flowsolve.grids import Closing, Final
from flowsolve.noise import Noise
from flowsolve.ode import trajectory
from flowsolve.paths import Path
from flowsolve.planning import allowance, given, laid, unit, varies, within
from flowsolve.pursuit import Arrivals, Finished, Metered, collect, pursue, resident
from flowsolve.snapshot import Callback, Snapshot
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, Status
from flowsolve.solvers.base import (
    Foreign,
    ForeignSDE,
    Query,
    SlopeSolver,
    Solver,
    State,
    Stepper,
    inverse,
    scaled,
)
from flowsolve.solvers.runge_kutta import RungeKutta
from flowsolve.streaming import Chunk

__all__ = ["Passage"]


def to_the_end(path: Path, end: float) -> Closing:
    """The step x' = α' ẑ + σ' ε̂ to flow time `end`."""
    point = path.at(end)
    return Closing(end, point.alpha, point.sigma)


class Passage:
    """A solve of a flow over an interval, in either direction; a `flowsolve.streaming.Job`.

    Adaptive solves, and adjoints on a fixed grid, run as the plain ODE that the flow is in a chart; other solves on a
    fixed grid in steps of flow time, because solvers of estimates know no chart.

    Where the path ends beyond the times its network knows, the solve ends at the edge of them, and one more estimate
    there closes the gap. The final policies end it earlier, and some of them with one more estimate too: all of it is
    `last`, where the solver stops, and `closing`, what is then made of the estimate there.

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
        noise: type[Noise] = Noise,
        gradient: str = "direct",
        capture: bool | str = False,
        final: str | Final = "path",
        t_eval: Sequence[float] | None = None,
        callback: Callback | None = None,
        resume: Snapshot | None = None,
    ) -> None:
        check_solver(solver)
        check_gradient(gradient, solver)
        self.flow, self.solver, self.seed, self.noise, self.gradient = flow, solver, seed, noise, gradient
        self.chart = None if chart is None else charts.resolve(chart)
        self.estimate: Any = Estimator(flow)
        path, (start, end) = flow.path, interval
        if isinstance(solver, Foreign | ForeignSDE) and varies(flow) and nfe is not None:
            raise ValueError(
                f"nfe = {nfe} with {solver!r}, whose loop does not say beforehand when it will ask, on a flow whose "
                "estimates cost more at some times than at others; drop nfe=, or use a solver of flowsolve's own"
            )
        if grid is not None and not solver.chooses_steps:
            grid = grids.resolve(grid)
        policy = Final.resolve(final)
        last, closing = policy.stop(path, interval, given(grid, path)), policy.closing(path, end)
        self.grid: Sequence[tuple[float, float, int]] = ()
        self.costs: Sequence[int] = ()
        if solver.chooses_steps:
            check_grid(grid, solver)
            if start <= path.window[1] < last:
                last, closing = path.window[1], to_the_end(path, last)
            for t in (start, last):
                within(path, t)
                if not isinstance(solver, ForeignSDE):
                    flow.require(t, "the interval")
            if isinstance(solver, ForeignSDE):
                solver.check(flow, self.chart, start, last)
            self.ruler = self._ruler(solver)
            self.budget = allowance(nfe, flow, self.ruler, last if closing is not None else None)
        else:
            self.budget = None
            steps, self.costs = laid(solver, flow, (start, last), grid, nfe, self.chart, int(closing is not None))
            self.grid = tuple(steps.intervals)
            if steps.closing:
                self.grid, last, closing = self.grid[:-1], steps.times[-2], to_the_end(path, last)
            elif closing is not None:
                within(path, last)
                flow.require(last, "the final step")
        self.start, self.last, self.closing = start, last, closing
        self.charted = isinstance(solver, SlopeSolver) and (solver.chooses_steps or gradient == "adjoint")
        self.capture, self.auto = self._captures(capture, bool(t_eval is not None or callback or resume))
        if (callback or resume) and (self.charted or solver.chooses_steps):
            raise TypeError(
                f"callback= and resume= go with a fixed grid, not with {solver!r} and gradient={gradient!r}; for an "
                "adaptive solver, solve in pieces: interval=(0, t), then start= the state"
            )
        self.callback, self.resume = callback, resume
        if resume is not None and (resume.plan != self.name or not 0 <= resume.step <= len(self.grid)):
            raise ValueError(
                f"the snapshot is of a solve by {resume.plan}; this one is by {self.name}. Resume with the same "
                "solver, nfe, grid, interval and final"
            )
        self.stops = [] if t_eval is None else self._stops(t_eval)
        if self.charted:
            self.ruler = self._ruler(solver)
            for t in (start, last):
                self.ruler.require(path, t)

    def _ruler(self, solver: Solver) -> Chart:
        """The chart that an ODE is solved in."""
        return self.chart or charts.CHARTS[solver.ruler if isinstance(solver, SlopeSolver) else "straight"]

    @property
    def calls(self) -> int:
        """What a solve on the grid costs, the final step with it: estimates where they all cost the same."""
        return sum(self.costs) // unit(self.flow)

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """States in the coordinates of the solve, and their conditioning."""
        x = state(chunk.x)
        cond = self.flow.conditioned(chunk.cond, len(x))
        context = Context({"cond": cond, "samples": chunk.samples}, len(x))
        return (scaled(inverse(self.ruler.scale(self.flow.path.at(self.start))), x) if self.charted else x), context

    def ode(self) -> tuple[float, float, Ask, int | Metered | None]:
        """The flow as an ODE in the chart: start, end, right-hand side and budget."""
        path, ruler = self.flow.path, self.ruler
        return ruler.clock(path, self.start), ruler.clock(path, self.last), self.estimate.slopes(ruler), self.budget

    def _captures(self, capture: bool | str, watched: bool) -> tuple[bool, bool]:
        """Whether the solve is to be recorded, and whether it may be where that pays.

        Raises:
            TypeError: it is to be recorded, and cannot be.
        """
        if capture not in (True, False, "auto"):
            raise ValueError(f"capture = {capture!r}; expected True, False or 'auto'")
        if not capture:
            return False, False
        try:
            refuse_foreign(self.solver, self.gradient)
            if watched:
                raise TypeError("capture=True goes with neither t_eval=, callback= nor resume=; drop one of them")
            if self.solver.chooses_steps and varies(self.flow):
                raise TypeError(
                    "capture=True with an adaptive solver needs estimates that cost the same at all times, and those "
                    f"of {self.flow!r} do not; give a solver on a fixed grid"
                )
        except TypeError:
            if capture is True:
                raise
            return False, False
        return capture is True, capture == "auto"

    def pursuer(self, arrivals: Arrivals, **options: Any) -> Iterator[Finished]:
        """The adaptive solve of samples that come and go, recorded or not."""
        start, end, ask, budget = self.ode()
        assert isinstance(self.solver, Adaptive)
        if not self.capture:
            return pursue(self.solver, arrivals, start, end, ask, budget=budget, **options)
        assert not isinstance(budget, Metered)
        return attempts.pursue(self.flow, self.key(), self.solver, arrivals, start, end, ask, budget=budget, **options)

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve of a whole batch."""
        if self.auto:
            self.capture = False
            if y.is_cuda and not torch.is_grad_enabled() and pays(self.flow, self.key(), y):
                return self._tried(y, context, progress)
        return self._run(y, context, progress)

    def _tried(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve, recorded if that can be done; a new recording must agree with the eager solve."""
        eager = None if proven(self.flow, self.key(), y) else self._run(y, context, progress)
        self.capture = True
        try:
            found = self._run(y, context, progress)
        except RuntimeError as error:
            self.capture = False
            hopeless(self.flow, self.key(), y, str(error))
            return self._run(y, context, progress) if eager is None else eager
        if eager is not None:
            ended = self.leave(found, context).x
            self.capture = False
            close = agrees(ended, self.leave(eager, context).x)
            self.capture = close
            if not close:
                hopeless(self.flow, self.key(), y, "a replay gave other states than the solve that it recorded")
                return eager
            prove(self.flow, self.key(), y)
        return found

    def _run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        if self.capture:
            require_cuda(y)
        path = self.flow.path
        mode = self.gradient if torch.is_grad_enabled() else "direct"
        if self.charted:
            if self.capture:
                parts = list(self.pursuer(resident(y, context), width=len(y), progress=progress, total=len(y)))
                return collect(parts, y, 0)[1]
            start, end, ask, budget = self.ode()
            clock = None
            if not self.solver.chooses_steps:
                clock = [(self.ruler.clock(path, a), self.ruler.clock(path, b), n) for a, b, n in self.grid]
            assert isinstance(self.solver, SlopeSolver)
            stops = [self.ruler.clock(path, t) for t in self.stops]
            states, solution = trajectory(
                y, start, stops if stops and stops[-1] == end else [*stops, end], ask, context, solver=self.solver,
                intervals=clock, budget=budget, mode=mode, functions=self.flow.nets, progress=progress,
                dense=bool(stops),
            )  # fmt: skip
            if not stops:
                return solution
            scales = [self.ruler.scale(path.at(t)) for t in self.stops]
            return self._seen(solution, [scaled(c, y) for c, y in zip(scales, states, strict=False)])
        noise = self.noise(self.seed, context.tree["samples"])
        if isinstance(self.solver, ForeignSDE):
            assert not isinstance(self.budget, Metered)
            x, nfe, status = self.solver.diffuse(
                lambda query: self.estimate(query, context.tree), path, y, self.start, self.last, self.budget, noise
            )
            zero = torch.zeros_like(nfe)
            return Solution(x, nfe, status, zero, zero, torch.full_like(nfe, self.last, dtype=torch.float64))
        if self.capture:
            return captured(self, y, context.tree["cond"], context.tree["samples"])
        begin, made, spent = State(y, noise), 0, 0
        if self.resume is not None:
            begin = replace(begin, past=self.resume.past, origin=self.resume.origin)
            made, spent = self.resume.step, self.resume.nfe // unit(self.flow)
        left = self.grid[made:]

        seen = {self.start: y}

        def show(i: int, state: State) -> None:
            if left[i][1] in self.stops:
                seen[left[i][1]] = state.x
            if self.callback is None:
                return
            nfe = spent * unit(self.flow) + sum(self.costs[made : made + i + 1])
            self.callback(
                Snapshot(
                    made + i + 1, len(self.grid), left[i][1], nfe, state.x, state.past, state.origin,
                    noise.seed, noise.samples, self.name,
                )
            )  # fmt: skip

        with clocked(self.flow, self.asked, y):
            _, solution = march(
                stepped(self.stepper(), left), begin, left, self.estimate, context.tree, segments=mode == "checkpoint",
                start=left[0][0] if left else self.last, observer=show if self.callback or self.stops else None,
                progress=progress,
            )  # fmt: skip
        if self.stops:
            solution = self._seen(solution, [seen[t] for t in self.stops])
        return replace(solution, nfe=solution.nfe + spent, accepted=solution.accepted + made)

    @cached_property
    def asked(self) -> list[float]:
        """The flow times at which a solve on the grid asks, as far as they are known beforehand."""
        if isinstance(self.solver, RungeKutta):
            path, ruler, solver = self.flow.path, self._ruler(self.solver), self.solver

            def stages() -> list[float]:
                clock = [(ruler.clock(path, a), ruler.clock(path, b), n) for a, b, n in self.grid]
                return [ruler.time(path, s) for s in solver.times(clock)]

            found: list[float] = path.remembered((solver, ruler, *self.grid), stages)
            return found
        ends = [b for _, b, n in self.grid if self.solver.asks_at_end(n)]
        return [*(a for a, _, _ in self.grid), *ends]

    def _stops(self, t_eval: Sequence[float]) -> list[float]:
        """Times to keep the state at, up to where the solver stops."""
        stops = [float(t) for t in t_eval]
        sign = 1.0 if self.last > self.start else -1.0
        line = [sign * t for t in stops]
        if (
            not stops
            or any(b <= a for a, b in pairwise(line))
            or line[0] < sign * self.start
            or line[-1] > sign * self.last
        ):
            raise ValueError(
                f"t_eval = {stops}; expected strictly monotone flow times from t = {self.start:g} to t = {self.last:g}"
                + ("" if self.closing is None else ", where the solver stops (what closes the solve is in sol.x)")
            )
        if isinstance(self.solver, ForeignSDE) or self.resume is not None:
            raise TypeError(f"t_eval= goes with neither resume= nor {self.solver!r}; drop it, or use callback=")
        if self.solver.chooses_steps:
            return stops
        nodes = [self.start, *(b for _, b, _ in self.grid)]
        nearest = [min(nodes, key=lambda node: abs(node - t)) for t in stops]
        for t, node in zip(stops, nearest, strict=True):
            if abs(t - node) > 1e-9:
                raise ValueError(
                    f"t_eval holds {t!r}, which is no node of the grid (the nearest is {node!r}); give nodes, or an "
                    "adaptive solver, which has a state at every time"
                )
        return nearest

    def _seen(self, solution: Solution, states: Sequence[Tensor]) -> Solution:
        """The solution with the states at the stops."""
        return replace(
            solution,
            t_eval=torch.tensor(self.stops, dtype=torch.float64, device="cpu"),
            trajectory=torch.stack(list(states)),
        )

    @property
    def name(self) -> str:
        """The solver and its grid in words: what a solve must share with one that it resumes."""
        digest = blake2b(repr((self.grid, self.closing, self.chart, self.noise.__name__)).encode(), digest_size=8)
        return (
            f"{self.solver!r} in {len(self.grid)} steps from t = {self.start!r} to {self.last!r} ({digest.hexdigest()})"
        )

    def stepper(self) -> Stepper:
        """The step function in flow time."""
        return self.solver.on(self.flow.path, self.chart, self.grid)

    def key(self) -> Any:
        """Equal for plans that make the same steps on the same flow as it is."""
        flow = self.flow
        made = flow.net, flow.path, flow.prediction, flow.clock, flow.dtype
        chart = None if self.chart is None else self.chart.settings
        return self.solver, self.grid, chart, self.noise, self.start, self.last, self.closing, made

    def leave(self, solution: Solution, context: Context) -> Solution:
        """The solution in flow time, at the end of the interval."""
        path = self.flow.path
        if self.charted:
            arrived, clock = self.ruler.clock(path, self.last), solution.t
            reached = torch.where(clock == arrived, self.last, hosted(self.ruler.time(path, clock)))
            solution = replace(solution, x=scaled(self.ruler.scale(path.at(reached)), solution.x), t=reached)
        if self.closing is not None and (self.charted or not self.capture):  # else it is in the recording
            solution = self._closed(solution, context, self.closing)
        return replace(solution, nfe=solution.nfe * unit(self.flow))

    def _closed(self, solution: Solution, context: Context, closing: Closing) -> Solution:
        """Take the samples that arrived where the solver stops to the end, with the estimate there."""
        end, data, noise = closing
        if not len(solution.x):
            return replace(solution, t=torch.full_like(solution.t, end))
        query = Query(solution.x, self.last)
        closed = self.estimate(query, context.tree).combine(data, noise)
        finite = ~plain(~torch.isfinite(rows(closed.detach())).all(1)).cpu()
        return replace(
            solution,
            x=choose(solution.ok, closed, solution.x),
            t=torch.where(solution.ok, end, solution.t),
            status=torch.where(solution.ok & ~finite, int(Status.NONFINITE), solution.status),
            nfe=solution.nfe + query.cost,
        )
