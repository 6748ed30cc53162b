r"""diffusers' schedulers and ours, step for step, in float64.

Levels are those that a scheduler lists for itself, but for methods that two libraries share only on special ones: the
single-step solvers (their stages are entries of the list, ours halves and thirds of a step in λ) and SA-Solver.

Schedulers end where they are told to: at σ = 0, where the last step is of order 1, or at the table's lowest level.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.paths import CondOT
from flowsolve.solvers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LMS,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPS,
    Euler,
    ExactSDE,
    Heun,
    Multistep,
    SASolver,
    SDEDPMSolverPP,
    SingleStep,
    Solver,
    UniPC,
)  # fmt: skip
from flowsolve.solvers.injection import Ancestral
from flowsolve.solvers.singlestep import Scheme
from tests.peers.harness import (
    PROBLEM,
    carried,
    denoised,
    deviation,
    diffusers_levels,
    diffusers_solve,
    distinct,
    edm_solve,
    eps,
    even,
    in_double,
    karras,
    listed,
    normal,
    ours,
    start,
    xi,
)  # fmt: skip

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # algorithms it would rather not have

Case = tuple[str, dict[str, Any], Solver, str | None]
MULTI, UNI = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
TABLE = {"final_sigmas_type": "sigma_min"}
FULL: dict[str, Any] = {"lower_order_final": False, **TABLE}
RULES = {"midpoint": "bh2", "heun": "exact"}
FORMS = {True: "data", False: "noise"}

PLAIN: list[Case] = [
    *(("DDIMScheduler", {"clip_sample": False, "step_options": {"eta": e}}, DDIM(e), None) for e in (0.0, 0.5, 1.0)),
    ("DDPMScheduler", {"clip_sample": False}, DDPM(), None),
    ("EulerDiscreteScheduler", {}, Euler(), "noise"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, Euler(), "noise"),
    ("EulerAncestralDiscreteScheduler", {}, DDPM(), None),
    ("EulerAncestralDiscreteScheduler", {}, Ancestral(Euler()), "straight"),
    ("LMSDiscreteScheduler", {}, LMS(4), None),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}, LMS(4), None),
]  # fmt: skip
STAGED: list[Case] = [
    ("HeunDiscreteScheduler", {}, Heun(), "noise"),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, Heun(), "noise"),
    ("KDPM2DiscreteScheduler", {}, DPMSolver(2), None),
    ("KDPM2AncestralDiscreteScheduler", {}, Ancestral(DPMSolver(2)), None),
]  # fmt: skip
DPM: list[Case] = [
    case
    for k in (1, 2)
    for kind, rule in RULES.items()
    for case in (
        (MULTI, {"solver_order": k, "solver_type": kind, "use_karras_sigmas": True}, DPMSolverPP(k, rule=rule), None),
        (MULTI, {"solver_order": k, "solver_type": kind, **TABLE}, DPMSolverPP(k, rule=rule), None),
        (
            MULTI, {"solver_order": k, "solver_type": kind, "algorithm_type": "dpmsolver", **TABLE},
            Multistep(k, "noise", rule=rule), None,
        ),
        (
            MULTI, {"solver_order": k, "solver_type": kind, "algorithm_type": "sde-dpmsolver++", **TABLE},
            SDEDPMSolverPP(k, rule=rule), None,
        ),
        (
            MULTI,
            {"solver_order": k, "solver_type": kind, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            SDEDPMSolverPP(k, rule=rule), None,
        ),
        (
            MULTI, {"solver_order": k, "solver_type": kind, "algorithm_type": "sde-dpmsolver", **TABLE},
            Multistep(k, "noise", eta=1.0, rule=rule), None,
        ),
    )
]  # fmt: skip
DPM += [(MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, **TABLE}, ExactSDE(1.0), None)]
UNIPC: list[Case] = [
    (
        UNI, {"solver_order": k, "solver_type": rule, "predict_x0": data, **FULL},
        UniPC(k, form=FORMS[data], rule=rule), None,
    )
    for k in (1, 2, 3)
    for rule in ("bh1", "bh2")
    for data in (True, False)
]  # fmt: skip
UNIPC += [(UNI, {"solver_order": k, "use_karras_sigmas": True}, UniPC(k, cooldown=True), None) for k in (1, 2, 3)]
UNIPC += [
    (UNI, {"solver_order": k, "disable_corrector": list(range(99)), **FULL}, Multistep(k, rule="bh2"), None)
    for k in (2, 3)
]
ADAMS: list[Case] = [
    ("DEISMultistepScheduler", {"solver_order": k, "lower_order_final": False}, DEIS(k), None) for k in (1, 2, 3)
]


def compare(name: str, config: dict[str, Any], solver: Solver, theirs: Tensor, found: Tensor) -> None:
    off = deviation(found, theirs)
    shown = {k: v for k, v in config.items() if k not in ("levels", "clip_sample", "disable_corrector")}
    print(f"PEER {name:32} {shown!s:100.100} {solver!r:60.60} {off:.1e}")
    assert off < 1e-11


@pytest.mark.parametrize(("name", "config", "solver", "chart"), [*PLAIN, *DPM, *UNIPC, *ADAMS])
def test_one_evaluation_a_step(name: str, config: dict[str, Any], solver: Solver, chart: str | None) -> None:
    levels, theirs = diffusers_solve(name, 20, **config)
    assert len(levels) == 21
    compare(name, config, solver, theirs, ours(solver, levels, chart=chart))


@pytest.mark.parametrize(("name", "config", "solver", "chart"), STAGED)
def test_steps_with_stages(name: str, config: dict[str, Any], solver: Solver, chart: str | None) -> None:
    levels, theirs = diffusers_solve(name, 20, **config)
    compare(name, config, solver, theirs, ours(solver, levels[:-1], chart=chart, final="denoise"))


FEW: list[Case] = [
    (MULTI, {"lower_order_final": False}, DPMSolverPP(2), None),
    (MULTI, {"lower_order_final": False, "use_karras_sigmas": True}, DPMSolverPP(2), None),
    (UNI, {"solver_order": 3, "use_karras_sigmas": True}, UniPC(3, cooldown=True), None),
    ("DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, DEIS(3), None),
]


@pytest.mark.parametrize("steps", [3, 5, 8])
@pytest.mark.parametrize(("name", "config", "solver", "chart"), FEW)
def test_few_steps(name: str, config: dict[str, Any], solver: Solver, chart: str | None, steps: int) -> None:
    levels, theirs = diffusers_solve(name, steps, **config)
    compare(name, config, solver, theirs, ours(solver, levels, chart=chart))


def test_lower_orders_in_the_last_steps() -> None:
    """With fewer than 15 steps diffusers lets the order fall; UniPC's always does, and is above."""
    config = {"solver_order": 2, **TABLE}
    levels, theirs = diffusers_solve(MULTI, 10, **config)
    compare(MULTI, config, DPMSolverPP(2), theirs, ours(DPMSolverPP(2, cooldown=True), levels))
    assert deviation(ours(DPMSolverPP(2), levels), theirs) > 1e-6


