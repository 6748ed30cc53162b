"""Options of other classes, as chains of `from_config` carry them along, say nothing: neither here nor in diffusers."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsolve import solvers
from flowsolve.adapters.diffusers.convention import SUPPORTED, TABLE_SCHEDULERS
from flowsolve.adapters.diffusers.options import OPTIONS, foreign, options_of

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler  # noqa: E402
from flowsolve.adapters.diffusers.layout import OWN, lay  # noqa: E402
from flowsolve.adapters.diffusers.reading import read  # noqa: E402

STEPS = 6
CHANGED: dict[str, Any] = {
    "num_train_timesteps": 500, "beta_start": 0.002, "beta_end": 0.03, "beta_schedule": "scaled_linear",
    "trained_betas": [0.01] * 1000, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    "steps_offset": 1, "clip_sample": True, "clip_sample_range": 0.5, "thresholding": True,
    "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5, "rescale_betas_zero_snr": True,
    "final_sigmas_type": "sigma_min", "use_karras_sigmas": True, "use_exponential_sigmas": True,
    "use_beta_sigmas": True, "use_lu_lambdas": True, "use_flow_sigmas": True, "flow_shift": 3.0,
    "use_dynamic_shifting": True, "time_shift_type": "linear", "solver_order": 3, "algorithm_type": "dpmsolver",
    "solver_type": "heun", "lower_order_final": False, "euler_at_final": True, "lambda_min_clipped": -4.0,
    "variance_type": "learned_range", "set_alpha_to_one": False, "skip_prk_steps": True, "snr_shift_scale": 2.0,
    "eta": 0.5, "predictor_order": 3, "corrector_order": 3, "tau_func": "constant", "predict_x0": False,
    "disable_corrector": [0], "solver_p": "ddim", "shift_terminal": 0.1, "sigma_min": 0.05, "sigma_max": 9.0,
    "interpolation_type": "log_linear", "timestep_type": "continuous", "noise_sampler_seed": 1, "shift": 3.0,
    "base_shift": 0.1, "max_shift": 2.0, "base_image_seq_len": 64, "max_image_seq_len": 128, "invert_sigmas": True,
    "stochastic_sampling": True, "s_noise": 0.5, "sigma_data": 2.0, "sigma_schedule": "exponential", "rho": 3.0,
    "snr": 0.3, "sampling_eps": 0.01, "correct_steps": 2, "scaler": 2.0, "s": 0.02, "beta_min": 0.2, "beta_max": 10.0,
}  # fmt: skip
"""For each option a value that is not the default of the classes that have it, or of most of them."""
NAMES = [n for n in SUPPORTED if n not in ("ScoreSdeVpScheduler", "DDPMWuerstchenScheduler")]  # refused in pipelines


@cache
def seen(name: str, *carried: str) -> tuple[Any, ...]:
    """All that is read from a configuration: path, output, limits, and for three solvers levels, times and end."""
    config = {"_class_name": name, **{k: CHANGED[k] for k in carried}}
    found: list[Any] = []
    for solver in ("ddim", "unipc", "heun"):
        s = Scheduler.from_config(config, solver=solver)
        s.set_timesteps(STEPS)
        found += [s.timesteps.tolist(), s.sigmas.tolist(), s.init_noise_sigma, repr(s.solver), s._table.plan.closing]
    plan = lay(s.reading, solvers.DDIM(), like=OWN, steps=STEPS)
    found += [repr(s.reading.path), s.reading.flow.prediction, repr(s.reading.limit), plan.times, plan.end, plan.start]
    return tuple(found)


def theirs(name: str, carried: list[str]) -> tuple[Tensor, Tensor]:
    """The time steps and the noise levels of the class itself, and what it makes of a sample."""
    config = {"_class_name": name, **{k: CHANGED[k] for k in carried}}
    made = getattr(diffusers, name).from_config(config)
    if name == "ScoreSdeVeScheduler":
        made.set_sigmas(STEPS)
        return made.timesteps, made.discrete_sigmas
    made.set_timesteps(STEPS, **({"jump_length": 100} if name == "RePaintScheduler" else {}))
    return made.timesteps, torch.as_tensor(getattr(made, "sigmas", getattr(made, "alphas_cumprod", 0.0)))


def test_every_option_has_another_value_here() -> None:
    assert CHANGED.keys() == {k for name in OPTIONS for k in OPTIONS[name]}
    varied = (
        "beta_schedule",
        "clip_sample",
        "lower_order_final",
        "prediction_type",
        "set_alpha_to_one",
        "sigma_schedule",
    )
    for name, options in OPTIONS.items():
        assert not [k for k, v in options.items() if v == CHANGED[k] and k not in varied], name


@pytest.mark.parametrize("name", NAMES)
def test_options_of_other_classes_change_nothing(name: str) -> None:
    """One by one and all together, for us and for the class itself."""
    strange = [k for k in CHANGED if k not in options_of(name) and k in foreign(CHANGED, name)]
    assert strange
    plain = seen(name)
    for option in strange:
        assert seen(name, option) == plain, option
    assert seen(name, *strange) == plain
    if not hasattr(diffusers, name):
        return
    for with_them, without in zip(theirs(name, strange), theirs(name, []), strict=True):
        assert torch.equal(with_them, without)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ScoreSdeVeScheduler"])  # its network is told σ
def test_nodes_are_those_of_the_class_whatever_is_carried_along(name: str) -> None:
    """Every time that we ask at is one of the class's list, which may have stages, and whole numbers for others."""
    if not hasattr(diffusers, name) or "Inverse" in name:
        pytest.skip(f"{name} is not in this diffusers, or lists its times from the data on")
    strange = foreign(CHANGED, name)
    s = Scheduler.from_config({"_class_name": name, **{k: CHANGED[k] for k in strange}}, solver="ddim")
    plan = lay(s.reading, solvers.DDIM(), like=OWN, steps=STEPS)
    listed = theirs(name, strange)[0].double()
    near = 1.0 + 1e-6 if s.reading.said.precondition is None and float(listed.max()) > 1.0 else 1e-4
    for t in plan.times:
        assert float((listed - float(s.reading.flow.clock(t))).abs().min()) < near
    assert len(set(plan.times)) == len(plan.times) >= STEPS - 1


