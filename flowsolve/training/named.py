r"""The objectives of the literature by name: each is a choice of target, density, weight and coupling.

| name | target | times | weight | path of its source | source |
|---|---|---|---|---|---|
| `flow_matching` | velocity | uniform | 1 | `CondOT(σ_min)`, `VP`, `VE` | Lipman et al. 2022 |
| `rectified_flow` | velocity | uniform | 1, fixed pairs | `CondOT()` | Liu et al. 2022 |
| `ot_flow_matching` | velocity | uniform | 1, exact coupling | `CondOT()` | Tong et al. 2023 |
| `schrodinger_bridge` | velocity, $\gamma = s\sqrt{t(1-t)}$ | uniform | 1, Sinkhorn $2s^2$ | `CondOT()` | same |
| `score_matching` | score | uniform | $\sigma^2$ (or 1) | `VE`, `VP` | Vincent 2011, Song & Ermon 2019 |
| `score_flow` | score | $p \propto g^2/\sigma^2$, importance | $g^2$ | `VP`, `SubVP` | Song et al. 2021 |
| `ddpm` | noise | uniform (or a table's entries) | 1 | `Discrete`, `VP`, `Cosine` | Ho et al. 2020 |
| `min_snr` | noise | uniform | min-SNR | `Discrete` | Hang et al. 2023 |
| `data` | data | uniform | 1, SNR or truncated SNR | `Cosine` | Salimans & Ho 2022 |
| `v` | $v$ | uniform | 1 (on the data: SNR + 1) | `Cosine`, `Trig` | Salimans & Ho 2022 |
| `edm` | data | log-normal $\sigma$ | EDM's | `EDM` | Karras et al. 2022 |
| `edm2` | data | log-normal $\sigma$ | EDM's, learned log-variance | `EDM` | Karras et al. 2024 |
| `sd3` | velocity | logit-normal, mode, cosmap | 1 | `CondOT()` | Esser et al. 2024 |
| `over_log_snr` | noise | uniform | $w(\lambda)\lambda'$ | any | Kingma & Gao 2023, Esser et al. 2024 |
| `interpolant` | velocity and $\zeta$ | uniform | 1 | `CondOT()`, `Trig` | Albergo et al. 2023 |

A name fixes no path: that is the flow's. Likewise the flow's network may predict anything; what is regressed is the
target. All of them work on all paths.

Esser et al. compare losses as $-\tfrac12\,\mathbb E_t\,w_t\lambda_t'\|\epsilon_\theta - \epsilon\|^2$ with *their*
$\lambda = 2\lambda$ of here; that is `over_log_snr(w)`, with $w$ a function of λ of here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from flowsolve.training import times, weights
from flowsolve.training.bridges import Bridge, Brownian
from flowsolve.training.couplings import INDEPENDENT, Coupling, Exact, Fixed, Sinkhorn
from flowsolve.training.interpolants import TwoHeaded
from flowsolve.training.objective import Objective

__all__ = [
    "data",
    "ddpm",
    "edm",
    "edm2",
    "flow_matching",
    "interpolant",
    "min_snr",
    "ot_flow_matching",
    "over_log_snr",
    "rectified_flow",
    "schrodinger_bridge",
    "score_flow",
    "score_matching",
    "sd3",
    "v",
]


def flow_matching(coupling: Coupling = INDEPENDENT) -> Objective:
    """Conditional flow matching: E ‖u_θ − (α̇ z + σ̇ ε)‖² (Lipman et al. 2022)."""
    return Objective("velocity", coupling=coupling)


def rectified_flow() -> Objective:
    """Flow matching of given pairs, ‖u_θ − (X₁ − X₀)‖² on the straight path (Liu et al. 2022)."""
    return Objective("velocity", coupling=Fixed())


def ot_flow_matching() -> Objective:
    """Flow matching of minibatch optimal transport (Tong et al. 2023); with labels, couple within them."""
    return Objective("velocity", coupling=Exact())


def schrodinger_bridge(std: float = 1.0) -> Objective:
    """SB-CFM: the entropic plan with ε = 2s² and Brownian bridges of standard deviation s (Tong et al. 2023)."""
    return Objective("velocity", coupling=Sinkhorn(2.0 * std**2, relative=False), bridge=Brownian(std), antithetic=True)


def score_matching(weight: weights.Weight = weights.sigma_squared) -> Objective:
    """Denoising score matching (Vincent 2011): σ²-weighted (Song & Ermon 2019), or raw with `weights.one`."""
    return Objective("score", weight=weight)


def score_flow(low: float | None = None, high: float | None = None) -> Objective:
    """Likelihood-weighted score matching, times drawn by importance (Song et al. 2021, ScoreFlow).

    Args:
        low: lowest log-SNR, needed on paths where it is infinite; between low and high it is the loss of uniform times.
        high: highest.
    """
    return Objective("score", times.log_snr_uniform(low, high), weights.likelihood, importance=True)


def ddpm(entries: bool = False) -> Objective:
    """E ‖ε_θ − ε‖² (Ho et al. 2020): times uniform, or the entries of a discrete table only."""
    return Objective("noise", times.entries if entries else times.uniform)


def min_snr(gamma: float = 5.0) -> Objective:
    """DDPM's loss with min-SNR-γ weights (Hang et al. 2023)."""
    return Objective("noise", weight=weights.min_snr(gamma))


