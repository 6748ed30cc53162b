"""Solves within torch.func, forward-mode derivatives and torch.compile: what comes out is right, or an error says why.

Truth is autograd's reverse mode, which `test_gradients` and the tests of the solvers hold against closed forms; the
derivative of the same arithmetic by another mode differs by rounding only. On mapped axes adaptive solves share their
steps, so there the solutions agree to the tolerance.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import flowsolve as fs
from flowsolve import kernels
from flowsolve._surroundings import mapped, moving, plain
from flowsolve.compat.torchdiffeq import odeint, odeint_adjoint
from flowsolve.guidance import Classifier, Posterior
from flowsolve.paths import CondOT
from flowsolve.solvers import (
    DDIM,
    DDPM,
    RK4,
    Dopri5,
    Dopri8,
    EulerMaruyama,
    SDEDPMSolverPP,
    UniPC,
)
from flowsolve.solvers.bridges import Torchdiffeq

D = torch.float64
SOLVERS = {"dopri5": (Dopri5(1e-9, 1e-9), None), "dopri8": (Dopri8(1e-9, 1e-9), None), "rk4": (RK4(), 40)}
every_solver = pytest.mark.parametrize(("solver", "nfe"), SOLVERS.values(), ids=SOLVERS.keys())
Solve = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def field(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: -w * y * torch.cos(y) * (1.0 + t)


def solving(solver: Any, nfe: int | None, **options: Any) -> Solve:
    """(y, w, t0, t1) → y(t1)."""

    def solve(y: Tensor, w: Tensor, t0: Any = 0.1, t1: Any = 0.9) -> Tensor:
        sol = fs.solve(field(w), y, t0, t1, solver=solver, nfe=nfe, **options)
        return sol.x  # type: ignore[return-value]

    return solve


def forward(f: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The derivative by forward mode; it must be there."""
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(f(*(forward_ad.make_dual(v, d) for v, d in zip(values, tangents, strict=True))))
    assert found.tangent is not None
    tangent: Tensor = found.tangent
    return tangent


Y, W, T0, T1 = normal(3, 2), torch.tensor(0.7, dtype=D), torch.tensor(0.1, dtype=D), torch.tensor(0.9, dtype=D)
ARGUMENTS = (Y, W, T0, T1)
TANGENTS = (normal(3, 2, seed=1), *(torch.tensor(v, dtype=D) for v in (0.3, -0.2, 0.5)))


def jacobians(f: Solve) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.autograd.functional.jacobian(f, ARGUMENTS)
    return found


def pushed(f: Solve) -> Tensor:
    """The derivative along TANGENTS, by reverse mode."""
    return sum(  # type: ignore[return-value]
        torch.tensordot(j, v, v.ndim) if v.ndim else j * v for j, v in zip(jacobians(f), TANGENTS, strict=True)
    )


