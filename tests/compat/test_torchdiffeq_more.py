"""What torchdiffeq can beside solving from time to time: against it, closed forms, the implicit-function theorem."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.compat.torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event

torchdiffeq = pytest.importorskip("torchdiffeq")

F64 = torch.float64
G = 9.81
BOTH = pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
Y0 = torch.tensor([[1.0, 0.3], [0.5, 0.5], [-1.0, 0.2]], dtype=F64)
T = torch.tensor([0.0, 0.7, 1.3, 3.0], dtype=F64)


class Ball(nn.Module):
    """y' = v, v' = −g − drag·v, with a radius at which it touches the ground."""

    def __init__(self, drag: float = 0.0) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(G, dtype=F64))
        self.radius = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.drag = drag

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        height, speed = state
        return speed, -self.gravity - self.drag * speed + 0.0 * height

    def ground(self, t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0] - self.radius


METHODS: list[tuple[str, Any]] = [("dopri5", None), ("bosh3", None), ("tsit5", None), ("rk4", {"step_size": 0.01})]


@BOTH
@pytest.mark.parametrize(("method", "options"), METHODS, ids=[m for m, _ in METHODS])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_time_of_an_event_and_its_derivatives(solve: Any, method: str, options: Any, reverse: bool) -> None:
    """Thrown up at speed v from h: τ = (±v + √(v² + 2g(h − r)))/g; by h, v, g, r and the start."""
    sign = -1.0 if reverse else 1.0
    h, v = (torch.tensor([x], dtype=F64, requires_grad=True) for x in (3.0, 1.5))
    t0, ball = torch.tensor([0.2], dtype=F64, requires_grad=True), Ball()
    given = {"method": method, "options": options, "rtol": 1e-9, "atol": 1e-9}
    tau, (height, speed) = odeint_event(
        ball, (h, v), t0, event_fn=ball.ground, reverse_time=reverse, odeint_interface=solve, **given
    )
    g, r = ball.gravity, ball.radius
    truth = t0 + sign * (sign * v + (v**2 + 2 * g * (h - r)).sqrt()) / g
    torch.testing.assert_close(tau, truth[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(height[-1], r.reshape(1), rtol=1e-9, atol=0.0)
    inputs = (h, v, g, r, t0)
    found = torch.autograd.grad(tau, inputs, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(truth[0], inputs, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    end = v - g * (truth - t0)
    torch.testing.assert_close(speed[-1], end, rtol=1e-8, atol=0.0)
    found = torch.autograd.grad(speed[-1].sum(), inputs)
    for a, b in zip(found, torch.autograd.grad(end.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_events_are_torchdiffeq_s(method: str) -> None:
    """With several event functions, the first of which to reach zero ends the solve."""

    def event(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[0] - 0.3, y[1] + 0.9, t - 40.0))

    swing = lambda t, y: torch.stack((y[1], -torch.sin(y[0])))  # noqa: E731
    y0, t = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    given = {"method": method, "rtol": 1e-10, "atol": 1e-10, "event_fn": event}
    ours, theirs = odeint(swing, y0, t, **given), torchdiffeq.odeint(swing, y0, t, **given)
    bound = 1e-6 if method == "dopri5" else 1e-5  # of torchdiffeq's interpolants, a quartic in dopri8's long steps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def test_an_event_at_the_start_and_one_that_never_comes() -> None:
    t = torch.tensor([0.5, 1.0], dtype=F64)
    tau, y = odeint(lambda t, y: -y, Y0, t, event_fn=lambda t, y: y[0, 0] - 1.0)
    assert float(tau) == 0.5
    assert torch.equal(y[1], Y0)
    with pytest.raises(RuntimeError, match="event_fn had no zero within"):
        odeint(lambda t, y: -y, Y0, t, event_fn=lambda t, y: y[0, 0] + 1, method="euler", options={"step_size": 0.1})


def test_bouncing_ball() -> None:
    """As the example: simulate to a collision, reverse the speed, and go on; the times against the closed form."""

    class Simulator(Ball):
        def simulate(self, bounces: int) -> list[Tensor]:
            t, state = torch.zeros(1, dtype=F64), (torch.tensor([10.0], dtype=F64), torch.tensor([0.0], dtype=F64))
            times = []
            for _ in range(bounces):
                tau, states = odeint_event(
                    self, state, t, event_fn=self.ground, odeint_interface=odeint, atol=1e-10, rtol=1e-10
                )
                height, speed = (v[-1] for v in states)
                state, t = (height + 1e-7, -speed * 0.9), tau.reshape(1)
                times.append(tau)
            return times

    ball = Simulator()
    times = ball.simulate(4)
    g, r = ball.gravity, ball.radius
    fall = (2 * (10.0 - r) / g).sqrt()
    expected = torch.stack([fall * (1 + 2 * sum(0.9**k for k in range(1, n + 1))) for n in range(4)])
    torch.testing.assert_close(torch.stack(times), expected, rtol=1e-6, atol=0.0)
    found = torch.autograd.grad(times[-1], (g, r))
    for a, b in zip(found, torch.autograd.grad(expected[-1], (g, r)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)


def test_learning_physics_from_the_times_of_collisions() -> None:
    """Gravity is learnt from when a ball lands."""
    ball = Ball()
    ball.gravity.data.fill_(6.0)
    target = math.sqrt(2 * (10.0 - 0.5) / G)
    optimizer = torch.optim.Adam([ball.gravity], lr=0.3)
    start = (torch.tensor([10.0], dtype=F64), torch.tensor([0.0], dtype=F64))
    for _ in range(60):
        optimizer.zero_grad()
        tau, _ = odeint_event(
            ball, start, torch.zeros(1, dtype=F64), event_fn=ball.ground, odeint_interface=odeint_adjoint
        )
        (tau - target).square().backward()
        optimizer.step()
    assert abs(float(ball.gravity.detach()) - G) < 0.2


def test_a_continuous_normalising_flow() -> None:
    """State and log-density side by side, with the trace by autograd, from a batch of points: a linear field's."""

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.tensor([[0.3, 0.5], [-0.2, 0.1]], dtype=F64))

        def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = states[0].requires_grad_(True)
                dz = z @ self.matrix.T
                trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
            return dz, -trace[:, None]  # type: ignore[index]

    flow = Flow()
    z, logp = odeint_adjoint(
        flow,
        (Y0, torch.zeros(3, 1, dtype=F64)),
        torch.tensor([1.0, 0.0], dtype=F64),
        atol=1e-9,
        rtol=1e-9,
        method="dopri5",
    )
    back = torch.linalg.matrix_exp(-flow.matrix)
    torch.testing.assert_close(z[-1], Y0 @ back.T, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(logp[-1], flow.matrix.trace().expand(3, 1), rtol=1e-7, atol=0.0)
    (found,) = torch.autograd.grad(z[-1].sum() + logp[-1].sum(), flow.matrix)
    (truth,) = torch.autograd.grad(
        (Y0 @ torch.linalg.matrix_exp(-flow.matrix).T).sum() + 3 * flow.matrix.trace(), flow.matrix
    )
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)


