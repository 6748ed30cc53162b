"""Charts: dy/ds against finite differences, and the theorem that Euler in three of them is DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import flowsolve as fs
from flowsolve import Flow
from flowsolve.charts import CHARTS, Chart, resolve
from flowsolve.passage import Passage
from flowsolve.paths import CondOT, Discrete, Path
from flowsolve.solvers import Euler
from flowsolve.solvers.base import Query, State, run
from tests.cases import PATHS

STRAIGHT_LINES = {"CondOT", "CondOT-sigma_min"}  # α and σ are linear in t, so native Euler is exact too
every_path = pytest.mark.parametrize("name", PATHS)
every_chart = pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
ddim_charts = pytest.mark.parametrize("chart", [CHARTS[c] for c in ("straight", "data", "noise")], ids=lambda c: c.name)
inside = st.floats(0.02, 0.98)


def smooth_time(path: Path, t: float) -> float:
    """t moved to the middle of its interval of a table, away from the knots where its slope jumps."""
    if not isinstance(path, Discrete):
        return t
    n = len(path.alphas_cumprod) - (0 if path.clean else 1)
    return (math.floor(t * n) + 0.5) / n


@every_path
@every_chart
@pytest.mark.parametrize("t", [0.03, 0.2, 0.5, 0.8, 0.97])
def test_slope_is_the_derivative_of_the_frozen_curve(name: str, chart: Chart, t: float) -> None:
    """y(s) = (α z + σ ε)/c along the path with (z, ε) frozen, differenced centrally over h = 1e-5 on both sides.

    The truncation error is h²/6 times a third derivative of size up to 10⁵ relative to the first (EDM, 1/σ³), and
    rounding is 1e-16/h: 1e-6 in all.
    """
    path = PATHS[name]
    t, h, z, eps = smooth_time(path, t), 1e-5, 1.3, -0.7

    def y(u: float) -> float:
        p = path.at(u)
        return (p.alpha * z + p.sigma * eps) / chart.scale(p)  # type: ignore[no-any-return]

    rise = y(t + h) - y(t - h)
    run_ = chart.clock(path, t + h) - chart.clock(path, t - h)
    a, b = chart.row(path.at(t), chart.clock(path, t))
    scale = abs(a * z) + abs(b * eps)
    assert rise / run_ == pytest.approx(a * z + b * eps, abs=1e-6 * scale)


@every_path
@every_chart
@given(t=inside)
def test_time_inverts_the_clock(name: str, chart: Chart, t: float) -> None:
    """s is read back through λ, rounded to ε(1 + |λ|) and, in the trig chart, ε over the angle left: 1e-13 in λ.

    λ' is above 2 on every path. Cosine returns by an asin of slope 80 near the data.
    """
    path = PATHS[name]
    assert chart.time(path, chart.clock(path, t)) == pytest.approx(t, abs=1e-13)
    many = torch.tensor([t, 0.5], dtype=torch.float64)
    back = chart.time(path, chart.clock(path, many))
    assert back.shape == (2,)
    assert float((back - many).abs().max()) <= 1e-13


@every_path
@pytest.mark.parametrize("chart", [CHARTS["straight"], CHARTS["trig"], CHARTS["native"]], ids=lambda c: c.name)
def test_charts_without_infinities_reach_both_ends(name: str, chart: Chart) -> None:
    path = PATHS[name]
    for t in (0.0, 1.0):
        chart.require(path, t)
        assert math.isfinite(chart.clock(path, t))
        assert chart.scale(path.at(t)) > 0.0
        assert chart.time(path, chart.clock(path, t)) == pytest.approx(t, abs=1e-12)


@pytest.mark.parametrize(("chart", "end"), [("data", 0.0), ("noise", 1.0), ("straight", 0.0), ("straight", 1.0)])
@pytest.mark.parametrize("name", ["CondOT", "Trig", "Discrete-zero-terminal"])
def test_infinite_log_snrs_are_reached_exactly(chart: str, end: float, name: str) -> None:
    path, ruler = PATHS[name], CHARTS[chart]
    s = ruler.clock(path, end)
    assert s == (1.0 if (chart, end) == ("straight", 1.0) else 0.0)
    assert ruler.time(path, s) == end
    assert float(ruler.time(path, torch.tensor([s], dtype=torch.float64))) == end


@every_chart
def test_clocks_are_monotone(chart: Chart) -> None:
    t = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)
    for path in PATHS.values():
        steps = chart.clock(path, t).diff()
        assert bool((steps < 0).all() if chart.name == "noise" else (steps > 0).all())


@pytest.mark.parametrize("chart", [c for c in CHARTS.values() if c.name != "native"], ids=lambda c: c.name)
def test_a_clock_means_the_same_on_every_path(chart: Chart) -> None:
    """At one λ all paths show one s."""
    clocks = [chart.clock(path, path.time(0.7)) for path in PATHS.values()]
    assert clocks == pytest.approx([clocks[0]] * len(clocks), rel=1e-12)


@every_chart
def test_floats_and_tensors_agree(chart: Chart) -> None:
    t = torch.tensor([0.1, 0.45, 0.9], dtype=torch.float64)
    for path in PATHS.values():
        s, p = chart.clock(path, t), path.at(t)
        for i, u in enumerate(t.tolist()):
            q, clock = path.at(u), chart.clock(path, u)
            pairs = [(s, clock), (chart.scale(p), chart.scale(q))]
            pairs += list(zip(chart.row(p, s), chart.row(q, clock), strict=True))
            for many, one in pairs:
                value = float(many[i]) if isinstance(many, Tensor) else many
                assert value == pytest.approx(one, rel=1e-13, abs=1e-14)


# --- Euler is DDIM --------------------------------------------------------------------------------------------------


def euler(flow: Flow, chart: Chart, x: Tensor, t: float, t_next: float) -> Tensor:
    """One Euler step of a flow in a chart, driven as any solver is."""
    asked = 0

    def answer(query: Query) -> Any:
        nonlocal asked
        asked += 1
        return flow.estimate(query.x, query.t)

    state = run(Euler().on(flow.path, chart)(State(x), t, t_next, 1), answer)
    assert asked == 1
    result: Tensor = state.x
    return result


def frozen(path: Path, z: Tensor, eps: Tensor) -> Flow:
    """A flow whose estimate is (z, ε) wherever it is asked on their line: it outputs their v."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        p = path.at(float(t[0]))
        return p.alpha * eps - p.sigma * z  # type: ignore[no-any-return]

    return Flow(net, path, "v")


