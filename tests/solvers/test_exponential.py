r"""Exponential integrators: coefficients against closed forms, orders against DOP853, ends, noise, memory.

The problem and its truth are those of `test_orders`. Grids are uniform in λ from −1.5 to 1.5, where the trajectories
part; a multistep method starts by single steps (warmup="single"), so that its order is not hidden by its first step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import flowsolve as fs
from flowsolve.paths import VE, VP, CondOT, Discrete, Path
from flowsolve.predictions import PREDICTIONS
from flowsolve.solvers import (
    DDIM,
    DEIS,
    ERSDE,
    IPNDM,
    LMS,
    RES,
    SEEDS,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPS,
    ExactSDE,
    Multistep,
    SASolver,
    SDEDPMSolverPP,
    SingleStep,
    StochasticHeun,
    UniPC,
)  # fmt: skip
from flowsolve.solvers.exponential import FORMS, form_of, update
from tests.solvers.test_orders import CORE, MORE, case, mixture

FORM_NAMES = ["data", "noise", "straight", 0.5]
PATHS = [*CORE, *MORE]


def lambda_times(path: Path, low: float, high: float, steps: int) -> list[float]:
    return [path.time(low + (high - low) * i / steps) for i in range(steps + 1)]


def measured(
    path: Path, solver: Any, steps: tuple[int, ...], prediction: str = "velocity"
) -> tuple[float, list[float]]:
    """The fitted order and the errors, λ from −1.5 to 1.5."""
    start, end = path.time(-1.5), path.time(1.5)
    flow, (x, truth) = mixture().flow(path, prediction), case(path, start, end)
    scale = path.alpha(end) + path.sigma(end)
    errors = []
    for n in steps:
        nfe = n * solver.evaluations if isinstance(solver, SingleStep) else sum(solver.schedule(10**6)[:n])
        sol = fs.sample(flow, start=x, interval=(start, end), solver=solver, nfe=nfe, grid="log_snr")
        assert sol.nfe.tolist() == [nfe] * len(x)
        errors.append(float((sol.x - truth).square().mean().sqrt() / scale))
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0]), errors


# --- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CondOT(), VP(), VE()], ids=repr)
@pytest.mark.parametrize("form", [*FORM_NAMES, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.5])
def test_coefficients_are_the_integrals(path: Path, form: Any, eta: float) -> None:
    """Against scipy's adaptive quadrature of the formula on the page."""
    f = form_of(form)
    a, b, other = path.time(-0.7), path.time(0.9), path.time(-1.6)
    la, lb, lo = path.log_snr(a), path.log_snr(b), path.log_snr(other)

    def r(lam: float) -> float:
        return f.p + f.q * math.exp(-lam)

    def kernel(lam: float) -> float:
        return (1 + eta**2) * f.scale(path.at(b)) * (r(lb) / r(lam)) ** eta**2 * math.exp(-lam) / r(lam) ** 2

    found = update(path, f, a, b, [a, other], eta=eta)
    first = quad(lambda v: kernel(v) * (v - lo) / (la - lo), la, lb, epsabs=1e-13, epsrel=1e-13)[0]
    second = quad(lambda v: kernel(v) * (v - la) / (lo - la), la, lb, epsabs=1e-13, epsrel=1e-13)[0]
    variance = quad(
        lambda v: 2 * (eta * f.scale(path.at(b)) * (r(lb) / r(v)) ** eta**2 * math.exp(-v) / r(v)) ** 2, la, lb,
        epsabs=1e-13, epsrel=1e-13,
    )[0]  # fmt: skip
    ratio = f.scale(path.at(b)) / f.scale(path.at(a)) * (r(lb) / r(la)) ** eta**2
    assert found.state == pytest.approx(ratio, rel=1e-12)
    assert found.weights == pytest.approx((first, second), rel=1e-11)
    assert found.noise == pytest.approx(math.sqrt(variance), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_data_form_weights_are_the_phi_functions(order: int) -> None:
    """∫ e^(λ−λ_b) λ^k dλ through the moments: weights applied to λ^k give the integral of λ^k, for k < order."""
    path = CondOT()
    lams = [0.4, 0.1, -0.5, -0.6, -1.3][:order]
    nodes, b = [path.time(v) for v in lams], path.time(1.1)
    lams = [path.log_snr(t) for t in nodes]
    found = update(path, FORMS["data"], nodes[0], b, nodes)
    for k in range(order):
        truth = path.alpha(b) * quad(lambda v, k=k: math.exp(v - 1.1) * v**k, lams[0], 1.1, epsabs=1e-14)[0]
        assert sum(w * v**k for w, v in zip(found.weights, lams, strict=True)) == pytest.approx(truth, rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    kappa=st.floats(0.0, 20.0), low=st.floats(-8.0, 6.0), size=st.floats(0.01, 8.0), eta=st.floats(0.0, 2.0),
    middle=st.floats(0.1, 0.9),
)  # fmt: skip
def test_two_steps_with_a_frozen_estimate_are_one(
    kappa: float, low: float, size: float, eta: float, middle: float
) -> None:
    """X, w and τ² of a step compose: the step is the exact solution for a constant F."""
    path, form = VP(), form_of(kappa)
    a, m, b = (path.time(low + size * s) for s in (0.0, middle, 1.0))
    if not a < m < b:
        return
    whole, first, second = (update(path, form, s, e, [s], eta=eta) for s, e in ((a, b), (a, m), (m, b)))
    assert whole.state == pytest.approx(first.state * second.state, rel=1e-9)
    assert whole.weights[0] == pytest.approx(first.weights[0] * second.state + second.weights[0], rel=1e-6)
    assert whole.noise**2 == pytest.approx((first.noise * second.state) ** 2 + second.noise**2, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("solver", [Multistep(order=1), SingleStep(order=1)], ids=lambda s: type(s).__name__)
def test_order_one_is_ddim(solver: Any, form: Any) -> None:
    path = VP()
    start, end = path.time(-3.0), path.time(3.0)
    x, _ = case(path, start, end)
    flow, common = mixture().flow(path), {"start": x, "interval": (start, end), "nfe": 7}
    one = type(solver)(order=1, form=form)
    torch.testing.assert_close(
        fs.sample(flow, solver=one, **common).x, fs.sample(flow, solver=DDIM(), **common).x, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
def test_order_one_with_noise_is_the_exact_step(eta: float) -> None:
    path = VP()
    start, end = path.time(-3.0), path.time(3.0)
    x, _ = case(path, start, end)
    flow, common = mixture().flow(path), {"start": x, "interval": (start, end), "nfe": 7, "seed": 3}
    truth = fs.sample(flow, solver=ExactSDE(eta), **common).x
    for solver in (SDEDPMSolverPP(order=1, eta=eta), DPMSolverPPS(order=1, eta=eta), Multistep(1, eta=lambda t: eta)):
        torch.testing.assert_close(fs.sample(flow, solver=solver, **common).x, truth, rtol=1e-11, atol=1e-11)


# --- orders ----------------------------------------------------------------------------------------------------------

SINGLE = {"warmup": "single"}
MULTI: list[tuple[str, Any, int]] = [
    ("2M exact", Multistep(2, rule="exact", **SINGLE), 2),
    ("2M bh1", Multistep(2, rule="bh1", **SINGLE), 2),
    ("2M", DPMSolverPP(2, **SINGLE), 2),
    ("3M", DPMSolverPP(3, **SINGLE), 3),
    ("4M", DPMSolverPP(4, **SINGLE), 4),
    ("UniPC-1", UniPC(1), 2),
    ("UniPC-2 bh1", UniPC(2, rule="bh1", **SINGLE), 3),
    ("UniPC-2 bh2", UniPC(2, **SINGLE), 3),
    ("UniPC-3", UniPC(3, **SINGLE), 4),
    ("DEIS-2", DEIS(2, **SINGLE), 2),
    ("DEIS-3", DEIS(3, **SINGLE), 3),
    ("tAB3", DEIS(3, variable="time", **SINGLE), 3),
    ("ρAB3", DEIS(3, variable="clock", **SINGLE), 3),
    ("LMS", LMS(4, **SINGLE), 4),
    ("2M twice", Multistep(2, warmup="trapezoid"), 2),
    ("DEIS-3 twice", DEIS(3, warmup="trapezoid"), 3),
    ("3M corrected", Multistep(3, warmup="corrected"), 3),
    ("DEIS-3 corrected", DEIS(3, warmup="corrected"), 3),
    ("iPNDM-v", IPNDM(3, equal=False, **SINGLE), 3),
]
ONE: list[tuple[str, Any, int]] = [
    ("2S", DPMSolver(2), 2),
    ("2S ++", DPMSolverPPS(2), 2),
    ("3S", DPMSolver(3), 3),
    ("3S ++", DPMSolverPPS(3), 3),
    ("RES", RES(), 2),
    ("Heun", StochasticHeun(eta=0.0), 2),
    ("SEEDS-3 without noise", SEEDS(3, eta=0.0), 3),
]
NAMED = [*MULTI, *ONE]


def check(path: Path, solver: Any, order: int, prediction: str = "velocity") -> None:
    steps = {1: (48, 96, 192), 2: (48, 96, 192), 3: (48, 96, 192), 4: (64, 128, 256)}[order]
    slope, errors = measured(path, solver, steps, prediction)
    print(f"ORDER {solver!r:.60} {path!r:28.28} {prediction} {slope:6.3f} {errors}")
    assert errors[0] < 0.1, errors
    assert errors[-1] > 3e-13, errors
    assert order - 0.2 <= slope <= order + 0.2, (slope, errors)


@pytest.mark.parametrize(("name", "solver", "order"), NAMED, ids=[n for n, *_ in NAMED])
@pytest.mark.parametrize("path", CORE, ids=repr)
def test_order(path: Path, name: str, solver: Any, order: int) -> None:
    check(path, solver, order)


@pytest.mark.parametrize(("name", "solver", "order"), NAMED, ids=[n for n, *_ in NAMED])
@pytest.mark.parametrize("path", MORE, ids=repr)
def test_order_on_the_other_paths(path: Path, name: str, solver: Any, order: int) -> None:
    if getattr(solver, "variable", "") == "time" and isinstance(path, Discrete):
        pytest.skip("a table's path has a kink in t at every entry")
    check(path, solver, order)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Multistep(2, **SINGLE), 2), (Multistep(3, **SINGLE), 3), (Multistep(3, variable="clock", **SINGLE), 3),
        (Multistep(2, corrector=1, **SINGLE), 2), (Multistep(2, corrector=2, **SINGLE), 3), (SingleStep(2), 2),
        (SingleStep(2, rule="bh2"), 2), (SingleStep(2, rule="bh1"), 2), (SingleStep(3), 3),
        (Multistep(2, rule="bh1", **SINGLE), 2), (Multistep(2, rule="bh2", **SINGLE), 2),
    ],
    ids=lambda v: repr(v) if not isinstance(v, int) else str(v),
)  # fmt: skip
def test_order_in_every_form(solver: Any, order: int, form: Any) -> None:
    slope, errors = measured(VP(), replace(solver, form=form), (128, 256, 512))
    assert errors[0] < 0.1
    assert errors[-1] > 3e-13
    assert order - 0.2 <= slope <= order + 0.2, (slope, errors)


