r"""Bits per dimension of integer images.

An image of D integers $k \in \{0, …, L-1\}^D$ has the probability mass that the model's density puts on its cell,

$$ P(k) = \int_{[0,1)^D} p\bigl(x(k+u)\bigr)\,\Bigl(\frac{hi-lo}{L}\Bigr)^{D} du,
   \qquad x(k+u) = lo + (hi-lo)\,\frac{k+u}{L}, $$

where $[lo, hi]$ is the flow's declared `data_range`. Uniform dequantisation draws $u$ and, by Jensen's inequality,
bounds $-\log P(k)$ from above; with K draws the importance-weighted bound is
$-\log\frac1K\sum_j p(x(k+u_j))(\cdot)^D$ (Burda et al. 2016), the $-\log K$ included. In bits and per dimension, one
draw gives

$$ \text{bpd} = -\frac{\log_2 p(x)}{D} - \log_2\frac{hi-lo}{L}. $$

The offset follows from the data range and the number of levels; there is no other constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.likelihood.log_prob import log_prob
from flowsolve.noise import DEQUANTIZE, Noise
from flowsolve.solvers.base import Solver

__all__ = ["BitsPerDim", "bits_per_dim"]


@dataclass(frozen=True)
class BitsPerDim:
    """Bits per dimension of a batch of images.

    Attributes:
        bpd: of each image, float64 of shape (B,).
        mean: over the images.
        stderr: standard error of the mean over the images; it contains the spread of the images, of the
            dequantisation and of the trace probes. NaN for a single image.
        nfe: network evaluations each image cost, int64 of shape (B,).
    """

    bpd: Tensor
    mean: float
    stderr: float
    nfe: Tensor

    def __str__(self) -> str:
        nfe = float(self.nfe.double().mean())
        return f"{self.mean:.4f} ± {self.stderr:.4f} bits/dim ({len(self.bpd)} images, {nfe:.1f} NFE)"


def bits_per_dim(
    flow: Flow,
    images: Tensor,
    *,
    solver: Solver,
    bits: int | None = None,
    levels: int | None = None,
    dequantize: str = "uniform",
    importance: int = 1,
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of integer images: an upper bound on the model's negative log-probability.

    Args:
        flow: the flow; its data_range says where the integers 0 … levels−1 lie.
        images: integers of shape (B, *S), of any integer dtype.
        solver: a Runge–Kutta solver.
        bits: bit depth; the images take 2**bits levels. By default 8.
        levels: number of levels instead, if it is not a power of two.
        dequantize: "uniform".
        importance: draws K of the importance-weighted bound; K solves a call. More than one needs trace="exact": the
            exponential of an unbiased estimate of log p is not an unbiased estimate of p.
        seed: key of the dequantisation and of the trace probes.
        samples: the global numbers of the images, by default 0 … B−1.
        **options: passed to `flowsolve.log_prob` (trace, probes, nfe, grid, chart, cond, progress, …).

    Returns:
        A `BitsPerDim`.

    Raises:
        TypeError: images that are not integers.
        ValueError: images outside the levels, or bad options.
    """
    if bits is not None and levels is not None:
        raise TypeError(f"bits = {bits} and levels = {levels} both say how many levels there are; give one")
    levels = 2 ** (8 if bits is None else bits) if levels is None else levels
    _check(images, levels, dequantize, importance)
    if importance > 1 and options.get("trace") != "exact":
        raise ValueError(
            f"importance = {importance} averages densities, and an estimated trace makes that average too large; "
            "set trace='exact', or importance=1"
        )
    noise = Noise.for_batch(seed, images.shape[0], samples)
    lo, hi = flow.data_range
    size = math.prod(images.shape[1:])
    device = images.device
    draws, nfe = [], torch.zeros(images.shape[0], dtype=torch.int64)
    for k in range(importance):
        u = noise.uniform(DEQUANTIZE, k, torch.empty(images.shape, dtype=torch.float32, device=device))
        x = lo + (hi - lo) / levels * (images.float() + u)
        out = log_prob(flow, x, solver=solver, seed=seed + k, samples=noise.samples, **options)
        draws.append(out.log_prob.detach().double().cpu())
        nfe = nfe + out.nfe
    nats = torch.logsumexp(torch.stack(draws), 0) - math.log(importance)
    bpd = -nats / (size * math.log(2.0)) - math.log2((hi - lo) / levels)
    stderr = float(bpd.std() / math.sqrt(len(bpd))) if len(bpd) > 1 else math.nan
    return BitsPerDim(bpd, float(bpd.mean()), stderr, nfe)


def _check(images: Tensor, levels: int, dequantize: str, importance: int) -> None:
    if not isinstance(images, Tensor) or images.is_floating_point() or images.dtype == torch.bool:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images are {got}; expected integers 0 … {levels - 1}. Scaled or dequantised images have a density, not a "
            "probability: give the integers, and the flow's data_range says where they lie"
        )
    if levels < 2:
        raise ValueError(f"levels = {levels}; expected at least 2")
    if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < levels:
        raise ValueError(
            f"images run from {int(images.min())} to {int(images.max())}; expected 0 … {levels - 1} (set bits= or "
            "levels= to what the images have)"
        )
    if dequantize != "uniform":
        raise ValueError(f"dequantize = {dequantize!r} is not known; expected 'uniform'")
    if not isinstance(importance, int) or importance < 1:
        raise ValueError(f"importance = {importance!r}; expected an integer of at least 1 draw")