def linear_net(weight: float, bias: float) -> Callable[[Tensor, Tensor], Tensor]:
    matrix = torch.tensor([[0.3, -0.4, 0.1], [0.2, 0.5, -0.6], [-0.7, 0.1, 0.2]], dtype=torch.float64)
    return lambda x, t: weight * (x @ matrix) + bias


pair = st.lists(st.floats(-4.0, 4.0), min_size=3, max_size=3)


def ddim(path: Path, estimate: tuple[Tensor, Tensor], t_next: float) -> Tensor:
    there = path.at(t_next)
    return there.alpha * estimate[0] + there.sigma * estimate[1]  # type: ignore[no-any-return]


@every_path
@ddim_charts
@given(t=inside, t_next=inside, z=pair, eps=pair)
def test_euler_is_ddim_for_a_frozen_estimate(
    name: str, chart: Chart, t: float, t_next: float, z: list[float], eps: list[float]
) -> None:
    assume(t != t_next)
    path = PATHS[name]
    data, noise = (torch.tensor([v], dtype=torch.float64) for v in (z, eps))
    got = euler(frozen(path, data, noise), chart, path.interpolate(data, noise, t), t, t_next)
    # Relative to the new state: VE and EDM reach σ = 80. A chart's y is at most 500 times the state (EDM, 1/σ).
    there = path.at(t_next)
    assert float((got - ddim(path, (data, noise), t_next)).abs().max()) <= 1e-10 * max(1.0, there.alpha + there.sigma)