def test_three_nodes_and_a_corrector_of_two_are_of_order_three_at_least() -> None:
    """One-sided: in data form the leading term is small, and slopes fall to 3 from above (3.35, then 3.21)."""
    slope, errors = measured(VP(), Multistep(3, corrector=2, **SINGLE), (128, 256, 512))
    assert slope >= 2.8, (slope, errors)


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("solver", [UniPC(2, **SINGLE), DPMSolver(3), DPMSolverPP(2, **SINGLE)], ids=repr)
def test_every_prediction_gives_the_same_solve(solver: Any, prediction: str) -> None:
    path = VP()
    start, end = path.time(-1.5), path.time(1.5)
    x, _ = case(path, start, end)
    common = {"start": x, "interval": (start, end), "nfe": 24, "solver": solver}
    truth = fs.sample(mixture().flow(path), **common).x
    torch.testing.assert_close(fs.sample(mixture().flow(path, prediction), **common).x, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [3, 4])
def test_a_ramp_converges_with_order_two(order: int) -> None:
    """The first step's error of size h² is what remains; with a corrector h³."""
    for solver, expected in (
        (Multistep(order, form="straight"), 2),
        (Multistep(order, form="straight", corrector=order), 3),
    ):
        slope, errors = measured(VP(), solver, (64, 128, 256))
        assert slope == pytest.approx(expected, abs=0.2), errors


