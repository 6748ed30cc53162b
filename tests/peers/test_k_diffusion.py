r"""k-diffusion's samplers and ours, step for step.

Its η is ours only in the ancestral samplers. In dpmpp_2m_sde and dpmpp_3m_sde it multiplies h where the family of
`flowsolve.solvers` has η²: theirs is the square of ours.

Both take the last step to σ = 0 by one evaluation. Where a step has stages, ours does it by final="denoise".
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsolve.solvers import DDIM, DDPM, LMS, DPMSolver, DPMSolverPP, DPMSolverPPS, Euler, Heun, SDEDPMSolverPP, Solver
from flowsolve.solvers.injection import Ancestral, Churn
from tests.peers.harness import (
    carried,
    denoised,
    deviation,
    even,
    k_diffusion,
    k_solve,
    karras,
    ours,
    start,
    xi,
)  # fmt: skip

CLEAN, OPEN = karras(12), karras(12, clean=False)
ETAS = (0.0, 0.5, 1.0)
HALF = math.sqrt(0.5)

WHOLE: list[tuple[str, dict[str, Any], Solver, str | None]] = [  # one evaluation a step: to σ = 0 in one solve
    ("euler", {}, Euler(), "noise"),
    ("euler", {"s_churn": 4.0}, Churn(Euler(), 4.0), "noise"),
    ("euler", {"s_churn": 40.0, "s_noise": 1.01}, Churn(Euler(), 40.0, s_noise=1.01), "noise"),
    ("euler_ancestral", {"eta": 1.0}, DDPM(), None),
    *(("euler_ancestral", {"eta": eta}, DDIM(eta), None) for eta in ETAS),
    *(("euler_ancestral", {"eta": eta}, Ancestral(Euler(), eta), "noise") for eta in ETAS),
    *(("lms", {"order": k}, LMS(k), None) for k in (1, 2, 3, 4)),
    ("dpmpp_2m", {}, DPMSolverPP(2), None),
    *(("dpmpp_2m_sde", {"eta": e * e}, SDEDPMSolverPP(2, eta=e), None) for e in (0.0, HALF, 1.0, 1.2)),
    *(
        ("dpmpp_2m_sde", {"eta": e * e, "solver_type": "heun"}, SDEDPMSolverPP(2, eta=e, rule="exact"), None)
        for e in (0.0, HALF, 1.0)
    ),
]  # fmt: skip
STAGED: list[tuple[str, dict[str, Any], Solver, str | None]] = [
    ("heun", {}, Heun(), "noise"),
    ("dpm_2", {}, DPMSolver(2), None),
    *(("dpm_2_ancestral", {"eta": eta}, Ancestral(DPMSolver(2), eta), None) for eta in ETAS),
    *(("dpmpp_2s_ancestral", {"eta": eta}, Ancestral(DPMSolverPPS(2), eta), None) for eta in ETAS),
]  # fmt: skip
CHURNED: list[tuple[str, dict[str, Any], Solver, str | None]] = [
    ("heun", {"s_churn": 4.0}, Churn(Heun(), 4.0), "noise"),
    ("heun", {"s_churn": 40.0, "s_noise": 1.003}, Churn(Heun(), 40.0, s_noise=1.003), "noise"),
    ("dpm_2", {"s_churn": 4.0}, Churn(DPMSolver(2), 4.0), None),
]  # fmt: skip


def compare(name: str, options: dict[str, Any], solver: Solver, theirs: Tensor, found: Tensor) -> None:
    off = deviation(found, theirs)
    print(f"PEER k-diffusion {name:18} {options!s:45} {solver!r:60.60} {off:.1e}")
    assert off < 1e-12


@pytest.mark.parametrize(("name", "options", "solver", "chart"), WHOLE)
@pytest.mark.parametrize("levels", [CLEAN, OPEN], ids=["clean", "open"])
def test_one_evaluation_a_step(
    name: str, options: dict[str, Any], solver: Solver, chart: str | None, levels: list[float]
) -> None:
    compare(name, options, solver, k_solve(name, levels, **options), ours(solver, levels, chart=chart))


@pytest.mark.parametrize(("name", "options", "solver", "chart"), STAGED)
def test_steps_with_stages(name: str, options: dict[str, Any], solver: Solver, chart: str | None) -> None:
    found = ours(solver, CLEAN[:-1], chart=chart, final="denoise")
    compare(name, options, solver, k_solve(name, CLEAN, **options), found)


@pytest.mark.parametrize(("name", "options", "solver", "chart"), CHURNED)
def test_steps_with_stages_and_churn(name: str, options: dict[str, Any], solver: Solver, chart: str | None) -> None:
    compare(name, options, solver, k_solve(name, OPEN, **options), ours(solver, OPEN, chart=chart))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpmpp_sde(eta: float) -> None:
    """Ours carries the noise of the stage on to the end of the step: given that, theirs is the same."""

    def noise(before: Tensor, after: Tensor) -> Tensor:
        ends = any(math.isclose(float(after), level, rel_tol=1e-9) for level in OPEN)
        return carried(before, after) if ends else xi(before, after)

    theirs = k_solve("dpmpp_sde", OPEN, noise=noise, eta=eta)
    compare("dpmpp_sde", {"eta": eta}, DPMSolverPPS(2, eta=eta), theirs, ours(DPMSolverPPS(2, eta=eta), OPEN))


def test_dpm_fast() -> None:
    """DPM-Solver's 3S, 2S and 1 in turn, on steps even in λ: dpm_solver_fast with 12 evaluations."""
    sampling, levels = k_diffusion(), even(5)
    x = ours(DPMSolver(3), levels[:4])
    x = ours(DPMSolver(2), levels[3:5], begin=x)
    x = ours(DPMSolver(1), levels[4:], begin=x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # its times are made of Python floats
    try:
        theirs = sampling.sample_dpm_fast(denoised, start(levels[0]), levels[-1], levels[0], 12, disable=True)
    finally:
        torch.set_default_dtype(before)
    compare("dpm_fast", {}, DPMSolver(3), theirs, x)