def test_a_latent_trajectory_is_decoded() -> None:
    """odeint over a batch of latents, permuted, and its gradient through a decoder: beside torchdiffeq's."""
    torch.manual_seed(0)
    inner, decoder = nn.Sequential(nn.Linear(2, 8), nn.ELU(), nn.Linear(8, 2)).double(), nn.Linear(2, 3).double()
    found = []
    for solve in (odeint, torchdiffeq.odeint):
        z = solve(lambda t, z: inner(z), Y0, T).permute(1, 0, 2)
        loss = decoder(z).square().mean()
        found.append(torch.autograd.grad(loss, [*inner.parameters(), *decoder.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_sampling_with_tolerances_in_lists() -> None:
    """A sampler that hands over lists of tolerances, one for a tensor, one each for a tuple (sample and likelihood)."""
    drift = lambda t, x: -x * t  # noqa: E731
    x = odeint(drift, Y0, T, method="dopri5", atol=[1e-6], rtol=[1e-6])
    torch.testing.assert_close(x[-1], Y0 * math.exp(-4.5), rtol=1e-4, atol=1e-6)

    def joint(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return drift(t, state[0]), 2.0 * t.expand(3)

    x, delta = odeint(joint, (Y0, torch.zeros(3, dtype=F64)), T, method="dopri5", atol=[1e-6] * 2, rtol=[1e-6] * 2)
    torch.testing.assert_close(delta[-1], torch.full((3,), 9.0, dtype=F64), rtol=1e-6, atol=0.0)


@BOTH
def test_tolerances_of_components(solve: Any) -> None:
    """Steps are those of the component with the tight tolerance; the others are not looked at."""
    calls = [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return torch.stack((-y[0], 40.0 * torch.cos(40.0 * t) + 0.0 * y[1]))

    y0, t = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 3.0], dtype=F64)
    spent = {}
    for name, atol in (("tight", [1e-8, 1e-8]), ("first", [1e-8, 1e3]), ("both", 1e-8)):
        calls[0] = 0
        y = solve(f, y0, t, rtol=0.0, atol=torch.tensor(atol, dtype=F64))
        spent[name] = calls[0]
        assert abs(float(y[-1, 0]) - math.exp(-3.0)) < 1e-6
    assert spent["tight"] == spent["both"]
    assert spent["first"] < spent["tight"] / 3


# --- times that steps must meet --------------------------------------------------------------------------------------


def kinked(t: Tensor, y: Tensor) -> Tensor:
    return -0.5 * y if t < 0.5 else 2.0 * y


@BOTH
@pytest.mark.parametrize("back", [False, True])
def test_a_jump_is_met(solve: Any, back: bool) -> None:
    """y' = −y/2 before t = ½ and 2y after: the field is asked on the right side, and no step is rejected there."""
    asked: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        asked.append(float(t))
        return kinked(t, y)

    y0 = Y0.clone().requires_grad_()
    t = torch.tensor([1.0, 0.0] if back else [0.0, 1.0], dtype=F64)
    y = solve(f, y0, t, rtol=1e-9, atol=1e-9, options={"jump_t": torch.tensor([0.5, 7.0])})
    factor = math.exp(-0.75 if back else 0.75)
    torch.testing.assert_close(y[-1], y0 * factor, rtol=1e-8, atol=1e-9)
    assert 0.5 not in asked
    with_jump, forward = len(asked), list(asked)
    (grad,) = torch.autograd.grad(y[-1].sum(), y0)
    torch.testing.assert_close(grad, torch.full_like(grad, factor), rtol=1e-7, atol=0.0)
    assert 0.5 not in asked
    asked.clear()
    solve(f, y0, t, rtol=1e-9, atol=1e-9)
    assert with_jump < len(asked)
    assert min(abs(v - 0.5) for v in forward) < 1e-15


def test_steps_meet_the_times_they_are_told() -> None:
    ends: list[float] = []

    class F(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            ends.append(float(t + dt))

    odeint(F(), Y0, torch.tensor([0.0, 1.0], dtype=F64), options={"step_t": torch.tensor([0.3, 0.8], dtype=F64)})
    assert {0.3, 0.8, 1.0} <= set(ends)


@BOTH
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_perturbed_grids(solve: Any, method: str, dtype: torch.dtype) -> None:
    asked: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        asked.append(float(t))
        return -y

    y0, t = Y0.to(dtype).clone().requires_grad_(), torch.tensor([0.0, 1.0])
    options = {"step_size": 0.25, "perturb": True}
    y = solve(f, y0, t, method=method, options=options)
    nodes = {0.0, 0.25, 0.5, 0.75, 1.0}
    assert not nodes & set(asked)
    torch.testing.assert_close(y, torchdiffeq.odeint(f, y0, t, method=method, options=options), rtol=1e-6, atol=1e-7)
    if solve is odeint_adjoint:
        asked.clear()
        y.sum().backward()
        assert asked
        assert not nodes & set(asked)


# --- the way back ----------------------------------------------------------------------------------------------------


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.told: dict[str, int] = {}
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            for suffix in ("", "_adjoint"):
                setattr(self, name + suffix, lambda t, y, dt, key=name + suffix: self.note(key, y))

    def note(self, key: str, y: Any) -> None:
        self.told[key] = self.told.get(key, 0) + 1
        self.last = y

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y * torch.cos(20 * t)


@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.1})])
def test_callbacks_on_the_way_back(method: str, options: Any) -> None:
    f = Told()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of callbacks that a fixed grid has not
        y = odeint_adjoint(f, Y0, torch.tensor([0.0, 1.0], dtype=F64), method=method, options=options)
    there = dict(f.told)
    assert not any(k.endswith("adjoint") for k in there)
    y.sum().backward()
    back = {k: v for k, v in f.told.items() if k.endswith("adjoint")}
    assert {k: v for k, v in f.told.items() if k in there} == there
    assert back["callback_step_adjoint"] > 0
    if method == "rk4":
        assert back == {"callback_step_adjoint": 10}
    else:
        tests = back["callback_accept_step_adjoint"] + back.get("callback_reject_step_adjoint", 0)
        assert tests == back["callback_step_adjoint"]
    assert f.last[1].shape == f.last[2].shape == Y0.shape


