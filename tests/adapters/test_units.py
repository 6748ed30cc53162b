"""What a `Scheduler` shows of Euler's kin is in their units: loops of users and pipelines of their own rely on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler, capture  # noqa: E402
from flowsolve.adapters.diffusers.convention import EULERS  # noqa: E402

STABLE: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ROUNDING = 2e-5
"""Relative, in float32: their table is a product of 1000 factors, each rounded (6e-8)."""
KINDS: dict[str, dict[str, Any]] = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "Karras": {"use_karras_sigmas": True},
}


def network(x: Tensor, t: Any) -> Tensor:
    """A smooth function of both."""
    return torch.sin(x) * (0.5 + 0.4 * torch.cos(torch.as_tensor(t, dtype=torch.float32) / 300.0))


def noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "Karras"])
def test_a_loop_that_takes_the_data_by_sigma(kind: str) -> None:
    """x₀ = latents − σ ε or, for v, as k-diffusion has it, with `sigmas` and latents of the scheduler; step by step."""
    found = []
    theirs = diffusers.EulerDiscreteScheduler(**STABLE, **KINDS[kind])
    for s in (theirs, Scheduler.from_config(theirs, solver="euler")):
        s.set_timesteps(8)
        x, seen = noise() * s.init_noise_sigma, []
        for i, t in enumerate(s.timesteps):
            sigma, output = s.sigmas[i], network(s.scale_model_input(x, t), t)
            if kind == "v":
                data = x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
            else:
                data = x - sigma * output
            out = s.step(output, t, x)
            seen.append((float(t), float(sigma), x / sigma, data / sigma, out.pred_original_sample / sigma))
            x = out.prev_sample
        found.append([*seen, (0.0, float(s.sigmas[-1]), x, x, x)])
    for a, b in zip(*found, strict=True):
        for u, v in zip(a, b, strict=True):
            torch.testing.assert_close(torch.as_tensor(v), torch.as_tensor(u), rtol=1e-4, atol=ROUNDING)


@pytest.mark.parametrize("name", EULERS)
@pytest.mark.parametrize("kind", ["linspace", "leading", "trailing"])
def test_what_the_kin_show(name: str, kind: str) -> None:
    """Start, first level, input and noising, whatever the solver."""
    theirs = getattr(diffusers, name)(**STABLE, **KINDS[kind])
    theirs.set_timesteps(6)
    x, e, k = noise(), noise().flip(0), theirs.timesteps[:1]
    for solver in ("euler", "heun", "unipc", "ddpm", "auto"):
        s = Scheduler.from_config(theirs, solver=solver, grid=None if solver != "auto" else "leading")
        s.set_timesteps(6)
        same = s.sigmas[0] == pytest.approx(float(theirs.sigmas[0]), rel=1e-4)
        if solver in ("euler", "heun"):
            assert same
        if same and solver == "euler":
            assert s.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-4)
        level = float(s.sigmas[0])
        assert s.init_noise_sigma in (pytest.approx(level), pytest.approx((level**2 + 1.0) ** 0.5))
        fed = s.scale_model_input(x, s.timesteps[0])
        torch.testing.assert_close(fed, x / (level**2 + 1.0) ** 0.5, rtol=1e-5, atol=1e-6)
        noised = s.add_noise(x, e, k)
        torch.testing.assert_close(noised, theirs.add_noise(x, e, k), rtol=1e-4, atol=1e-3)


def test_zero_terminal_snr_has_a_finite_level() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**STABLE, **KINDS["v"], rescale_betas_zero_snr=True)
    s = Scheduler.from_config(theirs, solver="euler")
    for each in (theirs, s):
        each.set_timesteps(5)
    assert float(s.sigmas[0]) == float(theirs.sigmas[0]) == 4096.0
    assert s.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma))
    ends = []
    for each in (theirs, s):
        x = noise() * each.init_noise_sigma
        for t in each.timesteps:
            x = each.step(network(each.scale_model_input(x, t), t), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)  # 2⁻¹² stands for 0 there


def test_other_classes_keep_their_units() -> None:
    """A configuration of DDIM is shown in DDIM's units, also with the solver "euler"."""
    s = Scheduler.from_config(diffusers.DDIMScheduler(**STABLE), solver="euler")
    s.set_timesteps(5)
    x = noise()
    assert s.scale_model_input(x, s.timesteps[0]) is x
    assert s.init_noise_sigma <= 1.0


