r"""Noise around the steps of a deterministic solver: ancestral sampling and churn.

A solver of the probability-flow ODE carries the marginal at one time to that at another. So does the addition of noise:
in the coordinates $x/\alpha$ it raises the noise level $\tilde\sigma = \sigma/\alpha$ of a sample of the marginal,

$$ x_s = \frac{\alpha_s}{\alpha_t}\,x_t + \sqrt{\sigma_s^2 - \Bigl(\frac{\alpha_s\sigma_t}{\alpha_t}\Bigr)^2}\;\xi,
   \qquad \xi\sim N(0, I), \quad s < t . $$

A step made of the two keeps the marginals as well as the inner solver does, for any step size: its bias is of the inner
solver's order, where the bias of the steps in `flowsolve.solvers.discrete` is of order 1. As steps shrink, both
wrappers become members of the SDE family.

| solver | order of the two | noise | source |
|---|---|---|---|
| `Ancestral` | down past the step's end, then back up | η² (1 − e^(−2h)) of the variance at the end | k-diffusion |
| `Churn` | up to $\tilde\sigma(1+\gamma)$, then down to the step's end | γ, or EDM's $S_{churn}$ | Karras et al. 2022 |

**Ancestral.** With $h = \lambda_s - \lambda_t$ and $\tau = \eta\,\sigma_s\sqrt{1-e^{-2h}}$ as in DDIM, the inner solver
goes to the point with $\alpha_s$ and $\sigma_\downarrow = \sqrt{\sigma_s^2-\tau^2}$, and τ ξ is added. That point need
not lie on the path, but the time $t_\downarrow$ with its log-SNR does, and the states at the two differ by the factor
$\alpha_s/\alpha(t_\downarrow)$. Around an Euler step it is `DDIM(eta)`; it is the member η of the family.

**Churn.** EDM's algorithm 2. Its $S_{churn}$ is shared out among N steps, $\gamma = \min(S_{churn}/N, \sqrt2-1)$. As
the steps shrink, the member of the family is $\eta^2 = \gamma/h$, which varies along the grid unless that is uniform
in λ.

The inner solver is any that makes its steps one at a time: a Runge–Kutta solver in a chart, `DDIM()`, and the like. One
that remembers earlier steps would take the added noise for a change of the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.paths import Path, Point
from flowsolve.solvers.base import Solver, State, Step, Stepper
from flowsolve.solvers.eta import check_eta
from flowsolve.solvers.runge_kutta import Euler, Heun

__all__ = ["Ancestral", "Around", "Churn", "missing"]


@dataclass(frozen=True)
class Around(Solver):
    """A solver that costs and asks what the steps of another do."""

    inner: Solver

    def __post_init__(self) -> None:
        name, inner = type(self).__name__, self.inner
        if not isinstance(inner, Solver):
            raise TypeError(f"{name} wraps {inner!r}; expected a solver such as flowsolve.solvers.Heun()")
        if why := self.refused():
            raise TypeError(f"{name} adds noise around the steps of another solver, but {inner!r} {why}")

    def refused(self) -> str:
        """Why the inner solver does not serve; empty if it does."""
        inner = self.inner
        if inner.chooses_steps:
            return "chooses its own steps; set adaptive=False, or use a solver on a fixed grid"
        if inner.remembers:
            return "is a multistep method, and what it remembers does not belong to a state with new noise"
        return "draws noise itself; use eta=0 or an ODE solver" if inner.random else ""

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Network evaluations of a full step: those of the inner solver."""
        return self.inner.evaluations

    @property
    def order(self) -> int:
        """The order of the inner solver."""
        return self.inner.order

    def schedule(self, nfe: int) -> list[int]:
        """The evaluations of each step when exactly nfe are to be spent."""
        return self.inner.schedule(nfe)

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a step of so many evaluations asks at the time it ends."""
        return self.inner.asks_at_end(evaluations)

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """What the inner solver requires."""
        self.inner.require(flow, chart, t, asks=asks)


@dataclass(frozen=True)
class Ancestral(Around):
    """Every step goes past its end by another solver, and comes back to it by fresh noise.

    Where the path ends too early for that, the step goes as far as the path and draws so much less: a step to the last
    time of a path draws none. (Around stages, the last time that the network knows.)

    Attributes:
        inner: the solver; with `Euler()` or `DDIM()` the whole is DDIM(eta).
        eta: 0 is the inner solver itself, 1 the reverse-time SDE.

    Examples:
        >>> solver = fs.solvers.Ancestral(fs.solvers.Heun(), eta=0.5)
        >>> solver.evaluations, solver.random
        (2, True)
    """

    inner: Solver = field(default_factory=Euler)
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.eta, 1.0)

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """What the inner solver requires, also at the end of the path, where a step from α = 0 with η = 1 goes."""
        super().require(flow, chart, t, asks=asks)
        if asks and self.eta == 1.0 and flow.path.at(t).alpha == 0.0:
            end = self._end(flow.path)
            self.inner.require(flow, chart, end, asks=self.inner.asks_at_end(self.inner.evaluations))

    def _end(self, path: Path) -> float:
        """The last time that a step may go to: with stages, the last that the network knows."""
        return 1.0 if self.inner.evaluations == 1 else path.window[1]

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; the chart is the inner solver's."""
        inner, end = self.inner.on(path, chart), self._end(path)

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            here, there = path.at(t), path.at(t_next)
            if not self.random or there.sigma == 0.0:
                return (yield from inner(state, t, t_next, evaluations))
            decay = float(here.alpha * there.sigma / (here.sigma * there.alpha))  # e^(−h)
            share = self.eta**2 * (1.0 - decay) * (1.0 + decay)
            past = path.time(there.log_snr - 0.5 * math.log1p(-share)) if share < 1.0 else end
            if min(past, end) <= t_next:
                return (yield from inner(state, t, t_next, evaluations))
            if past < end:
                tau = there.sigma * math.sqrt(share)
            else:  # what is missing where the path ends
                past, tau = end, missing(there, path.at(end))
            ratio = float(there.alpha / path.alpha(past))
            x = (yield from inner(state, t, past, evaluations)).x
            assert state.noise is not None
            return state.advance((ratio * x).add(state.noise.step(t, t_next, x), alpha=tau))

        return step


