r"""Step-size control: from the error of a step to the size of the next.

With $e$ the norm of the local error estimate in units of the tolerance, a step is accepted where $e \le 1$ and the
next one is

$$ h' = h \cdot \min\bigl(f_{\max}, \max(f_{\min},\; \theta\, e^{-(1/k - \tfrac34\beta)}\, e_{-}^{\;\beta})\bigr), $$

where $k$ is one more than the order of the error estimate and $e_-$ the error of the step accepted before. β = 0 is the
elementary (I) controller; β > 0 damps the sequence of steps (PI control, Gustafsson 1991; Hairer, Nørsett & Wanner
IV.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PI"]


@dataclass(frozen=True)
class PI:
    """Proportional-integral control of the step size.

    Attributes:
        safety: θ, below 1.
        min_factor: the most a step may shrink.
        max_factor: the most it may grow.
        beta: β, the weight of the previous error; 0 is the elementary controller.
    """

    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    beta: float = 0.04

    def factor(self, error: Tensor, previous: Tensor, accepted: Tensor, k: int) -> Tensor:
        """The factor h'/h of each sample, from errors of shape (B,) in units of the tolerance."""
        gain = self.safety * error.clamp_min(1e-10) ** (0.75 * self.beta - 1.0 / k) * previous**self.beta
        gain = gain.clamp(self.min_factor, self.max_factor)
        return torch.where(accepted, gain, gain.clamp_max(1.0))
