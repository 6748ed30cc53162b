"""Pipelines that ask more of a scheduler than most: either right, or refused with advice that can be followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler, capture  # noqa: E402
from tests.adapters.pipelines import vae  # noqa: E402


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- CogView 4: the network is told the level before its shift --------------------------------------------------------


def cogview() -> Any:
    if not hasattr(diffusers, "CogView4Pipeline"):
        pytest.skip("this diffusers has no CogView4")
    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    for p in transformer.parameters():
        p.data = 0.15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(None, None, vae(), transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(steps: int) -> dict[str, Any]:
    text = {"prompt_embeds": randn(1, 5, 32, seed=1), "negative_prompt_embeds": randn(1, 5, 32, seed=2)}
    size = {"height": 96, "width": 96, "output_type": "latent", "guidance_scale": 2.0}
    return {**text, **size, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(3)}


def test_cogview_s_network_is_told_the_level_before_the_shift() -> None:
    pipe = cogview()
    theirs, own = pipe.scheduler, pipe(**call(6)).images
    pipe.scheduler = s = Scheduler.from_config(theirs, solver="euler")
    torch.testing.assert_close(pipe(**call(6)).images, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(s.timesteps, theirs.timesteps)
    torch.testing.assert_close(s.sigmas, theirs.sigmas)
    assert not torch.allclose(s.timesteps, 1000.0 * s.sigmas[:-1])


def test_its_solves_converge_to_its_ode() -> None:
    """Stages and grids that the pipeline has not laid out are asked at their own time too."""
    pipe = cogview()
    theirs = pipe.scheduler
    own = pipe(**call(400)).images
    errors = {}
    for solver, grid in (("euler", None), ("heun", None), ("unipc", None), ("unipc", "uniform"), ("auto", None)):
        pipe.scheduler = Scheduler.from_config(theirs, solver=solver, grid=grid)
        errors[solver, grid] = float((pipe(**call(12)).images - own).norm() / own.norm())
    rough = errors.pop(("euler", None))
    assert max(errors.values()) < rough, (rough, errors)


def test_cogview_is_captured_with_its_own_clock() -> None:
    pipe = cogview()
    own = pipe(**call(300)).images
    held = capture(pipe, **call(4))
    sol = fs.sample(held.flow, start=held.start, solver=fs.solvers.Dopri5(1e-4, 1e-4), cond=held.cond,
                    interval=held.interval)  # fmt: skip
    held.close()
    assert float((sol.x - own).norm() / own.norm()) < 0.02


def test_timesteps_and_sigmas_that_differ_are_refused() -> None:
    s = Scheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), solver="euler")
    with pytest.raises(ValueError, match=r"timesteps = 1000 sigmas \(as CogView4\); give one of them"):
        s.set_timesteps(timesteps=[900.0, 500.0], sigmas=[1.0, 0.5])
    table = Scheduler.from_config(diffusers.DDIMScheduler(), solver="ddim")
    with pytest.raises(ValueError, match="give one of them"):
        table.set_timesteps(timesteps=[900.0, 500.0], sigmas=[0.9, 0.5])


# --- words that other schedulers' steps know --------------------------------------------------------------------------


def test_prev_timestep_of_the_unclip_kind() -> None:
    """Kandinsky 2.2's prior names where a step leads; the plan knows."""
    theirs = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample=False)
    s = Scheduler.from_config(theirs, solver="ddim")
    found = []
    for named in (True, False):
        s.set_timesteps(5)
        x = randn(2, 8)
        for i, t in enumerate(s.timesteps):
            last = i + 1 == len(s.timesteps)
            word = {"prev_timestep": None if last else s.timesteps[i + 1]} if named else {}
            x = s.step(0.3 * x, t, x, **word).prev_sample
        found.append(x)
    assert torch.equal(*found)


def test_times_of_a_sample_s_parts() -> None:
    """LTX's conditions: the sign is theirs; parts at other times are refused."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    s = Scheduler.from_config(theirs, solver="euler")
    ends = []
    for each in (theirs, s):
        each.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        x = randn(1, 6, 4)
        for t in each.timesteps:
            x = each.step(-torch.sin(x), t, x, per_token_timesteps=t.expand(1, 6), return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    s.set_timesteps(4)
    times = s.timesteps[0].expand(1, 6) * torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    with pytest.raises(ValueError, match=r"per_token_timesteps differ.*keep its own scheduler"):
        s.step(randn(1, 6, 4), s.timesteps[0], randn(1, 6, 4), per_token_timesteps=times)


def test_a_counter_that_a_pipeline_moves_is_refused() -> None:
    s = Scheduler.from_config(diffusers.EDMEulerScheduler(), solver="ddim")
    with pytest.raises(RuntimeError, match=r"moves the scheduler's counter.*keep its own scheduler"):
        s._step_index = 3


def test_a_clock_from_0_to_1() -> None:
    """OmniGen's table has one entry; its own pipeline gives the levels, and a bare number of steps is even ones."""
    s = Scheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1), solver="euler"
    )
    s.set_timesteps(8)
    assert s.timesteps.tolist() == pytest.approx([i / 8 for i in range(8)])


