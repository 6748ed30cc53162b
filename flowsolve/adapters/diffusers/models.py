"""diffusers' networks as `Flow` calls them: which arguments they take, and what their output holds.

A pipeline knows things of its network that no configuration says: whether the time is divided by 1000, and that an
output with twice the channels is a mean and a variance. They are in the table here. What conditions the network goes
through `cond=` under the network's own names:

| model | x | `cond` |
|---|---|---|
| `UNet2DModel` | image (B, C, H, W) | `class_labels` |
| `UNet2DConditionModel` | latent (B, C, H, W) | `encoder_hidden_states`, SDXL: `added_cond_kwargs` |
| `DiTTransformer2DModel` | latent (B, C, H, W) | `class_labels` |
| `PixArtTransformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `encoder_attention_mask`, `added_cond_kwargs` |
| `SD3Transformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `pooled_projections` |
| `FluxTransformer2DModel` | packed latent (B, L, 4C) | `encoder_hidden_states`, `pooled_projections`, `img_ids`, `txt_ids`, `guidance` |
| `Flux2Transformer2DModel` | packed latent (B, L, C) | `encoder_hidden_states`, `img_ids`, `txt_ids`, `guidance` |
| `ChromaTransformer2DModel` | packed latent (B, L, 4C) | `encoder_hidden_states`, `img_ids`, `txt_ids`, `attention_mask` |
| `QwenImageTransformer2DModel` | packed latent (B, L, 4C) | `encoder_hidden_states`, `encoder_hidden_states_mask`, `img_shapes` |
| `AuraFlowTransformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states` |
| `SanaTransformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `encoder_attention_mask` |
| `Lumina2Transformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `encoder_attention_mask` |
| `WanTransformer3DModel` | latent (B, C, F, H, W) | `encoder_hidden_states` |
| `HunyuanVideoTransformer3DModel` | latent (B, C, F, H, W) | `encoder_hidden_states`, `encoder_attention_mask`, `pooled_projections`, `guidance` |
| `LTXVideoTransformer3DModel` | packed latent (B, L, C) | `encoder_hidden_states`, `encoder_attention_mask`, `num_frames`, `height`, `width` |
| `LuminaNextDiT2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `encoder_mask`, `image_rotary_emb`, `cross_attention_kwargs` |
| `ZImageTransformer2DModel` | latent (B, C, H, W) | `cap_feats` (B, L, D) |
| `HiDreamImageTransformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states_t5`, `encoder_hidden_states_llama3` (B, layers, L, D), `pooled_embeds` |
| `HunyuanDiT2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `text_embedding_mask`, the same with `_t5`, `image_rotary_emb`, … |
| `CogView3PlusTransformer2DModel` | latent (B, C, H, W) | `encoder_hidden_states`, `original_size`, `target_size`, `crop_coords` |
| `CogVideoXTransformer3DModel` | latent (B, F, C, H, W) | `encoder_hidden_states`, `image_rotary_emb`; from a picture `image_latents` |
| `MochiTransformer3DModel` | latent (B, C, F, H, W) | `encoder_hidden_states`, `encoder_attention_mask` |
| `LatteTransformer3DModel` | latent (B, C, F, H, W) | `encoder_hidden_states`, `enable_temporal_attentions` |
| `AllegroTransformer3DModel` | latent (B, C, F, H, W) | `encoder_hidden_states`, `encoder_attention_mask`, `image_rotary_emb` |
| `SkyReelsV2Transformer3DModel`, `SanaVideoTransformer3DModel` | latent (B, C, F, H, W) | as Wan, Sana |
| `OvisImageTransformer2DModel`, `LongCatImageTransformer2DModel`, `BriaTransformer2DModel` | packed latent (B, L, 4C) | as Flux, without pooled text |
| `Kandinsky5Transformer3DModel` | latent (B, F, H, W, C) | `encoder_hidden_states`, `pooled_projections`, `visual_rope_pos`, `text_rope_pos`, `scale_factor` |
| `Kandinsky3UNet`, `UNet3DConditionModel` | latent (B, C, [F,] H, W) | `encoder_hidden_states`, `encoder_attention_mask` |
| `PriorTransformer` | embedding (B, D) | `proj_embedding`, `encoder_hidden_states`, `attention_mask` |
| `UNetSpatioTemporalConditionModel` | latent (B, F, C, H, W) | `encoder_hidden_states`, `added_time_ids`, `image_latents` |
| `StableAudioDiTModel` | latent (B, C, L) | `encoder_hidden_states`, `global_hidden_states`, `rotary_embedding` |
| `StableCascadeUNet` | latent (B, C, H, W) | `clip_text_pooled`, `clip_text`, `clip_img`, or `effnet` |
| `CogView4Transformer2DModel`, `GlmImageTransformer2DModel` | latent (B, C, H, W) | refused, but for a declared `time=`: their clock depends on the size |

Lumina 1 and 2 and Z-Image read 1 − σ and return the velocity towards the data, which HiDream does too; the other flows
read σ, times 1000 or not, and return that towards the noise. What is no tensor of samples (rotary embeddings, sizes) is
given with `fs.shared`. What packs an image or a film into L tokens is the pipeline's business.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve.adapters.networks import first_half

__all__ = ["MODELS", "Network", "UNet", "check_channels", "wrap"]


@dataclass(frozen=True)
class Model:
    """How a pipeline calls a class of networks.

    Attributes:
        part: the folders it is saved in.
        scale: what the scheduler's time is multiplied by.
        offset: what is added to it then.
        sign: of the output.
        option: an option of the network's configuration that multiplies its time too.
        packed: whether channels are not comparable, because tokens are packed outside the network.
        x, time: the network's names of state and time.
        beside: a condition that is concatenated to the state, where the network takes more channels than it returns.
        axis: of the channels.
        listed: whether state, output and these conditions are lists of samples; a picture is a film of one frame.
        layered: conditions whose samples are the network's second dimension.
        empty: conditions that the network asks for and its pipeline leaves None, by an option and its value.
        unshifted: whether the network is told the level before the scheduler's shift.
    """

    part: tuple[str, ...]
    scale: float = 1.0
    offset: float = 0.0
    sign: float = 1.0
    option: str = ""
    packed: bool = False
    x: str = "hidden_states"
    time: str = "timestep"
    beside: str = ""
    axis: int = 1
    listed: tuple[str, ...] = ()
    layered: tuple[str, ...] = ()
    empty: tuple[str, str, str] | None = None
    unshifted: bool = False


UNETS, TRANSFORMERS = ("unet",), ("transformer",)
IN_ALL = Model(UNETS, x="sample")
PLAIN, THOUSANDTH = Model(TRANSFORMERS), Model(TRANSFORMERS, scale=1e-3)
TO_DATA = Model(TRANSFORMERS, scale=-1e-3, offset=1.0, sign=-1.0)

MODELS = {
    "UNet2DModel": IN_ALL,
    "UNet2DConditionModel": replace(IN_ALL, empty=("encoder_hidden_states", "encoder_hid_dim_type", "image_proj")),
    "UNet3DConditionModel": IN_ALL,
    "UNetSpatioTemporalConditionModel": replace(IN_ALL, beside="image_latents", axis=2),
    "Kandinsky3UNet": IN_ALL,
    "StableCascadeUNet": Model(("prior", "decoder"), x="sample", time="timestep_ratio"),
    "PriorTransformer": Model(("prior",)),
    "DiTTransformer2DModel": PLAIN,
    "PixArtTransformer2DModel": PLAIN,
    "HunyuanDiT2DModel": PLAIN,
    "LatteTransformer3DModel": PLAIN,
    "AllegroTransformer3DModel": PLAIN,
    "CogVideoXTransformer3DModel": replace(PLAIN, beside="image_latents", axis=2),
    "CogView3PlusTransformer2DModel": PLAIN,
    "CogView4Transformer2DModel": replace(PLAIN, unshifted=True),
    "GlmImageTransformer2DModel": replace(PLAIN, unshifted=True),
    "StableAudioDiTModel": PLAIN,
    "SD3Transformer2DModel": PLAIN,
    "FluxTransformer2DModel": THOUSANDTH,
    "Flux2Transformer2DModel": THOUSANDTH,
    "ChromaTransformer2DModel": THOUSANDTH,
    "QwenImageTransformer2DModel": replace(THOUSANDTH, packed=True),
    "AuraFlowTransformer2DModel": THOUSANDTH,
    "SanaTransformer2DModel": replace(PLAIN, option="timestep_scale"),
    "LuminaNextDiT2DModel": TO_DATA,
    "Lumina2Transformer2DModel": TO_DATA,
    "ZImageTransformer2DModel": replace(TO_DATA, x="x", time="t", listed=("cap_feats",)),
    "HiDreamImageTransformer2DModel": replace(
        PLAIN, sign=-1.0, time="timesteps", layered=("encoder_hidden_states_llama3",)
    ),
    "WanTransformer3DModel": replace(PLAIN, beside="condition"),
    "SkyReelsV2Transformer3DModel": PLAIN,
    "SanaVideoTransformer3DModel": PLAIN,
    "OvisImageTransformer2DModel": THOUSANDTH,
    "LongCatImageTransformer2DModel": THOUSANDTH,
    "BriaTransformer2DModel": PLAIN,
    "HunyuanVideoTransformer3DModel": PLAIN,
    "LTXVideoTransformer3DModel": PLAIN,
    "MochiTransformer3DModel": PLAIN,
    "Kandinsky5Transformer3DModel": PLAIN,
}


class UNet(nn.Module):
    """A diffusers UNet, or any module unet(x, t).sample, whose forward returns the tensor itself."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return first_half(self.unet(x, t, **cond).sample, x)


