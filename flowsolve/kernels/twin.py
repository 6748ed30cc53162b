"""The kernels in plain torch: for every device and dtype, for autograd, and for the fused ones to be tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import rows, send
from flowsolve._surroundings import array, within

__all__ = ["error_norm", "host", "largest", "merge", "rms", "scale", "weighted"]


def rms(x: Tensor) -> Tensor:
    """The root mean square of each sample: (B, *S) to (B,)."""
    return rows(x).square().mean(1).sqrt()


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in each sample: (B, *S) to (B,)."""
    magnitude: Tensor = torch.linalg.vector_norm(rows(x), torch.inf, dim=1)
    return magnitude


def host(v: Tensor) -> NDArray[np.float64]:
    """Numbers of a device as float64 on the host: the one read that an adaptive step waits for."""
    if within() is not None:
        return array(v.double())
    numbers = v.detach()
    if not (v.is_cpu and v.dtype is torch.float64):
        numbers = numbers.cpu().double()
    return numbers.numpy()


def weighted(slopes: Sequence[Tensor], weights: NDArray[np.float64], base: Tensor | None = None) -> Tensor:
    """base + Σ_j w_j k_j, with weights of shape (1, m) or (B, m); see `flowsolve.kernels.Slopes.advance`."""
    if not slopes:
        if base is None:
            raise ValueError("nothing to add up: no slopes and no state")
        return base
    # fresh: `total` is ours to write to. What vmap maps cannot be written to a plain tensor: there nothing is.
    total, fresh, writes = base, False, within() is None
    if len(weights) == 1:
        for w, k in zip(weights[0].tolist(), slopes, strict=True):
            total = w * k if total is None else (total.add_ if fresh else total.add)(k, alpha=w)
            fresh = writes and not total.requires_grad
    else:
        like = slopes[0]
        table = send(torch.from_numpy(weights), like, like.dtype).reshape(*weights.shape, *[1] * (like.ndim - 1))
        for w, k in zip(table.unbind(1), slopes, strict=True):
            total = w * k if total is None else (total.addcmul_ if fresh else total.addcmul)(w, k)
            fresh = writes and not total.requires_grad
    assert total is not None
    return total


def scale(size: Tensor, atol: float, rtol: float) -> Tensor:
    """The tolerance of each number; kept from 0, so that a number that is 0 and stays 0 has no error."""
    return (rtol * size).add_(atol).clamp_min_(torch.finfo(size.dtype).tiny)


def error_norm(
    slopes: Sequence[Tensor],
    weights: NDArray[np.float64],
    y: Tensor,
    ahead: Tensor,
    atol: float,
    rtol: float,
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
