"""The scheduler's contract, shown on an exact network; it is in real pipelines in test_pipelines.py."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from benchmarks.sections.catalogue import ENTRIES
from flowsolve import solvers
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import DDIM, Euler, Heun, Solver, UniPC
from flowsolve.solvers.injection import Churn

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler, as_flow, timetable  # noqa: E402
from flowsolve.adapters.diffusers.convention import SUPPORTED  # noqa: E402
from flowsolve.adapters.diffusers.reading import read  # noqa: E402
from flowsolve.adapters.diffusers.settings import from_json, to_json  # noqa: E402

PROBLEM = GaussianMixture(
    torch.tensor([[-1.0, 0.5, 0.2], [1.0, 1.0, -0.5]], dtype=torch.float64),
    torch.tensor([0.5, 0.7], dtype=torch.float64),
)
STABLE: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DDIM_CONFIG = diffusers.DDIMScheduler(**STABLE, clip_sample=False, timestep_spacing="trailing").config
FLOW_CONFIG = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
EDM_CONFIG = diffusers.EDMEulerScheduler(sigma_min=0.03, sigma_max=20.0).config
CONFIGS = {"table": DDIM_CONFIG, "flow": FLOW_CONFIG, "edm": EDM_CONFIG}
SOLVERS = [replace(e.solver, adaptive=False) if e.solver.chooses_steps else e.solver for e in ENTRIES]
"""Every solver of the documentation's tables; those with step control on a fixed grid."""


def noise(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_at(scheduler: Any, x: Tensor, k: float) -> Tensor:
    """What a perfect network would output at a sample, asked at its own time k."""
    reading = scheduler.reading
    point = reading.path.at(float(reading.native(k)))
    row = reading.flow.prediction.row(point)
    return PROBLEM.combine(x, point, row.data, row.noise)


def loop(scheduler: Any, x: Tensor, first: int = 0, **options: Any) -> Tensor:
    """A pipeline's loop."""
    for t in scheduler.timesteps[first:]:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output_at(scheduler, x, float(t)), t, x, return_dict=False, **options)[0]
    return x


def loop_exactly(scheduler: Any, x: Tensor) -> Tensor:
    """The loop with the network asked at times in float64, which a pipeline's time steps are not."""
    for t, k in zip(scheduler.timesteps, scheduler._table.host, strict=True):
        x = scheduler.step(output_at(scheduler, x, k), t, x).prev_sample
    return x


def chart_for(solver: Solver, name: str) -> str | None:
    """DPM-Solver-12 and -23 by themselves run in the noise chart, which is infinite where a flow begins."""
    return "straight" if name == "flow" and type(solver).__name__.startswith("DPMSolver1") else None


# --- the same steps as fs.sample --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: repr(s)[:48])
def test_every_solver_makes_the_steps_of_sample(name: str, solver: Solver) -> None:
    """On the same nodes from the same start with the same noise, to rounding."""
    chart = "straight" if name == "flow" and repr(solver).startswith(("DPMSolver12", "DPMSolver23")) else None
    s = Scheduler.from_config(CONFIGS[name], solver=solver, chart=chart, seed=5)
    if name == "flow" and isinstance(solver, solvers.EulerMaruyama):
        with pytest.raises(ValueError, match=r"no step from t = 0 .* use ExactSDE"):
            s.set_timesteps(4)
        s = Scheduler.from_config(FLOW_CONFIG, solver=solver, grid=[0.1, 0.3, 0.5, 0.7, 1.0], seed=5)
    s.set_timesteps(4)
    start = noise() * s.init_noise_sigma
    found = loop_exactly(s, start)
    reading, nodes, closing = s.reading, s.nodes, s._table.plan.closing

    def net(x: Tensor, t: Tensor) -> Tensor:
        point = reading.path.at(float(t[0]))
        row = reading.flow.prediction.row(point)
        return PROBLEM.combine(x, point, row.data, row.noise)

    flow = fs.Flow(net, reading.path, reading.flow.prediction)
    final = "denoise" if closing is not None and name != "table" else "path"
    grid = [*nodes, 1.0] if closing is not None and name == "table" else nodes
    sol = fs.sample(
        flow, start=start, interval=(grid[0], grid[-1]), solver=solver, grid=grid, chart=chart, final=final, seed=5
    )
    torch.testing.assert_close(found, sol.x, rtol=1e-11, atol=1e-11)
    assert sol.nfe.tolist() == [s.nfe] * 4
    assert s.nfe == len(s.timesteps)
    m = solver.evaluations
    assert s.order == m
    assert s.nfe == (4 if m == 1 else 3 * m + 1)


def test_auto_brings_its_grid_and_another_grid_has_precedence() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="auto", seed=0)
    s.set_timesteps(8)
    solver, _ = solvers.Auto().choose(s.reading.path, 8)
    assert s.solver == solver
    sol = fs.sample(exact_flow(s), start=noise(), nfe=8)
    torch.testing.assert_close(loop_exactly(s, noise()), sol.x, rtol=1e-10, atol=1e-10)
    s = Scheduler.from_config(DDIM_CONFIG, solver="auto", grid="uniform")
    s.set_timesteps(8)
    assert s.solver == solver
    assert s.nodes == pytest.approx([i / 8 for i in range(9)])


def exact_flow(s: Any) -> fs.Flow:
    """The flow of a perfect network of a table's ε-prediction."""
    return PROBLEM.flow(s.reading.path, "noise")


@pytest.mark.parametrize(
    "grid", [*fs.grids.SPACINGS, fs.grids.Karras(rho=5.0), fs.grids.Shifted("log_snr", 2.0)], ids=repr
)
def test_grids_by_name_are_those_of_sample(grid: Any) -> None:
    """With a solver of one evaluation a step, on the same budget."""
    s = Scheduler.from_config(DDIM_CONFIG, solver="unipc", grid=grid)
    s.set_timesteps(6)
    begin = fs.planning.span(fs.grids.resolve(grid), s.reading.path, 6)[0]
    sol = fs.sample(exact_flow(s), start=noise(), interval=(begin, 1.0), solver=UniPC(2, corrector=2), nfe=6, grid=grid)
    torch.testing.assert_close(loop_exactly(s, noise()), sol.x, rtol=1e-9, atol=1e-9)
    assert len(s.timesteps) == 6


