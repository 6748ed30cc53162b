r"""Velocity networks of torchcfm and flow_matching: v(x, t) or v(t, x), noise at 0, data at 1.

The order of the arguments is read from their names, or declared as `arguments="xt" | "tx"`. The path is not in the
network: declare `path=`, or hand over the `matcher=` of torchcfm that it was trained with:

| matcher | path |
|---|---|
| `ConditionalFlowMatcher`, `ExactOptimalTransportConditionalFlowMatcher` | `CondOT`; `Smoothed` if its σ > 0 |
| `TargetConditionalFlowMatcher` | `CondOT(sigma_min=σ)` |
| `VariancePreservingConditionalFlowMatcher`, σ = 0 | `Trig` |

Independent flow matching with $\sigma > 0$ trains on $x = t z + (1-t)\varepsilon_0 + \sigma\varepsilon_1$: one Gaussian
of standard deviation $s(t) = \sqrt{(1-t)^2 + \sigma^2}$, and the mean of $z - \varepsilon_0$ given $x$ is
$\hat z + \dot s\,\hat\varepsilon$, the velocity of that path. With mini-batch optimal transport noise and data are no
longer independent: the velocity and the likelihood of its ODE hold, what is derived from scores (SDE samplers) does
not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import Reordered, Wrapper, argument_order, count, filled, place
from flowsolve.paths import CondOT, Path, Trig
from flowsolve.predictions import PREDICTIONS

__all__ = ["DECLARES", "NAMES", "Smoothed", "recognise"]

NAMES = ("torchcfm", "flow_matching")
DECLARES = ("net", "matcher", "arguments")


@dataclass(frozen=True)
class Smoothed(Path):
    """α = t, σ = √((1 − t)² + smoothing²): independent flow matching with a constant σ (Tong et al. 2023)."""

    smoothing: float

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothing < 1.0:
            raise ValueError(f"smoothing = {self.smoothing!r}; expected 0 < smoothing < 1 (0 is CondOT())")

    @property
    def prior_std(self) -> float:
        return self.sigma(0.0)

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        sigma = m.sqrt((1.0 - t) ** 2 + self.smoothing**2)
        return t, sigma, 1.0 + 0.0 * t, (t - 1.0) / sigma

    def _time(self, log_snr: Any, m: Any) -> Any:
        r, s = m.exp(log_snr), 1.0 + self.smoothing**2  # t² = r² ((1 − t)² + smoothing²)
        return r * s / (r + m.sqrt(s - r * r * self.smoothing**2))

    def _to_native(self, t: Any) -> Any:
        return t

    def _from_native(self, native: Any) -> Any:
        return native


class Concatenated(Wrapper):
    """A network of one argument, the state with time as its last feature (torchcfm's MLP)."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(torch.cat((x, t.to(x.dtype)[:, None]), 1), **cond)  # type: ignore[no-any-return]


def ordered(net: Any, said: Mapping[str, Any]) -> tuple[Callable[[Any], Any] | None, str]:
    """(how to call a network as net(x, t), what it was told by); None where nothing tells."""
    order = said.get("arguments")
    if order not in (None, "xt", "tx"):
        raise ValueError(f"arguments = {order!r}; expected 'xt' or 'tx'")
    by = "declared" if order else "by their names"
    if order is None and getattr(net, "time_varying", None) is True and type(net).__module__.startswith("torchcfm"):
        return Concatenated, "one argument, x with t behind"
    order = order or argument_order(net)
    if order is None:
        return None, ""
    return (Reordered if order == "tx" else lambda n: n), f"arguments ({order[0]}, {order[1]}), {by}"


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """A network of torchcfm or flow_matching, or one declared to be such."""
    net = source.given if source.kind == "object" else said.get("net")
    evidence = []
    name, sure = str(said.get("format") if asked else NAMES[0]), 1.0 if asked else 0.0
    if source.kind == "object":
        home = type(net).__module__.split(".")[0]
        if home in NAMES:
            name, sure = home, 0.95
            evidence.append(f"class {type(net).__name__} of {home}")
        elif not asked and said.get("matcher") is None:
            return None
    elif source.kind not in ("torch", "safetensors"):
        return None
    elif "net_model" in source.top or "ema_model" in source.top:
        sure = max(sure, 0.9)
        evidence.append(f"keys {', '.join(source.top)}, as torchcfm's training scripts save them")
    elif not asked:
        return None
    if said.get("matcher") is not None:
        sure = max(sure, 0.95)
    path, told = _matched(said.get("matcher"))
    evidence += told
    missing = []
    if net is None:
        missing.append("net= (the network that the weights belong to)")
    if path is None and "path" not in said:
        missing.append("path= (such as fs.paths.CondOT()), or matcher= (torchcfm's flow matcher)")
    call, how = (None, "") if net is None else ordered(net, said)
    if how:
        evidence.append(how)
    if net is not None and call is None:
        missing.append("arguments='xt' or 'tx' (the names of its arguments do not tell)")

    def network(device: Any, dtype: Any) -> Any:
        assert call is not None
        return call(place(filled(net, source), device, dtype))

    return Finding(
        source.title,
        name,
        sure,
        tuple(evidence),
        path,
        PREDICTIONS["velocity"],
        "flow",
        "t",
        parameters=count(net, source),
        missing=tuple(missing),
        network=network,
    )


def _matched(matcher: Any) -> tuple[Path | None, list[str]]:
    if matcher is None:
        return None, []
    name, sigma = type(matcher).__name__, float(getattr(matcher, "sigma", 0.0))
    told = [f"matcher= declared: {name}(sigma={sigma:g})"]
    if name in ("ConditionalFlowMatcher", "ExactOptimalTransportConditionalFlowMatcher"):
        return (Smoothed(sigma) if sigma else CondOT()), told
    if name == "TargetConditionalFlowMatcher":
        return CondOT(sigma), told
    if name == "VariancePreservingConditionalFlowMatcher" and sigma == 0.0:
        return Trig(), told
    raise ValueError(
        f"matcher = {name}(sigma={sigma:g}) trains on no path of the form αz + σε; supported are "
        "ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher, TargetConditionalFlowMatcher, and "
        "VariancePreservingConditionalFlowMatcher with sigma = 0"
    )
