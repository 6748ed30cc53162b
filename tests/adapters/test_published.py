"""Scheduler configurations as they are published: each read as it is meant, and run beside the class that it names.

`published.json` holds facts of public files: which options a model's `scheduler_config.json` states, as copies of it in
public repositories have it, or the script that wrote it (`source`). `reading` is what they mean, written by hand:

* path: "table", "flow", "EDM" or "VE"; prediction ("flow" is ε − z; "F behind" and "v behind" preconditioning);
* end: "clean", or "lowest" of the table or of σ; limit of ẑ; zero_snr: a table that ends in noise;
* shift of a flow: a number, or "exp" and "linear" in μ; terminal; inverted: level and clock of flow time itself;
* levels: the first and the last σ of a preconditioned path or of spaced levels; refused: the words of the refusal.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsolve import solvers
from flowsolve.guidance import Clip, Threshold
from flowsolve.paths import EDM, VE, CondOT, Discrete

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler  # noqa: E402
from flowsolve.adapters.diffusers.layout import OWN, lay  # noqa: E402
from flowsolve.adapters.diffusers.options import options_of  # noqa: E402

PUBLISHED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
READ = [p for p in PUBLISHED if "refused" not in p["reading"]]
STEPS, MU = 10, 0.8
OWN_SOLVERS = {
    "EulerDiscreteScheduler": "euler", "DDIMScheduler": "ddim", "CogVideoXDDIMScheduler": "ddim",
    "PNDMScheduler": "plms", "DPMSolverMultistepScheduler": "dpmsolver++", "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler", "EDMDPMSolverMultistepScheduler": "dpmsolver++",
    "EDMEulerScheduler": "ddim",
}  # fmt: skip
"""The solver that a class is."""
DRAW = {
    "DDPMScheduler": "ddpm",
    "EulerAncestralDiscreteScheduler": "euler",
    "CosineDPMSolverMultistepScheduler": "ddim",
}
"""Classes that draw noise of their own, and a solver with the same nodes."""


def names(entry: dict[str, Any]) -> str:
    return str(entry["model"])


def begun(scheduler: Any, entry: dict[str, Any]) -> Any:
    """A scheduler with its time steps set as the model's pipeline sets them."""
    config, options = entry["config"], {}
    if config["_class_name"] == "FlowMatchEulerDiscreteScheduler":  # pipelines of flows say N by even fractions
        options["sigmas"] = [1.0 - i / STEPS for i in range(STEPS)]
        if config.get("use_dynamic_shifting"):
            options["mu"] = MU
        scheduler.set_timesteps(**options)
    else:
        scheduler.set_timesteps(STEPS)
    return scheduler


def theirs_of(config: dict[str, Any]) -> Any:
    """The class that a configuration names, made from it; skipped where this diffusers' has not all of its options."""
    kind = getattr(diffusers, config["_class_name"])
    known = options_of(config["_class_name"]).keys() & config.keys()
    if absent := sorted(known - set(inspect.signature(kind.__init__).parameters)):
        pytest.skip(f"this diffusers' {kind.__name__} has no {', '.join(absent)}")
    return kind.from_config(config)


def test_there_are_forty_and_more() -> None:
    assert len({names(p) for p in PUBLISHED}) >= 40
    assert len({p["config"]["_class_name"] for p in PUBLISHED}) >= 12
    assert all(p["source"] for p in PUBLISHED)


@pytest.mark.parametrize("entry", [p for p in PUBLISHED if "refused" in p["reading"]], ids=names)
def test_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=entry["reading"]["refused"]):
        Scheduler.from_config(entry["config"])


