r"""The variational bound: log-likelihood bounded from below by a regression error, without a solve.

Let the generative process start from $N(0, s_0^2)$, with $s_0$ the path's prior_std, and follow the reverse-time SDE
($\eta = 1$) with the network's estimates from the first time $t_0$ of the path to $t_1$; let $q$ be the noising of a
data point $z$, $x_t = \alpha z + \sigma\varepsilon$. With $\lambda = \log\alpha/\sigma$ (so that SNR $= e^{2\lambda}$),
Girsanov's theorem gives the divergence of the two processes (Song et al. 2021b; Kingma et al. 2021)

$$ \mathrm{KL}(z) = \underbrace{\tfrac12\Bigl[\frac{\alpha_0^2\|z\|^2}{s_0^2} + D\Bigl(\frac{\sigma_0^2}{s_0^2} - 1 -
   \log\frac{\sigma_0^2}{s_0^2}\Bigr)\Bigr]}_{\text{prior}}
   + \underbrace{\mathbb E_\varepsilon\int_{\lambda_0}^{\lambda_1}\|\varepsilon-\hat\varepsilon\|^2\,d\lambda}_{
   \text{diffusion}}, \qquad
   \|\varepsilon-\hat\varepsilon\|^2 d\lambda = \tfrac12\|z-\hat z\|^2\,d\,e^{2\lambda}, $$

for any path and any prediction: $\hat\varepsilon$ is all that is read. (With $\lambda$ the logarithm of the SNR itself
the integral has a factor ½.) What is left is the end of the data, where $x_1/\alpha_1 = z + s\varepsilon$ with
$s = \sigma_1/\alpha_1$.

**Continuous data.** The decoder $N(z;\,x_1/\alpha_1,\,s^2)$ costs exactly $\frac D2\log 2\pi e s^2$, and

$$ \text{bound}(z) = -\mathrm{KL}(z) - \tfrac D2\log 2\pi e s^2 \ \le\ \log p_{\text{dec}}(z), \qquad
   p_{\text{dec}} = \hat p * N(0, s^2), $$

where $\hat p$ is the density of $x_1/\alpha_1$ under the model. The same number is a bound without a decoder, of the
noised point: $\text{bound}(z) \le \mathbb E_\varepsilon\log\hat p(z+s\varepsilon)$, since $\mathrm{KL}(z) \ge
\mathrm{KL}(q(x_1|z)\,\|\,p_1)$. There it is an **equality** for the exact network with the exact prior; with
$p$ the density of data, $\hat p = p * N(0, s^2)$ then, and as $\lambda_1$ grows the bound rises to $\log p(z)$, from
which it differs by $O(s^2)$. Averaged over data it lies below: noise only adds entropy.

**Integers.** With $z = T(k+\tfrac12)$, the middle of the cell, and the decoder that knows the levels (Kingma et al.
2021),

$$ P(k\mid x_1) = \prod_i \frac{N(x_{1,i};\,\alpha_1 z_i,\,\sigma_1^2)}{\sum_l N(x_{1,i};\,\alpha_1 T_i(l+\tfrac12),\,
   \sigma_1^2)}, \qquad \log P(k) \ge -\mathrm{KL}(z) + \mathbb E\log P(k\mid x_1). $$

Or the integers are dequantised, $z = T(k+u)$, and bound$(z) + \log|\det T'| - \log q(u\mid k)$ bounds the probability
that $p_{\text{dec}}$ gives the cell.

**Of which model.** The bound is on the likelihood of the *SDE* with $\eta = 1$. The ODE that `log_prob` reads has the
same marginals only where the network is the exact conditional expectation; for a trained one either may be larger, and
the bound holds for the first. It is a cross-check on `log_prob`, not a bound on it.

**Times** are those of `flowsolve.likelihood.bound_times`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve._arguments import check_flow, state
from flowsolve._batch import rows
from flowsolve._surroundings import refuse
from flowsolve.conditioning import settled
from flowsolve.flow import Flow
from flowsolve.likelihood.bits import level_count
from flowsolve.likelihood.bound_times import BoundTimes
from flowsolve.likelihood.decoders import Decoder, Density, Dequantized, Levels
from flowsolve.likelihood.dequantize import Dequantizer, declared, filled, readable, resolve
from flowsolve.noise import BOUND, Noise
from flowsolve.transforms import Transform

__all__ = ["VariationalBound", "variational_bound"]


@dataclass(frozen=True)
class VariationalBound:
    """Lower bounds on log-likelihoods, one entry a sample.

    Attributes:
        bound: on log p(x), or on log P(k) of integers, nats, float64 of shape (B,).
        bpd: −bound/(D ln 2), shape (B,); of continuous data it is relative to a volume of 1.
        mean: of bpd over the samples.
        stderr: standard error of `mean` over the samples, their own spread included. NaN for one.
        draw_stderr: standard error of bpd over the draws, shape (B,); NaN with a single draw.
        mean_draw_stderr: standard error of `mean` from the draws alone, as if samples had nothing in common; times that
            are even over the batch too make the error smaller as a rule.
        prior: divergence of the noised data from the prior, nats, shape (B,).
        diffusion: the integral, nats, shape (B,).
        data: the rest, the cost of the data's end: decoder, dequantisation and log-determinant, nats, shape (B,).
            bound = −(prior + diffusion + data).
        nfe: network evaluations of each sample, int64 of shape (B,).
        interval: flow times (from data, to noise).
    """

    bound: Tensor
    bpd: Tensor
    mean: float
    stderr: float
    draw_stderr: Tensor
    mean_draw_stderr: float
    prior: Tensor
    diffusion: Tensor
    data: Tensor
    nfe: Tensor
    interval: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.stderr:.4f} bits/dim, variational ({len(self.bpd)} samples)"


def variational_bound(
    flow: Flow,
    x: Tensor,
    *,
    draws: int = 16,
    dequantize: str | Dequantizer = "levels",
    bits: int | None = None,
    levels: int | None = None,
    times: str = "importance",
    low_discrepancy: bool = True,
    data_std: float | None = None,
    interval: tuple[float, float] | None = None,
    prior_std: float | None = None,
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> VariationalBound:
    """The continuous-time variational bound of the SDE with η = 1, in nats and bits per dimension.

    Args:
        flow: the flow.
        x: integer images of shape (B, *S), or continuous data z as the flow models them (floating).
        draws: network evaluations a sample: 1 or an even number.
        dequantize: for integers: "levels" (the decoder that knows them), or as for `flowsolve.bits_per_dim`.
        bits: bit depth of integers, as for `flowsolve.bits_per_dim`.
        levels: number of levels of integers instead.
        times: "importance" (λ distributed as the integrand of Gaussian data) or "uniform" (uniform in λ, which must be
            finite at the noise end).
        low_discrepancy: even times, as above; else independent ones.
        data_std: √v of "importance", by default a quarter of the data's range. It has no effect but on the variance.
        interval: flow times (from data, to noise). By default from the end of the network's window, or the last time
            before it at which the noise fills a cell (integers) or is e⁻⁷ of data_std (continuous data), to 0.
        prior_std: standard deviation of the state at interval[1]; the path's by default, needed where that is not 0.
        seed: key of times, noise and dequantisation.
        samples: the global numbers of the samples, by default 0 … B−1.
        cond: passed to the network.
        dtype: of the states of integers; continuous data keep theirs.

    Returns:
        A `VariationalBound`.

    Raises:
        TypeError: x that is neither integers nor floating.
        ValueError: integers outside the levels, data that are not finite, bad times or options.

    Examples:
        >>> mixture = fs.problems.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], std=0.3, dtype=torch.float64)
        >>> x = mixture.sample(400, seed=0)
        >>> out = fs.variational_bound(mixture.flow(fs.paths.CondOT()), x)
        >>> gap = (mixture.log_prob(x) - out.bound).mean() / (2 * 0.6931)  # bits per dimension
        >>> abs(float(gap)) < 2 * out.mean_draw_stderr
        True
    """
    check_flow(flow, cond)
    refuse("variational_bound, whose result has no derivatives,", "use log_prob(…, grad=True)")
    _check(draws, times)
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor of integers, or of floating continuous data")
    transform, count, size = None, 0, math.prod(x.shape[1:])
    if not x.is_floating_point():
        transform, count = declared(flow), level_count(flow, bits, levels)
        x = readable(x, count)
    else:
        x = _continuous(state(x), bits, levels, dequantize)
    v = _variance(flow, data_std)
    start, end = interval or (_edge(flow, transform, count, x, v), 0.0)
    _check_interval(flow, start, end, prior_std)
    noise = Noise.for_batch(seed, len(x), samples)
    clock = BoundTimes(flow.path, (start, end), v if times == "importance" else None, draws, low_discrepancy, noise)
    s0 = flow.path.prior_std if prior_std is None else prior_std
    s = math.exp(-flow.path.log_snr(start))
    if transform is None:
        decoder: Decoder = Density(x, s)
    elif dequantize == "levels":
        decoder = Levels(transform, count, x, s, dtype)
    else:
        decoder = Dequantized(transform, count, x, s, dtype, resolve(dequantize, flow, start, transform, count), noise)
    totals, given = [], settled(cond, len(x))
    for draw in range(draws):
        z, cost = decoder.data(draw)
        eps = noise.normal(BOUND, 2 * draw, z)
        with torch.no_grad():
            diffusion = clock.rate(draw) * _miss(flow, z, eps, clock.times(draw), given)
        parts = _prior(flow, end, s0, z), diffusion, cost(eps)
        totals.append(torch.stack([p.cpu().double() for p in parts]))
    return _summary(torch.stack(totals), size, draws * flow.nfe_per_call, low_discrepancy, (start, end))


def _miss(flow: Flow, z: Tensor, eps: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """‖ε − ε̂‖² of each sample at its own time, float64 of shape (B,) on the host."""
    estimate = flow.estimate(flow.path.interpolate(z, eps, t), t, **cond)
    return rows(eps.to(estimate.x) - estimate.noise).square().sum(1).cpu().double()


def _prior(flow: Flow, end: float, std: float, z: Tensor) -> Tensor:
    """KL(q(x₀|z) ‖ N(0, std²)), shape (B,)."""
    point, wide = flow.path.at(end), rows(z).to(_wide(z))
    ratio = float((point.sigma / std) ** 2)
    kept: Tensor = wide.square().sum(1) * float((point.alpha / std) ** 2)
    return 0.5 * (kept + wide.shape[1] * (ratio - 1.0 - math.log(ratio)))


def _summary(
    parts: Tensor, size: int, nfe: int, low_discrepancy: bool, interval: tuple[float, float]
) -> VariationalBound:
    """The figures of (draws, 3, B) parts in nats."""
    draws, _, count = parts.shape
    unit, each = size * math.log(2.0), parts.sum(1) / (size * math.log(2.0))
    if draws == 1:
        error = torch.full_like(each[0], math.nan)
    elif low_discrepancy:  # half the squared difference of a pair is the variance of one of the two
        error = (each[::2] - each[1::2]).square().sum(0).sqrt() / draws
    else:
        error = each.std(0) / math.sqrt(draws)
    prior, diffusion, data = parts.mean(0)
    bpd = each.mean(0)
    return VariationalBound(
        bound=-unit * bpd,
        bpd=bpd,
        mean=float(bpd.mean()),
        stderr=float(bpd.std() / math.sqrt(count)) if count > 1 else math.nan,
        draw_stderr=error,
        mean_draw_stderr=float(error.square().sum().sqrt()) / count,
        prior=prior,
        diffusion=diffusion,
        data=data,
        nfe=torch.full((count,), nfe, dtype=torch.int64, device="cpu"),
        interval=interval,
    )


def _edge(flow: Flow, transform: Transform | None, count: int, x: Tensor, v: float) -> float:
    """The default end at the data."""
    if transform is not None:
        return filled(flow, transform, count, tuple(x.shape[1:]))
    return min(flow.path.window[1], flow.path.time(7.0 - 0.5 * math.log(v)))


def _variance(flow: Flow, data_std: float | None) -> float:
    if data_std is None:
        low, high = flow.transform.ends()
        data_std = 0.25 * (high - low) if math.isfinite(high - low) else 1.0
    if not (math.isfinite(data_std) and data_std > 0):
        raise ValueError(f"data_std = {data_std!r}; expected a finite number > 0")
    return data_std**2


def _continuous(x: Tensor, bits: int | None, levels: int | None, dequantize: str | Dequantizer) -> Tensor:
    if bits is not None or levels is not None or dequantize != "levels":
        raise TypeError("bits=, levels= and dequantize= are for integer images; these are floating and have a density")
    if not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, *S) with at least one sample")
    if not bool(x.isfinite().all()):
        bad = (~rows(x.isfinite()).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"x is not finite in samples {bad[:5]}")
    return x


def _check(draws: int, times: str) -> None:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1 or (draws > 1 and draws % 2):
        raise ValueError(f"draws = {draws!r}; expected 1 or an even number: they come in pairs")
    if times not in ("importance", "uniform"):
        raise ValueError(f"times = {times!r} is not known; expected 'importance' or 'uniform'")


def _check_interval(flow: Flow, start: float, end: float, prior_std: float | None) -> None:
    if not 0.0 <= end < start <= flow.path.window[1]:
        raise ValueError(
            f"interval = {(start, end)!r}; expected times that fall from data to noise, within the network's window "
            f"[0, {flow.path.window[1]:g}]"
        )
    if flow.path.sigma(start) == 0.0:
        raise ValueError(
            f"at t = {start:g} the path has no noise, and the bound's integral has no end; end it before, with "
            f"interval=({flow.path.time(7.0):.6g}, {end:g}) for example"
        )
    if end != 0.0 and prior_std is None:
        raise ValueError(f"the interval ends at t = {end:g}, where the state is not the prior's; give prior_std=")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
