"""Adaptive Dopri5 against scipy, and what happens to each sample of a batch when others are easy, hard or broken.

Right-hand sides are elementwise, so a sample's arithmetic does not depend on its neighbours except through the
vectorisation of elementary functions and reductions, which may round differently at another place of a batch:
"alone" and "in a batch" are compared to 1e-12, and their evaluation and step counts exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import flowsolve as fs
from flowsolve import Status
from flowsolve.paths import CondOT, Discrete
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import PI, PID, Controller, Dopri5, I, rms
from flowsolve.solvers.base import run

Field = Callable[[Tensor, Tensor], Tensor]


def of(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """A driven pendulum: nonlinear and nonautonomous; y of shape (B, 2)."""
    return torch.stack((y[:, 1], -torch.sin(y[:, 0]) + 0.5 * torch.cos(3.0 * t.reshape(-1))), 1)


def reference(y0: Tensor, t0: float, t1: float) -> Tensor:
    rows = [
        solve_ivp(
            lambda t, y: [y[1], -math.sin(y[0]) + 0.5 * math.cos(3.0 * t)],
            (t0, t1), y.numpy(), method="DOP853", rtol=3e-14, atol=1e-14,
        ).y[:, -1]
        for y in y0
    ]  # fmt: skip
    return torch.from_numpy(np.stack(rows))


def counted(f: Field) -> tuple[Field, list[int]]:
    """f, and the number of rows of each of its calls."""
    rows: list[int] = []

    def g(t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(y))
        return f(t, y)

    return g, rows


def rates(y: Tensor) -> Tensor:
    """The rate that a sample carries in its second component."""
    return y[:, 1:]


def spinner(t: Tensor, y: Tensor) -> Tensor:
    """y = (u, k): u' = k cos(k t) (1 + u²)/2, stiffness k its own business; k' = 0."""
    k = rates(y)
    return torch.cat((k * torch.cos(k * t) * (1.0 + y[:, :1].square()) / 2.0, torch.zeros_like(k)), 1)


STARTS = of([0.3, 0.0], [2.5, -0.5], [-1.0, 1.5])


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 5.0), (5.0, 0.0), (-2.0, 1.0)])
def test_agrees_with_dop853(t0: float, t1: float) -> None:
    sol = fs.solve(pendulum, STARTS, t0, t1, solver=Dopri5(rtol=1e-12, atol=1e-12))
    torch.testing.assert_close(sol.x, reference(STARTS, t0, t1), rtol=1e-10, atol=1e-10)
    assert sol.ok.all()
    assert (sol.t == t1).all()


def test_the_error_follows_the_tolerance() -> None:
    """From 1e-3 to 1e-9: at most 100 tolerances (the pendulum amplifies), and in proportion (slope 1 ± 0.2)."""
    truth = reference(STARTS, 0.0, 5.0)
    tolerances = [10.0**-k for k in range(3, 10)]
    errors, nfe = [], []
    for tol in tolerances:
        sol = fs.solve(pendulum, STARTS, 0.0, 5.0, solver=Dopri5(rtol=tol, atol=tol))
        errors.append(float((sol.x - truth).abs().max()))
        nfe.append(int(sol.nfe.sum()))
    print("TOL", errors, nfe)
    assert all(e < 100 * tol for e, tol in zip(errors, tolerances, strict=True)), errors
    assert 0.8 <= np.polyfit(np.log(tolerances), np.log(errors), 1)[0] <= 1.2, errors
    assert nfe == sorted(nfe)
    # At order 5 a thousandth of the tolerance costs 1000^(1/5) = 4 times the steps.
    assert 2.5 < nfe[-1] / nfe[-4] < 5.0


def test_cost_is_that_of_scipy_s_rk45() -> None:
    """The same pair with the same tolerance: as many evaluations within a factor of 1.5."""
    for y in STARTS:
        ours = fs.solve(pendulum, y[None], 0.0, 5.0, solver=Dopri5(rtol=1e-7, atol=1e-7))
        theirs = solve_ivp(
            lambda t, y: [y[1], -math.sin(y[0]) + 0.5 * math.cos(3.0 * t)], (0, 5), y.numpy(), rtol=1e-7, atol=1e-7
        )
        assert 1 / 1.5 < int(ours.nfe) / theirs.nfev < 1.5


def test_decreasing_time_undoes_increasing_time() -> None:
    there = fs.solve(pendulum, STARTS, 0.0, 3.0, solver=Dopri5(rtol=1e-11, atol=1e-11)).x
    back = fs.solve(pendulum, there, 3.0, 0.0, solver=Dopri5(rtol=1e-11, atol=1e-11)).x
    torch.testing.assert_close(back, STARTS, rtol=1e-8, atol=1e-8)


def test_float32_stays_float32_and_meets_a_tolerance_it_can_meet() -> None:
    seen: set[torch.dtype] = set()

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.update((t.dtype, y.dtype))
        return pendulum(t, y)

    sol = fs.solve(f, STARTS.float(), 0.0, 5.0, solver=Dopri5(rtol=1e-5, atol=1e-5))
    assert sol.x.dtype == torch.float32
    assert seen == {torch.float32}
    torch.testing.assert_close(sol.x.double(), reference(STARTS, 0.0, 5.0), rtol=1e-3, atol=1e-3)


def test_any_event_shape() -> None:
    y0 = torch.linspace(0.1, 1.0, 24, dtype=torch.float64)
    flat = fs.solve(lambda t, y: -y, y0.reshape(2, 12), 0.0, 1.0, solver=Dopri5(1e-9, 1e-9))
    image = fs.solve(lambda t, y: -y, y0.reshape(2, 3, 2, 2), 0.0, 1.0, solver=Dopri5(1e-9, 1e-9))
    assert (image.x.reshape(2, 12) == flat.x).all()
    assert (image.nfe == flat.nfe).all()
    points = fs.solve(lambda t, y: -y, y0, 0.0, 1.0, solver=Dopri5(1e-9, 1e-9))  # S = (): numbers
    torch.testing.assert_close(points.x, y0 * math.exp(-1.0), rtol=1e-7, atol=1e-7)


# --- samples are strangers to each other -----------------------------------------------------------------------------


def test_one_hard_sample_among_64_easy_ones() -> None:
    solver = Dopri5(rtol=1e-8, atol=1e-8)
    easy = torch.stack((torch.linspace(-0.5, 0.5, 64, dtype=torch.float64), torch.linspace(0.5, 1.5, 64)), 1)
    hard = of([0.2, 60.0])
    batch = torch.cat((easy[:20], hard, easy[20:]))
    f, rows = counted(spinner)
    together = fs.solve(f, batch, 0.0, 1.0, solver=solver)
    assert sum(rows) == int(together.nfe.sum()), "finished samples are still evaluated, or NFE is miscounted"
    assert rows[0] == 65
    assert rows[-1] == 1
    assert together.nfe[20] > 5 * together.nfe.median()

    alone = fs.solve(spinner, hard, 0.0, 1.0, solver=solver)
    others = fs.solve(spinner, easy, 0.0, 1.0, solver=solver)
    keep = torch.arange(65) != 20
    for part, whole in ((alone, together.x[20:21]), (others, together.x[keep])):
        torch.testing.assert_close(part.x, whole, rtol=1e-12, atol=1e-12)
    for field in ("nfe", "accepted", "rejected", "status"):
        mine = getattr(together, field)
        assert (mine[20:21] == getattr(alone, field)).all(), field
        assert (mine[keep] == getattr(others, field)).all(), field
    for i in (0, 31, 63):
        solo = fs.solve(spinner, easy[i : i + 1], 0.0, 1.0, solver=solver)
        torch.testing.assert_close(solo.x, others.x[i : i + 1], rtol=1e-12, atol=1e-12)
        assert int(solo.nfe) == int(others.nfe[i])
    # u' = k cos(kt)(1 + u²)/2 with u = tan: u(t) = tan(arctan u₀ + sin(kt)/2)
    truth = torch.tan(torch.atan(batch[:, 0]) + torch.sin(batch[:, 1]) / 2)
    torch.testing.assert_close(together.x[:, 0], truth, rtol=1e-5, atol=1e-5)


def test_arithmetic_without_elementary_functions_is_the_same_to_the_bit() -> None:
    """A polynomial field and a maximum norm: nothing rounds differently in another batch."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return y * (1.0 - y) * 3.0

    solver = Dopri5(rtol=1e-7, atol=1e-7, norm=lambda e: e.abs().amax(1))
    batch = torch.linspace(0.01, 1.7, 64 * 8, dtype=torch.float64).reshape(64, 8)
    whole = fs.solve(f, batch, 0.0, 2.0, solver=solver)
    for i in (0, 7, 40, 63):
        solo = fs.solve(f, batch[i : i + 1], 0.0, 2.0, solver=solver)
        assert (solo.x[0] == whole.x[i]).all()
        assert (int(solo.nfe), int(solo.rejected)) == (int(whole.nfe[i]), int(whole.rejected[i]))


