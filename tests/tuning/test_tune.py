"""Trajectories against closed forms, the least-squares step against its normal equations, and what tuning returns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve._batch import rows
from flowsolve.problems import GaussianMixture, PowerLaw
from flowsolve.solvers import DEIS, Fitted, Multistep, UniPC
from flowsolve.tuning import Tuning, converged, procedure, search
from flowsolve.tuning.fitting import fit, weights_of
from flowsolve.tuning.refining import refine
from flowsolve.tuning.search import Generic, typical
from flowsolve.tuning.trajectories import march, relative

STD = torch.tensor([[0.05, 0.3, 1.0, 2.0]], dtype=torch.float64)
PATHS: list[Any] = [fs.paths.CondOT(), fs.paths.VP(), fs.paths.EDM(), fs.paths.Discrete.linear(1000)]
MIXTURE = GaussianMixture([[-1.0, 0.3], [1.0, 0.5]], std=0.2)


def flow_of(problem: Any, path: Any) -> fs.Flow:
    return problem.flow(path, "velocity" if path.at(0.0).alpha == 0.0 else "noise")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_trajectories_are_the_flow_map_between_nodes_too(path: Any) -> None:
    """Of a Gaussian the state's standard deviation is √(α²s² + σ²): x_t = x_0 √(v_t/v_0)."""
    flow = flow_of(GaussianMixture(torch.zeros_like(STD), STD), path)
    made = converged(flow, (3, 4), evaluations=128)
    levels = torch.linspace(-3.0, 3.0, 41).tolist()
    first = path.at(0.0)
    for t in (path.time(v) for v in levels):
        here = path.at(t)
        gain = ((here.alpha**2 * STD**2 + here.sigma**2) / (first.alpha**2 * STD**2 + first.sigma**2)).sqrt()
        exact = made.start * gain
        assert float(relative(made.at(t), exact).max()) < 1e-3  # float32, and 128 steps of orders 3 and 4
    expected = fs.sample(flow, (3, 4), nfe=128)
    assert torch.equal(made.end, expected.x)
    assert torch.equal(made.at(0.0), made.start)
    with pytest.raises(ValueError, match="expected a time between"):
        made.take(0, 1).at(1.5)


