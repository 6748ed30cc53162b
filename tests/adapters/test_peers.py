"""From one configuration, a solver by name and the class of diffusers that has it: ours is never behind.

The network is exact (a mixture of four dimensions), the truth its ODE, solved to 1e-7. Between equal methods on equal
nodes a difference is left: theirs ask at whole time steps, and at Karras levels at rounded ones, which moves errors by
up to 4% either way; hence `SLACK`. Named differences (docs/pipelines.md) are compared as they are named:

* DDIM on linspace steps by ⌊T/N⌋ there, past the entry that is next; the same update to what is next is their Euler.
* An option that SDXL's file carries along says nothing; DDIM.from_config would read its `set_alpha_to_one`.
* PNDM makes more evaluations than steps: equal evaluations are compared, and on linspace it steps as DDIM does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.problems import GaussianMixture

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler  # noqa: E402
from flowsolve.adapters.diffusers.options import foreign  # noqa: E402

SLACK = 1.05
PROBLEM = GaussianMixture(
    torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    torch.full((6,), 0.25, dtype=torch.float64),
)
START = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STABLE: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
OLD: dict[str, Any] = {**STABLE, "set_alpha_to_one": False, "steps_offset": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "DDPM": {"_class_name": "DDPMScheduler", "beta_schedule": "linear"},
    "cosine": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    "SD 1.5": {"_class_name": "PNDMScheduler", **OLD, "skip_prk_steps": True, "trained_betas": None},
    "SD 2": {"_class_name": "DDIMScheduler", **OLD, "prediction_type": "v_prediction"},
    "SDXL": {"_class_name": "EulerDiscreteScheduler", **OLD, "sample_max_value": 1.0, "use_karras_sigmas": False},
    "DPM": {"_class_name": "DPMSolverMultistepScheduler", **STABLE},
    "UniPC": {"_class_name": "UniPCMultistepScheduler", **STABLE},
    "DEIS": {"_class_name": "DEISMultistepScheduler", **STABLE},
    "Euler, Karras": {"_class_name": "EulerDiscreteScheduler", **STABLE, "use_karras_sigmas": True},
    "DPM, Karras": {"_class_name": "DPMSolverMultistepScheduler", **STABLE, "use_karras_sigmas": True},
}
PEERS = {
    "unipc": "UniPCMultistep", "dpmsolver++": "DPMSolverMultistep", "deis": "DEISMultistep", "ddim": "DDIM",
    "euler": "EulerDiscrete", "heun": "HeunDiscrete", "lms": "LMSDiscrete", "ipndm": "PNDM",
    "dpmsolverpps": "DPMSolverSinglestep",
}  # fmt: skip


def exact(reading: Any, x: Tensor, k: float) -> Tensor:
    """The output of a perfect network at its own time k."""
    point = reading.path.at(float(reading.native(k)))
    row = reading.flow.prediction.row(point)
    return PROBLEM.combine(x, point, row.data, row.noise)


def run(scheduler: Any, reading: Any, steps: int) -> tuple[Tensor, int]:
    """A pipeline's loop, and the evaluations that it made."""
    scheduler.set_timesteps(steps)
    x = START * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        x = scheduler.step(exact(reading, scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
    return x, len(scheduler.timesteps)


@cache
def truth(name: str) -> Tensor:
    reading = Scheduler.from_config(CONFIGS[name], solver="ddim").reading
    flow = PROBLEM.flow(reading.path, reading.flow.prediction)
    return fs.sample(flow, start=START, solver=fs.solvers.Tsit5(rtol=1e-7, atol=1e-7)).x


def error(name: str, found: Tensor) -> float:
    return float((found - truth(name)).square().mean().sqrt())


@pytest.mark.parametrize("solver", PEERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_solver_by_name_is_never_behind_its_class(name: str, spacing: str | None, solver: str) -> None:
    config = {**CONFIGS[name], "clip_sample": False, **({"timestep_spacing": spacing} if spacing else {})}
    peer = PEERS[solver]
    if solver == "ddim" and spacing == "linspace":
        peer, config["use_karras_sigmas"] = "EulerDiscrete", False
    if solver == "ipndm" and spacing == "linspace":
        pytest.skip("PNDM steps by ⌊T/N⌋, whatever is next in its list")
    for steps in (8, 10, 20):
        ours = Scheduler.from_config(config, solver=solver)
        known = {k: v for k, v in config.items() if k not in foreign(config, config["_class_name"])}
        known["clip_sample"] = False  # which a class that has the option would do, were it not said
        theirs, spent = run(getattr(diffusers, f"{peer}Scheduler").from_config(known), ours.reading, steps)
        found, _ = run(ours, ours.reading, spent if solver == "ipndm" else steps)
        assert error(name, found) <= SLACK * error(name, theirs), steps


@pytest.mark.parametrize(("solver", "peer", "options"), [
    ("sdedpmsolver++", "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("sasolver", "SASolver", {}), ("ancestral", "EulerAncestralDiscrete", {}), ("ddpm", "DDPM", {}),
])  # fmt: skip
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", [n for n in CONFIGS if "Karras" not in n])
def test_with_noise_the_nodes_are_those_of_the_class(
    name: str, spacing: str, solver: str, peer: str, options: dict[str, Any]
) -> None:
    """Samples are not comparable one by one; what the network is asked at is."""
    config = {**CONFIGS[name], "timestep_spacing": spacing}
    theirs = getattr(diffusers, f"{peer}Scheduler").from_config(config, **options)
    ours = Scheduler.from_config(config, solver=solver)
    for steps in (8, 10, 20):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert list(dict.fromkeys(ours.timesteps.tolist())) == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_on_a_trained_network(spacing: str) -> None:
    where = fs.adapters.bundled("digits-ddpm")
    net = diffusers.UNet2DModel.from_pretrained(where, subfolder="unet")
    own = diffusers.DDPMScheduler.from_pretrained(where, subfolder="scheduler").config
    config = {**own, "timestep_spacing": spacing, "clip_sample": False}
    start = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def drawn(scheduler: Any, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        x = start.clone()
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        return x

    reference = drawn(diffusers.DDIMScheduler.from_config(config), 300)
    for solver in ("unipc", "dpmsolver++", "deis"):
        for steps in (8, 10, 20):
            theirs = drawn(getattr(diffusers, f"{PEERS[solver]}Scheduler").from_config(config), steps)
            ours = drawn(Scheduler.from_config(config, solver=solver), steps)
            assert (ours - reference).norm() <= SLACK * (theirs - reference).norm(), (solver, steps)


def test_what_a_configuration_leaves_out_survives_saving(tmp_path: Any) -> None:
    """A default of its class is not a word of the configuration, also once it has been written down."""
    made = Scheduler.from_config(diffusers.DDIMScheduler(**STABLE), solver="unipc")
    stated = Scheduler.from_config(diffusers.DDIMScheduler(**STABLE, timestep_spacing="leading"), solver="unipc")
    made.save_pretrained(tmp_path)
    again = Scheduler.from_pretrained(tmp_path)
    for s in (made, stated, again, Scheduler.from_config(again)):
        s.set_timesteps(10)
    assert float(made.timesteps[0]) == 999.0  # UniPC's own default, linspace
    assert float(stated.timesteps[0]) == 900.0
    assert torch.equal(again.timesteps, made.timesteps)
    assert again.solver == made.solver == Scheduler.from_config(again).solver.__class__(2, corrector=2, cooldown=True)


def test_orders_are_the_configuration_s_where_a_solver_is_named() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", **STABLE, "solver_order": 3}
    for solver, order, cooldown in (
        ("dpmsolver++", 3, True), ("dpmsolver++:order=1", 1, True), (fs.solvers.DPMSolverPP(2), 2, False),
    ):  # fmt: skip
        s = Scheduler.from_config(config, solver=solver)
        s.set_timesteps(8)
        assert (s.solver.order, s.solver.cooldown) == (order, cooldown)
    s = Scheduler.from_config(config, solver="dpmsolver++", lower_order_final=False)
    s.set_timesteps(8)
    assert not s.solver.cooldown


def test_levels_that_are_asked_for_are_kept() -> None:
    """DDIM has no Karras levels and drops them where a configuration happens to have them; not if the caller asks."""
    config = {"_class_name": "EulerDiscreteScheduler", **STABLE, "use_karras_sigmas": True}
    dropped = Scheduler.from_config(config, solver="ddim")
    asked = Scheduler.from_config(config, solver="ddim", use_karras_sigmas=True)
    for s in (dropped, asked):
        s.set_timesteps(8)
    assert dropped.timesteps.tolist() == [875.0 - 125 * i for i in range(8)]
    assert asked.sigmas[1] != dropped.sigmas[1]


@pytest.mark.parametrize("solver", ["unipc", "dpmsolver++", "ddim", "heun"])
@pytest.mark.parametrize("option", [{"clip_sample": True, "clip_sample_range": 0.3},
                                    {"thresholding": True, "sample_max_value": 1.0}])  # fmt: skip
def test_clipping_is_heeded_by_every_solver(solver: str, option: dict[str, Any]) -> None:
    """Also by those whose class in diffusers does not know `clip_sample` and drops it in silence."""
    s = Scheduler.from_config({**CONFIGS["DDPM"], "clip_sample": False, **option}, solver=solver)
    s.set_timesteps(8)
    x = START
    for t in s.timesteps:
        out = s.step(exact(s.reading, x, float(t)), t, x)
        assert out.pred_original_sample.abs().max() <= (0.3 if "clip_sample" in option else 1.0)
        x = out.prev_sample


@pytest.mark.parametrize("solver", ["unipc", "dpmsolver++", "deis"])
def test_flows_do_not_end_in_a_wasted_step(solver: str) -> None:
    """FlowMatchEuler's fractions end at 1/T, where a multistep method has nothing to do; UniPC's at about 1/N."""
    s = Scheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}, solver=solver)
    theirs = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for one in (s, theirs):
        one.set_timesteps(8)
    torch.testing.assert_close(s.sigmas, theirs.sigmas, rtol=1e-5, atol=2e-6)
