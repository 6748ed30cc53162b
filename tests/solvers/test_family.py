"""The adaptive family: every pair and controller, against DOP853 and closed forms, and every way a sample can end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import flowsolve as fs
from flowsolve import Status
from flowsolve.solvers import PI, PID, Adaptive, Bosh3, Controller, Dopri5, Dopri8, I, Tableau, Tsit5, largest, rms

PAIRS = [Bosh3, Dopri5, Tsit5, Dopri8]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda c: c.__name__)
STARTS = torch.tensor([[0.3, 0.0], [2.5, -0.5], [-1.0, 1.5]], dtype=torch.float64)


def of(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[:, 1], -torch.sin(y[:, 0]) + 0.5 * torch.cos(3.0 * t.reshape(-1))), 1)


def swing(t: float, y: Any) -> list[float]:
    return [y[1], -math.sin(y[0]) + 0.5 * math.cos(3.0 * t)]


def truth(t0: float, t1: float) -> Tensor:
    ends = [solve_ivp(swing, (t0, t1), y, method="DOP853", rtol=3e-14, atol=1e-14).y[:, -1] for y in STARTS.numpy()]
    return torch.from_numpy(np.stack(ends))


@pairs
def test_errors_follow_the_tolerance_and_time_may_run_back(pair: type[Adaptive]) -> None:
    """From 1e-4 to 1e-8 (to 1e-10 but for Bosh3): below 100 tolerances, and falling in proportion within 0.25."""
    low = 8 if pair is Bosh3 else 10
    tolerances = [10.0**-k for k in range(4, low + 1, 2)]
    for t0, t1 in ((0.0, 4.0), (4.0, 0.0)):
        reference = truth(t0, t1)
        errors = []
        for tol in tolerances:
            sol = fs.solve(pendulum, STARTS, t0, t1, solver=pair(tol, tol))
            errors.append(float((sol.x - reference).abs().max()))
            assert (sol.nfe == 2 + (sol.accepted + sol.rejected) * (pair.tableau.stages - 1)).all()
        assert all(e < 100 * tol for e, tol in zip(errors, tolerances, strict=True)), errors
        assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(1.0, abs=0.25), errors


@pytest.mark.parametrize(("pair", "method"), [(Dopri5, "RK45"), (Dopri8, "DOP853"), (Bosh3, "RK23")])
@pytest.mark.parametrize("tol", [1e-4, 1e-8])
def test_the_same_pair_costs_what_it_costs_in_scipy(pair: type[Adaptive], method: str, tol: float) -> None:
    """With scipy's controller and norm: the evaluations of three solves together, within a tenth."""
    ours = fs.solve(pendulum, STARTS, 0.0, 10.0, solver=pair(tol, tol, controller=I(first_factor=10.0)))
    theirs = [solve_ivp(swing, (0.0, 10.0), y, method=method, rtol=tol, atol=tol).nfev for y in STARTS.numpy()]
    assert int(ours.nfe.sum()) == pytest.approx(sum(theirs), rel=0.1)


@pytest.mark.parametrize(
    "controller",
    [I(), PI(), PI(0.4), PID(0.3, 0.3, 0.05), PID(0.7, 0.25, 0.0, safety=0.95), PI(max_factor=2.0)],
    ids=repr,
)
def test_every_controller_reaches_the_end_within_the_tolerance(controller: Controller) -> None:
    for pair in PAIRS:
        sol = fs.solve(pendulum, STARTS, 0.0, 4.0, solver=pair(1e-6, 1e-6, controller=controller))
        torch.testing.assert_close(sol.x, truth(0.0, 4.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PI(safety=0.0), "safety"),
        (lambda: PI(safety=1.5), "safety"),
        (lambda: I(min_factor=1.0), "min_factor"),
        (lambda: I(max_factor=0.9), "max_factor"),
        (lambda: I(max_factor=20.0, first_factor=10.0), "first_factor"),
        (lambda: Dopri5(min_step=-1.0), "min_step"),
        (lambda: Dopri5(min_step=0.2, max_step=0.1), "min_step = 0.2 exceeds max_step"),
        (lambda: Dopri5(max_rejections=0), "max_rejections"),
    ],
)
def test_settings_that_make_no_sense(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_growth_is_limited_and_looser_after_the_first_step() -> None:
    """y' = 0 has no error: steps grow by max_factor, the first by first_factor."""
    times: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t.reshape(-1)[0]))
        return 0.0 * y

    fs.solve(f, of([1.0]), 0.0, 1000.0, solver=Dopri5(first_step=1e-3, controller=I(max_factor=3.0, first_factor=50.0)))
    ends = [0.0, *times[6::6]]
    steps = np.diff(ends)[:-1]
    assert steps[0] == pytest.approx(1e-3)
    assert steps[1] / steps[0] == pytest.approx(50.0)
    assert steps[2:] / steps[1:-1] == pytest.approx(3.0)


