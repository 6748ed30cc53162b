"""What a solve says of times, tolerances, stiffness and empty states, and that the mend it names is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.compat.torchdiffeq import odeint
from flowsolve.solvers.bridges import Torchdiffeq

Y0 = torch.ones(2, 3, dtype=torch.float64)
SOLVERS: list[Any] = [(fs.solvers.Dopri5(), {}), (fs.solvers.RK4(), {"nfe": 8})]


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def stiff(t: Tensor, y: Tensor) -> Tensor:
    return -1e6 * (y - torch.cos(t))


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=["adaptive", "fixed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_times_that_are_not_finite(solver: Any, options: Any, bad: float) -> None:
    for t0, t1, name in ((bad, 1.0, "t0"), (0.0, bad, "t1"), (0.0, torch.tensor(bad), "t1")):
        with pytest.raises(ValueError, match=f"{name} = {bad}; expected a finite time"):
            fs.solve(decay, Y0, t0, t1, solver=solver, **options)
    with pytest.raises(ValueError, match=rf"t_eval\[1\] = {bad}"):
        fs.solve(decay, Y0, 0.0, 1.0, solver=solver, t_eval=[0.5, bad], **options)
    with pytest.raises(ValueError, match="all finite"):
        odeint(decay, Y0, torch.tensor([0.0, bad]))


@pytest.mark.parametrize("solver", [fs.solvers.Bosh3, fs.solvers.Dopri5, fs.solvers.Tsit5, fs.solvers.Dopri8])
@pytest.mark.parametrize("first_step", [None, 0.01])
def test_a_component_that_starts_at_zero_needs_no_atol(solver: Any, first_step: float | None) -> None:
    """y' = cos t from 0, beside a component that does not vanish and one that stays 0: to the relative tolerance."""
    y0 = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    sol = fs.solve(
        lambda t, y: torch.cat((torch.cos(t), -y[:, 1:2], 0 * y[:, 2:]), 1), y0, 0.0, 1.0,
        solver=solver(rtol=1e-7, atol=0.0, first_step=first_step),
    )  # fmt: skip
    truth = torch.tensor([[math.sin(1.0), math.exp(-1.0), 0.0], [math.sin(1.0), 0.0, 0.0]], dtype=torch.float64)
    assert sol.ok.all()
    torch.testing.assert_close(sol.x, truth, rtol=1e-6, atol=0.0)
    assert int(sol.accepted.max()) < 200


def test_a_slope_that_is_not_finite_still_fails_at_once() -> None:
    sol = fs.solve(lambda t, y: y / 0.0, Y0, 0.0, 1.0, solver=fs.solvers.Dopri5(rtol=1e-6, atol=0.0), throw=False)
    assert (sol.status == fs.Status.NONFINITE).all()
    assert sol.nfe.tolist() == [2, 2]


@pytest.mark.parametrize("limit", [{"max_steps": 50}, {"nfe": 300}])
def test_a_stiff_problem_is_told_of_radau(limit: dict[str, int]) -> None:
    nfe = limit.pop("nfe", None)
    with pytest.raises(fs.SolverError, match=r"stiff.*Torchdiffeq\('scipy_solver', options=\{'solver': 'Radau'\}\)"):
        fs.solve(stiff, Y0, 0.0, 10.0, solver=fs.solvers.Tsit5(1e-4, 1e-6, **limit), nfe=nfe)


@pytest.mark.filterwarnings("ignore:The following arguments have no effect:UserWarning")  # scipy of torchdiffeq
def test_radau_is_the_mend() -> None:
    pytest.importorskip("torchdiffeq")
    pytest.importorskip("scipy")
    sol = fs.solve(stiff, Y0, 0.0, 10.0, solver=Torchdiffeq("scipy_solver", options={"solver": "Radau"}))
    torch.testing.assert_close(sol.x, math.cos(10.0) * Y0, rtol=0, atol=1e-4)
    assert int(sol.nfe[0]) < 1000


def test_a_blow_up_on_a_fixed_grid_says_so() -> None:
    with pytest.raises(fs.SolverError, match="on a fixed grid, take more steps"):
        fs.solve(stiff, Y0, 0.0, 10.0, solver=fs.solvers.RK4(), nfe=400)


@pytest.mark.parametrize("empty", [(), [], {}, {"x": ()}])
def test_states_without_tensors(empty: Any) -> None:
    with pytest.raises(TypeError, match="holds no tensor"):
        fs.solve(decay, empty, 0.0, 1.0, solver=fs.solvers.Dopri5())


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=["adaptive", "fixed"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_tensors_without_elements(solver: Any, options: Any, shape: tuple[int, ...]) -> None:
    sol = fs.solve(decay, torch.zeros(shape), 0.0, 1.0, solver=solver, t_eval=[0.5, 1.0], **options)
    assert sol.x.shape == (2, *shape)
    assert sol.ok.all()