def test_ipndm_has_the_exact_weights_where_its_clock_is_uniform() -> None:
    path = CondOT()
    for order in (1, 2, 3, 4):
        a, b, nodes = _equal(path, order + 1)
        made = IPNDM(order).update(path, FORMS["noise"], a, b, nodes)
        exact = update(path, FORMS["noise"], a, b, nodes, variable="clock")
        assert made.weights == pytest.approx(exact.weights, rel=1e-8)


def _equal(path: Path, nodes: int) -> tuple[float, float, tuple[float, ...]]:
    """A step and its nodes, equally spaced in σ/α."""
    ratios = np.linspace(2.0, 1.0, nodes)[::-1]  # from the step's end backwards
    times = [path.time(-math.log(r)) for r in ratios]
    return times[1], times[0], tuple(times[1:])


# --- ends, warm-up, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(
    "solver",
    [DPMSolverPP(3), UniPC(3), UniPC(2, form="straight"), DPMSolverPPS(2), DPMSolverPPS(3), SDEDPMSolverPP(2),
     SASolver(3, corrector=3), ERSDE(), SEEDS(2, form="data"), Multistep(3, form="straight", variable="clock")],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("grid", ["uniform", "log_snr", "karras"])
def test_from_pure_noise_to_pure_data(path: Path, solver: Any, grid: str) -> None:
    """Finite, of the exact budget, and near the truth."""
    flow = mixture().flow(path)
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * path.prior_std
    sol = fs.sample(flow, start=noise, solver=solver, nfe=31, grid=grid)
    assert sol.nfe.tolist() == [31] * 16
    assert bool(torch.isfinite(sol.x).all())
    assert float(sol.x.abs().max()) < 10.0
    if not solver.random:
        truth = fs.sample(flow, start=noise, solver=fs.solvers.Dopri5(1e-8, 1e-8)).x
        assert float((sol.x - truth).abs().median()) < 0.08