class ThreeNodes(SingleStep):
    """3S with all three of its nodes in the step."""

    @property
    def scheme(self) -> Scheme:
        return Scheme(((1 / 3, (0,)), (2 / 3, (1, 0))), (2, 1, 0))


SINGLE = [
    *((1, kind, SingleStep(1, form)) for kind in RULES for form in ("data", "noise")),
    *((2, kind, SingleStep(2, form, rule=rule)) for kind, rule in RULES.items() for form in ("data", "noise")),
    *((3, "heun", ThreeNodes(3, form)) for form in ("data", "noise")),
]


@pytest.mark.parametrize(("order", "kind", "solver"), SINGLE)
def test_single_steps(order: int, kind: str, solver: SingleStep) -> None:
    """On levels even in λ, of which ours sees every second or third."""
    levels, name = even(12), "DPMSolverSinglestepScheduler"
    algorithm = "dpmsolver++" if solver.form == "data" else "dpmsolver"
    config = {"solver_order": order, "solver_type": kind, "algorithm_type": algorithm, **FULL}
    _, theirs = diffusers_solve(name, 12, levels=levels, **config)
    compare(name, config, solver, theirs, ours(solver, levels[::order]))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 2), (2, 2), (2, 3), (3, 2), (3, 3), (3, 4)])
def test_sa_solver(tau: float, predictor: int, corrector: int) -> None:
    """Its corrector's order counts the end of the step. Its weights for two nodes are those of "bh1"."""
    config = {"predictor_order": predictor, "corrector_order": corrector, "lower_order_final": False}
    levels, name = even(12), "SASolverScheduler"
    options = {"algorithm_type": "data_prediction", "tau_func": lambda t: tau}
    _, theirs = diffusers_solve(name, 12, levels=levels, **config, **options)
    solver = SASolver(predictor, corrector=corrector - 1, rule="bh1", tau=tau, between=(0.0, math.inf))
    compare(name, {**config, "tau": tau}, solver, theirs, ours(solver, levels))


