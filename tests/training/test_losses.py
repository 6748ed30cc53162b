"""The losses against theory: exact zeros, the identities between targets, and the gradients of the marginal losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flowsolve._batch import per_sample
from flowsolve.flow import Flow
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, Trig
from flowsolve.predictions import PREDICTIONS, SingularEstimate, resolve
from flowsolve.problems import GaussianMixture
from flowsolve.training import cfm_loss, dsm_loss, times, weights

PATHS: list[Path] = [CondOT(), VP(), Cosine(), Trig(), VE(), EDM(), Discrete.linear()]
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point_mass(path: Path, prediction: str, at: float) -> Flow:
    """The exact flow of data that is always `at`: z is known and ε = (x − αz)/σ, nothing is left to chance."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        point = path.at(t)
        row = resolve(prediction).row(point)
        noise = (x - per_sample(point.alpha, x) * at) / per_sample(point.sigma, x)
        a, b = (per_sample(c / row.scale, x) for c in map(torch.as_tensor, row[:2]))
        return a * at + b * noise

    return Flow(net, path, prediction)


@path_cases
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_loss_of_a_point_mass_is_zero(path: Path, prediction: str) -> None:
    flow = point_mass(path, prediction, at=0.7)
    data = torch.full((64, 3), 0.7, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    losses = {"cfm": cfm_loss(flow, data, t=t, generator=rng(), reduction="none")}
    for target in (None, *PREDICTIONS):
        losses[str(target)] = dsm_loss(flow, data, target=target, t=t, generator=rng(), reduction="none")
    point = path.at(t)
    scale = 1.0 + (point.sigma / point.alpha + point.alpha / point.sigma).square()
    scale = scale * (1.0 + point.sigma_dot.square() + point.alpha_dot.square()) * (1.0 + point.sigma**-2)
    for name, loss in losses.items():
        assert float((loss / scale).max()) < 1e-22, name


class Field(nn.Module):
    """A small network whose output at (x, t) is smooth in three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.4, -0.7, 0.3], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c = self.theta
        return torch.tanh(a * x + b * t[:, None]) + c * x.flip(1)


def problem() -> GaussianMixture:
    return GaussianMixture(torch.tensor([[-1.5, 0.5], [1.0, 1.0]], dtype=torch.float64), [0.4, 0.7], [0.6, 0.4])


def mean_gradients(flow: Flow, marginal: str, groups: int = 100, n: int = 1000) -> tuple[Tensor, Tensor]:
    """Gradients of the conditional loss and its marginal counterpart over groups of n draws, each (groups, 3)."""
    mixture, path, theta = problem(), flow.path, flow.net.theta  # type: ignore[union-attr]
    conditional, exact = [], []
    for group in range(groups):
        data, noise = mixture.sample(n, 2 * group), torch.randn(n, 2, generator=rng(2 * group + 1), dtype=torch.float64)
        t = times.uniform(n, rng(10_000 + group)) * 0.9 + 0.05
        if marginal == "velocity":
            loss = cfm_loss(flow, data, t=t, noise=noise)
        else:
            loss = dsm_loss(flow, data, t=t, noise=noise, target=marginal)
        conditional.append(torch.autograd.grad(loss, theta)[0])
        x, point = path.interpolate(data, noise, t), path.at(t)
        truth = getattr(mixture, marginal)(x, point)
        loss = (getattr(flow.estimate(x, t), marginal) - truth).square().mean()
        exact.append(torch.autograd.grad(loss, theta)[0])
    return torch.stack(conditional), torch.stack(exact)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
@pytest.mark.parametrize(
    ("path", "marginal"),
    [(CondOT(), "velocity"), (VP(), "velocity"), (VP(), "score"), (Trig(), "data"), (Trig(), "noise")],
    ids=str,
)
def test_conditional_gradients_are_the_marginal_ones(path: Path, marginal: str, prediction: str) -> None:
    """Regression on what can be drawn has the gradient of regression on what cannot: within 5 standard errors."""
    conditional, exact = mean_gradients(Flow(Field(), path, prediction), marginal)
    difference = conditional - exact
    error = difference.std(0) / math.sqrt(len(difference))
    assert float((difference.mean(0).abs() / error).max()) < 5.0
    assert float((exact.mean(0).abs() / error).median()) > 5.0  # tight enough to see a wrong target


@path_cases
def test_weighted_score_loss_is_the_noise_loss(path: Path) -> None:
    flow = problem().flow(path, "v")
    data = problem().sample(200)
    t = torch.linspace(0.02, 0.98, 200, dtype=torch.float64)
    on_score = dsm_loss(
        flow, data, target="score", weight=weights.sigma_squared, t=t, generator=rng(), reduction="none"
    )
    on_noise = dsm_loss(flow, data, target="noise", t=t, generator=rng(), reduction="none")
    torch.testing.assert_close(on_score, on_noise, rtol=1e-7, atol=1e-12)


@path_cases
def test_targets_differ_by_a_weight_in_t(path: Path) -> None:
    """A combination cẑ + dε̂ is wrong by (d − cσ/α) δε, because αẑ + σε̂ = x is exact."""
    flow = Flow(Field(), path, "noise")
    data = problem().sample(200)
    t = torch.linspace(0.1, 0.9, 200, dtype=torch.float64)
    alpha, sigma, alpha_dot, sigma_dot = path.at(t)
    on_noise = dsm_loss(flow, data, target="noise", t=t, generator=rng(), reduction="none")
    expected = {
        "data": (sigma / alpha).square(),
        "score": 1.0 / sigma.square(),
        "velocity": (sigma_dot - alpha_dot * sigma / alpha).square(),
        "v": (alpha + sigma * sigma / alpha).square(),
    }
    for target, factor in expected.items():
        loss = dsm_loss(flow, data, target=target, t=t, generator=rng(), reduction="none")
        torch.testing.assert_close(loss, factor * on_noise, rtol=1e-6, atol=1e-10)
    loss = cfm_loss(flow, data, t=t, generator=rng(), reduction="none")
    torch.testing.assert_close(loss, expected["velocity"] * on_noise, rtol=1e-6, atol=1e-10)


def test_default_target_is_the_raw_output() -> None:
    for prediction in PREDICTIONS:
        flow = Flow(lambda x, t: torch.zeros_like(x), Cosine(), prediction)
        data, noise, t = problem().sample(50), torch.randn(50, 2, generator=rng(), dtype=torch.float64), 0.3
        point = Cosine().at(t)
        a, b, scale = resolve(prediction).row(point)
        loss = dsm_loss(flow, data, t=t, noise=noise, reduction="none")
        torch.testing.assert_close(loss, ((a * data + b * noise) / scale).square().mean(1))


def test_raw_regression_exists_where_the_estimate_does_not() -> None:
    flow = Flow(lambda x, t: torch.zeros_like(x), CondOT(), "noise")
    data = problem().sample(10)
    assert bool(dsm_loss(flow, data, t=0.0, generator=rng()).isfinite())
    with pytest.raises(SingularEstimate):
        cfm_loss(flow, data, t=0.0)
    with pytest.raises(SingularEstimate, match="does not exist"):
        dsm_loss(flow, data, target="score", t=1.0)


@path_cases
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_drawn_times_never_meet_a_singular_end(path: Path, prediction: str) -> None:
    flow = Flow(lambda x, t: torch.zeros_like(x), path, prediction)
    data = problem().sample(1000)
    for target in (None, *PREDICTIONS):
        assert bool(dsm_loss(flow, data, target=target, generator=rng()).isfinite())
    assert bool(cfm_loss(flow, data, t=times.stratified, generator=rng()).isfinite())


def test_draws_come_from_the_generator_alone() -> None:
    flow = Flow(Field(), VP(), "noise")
    data = problem().sample(20)
    before = torch.get_rng_state()
    first, again, other = (cfm_loss(flow, data, generator=rng(s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert float(first.detach()) == float(again.detach()) != float(other.detach())
    assert cfm_loss(flow, data).shape == ()


def test_reduction_weight_dtype_and_conditions() -> None:
    seen = {}

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        seen.update(cond, dtype=x.dtype, t=t)
        return x

    flow = Flow(net, CondOT(), "velocity", time=lambda t: 1000.0 * (1.0 - t))
    data = torch.randn(6, 1, 2, 2, generator=rng())
    each = cfm_loss(flow, data, t=0.25, generator=rng(), reduction="none", label=torch.arange(6))
    assert each.shape == (6,)
    assert each.dtype == torch.float32 == seen["dtype"]
    torch.testing.assert_close(seen["t"], torch.full((6,), 750.0))
    assert torch.equal(seen["label"], torch.arange(6))
    torch.testing.assert_close(cfm_loss(flow, data, t=0.25, generator=rng()), each.mean())
    weighted = cfm_loss(flow, data, t=0.25, weight=lambda p: p.sigma + p.alpha * 2, generator=rng(), reduction="none")
    torch.testing.assert_close(weighted, 1.25 * each)
    half = cfm_loss(flow, data.half(), t=0.25, generator=rng())
    assert half.dtype == torch.float32


def test_boundary_errors() -> None:
    flow = problem().flow(CondOT())
    data = problem().sample(4)
    with pytest.raises(TypeError, match="dequantised"):
        cfm_loss(flow, data.long())
    with pytest.raises(ValueError, match="reduction"):
        cfm_loss(flow, data, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise has shape"):
        cfm_loss(flow, data, noise=data[:2])
    with pytest.raises(ValueError, match="t has shape"):
        cfm_loss(flow, data, t=torch.rand(3))
    with pytest.raises(ValueError, match="outside the path"):
        cfm_loss(flow, data, t=1.5)
    with pytest.raises(ValueError, match="not known"):
        dsm_loss(flow, data, target="epsilon")


@given(n=st.integers(1, 200), seed=st.integers(0, 1000))
def test_stratified_times(n: int, seed: int) -> None:
    t = times.stratified(n, rng(seed)).sort().values
    assert float(t[0]) > 0.0
    assert float(t[-1]) < 1.0
    torch.testing.assert_close(t.diff(), torch.full((n - 1,), 1.0 / n, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("density", "mean"),
    [(times.uniform, 0.5), (times.stratified, 0.5), (times.logit_normal(0.0, 1.0), 0.5)],
    ids=["uniform", "stratified", "logit_normal"],
)
def test_time_densities(density: times.Density, mean: float) -> None:
    t = density(100_000, rng(3))
    assert t.dtype == torch.float64
    assert 0.0 < float(t.min()) < float(t.max()) < 1.0
    assert abs(float(t.mean()) - mean) < 5.0 * float(t.std()) / math.sqrt(len(t))
    inside = (t < 0.5).double().mean()
    assert abs(float(inside) - 0.5) < 5.0 * 0.5 / math.sqrt(len(t))


def test_logit_normal_is_normal_in_the_logit() -> None:
    logit = torch.logit(times.logit_normal(0.3, 0.8)(100_000, rng(4)))
    assert abs(float(logit.mean()) - 0.3) < 5.0 * 0.8 / math.sqrt(len(logit))
    assert abs(float(logit.std()) - 0.8) < 5.0 * 0.8 / math.sqrt(2 * len(logit))
    with pytest.raises(ValueError, match="std"):
        times.logit_normal(0.0, 0.0)


@path_cases
def test_weights(path: Path) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    point = path.at(t)
    torch.testing.assert_close(weights.likelihood(point), 2.0 * point.sigma.square() * point.log_snr_dot)
    snr = (2.0 * point.log_snr).exp()
    torch.testing.assert_close(weights.min_snr(5.0)(point), snr.clamp_max(5.0) / snr)
    with pytest.raises(ValueError, match="gamma"):
        weights.min_snr(0.0)
