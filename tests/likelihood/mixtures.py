"""Mixtures whose likelihood is known, of the sizes that the tests run through, and the flows of a full covariance."""

from __future__ import annotations

import math

import torch

import flowsolve as fs
from flowsolve.paths import Path
from flowsolve.problems import GaussianMixture


def mixture(*shape: int, seed: int = 1) -> GaussianMixture:
    """Four components around N(0, 1) draws, of spreads 0.3 to 0.6."""
    means = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return GaussianMixture(means, [0.3, 0.4, 0.5, 0.6], [0.4, 0.3, 0.2, 0.1])


MIXTURES = {"D=2": mixture(2), "D=16": mixture(16), "D=64": mixture(64), "images": mixture(2, 3, 3)}


def at_data(case: GaussianMixture, path: Path, count: int, t: float | None = None, seed: int = 2):
    """States x_t of the mixture at the data end of a path's window, and their log-density."""
    point = path.at(path.window[1] if t is None else t)
    z = case.sample(count, seed=seed)
    x = point.alpha * z + point.sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).to(z)
    return x, case.log_prob(x, point)


def at_noise(case: GaussianMixture, path: Path, t: float = 0.0):
    """The exact prior: the density of x_t."""
    return lambda y: case.log_prob(y, path.at(t))


def bits(error: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """An error in nats as bits per dimension."""
    return error / (x[0].numel() * math.log(2.0))


class Turned:
    """A Gaussian of standard deviations s along the columns of a random orthogonal matrix."""

    def __init__(self, std: torch.Tensor, seed: int = 0) -> None:
        draw = torch.randn(len(std), len(std), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.axes = torch.linalg.qr(draw)[0]
        self.plain = GaussianMixture(torch.zeros(1, len(std), dtype=torch.float64), std[None])

    def sample(self, count: int, seed: int = 0) -> torch.Tensor:
        return self.plain.sample(count, seed=seed) @ self.axes.T

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain.log_prob(x @ self.axes)

    def flow(self, path: Path) -> fs.Flow:
        inner = self.plain.flow(path)
        return fs.Flow(lambda x, t: inner.net(x @ self.axes, t) @ self.axes.T, path)