def test_a_start_by_single_steps_is_that_of_sample() -> None:
    """A multistep method with warmup="single" spends 3 evaluations on each of its first two steps."""
    solver = solvers.DEIS(3, warmup="single")
    s = Scheduler.from_config(DDIM_CONFIG, solver=solver, grid="uniform")
    s.set_timesteps(5)
    assert s.nfe == len(s.timesteps) == 9
    assert s._table.plan.begins == (0, 3, 6, 7, 8)

    class Thirds:
        """Nine even steps, of which the first two triples are 2 even steps of 5."""

        def times(self, path: Any, start: float, end: float, steps: int) -> list[float]:
            assert steps == 9
            return [0.0, 0.07, 0.14, 0.2, 0.27, 0.34, 0.4, 0.6, 0.8, 1.0]

    sol = fs.sample(exact_flow(s), start=noise(), solver=solver, nfe=9, grid=Thirds())
    torch.testing.assert_close(loop_exactly(s, noise()), sol.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("final", ["path", "sigma_min", "denoise", "tweedie"])
@pytest.mark.parametrize("name", ["table", "flow"])
def test_final_policies_are_those_of_sample(final: str, name: str) -> None:
    s = Scheduler.from_config(
        CONFIGS[name], solver=DDIM(), grid="log_snr", final=final, **({"shift": 1.0} if name == "flow" else {})
    )
    s.set_timesteps(6)
    flow = PROBLEM.flow(s.reading.path, "noise" if name == "table" else "velocity")
    sol = fs.sample(flow, start=noise(), solver=DDIM(), nfe=6, grid="log_snr", final=final)
    torch.testing.assert_close(loop_exactly(s, noise()), sol.x, rtol=1e-9, atol=1e-9)
    assert s.nfe == 6
    lowest = 0.002 / 1.002 if name == "flow" else math.exp(-s.reading.path.log_snr(0.999))  # a table ends before that
    assert float(s.sigmas[-1]) == pytest.approx(lowest if final == "sigma_min" else 0.0, abs=1e-6)


# --- what pipelines look for ------------------------------------------------------------------------------------------


def test_capabilities_are_discoverable() -> None:
    """As retrieve_timesteps and prepare_extra_step_kwargs look for them."""
    named = set(inspect.signature(Scheduler.set_timesteps).parameters)
    assert {"num_inference_steps", "device", "timesteps", "sigmas", "mu"} <= named
    assert {"eta", "generator", "return_dict"} <= set(inspect.signature(Scheduler.step).parameters)
    assert issubclass(Scheduler, diffusers.SchedulerMixin)


def test_the_configuration_is_kept_for_pipelines_to_read() -> None:
    s = Scheduler.from_config(FLOW_CONFIG, solver="heun")
    assert s.config.get("base_image_seq_len", 0) == 256
    assert s.config.shift == 3.0
    assert s.config.num_train_timesteps == 1000
    assert s.config.get("no such key", 7) == 7
    again = Scheduler.from_config(s.config, solver="ddim")
    assert again.config["flowsolve"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert Scheduler.from_config(again.config).solver == DDIM()  # options are kept too
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(s.config)
    assert back.config.shift == 3.0


def test_the_class_of_a_scheduler_that_was_never_saved() -> None:
    """Its configuration does not name it; its options do."""
    for name in ("DDPMScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        assert "_class_name" not in getattr(diffusers, name)().config
        assert Scheduler.from_config(getattr(diffusers, name)().config).reading.name == name
        assert Scheduler.from_config(getattr(diffusers, name)()).reading.name == name
    # FlowMapEulerDiscreteScheduler has the same options, and its networks are distilled.
    with pytest.raises(ValueError, match="its configuration has no _class_name"):
        Scheduler.from_config(diffusers.FlowMatchHeunDiscreteScheduler().config)
    # LMS and the two KDPM2 share all their options, and all that matters here.
    assert Scheduler.from_config(diffusers.LMSDiscreteScheduler()).reading.name == "LMSDiscreteScheduler"


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", [Euler(), Heun(), solvers.RK4(), solvers.DPMSolver(3)], ids=repr)
def test_progress_and_warm_up_counts(steps: int, solver: Solver) -> None:
    """The rule by which pipelines update their bars: once a step."""
    for config in CONFIGS.values():
        s = Scheduler.from_config(config, solver=solver)
        s.set_timesteps(steps)
        n, order = len(s.timesteps), s.order
        warm = n - steps * order
        updates = sum(i == n - 1 or (i + 1 > warm and (i + 1) % order == 0) for i in range(n))
        assert updates == steps
        assert s.num_inference_steps == steps
        assert list(s._table.plan.begins) == list(range(0, n, order))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_time_steps_are_float32_and_not_rounded(dtype: torch.dtype) -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="heun")
    s.set_timesteps(3)
    assert s.timesteps.dtype == torch.float32
    assert s.timesteps.tolist()[:2] == [999.0, 666.0]
    x = noise().to(dtype)
    out = s.step(x, s.timesteps[0], x)
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype


def test_a_half_precision_pipeline_keeps_its_state_in_float32() -> None:
    """40 Euler steps of a constant field, each too small for bfloat16 to add one by one."""
    s = Scheduler.from_config(FLOW_CONFIG, solver="euler", grid="uniform", shift=1.0)
    s.set_timesteps(40)
    x = torch.full((1, 3), 8.0, dtype=torch.bfloat16)
    for t in s.timesteps:
        x = s.step(torch.full_like(x, -0.25), t, x).prev_sample  # u = 0.25 towards the data
    assert x.dtype == torch.bfloat16
    assert x.tolist() == [[8.25] * 3]


@pytest.mark.parametrize("name", CONFIGS)
def test_add_noise_is_the_path(name: str) -> None:
    cls = {"table": "DDIMScheduler", "flow": "FlowMatchEulerDiscreteScheduler", "edm": "EDMEulerScheduler"}[name]
    theirs = getattr(diffusers, cls).from_config(CONFIGS[name])
    theirs.set_timesteps(5)
    s = Scheduler.from_config(CONFIGS[name], solver="ddim")
    z, e = noise(seed=1).float(), noise(seed=2).float()
    k = theirs.timesteps[[1, 2, 4, 3]]
    expected = theirs.scale_noise(z, k, e) if name == "flow" else theirs.add_noise(z, e, k)
    torch.testing.assert_close(s.add_noise(z, e, k), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s.scale_noise(z, k, e), expected, rtol=1e-4, atol=1e-5)
    one = s.add_noise(z.bfloat16(), e.bfloat16(), k[:1])
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one.float(), s.add_noise(z, e, k[:1].expand(4)), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="scale_noise needs the noise"):
        s.scale_noise(z, k)


def test_edm_inputs_are_scaled() -> None:
    theirs = diffusers.EDMEulerScheduler.from_config(EDM_CONFIG)
    theirs.set_timesteps(5)
    s = Scheduler.from_config(EDM_CONFIG, solver="ddim")
    s.set_timesteps(5)
    torch.testing.assert_close(s.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    x = noise().float()
    for ours, t in zip(s.timesteps, theirs.timesteps, strict=True):
        theirs._step_index = None
        torch.testing.assert_close(s.scale_model_input(x, ours), theirs.scale_model_input(x, t), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(s.scale_model_input(x, float(ours)), s.scale_model_input(x, ours))
    assert s.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_static_shift_is_applied_once() -> None:
    """diffusers shifts the end of its grid, and then the grid (its issue 13243)."""
    s = Scheduler.from_config(FLOW_CONFIG, solver="euler")
    s.set_timesteps(8)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLOW_CONFIG)
    theirs.set_timesteps(8)
    shifted = [3 * v / (1 + 2 * v) for v in (1 - (1 - 0.001) * i / 7 for i in range(8))]
    assert s.sigmas.tolist() == pytest.approx([*shifted, 0.0], abs=1e-6)
    assert float(s.sigmas[-2]) == pytest.approx(0.0030, abs=5e-5)
    assert float(theirs.sigmas[-2]) == pytest.approx(0.0089, abs=5e-5)


def test_explicit_sigmas_are_shifted_once_as_pipelines_expect() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLOW_CONFIG)
    for sigmas in ([1.0, 0.7, 0.2], [1.0, 0.75, 0.5, 0.25]):
        s = Scheduler.from_config(FLOW_CONFIG, solver="euler")
        s.set_timesteps(sigmas=sigmas, device="cpu")
        theirs.set_timesteps(sigmas=sigmas)
        torch.testing.assert_close(s.timesteps, theirs.timesteps)
        torch.testing.assert_close(s.sigmas, theirs.sigmas)
    s.set_timesteps(sigmas=[1.0, 0.5, 0.0])  # the end may be named
    assert s.timesteps.tolist() == pytest.approx([1000.0, 750.0])


def test_explicit_timesteps_are_taken_as_they_are() -> None:
    s = Scheduler.from_config(FLOW_CONFIG, solver="euler")
    s.set_timesteps(timesteps=[1000, 600, 100.5])
    assert s.timesteps.tolist() == [1000.0, 600.0, 100.5]
    s = Scheduler.from_config(DDIM_CONFIG, solver="heun")
    s.set_timesteps(timesteps=[999, 850, 13])  # as AYS has them
    assert s.timesteps.tolist() == [999.0, 850.0, 850.0, 13.0, 13.0]
    s.set_timesteps(sigmas=[14.615, 6.475, 0.152, 0.0])  # the first is just above the table
    assert float(s.timesteps[0]) == 999.0
    assert len(s.timesteps) == 5
    with pytest.raises(ValueError, match=r"timesteps = \[1200.0.*between 999 and 0"):
        s.set_timesteps(timesteps=[1200, 10])
    with pytest.raises(ValueError, match="strictly increasing"):
        s.set_timesteps(timesteps=[500, 500, 10])
    with pytest.raises(
        ValueError, match=r"sigmas = \[3.0, 0.0, 1.0\]; expected noise levels that fall, 0 only as the last"
    ):
        s.set_timesteps(sigmas=[3.0, 0.0, 1.0])


@pytest.mark.parametrize(("kind", "shift"), [("exponential", math.e**1.1), ("linear", 1.1)])
def test_dynamic_shift(kind: str, shift: float) -> None:
    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind).config
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(6, mu=1.1)
    s = Scheduler.from_config(config, solver="euler")
    s.set_timesteps(6, mu=1.1)
    torch.testing.assert_close(s.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"a loop of your own: set_timesteps\(…, mu=μ\)"):
        s.set_timesteps(6)
    s = Scheduler.from_config(config, solver="euler", grid="uniform")
    s.set_timesteps(4, mu=1.1)
    assert s.nodes == pytest.approx(fs.grids.Shifted("uniform", shift).times(s.reading.path, 0.0, 1.0, 4))
    s.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.1)  # "4 steps", in the words of flow pipelines
    assert s.nodes == pytest.approx(fs.grids.Shifted("uniform", shift).times(s.reading.path, 0.0, 1.0, 4))
    s = Scheduler.from_config(config, solver="euler", grid="log_snr")
    s.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.1)
    assert s.nodes == pytest.approx(fs.grids.Shifted("log_snr", shift).times(s.reading.path, 0.0, 1.0, 4))


