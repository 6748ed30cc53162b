r"""Loss weights: functions of the path's point, one number a sample.

| weight | $w$ | meant for | source |
|---|---|---|---|
| `sigma_squared` | $\sigma^2$ | target "score": the loss on noise | Song & Ermon 2019 |
| `likelihood` | $g^2 = 2\sigma^2\lambda'$ | target "score": a bound on the likelihood | Song et al. 2021 |
| `min_snr` | $\min(\mathrm{SNR}, \gamma)/\mathrm{SNR}$ | target "noise" | Hang et al. 2023 |

with $\mathrm{SNR} = \alpha^2/\sigma^2 = e^{2\lambda}$.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from flowsolve.paths import Point

__all__ = ["Weight", "likelihood", "min_snr", "sigma_squared"]

Weight = Callable[[Point], Tensor]


def sigma_squared(point: Point) -> Tensor:
    """σ²: turns the loss on the score into the loss on the noise."""
    return point.sigma * point.sigma  # type: ignore[no-any-return]


def likelihood(point: Point) -> Tensor:
    """g² = 2 σ² λ' = 2 σ (σ α̇ − α σ̇)/α, the squared diffusion of the path's SDE; infinite at α = 0."""
    alpha, sigma, alpha_dot, sigma_dot = point
    return 2.0 * sigma * (sigma * alpha_dot - alpha * sigma_dot) / alpha  # type: ignore[no-any-return]


def min_snr(gamma: float = 5.0) -> Weight:
    """min(SNR, γ)/SNR, which stops the almost clean times from ruling the loss on the noise.

    Raises:
        ValueError: gamma is not > 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma = {gamma!r}; expected a number > 0")
    return partial(_min_snr, gamma=gamma)


def _min_snr(point: Point, *, gamma: float) -> Tensor:
    return (gamma * (-2.0 * point.log_snr).exp()).clamp_max(1.0)  # type: ignore[no-any-return]
