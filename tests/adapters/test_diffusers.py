"""The diffusers adapter against diffusers itself: tables, conventions, weights, and every way to be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsolve import adapters
from flowsolve.adapters.diffusers import TABLE_SCHEDULERS, alphas_cumprod, as_flow, save
from flowsolve.paths import CondOT, Discrete
from flowsolve.problems import digits
from flowsolve.training import cfm_loss, dsm_loss, times
from tests.adapters.tiny import unet

diffusers = pytest.importorskip("diffusers")


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory as diffusers writes it."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", TABLE_SCHEDULERS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_are_those_of_diffusers(name: str, schedule: str) -> None:
    if name == "UnCLIPScheduler":  # it has one schedule
        scheduler = diffusers.UnCLIPScheduler()
    else:
        scheduler = getattr(diffusers, name)(beta_schedule=schedule, beta_start=2e-4, beta_end=0.012)
    theirs = scheduler.alphas_cumprod.float()
    torch.testing.assert_close(alphas_cumprod(scheduler.config).float(), theirs, rtol=2e-4, atol=1e-7)
    flow = as_flow(torch.nn.Identity(), scheduler)
    assert isinstance(flow.path, Discrete)
    k = torch.tensor([0.0, 1.0, 517.0, 999.0], dtype=torch.float64)
    alpha = flow.path.alpha(flow.path.time_from_native(k))
    expected = alphas_cumprod(scheduler.config)[k.long()].sqrt()
    torch.testing.assert_close(alpha, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(flow.clock(flow.path.time_from_native(k)), k)


def test_trained_betas_and_zero_terminal_snr() -> None:
    betas = torch.linspace(1e-3, 0.05, 40).tolist()
    for scheduler in (
        diffusers.DDIMScheduler(num_train_timesteps=40, trained_betas=betas),
        diffusers.DDPMScheduler(rescale_betas_zero_snr=True),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, beta_schedule="scaled_linear"),
    ):
        table = alphas_cumprod(scheduler.config)
        torch.testing.assert_close(table.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-6)
        if scheduler.config.get("rescale_betas_zero_snr"):
            assert float(table[-1]) == 0.0


def test_default_linear_table_is_that_of_the_path() -> None:
    assert as_flow(unet(), diffusers.DDPMScheduler()).path == Discrete.linear()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_estimates_are_those_of_a_ddim_step(tmp_path: Path, kind: str) -> None:
    """x̂₀ and ε̂ of a loaded checkpoint against the scheduler's own reading of the same output."""
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    net = unet()
    save(net, scheduler, tmp_path / "model", "DDIMPipeline")
    flow = adapters.load(tmp_path / "model")
    scheduler.set_timesteps(10)
    x = images()
    for k in scheduler.timesteps[:-1].tolist():
        with torch.no_grad():
            output = net(x, k).sample
            estimate = flow.estimate(x, flow.path.time_from_native(float(k)))
        torch.testing.assert_close(estimate.output, output, rtol=1e-5, atol=1e-6)
        step = scheduler.step(output, k, x)
        scale = 1.0 / float(estimate.point.alpha)
        torch.testing.assert_close(estimate.data, step.pred_original_sample, rtol=1e-4, atol=1e-5 * scale)
        previous = flow.path.at(flow.path.time_from_native(float(k - 100)))
        ddim = estimate.combine(previous.alpha, previous.sigma)
        torch.testing.assert_close(ddim, step.prev_sample, rtol=1e-4, atol=1e-5 * scale)


def test_round_trip_is_exact(checkpoint: Path) -> None:
    net, flow = unet(), adapters.load(checkpoint)
    assert flow.prediction.name == "noise"
    assert flow.dtype == torch.float32
    assert not flow.net.training  # type: ignore[union-attr]
    for k in (0, 400, 999):
        with torch.no_grad():
            assert torch.equal(flow.net(images(), torch.full((3,), float(k))), net(images(), k).sample)


def test_flow_matching_convention(tmp_path: Path) -> None:
    """The network reads 1000σ and predicts ε − z: an Euler step of ours is an Euler step of theirs."""
    scheduler, net = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), unet()
    save(net, scheduler, tmp_path / "model", "DiffusionPipeline")
    flow = adapters.load(tmp_path / "model")
    assert flow.path == CondOT()
    scheduler.set_timesteps(8)
    x = images()
    for i, k in enumerate(scheduler.timesteps):
        sigma, following = scheduler.sigmas[i].double().item(), scheduler.sigmas[i + 1].double().item()
        with torch.no_grad():
            output = net(x, k).sample
            velocity = flow.velocity(x, 1.0 - sigma)
        theirs = scheduler.step(output, k, x).prev_sample
        torch.testing.assert_close(velocity, -output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x + (sigma - following) * velocity, theirs, rtol=1e-4, atol=1e-5)


