"""Networks of flow models by class: a loaded directory asks and reads as the pipeline of that class does.

Each row is a network small enough for a test, with random weights, and how its pipeline calls it at the scheduler's
time t = 1000 σ: the facts were read off diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters
from flowsolve.adapters.diffusers.models import MODELS
from tests.adapters.families import FAMILIES
from tests.adapters.pipelines import alive
from tests.adapters.test_models import saved

diffusers = pytest.importorskip("diffusers")


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(count: int, width: int) -> Tensor:
    return torch.stack([torch.arange(count) % (3 + i) for i in range(width)], 1).float()


@dataclass(frozen=True)
class Row:
    """A class, its options, a state, its conditions, the pipeline's name, and t → what the pipeline makes of it."""

    name: str
    pipeline: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    cond: Callable[[], dict[str, Any]]
    time: Callable[[Tensor], Tensor]
    sign: float = 1.0


ROWS = [
    Row(
        "WanTransformer3DModel", "WanPipeline",
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
             ffn_dim=32, num_layers=2),
        (2, 4, 2, 8, 8), lambda: {"encoder_hidden_states": normal(2, 5, 16)}, lambda t: t,
    ),
    Row(
        "SanaTransformer2DModel", "SanaPipeline",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
             num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
             sample_size=8, timestep_scale=0.5),
        (2, 4, 8, 8), lambda: {"encoder_hidden_states": normal(2, 5, 12)}, lambda t: 0.5 * t,
    ),
    Row(
        "AuraFlowTransformer2DModel", "AuraFlowPipeline",
        dict(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
             num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64),
        (2, 4, 8, 8), lambda: {"encoder_hidden_states": normal(2, 5, 12)}, lambda t: t / 1000,
    ),
    Row(
        "Lumina2Transformer2DModel", "Lumina2Pipeline",
        dict(sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16), cap_feat_dim=12),
        (2, 4, 8, 8),
        lambda: {
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
        lambda t: 1 - t / 1000, -1.0,
    ),
    Row(
        "ChromaTransformer2DModel", "ChromaPipeline",
        dict(in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
             approximator_hidden_dim=16, approximator_layers=1),
        (2, 16, 8),
        lambda: {"encoder_hidden_states": normal(2, 5, 12), "txt_ids": ids(5, 3), "img_ids": ids(16, 3)},
        lambda t: t / 1000,
    ),
    Row(
        "Flux2Transformer2DModel", "Flux2Pipeline",
        dict(in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        (2, 16, 8),
        lambda: {
            "encoder_hidden_states": normal(2, 5, 12), "txt_ids": ids(5, 4), "img_ids": ids(16, 4),
            "guidance": torch.full((2,), 4.0),
        },
        lambda t: t / 1000,
    ),
    Row(
        "QwenImageTransformer2DModel", "QwenImagePipeline",
        dict(in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, axes_dims_rope=(4, 4, 8)),
        (2, 16, 16),
        lambda: {
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.int64),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
        lambda t: t / 1000,
    ),
    Row(
        "LTXVideoTransformer3DModel", "LTXPipeline",
        dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
             num_layers=1, caption_channels=16),
        (2, 16, 8),
        lambda: {
            "encoder_hidden_states": normal(2, 5, 16), "encoder_attention_mask": torch.ones(2, 5), "num_frames": 1,
            "height": 4, "width": 4,
        },
        lambda t: t,
    ),
    Row(
        "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
             num_single_layers=1, num_refiner_layers=1, patch_size=2, text_embed_dim=12, pooled_projection_dim=8,
             rope_axes_dim=(4, 4, 8)),
        (2, 4, 1, 8, 8),
        lambda: {
            "encoder_hidden_states": normal(2, 5, 12), "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
            "pooled_projections": normal(2, 8), "guidance": torch.full((2,), 6000.0),
        },
        lambda t: t,
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_loaded_network_is_asked_and_read_as_by_its_pipeline(row: Row, tmp_path: Path) -> None:
    """ε − z at σ is what the pipeline hands to its scheduler; the scheduler's Euler step is that of our ODE."""
    kind = getattr(diffusers, row.name, None)
    if kind is None:
        pytest.skip(f"{row.name} is not in this diffusers")
    torch.manual_seed(0)
    net = alive(kind(**row.options)).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = adapters.load(saved(tmp_path / "net", "transformer", net, scheduler, row.pipeline))
    assert MODELS[row.name].part == ("transformer",)
    x, cond = normal(*row.shape, seed=2), row.cond()
    given = {k: fs.shared(v) if isinstance(v, list) else v for k, v in cond.items()}
    outputs = []
    for sigma in (0.9, 0.35, 0.05):
        t = torch.full((2,), 1000.0 * sigma)
        with torch.no_grad():
            expected = row.sign * net(hidden_states=x, timestep=row.time(t), return_dict=False, **cond)[0]
            found = -flow.velocity(x, 1.0 - sigma, **given)
        outputs.append(found)
        size = float(expected.abs().max())
        assert size > 1e-3
        # time is 1 − (1 − σ) in one and σ in the other, a rounding of float32 each; networks amplify it
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * size)
    assert float((outputs[0] - outputs[2]).abs().max()) > 1e-3 * float(outputs[0].abs().max()), "time is not read"
    sol = fs.sample(flow, start=x, solver="euler", nfe=3, cond=given)
    assert sol.ok.all()


