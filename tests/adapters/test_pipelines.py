"""Our scheduler in real pipelines: every solver runs, and the one that is the pipeline's own makes the same images.

Images are in [0, 1]. "Equal" is to 1e-4 in float32; that another solver's images are not shows what that means. Latents
have the scale that an untrained network gives them (hundreds, PixArt's): they are compared to the largest of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from benchmarks.sections.catalogue import ENTRIES
from flowsolve import adapters
from flowsolve.noise import Noise
from flowsolve.solvers import (
    DDIM,
    DDPM,
    DEIS,
    LMS,
    Ancestral,
    Auto,
    DPMSolver,
    DPMSolverPP,
    Euler,
    Heun,
    SDEDPMSolverPP,
    Solver,
    UniPC,
)

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from flowsolve.adapters.diffusers import Scheduler, capture  # noqa: E402
from tests.adapters import pipelines  # noqa: E402
from tests.adapters.pipelines import STABLE, Case, flux, pixart, randn, sd3, stable, unconditional, xl  # noqa: E402

CASES: dict[str, Callable[..., Case]] = {
    "unconditional": unconditional, "stable": stable, "xl": xl, "sd3": sd3, "flux": flux, "pixart": pixart,
}  # fmt: skip
FLOWS = ("sd3", "flux")
EQUAL = 1e-4
GUIDANCE, STEPS = 7.5, 5
# A sum of a network rounds by about eps of its largest term, through some four blocks; guidance makes the difference of
# two estimates, each rounded by that, up to 2 × 7.5 as large; each step does so again.
ROUNDED = torch.finfo(torch.float32).eps * 4 * 2 * GUIDANCE * STEPS


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=CASES)
def named(request: pytest.FixtureRequest) -> tuple[str, Case]:
    return request.param, CASES[request.param]()


@contextmanager
def counted(case: Case) -> Iterator[list[Any]]:
    """The times at which the pipeline's network is called."""
    seen: list[Any] = []
    net = getattr(case.pipe, "unet", None) or case.pipe.transformer

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["timestep"] if "timestep" in kwargs else args[1])

    handle = net.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# --- every solver -----------------------------------------------------------------------------------------------------


def test_every_fixed_budget_solver_runs(named: tuple[str, Case]) -> None:
    """The whole list of docs/solvers.md: finite images, and as many evaluations as the scheduler says."""
    name, case = named
    seen: dict[str, Tensor] = {}
    output = {} if name == "unconditional" else {"output_type": "latent"}
    for entry in ENTRIES:
        solver: Any = replace(entry.solver, adaptive=False) if entry.solver.chooses_steps else entry.solver
        options: dict[str, Any] = {}
        if name in FLOWS and entry.name.startswith(("DPMSolver12", "DPMSolver23")):
            options = {"chart": "straight"}  # theirs is infinite at α = 0
        if name in FLOWS and entry.name.startswith("EulerMaruyama"):
            options = {"grid": [0.05, 0.5, 1.0]}  # there is no step from α = 0
        s = Scheduler.from_config(case.native, solver=solver, **options)
        with counted(case) as calls:
            found = case(s, steps=2, **output)
        assert bool(torch.isfinite(found).all()), entry.name
        assert len(calls) == s.nfe == len(s.timesteps), entry.name
        m = solver.evaluations
        lowest = s._table.plan.closing is None  # Stable Diffusion's table ends above the clean data
        assert s.nfe == (2 * m if m == 1 or lowest else m + 1), entry.name
        seen[entry.name] = found
    assert float((seen["DDIM()"] - seen["RK4()"]).abs().max()) > 1e-3
    assert len({round(v.sum().item(), 4) for v in seen.values()}) > 20  # they are not all one method, even in 2 steps


def test_auto_and_every_grid(named: tuple[str, Case]) -> None:
    name, case = named
    output = {} if name == "unconditional" else {"output_type": "latent"}
    for grid in (None, *fs.grids.SPACINGS):
        table = grid in ("leading", "trailing", "linspace")
        if name in FLOWS and table:
            continue
        for solver in ("auto", "heun"):
            s = Scheduler.from_config(case.native, solver=solver, grid=grid)
            with counted(case) as calls:
                assert bool(torch.isfinite(case(s, steps=3, **output)).all())
            assert len(calls) == s.nfe


# --- the pipeline's own solver ----------------------------------------------------------------------------------------


Parity = tuple[Callable[..., Case], str, dict[str, Any], Solver, dict[str, Any], int]
MULTI, UNI = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
NOISE_CHART = {"chart": "noise"}


