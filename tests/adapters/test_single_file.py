"""Single files of Stable Diffusion and its kin: what their keys and metadata make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowsolve import adapters
from flowsolve.adapters.diffusers import FLOW
from flowsolve.adapters.networks import preconditioned
from flowsolve.paths import EDM, CondOT, Discrete
from tests.adapters.tiny import ldm

ONE = torch.ones(1)


class Tree(nn.Module):
    """The tensors of tiny.ldm as a network."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, 8, 3, bias=False)]), nn.ModuleList()])
        attention = nn.Module()
        attention.to_k = nn.Linear(768, 8, bias=False)
        block, spatial = nn.Module(), nn.Module()
        block.attn2 = attention
        spatial.transformer_blocks = nn.ModuleList([block])
        self.input_blocks[1].extend([nn.Identity(), spatial])  # type: ignore[operator]
        self.time_embed = nn.ModuleList([nn.Linear(8, 8, bias=False)])
        self.out = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Conv2d(8, 4, 3, bias=False)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out[2].weight.sum() + 0.0 * x  # type: ignore[no-any-return,operator,union-attr]


def write(file: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        str(file),
        {f"modelspec.{k}": v for k, v in metadata.items()} or None,
    )
    return file


def test_the_tables_of_stable_diffusion(tmp_path: Path) -> None:
    """β from 0.00085 to 0.012, evenly spaced roots (Rombach et al. 2022); ztsnr ends it at 0 (Lin et al. 2024)."""
    finding = adapters.inspect(write(tmp_path / "a.safetensors", ldm(v_pred=ONE, ztsnr=ONE)))
    assert isinstance(finding.path, Discrete)
    roots = [0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5) for i in range(1000)]
    alphas, product = [], 1.0
    for root in roots:
        product *= 1.0 - root * root
        alphas.append(product**0.5)
    expected = [(a - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1]) for a in alphas]
    for k in (0, 500, 999):
        assert finding.path.alphas_cumprod[k] == pytest.approx(expected[k] ** 2, rel=1e-9, abs=1e-15)
    finding = adapters.inspect(write(tmp_path / "b.safetensors", ldm()), prediction="noise")
    assert finding.path.alphas_cumprod[999] == pytest.approx(alphas[999] ** 2, rel=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("width", "extra", "told", "path", "prediction", "scale"),
    [
        (768, {}, {"prediction_type": "epsilon"}, Discrete, "noise", 0.18215),
        (1024, {}, {"prediction_type": "v"}, Discrete, "v", 0.18215),
        (2048, {"v_pred": ONE}, {}, Discrete, "v", 0.13025),
        (2048, {"edm_mean": ONE, "edm_std": ONE}, {}, EDM(), preconditioned(0.5).name, 0.13025),
        (
            2048,
            {"edm_vpred.sigma_min": 0.004 * ONE, "edm_vpred.sigma_max": 90 * ONE},
            {},
            None,
            preconditioned(1.0, v=True).name,
            0.13025,
        ),
    ],
)
def test_what_the_keys_say(
    tmp_path: Path,
    width: int,
    extra: dict[str, Tensor],
    told: dict[str, str],
    path: Any,
    prediction: str,
    scale: float,
) -> None:
    finding = adapters.inspect(write(tmp_path / "m.safetensors", ldm(width, **extra), **told))
    assert finding.prediction is not None
    assert finding.prediction.name == prediction
    assert finding.latent_scale == scale
    assert [m.partition("=")[0] for m in finding.missing] == ["net"]
    if path is Discrete:
        assert isinstance(finding.path, Discrete)
    elif path is not None:
        assert finding.path == path
    else:
        assert isinstance(finding.path, EDM)
        assert (finding.path.sigma_min, finding.path.sigma_max) == pytest.approx((0.004, 90.0))


@pytest.mark.parametrize("width", [768, 1024, 2048])
def test_a_prediction_that_nothing_states_is_asked_for(tmp_path: Path, width: int) -> None:
    file = write(tmp_path / "finetune.safetensors", ldm(width))
    with pytest.raises(adapters.Unrecognised, match="prediction='noise' or 'v'"):
        adapters.load(file, net=nn.Identity())
    file = write(tmp_path / "both.safetensors", ldm(width, v_pred=ONE), prediction_type="epsilon")
    with pytest.raises(adapters.Unrecognised, match=r"key v_pred, but modelspec.prediction_type = 'epsilon'"):
        adapters.load(file, net=nn.Identity())


