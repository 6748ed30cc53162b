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
from flowsolve.guidance import Guided
from flowsolve.transforms import Chain

__all__ = ["digest", "fingerprint", "spell", "versions"]

CLOCK = (0.25, 0.5, 0.75)
"""Flow times at which clocks are compared."""


def spell(value: Any) -> Any:
    """A setting as JSON can hold it, the same in every process.

    A dataclass is its name and what is not a default, a network its name and the digest of its weights, a function its
    name.

    Examples:
        >>> from flowsolve.runs.settings import spell
        >>> spell(fs.solvers.Dopri5(rtol=1e-4))
        'Dopri5(rtol=0.0001)'
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Flow):
        return fingerprint(value)
    if isinstance(value, nn.Module):
        state = sorted((k, v) for k, v in value.state_dict().items() if isinstance(v, Tensor))
        return {"net": type(value).__qualname__, "weights": digest(*(v for _, v in state))}
    if isinstance(value, Chain):
        return [spell(value.first), *map(spell, value.maps), spell(value.ends())]
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
    """What makes a flow the same flow: its conventions, its transform, and the digest of its network's parameters and
    buffers; of a guided flow, its settings and the flows that it is made of.

    A function is known by its name alone; a clock, and a scale that depends on the noise level, by some of its values.
    """
    found: dict[str, Any] = {"flow": type(flow).__name__}
    if isinstance(flow, Guided):
        found |= {"base": fingerprint(flow.base), "settings": spell(flow.settings)}
    else:
        found["flow"] = repr(flow)
        found |= spell(flow.net) if isinstance(flow.net, nn.Module) else {"net": spell(flow.net), "weights": None}
        found["clock"] = [float(flow.clock(t)) for t in CLOCK]
        found["dtype"] = str(flow.dtype)
    return {**found, "transform": spell(flow.transform), "nfe_per_call": list(flow.nfe_range)}


def versions() -> dict[str, str]:
    """What computes: other versions may round otherwise."""
    return {"flowsolve": __version__, "torch": str(torch.__version__)}
