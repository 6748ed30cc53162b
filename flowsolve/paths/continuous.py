"""Paths given by formulas; see `flowsolve.paths` for the table of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import saturating_log
from flowsolve.paths.base import Path, T

__all__ = ["EDM", "VE", "VP", "CondOT", "Cosine", "SubVP", "Trig"]


@dataclass(frozen=True)
class CondOT(Path):
    """The conditional optimal-transport path of flow matching: α = t, σ = 1 − (1 − σ_min) t.

    With σ_min = 0 it is the rectified flow, and flow time is the clock of the straight chart.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < 1.0:
            raise ValueError(f"sigma_min = {self.sigma_min!r}; expected 0 <= sigma_min < 1")

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        one = 1.0 + 0.0 * t
        return t, (1.0 - t) + self.sigma_min * t, one, (self.sigma_min - 1.0) * one

    def _time(self, log_snr: Any, m: Any) -> Any:
        return 1.0 / (m.exp(-log_snr) + (1.0 - self.sigma_min))

    def time_of_share(self, share: T) -> T:
        """t = s/(1 − σ_min s), from α + σ = 1 + σ_min t."""
        if isinstance(share, Tensor):
            s = share.to(torch.float64)
            return (s / (1.0 - self.sigma_min * s) if self.sigma_min else s).clamp(0.0, 1.0)
        s = float(share)
        return min(max(s / (1.0 - self.sigma_min * s), 0.0), 1.0)

    def _to_native(self, t: Any) -> Any:
        return t

    def _from_native(self, native: Any) -> Any:
        return native


class _Diffusion(Path):
    """Paths told in diffusion time τ, which runs from 1 at the noise to tau_min at the data."""

    tau_min: float

    def _to_native(self, t: Any) -> Any:
        return (1.0 - t) + self.tau_min * t

    def _from_native(self, native: Any) -> Any:
        return (1.0 - native) / (1.0 - self.tau_min)

    def _check_tau(self) -> None:
        if not 0.0 < self.tau_min < 1.0:
            raise ValueError(
                f"tau_min = {self.tau_min!r}; expected 0 < tau_min < 1 (at τ = 0 the path has no finite slope)"
            )


@dataclass(frozen=True)
class VP(_Diffusion):
    """The variance-preserving SDE with linear β: −log α = L(τ) = ¼(β₁−β₀)τ² + ½β₀τ, σ = √(1 − α²)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    tau_min: float = 1e-5

    def __post_init__(self) -> None:
        _positive(beta_min=self.beta_min, beta_max=self.beta_max)
        self._check_tau()

    def _decay(self, t: Any) -> tuple[Any, Any]:
        """L = −log α and dL/dt."""
        tau = self._to_native(t)
        slope = self.beta_max - self.beta_min
        return (0.25 * slope * tau + 0.5 * self.beta_min) * tau, -0.5 * (self.beta_min + slope * tau) * (
            1.0 - self.tau_min
        )

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        decay, rate = self._decay(t)
        alpha = m.exp(-decay)
        sigma = m.sqrt(-m.expm1(-2.0 * decay))
        return alpha, sigma, -rate * alpha, rate * alpha * alpha / sigma

    def _time(self, log_snr: Any, m: Any) -> Any:
        return self._time_of_decay(0.5 * m.log1p(m.exp(-2.0 * log_snr)), m)  # σ²/α² = e^(2L) − 1

    def _time_of_decay(self, decay: Any, m: Any) -> Any:
        root = m.sqrt(self.beta_min**2 + 4.0 * (self.beta_max - self.beta_min) * decay)
        return self._from_native(4.0 * decay / (self.beta_min + root))


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP SDE: α as in VP, σ = 1 − α², a smaller noise at every α."""

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        decay, rate = self._decay(t)
        alpha = m.exp(-decay)
        return alpha, -m.expm1(-2.0 * decay), -rate * alpha, 2.0 * rate * alpha * alpha

    def _time(self, log_snr: Any, m: Any) -> Any:
        return self._time_of_decay(m.asinh(0.5 * m.exp(-log_snr)), m)  # σ/α = 2 sinh L


