"""Directories whose network would load, and would be something else than what it is loaded as."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flowsolve import adapters

diffusers = pytest.importorskip("diffusers")
from tests.adapters.pipelines import unet_conditional  # noqa: E402

STABLE: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def directory(root: Path, unet: Any, scheduler: Any, pipeline: str, **parts: Any) -> Path:
    """A checkpoint with an index that names a pipeline and its parts."""
    unet.save_pretrained(root / "unet")
    scheduler.save_pretrained(root / "scheduler")
    index = {"_class_name": pipeline, "unet": ["diffusers", type(unet).__name__], **parts}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def upscaler(channels: int) -> Any:
    """A network of `channels` channels, conditioned on a noise level as DeepFloyd IF's second stage is."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=8, norm_num_groups=4, class_embed_type="timestep",
    )  # fmt: skip


@pytest.mark.parametrize("pipeline", ["IFSuperResolutionPipeline", "DDPMPipeline"])
def test_a_second_stage_is_no_flow_of_six_channels(tmp_path: Path, pipeline: str) -> None:
    """DeepFloyd IF II: 3 noisy + 3 small channels in, 3 of noise + 3 of variance out."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    root = directory(tmp_path, upscaler(6), scheduler, pipeline)
    assert not adapters.inspect(root).ready
    with pytest.raises(adapters.Unrecognised, match=r"variance_type = 'learned_range'.* maps 6 channels to 6"):
        adapters.load(root)
    with pytest.raises(adapters.Unrecognised, match="maps 6 channels to 6"):
        adapters.load(upscaler(6), scheduler=scheduler)


def test_what_the_refusal_advises_can_be_done(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    root = directory(tmp_path, upscaler(3), scheduler, "DDPMPipeline")
    with pytest.raises(adapters.Unrecognised, match="variance_type='fixed_small'"):
        adapters.load(root)
    said = {**json.loads((root / "scheduler/scheduler_config.json").read_text()), "variance_type": "fixed_small"}
    assert adapters.load(root, scheduler=said).prediction.name == "noise"


@pytest.mark.parametrize(("pipeline", "parts", "message"), [
    ("StableDiffusionControlNetPipeline", {"controlnet": ["diffusers", "ControlNetModel"]}, "has a ControlNet"),
    ("StableDiffusionPipeline", {"controlnet": ["diffusers", "ControlNetModel"]}, "has a ControlNet"),
    ("StableDiffusionXLControlNetPAGPipeline", {}, "has a ControlNet"),
    ("StableDiffusionPAGPipeline", {}, "perturbed attention"),
    ("StableDiffusionAdapterPipeline", {"adapter": ["diffusers", "T2IAdapter"]}, "a T2I adapter"),
    ("AnimateDiffPipeline", {"motion_adapter": ["diffusers", "MotionAdapter"]}, "a motion adapter"),
])  # fmt: skip
def test_a_pipeline_of_more_than_its_denoiser(
    tmp_path: Path, pipeline: str, parts: dict[str, Any], message: str
) -> None:
    scheduler = diffusers.DDIMScheduler(**STABLE)
    root = directory(tmp_path, unet_conditional(), scheduler, pipeline, **parts)
    with pytest.raises(adapters.Unrecognised, match=rf"{message}.*capture\(pipe"):
        adapters.load(root)
    alone = adapters.load(root / "unet", scheduler=scheduler)  # as the refusal says
    assert alone.prediction.name == "noise"


def test_a_part_that_is_not_there_is_no_companion(tmp_path: Path) -> None:
    root = directory(
        tmp_path, unet_conditional(), diffusers.DDIMScheduler(**STABLE), "StableDiffusionPipeline",
        controlnet=[None, None], image_encoder=[None, None],
    )  # fmt: skip
    assert adapters.inspect(root).ready


def test_what_is_carried_along_is_no_evidence(tmp_path: Path) -> None:
    """inspect shows what the class named reads, and an old word for the prediction."""
    root = directory(tmp_path, unet_conditional(), diffusers.DDIMScheduler(**STABLE), "StableDiffusionPipeline")
    file = root / "scheduler/scheduler_config.json"
    said = {**json.loads(file.read_text()), "timestep_type": "continuous", "sigma_max": 700.0}
    file.write_text(json.dumps(said))
    finding = adapters.inspect(root)
    assert not any("continuous" in line or "700" in line for line in finding.evidence)
    file.write_text(json.dumps({k: v for k, v in said.items() if k != "prediction_type"} | {"predict_epsilon": False}))
    finding = adapters.inspect(root)
    assert finding.prediction is not None
    assert finding.prediction.name == "data"
    assert any("predict_epsilon = False" in line for line in finding.evidence)


def test_so_in_memory() -> None:
    class ControlNetPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
        def __init__(self, unet: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    with pytest.raises(adapters.Unrecognised, match="has a ControlNet"):
        adapters.load(ControlNetPipeline(unet_conditional(), diffusers.DDIMScheduler(**STABLE)))


@pytest.mark.parametrize(("name", "word"), [
    ("stabilityai/sdxl-turbo", "turbo"), ("models/FLUX.1-schnell", "schnell"), ("an/LCM_Dreamshaper_v7", "lcm"),
])  # fmt: skip
def test_a_distilled_pipeline_gets_a_word(name: str, word: str) -> None:
    """When a solver of many steps is put on it; its scheduler alone, of an ordinary class, says nothing."""
    from flowsolve.adapters.diffusers import Scheduler, capture

    class Plain(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
        def __init__(self, unet: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def __call__(self) -> None:
            raise RuntimeError("this far")

    pipe = Plain(unet_conditional(), diffusers.EulerAncestralDiscreteScheduler(**STABLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Scheduler.from_config(pipe, solver="unipc")
        Scheduler.from_config(pipe.scheduler, solver="unipc")
    pipe.register_to_config(_name_or_path=name)
    with pytest.warns(UserWarning, match=rf"says {word}: such networks are trained to jump"):
        made = Scheduler.from_config(pipe, solver="unipc")
    assert made.config["flowsolve"]["scheduler"] == "EulerAncestralDiscreteScheduler"
    with pytest.warns(UserWarning, match=rf"says {word}"), pytest.raises(RuntimeError, match="this far"):
        capture(pipe)


def test_schnell_is_known_by_its_network() -> None:
    from flowsolve.adapters.diffusers import Scheduler
    from tests.adapters.tiny import flux

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    for guided in (True, False):
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=flux(guidance_embeds=guided), **parts
        )
        with nullcontext() if guided else pytest.warns(UserWarning, match="schnell model"):
            Scheduler.from_config(pipe)
