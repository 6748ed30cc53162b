"""Parameters of a right-hand side, wherever it keeps them."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

__all__ = ["leaves", "modules_of", "parameters_of"]

DEPTH, MOST = 8, 10_000  # how far to search, and how many members of a container
USUAL = frozenset(vars(nn.Module()))
LIBRARIES = ("builtins", "numpy", "torch")  # whose functions keep no parameters of ours among their globals
PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.CodeType)


def parameters_of(functions: Iterable[Any], slopes: Iterable[Tensor]) -> list[Tensor]:
    """The parameters of a right-hand side: what it is, wraps, holds or refers to, and the leaves of its graph.

    A parameter of a module that is no leaf stands for the leaves behind it: it has its own way back to them. Of any
    other tensor that is no leaf the leaves behind it are meant.

    Args:
        functions: callables, modules, tensors, or lists of them, to search.
        slopes: results of the right-hand side, whose graphs end in its leaves.
    """
    found: dict[int, Tensor] = {}
    results = list(slopes)
    for v in _held(functions):
        if isinstance(v, nn.Module):
            found.update({id(p): p for p in v.parameters() if p.requires_grad})
        elif v.is_leaf:
            found[id(v)] = v
        else:
            results.append(v)
    inner = {p.grad_fn for p in found.values() if p.grad_fn is not None}
    found.update({id(v): v for v in leaves(results, inner)})
    return list(found.values())


def modules_of(f: Any, depth: int = 3) -> list[nn.Module]:
    """Modules that a callable surely calls: those it is, wraps, closes over, or reads by their global names."""
    if isinstance(f, nn.Module):
        return [f]
    if depth == 0:
        return []
    inner: list[Any] = [getattr(f, "__self__", None)]
    if isinstance(f, functools.partial):
        inner += [f.func, *f.args, *f.keywords.values()]
    elif isinstance(f, types.FunctionType):
        for cell in f.__closure__ or ():
            with suppress(ValueError):  # not yet assigned
                inner.append(cell.cell_contents)
        inner += [v for name in _globals(f.__code__) if isinstance(v := f.__globals__.get(name), nn.Module)]
    return [m for v in inner if v is not None for m in modules_of(v, depth - 1)]


@functools.lru_cache(256)
def _globals(code: types.CodeType) -> frozenset[str]:
    """The global names that a piece of code reads."""
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")


def leaves(results: Iterable[Tensor], inner: AbstractSet[Any] = frozenset()) -> list[Tensor]:
    """The leaves that some tensors were made of, as autograd saw it; not those behind the nodes in `inner`."""
    found: dict[int, Tensor] = {}
    seen = set(inner)
    stack: list[Any] = []
    for v in results:
        if v.grad_fn is not None:
            stack.append(v.grad_fn)
        elif v.requires_grad:
            found[id(v)] = v
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [parent for parent, _ in node.next_functions]
    return list(found.values())


def _held(functions: Iterable[Any]) -> Iterator[nn.Module | Tensor]:
    """Modules, and tensors that require gradients, that callables are, wrap, hold or refer to."""
    near: list[Any] = list(functions)
    seen: dict[int, Any] = {}
    for _ in range(DEPTH):
        far: list[Any] = []
        for v in near:
            if isinstance(v, PLAIN) or id(v) in seen or len(seen) > 10 * MOST:
                continue
            seen[id(v)] = v  # kept, so that no other object takes its number
            if isinstance(v, Tensor):
                if v.requires_grad:
                    yield v
                continue
            if isinstance(v, nn.Module):
                yield v
            far += _within(v)
        near = far


def _within(v: Any) -> list[Any]:
    """What an object holds or refers to."""
    if isinstance(v, nn.Module):
        # Its own parameters and modules are known; a plain list of modules is what it hides.
        hidden = [w for m in v.modules() for k, w in vars(m).items() if k not in USUAL]
        return [*hidden, *{type(m).forward for m in v.modules()}]
    if isinstance(v, dict):
        return list(v.values())[:MOST]
    if isinstance(v, list | tuple | set | frozenset):
        return list(v)[:MOST]
    if isinstance(v, functools.partial):
        return [v.func, v.args, v.keywords]
    if isinstance(v, types.MethodType):
        return [v.__self__, v.__func__]
    if isinstance(v, types.FunctionType):
        found = [v.__defaults__, v.__kwdefaults__, vars(v)]
        for cell in v.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not yet assigned
                continue
        if (v.__module__ or "").split(".")[0] not in LIBRARIES:
            found += [v.__globals__[name] for name in _names(v.__code__) if name in v.__globals__]
        return found
    slots = [w for name in _slots(v) if (w := getattr(v, name, None)) is not None]
    with suppress(TypeError):
        slots.append(vars(v))
    return [*slots, type(v).__call__] if callable(v) else slots


def _slots(v: Any) -> list[str]:
    """The names of what an object holds in slots."""
    given = [vars(kind).get("__slots__", ()) for kind in type(v).__mro__ if kind.__module__ not in LIBRARIES]
    return [name for names in given for name in ([names] if isinstance(names, str) else names) if name[:2] != "__"]


def _names(code: types.CodeType) -> set[str]:
    """Names that a piece of code, or code within it, refers to."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)
