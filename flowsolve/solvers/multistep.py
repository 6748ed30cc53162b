r"""Exponential multistep: one evaluation a step, and a memory of those before.

A step goes by the formula of `flowsolve.solvers.exponential`, its nodes the latest evaluations:

1. The estimate at (x_n, t_n) gives F_n.
2. *Corrector* (UniC; SA-Solver's): the step that led to t_n is taken once more, from the same origin, with the same
   noise, and with t_n among its nodes. It costs nothing, because the next step needs F_n anyway; F_n itself is not
   evaluated again. The last step of a solve has no corrector.
3. *Predictor*: the step to t_{n+1}, with nodes t_n, t_{n−1}, …

A predictor through k nodes is of order k, with a corrector of k nodes and the end of the step of order k + 1.

**The first steps** have fewer nodes. With `warmup="ramp"` their orders rise from 1, as in every published sampler. The
one error of size h² (h³ with a corrector) that the first step makes is then what remains in the end: such a solve
converges with order 2 (3), however many nodes follow, though at few steps the later ones matter more. With
`warmup="single"` the first order − 1 steps are single steps (`flowsolve.solvers.singlestep`) of order up to 3 with as
many evaluations, and the order of the method shows, up to 4. With `warmup="trapezoid"` the first step is taken twice,
by $F_0$ and then by the mean of $F_0$ and of F where that led, for one evaluation more, not used again: the
start of PLMS (`IPNDM(warmup="trapezoid")`; Liu et al. 2022); its one error is of size h³. With `warmup="corrected"`
the corrector is used while the orders rise and not beyond, which gives that too, at no cost. **The last steps**: on
networks whose field is stiffest at the data it can pay to let the order fall again (`cooldown=True`).

`IPNDM` takes the weights of Adams and Bashforth's formulas for equal steps, whatever the steps are: of its order only
where the grid is uniform in the clock of its form, and often good where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from flowsolve.charts import Chart
from flowsolve.paths import Path
from flowsolve.solvers.base import EstimateSolver, Past, Query, State, Step, Stepper
from flowsolve.solvers.eta import Eta, check_eta
from flowsolve.solvers.exponential import (
    RULES,
    VARIABLES,
    Form,
    Update,
    applied,
    check_choice,
    form_of,
    frozen,
    refuse_chart,
    update,
)  # fmt: skip
from flowsolve.solvers.singlestep import SCHEMES, substeps

__all__ = ["DEIS", "ERSDE", "IPNDM", "LMS", "DPMSolverPP", "Multistep", "SASolver", "SDEDPMSolverPP", "UniPC"]

MOST = 5
ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class Multistep(EstimateSolver):
    """Exponential multistep with every choice open; the named methods are settings of it.

    Attributes:
        order: nodes of the predictor, 1 to 5.
        form: what is frozen: "data", "noise", "straight", or the number κ of the blend ẑ − κ ε̂.
        corrector: nodes of the corrector besides the end of the step; 0 for none.
        eta: the member of the SDE family: 0 is the ODE, 1 the reverse-time SDE; or a function of flow time, read at the
            start of each step.
        variable: in what F is a polynomial: "log_snr", "clock" (of the form) or "time" (flow time).
        rule: the weight of the second of two nodes: "exact", "bh2" or "bh1".
        warmup: "ramp" (orders 1, 2, …), "corrected" (the same, each of these steps with a corrector), "single" (`order`
            evaluations for each of the first order − 1 steps) or "trapezoid" (orders 2, 2, 3, …: two evaluations for
            the first step).
        cooldown: orders …, 2, 1 in the last steps.
    """

    order: int = 2
    form: Any = "data"
    corrector: int = 0
    eta: Any = 0.0
    variable: str = "log_snr"
    rule: str = "exact"
    warmup: str = "ramp"
    cooldown: bool = False

    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("order", self.order, range(1, MOST + 1))
        if self.corrector not in range(self.order + 1):
            raise ValueError(f"corrector = {self.corrector!r}; expected a whole number from 0 (none) to the order")
        form_of(self.form)
        Eta(self.eta)
        check_choice("variable", self.variable, VARIABLES)
        check_choice("rule", self.rule, RULES)
        check_choice("warmup", self.warmup, ("ramp", "single", "trapezoid", "corrected"))
        if self.warmup != "ramp" and self.random:
            raise ValueError(f"warmup = {self.warmup!r} is for the ODE; expected eta = 0 beside it")

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return Eta(self.eta).random

    def level(self, path: Path, t: float, t_next: float) -> float:
        """η for a step."""
        return Eta(self.eta).at(t)

    def schedule(self, nfe: int) -> list[int]:
        """One evaluation a step, but for the first ones with warmup="single" or "trapezoid"."""
        first: list[int] = [2] if self.warmup == "trapezoid" and nfe > 1 else []
        dear = min(self.order, max(SCHEMES))
        while self.warmup == "single" and len(first) < self.order - 1 and sum(first) + dear < nfe:
            first.append(dear)
        return first + [1] * (nfe - sum(first))

    def counts(self, steps: int) -> list[int]:
        """One evaluation a step, but for the first ones with warmup="single" or "trapezoid"."""
        return next(found for nfe in range(steps, 8 * steps + 8) if len(found := self.schedule(nfe)) == steps)

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a step of so many evaluations asks at the time it ends: that which is taken twice."""
        return self.warmup == "trapezoid" and evaluations > 1

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; it takes no chart."""
        refuse_chart(self, chart)
        form = form_of(self.form)
        left = {t: len(grid) - i for i, (t, _, _) in enumerate(grid)} if self.cooldown else {}
        known: dict[Any, Update] = {}

        def coefficients(a: float, b: float, nodes: tuple[float, ...]) -> Update:
            if (a, b, nodes) not in known:
                known[a, b, nodes] = self.update(path, form, a, b, nodes)
            return known[a, b, nodes]

        def taken(state: State, x: Tensor, a: float, b: float, evaluated: Sequence[Past]) -> Tensor:
            """The state at b, from x at a."""
            made = coefficients(a, b, tuple(p.t for p in evaluated))
            ahead = applied(made, x, [p.value for p in evaluated])
            if made.noise:
                assert state.noise is not None
                ahead = ahead.add(state.noise.step(a, b, x), alpha=made.noise)
            return ahead

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            estimate = yield Query(state.x, t)
            if form.scale(path.at(t)) == 0.0 and evaluations == 1:
                return State(frozen(estimate, path, state, t, t_next, self.level(path, t, t_next)), state.noise)
            x, past, now = estimate.x, state.past, Past(t, form.value(estimate))
            if state.origin is not None:  # the step that led here once more, knowing F at its end
                before = past[0].t
                known_before = past[: min(self.corrector or self.order, left.get(before, MOST))]
                x = taken(state, state.origin, before, t, (now, *known_before))
            if evaluations > 1 and self.warmup == "trapezoid":
                made = coefficients(t, t_next, (t,))
                end = form.value((yield Query(applied(made, x, (now.value,)), t_next)))
                ahead = applied(made, x, (0.5 * (now.value + end),))
            elif evaluations > 1:
                ahead = yield from substeps(path, form, SCHEMES[evaluations], state, estimate, t, t_next)
            else:
                ahead = taken(state, x, t, t_next, (now, *past)[: min(self.order, left.get(t, MOST))])
            keep = max(self.order - 1, self.corrector) if form.scale(path.at(t)) else 0
            young = self.warmup == "corrected" and len(past) < self.order - 1
            past = (now, *past)[:keep]
            again = (self.corrector or young) and evaluations == 1  # a single step is of higher order as it is
            return replace(state, x=ahead, past=past, origin=x if again else None)

        return step

    def update(self, path: Path, form: Form, a: float, b: float, nodes: tuple[float, ...]) -> Update:
        """The coefficients of a step from a to b with these nodes, the latest first."""
        eta = self.level(path, a, b)
        return update(path, form, a, b, nodes, eta=eta, variable=self.variable, rule=self.rule)


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """DPM-Solver++ (Lu et al. 2022b), multistep: 1 is DDIM, 2 is "2M", 3 is "3M"; in data form.

    3M here has the full second difference; the published code halves it and is of order 2.
    """

    rule: str = "bh2"


@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS (Zhang & Chen 2023): Adams–Bashforth on ε̂ with exact weights, order 3 by default.

    `variable` "log_snr" is the paper's log-ρ AB, "clock" its ρAB, "time" its tAB (in flow time).
    """

    order: int = 3
    form: Any = "noise"


