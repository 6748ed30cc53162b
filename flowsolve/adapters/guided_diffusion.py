r"""guided-diffusion and ADM (Dhariwal & Nichol 2021): a bare state dict, or the network in memory.

The weights name their layers, and say by the channels of the last one whether a variance was learned (twice the
channels of the first: the second half is not used, whatever their number). They say nothing of the schedule:

* `schedule="linear"`: $\beta$ evenly from $10^{-4}s$ to $0.02s$, $s = 1000/N$; `"cosine"`: improved DDPM's, with
  $\beta \le 0.999$;
* `steps=N` (1000 unless declared), and `rescale_timesteps=True` if the network reads $1000k/N$ instead of $k$.

The published 64×64 ImageNet model is cosine, the others are linear. The networks of torchcfm have the same layer names;
without a learned variance the format has to be declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flowsolve.adapters.clocks import Linear
from flowsolve.adapters.diffusers.tables import alphas_cumprod, table_size
from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import FirstHalf, count, filled, place
from flowsolve.paths import Discrete
from flowsolve.predictions import PREDICTIONS
from flowsolve.transforms import Range

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("guided-diffusion", "adm")
DECLARES = ("net", "schedule", "steps", "rescale_timesteps", "predict_xstart")
LAYERS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "out.2.weight")
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """ADM weights by the names of their layers, or an ADM network by its class and module."""
    evidence: list[str] = []
    sure = 1.0 if asked else 0.0
    if source.kind == "object":
        net = source.given
        home = type(net).__module__.split(".")[0]
        ours = home in ("guided_diffusion", "improved_diffusion")
        if not isinstance(net, nn.Module) or not (asked or ours):
            return None
        if ours:
            evidence, sure = [f"class {type(net).__name__} of {home}"], 0.95
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    else:
        net, shapes = said.get("net"), source.tensors
        if not all(k in shapes for k in LAYERS):
            if asked and source.kind in ("torch", "safetensors"):
                source.require_trust()
                absent = next(k for k in LAYERS if k not in shapes)
                raise ValueError(f"{source.given} has no tensor {absent!r}; these are no guided-diffusion weights")
            return None
        if any("transformer_blocks" in k for k in shapes) or "net_model" in source.top or "ema_model" in source.top:
            return None
        evidence = [f"tensors {', '.join(LAYERS[:2])}, …, {LAYERS[3]}"]
    if LAYERS[1] in shapes:
        inner, outer = shapes[LAYERS[1]][1], shapes[LAYERS[3]][0]
        evidence.append(f"{inner} channels in, {outer} out: {'a' if outer == 2 * inner else 'no'} learned variance")
        sure = max(sure, 0.9 if outer == 2 * inner else 0.6)
    if any(k.startswith("label_emb") for k in shapes):
        evidence.append("label_emb: conditioned on y")
    missing = []
    if net is None:
        missing.append("net= (the UNetModel that the weights belong to)")
    schedule, path = said.get("schedule"), None
    steps = table_size(said, "steps")
    if schedule is None and "path" not in said:
        missing.append("schedule='linear' or 'cosine' (the weights do not say; ImageNet 64×64 is cosine)")
    elif schedule is not None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule = {schedule!r}; expected 'linear' or 'cosine'")
        s = 1000.0 / steps
        config = {"num_train_timesteps": steps, "beta_schedule": SCHEDULES[schedule]}
        path = Discrete(alphas_cumprod({**config, "beta_start": 1e-4 * s, "beta_end": 0.02 * s}))
        evidence.append(f"schedule= declared: {schedule}, {steps} steps")
    scale = 1000.0 / steps if said.get("rescale_timesteps") else 1.0

    curve: Any = said.get("path") or path

    def network(device: Any, dtype: Any) -> Any:
        return FirstHalf(place(filled(net, source), device, dtype)).eval()

    return Finding(
        source.title,
        NAMES[0],
        sure,
        tuple(evidence),
        path,
        PREDICTIONS["data" if said.get("predict_xstart") else "noise"],
        None if curve is None else Linear(scale, curve) if scale != 1.0 else "native",
        f"{scale:g} k" if scale != 1.0 else "the index k of the table",
        transform=Range(-1.0, 1.0),
        parameters=count(net, source),
        missing=tuple(missing),
        network=network,
    )
