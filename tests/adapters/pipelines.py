"""Real pipelines of diffusers with small random weights, built from configurations; nothing is downloaded.

Networks are made small but not trivial: initialisation leaves some of them with an output of zero, so those layers are
filled too.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

SIZE = 16
"""Pixels of a side; latents have half as many."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alive(net: nn.Module, scale: float = 0.1) -> nn.Module:
    """The network in evaluation mode, none of its weights zero."""
    generator = torch.Generator().manual_seed(5)
    for p in net.parameters():
        if float(p.detach().abs().max()) == 0.0:
            p.data = scale * torch.randn(p.shape, generator=generator)
        p.requires_grad_(False)
    return net.eval()


@cache
def vae(channels: int = 4, **options: Any) -> Any:
    torch.manual_seed(1)
    return alive(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, sample_size=SIZE,
            **options,
        )
    )  # fmt: skip


@cache
def unet2d() -> Any:
    torch.manual_seed(0)
    return alive(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=8,
        )
    )  # fmt: skip


@cache
def unet_conditional(xl: bool = False) -> Any:
    torch.manual_seed(2)
    extra = dict(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8,
    ) if xl else {}  # fmt: skip
    return alive(
        diffusers.UNet2DConditionModel(
            sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=8,
            norm_num_groups=4, **extra,
        )
    )  # fmt: skip


@cache
def sd3_transformer() -> Any:
    torch.manual_seed(3)
    return alive(
        diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
            pos_embed_max_size=8,
        )
    )  # fmt: skip


@cache
def flux_transformer() -> Any:
    torch.manual_seed(4)
    return alive(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        )
    )  # fmt: skip


@cache
def pixart_transformer() -> Any:
    torch.manual_seed(6)
    return alive(
        diffusers.PixArtTransformer2DModel(
            sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
        )
    )  # fmt: skip


STABLE: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
"""The table of Stable Diffusion."""


class Case:
    """A pipeline and a call of it that gives a tensor.

    Args:
        pipe: the pipeline, or its class.
        native: the scheduler that it comes with.
        call: the arguments of its calls, but for steps, generator and output.
        parts: the components of the class.
    """

    def __init__(self, cls: Any, native: Any, parts: dict[str, Any], call: dict[str, Any], output: str = "np") -> None:
        self.pipe = cls(**parts, scheduler=native)
        self.pipe.set_progress_bar_config(disable=True)
        self.native, self.call, self.output = native, call, output

    def __call__(self, scheduler: Any, steps: int = 4, seed: int | list[int] = 7, **options: Any) -> Tensor:
        """The images, or the latents with output "latent"."""
        self.pipe.scheduler = scheduler
        try:
            seeds = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else None
            call = {**self.call, "num_inference_steps": steps, "output_type": self.output, **options}
            generator = seeds or torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
            out = self.pipe(generator=generator, **call)
        finally:
            self.pipe.scheduler = self.native
        images = out.images
        return torch.from_numpy(images) if isinstance(images, np.ndarray) else images


def unconditional(native: Any = None) -> Case:
    return Case(
        diffusers.DDPMPipeline, native or diffusers.DDPMScheduler(clip_sample=False), {"unet": unet2d()},
        {"batch_size": 2},
    )  # fmt: skip


def text(n: int = 2, seed: int = 11) -> dict[str, Tensor]:
    return {"prompt_embeds": randn(n, 5, 8, seed=seed), "negative_prompt_embeds": randn(n, 5, 8, seed=seed + 1)}


def pooled(n: int = 2) -> dict[str, Tensor]:
    return {"pooled_prompt_embeds": randn(n, 8, seed=13), "negative_pooled_prompt_embeds": randn(n, 8, seed=14)}


def picture(n: int = 2) -> Tensor:
    return randn(n, 3, SIZE, SIZE, seed=21).tanh() * 0.5 + 0.5