class Network(nn.Module):
    """A diffusers network asked as its pipeline asks it."""

    def __init__(self, network: nn.Module, model: Model) -> None:
        super().__init__()
        self.network, self.model = network, model
        config: Any = network.config
        self.scale = model.scale * (float(config[model.option]) if model.option else 1.0)
        self.wide = bool(model.beside) and int(config["in_channels"]) != int(config["out_channels"])
        self.empty: dict[str, Any] = {}
        if model.empty is not None and config.get(model.empty[1]) == model.empty[2]:
            self.empty = {model.empty[0]: None}

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        model, given = self.model, {**self.empty, **cond}
        time = self.scale * t + model.offset if model.offset else self.scale * t
        state: Any = x
        if self.wide:
            if model.beside not in given:
                raise ValueError(f"{type(self.network).__name__} asks for {model.beside}, beside the state; pass cond=")
            state = torch.cat([x, given.pop(model.beside).to(x.dtype)], model.axis)
        for name in model.layered:
            given[name] = given[name].transpose(0, 1)
        if model.listed:
            state = list(state.unsqueeze(2).unbind(0))
            given.update({name: list(given[name]) for name in model.listed})
        output = self.network(**{model.x: state, model.time: time}, **given, return_dict=False)[0]
        output = torch.stack(list(output)).squeeze(2) if model.listed else output
        if output.ndim < x.ndim and output.numel() == x.numel():  # a film of one frame comes back as a picture
            output = output.reshape(x.shape)
        output = first_half(output, x)
        return output if model.sign == 1.0 else model.sign * output


def wrap(model: nn.Module) -> nn.Module:
    """A diffusers model as `Flow` calls it; a module of an unknown class is called like a UNet."""
    known = MODELS.get(type(model).__name__)
    if known is None:
        return UNet(model)
    made = Network(model, known)
    return UNet(model) if known.part == UNETS and not (made.wide or made.empty) else made


def check_channels(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a network's channels do not fit a flow, or None: it must return as many as it takes, or twice as many."""
    inner = config.get("in_channels")
    outer = config.get("out_channels") or inner
    known = MODELS.get(name)
    if inner is None or outer in (inner, 2 * inner) or (known is not None and known.packed):
        return None
    if known is not None and known.beside and inner > outer:
        return None
    hint = ""
    if inner > outer:
        hint = "; the others are another image (inpainting, editing, depth), to be concatenated in a function of yours"
    return (
        f"the {name} maps {inner} channels to {outer}; supported are equal numbers, or twice as many (a learned "
        f"variance){hint}"
    )
