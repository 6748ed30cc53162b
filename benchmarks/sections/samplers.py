r"""The samplers of diffusers and k-diffusion, each behind one call, with the network calls they make counted.

A sampler is driven as its users drive it: diffusers' schedulers by `set_timesteps`, `scale_model_input` and `step`,
k-diffusion's functions with a denoiser and a list of σ. In three things they are given more than their users get:

* the network is asked at the noise level of the scheduler's own `sigmas`, not at the whole number that many schedulers
  round or truncate it to (without this, flow-matching variants could not get below 1e-3);
* σ's own ends are the path's: the table's, and for CondOT 1 − t from 0.999 (diffusers) or 0.9985 on (k-diffusion, σ/α =
  666; its users' 80 are tried too);
* a sampler that would stop at σ_min (`dpm_fast`) gets an estimate there, out of its budget, like all the others; and
  UniPC with B(h) = h, or on ε̂, whose last step is NaN, ends with its last estimate, as UniPC with the other B(h) does.

A sampler that costs several evaluations a step takes as many steps as fit. A crash is recorded as one.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as File
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.paths import Discrete

__all__ = ["Ask", "Peer", "absent", "peers", "versions"]

LIBRARIES = ("diffusers", "k-diffusion")


class Ask:
    """A flow that is asked for the clean data at (x, noise level), and counts.

    Attributes:
        calls: network calls so far.
    """

    def __init__(self, flow: Flow, dtype: torch.dtype) -> None:
        self.flow, self.dtype, self.calls = flow, dtype, 0

    def at(self, x: Tensor, t: float) -> Any:
        """The estimate at flow time t."""
        self.calls += 1
        return self.flow.estimate(x.to(self.dtype), min(t, self.flow.path.window[1]))

    def time(self, ratio: float) -> float:
        """The flow time at which σ/α is `ratio`."""
        if ratio <= 0.0:
            return 1.0
        return 0.0 if math.isinf(ratio) else self.flow.path.time(-math.log(ratio))


@dataclass(frozen=True)
class Peer:
    """A sampler on a grid.

    Attributes:
        library: where it comes from.
        sampler: its name.
        grid: the grid's name.
        run: (ask, start, nfe) → the data, at most nfe calls.
    """

    library: str
    sampler: str
    grid: str
    run: Callable[[Ask, Tensor, int], Tensor] = field(compare=False)

    @property
    def name(self) -> str:
        """library sampler | grid."""
        return f"{self.library} {self.sampler} | {self.grid}"


def peers(flow: Flow) -> list[Peer]:
    """All samplers × grids that can run on a flow: one with a discrete table, or on the straight path."""
    table = isinstance(flow.path, Discrete)
    found = []
    if "diffusers" not in absent():
        found += _table_schedulers(flow) if table else _flow_schedulers()
    if "k-diffusion" not in absent():
        found += _k_diffusion(flow)
    return found


@cache
def absent() -> tuple[str, ...]:
    """The libraries that are not installed."""
    return tuple(name for name in LIBRARIES if (_diffusers() if name == "diffusers" else k_diffusion()) is None)


def versions() -> dict[str, str]:
    """Versions of those that are."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _diffusers() -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("diffusers")
    except ImportError:
        return None


@cache
def k_diffusion() -> ModuleType | None:
    """k-diffusion's module of samplers, without the rest of the package and what that needs."""
    home = importlib.util.find_spec("k_diffusion")
    if home is None or home.origin is None:
        return None
    folder = File(home.origin).parent
    package, utils = ModuleType("_k_diffusion"), ModuleType("_k_diffusion.utils")
    package.__path__ = [str(folder)]
    utils.append_dims = _append_dims  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules.update({"_k_diffusion": package, "_k_diffusion.utils": utils})
    try:
        return importlib.import_module("_k_diffusion.sampling")
    except ImportError:
        return None


def _append_dims(x: Tensor, dims: int) -> Tensor:
    return x.reshape(*x.shape, *[1] * (dims - x.ndim))


# diffusers: table


