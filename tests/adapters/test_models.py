"""diffusers' conditional networks: what the flow asks and reads is what their pipelines ask and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters
from flowsolve.adapters.diffusers import FLOW
from flowsolve.paths import CondOT, Discrete
from tests.adapters import tiny

diffusers = pytest.importorskip("diffusers")


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(root: Path, part: str, model: Any, scheduler: Any, pipeline: str, vae: dict[str, Any] | None = None) -> Path:
    """A pipeline directory, as save_pretrained writes it, without the text encoders that no flow needs."""
    import json

    model.save_pretrained(root / part)
    scheduler.save_pretrained(root / "scheduler")
    index = {"_class_name": pipeline, part: ["diffusers", type(model).__name__]}
    (root / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", type(scheduler).__name__]}))
    if vae is not None:
        (root / "vae").mkdir()
        (root / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **vae}))
    return root


SD_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize(
    "options",
    [{}, {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}],
    ids=["sd1", "sd2-v", "ztsnr"],
)
def test_stable_diffusion(tmp_path: Path, options: dict[str, Any]) -> None:
    """x̂₀ of a loaded pipeline is that of its DDIM scheduler, text embeddings going through cond."""
    scheduler = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=True, **options)
    model = tiny.unet_condition()
    root = saved(tmp_path / "sd", "unet", model, scheduler, "StableDiffusionPipeline", {"scaling_factor": 0.18215})
    finding = adapters.inspect(root)
    assert finding.latent_scale == 0.18215
    assert finding.data_range is None
    flow = finding.flow()
    text, x = normal(2, 5, 12), normal(2, 4, 8, 8, seed=2)
    for k in (0, 300, 980):
        with torch.no_grad():
            output = model(x, k, encoder_hidden_states=text).sample
            estimate = flow.estimate(x, flow.path.time_from_native(float(k)), encoder_hidden_states=text)
        torch.testing.assert_close(estimate.output, output, rtol=0, atol=1e-6)
        scheduler.set_timesteps(50)
        theirs = scheduler.step(output, k, x).pred_original_sample
        torch.testing.assert_close(estimate.data, theirs, rtol=1e-4, atol=1e-5 / float(estimate.point.alpha))


def test_sampling_a_loaded_pipeline_is_running_it(tmp_path: Path) -> None:
    """DDIM over the scheduler's own timesteps, with text embeddings, equals the pipeline's loop."""
    scheduler = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, timestep_spacing="trailing")
    model = tiny.unet_condition()
    flow = adapters.load(saved(tmp_path / "sd", "unet", model, scheduler, "StableDiffusionPipeline"))
    text, x = normal(3, 5, 12), normal(3, 4, 8, 8, seed=2)
    sol = fs.sample(
        flow, start=x, solver=fs.solvers.DDIM(), nfe=10, grid="uniform", interval=(0.0, 1.0),
        cond={"encoder_hidden_states": text},
    )  # fmt: skip
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(model(x, k, encoder_hidden_states=text).sample, k, x).prev_sample
    torch.testing.assert_close(sol.x, x, rtol=1e-4, atol=1e-4)


def test_sdxl_conditions_are_a_tree(tmp_path: Path) -> None:
    """Nested conditions (added_cond_kwargs) belong to their samples: a batch of three is three batches of one."""
    model = tiny.unet_condition(xl=True)
    scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS)
    root = saved(tmp_path / "xl", "unet", model, scheduler, "StableDiffusionXLPipeline", {"scaling_factor": 0.13025})
    flow = adapters.load(root)
    x = normal(3, 4, 8, 8, seed=2)
    cond = {
        "encoder_hidden_states": normal(3, 5, 12),
        "added_cond_kwargs": {"text_embeds": normal(3, 10), "time_ids": torch.arange(18.0).reshape(3, 6)},
    }
    solver = fs.solvers.Dopri5(rtol=1e-2, atol=1e-2)
    whole = fs.sample(flow, start=x, solver=solver, interval=(0.05, 0.95), cond=cond).x
    for i in range(3):
        one = {
            "encoder_hidden_states": cond["encoder_hidden_states"][i : i + 1],  # type: ignore[index]
            "added_cond_kwargs": {k: v[i : i + 1] for k, v in cond["added_cond_kwargs"].items()},  # type: ignore[union-attr]
        }
        alone = fs.sample(flow, start=x[i : i + 1], solver=solver, interval=(0.05, 0.95), cond=one).x
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_dit_and_pixart_leave_out_the_learned_variance(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler()
    for name, model, cond in (
        ("DiTPipeline", tiny.dit(), {"class_labels": torch.tensor([3, 7])}),
        (
            "PixArtSigmaPipeline",
            tiny.pixart(),
            {"encoder_hidden_states": normal(2, 5, 6), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        ),
    ):
        root = saved(tmp_path / name, "transformer", model, scheduler, name)
        finding = adapters.inspect(root)
        assert any("learned variance" in e for e in finding.evidence)
        flow = finding.flow()
        assert isinstance(flow.path, Discrete)
        x = normal(2, 4, 4, 4)
        with torch.no_grad():
            output = model(x, timestep=torch.tensor([500, 500]), **cond).sample
            ours = flow.estimate(x, flow.path.time_from_native(500.0), **cond).output
        assert output.shape[1] == 8
        torch.testing.assert_close(ours, output.chunk(2, 1)[0], rtol=0, atol=1e-6)


def test_sd3_and_flux_read_their_own_clocks(tmp_path: Path) -> None:
    """SD3 is told 1000 σ, FLUX σ itself; both predict ε − z, whatever the shift."""
    text, pooled = normal(2, 5, 6), normal(2, 5)
    cases: list[tuple[str, Any, Tensor, dict[str, Any], float]] = [
        ("sd3", tiny.sd3(), normal(2, 4, 4, 4), {}, 1000.0),
        (
            "flux",
            tiny.flux(),
            normal(2, 6, 4),
            {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.full((2,), 3.5)},
            1.0,
        ),
    ]
    for name, model, x, more, scale in cases:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name == "flux")
        vae = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        finding = adapters.inspect(saved(tmp_path / name, "transformer", model, scheduler, name, vae))
        assert (finding.latent_scale, finding.latent_shift) == (1.5305, 0.0609)
        flow = finding.flow()
        assert flow.path == CondOT()
        assert flow.prediction is FLOW
        cond = {"encoder_hidden_states": text, "pooled_projections": pooled, **more}
        sigma = 0.625
        with torch.no_grad():
            output = model(hidden_states=x, timestep=torch.full((2,), scale * sigma), **cond).sample
            velocity = flow.velocity(x, 1.0 - sigma, **cond)
        torch.testing.assert_close(velocity, -output, rtol=0, atol=1e-6)


def test_pipelines_and_models_in_memory() -> None:
    model, scheduler = tiny.unet(), diffusers.DDPMScheduler(prediction_type="v_prediction")
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    for flow in (
        adapters.load(pipeline),
        adapters.load(model, scheduler=scheduler),
        adapters.load(model, scheduler={**scheduler.config, "_class_name": "DDPMScheduler"}),
        adapters.load(model, scheduler=scheduler.config),  # of just these options there is one kind
        adapters.load(model, path=Discrete.linear(), prediction="v", time="native"),
    ):
        assert flow.path == Discrete.linear()
        assert flow.prediction.name == "v"
        x = normal(2, 1, 8, 8)
        with torch.no_grad():
            output = model(x, 400).sample
        torch.testing.assert_close(
            flow.estimate(x, flow.path.time_from_native(400.0)).output, output, rtol=0, atol=1e-6
        )
    with pytest.raises(adapters.Unrecognised, match="declare scheduler="):
        adapters.load(model)
    with pytest.raises(ValueError, match="has no _class_name"):
        adapters.load(model, scheduler={"prediction_type": "v_prediction"})


def test_a_single_model_directory(tmp_path: Path) -> None:
    """unet/ alone needs a scheduler, given as an object, a configuration, a file or a directory."""
    model, scheduler = tiny.unet(), diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    model.save_pretrained(tmp_path / "model")
    scheduler.save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(adapters.Unrecognised, match=r"scheduler= .*or path=, prediction= and time="):
        adapters.load(tmp_path / "model")
    for given in (
        scheduler,
        scheduler.config,
        tmp_path / "elsewhere",
        tmp_path / "elsewhere/scheduler_config.json",
    ):
        assert adapters.load(tmp_path / "model", scheduler=given).prediction.name == "noise"
    flow = adapters.load(tmp_path / "model", path=fs.paths.CondOT(), prediction="velocity", time="flow")
    assert flow.path == CondOT()
    with pytest.raises(adapters.Unrecognised, match=r"declare prediction= .*, and time="):
        adapters.load(tmp_path / "model", path=fs.paths.CondOT())


@pytest.mark.parametrize(
    "name",
    ["sdxl-turbo", "SDXL-Lightning", "lcm-dreamshaper", "FLUX.1-schnell", "Hyper-SD15", "model_turbo"],
)
def test_distilled_by_name(tmp_path: Path, name: str) -> None:
    root = saved(tmp_path / name, "unet", tiny.unet(), diffusers.DDPMScheduler(), "DDPMPipeline")
    with pytest.raises(adapters.Unrecognised, match=r"is refused: its name says .*no ODE.*distilled=False"):
        adapters.load(root)
    assert adapters.load(root, distilled=False).prediction.name == "noise"


def test_names_that_only_look_distilled(tmp_path: Path) -> None:
    for name in ("turbofan-photos", "calcmodel", "hyperbolic"):
        assert adapters.inspect(
            saved(tmp_path / name, "unet", tiny.unet(), diffusers.DDPMScheduler(), "DDPMPipeline")
        ).ready


def test_consistency_family(tmp_path: Path) -> None:
    for i, scheduler in enumerate(
        (diffusers.LCMScheduler(), diffusers.TCDScheduler(), diffusers.CMStochasticIterativeScheduler())
    ):
        root = saved(tmp_path / str(i), "unet", tiny.unet(), scheduler, "DiffusionPipeline")
        with pytest.raises(
            adapters.Unrecognised, match=f"its scheduler is {type(scheduler).__name__}.*jump to the data"
        ):
            adapters.load(root)
        with pytest.raises(adapters.Unrecognised, match="jump to the data"):
            adapters.load(diffusers.DDPMPipeline(unet=tiny.unet(), scheduler=scheduler))
    guided = tiny.unet_condition(time_cond_proj_dim=8)
    root = saved(tmp_path / "w", "unet", guided, diffusers.DDIMScheduler(), "DiffusionPipeline")
    with pytest.raises(adapters.Unrecognised, match="time_cond_proj_dim"):
        adapters.load(root)
    root = saved(tmp_path / "c", "unet", tiny.unet(), diffusers.DDIMScheduler(), "LatentConsistencyModelPipeline")
    with pytest.raises(adapters.Unrecognised, match="LatentConsistencyModelPipeline"):
        adapters.load(root)


def test_networks_that_need_another_image_or_another_network(tmp_path: Path) -> None:
    inpainting = saved(tmp_path / "i", "unet", tiny.unet_condition(in_channels=9), diffusers.DDIMScheduler(), "P")
    with pytest.raises(ValueError, match=r"maps 9 channels to 4.*concatenated in a function of yours"):
        adapters.load(inpainting)
    two = saved(tmp_path / "t", "transformer", tiny.sd3(), diffusers.FlowMatchEulerDiscreteScheduler(), "WanPipeline")
    import json

    index = json.loads((two / "model_index.json").read_text())
    (two / "model_index.json").write_text(json.dumps({**index, "transformer_2": ["diffusers", "X"]}))
    with pytest.raises(adapters.Unrecognised, match=r"more than one denoiser \(also transformer_2\)"):
        adapters.load(two)


def test_sharded_bin_and_half_precision(tmp_path: Path) -> None:
    model, scheduler = tiny.unet(), diffusers.DDPMScheduler()
    x = normal(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(x, 10).sample
    model.save_pretrained(tmp_path / "shards/unet", max_shard_size="20KB")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "bin/unet", safe_serialization=False)
    for kind in ("shards", "bin"):
        scheduler.save_pretrained(tmp_path / kind / "scheduler")
        flow = adapters.load(tmp_path / kind)
        with torch.no_grad():
            torch.testing.assert_close(flow.net(x, torch.tensor([10.0, 10.0])), expected)
    flow = adapters.load(tmp_path / "shards", dtype=torch.float16)
    assert flow.dtype == torch.float16


def test_variants(tmp_path: Path) -> None:
    """The plain files are taken, a variant where it is asked for or is the only one."""
    model, scheduler = tiny.unet(), diffusers.DDPMScheduler()
    other = tiny.unet()
    with torch.no_grad():
        other.conv_in.weight.zero_()
    model.save_pretrained(tmp_path / "unet")
    other.save_pretrained(tmp_path / "unet", variant="ema")
    scheduler.save_pretrained(tmp_path / "scheduler")

    def first(**said: Any) -> float:
        return float(adapters.load(tmp_path, **said).net.unet.conv_in.weight.detach().abs().sum())  # type: ignore[union-attr]

    assert first() > 0.0
    assert first(variant="ema") == 0.0
    with pytest.raises(FileNotFoundError, match=r"no weights \(diffusion_pytorch_model.fp16\*"):
        adapters.load(tmp_path, variant="fp16")
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert first() == 0.0


def test_the_hub_s_cache_keeps_the_name(tmp_path: Path) -> None:
    root = tmp_path / "models--stabilityai--sdxl-turbo/snapshots/71153311d3dbb46851df1931d3ca6e939de83304"
    root.mkdir(parents=True)
    saved(root, "unet", tiny.unet(), diffusers.DDPMScheduler(), "DDPMPipeline")
    with pytest.raises(adapters.Unrecognised, match="its name says turbo"):
        adapters.load(root)


def test_flux_without_guidance_is_schnell(tmp_path: Path) -> None:
    model, scheduler = tiny.flux(guidance_embeds=False), diffusers.FlowMatchEulerDiscreteScheduler()
    root = saved(tmp_path / "flux", "transformer", model, scheduler, "FluxPipeline")
    with pytest.raises(adapters.Unrecognised, match="without guidance_embeds is the schnell model"):
        adapters.load(root)
    assert adapters.load(root, distilled=False).path == CondOT()


def test_models_of_other_classes_are_refused() -> None:
    """A transformer whose pipeline may scale its time is not called on a guess."""
    torch.manual_seed(0)
    other = diffusers.UNet1DModel(
        block_out_channels=(8, 8, 16), down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"), extra_in_channels=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"holds a UNet1DModel; supported are UNet2DModel"):
        adapters.load(other, scheduler=diffusers.DDPMScheduler())


def test_a_declared_path_behind_preconditioning() -> None:
    """Other noise levels keep the scaling of the input; a path that scales the data is refused."""
    model, scheduler = tiny.unet(), diffusers.EDMEulerScheduler()
    flow = adapters.load(model, scheduler=scheduler, path=fs.paths.EDM(0.01, 40.0))
    assert flow.path == fs.paths.EDM(0.01, 40.0)
    x, sigma = normal(2, 1, 8, 8), fs.paths.EDM(0.01, 40.0).sigma(0.3)
    with torch.no_grad():
        fed = scheduler.precondition_inputs(sigma * x, sigma)
        output = model(fed, scheduler.precondition_noise(torch.tensor([sigma, sigma]))).sample
        expected = scheduler.precondition_outputs(sigma * x, output, sigma)
        torch.testing.assert_close(flow.data(sigma * x, 0.3), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"scales the data, but the network is behind EDM's preconditioning"):
        adapters.load(model, scheduler=scheduler, path=fs.paths.VP())


def test_latents_with_a_mean_and_a_spread_for_each_channel(tmp_path: Path) -> None:
    """(encoded − mean) · scaling_factor / std, as Playground's and Wan's pipelines have it."""
    vae = {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.0, 1.0], "latents_std": [2.0, 4.0, 1.0, 0.5]}
    root = saved(tmp_path / "m", "unet", tiny.unet_condition(), diffusers.DDPMScheduler(), "Pipeline", vae)
    finding = adapters.inspect(root)
    assert finding.latent_scale == (0.25, 0.125, 0.5, 1.0)
    assert finding.latent_shift == (0.1, -0.2, 0.0, 1.0)
    assert finding.summary()["latent_scale"] == [0.25, 0.125, 0.5, 1.0]
    transform = finding.flow().transform
    code = normal(2, 4, 3, 3)
    mean, std = (torch.tensor(vae[k]).reshape(1, 4, 1, 1) for k in ("latents_mean", "latents_std"))
    torch.testing.assert_close(transform.forward(code), (code - mean) * 0.5 / std)
    torch.testing.assert_close(transform.inverse(transform.forward(code)), code)
    with pytest.raises(ValueError, match=r"4 channels of Latent met states of shape \(2, 3, 3, 3\); expected \(B, C"):
        transform.forward(code[:, :3])


@pytest.mark.parametrize(
    ("vae", "right"),
    [
        ({"scaling_factor": 0.13025}, fs.transforms.Latent(0.13025)),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, fs.transforms.Latent(1.5305, 0.0609)),
        ({}, fs.transforms.Latent(diffusers.AutoencoderKL().config.scaling_factor)),  # older than the entry
        ({"_class_name": "AutoencoderOfOurs"}, fs.transforms.Range()),  # says nothing, so nothing is claimed
    ],
)
def test_a_flow_of_codes_declares_them(tmp_path: Path, vae: dict[str, Any], right: Any) -> None:
    root = saved(tmp_path / "m", "unet", tiny.unet_condition(), diffusers.DDPMScheduler(), "Pipeline", vae)
    assert adapters.load(root).transform == right
    mine = fs.transforms.Range(0.0, 1.0, levels=32)
    finding = adapters.inspect(root, transform=mine)
    assert finding.flow().transform is mine
    assert (finding.data_range, finding.levels, finding.latent_scale) == ((0.0, 1.0), 32, None)


@pytest.mark.parametrize("name", adapters.BUNDLED)
def test_bundled_checkpoints_declare_their_17_levels(name: str) -> None:
    flow = adapters.load(adapters.bundled(name))
    assert flow.transform == fs.transforms.Range(-1.0, 1.0, levels=17)
    k = torch.randint(0, 17, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    one, two = (fs.bits_per_dim(flow, k, nfe=16, seed=1, **said).bpd for said in ({}, {"levels": 17}))
    assert torch.equal(one, two)
    finding = adapters.inspect(adapters.bundled(name), data_range=(0.0, 1.0))
    assert finding.flow().transform == fs.transforms.Range(0.0, 1.0, levels=17)


@pytest.mark.parametrize(
    "record",
    ["{", "[]", "{}", '{"recipe": {"data": "digits"}}', '{"recipe": "digits", "versions": {"flowsolve": "1"}}',
     '{"recipe": {"data": "faces"}, "versions": {"flowsolve": "1"}}'],
)  # fmt: skip
def test_a_record_of_another_program_says_nothing(tmp_path: Path, record: str) -> None:
    root = saved(tmp_path / "m", "unet", tiny.unet(), diffusers.DDPMScheduler(), "DDPMPipeline")
    (root / "training.json").write_text(record)
    finding = adapters.inspect(root)
    assert finding.levels is None
    assert finding.flow().transform == fs.transforms.Range()


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"data_range": (0, 1), "transform": fs.transforms.Range()}, TypeError, "say the same; declare one"),
        ({"transform": (0, 1)}, TypeError, r"transform is \(0, 1\); expected a flowsolve.transforms object"),
        ({"data_range": 3}, ValueError, r"data_range = 3; expected two numbers \(low, high\)"),
        ({"data_range": (1, 0)}, ValueError, "expected finite numbers with low < high"),
    ],
)
def test_transforms_that_are_none(said: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        adapters.load(adapters.bundled("digits-ddpm"), **said)


def test_a_scheduler_made_from_the_pipeline_s_own() -> None:
    """Another library's scheduler, made from the configuration of the pipeline's, says what that said."""

    class Other:
        def __init__(self, **config: Any) -> None:
            self.config = config

    betas = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    for kept in (
        {"_class_name": "DDIMScheduler"},
        {"flowsolve": {"scheduler": "DDIMScheduler"}, "_class_name": "Other"},
    ):
        flow = adapters.load(tiny.unet(), scheduler=Other(**betas, **kept, prediction_type="v_prediction"))
        assert (flow.path, flow.prediction.name) == (Discrete.linear(100), "v")
    with pytest.raises(ValueError, match="scheduler Other is not supported"):
        adapters.load(tiny.unet(), scheduler=Other(**betas))
