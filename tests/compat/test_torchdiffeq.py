"""flowsolve's odeint beside torchdiffeq's, scipy's DOP853 and closed forms."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.compat.torchdiffeq import odeint, odeint_adjoint

torchdiffeq = pytest.importorskip("torchdiffeq")
PAIRS = ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
MATRIX = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
STARTS = torch.tensor([[1.0, 0.3], [0.5, 0.5], [-1.0, 0.2]], dtype=torch.float64)
FORWARD = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
BACKWARD = torch.tensor([3.0, 2.9, 1.0, 0.2, -1.0], dtype=torch.float64)
TIMES = pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["increasing", "decreasing"])


def field(t: Tensor, y: Tensor) -> Tensor:
    assert t.shape == ()
    assert t.dtype is y.dtype
    return torch.tanh(y) @ MATRIX.to(y.dtype) + torch.cos(t)


def coupled(t: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a vector and a number that act upon each other."""
    a, b, c = y
    return torch.sin(a) - 0.1 * c * t, -b + a.sum(), -c + b[0] * torch.cos(t)


TUPLE = (STARTS, torch.tensor([0.5, -0.5], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))


def truth(t: Tensor) -> Tensor:
    """`field` from STARTS by DOP853."""
    times = t.tolist()

    def f(s: float, y: np.ndarray) -> np.ndarray:
        return (np.tanh(y.reshape(3, 2)) @ MATRIX.numpy() + math.cos(s)).ravel()

    sol = solve_ivp(f, (times[0], times[-1]), STARTS.numpy().ravel(), "DOP853", times, rtol=1e-13, atol=1e-13)
    return torch.from_numpy(sol.y.T.reshape(-1, 3, 2))


def same(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- results ---------------------------------------------------------------------------------------------------------


@TIMES
@pytest.mark.parametrize(
    ("method", "tolerance", "bound"),
    [
        (None, 1e-9, 1e-7),
        ("dopri5", 1e-9, 1e-7),
        ("tsit5", 1e-9, 1e-7),
        ("dopri8", 1e-10, 1e-7),
        ("bosh3", 1e-7, 1e-4),
        ("adaptive_heun", 1e-5, 1e-2),
        ("fehlberg2", 1e-5, 5e-2),
    ],
)
def test_adaptive_methods_against_dop853(t: Tensor, method: str | None, tolerance: float, bound: float) -> None:
    y = odeint(field, STARTS, t, method=method, rtol=tolerance, atol=tolerance)
    assert y.shape == (len(t), 3, 2)
    assert torch.equal(y[0], STARTS)
    same(y, truth(t), bound)


@TIMES
def test_the_default_agrees_with_torchdiffeq(t: Tensor) -> None:
    same(odeint(field, STARTS, t), torchdiffeq.odeint(field, STARTS, t), 1e-5)


@TIMES
def test_tuples_agree_with_torchdiffeq(t: Tensor) -> None:
    found = odeint(coupled, TUPLE, t)
    expected = torchdiffeq.odeint(coupled, TUPLE, t)
    assert isinstance(found, tuple)
    for a, b in zip(found, expected, strict=True):
        same(a, b, 1e-5)


@TIMES
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "options",
    [
        None,
        {},
        {"step_size": 0.07},
        {"step_size": 0.07, "interp": "cubic"},
        {"step_size": 0.5, "perturb": False},
        {"step_size": 100.0},
        {"grid_constructor": lambda f, y, t: torch.linspace(float(t[0]), float(t[-1]), 18, dtype=t.dtype)},
    ],
    ids=["t", "none", "size", "cubic", "nodes", "one", "grid"],
)
def test_fixed_grids_are_torchdiffeq_s_to_rounding(t: Tensor, method: str, options: dict[str, Any] | None) -> None:
    same(
        odeint(field, STARTS, t, method=method, options=options),
        torchdiffeq.odeint(field, STARTS, t, method=method, options=options),
        1e-12,
    )
    if options is None:
        for a, b in zip(
            odeint(coupled, TUPLE, t, method=method), torchdiffeq.odeint(coupled, TUPLE, t, method=method), strict=True
        ):
            same(a, b, 1e-12)


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_grid_costs_its_steps(method: str) -> None:
    calls = [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return -y

    cost = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}[method]
    odeint(f, STARTS, FORWARD, method=method)
    assert calls[0] == 6 * cost
    for n in (1, 49, 93, 98):  # torchdiffeq takes 50 steps of 1/49
        calls[0] = 0
        odeint(f, STARTS, torch.tensor([0.0, 1.0]), method=method, options={"step_size": 1.0 / n})
        assert calls[0] == n * cost


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_any_shape_and_dtype(method: str) -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    for y0 in (torch.tensor(2.0), torch.ones(3), torch.ones(2, 1, 4, dtype=torch.float64), torch.ones(2).bfloat16()):
        seen = set()

        def f(t: Tensor, y: Tensor, seen: set[Any] = seen) -> Tensor:
            seen.add((y.dtype, y.shape))
            return -y

        y = odeint(f, y0, t, method=method)
        assert seen == {(y0.dtype, y0.shape)}
        assert y.dtype is y0.dtype
        assert y.shape == (3, *y0.shape)
        expected = y0 * torch.exp(-t.to(y0.dtype)).reshape(-1, *[1] * y0.ndim)
        bound = 1e-2 if y0.dtype is torch.bfloat16 else 1e-6 if method == "dopri5" else 1e-3
        same(y, expected, bound)


