r"""Bits per dimension of integer images.

The model of data is what the flow holds at the start $t_1$ of the likelihood's interval, with the path's scale taken
out: $\hat p(z) = \alpha_1^D\,p_{t_1}(\alpha_1 z)$, where $p_{t_1}$ is the density of `flowsolve.log_prob`. By default
$t_1$ is the end of the network's window. An image $k$ has the probability that $\hat p$ gives its cell, and draws
$z = T(k+u)$, $u \sim q$, bound it (`flowsolve.transforms`, `flowsolve.likelihood.dequantize`):

$$ \text{bpd} = -\frac{1}{D\ln 2}\,\log\frac1K\sum_{j=1}^{K} w_j \ \text{ on average}\ \ge -\frac{\log_2 P(k)}{D},
   \qquad \log w = \log p_{t_1}(\alpha_1 z) + D\log\alpha_1 + \log|\det T'| - \log q(u\mid k) . $$

With uniform dequantisation, one draw and a range $[lo, hi]$ of L levels that is $-\log_2 p(x)/D - \log_2\frac{hi -
lo}{L}$. The offset is the transform's log-determinant; there is no other constant.

**Errors.** An image's figure is random through its dequantisation and its trace probes, and the mean over images
through the choice of images too. Each has its own standard error in `BitsPerDim`; the solver's error is no random one
and stands apart.

**Estimated traces.** $e^{\log p + e}$ with $\mathbb E\,e = 0$ is too large on average, so an average of estimated
densities is no bound, however many draws it has: `importance` > 1 needs the exact trace. An average of estimated
*logarithms* is one: `draws` works with any trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve._surroundings import refuse
from flowsolve.flow import Flow
from flowsolve.likelihood.dequantize import Dequantizer, declared, filled, placed, readable, resolve
from flowsolve.likelihood.log_prob import log_prob
from flowsolve.likelihood.trace import Exact
from flowsolve.noise import Noise
from flowsolve.solvers.base import Solver

__all__ = ["BitsPerDim", "bits_per_dim"]

STRIDE = 0x9E3779B97F4A7C15  # between the seeds of the probes of successive draws: far from any that a user counts


@dataclass(frozen=True)
class BitsPerDim:
    """Bits per dimension of a batch of images.

    Attributes:
        bpd: of each image, float64 of shape (B,).
        mean: over the images.
        stderr: standard error of the mean over the images; it contains the spread of the images, of the
            dequantisation and of the trace probes. NaN for a single image.
        nfe: network evaluations each image cost, all draws together, int64 of shape (B,).
        probe_stderr: standard error of `bpd` that the trace probes leave, shape (B,): 0 with the exact trace, NaN with
            a single probe, which cannot tell.
        draw_stderr: standard error of `bpd` over the draws, of dequantisation and probes together, shape (B,): from
            `draws` bounds, or from the K of a single importance-weighted one, by the delta method; NaN from one of one.
        dequantization_stderr: the part of `draw_stderr` that is not `probe_stderr`, shape (B,).
        mean_draw_stderr: standard error of `mean` from the draws alone, which another seed would show on the same
            images. The spread of the images is the rest of `stderr`.
        solver_error: the solver's own estimate of its error in `bpd`, shape (B,), NaN where it gives none. No part of
            the others.
        interval: flow times of the likelihood (from data, to noise).
    """

    bpd: Tensor
    mean: float
    stderr: float
    nfe: Tensor
    probe_stderr: Tensor
    draw_stderr: Tensor
    dequantization_stderr: Tensor
    mean_draw_stderr: float
    solver_error: Tensor
    interval: tuple[float, float]

    def __str__(self) -> str:
        nfe = float(self.nfe.double().mean())
        return f"{self.mean:.4f} ± {self.stderr:.4f} bits/dim ({len(self.bpd)} images, {nfe:.1f} NFE)"


def bits_per_dim(
    flow: Flow,
    images: Tensor,
    *,
    solver: Solver | str | None = None,
    bits: int | None = None,
    levels: int | None = None,
    dequantize: str | Dequantizer = "uniform",
    importance: int = 1,
    draws: int = 1,
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    interval: tuple[float, float] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of integer images: an upper bound on the model's negative log-probability.

    Args:
        flow: the flow; its transform says where the integers 0 … levels−1 lie.
        images: integers of shape (B, *S), of any integer dtype.
        solver: a solver for `flowsolve.log_prob`, by default its own choice.
        bits: bit depth; the images take 2**bits levels. By default what the transform fixes, else 8.
        levels: number of levels instead, if it is not a power of two.
        dequantize: "uniform"; "truncated_normal", matched to the path's noise where the interval starts; or an object
            with sample(images, noise, draw) -> (u, log_q), such as a `FlowDequantizer`.
        importance: draws K of the importance-weighted bound; K solves. More than one needs trace="exact": the
            exponential of an unbiased estimate of log p is not an unbiased estimate of p.
        draws: independent bounds that are averaged, with any trace; two or more give standard errors of the draws.
        seed: key of the dequantisation and of the trace probes.
        samples: the global numbers of the images, by default 0 … B−1.
        interval: flow times of the likelihood (from data, to noise). By default it starts at the end of the network's
            window; with the truncated normal at the last time before at which the noise fills a cell (three of its
            standard deviations are at most half the middle level's width).
        dtype: of the states.
        **options: passed to `flowsolve.log_prob` (trace, probes, nfe, grid, chart, cond, progress, …).

    Returns:
        A `BitsPerDim`.

    Raises:
        TypeError: images that are not integers.
        ValueError: images outside the levels, none at all, a flow of codes, or bad options.

    Warns:
        UserWarning: the images use few of the levels, as images of another bit depth do.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[0.0, 0.0]], std=0.3).flow(fs.paths.CondOT())
        >>> images = torch.tensor([[100, 140], [255, 0]])
        >>> out = fs.bits_per_dim(flow, images, solver=fs.solvers.Dopri5(1e-6, 1e-6), trace="exact")
        >>> [round(float(b), 1) for b in out.bpd]
        [6.8, 14.5]
    """
    transform, count = declared(flow), level_count(flow, bits, levels)
    k = readable(images, count)
    _check(dequantize, importance, draws, options)
    refuse("bits_per_dim, whose result has no derivatives,", "use log_prob(…, grad=True)")
    if interval is None and dequantize == "truncated_normal":
        interval = (filled(flow, transform, count, tuple(k.shape[1:])), 0.0)
    start, end = interval or (flow.path.window[1], 0.0)
    dequantizer = resolve(dequantize, flow, start, transform, count)
    noise = Noise.for_batch(seed, len(k), samples)
    options |= {name: value for name, value in (("solver", solver), ("interval", interval)) if value is not None}

    alpha, size = flow.path.alpha(start), math.prod(k.shape[1:])
    weights, probes, errors, nfe = [], [], [], torch.zeros(len(k), dtype=torch.int64, device="cpu")
    for draw in range(draws * importance):
        v, log_q = placed(dequantizer, k, noise, draw)
        x = (alpha * transform.forward(v, count)).to(dtype)
        if not bool(x.isfinite().all()):
            raise ValueError(f"{transform!r} maps images to states that are not finite; keep it away from its ends")
        out = log_prob(flow, x, seed=seed + draw * STRIDE, samples=noise.samples, **options)
        options["verify"] = False  # once is enough
        offset = size * math.log(alpha) + transform.log_det(v, count) - log_q
        weights.append(out.log_prob.detach().cpu().double() + offset.cpu().double())
        probes.append(out.stderr.cpu().double())
        errors.append(out.error.detach().cpu().double())
        nfe = nfe + out.nfe
    return _summary(
        torch.stack(weights).reshape(draws, importance, -1),
        torch.stack(probes).square().sum(0).sqrt() / len(weights),
        torch.stack(errors).mean(0),
        nfe, size * math.log(2.0), (start, end),
    )  # fmt: skip


