"""`solve` over trees of tensors: what f is given, what comes back, and what is refused before anything is computed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.solvers import RK4, Bosh3, Dopri5, Heun, Tsit5

SOLVERS = [(Dopri5(1e-9, 1e-9), None), (RK4(), 400)]
both = pytest.mark.parametrize(("solver", "nfe"), SOLVERS, ids=["adaptive", "fixed"])


def of(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Body(NamedTuple):
    position: Tensor
    momentum: Tensor


TREES = {
    "tuple": (lambda a, b: (a, b), lambda y: (y[0], y[1])),
    "list": (lambda a, b: [a, b], lambda y: (y[0], y[1])),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda y: (y["a"], y["b"])),
    "nested": (lambda a, b: {"a": (a,), "b": [b]}, lambda y: (y["a"][0], y["b"][0])),
    "named": (Body, lambda y: (y.position, y.momentum)),
}


@both
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("t_eval", [None, [0.5, 1.0, math.pi]])
def test_trees_of_any_kind(tree: str, solver: Any, nfe: int | None, t_eval: Any) -> None:
    """An oscillator with position (B, 3) and momentum (B, 3): after half a turn both are reversed."""
    make, split = TREES[tree]
    a, b = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.ones(4, 3).double()

    def f(t: Tensor, y: Any) -> Any:
        position, momentum = split(y)
        assert type(y) is type(make(a, b))
        assert position.shape == momentum.shape == (len(position), 3)
        assert t.shape in ((), (len(position), 1))
        return make(momentum, -position)

    sol = fs.solve(f, make(a, b), 0.0, math.pi, solver=solver, nfe=nfe, t_eval=t_eval)
    assert type(sol.x) is type(make(a, b))
    p, q = split(sol.x)
    if t_eval is None:
        torch.testing.assert_close((p, q), (-a, -b), rtol=1e-6, atol=1e-6)
        return
    assert p.shape == (3, 4, 3)
    for i, t in enumerate(t_eval):
        expected = (a * math.cos(t) + b * math.sin(t), b * math.cos(t) - a * math.sin(t))
        torch.testing.assert_close((p[i], q[i]), expected, rtol=1e-5, atol=1e-5)


@both
def test_leaves_of_different_shapes_and_dtypes(solver: Any, nfe: int | None) -> None:
    """An image, a number and half-precision features for each sample: each leaf comes to f in its own dtype."""
    image, number, half = torch.ones(2, 3, 4, 4), of(1.0, 2.0), torch.ones(2, 5, dtype=torch.bfloat16)

    def f(t: Tensor, y: Any) -> Any:
        assert [v.dtype for v in y] == [torch.float32, torch.float64, torch.bfloat16]
        assert [tuple(v.shape[1:]) for v in y] == [(3, 4, 4), (), (5,)]
        return tuple(-v for v in y)

    sol = fs.solve(f, (image, number, half), 0.0, 1.0, solver=solver, nfe=nfe)
    assert [v.shape for v in sol.x] == [image.shape, number.shape, half.shape]
    torch.testing.assert_close(sol.x[1], number * math.exp(-1.0), rtol=1e-6, atol=1e-6)
    assert sol.nfe.shape == (2,)


@both
def test_a_tree_as_one_system(solver: Any, nfe: int | None) -> None:
    """Without a batch the leaves' shapes are free, t is 0-dimensional and there is one step size."""

    def f(t: Tensor, y: Any) -> Any:
        assert t.shape == ()
        return {"matrix": -y["matrix"], "number": 0.0 * y["number"] + 2.0 * t}

    y0 = {"matrix": torch.eye(3, dtype=torch.float64), "number": of(0.0)[0]}
    sol = fs.solve(f, y0, 0.0, 2.0, solver=solver, nfe=nfe, batched=False)
    torch.testing.assert_close(sol.x["matrix"], torch.eye(3).double() * math.exp(-2.0), rtol=1e-7, atol=1e-7)
    assert float(sol.x["number"]) == pytest.approx(4.0)
    assert sol.nfe.shape == (1,)
    dense = fs.solve(f, y0, 0.0, 2.0, solver=solver, nfe=nfe, batched=False, t_eval=[1.0, 2.0])
    assert dense.x["matrix"].shape == (2, 3, 3)
    assert dense.x["number"].tolist() == pytest.approx([1.0, 4.0])


