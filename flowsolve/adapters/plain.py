"""Anything else: a callable, or weights with the network that they belong to, whose conventions are declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import FirstHalf, count, filled, place
from flowsolve.adapters.velocity import ordered
from flowsolve.paths import CondOT

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("plain",)
DECLARES = ("net", "arguments")


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """A callable, or weights, with path= and prediction= declared."""
    net = source.given if source.kind == "object" else said.get("net")
    if source.kind == "object" and not callable(net):
        return None
    if source.kind not in ("object", "torch", "safetensors"):
        return None
    if not asked and not {"path", "prediction"} & set(said):
        return None
    missing = [f"{k}= (a plain network does not say it)" for k in ("path", "prediction") if k not in said]
    straight = isinstance(said.get("path"), CondOT)
    if "time" not in said and not straight:
        missing.append("time='flow', 'native' or a function of flow time")
    if net is None:
        missing.append("net= (the network that the weights belong to)")
    call, how = (None, "") if net is None else ordered(net, said)
    if net is not None and call is None:
        call, how = (lambda n: n), "arguments (x, t), as nothing says otherwise"

    def network(device: Any, dtype: Any) -> Any:
        assert call is not None
        placed = call(place(filled(net, source), device, dtype))
        return FirstHalf(placed).eval() if isinstance(net, nn.Module) else placed

    return Finding(
        source.title,
        "plain", 1.0 if asked or not missing else 0.8, (how,) if how else (),
        time="flow" if straight else None, clock="t" if straight else "", parameters=count(net, source),
        missing=tuple(missing), network=network,
    )  # fmt: skip
