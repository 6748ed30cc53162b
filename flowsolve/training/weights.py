r"""Loss weights: how much a time counts. Which times are drawn is a density (`training.times`).

A weight is a function of the path's point that multiplies the squared error of a *target*, one number a sample. It
means something only together with that target: by §7 of the theory the errors of two targets with rows $(a, b)$,
scale $s$ differ by a factor of $t$ alone,

$$ \|\hat o - o\|^2 = \Bigl(\frac{\alpha b - \sigma a}{\alpha s}\Bigr)^2 \|\hat\varepsilon - \varepsilon\|^2 . $$

| weight | $w$ | for the target | source |
|---|---|---|---|
| `one` | $1$ | any | |
| `sigma_squared` | $\sigma^2$ | score: the loss on noise | Song & Ermon 2019 |
| `likelihood` | $g^2 = 2\sigma^2\lambda'$ | score: a bound on the likelihood | Song et al. 2021 |
| `snr` | $\mathrm{SNR} = \alpha^2/\sigma^2$ | data: the loss on noise | Salimans & Ho 2022 |
| `truncated_snr` | $\max(\mathrm{SNR}, 1)$ | data | Salimans & Ho 2022 |
| `min_snr(γ)` | $\min(\mathrm{SNR}, \gamma)/\mathrm{SNR}$ | noise; others by `on=` | Hang et al. 2023 |
| `cosmap` | $\tfrac2\pi/(1-2\tau+2\tau^2)$, $\tau = \tfrac{\sigma}{\alpha+\sigma}$ | velocity | Esser et al. 2024 |
| `edm(σ_d)` | $\alpha^2/\sigma^2 + 1/\sigma_d^2$ | data | Karras et al. 2022 |
| `over_log_snr(w)` | $w(\lambda)\,\lambda'$ | noise; others by `on=` | Kingma & Gao 2023 |
| `equivalent(a, on=b)` | the factor above, $a$ over $b$ | $b$: the loss on $a$ | |
| `LearnedLogVariance(w)` | $w\,e^{-v(\lambda)}$, with $v$ added to the loss | that of $w$ | Karras et al. 2024 |

Weights multiply: `weights.sigma_squared * weights.one`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve.paths import Point
from flowsolve.predictions import Prediction, resolve

__all__ = [
    "LearnedLogVariance",
    "Own",
    "Weight",
    "cosmap",
    "edm",
    "equivalent",
    "error_ratio",
    "likelihood",
    "min_snr",
    "one",
    "over_log_snr",
    "sigma_squared",
    "snr",
    "truncated_snr",
]


class Weight:
    """A factor of the squared error at a point of the path. A subclass gives `__call__`."""

    def __call__(self, point: Point) -> Any:
        """The factor, for a point with tensors of shape (B,): shape (B,)."""
        raise NotImplementedError

    def offset(self, point: Point) -> Any:
        """What is added to the weighted error: 0, but for learned weights."""
        return 0.0

    def __mul__(self, other: Weight) -> Weight:
        return _Product(self, other) if isinstance(other, Weight) else NotImplemented


@dataclass(frozen=True)
class Own(Weight):
    """A function of a `Point` as a weight."""

    function: Callable[[Point], Any]

    def __call__(self, point: Point) -> Any:
        return self.function(point)


@dataclass(frozen=True)
class _Product(Weight):
    first: Weight
    second: Weight

    def __call__(self, point: Point) -> Any:
        return self.first(point) * self.second(point)

    def offset(self, point: Point) -> Any:
        return self.first.offset(point) + self.second.offset(point)


@dataclass(frozen=True)
class _One(Weight):
    def __call__(self, point: Point) -> Any:
        return torch.ones_like(point.alpha) if isinstance(point.alpha, Tensor) else 1.0


@dataclass(frozen=True)
class _SigmaSquared(Weight):
    def __call__(self, point: Point) -> Any:
        return point.sigma * point.sigma


@dataclass(frozen=True)
class _Likelihood(Weight):
    def __call__(self, point: Point) -> Any:
        alpha, sigma, alpha_dot, sigma_dot = point
        return 2.0 * sigma * (sigma * alpha_dot - alpha * sigma_dot) / alpha


@dataclass(frozen=True)
class _SNR(Weight):
    lowest: float = 0.0

    def __call__(self, point: Point) -> Any:
        ratio = torch.as_tensor(point.alpha / point.sigma)
        return ratio.square().clamp_min(self.lowest)


@dataclass(frozen=True)
class _MinSNR(Weight):
    gamma: float

    def __call__(self, point: Point) -> Any:
        return (self.gamma * (-2.0 * point.log_snr).exp()).clamp_max(1.0)


@dataclass(frozen=True)
class _CosMap(Weight):
    def __call__(self, point: Point) -> Any:
        tau = point.sigma / (point.alpha + point.sigma)
        return (2.0 / math.pi) / (1.0 - 2.0 * tau + 2.0 * tau * tau)


@dataclass(frozen=True)
class _EDM(Weight):
    sigma_data: float

    def __call__(self, point: Point) -> Any:
        level = point.sigma / point.alpha
        return level**-2 + self.sigma_data**-2


@dataclass(frozen=True)
class _Equivalent(Weight):
    target: str | Prediction
    on: str | Prediction

    def __call__(self, point: Point) -> Any:
        return (error_ratio(self.target, point) / error_ratio(self.on, point)) ** 2


@dataclass(frozen=True)
class _OverLogSNR(Weight):
    function: Callable[[Any], Any]

    def __call__(self, point: Point) -> Any:
        return self.function(point.log_snr) * point.log_snr_dot


class LearnedLogVariance(nn.Module, Weight):
    r"""EDM2's learned uncertainty: $L = w\,e^{-v(\lambda)}\,\|\cdot\|^2 + v(\lambda)$ (Karras et al. 2024).

    At its optimum $e^v = \mathbb E[w\|\cdot\|^2 \mid \lambda]$, so that every time contributes alike. $v$ is linear in
    fixed random Fourier features of $\lambda/4$ and starts at 0. Its parameters are trained beside the network's
    (`Objective.parameters()`), and dropped after training.

    Args:
        base: w.
        features: how many.
        seed: of the features.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, base: Weight | None = None, features: int = 128, seed: int = 0) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features = {features}; expected at least 1")
        self.base = one if base is None else base
        if not isinstance(self.base, Weight):
            raise TypeError(f"base is {base!r}; expected a weight of training.weights")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequency", 2.0 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phase", 2.0 * math.pi * torch.rand(features, generator=generator))
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def log_variance(self, point: Point) -> Tensor:
        """v(λ), shape (B,)."""
        lam = 0.25 * torch.as_tensor(point.log_snr).to(self.frequency)
        features = math.sqrt(2.0) * torch.cos(lam.reshape(-1, 1) * self.frequency + self.phase)
        v: Tensor = self.linear(features)[:, 0] / math.sqrt(len(self.frequency))
        return v

    def forward(self, point: Point) -> Any:
        v = torch.exp(-self.log_variance(point))
        return torch.as_tensor(self.base(point)).to(v) * v

    def offset(self, point: Point) -> Any:
        return self.log_variance(point)