def upscaler() -> Any:
    """`StableDiffusionLatentUpscalePipeline` of small random networks, with its scheduler's configuration."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=5, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, time_cond_proj_dim=64 + 64 + 16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2,
                                        num_hidden_layers=1, vocab_size=20))  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE, prediction_type="sample")
    pipe = diffusers.StableDiffusionLatentUpscalePipeline(vae, text, None, unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(steps: int) -> dict[str, Any]:
    """The arguments of a call."""
    g = torch.Generator().manual_seed(1)
    prompts = {k: torch.randn(1, 5, 16, generator=g) for k in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {k: torch.randn(1, 16, generator=g) for k in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    own = {"image": torch.randn(1, 4, 8, 8, generator=g), "num_inference_steps": steps, "guidance_scale": 3.0}
    return {**own, **prompts, **pooled, "output_type": "latent", "generator": torch.Generator().manual_seed(2)}


def upscaled(pipe: Any, steps: int) -> Tensor:
    return pipe(**call(steps)).images


def test_the_latent_upscaler_preconditions_by_sigmas() -> None:
    pipe = upscaler()
    own = upscaled(pipe, 4)
    theirs = pipe.scheduler
    pipe.scheduler = Scheduler.from_config(theirs, solver="euler")
    torch.testing.assert_close(upscaled(pipe, 4), own, rtol=1e-3, atol=1e-3)
    pipe.scheduler = theirs
    converged = upscaled(pipe, 400)
    errors = {}
    for solver in ("euler", "heun", "dpmsolver++"):
        pipe.scheduler = Scheduler.from_config(theirs, solver=solver)
        errors[solver] = float((upscaled(pipe, 20) - converged).norm() / converged.norm())
    assert errors["heun"] < errors["euler"]
    assert errors["dpmsolver++"] < errors["euler"]


def test_the_upscaler_is_captured() -> None:
    """It reads `sigmas` by the number of the turn: that is the level at the time which the turn is asked at."""
    pipe = upscaler()
    converged = upscaled(pipe, 400)
    held = capture(pipe, **call(4))
    sol = fs.sample(held.flow, start=held.start, solver="heun", grid="log_snr", nfe=60, interval=held.interval,
                    cond=held.cond)  # fmt: skip
    held.close()
    assert float((sol.x - converged).norm() / converged.norm()) < 0.02


def test_a_captured_pipeline_of_the_kin_is_in_the_path_s_units() -> None:
    """Its start is σ ε, of standard deviation about 1, and decoding gives what the flow ended at."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8),
                                 norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                                 up_block_types=("UpBlock2D",) * 2, layers_per_block=1).eval()  # fmt: skip

    class Plain(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
        def __init__(self, unet: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, n: int) -> Tensor:
            self.scheduler.set_timesteps(n)
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            x = x * self.scheduler.init_noise_sigma
            for t in self.scheduler.timesteps:
                out = self.unet(self.scheduler.scale_model_input(x, t), t).sample
                x = self.scheduler.step(out, t, x).prev_sample
            return x

    pipe = Plain(unet, diffusers.EulerDiscreteScheduler(**STABLE))
    own = pipe(10)
    held = capture(pipe, 10)
    assert float(held.start.std()) == pytest.approx(1.0, rel=0.1)
    lead = Scheduler.from_config(pipe.scheduler, solver="euler")
    lead.set_timesteps(10)
    sol = fs.sample(held.flow, start=held.start, solver=fs.solvers.DDIM(), grid=lead.nodes, cond=held.cond,
                    interval=(lead.nodes[0], 1.0))  # fmt: skip
    torch.testing.assert_close(sol.x, own, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(held.decode(sol.x), sol.x)
    held.close()