def test_the_last_step_to_the_data_is_the_denoised_state() -> None:
    path, seen = CondOT(), []
    flow = mixture().flow(path)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = [0.0, 0.3, 0.8, 1.0]
    sol = fs.sample(flow, start=x, solver=DPMSolverPP(3), grid=times)
    before = fs.sample(flow, start=x, solver=DPMSolverPP(3), grid=times[:-1], interval=(0.0, 0.8)).x
    seen.append(flow.data(before, 0.8))
    torch.testing.assert_close(sol.x, seen[0], rtol=1e-12, atol=1e-12)


def test_cooldown_ends_with_ddim() -> None:
    path = CondOT()
    flow, (x, _) = mixture().flow(path), case(path, path.time(-1.5), path.time(1.5))
    times = lambda_times(path, -1.5, 1.5, 6)
    common = {"start": x, "solver": UniPC(3, cooldown=True)}
    whole = fs.sample(flow, grid=times, interval=(times[0], times[-1]), **common).x
    plain = fs.sample(flow, grid=times, interval=(times[0], times[-1]), start=x, solver=UniPC(3)).x
    assert float((whole - plain).abs().max()) > 1e-5
    made = update(path, FORMS["data"], times[-2], times[-1], [times[-2]])
    assert made.weights[0] != 0.0


