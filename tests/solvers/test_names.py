"""Solvers and grids as text."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import flowsolve as fs
from flowsolve import grids, solvers
from flowsolve.grids.names import grid
from flowsolve.solvers import names


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("unipc", solvers.UniPC()),
        ("UniPC:order=2", solvers.UniPC(order=2)),
        ("dpm-solver++", solvers.DPMSolverPP()),
        ("dpm_solver_pp:order=3", solvers.DPMSolverPP(order=3)),
        ("sde-dpm-solver++:eta=0.5", solvers.SDEDPMSolverPP(eta=0.5)),
        ("dopri5:rtol=1e-4,atol=1e-6", solvers.Dopri5(1e-4, 1e-6)),
        ("multistep:order=3,form=noise,variable=clock", solvers.Multistep(3, "noise", variable="clock")),
        ("churn:inner=heun,churn=40", solvers.Churn(solvers.Heun(), 40)),
        ("dopri5:adaptive=false", solvers.Dopri5(adaptive=False)),
        ("auto:eta=1", solvers.Auto(eta=1)),
        ("RK4", solvers.RK4()),
        ("plms", solvers.IPNDM(4, warmup="trapezoid")),
    ],
)
def test_solvers(text: str, made: object) -> None:
    assert names.solver(text) == made


def test_every_solver_has_a_name() -> None:
    kinds = {v for v in vars(solvers).values() if isinstance(v, type) and issubclass(v, solvers.Solver | solvers.Auto)}
    abstract = {solvers.Solver, solvers.EstimateSolver, solvers.RungeKutta, solvers.Adaptive}
    abstract |= {solvers.Fitted, solvers.Tuned}  # which are called by the name of their file
    assert set(names.SOLVERS.values()) == kinds - abstract
    for kind in kinds - abstract - {solvers.Churn, solvers.RePaint}:
        assert names.solver(kind.__name__) == kind()


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("uniform", grids.Uniform()),
        ("karras:rho=5", grids.Karras(rho=5)),
        ("arctan:center=1,width=2.5", grids.Arctan(center=1, width=2.5)),
        ("trailing", grids.Timesteps("trailing")),
        ("0,0.25,1", [0.0, 0.25, 1.0]),
    ],
)
def test_grids(text: str, made: object) -> None:
    assert grid(text) == made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: names.solver("dpmpp_3m_sde_gpu"), "solver = 'dpmpp_3m_sde_gpu' has no equal here: its published step"),
        (lambda: names.solver("gradient_estimation"), "'gradient_estimation' has no equal here: the nearest is deis"),
        (
            lambda: names.solver("repaint:repeats=3"),
            "solver 'repaint:repeats=3' lacks inner, known, mask; give it as in",
        ),
        (lambda: names.solver("euler_cfg_pp"), "solver = 'euler_cfg_pp' is a guidance, not a step"),
        (lambda: names.solver("unipcc"), r"solver = 'unipcc' is not known; expected one of Ancestral, .*, UniPC, with"),
        (lambda: names.solver("unipc:ordr=3"), "unipc has no option 'ordr'; expected one of order, form"),
        (lambda: names.solver("heun:order=3"), "heun has no option 'order'; expected one of none"),
        (lambda: names.solver("unipc:3"), "'3' in 'unipc:3' is no option; expected name:key=value"),
        (lambda: names.solver("unipc:"), "'' in 'unipc:' is no option"),
        (lambda: names.solver("unipc:order=9"), "order = 9; expected one of"),
        (lambda: names.solver("dopri5:rtol=tight"), "solver 'dopri5:rtol=tight' has a value of the wrong kind"),
        (lambda: grid("karas"), "grid = 'karas' is not known; expected one of uniform, .*, or flow times as in"),
        (lambda: grid("karras:order=2"), "karras has no option 'order'; expected one of window, rho"),
    ],
)
def test_what_is_not_known_is_named(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_what_comes_next_to_a_name_is_known() -> None:
    for text in names.NEAREST.values():
        for word in text.replace(";", " ").replace(",", " ").split():
            if word.startswith(("dpm", "sde", "deis")):
                names.solver(word)


def test_res_multistep_is_the_exponential_method_of_two_steps() -> None:
    """x' = e^-h x + h ((φ₁ + φ₂/r) ẑ_n − φ₂/r ẑ_{n−1}) in σ, r the step before over this one (Zhang et al. 2023)."""
    mixture = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.4, dtype=torch.float64)
    flow = mixture.flow(fs.paths.VE())
    path, times = flow.path, [0.2, 0.35, 0.5, 0.7]
    start = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64).reshape(-1, 1) * path.sigma(times[0])
    x, before = start, None
    for t, to in pairwise(times):
        z, h = flow.data(x, t), math.log(path.sigma(t) / path.sigma(to))
        one = -math.expm1(-h) / h
        two = (1.0 - one) / h
        if before is None:
            x = math.exp(-h) * x + h * one * z
        else:
            r = before[1] / h
            x = math.exp(-h) * x + h * ((one + two / r) * z - two / r * before[0])
        before = z, h
    solver = names.solver("res_multistep")
    found = fs.sample(flow, start=start, solver=solver, grid=times, interval=(times[0], times[-1])).x
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
