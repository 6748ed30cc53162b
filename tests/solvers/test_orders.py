"""The measured order of every fixed-grid ODE solver, on every path and in every chart.

**Truth.** In the straight chart every Gaussian path is y = (1−s) ε + s z, so one field serves all of them. It is
written here in numpy from Bayes' rule, apart from the package, and solved by scipy's DOP853 at rtol 3e-14.

**Problem.** A mixture of three overlapping components in the plane (distances of 2 at spreads of 0.7 to 1): its field
is smooth, so that the asymptotic regime begins at few steps. Errors are root mean squares over 8 trajectories and 2
coordinates, relative to the scale α+σ at the end.

**Regime.** For each solver the step counts below are one range, the same for all paths; in the data and noise charts,
whose clocks run exponentially in λ, it is half as large again. The order is the least-squares slope of log error over
log steps, and is accepted only where the largest error is below 0.1 and the smallest above 3e-14, the rounding of
float64 here. Dopri5 needs the most steps: with fewer the error falls faster than its order, because the leading term
is small (slopes of 5.5 to 6.5 between 8 and 32 steps, which is not the regime that an order speaks of). For Tsit5 and
Dopri8 the regime begins where float64 ends (errors of 1e-13): until then their errors fall faster, and only a loss of
order would show here. That they have no more than their order is in the order conditions (`test_tableaus`) and in the
plain ODE below.

**Intervals.**

* `inner`: at uniform flow times, log-SNR from −1.5 to 1.5, where the trajectories part (σ/α from 4.5 to 0.22). It
  leaves out the ends because there α or σ vanishes, or λ' or σ̇ is infinite or nearly so (VP has σ ∝ √τ at the data):
  a uniform grid of flow times is no smooth grid in the clock there. In the noise and data charts, which are infinite at
  an end, log-SNR from −1 to 1 at equal steps of it.
* `whole`: from t = 0 to 1 (a discrete table to its last entry), in the straight and trig charts, which are finite at
  both ends. Nodes are uniform in the straight clock s, so that the step sizes are smooth for every path.

`Discrete` is piecewise smooth in t: its native chart has a kink at every entry of the table and is left out, and its
grids are uniform in s or λ, in which it is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

import flowsolve as fs
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP, Trig
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import (
    DDIM,
    RK4,
    Bosh3,
    Dopri5,
    Dopri8,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Ralston,
    Solver,
    Tsit5,
)  # fmt: skip

Array = NDArray[np.float64]

MEANS = [[-1.0, 0.5], [1.0, 1.0], [0.3, -1.0]]
STD = [0.7, 1.0, 0.8]
WEIGHTS = [0.5, 0.3, 0.2]

CORE = [CondOT(), VP(), VE()]
MORE = [CondOT(sigma_min=0.05), SubVP(), EDM(), Cosine(), Trig(), Discrete.linear()]
CHARTS = ["straight", "data", "noise", "trig", "native"]

ORDERS: list[tuple[Solver, int, Sequence[int]]] = [  # solver, order, steps
    (Euler(), 1, (64, 96, 144)),
    (Midpoint(), 2, (24, 48, 72)),
    (Heun(), 2, (24, 48, 72)),
    (Ralston(), 2, (24, 48, 72)),
    (Bosh3(adaptive=False), 3, (24, 48, 72)),
    (RK4(), 4, (12, 24, 48)),
    (Dopri5(adaptive=False), 5, (32, 48, 64)),
    (Tsit5(adaptive=False), 5, (24, 32, 48)),
    (Dopri8(adaptive=False), 8, (4, 6, 8, 12)),
]
EARLY = (Tsit5, Dopri8)
solver_cases = pytest.mark.parametrize(("solver", "order", "steps"), ORDERS, ids=[type(s).__name__ for s, *_ in ORDERS])


def mixture() -> GaussianMixture:
    means, std, weights = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STD, WEIGHTS))
    return GaussianMixture(means, std, weights)


def rectified(s: float, y: Array) -> Array:
    """E[z − ε | (1−s) ε + s z = y] for y of shape (B, 2)."""
    variance = s**2 * np.array(STD) ** 2 + (1.0 - s) ** 2
    off = y[:, None, :] - s * np.array(MEANS)
    exponent = np.log(WEIGHTS) - np.log(variance) - 0.5 * (off**2).sum(2) / variance
    share = np.exp(exponent - exponent.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    gain = (s * np.array(STD) ** 2 - (1.0 - s)) / variance  # Cov(z − ε, x) / Var(x) of each component
    return (share[:, :, None] * (np.array(MEANS) + gain[:, None] * off)).sum(1)


def exact(x: Tensor, path: Path, start: float, end: float) -> Tensor:
    """The state at `end` by DOP853."""
    (a0, b0), (a1, b1) = path.at(start)[:2], path.at(end)[:2]
    solution = solve_ivp(
        lambda s, y: rectified(s, y.reshape(x.shape)).ravel(),
        (a0 / (a0 + b0), a1 / (a1 + b1)),
        (x / (a0 + b0)).numpy().ravel(),
        method="DOP853", rtol=3e-14, atol=1e-14,
    )  # fmt: skip
    assert solution.success
    return torch.from_numpy(solution.y[:, -1].reshape(x.shape)) * (a1 + b1)


@cache
def case(path: Path, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Eight states of the marginal at `start`, and where they go."""
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    x = path.interpolate(mixture().sample(8, seed=3), noise, start)
    return x, exact(x, path, start, end)


