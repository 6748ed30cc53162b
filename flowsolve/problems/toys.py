r"""Two-dimensional toys: hard edges, curved supports and separate modes, with their densities where known.

* `checkerboard`: uniform on the 8 cells of a 4×4 board of side $4c$ on which
  $\lfloor x_1/c\rfloor + \lfloor x_2/c\rfloor$ is even. The density is $1/(8c^2)$, the entropy $\log 8c^2$;
  on the usual board $[-4, 4]^2$ ($c = 2$) no model can have a negative log-likelihood below $\log 32 = 3.466$
  nats.
* `eight_gaussians`: a `GaussianMixture` on a circle.
* `moons`: two half circles, $(\cos\theta, \sin\theta)$ and $(1-\cos\theta, \tfrac12-\sin\theta)$ with
  $\theta$ uniform on $[0, \pi]$, plus Gaussian noise.

Samples are functions of (n, seed), drawn in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsolve.problems.mixture import GaussianMixture

__all__ = ["Checkerboard", "Moons", "checkerboard", "eight_gaussians", "moons"]


def _uniform(n: int, columns: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, columns), generator=generator, dtype=torch.float64, device="cpu"), generator


@dataclass(frozen=True)
class Checkerboard:
    """The uniform density on the even cells of a 4×4 board, cells of side `scale`, centred at the origin."""

    scale: float = 2.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale = {self.scale!r}; expected a number > 0")

    @property
    def entropy(self) -> float:
        """log(8·scale²) nats: the lowest negative log-likelihood a model can have."""
        return math.log(8.0 * self.scale**2)

    def sample(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """n independent points, shape (n, 2)."""
        u, _ = _uniform(n, 3, seed)
        first = 4.0 * u[:, 0] - 2.0
        # in an even column the cells of x₂ start at −2 and 0, in an odd one at −1 and 1
        second = u[:, 1] - 2.0 * (u[:, 2] < 0.5) + first.floor() % 2.0
        return (self.scale * torch.stack((first, second), 1)).to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of x of shape (B, 2), shape (B,); −inf off the board."""
        cell = (x / self.scale).floor()
        inside = (cell.sum(1) % 2 == 0) & (cell >= -2).all(1) & (cell < 2).all(1)
        return x.new_full((len(x),), -self.entropy).masked_fill(~inside, -math.inf)


@dataclass(frozen=True)
class Moons:
    """Two interleaving half circles of radius 1 with Gaussian noise of standard deviation `noise`."""

    noise: float = 0.05

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise ValueError(f"noise = {self.noise!r}; expected a number >= 0")

    @property
    def mean(self) -> tuple[float, float]:
        """E[x] = (1/2, 1/4)."""
        return (0.5, 0.25)

    def sample(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """n independent points, shape (n, 2)."""
        u, generator = _uniform(n, 2, seed)
        theta, lower = math.pi * u[:, 0], u[:, 1] < 0.5
        first = torch.where(lower, 1.0 - theta.cos(), theta.cos())
        second = torch.where(lower, 0.5 - theta.sin(), theta.sin())
        noise = torch.randn((n, 2), generator=generator, dtype=torch.float64, device="cpu")
        return (torch.stack((first, second), 1) + self.noise * noise).to(dtype)


def checkerboard(scale: float = 2.0) -> Checkerboard:
    """The checkerboard on [−2·scale, 2·scale]²."""
    return Checkerboard(scale)


def moons(noise: float = 0.05) -> Moons:
    """The two moons."""
    return Moons(noise)


def eight_gaussians(radius: float = 4.0, std: float = 0.3, dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """Eight equal Gaussians, evenly spaced on a circle."""
    angle = torch.arange(8, dtype=torch.float64, device="cpu") * (math.pi / 4.0)
    return GaussianMixture(radius * torch.stack((angle.cos(), angle.sin()), 1), std, dtype=dtype)
