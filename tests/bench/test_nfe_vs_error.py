"""The comparison of samplers: its exact networks, its grids, its peers, and the script from end to end."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import flowsolve as fs
from flowsolve.kernels import rms

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sections(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sections import choices, generative, samplers

    return choices, generative, samplers


@pytest.mark.parametrize("dimension", [2, 64])
def test_matrix_products_are_the_mixture(sections, dimension):
    _, generative, _ = sections
    fast = generative.mixture(dimension)
    exact = fs.problems.GaussianMixture(fast.means, fast.variance.sqrt(), fast.weights)
    x = torch.randn(5, dimension, dtype=torch.float64)
    for path in (fs.paths.CondOT(), generative.TABLE):
        for t in (0.0, 0.3, 0.9, path.window[1]):
            point = path.at(t)
            data, noise = fast.estimate(x, point.alpha, point.sigma)
            torch.testing.assert_close(data, exact.data(x, point), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(noise, exact.noise(x, point), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", [fs.paths.CondOT(), fs.paths.Discrete.linear(1000)])
def test_warped_grids_run_from_end_to_end(sections, path):
    choices, _, _ = sections
    for choice in choices.candidates(path):
        for steps in (4, 5, 20):
            times = choice.grid.times(path, 0.0, 1.0, steps)
            assert len(times) == steps + 1
            assert (times[0], times[-1]) == (0.0, 1.0)
            assert all(a < b for a, b in pairwise(times)), choice.name
            assert times[-2] <= path.window[1]


def test_auto_spends_its_budget(sections):
    choices, generative, _ = sections
    for path, prediction in ((fs.paths.CondOT(), "velocity"), (generative.TABLE, "noise")):
        flow = generative.mixture(2).flow(path, prediction)
        for nfe in (3, 4, 5, 6, 8, 10, 14, 16, 50, 100):
            choice = choices.auto(path, nfe)
            found = fs.sample(flow, (2, 2), solver=choice.solver, grid=choice.grid, nfe=nfe, dtype=torch.float64)
            assert found.nfe.tolist() == [nfe, nfe]


def test_peers_find_the_end(sections):
    _, generative, samplers = sections
    for name in ("mixture 2, table", "mixture 2, straight"):
        problem = generative.PROBLEMS[name]()
        start = problem.start[:32]
        few = generative.Problem(problem.flow, start, 512, problem.exact)
        exact, facts = generative.truth(few)
        assert facts["largest"] < 1e-3
        assert facts["median"] < 1e-6
        for peer in samplers.peers(problem.flow):
            if "leading" in peer.grid or peer.grid == "beta" or "PNDM" in peer.sampler:
                continue  # they do not start at the noise; quantiles in σ leave a wide last step
            ask = samplers.Ask(problem.flow, torch.float64)
            x = peer.run(ask, start.clone(), 60)
            assert ask.calls <= 60, peer.name
            assert float((rms(x - exact) / rms(exact)).median()) < 0.1, peer.name


def test_the_script_writes_a_record_and_pictures(tmp_path):
    out = tmp_path / "nfe_vs_error.json"
    command = [sys.executable, str(BENCHMARKS / "nfe_vs_error.py"), "--quick", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 120
    record = json.loads(out.read_text())
    for found in record["problems"].values():
        for row in found["rows"]:
            assert row["ours"]["nfe"] <= row["budget"]
            assert row["auto"]["nfe"] == row["budget"]
            assert math.isfinite(row["ours"]["median"])
        errors = [row["auto"]["median"] for row in found["rows"]]
        assert errors[0] > errors[-1]
    for picture in ("nfe_vs_error.png", "nfe_vs_error-ratios.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
