r"""The plan of a solve in a pipeline: N steps of a solver, and the times at which the pipeline will evaluate.

A pipeline counts steps: `num_inference_steps` = N makes N + 1 nodes, and a step of a solver of m evaluations goes from
one node to the next. Its stages are entries of `timesteps` like any other, in the order in which the solver asks, so
that the step that begins at node i begins at entry m·i. The last step of a solver with stages goes to the clean data,
where networks are not trained, by its first evaluation alone, x' = α' ẑ + σ' ε̂ (as diffusers' Heun does):

| | entries of `timesteps`, evaluations |
|---|---|
| m = 1 | N |
| m > 1 | (N − 1) m + 1, or N m where the steps end before the clean data |

The times of the queries depend on the grid alone, so they are found by running the steps once on a state of one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from flowsolve import charts, grids
from flowsolve.adapters.diffusers import nodes
from flowsolve.adapters.diffusers.peers import as_peer, in_sigma, lowered
from flowsolve.adapters.diffusers.reading import Reading, start_std
from flowsolve.charts import Chart
from flowsolve.grids import At, Closing, Final, Grid, Shifted, Timesteps
from flowsolve.noise import Noise
from flowsolve.passage import to_the_end
from flowsolve.paths import Point
from flowsolve.planning import span, within
from flowsolve.solvers import Auto, UniPC, auto
from flowsolve.solvers.base import Query, Solver, State, Stepper, run

__all__ = ["OWN", "Plan", "lay"]

OWN = "own"
"""In the place of a solver: the nodes of the class that wrote the configuration."""


@dataclass(frozen=True)
class Plan:
    """A solve, laid out; it is never changed, and threads share it.

    Attributes:
        reading: the training convention.
        solver: the solver.
        stepper: its step function.
        intervals: (t, t_next, evaluations) of the steps.
        closing: what is made of a last evaluation, where the steps end.
        times: the flow time of each evaluation.
        points: the path there.
        begins: the number of the first evaluation of each step, and of the closing one.
        steps: N, as pipelines count them.
        start: the standard deviation of the state that a pipeline starts from.
    """

    reading: Reading
    solver: Solver
    stepper: Stepper
    intervals: tuple[tuple[float, float, int], ...]
    closing: Closing | None
    times: tuple[float, ...]
    points: tuple[Point, ...]
    begins: tuple[int, ...]
    steps: int
    start: float = 1.0

    @property
    def nodes(self) -> list[float]:
        """The flow times of the nodes: what `fs.sample(…, grid=…)` steps on, less the closing evaluation."""
        return [*(t for t, _, _ in self.intervals), self.end]

    @property
    def end(self) -> float:
        """Where the steps end."""
        return self.intervals[-1][1] if self.intervals else self.times[0]

    def shown(self, at: int | None) -> float:
        """The factor of the state at an evaluation, or of the result (None), as pipelines are shown it."""
        if at is not None:
            return float(self.reading.shown(self.points[at]))
        if self.closing is None:
            return float(self.reading.shown(self.reading.path.at(self.end)))
        return 1.0 / self.closing.data if self.reading.stretched else 1.0


def lay(
    reading: Reading,
    solver: Any,
    grid: Any = None,
    chart: str | Chart | None = None,
    final: str | Final | None = None,
    *,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    by_name: bool = False,
    like: Any = None,
) -> Plan:
    """The plan of N steps, or of explicit time steps or noise levels.

    Args:
        reading: the training convention.
        solver: a solver on a fixed grid, or `Auto`.
        grid: a spacing, its name, explicit flow times or `grids.At`; None for the configuration's own nodes.
        chart: for Runge–Kutta solvers.
        final: a final policy; None for the configuration's own end.
        steps, timesteps, sigmas: one of the three.
        mu: of a dynamic shift.
        by_name: whether the solver was given by name: it is then as its class in diffusers has it (`peers`).
        like: another solver, whose nodes are taken; or `OWN`, those of the configuration's own class.

    Raises:
        ValueError: nodes that are not a grid, or where no estimate exists.
    """
    path = reading.path
    if steps is None:
        steps = len(timesteps if timesteps is not None else sigmas if sigmas is not None else ())
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps = {steps!r}; expected an integer >= 1")
    method, chosen = auto.resolve(solver, grid, path, steps)
    counted = sigmas is not None and (even(sigmas) or linear_quadratic(sigmas))
    if isinstance(solver, Auto) and (timesteps is not None or (sigmas is not None and not counted)):
        method, by_name = UniPC(2), True  # auto's orders are for its own nodes, whose steps grow evenly
    ruler = None if chart is None else charts.resolve(chart)
    spacing = None if chosen is None else grids.resolve(chosen)
    if spacing is None and by_name:
        method = lowered(method, reading.config, steps)
    laid = reading if like is OWN else as_peer(reading, like or method, by_name)
    closes = method.evaluations > 1  # whether the last step is left to a closing evaluation, where it may be
    if timesteps is not None:
        begins, end = nodes.from_timesteps(laid, timesteps)
    elif sigmas is not None and (spacing is None or not counted):
        begins, end = nodes.from_sigmas(laid, sigmas, mu)
    elif spacing is None:
        begins, end = nodes.own(laid, steps, mu)
    else:
        begins, end, outside = _spaced(reading, method, spacing, final, steps, mu)
        closes = closes or outside
    policy = Final.resolve(final or "path")
    closing: Closing | None = None
    if policy.evaluations:
        closing = policy.closing(path, 1.0 if end is None else end)
    elif end is None:
        closing = Closing(begins[-1], 1.0, 0.0)
    elif closes and (end > path.window[1] or (final is None and path.at(end).sigma == 0.0)):
        closing = to_the_end(path, end)
    elif policy.policy == "path" or path.at(end).sigma > 0.0:
        begins = [*begins, end]
    if ruler is None and by_name and spacing is None and in_sigma(method, laid) and path.at(begins[0]).alpha > 0.0:
        ruler = charts.resolve("noise")
    plan = _checked(reading, method, ruler, begins, closing, steps)
    return replace(plan, start=start_std(laid if spacing is None else reading, plan.times[0]))


def even(sigmas: Sequence[float]) -> bool:
    """Whether noise fractions are N even ones from 1 to 1/N: how flow pipelines say "N steps"."""
    n = len(sigmas)
    return all(abs(float(v) - (1.0 - i / n)) < 1e-6 for i, v in enumerate(sigmas))


def linear_quadratic(sigmas: Sequence[float]) -> bool:
    """Whether they are the levels of Mochi's pipeline, which takes none from its caller, so that they say "N steps".

    Half of the steps are even ones from 1 to 1 - c, c = 0.025 (given as c rises from 0 where levels are inverted); the
    levels of the others are quadratic in their number, from there to 0 with an equal slope.
    """
    n, values = len(sigmas), [float(v) for v in sigmas]
    half, c = n // 2, 0.025
    if half < 1:
        return False
    rest = n - half
    curve = (half - c * n) / (half * rest**2)
    slope = c / half - 2.0 * (half - c * n) / rest**2
    least = curve * half**2
    known = [1.0 - (i * c / half if i < half else curve * i**2 + slope * i + least) for i in range(n)]
    return all(abs(v - w) < 1e-6 for v, w in zip(values, known, strict=True))


def _spaced(
    reading: Reading, solver: Solver, spacing: Any, final: str | Final | None, steps: int, mu: float | None
) -> tuple[list[float], float | None, bool]:
    """The nodes of a spacing, shifted as the configuration says if it does not shift itself; or of explicit times.

    And whether they had to be laid out anew, so that the last begins where the network's window ends.
    """
    path = reading.path
    if isinstance(spacing, At | list):
        times = spacing.on(path) if isinstance(spacing, At) else spacing
        if len(times) != steps + 1:
            raise ValueError(f"grid= has {len(times)} times, and {steps} steps need {steps + 1}; give as many")
        return list(times[:-1]), times[-1], False
    if reading.straight and not isinstance(spacing, Shifted):
        shift = nodes.shift_of(reading.config, mu)
        spacing = spacing if shift == 1.0 else Shifted(spacing, shift)
    start, end = span(spacing, path, steps)
    policy, edge = Final.resolve(final or "path"), path.window[1]
    stop = policy.stop(path, (start, end), None)
    if policy.evaluations or (final is None and not reading.clean):
        return spacing.times(path, start, stop, steps - 1) if steps > 1 else [start], None, False
    placed = spacing.times(path, start, stop, steps)
    beyond = edge < stop and (solver.evaluations > 1 or placed[-2] > edge)
    if beyond and steps > 1 and not isinstance(spacing, Timesteps):  # whose entries are all within the window
        return spacing.times(path, start, edge, steps - 1), stop, True
    return placed[:-1], stop, False


def _checked(
    reading: Reading, solver: Solver, chart: Chart | None, begins: list[float], closing: Closing | None, steps: int
) -> Plan:
    """The plan on these nodes, after every check that can be made before the first evaluation."""
    flow, path = reading.flow, reading.path
    counts = solver.counts(len(begins) - 1)
    intervals: tuple[tuple[float, float, int], ...] = ()
    if len(begins) > 1:
        intervals = tuple(Grid(tuple(begins), tuple(counts)).intervals)
    elif closing is None:
        raise ValueError(f"{steps} step leaves nothing to do before the clean data; take more, or final='denoise'")
    asked = {t for t, _, _ in intervals} | {after for _, after, n in intervals if solver.asks_at_end(n)}
    for t in begins if intervals else ():
        if t in asked:
            within(path, t)
        solver.require(flow, chart, t, asks=t in asked)
    if closing is not None:
        within(path, begins[-1])
        flow.require(begins[-1], "the final step")
    laid = intervals or ((begins[0], 1.0, 1),)
    if closing is not None and solver.cooldown:  # it is the last step, and of order 1
        laid = (*laid, (begins[-1], 1.0, 1)) if intervals else laid
    stepper = solver.on(path, chart, laid)
    times = [t for interval in intervals for t in _asked(reading, stepper, *interval)]
    first = [*accumulate((n for _, _, n in intervals), initial=0)]
    if closing is not None:
        times.append(begins[-1])
    else:
        first.pop()
    points = tuple(path.at(t) for t in times)
    return Plan(reading, solver, stepper, intervals, closing, tuple(times), points, tuple(first), steps)


def _asked(reading: Reading, stepper: Stepper, t: float, t_next: float, evaluations: int) -> list[float]:
    """The times of a step's queries."""
    found: list[float] = []

    def ask(query: Query) -> Any:
        found.append(float(query.t))
        return reading.flow.read(query.x, torch.zeros_like(query.x), query.point or reading.path.at(found[-1]))

    run(
        stepper(State(torch.zeros(1, 1, dtype=torch.float64, device="cpu"), Noise.of(0, 1)), t, t_next, evaluations),
        ask,
    )
    return found
