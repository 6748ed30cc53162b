"""Gradients of solves in every mode: against finite differences, closed forms, and each other.

gradcheck compares with central differences in float64; tolerances of the solves are far below its own, so that what is
left is the derivative. On fixed grids the grid is fine enough for the method's order. "checkpoint" must equal "direct"
to rounding, for it repeats the same arithmetic.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import flowsolve as fs
from flowsolve.gradients import MODES, parameters_of
from flowsolve.paths import VP, CondOT, Discrete
from flowsolve.solvers import DDIM, RK4, Bosh3, Dopri5, Dopri8, Heun, Midpoint, Tsit5

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


SECOND = [TIGHT["dopri5"], TIGHT["rk4"], (Dopri5(1e-10, 1e-10), "t_eval")]


@every_mode
@pytest.mark.parametrize(("solver", "nfe"), SECOND, ids=["dopri5", "rk4", "t_eval"])
def test_second_derivatives_in_end_times(solver: Any, nfe: Any, mode: str) -> None:
    """y' = -(1 + t) y: y₁ + dy₁/dt₁ = -t₁ y₁, whose gradients are t₁ y₁'s in all that y₁ depends on."""
    y0, t0, t1, rate = number(1.3), number(0.2), number(0.9), number(1.0)
    wanted = (y0, t1, rate, t0)

    def solve(t0: Any) -> Tensor:
        f = lambda t, y: -rate * (1.0 + t) * y  # noqa: E731
        if nfe == "t_eval":
            sol = fs.solve(
                f, y0.reshape(1, 1), t0, 2.0, solver=solver, gradient=mode, t_eval=torch.stack([t1, t1 + 0.3])
            )
            return sol.x[0].sum()  # type: ignore[index]
        return fs.solve(f, y0.reshape(1, 1), t0, t1, solver=solver, nfe=nfe, gradient=mode).x.sum()  # type: ignore[union-attr]

    closed = lambda t0: y0 * torch.exp(-rate * ((t1 - t0) + 0.5 * (t1**2 - t0**2)))  # noqa: E731
    for y, truth in ((solve(t0), closed(t0)), (solve(0.2), closed(0.2))):
        expected = torch.autograd.grad(truth * (1.0 - rate * (1.0 + t1)), wanted, allow_unused=True)
        (first,) = torch.autograd.grad(y, t1, create_graph=True)
        found = torch.autograd.grad(y + first, wanted, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_second_derivatives_mixed_in_both_times() -> None:
    """∂²y/∂t₀∂t₁ and ∂²y/∂t₀², which the adjoint refuses, for it would go through its own backward pass."""
    for mode in MODES:
        y0, t0, t1 = torch.ones(1, 1, dtype=torch.float64), number(0.2), number(0.9)
        y = fs.solve(lambda t, y: -(1.0 + t) * y, y0, t0, t1, solver=Dopri5(1e-10, 1e-10), gradient=mode).x
        (first,) = torch.autograd.grad(y.sum(), t0, create_graph=True)
        if mode == "adjoint":
            with pytest.raises(NotImplementedError, match="use gradient='checkpoint' or 'direct'"):
                torch.autograd.grad(first, t0)
            continue
        truth = torch.exp(-((t1 - t0) + 0.5 * (t1**2 - t0**2)))
        (expected,) = torch.autograd.grad(truth, t0, create_graph=True)
        for a, b in zip(torch.autograd.grad(first, (t0, t1)), torch.autograd.grad(expected, (t0, t1)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_third_derivative_in_one_time_is_refused() -> None:
    """One in other things as well is right: ∂³y/∂t∂y₀² of y = y₀/(1 − y₀t)."""
    for mode in ("direct", "checkpoint"):
        y0, t1 = number(0.3), number(1.0)
        y = fs.solve(lambda t, y: y * y, y0.reshape(1, 1), 0.0, t1, solver=Dopri8(1e-12, 1e-12), gradient=mode).x
        truth = y0 / (1.0 - y0 * t1)
        found, expected = y.sum(), truth
        for v in (t1, y0, y0):
            (found,) = torch.autograd.grad(found, v, create_graph=True)
            (expected,) = torch.autograd.grad(expected, v, create_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0.0)
        found = y.sum()
        for _ in range(2):
            (found,) = torch.autograd.grad(found, t1, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated three times with respect to one of its times"):
            torch.autograd.grad(found, t1)


def test_the_adjoint_s_gradient_is_not_taken_for_a_constant() -> None:
    """Through torch.autograd.grad(inputs=…) beside something else that depends on y₀, too: no share is dropped."""
    w, y0 = number(0.5), normal(3, 2).requires_grad_()
    y = fs.solve(lambda t, y: torch.sin(w * y), y0, 0.0, 1.0, solver=Dopri5(), gradient="adjoint").x
    first = torch.autograd.grad(y.sum(), (y0, w), create_graph=True)  # type: ignore[union-attr]
    torch.testing.assert_close(first, torch.autograd.grad(y.sum(), (y0, w), retain_graph=True))  # type: ignore[union-attr]
    for part, wanted in itertools.product(first, (y0, w)):
        with pytest.raises(NotImplementedError, match="adjoint has first"):
            torch.autograd.grad(part.sum() + (y0 * w).sum(), wanted, retain_graph=True)


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


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(2, 2).double()


GLOBAL, TABLE = linear(1), {"inner": [linear(2)], "gain": normal(2, seed=3).requires_grad_()}


def through_a_global(y: Tensor) -> Tensor:
    out: Tensor = TABLE["inner"][0](GLOBAL(y)) * TABLE["gain"]  # type: ignore[index,operator]
    return out


def phase(t: Tensor) -> int:
    """Which third of the interval, so that the ends of it see the first and the last expert only."""
    return min(2, int(3.0 * float(t.flatten()[0])))


class Hidden(nn.Module):
    """Experts in a plain list, of which nn.Module knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._experts = [linear(k) for k in range(3)]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self._experts[phase(t)](y)
        return out


