r"""score_sde networks (Song et al. 2021), continuous in time.

A network says what it was trained on only if it still carries its configuration (`net.config`); otherwise
`sde="vp" | "subvp" | "ve"` (or one of score_sde's SDE objects, or a path) has to be declared, with the constants where
they are not the usual ones.

| SDE | path | label | output |
|---|---|---|---|
| `vp` | `VP(beta_min, beta_max)` | $999\,\tau$ | ε (the score is −output/σ) |
| `subvp` | `SubVP(beta_min, beta_max)` | $999\,\tau$ | ε |
| `ve` | `VE(sigma_min, sigma_max)` | $\sigma(\tau)$ | the score |

with $\tau = 1$ the noise. Pixels run over $[-1, 1]$ where the configuration says `centered` and over $[0, 1]$ where it
does not; without one, the published recipes are taken: centred for VP and sub-VP, not for VE. A `.pth` file holds
`{optimizer, model, ema, step}`: give it the network as `net=`, and it gets the averaged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flowsolve.adapters.clocks import Linear
from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import count, filled, place
from flowsolve.paths import VE, VP, Path, SubVP
from flowsolve.predictions import PREDICTIONS
from flowsolve.transforms import Range

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("score_sde",)
DECLARES = ("net", "sde", "beta_min", "beta_max", "sigma_min", "sigma_max", "continuous")
CLASSES = ("NCSNpp", "DDPM", "NCSNv2", "NCSNv2_128", "NCSNv2_256", "NCSN")
SDES = {"vp": "vp", "vpsde": "vp", "subvp": "subvp", "sub-vp": "subvp", "subvpsde": "subvp", "ve": "ve", "vesde": "ve"}


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """A score_sde network in memory, or a .pth file of one."""
    net = source.given if source.kind == "object" else said.get("net")
    evidence: list[str] = []
    if source.kind == "object":
        if not isinstance(net, nn.Module):
            return None
        if type(net).__name__ in CLASSES and hasattr(net, "all_modules"):
            evidence.append(f"class {type(net).__name__} with all_modules")
    elif source.kind in ("torch", "safetensors"):
        if {"optimizer", "model", "ema", "step"} <= set(source.top):
            evidence.append("keys optimizer, model, ema, step")
        if any(k.startswith("all_modules.") for k in source.tensors):
            evidence.append("tensors all_modules.…")
    if not (evidence or asked) or source.kind not in ("object", "torch", "safetensors"):
        return None
    sure = asked or source.kind == "object" or "tensors all_modules.…" in evidence
    kind, constants, told, centered = _sde(said, getattr(net, "config", None))
    given = said.get("path")
    kind = {VP: "vp", SubVP: "subvp", VE: "ve"}.get(type(given), kind)
    evidence += told
    missing = []
    refusal = None
    path: Path | None = None
    if kind is None:
        missing.append("sde='vp', 'subvp' or 've' (no file of score_sde says which)")
    elif said.get("continuous") is False:
        refusal = (
            "it was trained at whole steps (continuous = False), and then reads another label. For VP it is a table: "
            "declare path=fs.paths.Discrete(…), prediction='noise', time='native'"
        )
    elif kind == "ve":
        path = VE(constants.get("sigma_min", 0.01), constants.get("sigma_max", 50.0))
    else:
        path = {"vp": VP, "subvp": SubVP}[kind](constants.get("beta_min", 0.1), constants.get("beta_max", 20.0))
    if given is not None:
        path = given
    if net is None:
        missing.append("net= (the network that the weights belong to)")
    if centered is None and kind is not None:
        centered = kind != "ve"
        evidence.append(f"pixels {'centred' if centered else 'in [0, 1]'}, as in the published {kind} recipes")
    clock: Any = "native" if kind == "ve" else _label(path) if isinstance(path, VP) else None

    def network(device: Any, dtype: Any) -> Any:
        assert isinstance(net, nn.Module)
        return place(_averaged(net, source), device, dtype)

    return Finding(
        source.title,
        NAMES[0],
        0.95 if sure else 0.7,
        tuple(evidence),
        path,
        None if kind is None else PREDICTIONS["score" if kind == "ve" else "noise"],
        clock,
        "" if kind is None else "σ" if kind == "ve" else "999 τ",
        transform=None if kind is None else Range(-1.0 if centered else 0.0, 1.0),
        parameters=count(net, source),
        missing=tuple(missing),
        refusal=refusal,
        network=network,
    )


def _label(path: Path) -> Any:
    return Linear(999.0, path)


def _sde(said: Mapping[str, Any], config: Any) -> tuple[str | None, dict[str, float], list[str], bool | None]:
    """(kind, constants, evidence, centred): what is declared, else what the network's configuration says."""
    constants: dict[str, float] = {}
    told: list[str] = []
    centered = None
    kind = None
    model, training, data = (getattr(config, k, None) for k in ("model", "training", "data"))
    if (name := getattr(training, "sde", None)) is not None:
        kind = SDES.get(str(name).lower())
        told.append(f"net.config.training.sde = {name}")
        for key in ("beta_min", "beta_max", "sigma_min", "sigma_max"):
            if getattr(model, key, None) is not None:
                constants[key] = float(getattr(model, key))
        centered = getattr(data, "centered", None)
    declared = said.get("sde")
    if isinstance(declared, str):
        if declared.lower() not in SDES:
            raise ValueError(f"sde = {declared!r}; expected 'vp', 'subvp' or 've'")
        kind = SDES[declared.lower()]
        told.append(f"sde= declared: {kind}")
    elif declared is not None:
        kind = SDES.get(type(declared).__name__.lower())
        if kind is None:
            raise TypeError(f"sde is a {type(declared).__name__}; expected 'vp', 'subvp', 've' or an SDE of score_sde")
        told.append(f"sde= declared: a {type(declared).__name__}")
        names = {"beta_min": ("beta_0", "beta_min"), "beta_max": ("beta_1", "beta_max")}
        for key in ("beta_min", "beta_max", "sigma_min", "sigma_max"):
            for attribute in names.get(key, (key,)):
                if getattr(declared, attribute, None) is not None:
                    constants[key] = float(getattr(declared, attribute))
    constants |= {k: float(said[k]) for k in ("beta_min", "beta_max", "sigma_min", "sigma_max") if k in said}
    return kind, constants, told, centered


def _averaged(net: nn.Module, source: Source) -> nn.Module:
    """The network with the file's weights, averaged where the file has averages (in the order of its parameters)."""
    filled(net, source)
    ema = source.content.get("ema") if isinstance(source.content, Mapping) else None
    if not isinstance(ema, Mapping) or "shadow_params" not in ema:
        return net
    own = [p for p in net.parameters() if p.requires_grad]
    if len(own) != len(ema["shadow_params"]) or any(
        p.shape != s.shape for p, s in zip(own, ema["shadow_params"], strict=True)
    ):
        raise ValueError(f"the averaged weights of {source.file} do not belong to this {type(net).__name__}")
    with torch.no_grad():
        for p, s in zip(own, ema["shadow_params"], strict=True):
            p.copy_(s)
    return net