def _table_schedulers(flow: Flow) -> list[Peer]:
    assert isinstance(flow.path, Discrete)
    bar = torch.tensor(flow.path.alphas_cumprod, dtype=torch.float64)
    betas = torch.cat([1.0 - bar[:1], 1.0 - bar[1:] / bar[:-1]]).numpy()
    base: dict[str, Any] = {"trained_betas": betas}
    named: dict[str, dict[str, Any]] = {
        "linspace": {"timestep_spacing": "linspace"},
        "trailing": {"timestep_spacing": "trailing"},
        "leading": {"timestep_spacing": "leading"},
        "karras": {"use_karras_sigmas": True},
        "exponential": {"use_exponential_sigmas": True},
        "beta": {"use_beta_sigmas": True},
        "lu": {"use_lu_lambdas": True},
        "default": {},
    }
    spaced = ("linspace", "trailing", "karras", "exponential", "beta")
    plain = {"set_alpha_to_one": True, "clip_sample": False}
    quiet = {"tau_func": _no_noise}
    dpm, unipc, deis = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
    single, sa = "DPMSolverSinglestepScheduler", "SASolverScheduler"
    rows: list[tuple[str, str, dict[str, Any], tuple[str, ...], Callable[[int], int]]] = [
        ("DDIM", "DDIMScheduler", plain, ("trailing", "leading"), _one),
        (
            "PNDM",
            "PNDMScheduler",
            {"set_alpha_to_one": True, "skip_prk_steps": True},
            ("leading", "trailing"),
            _less_one,
        ),
        ("Euler", "EulerDiscreteScheduler", {}, ("trailing", "karras"), _one),
        ("Heun", "HeunDiscreteScheduler", {}, ("linspace", "karras"), _pairs),
        ("LMS", "LMSDiscreteScheduler", {}, ("linspace", "karras"), _one),
        ("DPM++2M", dpm, {"solver_order": 2}, (*spaced, "leading", "lu"), _one),
        ("DPM++2M heun", dpm, {"solver_order": 2, "solver_type": "heun"}, ("linspace", "karras", "lu"), _one),
        ("DPM++3M", dpm, {"solver_order": 3}, ("linspace", "trailing", "karras", "lu"), _one),
        ("DPM++2S", single, {"solver_order": 2, "lower_order_final": True}, ("default", "karras"), _one),
        ("DPM++3S", single, {"solver_order": 3, "lower_order_final": True}, ("default", "karras"), _one),
        ("UniPC2 bh2", unipc, {"solver_order": 2}, (*spaced, "leading"), _one),
        ("UniPC2 bh1", unipc, {"solver_order": 2, "solver_type": "bh1"}, ("linspace", "karras"), _one),
        ("UniPC3 bh2", unipc, {"solver_order": 3}, (*spaced, "leading"), _one),
        ("UniPC3 bh1", unipc, {"solver_order": 3, "solver_type": "bh1"}, ("linspace", "karras"), _one),
        ("UniPC3 noise", unipc, {"solver_order": 3, "predict_x0": False}, ("linspace", "karras"), _one),
        ("DEIS2", deis, {"solver_order": 2}, ("linspace", "karras"), _one),
        ("DEIS3", deis, {"solver_order": 3}, spaced, _one),
        ("SA-Solver3-4 τ=0", sa, {"predictor_order": 3, "corrector_order": 4, **quiet}, ("linspace", "karras"), _one),
    ]
    return [
        Peer(
            "diffusers",
            name,
            grid,
            _Scheduled(kind, {**base, **options, **named[grid]}, steps, closed=_breaks(options)),
        )
        for name, kind, options, spacings, steps in rows
        for grid in spacings
    ]


def _breaks(options: dict[str, Any]) -> bool:
    """UniPC with B(h) = h, or on ε̂, divides infinities in a step to σ = 0."""
    return options.get("solver_type") == "bh1" or options.get("predict_x0") is False


def _no_noise(t: Any) -> float:
    return 0.0


def _one(nfe: int) -> int:
    return nfe


def _less_one(nfe: int) -> int:
    return nfe - 1


def _pairs(nfe: int) -> int:
    return (nfe + 1) // 2


