r"""The two-headed loss of stochastic interpolants (Albergo, Boffi & Vanden-Eijnden 2023).

With the states of `training.bridges`, a velocity $b$ and a denoiser $\eta$ are regressed from the same draws,

$$ L = \mathbb E\,w\bigl(\|b\|^2 - 2\,b\cdot\dot x_t\bigr) + \mathbb E\,w\,\|\eta - \zeta\|^2 , $$

whose minimisers are $b = \mathbb E[\dot x_t \mid x_t]$ and $\eta = \mathbb E[\zeta \mid x_t] = -\gamma\nabla\log p_t$.
Draws of $\zeta$ are antithetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flowsolve.conditioning import marked
from flowsolve.flow import Flow
from flowsolve.training.bridges import Bridge, Brownian
from flowsolve.training.objective import Objective

__all__ = ["TwoHeaded"]


@dataclass(frozen=True)
class TwoHeaded:
    """The loss of a velocity and a denoiser on the same draws.

    Args:
        objective: with a bridge; its target is the velocity.

    Raises:
        ValueError: an objective without a bridge.
    """

    objective: Objective = field(
        default_factory=lambda: Objective("velocity", bridge=Brownian(2.0**0.5), antithetic=True)
    )

    def __post_init__(self) -> None:
        if not isinstance(self.objective.bridge, Bridge):
            raise ValueError("a two-headed loss needs a bridge; give Objective('velocity', bridge=Brownian(), ...)")

    def __call__(
        self,
        flow: Flow,
        denoiser: Callable[..., Tensor],
        data: Tensor,
        *,
        noise: Tensor | None = None,
        t: float | Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        reduction: Literal["mean", "none"] = "mean",
        cond: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        """Both losses added; each is the mean over dimensions.

        Args:
            flow: predicts "velocity"; its network is b.
            denoiser: η(x, t, **cond) of shape (B, *S), with t as the flow's network is given it.
            data: z, shape (B, *S).
            noise: ε, points of the source, of data's shape; by default standard normal.
            t: as of an `Objective`, like the rest.
            labels: as of an `Objective`.
            generator: as of an `Objective`.
            reduction: as of an `Objective`.
            cond: keyword arguments of both networks.
            **more: more of them.
        """
        draw = self.objective.draw(
            flow, data, t=t, noise=noise, labels=labels, generator=generator, cond=marked(cond, more, len(data))
        )
        head = Flow(denoiser, flow.path, "velocity", time=flow.clock, dtype=flow.dtype)
        head.arm(False)
        found = head.call(draw.x, draw.t, **draw.cond)
        assert draw.bridge is not None
        error = (found - draw.bridge).square().flatten(1).mean(1)
        velocity = self.objective.compare(flow, draw, reduction)
        return velocity + self.objective.weighted(error, draw, flow, reduction)
