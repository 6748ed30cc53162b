"""The comparison of likelihoods: its peers are driven right, and the script runs from end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowsolve as fs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sections(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sections import densities, likelihoods

    return densities, likelihoods


@pytest.mark.parametrize("name", ["mixture 2, straight", "mixture 2, VP"])
def test_peers_that_are_asked_for_accuracy_give_the_closed_form(sections, name):
    """Given the prior that they assume at the noise end, N(0, 1), for the exact marginal there."""
    densities, likelihoods = sections
    from sections.generative import mixture

    problem = densities.PROBLEMS[name]()
    x, flow = problem.x[:16], problem.flow
    latent = fs.encode(flow, x, solver=fs.solvers.Dopri5(1e-10, 1e-10)).x
    made = mixture(2)
    exact = fs.problems.GaussianMixture(made.means, made.variance.sqrt(), made.weights)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1)
    truth = problem.truth[:16] + prior - exact.log_prob(latent, flow.path.at(0.0))
    problem = densities.Density(flow, x, truth, problem.trace, {})
    ways = likelihoods.peers(problem, (1e-7,))
    assert {"score_sde protocol, scipy", "score_sde protocol, torchdiffeq"} <= {w.name for w in ways}
    for way in ways:
        if way.name not in ("flow_matching, euler", "k-diffusion"):
            value, passes, _ = way.run(problem)
            assert problem.bits(value).abs().max() < 1e-4, way.name
            assert passes > 50


def test_k_diffusions_one_probe_is_unbiased(sections):
    densities, likelihoods = sections
    problem = densities.PROBLEMS["mixture 2, straight"]()
    way = next((w for w in likelihoods.peers(problem, (1e-5,)) if w.name == "k-diffusion"), None)
    if way is None:
        pytest.skip("k-diffusion is not installed")
    error = problem.bits(way.run(problem)[0])
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(error))


def test_the_script_from_end_to_end(tmp_path):
    out = tmp_path / "record.json"
    subprocess.run(
        [sys.executable, "likelihood.py", "--quick", "--out", str(out)], cwd=BENCHMARKS, check=True, capture_output=True
    )
    part = json.loads(out.read_text())["parts"]["mixture 2, straight"]
    curves = {row["setting"]: row for row in part["rows"] if row["method"] == "curve"}
    assert set(curves) == {16, 48}
    assert all(row["passes"] == n for n, row in curves.items())
    assert all(aim["met"] for aim in part["targets"])
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", [fs.paths.CondOT(), fs.paths.VP()])
def test_the_trace_in_closed_form_is_that_of_autograd(sections, path, prediction):
    densities, _ = sections
    generator = torch.Generator().manual_seed(0)
    spread = 0.2 + torch.rand(3, 5, generator=generator, dtype=torch.float64)
    exact = fs.problems.GaussianMixture(torch.randn(3, 5, generator=generator, dtype=torch.float64), spread)
    net = densities.Known(exact, path, prediction)
    flow, x = fs.Flow(net, path, prediction), torch.randn(4, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    torch.testing.assert_close(flow.data(x, t), exact.data(x, path.at(t)), rtol=1e-10, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v, t).sum(0), x)
    net(x, t)
    torch.testing.assert_close(net.trace, torch.einsum("ibi->b", jacobian), rtol=1e-9, atol=1e-9)


def test_errors_are_in_bits_of_a_dimension(sections):
    densities, _ = sections
    problem = densities.PROBLEMS["mixture 2, straight"]()
    off = problem.bits(problem.truth + 2.0 * math.log(2.0))
    assert torch.allclose(off, torch.ones_like(off))
