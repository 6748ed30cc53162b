"""A pipeline's network as a flow: the same images as the pipeline's own loop, and what that loop cannot do."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.solvers import DDIM, Dopri5, DPMSolverPP, Euler, Heun, UniPC

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from flowsolve.adapters.diffusers import FLOW, Captured, Scheduler, as_flow, capture  # noqa: E402
from tests.adapters.pipelines import Case, flux, pixart, sd3, stable, unconditional, xl  # noqa: E402


def held(case: Case, seed: int = 7, **options: Any) -> Captured:
    call = {**case.call, "output_type": case.output, "num_inference_steps": 4, **options}
    return capture(case.pipe, generator=torch.Generator().manual_seed(seed), **call)


def images(out: Any) -> Tensor:
    return torch.as_tensor(out.images)


def tensors(case: Case, scheduler: Any, steps: int = 4, **options: Any) -> Tensor:
    return case(scheduler, steps, **options)


MAKE: list[tuple[Callable[..., Case], str, int]] = [
    (unconditional, "", 1), (stable, "", 2), (stable, "img2img", 2), (xl, "", 2), (xl, "img2img", 2), (sd3, "", 2),
    (sd3, "img2img", 2), (flux, "", 1), (flux, "img2img", 1), (pixart, "", 2),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "calls"), MAKE)
def test_a_solve_of_the_captured_flow_is_the_pipeline_s(make: Any, kind: str, calls: int) -> None:
    """On the pipeline's nodes: UniPC by the scheduler, and by fs.sample; decoded by the pipeline."""
    case = make(kind=kind) if kind else make()
    own = Scheduler.from_config(case.native, solver=DPMSolverPP(1) if make is pixart else DDIM())
    tensors(case, own)  # lays out the nodes of the scheduler that the pipeline came with
    s = Scheduler.from_config(case.native, solver=UniPC(2), grid=own.nodes)
    expected = tensors(case, s)
    net = held(case)
    assert net.flow.nfe_per_call == calls
    nodes = [t for t in s.nodes if t >= net.interval[0]]
    assert nodes[0] == pytest.approx(net.interval[0], abs=1e-6)
    sol = fs.sample(
        net.flow, start=net.start, interval=(nodes[0], nodes[-1]), solver=UniPC(2), grid=nodes, cond=net.cond
    )
    found = images(net.decode(sol.x))
    assert float((found - expected).abs().max()) < 1e-4
    assert sol.nfe.tolist() == [calls * (len(nodes) - 1)] * 2
    assert net.interval[1] == pytest.approx(nodes[-1])
    other = fs.sample(net.flow, start=net.start, interval=net.interval, solver=Euler(), nfe=2 * calls, cond=net.cond)
    assert float((images(net.decode(other.x)) - expected).abs().max()) > 1e-3
    net.close()


def test_edm() -> None:
    case = xl(diffusers.EDMEulerScheduler())
    s = Scheduler.from_config(case.native, solver=DDIM())
    expected = tensors(case, s)
    net = held(case)
    sol = fs.sample(
        net.flow, start=net.start, solver=DDIM(), grid=s.nodes, interval=(0.0, 1.0), final="denoise", cond=net.cond
    )
    assert float((images(net.decode(sol.x)) - expected).abs().max()) < 1e-4


def test_an_adaptive_solver_owns_the_loop() -> None:
    """Dopri5, with steps and NFE of their own for both samples, against the transformer guided by hand."""
    case = sd3()
    net, call = held(case), case.call

    def guided(x: Tensor, k: Tensor, **cond: Tensor) -> Tensor:
        both = [
            case.pipe.transformer(
                hidden_states=x, timestep=k, encoder_hidden_states=cond[f"{sign}prompt_embeds"],
                pooled_projections=cond[f"{sign}pooled_prompt_embeds"],
            ).sample
            for sign in ("negative_", "")
        ]  # fmt: skip
        return both[0] + 3.0 * (both[1] - both[0])

    solver = Dopri5(1e-2, 1e-2)
    sol = fs.sample(net.flow, start=net.start, interval=net.interval, solver=solver, cond=net.cond)
    flow = fs.Flow(guided, fs.paths.CondOT(), FLOW, time=lambda t: 1000.0 * (1.0 - t), nfe_per_call=2)
    cond = {k: v for k, v in call.items() if isinstance(v, Tensor)}
    expected = fs.sample(flow, start=net.start, solver=solver, cond=cond)
    assert sol.nfe.tolist() == expected.nfe.tolist()
    torch.testing.assert_close(sol.x, expected.x, rtol=1e-4, atol=1e-4)
    assert int(sol.nfe.min()) > 20
    assert images(net.decode(sol.x)).shape == (2, 16, 16, 3)