class Slotted:
    """An object with neither a dictionary nor modules."""

    __slots__ = ("gains",)

    def __init__(self) -> None:
        self.gains = {k: normal(2, seed=k).requires_grad_() for k in range(3)}

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y) * self.gains[phase(t)]

    __call__ = slope


def holders() -> dict[str, tuple[Any, list[Tensor]]]:
    """Right-hand sides, and the leaves that they depend on."""
    gains = [normal(2, seed=k).requires_grad_() for k in range(3)]
    made = [2.0 * g for g in gains]
    hidden, slotted = Hidden(), Slotted()

    def default(t: Tensor, y: Tensor, gains: list[Tensor] = gains) -> Tensor:
        return y * gains[phase(t)]

    inner = TABLE["inner"][0]  # type: ignore[index]
    return {
        "globals": (lambda t, y: through_a_global(y), [*GLOBAL.parameters(), *inner.parameters(), TABLE["gain"]]),
        "closure": (lambda t, y: y * gains[phase(t)], gains),
        "default": (default, gains),
        "partial": (partial(lambda g, t, y: y * g["all"][phase(t)], {"all": tuple(gains)}), gains),
        "method": (slotted.slope, list(slotted.gains.values())),
        "callable": (slotted, list(slotted.gains.values())),
        "module": (hidden, [p for expert in hidden._experts for p in expert.parameters()]),
        "derived": (lambda t, y: y * made[phase(t)], gains),
    }


@pytest.mark.parametrize("holder", holders())
def test_the_adjoint_finds_what_a_slope_depends_on(holder: str) -> None:
    """Against the direct gradient.

    Where experts change is a node of the grid, so both are of order 2 in the step, h = 1/180, and h² = 3e-5.
    """
    f, wanted = holders()[holder]
    found = []
    for mode in ("direct", "adjoint"):
        y0 = normal(3, 2).requires_grad_()
        y = fs.solve(f, y0, 0.0, 1.0, solver=Midpoint(), nfe=360, gradient=mode).x
        found.append(torch.autograd.grad(y.square().sum(), (y0, *wanted), retain_graph=True))  # type: ignore[union-attr]
    size = max(float(a.abs().max()) for a in found[0])
    for a, b in zip(*found, strict=True):
        assert bool((a != 0).any())
        assert float((a - b).abs().max()) < 1e-4 * size


class Secret:
    """A store that no search looks into."""

    def __init__(self, *tensors: Tensor) -> None:
        self.read = iter(tensors).__reduce__


@pytest.mark.parametrize("known", [True, False])
def test_a_parameter_that_is_not_found_is_an_error_and_can_be_given(known: bool) -> None:
    """In the middle of the interval only; with other parameters that are found, and without."""
    secret, gain = Secret(middle := number(0.8)), number(1.1)

    def f(t: Tensor, y: Tensor) -> Tensor:
        inside = 0.3 < float(t.flatten()[0]) < 0.7
        return torch.sin(y) * ((gain if known else 1.1) + (secret.read()[1][0][0] if inside else 0.0))

    def solve(mode: str, **options: Any) -> tuple[Tensor, Tensor]:
        y0 = normal(3, 2).requires_grad_()
        y = fs.solve(f, y0, 0.0, 1.0, solver=Midpoint(), nfe=200, gradient=mode, **options).x
        return torch.autograd.grad(y.sum(), (y0, middle))  # type: ignore[union-attr,return-value]

    with pytest.raises(ValueError, match=r"no way to 1 tensor\(s\) .* give fs.solve params="):
        solve("adjoint")
    for a, b in zip(solve("direct"), solve("adjoint", params=iter([middle])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    with pytest.raises(TypeError, match="params holds a float"):
        solve("adjoint", params=[0.8])


def test_a_leaf_that_a_field_makes_is_no_parameter() -> None:
    """An energy's gradient is taken at a fresh leaf, which is gone after the call."""
    w = number(0.5)

    def force(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad((w * x**4).sum(), x, create_graph=True)
        return -slope

    found = []
    for mode in ("direct", "adjoint"):
        y0 = normal(3, 2).requires_grad_()
        x = fs.solve(force, y0, 0.0, 1.0, solver=Dopri5(1e-9, 1e-9), gradient=mode).x
        found.append(torch.autograd.grad(x.sum(), w)[0])  # type: ignore[union-attr]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


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