def test_a_single_time() -> None:
    for method in ("dopri5", "rk4"):
        assert torch.equal(odeint(field, STARTS, torch.tensor([0.5]), method=method), STARTS[None])
        assert torch.equal(odeint_adjoint(field, STARTS, torch.tensor([0.5]), method=method), STARTS[None])
        a, b, c = odeint(coupled, TUPLE, torch.tensor([0.5]), method=method)
        assert (a.shape, b.shape, c.shape) == ((1, 3, 2), (1, 2), (1,))


# --- gradients -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(MATRIX.clone())
        self.bias = nn.Parameter(torch.tensor([0.2, -0.3], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y) @ self.weight + self.bias * torch.cos(t)


def gradients(solve: Callable[..., Any], t: Tensor, wanted: str = "yp", **given: Any) -> list[Tensor]:
    net, y0, times = Net(), STARTS.clone().requires_grad_(), t.clone().requires_grad_("t" in wanted)
    y = solve(net, y0, times, **given)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape)
    leaves = [*([y0, *net.parameters()] if "p" in wanted else []), *([times] if "t" in wanted else [])]
    return list(torch.autograd.grad((weights * y).sum(), leaves))


@TIMES
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("ours", [odeint, odeint_adjoint])
def test_gradients_agree_with_torchdiffeq(t: Tensor, method: str, ours: Callable[..., Any]) -> None:
    options = {"step_size": 0.05} if method == "rk4" else None
    theirs = torchdiffeq.odeint if ours is odeint else torchdiffeq.odeint_adjoint
    given = {"method": method, "options": options, "rtol": 1e-8, "atol": 1e-8}
    if method == "rk4" and ours is odeint_adjoint:
        theirs = torchdiffeq.odeint
        bound = 1e-4  # torchdiffeq's adjoint steps from time to time, so that the two are as exact as the steps
    else:
        bound = 1e-6 if method == "rk4" else 1e-5
    for a, b in zip(gradients(ours, t, **given), gradients(theirs, t, **given), strict=True):
        same(a, b, bound)


