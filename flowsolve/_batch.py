"""Coefficients and batches: the one place where a number per sample meets a tensor of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["choose", "linear", "per_sample", "rows", "saturating_log", "select", "state_dtype"]

TINY = 2.2250738585072014e-308  # the smallest normal float64; log-SNRs saturate at ±log(TINY) = ±708.4


def saturating_log(v: Any) -> Any:
    """log v for v >= 0, a float or a tensor, with log 0 = -708.4 instead of -inf: differences are never NaN."""
    return v.clamp_min(TINY).log() if isinstance(v, Tensor) else math.log(max(v, TINY))


def per_sample(c: Any, x: Tensor) -> Any:
    """A coefficient ready to multiply x of shape (B, *S): floats pass, a tensor of shape (B,) is moved and reshaped."""
    if not isinstance(c, Tensor):
        return c
    if c.ndim == 0:
        return c.to(device=x.device, dtype=x.dtype)
    if c.shape != x.shape[:1]:
        raise ValueError(f"a time or coefficient of shape {tuple(c.shape)} met a batch of {x.shape[0]} samples")
    return c.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def linear(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a·x + b·y with coefficients that are floats or one number a sample; zeros and ones cost nothing."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        total: Tensor = per_sample(a, x) * x + per_sample(b, y) * y
        return total
    if a == 0.0:
        return y if b == 1.0 else b * y
    if b == 0.0:
        return x if a == 1.0 else a * x
    return torch.add(x if a == 1.0 else a * x, y, alpha=b)


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new of shape (B, *S) for the samples in a host mask of shape (B,), old for the others; free where all agree."""
    if bool(mask.all()):
        return new
    return torch.where(mask.to(new.device).reshape(-1, *[1] * (new.ndim - 1)), new, old)


def rows(x: Tensor) -> Tensor:
    """x of shape (B, *S) as (B, D)."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype a state is integrated in: its own, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def select(cond: Mapping[str, Any], count: int, index: Tensor | None) -> dict[str, Any]:
    """The conditioning of some samples: tensors with one row a sample are cut, also within containers."""
    if index is None:
        return dict(cond)

    def cut(v: Any) -> Any:
        if isinstance(v, Tensor):
            return v.index_select(0, index.to(v.device)) if v.ndim and v.shape[0] == count else v
        if isinstance(v, Mapping):
            return {k: cut(item) for k, item in v.items()}
        return type(v)(cut(item) for item in v) if type(v) in (list, tuple) else v

    return {k: cut(v) for k, v in cond.items()}