def test_the_order_of_a_batch_does_not_matter() -> None:
    y0 = torch.stack((torch.linspace(-1, 1, 9, dtype=torch.float64), torch.logspace(0, 1.3, 9, dtype=torch.float64)), 1)
    a = fs.solve(spinner, y0, 0.0, 1.0, solver=Dopri5())
    b = fs.solve(spinner, y0.flip(0), 0.0, 1.0, solver=Dopri5())
    torch.testing.assert_close(a.x, b.x.flip(0), rtol=1e-12, atol=1e-12)
    assert (a.nfe == b.nfe.flip(0)).all()


def test_network_rows_are_counted_on_flows_too_and_conditioning_follows_its_sample() -> None:
    problem = GaussianMixture(of([-1.0, 0.5], [1.0, 1.0]), 0.7)
    for path in (CondOT(), Discrete.linear()):
        exact, rows = problem.flow(path), []

        def net(x: Tensor, t: Tensor, gain: Tensor, shared: float, exact: fs.Flow = exact, rows: list = rows) -> Tensor:
            rows.append(len(x))
            assert gain.shape == (len(x),)
            assert shared == 1.0
            return exact.net(x, t) * gain[:, None]

        flow, gain = fs.Flow(net, path), of(1.0, 0.5, 2.0, 1.5)
        start = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        sol = fs.sample(flow, start=start, solver=Dopri5(), cond={"gain": gain, "shared": 1.0})
        assert sum(rows) == int(sol.nfe.sum())
        assert len(set(sol.nfe.tolist())) > 1
        for i in range(4):
            cond = {"gain": gain[i : i + 1], "shared": 1.0}
            solo = fs.sample(flow, start=start[i : i + 1], solver=Dopri5(), cond=cond)
            torch.testing.assert_close(solo.x[0], sol.x[i], rtol=1e-11, atol=1e-11)
            assert int(solo.nfe) == int(sol.nfe[i])


