r"""Flows whose samplers are compared: Gaussian mixtures with the spectrum of images, and the digits checkpoints.

**Mixtures.** Twelve components in D = 2, 64 and 3072 dimensions. Means have norm ½√D: coordinates of data in [−1, 1].
In 64 and 3072 dimensions means and spreads fall off along the coordinates as those of images do along frequencies, so
that the clusters are pancakes: three times as wide along the first coordinates as along the last (0.03 to 0.3). Spreads
in the plane are 0.05 to 0.3. Each is taken on DDPM's table of 1,000 entries, where the network predicts ε, and on the
straight path, where it predicts the velocity. `Mixture` computes what `flowsolve.problems.GaussianMixture` does (there
is a test) by matrix products.

**Truth** is one state for all: the probability-flow ODE from the common noise to the end of the window of times that
the network knows (entry 0 of a table, t = 1 on the straight path), in float64 for mixtures, and there ẑ. On the
straight path ẑ at t = 1 is the state itself. On a table nobody may ask beyond entry 0, σ/α = 0.01, so all samplers
here return an estimate ẑ of the data, taken at entry 0 or before (or, ours in the clock of their form, extrapolate to
σ = 0 from there), and the exact solution with its last estimate at entry 0 is what all of them tend to. Who asks last
at an earlier entry ("trailing", or ours where that is better) pays with the error it makes there and has one evaluation
more for the rest. It is computed twice, the second time with half the evaluations; their distance is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters, paths, solvers
from flowsolve.flow import Flow
from flowsolve.kernels import rms
from flowsolve.predictions import resolve

__all__ = ["PROBLEMS", "Mixture", "Problem", "sliced_wasserstein", "truth"]

COMPONENTS = 12
SEED = 0


class Mixture:
    """A mixture of Gaussians with diagonal covariances, estimates by matrix products.

    Args:
        means: μ, float64 of shape (K, D).
        std: s, of shape (K, D).
        weights: w, of shape (K,), of sum 1.
    """

    def __init__(self, means: Tensor, std: Tensor, weights: Tensor) -> None:
        self.means, self.variance, self.weights = means, std.square(), weights

    def estimate(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """E[z | x] and E[ε | x] for x of shape (B, D)."""
        variance = alpha**2 * self.variance + sigma**2
        precision = 1.0 / variance
        pulled = self.means * precision
        exponent = x.square() @ precision.T - 2.0 * alpha * (x @ pulled.T)
        exponent += (alpha**2 * (self.means * pulled).sum(1)) + variance.log().sum(1)
        share = (self.weights.log() - 0.5 * exponent).softmax(1)
        gain = self.variance * precision
        data = share @ (self.means - alpha**2 * gain * self.means) + alpha * x * (share @ gain)
        noise = sigma * (x * (share @ precision) - alpha * (share @ pulled))
        return data, noise

    def sample(self, n: int, seed: int) -> Tensor:
        """n independent points, shape (n, D)."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        normal = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.variance[which].sqrt() * normal

    def flow(self, path: fs.paths.Path, prediction: str) -> Flow:
        """The flow of the exact network."""
        made = resolve(prediction)

        def net(x: Tensor, t: Tensor) -> Tensor:
            point = path.at(float(t.flatten()[0]))
            a, b, scale = made.row(point)
            data, noise = self.estimate(x, point.alpha, point.sigma)
            return (a / scale) * data + (b / scale) * noise

        return Flow(net, path, prediction)


def mixture(dimension: int) -> Mixture:
    """The mixture in so many dimensions."""
    generator = torch.Generator().manual_seed(dimension)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    place = torch.arange(dimension, dtype=torch.float64)
    fall = 1.0 / (1.0 + place / max(1.0, dimension / 50.0)) if dimension > 2 else torch.ones(dimension).double()
    means = normal(COMPONENTS, dimension) * fall
    means *= 0.5 * math.sqrt(dimension) / means.norm(dim=1, keepdim=True)
    size = 0.05 * 6.0 ** uniform(COMPONENTS, 1)
    if dimension > 2:
        size = (
            (0.15 + 0.15 * uniform(COMPONENTS, 1)) * fall.clamp_min(0.1).sqrt() * (0.7 + 0.3 * uniform(COMPONENTS, 1))
        )
    weights = 0.5 + uniform(COMPONENTS)
    return Mixture(means, size.expand(COMPONENTS, dimension).contiguous(), weights / weights.sum())


