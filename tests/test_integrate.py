"""Sampling as a user meets it: pieces of a solve, what is refused, and what a device may not change."""

import numpy as np
import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.problems import GaussianMixture

MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64), 0.4)
FLOW = MIXTURE.flow(paths.VP())


@pytest.mark.parametrize("solver", [solvers.DDPM(), solvers.DDIM(eta=0.5), solvers.EulerMaruyama()], ids=repr)
def test_a_solve_in_pieces_draws_the_noise_of_the_whole(solver):
    """Noise is addressed by the interval, so cutting a solve changes nothing, and no noise is drawn twice."""
    times = [i / 20 for i in range(21)]
    whole = fs.sample(FLOW, (5, 2), solver=solver, grid=times, seed=3, dtype=torch.float64).x
    x = fs.sample(FLOW, (5, 2), solver=solver, grid=times[:8], interval=(0.0, times[7]), seed=3, dtype=torch.float64).x
    x = fs.sample(FLOW, start=x, solver=solver, grid=times[7:], interval=(times[7], 1.0), seed=3).x
    assert torch.equal(x, whole)


def test_half_precision_starts_from_the_same_noise():
    full = fs.sample(FLOW, (4, 2), solver=solvers.Heun(), nfe=8).x
    half = fs.sample(FLOW, (4, 2), solver=solvers.Heun(), nfe=8, dtype=torch.float16).x
    assert half.dtype == torch.float32
    assert torch.equal(full, half)


def test_numpy_numbers_and_grids_are_numbers_and_grids():
    times = np.linspace(0.0, 1.0, 5)
    a = fs.sample(FLOW, (2, 2), solver=solvers.Euler(), grid=times).x
    b = fs.sample(FLOW, (2, 2), solver=solvers.Euler(), nfe=np.int64(4)).x
    assert torch.allclose(a, b)


def test_a_midpoint_step_may_end_where_the_estimate_does_not_exist():
    flow = MIXTURE.flow(paths.CondOT(), "data")
    assert bool(fs.sample(flow, (4, 2), solver=solvers.Midpoint(), nfe=10).ok.all())
    with pytest.raises(fs.predictions.SingularEstimate, match="σ = 0"):
        fs.sample(flow, (4, 2), solver=solvers.Heun(), nfe=10)


def test_large_finite_states_are_finite():
    y0 = torch.tensor([[3e38, 3e38]])
    assert bool(fs.solve(lambda t, y: torch.zeros_like(y), y0, 0.0, 1.0, solver=solvers.Euler(), nfe=2).ok.all())


def test_a_number_that_is_zero_has_no_relative_error():
    y0 = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    sol = fs.solve(lambda t, y: -y, y0, 0.0, 1.0, solver=solvers.Dopri5(rtol=1e-8, atol=0.0))
    assert float(sol.x[0, 1]) == pytest.approx(np.exp(-1.0), rel=1e-7)


def test_a_guided_evaluation_counts_twice():
    flow = fs.Flow(MIXTURE.flow(paths.CondOT()).net, paths.CondOT(), nfe_per_call=2)
    assert fs.sample(flow, (3, 2), solver=solvers.Heun(), nfe=8).nfe.tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="not a multiple of the 2"):
        fs.sample(flow, (3, 2), solver=solvers.Heun(), nfe=7)


def test_a_network_in_training_mode_that_would_draw_or_mix_is_refused():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(self.layer(x))

    flow = fs.Flow(Net(), paths.CondOT())
    with pytest.raises(ValueError, match=r"layer 'drop' \(Dropout\).*net.eval"):
        fs.sample(flow, (2, 2), solver=solvers.Euler(), nfe=2)
    flow.net.eval()
    fs.sample(flow, (2, 2), solver=solvers.Euler(), nfe=2)


@pytest.mark.parametrize("interval", [(1.0, 0.0), (0.9995, 0.2)])
@pytest.mark.parametrize("solver", [solvers.Dopri5(), solvers.Euler()], ids=["adaptive", "fixed"])
def test_nobody_asks_a_network_beyond_the_times_it_knows(interval, solver):
    flow = MIXTURE.flow(paths.Discrete.linear(), "noise")
    options = {} if solver == solvers.Dopri5() else {"nfe": 4}
    with pytest.raises(ValueError, match="beyond the times it knows"):
        fs.encode(flow, torch.ones(2, 2, dtype=torch.float64), solver=solver, interval=interval, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"solver": solvers.Dopri5(), "grid": "uniform"}, TypeError, "chooses its own steps"),
        ({"shape": 8}, ValueError, "shape = 8; expected"),
        ({"shape": ()}, ValueError, "expected \\(B, \\*S\\)"),
        ({"shape": (2.5, 2)}, ValueError, "expected \\(B, \\*S\\)"),
        ({"dtype": torch.int64}, TypeError, "floating-point dtype"),
        ({"cond": torch.ones(3)}, TypeError, "expected a mapping"),
        ({"shape": None, "start": torch.ones(2, 2), "device": "cpu"}, TypeError, "place fresh noise"),
        ({"shape": None, "start": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "torch.int64"),
        ({"interval": (0.3, 1.0)}, ValueError, "give start= a state at that time"),
    ],
)
def test_bad_arguments_say_what_is_wrong(options, error, words):
    given = {"shape": (2, 2), "solver": solvers.Euler(), **options}
    if isinstance(given["solver"], solvers.Euler):
        given["nfe"] = 4
    with pytest.raises(error, match=words):
        fs.sample(FLOW, **given)


def test_devices_agree(device):
    """One seed, the same samples and densities on every device, to float32 rounding through 40 evaluations."""
    here = fs.sample(FLOW, (16, 2), solver=solvers.DDPM(), nfe=40, device="cpu")
    there = fs.sample(FLOW, (16, 2), solver=solvers.DDPM(), nfe=40, device=device)
    assert there.x.device.type == device.type
    assert (here.x - there.x.cpu()).abs().max() < 1e-4
    x = MIXTURE.sample(8, seed=0).float()
    options = {"solver": solvers.Dopri5(1e-5, 1e-5), "probes": 2}
    a, b = (fs.log_prob(FLOW, x.to(d), **options) for d in ("cpu", device))
    assert (a.log_prob - b.log_prob.cpu()).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "end"), [({"solver": solvers.Heun(), "nfe": 8}, "4/4"), ({"solver": solvers.Dopri5()}, "5/5")]
)
def test_progress_ends_where_the_solve_does(options, end, capfd):
    """Steps of a fixed grid, samples of an adaptive solve."""
    fs.sample(FLOW, (5, 2), progress=True, **options)
    assert end in capfd.readouterr().err