# --- failures stay where they are ------------------------------------------------------------------------------------


def broken(i_value: float, after: float) -> Field:
    """NaN for the samples that carry i_value, once t >= after."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        bad = (rates(y) == i_value) & (t >= after)
        return torch.where(bad, torch.nan, spinner(t, y))

    return f


@pytest.mark.parametrize("after", [0.0, 0.5])
@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
def test_a_field_that_fails_for_one_sample(after: float, worst: float) -> None:
    y0 = of([0.1, 1.0], [0.2, 7.0], [0.3, 2.0], [-0.3, 3.0])
    good = torch.tensor([True, False, True, True])

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((rates(y) == 7.0) & (t >= after), worst, spinner(t, y))

    sol = fs.solve(f, y0, 0.0, 1.0, solver=Dopri5(), throw=False)
    assert sol.status.tolist() == [0, Status.NONFINITE, 0, 0]
    assert float(sol.t[1]) == pytest.approx(after, abs=1e-6)
    assert float(sol.t[1]) <= after
    assert bool(sol.x.isfinite().all())
    assert int(sol.nfe[1]) < 1000
    for i in (0, 2, 3):
        solo = fs.solve(f, y0[i : i + 1], 0.0, 1.0, solver=Dopri5())
        torch.testing.assert_close(solo.x[0], sol.x[i], rtol=1e-13, atol=1e-13)
        assert int(solo.nfe) == int(sol.nfe[i])
    alive = fs.solve(f, y0[good], 0.0, 1.0, solver=Dopri5())
    torch.testing.assert_close(alive.x, sol.x[good], rtol=1e-13, atol=1e-13)
    if after:  # what it holds is the solution up to there
        upto = fs.solve(spinner, y0[1:2], 0.0, float(sol.t[1]), solver=Dopri5(1e-9, 1e-9))
        torch.testing.assert_close(sol.x[1:2], upto.x, rtol=1e-3, atol=1e-3)
    else:
        assert (sol.x[1] == y0[1]).all()


def test_a_start_that_is_not_finite() -> None:
    sol = fs.solve(lambda t, y: -y, of([1.0], [torch.nan], [torch.inf]), 0.0, 1.0, solver=Dopri5(), throw=False)
    assert sol.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.NONFINITE]
    sol = fs.solve(lambda t, y: -y, of([1.0], [torch.nan]), 0.0, 1.0, solver=Dopri5(first_step=0.1), throw=False)
    assert sol.status.tolist() == [Status.SUCCESS, Status.NONFINITE]


def test_blow_up_in_finite_time() -> None:
    """y' = y² leaves every bound at t = 1/y₀; the samples that live longer than the interval are exact."""
    y0 = of([0.5], [2.0], [0.1], [-3.0])
    sol = fs.solve(lambda t, y: y * y, y0, 0.0, 1.0, solver=Dopri5(1e-6, 1e-6), throw=False)
    ok = torch.tensor([True, False, True, True])
    assert (sol.ok == ok).all()
    assert int(sol.status[1]) in (Status.NONFINITE, Status.UNDERFLOW)
    assert float(sol.t[1]) == pytest.approx(0.5, abs=1e-4)
    torch.testing.assert_close(sol.x[ok], (1 / (1 / y0 - 1.0))[ok], rtol=1e-4, atol=1e-4)


