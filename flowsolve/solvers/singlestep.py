r"""Exponential single steps: every evaluation of a step lies within it, and nothing is remembered.

The stages of a step from $\lambda_a$ sit at $\lambda_a + c_i h$; each is reached, and the step completed, by the
formula of `flowsolve.solvers.exponential` with some of the earlier stages as nodes. What distinguishes the methods is
the list of stages and nodes, a *scheme*:

| scheme | stages c (nodes) | nodes of the step | order |
|---|---|---|---|
| 2S (Lu et al. 2022a, b) | ½ (start) | start, ½; rule `bh2` | 2 |
| RES 2 (Zhang et al. 2023) | ½ (start) | start, ½; exact | 2 |
| 3S (Lu et al. 2022a, b) | ⅓ (start), ⅔ (start, ⅓) | start, ⅔ | 3 |
| Heun | 1 (start) | start, end | 2 |

3S has order 3 from two nodes because ⅔ is a node of the Radau formula: the second moment comes out right to leading
order.

**With noise** the stages lie on one path: the noise of a stage is carried on to the next, decayed, and joined by that
of the interval between them. The noise is additive and its integrals are exact, so what a scheme of order 2 or more
gets wrong is of weak order 2 (measured: `benchmarks/results/orders.json`). Heun's, whose second node is the end of the
step itself, sees all of the noise half of the time and is of strong order 1 too.

Where an end of a step has no log-SNR (λ infinite) stages are placed by the straight clock α/(α+σ) instead, and none at
the end itself.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from flowsolve.charts import CHARTS, Chart
from flowsolve.paths import Path
from flowsolve.predictions import Estimate
from flowsolve.solvers.base import EstimateSolver, Query, State, Step, Stepper
from flowsolve.solvers.eta import Eta
from flowsolve.solvers.exponential import RULES, Form, applied, check_choice, form_of, frozen, refuse_chart, update

__all__ = ["RES", "SCHEMES", "SEEDS", "DPMSolver", "DPMSolverPPS", "Scheme", "SingleStep", "StochasticHeun", "substeps"]


class Scheme(NamedTuple):
    """Stages (c, nodes) and the nodes of the step itself, by number: 0 is the start, 1 the first stage, …

    Nodes are listed the latest first.
    """

    stages: tuple[tuple[float, tuple[int, ...]], ...]
    nodes: tuple[int, ...]


SCHEMES = {
    1: Scheme((), (0,)),
    2: Scheme(((1 / 2, (0,)),), (1, 0)),
    3: Scheme(((1 / 3, (0,)), (2 / 3, (1, 0))), (2, 0)),
}
HEUN = Scheme(((1.0, (0,)),), (1, 0))


def substeps(
    path: Path, form: Form, scheme: Scheme, state: State, estimate: Estimate, t: float, t_next: float,
    eta: float = 0.0, rule: str = "exact",
) -> Generator[Query, Estimate, Tensor]:  # fmt: skip
    """The rest of a single step whose first evaluation is at hand, and its end.

    Args:
        state: names the noise.
        estimate: that at t.
        eta: the member of the SDE family.
        rule: the weight of the second of two nodes, in the step and its stages.
    """
    if form.scale(path.at(t)) == 0.0:
        for c, _ in scheme.stages:
            stage = _between(path, t, t_next, min(c, 0.5))
            x = frozen(estimate, path, state, t, stage, eta)
            estimate, t = (yield Query(x, stage)), stage
        return frozen(estimate, path, state, t, t_next, eta)
    x, times, values = estimate.x, [t], [form.value(estimate)]
    noise: Tensor | None = None
    reached = t

    def drawn(until: float) -> Tensor | None:
        """The noise that has come in from t until a time."""
        nonlocal noise, reached
        if eta and until != reached:
            between = update(path, form, reached, until, [reached], eta=eta)
            assert state.noise is not None
            fresh = between.noise * state.noise.step(reached, until, x)
            noise, reached = fresh if noise is None else fresh.add_(noise, alpha=between.state), until
        return noise

    def to(until: float, nodes: Sequence[int]) -> Tensor:
        made = update(path, form, t, until, [times[i] for i in nodes], eta=eta, rule=rule)
        ahead = applied(made, x, [values[i] for i in nodes])
        come = drawn(until)
        return ahead if come is None else ahead + come

    for c, nodes in scheme.stages:
        stage = _between(path, t, t_next, c)
        estimate = yield Query(to(stage, nodes), stage)
        times.append(stage)
        values.append(form.value(estimate))
    return to(t_next, scheme.nodes)


def _between(path: Path, t: float, t_next: float, c: float) -> float:
    """The flow time at the fraction c of a step in log-SNR, or in the straight clock where that is infinite."""
    here, there = path.at(t), path.at(t_next)
    if c == 1.0 and there.alpha and there.sigma:
        return t_next
    if here.alpha and here.sigma and there.alpha and there.sigma:
        return path.time(float((1.0 - c) * here.log_snr + c * there.log_snr))
    clock, c = CHARTS["straight"], min(c, 0.5)
    return float(clock.time(path, (1.0 - c) * clock.clock(path, t) + c * clock.clock(path, t_next)))


@dataclass(frozen=True)
class SingleStep(EstimateSolver):
    """Exponential single steps with every choice open; the named methods are settings of it.

    Attributes:
        order: evaluations of a step: 1 (DDIM, or its stochastic like), 2 or 3.
        form: what is frozen: "data", "noise", "straight", or the number κ of the blend ẑ − κ ε̂.
        eta: the member of the SDE family: 0 is the ODE, 1 the reverse-time SDE; or a function of flow time, read at the
            start of each step.
        rule: the weight of the second of two nodes in a step of order 2: "exact", "bh2" or "bh1".
    """

    order: int = 2
    form: Any = "data"
    eta: Any = 0.0
    rule: str = "exact"

    def __post_init__(self) -> None:
        check_choice("order", self.order, tuple(SCHEMES))
        form_of(self.form)
        Eta(self.eta)
        check_choice("rule", self.rule, RULES)

    @property
    def scheme(self) -> Scheme:
        """Stages and nodes of a full step."""
        return SCHEMES[self.order]

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Network evaluations of a full step."""
        return len(self.scheme.stages) + 1

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return Eta(self.eta).random

    def schedule(self, nfe: int) -> list[int]:
        """Shorter steps first for what does not fill whole ones, of one order less where that can be."""
        full, rest = divmod(nfe, self.evaluations)
        if rest == 1 and self.evaluations == 3 and full:
            return [2, 2] + [3] * (full - 1)
        return [rest] * (rest > 0) + [self.evaluations] * full

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; it takes no chart."""
        refuse_chart(self, chart)
        form = form_of(self.form)

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            estimate = yield Query(state.x, t)
            scheme = self._scheme(evaluations)
            rule = self.rule if len(scheme.stages) == 1 else "exact"
            eta = Eta(self.eta).at(t)
            x = yield from substeps(path, form, scheme, state, estimate, t, t_next, eta, rule)
            return replace(state, x=x)

        return step

    def _scheme(self, evaluations: int) -> Scheme:
        return self.scheme if evaluations == self.evaluations else SCHEMES[evaluations]


@dataclass(frozen=True)
class DPMSolver(SingleStep):
    """DPM-Solver (Lu et al. 2022a): 1 is DDIM, 2 its "2S" (k-diffusion's dpm_2), 3 its "3S"; in noise form."""

    form: Any = "noise"
    rule: str = "bh2"


@dataclass(frozen=True)
class DPMSolverPPS(SingleStep):
    """DPM-Solver++ (Lu et al. 2022b), single-step: 2 is its "2S", 3 its "3S"; in data form, with any η."""

    rule: str = "bh2"


@dataclass(frozen=True)
class RES(SingleStep):
    """The refined exponential solver (Zhang et al. 2023), order 2: the exact weights at c = ½, in data form."""


@dataclass(frozen=True)
class SEEDS(SingleStep):
    """SEEDS (Gonzalez et al. 2023): single steps on the reverse-time SDE, order 1 to 3 as η → 0; in noise form."""

    form: Any = "noise"
    eta: Any = 1.0


@dataclass(frozen=True)
class StochasticHeun(SingleStep):
    """Heun's step on the SDE family with its linear part solved exactly: weak order 2, strong order 1."""

    eta: Any = 1.0

    @property
    def scheme(self) -> Scheme:
        """A stage at the end of the step."""
        return HEUN