def stable(native: Any = None, kind: str = "") -> Case:
    """Stable Diffusion 1.x: "" for text to image, "img2img" or "inpaint"."""
    parts = dict(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet_conditional(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    call: dict[str, Any] = {**text(), "guidance_scale": 3.0}
    if kind == "img2img":
        cls, more = diffusers.StableDiffusionImg2ImgPipeline, {"image": picture(), "strength": 0.5}
    elif kind == "inpaint":
        mask = torch.zeros(2, 1, SIZE, SIZE)
        mask[..., : SIZE // 2] = 1.0
        cls = diffusers.StableDiffusionInpaintPipeline
        more = {"image": picture(), "mask_image": mask, "strength": 1.0, "height": SIZE, "width": SIZE}
    else:
        cls, more = diffusers.StableDiffusionPipeline, {"height": SIZE, "width": SIZE}
    native = native or diffusers.DDIMScheduler(
        **STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    return Case(cls, native, parts, {**call, **more})


def prompted(folder: Path) -> Any:
    """Stable Diffusion with a tokenizer of letters and a text encoder of one layer, for calls with words."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    torch.manual_seed(8)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        )
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder.eval(), tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        unet=unet_conditional(), scheduler=stable().native, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl(native: Any = None, kind: str = "") -> Case:
    parts = dict(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet_conditional(True), add_watermarker=False,
    )  # fmt: skip
    call: dict[str, Any] = {**text(), **pooled(), "guidance_scale": 3.0}
    if kind == "img2img":
        cls, more = diffusers.StableDiffusionXLImg2ImgPipeline, {"image": picture(), "strength": 0.5}
    else:
        cls, more = diffusers.StableDiffusionXLPipeline, {"height": SIZE, "width": SIZE}
    native = native or diffusers.EulerDiscreteScheduler(**STABLE, steps_offset=1, timestep_spacing="leading")
    return Case(cls, native, parts, {**call, **more})


def sd3(native: Any = None, kind: str = "") -> Case:
    parts = dict(
        transformer=sd3_transformer(), vae=vae(shift_factor=0.0), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call: dict[str, Any] = {**text(), **pooled(), "guidance_scale": 3.0}
    if kind == "img2img":
        cls = diffusers.StableDiffusion3Img2ImgPipeline
        more = {"image": picture(), "strength": 0.5, "height": SIZE, "width": SIZE}
    else:
        cls, more = diffusers.StableDiffusion3Pipeline, {"height": SIZE, "width": SIZE}
    native = native or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Case(cls, native, parts, {**call, **more})


def flux(native: Any = None, kind: str = "") -> Case:
    parts = dict(
        transformer=flux_transformer(), vae=vae(shift_factor=0.0), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    call: dict[str, Any] = {
        "prompt_embeds": text()["prompt_embeds"], "pooled_prompt_embeds": pooled()["pooled_prompt_embeds"],
        "guidance_scale": 3.0, "height": SIZE, "width": SIZE,
    }  # fmt: skip
    if kind == "img2img":
        cls, more = diffusers.FluxImg2ImgPipeline, {"image": picture(), "strength": 0.5}
    else:
        cls, more = diffusers.FluxPipeline, {}
    native = native or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Case(cls, native, parts, {**call, **more})


def pixart(native: Any = None) -> Case:
    parts = dict(tokenizer=None, text_encoder=None, vae=vae(), transformer=pixart_transformer())
    ones = torch.ones(2, 5)
    call: dict[str, Any] = {
        **text(), "prompt_attention_mask": ones, "negative_prompt_attention_mask": ones, "guidance_scale": 3.0,
        "height": SIZE, "width": SIZE, "use_resolution_binning": False, "negative_prompt": None,
    }  # fmt: skip
    native = native or diffusers.DPMSolverMultistepScheduler(lower_order_final=False)
    return Case(diffusers.PixArtAlphaPipeline, native, parts, call)
