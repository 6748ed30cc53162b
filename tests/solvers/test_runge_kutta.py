"""Fixed grids: what a budget buys, exactness on polynomials, encoding and back, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.charts import CHARTS
from flowsolve.paths import VE, VP, CondOT, Cosine, Discrete, Path
from flowsolve.planning import plan
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import DDIM, DDPM, RK4, Dopri5, Euler, EulerMaruyama, ExactSDE, Heun, Midpoint, Solver

FIXED: list[Any] = [Euler(), Midpoint(), Heun(), RK4(), Dopri5(adaptive=False)]
EVERY: list[Any] = [*FIXED, DDIM(), DDIM(eta=0.5), DDPM(), ExactSDE(0.7), EulerMaruyama(0.0)]


def name(v: Any) -> str:
    return repr(v) if not isinstance(v, Dopri5) else f"Dopri5(adaptive={v.adaptive})"


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.3, -1.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.7, 1.0, 0.8], dtype=torch.float64))


def normal(n: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counting(path: Path) -> tuple[fs.Flow, list[float]]:
    """The mixture's flow, and the times it was asked at."""
    exact, times = mixture().flow(path), []

    def net(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return exact.net(x, t)

    return fs.Flow(net, path), times


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", EVERY, ids=name)
def test_a_schedule_spends_the_budget_exactly(solver: Solver) -> None:
    for nfe in range(1, 41):
        counts = solver.schedule(nfe)
        assert sum(counts) == nfe
        assert min(counts) >= 1
        full = counts.count(solver.evaluations)
        assert counts[len(counts) - full :] == [solver.evaluations] * full  # the shorter steps come first
        assert len(counts) - full <= 3
        if nfe % solver.evaluations == 0:
            assert counts == [solver.evaluations] * (nfe // solver.evaluations)


@pytest.mark.parametrize("solver", EVERY, ids=name)
@pytest.mark.parametrize("path", [CondOT(), Discrete.linear()], ids=["CondOT", "Discrete"])
def test_nfe_is_the_number_of_network_calls(path: Path, solver: Solver) -> None:
    flow, times = counting(path)
    for nfe in range(1, 41):
        times.clear()
        closing = isinstance(path, Discrete) and solver.evaluations > 1
        if closing and nfe == 1:  # one evaluation for the closing step leaves none to get there
            with pytest.raises(ValueError, match="at least 2"):
                fs.sample(flow, start=normal(), solver=solver, nfe=nfe)
            assert times == []
            continue
        sol = fs.sample(flow, start=normal(), solver=solver, nfe=nfe, seed=1)
        assert len(times) == nfe
        assert sol.nfe.tolist() == [nfe] * 3
        assert sol.ok.all()
        assert (sol.t == 1.0).all()


@pytest.mark.parametrize("grid", ["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("solver", EVERY, ids=name)
def test_twenty_means_twenty(solver: Solver, grid: str) -> None:
    for path in (CondOT(), VP(), VE(), Cosine(), Discrete.linear()):
        flow, times = counting(path)
        sol = fs.sample(flow, start=normal() * path.prior_std, solver=solver, nfe=20, grid=grid)
        assert len(times) == 20
        assert sol.nfe.tolist() == [20, 20, 20]


@pytest.mark.parametrize("grid", ["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("solver", [Euler(), DDIM(), DDPM(), Heun(), RK4()], ids=name)
@pytest.mark.parametrize("nfe", [10, 40])
def test_a_table_s_network_is_asked_only_at_times_of_its_window(solver: Solver, grid: str, nfe: int) -> None:
    """`Path.window`: beyond the last entry the network has never been; the step uses the estimate at the edge."""
    path = Discrete.linear()
    flow, times = counting(path)
    fs.sample(flow, start=normal(), solver=solver, nfe=nfe, grid=grid)
    assert max(times) <= path.window[1] + 1e-6


def test_a_table_s_network_is_asked_only_within_its_window_by_more_steps_than_entries() -> None:
    path = Discrete.linear(50, beta_end=0.3)
    flow, times = counting(path)
    fs.sample(flow, start=normal(), solver=DDIM(), nfe=75)
    assert max(times) <= path.window[1] + 1e-6


def test_a_guided_evaluation_counts_twice() -> None:
    exact = mixture().flow(CondOT())
    flow = fs.Flow(exact.net, CondOT(), nfe_per_call=2)
    sol = fs.sample(flow, start=normal(), solver=Heun(), nfe=20)
    assert sol.nfe.tolist() == [20, 20, 20]
    assert int(sol.accepted[0]) == 5
    with pytest.raises(ValueError, match="multiple of the 2"):
        fs.sample(flow, start=normal(), solver=Heun(), nfe=21)


def test_shorter_first_steps_keep_their_own_order() -> None:
    """n evaluations left over are a step of a method of order n: on y' = y, its polynomial."""
    for nfe, order in ((1, 1), (2, 2), (3, 3), (4, 4)):
        sol = fs.solve(
            lambda t, y: y, torch.ones(1, 1, dtype=torch.float64), 0.0, 0.5, solver=Dopri5(adaptive=False), nfe=nfe
        )
        assert float(sol.x) == pytest.approx(sum(0.5**k / math.factorial(k) for k in range(order + 1)), rel=1e-14)
    assert Dopri5(adaptive=False).schedule(20) == [4, 4, 6, 6]
    assert RK4().schedule(11) == [3, 4, 4]


@pytest.mark.parametrize("rest", [0, 1, 2, 3])
def test_a_budget_that_is_no_multiple_keeps_the_order(rest: int) -> None:
    """RK4 with 48 + rest and 96 + rest evaluations: the error still falls at order 4."""
    solver, y0 = RK4(), torch.ones(1, 1, dtype=torch.float64)

    def error(nfe: int) -> float:
        return abs(float(fs.solve(lambda t, y: -y, y0, 0.0, 2.0, solver=solver, nfe=nfe).x) - math.exp(-2.0))

    few, many = 48 + rest, 96 + rest
    assert math.log(error(few) / error(many)) / math.log(many / few) == pytest.approx(4.0, abs=0.2)


def test_nodes_are_where_they_are_said_to_be() -> None:
    flow, times = counting(CondOT())
    fs.sample(flow, start=normal(), solver=Euler(), nfe=10)
    assert times == pytest.approx([i / 10 for i in range(10)], abs=1e-15)
    times.clear()
    fs.sample(flow, start=normal(), solver=Heun(), nfe=4)
    assert times == pytest.approx([0.0, 0.5, 0.5, 1.0], abs=1e-15)
    times.clear()
    fs.sample(flow, start=normal(), solver=RK4(), grid=[0.0, 0.2, 1.0])
    assert times == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2, 0.6, 0.6, 1.0], abs=1e-15)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "degree"), list(zip(FIXED, (0, 1, 1, 3, 4), strict=True)), ids=[name(s) for s in FIXED]
)
def test_polynomials_in_time_are_integrated_exactly(solver: Solver, degree: int) -> None:
    """The rule of order p integrates degree p − 1 exactly (Simpson's, in RK4, degree 3), and not one more."""
    y0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    rate = torch.tensor([1.0, 0.3], dtype=torch.float64)
    for d in range(degree + 2):
        sol = fs.solve(lambda t, y, d=d: rate * t**d + 0 * y, y0, -0.5, 2.0, solver=solver, nfe=3 * solver.evaluations)
        truth = y0 + rate * (2.0 ** (d + 1) - (-0.5) ** (d + 1)) / (d + 1)
        error = float((sol.x - truth).abs().max())
        assert error < 1e-13 if d <= degree else error > 1e-6, (d, error)


@pytest.mark.parametrize("solver", FIXED, ids=name)
def test_one_step_of_a_linear_field_is_the_stability_polynomial(solver: Any) -> None:
    for z in (-2.0, 0.5, 1.0):
        one = torch.ones(1, 1, dtype=torch.float64)
        sol = fs.solve(lambda t, y, z=z: z * y, one, 0, 1, solver=solver, nfe=solver.evaluations)
        order = solver.tableau.order
        polynomial = sum(z**k / math.factorial(k) for k in range(order + 1)) + (z**6 / 600 if order == 5 else 0.0)
        assert float(sol.x) == pytest.approx(polynomial, rel=1e-13)


@pytest.mark.parametrize("solver", FIXED, ids=name)
@pytest.mark.parametrize("path", [CondOT(), VP(), VE(), Discrete.linear()], ids=lambda p: type(p).__name__)
def test_one_data_point_is_reached_exactly_by_any_budget(path: Path, solver: Solver) -> None:
    """With z known, straight trajectories: from pure noise to the data in one step, whatever the method."""
    point = torch.tensor([0.7, -1.2], dtype=torch.float64)
    flow = fs.Flow(lambda x, t: point.expand_as(x), path, prediction="data")
    start = normal() * path.prior_std
    for nfe in (2, 3, 7):
        if path.sigma(1.0) == 0.0 and solver.evaluations > 1 and not isinstance(path, Discrete):
            continue  # asks at σ = 0, refused below
        sol = fs.sample(flow, start=start, solver=solver, nfe=nfe, grid="uniform")
        (a0, s0), (a1, s1) = path.at(0.0)[:2], path.at(1.0)[:2]
        truth = a1 * point + s1 * (start - a0 * point) / s0
        torch.testing.assert_close(sol.x, truth, rtol=1e-11, atol=1e-11)


def test_float32_in_float32_out_and_half_is_raised() -> None:
    flow = mixture().flow(CondOT())
    assert fs.sample(flow, start=normal().float(), solver=Heun(), nfe=4).x.dtype == torch.float32
    assert fs.sample(flow, start=normal().bfloat16(), solver=Heun(), nfe=4).x.dtype == torch.float32
    assert fs.sample(flow, start=normal(), solver=Heun(), nfe=4).x.dtype == torch.float64
    assert fs.sample(flow, (3, 2), solver=Heun(), nfe=4).x.dtype == torch.float32


@pytest.mark.parametrize("solver", EVERY, ids=name)
def test_an_empty_batch(solver: Solver) -> None:
    sol = fs.sample(mixture().flow(CondOT()), (0, 2), solver=solver, nfe=12)
    assert sol.x.shape == (0, 2)
    assert sol.nfe.shape == (0,)


@pytest.mark.parametrize("solver", [DDIM(), DDPM(), ExactSDE(0.5), Heun(), Dopri5()], ids=name)
def test_a_sample_is_the_same_in_any_batch(solver: Solver) -> None:
    flow, nfe = mixture().flow(CondOT()), None if isinstance(solver, Dopri5) else 12
    whole = fs.sample(flow, (6, 2), solver=solver, nfe=nfe, seed=9, dtype=torch.float64)
    part = fs.sample(flow, (2, 2), solver=solver, nfe=nfe, seed=9, samples=[4, 1], dtype=torch.float64)
    torch.testing.assert_close(part.x, whole.x[[4, 1]], rtol=1e-12, atol=1e-12)


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CondOT(), VP(), Discrete.linear()], ids=lambda p: type(p).__name__)
def test_encode_inverts_sample_at_a_tight_tolerance(path: Path) -> None:
    flow, end = mixture().flow(path), path.window[1]
    solver = Dopri5(rtol=1e-10, atol=1e-10)
    data = fs.sample(flow, start=normal(5), solver=solver, interval=(0.0, end)).x
    back = fs.encode(flow, data, solver=solver)
    torch.testing.assert_close(back.x, normal(5), rtol=1e-7, atol=1e-7)
    assert (back.t == 0.0).all()
    again = fs.sample(flow, start=back.x, solver=solver, interval=(0.0, end)).x
    torch.testing.assert_close(again, data, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", [CondOT(), VP(), Discrete.linear()], ids=lambda p: type(p).__name__)
def test_encode_inverts_sample_at_order_four(path: Path) -> None:
    """RK4 there and back on the same grid, uniform in the straight clock: the errors of both ways, of order 4."""
    flow, end = mixture().flow(path), path.window[1]
    clock = [p.alpha / (p.alpha + p.sigma) for p in (path.at(0.0), path.at(end))]
    errors, steps = [], [12, 24, 48]
    for n in steps:
        inner = [clock[0] + (clock[1] - clock[0]) * i / n for i in range(1, n)]
        grid = [0.0, *(path.time(math.log(s / (1 - s))) for s in inner), end]
        data = fs.sample(flow, start=normal(5), solver=RK4(), interval=(0.0, end), grid=grid).x
        back = fs.encode(flow, data, solver=RK4(), grid=grid[::-1])
        assert int(back.nfe[0]) == 4 * n
        errors.append(float((back.x - normal(5)).square().mean().sqrt()))
    # There and back cancels part of the error: the order is at least that of the method.
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] > 3.8, errors
    assert errors[-1] < 1e-5


