"""A pipeline of every family that can be made small without downloads, each with a call that needs no text encoder.

Networks have random weights. A family's `make()` gives the pipeline with the scheduler that its published models name,
and the arguments of a call that returns latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.pipelines import alive, randn, vae

diffusers = pytest.importorskip("diffusers")

FLOW = "FlowMatchEulerDiscreteScheduler"
TEXT = 12
"""Width of the text."""


@dataclass(frozen=True)
class Family:
    """A pipeline class and how to make it small.

    Attributes:
        pipeline: its class.
        part: where its denoiser is.
        net: the class of that.
        options: its options.
        scheduler: the class and options of the scheduler.
        call: the call's arguments, with text for guidance or without.
        parts: other components.
        scale: of the weights that are zero at first.
        set: attributes of the pipeline.
    """

    pipeline: str
    part: str
    net: str
    options: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]]
    call: Callable[[], dict[str, Any]]
    parts: Callable[[], dict[str, Any]] = field(default=dict)
    solver: str = "euler"
    guided: bool = True
    scale: float = 0.1
    set: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The pipeline."""
        missing = [n for n in (self.pipeline, self.net, self.scheduler[0]) if not hasattr(diffusers, n)]
        if missing:
            pytest.skip(f"this diffusers has no {', '.join(missing)}")
        torch.manual_seed(0)
        net = alive(getattr(diffusers, self.net)(**self.options), self.scale)
        cls = getattr(diffusers, self.pipeline)
        held = {
            n: None
            for n, p in inspect.signature(cls.__init__).parameters.items()
            if n != "self" and p.default is inspect.Parameter.empty
        }
        scheduler = getattr(diffusers, self.scheduler[0])(**self.scheduler[1])
        pipe = cls(**{**held, **self.parts(), self.part: net, "scheduler": scheduler})
        for name, value in self.set.items():
            setattr(pipe, name, value)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def latents(out: Any) -> Tensor:
    """The latents that a pipeline returns."""
    found = next(iter(out.values())) if hasattr(out, "values") else out
    return torch.as_tensor(found)


def flow(**options: Any) -> tuple[str, dict[str, Any]]:
    return FLOW, options


def embeds(width: int = TEXT, negative: bool = True, length: int = 5, name: str = "prompt_embeds") -> dict[str, Tensor]:
    found = {name: randn(1, length, width, seed=11)}
    return {**found, f"negative_{name}": randn(1, length, width, seed=12)} if negative else found


def masks(length: int = 5, name: str = "prompt_attention_mask", negative: bool = True, kind: Any = None) -> Any:
    ones = torch.ones(1, length, dtype=kind or torch.int64)
    return {name: ones, f"negative_{name}": ones} if negative else {name: ones}


def square(side: int = 64) -> dict[str, int]:
    return {"height": side, "width": side}


STABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
COGVIDEO = dict(
    **STABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True, clip_sample=False,
    snr_shift_scale=3.0, timestep_spacing="trailing",
)  # fmt: skip


def stable_audio() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "projection_model": alive(
            diffusers.StableAudioProjectionModel(text_encoder_dim=TEXT, conditioning_dim=8, min_value=0, max_value=8)
        ),
        "vae": alive(
            diffusers.AutoencoderOobleck(
                encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
                audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
            )
        ),
    }  # fmt: skip


def movq() -> dict[str, Any]:
    torch.manual_seed(4)
    return {
        "movq": alive(
            diffusers.VQModel(
                block_out_channels=[8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=1,
                latent_channels=4, num_vq_embeddings=8, norm_num_groups=4, out_channels=3, in_channels=3,
                up_block_types=["UpDecoderBlock2D"] * 3, vq_embed_dim=4,
            )
        )
    }  # fmt: skip


def svd() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, intermediate_size=8,
        patch_size=8,
    )  # fmt: skip
    return {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": transformers.CLIPImageProcessor(crop_size=32, size=32),
        "vae": alive(
            diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=[32, 32], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
                latent_channels=4, layers_per_block=1,
            )
        ),
    }  # fmt: skip