@dataclass(frozen=True)
class _Scheduled:
    """A solve by a diffusers scheduler, noise prediction on a table or velocity on the straight path.

    Attributes:
        kind: the scheduler's class.
        options: its configuration.
        steps: how many it is to make of a budget.
        sigmas: gives its noise levels, for schedulers that take them.
        closed: take the last estimate as the result, which the scheduler's own last step, to σ = 0, makes NaN.
    """

    kind: str
    options: dict[str, Any]
    steps: Callable[[int], int]
    sigmas: Callable[[int], list[float]] | None = None
    closed: bool = False

    def __call__(self, ask: Ask, start: Tensor, nfe: int) -> Tensor:
        scheduler = getattr(_diffusers(), self.kind)(**self.options)
        table, n = isinstance(ask.flow.path, Discrete), self.steps(nfe)
        if self.sigmas is None:
            scheduler.set_timesteps(n)
        else:
            scheduler.set_timesteps(sigmas=self.sigmas(n))
        x = start * float(scheduler.init_noise_sigma) if table else start
        for i, step in enumerate(scheduler.timesteps):
            held = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
            estimate = ask.at(held, self._time(ask, scheduler, i, step, table))
            if self.closed and i == len(scheduler.timesteps) - 1:
                return estimate.data  # type: ignore[no-any-return]
            out = estimate.noise if table else estimate.combine(-1.0, 1.0)
            x = scheduler.step(out.to(x), step, x, return_dict=False)[0].to(x)
        return x

    @staticmethod
    def _time(ask: Ask, scheduler: Any, i: int, step: Any, table: bool) -> float:
        if not hasattr(scheduler, "sigmas"):
            return ask.flow.path.time_from_native(float(step))
        sigma = float(scheduler.sigmas[i])
        return ask.time(sigma) if table else 1.0 - sigma


# diffusers: flow matching


def _flow_schedulers() -> list[Peer]:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    dpm, unipc, deis = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
    single, sa = "DPMSolverSinglestepScheduler", "SASolverScheduler"
    found = []
    for grid, options, sigmas in (
        ("1 … 1/1000", {}, None),
        ("1 … 1/N", {}, _even),
        ("shift 3", {"shift": 3.0}, None),
        ("karras", {"use_karras_sigmas": True}, None),
        ("exponential", {"use_exponential_sigmas": True}, None),
        ("beta", {"use_beta_sigmas": True}, None),
    ):
        run = _Scheduled("FlowMatchEulerDiscreteScheduler", options, _one, sigmas)
        found.append(Peer("diffusers", "FlowMatchEuler", grid, run))
    for grid, options in (("1 … 1/1000", {}), ("shift 3", {"shift": 3.0})):
        run = _Scheduled("FlowMatchHeunDiscreteScheduler", options, _pairs)
        found.append(Peer("diffusers", "FlowMatchHeun", grid, run))
    last = {"lower_order_final": True}
    for name, kind, options in (
        ("DPM++2M", dpm, {"solver_order": 2}),
        ("DPM++2M heun", dpm, {"solver_order": 2, "solver_type": "heun"}),
        ("DPM++3M", dpm, {"solver_order": 3}),
        ("DPM++2S", single, {"solver_order": 2, **last}),
        ("DPM++3S", single, {"solver_order": 3, **last}),
        ("UniPC2 bh2", unipc, {"solver_order": 2}),
        ("UniPC2 bh1", unipc, {"solver_order": 2, "solver_type": "bh1"}),
        ("UniPC3 bh2", unipc, {"solver_order": 3}),
        ("UniPC3 bh1", unipc, {"solver_order": 3, "solver_type": "bh1"}),
        ("DEIS2", deis, {"solver_order": 2}),
        ("DEIS3", deis, {"solver_order": 3}),
        ("SA-Solver3-4 τ=0", sa, {"predictor_order": 3, "corrector_order": 4, "tau_func": _no_noise}),
    ):
        for shift in (1.0, 3.0):
            run = _Scheduled(kind, {**flow, **options, "flow_shift": shift}, _one, closed=_breaks(options))
            found.append(Peer("diffusers", name, f"flow, shift {shift:g}", run))
    return found


