"""Probabilities of integer images under a Gaussian mixture of states, by its distribution functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowsolve.problems import GaussianMixture
from flowsolve.transforms import Range, Transform


def log_mass(mixture: GaussianMixture, k: Tensor, transform: Transform = Range(), levels: int | None = None) -> Tensor:  # noqa: B008
    """log P(k), shape (B,): of each component, a product of differences of normal distribution functions."""
    edges = torch.stack([transform.forward(v.double(), levels) for v in (k, k + 1)])
    parts = []
    for mean, std in zip(mixture.means.double(), mixture.std.double(), strict=True):
        a, b = ((edges - mean) / std).sort(dim=0).values
        sign = torch.where(a + b > 0, -1.0, 1.0)  # in the lower tail, where differences keep their digits
        tail = torch.special.ndtr(torch.where(sign > 0, b, -a)) - torch.special.ndtr(torch.where(sign > 0, a, -b))
        parts.append(tail.log().flatten(1).sum(1))
    return torch.logsumexp(torch.stack(parts, 1) + mixture.weights.double().log(), 1)


def bits(nats: Tensor, k: Tensor) -> Tensor:
    """Bits per dimension of log-probabilities in nats."""
    return -nats / (k[0].numel() * math.log(2.0))


def blurred(mixture: GaussianMixture, std: float) -> GaussianMixture:
    """The mixture of x + std·ε."""
    spread = (mixture.std.square() + std**2).sqrt().expand_as(mixture.means)
    return GaussianMixture(mixture.means, spread, mixture.weights)
