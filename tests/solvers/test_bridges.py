"""torchdiffeq and torchsde as solvers: their results beside the libraries' own, closed forms, and exact accounts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import Status
from flowsolve.paths import VP, CondOT, Discrete
from flowsolve.problems import GaussianMixture
from flowsolve.solvers.bridges import Torchdiffeq, Torchsde

torchdiffeq = pytest.importorskip("torchdiffeq")
pytest.importorskip("torchsde")
ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
COSTS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
SDE_METHODS = ["euler", "milstein", "srk", "euler_heun", "heun", "midpoint", "log_ode", "reversible_heun"]
STARTS = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
Field = Callable[[Tensor, Tensor], Tensor]


def decay(t: Tensor, y: Tensor) -> Tensor:
    """y' = −y (1 + cos 3t)."""
    return -y * (1.0 + torch.cos(3.0 * t))


def decayed(y0: Tensor, t0: float, t1: float) -> Tensor:
    return y0 * math.exp(-(t1 - t0) - (math.sin(3.0 * t1) - math.sin(3.0 * t0)) / 3.0)


def counted(f: Field) -> tuple[Field, list[float]]:
    """f, and the times of its calls."""
    times: list[float] = []

    def g(t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t))
        return f(t, y)

    return g, times


def solver_for(method: str, tolerance: float = 1e-8) -> tuple[Torchdiffeq, int | None]:
    """A solver that is accurate to 1e-5 on `decay`, or 2e-3 if of order 1, and its budget."""
    if method in ORDERS:
        return Torchdiffeq(method), {"euler": 2000, "midpoint": 1500, "heun2": 1500, "heun3": 600, "rk4": 200}[method]
    if method == "explicit_adams":
        return Torchdiffeq(method, options={"max_order": 4}), 306
    if method in ("implicit_adams", "fixed_adams"):
        return Torchdiffeq(method, tolerance, tolerance, options={"step_size": 0.02}), None
    if method in ("fehlberg2", "adaptive_heun"):
        tolerance = 1e-6 if method == "fehlberg2" else 1e-5
    return Torchdiffeq(method, tolerance, tolerance), None


EVERY = [*ADAPTIVE, *ORDERS, "explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"]


# --- torchdiffeq -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.5), (1.5, 0.0)])
@pytest.mark.parametrize("method", EVERY)
def test_every_method_reaches_the_closed_form_and_counts_its_calls(method: str, t0: float, t1: float) -> None:
    f, times = counted(decay)
    solver, nfe = solver_for(method)
    sol = fs.solve(f, STARTS, t0, t1, solver=solver, nfe=nfe)
    loose = method in ("fehlberg2", "adaptive_heun", "euler")
    torch.testing.assert_close(sol.x, decayed(STARTS, t0, t1), rtol=2e-3 if loose else 1e-5, atol=0)
    assert sol.ok.all()
    assert sol.nfe.tolist() == [len(times)] * 3
    assert nfe is None or len(times) == nfe
    assert (sol.t == t1).all()
    assert min(times) >= 0.0
    assert max(times) <= 1.5


@pytest.mark.parametrize("method", ORDERS)
def test_fixed_steps_have_the_order_of_their_method(method: str) -> None:
    errors, steps = [], [40, 80, 160]
    for n in steps:
        x = fs.solve(decay, STARTS, 0.0, 1.5, solver=Torchdiffeq(method), nfe=n * COSTS[method]).x
        errors.append(float((x - decayed(STARTS, 0.0, 1.5)).abs().max()))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(order - ORDERS[method]) < 0.2, (order, errors)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("t", [[0.0, 0.4, 1.0, 1.5], [1.5, 1.1, 0.0]])
