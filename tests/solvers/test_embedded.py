"""DPM-Solver-12 and -23 on the per-sample step control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import flowsolve as fs
from flowsolve.paths import VE, VP, CondOT, Path
from flowsolve.solvers import DPMSolver, DPMSolver12, DPMSolver23
from flowsolve.solvers.embedded import first_moment
from tests.solvers.test_orders import case, mixture


@pytest.mark.parametrize("span", [-5.0, -0.3, -0.0101, -0.0099, -1e-4, 1e-9, 0.0099, 0.0101, 2.0, 30.0])
def test_the_first_moment_is_the_integral(span: float) -> None:
    truth = quad(lambda u: u * np.exp(span * u), 0, 1)[0] / quad(lambda u: np.exp(span * u), 0, 1)[0]
    assert first_moment(np.array([span]))[0] == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize(("solver", "order"), [(DPMSolver12, 2), (DPMSolver23, 3)])
@pytest.mark.parametrize("chart", ["noise", "data"])
def test_a_step_is_the_single_step_dpm_solver_s(solver: Any, order: int, chart: str) -> None:
    """At a tolerance that everything meets, the one step that is left to make is DPM-Solver's own."""
    path = VP()
    start, end = path.time(-0.5), path.time(0.4)
    flow, (x, _) = mixture().flow(path), case(path, path.time(-1.5), path.time(1.5))
    one = solver(rtol=1e6, atol=1e6, first_step=1e9)
    found = fs.sample(flow, start=x, interval=(start, end), solver=one, chart=chart)
    assert found.accepted.tolist() == [1] * len(x)
    assert found.nfe.tolist() == [order + 1] * len(x)
    truth = fs.sample(flow, start=x, interval=(start, end), solver=DPMSolver(order, form=chart), nfe=order)
    torch.testing.assert_close(found.x, truth.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", [CondOT(), VP(), VE()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("chart", ["noise", "data", "straight"])
@pytest.mark.parametrize(("solver", "order"), [(DPMSolver12, 2), (DPMSolver23, 3)])
def test_errors_follow_the_tolerance(path: Path, chart: str, solver: Any, order: int) -> None:
    """Errors fall with the tolerance, evaluations grow like its power −1/(order of the companion + 1)."""
    start, end = path.time(-1.5), path.time(1.5)
    flow, (x, truth) = mixture().flow(path), case(path, start, end)
    errors, calls, tolerances = [], [], [1e-3, 1e-4, 1e-5]
    for tol in tolerances:
        sol = fs.sample(flow, start=x, interval=(start, end), solver=solver(tol, tol), chart=chart)
        errors.append(float((sol.x - truth).square().mean().sqrt() / (path.alpha(end) + path.sigma(end))))
        calls.append(float(sol.nfe.double().mean()))
    assert errors[-1] < 100 * tolerances[-1]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    growth = np.polyfit(np.log10(tolerances), np.log10(calls), 1)[0]
    assert growth == pytest.approx(-1.0 / order, abs=0.15), calls


def test_a_sample_does_not_depend_on_its_batch() -> None:
    path = VP()
    start, end = path.time(-4.0), path.time(4.0)
    flow = mixture().flow(path)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = fs.sample(flow, start=x, interval=(start, end), solver=DPMSolver23(1e-4, 1e-4))
    assert len(set(whole.nfe.tolist())) > 1
    for i in range(6):
        alone = fs.sample(flow, start=x[i : i + 1], interval=(start, end), solver=DPMSolver23(1e-4, 1e-4))
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=1e-10, atol=1e-10)
        assert int(alone.nfe) == int(whole.nfe[i])


def test_gradients_flow_and_segments_agree() -> None:
    path = VP()
    start, end = path.time(-1.0), path.time(1.0)
    x, _ = case(path, path.time(-1.5), path.time(1.5))
    found = []
    for gradient in ("direct", "checkpoint"):
        y = x.clone().requires_grad_()
        sol = fs.sample(
            mixture().flow(path), start=y, interval=(start, end), solver=DPMSolver12(1e-3, 1e-3), gradient=gradient
        )
        found.append(torch.autograd.grad(sol.x.square().sum(), y)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


def test_infinite_ends_are_refused() -> None:
    flow, x = mixture().flow(CondOT()), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="chart 'noise' is infinite at t = 0"):
        fs.sample(flow, start=x, solver=DPMSolver23())
    with pytest.raises(ValueError, match=r"DPMSolver23 steps in log-SNR.*from 0"):
        fs.sample(flow, start=x, solver=DPMSolver23(), chart="data", final="sigma_min")