def test_a_blow_up_ends_when_time_stands_still() -> None:
    """At t* − t = 1e-16 time cannot advance: y is at most some 1e16, and no step may be accepted for standing still."""
    calls: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1.0)
        if len(calls) > 6000:  # a few hundred steps lead there
            raise AssertionError("still going")
        return y * y

    sol = fs.solve(f, of([2.0]), 0.0, 1.0, solver=Dopri5(1e-8, 1e-8), throw=False)
    assert int(sol.status) in (Status.NONFINITE, Status.UNDERFLOW)
    assert float(sol.x) < 1e18


def test_a_discontinuous_field_is_crossed() -> None:
    """y' = 1 before t = 1/3 and −2 after it: y(1) = 1/3 − 4/3."""
    f = lambda t, y: torch.where(t < 1 / 3, 1.0, -2.0).expand_as(y)  # noqa: E731
    sol = fs.solve(f, of([0.0], [5.0]), 0.0, 1.0, solver=Dopri5(rtol=1e-8, atol=1e-8))
    torch.testing.assert_close(sol.x, of([-1.0], [4.0]), rtol=1e-6, atol=1e-6)
    assert (sol.rejected > 0).all()
    assert (sol.nfe < 1000).all()


def test_sliding_along_a_discontinuity_ends_with_a_status() -> None:
    """y' = −sign(y) chatters at 0: it may end in an underflow or crawl to max_steps, but it ends, and near 0."""
    sol = fs.solve(lambda t, y: -torch.sign(y), of([0.5]), 0.0, 1.0, solver=Dopri5(max_steps=500), throw=False)
    assert abs(float(sol.x)) < 1e-3
    assert int(sol.status) in (Status.SUCCESS, Status.UNDERFLOW, Status.MAX_STEPS)


def test_max_steps() -> None:
    y0 = of([0.2, 200.0], [0.2, 1.0])
    sol = fs.solve(spinner, y0, 0.0, 1.0, solver=Dopri5(rtol=1e-8, atol=1e-8, max_steps=20), throw=False)
    assert sol.status.tolist() == [Status.MAX_STEPS, Status.SUCCESS]
    assert int(sol.accepted[0] + sol.rejected[0]) == 20
    assert 0.0 < float(sol.t[0]) < 1.0
    upto = fs.solve(spinner, y0[:1], 0.0, float(sol.t[0]), solver=Dopri5(rtol=1e-10, atol=1e-10))
    torch.testing.assert_close(sol.x[:1], upto.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [8, 9, 20, 38, 200, 1001])