UNTRIED = {"GlmImageTransformer2DModel", "LongCatImageTransformer2DModel", "UNet3DConditionModel"}
"""Networks whose pipelines need a text encoder to be run: rows by reading them alone."""


def test_the_documented_families_are_tested() -> None:
    earlier = {
        "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
        "SD3Transformer2DModel", "FluxTransformer2DModel", "PriorTransformer", "StableCascadeUNet",
    }  # fmt: skip
    also = {f.net for f in FAMILIES}
    assert {row.name for row in ROWS} | earlier | also | UNTRIED == set(MODELS)


def test_stable_cascade(tmp_path: Path) -> None:
    """The prior's network at the time of its own scheduler, whose update its own ε gives too."""
    torch.manual_seed(0)
    net = alive(diffusers.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16, block_out_channels=(16, 16),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        clip_image_in_channels=8, clip_text_in_channels=8, clip_text_pooled_in_channels=8, dropout=(0.0, 0.0),
    ))  # fmt: skip
    scheduler = diffusers.DDPMWuerstchenScheduler()
    flow = adapters.load(saved(tmp_path / "net", "prior", net, scheduler, "StableCascadePriorPipeline"))
    cond = {
        "clip_text_pooled": normal(2, 1, 8), "clip_text": normal(2, 5, 8), "clip_img": normal(2, 1, 8),
    }  # fmt: skip
    x = normal(2, 4, 8, 8, seed=2)
    for k in (0.9, 0.4, 0.05):
        t = flow.path.time_from_native(k)
        with torch.no_grad():
            eps = net(sample=x, timestep_ratio=torch.full((2,), k), return_dict=False, **cond)[0]
            found = flow.estimate(x, t, **cond)
        a = float(scheduler._alpha_cumprod(torch.tensor(k), torch.device("cpu")))
        assert flow.path.alpha(t) ** 2 == pytest.approx(a, rel=1e-5)
        torch.testing.assert_close(found.noise, eps, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.data, (x - (1 - a) ** 0.5 * eps) / a**0.5, rtol=1e-3, atol=1e-3 / a**0.5)


def test_an_unclip_prior(tmp_path: Path) -> None:
    """Kandinsky 2.2's prior makes an embedding: what it returns is the data."""
    torch.manual_seed(0)
    net = alive(diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=6, embedding_dim=12, num_layers=1, num_embeddings=5,
    ))  # fmt: skip
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", num_train_timesteps=1000)
    flow = adapters.load(saved(tmp_path / "net", "prior", net, scheduler, "KandinskyV22PriorPipeline"))
    cond = {"proj_embedding": normal(2, 12), "encoder_hidden_states": normal(2, 5, 12)}
    x = normal(2, 12, seed=2)
    for k in (900, 300):
        with torch.no_grad():
            expected = net(x, timestep=k, return_dict=False, **cond)[0]
            found = flow.estimate(x, flow.path.time_from_native(float(k)), **cond).data
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