def test_a_dynamic_shift_without_mu_says_what_to_do() -> None:
    """BRIA and EasyAnimate hand μ to a FlowMatchEulerDiscreteScheduler alone."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    s = Scheduler.from_config(theirs, solver="euler")
    with pytest.raises(ValueError, match=r"pipe.scheduler, use_dynamic_shifting=False, shift=s\) with s = math.exp"):
        s.set_timesteps(4)
    mended = Scheduler.from_config(theirs, solver="euler", use_dynamic_shifting=False, shift=2.718281828459045)
    mended.set_timesteps(4)
    s.set_timesteps(4, mu=1.0)
    torch.testing.assert_close(mended.sigmas, s.sigmas)


def test_auto_keeps_to_low_orders_on_levels_that_are_not_its_own() -> None:
    """Levels of a call whose steps grow suddenly: it is UniPC of order 2 there, and nearer than order 1."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    sigmas = [1.0 - 0.002 * i for i in range(12)] + [0.9 - 0.09 * i for i in range(10)]
    mixture = fs.problems.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor(0.5))
    flow = mixture.flow(fs.paths.CondOT())
    start, ends = randn(64, 2), {}
    true = fs.sample(flow, start=start, solver=fs.solvers.Dopri5(1e-6, 1e-6)).x
    for solver in ("euler", "auto", "unipc:order=2"):
        s = Scheduler.from_config(theirs, solver=solver)
        s.set_timesteps(sigmas=sigmas)
        x = start
        for t in s.timesteps:
            x = s.step(-flow.velocity(x, 1.0 - float(t) / 1000.0).to(x.dtype), t, x, return_dict=False)[0]
        ends[solver] = float((x - true).norm() / true.norm())
    assert ends["auto"] < ends["euler"], ends
    assert ends["auto"] == ends["unipc:order=2"], ends


# --- loops that decide by the number of their turn --------------------------------------------------------------------


class ByTurn(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
    """A pipeline that has a table of its own, as those with a ControlNet have."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, control_guidance_end: float = 1.0, skip_layer_guidance_stop: float = 0.2,
                 skip_guidance_layers: Any = None) -> Tensor:  # fmt: skip
        self.scheduler.set_timesteps(steps)
        keep = [1.0 - float((i + 1) / steps > control_guidance_end) for i in range(steps)]
        x = randn(1, 3, 8, 8)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(self.unet(x, t).sample * (0.5 + 0.5 * keep[i]), t, x).prev_sample
        return x


def by_turn() -> Any:
    from tests.adapters.pipelines import unet2d

    return ByTurn(unet2d(), diffusers.DDIMScheduler(clip_sample=False))


@pytest.mark.parametrize(("options", "name"), [
    ({"control_guidance_end": 0.5}, "control_guidance_end = 0.5"),
    ({"skip_guidance_layers": [7]}, "skip_layer_guidance_stop = 0.2"),
])  # fmt: skip
def test_a_call_that_decides_by_turn_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} makes ByTurn decide by the number of the turn"):
        capture(by_turn(), 8, **options)


def test_a_table_that_ends_says_how_to_make_it_longer() -> None:
    held = capture(by_turn(), 3)
    with pytest.raises(RuntimeError, match=r"tables end after 3 of them.*num_inference_steps as large"):
        fs.sample(held.flow, start=held.start, solver="ddim", nfe=8, cond=held.cond, interval=held.interval)
    held = capture(by_turn(), 100)
    sol = fs.sample(held.flow, start=held.start, solver="ddim", nfe=8, cond=held.cond)
    held.close()
    assert torch.isfinite(sol.x).all()


def test_a_controlnet_all_the_way_is_captured_and_for_a_half_is_not() -> None:
    from tests.adapters.pipelines import text, unet_conditional

    unet = unet_conditional()
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for p in controlnet.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae(), None, None, unet, controlnet, diffusers.DDIMScheduler(clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with_it = {"image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), **text(),
               "guidance_scale": 1.0, "output_type": "latent"}  # fmt: skip
    with pytest.raises(ValueError, match=r"capture it with control_guidance_end=1\.0"):
        capture(pipe, num_inference_steps=20, control_guidance_end=0.5, **with_it)
    own = pipe(num_inference_steps=120, generator=torch.Generator().manual_seed(3), **with_it).images
    held = capture(pipe, num_inference_steps=120, generator=torch.Generator().manual_seed(3), **with_it)
    sol = fs.sample(held.flow, start=held.start, solver="unipc", nfe=60, grid="log_snr", interval=held.interval,
                    cond=held.cond)  # fmt: skip
    held.close()
    assert float((sol.x - own).norm() / own.norm()) < 0.03