def test_a_budget_is_kept_and_the_best_state_returned(budget: int) -> None:
    y0 = of([0.2, 90.0], [0.2, 1.0])
    f, rows = counted(spinner)
    sol = fs.solve(f, y0, 0.0, 1.0, solver=Dopri5(rtol=1e-9, atol=1e-9), nfe=budget, throw=False)
    assert (sol.nfe <= budget).all()
    assert sum(rows) == int(sol.nfe.sum())
    assert int(sol.status[0]) == Status.BUDGET
    assert int(sol.nfe[0]) > budget - 6, "a budget that pays for another step is spent"
    upto = fs.solve(spinner, y0[:1], 0.0, float(sol.t[0]), solver=Dopri5(rtol=1e-11, atol=1e-11))
    torch.testing.assert_close(sol.x[:1], upto.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_a_budget_too_small_for_one_step_is_never_exceeded(budget: int) -> None:
    """Refused, or returned unspent; on no account overdrawn."""
    f, rows = counted(spinner)
    try:
        sol = fs.solve(f, of([0.2, 3.0]), 0.0, 1.0, solver=Dopri5(), nfe=budget, throw=False)
    except ValueError:
        assert rows == []
    else:
        assert int(sol.nfe) <= budget
        assert sum(rows) <= budget


@pytest.mark.parametrize("budget", [8, 9, 14, 15, 30])
@pytest.mark.parametrize("path", [CondOT(), Discrete.linear()], ids=["CondOT", "Discrete"])
def test_a_budget_on_a_flow_counts_the_closing_evaluation(path: Any, budget: int) -> None:
    problem, rows = GaussianMixture(of([-1.0, 0.5], [1.0, 1.0]), 0.3), []
    exact = problem.flow(path)

    def net(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return exact.net(x, t)

    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = Dopri5(rtol=1e-7, atol=1e-7)
    try:
        sol = fs.sample(fs.Flow(net, path), start=start, solver=solver, nfe=budget, throw=False)
    except ValueError:
        assert budget < 9
        assert rows == []
        return
    assert (sol.nfe <= budget).all()
    assert sum(rows) == int(sol.nfe.sum())
    assert (sol.status == Status.BUDGET).all()
    assert bool(sol.x.isfinite().all())


def test_the_error_names_samples_time_and_evaluations() -> None:
    y0 = of([0.1, 1.0], [0.2, 7.0], [0.3, 2.0], [0.4, 7.0])
    with pytest.raises(fs.SolverError) as caught:
        fs.solve(broken(7.0, 0.5), y0, 0.0, 1.0, solver=Dopri5())
    error = caught.value
    assert error.samples == [1, 3]
    sol = error.solution
    message = str(error)
    for i in (1, 3):
        assert f"sample {i}: " in message
        assert f"t = {float(sol.t[i]):.6g} after {int(sol.nfe[i])} evaluations" in message
    assert "2 of 4 samples" in message
    assert "throw=False" in message
    torch.testing.assert_close(
        sol.x, fs.solve(broken(7.0, 0.5), y0, 0.0, 1.0, solver=Dopri5(), throw=False).x, rtol=0, atol=0
    )


def test_a_fixed_grid_isolates_a_failure_too() -> None:
    y0 = of([0.1, 1.0], [0.2, 7.0], [0.3, 2.0])
    sol = fs.solve(broken(7.0, 0.45), y0, 0.0, 1.0, solver=fs.solvers.Heun(), nfe=20, throw=False)
    assert sol.status.tolist() == [0, Status.NONFINITE, 0]
    assert float(sol.t[1]) == pytest.approx(0.5)  # the end of the step in which it happened
    solo = fs.solve(spinner, y0[[0, 2]], 0.0, 1.0, solver=fs.solvers.Heun(), nfe=20)
    torch.testing.assert_close(sol.x[[0, 2]], solo.x, rtol=1e-13, atol=1e-13)
    with pytest.raises(fs.SolverError, match=r"sample 1: .* t = 0\.5 after 20 evaluations"):
        fs.solve(broken(7.0, 0.45), y0, 0.0, 1.0, solver=fs.solvers.Heun(), nfe=20)


# --- the error test --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", [I(), PI(), PI(safety=0.99, min_factor=0.5), PID(0.2, 0.4, 0.1)], ids=repr)
def test_a_step_that_fails_its_error_test_is_never_accepted(controller: Controller) -> None:
    """Every attempt is made by hand: its error is read from the norm, and the state moves if and only if it is ≤ 1."""
    errors: list[Tensor] = []

    def norm(scaled: Tensor) -> Tensor:
        errors.append(rms(scaled))
        return errors[-1]

    solver = Dopri5(rtol=1e-6, atol=1e-6, norm=norm, controller=controller)
    y0 = torch.stack((torch.linspace(-1, 1, 16, dtype=torch.float64), torch.logspace(0, 2, 16, dtype=torch.float64)), 1)

    def ask(query: Any) -> Tensor:
        t = query.t if isinstance(query.t, Tensor) else torch.full((16,), query.t, dtype=torch.float64)
        return torch.where(t[:, None] < 0.3, 1.0, -1.0) * spinner(t[:, None], query.x)  # a jump, to be rejected

    state = run(solver.begin(y0, 0.0, 1.0), ask)
    failures = 0
    for _ in range(60):
        before, calls = state, len(errors)
        attempt = run(solver.attempt(before, 1.0), ask)
        state = attempt.state
        assert len(errors) == calls + 1
        passed = (errors[-1] <= 1.0).numpy()
        assert (attempt.accepted == passed).all()
        failures += int((~passed).sum())
        assert ((state.s != before.s) == passed).all()
        assert ((state.y != before.y).any(1).numpy() == passed).all()
        assert (state.accepted - before.accepted == passed).all()
        assert (state.rejected - before.rejected == ~passed).all()
        assert (np.abs(state.h)[~passed] < np.abs(before.h)[~passed]).all(), (
            "a failed step is retried with a smaller one"
        )
        assert (state.s[passed] - before.s[passed] <= before.h[passed] * 1.000001).all()
        state = state.mark(np.ones(16, dtype=bool), Status.RUNNING)
        if (state.s >= 0.9).any():
            break
    assert failures > 5


def test_the_error_estimate_is_the_difference_of_the_two_solutions() -> None:
    """One attempt of y' = λ y: the pair's polynomials in z = hλ are known, R₅ and R̂₄ (Hairer & Wanner IV.2)."""
    seen: list[Tensor] = []

    def norm(scaled: Tensor) -> Tensor:
        seen.append(scaled.clone())
        return scaled.abs().amax(1)

    lam, h = -1.3, 0.25
    solver = Dopri5(rtol=0.0, atol=1.0, first_step=h, norm=norm)
    state = run(solver.begin(of([2.0]), 0.0, 1.0), lambda q: lam * q.x)
    state = run(solver.attempt(state, 1.0), lambda q: lam * q.x).state
    z = lam * h
    five = 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24 + z**5 / 120 + z**6 / 600
    assert float(state.y) == pytest.approx(2 * five, rel=1e-14)
    four = 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24 + 1097 / 120000 * z**5 + 161 / 120000 * z**6 + z**7 / 24000
    assert float(seen[-1]) == pytest.approx(2 * (five - four), rel=1e-9)


@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 0.0), (-1e-3, 1e-3), (1e-3, -1.0), (math.nan, 1e-3), (math.inf, 1.0)])
def test_tolerances_that_no_step_can_meet(rtol: float, atol: float) -> None:
    with pytest.raises(ValueError, match="tol"):
        Dopri5(rtol=rtol, atol=atol)


