"""Arguments of a right-hand side that belong to samples, and intervals of their own: against closed forms."""

from __future__ import annotations

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


def test_what_does_not_go_with_them() -> None:
    with pytest.raises(ValueError, match="go with neither t_eval= nor batched=False"):
        fs.solve(lambda t, y: -y, Y0, 0.0, torch.ones(B), solver=TIGHT, t_eval=[0.5])
    with pytest.raises(ValueError, match=r"t0 or t1 has shape \(3,\); expected a number, or one a sample, \(13,\)"):
        fs.solve(lambda t, y: -y, Y0, 0.0, torch.ones(3), solver=TIGHT)
