"""Arguments of a right-hand side that belong to samples, and intervals of their own: against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.solvers import RK4, Dopri5, Dopri8

B = 13
Y0 = torch.linspace(0.5, 2.0, 2 * B, dtype=torch.float64).reshape(B, 2)
RATE = torch.linspace(0.1, 30.0, B, dtype=torch.float64)  # of needs that differ: samples leave one by one
TIGHT = Dopri5(1e-10, 1e-10)


def decay(t: Tensor, y: Tensor, rate: Tensor, shift: float = 0.0) -> Tensor:
    return -rate.reshape(-1, *[1] * (y.ndim - 1)) * (y - shift)


@pytest.mark.parametrize("solver", [TIGHT, Dopri8(1e-10, 1e-10), RK4()], ids=lambda s: type(s).__name__)
def test_arguments_follow_their_samples(solver: Any) -> None:
    options: dict[str, Any] = {"solver": solver, "nfe": None if solver.chooses_steps else 4000}
    sol = fs.solve(decay, Y0, 0.0, 1.0, args=(RATE, 0.25), **options)
    expected = 0.25 + (Y0 - 0.25) * torch.exp(-RATE)[:, None]
    torch.testing.assert_close(sol.x, expected, rtol=1e-7, atol=1e-9)
    assert len(set(sol.nfe.tolist())) > 3 or not solver.chooses_steps
    i = 4  # alone, the same to the bit
    one = fs.solve(decay, Y0[i : i + 1], 0.0, 1.0, args=(RATE[i : i + 1], 0.25), **options)
    assert torch.equal(one.x[0], sol.x[i])


def test_shared_tensors_and_trees() -> None:
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    square = torch.eye(B, dtype=torch.float64)[:, :2]  # as long as the batch, and shared

    def turn(t: Tensor, y: Tensor, m: Tensor, rate: Tensor, extra: Tensor) -> Tensor:
        assert extra.shape == square.shape
        return rate[:, None] * (y @ m.T)

    sol = fs.solve(turn, Y0, 0.0, 1.0, args=(matrix, RATE, fs.shared(square)), solver=TIGHT)
    c, s = torch.cos(RATE), torch.sin(RATE)
    expected = torch.stack((c * Y0[:, 0] + s * Y0[:, 1], c * Y0[:, 1] - s * Y0[:, 0]), 1)
    torch.testing.assert_close(sol.x, expected, rtol=1e-6, atol=1e-7)
    tree = fs.solve(
        lambda t, y, r: {"a": -r[:, None] * y["a"], "b": y["a"]},
        {"a": Y0, "b": 0 * Y0},
        0.0,
        1.0,
        args=(RATE,),
        solver=TIGHT,
    )
    torch.testing.assert_close(tree.x["b"], Y0 * (-torch.expm1(-RATE) / RATE)[:, None], rtol=1e-7, atol=1e-9)
    single = fs.solve(lambda t, y, r: -r * y, Y0[0], 0.0, 1.0, args=(RATE[:2],), solver=TIGHT, batched=False)
    torch.testing.assert_close(single.x, Y0[0] * torch.exp(-RATE[:2]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_gradients_reach_arguments(gradient: str) -> None:
    rate = RATE.clone().requires_grad_()
    sol = fs.solve(decay, Y0, 0.0, 1.0, args=(rate,), solver=TIGHT, gradient=gradient)
    (found,) = torch.autograd.grad(sol.x.sum(), rate)
    torch.testing.assert_close(found, -(Y0.sum(1) * torch.exp(-RATE)), rtol=1e-5, atol=1e-8)


def test_a_closure_over_the_batch_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"samples that are still under way .*hand them over by args="):
        fs.solve(lambda t, y: -RATE[:, None] * y, Y0, 0.0, 1.0, solver=TIGHT)


@pytest.mark.parametrize("solver", [TIGHT, RK4()], ids=lambda s: type(s).__name__)
def test_intervals_of_their_own(solver: Any) -> None:
    """y' = −t y from t0 to t1, some of them backwards, one of no length: exp((t0² − t1²)/2)."""
    options: dict[str, Any] = {"solver": solver, "nfe": None if solver.chooses_steps else 400}
    t0, t1 = torch.linspace(-1.0, 1.0, B, dtype=torch.float64), torch.linspace(2.0, 0.0, B, dtype=torch.float64)
    t1[3] = t0[3]
    sol = fs.solve(lambda t, y: -t * y, Y0, t0, t1, **options)
    torch.testing.assert_close(sol.x, Y0 * torch.exp((t0**2 - t1**2) / 2)[:, None], rtol=1e-7, atol=0)
    assert torch.equal(sol.t, t1)
    sol = fs.solve(lambda t, y, r: -r[:, None] * t * y, Y0, 0.0, t1, args=(RATE / 10,), **options)
    torch.testing.assert_close(sol.x, Y0 * torch.exp(-RATE / 10 * t1**2 / 2)[:, None], rtol=1e-7, atol=0)
    tree = fs.solve(lambda t, y: (-t * y[0], y[0].sum(1)), (Y0, Y0[:, 0]), t0, t1, **options)
    torch.testing.assert_close(tree.x[0], Y0 * torch.exp((t0**2 - t1**2) / 2)[:, None], rtol=1e-7, atol=0)


