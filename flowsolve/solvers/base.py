r"""A solver asks, a driver answers.

One step of a solver is a generator. It yields a `Query` (a state and a time), is sent the answer, and returns the
new state:

    def step(state, t, t_next, evaluations):
        answer = yield Query(state.x, t)
        ...
        return state.advance(x_next)

A step never calls a network, so the same text runs under any driver: the direct one of `flowsolve.integrate`, a
diffusers scheduler that is handed the model's outputs from outside, a batch that samples join and leave. Between
steps everything a solver remembers is in its state, a plain value that can be stored and restored.

Two families differ in what they ask for.

* **Slope solvers** (`flowsolve.solvers.runge_kutta`, `adaptive`) see only dy/ds and run on any ODE. On a flow they run
  in a chart: `in_chart` translates a query for dy/ds at (y, s) into one for the estimate at (x, t).
* **Estimate solvers** (`discrete`, `stochastic`) combine ẑ, ε̂ and fresh noise themselves and need no chart.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import per_sample, send
from flowsolve._surroundings import array
from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.grids import Grid, Spacing, share
from flowsolve.noise import Noise
from flowsolve.paths import Path, Point
from flowsolve.predictions import Estimate

__all__ = [
    "EstimateSolver", "Foreign", "ForeignSDE", "Nodes", "Past", "Query", "SlopeSolver", "Solver", "State", "Step",
    "charted", "in_chart", "run", "scaled",
]  # fmt: skip


class Nodes:
    """The times of all queries of a step, known when it begins.

    What depends on time alone is computed for all of them at once, and sent to a device as one tensor.

    Attributes:
        table: float64 of shape (n, B): an array, or, in a recorded solve, a tensor of the device.
    """

    __slots__ = ("_made", "table")

    def __init__(self, table: NDArray[np.float64] | Tensor) -> None:
        self.table = table
        self._made: dict[Any, Any] = {}

    @property
    def recorded(self) -> bool:
        """Whether the times are on the device, of which nothing is to be asked."""
        return isinstance(self.table, Tensor)

    @property
    def times(self) -> Tensor:
        """The table as a tensor, where it is."""
        return self.table if isinstance(self.table, Tensor) else torch.from_numpy(self.table)

    def once(self, key: Any, make: Callable[[Tensor], Any]) -> Any:
        """make(times), made on the first call with this key."""
        if key not in self._made:
            self._made[key] = make(self.times)
        return self._made[key]


class Query:
    """A question: what is the slope, or the estimate, at this state and time?

    Attributes:
        x: the state, shape (B, *S).
        time: the time, where it is not among the nodes.
        nodes: the step's times, of which this is row `row`, where they are known.
        row: see `nodes`.
        point: the path's point at t, where it is known.
        cost: what the answer cost, where answers differ in that: evaluations, as an int or int64 of shape (B,).
    """

    __slots__ = ("cost", "nodes", "point", "row", "time", "x")

    def __init__(
        self, x: Tensor, t: Any = None, nodes: Nodes | None = None, row: int = 0, point: Point | None = None
    ) -> None:
        self.x, self.time, self.nodes, self.row, self.point = x, t, nodes, row, point
        self.cost: Any = 1

    @property
    def t(self) -> Any:
        """The time: a float, or a float64 tensor of shape (B,), of the host but in a recorded solve."""
        return self.time if self.nodes is None else self.nodes.times[self.row]

    def about(self, x: Tensor) -> Query:
        """The same question about another state."""
        return Query(x, self.time, self.nodes, self.row, self.point)


class Past(NamedTuple):
    """What a multistep solver remembers of an evaluation.

    Attributes:
        t: flow time of the evaluation.
        value: what was made of the estimate there, shape (B, *S).
    """

    t: float
    value: Tensor


@dataclass(frozen=True)
class State:
    """What a fixed-grid solve carries from step to step.

    Attributes:
        x: the state, shape (B, *S).
        noise: the batch's noise, addressed by intervals; None for a solve that draws none.
        past: evaluations that later steps will use, the latest first.
        origin: the state from which the last step set out, for solvers that will take it again.
    """

    x: Tensor
    noise: Noise | None = None
    past: tuple[Past, ...] = ()
    origin: Tensor | None = None

    def advance(self, x: Tensor) -> State:
        """The state after a step that ends in x and leaves nothing to remember."""
        return State(x, self.noise)


Step = Generator[Query, Any, State]
Stepper = Callable[[State, float, float, int], Step]


class Solver:
    """A method for advancing a state. Solvers are frozen dataclasses: equal settings are equal solvers.

    What a driver may know of one is declared here: `order`, `evaluations`, `remembers`, `random`, `chooses_steps`,
    `cooldown`, how a budget becomes steps (`schedule`, `counts`), and where it asks (`asks_at_end`, `require`).
    """

    evaluations: ClassVar[int] = 1
    """Network evaluations of a full step."""
    remembers: ClassVar[bool] = False
    """Whether a step uses evaluations of earlier steps (`State.past`)."""
    cooldown: bool = False
    """Whether the last steps of a solve are of lower order, so that a final step counts as one of them."""

    @property
    def order(self) -> int:
        """The order that the method is named by, as an ODE solver; measured orders are in docs/solvers.md."""
        return 1

    @property
    def known_as(self) -> str:
        """The name of the method in fingerprints: as registered, else with its module."""
        from flowsolve.solvers.registry import name_of  # which knows this class

        return name_of(type(self))

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function (state, t, t_next, evaluations) of this solver on a path.

        Args:
            path: the path.
            chart: the chart to step in, if one was asked for.
            grid: (t, t_next, evaluations) of all steps of the solve, where they are known.
        """
        raise NotImplementedError

    def schedule(self, nfe: int) -> list[int]:
        """The evaluations of each step when exactly nfe are to be spent."""
        return [1] * nfe

    def counts(self, steps: int) -> list[int]:
        """The evaluations of each step when so many steps are to be made."""
        return [self.evaluations] * steps

    def plan(self, path: Path, interval: tuple[float, float], spacing: Spacing, budget: int) -> Grid:
        """The grid on which the solver spends a budget of estimates, to the last one.

        By default the spacing lays out a step for each estimate, and a step that costs m of them (`schedule`) spans m.

        Args:
            path: the path.
            interval: flow times from and to.
            spacing: what places times.
            budget: estimates.
        """
        counts = self.schedule(budget)
        return Grid(tuple(share(spacing.times(path, *interval, budget), counts)), tuple(counts))

    def fill(self, path: Path, times: Sequence[float]) -> list[int]:
        """The evaluations of each step between explicit flow times."""
        return [self.evaluations] * (len(times) - 1)

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a step of so many evaluations asks at the time it ends."""
        return False

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """Raise ValueError unless the solver can have a node of its grid at flow time t, and ask there if it asks."""
        if asks:
            flow.require(t)

    @property
    def own_times(self) -> tuple[float, ...] | None:
        """The only flow times that the solver steps on, from noise to data; None where it takes any."""
        return None

    @property
    def chooses_steps(self) -> bool:
        """Whether the solver finds its own steps, rather than being given a grid."""
        return False

    @property
    def random(self) -> bool:
        """Whether steps draw noise, so that they cannot be retraced."""
        return False


class SlopeSolver(Solver):
    """A solver that sees only dy/ds: it runs on any ODE, and on a flow in a chart."""

    ruler: ClassVar[str] = "straight"
    """The chart to run in where none is asked for."""


class Foreign(SlopeSolver):
    """A solver of another library, which runs a loop of its own; see `flowsolve.solvers.bridges`."""

    @property
    def chooses_steps(self) -> bool:
        """Grids are the other library's business."""
        return True

    def trajectory(
        self,
        field: Callable[[float, Tensor], Tensor],
        y: Tensor,
        start: float,
        stops: Sequence[float],
        budget: int | None,
        functions: Sequence[Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve dy/dt = field(t, y) from y at the start, for all samples as one system.

        Args:
            field: dy/dt of shape (B, *S) at a time.
            y: shape (B, *S).
            start: the time there.
            stops: times at which the state is wanted, strictly monotone from the start on.
            budget: the most evaluations to spend; None for no limit.
            functions: where to look for the parameters of the field.

        Returns:
            The states at the stops, (T, B, *S); and for each sample the evaluations it cost and its `Status`, int64 of
            shape (B,).
        """
        raise NotImplementedError


class ForeignSDE(Solver):
    """A solver of another library for a flow's SDE family, which runs a loop of its own from the noise to the data."""

    @property
    def chooses_steps(self) -> bool:
        """Grids are the other library's business."""
        return True

    def check(self, flow: Flow, chart: Chart | None, start: float, end: float) -> None:
        """Raise unless the solver can carry a flow over an interval of flow time."""
        raise NotImplementedError

    def diffuse(
        self,
        ask: Callable[[Query], Estimate],
        path: Path,
        x: Tensor,
        start: float,
        end: float,
        budget: int | None,
        noise: Noise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry x from flow time `start` to a later one, for all samples as one system.

        Args:
            ask: answers a query about (x, t) with the estimate there.
            path: the flow's path.
            x: shape (B, *S).
            budget: the evaluations to spend, exactly.
            noise: names the seed and the samples.

        Returns:
            x at the end; and for each sample the evaluations it cost and its `Status`, int64 of shape (B,).
        """
        raise NotImplementedError


class EstimateSolver(Solver):
    """A solver whose step receives an `Estimate`: one evaluation at the start of each interval."""

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; it takes no chart."""
        if chart is not None:
            raise TypeError(
                f"{type(self).__name__} combines ẑ and ε̂ itself and has no chart; drop chart={chart.name!r}, or "
                "use a Runge–Kutta solver"
            )

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            return self.step(path, state, t, t_next)

        return step

    def step(self, path: Path, state: State, t: float, t_next: float) -> Step:
        """One step from t to t_next."""
        raise NotImplementedError


def in_chart(inner: Generator[Query, Tensor, Any], chart: Chart, path: Path) -> Generator[Query, Estimate, Any]:
    """Translate a generator that asks for dy/ds at (y, s) into one that asks for the estimate at (x, t)."""
    try:
        query = next(inner)
        while True:
            outer = charted(query, chart, path)
            estimate = yield outer
            query = inner.send(estimate.combine(*chart.row(estimate.point, query.t)))
    except StopIteration as stop:
        return stop.value


def charted(query: Query, chart: Chart, path: Path) -> Query:
    """The query about (x, t) that a query about (y, s) in a chart stands for."""
    y, nodes, row = query.x, query.nodes, query.row
    if nodes is None:
        clock = query.time
        if isinstance(clock, Tensor):
            t, point, c = _placed(chart, path, clock)
        else:
            t, point, c = path.remembered((chart, clock), lambda: _placed(chart, path, clock))
        return Query(scaled(c, y), t, point=point)

    def translate(clock: Tensor) -> tuple[Nodes, Point, Any]:
        t = chart.time(path, clock.flatten()).unflatten(0, clock.shape)
        points = path.at(t)
        c = chart.scale(points)
        placed = Nodes(t if nodes.recorded else array(t))
        return placed, points, c if isinstance(c, float) else send(c, y, y.dtype)

    times, points, c = nodes.once((id(chart), id(path)), translate)
    point = Point(*(v[row] for v in points))
    return Query(scaled(c if isinstance(c, float) else c[row], y), None, times, row, point)


def _placed(chart: Chart, path: Path, clock: Any) -> tuple[Any, Point, Any]:
    """Flow time at a time of a chart, the path's point there, and the scale."""
    t = chart.time(path, clock)
    point = path.at(t)
    return t, point, chart.scale(point)


def scaled(c: Any, y: Tensor) -> Tensor:
    """c·y for c a float or one number a sample; c = 1 costs nothing."""
    return y if isinstance(c, float) and c == 1.0 else per_sample(c, y) * y


def run(step: Generator[Query, Any, Any], ask: Callable[[Query], Any]) -> Any:
    """Drive one step to its end, answering each query by `ask`."""
    try:
        query = next(step)
        while True:
            query = step.send(ask(query))
    except StopIteration as stop:
        return stop.value


def inverse(c: Any) -> Any:
    """1/c for a float or a tensor."""
    return torch.reciprocal(c) if isinstance(c, Tensor) else 1.0 / c