def test_adaptive_is_torchdiffeq_stepping_onto_the_end(method: str, t: list[float]) -> None:
    f, ours = counted(decay)
    sol = fs.solve(f, STARTS, t[0], t[-1], solver=Torchdiffeq(method, 1e-4, 1e-4), t_eval=t)
    times = torch.tensor(t, dtype=torch.float64)
    g, theirs = counted(decay)
    there = torchdiffeq.odeint(g, STARTS, times, method=method, rtol=1e-4, atol=1e-4, options={"step_t": times[-1:]})
    assert torch.equal(sol.x, there)
    assert ours == pytest.approx(theirs, abs=1e-15)
    assert sol.t_eval is not None
    assert sol.t_eval.tolist() == t


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", ORDERS)
def test_fixed_is_torchdiffeq_on_the_same_grid(method: str, interp: str) -> None:
    times = [0.0, 0.31, 0.75, 1.5]
    nfe = 20 * COSTS[method] + (3 if interp == "cubic" else 0)
    sol = fs.solve(
        decay, STARTS, 0.0, 1.5, solver=Torchdiffeq(method, options={"interp": interp}), nfe=nfe, t_eval=times
    )
    assert sol.nfe.tolist() == [nfe] * 3
    t = torch.tensor(times, dtype=torch.float64)
    options = {"interp": interp, "grid_constructor": lambda f, y, t: torch.linspace(0.0, 1.5, 21, dtype=t.dtype)}
    there = torchdiffeq.odeint(decay, STARTS, t, method=method, options=options)
    torch.testing.assert_close(sol.x, there, rtol=1e-13, atol=1e-13)


def test_a_budget_is_spent_exactly_whatever_its_size() -> None:
    """torchdiffeq's own step_size = 1/n takes n + 1 steps for some n."""
    for n in [*range(1, 30), 49, 93, 98, 103, 107]:
        f, times = counted(lambda t, y: -y)
        sol = fs.solve(f, STARTS, 0.0, 1.0, solver=Torchdiffeq("euler"), nfe=n)
        assert len(times) == n == int(sol.nfe[0])
        torch.testing.assert_close(sol.x, STARTS * (1.0 - 1.0 / n) ** n, rtol=1e-12, atol=1e-13)
        g, times = counted(lambda t, y: -y)
        fs.solve(g, STARTS, 0.0, 1.0, solver=Torchdiffeq("euler", options={"step_size": 1.0 / n}))
        assert len(times) == n


@pytest.mark.parametrize("nfe", [4, 8, 9, 30])
@pytest.mark.parametrize("max_order", [3, 4, 12])
def test_adams_costs_what_was_planned(nfe: int, max_order: int) -> None:
    solver = Torchdiffeq("explicit_adams", options={"max_order": max_order})
    f, times = counted(lambda t, y: -0.1 * y)
    if max_order == 3 and nfe % 4:  # torchdiffeq warns that this is RK4 throughout
        with pytest.raises(ValueError, match=f"a budget of {nfe} evaluations is not a whole number"):
            fs.solve(f, STARTS, 0.0, 1.0, solver=solver, nfe=nfe)
        return
    sol = fs.solve(f, STARTS, 0.0, 1.0, solver=solver, nfe=nfe)
    assert int(sol.nfe[0]) == len(times) == nfe