def test_encoding_is_gaussian_for_gaussian_data() -> None:
    """One Gaussian N(m, s²): the flow is affine, and encoding data x gives (x − m)/s at CondOT's noise end."""
    problem = GaussianMixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    x = problem.sample(6, seed=1)
    out = fs.encode(problem.flow(CondOT()), x, solver=Dopri5(rtol=1e-10, atol=1e-10)).x
    torch.testing.assert_close(out, (x - problem.means[0]) / 0.5, rtol=1e-7, atol=1e-7)


def test_ddim_encodes_to_its_order() -> None:
    flow = mixture().flow(CondOT())
    errors = []
    for n in (100, 200):
        data = fs.sample(flow, start=normal(), solver=DDIM(), nfe=n).x
        errors.append(float((fs.encode(flow, data, solver=DDIM(), nfe=n).x - normal()).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.3)


# --- refusals --------------------------------------------------------------------------------------------------------


def flow(path: Path | None = None, prediction: str = "velocity") -> fs.Flow:
    exact = mixture().flow(path or CondOT(), prediction)

    def net(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the network was asked before the arguments were checked")

    return fs.Flow(net, exact.path, prediction)


def refuse(error: type[Exception], match: str, **options: Any) -> None:
    options = {"solver": Heun(), "nfe": 10, "start": normal(), **options}
    given = options.pop("flow", None) or flow()
    with pytest.raises(error, match=match):
        fs.sample(given, **options)


def test_singular_nodes_are_refused_before_the_first_evaluation() -> None:
    refuse(ValueError, r"α = 0.*start after", flow=flow(CondOT(), "noise"), solver=Euler())
    refuse(ValueError, r"α = 0.*start after", flow=flow(CondOT(), "score"), solver=DDIM())
    refuse(ValueError, r"α = 0", flow=flow(CondOT(), "noise"), solver=Dopri5(), nfe=None)
    refuse(ValueError, r"σ = 0.*end before", flow=flow(CondOT(), "data"), solver=Heun())
    refuse(ValueError, r"σ = 0", flow=flow(CondOT(), "data"), solver=RK4(), nfe=12)
    refuse(ValueError, r"σ = 0", flow=flow(CondOT(), "data"), solver=Dopri5(), nfe=None)
    for solver in (Euler(), DDIM(), DDPM()):  # these do not ask at the data end
        exact = mixture().flow(CondOT(), "data")
        assert bool(fs.sample(exact, start=normal(), solver=solver, nfe=10).x.isfinite().all())


def test_euler_maruyama_has_no_step_from_a_singular_end() -> None:
    refuse(ValueError, "ExactSDE", solver=EulerMaruyama())
    refuse(ValueError, "ExactSDE", flow=flow(Cosine()), solver=EulerMaruyama(eta=0.3))
    exact = mixture().flow(CondOT())
    assert bool(fs.sample(exact, start=normal(), solver=EulerMaruyama(eta=0.0), nfe=10).x.isfinite().all())
    sol = fs.sample(exact, start=normal(), solver=EulerMaruyama(), nfe=50, interval=(0.05, 1.0))
    assert bool(sol.x.isfinite().all())


def test_charts_are_refused_where_they_end_and_by_solvers_that_have_none() -> None:
    for solver in (DDIM(), DDPM(), ExactSDE(), EulerMaruyama(0.0)):
        refuse(TypeError, "no chart", solver=solver, chart="straight")
    refuse(ValueError, "chart 'noise' is infinite at t = 0", chart="noise")
    refuse(ValueError, "chart 'data' is infinite at t = 1", chart="data")
    refuse(ValueError, "chart 'data' is infinite", chart="data", solver=Dopri5(), nfe=None)
    refuse(ValueError, "not known", chart="polar")
    assert set(CHARTS) == {"straight", "data", "noise", "trig", "native"}


@pytest.mark.parametrize("solver", [DDPM(), DDIM(eta=0.1), ExactSDE(), EulerMaruyama()], ids=name)
def test_noise_cannot_be_retraced(solver: Solver) -> None:
    with pytest.raises(ValueError, match="draws noise"):
        fs.encode(flow(), normal(), solver=solver, nfe=10)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(eta=0.5), ExactSDE(), EulerMaruyama()], ids=name)
