r"""Traces of a network's Jacobian, from the graph of the very call that gave its value.

For the output $o(x)$ of one forward pass, a vector–Jacobian product $v^\top \partial o/\partial x$ costs one backward
pass over the same graph. From these:

* **exact**: $\operatorname{tr} J = \sum_i e_i^\top J e_i$, one product for each of the D numbers of a sample;
* **Hutchinson** (1990): $\operatorname{tr} J = \mathbb E\, v^\top J v$ for random signs $v$. Its variance,
  $2\,(\|A\|_F^2 - \sum_i A_{ii}^2)$ with $A$ the symmetric part of $J$, is the least among independent probes; the
  diagonal, and with it every multiple of the identity, is exact.

The probes of a sample are fixed for a whole solve, so that the integrand stays a smooth function of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve.noise import PROBE, Noise

__all__ = ["Exact", "Hutchinson", "Trace", "resolve"]


class Trace:
    """An estimator of tr ∂o/∂x for each sample; `count` estimates of it at once."""

    count: int

    def draw(self, x: Tensor, noise: Noise) -> Tensor | None:
        """The probes of the samples of x, (B, count, *S); None if it needs none."""
        raise NotImplementedError

    def __call__(self, output: Tensor, x: Tensor, probes: Tensor | None, graph: bool) -> Tensor:
        """(B, count) estimates from an output's graph and the samples' probes; graph keeps derivatives."""
        raise NotImplementedError

    def stderr(self, totals: Tensor) -> Tensor:
        """Standard error of the mean of (B, count) estimates: NaN for a single one, which cannot tell."""
        if self.count == 1:
            return torch.full_like(totals[:, 0], math.nan)
        return totals.std(1) / math.sqrt(self.count)


class Exact(Trace):
    """The sum of the diagonal, by one product for each of the D numbers of a sample."""

    count = 1

    def draw(self, x: Tensor, noise: Noise) -> Tensor | None:
        """Nothing."""
        return None

    def __call__(self, output: Tensor, x: Tensor, probes: Tensor | None, graph: bool) -> Tensor:
        """The trace, (B, 1)."""
        total = x.new_zeros(x.shape[0])
        for i in range(math.prod(x.shape[1:])):
            vector = x.new_zeros(x.shape)  # contiguous whatever x is, so that its rows are a view
            rows(vector)[:, i] = 1.0
            total = total + rows(_product(output, x, vector, graph))[:, i]
        return total.unsqueeze(1)

    def stderr(self, totals: Tensor) -> Tensor:
        """None: 0."""
        return torch.zeros_like(totals[:, 0])


@dataclass(frozen=True)
class Hutchinson(Trace):
    """vᵀJv for fixed probes.

    Attributes:
        count: the number of probes a sample has.
    """

    count: int = 1

    def draw(self, x: Tensor, noise: Noise) -> Tensor | None:
        """Random signs."""
        return torch.stack([noise.rademacher(PROBE, k, x) for k in range(self.count)], 1)

    def __call__(self, output: Tensor, x: Tensor, probes: Tensor | None, graph: bool) -> Tensor:
        """One estimate a probe, (B, count)."""
        if probes is None:
            raise ValueError("Hutchinson's estimator needs probes")
        return torch.stack([rows(v * _product(output, x, v, graph)).sum(1) for v in probes.unbind(1)], 1)


def _product(output: Tensor, x: Tensor, vector: Tensor, graph: bool) -> Tensor:
    """vᵀ ∂o/∂x, one backward pass. (Products batched by vmap fail on ordinary convolutional networks.)"""
    product = None
    if output.requires_grad:
        (product,) = torch.autograd.grad(output, x, vector, retain_graph=True, create_graph=graph, allow_unused=True)
    if product is None:
        raise ValueError(
            "the network's output does not depend on x for autograd, so its divergence cannot be read; remove "
            "no_grad, inference_mode, detach or NumPy from the network's forward pass"
        )
    return product


def resolve(trace: str, probes: int) -> Trace:
    """The estimator of a name."""
    if trace == "exact":
        return Exact()
    if trace != "hutchinson":
        raise ValueError(f"trace = {trace!r} is not known; expected 'hutchinson' or 'exact'")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes = {probes!r}; expected an integer >= 1")
    return Hutchinson(probes)
