"""What `solve_sde` promises beside its orders: samples, output times, gradients, states, and errors that help."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.sde import SRK, BrownianPath, EulerMaruyama, Milstein, ReversibleHeun, Scheme, StochasticHeun

Y0 = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).reshape(4, 3)
SCHEMES: list[Scheme] = [EulerMaruyama(), Milstein(), Milstein(False), StochasticHeun(), ReversibleHeun(), SRK()]


def f(t: Tensor, y: Tensor) -> Tensor:
    return y.sin() * (1 + t)


def g(t: Tensor, y: Tensor) -> Tensor:
    return 0.3 * y.cos() * (1 + t)


def solve(y0: Tensor = Y0, steps: Any = 8, **options: Any) -> fs.Solution:
    return fs.solve_sde(f, g, y0, 0.0, 1.0, steps=steps, **options)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("noise", ["fresh", "brownian"])
def test_a_sample_is_the_same_in_any_batch(scheme: Scheme, noise: str) -> None:
    whole = solve(solver=scheme, noise=noise, seed=3).x
    part = solve(Y0[[3, 1]], solver=scheme, noise=noise, seed=3, samples=[3, 1]).x
    torch.testing.assert_close(whole[[3, 1]], part, rtol=1e-14, atol=1e-14)
    own = solve(Y0[:2], solver=scheme, noise=noise, seed=[9, 8]).x
    torch.testing.assert_close(own[1:], solve(Y0[1:2], solver=scheme, noise=noise, seed=[8]).x, rtol=1e-14, atol=1e-14)
    assert (solve(solver=scheme, noise=noise, seed=4).x - whole).abs().max() > 0.01


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("noise", ["fresh", "brownian"])
def test_output_times_do_not_disturb_the_steps(scheme: Scheme, noise: str) -> None:
    nodes = solve(solver=scheme, noise=noise, t_eval=[i / 8 for i in range(9)])
    looks = solve(solver=scheme, noise=noise, t_eval=[0.1, 0.25, 0.3, 0.375, 1.0])
    assert torch.equal(nodes.x[0], Y0)
    assert torch.equal(looks.x[1], nodes.x[2])
    assert torch.equal(looks.x[3], nodes.x[3])
    assert torch.equal(looks.x[4], nodes.x[8])
    assert torch.equal(solve(solver=scheme, noise=noise).x, nodes.x[8])
    assert looks.t_eval is not None
    assert looks.t_eval.tolist() == [0.1, 0.25, 0.3, 0.375, 1.0]


def test_states_between_nodes_converge_like_the_others() -> None:
    """Geometric Brownian motion at t = 0.37, between the nodes of every grid, to the path's own value there."""
    y0 = torch.ones(300, 1, dtype=torch.float64)
    path = BrownianPath.of(0.0, 1.0, seed=2, samples=300)
    truth = torch.exp((0.4 - 0.5**2 / 2) * 0.37 + 0.5 * path(0.0, 0.37, y0))
    errors = []
    for n in (8, 32):
        sol = fs.solve_sde(
            lambda t, y: 0.4 * y, lambda t, y: 0.5 * y, y0, 0.0, 1.0, steps=n, noise=path, t_eval=[0.37], solver=SRK()
        )
        errors.append(float((sol.x[0] - truth).square().mean().sqrt()))
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(1.5, abs=0.35)
    assert errors[1] < 2e-3


def test_a_solve_in_pieces_is_the_whole() -> None:
    whole = solve(steps=[0.0, 0.25, 0.5, 0.625, 1.0]).x
    half = fs.solve_sde(f, g, Y0, 0.0, 0.5, steps=2)
    torch.testing.assert_close(
        fs.solve_sde(f, g, half.x, 0.5, 1.0, steps=[0.5, 0.625, 1.0]).x, whole, rtol=1e-14, atol=1e-14
    )


