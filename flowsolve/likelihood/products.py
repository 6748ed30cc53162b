"""Products with the Jacobian of a network's output, from the graph of one call or by passes that carry a tangent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["AT_ONCE", "Forward", "Function", "Product", "Pulled", "Reverse", "Unseen", "full"]

AT_ONCE = 64
"""The most products in one batched pass, whose intermediate values take as many times the memory of one."""

Function = Callable[[Tensor], Tensor]
Product = Callable[[Tensor], Tensor]
"""From vectors (K, B, *S) to their products with each sample's Jacobian, or its transpose, in the same shape."""


class Reverse:
    """vᵀJ, by backward passes over a graph; several at once where the network's operations can be batched."""

    def __init__(self, output: Tensor, x: Tensor, graph: bool, learnt: dict[str, Any]) -> None:
        self.output, self.x, self.graph, self.learnt = output, x, graph, learnt

    def __call__(self, vectors: Tensor) -> Tensor:
        if len(vectors) > 1 and self.learnt.get("batched", True):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*performance drop.*")
                    parts = [self._pull(part, True) for part in vectors.split(AT_ONCE)]
                self.learnt["batched"] = True
                return torch.cat(parts)
            except RuntimeError as error:
                if full(error):
                    raise
                self.learnt["batched"] = False
        return torch.stack([self._pull(v, False) for v in vectors])

    def _pull(self, vectors: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            self.output, self.x, vectors, retain_graph=True, create_graph=self.graph, allow_unused=True,
            is_grads_batched=batched,
        )  # fmt: skip
        if found is None:
            raise Unseen("")
        return found


class Pulled:
    """vᵀJ within a transform of torch.func or forward-mode derivatives, which see through it."""

    def __init__(self, function: Function, x: Tensor) -> None:
        self.output, self.pull = torch.func.vjp(function, x)  # type: ignore[misc]

    def __call__(self, vectors: Tensor) -> Tensor:
        return torch.stack([self.pull(v)[0] for v in vectors])


class Forward:
    """J v, by passes that carry a tangent; the first of them gives the output too."""

    def __init__(self, function: Function, x: Tensor, first: Tensor | None) -> None:
        self.function, self.x, self.first = function, x, None
        if first is None:
            with torch.no_grad():
                self.output = function(x)
        else:
            self.output, self.first = self._push(first)

    def __call__(self, vectors: Tensor) -> Tensor:
        ready, self.first = ([] if self.first is None else [self.first]), None
        return torch.stack([*ready, *(self._push(v)[1] for v in vectors[len(ready) :])])

    def _push(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        # The fused kernels of attention have no forward mode; the plain one has.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            output, tangent = forward_ad.unpack_dual(self.function(forward_ad.make_dual(self.x, vector.contiguous())))
        if tangent is None:
            raise Unseen(", in reverse or in forward mode")
        return output, tangent


class Unseen(ValueError):
    """Autograd sees no way from x to the output."""

    def __init__(self, how: str) -> None:
        super().__init__(
            f"the network's output does not depend on x for autograd{how}, so its divergence cannot be read; remove "
            "no_grad, inference_mode, detach or NumPy from the network's forward pass"
        )


def full(error: Exception) -> bool:
    """Whether memory ran out, which no other way of making the products would mend."""
    return isinstance(error, torch.OutOfMemoryError)