def close(a: Any, b: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- fs.solve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_eval", [None, "tensor"])
@every_solver
def test_forward_mode_has_the_derivative_with_and_without_kernels(solver: Any, nfe: int | None, t_eval: Any) -> None:
    """In the state, a parameter and the times; the same after the compiled kernels are loaded as before."""
    if t_eval is None:
        solve = solving(solver, nfe)
    else:

        def solve(y: Tensor, w: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
            times = torch.stack((0.5 * (t0 + t1), t1))
            return fs.solve(field(w), y, t0, 1.0, solver=solver, nfe=nfe, t_eval=times).x  # type: ignore[return-value]

    expected = pushed(solve)
    close(forward(solve, ARGUMENTS, TANGENTS), expected)
    with torch.no_grad():
        close(forward(solve, ARGUMENTS, TANGENTS), expected)
    with kernels.use("fused"):
        close(forward(solve, ARGUMENTS, TANGENTS), expected)
        close(solve(*ARGUMENTS), solve(*ARGUMENTS))


def test_forward_mode_is_the_difference_quotient() -> None:
    """The one truth of this file that is no derivative of autograd's."""
    solve, h = solving(Dopri8(1e-12, 1e-12), None), 1e-4
    ahead, behind = (solve(*(v + s * h * d for v, d in zip(ARGUMENTS, TANGENTS, strict=True))) for s in (1.0, -1.0))
    close(forward(solve, ARGUMENTS, TANGENTS), (ahead - behind) / (2 * h), 1e-7)


@every_solver
def test_torch_func_differentiates_solves(solver: Any, nfe: int | None) -> None:
    solve = solving(solver, nfe)
    expected = jacobians(solve)
    everything = (0, 1, 2, 3)
    for a, b, c in zip(
        jacrev(solve, everything)(*ARGUMENTS), jacfwd(solve, everything)(*ARGUMENTS), expected, strict=True
    ):
        close(a, c)
        close(b, c)
    close(jvp(solve, ARGUMENTS, TANGENTS)[1], pushed(solve))
    for a, c in zip(grad(lambda *v: solve(*v).sum(), everything)(*ARGUMENTS), expected, strict=True):
        close(a, c.sum((0, 1)))
    total = lambda *v: solve(*v).sum()  # noqa: E731
    found = hessian(total, everything)(*ARGUMENTS)
    truth = torch.autograd.functional.hessian(total, ARGUMENTS)
    for a, b in zip(itertools.chain(*found), itertools.chain(*truth), strict=True):
        close(a, b, 1e-10)


@every_solver
def test_vmap_maps_states_and_parameters(solver: Any, nfe: int | None) -> None:
    """Per-sample gradients too; along a mapped axis steps are shared, so adaptive solves agree to the tolerance."""
    solve, bound = solving(solver, nfe), 1e-12 if nfe else 1e-7
    close(vmap(lambda y: solve(y[None], W)[0])(Y), solve(Y, W), bound)
    rates = torch.tensor([0.2, 0.7, 4.0], dtype=D)
    close(vmap(lambda w: solve(Y, w))(rates), torch.stack([solve(Y, w) for w in rates]), bound)
    states = torch.stack((Y, 3.0 * Y))
    close(vmap(vmap(lambda y: solve(y[None], W)[0]))(states), torch.stack([solve(y, W) for y in states]), bound)
    each = vmap(grad(lambda y, w: solve(y[None], w).sum(), (0, 1)), (0, None))(Y, W)
    close(each[0], grad(lambda y: solve(y, W).sum())(Y), 10 * bound)
    close(each[1].sum(), grad(lambda w: solve(Y, w).sum())(W), 10 * bound)


def test_vmap_shares_output_times_and_fails_as_one() -> None:
    f = lambda y: fs.solve(lambda t, x: -x, y, 0.0, 1.0, solver=Dopri5(1e-9, 1e-9), t_eval=[0.5, 1.0]).x  # noqa: E731
    states = torch.stack((Y, 100.0 * Y))
    close(vmap(f)(states), torch.stack([f(y) for y in states]), 1e-7)
    solve = lambda y: fs.solve(lambda t, x: x * x, y, 0.0, 1.0, solver=Dopri5(), throw=False)  # noqa: E731
    status = vmap(lambda y: solve(y).status, out_dims=None)(torch.tensor([[[0.5], [0.5]], [[0.5], [2.0]]], dtype=D))
    assert status.tolist()[0] == 0
    assert status.tolist()[1] > 0
    march = lambda y: fs.solve(lambda t, x: x / y, y, 0.0, 1.0, solver=RK4(), nfe=4, throw=False)  # noqa: E731
    status = vmap(lambda y: march(y).status, out_dims=None)(torch.tensor([[[0.5], [0.5]], [[0.5], [0.0]]], dtype=D))
    assert status.tolist() == [0, 1]


def test_a_mapped_time_is_refused() -> None:
    times = torch.tensor([0.5, 1.0], dtype=D)
    with pytest.raises(ValueError, match=r"t1 is mapped by torch\.func\.vmap"):
        vmap(lambda t: solving(Dopri5(), None)(Y, W, 0.0, t))(times)
    with pytest.raises(ValueError, match="t0 is mapped"):
        vmap(grad(lambda t: solving(RK4(), 8)(Y, W, t, 2.0).sum()))(times)
    with pytest.raises(ValueError, match="t is mapped"):
        vmap(lambda t: odeint(field(W), Y, torch.stack((t, t + 1.0))))(times)


@pytest.mark.parametrize(("solver", "nfe"), [SOLVERS["dopri5"], SOLVERS["rk4"]], ids=["dopri5", "rk4"])
def test_modes_of_autograd_s_own_refuse_by_name(solver: Any, nfe: int | None) -> None:
    checkpoint, adjoint = (solving(solver, nfe, gradient=mode) for mode in ("checkpoint", "adjoint"))
    for transform in (grad, hessian):
        with pytest.raises(NotImplementedError, match="use gradient='direct'"):
            transform(lambda y: checkpoint(y, W).sum())(Y)
    close(jvp(checkpoint, ARGUMENTS, TANGENTS)[1], pushed(solving(solver, nfe)))
    close(forward(checkpoint, ARGUMENTS, TANGENTS), pushed(solving(solver, nfe)))
    for attempt in (
        lambda: grad(lambda y: adjoint(y, W).sum())(Y),
        lambda: jvp(adjoint, ARGUMENTS, TANGENTS),
        lambda: vmap(lambda w: adjoint(Y, w))(W[None]),
        lambda: forward(lambda y: adjoint(y, W), (Y,), TANGENTS[:1]),
        lambda: forward(lambda w: adjoint(Y, w), (W,), TANGENTS[1:2]),
    ):
        with pytest.raises(NotImplementedError, match="gradient='adjoint' has reverse-mode derivatives"):
            attempt()


def test_compat_is_seen_through() -> None:
    times = torch.tensor([0.1, 0.5, 0.9], dtype=D)
    for options in ({}, {"method": "rk4", "options": {"step_size": 0.05}}):
        solve = lambda y, w, t, options=options: odeint(field(w), y, t, **options)  # noqa: E731
        values, tangents = (Y, W, times), (TANGENTS[0], TANGENTS[1], normal(3, seed=4))
        expected = torch.autograd.functional.jacobian(solve, values)
        pushed = sum(
            torch.tensordot(j, v, v.ndim) if v.ndim else j * v for j, v in zip(expected, tangents, strict=True)
        )
        close(forward(solve, values, tangents), pushed)
        for a, b in zip(jacrev(solve, (0, 1, 2))(*values), expected, strict=True):
            close(a, b)
    with pytest.raises(NotImplementedError, match="gradient='direct'"):
        grad(lambda y: odeint_adjoint(field(W), y, times, adjoint_params=()).sum())(Y)


def test_torchdiffeq_s_adaptive_runs_refuse_by_name() -> None:
    solve = solving(Torchdiffeq("dopri5"), None)
    for attempt in (
        lambda: grad(lambda y: solve(y, W).sum())(Y),
        lambda: forward(lambda w: solving(Torchdiffeq("dopri5", adjoint=True), None)(Y, w), (W,), TANGENTS[1:2]),
    ):
        with pytest.raises(NotImplementedError, match=r"use a solver such as Dopri5\(\)"):
            attempt()
    close(jvp(solving(Torchdiffeq("rk4"), 40), ARGUMENTS, TANGENTS)[1], pushed(solving(Torchdiffeq("rk4"), 40)))


def test_what_lies_behind_wrappers() -> None:
    seen: list[Any] = []

    def look(v: Tensor) -> Tensor:
        seen.append((plain(v), mapped(v), moving(v)))
        return v.sum()

    values = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, -1.0]])
    vmap(look)(values)
    vmap(look, in_dims=1)(values)
    vmap(grad(look))(values)
    vmap(vmap(look, in_dims=1), in_dims=0)(values[None].expand(2, 2, 3).contiguous())
    grad(look)(values)
    assert [m for _, m, _ in seen] == [True, True, True, True, False]
    assert all(moves for *_, moves in seen)
    found = [v.tolist() for v, *_ in seen]
    assert found == [[4.0, 5.0, 2.0], [5.0, 4.0], [4.0, 5.0, 2.0], [5.0, 4.0], values.tolist()]
    assert not moving(values)
    assert not moving(1.0)