def test_one_tolerance_may_be_zero() -> None:
    for solver in (Dopri5(rtol=0.0, atol=1e-9), Dopri5(rtol=1e-9, atol=0.0)):
        sol = fs.solve(lambda t, y: -y, of([1.0, 3.0]), 0.0, 1.0, solver=solver)
        torch.testing.assert_close(sol.x, of([1.0, 3.0]) * math.exp(-1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{"first_step": 0.0}, {"first_step": -0.1}, {"max_step": 0.0}, {"max_steps": 0}], ids=repr
)
def test_options_that_make_no_step(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Dopri5(**options)


def test_max_step_and_first_step_are_obeyed() -> None:
    times: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t.flatten()[0]))
        return -y

    sol = fs.solve(f, of([1.0]), 0.0, 1.0, solver=Dopri5(rtol=1e-2, atol=1e-2, max_step=0.05))
    assert int(sol.accepted) == 20
    times.clear()
    fs.solve(f, of([1.0]), 0.0, 1.0, solver=Dopri5(rtol=1e-2, atol=1e-2, first_step=0.02))
    assert times[1] == pytest.approx(0.02 / 5)  # no evaluation to choose it, and its second node


# --- edges of the interface ------------------------------------------------------------------------------------------


def test_an_interval_of_no_length() -> None:
    for solver in (Dopri5(), fs.solvers.RK4()):
        f, rows = counted(lambda t, y: -y)
        sol = fs.solve(f, STARTS, 0.7, 0.7, solver=solver, nfe=20)
        assert (sol.x == STARTS).all()
        assert sol.nfe.tolist() == [0, 0, 0]
        assert sol.ok.all()
        assert (sol.t == 0.7).all()
        assert rows == []


