"""Networks that write into what they are given or return one buffer: the same result as from a copy, or an error."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve._guard import LEARNING, Guard
from flowsolve.compat import torchdiffeq as compat
from flowsolve.solvers.bridges import Torchdiffeq

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (fs.solvers.Euler(), {"nfe": 12}),
    "heun": (fs.solvers.Heun(), {"nfe": 12}),
    "rk4": (fs.solvers.RK4(), {"nfe": 12}),
    "dopri5": (fs.solvers.Dopri5(), {}),
    "dopri8": (fs.solvers.Dopri8(), {}),
    "unipc": (fs.solvers.UniPC(), {"nfe": 12, "interval": (0.01, 0.99)}),
    "auto": ("auto", {"nfe": 12}),
    "ddpm": (fs.solvers.DDPM(), {"nfe": 12, "interval": (0.01, 0.99)}),
    "heun, stochastic": (fs.solvers.StochasticHeun(), {"nfe": 12, "interval": (0.01, 0.99)}),
}


def ring(count: int) -> Callable[[Tensor], Tensor]:
    """Copies into one of `count` buffers of a shape, one after the other."""
    buffers: dict[Any, list[Tensor]] = {}

    def keep(v: Tensor) -> Tensor:
        row = buffers.setdefault(v.shape, [torch.empty_like(v) for _ in range(count)])
        row.append(row.pop(0))
        return row[-1].copy_(v)

    return keep


def lent() -> Callable[[Tensor], Tensor]:
    """One buffer of another library: each output is another tensor over the same memory."""
    memory: dict[Any, Any] = {}

    def keep(v: Tensor) -> Tensor:
        array = memory.setdefault(v.shape, np.empty(v.shape, dtype=v.numpy().dtype))
        array[...] = v.numpy()
        return torch.from_numpy(array)

    return keep


def in_place(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    t.mul_(2.0)
    for v in cond.values():
        v.add_(1.0)
    return x.mul_(-1.0)


def within_a_view(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    x.flatten()[:] *= -1.0
    return x + 0.0


def plain(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    return -x


def kept_by(keep: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, **cond: keep(-x)


def part_of(keep: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, **cond: keep(torch.cat((-x, x)))[: len(x)]


HABITS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "in place": lambda: in_place,
    "a view": lambda: within_a_view,
    "one buffer": lambda: kept_by(ring(1)),
    "two buffers": lambda: kept_by(ring(2)),
    "three in turn": lambda: kept_by(ring(3)),
    "lent": lambda: kept_by(lent()),
    "part of one buffer": lambda: part_of(ring(1)),
}
every_habit = pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)


@every_habit
@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_that_of_a_network_without_the_habit(habit: Any, name: str) -> None:
    solver, options = SOLVERS[name]
    start, cond = torch.linspace(-2, 2, 6).reshape(3, 2), {"shift": torch.ones(3, 1)}
    kept, given = start.clone(), cond["shift"].clone()
    solve = {"solver": solver, "seed": 1, "cond": cond, **options}
    right = fs.sample(fs.Flow(plain, fs.paths.CondOT()), start=start, **solve)
    found = fs.sample(fs.Flow(habit(), fs.paths.CondOT()), start=start, **solve)
    assert torch.equal(found.x, right.x)
    assert torch.equal(found.nfe, right.nfe)
    assert torch.equal(start, kept)
    assert torch.equal(cond["shift"], given)


@every_habit
@pytest.mark.parametrize(
    "solver", [fs.solvers.RK4(), fs.solvers.Dopri5(), Torchdiffeq("rk4")], ids=["rk4", "dopri5", "bridge"]
)
@pytest.mark.parametrize("kind", ["tensor", "tree", "system"])
def test_so_is_an_ode_of_one_s_own(habit: Any, solver: Any, kind: str) -> None:
    y0, net = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 2), habit()
    kept = y0.clone()
    options = {} if isinstance(solver, fs.solvers.Dopri5) else {"nfe": 40}
    fields = {
        "tensor": (lambda t, y: net(y, t), y0),
        "tree": (lambda t, y: {"a": net(y["a"], t)}, {"a": y0}),
        "system": (lambda t, y: net(y, t), y0),
    }
    f, state = fields[kind]
    sol = fs.solve(f, state, 0.0, 1.0, solver=solver, batched=kind != "system", **options)
    x = sol.x["a"] if kind == "tree" else sol.x
    torch.testing.assert_close(x, math.exp(-1) * kept, rtol=1e-4, atol=1e-6)
    assert torch.equal(y0, kept)


@every_habit
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_so_is_torchdiffeq_s_interface(habit: Any, method: str) -> None:
    net, y0 = habit(), torch.ones(3, dtype=torch.float64)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = compat.odeint(lambda t, y: net(y, t), y0, t, method=method)
    torch.testing.assert_close(found[-1], torch.full_like(y0, math.exp(-1)), rtol=1e-5, atol=0.0)
    assert torch.equal(y0, torch.ones_like(y0))


@every_habit
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_so_is_a_likelihood(habit: Any, trace: str) -> None:
    if habit is HABITS["lent"]:
        pytest.skip("numpy sees no tensor that autograd follows")
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 2)
    kept, net = x.clone(), habit()

    def seen(x: Tensor, t: Tensor, **cond: Any) -> Tensor:  # a buffer cannot carry gradients; in place can
        return net(x, t) if habit in (HABITS["in place"], HABITS["a view"]) else net(x.detach(), t) - (x - x.detach())

    out = fs.log_prob(fs.Flow(seen, fs.paths.CondOT()), x, solver=fs.solvers.RK4(), nfe=16, trace=trace)
    right = fs.log_prob(fs.Flow(plain, fs.paths.CondOT()), x, solver=fs.solvers.RK4(), nfe=16, trace=trace)
    torch.testing.assert_close(out.log_prob, right.log_prob, rtol=1e-13, atol=1e-13)
    assert torch.equal(x, kept)


def test_gradients_pass_the_copies() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(inplace=True), nn.Linear(8, 2), nn.SiLU(inplace=True))
    twin = nn.Sequential(net[0], nn.SiLU(), net[2], nn.SiLU())
    grads = []
    for layers in (net, twin):
        flow = fs.Flow(lambda x, t, layers=layers: layers(x), fs.paths.CondOT())
        x = torch.linspace(-1, 1, 6).reshape(3, 2).requires_grad_()
        out = fs.sample(flow, start=x, solver=fs.solvers.Heun(), nfe=12).x
        grads.append(torch.autograd.grad(out.square().sum(), [x, *net.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_inference_tensors_are_compared_by_value() -> None:
    with torch.inference_mode():
        x = torch.ones(3, 2)
        found = fs.sample(fs.Flow(in_place, fs.paths.CondOT()), start=x, solver=fs.solvers.Heun(), nfe=40).x
        assert torch.equal(x, torch.ones(3, 2))
    right = fs.sample(fs.Flow(plain, fs.paths.CondOT()), start=torch.ones(3, 2), solver=fs.solvers.Heun(), nfe=40).x
    assert torch.equal(found, right)


def test_a_habit_taken_up_later_is_an_error() -> None:
    calls = 0

    def late(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x if calls <= LEARNING + 1 else x.mul_(-1.0)

    with pytest.raises(RuntimeError, match=r"wrote into the tensors it was given.*x\.clone\(\)"):
        fs.sample(fs.Flow(late, fs.paths.CondOT()), start=torch.ones(3, 2), solver=fs.solvers.Heun(), nfe=40)

    keep, count = ring(1), 0

    def later(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return -x if count <= LEARNING + 1 else keep(-x)

    with pytest.raises(RuntimeError, match=r"memory of an earlier one.*clone\(\)"):
        fs.sample(fs.Flow(later, fs.paths.CondOT()), start=torch.ones(3, 2), solver=fs.solvers.RK4(), nfe=40)


def test_what_is_no_habit_is_left_alone() -> None:
    """The input returned, a constant, a cached output that nobody writes to: no error, no copy where none is needed."""
    constant = torch.ones(3, 2)
    cached: list[Tensor] = []

    def lazily(x: Tensor, t: Tensor) -> Tensor:
        if len(cached) % 2 == 0:
            cached.append(-x)
        else:
            cached.append(cached[-1])
        return cached[-1]

    for net in (lambda x, t: x, lambda x, t: x.view_as(x), lambda x, t: constant, lazily):
        fs.sample(fs.Flow(net, fs.paths.CondOT()), start=torch.ones(3, 2), solver=fs.solvers.RK4(), nfe=40)
    given: list[int] = []
    guard = Guard(lambda a, b: (given.append(a.data_ptr()), -a)[1], "f")
    x, t = torch.ones(3), torch.ones(3)
    kept = [guard(x, t) for _ in range(LEARNING + 5)]
    assert [p == x.data_ptr() for p in given] == [False] * LEARNING + [True] * 5
    assert all(torch.equal(v, -x) for v in kept)


def test_a_guard_survives_a_pickle() -> None:
    guard = pickle.loads(pickle.dumps(Guard(torch.add, "f")))  # noqa: S301
    assert torch.equal(guard(torch.ones(2), torch.ones(2)), 2 * torch.ones(2))


@pytest.mark.parametrize("solver", ["unipc", "dpmsolver++", "deis", "heun"])
def test_a_pipeline_s_outputs_may_lie_in_a_buffer(solver: str) -> None:
    pytest.importorskip("diffusers")
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    ends = []
    for keep in (ring(1), lambda v: v):
        scheduler = fs.adapters.diffusers.Scheduler.from_config(config, solver=solver)
        scheduler.set_timesteps(10)
        x = torch.linspace(-2, 2, 6).reshape(3, 2) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(keep(0.5 * scheduler.scale_model_input(x, t).sin()), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)