@dataclass(frozen=True)
class Cosine(_Diffusion):
    """The cosine schedule of improved DDPM, without its discretisation or its clipped β: α = cos θ(τ)/cos θ(0).

    All of it is written in angles whose differences are exact: θ − θ₀ at the data, π/2 − θ at the noise, where α = 0.
    """

    s: float = 0.008
    tau_min: float = 1e-5

    def __post_init__(self) -> None:
        _positive(s=self.s)
        self._check_tau()

    @property
    def _start(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        quarter, norm = 0.5 * math.pi / (1.0 + self.s), math.cos(self._start)
        rate = quarter * (1.0 - self.tau_min)
        tau = self._to_native(t)
        alpha, alpha_dot = m.sin(rate * t) / norm, rate * m.cos(rate * t) / norm
        # cos²θ₀ − cos²θ = sin(θ−θ₀) sin(θ+θ₀)
        sigma = m.sqrt(m.sin(quarter * tau) * m.sin(quarter * (tau + 2.0 * self.s))) / norm
        return alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma

    def _time(self, log_snr: Any, m: Any) -> Any:
        alpha = 1.0 / m.sqrt(1.0 + m.exp(-2.0 * log_snr)) if m is torch else _sigmoid_root(log_snr)
        rate = 0.5 * math.pi * (1.0 - self.tau_min) / (1.0 + self.s)
        return m.asin(alpha * math.cos(self._start)) / rate


def _sigmoid_root(log_snr: float) -> float:
    """√sigmoid(2λ), for λ so small that e^(−2λ) overflows too."""
    return math.exp(log_snr) if log_snr < -300.0 else 1.0 / math.sqrt(1.0 + math.exp(-2.0 * log_snr))


@dataclass(frozen=True)
class Trig(Path):
    """α = sin(πt/2), σ = cos(πt/2): the unit circle at constant speed. Native time: the angle from the data."""

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        q = 0.5 * math.pi
        alpha, sigma = m.sin(q * t), m.sin(q * (1.0 - t))
        return alpha, sigma, q * sigma, -q * alpha

    def _time(self, log_snr: Any, m: Any) -> Any:
        return m.atan(m.exp(log_snr)) * (2.0 / math.pi)

    def _to_native(self, t: Any) -> Any:
        return 0.5 * math.pi * (1.0 - t)

    def _from_native(self, native: Any) -> Any:
        return 1.0 - native * (2.0 / math.pi)


class _Exploding(Path):
    """Paths with α = 1: the noise grows and the data stands still. Native time: σ."""

    sigma_min: float
    sigma_max: float

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def _to_native(self, t: Any) -> Any:
        return self.sigma(t)

    def _from_native(self, native: Any) -> Any:
        return self.time(-saturating_log(native))

    def _check_range(self) -> None:
        _positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min!r} must be below sigma_max = {self.sigma_max!r}")


@dataclass(frozen=True)
class VE(_Exploding):
    """The variance-exploding SDE: σ falls geometrically from σ_max to σ_min, so λ is linear in t."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        self._check_range()

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        ratio = self.sigma_min / self.sigma_max
        sigma = self.sigma_max * ratio**t
        return 1.0 + 0.0 * t, sigma, 0.0 * t, math.log(ratio) * sigma

    def _time(self, log_snr: Any, m: Any) -> Any:
        return (math.log(self.sigma_max) + log_snr) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(_Exploding):
    """EDM's noise levels: σ^(1/ρ) is linear in t, so uniform flow times are the Karras grid."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        self._check_range()
        _positive(rho=self.rho)

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        first, last = self.sigma_max ** (1.0 / self.rho), self.sigma_min ** (1.0 / self.rho)
        root = first * (1.0 - t) + last * t
        slope = self.rho * (last - first) * root ** (self.rho - 1.0)
        return 1.0 + 0.0 * t, root**self.rho, 0.0 * t, slope

    def _time(self, log_snr: Any, m: Any) -> Any:
        first, last = self.sigma_max ** (1.0 / self.rho), self.sigma_min ** (1.0 / self.rho)
        return (first - m.exp(-log_snr / self.rho)) / (first - last)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value!r}; expected a finite number > 0")