def test_the_way_back_has_its_own_method_and_tolerances() -> None:
    """Gradients by λ of Σ y₀ e^(−λ): as exact as the way back."""
    t, spent, errors = torch.tensor([0.0, 1.0], dtype=F64), [], []
    for back in (
        {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-3},
        {"adjoint_rtol": 1e-11, "adjoint_atol": 1e-11},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.02}},
        {"adjoint_method": "bosh3", "adjoint_rtol": 1e-4, "adjoint_options": {"norm": "seminorm"}},
        {"adjoint_options": {"norm": lambda v: torch.stack([x.abs().max() for x in v[1:3]]).max()}},
    ):
        calls = [0]
        rate = torch.tensor(0.7, dtype=F64, requires_grad=True)

        def f(t: Tensor, y: Tensor, rate: Tensor = rate, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return -rate * y

        y = odeint_adjoint(f, Y0, t, rtol=1e-9, atol=1e-9, adjoint_params=(rate,), **back)
        there = calls[0]
        (found,) = torch.autograd.grad(y[-1].sum(), rate)
        spent.append(calls[0] - there)
        errors.append(abs(float(found) + float(Y0.sum()) * math.exp(-0.7)))
    assert spent[0] < spent[1]
    assert errors[1] < 1e-9
    assert errors[2] < 1e-7
    assert errors[4] < 1e-7
    with pytest.raises(ValueError, match="give adjoint_options= too"):
        odeint_adjoint(Told(), Y0, t, options={"safety": 0.8}, adjoint_method="bosh3")


# --- complex states, dense output, methods of torchdiffeq's own ------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("tsit5", None), ("rk4", {"step_size": 0.01})])
def test_complex_states(solve: Any, method: str, options: Any) -> None:
    """z' = iω z: a rotation, and its derivative by ω."""
    omega = torch.tensor(1.3, dtype=F64, requires_grad=True)
    z0 = torch.tensor([1.0 + 0.5j, -0.2j], dtype=torch.complex128)

    def f(t: Tensor, z: Tensor) -> Tensor:
        assert t.dtype is F64
        assert z.is_complex()
        return 1j * omega * z

    z = solve(f, z0, T, method=method, options=options, rtol=1e-10, atol=1e-10)
    truth = z0 * torch.exp(1j * omega * T[:, None])
    torch.testing.assert_close(z, truth, rtol=1e-7, atol=1e-8)
    loss = lambda v: (v[-1].real * torch.tensor([1.0, 2.0], dtype=F64)).sum() + v[-1].imag.sum()  # noqa: E731
    (a,), (b,) = (torch.autograd.grad(loss(v), omega) for v in (z, truth))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_dense_output(method: str) -> None:
    options = {"step_size": 0.01} if method == "rk4" else None
    solution = odeint_dense(
        lambda t, y: -y, Y0, torch.tensor(0.0), torch.tensor(2.0), rtol=1e-9, atol=1e-9, method=method, options=options
    )
    for t in (0.0, 0.31, 2.0):
        torch.testing.assert_close(solution(torch.tensor(t, dtype=F64)), Y0 * math.exp(-t), rtol=1e-6, atol=1e-8)
    assert solution(torch.tensor([0.5, 1.0])).shape == (2, 3, 2)
    joint = odeint_dense(lambda t, y: (y[1], -y[0]), (Y0[0], Y0[1]), 0.0, 1.0)
    assert [v.shape for v in joint(0.5)] == [(2,), (2,)]
    if method == "dopri5":
        theirs = torchdiffeq.odeint_dense(
            lambda t, y: -y, Y0, torch.tensor(0.0), torch.tensor(2.0), rtol=1e-9, atol=1e-9
        )
        for t in (0.31, 1.7):
            at = torch.tensor(t, dtype=F64)
            torch.testing.assert_close(solution(at), theirs(at), rtol=1e-6, atol=1e-7)


OWN = ["explicit_adams", "implicit_adams", "scipy_solver"]


@pytest.mark.parametrize("method", OWN)
def test_methods_of_torchdiffeq_s_own_are_run_by_it(method: str) -> None:
    t = torch.linspace(0.0, 1.0, 50, dtype=F64)
    f: Callable[..., Any] = lambda t, y: -y  # noqa: E731
    with pytest.warns(UserWarning, match=rf"{method} is torchdiffeq's own: torchdiffeq [\d.]+ runs it"):
        y = odeint(f, Y0, t, method=method)
    assert torch.equal(y, torchdiffeq.odeint(f, Y0, t, method=method))
    with pytest.warns(UserWarning, match="is torchdiffeq's own"):
        y = odeint_adjoint(f, Y0, t, method=method, adjoint_params=())
    assert torch.equal(y, torchdiffeq.odeint_adjoint(f, Y0, t, method=method, adjoint_params=()))


def test_events_agree_with_the_core() -> None:
    """The same crossing by fs.solve and by odeint."""
    swing = lambda t, y: torch.stack((y[1], -torch.sin(y[0])))  # noqa: E731
    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    tau, _ = odeint(swing, y0, torch.tensor([0.0, 1.0], dtype=F64), event_fn=lambda t, y: y[0], rtol=1e-11, atol=1e-11)
    sol = fs.solve(swing, y0, 0.0, 9.0, solver=fs.solvers.Dopri5(1e-11, 1e-11), batched=False, event=lambda t, y: y[0])
    np.testing.assert_allclose(float(tau), float(sol.t), rtol=1e-9)