def test_a_shift_of_the_grid_s_own_is_not_shifted_again() -> None:
    s = Scheduler.from_config(FLOW_CONFIG, solver="euler", grid=fs.grids.Shifted("uniform", 5.0))
    s.set_timesteps(4)
    assert s.nodes == pytest.approx(fs.grids.Shifted("uniform", 5.0).times(s.reading.path, 0.0, 1.0, 4))


OWN = {"EulerDiscrete": "euler", "Heun": "heun", "LMS": "lms", "DPMSolverM": "dpmsolver++", "DPMSolverS": "dpmsolver++",
       "DEIS": "deis", "UniPC": "unipc", "SASolver": "sasolver", "DDPM": "ddpm", "FlowMatch": "euler"}  # fmt: skip


def own_solver(name: str) -> str:
    """The solver that a class of diffusers is."""
    return next((solver for start, solver in OWN.items() if name.startswith(start)), "ddim")


TABLED = ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
          "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
          "UniPCMultistepScheduler", "SASolverScheduler"]  # fmt: skip


SPACED = [(n, s) for n in TABLED for s in ("leading", "trailing", "linspace")
          if s == "linspace" or not n.startswith("DPMSolverSingle")]  # fmt: skip


@pytest.mark.parametrize(("name", "spacing"), SPACED)
@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_nodes_are_those_that_diffusers_visits(name: str, spacing: str, steps: int) -> None:
    spaced = {} if name.startswith("DPMSolverSingle") else {"timestep_spacing": spacing}
    theirs = getattr(diffusers, name)(**STABLE, **spaced)
    s = Scheduler.from_config(theirs, solver=own_solver(name))
    theirs.set_timesteps(steps)
    s.set_timesteps(steps)
    visited = list(dict.fromkeys(theirs.timesteps.tolist()))
    if (spacing, steps) == ("linspace", 1) and name in (
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
    ):
        assert visited == [0]  # the cleanest entry for pure noise; ours is the noisiest
        assert s.timesteps.tolist() == [999.0]
        return
    assert list(dict.fromkeys(s.timesteps.tolist())) == pytest.approx(visited, abs=1e-4)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_levels_by_option_are_those_of_diffusers(name: str, option: str) -> None:
    if option == "use_beta_sigmas":
        pytest.importorskip("scipy")
    theirs = getattr(diffusers, name)(**({} if name.startswith("Flow") else STABLE), **{option: True})
    theirs.set_timesteps(6)
    s = Scheduler.from_config(theirs, solver=own_solver(name))
    s.set_timesteps(6)
    torch.testing.assert_close(s.sigmas, theirs.sigmas.float(), rtol=2e-4, atol=1e-5)
    assert len(set(s.timesteps.tolist())) == 6