@dataclass(frozen=True)
class Problem:
    """A flow and the noise that all solvers start from.

    Attributes:
        flow: the flow.
        start: shape (B, *S), in the dtype of the solve.
        evaluations: of the reference.
        exact: (n, seed) → independent samples of the data, shape (n, D).
        dear: whether evaluations take so long that there are fewer budgets.
        peak: the range of the data, for the PSNR.
    """

    flow: Flow
    start: Tensor
    evaluations: int
    exact: Callable[[int, int], Tensor]
    dear: bool = False
    peak: float = 2.0


def _mixture(dimension: int, path: fs.paths.Path, prediction: str, batch: int, evaluations: int = 2048) -> Problem:
    found = mixture(dimension)
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(batch, dimension, generator=generator, dtype=torch.float64)
    return Problem(found.flow(path, prediction), start, evaluations, found.sample, dear=dimension > 1000)


def _digits(name: str, batch: int, evaluations: int = 2048) -> Problem:
    flow = adapters.load(adapters.bundled(name))
    start = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))
    return Problem(flow, start, evaluations, _train, dear=True)


def _train(n: int, seed: int) -> Tensor:
    """Different digits of the training set."""
    images = fs.problems.digits.load("train").images
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:n]]
    return fs.problems.digits.dequantize(chosen, generator).flatten(1).double()


TABLE = paths.Discrete.linear(1000)
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mixture 2, table": partial(_mixture, 2, TABLE, "noise", 512),
    "mixture 2, straight": partial(_mixture, 2, paths.CondOT(), "velocity", 512),
    "mixture 64, table": partial(_mixture, 64, TABLE, "noise", 256),
    "mixture 64, straight": partial(_mixture, 64, paths.CondOT(), "velocity", 256),
    "mixture 3072, table": partial(_mixture, 3072, TABLE, "noise", 16),
    "mixture 3072, straight": partial(_mixture, 3072, paths.CondOT(), "velocity", 16),
    "digits-ddpm": partial(_digits, "digits-ddpm", 16),
    "digits-condot": partial(_digits, "digits-condot", 16),
}


def truth(problem: Problem) -> tuple[Tensor, dict[str, Any]]:
    """The converged end point, and what is known of its error."""
    budgets = (problem.evaluations, problem.evaluations // 2)
    found = [fs.sample(problem.flow, start=problem.start, solver=solvers.RK4(), nfe=n, grid=FINE).x for n in budgets]
    gap = rms((found[0] - found[1]).double()) / rms(found[0].double())
    facts = {"nfe": problem.evaluations, "median": float(gap.median()), "largest": float(gap.max())}
    return found[0], facts


class _Fine:
    """Equal steps of the mean of flow time and tanh(λ/5).

    Flow time resolves the ripple of networks whose time enters by a sinusoidal embedding; λ the data end.
    """

    def times(self, path: fs.paths.Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        t = torch.linspace(start, end, 8 * steps + 1, dtype=torch.float64)
        clock = (t + torch.tanh(0.2 * path.log_snr(t).clamp(-100.0, 100.0))).numpy()
        wanted = np.linspace(clock[0], clock[-1], steps + 1)[1:-1]
        return [start, *np.interp(wanted, clock, t.numpy()).tolist(), end]


FINE = _Fine()


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 128, seed: int = 0) -> float:
    """Root mean square over random directions of the 2-Wasserstein distance of two clouds, (N, D) and (M, D)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64)
    w /= w.norm(dim=0)
    levels = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    a, b = ((v.double() @ w).quantile(levels, dim=0) for v in (x, y))
    return float((a - b).square().mean().sqrt())
