r"""Euler–Maruyama on the SDE family, in flow time.

$$ x' = x + \bigl[u + \tfrac12\eta^2 g^2\,\nabla\log p\bigr]\,\Delta t + \eta\, g\sqrt{\Delta t}\;\xi,
   \qquad g^2 = 2\sigma^2\lambda'(t). $$

With $x = \alpha\hat z+\sigma\hat\varepsilon$, $u = \dot\alpha\hat z+\dot\sigma\hat\varepsilon$ and
$\nabla\log p = -\hat\varepsilon/\sigma$ the drift step is one combination of the estimate,

$$ (\alpha + \dot\alpha\Delta t)\,\hat z
   + \bigl(\sigma + (\dot\sigma - \eta^2\sigma\lambda')\,\Delta t\bigr)\,\hat\varepsilon . $$

Where $\lambda'$ is infinite (α = 0 or σ = 0) the SDE mixes infinitely fast and an explicit step does not exist; the
exact step of `ExactSDE` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.paths import Path
from flowsolve.solvers.base import EstimateSolver, Query, State, Step
from flowsolve.solvers.eta import check_eta

__all__ = ["EulerMaruyama"]


@dataclass(frozen=True)
class EulerMaruyama(EstimateSolver):
    """Euler–Maruyama in flow time: weak order 1, strong order ½ (1 for additive noise), one evaluation a step.

    Attributes:
        eta: 0 is Euler on the probability-flow ODE, 1 the reverse-time SDE.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_eta(self.eta)

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """Every node but the last needs an estimate and, with noise, a finite λ'."""
        super().require(flow, chart, t, asks=asks)
        point = flow.path.at(t)
        if asks and self.eta and (point.alpha == 0.0 or point.sigma == 0.0):
            raise ValueError(
                f"EulerMaruyama(eta={self.eta:g}) has no step from t = {t:g} of {flow.path!r}, where g² = 2σ²λ' is "
                "infinite; use ExactSDE, which is exact there, or start at a finite log-SNR: "
                f"interval=({flow.path.time(-5.0):.6g}, …) with start= a state at that time"
            )

    def step(self, path: Path, state: State, t: float, t_next: float) -> Step:
        """One step from t to t_next."""
        estimate = yield Query(state.x, t)
        p, dt = path.at(t), t_next - t
        mixing = self.eta**2 * p.log_snr_dot if self.eta else 0.0  # half the rate at which ε̂ is replaced
        x = estimate.combine(p.alpha + p.alpha_dot * dt, p.sigma + (p.sigma_dot - mixing * p.sigma) * dt)
        if mixing:
            assert state.noise is not None
            x = x.add(state.noise.step(t, t_next, x), alpha=p.sigma * math.sqrt(2.0 * mixing * dt))
        return state.advance(x)
