r"""Gaussian paths: the curve $(\alpha(t), \sigma(t))$ that joins noise to data.

Every Gaussian generative model moves along

$$ x_t = \alpha(t)\,z + \sigma(t)\,\varepsilon, \qquad t = 0:\ \text{pure noise} \;\to\; t = 1:\ \text{data}, $$

with $z$ a data point and $\varepsilon \sim N(0, I)$. Models differ in the curve and in the clock their network
was trained with; both are written down here and nowhere else. *Flow time* $t \in [0, 1]$ always runs from noise to
data. The clock of the network (the index of a discrete table, the diffusion time of an SDE, $\sigma$ itself) is the
path's *native time*, reached by `native_time` and left by `time_from_native`.

The log-SNR $\lambda(t) = \log(\alpha/\sigma)$ strictly increases. Two paths that pass through the same $\lambda$
differ there by a rescaling of $x$ only, which is why one solver serves them all. (Some papers call $2\lambda$ the
log-SNR; here, as in Lu et al. 2022, it is $\lambda$.)

| path | $\alpha$ | $\sigma$ | native time | source |
|---|---|---|---|---|
| `CondOT` | $t$ | $1-(1-\sigma_{\min})t$ | $t$ | Lipman et al. 2022 |
| `VP` | $e^{-L(\tau)}$ | $\sqrt{1-\alpha^2}$ | $\tau$ | Song et al. 2021 |
| `SubVP` | $e^{-L(\tau)}$ | $1-\alpha^2$ | $\tau$ | Song et al. 2021 |
| `Cosine` | $\cos\theta(\tau)/\cos\theta(0)$ | $\sqrt{1-\alpha^2}$ | $\tau$ | Nichol & Dhariwal 2021 |
| `Trig` | $\sin(\pi t/2)$ | $\cos(\pi t/2)$ | angle from the data | Albergo & Vanden-Eijnden 2023 |
| `VE` | $1$ | $\sigma_{\max}(\sigma_{\min}/\sigma_{\max})^t$ | $\sigma$ | Song et al. 2021 |
| `EDM` | $1$ | $((1-t)\sigma_{\max}^{1/\rho}+t\sigma_{\min}^{1/\rho})^\rho$ | $\sigma$ | Karras et al. 2022 |
| `Discrete` | from a table $\bar\alpha_k$ | $\sqrt{1-\bar\alpha_k}$ | index $k$ | Ho et al. 2020 |

with $L(\tau) = \tfrac14(\beta_1-\beta_0)\tau^2 + \tfrac12\beta_0\tau$ and
$\theta(\tau) = \tfrac\pi2\,\frac{\tau+s}{1+s}$. The diffusion time $\tau$ runs from 1 (noise) to `tau_min` (data):
$\sigma \propto \sqrt\tau$ has no finite slope at $\tau = 0$, and no network is trained there.

Times are Python floats or tensors. One formula serves both, because `math` and `torch` share their function names; all
of it is float64. $\alpha$, $\sigma$ and their derivatives are finite on all of $[0, 1]$, and $\lambda$ saturates at
$\pm 708.4$, where $\alpha/\sigma$ leaves the range of float64, so that no difference of log-SNRs is ever NaN.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from flowsolve._batch import linear, saturating_log

__all__ = ["EDM", "VE", "VP", "CondOT", "Cosine", "Discrete", "Path", "Point", "SubVP", "Trig"]

T = TypeVar("T", float, Tensor)


class Point(NamedTuple):
    """Where a path is at one time: α, σ and their derivatives in flow time, as floats or as tensors of shape (B,)."""

    alpha: Any
    sigma: Any
    alpha_dot: Any
    sigma_dot: Any

    @property
    def log_snr(self) -> Any:
        """λ = log(α/σ), saturating at ±708.4."""
        return saturating_log(self.alpha) - saturating_log(self.sigma)

    @property
    def log_snr_dot(self) -> Any:
        """λ' = α̇/α − σ̇/σ; infinite (or a ZeroDivisionError for floats) where α or σ vanishes."""
        return self.alpha_dot / self.alpha - self.sigma_dot / self.sigma