@dataclass(frozen=True)
class Churn(Around):
    """Every step raises the noise level σ̃ = σ/α to σ̃ (1 + γ) by fresh noise, then goes down by another solver.

    How much is told either for the whole solve, as EDM does, or for a step; a solve in pieces does as the whole with
    gamma= only. Where the path does not go up to σ̃ (1 + γ), its noisiest point is as far as noise is raised; a step
    from pure noise (α = 0) adds none.

    Attributes:
        inner: the solver; EDM's own is `Heun()` with chart="noise".
        churn: S_churn: γ = min(churn/N, √2 − 1) in N steps.
        gamma: γ itself.
        s_min, s_max: the noise levels σ̃ between which noise is added.
        s_noise: standard deviation of the noise added; any other than 1 gives up the marginals.

    Examples:
        >>> solver = fs.solvers.Churn(fs.solvers.Heun(), churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
        >>> solver.share(256)
        0.15625
    """

    inner: Solver = field(default_factory=Heun)
    churn: float | None = None
    gamma: float | None = None
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.churn is None) == (self.gamma is None):
            raise ValueError(f"churn = {self.churn!r}, gamma = {self.gamma!r}; expected one of the two")
        for name in ("churn", "gamma"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"{name} = {value!r}; expected a finite number >= 0")
        if not 0.0 < self.s_noise < math.inf:
            raise ValueError(f"s_noise = {self.s_noise!r}; expected a finite number > 0, about 1")
        if not 0.0 <= self.s_min <= self.s_max:
            raise ValueError(f"s_min = {self.s_min!r}, s_max = {self.s_max!r}; expected 0 <= s_min <= s_max")

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return bool(self.churn or self.gamma)

    def share(self, steps: int) -> float:
        """γ in a solve of so many steps."""
        if self.gamma is not None:
            return self.gamma
        assert self.churn is not None
        return min(self.churn / steps, math.sqrt(2.0) - 1.0) if self.churn else 0.0

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; the chart is the inner solver's."""
        if self.churn and not grid:
            raise ValueError(f"churn = {self.churn!r} is spread over the steps of a solve, not known here; give gamma=")
        inner, gamma = self.inner.on(path, chart), self.share(len(grid))

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            state, t = self._raised(path, gamma, state, t, t_next)
            return (yield from inner(state, t, t_next, evaluations))

        return step

    def _raised(self, path: Path, gamma: float, state: State, t: float, t_next: float) -> tuple[State, float]:
        """The state with more noise, and the time to which it belongs."""
        here = path.at(t)
        if gamma == 0.0 or here.alpha == 0.0 or not self.s_min <= here.sigma / here.alpha <= self.s_max:
            return state, t
        before = min(t, path.time(here.log_snr - math.log1p(gamma)))
        if before == t:
            return state, t
        up = path.at(before)
        ratio = float(up.alpha / here.alpha)
        tau = ratio * here.sigma * math.sqrt(gamma * (2.0 + gamma)) if before > 0.0 else missing(up, here)
        assert state.noise is not None
        x = state.noise.step(t, t_next, state.x)
        return state.advance((ratio * state.x).add(x, alpha=self.s_noise * tau)), before


def missing(noisy: Point, clean: Point) -> float:
    """The standard deviation of the noise between two points, in the scale of the noisy one."""
    left = noisy.alpha * clean.sigma / clean.alpha
    return math.sqrt(max(0.0, (noisy.sigma - left) * (noisy.sigma + left)))
