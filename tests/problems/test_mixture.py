"""The mixture against quadrature, automatic differentiation and torch.distributions, on every path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP, Trig
from flowsolve.predictions import PREDICTIONS, Prediction, Row
from flowsolve.problems import GaussianMixture

PATHS: list[Path] = [
    CondOT(),
    CondOT(sigma_min=0.1),
    VP(),
    SubVP(),
    VE(),
    EDM(),
    Cosine(),
    Trig(),
    Discrete.linear(),
    Discrete.linear(50, beta_end=0.3, clean=False),
]
TIMES = [0.03, 0.31, 0.5, 0.772, 0.97]
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)
time_cases = pytest.mark.parametrize("t", TIMES)


def mixture(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    means = torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.3, -1.0]], dtype=dtype)
    return GaussianMixture(means, torch.tensor([0.3, 0.8, 0.1]), torch.tensor([0.5, 0.3, 0.2]))


def states(problem: GaussianMixture, path: Path, t: float, n: int = 64, seed: int = 1) -> Tensor:
    data = problem.sample(n, seed)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=data.dtype)
    return path.interpolate(data, noise, t)


def test_log_prob_is_that_of_torch_distributions() -> None:
    problem = mixture()
    parts = torch.distributions.Independent(
        torch.distributions.Normal(problem.means, problem.std.expand_as(problem.means)), 1
    )
    reference = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(problem.weights), parts)
    x = problem.sample(50)
    torch.testing.assert_close(problem.log_prob(x), reference.log_prob(x), rtol=1e-12, atol=1e-12)


@path_cases
@time_cases
def test_score_is_the_gradient_of_the_log_density(path: Path, t: float) -> None:
    problem, point = mixture(), path.at(t)
    x = states(problem, path, t).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.log_prob(x, point).sum(), x)
    torch.testing.assert_close(problem.score(x, point), gradient, rtol=1e-10, atol=1e-10)


@path_cases
@time_cases
def test_estimates_agree_with_quadrature(path: Path, t: float) -> None:
    problem = GaussianMixture(torch.tensor([[-1.5], [0.4], [2.0]], dtype=torch.float64), [0.3, 0.6, 0.2])
    point = path.at(t)
    x = states(problem, path, t, n=8)
    z = torch.linspace(-8.0, 8.0, 400_001, dtype=torch.float64)  # the integrand is 0 at both ends: spectral accuracy
    exponent = problem.log_prob(z[:, None]) - 0.5 * ((x - point.alpha * z) / point.sigma).square()
    density = (exponent - exponent.max(1, keepdim=True).values).exp()
    density = density / density.sum(1, keepdim=True)
    data = (density * z).sum(1, keepdim=True)
    noise = (density * (x - point.alpha * z) / point.sigma).sum(1, keepdim=True)
    torch.testing.assert_close(problem.data(x, point), data, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(problem.noise(x, point), noise, rtol=1e-9, atol=1e-9)


@path_cases
@time_cases
def test_data_estimate_is_tweedies_formula(path: Path, t: float) -> None:
    problem, point = mixture(), path.at(t)
    x = states(problem, path, t)
    tweedie = (x + point.sigma**2 * problem.score(x, point)) / point.alpha
    torch.testing.assert_close(
        problem.data(x, point), tweedie, rtol=1e-9, atol=1e-10 * (1.0 + point.sigma) / point.alpha
    )


@path_cases
@time_cases
def test_velocity_from_score_is_the_literature_formula(path: Path, t: float) -> None:
    problem = mixture()
    alpha, sigma, alpha_dot, sigma_dot = point = path.at(t)
    x = states(problem, path, t)
    expected = (sigma**2 * alpha_dot / alpha - sigma_dot * sigma) * problem.score(x, point) + alpha_dot / alpha * x
    atol = 1e-10 * (1.0 + abs(sigma_dot) + abs(alpha_dot) / alpha)
    torch.testing.assert_close(problem.velocity(x, point), expected, rtol=1e-9, atol=atol)


@path_cases
@time_cases
def test_continuity_equation(path: Path, t: float) -> None:
    """∂_t log p + u·∇ log p + div u = 0, with the time derivative taken through the path itself."""
    problem = mixture()
    x = states(problem, path, t, n=16).requires_grad_()
    time = torch.full((len(x),), t, dtype=torch.float64, requires_grad=True)
    point = path.at(time)
    log_prob = problem.log_prob(x, point)
    by_time, score = torch.autograd.grad(log_prob.sum(), (time, x), retain_graph=True)
    velocity = problem.velocity(x, point)
    rows = [torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
    terms = torch.stack((by_time, (velocity * score).sum(1), rows[0], rows[1]))
    residual = terms.sum(0).abs() / (1.0 + terms.abs().sum(0))
    assert float(residual.detach().max()) < 1e-8


@path_cases
@time_cases
def test_every_prediction_gives_the_same_estimate(path: Path, t: float) -> None:
    problem, point = mixture(), path.at(t)
    x = states(problem, path, t, n=32)
    truth = {name: getattr(problem, name)(x, point) for name in ("data", "noise", "velocity", "score")}
    for prediction in PREDICTIONS:
        estimate = problem.flow(path, prediction).estimate(x, t)
        for name, expected in truth.items():
            # the condition of the 2×2 solve: what 1e-10 means where α or σ is small
            scale = float(expected.abs().max()) + (point.sigma / point.alpha + point.alpha / point.sigma) * (
                abs(point.alpha_dot) + abs(point.sigma_dot) + 1.0 if name == "velocity" else 1.0
            )
            torch.testing.assert_close(getattr(estimate, name), expected, rtol=0, atol=1e-10 * scale)


@path_cases
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_are_finite_at_both_ends(path: Path, prediction: str, dtype: torch.dtype) -> None:
    problem = mixture()
    flow = problem.flow(path, prediction)
    for t in (0.0, 1.0):
        x = states(problem, path, t).to(dtype).requires_grad_()
        output = flow.call(x, t)
        assert output.dtype == dtype
        assert bool(output.isfinite().all())
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert bool(gradient.isfinite().all())


def test_limits_at_the_ends() -> None:
    problem, path = mixture(), CondOT()
    x = 3.0 * torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(problem.data(x, path.at(0.0)), problem.mean.expand(10, 2))
    torch.testing.assert_close(problem.noise(x, path.at(0.0)), x)
    torch.testing.assert_close(problem.data(x, path.at(1.0)), x)
    torch.testing.assert_close(problem.noise(x, path.at(1.0)), torch.zeros_like(x))


def test_far_away_points_stay_finite() -> None:
    problem = mixture(torch.float32)
    x = torch.tensor([[1e4, -1e4], [-3e5, 0.0]])
    for t in (0.0, 0.4, 1.0):
        assert bool(problem.flow(CondOT()).velocity(x, t).isfinite().all())


@path_cases
def test_one_time_a_sample(path: Path) -> None:
    problem = mixture()
    t = torch.tensor(TIMES, dtype=torch.float64)
    x = torch.cat([states(problem, path, s, n=1) for s in TIMES])
    flow = problem.flow(path, "v")
    together = flow.estimate(x, t)
    for i, s in enumerate(TIMES):
        alone = flow.estimate(x[i : i + 1], s)
        torch.testing.assert_close(together.velocity[i : i + 1], alone.velocity, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            problem.log_prob(x, path.at(t))[i], problem.marginal(path, s).log_prob(x[i : i + 1])[0]
        )


def test_a_prediction_of_ones_own() -> None:
    problem, path = mixture(), VP()
    mine = Prediction("mine", lambda p: Row(-p.alpha_dot, -p.sigma_dot, 2.0))
    x = states(problem, path, 0.4)
    point = path.at(0.4)
    torch.testing.assert_close(problem.flow(path, mine).velocity(x, 0.4), problem.velocity(x, point))
    torch.testing.assert_close(problem.flow(path, mine).call(x, 0.4), -0.5 * problem.velocity(x, point))


@given(t=st.floats(0.05, 0.95), seed=st.integers(0, 10))
def test_event_shape_does_not_matter(t: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    std = 0.2 + torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    image, flat = GaussianMixture(means, std), GaussianMixture(means.flatten(1), std.flatten(1))
    x = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    point = Trig().at(t)
    torch.testing.assert_close(image.log_prob(x, point), flat.log_prob(x.flatten(1), point))
    torch.testing.assert_close(image.velocity(x, point).flatten(1), flat.velocity(x.flatten(1), point))
    torch.testing.assert_close(image.cov, flat.cov)
    torch.testing.assert_close(image.sample(3, seed).flatten(1), flat.sample(3, seed))


def test_float32_follows_float64() -> None:
    exact, single = mixture(), mixture(torch.float32)
    x = states(exact, VP(), 0.5)
    point = VP().at(0.5)
    torch.testing.assert_close(
        single.velocity(x.float(), point).double(), exact.velocity(x, point), rtol=1e-4, atol=1e-4
    )
    assert single.sample(2).dtype == torch.float32
    torch.testing.assert_close(single.sample(100, 3).double(), exact.sample(100, 3), rtol=1e-5, atol=1e-5)


def five_sigma(samples: Tensor, expected: Tensor) -> None:
    """The mean over samples (n, …) lies within five standard errors of what is expected."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert float(((samples.mean(0) - expected).abs() / error).max()) < 5.0


