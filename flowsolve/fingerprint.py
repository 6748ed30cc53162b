"""What decides a result, as plain values: a solver spelt out, a checkpoint's digest.

`fingerprint` says in full what makes a flow the same flow; `marks` says it in three short digests, of the path, of the
prediction and of all of it, by which a solver that was fitted to a checkpoint knows it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from flowsolve._batch import hosted
from flowsolve.flow import Flow
from flowsolve.guidance import Guided
from flowsolve.identity import digest, identity, module_digest
from flowsolve.transforms import Chain

__all__ = ["Elsewhere", "fingerprint", "marks", "spell"]

CLOCK, TIMES = (0.25, 0.5, 0.75), 1024
"""Flow times at which clocks are compared, and the intervals between those at which paths are."""


def spell(value: Any) -> Any:
    """A setting as JSON can hold it, the same in every process.

    A dataclass is its name and what is not a default, a network its name and the digest of its weights, a function its
    name and the digest of what it depends on (`flowsolve.identity`).

    Examples:
        >>> from flowsolve.fingerprint import spell
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
        return {"net": type(value).__qualname__, "weights": module_digest(value)}
    if isinstance(value, Chain):
        return [spell(value.first), *map(spell, value.maps), spell(value.ends())]
    if isinstance(value, Tensor | np.ndarray):
        return {"tensor": list(value.shape), "digest": digest(value)}
    if is_dataclass(value) and not isinstance(value, type):
        given = [f"{f.name}={_text(getattr(value, f.name))}" for f in fields(value) if f.init and _given(value, f)]
        return f"{getattr(value, 'known_as', type(value).__name__)}({', '.join(given)})"
    if isinstance(value, Mapping):
        return {str(k): spell(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [spell(v) for v in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return identity(value)


def _text(value: Any) -> str:
    spelt = spell(value)
    return spelt if isinstance(spelt, str) and not isinstance(value, str) else repr(spelt)


def _given(value: Any, f: Any) -> bool:
    here = getattr(value, f.name)
    if f.default is not MISSING:
        return bool(here != f.default)
    return f.default_factory is MISSING or bool(here != f.default_factory())


def fingerprint(flow: Flow) -> dict[str, Any]:
    """What makes a flow the same flow: its conventions, its transform, and the digest of its network's parameters and
    buffers; of a guided flow, its settings and the flows that it is made of.

    A path is known by its values and settings, a prediction by its row, a clock, and a scale that depends on the noise
    level, by some of their values, a function by what it depends on.
    """
    found: dict[str, Any] = {"flow": type(flow).__name__}
    if isinstance(flow, Guided):
        found |= {"base": fingerprint(flow.base), "settings": spell(flow.settings)}
    else:
        found["flow"] = repr(flow)
        found |= spell(flow.net) if isinstance(flow.net, nn.Module) else {"net": spell(flow.net), "weights": None}
        found["clock"] = [float(flow.clock(t)) for t in CLOCK]
        found["path"], found["row"] = _curve(flow)
        found["dtype"] = str(flow.dtype)
    return {**found, "transform": spell(flow.transform), "nfe_per_call": list(flow.nfe_range)}


def _curve(flow: Flow) -> tuple[str, str]:
    """Digests of the path and of the prediction's row along it."""
    path, times = flow.path, torch.arange(0, TIMES + 1, dtype=torch.float64, device="cpu") / TIMES
    inner = times[1:-1]
    values = [f(inner) for f in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot)]
    numbers = [v for _, v in sorted(vars(path).items()) if isinstance(v, int | float | tuple)]
    flat = torch.tensor(
        [float(x) for v in numbers for x in (v if isinstance(v, tuple) else (v,)) if _plain(x)], device="cpu"
    )
    rows = [hosted(v, dtype=torch.float64).expand(len(inner)) for v in flow.prediction.row(path.at(inner))]
    return digest(*values, flat.double()), digest(*rows)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float)


class Elsewhere:
    """Stands for a network that another program calls, as a pipeline does: nothing is known of it."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """There is nothing to be called."""
        raise RuntimeError("a scheduler has no network; the pipeline calls it")


_known: WeakKeyDictionary[Flow, tuple[Any, dict[str, str]]] = WeakKeyDictionary()


def marks(flow: Flow) -> dict[str, str]:
    """Digests of a flow's path, of its prediction, and of all that makes it the same flow but its transform.

    Of a network that is `Elsewhere` the path alone is known. They are remembered until a weight is written to.
    """
    state = flow.path, flow.prediction, tuple(map(_written, flow.nets))
    known = _known.get(flow)
    if known is not None and known[0] == state:
        return known[1]
    path, row = _curve(flow)
    found = {"path": path}
    if not isinstance(flow.net, Elsewhere):
        told = {k: v for k, v in fingerprint(flow).items() if k != "transform"}
        text = json.dumps(told, sort_keys=True, ensure_ascii=False)
        found |= {"prediction": row, "network": hashlib.sha256(text.encode()).hexdigest()[:16]}
    _known[flow] = state, found
    return found


def _written(net: Any) -> Any:
    """Changes when a network is replaced or one of its tensors written to."""
    if not isinstance(net, nn.Module):
        return id(net)
    tensors = [*net.parameters(), *net.buffers()]
    return id(net), tuple((v.data_ptr(), 0 if v.is_inference() else v._version) for v in tensors)