@dataclass(frozen=True)
class LMS(Multistep):
    """Linear multistep in σ/α, order 4 by default: DEIS's ρAB under the name of k-diffusion's sampler."""

    order: int = 4
    form: Any = "noise"
    variable: str = "clock"


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC (Zhao et al. 2023): order k by its predictor, k + 1 with the corrector; in data form.

    `rule` "bh2" and "bh1" are the paper's two B(h); they matter with two nodes only.
    """

    order: int = 3
    corrector: int | None = None  # type: ignore[assignment]
    rule: str = "bh2"

    def __post_init__(self) -> None:
        if self.corrector is None:
            object.__setattr__(self, "corrector", self.order)
        super().__post_init__()


@dataclass(frozen=True)
class IPNDM(Multistep):
    """iPNDM (Liu et al. 2022; Zhang & Chen 2023): Adams and Bashforth's weights for equal steps, order 1 to 4.

    Of its order where the grid is uniform in the clock of the form. With equal=False the weights are those of the
    steps that are taken ("iPNDM-v").
    """

    order: int = 4
    form: Any = "noise"
    variable: str = "clock"
    equal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, range(1, max(ADAMS) + 1))
        if self.corrector or self.random:
            raise ValueError("IPNDM has no corrector and draws no noise; use UniPC or SASolver")

    def update(self, path: Path, form: Form, a: float, b: float, nodes: tuple[float, ...]) -> Update:
        """The coefficients of a step from a to b with these nodes, the latest first."""
        if not self.equal:
            return super().update(path, form, a, b, nodes)
        made = update(path, form, a, b, nodes[:1])
        return made._replace(weights=tuple(made.weights[0] * w for w in ADAMS[len(nodes)]))


@dataclass(frozen=True)
class SDEDPMSolverPP(Multistep):
    """SDE-DPM-Solver++ (Lu et al. 2022b), multistep, with any η: 1 is its "1", 2 its "2M", 3 its "3M"."""

    eta: Any = 1.0
    rule: str = "bh2"


@dataclass(frozen=True)
class SASolver(Multistep):
    """SA-Solver (Xue et al. 2023): stochastic Adams, predictor and corrector, of noise level τ where σ/α is in bounds.

    The paper's corrector order is one more than `corrector`, which does not count the end of the step; `rule` "bh1" is
    its code's.

    Attributes:
        tau: η within the bounds; 0 outside.
        between: the bounds.
    """

    corrector: int = 1
    rule: str = "bh1"
    tau: float = 1.0
    between: tuple[float, float] = (0.05, 50.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.tau)
        if self.eta:
            raise ValueError(f"eta = {self.eta!r}; SASolver's noise level is tau")

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return self.tau > 0.0

    def level(self, path: Path, t: float, t_next: float) -> float:
        """η for a step: τ if the step begins within the bounds."""
        low, high = self.between
        return self.tau if low <= math.exp(-path.log_snr(t)) <= high else 0.0


@dataclass(frozen=True)
class ERSDE(Multistep):
    r"""ER-SDE-Solver (Cui et al. 2023): the family member whose η follows from a noise scale φ of s = σ/α.

    $$ \eta^2 = \frac{d\log\varphi}{d\log s} - 1, \qquad \varphi(s) = s\,(e^{s^{0.3}} + 10), $$

    their choice number 5, averaged over each step, which leaves the step of order 1 exact. Order 1 to 3.
    """

    order: int = 3

    @property
    def random(self) -> bool:
        """Always."""
        return True

    def level(self, path: Path, t: float, t_next: float) -> float:
        """The root of the mean of η² over a step."""
        here, there = path.at(t), path.at(t_next)
        if here.alpha == 0.0 or there.sigma == 0.0:
            return 1.0
        a, b = math.exp(-here.log_snr), math.exp(-there.log_snr)
        return math.sqrt((_lift(a) - _lift(b)) / math.log(a / b))


def _lift(s: float) -> float:
    """log φ(s)/s."""
    power: float = s**0.3
    return power + math.log1p(10.0 * math.exp(-power))