@TIMES
@pytest.mark.parametrize("ours", [odeint, odeint_adjoint])
def test_gradients_with_respect_to_time(t: Tensor, ours: Callable[..., Any]) -> None:
    given = {"rtol": 1e-8, "atol": 1e-8}
    (found,) = gradients(ours, t, "t", **given)
    (expected,) = gradients(torchdiffeq.odeint_adjoint, t, "t", **given)
    same(found, expected, 1e-5)


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "options": {"step_size": 0.01}}], ids=["dopri5", "rk4"])
def test_second_derivatives_with_respect_to_time(options: Any) -> None:
    """Of y₁ + dy₁/dt₁ with y' = −(1 + t) y, beside torchdiffeq's (which differentiates its interpolant: 1e-4)."""
    found = []
    for solve in (odeint, torchdiffeq.odeint):
        y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
        y = solve(lambda t, y: -(1.0 + t) * y, y0, t, **options)
        (first,) = torch.autograd.grad(y[-1].sum(), t, create_graph=True)
        found.append(torch.autograd.grad(y[-1].sum() + first[-1], (y0, t)))
    decay = math.exp(-(0.7 + 0.5 * (0.9**2 - 0.2**2)))  # y₁ + dy₁/dt₁ = −t₁ y₁
    truth = torch.tensor([-1.2 * 0.9 * 2, 0.0, 2 * (0.9 * 1.9 - 1.0)], dtype=torch.float64) * decay
    torch.testing.assert_close(found[0][0], torch.full_like(found[0][0], -0.9 * decay), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[0][1], truth, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1][1], truth, rtol=1e-3, atol=1e-3)


def test_gradients_of_tuples() -> None:
    for ours in (odeint, odeint_adjoint):
        results = []
        for solve, more in ((ours, {}), (torchdiffeq.odeint, {})):
            y0 = tuple(v.clone().requires_grad_() for v in TUPLE)
            out = solve(coupled, y0, FORWARD, rtol=1e-9, atol=1e-9, **more)
            results.append(torch.autograd.grad(sum((v.square()).sum() for v in out), y0))
        for a, b in zip(*results, strict=True):
            same(a, b, 1e-6)


def test_the_adjoint_finds_parameters_wherever_they_are() -> None:
    """y(1) = y₀ e^(−2v): v a leaf behind what is listed, listed itself, or not listed at all."""
    for listed in ("none", "behind", "itself", "empty"):
        v = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        w = 2.0 * v
        params = {"none": None, "behind": (w,), "itself": [v], "empty": ()}[listed]
        y = odeint_adjoint(lambda t, y, w=w: -w * y, STARTS, torch.tensor([0.0, 1.0]), adjoint_params=params)
        (found,) = torch.autograd.grad(y[-1].sum(), v)
        same(found, -2.0 * STARTS.sum() * math.exp(-0.8), 1e-6)


def test_no_gradients_without_recording() -> None:
    with torch.no_grad():
        assert not odeint_adjoint(Net(), STARTS, FORWARD).requires_grad
    assert odeint(Net(), STARTS, FORWARD).requires_grad
    assert not odeint(field, STARTS, FORWARD).requires_grad


# --- options ---------------------------------------------------------------------------------------------------------


def counted(method: str = "dopri5", **given: Any) -> tuple[int, Any]:
    calls = [0]

    def f(t: Tensor, y: Any) -> Any:
        calls[0] += 1
        return coupled(t, y) if isinstance(y, tuple) else field(t, y)

    y = odeint(f, given.pop("y0", STARTS), given.pop("t", FORWARD), method=method, **given)
    return calls[0], y


def test_options_are_obeyed() -> None:
    assert counted(options={"first_step": 0.01, "max_step": 0.01})[0] == 1 + 6 * 300
    usual = counted(rtol=1e-6, atol=1e-6)[0]
    assert counted(rtol=1e-6, atol=1e-6, options={"safety": 0.5})[0] > usual
    assert counted(rtol=1e-6, atol=1e-6, options={"ifactor": 1.01, "first_step": 1e-2})[0] > usual
    assert counted(rtol=torch.tensor(1e-6), atol=np.float64(1e-6), options={"dtype": torch.float64})[0] == usual