def test_flow_transformers(tmp_path: Path) -> None:
    sd3 = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2, 2)}
    finding = adapters.inspect(write(tmp_path / "sd3.safetensors", sd3))
    assert (finding.path, finding.prediction, finding.native) == (CondOT(), FLOW, (1000.0, 0.0))
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2), "img_in.weight": torch.zeros(2, 2)}
    dev = adapters.inspect(write(tmp_path / "dev.safetensors", {**flux, "guidance_in.in_layer.weight": ONE}))
    assert (dev.path, dev.prediction, dev.native, dev.refusal) == (CondOT(), FLOW, (1.0, 0.0), None)
    schnell = write(tmp_path / "flux1.safetensors", flux)
    with pytest.raises(adapters.Unrecognised, match="without guidance_in is the schnell model"):
        adapters.load(schnell)
    assert adapters.inspect(schnell, distilled=False).refusal is None


def test_the_weights_fill_the_network(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", ldm(), prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"m.safetensors do not belong to this Linear"):
        adapters.load(file, net=nn.Linear(2, 2))

    flow = adapters.load(file, net=Tree())
    assert float(flow.noise(torch.ones(1, 4, 2, 2), 0.5).abs().max().detach()) == 0.0  # the file's zeros


def test_other_channels_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "inpaint.safetensors", ldm(channels=9), prediction_type="epsilon")
    with pytest.raises(adapters.Unrecognised, match="takes 9 channels"):
        adapters.load(file, net=nn.Identity())


def test_a_part_of_a_diffusers_directory(tmp_path: Path) -> None:
    file = write(tmp_path / "diffusion_pytorch_model.safetensors", {"down_blocks.0.resnets.0.conv1.weight": ONE})
    with pytest.raises(adapters.Unrecognised, match="give the directory that holds them"):
        adapters.load(file)


def averaged(raw: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    """What the training script of latent diffusion keeps beside the raw weights."""
    own = {k: v for k, v in raw.items() if k.startswith("model.diffusion_model.")}
    twins = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): torch.full_like(v, value) for k, v in own.items()
    }
    return {**raw, **twins, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}


def test_averaged_weights_are_taken_and_said(tmp_path: Path) -> None:
    file = write(tmp_path / "full.safetensors", averaged(ldm(), 1.0), prediction_type="epsilon")
    finding = adapters.inspect(file)
    assert "model_ema.…: averaged weights beside the raw ones; the averaged are taken" in finding.evidence
    assert finding.parameters == adapters.inspect(write(tmp_path / "raw.safetensors", ldm())).parameters
    net = Tree()
    adapters.load(file, net=net)
    assert all(bool((v == 1.0).all()) for v in net.state_dict().values())  # the raw ones are 0


def test_averages_of_some_weights_are_not_mixed_with_raw_ones(tmp_path: Path) -> None:
    tensors = averaged(ldm(), 1.0)
    del tensors["model_ema.diffusion_modelout2weight"]
    file = write(tmp_path / "part.safetensors", tensors, prediction_type="epsilon")
    assert "model_ema.…: averages of 3 of 4 tensors; the raw weights are taken" in adapters.inspect(file).evidence
    net = Tree()
    adapters.load(file, net=net)
    assert all(bool((v == 0.0).all()) for v in net.state_dict().values())


@pytest.mark.parametrize("names", [
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
     "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
     "lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "lora_te1_text_model_mlp_fc1.lora_up.weight"),
    ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
     "transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"),
    ("unet.down_blocks.0.attentions.0.processor.to_k_lora.down.weight",
     "unet.down_blocks.0.attentions.0.processor.to_k_lora.up.weight"),
])  # fmt: skip
def test_a_lora_is_named_as_such(tmp_path: Path, names: tuple[str, ...]) -> None:
    file = write(tmp_path / "style.safetensors", {k: torch.zeros(2, 2) for k in names})
    with pytest.raises(adapters.Unrecognised, match=r"it is a LoRA.*pipe.load_lora_weights"):
        adapters.load(file)
    with pytest.raises(ValueError, match=r"style.safetensors: it is a LoRA"):
        adapters.load(tmp_path)