def level_count(flow: Flow, bits: int | None, levels: int | None) -> int:
    """L, from what the caller and the transform say."""
    if bits is not None and levels is not None:
        raise TypeError(f"bits = {bits} and levels = {levels} both say how many levels there are; give one")
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16):
        raise ValueError(f"bits = {bits!r}; expected an integer from 1 to 16")
    return declared(flow).count(levels if bits is None else 2**bits)


def _check(dequantize: str | Dequantizer, importance: int, draws: int, options: dict[str, Any]) -> None:
    for name, n in (("importance", importance), ("draws", draws)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} = {n!r}; expected an integer of at least 1")
    trace = options.get("trace")
    if importance > 1 and trace != "exact" and not isinstance(trace, Exact):
        raise ValueError(
            f"importance = {importance} averages densities, and an estimated trace makes that average too large; "
            "set trace='exact', or importance=1 and draws="
        )
    if importance > 1 and not getattr(dequantize, "exact", True):
        raise ValueError(
            f"importance = {importance} averages densities, and the dequantiser only estimates its own; give it "
            "trace='exact', or set importance=1"
        )


def _summary(
    weights: Tensor, probe: Tensor, error: Tensor, nfe: Tensor, unit: float, interval: tuple[float, float]
) -> BitsPerDim:
    """The figures of (draws, K, B) log-weights; `unit` nats make one bit per dimension."""
    draws, importance, images = weights.shape
    nats = torch.logsumexp(weights, 1) - math.log(importance)
    if draws > 1:
        over_draws = nats.std(0) / math.sqrt(draws)
    elif importance > 1:  # of log mean w: std(w)/(mean(w) √K)
        weight = (weights[0] - nats).exp()
        over_draws = weight.std(0) / math.sqrt(importance)
    else:
        over_draws = torch.full_like(nats[0], math.nan)
    bpd = -nats.mean(0) / unit
    return BitsPerDim(
        bpd=bpd,
        mean=float(bpd.mean()),
        stderr=float(bpd.std() / math.sqrt(images)) if images > 1 else math.nan,
        nfe=nfe,
        probe_stderr=probe / unit,
        draw_stderr=over_draws / unit,
        dequantization_stderr=(over_draws.square() - probe.square()).clamp_min(0.0).sqrt() / unit,
        mean_draw_stderr=float(over_draws.square().sum().sqrt()) / (images * unit),
        solver_error=error / unit,
        interval=interval,
    )