def _even(n: int) -> list[float]:
    return [1.0 - i / n for i in range(n)]


# k-diffusion


def _k_diffusion(flow: Flow) -> list[Peer]:
    path = flow.path
    table = isinstance(path, Discrete)
    low = math.exp(-path.log_snr(path.window[1])) if table else 1.5e-3
    high = math.exp(-path.log_snr(0.0)) if table else 666.0

    def karras(top: float) -> Callable[[int], Tensor]:
        return lambda n: _module().get_sigmas_karras(n, low, top)

    def exponential(top: float) -> Callable[[int], Tensor]:
        return lambda n: _module().get_sigmas_exponential(n, low, top)

    def uniform(n: int) -> Tensor:
        first, last = path.time(-math.log(high)), path.time(-math.log(low))
        times = [first + (last - first) * i / max(n - 1, 1) for i in range(n)]
        return torch.tensor([math.exp(-path.log_snr(t)) for t in times] + [0.0])

    grids = {"karras": karras(high), "exponential": exponential(high), "uniform": uniform}
    if not table:
        grids["karras 80"], grids["exponential 80"] = karras(80.0), exponential(80.0)
    some = ("karras", "exponential", *(() if table else ("karras 80", "exponential 80")))
    rows: list[tuple[str, dict[str, Any], tuple[str, ...], Callable[[int], int]]] = [
        ("euler", {}, ("karras", "uniform"), _one),
        ("heun", {}, (*some, "uniform"), _pairs),
        ("dpm_2", {}, (*some,), _pairs),
        ("lms", {}, tuple(grids), _one),
        ("dpmpp_2m", {}, tuple(grids), _one),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, (*some,), _pairs),
        ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, (*some,), _one),
        ("dpmpp_3m_sde", {"eta": 0.0}, tuple(grids), _one),
    ]
    found = [
        Peer("k-diffusion", name, grid, _Sampled(f"sample_{name}", options, grids[grid], steps))
        for name, options, spacings, steps in rows
        for grid in spacings
    ]
    return [*found, Peer("k-diffusion", "dpm_fast", "exponential", _Fast(low, high))]


def _module() -> Any:
    return k_diffusion()


def _denoiser(ask: Ask) -> Callable[..., Tensor]:
    """What k-diffusion calls: (x/α, σ/α) → ẑ."""

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        t = ask.time(float(sigma.flatten()[0]))
        point = ask.flow.path.at(min(t, ask.flow.path.window[1]))
        return ask.at(x * point.alpha, t).data.to(x)  # type: ignore[no-any-return]

    return model


def _scaled(ask: Ask, start: Tensor, sigma: float) -> Tensor:
    """The start in k-diffusion's scale: x/α at the first σ/α, x = noise times the path's σ."""
    point = ask.flow.path.at(ask.time(sigma))
    whole = 1.0 if isinstance(ask.flow.path, Discrete) else point.sigma
    return start * (whole / point.alpha)


@dataclass(frozen=True)
class _Sampled:
    function: str
    options: dict[str, Any]
    sigmas: Callable[[int], Tensor]
    steps: Callable[[int], int]

    def __call__(self, ask: Ask, start: Tensor, nfe: int) -> Tensor:
        sigmas = self.sigmas(self.steps(nfe)).to(start)
        sample = getattr(_module(), self.function)
        extra = {"noise_sampler": lambda *_: 0.0} if "eta" in self.options else {}
        x = _scaled(ask, start, float(sigmas[0]))
        return sample(_denoiser(ask), x, sigmas, disable=True, **self.options, **extra)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Fast:
    low: float
    high: float

    def __call__(self, ask: Ask, start: Tensor, nfe: int) -> Tensor:
        model = _denoiser(ask)
        x = _module().sample_dpm_fast(
            model, _scaled(ask, start, self.high), self.low, self.high, nfe - 1, disable=True, eta=0.0
        )
        return model(x, torch.tensor([self.low], dtype=x.dtype))
