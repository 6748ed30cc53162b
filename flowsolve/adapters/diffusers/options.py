r"""Which options each of diffusers' schedulers has, and what they are by default.

A `scheduler_config.json` often carries options of other classes: `X.from_config(other.config)` keeps what X does not
know, for whatever class comes next, and saves it. SDXL's file names `EulerDiscreteScheduler` and holds the
`set_alpha_to_one` and `skip_prk_steps` of a `PNDMScheduler`. The class that is named ignores them, and so they say
nothing: an option is read where the named class has it and nowhere else.

The table is of diffusers 0.42; what an installed version has beside it is added, and its defaults have precedence. So
an option of a class is read whatever version is installed, and without one. An option that no class is known to have
is left where it is.

`sigma_min` and `sigma_max` are parameters of few classes, but the Karras, exponential and beta levels of nearly all
that have such levels run between them where a configuration holds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from flowsolve._optional import require

__all__ = ["OPTIONS", "foreign", "options_of", "parameters"]

_TABLE = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", trained_betas=None,
    prediction_type="epsilon",
)  # fmt: skip
_LATENT = {**_TABLE, "beta_start": 0.00085, "beta_end": 0.012}
_SPACED = dict(timestep_spacing="linspace", steps_offset=0)
_LEADING = dict(timestep_spacing="leading", steps_offset=0)
_CLIP = dict(clip_sample=True, clip_sample_range=1.0)
_THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
_ZERO = dict(rescale_betas_zero_snr=False)
_FINAL = dict(final_sigmas_type="zero")
_LEVELS = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
_ENDS = dict(sigma_min=None, sigma_max=None)
_FLOW = dict(use_flow_sigmas=False, flow_shift=1.0)
_DYNAMIC = dict(use_dynamic_shifting=False, time_shift_type="exponential")
_DPM = dict(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True)
_LEARNED = dict(lambda_min_clipped=-float("inf"), variance_type=None)

_DDPM = {**_TABLE, **_LEADING, **_CLIP, **_THRESHOLD, **_ZERO, "variance_type": "fixed_small"}
_DDIM = {**_TABLE, **_LEADING, **_CLIP, **_THRESHOLD, **_ZERO, "set_alpha_to_one": True}
_VIDEO = {
    **_LATENT, **_LEADING, **_CLIP, **_ZERO, "beta_schedule": "scaled_linear", "set_alpha_to_one": True,
    "sample_max_value": 1.0, "snr_shift_scale": 3.0,
}  # fmt: skip
_DPMPP = {**_TABLE, **_SPACED, **_THRESHOLD, **_LEVELS, **_FLOW, **_DPM, **_LEARNED}
_SECOND = {**_LATENT, **_SPACED, **_LEVELS}
_EDM = dict(
    sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000,
    prediction_type="epsilon", rho=7.0, final_sigmas_type="zero",
)  # fmt: skip
_EDM_DPM = dict(solver_order=2, solver_type="midpoint", lower_order_final=True, euler_at_final=False)

OPTIONS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDIMInverseScheduler": {k: v for k, v in _DDIM.items() if k not in _THRESHOLD},
    "CogVideoXDDIMScheduler": _VIDEO,
    "CogVideoXDPMScheduler": _VIDEO,
    "PNDMScheduler": {**_TABLE, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "RePaintScheduler": {
        **{k: v for k, v in _TABLE.items() if k != "prediction_type"}, "eta": 0.0, "clip_sample": True,
    },
    "UnCLIPScheduler": {
        **_CLIP, "num_train_timesteps": 1000, "variance_type": "fixed_small_log", "prediction_type": "epsilon",
        "beta_schedule": "squaredcos_cap_v2",
    },
    "DEISMultistepScheduler": {
        **_TABLE, **_SPACED, **_THRESHOLD, **_LEVELS, **_FLOW, **_DPM, **_DYNAMIC, "algorithm_type": "deis",
        "solver_type": "logrho",
    },
    "DPMSolverMultistepScheduler": {
        **_DPMPP, **_FINAL, **_ZERO, **_DYNAMIC, "euler_at_final": False, "use_lu_lambdas": False,
    },
    "DPMSolverMultistepInverseScheduler": {**_DPMPP, "euler_at_final": False},
    "DPMSolverSinglestepScheduler": {
        **{k: v for k, v in _DPMPP.items() if k not in _SPACED}, **_FINAL, **_DYNAMIC, "lower_order_final": False,
    },
    "SASolverScheduler": {
        **_TABLE, **_SPACED, **_THRESHOLD, **_LEVELS, **_FLOW, **_LEARNED, "predictor_order": 2, "corrector_order": 2,
        "tau_func": None, "algorithm_type": "data_prediction", "lower_order_final": True,
    },
    "UniPCMultistepScheduler": {
        **_TABLE, **_SPACED, **_THRESHOLD, **_LEVELS, **_ENDS, **_FLOW, **_FINAL, **_ZERO, **_DYNAMIC,
        "solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True, "disable_corrector": [],
        "solver_p": None, "shift_terminal": None,
    },
    "EulerDiscreteScheduler": {
        **_TABLE, **_SPACED, **_LEVELS, **_ENDS, **_ZERO, **_FINAL, "interpolation_type": "linear",
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {**_TABLE, **_SPACED, **_ZERO},
    "LMSDiscreteScheduler": {**_TABLE, **_SPACED, **_LEVELS},
    "HeunDiscreteScheduler": {**_SECOND, **_CLIP, "clip_sample": False},
    "KDPM2DiscreteScheduler": _SECOND,
    "KDPM2AncestralDiscreteScheduler": _SECOND,
    "DPMSolverSDEScheduler": {**_SECOND, "noise_sampler_seed": None},
    "FlowMatchEulerDiscreteScheduler": {
        **_LEVELS, **_DYNAMIC, "num_train_timesteps": 1000, "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
        "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": dict(num_train_timesteps=1000, shift=1.0),
    "LTXEulerAncestralRFScheduler": dict(num_train_timesteps=1000, eta=1.0, s_noise=1.0),
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {**_EDM, **_EDM_DPM, **_THRESHOLD, "algorithm_type": "dpmsolver++"},
    "CosineDPMSolverMultistepScheduler": {
        **_EDM, **_EDM_DPM, "sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0, "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
    },
    "ScoreSdeVeScheduler": dict(
        num_train_timesteps=2000, snr=0.15, sigma_min=0.01, sigma_max=1348.0, sampling_eps=1e-5, correct_steps=1,
    ),
    "DDPMWuerstchenScheduler": dict(scaler=1.0, s=0.008),
    "ScoreSdeVpScheduler": dict(num_train_timesteps=2000, beta_min=0.1, beta_max=20, sampling_eps=1e-3),
    "IPNDMScheduler": dict(num_train_timesteps=1000, trained_betas=None),
}  # fmt: skip
"""The parameters of each class, with their defaults."""


TO_THE_TABLE = ("DPMSolverSDEScheduler", "LMSDiscreteScheduler")
"""Classes whose Karras levels run between those of the table, whatever ends are given."""


def options_of(name: str) -> dict[str, Any]:
    """The options of a scheduler's class with their defaults: those of the installed diffusers and of the table."""
    return {**OPTIONS.get(name, {}), **parameters(name)}


def parameters(name: str) -> Mapping[str, Any]:
    """The options of a class as the installed diffusers has them; empty where it has no such class, or is missing."""
    try:
        library = require("diffusers", "diffusers", "reading a diffusers scheduler")
    except ImportError:
        return {}
    kind = getattr(library.schedulers, name, None)
    return {} if kind is None else _signature(kind)


@cache
def _signature(kind: type[Any]) -> Mapping[str, Any]:
    known = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in known if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def foreign(config: Mapping[str, Any], name: str) -> list[str]:
    """The options in a configuration that other classes have and the named one has not."""
    own = {*options_of(name)}
    if own & _LEVELS.keys() and not (name in TO_THE_TABLE and config.get("use_karras_sigmas")):
        own |= _ENDS.keys()
    if (
        name == "LTXEulerAncestralRFScheduler"
    ):  # which has a FlowMatchEuler of the same configuration lay out its levels
        own |= options_of("FlowMatchEulerDiscreteScheduler").keys()
    others = {option for kind in OPTIONS for option in OPTIONS[kind]}
    return [k for k in config if k in others and k not in own]