def test_a_level_that_stands_twice_is_visited_once() -> None:
    """diffusers' last step with Karras levels that end in the table goes from the lowest level to itself."""
    theirs = diffusers.DEISMultistepScheduler(**STABLE, use_karras_sigmas=True)
    theirs.set_timesteps(5)
    assert float(theirs.sigmas[-1]) == float(theirs.sigmas[-2])
    s = Scheduler.from_config(theirs, solver="deis")
    s.set_timesteps(5)
    assert s.nodes[-1] == 1.0  # and the step that is left goes to the clean data
    torch.testing.assert_close(s.sigmas[:-1], theirs.sigmas[:-1].float(), rtol=2e-4, atol=1e-5)


def test_pndm_takes_one_evaluation_more_than_steps() -> None:
    theirs = diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1)
    theirs.set_timesteps(10)
    s = Scheduler.from_config(theirs, solver="ipndm")
    s.set_timesteps(10)
    assert len(theirs.timesteps) == 11
    assert len(s.timesteps) == 10
    assert s.timesteps.tolist() == list(dict.fromkeys(theirs.timesteps.tolist()))


STABLE_1: dict[str, Any] = {
    "_class_name": "PNDMScheduler", **STABLE, "clip_sample": False, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
"""Of Stable Diffusion 1.5, as published."""


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20, 50])
def test_plms_is_pndm(steps: int, spacing: str) -> None:
    """Liu et al. 2022 without Runge–Kutta steps: the same times, N + 1 of them, and the same samples, to rounding.

    Their table is given in float64 here; some 50 operations a step on numbers of order 100.
    """
    if spacing == "trailing" and 1000 % steps:
        pytest.skip("they step by ⌊T/N⌋, whatever is next in the list")
    config, ends = {**STABLE_1, "timestep_spacing": spacing}, []
    theirs = diffusers.PNDMScheduler.from_config(config)
    theirs.alphas_cumprod = fs.adapters.diffusers.alphas_cumprod(config)
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    ours = Scheduler.from_config(config, solver="plms")
    for s in (theirs, ours):
        s.set_timesteps(steps)
        x = noise()
        for t in s.timesteps:
            x = s.step(torch.sin(x) * (0.5 + 0.4 * torch.cos(t.double() / 300.0)), t, x, return_dict=False)[0]
        ends.append(x)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.nfe == (steps + 1 if steps > 1 else 1)
    assert ours.order == 1
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-11)


def test_plms_begins_within() -> None:
    """Image-to-image passes over entries; at the one that is there twice the first does nothing."""
    s = Scheduler.from_config(STABLE_1, solver="plms")
    s.set_timesteps(8)
    assert s.timesteps[1] == s.timesteps[2]
    ends = []
    for first in (1, 2):
        s.set_timesteps(8)
        s.set_begin_index(first)
        ends.append(loop(s, noise(), first))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], noise())