class Path:
    """A Gaussian path x_t = α(t) z + σ(t) ε. A subclass gives its curve and the inverse of its log-SNR.

    All methods take flow time t in [0, 1] as a float (and return a float) or as a tensor of any shape (and return a
    float64 tensor of that shape on the same device).
    """

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        """(α, σ, α̇, σ̇) at t, with m the namespace (math or torch) whose functions suit t."""
        raise NotImplementedError

    def _time(self, log_snr: Any, m: Any) -> Any:
        """The inverse of λ strictly inside the path's range."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the state that sampling starts from at t = 0."""
        return 1.0

    @property
    def window(self) -> tuple[float, float]:
        """The flow times at which the network may be asked; beyond it a step uses the estimate at the window's edge."""
        return (0.0, 1.0)

    def at(self, t: float | Tensor) -> Point:
        """(α, σ, α̇, σ̇) at flow time t.

        Raises:
            ValueError: t lies outside [0, 1] (tensors are checked where that needs no wait for a device).
        """
        if isinstance(t, Tensor):
            t = t.to(torch.float64)
            if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
                worst = t[~((t >= 0) & (t <= 1))].flatten()[0].item()
                raise ValueError(_outside(worst))
            return Point(*self._curve(t, torch))
        t = float(t)
        if not 0.0 <= t <= 1.0:
            raise ValueError(_outside(t))
        return Point(*self._curve(t, math))

    def alpha(self, t: T) -> T:
        """α(t), the weight of the data."""
        return self.at(t).alpha  # type: ignore[no-any-return]

    def sigma(self, t: T) -> T:
        """σ(t), the weight of the noise."""
        return self.at(t).sigma  # type: ignore[no-any-return]

    def alpha_dot(self, t: T) -> T:
        """dα/dt."""
        return self.at(t).alpha_dot  # type: ignore[no-any-return]

    def sigma_dot(self, t: T) -> T:
        """dσ/dt."""
        return self.at(t).sigma_dot  # type: ignore[no-any-return]

    def log_snr(self, t: T) -> T:
        """λ(t) = log(α/σ), strictly increasing; saturates at ±708.4 where α or σ vanishes."""
        return self.at(t).log_snr  # type: ignore[no-any-return]

    def time(self, log_snr: T) -> T:
        """The flow time at which the path has the given log-SNR; values beyond the path's ends give 0 and 1 exactly."""
        lo, hi = self.log_snr(0.0), self.log_snr(1.0)
        if isinstance(log_snr, Tensor):
            lam = log_snr.to(torch.float64)
            t = self._time(lam.clamp(lo, hi), torch).clamp(0.0, 1.0)
            return torch.where(lam <= lo, 0.0, torch.where(lam >= hi, 1.0, t))
        lam = float(log_snr)
        if lam <= lo or lam >= hi:
            return 0.0 if lam <= lo else 1.0
        return min(max(float(self._time(lam, math)), 0.0), 1.0)

    def native_time(self, t: T) -> T:
        """The clock the network was trained with, at flow time t."""
        raise NotImplementedError

    def time_from_native(self, native: T) -> T:
        """The flow time of a native time; the inverse of `native_time`."""
        raise NotImplementedError

    def interpolate(self, data: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x_t = α(t) z + σ(t) ε for data and noise of shape (B, *S) and t a float or of shape (B,)."""
        point = self.at(t)
        return linear(point.alpha, data, point.sigma, noise)


def _outside(t: float) -> str:
    return (
        f"t = {t!r} is outside the path: flow time runs from noise at t = 0 to data at t = 1. "
        "If this is a network's own time, convert it with path.time_from_native(...)."
    )


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value!r}; expected a finite number > 0")


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

    def native_time(self, t: T) -> T:
        return t

    def time_from_native(self, native: T) -> T:
        return native


class _Diffusion(Path):
    """Paths told in diffusion time τ, which runs from 1 at the noise to tau_min at the data."""

    tau_min: float

    def native_time(self, t: T) -> T:
        return (1.0 - t) + self.tau_min * t

    def time_from_native(self, native: T) -> T:
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
        tau = self.native_time(t)
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
        return self.time_from_native(4.0 * decay / (self.beta_min + root))


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
        tau = self.native_time(t)
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

    def native_time(self, t: T) -> T:
        return 0.5 * math.pi * (1.0 - t)

    def time_from_native(self, native: T) -> T:
        return 1.0 - native * (2.0 / math.pi)


class _Exploding(Path):
    """Paths with α = 1: the noise grows and the data stands still. Native time: σ."""

    sigma_min: float
    sigma_max: float

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def native_time(self, t: T) -> T:
        return self.sigma(t)

    def time_from_native(self, native: T) -> T:
        log_snr: T = -saturating_log(native)
        return self.time(log_snr)

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


@dataclass(frozen=True)
class Discrete(Path):
    """The path of a discrete table ᾱ_0 > ᾱ_1 > … > ᾱ_{N−1}: exact at its entries, continuous in between.

    With `clean` (the default) the path ends in the data itself: entry k sits at t = 1 − (k+1)/N and t = 1 has ᾱ = 1,
    so N uniform steps visit every entry and end where DDPM ends. The network knows only the entries, hence the
    window [0, 1 − 1/N]. Without `clean` the path ends at entry 0.

    Between entries α/(α+σ), the clock of the straight chart, is linear in t: the one interpolation that is finite at
    both ends, also for tables with zero terminal SNR. Native time is the (fractional) index k.
    """

    alphas_cumprod: tuple[float, ...]
    clean: bool = True
    _nodes: tuple[list[float], list[float]] = field(init=False, repr=False, compare=False)
    _tensors: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __init__(self, alphas_cumprod: Iterable[float] | Tensor, clean: bool = True) -> None:
        if isinstance(alphas_cumprod, Tensor):
            alphas_cumprod = alphas_cumprod.detach().cpu().double().tolist()
        table = tuple(float(a) for a in alphas_cumprod)
        if len(table) < 2:
            raise ValueError(f"alphas_cumprod has {len(table)} entries; expected a 1-D table of at least 2")
        falling = all(x > y for x, y in pairwise(table))
        if not falling or not (table[0] < 1.0 and table[-1] >= 0.0):
            raise ValueError(
                f"alphas_cumprod runs from {table[0]:.6g} to {table[-1]:.6g}; expected values in [0, 1) that strictly "
                "decrease with the index (the noise grows). Pass the cumulative products, not the betas: "
                "Discrete.from_betas(betas) builds them."
            )
        roots = [(math.sqrt(a), math.sqrt(1.0 - a)) for a in ((1.0, *table) if clean else table)]
        nodes = ([a / (a + s) for a, s in roots], [s / (a + s) for a, s in roots])
        tensors = tuple(torch.tensor(n, dtype=torch.float64) for n in nodes)
        fields = {"alphas_cumprod": table, "clean": clean, "_nodes": nodes, "_tensors": tensors}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_betas(cls, betas: Iterable[float] | Tensor, clean: bool = True) -> Discrete:
        """The table ᾱ_k = Π_{j≤k} (1 − β_j) of Ho et al. 2020."""
        if isinstance(betas, Tensor):
            betas = betas.detach().cpu().double().tolist()
        table, product = [], 1.0
        for beta in betas:
            product *= 1.0 - float(beta)
            table.append(product)
        return cls(table, clean)

    @classmethod
    def linear(
        cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, clean: bool = True
    ) -> Discrete:
        """DDPM's table: betas linear from beta_start to beta_end (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), clean)

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"Discrete({len(self.alphas_cumprod)} entries, {first:.6g} … {last:.6g}, clean={self.clean})"

    @property
    def _intervals(self) -> int:
        return len(self._nodes[0]) - 1

    @property
    def window(self) -> tuple[float, float]:
        return (0.0, 1.0 - 1.0 / self._intervals) if self.clean else (0.0, 1.0)

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        n = self._intervals
        place = (1.0 - t) * n
        data, noise = self._table(t)
        i: Any = place.floor().clamp(0, n - 1).long() if m is torch else min(int(place), n - 1)
        w = place - i
        a, b = (1.0 - w) * data[i] + w * data[i + 1], (1.0 - w) * noise[i] + w * noise[i + 1]
        rate_a, rate_b = n * (data[i] - data[i + 1]), n * (noise[i] - noise[i + 1])
        norm = m.sqrt(a * a + b * b)
        twist = (rate_a * b - a * rate_b) / (norm * norm * norm)
        return a / norm, b / norm, b * twist, -a * twist

    def _time(self, log_snr: Any, m: Any) -> Any:
        share = 1.0 / (1.0 + m.exp(log_snr))  # σ/(α+σ), increasing with the index
        noise = self._table(log_snr)[1]
        last = self._intervals - 1
        i: Any
        if m is torch:
            i = (torch.searchsorted(noise, share.contiguous(), right=True) - 1).clamp(0, last)
        else:
            i = min(max(bisect_right(noise, share) - 1, 0), last)
        return 1.0 - (i + (share - noise[i]) / (noise[i + 1] - noise[i])) / self._intervals

    def _table(self, like: Any) -> tuple[Any, Any]:
        """α/(α+σ) and σ/(α+σ) at the nodes, as lists for a float and as tensors beside a tensor."""
        if not isinstance(like, Tensor):
            return self._nodes
        return self._tensors[0].to(like.device), self._tensors[1].to(like.device)

    def native_time(self, t: T) -> T:
        """The index k of the table: fractional between entries, exact at them, 0 beyond the last."""
        k: Any = (1.0 - t) * self._intervals - (1.0 if self.clean else 0.0)
        if isinstance(k, Tensor):
            k = torch.where((k - k.round()).abs() < 1e-9, k.round(), k).clamp_min(0.0)
        else:
            k = max(float(round(k)) if abs(k - round(k)) < 1e-9 else k, 0.0)
        return cast(T, k)

    def time_from_native(self, native: T) -> T:
        return 1.0 - (native + (1.0 if self.clean else 0.0)) / self._intervals
