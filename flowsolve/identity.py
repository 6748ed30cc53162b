r"""What a function is, as plain values: so that a run is not continued with a network behind it that has other weights.

A function is its name, its code (compiled: another Python's is another function, which is refused rather than mixed),
its defaults, and what it reaches: closed-over variables, globals that its code names, the object of a bound
method, the parts of a `functools.partial`. Of what is reached count tensors, arrays, networks, numbers, texts, and
functions again, in containers too; a module is its class, its weights and its other tensors. (Numbers that a module
holds may count what it did: they are left out.)
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowsolve._batch import hosted

__all__ = ["digest", "identity", "module_digest"]

DEPTH = 5
"""How many steps away from a function things count."""

OWN = ("flowsolve.", "torch.", "numpy.", "math", "builtins")
"""Modules whose functions are known by their names."""


def digest(*tensors: Tensor | np.ndarray[Any, Any]) -> str:
    """A short digest of the shapes, dtypes and bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        t = hosted(tensor).detach().cpu()
        found.update(f"{t.dtype} {tuple(t.shape)};".encode())
        flat = t.reshape(-1)
        dense = flat if flat.stride() == (1,) else torch.empty(flat.shape, dtype=t.dtype, device="cpu").copy_(flat)
        found.update(dense.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def identity(f: Callable[..., Any]) -> str:
    """The name of a function, and behind it a digest of all that it depends on, where that is more than its name."""
    name = _name(f)
    if isinstance(f, types.FunctionType | types.BuiltinFunctionType | type) and name.startswith(OWN):
        return name
    reached = json.dumps(_reached(f, DEPTH, set()), sort_keys=True, ensure_ascii=False)
    return f"{name} ({hashlib.sha256(reached.encode()).hexdigest()[:16]})"


def module_digest(module: nn.Module) -> str:
    """A digest of a network's weights, buffers and other tensors."""
    state = sorted((k, v) for k, v in module.state_dict().items() if isinstance(v, Tensor))
    more = {
        f"{name}.{key}": digest(v)
        for name, m in module.named_modules()
        for key, v in vars(m).items()
        if isinstance(v, Tensor)
    }
    weights = digest(*(v for _, v in state))
    return weights if not more else hashlib.sha256(f"{weights}{sorted(more.items())}".encode()).hexdigest()[:16]


def _name(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _reached(value: Any, depth: int, seen: set[int]) -> Any:
    """A value and what it depends on; None for what does not count."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray):
        return digest(value) if not (isinstance(value, np.ndarray) and value.dtype == object) else None
    if isinstance(value, nn.Module):
        return [_name(value), module_digest(value)]
    if depth == 0 or id(value) in seen:
        return None
    seen = seen | {id(value)}

    def inner(v: Any) -> Any:
        return _reached(v, depth - 1, seen)

    if isinstance(value, Mapping):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [inner(v) for v in value]
        return items if isinstance(value, list | tuple) else sorted(map(str, items))
    if isinstance(value, functools.partial):
        return [inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, types.MethodType):
        return [_name(value), inner(value.__self__), inner(value.__func__)]
    if isinstance(value, types.FunctionType):
        return _function(value, inner)
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return None if isinstance(value, types.ModuleType) else _name(value)
    return [_name(value), inner(dict(getattr(value, "__dict__", {})))]


def _function(f: types.FunctionType, inner: Callable[[Any], Any]) -> Any:
    if _name(f).startswith(OWN):
        return _name(f)
    code, cells = f.__code__, {}
    for name, cell in zip(code.co_freevars, f.__closure__ or (), strict=True):
        try:
            cells[name] = inner(cell.cell_contents)
        except ValueError:  # not filled yet
            cells[name] = None
    outer = {name: inner(f.__globals__[name]) for name in code.co_names if name in f.__globals__}
    return [_name(f), _code(code), cells, outer, inner([f.__defaults__, f.__kwdefaults__])]


def _code(code: types.CodeType) -> Any:
    """What a piece of code does: its instructions, and the constants and names in them."""
    constants = [_code(v) if isinstance(v, types.CodeType) else repr(v) for v in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest()[:16], constants, list(code.co_names), list(code.co_varnames)]