@every_path
@ddim_charts
@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "v", "score"])
@pytest.mark.parametrize(("t", "t_next"), [(0.1, 0.3), (0.3, 0.1), (0.55, 0.9), (0.9, 0.55), (0.2, 0.95)])
def test_euler_is_ddim_for_a_linear_network(name: str, chart: Chart, prediction: str, t: float, t_next: float) -> None:
    """ẑ and ε̂ from the network's output by the textbook, one prediction at a time.

    A table's velocity jumps at its entries, where the last bit of t decides between two estimates: not asked there.
    """
    path = PATHS[name]
    t = smooth_time(path, t)
    p = path.at(t)
    net = linear_net(0.7, 0.2)
    x = torch.tensor([[0.4, -1.1, 0.9], [1.7, 0.3, -0.2]], dtype=torch.float64) * math.hypot(p.alpha, p.sigma)
    o = net(x, torch.zeros(2))
    if prediction == "data":
        z, eps = o, (x - p.alpha * o) / p.sigma
    elif prediction in ("noise", "score"):
        eps = o if prediction == "noise" else -p.sigma * o
        z = (x - p.sigma * eps) / p.alpha
    elif prediction == "v":
        norm = p.alpha**2 + p.sigma**2
        z, eps = (p.alpha * x - p.sigma * o) / norm, (p.sigma * x + p.alpha * o) / norm
    else:
        det = p.alpha * p.sigma_dot - p.sigma * p.alpha_dot
        z, eps = (p.sigma_dot * x - p.sigma * o) / det, (p.alpha * o - p.alpha_dot * x) / det
    got = euler(Flow(net, path, prediction), chart, x, t, t_next)
    expected = ddim(path, (z, eps), t_next)
    size = float(torch.maximum(z.abs().max(), eps.abs().max()))
    assert float((got - expected).abs().max()) <= 1e-10 * max(1.0, size)


@every_path
@pytest.mark.parametrize(("t", "t_next"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.4), (0.6, 1.0), (0.4, 0.0), (1.0, 0.6)])
def test_euler_in_the_straight_chart_is_ddim_from_and_to_the_very_ends(name: str, t: float, t_next: float) -> None:
    path = PATHS[name]
    z, eps = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = euler(frozen(path, z, eps), CHARTS["straight"], path.interpolate(z, eps, t), t, t_next)
    assert float((got - ddim(path, (z, eps), t_next)).abs().max()) <= 1e-10


@pytest.mark.parametrize(("chart", "t", "t_next"), [("data", 0.0, 0.5), ("data", 0.5, 0.0), ("noise", 0.5, 1.0),
                                                    ("noise", 1.0, 0.5)])  # fmt: skip
@pytest.mark.parametrize("name", ["CondOT", "Trig", "Discrete-zero-terminal"])
def test_euler_is_ddim_up_to_the_end_where_a_chart_is_finite(chart: str, t: float, t_next: float, name: str) -> None:
    path = PATHS[name]
    z, eps = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = euler(frozen(path, z, eps), CHARTS[chart], path.interpolate(z, eps, t), t, t_next)
    assert float((got - ddim(path, (z, eps), t_next)).abs().max()) <= 1e-12


@pytest.mark.parametrize("chart", [CHARTS["trig"], CHARTS["native"]], ids=lambda c: c.name)
@every_path
def test_euler_in_trig_and_native_agrees_with_ddim_to_second_order_only(name: str, chart: Chart) -> None:
    """The gap is not zero, and it falls by 4 when the step is halved (by 4 ± O(h); h is a tenth of what moves)."""
    path = PATHS[name]
    t, z, eps = smooth_time(path, 0.5), torch.tensor([[1.3, 0.2]]).double(), torch.tensor([[-0.7, 1.1]]).double()
    flow, x = frozen(path, z, eps), path.interpolate(z, eps, smooth_time(path, 0.5))
    step = 0.1 / len(path.alphas_cumprod) if isinstance(path, Discrete) else 0.01

    def gap(h: float) -> float:
        return float((euler(flow, chart, x, t, t + h) - ddim(path, (z, eps), t + h)).abs().max())

    if chart.name == "native" and name in STRAIGHT_LINES:
        assert gap(step) <= 1e-15
        return
    assert gap(step) > 1e-9
    assert gap(step) / gap(step / 2) == pytest.approx(4.0, rel=0.15)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CondOT", "Trig", "Discrete", "Discrete-zero-terminal"])
