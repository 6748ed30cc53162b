"""Tiny networks of every kind, with random weights: enough to save, to load and to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def unet(**options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    settings = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return diffusers.UNet2DModel(**{**settings, **options}).eval()


def unet_condition(xl: bool = False, **options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    if xl:
        settings |= dict(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10
        )
    return diffusers.UNet2DConditionModel(**{**settings, **options}).eval()


def dit(**options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    )  # fmt: skip
    return diffusers.DiTTransformer2DModel(**{**settings, **options}).eval()


def pixart(**options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, cross_attention_dim=8, caption_channels=6, norm_num_groups=2, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtTransformer2DModel(**{**settings, **options}).eval()


def sd3(**options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
        pos_embed_max_size=4,
    )  # fmt: skip
    return diffusers.SD3Transformer2DModel(**{**settings, **options}).eval()


def flux(**options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.FluxTransformer2DModel(**{**settings, **options}).eval()


class ADM(nn.Module):
    """The layer names of guided-diffusion's UNetModel, and its doubled output."""

    def __init__(self, channels: int = 3, learned: bool = True, classes: int = 0, outputs: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        outputs = outputs or (2 if learned else 1) * channels
        self.time_embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1))])
        block = nn.Module()
        block.in_layers = nn.Sequential(nn.GroupNorm(2, 8))
        self.middle_block = nn.ModuleList([block])
        self.out = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, outputs, 3, padding=1))
        if classes:
            self.label_emb = nn.Embedding(classes, 8)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.input_blocks[0](x) + self.time_embed(timesteps.to(x.dtype)[:, None] / 1000.0)[:, :, None, None]
        h = h if y is None else h + self.label_emb(y)[:, :, None, None]
        return self.out(self.middle_block[0].in_layers(h))  # type: ignore[no-any-return,operator,union-attr]


class DiT(nn.Module):
    """The layer names of DiT and SiT; forward(x, t, y) with a doubled output."""

    def __init__(
        self, channels: int = 4, patch: int = 2, learned: bool = True, halve: bool = False, classes: int = 11
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.halve = patch, halve
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, 8, patch, patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(1, 8))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes, 8)
        block = nn.Module()
        block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 8))
        self.blocks = nn.ModuleList([block])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(8, patch * patch * channels * (2 if learned else 1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.x_embedder.proj(x).permute(0, 2, 3, 1)  # type: ignore[operator,union-attr]
        c = self.t_embedder.mlp(t.to(x.dtype)[:, None]) + self.y_embedder.embedding_table(y)  # type: ignore[operator,union-attr]
        h = h + self.blocks[0].adaLN_modulation(c)[:, None, None]  # type: ignore[operator,union-attr]
        o = self.final_layer.linear(h)  # type: ignore[operator,union-attr]
        b, rows, columns, _ = o.shape
        o = o.reshape(b, rows, columns, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
        o = o.reshape(b, -1, rows * self.patch, columns * self.patch)
        return o.chunk(2, 1)[0] if self.halve else o


class SiT(DiT):
    """The same weights under the other name; its forward drops the second half itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(halve=True, **options)


class NCSNpp(nn.Module):
    """score_sde's networks: a list all_modules, labels as the second argument."""

    def __init__(self, config: Any = None, divide: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all_modules = nn.ModuleList([nn.Linear(1, 3), nn.Conv2d(3, 3, 1)])
        self.divide = divide
        if config is not None:
            self.config = config

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.all_modules[1](x) + self.all_modules[0](labels.to(x.dtype)[:, None] / 999.0)[:, :, None, None]
        return h / labels.to(x.dtype)[:, None, None, None] if self.divide else h


def ldm(
    width: int = 768, channels: int = 4, prefix: str = "model.diffusion_model.", **extra: Tensor
) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion single file that tell what it is."""
    return {
        f"{prefix}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
        f"{prefix}time_embed.0.weight": torch.zeros(8, 8),
        f"{prefix}out.2.weight": torch.zeros(4, 8, 3, 3),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(2, 2),
        **extra,
    }