@pytest.mark.parametrize("entry", READ, ids=names)
def test_the_reading(entry: dict[str, Any]) -> None:
    """What a person reads in the file."""
    config, meant = entry["config"], entry["reading"]
    s = begun(Scheduler.from_config(config, solver={**OWN_SOLVERS, **DRAW}[config["_class_name"]]), entry)
    reading = s.reading
    assert type(reading.path) is {"table": Discrete, "flow": CondOT, "EDM": EDM, "VE": VE}[meant["path"]]
    assert reading.flow.prediction.name.startswith(meant["prediction"])
    assert (reading.limit is not None) == ("limit" in meant)
    if "limit" in meant:
        assert isinstance(reading.limit, {"clip": Clip, "threshold": Threshold}[meant["limit"]])
    assert (float(s.sigmas[-1]) == 0.0) == (meant["end"] == "clean")
    if meant["path"] == "table":
        roots = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=torch.float64)
        if config["beta_schedule"] == "scaled_linear" and config["num_train_timesteps"] == 1000:
            first = 1.0 - float(roots[0]) ** 2
            first /= (c := config.get("snr_shift_scale", 1.0)) + (1.0 - c) * first
            assert reading.path.alphas_cumprod[0] == pytest.approx(first, rel=1e-9)
        assert (reading.path.alphas_cumprod[-1] == 0.0) == bool(meant.get("zero_snr"))
    if "levels" in meant:
        own = lay(reading, solvers.DDIM(), like=OWN, steps=STEPS)
        levels = [p.sigma / p.alpha for p in own.points]
        ends = (levels[0], levels[-1] if meant["end"] == "clean" else float(s.sigmas[-1]))
        assert ends == pytest.approx(meant["levels"], rel=1e-6)
    if isinstance(shift := meant.get("shift"), float | str) and shift != "Karras":
        bare = 0.6
        s.set_timesteps(sigmas=[1.0, bare, 0.2], mu=MU)
        factor = {"exp": math.exp(MU), "linear": MU}.get(shift, shift)
        level = [factor * v / (1.0 + (factor - 1.0) * v) for v in (1.0, bare, 0.2)]
        if "terminal" in meant:
            level = [1.0 - (1.0 - v) * (1.0 - meant["terminal"]) / (1.0 - level[-1]) for v in level]
        assert s.sigmas[:3].tolist() == pytest.approx(level, rel=1e-6)
        clock = [1.0 - v if meant.get("inverted") else v for v in level]
        assert s.timesteps.tolist() == pytest.approx([config["num_train_timesteps"] * v for v in clock], abs=1e-3)


@pytest.mark.parametrize("entry", READ, ids=names)
def test_beside_its_class(entry: dict[str, Any]) -> None:
    """Times, levels, start and input of the class named, on its own nodes."""
    config, meant = entry["config"], entry["reading"]
    name = config["_class_name"]
    theirs = begun(theirs_of(config), entry)
    s = begun(Scheduler.from_config(config, solver={**OWN_SOLVERS, **DRAW}[name]), entry)
    whole = meant["path"] == "flow" and name != "FlowMatchEulerDiscreteScheduler"  # theirs are truncated
    times, levels = theirs.timesteps.double(), torch.as_tensor(getattr(theirs, "sigmas", 0.0)).double()
    if meant["path"] != "table" and meant["end"] == "lowest":  # theirs end in a step from the lowest level to itself
        times, levels = times[:-1], levels[:-1]
    torch.testing.assert_close(s.timesteps.double(), times, rtol=2e-5, atol=1.0 if whole else 2e-3)
    if name in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler",
                "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"):  # fmt: skip
        levels = 1.0 - levels if meant.get("inverted") else levels
        torch.testing.assert_close(s.sigmas.double(), levels, rtol=2e-4, atol=2e-5)
    if hasattr(theirs, "init_noise_sigma"):
        assert s.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-4)
    if hasattr(theirs, "scale_model_input"):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        fed = s.scale_model_input(x, s.timesteps[0])
        torch.testing.assert_close(fed, theirs.scale_model_input(x, theirs.timesteps[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("entry", [p for p in READ if p["config"]["_class_name"] in OWN_SOLVERS], ids=names)
def test_run_beside_its_class(entry: dict[str, Any]) -> None:
    """The same samples by its own solver. The network does not look at the time, which some of theirs truncate."""
    config, found = entry["config"], []
    name = config["_class_name"]
    if name in ("CogVideoXDDIMScheduler", "DDIMScheduler") and config.get("timestep_spacing") == "linspace":
        pytest.skip("theirs steps by ⌊T/N⌋, whatever is next in its list")
    if name == "PNDMScheduler" and not config.get("steps_offset"):
        pytest.skip("the last step of theirs goes from the lowest entry to itself, ours to the clean data")
    theirs = theirs_of(config)
    for scheduler in (theirs, Scheduler.from_config(config, solver=OWN_SOLVERS[name])):
        s = begun(scheduler, entry)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        x = x * float(getattr(s, "init_noise_sigma", 1.0))
        for t in s.timesteps:
            scaled: Tensor = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
            x = s.step(0.6 * torch.sin(scaled), t, x, return_dict=False)[0]
        found.append(x.double())
    off = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    assert off < 2e-4, off  # float32 tables, levels and states; STEPS steps


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmsolver++", "auto", "ddim"])
def test_levels_beyond_a_flow_s_end_are_ratios(solver: str) -> None:
    """Cosmos-Predict 2.5: σ from 200 to 0.01 are of z + σ ε, the fractions of a flow σ/(1 + σ), for every solver."""
    config = next(p["config"] for p in PUBLISHED if "Predict2.5" in names(p))
    s = Scheduler.from_config(config, solver=solver)
    s.set_timesteps(6)
    if solver != "auto":
        assert float(s.sigmas[0]) == pytest.approx(200.0 / 201.0)
        assert s.reading.path.at(s._table.plan.times[-1]).sigma == pytest.approx(0.01 / 1.01)
    assert float(s.sigmas[-1]) == 0.0
