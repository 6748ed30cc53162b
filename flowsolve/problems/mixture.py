r"""Gaussian mixtures: the one family of data for which every quantity of every Gaussian path is known.

Let $z \sim \sum_k w_k\,N(\mu_k, s_k^2)$ and $x = \alpha z + \sigma\varepsilon$. Then $x$ is a mixture too,
with means $\alpha\mu_k$ and variances $v_k = \alpha^2 s_k^2 + \sigma^2$, and with the responsibilities
$r_k(x) = w_k N(x; \alpha\mu_k, v_k) / \sum_j w_j N(x; \alpha\mu_j, v_j)$ and the pulls
$q_k = (x - \alpha\mu_k)/v_k$

$$ \mathbb E[z \mid x] = \sum_k r_k\,(\mu_k + \alpha s_k^2 q_k), \qquad
   \mathbb E[\varepsilon \mid x] = \sigma \sum_k r_k\,q_k, \qquad
   \nabla\log p(x) = -\sum_k r_k\,q_k , $$

and, with $m_k = \mu_k + \alpha s_k^2 q_k$, from $\nabla r_k = r_k\,(\bar q - q_k)$, $\bar q = \sum_j r_j q_j$,

$$ \operatorname{tr}\frac{\partial\,\mathbb E[z\mid x]}{\partial x} =
   \sum_k r_k \Bigl(\sum_i \frac{\alpha s_{k,i}^2}{v_{k,i}} + m_k\cdot(\bar q - q_k)\Bigr) . $$

Nothing divides by $\alpha$ or $\sigma$, so all of it holds at both ends: at $\alpha = 0$ the responsibilities
are the weights, at $\sigma = 0$ the data estimate is $x/\alpha$. (Conditioning of Gaussians: Bishop 2006,
§2.3.)

States have any event shape S. The spread is isotropic or diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowsolve._batch import hosted, linear, per_sample, state_dtype
from flowsolve.flow import Flow
from flowsolve.paths import Path, Point
from flowsolve.predictions import Prediction, resolve

__all__ = ["DATA", "Exact", "GaussianMixture"]

DATA = Point(1.0, 0.0, 0.0, 0.0)  # where x is the data itself


class GaussianMixture:
    """A mixture of Gaussians with isotropic or diagonal covariances, and its exact flow along any path.

    Args:
        means: μ, shape (K, *S).
        std: s, a number, shape (K,), or (K, *S).
        weights: w, shape (K,), positive, normalised here; equal by default.
        dtype: of samples and moments; by default that of means. Estimates are computed in the dtype of x.

    Raises:
        ValueError: shapes that do not match, or std or weights not > 0.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Any],
        std: float | Tensor | Sequence[Any],
        weights: Tensor | Sequence[float] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        means = hosted(means)
        if dtype is None:
            dtype = means.dtype if means.dtype.is_floating_point else torch.get_default_dtype()
        if means.ndim < 2 or not len(means):
            raise ValueError(f"means has shape {tuple(means.shape)}; expected (K, *S) with K >= 1 components")
        k = len(means)
        spread = torch.as_tensor(std, device=means.device).to(dtype)
        if spread.ndim == 0 or spread.shape == (k,):
            spread = spread.expand(k).reshape(k, *[1] * (means.ndim - 1))
        elif spread.shape != means.shape:
            raise ValueError(f"std has shape {tuple(spread.shape)}; expected a number, ({k},) or {tuple(means.shape)}")
        share = torch.ones(k, device="cpu") if weights is None else hosted(weights)
        share = share.to(device=means.device, dtype=dtype)
        if share.shape != (k,):
            raise ValueError(f"weights has shape {tuple(share.shape)}; expected ({k},)")
        if not (bool((spread > 0).all()) and bool((share > 0).all())):
            raise ValueError("std and weights must be > 0")
        self.means = means.to(dtype)
        self.std = spread
        self.weights = share / share.sum()

    def __repr__(self) -> str:
        return f"GaussianMixture({len(self.means)} components, event shape {tuple(self.means.shape[1:])})"

    @property
    def mean(self) -> Tensor:
        """E[z], shape S."""
        return torch.tensordot(self.weights, self.means, dims=1)  # type: ignore[no-any-return]

    @property
    def cov(self) -> Tensor:
        """Covariance of the flattened state, shape (D, D)."""
        off = (self.means - self.mean).flatten(1)
        within = self.weights @ self.std.square().expand_as(self.means).flatten(1)
        return torch.einsum("k,ki,kj->ij", self.weights, off, off) + torch.diag(within)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n independent points, shape (n, *S); the same for every dtype and device up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        steps = self.weights.double().cumsum(0).cpu()
        which = torch.searchsorted(steps, u, right=True).clamp_max(len(steps) - 1).to(self.means.device)
        normal = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=torch.float64, device="cpu")
        return self.means[which] + self.std[which] * normal.to(self.means)

    def marginal(self, path: Path, t: float) -> GaussianMixture:
        """The mixture that x_t = α z + σ ε follows, as one of its own."""
        point = path.at(float(t))
        std = (point.alpha**2 * self.std.square() + point.sigma**2).sqrt().expand_as(self.means)
        return GaussianMixture(point.alpha * self.means, std, self.weights)

    def log_prob(self, x: Tensor, point: Point = DATA) -> Tensor:
        """Log-density in nats of x of shape (B, *S), shape (B,); at a point of a path, that of x_t."""
        return self._pulls(x, point)[0].logsumexp(1)

    def data(self, x: Tensor, point: Point) -> Tensor:
        """E[z | x] at a point of a path (`path.at(t)`, t a float or of shape (B,)), shape (B, *S)."""
        return self._estimate(x, point)[0]

    def noise(self, x: Tensor, point: Point) -> Tensor:
        """E[ε | x] at a point of a path, shape (B, *S)."""
        return self.combine(x, point, 0.0, 1.0)

    def score(self, x: Tensor, point: Point) -> Tensor:
        """∇ log p_t(x) at a point of a path, shape (B, *S); finite at σ = 0 too."""
        return -self._estimate(x, point)[1]

    def velocity(self, x: Tensor, point: Point) -> Tensor:
        """u = α̇ E[z | x] + σ̇ E[ε | x] at a point of a path, shape (B, *S)."""
        return self.combine(x, point, point.alpha_dot, point.sigma_dot)

    def combine(self, x: Tensor, point: Point, data: Any, noise: Any) -> Tensor:
        """data·E[z | x] + noise·E[ε | x] at a point of a path, weights as floats or of shape (B,)."""
        mean, pull = self._estimate(x, point)
        return linear(data, mean, noise * point.sigma, pull)

    def trace(self, x: Tensor, point: Point) -> Tensor:
        """tr ∂E[z | x]/∂x at a point of a path, shape (B,)."""
        log_joint, pull = self._pulls(x, point)
        share = log_joint.softmax(1)
        pull = pull.flatten(2)
        alpha, sigma = (per_sample(c, pull) for c in point[:2])
        square = self.std.to(pull).square().expand_as(self.means).flatten(1)
        gain = alpha * square / (alpha**2 * square + sigma**2)
        center = self.means.to(pull).flatten(1) + alpha * square * pull
        mean_pull = torch.einsum("bk,bkd->bd", share, pull).unsqueeze(1)
        found: Tensor = (share * (gain + center * (mean_pull - pull)).sum(2)).sum(1)
        return found

    def flow(self, path: Path, prediction: str | Prediction = "velocity") -> Flow:
        """The flow whose network outputs exactly what the prediction asks for, finite at both ends."""
        return Flow(Exact(self, path, resolve(prediction)), path, prediction)

    def _pulls(self, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """log w_k N(x; αμ_k, v_k), shape (B, K), and q_k, shape (B, K, *S)."""
        if x.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, self.means.shape[1:]))})")
        x = x.to(state_dtype(x)).unsqueeze(1)
        means, std = self.means.to(x), self.std.to(x)
        alpha, sigma = (per_sample(c, x) for c in point[:2])
        variance = alpha**2 * std**2 + sigma**2
        off = x - alpha * means
        pull = off / variance
        exponent = (off * pull + (2.0 * math.pi * variance).log()).flatten(2).sum(2)
        return self.weights.to(x).log() - 0.5 * exponent, pull

    def _estimate(self, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """E[z | x] and E[ε | x]/σ, both of shape (B, *S)."""
        log_joint, pull = self._pulls(x, point)
        share = log_joint.softmax(1).reshape(*log_joint.shape, *[1] * (x.ndim - 1))
        drift = per_sample(point.alpha, pull) * self.std.to(pull).square() * pull
        return (share * (self.means.to(pull) + drift)).sum(1), (share * pull).sum(1)


class Known(Protocol):
    """Data whose score and estimates are known at every point of a path."""

    def score(self, x: Tensor, point: Point) -> Tensor:
        """∇ log p_t(x), shape (B, *S)."""
        ...

    def combine(self, x: Tensor, point: Point, data: Any, noise: Any) -> Tensor:
        """data·E[z | x] + noise·E[ε | x], shape (B, *S)."""
        ...


class Exact:
    """The network of an exact flow: net(x, t) for x of shape (B, *S) and flow times of shape (B,)."""

    def __init__(self, problem: Known, path: Path, prediction: Prediction) -> None:
        self.problem = problem
        self.path = path
        self.prediction = prediction

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        point = self.path.at(t)
        if self.prediction.name == "score":  # σ cancels, and must where it is 0
            return self.problem.score(x, point)
        a, b, scale = self.prediction.row(point)
        return self.problem.combine(x, point, a / scale, b / scale)