def table(spacing: str, offset: int) -> dict[str, Any]:
    return {**STABLE, "timestep_spacing": spacing, "steps_offset": offset}


def parity() -> Iterator[Parity]:
    for spacing, offset in (("leading", 1), ("leading", 0), ("trailing", 0), ("linspace", 0)):
        kw = table(spacing, offset)
        ddim = {**kw, "clip_sample": False}
        if spacing != "linspace":  # its previous step is not the next of the list there
            yield stable, "DDIMScheduler", {**ddim, "set_alpha_to_one": True}, DDIM(), {}, 5
            if (spacing, offset) != ("leading", 0):  # there the last step goes from the lowest entry to itself
                yield stable, "DDIMScheduler", {**ddim, "set_alpha_to_one": False}, DDIM(), {}, 5
        yield stable, "EulerDiscreteScheduler", kw, Euler(), {}, 4
        yield stable, "EulerDiscreteScheduler", {**kw, "use_karras_sigmas": True}, Euler(), {}, 4
        yield stable, "HeunDiscreteScheduler", kw, Heun(), NOISE_CHART, 4
        yield stable, "HeunDiscreteScheduler", {**kw, "use_karras_sigmas": True}, Heun(), NOISE_CHART, 4
        yield stable, "KDPM2DiscreteScheduler", kw, DPMSolver(2), {}, 4
        yield stable, "LMSDiscreteScheduler", kw, LMS(4), {}, 6
        yield stable, MULTI, kw, DPMSolverPP(2, cooldown=True), {}, 5
        if spacing == "trailing":  # from 15 steps on it does not end in order 1
            yield stable, MULTI, kw, DPMSolverPP(2), {}, 16
        yield stable, MULTI, {**kw, "solver_order": 1}, DPMSolverPP(1), {}, 5
        yield (
            stable, MULTI, {**kw, "solver_type": "heun", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
            DPMSolverPP(2, rule="exact"), {}, 5,
        )  # fmt: skip
        yield stable, "DEISMultistepScheduler", {**kw, "solver_order": 3, "lower_order_final": False}, DEIS(3), {}, 6
        yield stable, UNI, kw, UniPC(2, cooldown=True), {}, 6
        yield stable, UNI, {**kw, "solver_order": 3}, UniPC(3, cooldown=True), {}, 6
        low = {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "bh1"}
        yield stable, UNI, {**kw, **low}, UniPC(2, rule="bh1"), {}, 6
    for kind in ("v_prediction", "sample"):
        yield (
            stable,
            "DDIMScheduler",
            {**table("leading", 1), "clip_sample": False, "prediction_type": kind},
            DDIM(),
            {},
            4,
        )
        yield stable, UNI, {**table("trailing", 0), "prediction_type": kind}, UniPC(2, cooldown=True), {}, 5
    for betas in ({"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": torch.linspace(1e-3, 0.02, 1000).tolist()}):
        yield stable, "DDIMScheduler", {**betas, "clip_sample": False, "steps_offset": 1}, DDIM(), {}, 4
    yield (
        stable, "DDIMScheduler",
        {**STABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
         "clip_sample": False, "steps_offset": 1},
        DDIM(), {}, 5,
    )  # fmt: skip
    yield xl, "EulerDiscreteScheduler", table("leading", 1), Euler(), {}, 4
    yield xl, UNI, table("leading", 1), UniPC(2, cooldown=True), {}, 4
    yield xl, "EDMEulerScheduler", {}, Euler(), NOISE_CHART, 5
    yield xl, "EDMDPMSolverMultistepScheduler", {"lower_order_final": False}, DPMSolverPP(2), {}, 5
    yield (
        xl, "EDMDPMSolverMultistepScheduler",
        {"lower_order_final": False, "prediction_type": "v_prediction", "sigma_schedule": "exponential"},
        DPMSolverPP(2), {}, 5,
    )  # fmt: skip
    continuous = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    yield xl, "EulerDiscreteScheduler", {**continuous, "sigma_min": 0.002, "sigma_max": 700.0}, Euler(), NOISE_CHART, 5
    yield sd3, "FlowMatchEulerDiscreteScheduler", {}, Euler(), {}, 4
    yield sd3, "FlowMatchEulerDiscreteScheduler", {}, DDIM(), {}, 4
    yield sd3, "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, Euler(), {}, 4
    yield sd3, "FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, Euler(), {}, 4
    yield sd3, "FlowMatchHeunDiscreteScheduler", {}, Heun(), {}, 4
    yield flux, "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, Euler(), {}, 4
    yield flux, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, Euler(), {}, 4
    yield (
        flux,
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        Euler(),
        {},
        4,
    )
    yield pixart, MULTI, {"lower_order_final": False}, DPMSolverPP(2), {}, 4
    yield pixart, "DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, DDIM(), {}, 4
    yield unconditional, "DDIMScheduler", {"clip_sample": False}, DDIM(), {}, 5


@pytest.fixture(scope="module")
def kept() -> dict[Any, Case]:
    """Pipelines, made once."""
    return {}


def label(case: Parity) -> str:
    make, name, config, solver, _, steps = case
    short = {k: v for k, v in config.items() if k not in STABLE and k != "trained_betas"}
    return f"{make.__name__}-{name}-{'-'.join(map(str, short.values()))}-{type(solver).__name__}-{steps}"


@pytest.mark.parametrize("case", list(parity()), ids=label)
def test_the_pipeline_s_own_solver_makes_its_images(case: Parity, kept: dict[Any, Case]) -> None:
    make, name, config, solver, options, steps = case
    pipeline = kept.setdefault(make, make())
    theirs = getattr(diffusers, name)(**config)
    expected = pipeline(theirs, steps)
    found = pipeline(Scheduler.from_config(theirs, solver=solver, **options), steps)
    assert float((found - expected).abs().max()) < EQUAL
    if steps > 1:
        another = "unipc" if solver in (DDIM(), Euler(), DPMSolverPP(1)) else "ddim"
        other = pipeline(Scheduler.from_config(theirs, solver=another), steps)
        assert float((other - expected).abs().max()) > 10 * EQUAL


@contextmanager
def given_noise(*modules: Any) -> Iterator[None]:
    """Ours and theirs draw the same noise: the n-th draw of a run is a function of n."""
    drawn: list[int] = [0]

    def draw(shape: Any, **kwargs: Any) -> Tensor:
        drawn[0] += 1
        return randn(*shape, seed=1000 + drawn[0])

    def step(self: Noise, t: float, t_next: float, like: Tensor) -> Tensor:
        return draw(like.shape) if like.ndim == 4 else like  # (times are found on a state of one number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noise, "step", step)
        for module in modules:
            patch.setattr(module, "randn_tensor", draw)
        given_noise.reset = lambda: drawn.__setitem__(0, 0)  # type: ignore[attr-defined]
        yield


STOCHASTIC: list[tuple[Callable[..., Case], str, dict[str, Any], Solver]] = [
    (unconditional, "DDPMScheduler", {"clip_sample": False}, DDPM()),
    (unconditional, "DDPMScheduler", {"clip_sample": True}, DDPM()),
    (unconditional, "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, DDPM()),
    (stable, "DDPMScheduler", {**table("leading", 1), "clip_sample": False}, DDPM()),
    (stable, "EulerAncestralDiscreteScheduler", table("linspace", 0), Ancestral(Euler())),
    (stable, "EulerAncestralDiscreteScheduler", table("trailing", 0), Ancestral(Euler())),
    (stable, MULTI, {**STABLE, "algorithm_type": "sde-dpmsolver++", "lower_order_final": False}, SDEDPMSolverPP(2)),
    (pixart, MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, SDEDPMSolverPP(1)),
]


@pytest.mark.parametrize(("make", "name", "config", "solver"), STOCHASTIC)
def test_so_with_noise_given_the_same_noise(
    make: Any, name: str, config: dict[str, Any], solver: Solver, kept: dict[Any, Case]
) -> None:
    theirs, case = getattr(diffusers, name)(**config), kept.setdefault(make, make())
    with given_noise(sys.modules[type(theirs).__module__]):
        expected = case(theirs, 5)
        given_noise.reset()  # type: ignore[attr-defined]
        found = case(Scheduler.from_config(theirs, solver=solver), 5)
    assert float((found - expected).abs().max()) < EQUAL
    assert float((case(Scheduler.from_config(theirs, solver="ddim"), 5) - expected).abs().max()) > 10 * EQUAL


# --- where theirs is different ----------------------------------------------------------------------------------------


def test_a_static_shift_makes_other_images_because_it_is_applied_once(kept: dict[Any, Case]) -> None:
    """Given the levels that diffusers ends up with, the images are its own (diffusers#13243)."""
    case = kept.setdefault(sd3, sd3())
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = case(theirs, 4)
    assert float((case(Scheduler.from_config(theirs, solver="euler"), 4) - expected).abs().max()) > 10 * EQUAL
    twice = [1.0 - float(v) for v in theirs.sigmas]
    found = case(Scheduler.from_config(theirs, solver="euler", grid=twice), 4)
    assert float((found - expected).abs().max()) < EQUAL


def test_ddim_s_previous_step_is_not_the_next_of_its_list(kept: dict[Any, Case]) -> None:
    """With linspace it steps by T // N, whatever comes next (diffusers#9261); ours steps to what comes next."""
    case = kept.setdefault(stable, stable())
    theirs = diffusers.DDIMScheduler(**table("linspace", 1), clip_sample=False)
    expected = case(theirs, 5)
    assert float((case(Scheduler.from_config(theirs, solver="ddim"), 5) - expected).abs().max()) > 10 * EQUAL


def test_karras_levels_are_asked_at_their_own_time(kept: dict[Any, Case]) -> None:
    """DPM-Solver's scheduler rounds the time of a level to a whole entry; ours does not."""
    case = kept.setdefault(stable, stable())
    theirs = diffusers.DPMSolverMultistepScheduler(**STABLE, use_karras_sigmas=True, lower_order_final=False)
    expected = case(theirs, 4)
    s = Scheduler.from_config(theirs, solver=DPMSolverPP(2))
    off = float((case(s, 4) - expected).abs().max())
    assert EQUAL < off < 1e-2
    assert (s.timesteps - theirs.timesteps).abs().max() < 0.51
    assert torch.allclose(s.sigmas, theirs.sigmas, rtol=1e-4)


def test_flow_time_steps_are_not_truncated(kept: dict[Any, Case]) -> None:
    """DPM-Solver's scheduler on a flow asks at ⌊1000 σ⌋."""
    case = kept.setdefault(sd3, sd3())
    theirs = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    case(theirs, 4)
    s = Scheduler.from_config(theirs, solver=DPMSolverPP(2, cooldown=True))
    case(s, 4)
    assert torch.allclose(s.sigmas, theirs.sigmas, atol=1e-5)
    assert not theirs.timesteps.is_floating_point()
    lost = s.timesteps - theirs.timesteps
    assert float(lost.min()) > -1e-3
    assert 0.1 < float(lost.max()) < 1.01


def test_pndm_evaluates_once_more_than_it_has_steps(kept: dict[Any, Case]) -> None:
    case = kept.setdefault(stable, stable())
    theirs = diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1)
    for scheduler, calls in ((theirs, 7), (Scheduler.from_config(theirs, solver="ipndm"), 6)):
        with counted(case) as seen:
            case(scheduler, 6)
        assert len(seen) == calls


# --- image to image, inpainting ---------------------------------------------------------------------------------------


IMAGES: list[tuple[Callable[..., Case], str, dict[str, Any], Any, dict[str, Any]]] = [
    (stable, "DDIMScheduler", {**table("leading", 1), "clip_sample": False}, DDIM(), {}),
    (stable, "EulerDiscreteScheduler", table("linspace", 0), Euler(), {}),
    (stable, MULTI, {**table("trailing", 0), "lower_order_final": False}, DPMSolverPP(2), {}),
    (stable, "HeunDiscreteScheduler", table("linspace", 0), Heun(), NOISE_CHART),
    (xl, "EulerDiscreteScheduler", table("leading", 1), Euler(), {}),
    (xl, UNI, table("leading", 1), UniPC(2, cooldown=True), {}),
    (sd3, "FlowMatchEulerDiscreteScheduler", {}, Euler(), {}),
    (flux, "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, Euler(), {}),
]


@pytest.mark.parametrize(("make", "name", "config", "solver", "options"), IMAGES)
@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_image_to_image(
    make: Any, name: str, config: Any, solver: Any, options: Any, strength: float, kept: dict[Any, Case]
) -> None:
    case = kept.setdefault((make, "img2img"), make(kind="img2img"))
    theirs = getattr(diffusers, name)(**config)
    expected = case(theirs, 6, strength=strength)
    found = case(Scheduler.from_config(theirs, solver=solver, **options), 6, strength=strength)
    assert float((found - expected).abs().max()) < EQUAL
    assert float((case(theirs, 6, strength=0.3) - expected).abs().max()) > 10 * EQUAL


@pytest.mark.parametrize("make", [stable, xl, sd3])
@pytest.mark.parametrize("solver", ["heun", "rk4", "unipc", "seeds", "auto"])
def test_image_to_image_by_steps(make: Any, solver: str, kept: dict[Any, Case]) -> None:
    """strength 0.5 of 4 steps is 2 steps, whatever a step costs; the bar counts steps."""
    case = kept.setdefault((make, "img2img"), make(kind="img2img"))
    s = Scheduler.from_config(case.native, solver=solver)
    with counted(case) as calls:
        found = case(s, 4, strength=0.5)
    assert bool(torch.isfinite(found).all())
    assert len(calls) == s.nfe - 2 * s.order


def test_an_ensemble_of_two_networks(kept: dict[Any, Case]) -> None:
    """SDXL's base to 0.5 and the refiner from there."""
    base, refiner = kept.setdefault(xl, xl()), kept.setdefault((xl, "img2img"), xl(kind="img2img"))
    theirs = diffusers.EulerDiscreteScheduler(**table("leading", 1))
    found = []
    for scheduler in (theirs, Scheduler.from_config(theirs, solver="euler")):
        halfway = base(scheduler, 6, denoising_end=0.5, output_type="latent")
        # What is handed over is in the scale of the scheduler's state, x/α for Euler's and x here.
        found.append(refiner(scheduler, 6, denoising_start=0.5, image=halfway))
    assert float((found[0] - found[1]).abs().max()) < EQUAL


def test_flux_image_to_image_counts_time_steps(kept: dict[Any, Case]) -> None:
    """It takes len(timesteps) for the number of steps, so that with stages it begins too late, or never."""
    case = kept.setdefault((flux, "img2img"), flux(kind="img2img"))
    for solver, evaluations in (("unipc", 2), ("heun", 1)):
        s = Scheduler.from_config(case.native, solver=solver)
        with counted(case) as calls:
            case(s, 4, strength=0.5)
        assert len(calls) == evaluations


def test_pixart_in_one_step_takes_the_estimate(kept: dict[Any, Case]) -> None:
    """The step's second output, which some of diffusers' own schedulers do not give."""
    case = kept.setdefault(pixart, pixart())
    with pytest.raises(IndexError):
        case(diffusers.DPMSolverMultistepScheduler(), 1)
    s = Scheduler.from_config(case.native, solver="ddim", timestep_spacing="trailing")
    x = case(s, 1, output_type="latent")
    expected = case(diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing"), 1, output_type="latent")
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_inpainting(solver: str, kept: dict[Any, Case]) -> None:
    """Also in the units of Euler's kin, in which the picture is noised and blended in."""
    case = kept.setdefault((stable, "inpaint"), stable(kind="inpaint"))
    theirs: Any = diffusers.DDIMScheduler(**table("leading", 1), clip_sample=False)
    if solver == "euler":
        theirs = diffusers.EulerDiscreteScheduler(**table("leading", 1))
    for strength in (1.0, 0.6):
        expected = case(theirs, 5, strength=strength)
        found = case(Scheduler.from_config(theirs, solver=solver), 5, strength=strength)
        assert float((found - expected).abs().max()) < EQUAL


@pytest.mark.parametrize("solver", ["unipc", "heun", "ddpm", "auto"])
def test_inpainting_keeps_what_is_not_masked(solver: str, kept: dict[Any, Case]) -> None:
    """Latents outside the mask end as those of the picture, also where a corrector would undo the blending."""
    case = kept.setdefault((stable, "inpaint"), stable(kind="inpaint"))
    ends: list[Tensor] = []
    for name in (solver, "ddim"):
        s = Scheduler.from_config(case.native, solver=name)
        ends.append(case(s, 4, output_type="latent"))
    outside = ends[0][..., 4:]
    torch.testing.assert_close(outside, ends[1][..., 4:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ends[0][..., :4], ends[1][..., :4], atol=1e-2)


# --- what a pipeline lets through -------------------------------------------------------------------------------------


def test_callbacks_see_and_change_the_latents(kept: dict[Any, Case]) -> None:
    case = kept.setdefault(stable, stable())
    s, seen = Scheduler.from_config(case.native, solver="unipc"), []
    plain = case(s, 4)

    def look(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, float(t), given["latents"].shape))
        return given

    assert torch.equal(case(s, 4, callback_on_step_end=look), plain)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == s.timesteps.tolist()

    def stop(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] * (0.5 if i == 3 else 1.0)}

    assert not torch.allclose(case(s, 4, callback_on_step_end=stop), plain, atol=1e-3)


def test_a_pipeline_in_bfloat16_asks_at_unrounded_times() -> None:
    """bfloat16 has no 750 and 667 … ; the network must see them all the same."""
    case = stable()
    case.pipe.unet = pipelines.unet_conditional.__wrapped__().bfloat16()
    case.pipe.vae = pipelines.vae.__wrapped__().bfloat16()
    case.call = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in case.call.items()}
    s = Scheduler.from_config(case.native, solver="heun", grid="trailing")
    with counted(case) as times:
        out = case(s, 3, output_type="latent")
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out).all())
    assert [float(t) for t in times] == s.timesteps.tolist()
    assert any(float(t.bfloat16()) != float(t) for t in times)