def second_moments(x: Tensor, mean: Tensor) -> Tensor:
    off = (x - mean).flatten(1)
    return torch.einsum("ni,nj->nij", off, off)


def test_moments_of_samples() -> None:
    problem = mixture()
    x = problem.sample(200_000, seed=5)
    five_sigma(x, problem.mean)
    five_sigma(second_moments(x, problem.mean), problem.cov)
    assert not torch.equal(x, problem.sample(200_000, seed=6))


@pytest.mark.parametrize("path", [CondOT(), VP(), VE(), Discrete.linear()], ids=repr)
@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_moments_of_marginals(path: Path, t: float) -> None:
    problem = GaussianMixture(
        torch.tensor([[-2.0, 0.5], [1.0, 1.5]], dtype=torch.float64), torch.tensor([[0.3, 1.0], [0.5, 0.1]])
    )
    marginal = problem.marginal(path, t)
    x = states(problem, path, t, n=50_000, seed=7)
    five_sigma(x, marginal.mean)
    five_sigma(second_moments(x, marginal.mean), marginal.cov)


def test_boundary_errors() -> None:
    with pytest.raises(ValueError, match="means has shape"):
        GaussianMixture(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="std has shape"):
        GaussianMixture(torch.zeros(3, 2), [1.0, 2.0])
    with pytest.raises(ValueError, match="weights has shape"):
        GaussianMixture(torch.zeros(3, 2), 1.0, [1.0])
    with pytest.raises(ValueError, match="> 0"):
        GaussianMixture(torch.zeros(3, 2), 0.0)
    with pytest.raises(ValueError, match="> 0"):
        GaussianMixture(torch.zeros(3, 2), 1.0, [1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="x has shape"):
        mixture().log_prob(torch.zeros(4, 3))
    assert repr(mixture()) == "GaussianMixture(3 components, event shape (2,))"