def clocked(path: Path, start: float, end: float, steps: int) -> list[float]:
    """Flow times that are uniform in the straight clock."""
    s0, s1 = (p.alpha / (p.alpha + p.sigma) for p in (path.at(start), path.at(end)))
    inner = (s0 + (s1 - s0) * i / steps for i in range(1, steps))
    return [start, *(path.time(math.log(s / (1.0 - s))) for s in inner), end]


def measure(
    path: Path, solver: Solver, steps: Sequence[int], start: float, end: float, chart: str | None, grid: str
) -> tuple[float, list[float]]:
    """The fitted order and the errors."""
    flow, (x, truth) = mixture().flow(path), case(path, start, end)
    scale = path.alpha(end) + path.sigma(end)
    errors = []
    for n in steps:
        times: dict[str, Any] = {"nfe": n * solver.evaluations, "grid": grid}
        if grid == "straight clock":
            times = {"grid": clocked(path, start, end, n)}
        out = fs.sample(flow, start=x, interval=(start, end), solver=solver, chart=chart, **times)
        assert out.nfe.tolist() == [n * solver.evaluations] * len(x)
        errors.append(float((out.x - truth).square().mean().sqrt() / scale))
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0]), errors


def check(path: Path, solver: Solver, order: int, steps: Sequence[int], where: str, chart: str | None) -> None:
    start, end, grid = 0.0, path.window[1], "straight clock"
    if where == "inner" and chart in ("data", "noise"):
        start, end, grid = path.time(-1.0), path.time(1.0), "log_snr"
        steps = [n * 3 // 2 for n in steps]
    elif where == "inner":
        start, end = path.time(-1.5), path.time(1.5)
        grid = "straight clock" if isinstance(path, Discrete) else "uniform"
    slope, errors = measure(path, solver, steps, start, end, chart, grid)
    print(f"ORDER {type(solver).__name__:14} {path!r:28.28} {where:5} {chart or '-':8} {slope:6.3f} {errors}")
    assert errors[0] < 0.1, errors
    assert errors[-1] > 3e-14, errors
    assert slope >= order - 0.2, (slope, errors)
    if type(solver) not in EARLY:
        assert slope <= order + 0.2, (slope, errors)


@pytest.mark.parametrize(
    ("path", "chart"),
    [(CondOT(), "straight"), (VP(), "straight"), (VE(), "trig"), (Discrete.linear(), "trig")],
)
def test_dopri5_and_dop853_agree(path: Path, chart: str) -> None:
    """Two methods, two codes and two charts at tolerances of 1e-12 and 3e-14: the reference is converged."""
    start, end = 0.0, path.window[1]
    x, truth = case(path, start, end)
    out = fs.sample(
        mixture().flow(path), start=x, interval=(start, end), solver=Dopri5(rtol=1e-12, atol=1e-12), chart=chart
    )
    torch.testing.assert_close(out.x, truth, rtol=1e-11, atol=1e-11)


@solver_cases
@pytest.mark.parametrize("path", CORE, ids=repr)
@pytest.mark.parametrize("chart", CHARTS)
def test_order_in_every_chart(path: Path, chart: str, solver: Solver, order: int, steps: Sequence[int]) -> None:
    check(path, solver, order, steps, "inner", chart)


@solver_cases
@pytest.mark.parametrize("path", MORE, ids=repr)
def test_order_on_the_other_paths(path: Path, solver: Solver, order: int, steps: Sequence[int]) -> None:
    check(path, solver, order, steps, "inner", None)


@pytest.mark.slow
@solver_cases
@pytest.mark.parametrize("path", MORE, ids=repr)
@pytest.mark.parametrize("chart", CHARTS[1:])
def test_order_on_the_other_paths_in_every_chart(
    path: Path, chart: str, solver: Solver, order: int, steps: Sequence[int]
) -> None:
    if chart == "native" and isinstance(path, Discrete):
        pytest.skip("a table's path has a kink in t at every entry")
    check(path, solver, order, steps, "inner", chart)


@solver_cases
@pytest.mark.parametrize("path", [CondOT(), Discrete.linear()], ids=repr)
@pytest.mark.parametrize("chart", ["straight", "trig"])
def test_order_from_pure_noise_to_pure_data(
    path: Path, chart: str, solver: Solver, order: int, steps: Sequence[int]
) -> None:
    check(path, solver, order, steps, "whole", chart)


@pytest.mark.slow
@solver_cases
@pytest.mark.parametrize("path", [*CORE[1:], *MORE[:-1]], ids=repr)
@pytest.mark.parametrize("chart", ["straight", "trig"])
def test_order_from_pure_noise_to_pure_data_on_the_other_paths(
    path: Path, chart: str, solver: Solver, order: int, steps: Sequence[int]
) -> None:
    check(path, solver, order, steps, "whole", chart)


@pytest.mark.parametrize("where", ["inner", "whole"])
@pytest.mark.parametrize("path", [*CORE, *MORE], ids=repr)
def test_ddim_has_order_one(path: Path, where: str) -> None:
    check(path, DDIM(), 1, (64, 96, 144), where, None)


@pytest.mark.parametrize("path", CORE, ids=repr)
def test_euler_maruyama_without_noise_is_euler_in_flow_time(path: Path) -> None:
    check(path, EulerMaruyama(eta=0.0), 1, (64, 96, 144), "inner", None)
    start, end = path.time(-1.5), path.time(1.5)
    x, _ = case(path, start, end)
    flow, common = mixture().flow(path), {"start": x, "interval": (start, end), "nfe": 20}
    a = fs.sample(flow, solver=EulerMaruyama(eta=0.0), **common).x
    b = fs.sample(flow, solver=Euler(), chart="native", **common).x
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chart", ["straight", "data", "noise"])
@pytest.mark.parametrize("path", [*CORE, *MORE], ids=repr)
def test_euler_is_ddim_in_the_charts_with_constant_coefficients(path: Path, chart: str) -> None:
    start, end = (0.0, 1.0) if chart == "straight" else (path.time(-3.0), path.time(3.0))
    x, _ = case(path, start, min(end, path.window[1]))
    flow, common = mixture().flow(path), {"start": x, "interval": (start, end), "nfe": 11}
    a = fs.sample(flow, solver=DDIM(), **common).x
    b = fs.sample(flow, solver=Euler(), chart=chart, **common).x
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_euler_is_not_ddim_in_the_native_chart_of_vp() -> None:
    path = VP()
    start, end = path.time(-1.5), path.time(1.5)
    x, _ = case(path, start, end)
    flow, common = mixture().flow(path), {"start": x, "interval": (start, end), "nfe": 11}
    a = fs.sample(flow, solver=DDIM(), **common).x
    b = fs.sample(flow, solver=Euler(), chart="native", **common).x
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("chart", CHARTS)
def test_every_chart_and_prediction_solves_the_same_flow(chart: str) -> None:
    path = VP()
    start, end = path.time(-1.5), path.time(1.5)
    x, truth = case(path, start, end)
    for prediction in ("velocity", "noise", "score", "data", "v"):
        flow = mixture().flow(path, prediction)
        out = fs.sample(flow, start=x, interval=(start, end), solver=RK4(), nfe=400, chart=chart)
        torch.testing.assert_close(out.x, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [(s, p, [n * 4 for n in steps]) for s, p, steps in ORDERS if type(s) not in EARLY],
    ids=[type(s).__name__ for s, *_ in ORDERS if type(s) not in EARLY],
)
def test_order_on_a_plain_ode(solver: Solver, order: int, steps: Sequence[int]) -> None:
    """The nonautonomous, nonlinear y' = −2 t y², y(0) = 1, with y = 1/(1 + t²), in both directions of time."""
    y0 = torch.tensor([[1.0, 0.5], [0.25, 2.0]], dtype=torch.float64)
    for t1 in (1.5, -1.5):
        truth = 1.0 / (1.0 / y0 + t1**2)
        errors = []
        for n in steps:
            sol = fs.solve(lambda t, y: -2 * t * y * y, y0, 0.0, t1, solver=solver, nfe=n * solver.evaluations)
            errors.append(float((sol.x - truth).abs().max()))
        assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2)


