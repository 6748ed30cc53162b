"""Parameters of a right-hand side, wherever it keeps them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["modules_of", "parameters_of"]


def parameters_of(functions: Iterable[Any], slopes: Iterable[Tensor]) -> list[Tensor]:
    """The parameters of a right-hand side: those of modules it is, wraps or closes over, and the leaves of its graph.

    A parameter of a module that is no leaf stands for the leaves behind it: it has its own way back to them.

    Args:
        functions: callables to search for modules.
        slopes: results of the right-hand side, whose graphs end in its leaves.
    """
    found: dict[int, Tensor] = {}
    for f in functions:
        for module in modules_of(f, 3):
            found.update({id(p): p for p in module.parameters() if p.requires_grad})
    inner = {p.grad_fn for p in found.values() if p.grad_fn is not None}
    for slope in slopes:
        stack, seen = [slope.grad_fn], set(inner)
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found[id(node.variable)] = node.variable
            stack += [parent for parent, _ in node.next_functions]
    return list(found.values())


def modules_of(f: Any, depth: int) -> list[nn.Module]:
    """Modules that a callable is, wraps or closes over."""
    if isinstance(f, nn.Module):
        return [f]
    if depth == 0:
        return []
    inner: list[Any] = [getattr(f, "__self__", None)]
    if isinstance(f, functools.partial):
        inner += [f.func, *f.args, *f.keywords.values()]
    elif inspect.isfunction(f):
        inner += inspect.getclosurevars(f).nonlocals.values()
    return [m for v in inner if v is not None for m in modules_of(v, depth - 1)]
