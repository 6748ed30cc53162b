"""Gradients of solves in every mode: against finite differences, closed forms, and each other.

gradcheck compares with central differences in float64; tolerances of the solves are far below its own, so that what is
left is the derivative. On fixed grids the grid is fine enough for the method's order. "checkpoint" must equal "direct"
to rounding, for it repeats the same arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import flowsolve as fs
from flowsolve.gradients import MODES, parameters_of
from flowsolve.paths import VP, CondOT, Discrete
from flowsolve.solvers import DDIM, RK4, Bosh3, Dopri5, Dopri8, Heun, Tsit5

TIGHT = {
    "bosh3": (Bosh3(1e-8, 1e-8), None),
    "dopri5": (Dopri5(1e-10, 1e-10), None),
    "tsit5": (Tsit5(1e-10, 1e-10), None),
    "dopri8": (Dopri8(1e-11, 1e-11), None),
    "rk4": (RK4(), 400),
    "dopri5-fixed": (Dopri5(adaptive=False), 240),
}
every_mode = pytest.mark.parametrize("mode", MODES)
every_solver = pytest.mark.parametrize(("solver", "nfe"), TIGHT.values(), ids=TIGHT.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@every_mode
@every_solver
def test_gradcheck_in_state_parameters_and_end_times(solver: Any, nfe: int | None, mode: str) -> None:
    y0 = normal(3, 2).requires_grad_()
    w = (0.7 * normal(2, 2, seed=1)).requires_grad_()
    rates = torch.tensor([[0.3], [1.0], [4.0]], dtype=torch.float64)

    def final(y0: Tensor, w: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        def f(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ w.T) * (1.0 + t) + torch.sin(3.0 * t)

        sol = fs.solve(f, y0, t0, t1, solver=solver, nfe=nfe, gradient=mode)
        return sol.x * rates

    inputs = (y0, w, number(0.1), number(0.9))
    assert gradcheck(final, inputs, eps=1e-5, atol=1e-6, rtol=1e-5, nondet_tol=1e-9, fast_mode=True)


@every_mode
@pytest.mark.parametrize(("solver", "nfe"), [TIGHT["dopri5"], TIGHT["rk4"]], ids=["dopri5", "rk4"])
def test_gradcheck_through_output_times(solver: Any, nfe: int | None, mode: str) -> None:
    y0, w = normal(3, 2).requires_grad_(), (0.7 * normal(2, 2, seed=1)).requires_grad_()
    times = torch.tensor([1.1, 0.55, 0.1], dtype=torch.float64, requires_grad=True)  # backwards

    def states(y0: Tensor, w: Tensor, times: Tensor) -> Tensor:
        f = lambda t, y: torch.tanh(y @ w.T) * (1.0 + t)  # noqa: E731
        return fs.solve(f, y0, 1.2, 0.0, solver=solver, nfe=nfe, t_eval=times, gradient=mode).x  # type: ignore[return-value]

    inputs = (y0, w, times)
    assert gradcheck(states, inputs, eps=1e-5, atol=1e-6, rtol=1e-5, nondet_tol=1e-9, fast_mode=True)


def stiff(y: Tensor) -> Tensor:
    """Rates that the samples carry in their last number."""
    return torch.cat((y[:, 1:] * torch.cos(y[:, 1:]) * torch.sin(y[:, :1]), torch.zeros_like(y[:, 1:])), 1)


@every_mode
def test_samples_with_their_own_steps_have_their_own_gradients(mode: str) -> None:
    """A batch against each of its samples alone; step counts differ by more than 3, and the parameter's adds up."""
    y0 = torch.stack((torch.linspace(-1, 1, 6, dtype=torch.float64), torch.logspace(-0.5, 1.6, 6).double()), 1)
    gain = number(1.3)
    solver = Dopri5(1e-9, 1e-9)

    def gradient(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = y.clone().requires_grad_()
        sol = fs.solve(lambda t, x: gain * stiff(x), y, 0.0, 1.0, solver=solver, gradient=mode)
        dy, dg = torch.autograd.grad((sol.x[:, 0] ** 2).sum(), (y, gain))
        return dy, dg, sol.nfe

    whole, total, nfe = gradient(y0)
    assert int(nfe.max()) > 3 * int(nfe.min())
    parts = [gradient(y0[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat([p[0] for p in parts]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(total, sum(p[1] for p in parts), rtol=1e-9, atol=1e-10)


@every_mode
def test_a_linear_ode_has_the_gradient_of_its_closed_form(mode: str) -> None:
    """y(1) = e^a y₀: ∂/∂a = y(1), ∂/∂y₀ = e^a."""
    a, y0 = number(0.7), torch.tensor([[1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    sol = fs.solve(lambda t, y: a * y, y0, 0.0, 1.0, solver=Dopri8(1e-12, 1e-12), gradient=mode)
    dy, da = torch.autograd.grad(sol.x.sum(), (y0, a))
    torch.testing.assert_close(dy, torch.full_like(dy, math.exp(0.7)), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(da, -torch.tensor(math.exp(0.7), dtype=torch.float64), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("t_eval", [None, [0.2, 0.7, 1.0]])
@pytest.mark.parametrize(("solver", "nfe"), [(Dopri5(1e-7, 1e-7), None), (RK4(), 100), (Tsit5(1e-5, 1e-5), None)])
def test_checkpointing_gives_the_very_same_gradient(solver: Any, nfe: int | None, t_eval: Any) -> None:
    y0 = torch.stack((torch.linspace(-1, 1, 6, dtype=torch.float64), torch.logspace(-0.5, 1.6, 6).double()), 1)
    gain = number(1.3)
    found = []
    for mode in ("direct", "checkpoint"):
        y = y0.clone().requires_grad_()
        f = lambda t, x: torch.where(t < 0.4, gain, gain**2) * stiff(x)  # noqa: E731 (a jump, so that steps are rejected)
        sol = fs.solve(f, y, 0.0, 1.0, solver=solver, nfe=nfe, gradient=mode, t_eval=t_eval)
        found.append((sol.nfe, *torch.autograd.grad((sol.x[..., 0] ** 2).sum(), (y, gain))))
        if nfe is None:
            assert int(sol.rejected.sum()) > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_checkpointing_holds_few_graphs_at_a_time() -> None:
    """Bytes of saved tensors alive while the graph is built: O(n) directly, O(√n) of boundaries with checkpoints."""

    def held(mode: str, nfe: int) -> int:
        total = 0

        def pack(v: Tensor) -> Tensor:
            nonlocal total
            total += v.numel() * v.element_size()
            return v

        y = torch.ones(1000, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            fs.solve(lambda t, x: torch.sin(x), y, 0.0, 1.0, solver=RK4(), nfe=nfe, gradient=mode)
        return total

    direct = held("direct", 1024) / held("direct", 64)
    checkpoint = held("checkpoint", 1024) / held("checkpoint", 64)
    assert 14 < direct < 18
    assert checkpoint < 6  # √16 = 4


def test_second_derivatives() -> None:
    """d²/dy₀² of y(1) = y₀ / (1 − y₀) for y' = y², which is 2 / (1 − y₀)³, directly and with checkpoints."""
    for mode in ("direct", "checkpoint"):
        y0 = number(0.3).reshape(1, 1).detach().requires_grad_()
        x = fs.solve(lambda t, y: y * y, y0, 0.0, 1.0, solver=Dopri8(1e-12, 1e-12), gradient=mode).x
        (first,) = torch.autograd.grad(x.sum(), y0, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), y0)
        assert first.item() == pytest.approx(1 / 0.7**2, rel=1e-9)
        assert second.item() == pytest.approx(2 / 0.7**3, rel=1e-9)


# --- flows -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small velocity network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        out = self.body(torch.cat((x, t[:, None].to(x)), 1))
        return out if shift is None else out + shift[:, None]


@pytest.mark.parametrize(
    ("path", "prediction", "solver", "nfe", "bound"),
    [
        (CondOT(), "velocity", Dopri5(1e-10, 1e-10), None, 1e-7),
        (CondOT(), "velocity", RK4(), 80, 1e-5),
        (VP(), "v", Tsit5(1e-9, 1e-9), None, 1e-6),
        (Discrete.linear(), "v", Dopri5(1e-6, 1e-6), None, 1e-3),
    ],
    ids=["CondOT-Dopri5", "CondOT-RK4", "VP", "Discrete"],
)
def test_modes_agree_on_flows(path: Any, prediction: str, solver: Any, nfe: int | None, bound: float) -> None:
    """Checkpoints give the direct gradient; the adjoint differs by the error of the solve, which the bound states."""
    net, start = Net(), normal(4, 2)
    flow = fs.Flow(net, path, prediction)
    found = {}
    for mode in MODES:
        x = start.clone().requires_grad_()
        sol = fs.sample(flow, start=x, solver=solver, nfe=nfe, gradient=mode)
        found[mode] = (sol.x, *torch.autograd.grad(sol.x.square().sum(), (x, *net.parameters())))
    for direct, checkpoint, adjoint in zip(*found.values(), strict=True):
        torch.testing.assert_close(direct, checkpoint, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(direct, adjoint, rtol=bound, atol=bound)


def test_estimate_solvers_have_checkpoints_and_no_adjoint() -> None:
    net = Net()
    flow = fs.Flow(net, CondOT())
    gradients = []
    for mode in ("direct", "checkpoint"):
        x = normal(4, 2).requires_grad_()
        out = fs.sample(flow, start=x, solver=DDIM(eta=0.5), nfe=30, gradient=mode).x
        gradients.append(torch.autograd.grad(out.square().sum(), (x, *net.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    with pytest.raises(TypeError, match="DDIM has no adjoint"):
        fs.sample(flow, start=normal(4, 2).requires_grad_(), solver=DDIM(), nfe=10, gradient="adjoint")
    with pytest.raises(ValueError, match="gradient = 'backprop'"):
        fs.sample(flow, (4, 2), solver=DDIM(), nfe=10, gradient="backprop")


def test_conditioning_receives_gradients_directly_and_is_refused_by_the_adjoint() -> None:
    flow = fs.Flow(Net(), CondOT())
    shift = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    found = []
    for mode in ("direct", "checkpoint"):
        sol = fs.sample(flow, start=normal(4, 2), solver=Dopri5(), cond={"shift": shift}, grad=True, gradient=mode)
        found.append(torch.autograd.grad(sol.x.sum(), shift)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
    assert bool((found[0] != 0).all())
    with pytest.raises(ValueError, match="conditioning; use gradient='checkpoint'"):
        fs.sample(flow, start=normal(4, 2), solver=Dopri5(), cond={"shift": shift}, grad=True, gradient="adjoint")


def test_log_prob_with_checkpoints() -> None:
    """Training by likelihood: the trace needs derivatives of the network within the part that is repeated."""
    net = Net()
    flow = fs.Flow(net, CondOT())
    found = []
    for mode in ("direct", "checkpoint"):
        for solver, nfe in ((RK4(), 40), (Dopri5(), None)):
            x = normal(4, 2).requires_grad_()
            out = fs.log_prob(flow, x, solver=solver, nfe=nfe, trace="exact", gradient=mode)
            found.append(
                (out.log_prob, *torch.autograd.grad(out.log_prob.sum(), (x, *net.parameters()), allow_unused=True))
            )
    for a, b in ((found[0], found[2]), (found[1], found[3])):
        for u, v in zip(a, b, strict=True):
            assert (u is None) == (v is None)
            if u is not None:
                torch.testing.assert_close(u, v, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="no adjoint"):
        fs.log_prob(flow, normal(4, 2), solver=RK4(), nfe=40, gradient="adjoint")


# --- edges -----------------------------------------------------------------------------------------------------------


@every_mode
def test_nothing_is_recorded_without_need(mode: str) -> None:
    y0 = normal(3, 2)
    sol = fs.solve(lambda t, y: -y, y0, 0.0, 1.0, solver=Dopri5(), gradient=mode)
    assert not sol.x.requires_grad
    with torch.no_grad():
        sol = fs.solve(lambda t, y: -y, y0.requires_grad_(), 0.0, 1.0, solver=Dopri5(), gradient=mode)
    assert not sol.x.requires_grad


@every_mode
def test_trees_have_gradients(mode: str) -> None:
    x, v = normal(3, 2).requires_grad_(), normal(3, seed=2).requires_grad_()
    solver = Dopri5(1e-9, 1e-9)

    def f(t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
        return {"x": -y["x"] * y["v"][0][:, None], "v": (torch.sin(y["v"][0]),)}

    sol = fs.solve(f, {"x": x, "v": (v,)}, 0.0, 1.0, solver=solver, gradient=mode)
    loss = sol.x["x"].sum() + sol.x["v"][0].sum()  # type: ignore[index,call-overload]
    found = torch.autograd.grad(loss, (x, v))
    reference = fs.solve(f, {"x": x, "v": (v,)}, 0.0, 1.0, solver=Dopri8(1e-12, 1e-12))
    expected = torch.autograd.grad(reference.x["x"].sum() + reference.x["v"][0].sum(), (x, v))  # type: ignore[index,call-overload]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_parameters_are_found_in_modules_closures_and_graphs() -> None:
    net, gain, unused = Net(), number(2.0), Net()
    f = lambda t, y: gain * net(y, t)  # noqa: E731
    slope = f(torch.zeros(3), normal(3, 2))
    found = {id(p) for p in parameters_of([f], [slope])}
    assert found == {id(gain), *(id(p) for p in net.parameters())}
    assert not found & {id(p) for p in unused.parameters()}
    assert {id(p) for p in parameters_of([net.forward], [])} == {id(p) for p in net.parameters()}


def test_a_sample_that_fails_has_no_adjoint() -> None:
    y0 = torch.tensor([[0.5], [2.0]], dtype=torch.float64, requires_grad=True)
    with pytest.raises(fs.SolverError):
        fs.solve(lambda t, y: y * y, y0, 0.0, 1.0, solver=Dopri5(), gradient="adjoint", throw=False)
    sol = fs.solve(lambda t, y: y * y, y0, 0.0, 1.0, solver=Dopri5(1e-8, 1e-8), gradient="checkpoint", throw=False)
    (dy,) = torch.autograd.grad(sol.x[0], y0)
    torch.testing.assert_close(dy, torch.tensor([[4.0], [0.0]], dtype=torch.float64), rtol=1e-5, atol=1e-12)


def test_heun_s_adjoint_converges_at_its_order() -> None:
    """Against the exact derivative e of y₀ ↦ y(1) for y' = y and of the rate: errors fall as n⁻²."""
    errors = []
    for steps in (20, 40, 80):
        a, y0 = number(1.0), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        x = fs.solve(
            lambda t, y, a=a: a * y * torch.cos(t), y0, 0.0, 1.0, solver=Heun(), nfe=2 * steps, gradient="adjoint"
        ).x
        dy, da = torch.autograd.grad(x.sum(), (y0, a))
        truth = math.exp(math.sin(1.0))
        errors.append((abs(float(dy) - truth), abs(float(da) - truth * math.sin(1.0))))
    for i in range(2):
        assert math.log2(errors[0][i] / errors[1][i]) == pytest.approx(2.0, abs=0.2)
        assert math.log2(errors[1][i] / errors[2][i]) == pytest.approx(2.0, abs=0.2)