def test_ipndm() -> None:
    """Its model is a v-prediction on its own table, replaced here, because its own starts at α = 0."""
    cls, levels = diffusers.IPNDMScheduler, karras(12)
    roots = [1.0 / math.sqrt(1.0 + v * v) for v in levels]
    with in_double(cls, lambda: torch.zeros(())):
        s = cls()
        s.set_timesteps(12)
        s.alphas = torch.tensor(roots, dtype=torch.float64)
        s.betas = torch.tensor([a * v for a, v in zip(roots, levels, strict=True)], dtype=torch.float64)
        x = start(levels[0]) * roots[0]
        for a, level, t in zip(roots, levels, s.timesteps, strict=False):
            v = a * eps(x / a, level) - a * level * denoised(x / a, level)
            x = s.step(v, t, x).prev_sample
    compare("IPNDMScheduler", {}, IPNDM(4), x, ours(IPNDM(4), levels))


EDMS: list[Case] = [
    ("EDMEulerScheduler", {}, Euler(), "noise"),
    ("EDMDPMSolverMultistepScheduler", {}, DPMSolverPP(2), None),
    ("EDMDPMSolverMultistepScheduler", {"solver_type": "heun"}, DPMSolverPP(2, rule="exact"), None),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, SDEDPMSolverPP(2), None),
]


@pytest.mark.parametrize(("name", "config", "solver", "chart"), EDMS)
def test_edm(name: str, config: dict[str, Any], solver: Solver, chart: str | None) -> None:
    levels, theirs = edm_solve(name, 18, **config)
    compare(name, config, solver, theirs, ours(solver, levels, chart=chart))


def test_dpm_solver_sde() -> None:
    """k-diffusion's dpmpp_sde, with the same noise as there."""
    name = "DPMSolverSDEScheduler"
    visited = distinct(diffusers_levels(name, 12))

    def noise(before: Tensor, after: Tensor) -> Tensor:
        ends = any(math.isclose(float(after), level, rel_tol=1e-9) for level in visited)
        return carried(before, after) if ends else xi(before, after)

    levels, theirs = diffusers_solve(name, 12, noise=noise)
    assert levels == visited
    solver = DPMSolverPPS(2, eta=1.0)
    compare(name, {}, solver, theirs, ours(solver, levels[:-1], final="denoise"))


# --- flow matching ----------------------------------------------------------------------------------------------------


def flow_solve(name: str, steps: int, **config: Any) -> tuple[list[float], Tensor]:
    """Flow times that a flow-matching scheduler visits, and where it ends; its model is ε − z on x = (1−s) z + s ε."""
    cls, path = getattr(diffusers, name), CondOT()
    with in_double(cls, lambda: torch.zeros(())):
        s = cls(**config)
        s.set_timesteps(steps)
        times = [1.0 - v for v in listed(s)]
        x = path.interpolate(PROBLEM.sample(len(normal(7)), seed=3), normal(7), times[0])
        for i, t in enumerate(s.timesteps):
            x = s.step(PROBLEM.combine(x, path.at(times[i]), -1.0, 1.0), t, x).prev_sample
            assert x.dtype == torch.float64
    return sorted(set(times)), x


FLOWS: list[tuple[str, dict[str, Any], Solver, str]] = [
    ("FlowMatchEulerDiscreteScheduler", {}, Euler(), "path"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, Euler(), "path"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, DDIM(), "path"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, Heun(), "denoise"),
    (MULTI, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, DPMSolverPP(2), "path"),
    (
        MULTI, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_type": "heun"},
        DPMSolverPP(2, rule="exact"), "path",
    ),
    (
        UNI, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        UniPC(2, cooldown=True), "path",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "solver", "final"), FLOWS)
def test_flow_matching(name: str, config: dict[str, Any], solver: Solver, final: str) -> None:
    times, theirs = flow_solve(name, 20, **config)
    grid = times[:-1] if final == "denoise" else times
    begin = CondOT().interpolate(PROBLEM.sample(len(normal(7)), seed=3), normal(7), times[0])
    sol = fs.sample(
        PROBLEM.flow(CondOT()), start=begin, interval=(grid[0], grid[-1]), solver=solver, grid=grid, final=final
    )
    compare(name, config, solver, theirs, sol.x)
