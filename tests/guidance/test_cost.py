"""What guidance within an interval costs: counted by the network itself, for every kind of solve."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsolve as fs
from flowsolve import batching, grids, paths, solvers
from flowsolve.guidance import Autoguidance, Classifier, ClassifierFree, Interval, Transformed, ZeroStar
from flowsolve.paths import CondOT, Discrete, Path
from flowsolve.planning import afford
from flowsolve.problems import GaussianMixture
from tests.guidance.labelled import MEANS, labelled

Y = torch.tensor([1, 2, 3, 1, 2])
WHO = torch.arange(5)
WITHIN = (-1.0, 1.5)


def guided(path: Path, prediction: str = "velocity", **options: Any) -> ClassifierFree:
    return ClassifierFree(labelled(path, prediction), 3.0, unconditional={"y": 0}, **{"interval": WITHIN, **options})


FIXED: list[tuple[Path, Any, dict[str, Any]]] = [
    (CondOT(), solvers.DDIM(), {}), (CondOT(), solvers.Heun(), {}), (CondOT(), solvers.RK4(), {}),
    (CondOT(), solvers.ExactSDE(), {}), (CondOT(), "auto", {}), (paths.VP(), solvers.UniPC(order=3), {}),
    (paths.VP(), solvers.UniPC(order=3, warmup="single"), {"grid": "log_snr"}),
    (paths.EDM(), solvers.Heun(), {"grid": "karras"}),
    (paths.VP(), solvers.EulerMaruyama(), {"final": "denoise"}), (Discrete.linear(60), solvers.Heun(), {}),
    (Discrete.linear(), solvers.DDPM(), {"grid": "trailing"}), (paths.VP(), solvers.Dopri5(adaptive=False), {}),
    (CondOT(), solvers.Heun(), {"chart": "trig"}),
    (paths.EDM(), solvers.DPMSolverPP(), {"grid": "karras", "final": "tweedie"}),
    (paths.EDM(), solvers.Churn(solvers.Heun(), churn=4.0), {"grid": "karras", "noise": "fresh"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "solver", "options"), FIXED, ids=lambda v: repr(v)[:20])
def test_a_budget_is_never_exceeded_and_what_is_counted_is_what_the_network_saw(
    path: Path, solver: Any, options: Any
) -> None:
    flow = guided(path)
    for nfe in (13, 24):
        sol = fs.sample(flow, (5, 2), solver=solver, nfe=nfe, cond={"y": Y, "who": WHO}, **options)
        assert bool(sol.ok.all())
        assert sol.nfe.tolist() == flow.base.net.each(5), "rows that the network saw of each sample"
        assert nfe - 5 <= int(sol.nfe[0]) <= nfe
        few = fs.sample(flow, (5, 2), solver=solver, nfe=nfe, cond={"y": Y, "who": WHO}, batch=2, **options)
        assert few.nfe.tolist() == sol.nfe.tolist() == flow.base.net.each(5)
        torch.testing.assert_close(few.x, sol.x, rtol=1e-5, atol=1e-5)


@given(st.integers(2, 60), st.floats(-4.0, 2.0), st.floats(0.1, 5.0), st.sampled_from(["uniform", "log_snr"]))
def test_the_most_estimates_that_a_budget_pays_for_are_taken(nfe: int, low: float, width: float, grid: str) -> None:
    """DDIM asks at the start of each step: all numbers of steps are tried here, their nodes counted one by one."""
    path = paths.VP()
    flow = guided(path, interval=(low, low + width))

    def price(steps: int) -> int:
        if grid == "uniform":
            lams = [path.log_snr(i / steps) for i in range(steps)]
        else:
            first, last = path.log_snr(0.0), path.log_snr(1.0)
            lams = [first + (last - first) * i / steps for i in range(steps)]
        return sum(2 if low <= lam < low + width else 1 for lam in lams)

    best = max((n for n in range(1, nfe + 1) if price(n) <= nfe), default=0)
    if not best:
        with pytest.raises(ValueError, match=r"expected at least 2: an estimate of ClassifierFree.* costs 1 to 2"):
            fs.sample(flow, (1, 2), solver=solvers.DDIM(), nfe=nfe, grid=grid, cond={"y": Y[:1]})
        return
    sol = fs.sample(flow, (1, 2), solver=solvers.DDIM(), nfe=nfe, grid=grid, cond={"y": Y[:1]})
    assert int(sol.accepted) == best
    assert int(sol.nfe) == price(best)


@given(st.integers(1, 300), st.integers(0, 3), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_the_search_finds_what_trying_all_numbers_finds(nfe: int, least: int, width: float, start: float) -> None:
    """Costs of uniform nodes in an interval, which do not always rise with their number."""
    flow = fs.Flow(lambda x, t: x, CondOT())
    flow.nfe_range = (least, 3)

    def lay(n: int) -> tuple[int, int]:
        inside = sum(start <= i / n < start + width for i in range(n))
        return n, 3 * inside + least * (n - inside)

    fits = [n for n in range(1, nfe // max(1, least) + 1) if lay(n)[1] <= nfe]
    if fits:
        assert afford(nfe, flow, lay) == fits[-1]
    else:
        with pytest.raises(ValueError, match="expected at least"):
            afford(nfe, flow, lay)


def test_limits_are_noise_levels_and_do_not_move_with_the_grid() -> None:
    """Whatever the steps, the network sees a sample twice where σ/α is in (0.47, 2.1], and nowhere else."""
    path = CondOT()
    flow = guided(path, interval=Interval.sigma(0.47, 2.1))
    for grid, nfe in (("uniform", 20), ("log_snr", 33), ("karras", 11), ([0.0, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0], None)):
        flow.base.net.calls = []
        fs.sample(flow, (5, 2), solver=solvers.DDIM(), nfe=nfe, grid=grid, cond={"y": Y})
        assert len(flow.base.net.calls) > 4
        for t, _ in flow.base.net.calls:
            level = float(((1.0 - t) / t)[0])
            assert len(t) == (10 if 0.47 < level <= 2.1 else 5)


def test_the_fields_of_noise_levels() -> None:
    assert Interval.sigma(0.0, 3.0) == Interval(-math.log(3.0), math.inf)
    assert Interval.sigma(2.0) == Interval(-math.inf, -math.log(2.0))
    assert 0.0 in Interval(0.0, 1.0)
    assert 1.0 not in Interval(0.0, 1.0)
    flow = guided(CondOT(), interval=Interval.sigma(0.5, 2.0))
    at = torch.tensor([[0.3, 1 / 3 + 1e-9], [0.6, 0.7]], dtype=torch.float64)
    assert flow.cost(at).tolist() == [[1, 2], [2, 1]]
    assert [flow.cost(t) for t in (0.3, 0.5, 0.7)] == [1, 2, 1]


ADAPTIVE = [solvers.Dopri5(), solvers.Bosh3(rtol=1e-3, atol=1e-3), solvers.Dopri8()]


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("batch", [None, 2, 5])
def test_adaptive_samples_pay_for_their_own_evaluations(solver: Any, batch: int | None) -> None:
    path = CondOT()
    flow = guided(path)
    cond = {"y": Y, "who": WHO}
    sol = fs.sample(flow, (5, 2), solver=solver, cond=cond, batch=batch)
    assert sol.nfe.tolist() == flow.base.net.each(5)
    assert len(set(sol.nfe.tolist())) > 1
    if batch is None:
        looked = fs.sample(flow, (5, 2), solver=solver, cond=cond, t_eval=[0.2, 0.45, 0.62, 0.9, 1.0])
        assert looked.nfe.tolist() == flow.base.net.each(5)
        assert bool((looked.nfe >= sol.nfe).all())
        alone = fs.sample(flow, (1, 2), solver=solver, samples=[3], cond={"y": Y[3:4]})
        assert int(alone.nfe) == int(sol.nfe[3]), "a sample's cost does not depend on its batch mates"


def test_adaptive_log_snr_steps_pay_too() -> None:
    flow = guided(paths.VP(), "noise")
    solver = solvers.DPMSolver23(rtol=1e-3, atol=1e-3)
    sol = fs.sample(flow, (5, 2), solver=solver, cond={"y": Y, "who": WHO}, final="denoise")
    assert sol.nfe.tolist() == flow.base.net.each(5)
    most = int(sol.nfe.max())
    exact = fs.sample(flow, (5, 2), solver=solver, cond={"y": Y}, final="denoise", nfe=most)
    assert torch.equal(exact.nfe, sol.nfe)


@pytest.mark.parametrize(("batch", "gradient"), [(None, "direct"), (None, "checkpoint"), (2, "direct")])
def test_an_adaptive_budget_is_the_most_that_a_sample_may_cost(batch: int | None, gradient: str) -> None:
    flow = guided(CondOT())
    options: dict[str, Any] = {
        "solver": solvers.Dopri5(1e-4, 1e-4), "cond": {"y": Y, "who": WHO}, "batch": batch, "gradient": gradient,
        "grad": gradient != "direct",
    }  # fmt: skip
    free = fs.sample(flow, (5, 2), **options)
    assert free.nfe.tolist() == flow.base.net.each(5)
    most = int(free.nfe.max())
    assert torch.equal(fs.sample(flow, (5, 2), nfe=most, **options).nfe, free.nfe), "what is needed suffices"
    flow.base.net.calls = []
    less = fs.sample(flow, (5, 2), nfe=most - 1, throw=False, **options)
    assert less.nfe.tolist() == flow.base.net.each(5)
    short = free.nfe == most
    assert torch.equal(less.status, torch.where(short, int(fs.Status.BUDGET), 0))
    assert bool((less.nfe < most).all())
    with pytest.raises(ValueError, match="a budget of 9 evaluations; Dopri5 needs 16 to take one step"):
        fs.sample(flow, (5, 2), nfe=9, **options)


def test_streams_and_encodings_count_the_same() -> None:
    net = labelled(CondOT()).net
    shared = {"y": torch.tensor([1])}
    flow = ClassifierFree(
        fs.Flow(lambda x, t, y: net(x, t, y.expand(len(x)) if len(y) == 1 else y), CondOT()),
        3.0, unconditional={"y": torch.tensor([0])}, interval=WITHIN,
    )  # fmt: skip
    whole = fs.sample(flow, (5, 2), solver=solvers.Dopri5(), cond=shared)
    parts = list(batching.sample(flow, (5, 2), solver=solvers.Dopri5(), batch=2, cond=shared))
    assert torch.cat([p.nfe for p in parts]).tolist() == whole.nfe.tolist()
    fixed = list(batching.sample(flow, (5, 2), nfe=24, batch=2, cond=shared))
    assert {int(n) for p in fixed for n in p.nfe} == set(fs.sample(flow, (5, 2), nfe=24, cond=shared).nfe.tolist())
    guided_there = guided(CondOT())
    there = fs.encode(guided_there, whole.x, solver=solvers.Heun(), nfe=30, cond={"y": Y, "who": WHO})
    assert there.nfe.tolist() == guided_there.base.net.each(5)
    assert int(there.nfe[0]) in (29, 30)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (paths.EDM(), {"solver": solvers.DDIM(), "nfe": 15, "grid": "karras", "final": "denoise"}),
        (Discrete.linear(60), {"solver": solvers.Heun(), "nfe": 15}),
        (Discrete.linear(60), {"solver": solvers.Bosh3(1e-3, 1e-3)}),
        (Discrete.linear(60), {"solver": solvers.Bosh3(1e-3, 1e-3), "nfe": 400, "final": "tweedie"}),
    ],
    ids=lambda v: repr(v)[:24],
)
def test_a_final_estimate_that_is_guided_costs_what_a_guided_one_does(path: Path, options: dict[str, Any]) -> None:
    flow = guided(path, "noise" if isinstance(path, Discrete) else "data", interval=(1.0, math.inf))
    sol = fs.sample(flow, (5, 2), cond={"y": Y, "who": WHO}, **options)
    assert len(flow.base.net.calls[-1][0]) == 10, "the last call is guided"
    assert sol.nfe.tolist() == flow.base.net.each(5)
    if not options["solver"].chooses_steps:
        assert options["nfe"] - 2 <= int(sol.nfe[0]) <= options["nfe"]


def test_explicit_times_have_their_price() -> None:
    flow = guided(CondOT())
    times = [0.0, 0.2, 0.5, 0.7, 0.9, 1.0]  # λ = −708, −1.4, 0, 0.8, 2.2
    assert fs.sample(flow, (5, 2), solver=solvers.DDIM(), grid=times, cond={"y": Y}).nfe.tolist() == [7] * 5
    assert fs.sample(flow, (5, 2), solver=solvers.DDIM(), grid=times, nfe=7, cond={"y": Y}).nfe.tolist() == [7] * 5
    with pytest.raises(ValueError, match=r"the budget is 8 evaluations, but DDIM.* spends 7 on the times given"):
        fs.sample(flow, (5, 2), solver=solvers.DDIM(), grid=times, nfe=8, cond={"y": Y})
    flow.base.net.calls = []
    at = grids.At(sigma=[80.0, 2.0, 1.0, 0.5, 0.1])
    found = fs.sample(flow, start=torch.ones(5, 2), solver=solvers.Heun(), grid=at, cond={"y": Y, "who": WHO})
    assert found.nfe.tolist() == flow.base.net.each(5)


def test_snapshots_count_what_was_spent_and_go_on_from_there() -> None:
    flow = guided(CondOT())
    shots: list[fs.Snapshot] = []
    options: dict[str, Any] = {"solver": solvers.UniPC(order=2), "nfe": 20, "cond": {"y": Y, "who": WHO}}
    seen: list[int] = []

    def look(shot: fs.Snapshot) -> None:
        shots.append(shot)
        seen.append(flow.base.net.asked // 5)

    whole = fs.sample(flow, (5, 2), grid="log_snr", callback=look, **options)
    assert [shot.nfe for shot in shots] == torch.tensor(seen).cumsum(0).tolist()
    again = fs.sample(flow, resume=shots[4], grid="log_snr", **options)
    assert torch.equal(again.x, whole.x)
    assert torch.equal(again.nfe, whole.nfe)


def test_other_libraries_are_counted_and_cannot_be_given_a_budget() -> None:
    pytest.importorskip("torchdiffeq")
    flow = guided(CondOT())
    solver = solvers.bridges.Torchdiffeq("dopri5", rtol=1e-3, atol=1e-3)
    sol = fs.sample(flow, (5, 2), solver=solver, cond={"y": Y, "who": WHO})
    assert sol.nfe.tolist() == flow.base.net.each(5)
    with pytest.raises(ValueError, match=r"nfe = 40 with Torchdiffeq.*does not say beforehand.*drop nfe="):
        fs.sample(flow, (5, 2), solver=solver, nfe=40, cond={"y": Y})


def test_nested_guidance_counts_all_of_it() -> None:
    path = CondOT()
    inner = guided(path, interval=(-1.0, 1.0))
    weak = GaussianMixture(MEANS, 0.9).flow(path)
    outer = Transformed(
        Autoguidance(inner, fs.Flow(lambda x, t, y: weak.net(x, t), path), 2.0, interval=(0.0, 2.0)), torch.tanh
    )
    assert outer.nfe_range == (1, 3)
    assert [outer.cost(path.time(v)) for v in (-2.0, -0.5, 0.5, 1.5, 3.0)] == [1, 2, 3, 2, 1]
    twice = ClassifierFree(guided(path), 2.0, unconditional={"y": 1})
    assert twice.nfe_range == (2, 4)
    sol = fs.sample(twice, (5, 2), solver=solvers.Heun(), nfe=40, cond={"y": Y, "who": WHO})
    assert sol.nfe.tolist() == twice.base.base.net.each(5)


def test_scales_are_functions_of_the_noise_level() -> None:
    """A scale of exactly 1 needs no unconditional estimate; any other is u + w(λ) (c − u)."""
    path = CondOT()
    net = labelled(path)

    def scale(lam: float) -> float:
        return 1.0 + max(0.0, 2.0 - abs(lam))

    flow = ClassifierFree(net, scale, unconditional={"y": 0})
    x = torch.ones(4, 2, dtype=torch.float64)
    lams = torch.tensor([-3.0, -1.0, 0.5, 2.5], dtype=torch.float64)
    t, y = path.time(lams), torch.tensor([1, 2, 3, 1])
    assert flow.cost(t).tolist() == [1, 2, 2, 1]
    weak, strong = net.velocity(x, t, y=0 * y), net.velocity(x, t, y=y)
    w = torch.tensor([1.0, 2.0, 2.5, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(flow.velocity(x, t, y=y), weak + w * (strong - weak))
    assert repr(flow).endswith("scale=scale)")


def test_zero_init_runs_no_network_and_counts_nothing() -> None:
    flow = guided(CondOT(), interval=None, rule=ZeroStar(zero_until=-1.0))
    assert flow.nfe_range == (0, 2)
    sol = fs.sample(flow, (5, 2), solver=solvers.Euler(), nfe=20, cond={"y": Y, "who": WHO})
    assert sol.nfe.tolist() == flow.base.net.each(5)
    assert int(sol.accepted[0]) == 15, "10 of 15 steps begin at λ >= −1, t >= 0.269, and 11 of 16"
    adaptive = fs.sample(flow, (5, 2), solver=solvers.Bosh3(1e-3, 1e-3), cond={"y": Y, "who": WHO})
    assert adaptive.nfe.tolist() == flow.base.net.each(5)


def test_a_classifier_counts_as_declared() -> None:
    base = GaussianMixture(MEANS, 0.3).flow(paths.VP())

    def right(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(x[:, 0])

    assert Classifier(base, right).nfe_per_call == 2
    assert Classifier(base, right, evaluations=0).nfe_per_call == 1
    within = Classifier(base, right, interval=(-1.0, 1.0))
    assert within.nfe_range == (1, 2)
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return right(x, t)

    flow = Classifier(base, counted, interval=(-1.0, 1.0))
    sol = fs.sample(flow, (3, 2), solver=solvers.DDIM(), nfe=30)
    assert int(sol.nfe[0]) == int(sol.accepted[0]) + calls


def test_a_cost_that_varies_is_no_number() -> None:
    flow = guided(CondOT())
    with pytest.raises(ValueError, match=r"costs 1 to 2 evaluations; ask flow.cost\(t\)"):
        _ = flow.nfe_per_call
    assert guided(CondOT(), interval=None).nfe_per_call == 2
    assert guided(CondOT(), interval=(-math.inf, math.inf)).nfe_per_call == 2
    assert fs.Flow(lambda x, t: x, CondOT(), nfe_per_call=3).cost(torch.ones(2)).tolist() == [3, 3]