def test_min_step_ends_a_sample_that_would_need_a_smaller_one() -> None:
    """A jump at t = 1/3 for the second sample only."""
    f = lambda t, y: torch.where((t < 1 / 3) | (y[:, 1:] == 0.0), y * 0.0 + 1.0, -50.0 + 0.0 * y) * of(1.0, 0.0)  # noqa: E731
    y0 = of([0.0, 0.0], [0.0, 1.0])
    sol = fs.solve(f, y0, 0.0, 1.0, solver=Dopri5(1e-8, 1e-8, min_step=1e-3), throw=False)
    assert sol.status.tolist() == [Status.SUCCESS, Status.UNDERFLOW]
    assert 0.32 < float(sol.t[1]) <= 1 / 3 + 1e-3
    torch.testing.assert_close(sol.x[1, 0], sol.t[1], rtol=1e-6, atol=1e-6)
    with pytest.raises(fs.SolverError, match=r"sample 1: step size fell below"):
        fs.solve(f, y0, 0.0, 1.0, solver=Dopri5(1e-8, 1e-8, min_step=1e-3))


def test_max_rejections_ends_a_sample() -> None:
    f = lambda t, y: torch.where(t < 1 / 3, 1.0, -50.0).expand_as(y)  # noqa: E731
    sol = fs.solve(f, of([0.0]), 0.0, 1.0, solver=Dopri5(1e-10, 1e-10, max_rejections=4), throw=False)
    assert sol.status.tolist() == [Status.MAX_REJECTIONS]
    assert "rejected" in sol.messages[0]
    assert float(sol.t) <= 1 / 3


@pairs
def test_a_nan_a_blow_up_and_a_jump_do_no_harm_to_the_others(pair: type[Adaptive]) -> None:
    kinds = of([0.0], [1.0], [2.0], [3.0])

    def f(t: Tensor, y: Tensor) -> Tensor:
        u, kind = y[:, :1], y[:, 1:]
        du = -u
        du = torch.where((kind == 1.0) & (t > 0.5), torch.nan, du)
        du = torch.where(kind == 2.0, u * u, du)
        du = torch.where(kind == 3.0, torch.where(t < 0.4, 1.0, -1.0), du)
        return torch.cat((du, torch.zeros_like(kind)), 1)

    y0 = torch.cat((of([1.0], [1.0], [2.0], [0.0]), kinds), 1)
    sol = fs.solve(f, y0, 0.0, 1.0, solver=pair(1e-6, 1e-6), throw=False)
    assert sol.status[[0, 3]].tolist() == [Status.SUCCESS] * 2
    assert int(sol.status[1]) == Status.NONFINITE
    assert int(sol.status[2]) in (Status.NONFINITE, Status.UNDERFLOW)
    assert float(sol.t[2]) == pytest.approx(0.5, abs=1e-3)
    assert float(sol.x[0, 0]) == pytest.approx(math.exp(-1.0), abs=1e-5)
    assert float(sol.x[3, 0]) == pytest.approx(-0.2, abs=1e-4)
    assert bool(sol.x.isfinite().all())


@pairs
def test_half_precision_states_are_integrated_in_float32(pair: type[Adaptive]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        sol = fs.solve(lambda t, y: -y, torch.ones(2, 3, dtype=dtype), 0.0, 1.0, solver=pair())
        assert sol.x.dtype == torch.float32
        torch.testing.assert_close(sol.x, torch.full((2, 3), math.exp(-1.0)), rtol=1e-4, atol=1e-4)


def test_times_that_float32_cannot_tell_apart_are_refused() -> None:
    y0 = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"apart; give y0 in float64, or measure time from t0"):
        fs.solve(lambda t, y: -y, y0, 1e8, 1e8 + 1.0, solver=Dopri5())
    sol = fs.solve(lambda t, y: -y, y0.double(), 1e8, 1e8 + 1.0, solver=Dopri5(1e-8, 1e-8))
    assert float(sol.x) == pytest.approx(math.exp(-1.0), rel=1e-7)
    far = fs.solve(lambda t, y: -y / 1e8, y0, 1e8, 2e8, solver=Dopri5())
    assert float(far.x) == pytest.approx(math.exp(-1.0), rel=1e-4)


