"""States that are trees of tensors, as one tensor of shape (B, D) and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowsolve._batch import rows, state_dtype

__all__ = ["Packing"]


class Packing:
    """How a tree of tensors (B, *S) is held as one tensor.

    Args:
        y0: the tree.

    Raises:
        TypeError, ValueError: it holds no tensors, others than floating-point ones, or batches of several sizes.
    """

    def __init__(self, y0: Any) -> None:
        leaves, self.spec = tree_flatten(y0)
        if not leaves:
            raise TypeError(f"y0 = {y0!r} holds no tensor; expected a tensor, or a tree of them with one at least")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim == 0:
                got = f"tensor of {leaf.dtype}, shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                raise TypeError(f"y0 holds a {got}; expected floating-point tensors of shape (B, *S)")
        if len({len(leaf) for leaf in leaves}) > 1:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(f"the tensors of y0 have shapes {shapes}; expected the same first dimension, the batch")
        self.shapes = [leaf.shape[1:] for leaf in leaves]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.dtype = reduce(torch.promote_types, (state_dtype(leaf) for leaf in leaves))

    def pack(self, tree: Any) -> Tensor:
        """The state as it is integrated, (B, D)."""
        return torch.cat([rows(leaf.to(self.dtype)) for leaf in tree_flatten(tree)[0]], 1)

    def unpack(self, x: Tensor, lead: int = 0, like: bool = False) -> Any:
        """The tree behind `lead` more dimensions; in the leaves' own dtypes if `like`, in float32 at least if not."""
        leaves = []
        for part, shape, dtype in zip(x.split(self.sizes, -1), self.shapes, self.dtypes, strict=True):
            leaf = part.reshape(*x.shape[: lead + 1], *shape)
            leaves.append(leaf.to(dtype if like else torch.promote_types(dtype, torch.float32)))
        return tree_unflatten(leaves, self.spec)

    def fed(self, f: Callable[..., Any], name: str, noise_type: str = "") -> Callable[..., Any]:
        """A function (t, y, *args) of the tree, which gives trees, as one of the packed state.

        Args:
            f: the function; a number that it gives passes.
            name: its name in errors.
            noise_type: of g: "general" gives leaves (B, *S, m), and so may "additive".
        """

        def packed(t: Tensor, y: Tensor, *args: Any) -> Any:
            found = f(t, self.unpack(y, like=True), *args)
            if isinstance(found, int | float):
                return found
            leaves, spec = tree_flatten(found)
            shapes = [tuple(getattr(v, "shape", ())) for v in leaves]
            columns = [len(shape) == len(s) + 2 for shape, s in zip(shapes, self.shapes, strict=False)]
            wide = noise_type == "general" or (noise_type == "additive" and all(columns))
            tail = shapes[0][-1:] if wide and shapes else ()
            expected = [(len(y), *shape, *tail) for shape in self.shapes]
            if spec != self.spec or shapes != expected:
                raise ValueError(
                    f"{name}(t, y) returned tensors of shape {shapes}; expected the structure of y0, {expected}"
                )
            return torch.cat([v.to(self.dtype).reshape(len(y), -1, *tail) for v in leaves], 1)

        return packed