# --- beginning within, and going elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [UniPC(3), Heun(), solvers.RK4(), solvers.SEEDS(3), Churn(Heun(), gamma=0.3)], ids=repr
)
def test_a_slice_of_the_time_steps_is_a_solve_of_the_rest(solver: Solver) -> None:
    """As image-to-image has it: timesteps[t_start · order:], with the state noised to the first of them."""
    s = Scheduler.from_config(DDIM_CONFIG, solver=solver, seed=3)
    s.set_timesteps(6)
    first = 2 * s.order
    s.set_begin_index(first)
    assert s.begin_index == first
    z, e = PROBLEM.sample(4, seed=1), noise(seed=2)
    x = s.add_noise(z, e, s.timesteps[first : first + 1])
    found = loop(s, x, first)
    flow = exact_flow(s)
    begin = float(s.reading.native(float(s.timesteps[first])))
    if isinstance(solver, Churn):  # the first step's noise is in the state that the pipeline made
        nodes = [begin, *s.nodes[3:]]
        sol = fs.sample(flow, start=x, interval=(begin, nodes[1]), solver=Heun(), grid=nodes[:2])
        sol = fs.sample(flow, start=sol.x, interval=(nodes[1], 1.0), solver=solver, grid=[*nodes[1:], 1.0], seed=3)
    else:
        grid = [*s.nodes[2:], *([1.0] if s.nodes[-1] != 1.0 else [])]
        sol = fs.sample(flow, start=x, interval=(grid[0], 1.0), solver=solver, grid=grid, seed=3)
    torch.testing.assert_close(found, sol.x, rtol=1e-5, atol=1e-5)


