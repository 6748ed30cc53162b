r"""Bridge noise: the $\gamma(t)$ of stochastic interpolants between two data sets.

A stochastic interpolant joins a source $\varepsilon$ (any data) and data $z$ by
$x_t = \alpha z + \sigma\varepsilon + \gamma\zeta$ with fresh normal $\zeta$ and $\gamma(0) = \gamma(1) = 0$ (Albergo,
Boffi & Vanden-Eijnden 2023). Two networks are learned,

$$ b(x, t) = \mathbb E[\dot\alpha z + \dot\sigma\varepsilon + \dot\gamma\zeta \mid x_t = x], \qquad
   \eta(x, t) = \mathbb E[\zeta \mid x_t = x], \qquad \nabla\log p_t = -\eta/\gamma : $$

$b$ moves samples by an ODE, and with the score $-\eta/\gamma$ by the SDE of any diffusion.

| bridge | $\gamma$ | |
|---|---|---|
| `Brownian(s)` | $s\sqrt{t(1-t)}$ | $s = \sqrt2$: Albergo et al.; with `Sinkhorn(2s²)`: Tong et al. 2023 |
| `Sine(s)` | $s\sin^2\pi t$ | $\dot\gamma$ is finite |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bridge", "Brownian", "Sine"]


@dataclass(frozen=True)
class Bridge:
    """γ(t), a function of flow times that vanishes at both ends.

    Args:
        scale: s > 0.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale = {self.scale!r}; expected a finite number > 0")

    def gamma(self, t: Tensor) -> Tensor:
        """γ at flow times of shape (B,), float64."""
        raise NotImplementedError

    def gamma_dot(self, t: Tensor) -> Tensor:
        """dγ/dt."""
        raise NotImplementedError


@dataclass(frozen=True)
class Brownian(Bridge):
    """γ = s √(t(1 − t)), the standard deviation of a Brownian bridge; γ̇ is infinite at the ends."""

    def gamma(self, t: Tensor) -> Tensor:
        return self.scale * (t * (1.0 - t)).sqrt()

    def gamma_dot(self, t: Tensor) -> Tensor:
        return 0.5 * self.scale * (1.0 - 2.0 * t) / (t * (1.0 - t)).sqrt()


@dataclass(frozen=True)
class Sine(Bridge):
    """γ = s sin² πt."""

    def gamma(self, t: Tensor) -> Tensor:
        return self.scale * torch.sin(math.pi * t).square()

    def gamma_dot(self, t: Tensor) -> Tensor:
        return self.scale * math.pi * torch.sin(2.0 * math.pi * t)