def test_one_prompt_serves_any_number_of_samples() -> None:
    case = unconditional()
    net = held(case, batch_size=1)
    start = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    sol = fs.sample(net.flow, start=start, interval=net.interval, solver=Heun(), nfe=7)
    flow = as_flow(case.pipe.unet, case.native)
    expected = fs.sample(flow, start=start, interval=net.interval, solver=Heun(), nfe=7)
    torch.testing.assert_close(sol.x, expected.x, rtol=1e-5, atol=1e-5)


def test_likelihood_is_that_of_the_network() -> None:
    """Without guidance, against the UNet taken out of the pipeline: gradients go through the pipeline's loop."""
    case = stable()
    net = held(case, guidance_scale=1.0)
    assert net.flow.nfe_per_call == 1
    x = 0.1 * net.start
    options: dict[str, Any] = {"solver": Heun(), "nfe": 8, "probes": 2, "seed": 2}
    found = fs.log_prob(net.flow, x, cond=net.cond, **options)
    flow = as_flow(case.pipe.unet, case.native)
    expected = fs.log_prob(flow, x, cond={"encoder_hidden_states": case.call["prompt_embeds"]}, **options)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.latent, expected.latent, rtol=1e-4, atol=1e-4)


def test_guided_likelihood_counts_both_evaluations() -> None:
    net = held(sd3())
    out = fs.log_prob(net.flow, net.start, solver=Heun(), nfe=8, cond=net.cond)
    assert out.nfe.tolist() == [8, 8]
    assert bool(torch.isfinite(out.log_prob).all())


def test_the_pipeline_is_not_changed() -> None:
    case = stable()
    before = tensors(case, case.native)
    scheduler, config = case.pipe.scheduler, dict(case.pipe.config)
    g = torch.Generator().manual_seed(7)
    net = capture(case.pipe, generator=g, **{**case.call, "output_type": "np", "num_inference_steps": 4})
    state = g.get_state()
    first = images(net.decode(net.start))
    assert torch.equal(images(net.decode(net.start)), first)
    assert torch.equal(g.get_state(), state)
    assert case.pipe.scheduler is scheduler
    assert dict(case.pipe.config) == config
    assert torch.equal(tensors(case, case.native), before)


def test_its_thread_ends_with_it() -> None:
    def alive() -> int:
        gc.collect()
        return sum(t.name == "flowsolve-capture" for t in threading.enumerate())

    def wait(count: int) -> None:
        for t in threading.enumerate():
            if t.name == "flowsolve-capture" and alive() > count:
                t.join(5.0)

    wait(0)
    before = alive()
    net = held(unconditional())
    flow = net.flow
    assert alive() == before + 1
    del net
    assert alive() == before + 1  # the flow still needs it
    x = torch.zeros(2, 3, 8, 8)
    flow.estimate(x, 0.5)
    del flow
    wait(before)
    assert alive() == before
    net = held(unconditional())
    net.close()
    with pytest.raises(RuntimeError, match="the captured pipeline has ended; capture it again"):
        net.flow.estimate(x, 0.5)


# --- what cannot be led -----------------------------------------------------------------------------------------------


def test_inpainting_is_refused() -> None:
    """Its network is a function of the picture it blends in, at every step."""
    net = held(stable(kind="inpaint"))
    with pytest.raises(RuntimeError, match="changes the sample between two steps"):
        net.flow.estimate(net.start, 0.6, **net.cond)


def test_looking_ahead_is_refused() -> None:
    with pytest.raises(RuntimeError, match="looks ahead in its time steps"):
        held(xl(), denoising_end=0.5)


def test_an_error_of_the_pipeline_is_told() -> None:
    with pytest.raises(ValueError, match="divisible by"):
        held(stable(), height=13)


class Restless(diffusers.DDPMPipeline):  # type: ignore[misc,name-defined]
    """Makes time steps of its own."""

    def __call__(self, **options: Any) -> Any:
        self.scheduler.set_timesteps(4)
        x = torch.zeros(1, 3, 8, 8)
        for t in self.scheduler.timesteps.flip(0):
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample


class Idle(diffusers.DDPMPipeline):  # type: ignore[misc,name-defined]
    """Calls no step."""

    def __call__(self, **options: Any) -> Any:
        self.scheduler.set_timesteps(4)


def test_pipelines_that_lead_themselves_are_refused() -> None:
    case = unconditional()
    with pytest.raises(RuntimeError, match="makes time steps of its own"):
        capture(Restless(case.pipe.unet, case.native))
    with pytest.raises(RuntimeError, match=r"came to its end without calling scheduler\.step"):
        capture(Idle(case.pipe.unet, case.native))


def test_arguments_that_are_wrong() -> None:
    net = held(stable())
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 8, 8\); expected that of the pipeline, \(2, 4, 8, 8\)"):
        net.decode(net.start[:1])
    with pytest.raises(ValueError, match=r"1 samples for a pipeline that was called for 2; pass cond=captured.cond"):
        fs.sample(net.flow, start=net.start[:1], interval=net.interval, solver=Euler(), nfe=2)
    with pytest.raises(ValueError, match="LCMScheduler is not supported"):
        held(unconditional(diffusers.LCMScheduler()))