def test_what_cannot_be_planned_is_refused() -> None:
    for method, cost in COSTS.items():
        with pytest.raises(ValueError, match=f"{method} steps on a fixed grid: give nfe="):
            fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchdiffeq(method))
        if cost > 1:
            with pytest.raises(
                ValueError, match=f"not a whole number of steps of {method}; expected for example {10 * cost}"
            ):
                fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchdiffeq(method), nfe=10 * cost + 1)
    with pytest.raises(
        ValueError, match=r"budget of 1 .* not a whole number of steps of rk4; expected for example 4 or 8"
    ):
        fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchdiffeq("rk4"), nfe=1)
    with pytest.raises(ValueError, match="no grid spends just so many"):
        fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchdiffeq("implicit_adams"), nfe=40)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="method = 'rk5'; expected one of torchdiffeq's: dopri5"):
        Torchdiffeq("rk5")
    with pytest.raises(ValueError, match=r"rtol = -1\.0; expected"):
        Torchdiffeq(rtol=-1.0)
    with pytest.raises(TypeError, match="dopri5 has no option 'step_size'; expected some of norm"):
        Torchdiffeq(options={"step_size": 0.1})
    with pytest.raises(TypeError, match="both step_size and grid_constructor"):
        Torchdiffeq("rk4", options={"step_size": 0.1, "grid_constructor": print})
    with pytest.raises(ValueError, match="step_size = 0; expected"):
        Torchdiffeq("rk4", options={"step_size": 0})
    options = {"step_size": 0.1}
    solver = Torchdiffeq("rk4", options=options)
    options["step_size"] = 0.2
    assert solver == Torchdiffeq("rk4", options={"step_size": 0.1})
    assert hash(solver) == hash(Torchdiffeq("rk4", options={"step_size": 0.1}))
    with pytest.raises(TypeError, match="runs a loop of its own; drop gradient='checkpoint'"):
        fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchdiffeq(), gradient="checkpoint")
    with pytest.raises(TypeError, match="chooses its own steps; drop grid="):
        fs.sample(gaussian(CondOT()), shape=(2, 2), solver=Torchdiffeq(), grid="log_snr")


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "scipy_solver"])
def test_a_budget_that_is_spent_leaves_all_at_the_start(method: str) -> None:
    f, times = counted(decay)
    sol = fs.solve(f, STARTS, 0.0, 1.5, solver=Torchdiffeq(method, 1e-9, 1e-9), nfe=20, throw=False)
    assert sol.status.tolist() == [Status.BUDGET] * 3
    assert sol.nfe.tolist() == [20] * 3 == [len(times)] * 3
    assert torch.equal(sol.x, STARTS)
    assert sol.t.tolist() == [0.0] * 3
    with pytest.raises(fs.SolverError, match="evaluation budget spent"):
        fs.solve(decay, STARTS, 0.0, 1.5, solver=Torchdiffeq(method, 1e-9, 1e-9), nfe=20)
    seen = fs.solve(
        decay, STARTS, 0.0, 1.5, solver=Torchdiffeq(method, 1e-9, 1e-9), nfe=20, t_eval=[0.0, 1.0, 1.5], throw=False
    )
    assert torch.equal(seen.x[0], STARTS)
    assert seen.x[1:].isnan().all()


def test_a_grid_of_one_s_own_makes_the_budget_a_limit() -> None:
    solver = Torchdiffeq("rk4", options={"step_size": 0.1})
    assert fs.solve(decay, STARTS, 0.0, 1.0, solver=solver, nfe=41).nfe.tolist() == [40] * 3
    assert not fs.solve(decay, STARTS, 0.0, 1.0, solver=solver, nfe=39, throw=False).ok.any()
    uneven = Torchdiffeq(
        "euler", options={"grid_constructor": lambda f, y, t: torch.tensor([0.0, 0.5, 0.6, 1.0]).to(t)}
    )
    x = fs.solve(lambda t, y: -y, STARTS, 0.0, 1.0, solver=uneven).x
    torch.testing.assert_close(x, STARTS * 0.5 * 0.9 * 0.6)


@pytest.mark.parametrize("method", ["dopri5", "scipy_solver"])
def test_failures_have_a_status(method: str) -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, math.nan, 1.0) * y

    def explodes(t: Tensor, y: Tensor) -> Tensor:  # at t = 1/6
        return 3.0 * y * y

    sol = fs.solve(broken, STARTS, 0.0, 1.0, solver=Torchdiffeq(method), throw=False)
    assert sol.status.tolist() == [Status.NONFINITE] * 3
    assert torch.equal(sol.x, STARTS)
    with pytest.raises(fs.SolverError, match="3 of 3 samples"):
        fs.solve(broken, STARTS, 0.0, 1.0, solver=Torchdiffeq(method))
    sol = fs.solve(explodes, STARTS.abs(), 0.0, 1.0, solver=Torchdiffeq(method, 1e-3, 1e-3), throw=False)
    assert sol.status.tolist() == [Status.UNDERFLOW if method == "dopri5" else Status.NONFINITE] * 3


def test_too_many_steps_have_a_status() -> None:
    solver = Torchdiffeq(rtol=1e-9, atol=1e-9, options={"max_num_steps": 3})
    assert fs.solve(decay, STARTS, 0.0, 1.0, solver=solver, throw=False).status.tolist() == [Status.MAX_STEPS] * 3


