r"""What a variational bound adds at the data's end, where $x_1/\alpha_1 = z + s\varepsilon$: the cost of z given x₁.

| decoder | of | cost, nats |
|---|---|---|
| `Density` | continuous z | $\frac D2\log 2\pi e s^2$: that of $N(z; x_1/\alpha_1, s^2)$, in expectation and exactly |
| `Dequantized` | integers, $z = T(k+u)$ | the same, $+\log q(u\mid k) - \log\lvert\det T'\rvert$ |
| `Levels` | integers, $z = T(k+\frac12)$ | $\sum_i\log\sum_l e^{g_l\varepsilon_i - g_l^2/2}$ |

where $s\,g_l$ is the way from the middle of level $k_i$ to that of $l$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve.likelihood.dequantize import Dequantizer, placed
from flowsolve.noise import Noise
from flowsolve.transforms import Transform

__all__ = ["Decoder", "Density", "Dequantized", "Levels"]

REACH = 24.0  # levels further away than so many standard deviations of the noise are not taken for one another

Cost = Callable[[Tensor], Tensor]


class Decoder(Protocol):
    """The data's end of a bound."""

    def data(self, draw: int) -> tuple[Tensor, Cost]:
        """z of a draw, shape (B, *S), and its cost in nats, shape (B,), as a function of the noise ε of x₁."""
        ...


@dataclass(frozen=True)
class Density:
    """Continuous data z, shape (B, *S), under noise of standard deviation s."""

    z: Tensor
    s: float

    def data(self, draw: int) -> tuple[Tensor, Cost]:
        """A `Decoder`'s data."""
        return self.z, lambda eps: torch.full(
            (len(eps),), gaussian_cost(self.z, self.s), dtype=torch.float64, device="cpu"
        )


@dataclass(frozen=True)
class Dequantized:
    """Integers k of so many levels, shape (B, *S), placed in their cells."""

    transform: Transform
    count: int
    k: Tensor
    s: float
    dtype: torch.dtype
    dequantizer: Dequantizer
    noise: Noise

    def data(self, draw: int) -> tuple[Tensor, Cost]:
        """A `Decoder`'s data."""
        v, log_q = placed(self.dequantizer, self.k, self.noise, draw)
        cost = log_q - self.transform.log_det(v, self.count) + gaussian_cost(v, self.s)
        return self.transform.forward(v, self.count).to(self.dtype), lambda eps: cost


class Levels:
    """Integers k of so many levels, shape (B, *S), in the middle of their cells; see `Dequantized`."""

    def __init__(self, transform: Transform, count: int, k: Tensor, s: float, dtype: torch.dtype) -> None:
        self.transform, self.count, self.s, self.dtype = transform, count, s, dtype
        self.middle = k.to(torch.float32 if k.device.type == "mps" else torch.float64) + 0.5
        self.z = self._at(self.middle)
        least, last = math.inf, self._at(torch.full_like(self.z[:1], 0.5))
        for level in range(1, count):
            last, before = self._at(torch.full_like(self.z[:1], level + 0.5)), last
            least = min(least, float((last - before).abs().min()))
        self.near = min(count - 1, math.ceil(REACH * s / least))

    def data(self, draw: int) -> tuple[Tensor, Cost]:
        """A `Decoder`'s data."""
        return self.z.to(self.dtype), self._cost

    def _at(self, v: Tensor) -> Tensor:
        return self.transform.forward(v, self.count)

    def _cost(self, eps: Tensor) -> Tensor:
        noise, total = eps.to(self.z), torch.zeros_like(self.z)
        for step in (*range(-self.near, 0), *range(1, self.near + 1)):
            other = self.middle + step
            there = (other > 0) & (other < self.count)
            gap = (self._at(other.clamp(0.5, self.count - 0.5)) - self.z) / self.s
            total = torch.logaddexp(total, torch.where(there, gap * (noise - 0.5 * gap), -math.inf))
        return rows(total).sum(1)


def gaussian_cost(z: Tensor, s: float) -> float:
    """−E log N(z; z + sε, s²) = (D/2) log 2πe s²."""
    return 0.5 * rows(z).shape[1] * math.log(2.0 * math.pi * math.e * s * s)