def test_noise_cannot_be_drawn_backwards_by_sample_either(solver: Solver) -> None:
    """From data to noise e^(−2h) > 1: there is no such step, and to return numbers for it would be silent nonsense."""
    with pytest.raises(ValueError, match="noise"):
        fs.sample(mixture().flow(CondOT()), start=normal(), interval=(0.9, 0.1), solver=solver, nfe=10)


def test_solvers_are_instances_and_know_their_options() -> None:
    refuse(TypeError, r"class Heun.*Heun\(\)", solver=Heun)
    refuse(TypeError, "expected a solver", solver=2)
    with pytest.raises(TypeError, match=r"class Dopri5"):
        fs.solve(lambda t, y: y, normal(), 0, 1, solver=Dopri5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="flows only"):
        fs.solve(lambda t, y: y, normal(), 0, 1, solver=DDIM(), nfe=10)
    for make in (
        lambda: Heun(order=2),
        lambda: Dopri5(tol=1e-3),
        lambda: DDIM(nu=1.0),
        lambda: EulerMaruyama(chart="x"),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            make()  # type: ignore[no-untyped-call]
    for solver in EVERY:
        assert dataclasses.is_dataclass(solver)
        assert solver == dataclasses.replace(solver)
        assert hash(solver) == hash(dataclasses.replace(solver))
        for field in dataclasses.fields(solver):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(solver, field.name, None)


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("make", [DDIM, ExactSDE, EulerMaruyama])
def test_eta_is_a_number_that_makes_sense(make: Callable[..., Any], eta: float) -> None:
    with pytest.raises(ValueError, match="eta"):
        make(eta=eta)
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta=1.01)


