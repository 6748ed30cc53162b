r"""Time densities: where on the path a loss looks. How much it counts there is a weight (`training.weights`).

A density is known by its quantile function and its pdf, both on the path's window of flow times. Draws are
$t = Q(u)$ with $u$ uniform on the *open* interval (0, 1): a path may be singular at its ends, which have
probability zero. `uniform(n)` and the other densities that know no path give the share of the window.

| density | law | source |
|---|---|---|
| `uniform` | $U(0, 1)$ | Lipman et al. 2022 |
| `logit_normal(m, s)` | $\mathrm{sigmoid}(N(m, s^2))$ | Esser et al. 2024 |
| `mode(s)` | $u + s\,\bigl(u - \sin^2\tfrac{\pi u}2\bigr)$, $u \sim U(0, 1)$ | Esser et al. 2024 |
| `cosmap` | pdf $\tfrac{2}{\pi}\,\big/\,(1-2t+2t^2)$ | Esser et al. 2024 |
| `log_normal(m, s)` | $\ln(\sigma/\alpha) \sim N(m, s^2)$, cut to the path | Karras et al. 2022 |
| `log_snr_uniform` | $\lambda \sim U$: $p(t) \propto g^2/\sigma^2 = 2\lambda'$ | Song et al. 2021 |
| `entries` | the entries of a discrete table, each alike | Ho et al. 2020 |
| `Learned()` | $p(t) \propto \sqrt{\mathbb E[L^2 \mid t]}$, from the losses seen | Nichol & Dhariwal 2021 |
| `even(density)` | $Q\bigl((u + i/n) \bmod 1\bigr)$, shuffled: each as before, jointly even | Kingma et al. 2021 |

(Esser et al. count $t$ from the data; here it runs to the data, so that their $m$ is $-m$ here; `mode` and `cosmap` are
symmetric. `stratified` is `even(uniform)`.) `even` leaves every expectation as it is and removes most of the variance
that comes from the times. A density changes what is learned only through its product with the weight; with
`Objective(importance=True)` it changes nothing but the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve.paths import Discrete, Path

__all__ = [
    "Density",
    "Drawn",
    "Learned",
    "UnitDensity",
    "cosmap",
    "entries",
    "even",
    "log_normal",
    "log_snr_uniform",
    "logit_normal",
    "mode",
    "stratified",
    "uniform",
]

HALF_ULP = 2.0**-54  # half the spacing of torch's float64 uniforms: what a drawn 0 is moved to
LAST_LOG_SNR = 700.0  # log-SNRs beyond it are saturated: the path ends in an infinite one


def _rand(n: int, generator: torch.Generator | None) -> Tensor:
    place = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(n, generator=generator, device=place, dtype=torch.float64).cpu()


def _even(n: int, generator: torch.Generator | None) -> Tensor:
    shift = _rand(1, generator)
    place = generator.device if generator is not None else torch.device("cpu")
    order = torch.randperm(n, generator=generator, device=place).cpu()
    return (shift + order.to(torch.float64) / max(n, 1)) % 1.0


def _open(u: Tensor) -> Tensor:
    return u.clamp(HALF_ULP, 1.0 - 2.0 * HALF_ULP)


def _share(t: Tensor, path: Path) -> Tensor:
    """Flow times as shares of the path's window."""
    first, last = path.window
    return (t.to(torch.float64) - first) / (last - first)


def _inside(share: Tensor, path: Path) -> Tensor:
    """Shares of the path's window as flow times, off its ends."""
    first, last = path.window
    return first + (last - first) * _open(share)


class Density:
    """A probability density of flow times on a path's window. A subclass gives its quantile function and its pdf."""

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        """The flow time below which a share u of the draws lies, float64, for u of any shape."""
        raise NotImplementedError

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        """The density per unit of flow time, float64, for t inside the path's window; it integrates to 1 there."""
        raise NotImplementedError

    def draw(self, n: int, path: Path, generator: torch.Generator | None = None) -> Tensor:
        """n flow times, shape (n,), float64 on the host."""
        return self.quantile(_open(_rand(n, generator)), path)