def test_an_assertion_of_the_field_is_its_own() -> None:
    def wrong(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("not a number of mine")

    with pytest.raises(AssertionError, match="of mine"):
        fs.solve(wrong, STARTS, 0.0, 1.0, solver=Torchdiffeq())


def test_on_a_fixed_grid_one_broken_sample_leaves_the_others() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((t > 0.5) & (y < 0.0), math.nan, -1.0) * y

    sol = fs.solve(broken, STARTS, 0.0, 1.0, solver=Torchdiffeq("rk4"), nfe=200, throw=False)
    assert sol.status.tolist() == [0, Status.NONFINITE, 0]
    torch.testing.assert_close(sol.x[[0, 2]], STARTS[[0, 2]] * math.exp(-1.0), rtol=1e-8, atol=0)


def pendulum(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"angle": y["speed"], "speed": -torch.sin(y["angle"]) + 0.5 * torch.cos(3.0 * t)}


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "scipy_solver"])
@pytest.mark.parametrize("stops", [[0.0, 0.7, 3.0], [3.0, 0.7, 0.0]])
def test_trees_and_times_of_output_against_dop853(method: str, stops: list[float]) -> None:
    y0 = {
        "angle": torch.tensor([0.3, 2.5], dtype=torch.float64),
        "speed": torch.tensor([0.0, -0.5], dtype=torch.float64),
    }
    sol = fs.solve(
        lambda t, y: {k: v.flatten() for k, v in pendulum(t, y).items()}, y0, stops[0], stops[-1],
        solver=Torchdiffeq(method, 1e-9, 1e-9), t_eval=stops,
    )  # fmt: skip
    for i in range(2):
        truth = solve_ivp(
            lambda t, y: [y[1], -math.sin(y[0]) + 0.5 * math.cos(3.0 * t)], (stops[0], stops[-1]),
            [float(y0["angle"][i]), float(y0["speed"][i])], method="DOP853", rtol=1e-13, atol=1e-13, t_eval=stops,
        ).y  # fmt: skip
        # torchdiffeq interpolates dopri8's long steps by a polynomial of degree 4
        tolerance = 1e-3 if method == "dopri8" else 1e-6
        np.testing.assert_allclose(sol.x["angle"][:, i], truth[0], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(sol.x["speed"][:, i], truth[1], rtol=tolerance, atol=tolerance)


def test_float32_stays_float32() -> None:
    sol = fs.solve(decay, STARTS.float(), 0.0, 1.5, solver=Torchdiffeq("dopri5"), t_eval=[0.5, 1.5])
    assert sol.x.dtype is torch.float32
    torch.testing.assert_close(sol.x[1], decayed(STARTS, 0.0, 1.5).float(), rtol=1e-4, atol=1e-4)


def test_options_reach_torchdiffeq() -> None:
    f, times = counted(decay)
    fs.solve(f, STARTS, 0.0, 1.0, solver=Torchdiffeq(options={"first_step": 0.01, "max_step": 0.01}))
    assert len(times) == 1 + 6 * 100
    sizes: list[torch.Size] = []

    def norm(e: Tensor) -> Tensor:
        sizes.append(e.shape)
        return e.abs().max()

    def jump(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.3, 1.0, -1.0) * torch.ones_like(y)

    options = {"norm": norm, "jump_t": torch.tensor([0.3], dtype=torch.float64)}
    g, times = counted(jump)
    sol = fs.solve(g, STARTS, 0.0, 1.0, solver=Torchdiffeq(options=options))
    assert set(sizes) == {STARTS.shape}
    torch.testing.assert_close(sol.x, STARTS - 0.4, rtol=0, atol=1e-7)
    assert len(times) < 60  # it knows of the jump


# --- gradients -------------------------------------------------------------------------------------------------------


class Rate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


@pytest.mark.parametrize(
    ("solver", "nfe"),
    [
        (Torchdiffeq("dopri5", 1e-10, 1e-10), None),
        (Torchdiffeq("dopri5", 1e-10, 1e-10, adjoint=True), None),
        (Torchdiffeq("rk4"), 400),
        (Torchdiffeq("rk4", adjoint=True), 400),
        (Torchdiffeq("midpoint", options={"step_size": 1e-2}, adjoint=True), None),
        (Torchdiffeq("scipy_solver", 1e-10, 1e-10, adjoint=True), None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("stops", [None, [0.5, 1.0]])
def test_gradients_of_both_kinds(solver: Torchdiffeq, nfe: int | None, stops: list[float] | None) -> None:
    """y(t) = y₀ e^(−θ t): ∂/∂y₀ and ∂/∂θ, with θ in a module or a tensor that the field closes over."""
    for form in ("module", "tensor"):
        module = Rate()
        loose = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        f = module if form == "module" else (lambda t, y, loose=loose: -loose * y)
        theta = module.rate if form == "module" else loose
        y0 = STARTS.clone().requires_grad_()
        sol = fs.solve(f, y0, 0.0, 1.0, solver=solver, nfe=nfe, t_eval=stops)
        found = torch.autograd.grad(sol.x.sum(), (y0, theta))
        ends = torch.tensor(stops or [1.0], dtype=torch.float64)
        slope = torch.exp(-0.7 * ends).sum()
        tolerance = 1e-4 if solver.method == "midpoint" else 1e-7
        torch.testing.assert_close(found[0], torch.full_like(y0, float(slope)), rtol=tolerance, atol=tolerance)
        by_rate = -(ends * torch.exp(-0.7 * ends)).sum() * STARTS.sum()
        torch.testing.assert_close(found[1], by_rate, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams", "scipy_solver"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_adjoint_finds_the_parameters_on_the_way(method: str, dtype: torch.dtype) -> None:
    module, y0 = Rate().to(dtype), STARTS.to(dtype).requires_grad_()
    f, times = counted(module)
    options = {"step_size": 0.1} if method in ("rk4", "implicit_adams") else None
    sol = fs.solve(f, y0, 0.1, 1.0, solver=Torchdiffeq(method, options=options, adjoint=True))
    calls = len(times)
    assert calls == int(sol.nfe[0])
    sol.x.sum().backward()
    assert int(sol.nfe[0]) == calls < len(times)
    assert module.rate.grad is not None
    with torch.no_grad():
        plain = fs.solve(f, y0, 0.1, 1.0, solver=Torchdiffeq(method, options=options))
    assert int(plain.nfe[0]) == calls
    assert torch.equal(plain.x, sol.x)


def test_scipy_says_that_it_records_nothing() -> None:
    y0 = STARTS.clone().requires_grad_()
    with pytest.raises(ValueError, match="records no gradients; set adjoint=True"):
        fs.solve(decay, y0, 0.0, 1.0, solver=Torchdiffeq("scipy_solver"))


# --- flows -----------------------------------------------------------------------------------------------------------

MIXTURE = GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], std=0.4, dtype=torch.float64)


def gaussian(path: Any) -> fs.Flow:
    return MIXTURE.flow(path)


@pytest.mark.parametrize("path", [VP(), Discrete.linear()], ids=["VP", "Discrete"])
@pytest.mark.parametrize(
    ("solver", "nfe"),
    [
        (Torchdiffeq("dopri5", 1e-8, 1e-8), None),
        (Torchdiffeq("rk4"), 241),
        (Torchdiffeq("scipy_solver", 1e-8, 1e-8), None),
    ],
    ids=["dopri5", "rk4", "scipy"],
)
def test_sample_and_encode_agree_with_flowsolve_s_own(path: Any, solver: Torchdiffeq, nfe: int | None) -> None:
    flow, start = gaussian(path), torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = start * path.prior_std
    own = fs.sample(flow, start=start, solver=fs.solvers.Dopri8(1e-9, 1e-9))
    closing = path.window[1] < 1.0
    budget = None if nfe is None else nfe if closing else nfe - 1
    sol = fs.sample(flow, start=start, solver=solver, nfe=budget)
    torch.testing.assert_close(sol.x, own.x, rtol=1e-5, atol=1e-5)
    assert (sol.t == 1.0).all()
    assert budget is None or (sol.nfe == budget).all()
    back = fs.encode(flow, own.x, solver=solver, nfe=None if nfe is None else nfe - 1)
    if not closing:
        torch.testing.assert_close(back.x, start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chart", ["straight", "native", "trig"])
def test_the_network_is_never_asked_outside_the_interval(chart: str) -> None:
    flow = gaussian(CondOT())
    seen: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return flow.net(x, t)  # type: ignore[no-any-return]

    spied = fs.Flow(net, CondOT(), flow.prediction)
    for method in ("dopri5", "adaptive_heun"):
        fs.sample(
            spied, start=torch.randn(4, 2), interval=(0.0, 0.7), solver=Torchdiffeq(method, 1e-2, 1e-2), chart=chart
        )
    assert min(seen) == 0.0
    assert max(seen) <= 0.7 + 1e-7


@pytest.mark.parametrize("solver", [Torchdiffeq("dopri5", 1e-9, 1e-9), Torchdiffeq("rk4")], ids=["dopri5", "rk4"])
def test_log_prob_is_the_closed_form(solver: Torchdiffeq) -> None:
    x = MIXTURE.sample(6, seed=2)
    out = fs.log_prob(gaussian(CondOT()), x, solver=solver, nfe=400 if solver.method == "rk4" else None, trace="exact")
    torch.testing.assert_close(out.log_prob, MIXTURE.log_prob(x), rtol=1e-6, atol=1e-6)
    assert solver.method != "rk4" or (out.nfe == 400).all()


def test_log_prob_has_gradients_by_torchdiffeq_s_adjoint() -> None:
    class Net(nn.Module):
        """Velocity of the flow of N(0, s²), with s a parameter: u = (t s² − (1 − t)) x / (t² s² + (1 − t)²)."""

        def __init__(self) -> None:
            super().__init__()
            self.std = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t, v = t[:, None], self.std**2
            return x * (t * v - (1 - t)) / (t * t * v + (1 - t) ** 2)

    net, x = Net(), torch.tensor([[0.3], [-0.9]], dtype=torch.float64)
    flow = fs.Flow(net, CondOT())
    for solver in (Torchdiffeq(rtol=1e-9, atol=1e-9, adjoint=True), Torchdiffeq(rtol=1e-9, atol=1e-9)):
        out = fs.log_prob(flow, x, solver=solver, trace="exact", grad=True)
        (found,) = torch.autograd.grad(out.log_prob.sum(), net.std)
        truth = ((x / 0.5) ** 2 - 1).sum() / 0.5
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_guidance_counts_twice() -> None:
    flow = gaussian(CondOT())
    guided = fs.Flow(flow.net, CondOT(), flow.prediction, nfe_per_call=2)
    assert fs.sample(guided, shape=(2, 2), solver=Torchdiffeq("rk4"), nfe=80).nfe.tolist() == [80, 80]


# --- torchsde --------------------------------------------------------------------------------------------------------

INSIDE = (0.02, 0.98)


def counting(flow: fs.Flow) -> tuple[fs.Flow, list[int]]:
    calls = [0]

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return flow.net(x, t)  # type: ignore[no-any-return]

    return fs.Flow(net, flow.path, flow.prediction), calls


def inside(count: int, flow: fs.Flow, data: GaussianMixture, at: float = INSIDE[0]) -> Tensor:
    noise = torch.randn(count, data.means.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return flow.path.interpolate(data.sample(count, seed=4), noise, at)


def budget(method: str, nfe: int) -> int:
    return nfe + (method == "reversible_heun")


@pytest.mark.parametrize(
    ("method", "eta"), [*((m, eta) for m in SDE_METHODS for eta in (0.0, 1.0)), ("srk", 1.5), ("heun", 1.5)]
)
def test_every_sde_method_keeps_mean_and_variance_and_counts_its_calls(method: str, eta: float) -> None:
    """Exact start, 120 evaluations: mean and variance within 5 standard errors, and 2 % for the method's own error."""
    n, mean, std = 4000, 0.7, 0.5
    data = GaussianMixture([[mean]], std=std, dtype=torch.float64)
    flow, calls = counting(data.flow(CondOT()))
    nfe = budget(method, 120)
    sol = fs.sample(flow, start=inside(n, flow, data), interval=INSIDE, solver=Torchsde(method, eta), nfe=nfe, seed=7)
    assert sol.nfe.unique().tolist() == [nfe] == calls
    assert sol.ok.all()
    assert (sol.t == INSIDE[1]).all()
    point = flow.path.at(INSIDE[1])
    variance = (point.alpha * std) ** 2 + point.sigma**2
    assert abs(float(sol.x.mean()) - point.alpha * mean) < 5 * math.sqrt(variance / n) + 0.02 * mean
    assert abs(float(sol.x.var()) / variance - 1.0) < 5 * math.sqrt(2.0 / n) + 0.02


@pytest.mark.parametrize(
    ("method", "own"),
    [("euler", fs.solvers.Euler()), ("heun", fs.solvers.Heun()), ("midpoint", fs.solvers.Midpoint())],
)
def test_without_noise_it_is_the_ode(method: str, own: Any) -> None:
    flow = gaussian(CondOT())
    start = inside(6, flow, MIXTURE)
    sol = fs.sample(flow, start=start, interval=INSIDE, solver=Torchsde(method, 0.0), nfe=40)
    other = fs.sample(flow, start=start, interval=INSIDE, solver=own, nfe=40, chart="native")
    torch.testing.assert_close(sol.x, other.x, rtol=1e-8, atol=1e-8)
    assert not Torchsde(method, 0.0).random
    assert Torchsde(method).random
    exact = fs.sample(flow, start=start, interval=INSIDE, solver=fs.solvers.Dopri5(1e-10, 1e-10)).x
    errors = [
        float(
            (fs.sample(flow, start=start, interval=INSIDE, solver=Torchsde(method, 0.0), nfe=n).x - exact).abs().max()
        )
        for n in (100, 400)
    ]
    assert 4.0 * 0.8 < errors[0] / errors[1] < (4.0 if method == "euler" else 16.0) * 1.2


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 98, 103, 300])
def test_rounding_makes_no_step_more(steps: int) -> None:
    flow, calls = counting(gaussian(CondOT()))
    for interval in (INSIDE, (0.1, 0.7)):
        calls[0] = 0
        fs.sample(flow, start=inside(1, flow, MIXTURE).float(), interval=interval, solver=Torchsde("euler"), nfe=steps)
        assert calls == [steps]


def test_a_seed_repeats_itself_and_belongs_to_its_samples_and_interval() -> None:
    flow = gaussian(CondOT())
    start = inside(4, flow, MIXTURE)

    def drawn(**given: Any) -> Tensor:
        settings = {"start": start, "interval": INSIDE, "nfe": 20, "seed": 3, **given}
        return fs.sample(flow, solver=Torchsde("srk"), **settings).x

    before = torch.random.get_rng_state()
    first = drawn()
    torch.rand(3)
    assert torch.equal(drawn(), first)
    torch.random.set_rng_state(before)
    drawn()
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is left alone"
    assert not torch.equal(drawn(seed=4), first)
    assert not torch.equal(drawn(seed=-3), first)
    later = drawn(samples=[4, 5, 6, 7])
    assert not torch.isclose(later, first).any(), "another part of the data set has other noise"
    assert torch.equal(drawn(samples=[0, 1, 2, 3]), first)
    shift = torch.corrcoef(
        torch.stack((drawn(interval=(0.02, 0.5)) - start, drawn(interval=(0.5, 0.98)) - start)).flatten(1)
    )
    assert abs(float(shift[0, 1])) < 0.99


def test_any_shape_dtype_and_gradient() -> None:
    flow = fs.Flow(lambda x, t: -x, VP(), prediction="noise")
    start = torch.randn(2, 3, 4, 4, requires_grad=True)
    sol = fs.sample(flow, start=start, interval=(0.1, 0.9), solver=Torchsde("midpoint"), nfe=20)
    assert sol.x.shape == start.shape
    assert sol.x.dtype is torch.float32
    (found,) = torch.autograd.grad(sol.x.sum(), start)
    assert bool((found.abs() > 0).all())


def test_a_window_is_closed_by_one_more_evaluation() -> None:
    path = Discrete.linear()
    flow, calls = counting(gaussian(path))
    start = inside(3, flow, MIXTURE, at=0.05)
    sol = fs.sample(flow, start=start, interval=(0.05, 1.0), solver=Torchsde("euler"), nfe=51)
    assert calls == [51]
    assert (sol.t == 1.0).all()
    assert sol.ok.all()


def test_a_sample_that_is_not_finite_says_so() -> None:
    flow = fs.Flow(lambda x, t: torch.where(x > 1e6, math.nan, 0.0) * x, CondOT(), prediction="velocity")
    start = torch.tensor([[0.0], [5e6]], dtype=torch.float64)
    sol = fs.sample(flow, start=start, interval=INSIDE, solver=Torchsde("heun"), nfe=20, throw=False)
    assert sol.status.tolist() == [0, Status.NONFINITE]


def test_what_torchsde_cannot_do_is_refused() -> None:
    flow = gaussian(CondOT())
    start = inside(2, flow, MIXTURE)

    def sample(solver: Any = None, **given: Any) -> Any:
        settings = {"start": start, "interval": INSIDE, "nfe": 20, **given}
        return fs.sample(flow, solver=solver or Torchsde("heun"), **settings)

    with pytest.raises(ValueError, match=r"nfe is missing: heun needs one of steps, for example 2 or"):
        sample(nfe=None)
    with pytest.raises(ValueError, match=r"a budget of 21 .* no whole number: heun needs .* 20 or 22"):
        sample(nfe=21)
    with pytest.raises(ValueError, match=r"a budget of 1 .*: reversible_heun needs .* 2 or"):
        sample(Torchsde("reversible_heun"), nfe=1)
    with pytest.raises(ValueError, match="runs from noise to data"):
        sample(interval=(0.98, 0.02))
    with pytest.raises(ValueError, match=r"runs from noise to data, .*; go back with an ODE solver"):
        fs.encode(flow, start, solver=Torchsde(), nfe=20)
    with pytest.raises(ValueError, match=r"asks at t = 0 .*λ' is infinite"):
        fs.sample(flow, shape=(2, 2), solver=Torchsde("euler"), nfe=20)
    with pytest.raises(ValueError, match=r"asks at t = 1 .*λ' is infinite"):
        sample(interval=(0.02, 1.0))
    sample(Torchsde("euler"), interval=(0.02, 1.0))  # does not ask there
    with pytest.raises(TypeError, match="has no chart"):
        sample(chart="straight")
    with pytest.raises(TypeError, match="chooses its own steps"):
        sample(grid="log_snr")
    for gradient in ("adjoint", "checkpoint"):
        with pytest.raises(TypeError, match=f"drop gradient='{gradient}'"):
            sample(gradient=gradient)
    with pytest.raises(ValueError, match="method = 'rk4'; expected one of torchsde's: euler"):
        Torchsde("rk4")
    with pytest.raises(ValueError, match="eta = -1"):
        Torchsde(eta=-1.0)
    with pytest.raises(TypeError, match="a likelihood is of the ODE: give a Runge–Kutta solver"):
        fs.log_prob(flow, start, solver=Torchsde())
    with pytest.raises(TypeError, match="works on flows only"):
        fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchsde())


# --- the libraries are optional --------------------------------------------------------------------------------------


def test_flowsolve_imports_neither() -> None:
    code = (
        "import sys, flowsolve as fs; fs.solvers.bridges.Torchdiffeq(), fs.solvers.bridges.Torchsde();"
        "assert not {'torchdiffeq', 'torchsde', 'scipy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ImportError, match=r"Torchdiffeq\('dopri5'\) needs torchdiffeq, .*pip install .*\[bridges\]'"):
        fs.solve(decay, STARTS, 0.0, 1.0, solver=Torchdiffeq())
    flow = gaussian(CondOT())
    with pytest.raises(ImportError, match=r"Torchsde\('srk'\) needs torchsde, .*pip install .*\[bridges\]'"):
        fs.sample(flow, start=inside(2, flow, MIXTURE), interval=INSIDE, solver=Torchsde("srk"), nfe=20)