one = _One()
"""1: the target's own error."""

sigma_squared = _SigmaSquared()
"""σ²: turns the loss on the score into the loss on the noise."""

likelihood = _Likelihood()
"""g² = 2 σ² λ' = 2 σ (σ α̇ − α σ̇)/α, the squared diffusion of the path's SDE; infinite at α = 0."""

snr = _SNR()
"""α²/σ²: turns the loss on the data into the loss on the noise."""

truncated_snr = _SNR(1.0)
"""max(α²/σ², 1), for the data (Salimans & Ho 2022)."""

cosmap = _CosMap()
"""On the straight path, with uniform times, what `times.cosmap` is as a density (Esser et al. 2024)."""


def min_snr(gamma: float = 5.0, on: str | Prediction = "noise") -> Weight:
    """min(SNR, γ)/SNR on the noise, which stops the almost clean times from ruling the loss; the same on any target.

    Raises:
        ValueError: gamma is not > 0.
    """
    _positive(gamma=gamma)
    return _moved(_MinSNR(float(gamma)), on)


def edm(sigma_data: float = 0.5) -> Weight:
    """(σ̃² + σ_d²)/(σ̃ σ_d)², which makes the raw network's error count alike at every level (Karras et al. 2022)."""
    _positive(sigma_data=sigma_data)
    return _EDM(float(sigma_data))


def equivalent(target: str | Prediction, on: str | Prediction) -> Weight:
    """The weight that turns the loss on the target `on` into the unweighted loss on `target`."""
    return _Equivalent(resolve(target), resolve(on))


def over_log_snr(weight: Callable[[Any], Any], on: str | Prediction = "noise") -> Weight:
    """w(λ) λ'(t): with uniform times the loss is ∫ w(λ) E‖ε̂ − ε‖² dλ on every path (Kingma & Gao 2023).

    Args:
        weight: w, a function of λ = log(α/σ), half of the log-SNR of some papers.
        on: the target whose error it multiplies.
    """
    return _moved(_OverLogSNR(weight), on)


def error_ratio(target: str | Prediction, point: Point) -> Any:
    """(αb − σa)/(αs): the error of a target in units of the error of the noise."""
    a, b, scale = resolve(target).row(point)
    return (b - point.sigma / point.alpha * a) / scale


def _moved(weight: Weight, on: str | Prediction) -> Weight:
    """A weight that is meant for the noise, for another target."""
    on = resolve(on)
    return weight if on.name == "noise" else weight * _Equivalent(resolve("noise"), on)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value!r}; expected a number > 0")
