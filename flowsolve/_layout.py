"""How the state that a right-hand side knows, a tensor or a tree of them, is held as one tensor of shape (B, *S)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowsolve._arguments import state
from flowsolve._batch import send, state_dtype
from flowsolve._guard import Guard

__all__ = ["Layout"]


class Layout:
    """How the state that f knows is held as one tensor of shape (B, *S)."""

    def __init__(self, y0: Any, batched: bool) -> None:
        leaves, self.spec = tree_flatten(y0)
        self.tree = not isinstance(y0, Tensor)
        if not leaves:
            raise TypeError(f"y0 = {y0!r} holds no tensor; expected a tensor, or a tree of them with one at least")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"the state y0 holds a {got}; expected floating-point tensors")
        self.single = not batched or any(leaf.ndim == 0 for leaf in leaves)
        if not self.single and len({len(leaf) for leaf in leaves}) > 1:
            sizes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(
                f"the tensors of y0 have shapes {sizes}; expected the same first dimension, the batch, or batched=False"
            )
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.sizes = [(shape if self.single else shape[1:]).numel() for shape in self.shapes]
        self.dtype = reduce(torch.promote_types, (state_dtype(leaf) for leaf in leaves))

    def pack(self, y0: Any) -> Tensor:
        """The state as it is integrated."""
        leaves, _ = tree_flatten(y0)
        if not self.tree:
            return state(leaves[0].unsqueeze(0) if self.single else leaves[0])
        return torch.cat([self._row(leaf.to(self.dtype)) for leaf in leaves], 1)

    def unpack(self, x: Tensor, lead: int = 0, like: bool = False, many: bool = False) -> Any:
        """The state as f knows it, behind `lead` more dimensions; with the leaves' own dtypes if `like`.

        Of one system, `many` states may lie side by side where its samples would.
        """
        if many and self.single:
            x, lead = x.unsqueeze(1), lead + 1
        if not self.tree:
            return x.squeeze(lead) if self.single else x
        front, count = x.shape[:lead], x.shape[lead]
        leaves = []
        for part, shape, dtype in zip(x.split(self.sizes, -1), self.shapes, self.dtypes, strict=True):
            leaf = part.reshape((*front, *shape) if self.single else (*front, count, *shape[1:]))
            leaves.append(leaf.to(dtype if like else torch.promote_types(dtype, torch.float32)))
        return tree_unflatten(leaves, self.spec)

    def time(self, t: Tensor) -> Tensor:
        """Times of shape (…, B) as f is given them."""
        if self.single:
            return t[..., 0]
        return t.reshape(*t.shape, *[1] * (1 if self.tree else len(self.shapes[0]) - 1))

    def slope(self, f: Guard, t: Tensor, x: Tensor, args: Any) -> Tensor:
        """f(t, y) as one tensor."""
        if not self.tree:
            given = x[0] if self.single else x
            return self.checked(f(t, given, args), given)
        given = self.unpack(x, like=True)
        # f is given copies, which it may write into, and what it returns is copied below.
        more = args or {}
        answer = f.function(lambda: f.f(t.clone(), self.unpack(x.clone(), like=True), **more), x.device)
        leaves, spec = tree_flatten(answer)
        if spec != self.spec:
            leaves, spec = tree_flatten(_ordered(answer, given))
        expected = [v.shape for v in tree_flatten(given)[0]]
        if spec != self.spec or [getattr(v, "shape", None) for v in leaves] != expected:
            raise ValueError(
                f"f(t, y) returned {_outline(leaves, spec)}; expected the structure of y0, {_outline(given)}"
            )
        for leaf in leaves:
            _real(leaf, x)
        return torch.cat([self._row(v.to(x.dtype)) for v in leaves], 1)

    def checked(self, slope: Any, given: Tensor) -> Tensor:
        """What f returned for a tensor, if it is of the same shape, in the dtype of the state."""
        if not isinstance(slope, Tensor) or slope.shape != given.shape:
            got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
            raise ValueError(f"f(t, y) returned {got} for y of shape {tuple(given.shape)}; expected the same shape")
        _real(slope, given)
        found: Tensor = slope.unsqueeze(0) if self.single else slope
        return found if found.dtype is given.dtype else found.to(given.dtype)

    def number(self, g: Callable[..., Any], y: Tensor, times: Tensor, tree: Any) -> Tensor:
        """g(t, y, *args) of states and times side by side: one number a sample (`flowsolve.events`)."""
        more, t = (tree["args"] if tree else ()), send(times, y, y.dtype)
        if self.single:  # one system: a look may be at several of its times
            found = [g(time, self.unpack(row[None], like=True), *more) for time, row in zip(t, y, strict=True)]
        else:
            found = [g(self.time(t), self.unpack(y, like=True), *more)]
        for v in found:
            if not isinstance(v, Tensor) or v.numel() != (1 if self.single else len(y)):
                got = f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
                expected = "one number" if self.single else f"one number a sample, ({len(y)},)"
                raise ValueError(f"the event returned {got}; expected {expected}")
        return torch.stack([v.reshape(()) for v in found]) if self.single else found[0].reshape(-1)

    def _row(self, leaf: Tensor) -> Tensor:
        return leaf.reshape(1, -1) if self.single else leaf.reshape(len(leaf), -1)


def _ordered(tree: Any, like: Any) -> Any:
    """A tree with the keys of its dicts in another's order, where they are the same keys."""
    if isinstance(tree, dict) and isinstance(like, dict) and tree.keys() == like.keys():
        return {k: _ordered(tree[k], v) for k, v in like.items()}
    if type(tree) is type(like) and type(like) in (list, tuple) and len(tree) == len(like):
        return type(like)(_ordered(a, b) for a, b in zip(tree, like, strict=True))
    return tree


def _outline(tree: Any, spec: Any = None) -> str:
    """A tree with shapes in place of its tensors."""
    leaves, form = (tree, spec) if spec is not None else tree_flatten(tree)
    told = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
    return str(tree_unflatten(told, form))


def _real(slope: Tensor, y: Tensor) -> None:
    """Raise TypeError for a complex slope of a real state."""
    if slope.is_complex() and not y.is_complex():
        raise TypeError(
            f"f(t, y) returned {slope.dtype} for y of {y.dtype}; expected real numbers, since the imaginary "
            "part would be lost"
        )
