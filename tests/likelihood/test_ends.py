"""Fields that are no conditional expectation: the likelihood is their change of variables, to the very ends."""

import math

import pytest
import torch
from torch import nn

import flowsolve as fs
from flowsolve import paths, solvers
from tests.likelihood.mixtures import MIXTURES, at_data, at_noise, bits

CONDOT = paths.CondOT()
SIZE = 8


def normal(y):
    return (-0.5 * y * y - 0.5 * math.log(2.0 * math.pi)).sum(1)


def points(count=64, size=SIZE):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Random(nn.Module):
    """Two hidden layers with random weights, three times as large as they come."""

    def __init__(self, size=SIZE):
        super().__init__()
        torch.manual_seed(1)
        layers = nn.Linear(size + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, size)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x, t):
        return 3.0 * self.layers(torch.cat([x, t.double().reshape(-1, 1)], 1))


@pytest.mark.parametrize("k", [-1.0, 0.0, 1.0, 2.0])
def test_affine_fields(k):
    """u = k x: x0 = x e^{−k}, log p = log N(x0) − D k, to 1e-5 bits/dim from 192 evaluations, and closer with each."""
    flow, x = fs.Flow(lambda x, t: k * x, CONDOT), points()
    truth = normal(x * math.exp(-k)) - SIZE * k
    off = {n: bits(fs.log_prob(flow, x, nfe=n, trace="exact").log_prob - truth, x).abs().max() for n in (96, 192)}
    assert off[192] < 1e-5
    assert off[192] < off[96] / 3
    backwards = fs.sample_log_prob(flow, start=x * math.exp(-k), nfe=192, trace="exact")
    assert (backwards.x - x).abs().max() < 1e-4
    there = normal(backwards.x * math.exp(-k)) - SIZE * k
    assert bits(backwards.log_prob - there, x).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        (CONDOT, "velocity"), (paths.VP(), "velocity"), (paths.VP(), "noise"), (paths.Trig(), "v"),
        (paths.Cosine(), "v"), (paths.Discrete.linear(), "noise"), (paths.CondOT(sigma_min=1e-3), "velocity"),
    ],
    ids=repr,
)  # fmt: skip
def test_random_networks(path, prediction):
    """1e-5 bits/dim from a tight solve at 192 evaluations; the error covers at every budget."""
    flow, x = fs.Flow(Random(), path, prediction=prediction), points(24)
    truth = fs.log_prob(flow, x, solver=solvers.Dopri5(1e-9, 1e-9), trace="exact").log_prob
    for nfe in (16, 24, 48, 96, 192):
        out = fs.log_prob(flow, x, nfe=nfe, trace="exact")
        off = (out.log_prob - truth).abs()
        assert (off <= 2.0 * out.error + 1e-8).double().mean() >= 0.9
        assert (off <= 4.0 * out.error + 1e-8).double().mean() >= 0.97
    assert bits(off, x).abs().max() < 1e-5


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_the_prior_asked_for_is_the_prior_used(trace):
    """A prior that is not normal, where the path ends in pure noise: u = 0 hands it on as it is."""
    flow, x = fs.Flow(lambda x, t: 0.0 * x, CONDOT), points()

    def prior(x):
        return (torch.log(1.0 / (math.pi * (1.0 + x * x)))).sum(1)

    out = fs.log_prob(flow, x, nfe=96, trace=trace, prior=prior)
    assert (out.latent - x).abs().max() < 1e-6
    assert bits(out.log_prob - prior(x), x).abs().max() < 1e-5


def test_noise_that_the_prediction_does_not_see():
    """A noise prediction tells nothing at α = 0: the prior is the one there, the way to it a line from the nodes."""
    case = MIXTURES["D=16"]
    x, truth = at_data(case, CONDOT, 8)
    for prediction in ("noise", "score"):
        out = fs.log_prob(case.flow(CONDOT, prediction), x, nfe=128, trace="exact", prior=at_noise(case, CONDOT))
        assert out.nfe.tolist() == [128] * 8
        assert bits(out.log_prob - truth, x).abs().max() < 1e-4


def test_the_ends_are_evaluated_and_counted():
    """One evaluation at each end without a log-SNR; none where there is none."""
    for path, ends in ((CONDOT, {0.0, 1.0}), (paths.VP(), set())):
        seen = []
        inner = MIXTURES["D=2"].flow(path)

        def net(x, t, seen=seen, inner=inner):
            seen.append(float(t[0]))
            return inner.net(x, t)

        out = fs.log_prob(fs.Flow(net, path), points(3, 2), nfe=20, trace="exact", verify=False)
        assert len(seen) == 20
        assert out.nfe.tolist() == [20] * 3
        assert (ends == {t for t in seen if t in (0.0, 1.0)}) or path != CONDOT
