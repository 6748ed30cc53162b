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

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flowsolve._batch import per_sample
from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.noise import Noise
from flowsolve.paths import Path
from flowsolve.predictions import Estimate

__all__ = ["EstimateSolver", "Query", "Solver", "State", "Step", "in_chart", "run"]


class Query(NamedTuple):
    """A state of shape (B, *S) and the time, a float or a float64 host tensor of shape (B,), it is asked about."""

    x: Tensor
    t: Any


@dataclass(frozen=True)
class State:
    """What a fixed-grid solve carries from step to step.

    Attributes:
        x: the state, shape (B, *S).
        noise: the batch's noise, addressed by intervals; None for a solve that draws none.
    """

    x: Tensor
    noise: Noise | None = None

    def advance(self, x: Tensor) -> State:
        """The state after a step that ends in x."""
        return replace(self, x=x)


Step = Generator[Query, Any, State]
Stepper = Callable[[State, float, float, int], Step]


class Solver:
    """A method for advancing a state. Solvers are frozen dataclasses: equal settings are equal solvers."""

    evaluations: ClassVar[int] = 1
    """Network evaluations of a full step."""

    def on(self, path: Path, chart: Chart | None) -> Stepper:
        """The step function (state, t, t_next, evaluations) of this solver on a path."""
        raise NotImplementedError

    def schedule(self, nfe: int) -> list[int]:
        """The evaluations of each step when exactly nfe are to be spent."""
        return [1] * nfe

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a step of so many evaluations asks at the time it ends."""
        return False

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """Raise ValueError unless the solver can have a node of its grid at flow time t, and ask there if it asks."""
        if asks:
            flow.require(t)

    @property
    def random(self) -> bool:
        """Whether steps draw noise, so that they cannot be retraced."""
        return False


class EstimateSolver(Solver):
    """A solver whose step receives an `Estimate`: one evaluation at the start of each interval."""

    def on(self, path: Path, chart: Chart | None) -> Stepper:
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
        y, s = next(inner)
        while True:
            t = chart.time(path, s)
            estimate = yield Query(scaled(chart.scale(path.at(t)), y), t)
            y, s = inner.send(estimate.combine(*chart.row(estimate.point, s)))
    except StopIteration as stop:
        return stop.value


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
