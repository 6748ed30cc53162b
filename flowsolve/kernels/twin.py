r"""The kernels in plain torch: for every device and dtype, for autograd, and for the fused ones to be tested against.

**The same bits.** Which version serves, and where in a batch a sample stands, must not show in its result: steps are
accepted or not by a comparison, so what begins as a rounding can end as another number of evaluations. On the CPU it
does not:

* A state is $((y + w_1 k_1) + w_2 k_2) + \dots$, each product and each sum rounded on its own. (torch's `add(alpha=)`
  and `addcmul` fuse them in the vectorised part of a loop and not in its rest, so that a number's bits depend on where
  it stands.)
  Where gradients are recorded only the twin serves, and fuses them.
* Norms are sums in float64, whose order is anybody's, rounded to float32 in the end: what the order changes,
  $10^{-16}$, meets a rounding boundary in one case of $10^8$.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import rows, send
from flowsolve._surroundings import array, within

__all__ = ["error_norm", "host", "largest", "merge", "rms", "scale", "weighted"]

Weights = NDArray[np.float64] | Tensor
"""Of the host, or, in a recorded solve, of the device."""


def rms(x: Tensor) -> Tensor:
    """The root mean square of each sample, (B, *S) to (B,): float64 on the CPU, of x's dtype elsewhere."""
    flat = rows(x)
    wide = torch.float64 if flat.is_cpu else flat.dtype  # not every device knows float64
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=wide) / max(1, flat.shape[1]) ** 0.5
    return norm


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in each sample: (B, *S) to (B,)."""
    flat = rows(x)
    if not flat.shape[1]:
        return flat.new_zeros(len(flat))
    return flat.abs().amax(1)  # on the CPU 30 times as fast as torch's own norm of this kind


def host(v: Tensor) -> NDArray[np.float64]:
    """Numbers of a device as float64 on the host: the one read that an adaptive step waits for."""
    if within() is not None:
        return array(v.double())
    numbers = v.detach()
    if not (v.is_cpu and v.dtype is torch.float64):
        numbers = numbers.cpu().double()
    return numbers.numpy()


def weighted(slopes: Sequence[Tensor], weights: Weights, base: Tensor | None = None) -> Tensor:
    """base + Σ_j w_j k_j, with weights of shape (1, m) or (B, m); see `flowsolve.kernels.Slopes.advance`."""
    if not slopes:
        if base is None:
            raise ValueError("nothing to add up: no slopes and no state")
        return base
    # fresh: `total` is ours to write to. What vmap maps cannot be written to a plain tensor: there nothing is.
    total, fresh, writes = base, False, within() is None
    numbers: Sequence[Any]
    if isinstance(weights, np.ndarray) and len(weights) == 1:
        numbers = weights[0].tolist()
    else:
        like, table = slopes[0], weights if isinstance(weights, Tensor) else torch.from_numpy(weights)
        numbers = send(table, like, like.dtype).reshape(*table.shape, *[1] * (like.ndim - 1)).unbind(1)
    for w, k in zip(numbers, slopes, strict=True):
        if total is not None and (total.requires_grad or k.requires_grad):  # one node of the graph, not two
            total = torch.addcmul(total, w, k) if isinstance(w, Tensor) else torch.add(total, k, alpha=w)
            fresh = False
            continue
        part = k * w
        total = part if total is None else total.add_(part) if fresh else total + part
        fresh = writes and not part.requires_grad
    assert total is not None
    return total


def scale(size: Tensor, atol: Any, rtol: Any) -> Tensor:
    """The tolerance of each number; kept from 0, so that a number that is 0 and stays 0 has no error."""
    unit: Tensor = rtol * size
    return unit.add_(atol).clamp_min_(torch.finfo(size.dtype).tiny)


def error_norm(
    slopes: Sequence[Tensor],
    weights: Weights,
    y: Tensor,
    ahead: Tensor,
    atol: Any,
    rtol: Any,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The norm of the local error in units of the tolerance; see `flowsolve.kernels.Slopes.error_norm`."""
    with torch.no_grad():
        local = weighted(slopes, weights)
        local = torch.add(local, ahead, alpha=0.0)  # an infinite state is an infinite error, whatever the scale
        unit = scale(torch.maximum(y.abs(), ahead.abs()), atol, rtol)
        return norm(local.div_(unit) if within() is None else local / unit)


def merge(accepted: NDArray[np.bool_], new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where accepted, those of `old` elsewhere."""
    mask = send(torch.from_numpy(accepted), new)
    return torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
