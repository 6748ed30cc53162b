"""Events and dense output: against closed forms, scipy's events, and the implicit-function theorem."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.events import root
from flowsolve.solvers import RK4, Bosh3, Dopri5, Dopri8, Heun, Tsit5

F64 = torch.float64
G = 9.81
TIGHT = Dopri5(1e-10, 1e-10)


def fall(t: Tensor, y: Tensor, drag: float = 0.0) -> Tensor:
    return torch.stack((y[:, 1], -G - drag * y[:, 1]), 1)


def swing(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[:, 1], -torch.sin(y[:, 0])), 1)


def dropped(heights: Tensor) -> Tensor:
    return torch.stack((heights, torch.zeros_like(heights)), 1)


HEIGHTS = torch.linspace(0.5, 30.0, 1000, dtype=F64)
SOLVERS: list[tuple[Any, int | None]] = [
    (TIGHT, None), (Tsit5(1e-10, 1e-10), None), (Dopri8(1e-10, 1e-10), None), (Bosh3(1e-8, 1e-8), None),
    (RK4(), 400), (Heun(), 400), (Dopri5(adaptive=False), 600),
]  # fmt: skip


def name(v: Any) -> str:
    return type(v).__name__


@pytest.mark.parametrize(("solver", "nfe"), SOLVERS, ids=name)
def test_a_thousand_samples_with_times_of_their_own(solver: Any, nfe: int | None) -> None:
    """A parabola, on which every interpolant of order 2 or more is exact: τ = √(2h/g)."""
    sol = fs.solve(fall, dropped(HEIGHTS), 0.0, 9.0, solver=solver, nfe=nfe, event=lambda t, y: y[:, 0])
    tau = (2.0 * HEIGHTS / G).sqrt()
    torch.testing.assert_close(sol.t, tau, rtol=1e-12, atol=0.0)
    assert (sol.status == fs.Status.EVENT).all()
    assert sol.ok.all()
    assert "reached an event at t = " in sol.messages[0]
    torch.testing.assert_close(sol.x[:, 1], -G * tau, rtol=1e-12, atol=0.0)
    assert sol.x[:, 0].abs().max() < 1e-12 * 30.0
    (met,) = sol.events
    assert torch.equal(met.sample, torch.arange(1000))
    assert torch.equal(met.t, sol.t)
    assert torch.equal(met.y, sol.x)
    if nfe is None:  # alone, to the bit
        one = fs.solve(fall, dropped(HEIGHTS[7:8]), 0.0, 9.0, solver=solver, event=lambda t, y: y[:, 0])
        assert torch.equal(one.t[0], sol.t[7])
        assert torch.equal(one.x[0], sol.x[7])
        assert one.nfe[0] == sol.nfe[7]


def scipy_events(f: Any, span: tuple[float, float], y0: Any, *events: Any) -> Any:
    integrate = pytest.importorskip("scipy.integrate")
    return integrate.solve_ivp(f, span, y0, method="DOP853", rtol=1e-12, atol=1e-12, events=list(events))


def test_a_bouncing_ball_is_scipy_s() -> None:
    """Five bounces with a restitution of 0.8, restarted at each, with drag."""
    drag, kept = 0.1, 0.8

    def ground(t: float, y: Any) -> float:
        return float(y[0])

    ground.terminal, ground.direction = True, -1  # type: ignore[attr-defined]
    t, y, theirs = 0.0, np.array([3.0, 1.0]), []
    for _ in range(5):
        out = scipy_events(lambda t, y: [y[1], -G - drag * y[1]], (t, 20.0), y, ground)
        t, y = out.t_events[0][0], np.array([0.0, -kept * out.y_events[0][0][1]])
        theirs.append(t)
    event = fs.Event(lambda t, y, drag: y[:, 0], direction=-1)
    start, x, ours = torch.zeros(1, dtype=F64), torch.tensor([[3.0, 1.0]], dtype=F64), []
    for _ in range(5):
        sol = fs.solve(fall, x, float(start), 20.0, solver=Dopri8(1e-12, 1e-12), event=event, args=(drag,))
        start, x = sol.t, torch.stack((0.0 * sol.x[:, 0], -kept * sol.x[:, 1]), 1)
        ours.append(float(sol.t))
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("direction", [-1, 0, 1])
@pytest.mark.parametrize("back", [False, True])
def test_crossings_of_a_pendulum_are_scipy_s(direction: int, back: bool) -> None:
    starts, end = np.array([[1.0, 0.0], [2.5, 0.1], [0.3, -1.0]]), -20.0 if back else 20.0

    def down(t: float, y: Any) -> float:
        return float(y[0] - 0.1)

    down.direction = direction  # type: ignore[attr-defined]
    sol = fs.solve(
        swing, torch.from_numpy(starts), 0.0, end, solver=Dopri8(1e-12, 1e-12), t_eval=[end / 2, end],
        event=fs.Event(lambda t, y: y[:, 0] - 0.1, direction=direction, terminal=False),
    )  # fmt: skip
    assert (sol.status == fs.Status.SUCCESS).all()
    assert torch.isfinite(sol.x).all()
    (met,) = sol.events
    for i, y in enumerate(starts):
        out = scipy_events(lambda t, y: [y[1], -np.sin(y[0])], (0.0, end), y, down)
        assert len(out.t_events[0]) > 1
        np.testing.assert_allclose(met.t[met.sample == i].numpy(), out.t_events[0], rtol=1e-8)
        np.testing.assert_allclose(met.y[met.sample == i].numpy(), out.y_events[0], atol=1e-8)


def test_several_events_and_the_nth_of_them() -> None:
    """y = sin t, y' = cos t: the second zero of y' comes at 3π/2, after the zero of y at π."""
    ring = lambda t, y: torch.stack((y[:, 1], -y[:, 0]), 1)  # noqa: E731
    zero, turn = fs.Event(lambda t, y: y[:, 0], terminal=False), fs.Event(lambda t, y: y[:, 1:], terminal=2)
    y0 = torch.tensor([[0.0, 1.0], [math.sin(2.0), math.cos(2.0)]], dtype=F64)
    for options in ({"solver": TIGHT}, {"solver": RK4(), "nfe": 4000}):
        sol = fs.solve(ring, y0, 0.0, 10.0, event=[zero, turn], t_eval=[1.0, 4.0, 9.0], **options)
        expected = torch.tensor([1.5 * math.pi, 2.5 * math.pi - 2.0], dtype=F64)
        torch.testing.assert_close(sol.t, expected, rtol=1e-7, atol=0)
        assert torch.isnan(sol.x[2]).all()
        torch.testing.assert_close(sol.x[:2, 0, 0], torch.tensor([1.0, 4.0], dtype=F64).sin(), rtol=1e-7, atol=1e-8)
        first, second = sol.events
        torch.testing.assert_close(
            first.t, torch.tensor([math.pi, math.pi - 2.0, 2 * math.pi - 2.0], dtype=F64), rtol=1e-7, atol=0
        )
        assert first.sample.tolist() == [0, 1, 1]
        assert second.sample.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("solver", "nfe"), [(TIGHT, None), (Dopri8(1e-10, 1e-10), None), (RK4(), 4000)], ids=name)
def test_derivatives_of_an_event_s_time(solver: Any, nfe: int | None) -> None:
    """Of τ = ln(y₀/c)/λ, where y₀ e^(−λτ) = c: first and second, by y₀, λ and c; and of the state there, c."""
    y0 = torch.tensor([[2.0], [3.0], [5.0]], dtype=F64, requires_grad=True)
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    level = torch.tensor(0.7, dtype=F64, requires_grad=True)
    t0 = torch.tensor(0.25, dtype=F64, requires_grad=True)
    sol = fs.solve(
        lambda t, y, r: -r[:, None] * y, y0, t0, 9.0, solver=solver, nfe=nfe, args=(rate,),
        event=lambda t, y, r: y[:, 0] - level,
    )  # fmt: skip
    truth = 0.25 + (y0[:, 0] / level).log() / rate
    truth = truth + (t0 - t0.detach())
    torch.testing.assert_close(sol.t, truth, rtol=1e-8, atol=0.0)
    inputs = (y0, rate, level, t0)
    for k in range(3):
        found = torch.autograd.grad(sol.t[k], inputs, create_graph=True, allow_unused=True)
        expected = torch.autograd.grad(truth[k], inputs, create_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        twice = torch.autograd.grad(found[0].sum() + found[1].sum() + found[2], inputs[:3], retain_graph=True)
        known = torch.autograd.grad(expected[0].sum() + expected[1].sum() + expected[2], inputs[:3], retain_graph=True)
        for a, b in zip(twice, known, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    there = torch.autograd.grad(sol.x.sum(), inputs, allow_unused=True)
    torch.testing.assert_close(there[2], torch.tensor(3.0, dtype=F64), rtol=1e-6, atol=0.0)
    for v in (there[0], there[1]):
        torch.testing.assert_close(v, torch.zeros_like(v), rtol=0.0, atol=1e-6)


def test_derivatives_by_the_end_are_those_of_who_gets_there() -> None:
    t1 = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y0 = torch.tensor([[0.5], [5.0]], dtype=F64)
    sol = fs.solve(lambda t, y: -y, y0, 0.0, t1, solver=TIGHT, event=lambda t, y: y[:, 0] - 0.4)
    assert sol.status.tolist() == [int(fs.Status.EVENT), int(fs.Status.SUCCESS)]
    (found,) = torch.autograd.grad(sol.x.sum(), t1)
    assert float(found) == pytest.approx(-5.0 * math.exp(-1.0), rel=1e-8)


def test_trees_and_single_systems() -> None:
    tree = fs.solve(
        lambda t, y: {"h": y["v"], "v": -G + 0 * y["v"]}, {"h": HEIGHTS, "v": 0 * HEIGHTS}, 0.0, 9.0, solver=TIGHT,
        event=lambda t, y: y["h"], dense=True,
    )  # fmt: skip
    torch.testing.assert_close(tree.t, (2 * HEIGHTS / G).sqrt(), rtol=1e-12, atol=0.0)
    assert tree.events[0].y["v"].shape == (1000,)
    half = tree.dense(torch.stack((tree.t / 2, tree.t), 1))
    torch.testing.assert_close(half["h"][0], 0.75 * HEIGHTS, rtol=1e-10, atol=0.0)
    one = fs.solve(
        lambda t, y: torch.stack((y[1], -torch.sin(y[0]))), torch.tensor([1.0, 0.0], dtype=F64), 0.0, 20.0,
        solver=TIGHT, batched=False, event=fs.Event(lambda t, y: y[0], terminal=False), dense=True,
    )  # fmt: skip
    many = fs.solve(
        swing, torch.tensor([[1.0, 0.0]], dtype=F64), 0.0, 20.0, solver=TIGHT,
        event=fs.Event(lambda t, y: y[:, 0], terminal=False),
    )  # fmt: skip
    torch.testing.assert_close(one.events[0].t, many.events[0].t, rtol=1e-13, atol=0.0)
    assert one.events[0].y.shape == (len(one.events[0].t), 2)
    assert one.dense(3.0).shape == (2,)


def test_what_counts_as_an_event() -> None:
    """Leaving zero does not, arriving there does; and a function of time alone is met where it says."""
    grow = lambda t, y: torch.ones_like(y)  # noqa: E731
    left = fs.solve(grow, torch.zeros(1, 1, dtype=F64), 0.0, 1.0, solver=TIGHT, event=lambda t, y: y[:, 0])
    assert left.status[0] == fs.Status.SUCCESS
    assert len(left.events[0].t) == 0
    clock = fs.solve(grow, torch.zeros(3, 1, dtype=F64), 0.0, 1.0, solver=TIGHT, event=lambda t, y: t - 0.3)
    torch.testing.assert_close(clock.t, torch.full((3,), 0.3, dtype=F64), rtol=1e-14, atol=0.0)
    end = fs.solve(grow, torch.zeros(1, 1, dtype=F64), 0.0, 1.0, solver=RK4(), nfe=16, event=lambda t, y: t - 1.0)
    assert end.status[0] == fs.Status.EVENT


def test_roots_are_found_to_the_last_bits() -> None:
    """Of x³ − a and of a step, beside the exact ones."""
    a = np.linspace(1e-9, 0.999, 50)
    found = root(lambda x: x**3 - a, 50)
    np.testing.assert_allclose(found, np.cbrt(a), rtol=1e-13)
    np.testing.assert_allclose(root(lambda x: np.where(x < a, -1.0, 1.0), 50), a, atol=1e-15)


def test_errors() -> None:
    y0 = dropped(HEIGHTS[:3])
    with pytest.raises(
        ValueError, match=r"the event returned a tensor of shape \(3, 2\); expected one number a sample"
    ):
        fs.solve(fall, y0, 0.0, 1.0, solver=TIGHT, event=lambda t, y: y)
    with pytest.raises(TypeError, match="g is a float; expected a function"):
        fs.solve(fall, y0, 0.0, 1.0, solver=TIGHT, event=0.5)
    with pytest.raises(ValueError, match="terminal = 0; expected"):
        fs.Event(fall, terminal=0)
    with pytest.raises(ValueError, match="with event=, which keeps its graph"):
        fs.solve(fall, y0.requires_grad_(), 0.0, 1.0, solver=TIGHT, event=lambda t, y: y[:, 0], gradient="adjoint")
    with pytest.raises(TypeError, match="runs a loop of its own, which has no dense=True"):
        fs.solve(fall, y0, 0.0, 1.0, solver=fs.solvers.bridges.Torchdiffeq(), dense=True)


# --- dense output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "nfe"), SOLVERS, ids=name)
@pytest.mark.parametrize("end", [3.0, -3.0])
def test_dense_output_is_the_solution(solver: Any, nfe: int | None, end: float) -> None:
    """y' = −λ y; at times of one's own for each sample, which are those of t_eval where they are shared."""
    y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.1]], dtype=F64)
    rate = torch.tensor([0.3, 1.0, 2.0], dtype=F64)
    f = lambda t, y, r: -r[:, None] * y  # noqa: E731
    shared = [0.1 * end, 0.55 * end, end]
    sol = fs.solve(f, y0, 0.0, end, solver=solver, nfe=nfe, args=(rate,), dense=True)
    beside = fs.solve(f, y0, 0.0, end, solver=solver, nfe=nfe, args=(rate,), t_eval=shared)
    torch.testing.assert_close(sol.dense(shared), beside.x, rtol=1e-13, atol=1e-13)
    own = torch.linspace(0.0, end, 30, dtype=F64).reshape(3, 10).flip(0)
    truth = y0[:, None] * torch.exp(-rate[:, None] * own)[..., None]
    error = (sol.dense(own).transpose(0, 1) - truth).abs().max() / truth.abs().max()
    assert error < {"Heun": 1e-2, "Bosh3": 1e-5}.get(name(solver), 1e-6)
    torch.testing.assert_close(sol.dense(0.0), y0, rtol=0.0, atol=0.0)
    torch.testing.assert_close(sol.dense(end), sol.x, rtol=1e-13, atol=1e-13)
    t, y = sol.dense.steps(1)
    assert len(t) == len(y) == int(sol.accepted[1]) + 1
    assert float(t[0]) == 0.0
    assert float(t[-1]) == end
    assert (t.diff() * end > 0).all()
    torch.testing.assert_close(y[-1], sol.x[1], rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="lies outside the interval of the solve, from 0 to"):
        sol.dense(1.5 * end)


def test_dense_output_has_derivatives() -> None:
    """By the start, and by the time asked for: that of the interpolant, near f."""
    y0 = torch.tensor([[1.0], [2.0]], dtype=F64, requires_grad=True)
    t = torch.tensor([0.3, 0.9], dtype=F64, requires_grad=True)
    sol = fs.solve(lambda t, y: -y, y0, 0.0, 1.0, solver=TIGHT, dense=True)
    y = sol.dense(t)
    by_start, by_time = torch.autograd.grad(y.sum(), (y0, t))
    torch.testing.assert_close(by_start, (-t.detach()).exp().sum().expand(2, 1), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(by_time, -3.0 * (-t.detach()).exp(), rtol=1e-5, atol=0.0)


def test_dense_output_behind_an_event_is_nothing() -> None:
    sol = fs.solve(fall, dropped(HEIGHTS), 0.0, 9.0, solver=TIGHT, event=lambda t, y: y[:, 0], dense=True)
    y = sol.dense(1.0)
    alive = (2 * HEIGHTS / G).sqrt() > 1.0
    assert torch.equal(torch.isnan(y[:, 0]), ~alive)
    torch.testing.assert_close(y[alive, 0], HEIGHTS[alive] - G / 2, rtol=1e-11, atol=1e-11)


def test_without_them_a_solve_costs_what_it_did() -> None:
    plain = fs.solve(fall, dropped(HEIGHTS), 0.0, 1.0, solver=Dopri8())
    dense = fs.solve(fall, dropped(HEIGHTS), 0.0, 1.0, solver=Dopri8(), dense=True)
    assert torch.equal(plain.x, dense.x)
    assert torch.equal(dense.nfe, plain.nfe + 3 * plain.accepted)
    assert plain.dense is None
    assert plain.events == ()