def test_gradients_of_intervals_of_their_own() -> None:
    """∂y/∂t1 = f(t1, y1), ∂y/∂t0 = −∂y/∂y0 f(t0, y0)."""
    t0 = torch.linspace(0.0, 0.5, B, dtype=torch.float64).requires_grad_()
    t1 = torch.linspace(1.0, 1.5, B, dtype=torch.float64).requires_grad_()
    sol = fs.solve(lambda t, y: -t * y, Y0, t0, t1, solver=TIGHT)
    first, last = torch.autograd.grad(sol.x.sum(), (t0, t1))
    end = sol.x.detach().sum(1)
    torch.testing.assert_close(last, -t1.detach() * end, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first, t0.detach() * end, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [TIGHT, Dopri8(1e-10, 1e-10), RK4()], ids=lambda s: type(s).__name__)
def test_times_of_output_of_their_own(solver: Any) -> None:
    """Rows of times, with ends of their own too, backwards for some; and the shared ones of own intervals."""
    options: dict[str, Any] = {"solver": solver, "nfe": None if solver.chooses_steps else 4000}
    rate = RATE / 10.0
    times = torch.rand(B, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(1).values
    times[::2] *= -1.0  # these run backwards
    truth = Y0[:, None] * torch.exp(-rate[:, None] * times)[..., None]
    t1 = torch.where(torch.arange(B) % 2 == 0, -2.0, 2.0).double()
    sol = fs.solve(decay, Y0, 0.0, t1, args=(rate,), t_eval=times, **options)
    assert sol.x.shape == (4, B, 2)
    torch.testing.assert_close(sol.x.transpose(0, 1), truth, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(sol.t, times[:, -1], rtol=1e-15, atol=0.0)
    one = fs.solve(decay, Y0[3:4], 0.0, float(times[3, -1]), args=(rate[3:4],), t_eval=times[3], **options)
    torch.testing.assert_close(one.x[:, 0], sol.x[:, 3], rtol=1e-7, atol=1e-9)
    ends = torch.linspace(1.0, 2.0, B, dtype=torch.float64)
    sol = fs.solve(decay, Y0, 0.0, ends, args=(rate,), t_eval=[0.0, 0.5, 1.0], dense=True, **options)
    torch.testing.assert_close(sol.x[1], Y0 * torch.exp(-0.5 * rate)[:, None], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(sol.dense(ends[:, None])[0], Y0 * torch.exp(-ends * rate)[:, None], rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="rows that do not run from t0 towards t1"):
        fs.solve(decay, Y0, 0.0, t1, args=(rate,), t_eval=-times, **options)


def test_events_in_intervals_of_their_own() -> None:
    """y₀ e^(−λ(t − t₀)) = c at t₀ + ln(y₀/c)/λ, and its derivative by t₀, which is 1."""
    t0 = torch.linspace(-1.0, 1.0, B, dtype=torch.float64).requires_grad_()
    sol = fs.solve(decay, Y0, t0, t0.detach() + 100.0, args=(RATE,), solver=TIGHT, event=lambda t, y, r: y[:, 0] - 0.2)
    torch.testing.assert_close(sol.t, t0 + (Y0[:, 0] / 0.2).log() / RATE, rtol=1e-7, atol=1e-9)
    assert torch.equal(sol.events[0].t, sol.t)
    (found,) = torch.autograd.grad(sol.t.sum(), t0)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_tolerances_and_first_steps_of_their_own(gradient: str) -> None:
    """A sample has the steps that it has alone with these numbers."""
    rtol = torch.logspace(-10, -3, B, dtype=torch.float64)
    first = torch.linspace(1e-3, 1e-2, B, dtype=torch.float64)
    y0 = Y0.clone().requires_grad_()
    sol = fs.solve(
        decay,
        y0,
        0.0,
        1.0,
        args=(RATE,),
        solver="dopri5",
        rtol=rtol,
        atol=rtol / 10,
        first_step=first,
        gradient=gradient,
    )
    (grad,) = torch.autograd.grad(sol.x.sum(), y0)
    torch.testing.assert_close(grad, torch.exp(-RATE)[:, None].expand(B, 2), rtol=1e-1, atol=1e-3)
    for i in (0, 5, B - 1):
        solver = Dopri5(float(rtol[i]), float(rtol[i] / 10), first_step=float(first[i]))
        one = fs.solve(decay, Y0[i : i + 1], 0.0, 1.0, args=(RATE[i : i + 1],), solver=solver)
        torch.testing.assert_close(sol.x[i], one.x[0], rtol=1e-12, atol=0.0)
        assert int(sol.accepted[i]) == int(one.accepted[0])
        assert int(sol.rejected[i]) == int(one.rejected[0])
    plain = fs.solve(decay, Y0, 0.0, 1.0, args=(RATE,), solver="dopri5", rtol=1e-8, atol=1e-9)
    named = fs.solve(decay, Y0, 0.0, 1.0, args=(RATE,), solver=Dopri5(1e-8, 1e-9))
    assert torch.equal(plain.x, named.x)
    with pytest.raises(ValueError, match=r"rtol has shape \(3,\); expected one a sample, \(13,\)"):
        fs.solve(decay, Y0, 0.0, 1.0, args=(RATE,), solver="dopri5", rtol=rtol[:3])
    with pytest.raises(TypeError, match="rtol given, but RK4 has none"):
        fs.solve(decay, Y0, 0.0, 1.0, args=(RATE,), solver=RK4(), nfe=40, rtol=1e-3)


# --- times that steps must meet --------------------------------------------------------------------------------------


def kinked(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t < 0.5, -0.5 * y, 2.0 * y)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("back", [False, True])
def test_a_jump_is_met(gradient: str, back: bool) -> None:
    """y' = −y/2 before t = ½, 2y after: no rejection, fewer evaluations than by search, asked beside ½ only."""
    asked: list[Tensor] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        asked.append(t.detach())
        return kinked(t, y)

    t0, t1 = (1.0, 0.0) if back else (0.0, 1.0)
    y0, times = Y0.clone().requires_grad_(), [t0, 0.5, t1]
    sol = fs.solve(f, y0, t0, t1, solver=TIGHT, jump_t=[0.5, 3.0], t_eval=times, gradient=gradient)
    factors = [1.0, math.exp(-1.0), math.exp(-0.75)] if back else [1.0, math.exp(-0.25), math.exp(0.75)]
    for x, factor in zip(sol.x, factors, strict=True):
        torch.testing.assert_close(x, y0 * factor, rtol=1e-8, atol=0.0)
    (grad,) = torch.autograd.grad(sol.x[-1].sum(), y0)
    torch.testing.assert_close(grad, torch.full_like(grad, factors[-1]), rtol=1e-7, atol=0.0)
    assert not any(bool((t == 0.5).any()) for t in asked)
    assert int(sol.rejected.max()) == 0
    searched = fs.solve(kinked, Y0, t0, t1, solver=TIGHT)
    assert int(sol.nfe.max()) < int(searched.nfe.min())


def test_corners_keep_the_account_of_a_solve() -> None:
    """Events end samples on either side; what ended takes no part in what follows; and dense output spans all."""
    sol = fs.solve(
        kinked, Y0, 0.0, 1.0, solver=TIGHT, jump_t=torch.tensor([0.5]), step_t=[0.2], t_eval=[0.4, 0.9], dense=True,
        event=lambda t, y: y[:, 0] - 1.5,
    )  # fmt: skip
    y = Y0[:, 0]
    early, low = y > 1.5, y * math.exp(-0.25)
    truth = torch.where(early, 2.0 * (y / 1.5).log(), 0.5 + 0.5 * (1.5 / low).log())
    met = early & (truth < 0.5) | ~early & (truth < 0.9)
    assert 2 < int(met.sum()) < B - 2
    assert torch.equal(sol.status == fs.Status.EVENT, met)
    torch.testing.assert_close(sol.t, torch.where(met, truth, 0.9), rtol=1e-8, atol=0.0)
    assert torch.equal(sol.events[0].sample, torch.nonzero(met).flatten())
    assert torch.equal(torch.isnan(sol.x[1, :, 0]), met)
    rest = ~met
    torch.testing.assert_close(sol.x[1, rest], Y0[rest] * math.exp(-0.25 + 0.8), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(sol.dense([0.4, 0.9])[:, rest], sol.x[:, rest], rtol=1e-12, atol=0.0)
    ends, _ = sol.dense.steps(int(torch.nonzero(rest)[0]))
    assert {0.2, 0.5} <= set(ends.tolist())
    assert len(ends) == int(sol.accepted[rest][0]) + 1


def test_trees_and_single_systems_meet_corners() -> None:
    tree = fs.solve(lambda t, y: {"a": kinked(t, y["a"])}, {"a": Y0}, 0.0, 1.0, solver=TIGHT, jump_t=[0.5])
    torch.testing.assert_close(tree.x["a"], Y0 * math.exp(0.75), rtol=1e-8, atol=0.0)
    one = fs.solve(kinked, Y0[0], 0.0, 1.0, solver=TIGHT, jump_t=[0.5], batched=False, t_eval=[0.5, 1.0])
    torch.testing.assert_close(one.x[-1], Y0[0] * math.exp(0.75), rtol=1e-8, atol=0.0)
    end = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    moved = fs.solve(kinked, Y0, 0.0, end, solver=TIGHT, jump_t=[0.5])
    (found,) = torch.autograd.grad(moved.x.sum(), end)
    torch.testing.assert_close(found, 2.0 * moved.x.detach().sum(), rtol=1e-8, atol=0.0)


def test_what_does_not_go_with_them() -> None:
    with pytest.raises(ValueError, match="go with no batched=False"):
        fs.solve(lambda t, y: -y, Y0, 0.0, torch.ones(B), solver=TIGHT, batched=False)
    with pytest.raises(ValueError, match=r"t0 or t1 has shape \(3,\); expected a number, or one a sample, \(13,\)"):
        fs.solve(lambda t, y: -y, Y0, 0.0, torch.ones(3), solver=TIGHT)
    with pytest.raises(ValueError, match="are for adaptive solvers without nfe="):
        fs.solve(lambda t, y: -y, Y0, 0.0, 1.0, solver=RK4(), nfe=40, jump_t=[0.5])
    with pytest.raises(ValueError, match="are of one interval"):
        fs.solve(lambda t, y: -y, Y0, 0.0, torch.ones(B), solver=TIGHT, jump_t=[0.5])