class UnitDensity(Density):
    """A density of the share of the window, the same for every path; called, it draws shares in (0, 1)."""

    def unit_quantile(self, u: Tensor) -> Tensor:
        """The share below which a share u of the draws lies."""
        raise NotImplementedError

    def unit_pdf(self, share: Tensor) -> Tensor:
        """The density per unit of share."""
        raise NotImplementedError

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        return _inside(self.unit_quantile(u), path)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        first, last = path.window
        return self.unit_pdf(_share(t, path)) / (last - first)

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n shares of the window in the open interval (0, 1), shape (n,), float64 on the host."""
        return _open(self.unit_quantile(_open(_rand(n, generator))))


@dataclass(frozen=True)
class _Uniform(UnitDensity):
    def unit_quantile(self, u: Tensor) -> Tensor:
        return u

    def unit_pdf(self, share: Tensor) -> Tensor:
        return torch.ones_like(share)


@dataclass(frozen=True)
class _LogitNormal(UnitDensity):
    mean: float
    std: float

    def unit_quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def unit_pdf(self, share: Tensor) -> Tensor:
        return _normal((share.logit() - self.mean) / self.std) / (self.std * share * (1.0 - share))


@dataclass(frozen=True)
class _Mode(UnitDensity):
    scale: float

    def unit_quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (u - torch.sin(0.5 * math.pi * u).square())

    def unit_pdf(self, share: Tensor) -> Tensor:
        low, high = torch.zeros_like(share), torch.ones_like(share)
        for _ in range(60):  # bisection: the slope may vanish in the middle, where Newton would stall
            middle = 0.5 * (low + high)
            below = self.unit_quantile(middle) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        u = 0.5 * (low + high)
        return 1.0 / (1.0 + self.scale * (1.0 - 0.5 * math.pi * torch.sin(math.pi * u)))


@dataclass(frozen=True)
class _CosMap(UnitDensity):
    def unit_quantile(self, u: Tensor) -> Tensor:
        data, noise = torch.sin(0.5 * math.pi * u), torch.sin(0.5 * math.pi * (1.0 - u))
        return data / (data + noise)

    def unit_pdf(self, share: Tensor) -> Tensor:
        return (2.0 / math.pi) / (1.0 - 2.0 * share + 2.0 * share.square())


@dataclass(frozen=True)
class _LogNormal(Density):
    mean: float
    std: float

    def _cut(self, path: Path) -> tuple[float, float]:
        """Φ at the ends of the path's window."""
        ends = torch.tensor([path.log_snr(t) for t in path.window], dtype=torch.float64)
        low, high = torch.special.ndtr((ends + self.mean) / self.std).tolist()
        if not high - low > 1e-6:
            raise ValueError(
                f"ln(σ/α) ~ N({self.mean:g}, {self.std:g}²) lies outside {path!r}, where it runs from "
                f"{-float(ends[0]):g} to {-float(ends[1]):g}; move the mean"
            )
        return low, high

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        low, high = self._cut(path)
        lam = self.std * torch.special.ndtri(_open(low + (high - low) * u)) - self.mean
        return _inside(_share(path.time(lam), path), path)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = self._cut(path)
        point = path.at(t)
        found: Tensor = _normal((point.log_snr + self.mean) / self.std) * point.log_snr_dot / (self.std * (high - low))
        return found


@dataclass(frozen=True)
class _LogSNRUniform(Density):
    low: float | None
    high: float | None

    def ends(self, path: Path) -> tuple[float, float]:
        """The log-SNRs between which they are uniform.

        Raises:
            ValueError: the path has infinite ones and no finite range was given.
        """
        own = [path.log_snr(t) for t in path.window]
        low = own[0] if self.low is None else max(own[0], self.low)
        high = own[1] if self.high is None else min(own[1], self.high)
        if abs(low) > LAST_LOG_SNR or abs(high) > LAST_LOG_SNR or not low < high:
            raise ValueError(
                f"log-SNRs from {low:g} to {high:g} on {path!r} have no uniform density; give a finite range, for "
                "example log_snr_uniform(low=-7.0, high=7.0)"
            )
        return low, high

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        low, high = self.ends(path)
        return _inside(_share(path.time(low + (high - low) * u), path), path)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = self.ends(path)
        point = path.at(t)
        lam = point.log_snr
        return torch.where((lam >= low) & (lam <= high), point.log_snr_dot / (high - low), 0.0)