@pytest.mark.parametrize("solver", [UniPC(3), UniPC(3, **SINGLE), DEIS(3), SASolver(2)], ids=repr)
def test_gradients_remember_the_past_in_segments(solver: Any) -> None:
    """A checkpointed solve carries the memory across its segments."""
    path = VP()
    start, end = path.time(-2.0), path.time(2.0)
    x, _ = case(path, start, end)
    found = []
    for gradient in ("direct", "checkpoint"):
        y = x.clone().requires_grad_()
        out = fs.sample(
            mixture().flow(path), start=y, interval=(start, end), solver=solver, nfe=17, gradient=gradient
        ).x
        (g,) = torch.autograd.grad(out.square().sum(), y)
        found.append((out.detach(), g))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_a_corrector_needs_no_more_evaluations_and_takes_its_noise_again() -> None:
    """With ẑ a function of λ alone the corrector is the exact step through one more node, noise and all."""
    path, calls = VP(), []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t[0]))
        lam = torch.tensor(path.log_snr(float(t[0])), dtype=torch.float64)
        return (lam**2).expand_as(x)  # a parabola in λ: three nodes are exact

    flow = fs.Flow(net, path, "data")
    times = lambda_times(path, -1.0, 1.0, 8)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    solver = SASolver(2, corrector=2, rule="exact")
    sol = fs.sample(flow, start=x, interval=(times[0], times[-1]), grid=times, solver=solver, seed=5)
    assert len(calls) == 8 == int(sol.nfe[0])
    # The same noise and the exact drift, step by step; the last step is predicted with two nodes only.
    noise, state = fs.noise.Noise.of(5, 3), x
    form = FORMS["data"]
    for i, (a, b) in enumerate(pairwise(times)):
        nodes = {0: (b, a), 7: (a, times[6])}.get(i, (b, a, times[i - 1]))
        made = update(path, form, a, b, nodes, eta=1.0)
        drift = sum(w * path.log_snr(t) ** 2 for w, t in zip(made.weights, nodes, strict=True))
        state = made.state * state + drift + made.noise * noise.step(a, b, x)
    torch.testing.assert_close(sol.x, state, rtol=1e-10, atol=1e-10)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    for make, words in (
        (lambda: Multistep(order=0), "order = 0"),
        (lambda: Multistep(order=6), "order = 6"),
        (lambda: Multistep(order=2, corrector=3), "corrector = 3"),
        (lambda: Multistep(form="score"), "form = 'score'"),
        (lambda: Multistep(form=-1.0), "expected two finite numbers"),
        (lambda: Multistep(variable="sigma"), "variable = 'sigma'"),
        (lambda: Multistep(rule="midpoint"), "rule = 'midpoint'"),
        (lambda: SDEDPMSolverPP(eta=-0.1), "eta = -0.1"),
        (lambda: SDEDPMSolverPP(warmup="single"), "warmup = 'single'"),
        (lambda: IPNDM(order=5), "order = 5"),
        (lambda: DPMSolver(order=4), "order = 4"),
        (lambda: SASolver(eta=1.0), "tau"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize(
    "solver",
    [DEIS(3), DEIS(3, **SINGLE), DPMSolver(2), DPMSolver(3), LMS(), SEEDS(2), UniPC(2, form="noise")],
    ids=repr,
)
def test_a_form_that_is_infinite_at_the_start_sets_out_with_ddim(solver: Any) -> None:
    flow = mixture().flow(CondOT())
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sol = fs.sample(flow, start=x, solver=solver, nfe=61)
    assert sol.nfe.tolist() == [61] * 64
    if not solver.random:
        truth = fs.sample(flow, start=x, solver=fs.solvers.Dopri5(1e-8, 1e-8)).x
        assert float((sol.x - truth).abs().median()) < 0.02


def test_the_way_back_from_the_data_sets_out_with_ddim() -> None:
    flow, x = mixture().flow(CondOT()), mixture().sample(16, seed=4)
    truth = fs.encode(flow, x, solver=fs.solvers.Dopri5(1e-8, 1e-8)).x
    found = fs.encode(flow, x, solver=DPMSolverPP(), nfe=80, grid="log_snr").x
    assert float((found - truth).abs().median()) < 0.02


def test_there_is_a_form_instead_of_a_chart() -> None:
    with pytest.raises(TypeError, match=r"no chart.*form="):
        fs.sample(mixture().flow(CondOT()), start=torch.zeros(2, 2), solver=UniPC(), nfe=5, chart="data")


@pytest.mark.parametrize("solver", [UniPC(3, form="straight", **SINGLE), DPMSolverPP(3, form="straight", **SINGLE)])
def test_encode_and_sample_are_inverse(solver: Any) -> None:
    flow = mixture().flow(CondOT())
    x = mixture().sample(8, seed=4)
    noise = fs.encode(flow, x, solver=solver, nfe=160).x
    torch.testing.assert_close(fs.sample(flow, start=noise, solver=solver, nfe=160).x, x, rtol=0.0, atol=2e-3)