def test_a_begin_within_a_step_is_refused() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="rk4")
    s.set_timesteps(3)
    x = noise()
    with pytest.raises(ValueError, match=r"entry 5 of timesteps, a stage within step 1; .*one of \[0, 4, 8\]"):
        s.step(x, s.timesteps[5], x)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loop_over_time_steps_reads_no_value_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that would be a wait in every step: a view of `timesteps` is known by where it lies."""
    s = Scheduler.from_config(CONFIGS[name], solver="heun")
    s.set_timesteps(4)

    def read(timestep: Any) -> float:
        raise AssertionError("the value of a time step was read")

    for module in (sys.modules[Scheduler.__module__], timetable):
        monkeypatch.setattr(module, "number", read)
    x = noise()
    for t in s.timesteps[2:]:
        x = s.step(s.scale_model_input(x, t), t, x).prev_sample
    with pytest.raises(AssertionError, match="was read"):
        s.step(x, float(s.timesteps[0]), x)


def test_time_steps_are_found_by_place_or_by_the_nearest_value() -> None:
    """A view of `timesteps` is its place, also where values stand twice; a number is the nearest of them."""
    s = Scheduler.from_config(DDIM_CONFIG, solver="heun")
    s.set_timesteps(4)
    expected = loop(s, noise())
    assert s.timesteps.tolist()[1] == s.timesteps.tolist()[2]
    for given in (
        s.timesteps.tolist(),
        [torch.tensor(v) for v in s.timesteps.tolist()],
        [v * (1 + 1e-6) for v in s.timesteps.tolist()],
        [float(t.bfloat16()) for t in s.timesteps],
        [t.reshape(1).repeat(4) for t in s.timesteps],
    ):
        x = noise()
        for t, k in zip(given, s.timesteps, strict=True):
            x = s.step(output_at(s, x, float(k)), t, x).prev_sample
        torch.testing.assert_close(x, expected)
    with pytest.raises(ValueError, match=r"timestep = 900 is none of timesteps, \[999.0, 749.0,"):
        s.step(noise(), 900, noise())
    with pytest.raises(ValueError, match=r"one time for all samples.*capture"):
        s.step(noise(), torch.tensor([999.0, 500.0, 3.0, 2.0]), noise())


def test_a_step_elsewhere_begins_anew() -> None:
    """What a multistep method remembers belongs to the steps before; going back in time is a new solve."""
    s = Scheduler.from_config(DDIM_CONFIG, solver="unipc")
    s.set_timesteps(5)
    x = noise()
    for t in s.timesteps[:3]:
        x = s.step(output_at(s, x, float(t)), t, x).prev_sample
    again = s.step(output_at(s, noise(), float(s.timesteps[1])), s.timesteps[1], noise()).prev_sample
    ddim = Scheduler.from_config(DDIM_CONFIG, solver="ddim")
    ddim.set_timesteps(5)
    first = ddim.step(output_at(ddim, noise(), float(ddim.timesteps[1])), ddim.timesteps[1], noise()).prev_sample
    torch.testing.assert_close(again, first)  # order 1, having nothing to remember


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("solver", [DDIM(), Heun(), solvers.SEEDS(3)], ids=repr)
def test_a_changed_sample_is_the_state_from_there_on(solver: Solver, in_place: bool) -> None:
    """A callback adds to the latents after two steps: the rest is a solve from the changed state."""
    s = Scheduler.from_config(DDIM_CONFIG, solver=solver, seed=1)
    s.set_timesteps(5)
    at = 2 * s.order
    x, last = noise(), None
    for i, t in enumerate(s.timesteps):
        if i == at:
            x = x.add_(0.5) if in_place else x + 0.5
            last = x.clone()
        x = s.step(output_at(s, x, float(t)), t, x).prev_sample
    assert last is not None
    rest = Scheduler.from_config(DDIM_CONFIG, solver=solver, seed=1)
    rest.set_timesteps(5)
    torch.testing.assert_close(x, loop(rest, last, at))
    assert not torch.allclose(x, loop(rest, noise()), atol=1e-2)


def test_unipc_does_not_correct_a_change_away() -> None:
    """One UniPC step after a change: the state is the changed one, the estimates before it stay."""
    s = Scheduler.from_config(DDIM_CONFIG, solver=UniPC(2))
    s.set_timesteps(5)
    x, past = noise(), []
    for i, t in enumerate(s.timesteps[:3]):
        x = x + 0.5 if i == 2 else x
        out = s.step(output_at(s, x, float(t)), t, x)
        past.append((x, out.pred_original_sample))
        x = out.prev_sample
    # DPM-Solver++(2M) by hand from the changed state: ẑ + (r/2)(ẑ − ẑ₋₁), r = h/h₋₁, without a corrector.
    lam = [s.reading.path.log_snr(t) for t in s.nodes[1:4]]
    here, there = (s.reading.path.at(t) for t in s.nodes[2:4])
    h = lam[2] - lam[1]
    data = past[2][1] + 0.5 * h / (lam[1] - lam[0]) * (past[2][1] - past[1][1])
    expected = there.sigma / here.sigma * past[2][0] - there.alpha * math.expm1(-h) * data
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


# --- noise ------------------------------------------------------------------------------------------------------------


def run(scheduler: Any, x: Tensor, generator: Any = None) -> Tensor:
    scheduler.set_timesteps(4)
    return loop(scheduler, x, generator=generator)


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_named_by_the_generator() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="ddpm")
    first = run(s, noise(), g(1))
    assert torch.equal(first, run(s, noise(), g(1)))
    assert not torch.allclose(first, run(s, noise(), g(2)))
    one = g(1)
    run(s, noise(), one)
    assert not torch.allclose(first, run(s, noise(), one))  # it moves on


def test_a_list_of_generators_makes_a_sample_its_own() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver=solvers.StochasticHeun())
    whole = run(s, noise(), [g(i) for i in range(4)])
    for i in range(4):
        torch.testing.assert_close(run(s, noise()[i : i + 1], [g(i)]), whole[i : i + 1], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="3 generators for 4 samples"):
        run(s, noise(), [g(i) for i in range(3)])


def test_without_a_generator_noise_is_named_by_the_latents_or_a_seed() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="sasolver")
    assert torch.equal(run(s, noise()), run(s, noise()))
    torch.testing.assert_close(run(s, noise())[2:], run(s, noise()[2:]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(run(s, noise()), run(s, noise() + 1e-3), atol=1e-2)
    seeded = Scheduler.from_config(DDIM_CONFIG, solver="sasolver", seed=1)
    assert not torch.allclose(run(seeded, noise()), run(s, noise()), atol=1e-2)


def test_eta_is_ddim_s() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="ddim", seed=1)
    s.set_timesteps(4)
    full = Scheduler.from_config(DDIM_CONFIG, solver="ddpm", seed=1)
    full.set_timesteps(4)
    torch.testing.assert_close(loop(s, noise(), eta=1.0), loop(full, noise()))
    torch.testing.assert_close(loop(full, noise(), eta=0.0), loop(full, noise()))  # pipelines' default says nothing
    with pytest.raises(ValueError, match=r"eta = 0\.5 is DDIM's"):
        loop(full, noise(), eta=0.5)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_two_threads_with_one_scheduler() -> None:
    """In lockstep, with different budgets and starts: a barrier makes every step of one meet one of the other."""
    s = Scheduler.from_config(DDIM_CONFIG, solver=UniPC(3))
    barrier, found = threading.Barrier(2, timeout=20), {}

    def solve(steps: int, seed: int) -> None:
        x = noise(seed=seed)
        s.set_timesteps(steps)
        barrier.wait()
        assert len(s.timesteps) == steps
        for i in range(8):
            if i < steps:
                t = s.timesteps[i]
                x = s.step(output_at(s, x, float(t)), t, x).prev_sample
            barrier.wait()
        found[steps] = x

    threads = [threading.Thread(target=solve, args=a) for a in ((5, 1), (8, 2))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for steps, seed in ((5, 1), (8, 2)):
        alone = Scheduler.from_config(DDIM_CONFIG, solver=UniPC(3))
        alone.set_timesteps(steps)
        assert torch.equal(found[steps], loop(alone, noise(seed=seed)))


def test_a_thread_without_time_steps_sees_the_last_plan() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="ddim")
    s.set_timesteps(5)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(loop(s, noise())))
    thread.start()
    thread.join()
    assert torch.equal(found[0], loop(s, noise()))


def test_copies_do_not_share_runs() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver=UniPC(2))
    s.set_timesteps(5)
    expected = loop(s, noise())
    s.step(noise(), s.timesteps[0], noise())
    twins = [copy.deepcopy(s), copy.copy(s)]
    assert all(torch.equal(other.timesteps, s.timesteps) for other in twins)
    for other in (*twins, pickle.loads(pickle.dumps(s))):  # noqa: S301 (what was just pickled)
        assert other.step_index is None
        other.set_timesteps(5)
        assert torch.equal(loop(other, noise()), expected)
    assert s.step_index == 1


# --- saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: repr(s)[:48])
def test_settings_have_json(solver: Solver) -> None:
    if hasattr(solver, "norm"):
        with pytest.raises(TypeError, match="has no JSON"):
            to_json(solver)
        return
    assert from_json(json.loads(json.dumps(to_json(solver)))) == solver


GRIDS = [
    None, "karras", fs.grids.Arctan(center=1.0, width=2.0, until=3.8), fs.grids.Shifted("uniform", 2.0),
    fs.grids.At(sigma=[10.0, 1.0, 0.1]), [0.0, 0.5, 1.0],
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_save_and_load(tmp_path: Path, grid: Any) -> None:
    s = Scheduler.from_config(
        DDIM_CONFIG, solver=solvers.Ancestral(Heun(), eta=0.5), grid=grid, final="denoise", seed=3
    )
    s.save_pretrained(tmp_path)
    again = Scheduler.from_pretrained(tmp_path)
    assert again.solver == s.solver
    assert dict(again.config) == dict(Scheduler.from_config(s.config).config)
    assert again.config["beta_end"] == 0.012
    for one in (s, again):
        one.set_timesteps(2 if grid else 4)
    assert again.nodes == s.nodes
    assert torch.equal(again.timesteps, s.timesteps)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path)  # whose file it is too
    assert theirs.config.beta_end == 0.012


def test_the_scheduler_of_a_saved_pipeline(tmp_path: Path) -> None:
    """`from_pretrained` on the folder of a scheduler of diffusers' own."""
    theirs = diffusers.UniPCMultistepScheduler(**STABLE, solver_order=3)
    theirs.save_pretrained(tmp_path / "scheduler")
    s = Scheduler.from_pretrained(tmp_path, subfolder="scheduler", solver="unipc")
    assert s.reading.name == "UniPCMultistepScheduler"
    assert s.solver == UniPC()