@pytest.mark.parametrize("name", NAMES)
def test_options_of_a_class_are_read(name: str) -> None:
    """The sweep can tell: an option that matters to the levels does so in the class that has it."""
    matter = ("final_sigmas_type", "set_alpha_to_one", "use_karras_sigmas", "thresholding", "shift", "prediction_type")
    had = [k for k in matter if k in options_of(name) and options_of(name)[k] != CHANGED[k]]
    above = ("steps_offset",) if "set_alpha_to_one" in had else ()  # the lowest entry is not among the steps then
    for option in had:
        assert seen(name, option, *above) != seen(name, *above), option


@pytest.mark.parametrize("kind", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", [n for n in TABLE_SCHEDULERS if "use_karras_sigmas" in OPTIONS[n]])
def test_ends_of_levels_are_read_where_the_class_reads_them(name: str, kind: str) -> None:
    """sigma_min and sigma_max are parameters of few classes; such levels run between them in most all the same."""
    if kind == "use_beta_sigmas":
        pytest.importorskip("scipy")
    config = {"_class_name": name, "sigma_min": 0.05, "sigma_max": 9.0, kind: True}
    made = getattr(diffusers, name).from_config(config)
    made.set_timesteps(STEPS)
    s = Scheduler.from_config(config, solver="ddim")
    plan = lay(s.reading, solvers.DDIM(), like=OWN, steps=STEPS)
    theirs = made.sigmas.double()
    theirs = theirs[theirs > 0.0]
    if name in ("DPMSolverSDEScheduler", "LMSDiscreteScheduler") and kind == "use_karras_sigmas":
        assert float(theirs[0]) == pytest.approx(float((1.0 / made.alphas_cumprod[-1] - 1.0).sqrt()), rel=1e-3)
    else:
        assert float(theirs[0]) == pytest.approx(9.0, rel=1e-5)
    for point in plan.points:  # every level of ours is one of theirs, which may have others between
        level = point.sigma / point.alpha
        assert float((theirs / level).log().abs().min()) < 1e-3


SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip


@pytest.mark.parametrize("solver", ["euler", "ddim", "unipc", "dpmsolver++", "heun", "auto"])
def test_stable_diffusion_xl_as_published_ends_in_clean_data(solver: str) -> None:
    """Its file holds PNDM's set_alpha_to_one = false under a class that has no such option."""
    s = Scheduler.from_config(SDXL, solver=solver)
    s.set_timesteps(8)
    assert float(s.sigmas[-1]) == 0.0
    assert s.config["set_alpha_to_one"] is False  # it is carried along here as well
    assert diffusers.DDIMScheduler.from_config(s.config).config.set_alpha_to_one is False


def test_a_change_of_an_option_that_the_class_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match=r"'set_alpha_to_one' is no option of .* or of EulerDiscreteScheduler"):
        Scheduler.from_config(SDXL, set_alpha_to_one=True)


def test_the_table_is_that_of_diffusers() -> None:
    """What the installed version has is in the table, unless it is newer; none is called what it is not."""
    for name in OPTIONS:
        kind = getattr(diffusers.schedulers, name, None)
        if kind is None:
            continue
        held = {p for p in inspect.signature(kind.__init__).parameters if p not in ("self", "kwargs")}
        if tuple(int(v) for v in diffusers.__version__.split(".")[:2]) == (0, 42):
            assert OPTIONS[name] == options_of(name)
            assert held == OPTIONS[name].keys()
        assert options_of(name).keys() >= held


def test_predict_epsilon_of_old_configurations() -> None:
    """Until diffusers 0.10 predict_epsilon = false said that the network gives the data; today's classes ignore it."""
    old = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "predict_epsilon": False}
    assert read(old).flow.prediction.name == "data"
    assert read({**old, "predict_epsilon": True}).flow.prediction.name == "noise"
    assert read({**old, "prediction_type": "sample"}).flow.prediction.name == "data"
    held = diffusers.DDPMScheduler.from_config(old)  # which fills in prediction_type = epsilon, and notes that
    assert held.config.prediction_type == "epsilon"
    for config in (held, held.config):
        made = Scheduler.from_config(config, solver="ddim")
        assert made.reading.flow.prediction.name == "data"
        assert Scheduler.from_config(made.config).reading.flow.prediction.name == "data"
    with pytest.raises(ValueError, match=r"predict_epsilon = False .*prediction_type = 'epsilon' contradict"):
        read({**old, "prediction_type": "epsilon"})
