"""The densities at the noise end against closed forms."""

import math

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.likelihood.prior import marginal_log_prob, normal_log_prob, resolve, stretch
from flowsolve.problems import GaussianMixture
from tests.likelihood.mixtures import MIXTURES, Turned, at_data, bits

TIGHT = solvers.Dopri5(1e-8, 1e-8)


def test_normal():
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.distributions.Normal(*torch.tensor([0.0, 2.5]).double()).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(normal_log_prob(x, 2.5), truth, rtol=1e-12)


def test_marginal_is_exact_for_an_isotropic_normal():
    """At any noise: ε̂ and T of N(m, v) at s written out."""
    mean, v, size = 0.7, 0.36, 6
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha, sigma in ((1.0, 2.0), (0.3, 0.8)):
        var = alpha**2 * v + sigma**2
        noise = sigma * (x - alpha * mean) / var
        trace = torch.full((5, 1), size * sigma**2 / var, dtype=torch.float64)
        truth = (
            torch.distributions.Normal(*torch.tensor([alpha * mean, var**0.5], dtype=torch.float64)).log_prob(x).sum(1)
        )
        assert torch.allclose(marginal_log_prob(noise, trace, sigma)[:, 0], truth, rtol=1e-9)


def test_the_stretch_is_kept_to_where_it_has_a_meaning():
    trace = torch.tensor([[-3.0, 0.0, 4.0, 8.0, 1e9]])
    assert stretch(trace, 8).tolist() == [[2.0, 2.0, 2.0, 1.0, 0.5]]


def at(case, level):
    """log p of states x_t at a log-SNR, from "marginal" alone: the likelihood of an interval next to nothing."""
    path = paths.VE(sigma_min=1e-3, sigma_max=1e4)
    t = path.time(level)
    start = path.time(level + 0.2)
    x = case.sample(16, seed=1) + path.at(start).sigma * torch.randn(16, *case.means.shape[1:]).double()
    options = {"interval": (start, t), "trace": "exact", "prior": "marginal"}
    truth = case.log_prob(x, path.at(start))
    return [
        float((fs.log_prob(case.flow(path), x, **options, **o).log_prob - truth).square().mean().sqrt())
        for o in ({"solver": TIGHT}, {"nfe": 12, "repeats": 0})
    ]


def test_marginal_gains_with_the_noise():
    """Anisotropic data: as 1/s² from one estimate (a Runge–Kutta solver), as 1/s³ or faster from a curve's two."""
    torch.manual_seed(0)
    case = MIXTURES["D=16"]
    near, far = at(case, -math.log(20.0)), at(case, -math.log(200.0))
    assert 1.8 < math.log10(near[0] / far[0]) < 2.2
    assert math.log10(near[1] / far[1]) > 2.8
    assert near[1] < 0.3 * near[0]


def test_marginal_where_the_path_keeps_signal():
    """VP, EDM and a table end at s from 80 to 158; both methods give the data's density, which "normal" misses."""
    for case in (MIXTURES["D=16"], Turned(torch.linspace(0.3, 1.5, 8, dtype=torch.float64))):
        for path in (paths.VP(), paths.EDM(), paths.Discrete.linear()):
            flow = case.flow(path)
            if isinstance(case, GaussianMixture):
                x, truth = at_data(case, path, 6)
            elif path.window[1] < 1.0 or path.at(1.0).sigma or path.at(1.0).alpha != 1.0:
                continue
            else:
                x = case.sample(6)
                truth = case.log_prob(x)
            for method, bound in (({"solver": TIGHT}, 4e-4), ({"nfe": 128}, 3e-5)):
                out = fs.log_prob(flow, x, trace="exact", prior="marginal", **method)
                assert bits(out.log_prob - truth, x).abs().max() < bound


def test_marginal_and_normal_differ_by_the_signal_left():
    """On EDM, s = 80, a mean of 30: the model that one samples from is another than the data's."""
    case = GaussianMixture([[30.0, 30.0]], 0.5, dtype=torch.float64)
    x, truth = at_data(case, paths.EDM(), 4)
    for method in ({"solver": TIGHT}, {"nfe": 96}):
        normal, marginal = (
            fs.log_prob(case.flow(paths.EDM()), x, trace="exact", prior=p, **method).log_prob
            for p in ("normal", "marginal")
        )
        assert (marginal - truth).abs().max() < 1e-4
        assert (normal - truth).abs().min() > 1e-2


def test_a_normal_prior_makes_a_density_of_what_is_sampled():
    """On VP at t = 0 with N(0, 1), for one Gaussian N(m, v): samples are normal, with moments that the ODE tells."""
    case, path = GaussianMixture([[0.8]], 0.6, dtype=torch.float64), paths.VP()
    begin, end = path.at(0.0), path.at(1.0)
    spread = [math.sqrt(p.alpha**2 * 0.36 + p.sigma**2) for p in (begin, end)]
    mean = end.alpha * 0.8 - spread[1] / spread[0] * begin.alpha * 0.8  # (x − αm)/spread is constant along the ODE
    law = torch.distributions.Normal(*torch.tensor([mean, spread[1] / spread[0]], dtype=torch.float64))
    x = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)[:, None]
    for method in ({"solver": TIGHT}, {"nfe": 128}):
        out = fs.log_prob(case.flow(path), x, trace="exact", **method)
        assert (out.log_prob - law.log_prob(x[:, 0])).abs().max() < 1e-4


def test_a_function_of_the_state():
    """Given as such it stands for "normal", where the path ends in noise and where it does not."""
    for path in (paths.CondOT(), paths.VE()):
        x, _ = at_data(MIXTURES["D=2"], path, 4)
        flow = MIXTURES["D=2"].flow(path)
        for method in ({"solver": TIGHT}, {"nfe": 96}):
            own = fs.log_prob(flow, x, trace="exact", prior=lambda y: normal_log_prob(y, path.prior_std), **method)  # noqa: B023
            named = fs.log_prob(flow, x, trace="exact", **method)
            assert (own.log_prob - named.log_prob).abs().max() < 1e-4


def test_names():
    assert resolve(None, 0.0) == "normal"
    assert resolve("marginal", 0.3) == "marginal"
    assert resolve(normal_log_prob, 0.3) is normal_log_prob
    with pytest.raises(
        ValueError, match=r"the interval ends at t = 0.3, .* give prior=…: a function of the state, or 'mar"
    ):
        resolve(None, 0.3)
    with pytest.raises(ValueError, match="prior = 'flat'; expected 'normal', 'marginal' or a function"):
        resolve("flat", 0.0)