def test_norms() -> None:
    """By default that of a tuple is the largest rms of its members; a norm given sees what func sees."""

    def largest(e: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([v.square().mean().sqrt() for v in e]).max()

    default, given = counted(y0=TUPLE), counted(y0=TUPLE, options={"norm": largest})
    assert default[0] == given[0]
    for a, b in zip(default[1], given[1], strict=True):
        same(a, b, 1e-12)
    shapes = set()

    def first(e: Tensor) -> Tensor:
        shapes.add(e.shape)
        return e[0].abs().max()

    counted(options={"norm": first})
    assert shapes == {STARTS.shape}
    assert counted(options={"norm": lambda e: 0.0 * e.sum()})[0] < counted()[0] / 2


def test_limits_raise() -> None:
    with pytest.raises(fs.SolverError, match="max_steps attempts made") as caught:
        counted(options={"max_num_steps": 2})
    assert caught.value.solution.x.shape == STARTS.shape
    with pytest.raises(fs.SolverError):
        odeint(lambda t, y: y * y, torch.ones(1), torch.tensor([0.0, 2.0]))
    with pytest.raises(fs.SolverError, match="not finite"):
        odeint(lambda t, y: y * math.nan, STARTS, FORWARD, method="rk4")
    with pytest.raises(fs.SolverError):
        odeint_adjoint(lambda t, y: y * math.nan, STARTS.requires_grad_(False), FORWARD)
    calls, _ = counted(rtol=1e-12, atol=1e-12, options={"min_step": 0.1})
    assert calls <= 2 + 6 * 31  # a step of min_step is always accepted, as there


# --- callbacks -------------------------------------------------------------------------------------------------------


class Told(nn.Module):
    """Notes what it is told."""

    def __init__(self, names: tuple[str, ...], inner: Callable[..., Any] = field) -> None:
        super().__init__()
        self.inner, self.log = inner, []
        for name in names:
            setattr(self, name, lambda t, y, dt, name=name: self.log.append((name, float(t), y, float(dt))))

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.inner(t, y)


STEP = ("callback_step",)
ALL = ("callback_step", "callback_accept_step", "callback_reject_step")


@TIMES
@pytest.mark.parametrize("options", [None, {"step_size": 0.3}])
def test_callbacks_on_a_fixed_grid_are_torchdiffeq_s(t: Tensor, options: dict[str, Any] | None) -> None:
    ours, theirs = Told(STEP), Told(STEP)
    odeint(ours, STARTS, t, method="rk4", options=options)
    torchdiffeq.odeint(theirs, STARTS, t, method="rk4", options=options)
    assert len(ours.log) == len(theirs.log)
    for a, b in zip(ours.log, theirs.log, strict=True):
        assert a[0] == b[0]
        assert a[1] == pytest.approx(b[1], abs=1e-12)
        assert a[3] == pytest.approx(b[3], abs=1e-12)
        same(a[2], b[2], 1e-12)


@TIMES
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_callbacks_of_an_adaptive_method_tell_its_steps(t: Tensor, solve: Callable[..., Any]) -> None:
    def jumps(s: Tensor, y: Tensor) -> Tensor:
        return field(s, y) + torch.sign(s - 0.5)

    func = Told(ALL, jumps)
    y0 = STARTS.clone().requires_grad_()
    y = solve(func, y0, t, rtol=1e-6, atol=1e-6)
    log = list(func.log)
    steps = [e for e in log if e[0] == "callback_step"]
    accepted = [e for e in log if e[0] == "callback_accept_step"]
    rejected = [e for e in log if e[0] == "callback_reject_step"]
    assert len(steps) == len(accepted) + len(rejected)
    assert rejected
    assert [e[0] for e in log[::2]] == ["callback_step"] * len(steps)
    assert sum(e[3] for e in accepted) == pytest.approx(abs(float(t[-1] - t[0])))
    sign = 1.0 if t[-1] > t[0] else -1.0
    for a, b in pairwise(accepted):
        assert b[1] == pytest.approx(a[1] + sign * a[3])
    assert accepted[0][1] == float(t[0])
    assert accepted[0][2].shape == STARTS.shape
    torch.autograd.grad(y.sum(), y0)
    assert func.log == log, "nobody is called on the way back"


def test_callbacks_are_given_tuples() -> None:
    func = Told(STEP, coupled)
    odeint(func, TUPLE, FORWARD)
    assert all([v.shape for v in e[2]] == [v.shape for v in TUPLE] for e in func.log)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_here_says_so() -> None:
    t = FORWARD
    with pytest.raises(ValueError, match=r"method = 'rk5' is not known; expected one of dopri5.* torchdiffeq's: expl"):
        odeint(field, STARTS, t, method="rk5")
    with pytest.warns(UserWarning, match="dopri5 has no option 'step_size': ignored; expected some of norm"):
        odeint(field, STARTS, t, options={"step_size": 0.1})
    with pytest.warns(UserWarning, match="rk4 has no option 'safety'"):
        odeint(field, STARTS, t, method="rk4", options={"safety": 0.8})
    with pytest.raises(ValueError, match="interp = 'quintic'"):
        odeint(field, STARTS, t, method="rk4", options={"interp": "quintic"})
    with pytest.raises(ValueError, match="step_size = -1"):
        odeint(field, STARTS, t, method="rk4", options={"step_size": -1})
    with pytest.raises(ValueError, match="give one of them"):
        odeint(field, STARTS, t, method="rk4", options={"step_size": 1, "grid_constructor": print})
    with pytest.raises(ValueError, match=r"grid_constructor returned nodes from 0\.0 to 1\.0"):
        odeint(field, STARTS, t, method="rk4", options={"grid_constructor": lambda f, y, t: torch.tensor([0.0, 1.0])})
    with pytest.raises(TypeError, match="dtype = 'double'; expected a floating-point dtype"):
        odeint(field, STARTS, t, options={"dtype": "double"})
    with pytest.raises(ValueError, match="dfactor, ifactor"):
        odeint(field, STARTS, t, options={"ifactor": 0.5})
    with pytest.raises(ValueError, match=r"rtol has shape \(3, 3\); expected what broadcasts to \(3, 2\)"):
        odeint(field, STARTS, t, rtol=torch.full((3, 3), 1e-6))
    with pytest.raises(ValueError, match="atol has 2 entries; expected one for each of the 3"):
        odeint(coupled, TUPLE, t, atol=(1e-6, 1e-7))
    with pytest.raises(ValueError, match="step_t and jump_t hold a time twice"):
        odeint(field, STARTS, t, options={"jump_t": torch.tensor([0.5]), "step_t": torch.tensor([0.5])})
    with pytest.warns(UserWarning, match="has no error test, and never calls callback_accept_step"):
        odeint(Told(ALL[1:2]), STARTS, t, method="euler")
    with pytest.raises(ValueError, match="t has 4 times; with event_fn expected 2"):
        odeint(field, STARTS, torch.linspace(0.0, 1.0, 4), event_fn=lambda t, y: y.sum())
    with pytest.raises(ValueError, match="give options step_size"):
        odeint(field, STARTS, t[:2], event_fn=lambda t, y: y.sum(), method="rk4")
    with pytest.raises(ValueError, match="event_fn returned float; expected a tensor"):
        odeint(field, STARTS, t[:2], event_fn=lambda t, y: 1.0)


def test_times_states_and_results_are_checked() -> None:
    for bad in ([0.0, 1.0], torch.tensor([0, 1]), torch.tensor(0.0), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(TypeError, match=r"t is .*; expected a floating-point tensor"):
            odeint(field, STARTS, bad)  # type: ignore[arg-type]
    for values in ([0.0, 0.0], [0.0, 1.0, 0.5], [0.0, math.nan]):
        with pytest.raises(ValueError, match="expected strictly increasing or decreasing times"):
            odeint(field, STARTS, torch.tensor(values))
    for state in (torch.tensor([1, 2]), [STARTS], ()):
        with pytest.raises(TypeError, match="y0 is or holds"):
            odeint(field, state, FORWARD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned \[\(3, 1\)\]; expected the shapes of y0, \[\(3, 2\)\]"):
        odeint(lambda t, y: y[:, :1], STARTS, FORWARD)
    with pytest.raises(ValueError, match=r"returned \['float'\]"):
        odeint(lambda t, y: 0.0, STARTS, FORWARD)
    with pytest.raises(ValueError, match=r"returned \[\(3, 2\), \(2,\)\]; expected the shapes of y0"):
        odeint(lambda t, y: y[:2], TUPLE, FORWARD)


def test_torchdiffeq_need_not_be_installed() -> None:
    code = (
        "import sys; sys.modules['torchdiffeq'] = None; import torch;"
        "from flowsolve.compat.torchdiffeq import odeint, odeint_adjoint;"
        "print(odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0., 1.]))[-1].item())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(out) == pytest.approx(math.exp(-1.0), rel=1e-6)
