r"""DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024): one architecture, two conventions.

Their weights have the same names, so that only what the training script saved beside them (`args`) or the caller tells
them apart.

| format | path | time | output |
|---|---|---|---|
| `dit` | the linear table of 1000 steps | $k$ | ε, and a learned variance |
| `sit`, `path_type="Linear"` | `CondOT` | $t$ | velocity, or score, or noise |
| `sit`, `path_type="GVP"` | `Trig` | $t$ | the same |
| `sit`, `path_type="VP"` | `VP` | $1 - \tau$ | the same |

Both run from noise 0 to data 1 in SiT, as here. The condition is `y`; the latents are those of Stable Diffusion's VAE
times 0.18215.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from flowsolve.adapters.clocks import Linear
from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import FirstHalf, count, filled, place
from flowsolve.paths import VP, CondOT, Discrete, Path, Point, Trig
from flowsolve.predictions import PREDICTIONS, Prediction, Row, resolve
from flowsolve.transforms import Latent

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("dit", "sit")
DECLARES = ("net", "path_type")
LAYERS = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight")  # fmt: skip  # noqa: E501
PATHS: dict[str, Path] = {"Linear": CondOT(), "GVP": Trig(), "VP": VP()}
LATENT_SCALE = 0.18215


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """DiT or SiT weights by the names of their layers, or a network by its layers and class."""
    if source.kind == "object":
        net = source.given
        if not isinstance(net, nn.Module):
            return None
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    else:
        net, shapes = said.get("net"), source.tensors
    if not all(k in shapes for k in LAYERS):
        if asked and source.kind != "object":
            source.require_trust()
            raise ValueError(f"{source.given} has not the layers of DiT or SiT, such as {LAYERS[0]!r}")
        if not asked:
            return None
    evidence = [f"tensors {', '.join(LAYERS[:2])}, …"] if all(k in shapes for k in LAYERS) else []
    if evidence:
        _, channels, *patch = shapes[LAYERS[0]]
        outer = shapes[LAYERS[3]][0] // torch.Size(patch).numel()
        evidence.append(
            f"{channels} channels in, {outer} out: {'a' if outer == 2 * channels else 'no'} learned variance"
        )
    kind, sure, options = _kind(source, said, evidence)
    missing = []
    if net is None:
        missing.append("net= (the DiT or SiT that the weights belong to)")
    path: Path | None = None
    prediction: Prediction | None = None
    time: Any = None
    clock = ""
    if kind is None:
        missing.append("format='dit' or 'sit' (their weights have the same names), or path=, prediction= and time=")
    elif kind == "dit":
        path, prediction, time, clock = Discrete.linear(), PREDICTIONS["noise"], "native", "the index k of the table"
    else:
        path, prediction, time, clock, lacking = _sit(options, said)
        missing += lacking

    def network(device: Any, dtype: Any) -> Any:
        return FirstHalf(place(filled(net, source), device, dtype)).eval()

    return Finding(
        source.title,
        kind or "dit or sit",
        sure,
        tuple(evidence),
        path,
        prediction,
        time,
        clock,
        transform=Latent(LATENT_SCALE),
        parameters=count(net, source),
        missing=tuple(missing),
        network=network,
    )


def _kind(source: Source, said: Mapping[str, Any], evidence: list[str]) -> tuple[str | None, float, dict[str, Any]]:
    """('dit', 'sit' or None, confidence, what the training script's arguments say)."""
    args = source.content.get("args") if isinstance(source.content, Mapping) else None
    options = {k: getattr(args, k, None) for k in ("path_type", "prediction")}
    if said.get("format") in NAMES:
        return str(said["format"]), 1.0, options
    if options["path_type"] is not None:
        evidence.append(f"args of training: path_type = {options['path_type']}, prediction = {options['prediction']}")
        return "sit", 0.95, options
    return None, 0.5, options


def _sit(
    options: Mapping[str, Any], said: Mapping[str, Any]
) -> tuple[Path | None, Prediction | None, Any, str, list[str]]:
    kind = said.get("path_type") or options["path_type"]
    missing = []
    if kind is None and "path" not in said:
        missing.append("path_type='Linear', 'GVP' or 'VP' (published SiT models are Linear)")
    if kind is not None and kind not in PATHS:
        raise ValueError(f"path_type = {kind!r}; expected one of {', '.join(PATHS)}")
    told = said.get("prediction") or options["prediction"]
    if told is None:
        missing.append("prediction='velocity', 'noise' or 'score' (published SiT models predict the velocity)")
    path = said.get("path") or (None if kind is None else PATHS[kind])
    prediction = None if told is None else resolve(told)
    if not isinstance(path, VP):
        return path, prediction, "flow", "t", missing
    vp = path
    if prediction is not None and prediction.name == "velocity":
        # their velocity is per unit of 1 − τ, ours per unit of flow time, which leaves out τ < tau_min
        rate = 1.0 - vp.tau_min
        prediction = Prediction("velocity", partial(_scaled, rate=rate))
    return path, prediction, Linear(1.0, vp, falling=True), "1 − τ", missing


def _scaled(point: Point, rate: float) -> Row:
    return Row(point.alpha_dot, point.sigma_dot, rate)
