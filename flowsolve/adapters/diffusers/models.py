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
    """How a pipeline calls a class of networks: the folder it is saved in, and what its time is multiplied by."""

    part: str
    scale: float = 1.0


MODELS = {
    "UNet2DModel": Model("unet"),
    "UNet2DConditionModel": Model("unet"),
    "DiTTransformer2DModel": Model("transformer"),
    "PixArtTransformer2DModel": Model("transformer"),
    "SD3Transformer2DModel": Model("transformer"),
    "FluxTransformer2DModel": Model("transformer", scale=1e-3),
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

    def __init__(self, transformer: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.transformer, self.scale = transformer, scale

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return first_half(self.transformer(hidden_states=x, timestep=self.scale * t, **cond).sample, x)


def wrap(model: nn.Module) -> nn.Module:
    """A diffusers model as `Flow` calls it; a module of an unknown class is called like a UNet."""
    known = MODELS.get(type(model).__name__)
    return UNet(model) if known is None or known.part == "unet" else Transformer(model, known.scale)


def check_channels(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a network's channels do not fit a flow, or None: it must return as many as it takes, or twice as many."""
    inner = config.get("in_channels")
    outer = config.get("out_channels") or inner
    if inner is None or outer in (inner, 2 * inner):
        return None
    hint = ""
    if inner > outer:
        hint = "; the others are another image (inpainting, editing, depth), to be concatenated in a function of yours"
    return (
        f"the {name} maps {inner} channels to {outer}; supported are equal numbers, or twice as many (a learned "
        f"variance){hint}"
    )