@pytest.mark.parametrize("nfe", [0, -3, 2.5, True, "10"])
def test_budgets_that_are_not_counts(nfe: Any) -> None:
    for solver in (Heun(), DDIM(), Dopri5()):
        refuse(ValueError, "nfe", solver=solver, nfe=nfe)


@pytest.mark.parametrize("nfe", [0, -3, 2.5, True])
@pytest.mark.parametrize("solver", [Heun(), Dopri5()], ids=name)
def test_budgets_that_are_not_counts_for_a_plain_ode(nfe: Any, solver: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="nfe"):
        fs.solve(lambda t, y: -y, normal(), 0.0, 1.0, solver=solver, nfe=nfe)


def test_grids_and_budgets_that_contradict_each_other() -> None:
    refuse(ValueError, "give nfe", nfe=None)
    refuse(ValueError, "spends 4 on the 2 steps", grid=[0.0, 0.5, 1.0], nfe=10)
    refuse(ValueError, "increasing", grid=[0.0, 0.6, 0.5, 1.0], nfe=None)
    refuse(ValueError, "at least 2|interval", grid=[0.0], nfe=None)
    refuse(ValueError, "at least 2|interval", grid=[], nfe=None)
    refuse(ValueError, r"\[0, 1\]|interval", grid=[0.0, 1.5], nfe=None)
    refuse(ValueError, "not known", grid="cosine")
    exact = mixture().flow(CondOT())
    assert fs.sample(exact, start=normal(), solver=Heun(), grid=[0.0, 0.5, 1.0], nfe=4).nfe.tolist() == [4, 4, 4]