def test_a_function_among_the_settings_is_not_saved(tmp_path: Path) -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver=solvers.SDEDPMSolverPP(eta=lambda t: t))
    s.set_timesteps(4)
    assert torch.isfinite(loop(s, noise())).all()
    with pytest.raises(ValueError, match=r"the solver cannot be saved: .* has no JSON"):
        s.save_pretrained(tmp_path)
    assert Scheduler.from_config(s).solver == s.solver
    with pytest.raises(ValueError, match=r"the solver of this configuration is not in it .*; give it"):
        Scheduler.from_config(s.config)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_every_name_is_a_solver_that_runs() -> None:
    from flowsolve.solvers.names import SOLVERS

    others = (solvers.Churn, solvers.RePaint, solvers.Restart)  # which need more than a name, or go back
    fixed = [n for n, kind in SOLVERS.items() if not issubclass(kind, (solvers.Adaptive, *others))]
    assert len(fixed) > 20
    with pytest.raises(TypeError, match="Restart goes back to earlier times, and a list of so many steps does not"):
        Scheduler.from_config(DDIM_CONFIG, solver="restart").set_timesteps(3)
    for name in (*fixed, "DPMSolver++", "sde-dpmsolver++", "UniPC:order=2"):
        s = Scheduler.from_config(DDIM_CONFIG, solver=name)
        s.set_timesteps(3)
        assert torch.isfinite(loop(s, noise())).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "unipcc"}, ValueError, r"solver = 'unipcc' is not known; expected one of .*unipc"),
        ({"solver": UniPC}, TypeError, r"is the class UniPC; pass an instance, UniPC\(\)"),
        ({"solver": 3}, TypeError, "solver is a int"),
        ({"solver": solvers.Dopri5()}, TypeError, r"chooses its own steps and needs the loop; use .*capture"),
        ({"stepz": 3}, TypeError, r"'stepz' is no option of Scheduler \(solver, grid, .* or of DDIMScheduler"),
        ({"beta_schedule": "zigzag"}, ValueError, "beta_schedule = 'zigzag' is not supported"),
        ({"prediction_type": "flow_prediction"}, ValueError, "supported are epsilon, sample, v_prediction"),
    ],
)  # fmt: skip
def test_options_that_are_wrong(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scheduler.from_config(DDIM_CONFIG, **options)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("unet", TypeError, r"config is a str; expected that of a scheduler, pipe.scheduler.config"),
        ({"a": 1}, ValueError, "its configuration has no _class_name. Pass the scheduler itself"),
        ({"_class_name": "UNet2DModel"}, ValueError, "scheduler UNet2DModel is not supported; supported are DDPM"),
        ({"_class_name": "LCMScheduler"}, ValueError, "LCMScheduler is not supported: its network is trained to jump"),
        ({"_class_name": "ScoreSdeVpScheduler"}, ValueError, "does not say which time its network reads"),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "sample"},
            ValueError,
            "supported are eps",
        ),
    ],
)
def test_configurations_that_are_wrong(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scheduler.from_config(config)


def test_calls_that_are_wrong() -> None:
    s = Scheduler.from_config(DDIM_CONFIG, solver="ddim")
    with pytest.raises(ValueError, match="call set_timesteps"):
        _ = s.timesteps
    with pytest.raises(ValueError, match="give one of num_inference_steps, timesteps and sigmas"):
        s.set_timesteps()
    with pytest.raises(ValueError, match="num_inference_steps = 0; expected an integer >= 1"):
        s.set_timesteps(0)
    with pytest.raises(ValueError, match="1001 steps on a table of 1000 entries"):
        s.set_timesteps(1001)
    with pytest.raises(ValueError, match="num_inference_steps = 3 beside 2 values"):
        s.set_timesteps(3, timesteps=[900, 100])
    s.set_timesteps(3)
    with pytest.raises(ValueError, match=r"model_output has shape \(4, 2\); expected the sample's, \(4, 3\)"):
        s.step(torch.zeros(4, 2), s.timesteps[0], torch.zeros(4, 3))
    s = Scheduler.from_config(DDIM_CONFIG, solver="ddim", final="sigma_min")
    with pytest.raises(ValueError, match="1 step leaves nothing to do before the clean data"):
        s.set_timesteps(1)
    s = Scheduler.from_config(diffusers.EulerDiscreteScheduler(interpolation_type="log_linear"), solver="ddim")
    with pytest.raises(ValueError, match="interpolation_type = 'log_linear' is not supported"):
        s.set_timesteps(5)
    s = Scheduler.from_config(DDIM_CONFIG, solver="ddim", grid=[0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="grid= has 3 times, and 5 steps need 6"):
        s.set_timesteps(5)


def test_noise_prediction_of_pure_noise_is_refused() -> None:
    """A table of zero terminal SNR and a noise prediction: the first estimate does not exist."""
    s = Scheduler.from_config(
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), solver="ddim"
    )
    with pytest.raises(ValueError, match=r"asks a 'noise' prediction at t = 0.*says both rescale_betas_zero_snr"):
        s.set_timesteps(4)
    for option, value in (("prediction_type", "v_prediction"), ("rescale_betas_zero_snr", False),
                          ("timestep_spacing", "leading")):  # fmt: skip
        mended = Scheduler.from_config(s.config, solver="unipc", **{option: value})
        mended.set_timesteps(4)
    s = Scheduler.from_config({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, solver="ddim",
                              grid="uniform")  # fmt: skip
    with pytest.raises(ValueError, match=r"Lay the steps out within: .*grid="):
        s.set_timesteps(4)
    s = Scheduler.from_config(s, grid=[0.1, 0.4, 0.7, 1.0])
    s.set_timesteps(3)


def test_learned_variance_is_not_used() -> None:
    s = Scheduler.from_config(
        DDIM_CONFIG,
        solver="ddim",
    )
    learned = Scheduler.from_config(
        diffusers.DDPMScheduler(
            **STABLE, clip_sample=False, variance_type="learned_range", timestep_spacing="trailing"
        ),
        solver="ddim",
    )
    for one in (s, learned):
        one.set_timesteps(3)
    x = noise()
    both = torch.cat((0.1 * x, 100.0 * x), 1)
    torch.testing.assert_close(
        learned.step(both, learned.timesteps[0], x).prev_sample, s.step(0.1 * x, s.timesteps[0], x).prev_sample
    )


def test_thresholding_is_that_of_diffusers() -> None:
    options = dict(**STABLE, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    theirs = diffusers.DPMSolverMultistepScheduler(**options, solver_order=1)
    s = Scheduler.from_config(theirs, solver="dpmsolver++")
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    theirs.set_timesteps(5)
    s.set_timesteps(5)
    for t, k in zip(s.timesteps, theirs.timesteps, strict=True):
        x = s.step(0.3 * x, t, x).prev_sample
        y = theirs.step(0.3 * y, k, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_diffusers_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, flowsolve as fs; names = fs.adapters.diffusers.__all__; "
        "early = {'diffusers', 'transformers', 'typer'} & set(sys.modules); assert not early, early; "
        "assert 'Scheduler' in names and 'capture' in names; "
        "fs.adapters.diffusers.Scheduler; assert 'diffusers' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_diffusers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import flowsolve.adapters.diffusers as package

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "flowsolve.adapters.diffusers.scheduler")
    with pytest.raises(ImportError, match=r"a scheduler for its pipelines needs diffusers.*\[diffusers\]"):
        _ = package.Scheduler
    with pytest.raises(AttributeError, match="has no attribute 'Sheduler'"):
        _ = package.Sheduler


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n != "DDPMWuerstchenScheduler"])  # loaded alone
def test_what_is_read_from_a_checkpoint_is_read_in_a_pipeline(name: str) -> None:
    """For every class: a network as `as_flow` asks it, and as a pipeline does by the scheduler, gives one estimate."""
    config = {"_class_name": name}
    if name == "ScoreSdeVpScheduler":  # it does not say which time its network reads
        for made in (Scheduler.from_config, lambda c: as_flow(torch.nn.Identity(), c)):
            with pytest.raises(ValueError, match="does not say which time its network reads"):
                made(config)
        return
    s = Scheduler.from_config(config, solver="euler")
    s = Scheduler.from_config(s, clip_sample=False) if s.config.get("clip_sample") else s
    s.set_timesteps(5)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, k: Tensor, **cond: Any) -> Any:
            return type("Output", (), {"sample": (0.3 * x + 0.1) * (1.0 + torch.sin(k.double()))[:, None]})()

    flow, x = as_flow(Net(), config), s.init_noise_sigma * noise()
    for k, t in zip(s.timesteps, s._table.plan.times, strict=True):
        output = Net()(s.scale_model_input(x, k), k.expand(4)).sample
        out = s.step(output, k, x)
        state = x / s.reading.shown(s.reading.path.at(t))  # Euler's kin show x/α
        torch.testing.assert_close(out.pred_original_sample, flow.data(state, t), rtol=1e-3, atol=1e-3)
        x = out.prev_sample
    assert torch.isfinite(x).all()


