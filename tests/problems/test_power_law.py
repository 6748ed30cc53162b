"""Power-law fields against dense linear algebra, automatic differentiation and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path
from flowsolve.problems import GaussianMixture, PowerLaw

PATHS: list[Path] = [CondOT(), VP(), VE(), EDM(), Cosine(), Discrete.linear()]
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)
EPS = torch.finfo(torch.float64).eps


def field(**changes: object) -> PowerLaw:
    given: dict[str, object] = {"shape": (3, 4, 5), "slope": 1.3, "noise": 0.01, "dtype": torch.float64, **changes}
    return PowerLaw(**given)  # type: ignore[arg-type]


def mixed() -> PowerLaw:
    return field(slope=[0.7, 1.0, 1.5], contrast=[0.4, 1.0, 1.7], weights=[1.0, 2.0, 1.0])


def states(problem: PowerLaw, path: Path, t: float, n: int = 6) -> Tensor:
    data = problem.sample(n, 1)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(2), dtype=data.dtype)
    return path.interpolate(data, noise, t)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 6, 6), (8, 7), (3, 32, 32)])
def test_the_basis_is_orthonormal(shape: tuple[int, ...]) -> None:
    problem = PowerLaw(shape, dtype=torch.float64)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = problem.forth(x)
    torch.testing.assert_close(problem.back(h), x, rtol=0, atol=100 * EPS * float(x.abs().max()))
    torch.testing.assert_close(h.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=100 * EPS, atol=0)


def test_the_covariance_is_a_filter_in_fourier_space() -> None:
    """cov @ x is a filter of |k|^(−2p) by FFT, times the share of its colour."""
    problem = field(noise=0.0, scale=1.0)
    rows, columns = torch.fft.fftfreq(4, dtype=torch.float64) * 5, torch.fft.fftfreq(5, dtype=torch.float64) * 5
    power = (rows[:, None] ** 2 + columns**2).sqrt().clamp(min=1) ** (-2 * 1.3)
    grey, colour = torch.tensor([1.0, 1.0, 1.0]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    filtered = torch.fft.ifft2(torch.fft.fft2(x) * power).real
    mean = power.mean() * (1 + 2 / 16) / 3
    for tint, share in ((grey, 1.0), (colour, 1 / 16)):
        image = (tint[:, None, None] * x).flatten()
        expected = (tint[:, None, None] * filtered).flatten() * share / mean
        torch.testing.assert_close(problem.cov @ image, expected, rtol=0, atol=1e3 * EPS)


def test_the_scale_is_that_of_the_data() -> None:
    for problem in (field(noise=0.0), mixed()):
        exact = float(problem.cov.diagonal().mean())
        expected = 0.45**2 + (0.01**2 if problem.weights.numel() > 1 else 0.0)
        assert abs(exact - expected) < 1e2 * EPS
    components = mixed().std.square().mean((1, 2, 3)) - 0.01**2
    torch.testing.assert_close((components / components[1]).sqrt(), torch.tensor([0.4, 1.0, 1.7]).double())


@path_cases
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_a_single_field_is_dense_linear_algebra(path: Path, t: float) -> None:
    problem, point = field(), path.at(t)
    x = states(problem, path, t)
    flat, size = x.flatten(1), 60
    marginal = point.alpha**2 * problem.cov + point.sigma**2 * torch.eye(size, dtype=torch.float64)
    gain = point.alpha * torch.linalg.solve(marginal, problem.cov).T
    condition = float(torch.linalg.cond(marginal))
    bound = 100 * size * EPS * condition
    torch.testing.assert_close(problem.data(x, point).flatten(1), flat @ gain.T, rtol=bound, atol=bound)
    score = -torch.linalg.solve(marginal, flat.T).T
    torch.testing.assert_close(
        problem.score(x, point).flatten(1), score, rtol=bound, atol=bound * float(score.abs().max())
    )
    dense = torch.distributions.MultivariateNormal(torch.zeros(size, dtype=torch.float64), marginal)
    torch.testing.assert_close(problem.log_prob(x, point), dense.log_prob(flat), rtol=bound, atol=bound)
    torch.testing.assert_close(problem.trace(x, point), gain.trace().expand(6), rtol=bound, atol=0)


@path_cases
@pytest.mark.parametrize("t", [0.1, 0.6, 0.95])
def test_mixtures_against_automatic_differentiation(path: Path, t: float) -> None:
    problem, point = mixed(), path.at(t)
    x = states(problem, path, t).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.log_prob(x, point).sum(), x)
    largest = float(gradient.abs().max())
    torch.testing.assert_close(problem.score(x, point), gradient, rtol=0, atol=1e-11 * largest)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: problem.data(v[None], point)[0]))(x.detach())
    trace = jacobian.reshape(6, 60, 60).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(problem.trace(x, point), trace, rtol=1e-10, atol=1e-10)
    tweedie = (x + point.sigma**2 * gradient) / point.alpha
    bound = 1e-11 * (1.0 + float(x.detach().abs().max())) / point.alpha
    torch.testing.assert_close(problem.data(x, point), tweedie, rtol=0, atol=bound)
    u = point.alpha_dot * problem.data(x, point) + point.sigma_dot * problem.noise(x, point)
    torch.testing.assert_close(problem.velocity(x, point), u, rtol=1e-9, atol=1e-9 * float(u.detach().abs().max()))


def test_the_trace_of_a_mixture_with_means() -> None:
    means = torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.3, -1.0]], dtype=torch.float64)
    problem = GaussianMixture(means, torch.tensor([0.3, 0.8, 0.1]), [0.5, 0.3, 0.2])
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.0, 0.4, 0.9, 1.0):
        point = CondOT().at(t)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v, p=point: problem.data(v[None], p)[0]))(x)
        trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(problem.trace(x, point), trace, rtol=1e-10, atol=1e-10)


@path_cases
def test_the_flow_map_of_a_field_is_what_a_solve_finds(path: Path) -> None:
    problem, end = field(), 0.9
    x = states(problem, path, 0.2)
    found = fs.sample(problem.flow(path), start=x, solver=fs.solvers.RK4(), nfe=2000, interval=(0.2, end)).x
    exact = problem.flow_map(path, x, 0.2, end)
    assert float(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max()) < 1e-7
    torch.testing.assert_close(problem.flow_map(path, exact, end, 0.2), x, rtol=1e-10, atol=1e-10)


def test_equal_components_have_the_closed_flow_map() -> None:
    """Three components that are one and the same: the solve is held against the closed form, up to clean data."""
    one, many = field(), field(slope=[1.3, 1.3, 1.3])
    for path in (CondOT(), VP(), EDM()):
        x = torch.randn(4, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * path.prior_std
        closed, solved = one.flow_map(path, x), many.flow_map(path, x, tolerance=1e-8)
        assert float(((solved - closed).flatten(1).norm(dim=1) / closed.flatten(1).norm(dim=1)).max()) < 1e-8


def test_the_flow_map_of_a_mixture_transports_and_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, path = mixed(), CondOT()
    x = torch.randn(4, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = problem.flow_map(path, x)
    assert float((problem.flow_map(path, there, 1.0, 0.0) - x).abs().max()) < 1e-7
    found = fs.sample(problem.flow(path), start=x, solver=fs.solvers.Dopri8(1e-10, 1e-10)).x
    assert float((found - there).abs().max()) < 1e-7
    monkeypatch.setattr("flowsolve.problems.power_law.MOST", 128)
    with pytest.raises(ValueError, match=r"tolerance = 0\.0 is not reached"):
        field(slope=[1.0, 2.0], shape=(2, 2)).flow_map(path, x[:1, 0, :2, :2], tolerance=0.0)


def test_moments_of_samples() -> None:
    problem = field(shape=(1, 3, 4), slope=[0.5, 1.5], contrast=[0.5, 1.5])
    x = problem.sample(100_000, seed=3).flatten(1)
    products = torch.einsum("ni,nj->nij", x, x)
    for found, expected in ((x, problem.mean.flatten()), (products, problem.cov)):
        error = found.std(0) / math.sqrt(len(x))
        assert float(((found.mean(0) - expected).abs() / error).max()) < 5.0


@path_cases
@pytest.mark.parametrize("prediction", ["data", "noise", "velocity", "score", "v"])
def test_networks_are_finite_and_agree(path: Path, prediction: str) -> None:
    problem = mixed()
    flow = problem.flow(path, prediction)
    for t in (0.0, 1.0):
        assert bool(flow.call(states(problem, path, t), t).isfinite().all())
    x, point = states(problem, path, 0.5), path.at(0.5)
    data = problem.data(x, point)
    atol = 1e-11 * (1.0 + point.sigma / point.alpha) ** 2 * (1.0 + float(data.abs().max()))
    torch.testing.assert_close(flow.estimate(x, 0.5).data, data, rtol=0, atol=atol)
    times = torch.tensor([0.2, 0.4, 0.5, 0.5, 0.7, 0.9], dtype=torch.float64)
    torch.testing.assert_close(problem.data(x, path.at(times))[2:4], data[2:4], rtol=1e-10, atol=1e-10)


def test_large_fields_in_single_precision() -> None:
    problem = PowerLaw(noise=0.004)
    x = problem.sample(4, 1)
    assert x.shape == (4, 3, 32, 32)
    assert x.dtype == torch.float32
    wide = PowerLaw(noise=0.004, dtype=torch.float64)
    torch.testing.assert_close(
        problem.data(x, VP().at(0.7)).double(), wide.data(x.double(), VP().at(0.7)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": (4,)}, r"shape = \(4,\); expected \(H, W\)"),
        ({"slope": [1.0, 2.0], "contrast": [1.0, 2.0, 3.0]}, "slope has 2 values; expected 1 or 3"),
        ({"contrast": [1.0, 0.0]}, "expected values > 0"),
        ({"slope": math.nan}, "expected finite numbers"),
        ({"scale": 0.0}, r"scale = 0\.0"),
        ({"noise": -1.0}, r"noise = -1\.0"),
        ({"colours": [1.0]}, "expected 3 values"),
        ({"weights": [1.0, 1.0]}, "expected 1 finite values"),
    ],
)
def test_boundary_errors(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        field(**changes)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); expected \(B, 3, 4, 5\)"):
        field().log_prob(torch.zeros(2, 5))