def test_explicit_times_start_and_end_where_the_interval_does() -> None:
    """A start at t = 0 is not a state at t = 0.3: times that begin or end elsewhere contradict the interval."""
    exact = mixture().flow(CondOT())
    for grid in ([0.3, 0.6, 1.0], [0.0, 0.5, 0.9]):
        with pytest.raises(ValueError, match="interval"):
            fs.sample(exact, start=normal(), interval=(0.0, 1.0), solver=Heun(), grid=grid)


def test_intervals_and_starts_that_make_no_sense() -> None:
    for interval in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.0, math.nan)):
        refuse(ValueError, "interval", interval=interval)
    refuse(ValueError, "give one of shape", start=None)
    refuse(ValueError, "give one of shape", shape=(3, 2))
    refuse(ValueError, "give start= a state at that time", start=None, shape=(3, 2), interval=(0.5, 1.0))
    refuse(TypeError, "floating-point", start=torch.zeros(3, 2, dtype=torch.int64))
    refuse(ValueError, "samples lists 2", samples=[0, 1])


def test_an_interval_that_begins_at_the_edge_of_the_window() -> None:
    """From the last entry of a table to the data is the closing step and nothing else."""
    path = Discrete.linear()
    exact, x = mixture().flow(path), normal()
    truth = exact.estimate(x, path.window[1]).data
    for solver in (DDIM(), Euler(), Heun(), Dopri5()):
        nfe = None if isinstance(solver, Dopri5) else 1
        sol = fs.sample(exact, start=x, interval=(path.window[1], 1.0), solver=solver, nfe=nfe)
        torch.testing.assert_close(sol.x, truth, rtol=1e-12, atol=1e-12)
        assert sol.nfe.tolist() == [1, 1, 1]


def test_a_plan_is_made_before_anything_is_computed() -> None:
    grid = plan(RK4(), flow(), (0.0, 1.0), "uniform", 11)
    assert grid.times == (0.0, 3 / 11, 7 / 11, 1.0)
    assert grid.evaluations == (3, 4, 4)
    grid = plan(Heun(), flow(Discrete.linear()), (0.0, 1.0), "uniform", 5)
    assert grid.times[-2:] == (0.999, 1.0)
    assert grid.evaluations == (2, 2, 1)