FAMILIES = [
    Family(
        "CogVideoXPipeline", "transformer", "CogVideoXTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
             text_embed_dim=TEXT, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
             max_text_seq_length=5, use_rotary_positional_embeddings=True),
        ("CogVideoXDDIMScheduler", COGVIDEO), lambda: {**embeds(), **square(), "num_frames": 9}, solver="ddim",
    ),
    Family(
        "CogView3PlusPipeline", "transformer", "CogView3PlusTransformer2DModel",
        dict(patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
             text_embed_dim=TEXT, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8),
        ("CogVideoXDDIMScheduler", {**COGVIDEO, "snr_shift_scale": 4.0}), lambda: {**embeds(), **square()},
        solver="ddim",
    ),
    Family(
        "CogView4Pipeline", "transformer", "CogView4Transformer2DModel",
        dict(patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
             text_embed_dim=TEXT, time_embed_dim=8, condition_dim=4),
        flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
             time_shift_type="linear"),
        lambda: {**embeds(), **square()},
    ),
    Family(
        "HunyuanDiTPipeline", "transformer", "HunyuanDiT2DModel",
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
             num_layers=2, cross_attention_dim=TEXT, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5,
             text_len_t5=6, activation_fn="gelu-approximate"),
        ("DDPMScheduler", dict(beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear",
                               prediction_type="v_prediction", steps_offset=1, clip_sample=False)),
        lambda: {**embeds(), **masks(), **embeds(16, length=6, name="prompt_embeds_2"),
                 **masks(6, "prompt_attention_mask_2"), **square(), "use_resolution_binning": False,
                 "original_size": (64, 64), "target_size": (64, 64)},
        parts=lambda: {"requires_safety_checker": False}, solver="ddpm",
    ),
    Family(
        "MochiPipeline", "transformer", "MochiTransformer3DModel",
        dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
             in_channels=4, out_channels=None, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4,
             activation_fn="swiglu", max_sequence_length=5),
        flow(invert_sigmas=True), lambda: {**embeds(16), **masks(), **square(), "num_frames": 7},
    ),
    Family(
        "ZImagePipeline", "transformer", "ZImageTransformer2DModel",
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1,
             n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=TEXT, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
        flow(shift=3.0),
        lambda: {"prompt_embeds": [randn(5, TEXT, seed=11)], "negative_prompt_embeds": [randn(5, TEXT, seed=12)],
                 **square()},
    ),
    Family(
        "HiDreamImagePipeline", "transformer", "HiDreamImageTransformer2DModel",
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
             num_attention_heads=4, caption_channels=[TEXT, TEXT], text_emb_dim=8, num_routed_experts=4,
             num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
             force_inference_output=True),
        flow(shift=3.0),
        lambda: {**embeds(name="prompt_embeds_t5"),
                 "prompt_embeds_llama3": randn(2, 1, 5, TEXT, seed=13),
                 "negative_prompt_embeds_llama3": randn(2, 1, 5, TEXT, seed=14),
                 "pooled_prompt_embeds": randn(1, 8, seed=15), "negative_pooled_prompt_embeds": randn(1, 8, seed=16),
                 **square()},
        parts=lambda: {"vae": vae(4, shift_factor=0.0)}, set={"default_sample_size": 16},
    ),
    Family(
        "LattePipeline", "transformer", "LatteTransformer3DModel",
        dict(sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
             caption_channels=TEXT,
             in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
             activation_fn="gelu-approximate",
             num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2),
        ("DDIMScheduler", dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)),
        lambda: {**embeds(), **square(), "video_length": 2, "negative_prompt": None, "clean_caption": False,
                 "mask_feature": False}, solver="ddim",
    ),
    Family(
        "AllegroPipeline", "transformer", "AllegroTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
             cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=TEXT),
        ("EulerAncestralDiscreteScheduler", dict(STABLE)),
        lambda: {**embeds(), **masks(), **square(), "num_frames": 8, "negative_prompt": None, "clean_caption": False},
        solver="ddpm",
    ),
    Family(
        "StableAudioPipeline", "transformer", "StableAudioDiTModel",
        dict(sample_size=4, in_channels=3, num_layers=1, attention_head_dim=4, num_key_value_attention_heads=2,
             out_channels=3, num_attention_heads=2, cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=16,
             cross_attention_input_dim=8),
        ("EDMDPMSolverMultistepScheduler", dict(prediction_type="v_prediction", sigma_data=1.0, sigma_min=0.3,
                                                sigma_max=500.0, solver_order=2)),
        lambda: {**embeds(), "attention_mask": torch.ones(1, 5, dtype=torch.int64),
                 "negative_attention_mask": torch.ones(1, 5, dtype=torch.int64), "audio_end_in_s": 2.0},
        parts=stable_audio, solver="dpmsolver++",
    ),
    Family(
        "KandinskyV22Pipeline", "unet", "UNet2DConditionModel",
        dict(in_channels=4, out_channels=8, addition_embed_type="image", down_block_types=(
            "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), up_block_types=(
            "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(8, 16), layers_per_block=1, encoder_hid_dim=TEXT, encoder_hid_dim_type="image_proj",
            cross_attention_dim=8, attention_head_dim=4, resnet_time_scale_shift="scale_shift", class_embed_type=None,
            norm_num_groups=4),
        ("DDIMScheduler", dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False,
                               set_alpha_to_one=False, steps_offset=1)),
        lambda: {"image_embeds": randn(1, TEXT, seed=11), "negative_image_embeds": randn(1, TEXT, seed=12), **square()},
        parts=movq, solver="ddim",
    ),
    Family(
        "Kandinsky3Pipeline", "unet", "Kandinsky3UNet",
        dict(in_channels=4, time_embedding_dim=8, groups=4, attention_head_dim=4, layers_per_block=3,
             block_out_channels=(32, 64), cross_attention_dim=8, encoder_hid_dim=TEXT),
        ("DDPMScheduler", dict(beta_start=0.0001, beta_end=0.02, beta_schedule="squaredcos_cap_v2", clip_sample=False)),
        lambda: {**embeds(), **masks(name="attention_mask"), **square()}, parts=movq, solver="ddpm",
    ),
    Family(
        "Kandinsky5T2IPipeline", "transformer", "Kandinsky5Transformer3DModel",
        dict(in_visual_dim=4, in_text_dim=TEXT, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
             model_dim=16, ff_dim=16, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6)),
        flow(shift=3.0),
        lambda: {**embeds(name="prompt_embeds_qwen"), "prompt_embeds_clip": randn(1, 8, seed=15),
                 "negative_prompt_embeds_clip": randn(1, 8, seed=16),
                 "prompt_cu_seqlens": torch.tensor([0, 5]), "negative_prompt_cu_seqlens": torch.tensor([0, 5]),
                 "height": 64, "width": 64}, set={"resolutions": [(64, 64)]},
    ),
    Family(
        "StableVideoDiffusionPipeline", "unet", "UNetSpatioTemporalConditionModel",
        dict(block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
             num_attention_heads=2, projection_class_embeddings_input_dim=24, addition_time_embed_dim=8),
        ("EulerDiscreteScheduler", dict(STABLE, prediction_type="v_prediction", use_karras_sigmas=True,
         timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, interpolation_type="linear", steps_offset=1,
         timestep_spacing="leading")),
        lambda: {"image": randn(1, 3, 16, 16, seed=21).tanh() * 0.5 + 0.5, "height": 16, "width": 16, "num_frames": 2,
                 "min_guidance_scale": 1.0, "max_guidance_scale": 2.5},
        parts=svd,
    ),
    Family(
        "LuminaPipeline", "transformer", "LuminaNextDiT2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, learn_sigma=True, cross_attention_dim=TEXT),
        flow(), lambda: {**embeds(), **masks(), **square()},
    ),
    Family(
        "WanPipeline", "transformer", "WanTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=32,
             ffn_dim=32, num_layers=2),
        ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)),
        lambda: {**embeds(), **square(), "num_frames": 5}, solver="unipc",
    ),
    Family(
        "SkyReelsV2Pipeline", "transformer", "SkyReelsV2Transformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=32,
             ffn_dim=32, num_layers=2),
        ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)),
        lambda: {**embeds(), **square(), "num_frames": 5}, solver="unipc",
    ),
    Family(
        "SanaPipeline", "transformer", "SanaTransformer2DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
             num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT,
             sample_size=8),
        ("DPMSolverMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)),
        lambda: {**embeds(), **masks(), "height": 256, "width": 256, "use_resolution_binning": False,
                 "negative_prompt": None, "clean_caption": False}, solver="dpmsolver++",
    ),
    Family(
        "SanaVideoPipeline", "transformer", "SanaVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
             num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=TEXT,
             sample_size=8),
        ("DPMSolverMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)),
        lambda: {**embeds(), **masks(), "height": 64, "width": 64, "frames": 5, "use_resolution_binning": False,
                 "negative_prompt": None, "clean_caption": False}, solver="dpmsolver++",
    ),
    Family(
        "AuraFlowPipeline", "transformer", "AuraFlowTransformer2DModel",
        dict(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
             num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=16, pos_embed_max_size=64),
        flow(shift=1.73), lambda: {**embeds(), **masks(), **square()},
    ),
    Family(
        "Lumina2Pipeline", "transformer", "Lumina2Transformer2DModel",
        dict(sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16), cap_feat_dim=TEXT),
        flow(shift=6.0), lambda: {**embeds(), **masks(kind=torch.bool), **square()},
    ),
    Family(
        "ChromaPipeline", "transformer", "ChromaTransformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
             approximator_hidden_dim=16, approximator_layers=1),
        flow(use_dynamic_shifting=True),
        lambda: {**embeds(), **masks(kind=torch.bool), **square()},
    ),
    Family(
        "Flux2Pipeline", "transformer", "Flux2Transformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=TEXT, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        flow(use_dynamic_shifting=True), lambda: {**embeds(negative=False), **square()},
        guided=False,
    ),
    Family(
        "QwenImagePipeline", "transformer", "QwenImageTransformer2DModel",
        dict(in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 8)),
        flow(use_dynamic_shifting=True, shift_terminal=0.02),
        lambda: {**embeds(), **masks(name="prompt_embeds_mask"), **square(), "true_cfg_scale": 3.0},
    ),
    Family(
        "LTXPipeline", "transformer", "LTXVideoTransformer3DModel",
        dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
             num_layers=1, caption_channels=TEXT),
        flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        lambda: {**embeds(), **masks(), **square(), "num_frames": 9},
    ),
    Family(
        "HunyuanVideoPipeline", "transformer", "HunyuanVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
             num_single_layers=1, num_refiner_layers=1, patch_size=2, text_embed_dim=TEXT, pooled_projection_dim=8,
             rope_axes_dim=(4, 4, 8)),
        flow(shift=7.0),
        lambda: {**embeds(negative=False), **masks(negative=False), "pooled_prompt_embeds": randn(1, 8, seed=13),
                 **square(), "num_frames": 5}, guided=False,
    ),
    Family(
        "OvisImagePipeline", "transformer", "OvisImageTransformer2DModel",
        dict(in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
             num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 8)),
        flow(use_dynamic_shifting=True), lambda: {**embeds(), **square(), "negative_prompt": None},
    ),
    Family(
        "BriaPipeline", "transformer", "BriaTransformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 8)),
        flow(shift=3.0), lambda: {**embeds(), **square()}, parts=lambda: {"vae": vae(4)},
    ),
    Family(
        "PixArtAlphaPipeline", "transformer", "PixArtTransformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
             num_attention_heads=2, cross_attention_dim=16, caption_channels=TEXT, use_additional_conditions=False),
        ("DPMSolverMultistepScheduler", dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")),
        lambda: {**embeds(), **masks(), **square(), "use_resolution_binning": False, "negative_prompt": None,
                 "clean_caption": False}, solver="dpmsolver++",
    ),
    Family(
        "StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
             num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=16, pooled_projection_dim=8,
             pos_embed_max_size=8),
        flow(shift=3.0),
        lambda: {**embeds(), "pooled_prompt_embeds": randn(1, 8, seed=13),
                 "negative_pooled_prompt_embeds": randn(1, 8, seed=14), **square()},
    ),
    Family(
        "FluxPipeline", "transformer", "FluxTransformer2DModel",
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
             num_attention_heads=2, joint_attention_dim=TEXT, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
             guidance_embeds=True),
        flow(use_dynamic_shifting=True),
        lambda: {**embeds(negative=False), "pooled_prompt_embeds": randn(1, 8, seed=13), **square()}, guided=False,
    ),
    Family(
        "StableDiffusionPipeline", "unet", "UNet2DConditionModel",
        dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D",
             "UpBlock2D"), cross_attention_dim=TEXT, attention_head_dim=8, norm_num_groups=4),
        ("PNDMScheduler", dict(STABLE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)),
        lambda: {**embeds(), **square()}, parts=lambda: {"requires_safety_checker": False}, solver="plms",
    ),
    Family(
        "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel",
        dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D",
             "UpBlock2D"), cross_attention_dim=TEXT, attention_head_dim=8, norm_num_groups=4,
             addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32),
        ("EulerDiscreteScheduler", dict(STABLE, steps_offset=1, timestep_spacing="leading")),
        lambda: {**embeds(), "pooled_prompt_embeds": randn(1, 8, seed=13),
                 "negative_pooled_prompt_embeds": randn(1, 8, seed=14), **square()},
        parts=lambda: {"add_watermarker": False},
    ),
]  # fmt: skip