@pytest.mark.parametrize("make", [stable, unconditional])
def test_generators(make: Any, kept: dict[Any, Case]) -> None:
    case = kept.setdefault(make, make())
    s = Scheduler.from_config(case.native, solver="ddpm")
    assert torch.equal(case(s, 4, seed=3), case(s, 4, seed=3))
    assert not torch.allclose(case(s, 4, seed=3), case(s, 4, seed=4), atol=1e-3)
    pair, swapped = case(s, 4, seed=[3, 4]), case(s, 4, seed=[5, 4])
    if make is unconditional:  # no prompts: a sample is its generator
        torch.testing.assert_close(pair[1], swapped[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pair[0], swapped[0], atol=1e-3)


@pytest.mark.parametrize("make", [sd3, flux])
def test_pipelines_that_hand_no_generator_to_the_steps(make: Any, kept: dict[Any, Case]) -> None:
    """Their noise is named by the starting latents, and so by the pipeline's generator."""
    case = kept.setdefault(make, make())
    s = Scheduler.from_config(case.native, solver="stochasticheun")
    assert torch.equal(case(s, 3, seed=3), case(s, 3, seed=3))
    assert not torch.allclose(case(s, 3, seed=3), case(s, 3, seed=4), atol=1e-3)


def test_two_threads_share_a_scheduler() -> None:
    """Two pipelines in lockstep, step by step, on one scheduler, with different budgets."""
    s = Scheduler.from_config(stable().native, solver=UniPC(3))
    alone = {steps: stable()(s, steps, seed=steps, output_type="latent") for steps in (4, 6)}
    barrier, found = threading.Barrier(2, timeout=60), {}

    def meet(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i < 4:
            barrier.wait()
        return {}

    def work(steps: int) -> None:
        found[steps] = stable()(s, steps, seed=steps, output_type="latent", callback_on_step_end=meet)

    threads = [threading.Thread(target=work, args=(n,)) for n in (4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for steps, expected in alone.items():
        assert torch.equal(found[steps], expected)


# --- saved pipelines --------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_comes_back_with_its_solver(tmp_path: Path) -> None:
    case = unconditional()
    s = Scheduler.from_config(case.native, solver=DEIS(2), grid="trailing")
    case.pipe.scheduler = s
    case.pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["flowsolve.adapters.diffusers.scheduler", "Scheduler"]
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(again.scheduler, Scheduler)
    assert again.scheduler.solver == DEIS(2)
    again.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(7)
    images = torch.from_numpy(again(batch_size=2, num_inference_steps=4, generator=g, output_type="np").images)
    torch.testing.assert_close(images, case(s, 4))
    flow = adapters.load(tmp_path)  # and it is a checkpoint like any other
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    sol = fs.sample(flow, start=start, solver=DEIS(2), nfe=4, grid="trailing")
    torch.testing.assert_close((sol.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), images, rtol=1e-4, atol=1e-4)


def test_a_saved_pipeline_needs_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes classes of other packages only from modules that the program has imported itself."""
    case = unconditional()
    case.pipe.scheduler = Scheduler.from_config(case.native, solver="deis")
    case.pipe.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "flowsolve.adapters.diffusers.scheduler")
    with pytest.raises(ValueError, match=r"flowsolve\.adapters\.diffusers\.scheduler"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path, local_files_only=True)


COLLEAGUE = """
import json, logging, sys
from pathlib import Path
sys.modules["flowsolve"] = None  # not installed: importing it fails
import diffusers
root = Path(sys.argv[1])
try:
    diffusers.DDPMPipeline.from_pretrained(root, local_files_only=True)
except (ValueError, ImportError) as error:
    print("told", error)
note = (root / "scheduler/FLOWSOLVE.md").read_text()
entry = next(line for line in note.splitlines() if line.strip().startswith('"scheduler"'))
index = json.loads((root / "model_index.json").read_text())
(root / "model_index.json").write_text(json.dumps(index | json.loads("{" + entry + "}")))
pipe = diffusers.DDPMPipeline.from_pretrained(root, local_files_only=True)
print("opened", type(pipe.scheduler).__name__, pipe.scheduler.config.num_train_timesteps)
"""


def test_a_saved_pipeline_opened_without_flowsolve(tmp_path: Path) -> None:
    """The error names us, the folder says what to install, and what it advises otherwise works without."""
    case = unconditional(diffusers.DDIMScheduler(num_train_timesteps=500))
    case.pipe.scheduler = Scheduler.from_config(case.native, solver="unipc")
    case.pipe.save_pretrained(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-c", COLLEAGUE, str(tmp_path / "pipe")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^told .*flowsolve", done.stdout)
    assert "opened DDIMScheduler 500" in done.stdout
    assert "pip install 'flowsolve[diffusers]'" in done.stderr  # where diffusers prints what it does not know
    note = (tmp_path / "pipe/scheduler/FLOWSOLVE.md").read_text(encoding="utf-8")
    assert "pip install 'flowsolve[diffusers]', or in a copy of its repository pip install '.[diffusers]'" in note
    assert "from flowsolve.adapters.diffusers import Scheduler" in note
    assert str(Path(fs.__file__).parents[1]) not in note  # no path of the machine that saved it


@pytest.mark.parametrize("solver", [DDIM(), UniPC(3), Heun()], ids=repr)
def test_loading_and_sampling_is_running_the_pipeline(tmp_path: Path, solver: Solver) -> None:
    """A saved DDPM pipeline: `adapters.load` and `fs.sample` on the scheduler's nodes, against the pipeline."""
    case = unconditional(diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing"))
    case.pipe.save_pretrained(tmp_path)
    s = Scheduler.from_config(case.native, solver=solver)
    expected = case(s, 5)
    flow = adapters.load(tmp_path)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    sol = fs.sample(flow, start=start, solver=solver, grid=[*s.nodes, 1.0] if s.nodes[-1] < 1.0 else s.nodes)
    images = (sol.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float((images - expected).abs().max()) < EQUAL
    assert sol.nfe.tolist() == [s.nfe] * 2


def conditions(case: Case, name: str, sign: str = "") -> dict[str, Any]:
    """What the pipeline gives its network, under the network's own names; with "negative_" for nothing."""
    call = case.call
    given: dict[str, Any] = {"encoder_hidden_states": call[f"{sign}prompt_embeds"]}
    if name in ("xl", "sd3", "flux"):
        given["pooled_projections"] = call[f"{sign}pooled_prompt_embeds"]
    if name == "xl":
        ids = torch.tensor([16.0, 16.0, 0.0, 0.0, 16.0, 16.0]).expand(2, 6)
        given["added_cond_kwargs"] = {"text_embeds": given.pop("pooled_projections"), "time_ids": ids}
    if name == "pixart":
        given["encoder_attention_mask"] = call[f"{sign}prompt_attention_mask"]
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if name == "flux":
        ids = case.pipe._prepare_latent_image_ids(2, 4, 4, torch.device("cpu"), torch.float32)
        given |= {"guidance": torch.full((2,), 3.0), "txt_ids": torch.zeros(5, 3), "img_ids": ids}
    return given


def latents(case: Case, name: str, scheduler: Any) -> Tensor:
    """What the pipeline starts from with the seed 7, as the path scales it."""
    shown = scheduler.reading.shown(scheduler.reading.path.at(scheduler.nodes[0]))
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * scheduler.init_noise_sigma / shown
    return case.pipe._pack_latents(start, 2, 4, 8, 8) if name == "flux" else start


@pytest.mark.parametrize("name", ["stable", "xl", "sd3", "flux", "pixart"])
def test_so_with_conditioning(name: str, tmp_path: Path) -> None:
    """Saved with its own scheduler, held in memory with ours, and saved with ours: the flow is the same."""
    case = CASES[name]()
    s = Scheduler.from_config(case.native, solver=UniPC(2))
    expected = case(s, 5, output_type="latent", **({} if name == "flux" else {"guidance_scale": 1.0}))
    case.pipe.save_pretrained(tmp_path)
    flows, start, nodes = [adapters.load(tmp_path)], latents(case, name, s), s.nodes
    case.pipe.scheduler = s
    flows.append(adapters.load(case.pipe))
    s.save_pretrained(tmp_path / "scheduler")
    assert "flowsolve" in json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    flows.append(adapters.load(tmp_path))
    for flow in flows:
        sol = fs.sample(
            flow, start=start, interval=(nodes[0], nodes[-1]), solver=UniPC(2), grid=nodes, cond=conditions(case, name)
        )
        assert off(sol.x, expected) < ROUNDED


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable", "xl", "sd3", "pixart"])
@pytest.mark.parametrize("batched", [True, False])
def test_classifier_free_guidance_is_the_pipeline_s(name: str, batched: bool, tmp_path: Path) -> None:
    """guidance_scale = 7.5 by the pipeline, and of the loaded flow; a negative prompt for each sample."""
    case = CASES[name]()
    s = Scheduler.from_config(case.native, solver=UniPC(2))
    expected = case(s, STEPS, output_type="latent", guidance_scale=GUIDANCE)
    case.pipe.save_pretrained(tmp_path)
    cond = {**conditions(case, name), "unconditional": conditions(case, name, "negative_")}
    guided = fs.guidance.ClassifierFree(adapters.load(tmp_path), GUIDANCE, batched=batched)
    sol = fs.sample(
        guided, start=latents(case, name, s), interval=(s.nodes[0], s.nodes[-1]), solver=UniPC(2), grid=s.nodes,
        cond=cond,
    )  # fmt: skip
    assert off(sol.x, expected) < ROUNDED
    assert sol.nfe.tolist() == [2 * STEPS] * 2


def test_guidance_by_one_empty_prompt_for_all(tmp_path: Path) -> None:
    """The guide's three lines: the arguments that say nothing are the flow's, and images are those of the pipeline."""
    case = stable()
    nothing = case.call["negative_prompt_embeds"][:1]
    case.call["negative_prompt_embeds"] = nothing.expand(2, -1, -1)
    s = Scheduler.from_config(case.native, solver=UniPC(2))
    expected = case(s, 5, guidance_scale=7.5)
    case.pipe.save_pretrained(tmp_path)
    guided = fs.guidance.ClassifierFree(adapters.load(tmp_path), 7.5, unconditional={"encoder_hidden_states": nothing})
    sol = fs.sample(
        guided, start=latents(case, "stable", s), interval=(s.nodes[0], s.nodes[-1]), solver=UniPC(2), grid=s.nodes,
        cond={"encoder_hidden_states": case.call["prompt_embeds"]},
    )  # fmt: skip
    vae = case.pipe.vae
    with torch.no_grad():
        images = vae.decode(sol.x / vae.config.scaling_factor).sample
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float((images - expected).abs().max()) < EQUAL
    assert float((case(s, 5, guidance_scale=7.0) - expected).abs().max()) > 10 * EQUAL


def test_guidance_of_a_captured_pipeline() -> None:
    """Two prompts and an empty one, captured without guidance: the rows of the call are what conditions the flow."""
    case = stable()
    text, nothing = case.call["prompt_embeds"], case.call["negative_prompt_embeds"][:1]
    call = {**case.call, "negative_prompt_embeds": nothing.expand(2, -1, -1), "guidance_scale": 7.5}
    start = randn(2, 4, 8, 8, seed=7)
    theirs = capture(case.pipe, **call, latents=start)
    call |= {"prompt_embeds": torch.cat((text, nothing)), "guidance_scale": 1.0, "latents": randn(3, 4, 8, 8)}
    plain = capture(case.pipe, **{k: v for k, v in call.items() if not k.startswith("negative")})
    ours = fs.guidance.ClassifierFree(plain.flow, 7.5, unconditional={"rows": 2})
    expected = fs.sample(theirs.flow, start=start, interval=theirs.interval, solver=DDIM(), nfe=8, cond=theirs.cond)
    found = fs.sample(
        ours, start=start, interval=theirs.interval, solver=DDIM(), nfe=8, cond={"rows": torch.tensor([0, 1])}
    )
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    assert found.nfe.tolist() == expected.nfe.tolist() == [8, 8]
    clipped = fs.guidance.Transformed(theirs.flow, fs.guidance.Clip(-0.1, 0.1))
    data = theirs.flow.data(start, 0.5, **theirs.cond)
    torch.testing.assert_close(clipped.data(start, 0.5, **theirs.cond), data.clamp(-0.1, 0.1), rtol=1e-4, atol=1e-5)
    assert float(data.abs().max()) > 0.2
    plain.close()
    theirs.close()


# --- the guide --------------------------------------------------------------------------------------------------------


def test_the_guide_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snippet of docs/pipelines.md in order, on a pipeline that reads words."""
    text = (Path(__file__).parents[2] / "docs/pipelines.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 8
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"pipe": pipelines.prompted(tmp_path / "tokenizer")}
    for snippet in snippets:
        exec(snippet, known)  # noqa: S102 (the guide)
    assert known["again"].scheduler.solver == Auto()
    assert known["image"].size == (16, 16)
    assert len(known["images"]) == 2
    assert bool(torch.isfinite(known["out"].log_prob).all())
