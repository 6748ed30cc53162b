r"""Single files of Stable Diffusion and its kin: what their tensors and metadata say.

A single file holds weights in the layout of the training code, without the architecture: give the network itself as
`net=`. What it says of the convention:

| seen | becomes |
|---|---|
| width of `attn2.to_k`: 768, 1024, 2048 (1280) | SD 1, SD 2, SDXL (its refiner): the `scaled_linear` table |
| key `v_pred`, or metadata `modelspec.prediction_type` | prediction `v`, or what the metadata say |
| key `ztsnr` | the table with zero terminal SNR |
| keys `edm_mean`, `edm_std` (Playground) | `EDM` with $\sigma_d = 0.5$, $F$ |
| keys `edm_vpred.sigma_min`, `edm_vpred.sigma_max` (CosXL) | `EDM` between them with $\sigma_d = 1$, v |
| `joint_blocks` (SD 3) | `CondOT`, the clock $1000(1-t)$, velocity towards the noise |
| `double_blocks` and `guidance_in` (FLUX dev) | `CondOT`, the clock $1 - t$, velocity towards the noise |
| `double_blocks` without `guidance_in` (FLUX schnell) | refused unless `distilled=False`: it is distilled |

**Averaged weights** (`model_ema.…`, the names of the raw ones without their dots) are taken where they lie beside the
raw ones, `model.diffusion_model.…`, as training scripts sample with them; the evidence says which were taken.

**LoRA** files hold updates of another network's weights, and are named as such.

Where neither a key nor the metadata name the prediction it has to be declared: fine-tunes that predict v carry the very
tensors of those that predict ε.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flowsolve.adapters.clocks import Linear
from flowsolve.adapters.diffusers.convention import FLOW, JUMPS
from flowsolve.adapters.diffusers.tables import alphas_cumprod
from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.lora import REFUSAL, is_lora
from flowsolve.adapters.networks import (
    FirstHalf,
    Preconditioned,
    Preconditioning,
    fill,
    place,
    preconditioned,
    require_unscaled,
)
from flowsolve.paths import EDM, CondOT, Discrete, Path
from flowsolve.predictions import PREDICTIONS, Prediction
from flowsolve.transforms import Latent

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("stable-diffusion",)
DECLARES = ("net", "distilled")
PREFIX = "model.diffusion_model."
EMA = "model_ema."
WIDTHS = {768: "SD 1", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}
LATENT = {"SD 1": 0.18215, "SD 2": 0.18215, "SDXL refiner": 0.13025, "SDXL": 0.13025}
PREDICTION_TYPES = {"epsilon": "noise", "eps": "noise", "v": "v", "v_prediction": "v", "sample": "data"}
EDM_STATE = ("edm_mean", "edm_std", "edm_vpred.sigma_min", "edm_vpred.sigma_max", "v_pred", "ztsnr")


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """Single-file weights by the names and shapes of their tensors."""
    if source.kind not in ("safetensors", "torch"):
        return None
    names = source.tensors
    if is_lora(names):
        first = f"tensors {next(iter(names))}, …"
        return Finding(str(source.given), NAMES[0], 0.95, (first,), parameters=_count(names), refusal=REFUSAL)
    bare = {k.removeprefix(PREFIX): shape for k, shape in names.items() if not k.startswith(EMA)}
    cross = next((s for k, s in bare.items() if k.endswith("attn2.to_k.weight") and "input_blocks" in k), None)
    evidence: list[str] = [f"metadata {k}: {v}" for k, v in source.metadata.items() if k.startswith("modelspec.")][:4]
    if cross is not None and len(cross) == 2:
        return _unet(source, said, bare, cross[1], evidence)
    if any(k.startswith("joint_blocks.") for k in bare):
        evidence.append("tensors joint_blocks.…")
        return _flow(source, said, bare, "SD 3", 1000.0, 1.5305, 0.0609, evidence, None)
    if any(k.startswith("double_blocks.") for k in bare) and "img_in.weight" in bare:
        evidence.append("tensors double_blocks.…, img_in")
        guided = any(k.startswith("guidance_in.") for k in bare)
        evidence.append(f"guidance_in: {'yes' if guided else 'no'}")
        refusal = (
            None
            if guided or said.get("distilled") is False
            else (
                f"FLUX without guidance_in is the schnell model: {JUMPS}. If this one is not distilled, declare "
                "distilled=False"
            )
        )
        return _flow(source, said, bare, "FLUX", 1.0, 0.3611, 0.1159, evidence, refusal)
    if any(k.startswith(("down_blocks.", "transformer_blocks.")) for k in bare) and source.kind == "safetensors":
        return Finding(
            str(source.given), "diffusers", 0.9, ("tensors down_blocks.… or transformer_blocks.…",),
            parameters=_count(bare),
            refusal="these are the weights of one diffusers model; give the directory that holds them with config.json",
        )  # fmt: skip
    return None


def _unet(source: Source, said: Mapping[str, Any], bare: Mapping[str, Any], width: int, evidence: list[str]) -> Finding:
    names = source.tensors
    kind = WIDTHS.get(width)
    evidence.append(f"attn2.to_k of width {width}: {kind or 'no known model'}")
    evidence += _averaged(names)[1]
    marks = [k for k in EDM_STATE if k in names]
    evidence += [f"key {k}" for k in marks]
    inner = bare["input_blocks.0.0.weight"][1] if "input_blocks.0.0.weight" in bare else 4
    missing, refusal = [], None
    if inner != 4:
        refusal = (
            f"its network takes {inner} channels (inpainting, editing, depth): concatenate the others in a function "
            "of yours, and make a flow of that"
        )
    stated = source.metadata.get("modelspec.prediction_type", "").lower()
    if stated and stated not in PREDICTION_TYPES:
        missing.append(f"prediction= (modelspec.prediction_type = {stated!r} is not known)")
    path: Path | None
    prediction: Prediction | None
    time: Any = "native"
    clock, edm = "σ", None
    if "edm_vpred.sigma_max" in marks:
        low, high = source.number("edm_vpred.sigma_min", 0.002), source.number("edm_vpred.sigma_max", 120.0)
        path, prediction, edm, clock = EDM(low, high), preconditioned(1.0, v=True), 1.0, "σ; inside, ¼ log σ"
    elif "edm_mean" in marks or "edm_std" in marks:
        path, prediction, edm, clock = EDM(), preconditioned(0.5), 0.5, "σ; inside, ¼ log σ"
    else:
        zero = "ztsnr" in marks
        config = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": zero}
        path, clock = Discrete(alphas_cumprod({**config, "beta_start": 0.00085, "beta_end": 0.012})), "the index k"
        told = "v" if "v_pred" in marks else PREDICTION_TYPES.get(stated)
        if "v_pred" in marks and PREDICTION_TYPES.get(stated, "v") != "v":
            missing.append(f"prediction= (key v_pred, but modelspec.prediction_type = {stated!r})")
            told = None
        prediction = None if told is None else PREDICTIONS[told]
        if told is None and not missing:
            missing.append("prediction='noise' or 'v' (neither a key nor the metadata say)")
    if said.get("net") is None:
        missing.append("net= (the UNetModel that the weights belong to)")

    if "prediction" in said or "time" in said:
        edm = None
    if edm is not None:
        require_unscaled(said.get("path"))

    def network(device: Any, dtype: Any) -> Any:
        net = FirstHalf(_filled(source, said, device, dtype)).eval()
        return net if edm is None else Preconditioned(net, Preconditioning(edm)).eval()

    return Finding(
        str(source.given), NAMES[0], 0.95 if kind else 0.6, tuple(evidence), path, prediction, time, clock,
        transform=Latent(LATENT[kind]) if kind in LATENT else None, parameters=_count(bare), missing=tuple(missing),
        refusal=refusal, network=network,
    )  # fmt: skip


def _flow(
    source: Source, said: Mapping[str, Any], bare: Mapping[str, Any], what: str, scale: float, latent: float,
    shift: float, evidence: list[str], refusal: str | None,
) -> Finding:  # fmt: skip
    return Finding(
        str(source.given),
        NAMES[0],
        0.95,
        (*evidence, f"the layout of {what}"),
        CondOT(),
        FLOW,
        Linear(scale, falling=True),
        f"{scale:g} (1 − t)",
        transform=Latent(latent, shift),
        parameters=_count(bare),
        missing=() if said.get("net") is not None else ("net= (the transformer that the weights belong to)",),
        refusal=refusal,
        network=lambda device, dtype: _filled(source, said, device, dtype),
    )


def _filled(source: Source, said: Mapping[str, Any], device: Any, dtype: Any) -> Any:
    source.require_trust()
    state = source.state()
    taken = _averaged(state)[0]
    if any(k.startswith(PREFIX) for k in state):
        state = {k.removeprefix(PREFIX): state[taken.get(k, k)] for k in state if k.startswith(PREFIX)}
    return place(fill(said["net"], {k: v for k, v in state.items() if k not in EDM_STATE}, source.file), device, dtype)


def _averaged(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The averaged tensor for each raw one of the network, where all of them have one; and what to say of that."""
    raw = [k for k in names if k.startswith(PREFIX)]
    held = {k for k in names if k.startswith(EMA)}
    pairs = {k: twin for k in raw if (twin := EMA + k.removeprefix("model.").replace(".", "")) in held}
    if not pairs:
        return {}, []
    if len(pairs) < len(raw):
        return {}, [f"{EMA}…: averages of {len(pairs)} of {len(raw)} tensors; the raw weights are taken"]
    return pairs, [f"{EMA}…: averaged weights beside the raw ones; the averaged are taken"]


def _count(bare: Mapping[str, Any]) -> int:
    return sum(torch.Size(s).numel() for s in bare.values())