def data(weight: weights.Weight = weights.one) -> Objective:
    """E w ‖z_θ − z‖²: with `weights.snr` DDPM's loss, with `weights.truncated_snr` that of Salimans & Ho 2022."""
    return Objective("data", weight=weight)


def v(weight: weights.Weight = weights.one) -> Objective:
    """E w ‖v_θ − (α ε − σ z)‖² (Salimans & Ho 2022)."""
    return Objective("v", weight=weight)


def edm(sigma_data: float = 0.5, mean: float = -1.2, std: float = 1.2) -> Objective:
    """EDM's loss: ln σ ~ N(mean, std²), weight (σ² + σ_d²)/(σ σ_d)² on the data (Karras et al. 2022)."""
    return Objective("data", times.log_normal(mean, std), weights.edm(sigma_data))


def edm2(sigma_data: float = 0.5, mean: float = -0.4, std: float = 1.0) -> Objective:
    """EDM's loss over a learned variance; its parameters are `objective.parameters()` (Karras et al. 2024)."""
    return Objective("data", times.log_normal(mean, std), weights.LearnedLogVariance(weights.edm(sigma_data)))


def sd3(
    density: Literal["lognorm", "mode", "cosmap", "uniform"] = "lognorm", first: float = 0.0, second: float = 1.0
) -> Objective:
    """Rectified flow with the time densities of SD3 (Esser et al. 2024).

    Args:
        density: "lognorm": rf/lognorm(first, second); "mode": rf/mode(first); "cosmap"; "uniform".
        first: m or s, as they count it, with time from the data.
        second: the standard deviation of "lognorm".
    """
    found: dict[str, Callable[[], times.Density]] = {
        "lognorm": lambda: times.logit_normal(-first, second),
        "mode": lambda: times.mode(first),
        "cosmap": lambda: times.cosmap,
        "uniform": lambda: times.uniform,
    }
    if density not in found:
        raise ValueError(f"density = {density!r}; expected one of {', '.join(found)}")
    return Objective("velocity", found[density]())


def over_log_snr(weight: Callable[[Any], Any]) -> Objective:
    """∫ w(λ) E ‖ε_θ − ε‖² dλ on any path (Kingma & Gao 2023); λ = log(α/σ)."""
    return Objective("noise", weight=weights.over_log_snr(weight))


def interpolant(bridge: Bridge | None = None, coupling: Coupling = INDEPENDENT) -> TwoHeaded:
    """The two-headed loss of stochastic interpolants, antithetic (Albergo, Boffi & Vanden-Eijnden 2023)."""
    bridge = Brownian(2.0**0.5) if bridge is None else bridge
    return TwoHeaded(Objective("velocity", coupling=coupling, bridge=bridge, antithetic=True))