def test_batches_of_one_and_none() -> None:
    one = fs.solve(pendulum, STARTS[:1], 0.0, 1.0, solver=Dopri5())
    assert one.x.shape == (1, 2)
    for solver in (Dopri5(), fs.solvers.RK4()):
        none = fs.solve(pendulum, STARTS[:0], 0.0, 1.0, solver=solver, nfe=40)
        assert none.x.shape == (0, 2)
        assert none.nfe.shape == none.status.shape == none.t.shape == (0,)
        assert none.ok.all()


@pytest.mark.parametrize("stops", [[0.25, 1.0, 2.0], [0.0, 0.5], [2.0], [0.1, 0.2, 0.3, 1.9]])
def test_t_eval_is_on_the_solution_and_does_not_disturb_it(stops: list[float]) -> None:
    solver = Dopri5(rtol=1e-10, atol=1e-10)
    f, rows = counted(pendulum)
    sol = fs.solve(f, STARTS, 0.0, 2.0, solver=solver, t_eval=stops)
    assert sol.x.shape == (len(stops), 3, 2)
    assert sol.t_eval is not None
    assert sol.t_eval.tolist() == stops
    assert sum(rows) == int(sol.nfe.sum())
    for x, stop in zip(sol.x, stops, strict=True):
        if stop:
            # The interpolant is of order 4, one less than the steps.
            torch.testing.assert_close(x, reference(STARTS, 0.0, stop), rtol=1e-6, atol=1e-6)
        else:
            assert (x == STARTS).all()
    assert (sol.nfe == fs.solve(pendulum, STARTS, 0.0, stops[-1], solver=solver).nfe).all(), "stops disturb the steps"


def test_t_eval_backwards_on_a_fixed_grid_and_refusals() -> None:
    stops = [1.0, 0.4999, 0.0]
    fixed = fs.solve(pendulum, STARTS, 2.0, 0.0, solver=fs.solvers.RK4(), nfe=4 * 200, t_eval=stops)
    adaptive = fs.solve(pendulum, STARTS, 2.0, 0.0, solver=Dopri5(1e-10, 1e-10), t_eval=stops)
    torch.testing.assert_close(fixed.x, adaptive.x, rtol=1e-6, atol=1e-6)
    for bad in ([0.5, 0.2], [3.0], [], [-0.1], [0.5, 0.5]):
        with pytest.raises(ValueError, match="t_eval"):
            fs.solve(pendulum, STARTS, 0.0, 2.0, solver=Dopri5(), t_eval=bad)