@pytest.mark.parametrize("norm", [rms, largest, lambda e: e.abs().mean(1)], ids=["rms", "largest", "mean"])
def test_norms(norm: Any) -> None:
    sol = fs.solve(pendulum, STARTS, 0.0, 4.0, solver=Tsit5(1e-7, 1e-7, norm=norm))
    torch.testing.assert_close(sol.x, truth(0.0, 4.0), rtol=1e-5, atol=1e-5)


def test_the_largest_norm_is_stricter_than_the_root_mean_square() -> None:
    y0 = torch.zeros(1, 64, dtype=torch.float64)
    y0[0, 0] = 1.0
    f = lambda t, y: torch.sin(20.0 * t) * y  # noqa: E731 (all zeros stay zeros, and have no error)
    loose, strict = (int(fs.solve(f, y0, 0.0, 2.0, solver=Dopri5(norm=n)).nfe) for n in (rms, largest))
    assert strict > loose


def test_a_pair_of_one_s_own() -> None:
    """Heun and Euler as a pair of orders 2 and 1, which is not first same as last."""

    class HeunEuler(Adaptive):
        tableau = Tableau(
            "heun-euler", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), error=((-0.5, 0.5),), error_order=1
        )

    assert HeunEuler.pair.fsal
    sol = fs.solve(pendulum, STARTS, 0.0, 1.0, solver=HeunEuler(1e-6, 1e-6), t_eval=[0.5, 1.0])
    torch.testing.assert_close(sol.x[1], truth(0.0, 1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sol.x[0], truth(0.0, 0.5), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="ssp2 has no embedded companion"):

        class Bare(Adaptive):
            tableau = Tableau("ssp2", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))


@pairs
@pytest.mark.parametrize("backwards", [False, True])
def test_output_between_steps(pair: type[Adaptive], backwards: bool) -> None:
    """Many output times: on the solution to the order of the interpolant, and without a change to the steps."""
    t0, t1 = (4.0, 0.0) if backwards else (0.0, 4.0)
    times = np.linspace(t0, t1, 41)
    tol = 1e-6 if pair is Bosh3 else 1e-8
    sol = fs.solve(pendulum, STARTS, t0, t1, solver=pair(tol, tol), t_eval=times.tolist())
    plain = fs.solve(pendulum, STARTS, t0, t1, solver=pair(tol, tol))
    assert sol.x.shape == (41, 3, 2)
    torch.testing.assert_close(sol.x[-1], plain.x, rtol=0.0, atol=0.0)
    assert (sol.x[0] == STARTS).all()
    extra = sol.nfe - plain.nfe
    assert bool((extra == 0).all()) if pair is not Dopri8 else bool(((extra > 0) & (extra % 3 == 0)).all())
    assert sol.accepted.tolist() == plain.accepted.tolist()
    for i, y in enumerate(STARTS.numpy()):
        reference = solve_ivp(swing, (t0, t1), y, t_eval=times, method="DOP853", rtol=3e-14, atol=1e-14).y.T
        error = float((sol.x[:, i] - torch.from_numpy(reference)).abs().max())
        assert error < 3e3 * tol if pair is not Dopri8 else error < 1e2 * tol, error


def test_samples_pass_output_times_in_their_own_steps() -> None:
    """Rates from 1 to 40: several samples in one step, several times in one step, and a sample that fails."""
    rate = torch.logspace(0, 1.6, 8, dtype=torch.float64)[:, None]
    y0 = torch.cat((torch.ones_like(rate), rate), 1)

    def f(t: Tensor, y: Tensor) -> Tensor:
        du = y[:, 1:] * torch.cos(y[:, 1:] * t) * y[:, :1]
        du = torch.where((y[:, 1:] > 39.0) & (t > 0.6), torch.nan, du)
        return torch.cat((du, torch.zeros_like(du)), 1)

    times = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    sol = fs.solve(f, y0, 0.0, 1.0, solver=Dopri5(1e-9, 1e-9), t_eval=times, throw=False)
    exact = torch.exp(torch.sin(rate.T * times[:, None]))
    torch.testing.assert_close(sol.x[:, :7, 0], exact[:, :7], rtol=1e-6, atol=1e-6)
    assert sol.status.tolist() == [0] * 7 + [Status.NONFINITE]
    reached = times <= sol.t[7]
    torch.testing.assert_close(sol.x[reached, 7, 0], exact[reached, 7], rtol=1e-6, atol=1e-6)
    assert bool(sol.x[~reached, 7].isnan().all())
    assert int(reached.sum()) in (12, 13)
