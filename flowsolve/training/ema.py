r"""Exponential moving averages of weights.

After update $n$ the average is $\bar\theta_n = d_n\bar\theta_{n-1} + (1 - d_n)\,\theta_n$ with $d_n = d$, or,
with a warm-up, $d_n = \min\bigl(d, (1 + n)/(10 + n)\bigr)$, so that the first, bad weights are forgotten at
once. With constant $d$: $\bar\theta_n = d^n\theta_0 + (1-d)\sum_{k=1}^n d^{n-k}\theta_k$.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

__all__ = ["EMA"]


class EMA:
    """The moving average of a module's weights, kept as a module of its own.

    Args:
        module: the module being trained.
        decay: d in [0, 1); about 1/(1 − d) updates are remembered.
        warmup: let the memory grow with the number of updates.

    Attributes:
        module: the averaged copy, in evaluation mode, without gradients; floating weights in float32 at
            least.
        updates: n, the number of updates so far.

    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay = {decay!r}; expected 0 <= decay < 1")
        self.source = module
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.module = deepcopy(module).eval().requires_grad_(False)
        for p in self.module.parameters():
            if p.dtype.is_floating_point:  # bfloat16 cannot hold a step of 1e-3
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average; buffers and integer weights are copied."""
        self.updates += 1
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        for mean, p in zip(self.module.parameters(), self.source.parameters(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(p.to(mean.dtype), 1.0 - decay)
            else:
                mean.copy_(p)
        for copy, b in zip(self.module.buffers(), self.source.buffers(), strict=True):
            copy.copy_(b)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])