@dataclass(frozen=True)
class _Entries(Density):
    def draw(self, n: int, path: Path, generator: torch.Generator | None = None) -> Tensor:
        return self.quantile(_open(_rand(n, generator)), path)

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        if not isinstance(path, Discrete):
            raise ValueError(
                f"{path!r} has no table whose entries could be drawn; expected a Discrete path, or uniform"
            )
        count = len(path.alphas_cumprod)
        index = count - 1 - (u * count).floor().clamp(0, count - 1)
        return torch.as_tensor(path.time_from_native(index))

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        raise ValueError("the entries of a table have probabilities, not a density; use uniform where one is needed")


@dataclass(frozen=True)
class _Even(Density):
    base: Density

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        return self.base.quantile(u, path)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        return self.base.pdf(t, path)

    def draw(self, n: int, path: Path, generator: torch.Generator | None = None) -> Tensor:
        return self.quantile(_open(_even(n, generator)), path)


@dataclass(frozen=True)
class _EvenUnit(_Even, UnitDensity):
    base: UnitDensity

    def unit_quantile(self, u: Tensor) -> Tensor:
        return self.base.unit_quantile(u)

    def unit_pdf(self, share: Tensor) -> Tensor:
        return self.base.unit_pdf(share)

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return _open(self.unit_quantile(_open(_even(n, generator))))


@dataclass(frozen=True)
class Drawn(Density):
    """A function of one's own as a density: draw(n, generator) gives n shares of the window, shape (n,).

    Args:
        function: draws the shares.
        unit_pdf: their pdf, a function of shares; needed for `importance=True` and for effective weights only.
    """

    function: Callable[[int, torch.Generator | None], Tensor]
    unit_pdf: Callable[[Tensor], Tensor] | None = None

    def draw(self, n: int, path: Path, generator: torch.Generator | None = None) -> Tensor:
        first, last = path.window
        return first + (last - first) * self.function(n, generator).to("cpu", torch.float64)

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        raise ValueError("a density that is a function that draws has no quantiles; it cannot be drawn evenly")

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        if self.unit_pdf is None:
            raise ValueError("a density that is a function that draws has no pdf; give Drawn(function, unit_pdf=...)")
        first, last = path.window
        return self.unit_pdf(_share(t, path)) / (last - first)


