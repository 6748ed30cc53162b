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


class Path(nn.Module):
    """A layer of one's own that is random in training mode (drop-path, functional dropout)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3, self.training)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(2, 1, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None], x[:, None], x[:, None])[0][:, 0]


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 2, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None])[0][:, 0]


def left_in_training_mode() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.3))).eval()
    net[1][0].train()
    return net


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "functional dropout": lambda: nn.Sequential(nn.Linear(2, 2), Path()),
    "attention": Attending,
    "LSTM": Remembering,
    "RReLU": lambda: nn.Sequential(nn.Linear(2, 2), nn.RReLU()),
    "dropout in training mode under an eval parent": left_in_training_mode,
    "running statistics": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
    ),
}
ENTRIES: dict[str, Callable[[fs.Flow], Any]] = {
    "sample": lambda flow: fs.sample(flow, (3, 2), nfe=8),
    "encode": lambda flow: fs.encode(flow, torch.ones(3, 2), nfe=8),
    "log_prob": lambda flow: fs.log_prob(flow, torch.ones(3, 2), solver=fs.solvers.Heun(), nfe=8),
    "curve": lambda flow: fs.log_prob(flow, torch.ones(3, 2), nfe=12),
    "sample_log_prob": lambda flow: fs.sample_log_prob(flow, (3, 2), solver=fs.solvers.Heun(), nfe=8),
    "batching": lambda flow: list(fs.batching.sample(flow, (3, 2), batch=2, nfe=8)),
    "bound": lambda flow: fs.variational_bound(flow, torch.tensor([[0, 255]] * 3, dtype=torch.uint8)),
    "guided": lambda flow: fs.sample(fs.guidance.Autoguidance(fs.Flow(plain, flow.path), flow, 2.0), (3, 2), nfe=8),
}


@pytest.mark.parametrize("wrap", [lambda net: lambda x, t: net(x), lambda net: Timeless(net)], ids=["lambda", "module"])
@pytest.mark.parametrize("name", RANDOM)
def test_training_mode_is_noticed_in_every_layer(name: str, wrap: Any) -> None:
    net = RANDOM[name]()
    flow = fs.Flow(wrap(net), fs.paths.CondOT())
    with pytest.raises(ValueError, match="training mode"):
        fs.sample(flow, (3, 2), nfe=8)
    net.eval()
    fs.sample(flow, (3, 2), nfe=8)
    net.train()
    with pytest.raises(ValueError, match="training mode"):
        fs.sample(flow, (3, 2), nfe=8)


class Timeless(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_training_mode_is_noticed_at_every_entry(entry: Any) -> None:
    net = RANDOM["functional dropout"]()
    with pytest.raises(ValueError, match="training mode"):
        entry(fs.Flow(lambda x, t: net(x), fs.paths.CondOT()))


LEFT = {"dropout": RANDOM["functional dropout"](), "mixing": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))}
DROPPING, MIXING = LEFT["dropout"], LEFT["mixing"]


@pytest.mark.parametrize("net", [lambda x, t: DROPPING(x), lambda x, t: MIXING(x)], ids=LEFT)
def test_training_mode_is_noticed_in_a_network_that_is_a_global(net: Any) -> None:
    """As a script or a notebook has it."""
    with pytest.raises(ValueError, match="training mode"):
        fs.sample(fs.Flow(net, fs.paths.CondOT()), (3, 2), nfe=8)


@pytest.mark.parametrize("tree", [False, True])
def test_training_mode_is_noticed_in_an_ode_of_one_s_own(tree: bool) -> None:
    net = RANDOM["functional dropout"]()
    f, y0 = ((lambda t, y: [net(y[0])]), [torch.ones(3, 2)]) if tree else ((lambda t, y: net(y)), torch.ones(3, 2))
    with pytest.raises(ValueError, match="training mode"):
        fs.solve(f, y0, 0.0, 1.0, solver=fs.solvers.Heun(), nfe=8)


def test_a_random_network_that_is_in_no_mode_is_warned_of_and_drawing_without_effect_is_not() -> None:
    with pytest.warns(UserWarning, match="draws at random"):
        fs.sample(fs.Flow(lambda x, t: -x + torch.randn_like(x), fs.paths.CondOT()), (3, 2), nfe=8)
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))  # training mode, without a consequence
    before = torch.get_rng_state()
    flow = fs.Flow(lambda x, t: (torch.rand(3), net(x))[1], fs.paths.CondOT())
    made = int(fs.sample(flow, (3, 2), solver=fs.solvers.Euler(), nfe=8).nfe[0])
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    for _ in range(made):
        torch.rand(3)
    assert torch.equal(after, torch.get_rng_state())  # what was drawn to look is not missed


def test_dropout_is_welcome_in_training() -> None:
    net = RANDOM["functional dropout"]()
    flow = fs.Flow(lambda x, t: net(x), fs.paths.CondOT())
    flow.arm()  # as a solve does that then stops for another reason
    fs.training.cfm_loss(flow, torch.ones(3, 2)).backward()