def test_saved_directory_opens_as_a_pipeline(tmp_path: Path) -> None:
    save(unet(), diffusers.DDPMScheduler(), tmp_path / "model")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    assert isinstance(pipeline.unet, diffusers.UNet2DModel)
    torch.testing.assert_close(pipeline.unet.conv_in.weight, unet().conv_in.weight)


def test_dtype_and_pipeline_less_directory(checkpoint: Path) -> None:
    (checkpoint / "model_index.json").unlink()
    flow = adapters.load(str(checkpoint), dtype=torch.bfloat16, device="cpu")
    assert flow.dtype == torch.bfloat16
    assert flow.velocity(images(), 0.5).dtype == torch.float32


def test_an_older_configuration_is_completed(checkpoint: Path) -> None:
    config = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "num_train_timesteps": 100}
    (checkpoint / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    flow = adapters.load(checkpoint)
    assert flow.path == Discrete.linear(100)
    assert flow.prediction.name == "noise"


def test_wrong_paths(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory or file on this machine"):
        adapters.load("google/ddpm-cifar10-32")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing.*scheduler_config.json.*holds model"):
        adapters.load(tmp_path)
    with pytest.raises(ValueError, match="pass its parent"):
        adapters.load(checkpoint / "unet")
    (checkpoint / "unet/config.json").rename(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        adapters.load(checkpoint)


def test_missing_or_pickled_weights(checkpoint: Path) -> None:
    (checkpoint / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights \(diffusion_pytorch_model.*holds config.json"):
        adapters.load(checkpoint)
    (checkpoint / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80pickle")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin is a broken or truncated pickle"):
        adapters.load(checkpoint)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"_class_name": "UNet1DModel"}, "holds a UNet1DModel; supported are UNet2DModel, UNet2DCond"),
        ("unet", {"out_channels": 3}, "maps 1 channels to 3"),
        ("scheduler", {"_class_name": "KarrasVeScheduler"}, "scheduler KarrasVeScheduler is not supported; supported"),
        ("scheduler", {"_class_name": None}, "scheduler None is not supported"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(checkpoint: Path, file: str, changes: dict[str, Any], message: str) -> None:
    name = "unet/config.json" if file == "unet" else "scheduler/scheduler_config.json"
    edit(checkpoint / name, **changes)
    with pytest.raises(ValueError, match=message):
        adapters.load(checkpoint)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "expected an object")])
def test_broken_json(checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "scheduler/scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        adapters.load(checkpoint)


def test_a_scheduler_object_of_another_kind() -> None:
    with pytest.raises(ValueError, match="VQDiffusionScheduler is not supported"):
        as_flow(unet(), diffusers.VQDiffusionScheduler(8))


def test_diffusers_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install .*\[diffusers\]'"):
        adapters.load(checkpoint)


@pytest.mark.parametrize("name", adapters.BUNDLED)
def test_bundled_checkpoints_are_what_they_record(name: str) -> None:
    """The held-out loss of training.json, measured again through the public loader."""
    pytest.importorskip("sklearn")
    root = adapters.bundled(name)
    record = json.loads((root / "training.json").read_text())
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) < 3_000_000
    flow = adapters.load(root)
    assert sum(p.numel() for p in flow.net.parameters()) == record["parameters"]  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(5)
    data = digits.dequantize(digits.load("held_out").images.repeat(4, 1, 1, 1), generator)
    loss = dsm_loss if name == "digits-ddpm" else cfm_loss
    with torch.no_grad():
        each = loss(flow, data, t=times.stratified, generator=generator, reduction="none")
    error = float(each.std()) / len(each) ** 0.5
    # five standard errors; the record is an estimate too, over 3,000 draws
    assert abs(float(each.mean()) - record["loss"]["held_out"]) < 5.0 * error * (1.0 + len(each) / 3000) ** 0.5


def test_unknown_bundled_name() -> None:
    with pytest.raises(ValueError, match="digits-ddpm, digits-condot"):
        adapters.bundled("mnist")


@pytest.mark.parametrize("place", [".", "scheduler", ".."])
def test_a_model_s_scheduler_is_read_where_it_lies(tmp_path: Path, place: str) -> None:
    """Saved by itself, a network's folder may have it beside config.json, below, or one folder up."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "checkpoint" / "network"
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    diffusers.UNet2DModel(**sizes, **kinds).save_pretrained(folder)
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / place)
    flow = adapters.load(folder)
    assert isinstance(flow.path, Discrete)
    assert flow.prediction.name == "noise"