def test_tsit5_s_order_on_a_plain_ode() -> None:
    """y' = 3 cos(3t) y, y = y₀ exp(sin 3t)."""
    fixed, y0 = Tsit5(adaptive=False), torch.tensor([[1.0, 0.5], [0.25, 2.0]], dtype=torch.float64)
    for t1 in (2.0, -2.0):
        truth, errors, steps = y0 * math.exp(math.sin(3.0 * t1)), [], (48, 64, 96)
        for n in steps:
            sol = fs.solve(lambda t, y: 3.0 * torch.cos(3.0 * t) * y, y0, 0.0, t1, solver=fixed, nfe=6 * n)
            errors.append(float((sol.x - truth).abs().max()))
        assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(5.0, abs=0.2), errors


def test_dopri8_s_order_on_a_plain_ode() -> None:
    """y' = (5 + 2t) K y with K skew turns y by 5t + t²."""
    fixed, y0 = Dopri8(adaptive=False), torch.tensor([[1.0, 0.5], [0.25, 2.0]], dtype=torch.float64)
    k = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for t1 in (2.0, -2.0):
        angle = 5.0 * t1 + t1**2
        c, s = math.cos(angle), math.sin(angle)
        truth, errors, steps = y0 @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64), [], (16, 24, 32)
        for n in steps:
            sol = fs.solve(lambda t, y: (5.0 + 2.0 * t) * y @ k, y0, 0.0, t1, solver=fixed, nfe=12 * n)
            errors.append(float((sol.x - truth).abs().max()))
        assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(8.0, abs=0.2), errors