def test_a_sample_that_fails_before_a_stop_has_no_state_there() -> None:
    y0 = of([0.1, 1.0], [0.2, 7.0])
    sol = fs.solve(broken(7.0, 0.5), y0, 0.0, 1.0, solver=Dopri5(), t_eval=[0.25, 0.75, 1.0], throw=False)
    assert sol.status.tolist() == [Status.SUCCESS, Status.NONFINITE]
    assert float(sol.t[1]) <= 0.5
    assert sol.x[0].isfinite().all()
    assert sol.x[1:, 1].isnan().all()
    assert sol.x[1:, 0].isfinite().all()
    assert float(sol.t[0]) == 1.0


@pytest.mark.parametrize("solver", [Dopri5(1e-9, 1e-9), fs.solvers.RK4()], ids=["adaptive", "fixed"])
def test_a_state_without_a_batch(solver: Any) -> None:
    """A matrix as one system: Y' = (1 + t) K Y with K skew turns Y by t + t²/2; t is 0-dimensional."""
    k = of([0.0, 1.0], [-1.0, 0.0])

    def f(t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == ()
        assert y.shape == (2, 2)
        return (1.0 + t) * k @ y

    sol = fs.solve(f, torch.eye(2, dtype=torch.float64), 0.0, 1.0, solver=solver, nfe=400, batched=False)
    angle = of(1.5)[0]
    truth = torch.stack((torch.stack((angle.cos(), angle.sin())), torch.stack((-angle.sin(), angle.cos()))))
    torch.testing.assert_close(sol.x, truth, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("solver", [Dopri5(1e-9, 1e-9), fs.solvers.RK4()], ids=["adaptive", "fixed"])
def test_a_number_as_the_state(solver: Any, batched: bool) -> None:
    sol = fs.solve(lambda t, y: -y * (1 + 0 * t), of(2.0)[0], 0.0, 1.0, solver=solver, nfe=400, batched=batched)
    assert sol.x.shape == ()
    assert float(sol.x) == pytest.approx(2.0 * math.exp(-1.0), rel=1e-7)


def test_a_batch_of_numbers_on_a_fixed_grid() -> None:
    sol = fs.solve(lambda t, y: -y, of(1.0, 2.0, 3.0), 0.0, 1.0, solver=fs.solvers.RK4(), nfe=400)
    torch.testing.assert_close(sol.x, of(1.0, 2.0, 3.0) * math.exp(-1.0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "wrong", [lambda t, y: y[:, :1], lambda t, y: y.sum(), lambda t, y: 0.0, lambda t, y: torch.cat((y, y))]
)
@pytest.mark.parametrize("solver", [Dopri5(), fs.solvers.Euler()], ids=["adaptive", "fixed"])
def test_a_field_of_the_wrong_shape(solver: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        fs.solve(wrong, STARTS, 0.0, 1.0, solver=solver, nfe=20)


def test_time_is_a_column_that_broadcasts() -> None:
    shapes: set[tuple[int, ...]] = set()

    def f(t: Tensor, y: Tensor) -> Tensor:
        shapes.add(tuple(t.shape))
        return t * torch.ones_like(y)

    y0, truth = torch.zeros(4, 2, 3, dtype=torch.float64), torch.full((4, 2, 3), 2.0, dtype=torch.float64)
    torch.testing.assert_close(fs.solve(f, y0, 0.0, 2.0, solver=fs.solvers.Heun(), nfe=4).x, truth)
    assert shapes == {()}
    shapes.clear()
    torch.testing.assert_close(fs.solve(f, y0, 0.0, 2.0, solver=Dopri5()).x, truth)
    assert shapes == {(4, 1, 1)}, "every evaluation of an adaptive solve has a time a sample, the first one too"


def test_gradients_flow_through_accepted_steps() -> None:
    y0, rate = of([1.0], [2.0]).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sol = fs.solve(lambda t, y: -rate * y, y0, 0.0, 1.0, solver=Dopri5(1e-10, 1e-10))
    gradients = torch.autograd.grad(sol.x.sum(), (y0, rate))
    torch.testing.assert_close(gradients[0], torch.full_like(y0, math.exp(-0.7)), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(gradients[1], -3.0 * math.exp(-0.7) * torch.ones_like(rate), rtol=1e-7, atol=1e-7)
