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

Lumina 2 reads 1 − σ and returns the velocity towards the data; the others of these read σ, times 1000 or not, and return
that towards the noise. What packs an image or a film into L tokens is the pipeline's business.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flowsolve.adapters.networks import first_half

__all__ = ["MODELS", "Transformer", "UNet", "check_channels", "wrap"]


@dataclass(frozen=True)
class Model:
    """How a pipeline calls a class of networks.

    Attributes:
        part: the folder it is saved in.
        scale: what the scheduler's time is multiplied by.
        offset: what is added to it then.
        sign: of the output.
        option: an option of the network's configuration that multiplies its time too.
        packed: whether channels are not comparable, because tokens are packed outside the network.
    """

    part: str
    scale: float = 1.0
    offset: float = 0.0
    sign: float = 1.0
    option: str = ""
    packed: bool = False


MODELS = {
    "UNet2DModel": Model("unet"),
    "UNet2DConditionModel": Model("unet"),
    "DiTTransformer2DModel": Model("transformer"),
    "PixArtTransformer2DModel": Model("transformer"),
    "SD3Transformer2DModel": Model("transformer"),
    "FluxTransformer2DModel": Model("transformer", scale=1e-3),
    "Flux2Transformer2DModel": Model("transformer", scale=1e-3),
    "ChromaTransformer2DModel": Model("transformer", scale=1e-3),
    "QwenImageTransformer2DModel": Model("transformer", scale=1e-3, packed=True),
    "AuraFlowTransformer2DModel": Model("transformer", scale=1e-3),
    "SanaTransformer2DModel": Model("transformer", option="timestep_scale"),
    "Lumina2Transformer2DModel": Model("transformer", scale=-1e-3, offset=1.0, sign=-1.0),
    "WanTransformer3DModel": Model("transformer"),
    "HunyuanVideoTransformer3DModel": Model("transformer"),
    "LTXVideoTransformer3DModel": Model("transformer"),
}


class UNet(nn.Module):
    """A diffusers UNet, or any module unet(x, t).sample, whose forward returns the tensor itself."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return first_half(self.unet(x, t, **cond).sample, x)


class Transformer(nn.Module):
    """A diffusers transformer, which takes its time by name and scaled as its pipeline scales it."""

    def __init__(self, transformer: nn.Module, scale: float = 1.0, offset: float = 0.0, sign: float = 1.0) -> None:
        super().__init__()
        self.transformer, self.scale, self.offset, self.sign = transformer, scale, offset, sign

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        time = self.scale * t + self.offset if self.offset else self.scale * t
        output = first_half(self.transformer(hidden_states=x, timestep=time, **cond).sample, x)
        return output if self.sign == 1.0 else self.sign * output


def wrap(model: nn.Module) -> nn.Module:
    """A diffusers model as `Flow` calls it; a module of an unknown class is called like a UNet."""
    known = MODELS.get(type(model).__name__)
    if known is None or known.part == "unet":
        return UNet(model)
    stated = float(getattr(model.config, known.option)) if known.option else 1.0
    return Transformer(model, stated * known.scale, known.offset, known.sign)


def check_channels(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a network's channels do not fit a flow, or None: it must return as many as it takes, or twice as many."""
    inner = config.get("in_channels")
    outer = config.get("out_channels") or inner
    if inner is None or outer in (inner, 2 * inner) or (name in MODELS and MODELS[name].packed):
        return None
    hint = ""
    if inner > outer:
        hint = "; the others are another image (inpainting, editing, depth), to be concatenated in a function of yours"
    return (
        f"the {name} maps {inner} channels to {outer}; supported are equal numbers, or twice as many (a learned "
        f"variance){hint}"
    )