def test_trajectories_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    calls = 0

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
            nonlocal calls
            calls += len(x)
            return -self.gain * x + shift.reshape(-1, 1)

    flow = fs.Flow(Net(), fs.paths.CondOT())
    cond = {"shift": torch.linspace(-1.0, 1.0, 20)}
    options: dict[str, Any] = {"cond": cond, "evaluations": 16, "cache": tmp_path}
    first = converged(flow, (20, 3), **options, until=lambda: True)  # as if time was up
    assert len(first) == 8
    assert calls == 8 * 16
    whole = converged(flow, (20, 3), **options)
    assert (len(whole), calls) == (20, 20 * 16)
    again = converged(flow, (20, 3), **options)
    assert calls == 20 * 16
    assert torch.equal(again.states, whole.states)
    assert torch.equal(whole.states[:, :8], first.states)
    expected = fs.sample(flow, (20, 3), nfe=16, cond=cond)
    torch.testing.assert_close(whole.end, expected.x, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        flow.net.gain.mul_(2.0)  # another checkpoint
    calls = 0
    converged(flow, (20, 3), **options)
    assert calls == 20 * 16


def test_the_weights_solve_the_normal_equations() -> None:
    """At each step the gradient of the ridge problem vanishes, computed by autograd from the solver's own states."""
    flow, n, ridge = flow_of(MIXTURE, fs.paths.CondOT()), 4, 1e-3
    with torch.no_grad():
        data = converged(flow, (16, 2), evaluations=64)
        times = Generic(UniPC(2), "uniform").times(flow, n)
        assert times is not None
        omega = weights_of(data, None)
        made, end = fit(UniPC(2), times, data, ridge, omega)
        states, estimates = [data.start], []
        march(
            made,
            flow,
            times,
            data.start,
            data.context,
            lambda k, q, e, s: (estimates.append(e), states.append(s.x), s)[2],
        )
    torch.testing.assert_close(states[-1], end, rtol=1e-5, atol=1e-6)
    for k in range(n):
        history = [f for e in reversed(estimates[: k + 1]) for f in (e.data.double(), e.noise.double())]
        w = torch.tensor([v for pair in zip(made.data[k], made.noise[k], strict=True) for v in pair]).double()
        generic = states[k + 1].double() - sum(v * f for v, f in zip(w, history, strict=True))
        free = w.clone().requires_grad_()
        off = data.at(times[k + 1]).double() - generic - sum(v * f for v, f in zip(free, history, strict=True))
        sizes = torch.stack([(omega * rows(f).square().sum(1)).sum() for f in history])
        ((omega * rows(off).square().sum(1)).sum() + ridge * (free.square() * sizes).sum()).backward()
        assert free.grad is not None
        scale = 2.0 * (ridge * w.abs() * sizes + (sizes * (omega * rows(off.detach()).square().sum(1)).sum()).sqrt())
        assert bool((free.grad.abs() <= 1e-4 * scale.max()).all())


def test_an_endless_ridge_is_the_generic_solver() -> None:
    flow = flow_of(MIXTURE, fs.paths.VP())
    with torch.no_grad():
        data = converged(flow, (8, 2), evaluations=48)
        times = Generic(DEIS(2), "karras").times(flow, 5)
        assert times is not None
        made, end = fit(DEIS(2), times, data, 1e12, weights_of(data, None))
        generic = march(DEIS(2), flow, times, data.start, data.context)
    assert max(abs(v) for row in (*made.data, *made.noise) for v in row) < 1e-9
    torch.testing.assert_close(end, generic, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_times_stay_in_order_and_errors_fall(path: Any) -> None:
    flow = flow_of(MIXTURE, path)
    with torch.no_grad():
        data = converged(flow, (16, 2), evaluations=64)
        times = Generic(UniPC(2), "log_snr").times(flow, 6)
        assert times is not None
        omega = weights_of(data, None)
        before = typical(relative(fit(UniPC(2), times, data, 1e-4, omega)[1], data.end))
        told: list[str] = []
        made, error = refine(
            lambda at: fit(UniPC(2), at, data, 1e-4, omega), times, data, omega, typical, rounds=3, tell=told.append
        )
    assert all(a < b for a, b in zip(made.times, made.times[1:], strict=False))
    assert (made.times[0], made.times[-1]) == (0.0, 1.0)
    assert all(t <= path.window[1] for t in made.times[:-1])
    assert told
    assert error < before


def test_what_is_remembered_changes_nothing_but_the_cost() -> None:
    flow, calls = flow_of(MIXTURE, fs.paths.CondOT()), 0
    with torch.no_grad():
        data = converged(flow, (8, 2), evaluations=32)
        times = list(Generic(UniPC(2), "uniform").times(flow, 6) or ())
        inner = flow.net

        def counted(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            found: Tensor = inner(x, t)
            return found

        flow.net = counted
        memory: dict[tuple[float, ...], Any] = {}
        omega = weights_of(data, None)
        fit(UniPC(2), times, data, 1e-4, omega, memory=memory)
        assert calls == 6
        moved = [*times[:4], times[4] + 0.01, *times[5:]]
        plain, end = fit(UniPC(2), moved, data, 1e-4, omega)
        before = calls
        again, same = fit(UniPC(2), moved, data, 1e-4, omega, memory=memory)
    assert calls - before == 2  # at nodes 4 and 5
    assert plain == again
    assert torch.equal(end, same)


def test_a_sample_in_another_mode_has_the_weight_of_the_others() -> None:
    flow = flow_of(MIXTURE, fs.paths.CondOT())
    with torch.no_grad():
        data = converged(flow, (8, 2), evaluations=32)
    errors = torch.tensor([0.01] * 7 + [2.0], dtype=torch.float64)
    loss = weights_of(data, errors) * rows(data.end.double()).square().sum(1) * errors.square()
    torch.testing.assert_close(loss, torch.ones_like(loss))


def test_what_is_worse_on_validation_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(base: Multistep, times: Any, data: Any, ridge: float, omega: Tensor, memory: Any = None) -> Any:
        rows = tuple(tuple(0.3 for _ in range(k + 1)) for k in range(len(times) - 1))
        made = Fitted(base, tuple(times), rows, rows)
        return made, march(made, data.flow, times, data.start, data.context)

    monkeypatch.setattr(procedure, "fit", spoilt)
    flow = flow_of(MIXTURE, fs.paths.CondOT())
    found = fs.tune(flow, (16, 2), nfe=4, minutes=0.2, evaluations=48)
    row, solver = found.rows[0], found.solver.fits[0]
    assert (row.kept, row.ratio) == ("generic", 1.0)
    generic = fs.sample(flow, (8, 2), solver=solver.base, grid=list(solver.times), seed=9)
    assert torch.equal(fs.sample(flow, (8, 2), solver=found.solver, seed=9).x, generic.x)


@pytest.mark.parametrize("stages", ["grid", "coefficients", "both"])
def test_a_power_law_is_sampled_better_than_by_any_generic_in_hindsight(stages: str, tmp_path: Path) -> None:
    """Judged by the closed form of the flow map, on fresh noise, against all generic pairs of the search."""
    law = PowerLaw((1, 8, 8), slope=1.0, noise=0.004)
    flow, n = law.flow(fs.paths.CondOT()), 5
    found = fs.tune(flow, (16, 1, 8, 8), nfe=(n,), minutes=0.4, evaluations=64, stages=stages, seed=4)
    start = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(8))
    exact = fs.sample(flow, start=start, solver=fs.solvers.Dopri8(1e-9, 1e-9)).x

    def error(**options: Any) -> float:
        return typical(relative(fs.sample(flow, start=start, **options).x, exact))

    pairs = [pair for pair in search.candidates(flow.path, n) if pair.times(flow, n) is not None]
    generic = min(error(solver=p.solver, grid=p.grid, nfe=n) for p in pairs)
    tuned = error(solver=found.solver, nfe=n)
    assert tuned < generic
    row = found.rows[0]
    assert abs(math.log(tuned / row.tuned)) < 1.0  # what the held-out figure promised
    assert row.kept == "tuned"
    # and the file says the same
    found.save(tmp_path / "tuned.json")
    read = Tuning.load(tmp_path / "tuned.json")
    assert read.rows == found.rows
    assert read.solver == found.solver
    assert str(read) == str(found)
    assert read.merged(found).rows == found.rows


def test_progress_is_told_and_time_is_kept_to() -> None:
    import time

    flow, told = flow_of(MIXTURE, fs.paths.CondOT()), []
    begun = time.perf_counter()
    found = fs.tune(flow, (8, 2), nfe=(3, 4), minutes=0.001, evaluations=32, progress=told.append)
    assert time.perf_counter() - begun < 20.0
    assert [row.nfe for row in found.rows] == [3, 4]
    assert any("trajectories" in line for line in told)
    assert any("generic" in line for line in told)


def test_what_is_asked_for_is_checked() -> None:
    flow = flow_of(MIXTURE, fs.paths.CondOT())
    bad: list[tuple[dict[str, Any], str]] = [
        ({"shape": (3, 2)}, "at least 4 samples"),
        ({"nfe": 1}, "at least 2 estimates"),
        ({"nfe": ()}, "at least 2 estimates"),
        ({"stages": "all"}, "stages = 'all'"),
        ({"minutes": 0.0}, "minutes = 0.0"),
    ]
    for options, said in bad:
        with pytest.raises(ValueError, match=said):
            fs.tune(flow, **{"shape": (8, 2), **options})
    with pytest.raises(TypeError, match=r"expected a flowsolve\.Flow"):
        fs.tune(MIXTURE, (8, 2))  # type: ignore[arg-type]


def test_a_guided_flow_is_another_and_its_budget_counts_both_networks() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.9))

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return -self.gain * x + 0.3 * label.reshape(-1, 1) - torch.tanh(x) * t.reshape(-1, 1)

    base = fs.Flow(Net(), fs.paths.CondOT())
    guided = {w: fs.guidance.ClassifierFree(base, w, unconditional={"label": torch.zeros(1)}) for w in (2.0, 3.0)}
    cond = {"label": torch.tensor([1.0, 2.0] * 4)}
    found = fs.tune(guided[2.0], (8, 3), nfe=8, minutes=0.1, cond=cond, evaluations=64)
    assert fs.sample(guided[2.0], (8, 3), solver=found.solver, nfe=8, cond=cond).nfe.tolist() == [8] * 8
    with pytest.raises(ValueError, match="another network"):
        fs.sample(guided[3.0], (8, 3), solver=found.solver, nfe=8, cond=cond)
