"""What decides a result, as plain values: a solver spelt out, a checkpoint's digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowsolve._version import __version__
from flowsolve.flow import Flow

__all__ = ["digest", "fingerprint", "spell", "versions"]


def spell(value: Any) -> Any:
    """A setting as JSON can hold it, the same in every process: a dataclass by its name and what is not a default.

    Examples:
        >>> fs.runs.settings.spell(fs.solvers.Dopri5(rtol=1e-4))
        'Dopri5(rtol=0.0001)'
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor | np.ndarray):
        return {"tensor": list(value.shape), "digest": digest(value)}
    if is_dataclass(value) and not isinstance(value, type):
        given = [f"{f.name}={_text(getattr(value, f.name))}" for f in fields(value) if f.init and _given(value, f)]
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, Mapping):
        return {str(k): spell(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [spell(v) for v in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else f"{type(value).__module__}.{type(value).__qualname__}"


def _text(value: Any) -> str:
    spelt = spell(value)
    return spelt if isinstance(spelt, str) and not isinstance(value, str) else repr(spelt)


def _given(value: Any, f: Any) -> bool:
    here = getattr(value, f.name)
    if f.default is not MISSING:
        return bool(here != f.default)
    return f.default_factory is MISSING or bool(here != f.default_factory())


def digest(*tensors: Tensor | np.ndarray[Any, Any]) -> str:
    """A short digest of the shapes, dtypes and bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        t = torch.as_tensor(tensor).detach().cpu().contiguous()
        found.update(f"{t.dtype} {tuple(t.shape)};".encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def fingerprint(flow: Flow) -> dict[str, Any]:
    """What makes a flow the same flow: its conventions, and the digest of its network's parameters and buffers.

    A network without parameters is known by its name alone.
    """
    net = flow.net
    weights = None
    if isinstance(net, nn.Module):
        state = sorted((k, v) for k, v in net.state_dict().items() if isinstance(v, Tensor))
        weights = digest(*(v for _, v in state))
    return {
        "flow": repr(flow),
        "net": spell(net) if weights is None else f"{type(net).__qualname__}",
        "weights": weights,
        "clock": [float(flow.clock(t)) for t in (0.25, 0.5, 0.75)],
        "data_range": list(flow.data_range),
        "dtype": str(flow.dtype),
        "nfe_per_call": flow.nfe_per_call,
    }


def versions() -> dict[str, str]:
    """What computes: other versions may round otherwise."""
    return {"flowsolve": __version__, "torch": str(torch.__version__)}