# --- flows -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.body(torch.cat((x, t[:, None].to(x)), 1))
        return out


NET = Net()
FLOW = fs.Flow(NET, CondOT())
BENT = {
    "plain": FLOW,
    "classifier": Classifier(FLOW, lambda x, t: -(x - 0.3).square().sum(1) * t, 2.0, interval=(-2.0, 40.0)),
    "posterior": Posterior(FLOW, lambda z: -(z - 0.3).square().sum(1), 1.0, interval=(-2.0, 40.0)),
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "dopri5": {"solver": Dopri5(1e-7, 1e-7)},
    "dopri5-batch": {"solver": Dopri5(1e-7, 1e-7), "batch": 2},
    "rk4": {"solver": RK4(), "nfe": 24},
    "ddim-batch": {"solver": DDIM(), "nfe": 8, "batch": 2},
    "unipc": {"solver": UniPC(), "nfe": 8},
    "ddpm": {"solver": DDPM(), "nfe": 8},
    "sde-brownian": {"solver": SDEDPMSolverPP(), "nfe": 8, "noise": "brownian"},
    "euler-maruyama": {"solver": EulerMaruyama(), "nfe": 8, "interval": (0.1, 0.9)},
}


def along(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> None:
    """Every mode against reverse mode, in the state."""
    expected = torch.autograd.functional.jacobian(f, x)
    close(jacrev(f)(x), expected)
    close(jvp(f, (x,), (v,))[1], torch.tensordot(expected, v, 2))
    close(forward(f, (x,), (v,)), torch.tensordot(expected, v, 2))
    with kernels.use("fused"):
        close(forward(f, (x,), (v,)), torch.tensordot(expected, v, 2))


@pytest.mark.parametrize(
    ("sampler", "bent"),
    [*((name, "plain") for name in SAMPLERS), *itertools.product(("rk4", "unipc"), ("classifier", "posterior"))],
)
def test_sampling_is_seen_through(sampler: str, bent: str) -> None:
    along(lambda x: fs.sample(BENT[bent], start=x, **SAMPLERS[sampler]).x, Y, TANGENTS[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["dopri5", "rk4", "unipc", "sde-brownian"])
def test_network_parameters_are_seen_through_by_default(sampler: str) -> None:
    """A plain start does not switch gradients off within a transform, where that would be silent zeros."""

    def loss(values: dict[str, Tensor]) -> Tensor:
        flow = fs.Flow(lambda x, t: functional_call(NET, values, (x, t)), CondOT())
        return fs.sample(flow, start=Y, **SAMPLERS[sampler]).x.square().sum()  # type: ignore[union-attr]

    values = {k: v.detach() for k, v in NET.named_parameters()}
    found = grad(loss)(values)
    out = fs.sample(FLOW, start=Y, grad=True, **SAMPLERS[sampler]).x.square().sum()  # type: ignore[union-attr]
    for a, b in zip(found.values(), torch.autograd.grad(out, list(NET.parameters())), strict=True):
        close(a, b)
    ones = {k: torch.ones_like(v) for k, v in values.items()}
    close(jvp(loss, (values,), (ones,))[1], sum(v.sum() for v in found.values()))
    two = {k: torch.stack((v, 0.5 * v)) for k, v in values.items()}
    apart = torch.stack([loss({k: v[i] for k, v in two.items()}) for i in range(2)])
    close(vmap(loss)(two), apart, 1e-5 if "nfe" not in SAMPLERS[sampler] else 1e-11)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize(
    "options", [{"solver": Dopri5(1e-7, 1e-7)}, {"solver": UniPC(), "nfe": 24}], ids=["ode", "curve"]
)
def test_log_prob_is_seen_through(options: Any, trace: str) -> None:
    f = lambda x: fs.log_prob(FLOW, x, trace=trace, **options).log_prob  # noqa: E731
    expected = torch.autograd.functional.jacobian(f, Y)
    close(jacrev(f)(Y), expected, 1e-10)
    close(jvp(f, (Y,), (TANGENTS[0],))[1], torch.tensordot(expected, TANGENTS[0], 2), 1e-10)
    close(forward(f, (Y,), TANGENTS[:1]), torch.tensordot(expected, TANGENTS[0], 2), 1e-10)
    states = torch.stack((Y, -Y))
    close(vmap(f)(states), torch.stack([f(x) for x in states]), 1e-5 if "nfe" not in options else 1e-11)


def test_results_without_derivatives_say_so() -> None:
    x = fs.problems.GaussianMixture([[-1.0, 0.0]], std=0.3, dtype=D).sample(3, seed=0)
    for call in (
        lambda v: fs.variational_bound(FLOW, v).bound.sum(),
        lambda v: fs.round_trip(FLOW, v, solver=RK4(), nfe=8).error.sum(),
        lambda v: next(iter(fs.batching.log_prob(FLOW, [v], solver=RK4(), nfe=8, batch=4))).log_prob.sum(),
    ):
        with pytest.raises(NotImplementedError, match="no derivatives"):
            grad(call)(x)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Callable[[Callable[..., Any]], Any]]:
    """torch.compile without a C++ compiler, forgotten afterwards; `dynamo` warns of what it does not trace."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda f: torch.compile(f, backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["direct", "checkpoint", "adjoint"])
def test_compiled_solves_are_those_of_plain_python(mode: str, compiled: Any) -> None:
    w = W.clone().requires_grad_()
    for options in ({}, {"t_eval": [0.4, 0.9]}):
        solve = solving(Dopri5(1e-7, 1e-7), None, gradient=mode, **options)
        f = lambda y, solve=solve: solve(y, w)  # noqa: E731
        assert torch.equal(f(Y), compiled(f)(Y))
        a, b = (torch.autograd.grad(g(Y).sum(), w)[0] for g in (f, compiled(f)))
        assert torch.equal(a, b)


def test_compiled_sampling_likelihoods_and_runs_of_torchdiffeq(compiled: Any) -> None:
    adaptive = Dopri5(1e-6, 1e-6)
    for f in (
        lambda x: fs.sample(FLOW, start=x, solver=adaptive).x,
        lambda x: fs.sample(FLOW, start=x, solver=adaptive, batch=2).x,
        lambda x: fs.sample(FLOW, start=x, solver=DDIM(), nfe=4, batch=2).x,
        lambda x: fs.log_prob(FLOW, x, solver=adaptive, trace="exact").log_prob,
        lambda x: odeint(lambda t, y: -y, x, torch.tensor([0.0, 1.0], dtype=D)),
        lambda x: solving(Torchdiffeq("dopri5"), None)(x, W),
    ):
        with torch.no_grad():
            assert torch.equal(f(Y), compiled(f)(Y))


def test_a_compiled_network_stays_compiled_within_a_solve(compiled: Any) -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    flow = fs.Flow(torch.compile(NET, backend=backend), CondOT())
    outer = compiled(lambda x: fs.sample(flow, start=x, solver=Dopri5(1e-6, 1e-6)).x)
    with torch.no_grad():
        close(outer(Y), fs.sample(FLOW, start=Y, solver=Dopri5(1e-6, 1e-6)).x)
    assert calls