def test_samples_of_a_tree_have_their_own_steps() -> None:
    rate = torch.logspace(0, 1.5, 5, dtype=torch.float64)
    f = lambda t, y: (torch.cos(y[1] * t[:, 0]) * y[1], 0.0 * y[1])  # noqa: E731
    sol = fs.solve(f, (torch.zeros(5).double(), rate), 0.0, 1.0, solver=Tsit5(1e-8, 1e-8))
    torch.testing.assert_close(sol.x[0], torch.sin(rate), rtol=1e-6, atol=1e-6)
    assert int(sol.nfe[-1]) > 2 * int(sol.nfe[0])


@pytest.mark.parametrize(
    ("y0", "error", "match"),
    [
        (
            (torch.ones(2, 3), torch.ones(3, 3)),
            ValueError,
            r"shapes \(2, 3\), \(3, 3\); expected the same first dimension",
        ),
        ((torch.ones(2), 1.0), TypeError, "holds a float; expected floating-point tensors"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "holds a dtype torch.int64"),
        ((), TypeError, "holds no tensor"),
        (1.0, TypeError, "holds a float"),
    ],
)
def test_trees_that_are_no_state(y0: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fs.solve(lambda t, y: y, y0, 0.0, 1.0, solver=Dopri5())


@pytest.mark.parametrize(
    "wrong", [lambda t, y: y[0], lambda t, y: (y[0],), lambda t, y: (y[0], y[1][:, :1]), lambda t, y: (y[0], 0.0)]
)
def test_right_hand_sides_that_return_another_tree(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"f\(t, y\) returned .*; expected the structure of y0, \(\(2, 3\), \(2, 3\)\)"
    ):
        fs.solve(wrong, (torch.ones(2, 3), torch.ones(2, 3)), 0.0, 1.0, solver=Dopri5())


def test_output_times_within_a_fixed_grid_cost_nothing_but_what_is_said() -> None:
    y0 = torch.ones(2, 1, dtype=torch.float64)
    for solver, extra in ((Heun(), 0), (RK4(), 0), (Bosh3(adaptive=False), 2)):
        n = 20 * solver.evaluations
        sol = fs.solve(lambda t, y: -y, y0, 0.0, 1.0, solver=solver, nfe=n, t_eval=[0.0, 0.31, 0.5, 0.77, 1.0])
        assert sol.nfe.tolist() == [n + extra] * 2  # 0, 0.5 and 1 are nodes
        torch.testing.assert_close(sol.x[:, 0, 0], torch.exp(-of(0.0, 0.31, 0.5, 0.77, 1.0)), rtol=2e-3, atol=2e-3)
        assert sol.x[0].tolist() == y0.tolist()


@pytest.mark.parametrize("solver", [fs.solvers.Dopri5(), fs.solvers.RK4()])
def test_a_complex_slope_of_a_real_state_is_refused(solver: Any) -> None:
    """Its imaginary part would be dropped: y' = iy from 1 would end in 1, not in e^i."""
    nfe = None if solver == fs.solvers.Dopri5() else 20
    y0 = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"returned torch.complex128 for y of torch.float64; expected real numbers"):
        fs.solve(lambda t, y: 1j * y, y0, 0.0, 1.0, solver=solver, nfe=nfe)
    with pytest.raises(TypeError, match=r"returned torch.complex128"):
        fs.solve(lambda t, y: {"a": 1j * y["a"]}, {"a": y0}, 0.0, 1.0, solver=solver, nfe=nfe)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_times_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    """Before the field is asked."""
    y0 = torch.ones(2, 1)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    for times, words in (
        ((bad, 1.0, None), "t0 = "),
        ((0.0, bad, None), "t1 = "),
        ((0.0, 1.0, [0.5, bad]), r"t_eval\[1\] = "),
    ):
        with pytest.raises(ValueError, match=words + r".*; expected a finite time"):
            fs.solve(f, y0, times[0], times[1], t_eval=times[2], solver=fs.solvers.Dopri5())