class Learned(UnitDensity):
    """The density under which the importance-weighted loss varies least, learned from the losses of past steps.

    The variance of L/p is least for p(t) ∝ √E[L² | t] (Nichol & Dhariwal 2021). E[L²] is averaged in bins of the
    window; until every bin has been seen, times are uniform. Use it with `Objective(importance=True)`, which then has
    the expectation of uniform times.

    Args:
        bins: K, bins of equal width.
        floor: the share of uniform times that is always mixed in; bounds 1/p.
        memory: about how many past losses a bin remembers.

    Raises:
        ValueError: bins < 1, floor outside (0, 1], or memory < 1.
    """

    def __init__(self, bins: int = 64, floor: float = 0.1, memory: float = 200.0) -> None:
        if bins < 1 or not 0.0 < floor <= 1.0 or not memory >= 1.0:
            raise ValueError(f"bins = {bins}, floor = {floor}, memory = {memory}; expected >= 1, in (0, 1], and >= 1")
        self.bins, self.floor, self.memory = bins, floor, memory
        self.count = torch.zeros(bins, dtype=torch.float64)
        self.square = torch.zeros(bins, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"Learned(bins={self.bins}, floor={self.floor:g}, memory={self.memory:g})"

    @property
    def probabilities(self) -> Tensor:
        """The probability of each bin, shape (K,)."""
        root = self.square.sqrt()
        if bool((self.count == 0).any()) or not float(root.sum()) > 0.0:
            return torch.full((self.bins,), 1.0 / self.bins, dtype=torch.float64)
        return self.floor / self.bins + (1.0 - self.floor) * root / root.sum()

    def update(self, t: Tensor, loss: Tensor, path: Path) -> None:
        """Learn from a batch: flow times and losses (weighted, before division by the pdf), each of shape (B,)."""
        where = self._bin(_share(t, path))
        count = torch.zeros_like(self.count).index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
        total = torch.zeros_like(self.square).index_add_(0, where, loss.detach().cpu().double().square())
        seen = count > 0
        # a running mean until the memory is full, an exponential one from then on
        rate = torch.maximum(count / (self.count + count).clamp_min(1.0), (count / self.memory).clamp_max(1.0))
        mean = total / count.clamp_min(1.0)
        self.square = torch.where(seen, self.square + rate * (mean - self.square), self.square)
        self.count = self.count + count

    def _bin(self, share: Tensor) -> Tensor:
        return (share * self.bins).long().clamp(0, self.bins - 1)

    def unit_quantile(self, u: Tensor) -> Tensor:
        edges = torch.cat((torch.zeros(1, dtype=torch.float64), self.probabilities.cumsum(0)))
        edges = edges / edges[-1]
        k = (torch.searchsorted(edges, u.contiguous(), right=True) - 1).clamp(0, self.bins - 1)
        return (k + (u - edges[k]) / (edges[k + 1] - edges[k])) / self.bins

    def unit_pdf(self, share: Tensor) -> Tensor:
        return self.bins * self.probabilities[self._bin(share)]

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        return {"count": self.count.clone(), "square": self.square.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.count, self.square = state["count"].clone(), state["square"].clone()


def even(density: Density = _Uniform()) -> Density:
    """The same density, drawn with low discrepancy: one time in each of n parts of equal probability, shuffled."""
    return _EvenUnit(density) if isinstance(density, UnitDensity) else _Even(density)


uniform = _Uniform()
"""Times uniform on the window; `uniform(n, generator)` draws n numbers in (0, 1)."""

stratified = _EvenUnit(uniform)
"""`even(uniform)`: one time in every interval of length 1/n (up to a common shift), in random order."""

cosmap = _CosMap()
"""Times whose log-SNR on the straight path is spread as the cosine schedule spreads it (Esser et al. 2024)."""

entries = _Entries()
"""The entries of a `Discrete` table, each with the same probability: DDPM's times (Ho et al. 2020)."""


def logit_normal(mean: float = 0.0, std: float = 1.0) -> UnitDensity:
    """The density of sigmoid(mean + std·N(0, 1)): more times in the middle; mean > 0 leans towards the data.

    Raises:
        ValueError: std is not > 0.
    """
    _positive(std=std)
    return _LogitNormal(float(mean), float(std))


def mode(scale: float = 1.29) -> UnitDensity:
    """SD3's density with heavy tails: scale > 0 favours the middle, < 0 the ends; 0 is uniform (Esser et al. 2024).

    Raises:
        ValueError: scale outside [−1, 2/(π − 2)], where the map from uniform numbers is no longer monotonic.
    """
    if not -1.0 <= scale <= 2.0 / (math.pi - 2.0):
        raise ValueError(f"scale = {scale!r}; expected -1 <= scale <= 2/(π − 2) = 1.7519")
    return _Mode(float(scale))


def log_normal(mean: float = -1.2, std: float = 1.2) -> Density:
    """EDM's noise levels: ln(σ/α) = −λ ~ N(mean, std²), cut to the path's own range (Karras et al. 2022).

    Raises:
        ValueError: std is not > 0; when drawn, the path has hardly any of it.
    """
    _positive(std=std)
    return _LogNormal(float(mean), float(std))


def log_snr_uniform(low: float | None = None, high: float | None = None) -> Density:
    """λ uniform: p(t) ∝ λ'(t) = g²/(2σ²), importance sampling for the likelihood weight (Song et al. 2021).

    Args:
        low: lowest λ; by default the path's own, which must then be finite.
        high: highest λ, likewise.
    """
    return _LogSNRUniform(low, high)


def _normal(v: Tensor) -> Tensor:
    return torch.exp(-0.5 * v.square()) / math.sqrt(2.0 * math.pi)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value!r}; expected a number > 0")