VISITED: list[tuple[str, dict[str, Any]]] = [
    ("RePaintScheduler", {}), ("UnCLIPScheduler", {}), ("CogVideoXDDIMScheduler", {}), ("IPNDMScheduler", {}),
    ("CosineDPMSolverMultistepScheduler", {}), ("CosineDPMSolverMultistepScheduler", {"sigma_schedule": "karras"}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}), ("LTXEulerAncestralRFScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    *(("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction", **o}) for o in (
        {}, {"timestep_spacing": "leading"}, {"sigma_min": 0.01, "sigma_max": 50.0, "use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
    )),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "timestep_spacing": "trailing"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), VISITED)
def test_nodes_of_the_less_common_are_those_of_diffusers(name: str, options: dict[str, Any]) -> None:
    theirs = getattr(diffusers, name)(**options)
    s = Scheduler.from_config(theirs, solver="euler" if name == "EulerDiscreteScheduler" else "ddim")
    theirs.set_timesteps(6, **({"jump_length": 100} if name == "RePaintScheduler" else {}))
    s.set_timesteps(6)
    torch.testing.assert_close(s.timesteps.double(), theirs.timesteps.double(), rtol=1e-5, atol=1e-4)
    if hasattr(theirs, "init_noise_sigma"):
        assert s.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
    if hasattr(theirs, "scale_model_input"):
        x = noise().float()
        fed = theirs.scale_model_input(x, theirs.timesteps[0])
        torch.testing.assert_close(s.scale_model_input(x, s.timesteps[0]), fed, rtol=1e-5, atol=1e-6)


def test_score_sde_ve_visits_its_noise_levels() -> None:
    """Its network is told σ; the last step takes the estimate, as its corrected mean does."""
    theirs = diffusers.ScoreSdeVeScheduler()
    theirs.set_sigmas(6)
    s = Scheduler.from_config(theirs, solver="ddim")
    s.set_timesteps(6)
    torch.testing.assert_close(s.timesteps.flip(0), theirs.discrete_sigmas, rtol=1e-4, atol=1e-6)
    assert s.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)
    x, k = noise(), s.timesteps[-1]
    s.set_begin_index(5)
    found = s.step(-0.3 * x, k, x).prev_sample
    torch.testing.assert_close(found, x - 0.3 * float(k) ** 2 * x, rtol=1e-6, atol=1e-9)


def test_readings_of_edm_match_its_preconditioning() -> None:
    """ẑ from F as diffusers makes it, for both signs."""
    for kind in ("epsilon", "v_prediction"):
        theirs = diffusers.EDMEulerScheduler(prediction_type=kind)
        flow = read({"_class_name": "EDMEulerScheduler", **theirs.config}).flow
        x, output = noise(seed=1).float(), noise(seed=2).float()
        for t in (0.0, 0.4, 1.0):
            sigma = flow.path.sigma(t)
            expected = theirs.precondition_outputs(x, output, sigma)
            torch.testing.assert_close(flow.read(x, output, flow.path.at(t)).data, expected, rtol=1e-4, atol=1e-4)