def test_evaluations_are_counted() -> None:
    for scheme, count in ((EulerMaruyama(), 8), (StochasticHeun(), 16), (SRK(), 16), (ReversibleHeun(), 9)):
        calls = 0

        def counted(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return f(t, y)

        sol = fs.solve_sde(counted, g, Y0, 0.0, 1.0, steps=8, solver=scheme, sde_type="stratonovich")
        assert sol.nfe.tolist() == [count] * 4
        assert calls == count
        assert sol.accepted.tolist() == [8] * 4


def test_images_scalars_and_half_precision() -> None:
    y0 = torch.rand(2, 1, 4, 4)
    assert solve(y0).x.shape == (2, 1, 4, 4)
    assert solve(y0.half()).x.dtype == torch.float32
    assert solve(torch.rand(5)).x.shape == (5,)
    assert solve(torch.rand(5), noise_type="scalar").x.shape == (5,)
    general = fs.solve_sde(
        f, lambda t, y: torch.stack((y, y * y), -1), torch.rand(5), 0.0, 1.0, steps=4, noise_type="general"
    )
    assert general.x.shape == (5,)
    matrix = fs.solve_sde(f, lambda t, y: torch.ones(1, 1, 4, 4, 3), y0, 0.0, 1.0, steps=4, noise_type="additive")
    assert matrix.x.shape == y0.shape
    assert solve(Y0[:0]).x.shape == (0, 3)
    assert torch.equal(fs.solve_sde(f, g, Y0, 1.0, 1.0, steps=3).x, Y0)


def test_further_arguments() -> None:
    rates = torch.rand(4, 1, dtype=torch.float64)
    with_args = fs.solve_sde(lambda t, y, r: -r * y, lambda t, y, r: r, Y0, 0.0, 1.0, steps=4, args=(rates,))
    closed = fs.solve_sde(lambda t, y: -rates * y, lambda t, y: rates, Y0, 0.0, 1.0, steps=4)
    assert torch.equal(with_args.x, closed.x)


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general", "number"])
@pytest.mark.parametrize(
    "steps", [{"steps": 8}, {"rtol": 1e-2, "atol": 1e-2, "solver": SRK()}], ids=["grid", "adaptive"]
)
def test_trees(noise_type: str, steps: dict[str, Any]) -> None:
    """A tree is the packed state: elements side by side, the same motions."""
    if noise_type == "general" and "atol" in steps:
        steps = {"steps": 5}  # SRK has no general noise

    def value(t: Tensor, y: Tensor) -> Any:
        if noise_type == "number":
            return 0.2
        if noise_type == "additive":
            return (0.2 + 0 * y) * (1 + t)
        return torch.stack((0.2 * y, y.cos()), -1) if noise_type == "general" else 0.2 * y.cos()

    def h(t: Tensor, y: dict[str, Tensor]) -> Any:
        assert y["a"].shape == (4, 2, 3)
        assert y["b"].dtype == torch.float32
        t = t.reshape(-1, 1) if t.ndim else t
        if noise_type == "number":
            return 0.2
        return {"a": value(t if not t.ndim else t[..., None], y["a"]), "b": value(t, y["b"])}

    kind = "additive" if noise_type == "number" else noise_type
    y0 = {"a": torch.rand(4, 2, 3, dtype=torch.float64), "b": torch.rand(4, 2)}
    options: dict[str, Any] = {"noise_type": kind, "t_eval": [0.4, 1.0], "seed": 3, "noise": "brownian", **steps}
    sol = fs.solve_sde(lambda t, y: {"a": -y["a"], "b": -y["b"]}, h, y0, 0.0, 1.0, **options)
    packed = torch.cat((y0["a"].flatten(1), y0["b"].double()), 1)
    flat = fs.solve_sde(lambda t, y: -y, value, packed, 0.0, 1.0, **options).x
    assert isinstance(sol.x, dict)
    torch.testing.assert_close(sol.x["a"], flat[..., :6].reshape(2, 4, 2, 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sol.x["b"].double(), flat[..., 6:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("y0", "error", "match"),
    [
        ((), TypeError, "holds no tensor"),
        ((torch.zeros(2, 1), torch.zeros(3, 1)), ValueError, "the same first dimension"),
        ((torch.zeros(2, 1), 1.0), TypeError, "holds a 1.0"),
        ([torch.zeros(2, 1), torch.zeros(2, 3)], ValueError, "expected the structure of y0"),
    ],
)
def test_trees_that_are_no_state(y0: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        fs.solve_sde(lambda t, y: y[:1], lambda t, y: y, y0, 0.0, 1.0, steps=2)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_checkpoints_give_the_same_gradient(scheme: Scheme) -> None:
    found = []
    for mode in ("direct", "checkpoint"):
        theta, y0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), Y0.clone().requires_grad_()
        sol = fs.solve_sde(
            lambda t, y, a: a * y.sin(), lambda t, y, a: a * y.cos(), y0, 0.0, 1.0, steps=10, solver=scheme,
            gradient=mode, t_eval=[0.33, 0.5, 1.0], args=(theta,),
        )  # fmt: skip
        assert int(sol.nfe[0]) == {"StochasticHeun": 20 + 2, "SRK": 20 + 2, "ReversibleHeun": 11 + 1}.get(
            type(scheme).__name__, 10 + 1
        )
        sol.x.square().sum().backward()
        found.append((theta.grad, y0.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general"])
@pytest.mark.parametrize("kind", ["stratonovich", "ito"])
def test_the_adjoint_is_the_gradient_of_the_steps(noise_type: str, kind: str) -> None:
    """States found again to rounding: gradients of the start, parameters and arguments, with looks on the way."""
    net = torch.nn.Linear(3, 3, dtype=torch.float64)
    found = []
    for mode in ("direct", "adjoint"):
        net.zero_grad()
        theta, y0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), Y0.clone().requires_grad_()

        def diffusion(t: Tensor, y: Tensor, theta: Tensor) -> Any:
            if noise_type == "additive":
                return theta * (1 + t)
            found = theta * y.sin()
            return torch.stack((found, 0.3 * y), -1) if noise_type == "general" else found

        sol = fs.solve_sde(
            lambda t, y, theta: net(y).tanh() * (1 + theta), diffusion, y0, 0.0, 1.0, steps=23,
            solver=ReversibleHeun(), noise_type=noise_type, sde_type=kind, gradient=mode, args=(theta,),
            t_eval=[0.0, 0.111, 11 / 23, 0.7, 0.71, 1.0],
        )  # fmt: skip
        (sol.x.square() * torch.arange(1.0, 7.0)[:, None, None]).sum().backward()
        found.append([theta.grad, y0.grad, net.weight.grad, net.bias.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_adjoint_keeps_no_states() -> None:
    """What autograd saves for the way back, in numbers: that of the ends, whatever the steps."""
    saved = []
    for mode in ("direct", "adjoint"):
        for n in (10, 100):
            held = 0

            def pack(v: Tensor) -> Tensor:
                nonlocal held
                held += v.numel()
                return v

            theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
                fs.solve_sde(
                    lambda t, y, a: a * y.sin(), lambda t, y, a: a * y.cos(), Y0, 0.0, 1.0, steps=n, args=(theta,),
                    solver=ReversibleHeun(), sde_type="stratonovich", gradient=mode,
                )  # fmt: skip
            saved.append(held)
    assert saved[1] > 5 * saved[0]
    assert saved[3] == saved[2] < saved[0]


def test_the_adjoint_refuses_what_it_has_not() -> None:
    y0 = Y0.clone().requires_grad_()
    with pytest.raises(TypeError, match=r"use ReversibleHeun\(\)"):
        solve(y0, solver=SRK(), gradient="adjoint")
    x = solve(y0, solver=ReversibleHeun(), gradient="adjoint").x
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(x.sum(), y0, create_graph=True)


def test_gradients_are_those_of_the_solution() -> None:
    """Geometric Brownian motion: ∂X/∂s = X (W − s), and ∂X/∂X₀ = X / X₀, as SRK converges to X."""
    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(100, 1, dtype=torch.float64, requires_grad=True)
    path = BrownianPath.of(0.0, 1.0, seed=1, samples=100)
    x = fs.solve_sde(lambda t, y: 0.2 * y, lambda t, y: s * y, y0, 0.0, 1.0, steps=64, noise=path, solver=SRK()).x
    x.sum().backward()
    w = path(0.0, 1.0, y0.detach())
    truth = torch.exp(0.2 - 0.5**2 / 2 + 0.5 * w)
    assert s.grad is not None
    torch.testing.assert_close(s.grad, (truth * (w - 0.5)).sum(), rtol=2e-3, atol=0)
    torch.testing.assert_close(y0.grad, truth, rtol=2e-3, atol=0)


@pytest.mark.parametrize("scheme", [EulerMaruyama(), Milstein(), SRK()], ids=repr)
def test_transforms_of_torch_func(scheme: Scheme) -> None:
    def loss(rate: Tensor) -> Tensor:
        return fs.solve_sde(
            lambda t, y: -rate * y, lambda t, y: rate * y.sin(), Y0, 0.0, 1.0, steps=4, solver=scheme
        ).x.sum()

    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (direct,) = torch.autograd.grad(loss(rate), rate)
    torch.testing.assert_close(torch.func.grad(loss)(rate.detach()), direct)
    _, tangent = torch.func.jvp(loss, (rate.detach(),), (torch.ones_like(rate),))
    torch.testing.assert_close(tangent, direct)


def test_vmap_and_compile() -> None:
    """Mapped parameters share the noise; a compiled caller runs the solve as it stands."""

    def end(rate: Tensor) -> Tensor:
        return fs.solve_sde(lambda t, y: -rate * y, lambda t, y: 0.3 * y, Y0, 0.0, 1.0, steps=4, solver=SRK()).x

    rates = torch.tensor([1.0, 2.0], dtype=torch.float64)
    both = torch.stack([end(rate) for rate in rates])
    torch.testing.assert_close(torch.func.vmap(end)(rates), both)
    torch.testing.assert_close(torch.compile(end, backend="eager")(rates[1]), both[1])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_sample_that_fails_says_when_and_leaves_the_others() -> None:
    y0 = torch.tensor([[1.0], [50.0], [0.5]], dtype=torch.float64)
    sol = fs.solve_sde(lambda t, y: y**3, lambda t, y: 0.1, y0, 0.0, 1.0, steps=16, noise_type="additive", throw=False,
                       solver=EulerMaruyama())  # fmt: skip
    alone = fs.solve_sde(lambda t, y: y**3, lambda t, y: 0.1, y0[2:], 0.0, 1.0, steps=16, noise_type="additive",
                         samples=[2], solver=EulerMaruyama())  # fmt: skip
    assert sol.ok.tolist()[1:] == [False, True]
    assert sol.status[1] == fs.Status.NONFINITE
    torch.testing.assert_close(sol.x[2:], alone.x)
    with pytest.raises(fs.SolverError, match="sample 1"):
        fs.solve_sde(lambda t, y: y**3, lambda t, y: 0.1, y0, 0.0, 1.0, steps=16, noise_type="additive")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"noise_type": "white"}, ValueError, "diagonal, scalar, additive, general"),
        ({"sde_type": "Ito"}, ValueError, "ito, stratonovich"),
        ({"solver": "rk45"}, ValueError, "euler, euler_maruyama"),
        ({"solver": SRK}, TypeError, r"pass an instance, SRK\(\)"),
        ({"solver": fs.solvers.Heun()}, TypeError, "one of flowsolve.sde"),
        ({"solver": SRK(), "noise_type": "general"}, ValueError, "use EulerMaruyama"),
        ({"gradient": "adjoint"}, (ValueError, TypeError), "gradient"),
        ({"steps": 0}, ValueError, "at least 1"),
        ({"steps": 2.5}, TypeError, "number of steps"),
        ({"steps": [0.0, 0.5]}, ValueError, "rising times"),
        ({"t_eval": [0.5, 0.2]}, ValueError, "strictly rising"),
        ({"t_eval": [0.5, 1.5]}, ValueError, "t0 = 0 to t1 = 1"),
        ({"t_eval": []}, ValueError, "t_eval is empty"),
        ({"noise": "white"}, ValueError, "'fresh', 'brownian'"),
        ({"noise": BrownianPath.of(0.0, 0.5, seed=0, samples=4)}, ValueError, r"over \[0, 0.5\]"),
        ({"noise_type": "general"}, ValueError, r"g\(t, y\) returned a tensor of shape \(4, 3\)"),
        ({"samples": [1]}, ValueError, "batch of 4"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        solve(**{"steps": 8, **options})


def test_shapes_and_times_are_checked() -> None:
    with pytest.raises(ValueError, match=r"f\(t, y\) returned a tensor of shape \(4,\)"):
        fs.solve_sde(lambda t, y: y[:, 0], g, Y0, 0.0, 1.0, steps=2)
    with pytest.raises(ValueError, match="returned a float"):
        fs.solve_sde(f, lambda t, y: 1.0, Y0, 0.0, 1.0, steps=2)
    with pytest.raises(ValueError, match="write a reverse-time SDE"):
        fs.solve_sde(f, g, Y0, 1.0, 0.0, steps=2)
    with pytest.raises(ValueError, match="t1 = nan; expected a finite time"):
        fs.solve_sde(f, g, Y0, 0.0, math.nan, steps=2)
    with pytest.raises(ValueError, match="requires a gradient"):
        fs.solve_sde(f, g, Y0, 0.0, torch.tensor(1.0, requires_grad=True), steps=2)  # type: ignore[arg-type]


def test_a_diffusion_without_forward_derivatives() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.cos()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad

    with pytest.raises(ValueError, match=r"Milstein\(derivatives=False\)"):
        fs.solve_sde(f, lambda t, y: Cut.apply(y), Y0, 0.0, 1.0, steps=2, solver=Milstein())
    assert fs.solve_sde(f, lambda t, y: Cut.apply(y), Y0, 0.0, 1.0, steps=2, solver=Milstein(False)).ok.all()
