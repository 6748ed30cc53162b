"""Coefficients and batches: the one place where a number per sample meets a tensor of samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "MARK",
    "Context",
    "Whose",
    "choose",
    "hosted",
    "linear",
    "per_sample",
    "rows",
    "saturating_log",
    "send",
    "state_dtype",
    "take",
]

MARK = "_per_sample"  # the keyword under which a batch's conditioning says which of its leaves have a row a sample
WIDE = {torch.float32: torch.float32, torch.float64: torch.float64}  # what need not be looked up each time
TINY = 2.2250738585072014e-308  # the smallest normal float64; log-SNRs saturate at ±log(TINY) = ±708.4


def saturating_log(v: Any) -> Any:
    """log v for v >= 0, a float or a tensor, with log 0 = -708.4 instead of -inf: differences are never NaN."""
    return v.clamp_min(TINY).log() if isinstance(v, Tensor) else math.log(max(v, TINY))


def send(v: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """v on the device of `like`, in a dtype; from the host without waiting for what the device is busy with.

    (A copy from pageable memory has read it when the call returns; the other way round it would not be safe.)
    """
    return v.to(device=like.device, dtype=dtype or v.dtype, non_blocking=v.is_cpu)


def hosted(v: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as it is and where it is; numbers as a tensor of the host, whatever torch's default device."""
    if isinstance(v, Tensor):
        return v if dtype is None else v.to(dtype)
    return torch.as_tensor(v, dtype=dtype, device="cpu")


def per_sample(c: Any, x: Tensor) -> Any:
    """A coefficient ready to multiply x of shape (B, *S): floats pass, a tensor of shape (B,) is moved and reshaped."""
    if not isinstance(c, Tensor):
        return c
    if c.ndim == 0:
        return send(c, x, x.dtype)
    if c.shape != x.shape[:1]:
        raise ValueError(f"a time or coefficient of shape {tuple(c.shape)} met a batch of {x.shape[0]} samples")
    return send(c, x, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


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
    return torch.where(send(mask, new).reshape(-1, *[1] * (new.ndim - 1)), new, old)


def rows(x: Tensor) -> Tensor:
    """x of shape (B, *S) as (B, D)."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype a state is integrated in: its own, but float32 at least."""
    return WIDE.get(x.dtype) or torch.promote_types(x.dtype, torch.float32)


def take(x: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Some rows of x, by position."""
    return x.index_select(0, send(torch.from_numpy(index), x))


@dataclass(frozen=True, eq=False)
class Whose:
    """A leaf of a tree with whose it is (`flowsolve.conditioning`).

    Attributes:
        value: a tensor, or anything that is shared.
        own: whether it is a tensor with a row for each sample.
    """

    value: Any
    own: bool


class Context:
    """What belongs to the samples of a batch beside their state: tensors with one row a sample, anywhere in a tree.

    Which leaves those are is settled once, when the batch is made: as they are marked (`Whose`), and of unmarked
    tensors those whose first dimension is the batch's.

    Attributes:
        tree: mappings, sequences and leaves, as they were given, without marks.
        columns: numbers of the host with a column a sample, (k, B), if any.
    """

    def __init__(self, tree: Any, count: int, columns: NDArray[np.float64] | None = None) -> None:
        self.columns = columns
        leaves, self._spec = tree_flatten(tree)
        self._own = [
            v.own if isinstance(v, Whose) else isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == count
            for v in leaves
        ]
        self._leaves = [v.value if isinstance(v, Whose) else v for v in leaves]
        marked = any(isinstance(v, Whose) for v in leaves)
        self.tree = tree_unflatten(self._leaves, self._spec) if marked else tree

    @property
    def marked(self) -> Any:
        """The tree with its tensors marked: a context of the same samples made of it is this one."""
        pairs = zip(self._leaves, self._own, strict=True)
        return tree_unflatten([Whose(v, own) if isinstance(v, Tensor) else v for v, own in pairs], self._spec)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients would flow to any of it."""
        return any(isinstance(v, Tensor) and v.requires_grad for v in self._leaves)

    def select(self, index: NDArray[np.int64]) -> Context:
        """The context of some samples, by position."""
        chosen = self._with([take(v, index) if own else v for v, own in zip(self._leaves, self._own, strict=True)])
        if self.columns is not None:
            chosen.columns = self.columns[:, index]
        return chosen

    def joined(self, other: Context) -> Context:
        """The context of this batch's samples and then the other's.

        Raises:
            ValueError: what they share among themselves is not the same in both.
        """
        both = self._combined(other, lambda a, b: torch.cat((a, b)))
        if (self.columns is None) != (other.columns is None):
            raise ValueError("of two batches that follow each other one has tolerances of its own; give them to both")
        if self.columns is not None and other.columns is not None:
            both.columns = np.concatenate((self.columns, other.columns), 1)
        return both

    def placed(self, index: NDArray[np.int64], other: Context) -> Context:
        """This context with some samples, by position, replaced by the other's; errors as for `joined`."""

        def put(a: Tensor, b: Tensor) -> Tensor:
            return a.index_copy(0, send(torch.from_numpy(index), a), b.to(a.device))

        return self._combined(other, put)

    def _combined(self, other: Context, combine: Callable[[Tensor, Tensor], Tensor]) -> Context:
        if self._spec != other._spec or self._own != other._own:
            raise ValueError(
                "two batches that follow each other have other keyword arguments for the network, or rows a sample in "
                "one only; give them the same names, and flowsolve.shared or flowsolve.per_sample where they differ"
            )
        made = []
        for a, b, own in zip(self._leaves, other._leaves, self._own, strict=True):
            if not (own or a is b or _same(a, b)):
                raise ValueError(
                    f"two batches that follow each other share different values among their samples ({_said(a)} and "
                    f"{_said(b)}), and the network is to see samples of both at once; give a tensor with a row a sample"
                )
            made.append(combine(a, b) if own else a)
        return self._with(made)

    def _with(self, leaves: list[Any]) -> Context:
        new = object.__new__(Context)
        new.columns = None
        new._leaves, new._spec, new._own = leaves, self._spec, self._own
        new.tree = tree_unflatten(leaves, self._spec)
        return new


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _said(v: Any) -> str:
    return f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)