@pytest.mark.parametrize(
    ("solver", "steps"),
    [
        (Euler(), (64, 96, 144)), (Heun(), (32, 48, 72)), (Ralston(), (32, 48, 72)), (RK4(), (24, 36, 54)),
        (Bosh3(adaptive=False), (24, 36, 54)), (Dopri5(adaptive=False), (64, 96, 144)),
        (Tsit5(adaptive=False), (64, 96, 144)), (Dopri8(adaptive=False), (16, 24, 32)),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_dense_output_has_the_order_of_the_interpolant(solver: Any, steps: Sequence[int]) -> None:
    """Between the nodes errors fall like h^(q+1), with q the interpolant's order, or like the steps' own h^p."""
    y0 = torch.tensor([[1.0, 0.5], [0.25, 2.0]], dtype=torch.float64)
    times = np.linspace(0.01, 2.0, 97)
    errors = []
    for n in steps:
        sol = fs.solve(
            lambda t, y: 3.0 * torch.cos(3.0 * t) * y, y0, 0.0, 2.0, solver=solver, nfe=n * solver.evaluations,
            t_eval=times.tolist(),
        )  # fmt: skip
        truth = y0 * torch.from_numpy(np.exp(np.sin(3.0 * times)))[:, None, None]
        errors.append(float((sol.x - truth).abs().max()))
    rate = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"DENSE {type(solver).__name__} {rate:.2f} {errors}")
    assert rate >= min(solver.tableau.order, solver.tableau.dense_order + 1) - 0.25, errors
