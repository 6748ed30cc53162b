"""Partial solves: snapshots that resume to the same bits, callbacks, intervals in pieces, round trips."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
import torch

import flowsolve as fs
from flowsolve.paths import VP, CondOT, Discrete
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import (
    DDPM,
    DEIS,
    ERSDE,
    Dopri5,
    DPMSolverPP,
    Euler,
    Heun,
    SASolver,
    SDEDPMSolverPP,
    StochasticHeun,
    UniPC,
)  # fmt: skip


def problem() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor(0.3, dtype=torch.float64))


SOLVERS = [
    Euler(), Heun(), DDPM(), DPMSolverPP(3), UniPC(3), UniPC(3, cooldown=True), UniPC(3, warmup="single"),
    SDEDPMSolverPP(2), SASolver(3, corrector=3), StochasticHeun(form="straight"), ERSDE(),
]  # fmt: skip


@pytest.mark.parametrize("path", [CondOT(), Discrete.linear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solve_resumes_to_the_same_bits_at_every_step(path: Any, solver: Any, tmp_path: File) -> None:
    flow, shots = problem().flow(path), []
    common = {"solver": solver, "nfe": 14, "grid": "log_snr"}
    whole = fs.sample(flow, shape=(5, 2), seed=3, callback=shots.append, **common)
    assert [s.step for s in shots] == list(range(1, shots[-1].steps + 1))
    assert shots[-1].nfe in (14, 13)  # without the closing step of a table's path
    for shot in shots:
        shot.save(tmp_path / "shot.pt")
        back = fs.Snapshot.load(tmp_path / "shot.pt")
        rest = fs.sample(flow, resume=back, **common)
        assert bool((rest.x == whole.x).all()), shot.step
        assert rest.nfe.tolist() == [14] * 5
        assert rest.accepted.tolist() == whole.accepted.tolist()


def test_a_brownian_solve_resumes_too() -> None:
    flow, shots = problem().flow(CondOT()), []
    common = {"solver": SDEDPMSolverPP(2), "nfe": 8, "noise": "brownian"}
    whole = fs.sample(flow, shape=(3, 2), seed=1, callback=shots.append, **common)
    assert bool((fs.sample(flow, resume=shots[3], **common).x == whole.x).all())


def test_what_a_callback_raises_ends_the_solve_and_nothing_is_lost() -> None:
    flow, shots = problem().flow(VP()), []

    def stop(shot: fs.Snapshot) -> None:
        shots.append(shot)
        if shot.step == 4:
            raise KeyboardInterrupt

    common = {"solver": DEIS(3, form="data"), "nfe": 9}
    with pytest.raises(KeyboardInterrupt):
        fs.sample(flow, shape=(2, 2), callback=stop, **common)
    rest = fs.sample(flow, resume=shots[-1], **common)
    assert bool((rest.x == fs.sample(flow, shape=(2, 2), **common).x).all())


def test_a_callback_sees_the_trajectory() -> None:
    path, shots = CondOT(), []
    flow = problem().flow(path)
    fs.sample(flow, shape=(4, 2), solver=Euler(), nfe=5, callback=shots.append)
    assert [s.t for s in shots] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [s.nfe for s in shots] == [1, 2, 3, 4, 5]


def test_another_plan_is_refused() -> None:
    flow, shots = problem().flow(CondOT()), []
    fs.sample(flow, shape=(4, 2), solver=Euler(), nfe=5, callback=shots.append)
    for other in (
        {"solver": Euler(), "nfe": 6},
        {"solver": Heun(), "nfe": 10},
        {"solver": Euler(), "nfe": 5, "grid": "karras"},
    ):
        with pytest.raises(ValueError, match="Resume with the same solver"):
            fs.sample(flow, resume=shots[2], **other)
    with pytest.raises(ValueError, match="give one of shape"):
        fs.sample(flow, resume=shots[2], shape=(4, 2), solver=Euler(), nfe=5)
    with pytest.raises(TypeError, match="fixed grid"):
        fs.sample(flow, shape=(4, 2), solver=Dopri5(), callback=shots.append)
    with pytest.raises(ValueError, match="one batch"):
        fs.sample(flow, shape=(4, 2), solver=Euler(), nfe=5, batch=2, callback=shots.append)


def test_a_file_that_is_no_snapshot_is_refused(tmp_path: File) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a snapshot"):
        fs.Snapshot.load(tmp_path / "other.pt")


@pytest.mark.parametrize("solver", [Euler(), DDPM(), StochasticHeun(form="straight")], ids=repr)
def test_one_step_solvers_in_pieces_are_the_whole(solver: Any) -> None:
    """A partial solve, as for image-to-image strength: from any state at any time."""
    flow = problem().flow(CondOT())
    times = [i / 8 for i in range(9)]
    whole = fs.sample(flow, shape=(3, 2), solver=solver, grid=times, seed=2).x
    half = fs.sample(flow, shape=(3, 2), solver=solver, grid=times[:5], interval=(0.0, 0.5), seed=2).x
    rest = fs.sample(flow, start=half, solver=solver, grid=times[4:], interval=(0.5, 1.0), seed=2).x
    assert bool((rest == whole).all())


@pytest.mark.parametrize(
    ("solver", "nfe", "bound"),
    [(UniPC(3, form="straight"), 60, 0.02), (Heun(), 60, 0.02), (Dopri5(1e-8, 1e-8), None, 1e-6)],
    ids=lambda v: type(v).__name__,
)
def test_a_round_trip_reports_what_was_lost(solver: Any, nfe: int | None, bound: float) -> None:
    flow, x = problem().flow(CondOT()), problem().sample(32, seed=1)
    report = fs.round_trip(flow, x, solver=solver, nfe=nfe)
    direct = (report.x - x).square().mean(1).sqrt()
    torch.testing.assert_close(report.error, direct)
    assert float(report.error.median()) < bound
    assert float(report.latent_std.median()) == pytest.approx(1.0, abs=0.35)
    torch.testing.assert_close(report.psnr, 20 * torch.log10(2.0 / direct))
    assert "round trip of 32 samples" in str(report)


def test_a_round_trip_on_explicit_times() -> None:
    flow, x = problem().flow(CondOT()), problem().sample(4, seed=1)
    times = [1.0, 0.7, 0.4, 0.1, 0.0]
    report = fs.round_trip(flow, x, solver=Euler(), grid=times)
    latent = fs.encode(flow, x, solver=Euler(), grid=times).x
    torch.testing.assert_close(report.x, fs.sample(flow, start=latent, solver=Euler(), grid=times[::-1]).x)
    assert report.nfe.tolist() == [8] * 4


# --- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Euler(), UniPC(3), DDPM(), Heun()], ids=repr)
def test_a_trajectory_on_a_fixed_grid_is_its_nodes(solver: Any) -> None:
    flow, shots = problem().flow(CondOT()), []
    common = {"solver": solver, "nfe": 8 * solver.evaluations, "seed": 2}
    sol = fs.sample(flow, shape=(3, 2), t_eval=[0.0, 0.25, 0.5, 1.0], callback=shots.append, **common)
    assert sol.trajectory is not None
    assert sol.t_eval is not None
    assert sol.t_eval.tolist() == [0.0, 0.25, 0.5, 1.0]
    assert sol.trajectory.shape == (4, 3, 2)
    for state, step in ((sol.trajectory[1], 2), (sol.trajectory[2], 4), (sol.trajectory[3], 8)):
        assert bool((state == shots[step - 1].x).all())
    assert bool((sol.x == fs.sample(flow, shape=(3, 2), **common).x).all())
    with pytest.raises(ValueError, match=r"0\.3, which is no node of the grid \(the nearest is 0\.25"):
        fs.sample(flow, shape=(3, 2), t_eval=[0.3], **common)


@pytest.mark.parametrize("chart", [None, "trig"])
def test_a_trajectory_of_an_adaptive_solver_is_at_any_time(chart: Any) -> None:
    flow, times = problem().flow(CondOT()), [0.1, 0.37, 0.8]
    common = {"solver": Dopri5(1e-9, 1e-9), "chart": chart}
    sol = fs.sample(flow, shape=(5, 2), dtype=torch.float64, t_eval=times, **common)
    start = fs.sample(flow, shape=(5, 2), dtype=torch.float64, t_eval=[0.0], **common).trajectory[0]
    for t, state in zip(times, sol.trajectory, strict=True):
        there = fs.sample(flow, start=start, interval=(0.0, t), **common).x
        torch.testing.assert_close(state, there, rtol=0.0, atol=2e-7)
    back = fs.encode(flow, sol.x, t_eval=times[::-1], **common).trajectory
    torch.testing.assert_close(back.flip(0), sol.trajectory, rtol=0.0, atol=1e-6)


def test_bad_stops_are_refused() -> None:
    flow = problem().flow(CondOT())
    for bad in ([], [0.5, 0.5], [0.5, 0.2]):
        with pytest.raises(ValueError, match="expected strictly monotone"):
            fs.sample(flow, shape=(2, 2), solver=Dopri5(), t_eval=bad)
    with pytest.raises(ValueError, match="what closes the solve is in sol"):
        fs.sample(flow, shape=(2, 2), solver=Euler(), nfe=5, final="denoise", t_eval=[1.0])