def test_the_data_chart_is_refused_at_noiseless_data(name: str) -> None:
    CHARTS["data"].require(PATHS[name], 0.0)
    CHARTS["data"].require(PATHS[name], 0.99)
    with pytest.raises(ValueError, match=r"chart 'data' is infinite at t = 1 .*σ = 0; use chart='straight'"):
        CHARTS["data"].require(PATHS[name], 1.0)


@pytest.mark.parametrize("name", ["CondOT", "CondOT-sigma_min", "Trig", "Cosine", "Discrete-zero-terminal"])
def test_the_noise_chart_is_refused_at_pure_noise(name: str) -> None:
    CHARTS["noise"].require(PATHS[name], 1.0)
    CHARTS["noise"].require(PATHS[name], 0.01)
    with pytest.raises(ValueError, match=r"chart 'noise' is infinite at t = 0 .*α = 0; use chart='straight'"):
        CHARTS["noise"].require(PATHS[name], 0.0)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM", "Discrete-not-clean"])
@every_chart
def test_where_alpha_and_sigma_stay_positive_every_chart_is_finite(name: str, chart: Chart) -> None:
    for t in (0.0, 1.0):
        chart.require(PATHS[name], t)


@pytest.mark.parametrize("wrong", ["Straight", "", None, 3, ["data"]])
def test_an_unknown_chart_is_an_error_that_lists_the_names(wrong: Any) -> None:
    with pytest.raises(ValueError, match="not known; expected one of straight, data, noise, trig, native"):
        resolve(wrong)


def test_charts_are_known_by_name_and_are_themselves() -> None:
    for name, chart in CHARTS.items():
        assert resolve(name) is chart
        assert resolve(chart) is chart
        assert repr(chart) == f"<chart {name}>"


@pytest.mark.parametrize("kind", ["plain", "dataclass"])
def test_a_chart_of_ones_own_may_change(kind: str) -> None:
    """What a path remembers is of charts that cannot: y = x/k against s = k t, for a k that is set anew."""

    class Scaled(Chart):
        name = "scaled"

        def __init__(self, k: float = 1.0) -> None:
            self.k = k

        def scale(self, point: Any) -> Any:
            return self.k

        def clock(self, path: Any, t: Any) -> Any:
            return self.k * t

        def time(self, path: Any, s: Any) -> Any:
            return s / self.k

        def row(self, point: Any, s: Any) -> tuple[Any, Any]:
            return point.alpha_dot / self.k**2, point.sigma_dot / self.k**2

    chart: Any = Scaled()
    if kind == "dataclass":
        Scaled.__eq__ = lambda self, other: self.k == other.k  # type: ignore[method-assign]
        Scaled.__hash__ = None  # type: ignore[assignment]  # as a dataclass that is not frozen
    flow, x = fs.Flow(lambda x, t: -x * t[:, None], CondOT()), torch.ones(2, 3, dtype=torch.float64)
    expected = fs.sample(flow, start=x, solver="rk4", nfe=40, chart="native").x
    keys: list[Any] = []  # of recordings
    for k in (1.0, 2.0, 0.5):
        chart.k = k
        found = fs.sample(flow, start=x, solver="rk4", nfe=40, chart=chart).x
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert Passage(flow, (0.0, 1.0), solver=fs.solvers.RK4(), nfe=40, chart=chart).key() not in keys
        keys.append(Passage(flow, (0.0, 1.0), solver=fs.solvers.RK4(), nfe=40, chart=chart).key())
        found = fs.sample(flow, start=x, solver=fs.solvers.Dopri5(1e-9, 1e-9), chart=chart).x
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # RK4's error with 10 steps
