r"""DDIM, DDPM and the exact step of the SDE family: one formula with a share τ of fresh noise.

The processes

$$ dx = \bigl[u + \tfrac12\eta^2 g^2\,\nabla\log p\bigr]\,dt + \eta\,g\,dW, \qquad g^2 = 2\sigma^2\lambda'(t), $$

have the same marginals for every η: η = 0 is the probability-flow ODE, η = 1 the time reversal of the noising process.
A step from t to s with the estimate frozen replaces part of ε̂ by fresh noise,

$$ x_s = \alpha_s\hat z + \sqrt{\sigma_s^2-\tau^2}\;\hat\varepsilon + \tau\,\xi, \qquad \xi\sim N(0, I), \quad
   h = \lambda_s-\lambda_t, $$

and the methods differ in τ alone:

| solver | τ² | what it is |
|---|---|---|
| `DDIM(eta=0)` | 0 | the exact solution of the ODE in the straight chart (Song, Meng & Ermon 2021) |
| `DDIM(eta)` | η² σ_s² (1 − e^(−2h)) | η scales the standard deviation |
| `DDPM()` | σ_s² (1 − e^(−2h)) | the ancestral update of Ho et al. 2020 |
| `ExactSDE(eta)` | σ_s² (1 − e^(−2η²h)) | the exact solution of the family member η with ẑ frozen |

With ẑ frozen, (x − αẑ)/σ is an Ornstein–Uhlenbeck process of rate η²λ', whence the last row. The three agree at
η = 0 and η = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolve.paths import Path, Point
from flowsolve.solvers.base import EstimateSolver, Query, State, Step
from flowsolve.solvers.eta import check_eta

__all__ = ["DDIM", "DDPM", "ExactSDE"]


@dataclass(frozen=True)
class _FrozenEstimate(EstimateSolver):
    """x_s = α_s ẑ + √(σ_s² − τ²) ε̂ + τ ξ; a subclass that draws noise gives τ²/σ_s² as a function of e^(−h)."""

    def fresh(self, decay: float) -> float:
        """τ²/σ_s², the share of the noise's variance that is drawn anew, from e^(−h)."""
        raise NotImplementedError

    def step(self, path: Path, state: State, t: float, t_next: float) -> Step:
        """One step from t to t_next."""
        estimate = yield Query(state.x, t)
        there = path.at(t_next)
        share = self.fresh(_decay(path.at(t), there)) if self.random else 0.0
        x = estimate.combine(there.alpha, there.sigma * math.sqrt(1.0 - share))
        if share > 0.0 and there.sigma > 0.0:
            assert state.noise is not None
            x = x.add(state.noise.step(t, t_next, x), alpha=there.sigma * math.sqrt(share))
        return state.advance(x)


def _decay(here: Point, there: Point) -> float:
    """e^(−h) = (α_t σ_s)/(σ_t α_s), between 0 and 1 on the way to the data."""
    return float(here.alpha * there.sigma / (here.sigma * there.alpha))


@dataclass(frozen=True)
class DDIM(_FrozenEstimate):
    """Denoising diffusion implicit models, on any path: order 1, one evaluation a step.

    Attributes:
        eta: 0 is deterministic; 1 is DDPM; in between it scales the standard deviation of the fresh noise.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_eta(self.eta, 1.0)

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def fresh(self, decay: float) -> float:
        """η² (1 − e^(−2h))."""
        return self.eta**2 * (1.0 - decay) * (1.0 + decay)


@dataclass(frozen=True)
class DDPM(_FrozenEstimate):
    """The ancestral update of denoising diffusion probabilistic models, on any path; weak order 1."""

    @property
    def random(self) -> bool:
        """Always."""
        return True

    def fresh(self, decay: float) -> float:
        """1 − e^(−2h)."""
        return (1.0 - decay) * (1.0 + decay)


@dataclass(frozen=True)
class ExactSDE(_FrozenEstimate):
    """The exact solution of the family member η over a step with ẑ frozen; weak order 1.

    Attributes:
        eta: any number >= 0: 0 is the ODE, 1 the reverse-time SDE, more is more stochastic than either.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_eta(self.eta)

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def fresh(self, decay: float) -> float:
        """1 − e^(−2η²h)."""
        return -math.expm1(2.0 * self.eta**2 * math.log(decay)) if decay > 0.0 else 1.0
