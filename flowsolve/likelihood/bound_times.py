r"""Times for the variational bound: where its integral over the log-SNR is read.

The integral is an average over $\lambda \sim \pi$ of $\|\varepsilon-\hat\varepsilon\|^2/\pi(\lambda)$. For
Gaussian data of variance $v$ the integrand is $\propto ve^{2\lambda}/(1+ve^{2\lambda})$; this is $\pi$ ("importance"),
whose distribution function $\log(1+ve^{2\lambda})$ is inverted in closed form. It reaches down to $\lambda = -\infty$,
so a path that starts in pure noise is not cut. The draws of a sample come in pairs, one pair to each of m = draws/2
equal slices of the distribution, at $(j + \{U + i\varphi\})/m$ with one uniform number U for each slice and member, i
the sample's number and φ the golden ratio: independent in a sample, even over a batch. So a batch has the small
variance of VDM's low-discrepancy times, a sample is the same in any batch, and half the mean square difference within
pairs is an *unbiased* estimate of the variance of its bound.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flowsolve.noise import BOUND, Noise
from flowsolve.paths import Path

__all__ = ["BoundTimes"]

GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴/φ: multiples of it, cut to 64 bits, are {i φ} exactly


class BoundTimes:
    """The times of a batch's draws, and what they weigh.

    Args:
        path: the path.
        interval: flow times (from data, to noise).
        v: the variance of the Gaussian data whose integrand is followed; None for times uniform in λ.
        draws: how many there are.
        even: low-discrepancy times; else independent ones.
        noise: the noise of the samples.
    """

    def __init__(
        self, path: Path, interval: tuple[float, float], v: float | None, draws: int, even: bool, noise: Noise
    ) -> None:
        self.path, self.noise, self.even, self.draws = path, noise, even, draws
        self.log_v = None if v is None else math.log(v)
        hi, lo = (path.log_snr(t) for t in interval)
        if self.log_v is None and lo < -700.0:
            raise ValueError(
                f"times = 'uniform' in log-SNR, which is −∞ at t = {interval[1]:g} of {path!r}; use times='importance'"
            )
        self.lo, self.hi = (w if self.log_v is None else _softplus(2.0 * w + self.log_v) for w in (lo, hi))
        self.first = Noise.of(noise.seed, [0])
        numbers = noise.samples.numpy().astype(np.uint64) * np.uint64(GOLDEN)
        self.turns = torch.from_numpy((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def place(self, draw: int) -> Tensor:
        """Uniform numbers in (0, 1), one a sample, float64 of shape (B,) on the host."""
        if not self.even:
            return self.noise.uniform(
                BOUND, 2 * draw + 1, torch.empty(len(self.turns), 1, dtype=torch.float64, device="cpu")
            )[:, 0]
        slices, j = max(1, self.draws // 2), draw // 2
        common = self.first.uniform(BOUND, 2 * draw + 1, torch.empty(1, 1, dtype=torch.float64, device="cpu"))
        within = ((common[0] + self.turns) % 1.0).clamp(2.0**-54, 1.0 - 2.0**-53)
        return (j + within) / slices

    def coordinate(self, draw: int) -> Tensor:
        """Y = log(1 + v e^(2λ)), or λ: what is uniform."""
        return self.lo + (self.hi - self.lo) * self.place(draw)

    def times(self, draw: int) -> Tensor:
        """Flow times, shape (B,)."""
        y = self.coordinate(draw)
        log_snr = y if self.log_v is None else 0.5 * (y + torch.log(-torch.expm1(-y)) - self.log_v)
        return self.path.time(log_snr)

    def rate(self, draw: int) -> Tensor:
        """1/π(λ), shape (B,)."""
        span = self.hi - self.lo
        if self.log_v is None:
            return torch.full((len(self.turns),), span, dtype=torch.float64, device="cpu")
        return 0.5 * span / -torch.expm1(-self.coordinate(draw))


def _softplus(w: float) -> float:
    """log(1 + e^w)."""
    return w + math.log1p(math.exp(-w)) if w > 0 else math.log1p(math.exp(w))
