"""Predictions and estimates against the literature's conversions, on every path."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowsolve.paths import EDM, VE, VP, CondOT, Path, Point, SubVP, Trig
from flowsolve.predictions import PREDICTIONS, Estimate, Prediction, Row, SingularEstimate, resolve
from tests.cases import PATHS

NAMES = ("data", "noise", "score", "velocity", "v")
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)

# Inside, the worst-conditioned read is a data prediction at σ = 0.002 (ε̂ = (x − z)/σ) or a noise prediction at
# α = 0.004 or σ = 80: a factor of 10⁴ at most, so rounding of 1e-16 stays below 1e-10 with two digits to spare. At the
# very ends a read that divides by α or σ loses everything; those cases are tests of their own below.
inside = st.floats(0.02, 0.98)
numbers = st.lists(st.floats(-4.0, 4.0), min_size=3, max_size=3)


def output_of(name: str, p: Point, z: Tensor, eps: Tensor) -> Tensor:
    """What a perfect network outputs, as the papers define it (not by the rows under test)."""
    return {
        "data": lambda: z,
        "noise": lambda: eps,
        "score": lambda: -eps / p.sigma,
        "velocity": lambda: p.alpha_dot * z + p.sigma_dot * eps,
        "v": lambda: p.alpha * eps - p.sigma * z,
    }[name]()


def read(name: str, x: Tensor, output: Tensor, point: Point) -> Estimate:
    return Estimate(x, output, point, PREDICTIONS[name].row(point))


def rounding(estimate: Estimate, row: tuple[Any, Any], of_x: float, of_output: float) -> float:
    """What rounding of x and of the output, relative to the largest of the terms they are sums of, makes of a row.

    A few roundings of each coefficient and of the sum, hence 16 units; a factor |k| is that of the read itself, which
    no arithmetic avoids: next to a kink of a table the velocity's determinant is small.
    """
    k_x, k_o = estimate.coefficients(*row)
    return 16 * torch.finfo(torch.float64).eps * (abs(k_x) * of_x + abs(k_o) * of_output)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, extra: float = 0.0) -> None:
    """To the tolerance relative to the size of the tensor: a component may be 0 by cancellation; and `extra` more."""
    assert actual.dtype == expected.dtype
    scale = 1.0 + float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= tolerance * scale + extra


@every_path
@settings(max_examples=25)
@given(t=inside, z=numbers, eps=numbers)
def test_every_pair_of_predictions_converts_and_returns(path: Path, t: float, z: list[float], eps: list[float]) -> None:
    point = path.at(t)
    data, noise = (torch.tensor([v], dtype=torch.float64) for v in (z, eps))
    x = point.alpha * data + point.sigma * noise
    outputs = {name: output_of(name, point, data, noise) for name in NAMES}
    size_z, size_eps = float(data.abs().max()), float(noise.abs().max())
    size_x = point.alpha * size_z + point.sigma * size_eps
    rows = {name: PREDICTIONS[name].row(point) for name in NAMES}
    sizes = {name: (abs(a) * size_z + abs(b) * size_eps) / w for name, (a, b, w) in rows.items()}
    for name in NAMES:
        estimate = read(name, x, outputs[name], point)
        assert_close(estimate.data, data, extra=rounding(estimate, (1.0, 0.0), size_x, sizes[name]))
        assert_close(estimate.noise, noise, extra=rounding(estimate, (0.0, 1.0), size_x, sizes[name]))
        for other in NAMES:
            converted = getattr(estimate, other)
            a, b, w = rows[other]
            made = rounding(estimate, (a / w, b / w), size_x, sizes[name])
            assert_close(converted, outputs[other], extra=made)
            back = read(other, x, converted, point)
            a, b, w = rows[name]
            again = rounding(back, (a / w, b / w), size_x, sizes[other])
            again += abs(back.coefficients(a / w, b / w)[1]) * made
            assert_close(getattr(back, name), outputs[name], extra=again)


@every_path
@pytest.mark.parametrize(("name", "other"), list(product(NAMES, NAMES)))
def test_coefficients_per_sample_equal_those_of_floats(path: Path, name: str, other: str) -> None:
    t = torch.tensor([0.07, 0.31, 0.5, 0.93], dtype=torch.float64)
    point = path.at(t)
    row, other_row = PREDICTIONS[name].row(point), PREDICTIONS[other].row(point)
    blank = torch.zeros(4, 2, dtype=torch.float64)
    together = Estimate(blank, blank, point, row).coefficients(other_row.data, other_row.noise)
    for i, u in enumerate(t.tolist()):
        p = path.at(u)
        r = PREDICTIONS[other].row(p)
        alone = Estimate(blank, blank, p, PREDICTIONS[name].row(p)).coefficients(r.data, r.noise)
        for many, one in zip(together, alone, strict=True):
            value = many[i] if isinstance(many, Tensor) else many
            assert float(value) == pytest.approx(float(one), rel=1e-11, abs=1e-11)


@every_path
@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 2, 3, 3), (4, 1, 2, 2, 2)])
def test_a_batch_with_its_own_times_is_its_samples_one_by_one(path: Path, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, output = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.07, 0.31, 0.5, 0.93], dtype=torch.float64)
    for name in NAMES:
        together = read(name, x, output, path.at(t))
        for i, u in enumerate(t.tolist()):
            alone = read(name, x[i : i + 1], output[i : i + 1], path.at(u))
            for what in NAMES:
                assert getattr(together, what).shape == shape
                assert_close(getattr(together, what)[i : i + 1], getattr(alone, what), 1e-11)


@every_path
@pytest.mark.parametrize("t", [0.03, 0.4, 0.77, 0.97])
def test_velocity_of_a_score_is_the_literatures_formula(path: Path, t: float) -> None:
    """u = (σ² α̇/α − σ̇ σ) score + (α̇/α) x, and its inverse."""
    alpha, sigma, alpha_dot, sigma_dot = path.at(t)
    generator = torch.Generator().manual_seed(2)
    x, score = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    u = (sigma**2 * alpha_dot / alpha - sigma_dot * sigma) * score + (alpha_dot / alpha) * x
    assert_close(read("score", x, score, path.at(t)).velocity, u, 1e-13)
    assert_close(read("velocity", x, u, path.at(t)).score, score, 1e-12)


def probability_flow(path: Path, t: float, x: Tensor, score: Tensor) -> Tensor:
    """dx/dt by the ODEs of Song et al. 2021 (eq. 13) and Karras et al. 2022 (eq. 1), in their own time."""
    if isinstance(path, VP):
        tau = 1.0 - (1.0 - path.tau_min) * t
        beta = path.beta_min + tau * (path.beta_max - path.beta_min)
        integral = path.beta_min * tau + 0.5 * tau**2 * (path.beta_max - path.beta_min)
        g2 = beta * (1.0 - math.exp(-2.0 * integral)) if isinstance(path, SubVP) else beta
        return -(1.0 - path.tau_min) * (-0.5 * beta * x - 0.5 * g2 * score)
    if isinstance(path, VE):
        ratio = path.sigma_max / path.sigma_min
        sigma = path.sigma_min * ratio ** (1.0 - t)
        g2 = sigma**2 * 2.0 * math.log(ratio)
        return 0.5 * g2 * score
    assert isinstance(path, EDM)
    a, b = path.sigma_max ** (1.0 / path.rho), path.sigma_min ** (1.0 / path.rho)
    root = a + t * (b - a)
    dsigma_dt = path.rho * root ** (path.rho - 1.0) * (b - a)
    return dsigma_dt * (-(root**path.rho) * score)


@pytest.mark.parametrize("path", [VP(), SubVP(), VE(), EDM()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_velocity_is_the_probability_flow_ode_of_the_sde(path: Path, t: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x, score = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    assert_close(read("score", x, score, path.at(t)).velocity, probability_flow(path, t, x, score), 1e-12)


def test_a_ddim_step_is_one_combination() -> None:
    """Song et al. 2021 (DDIM), eq. 12 with σ = 0, from ε̂."""
    path = VP()
    here, there = path.at(0.4), path.at(0.6)
    x, eps = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    z = (x - here.sigma * eps) / here.alpha
    step = read("noise", x, eps, here).combine(there.alpha, there.sigma)
    assert_close(step, there.alpha * z + there.sigma * eps, 1e-13)


# --- where the estimate does not exist ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CondOT", "CondOT-sigma_min", "Cosine", "Trig", "Discrete-zero-terminal"])
def test_without_data_in_the_state_noise_and_score_say_nothing_new(name: str) -> None:
    point = PATHS[name].at(0.0)
    assert {n for n in NAMES if PREDICTIONS[n].singular(point)} == {"noise", "score"}


@pytest.mark.parametrize("name", ["CondOT", "Trig", "Discrete", "Discrete-zero-terminal"])
def test_without_noise_in_the_state_a_data_prediction_says_nothing_new(name: str) -> None:
    point = PATHS[name].at(1.0)
    assert {n for n in NAMES if PREDICTIONS[n].singular(point)} == {"data"}


@every_path
def test_inside_no_prediction_is_singular(path: Path) -> None:
    for t in (0.01, 0.5, 0.99, torch.tensor([0.01, 0.99], dtype=torch.float64)):
        assert not any(p.singular(path.at(t)) for p in PREDICTIONS.values())


def test_one_singular_sample_makes_the_batch_singular() -> None:
    point = CondOT().at(torch.tensor([0.5, 0.0]))
    assert PREDICTIONS["noise"].singular(point)
    assert not PREDICTIONS["velocity"].singular(point)


@every_path
def test_velocity_and_v_are_read_at_both_ends(path: Path) -> None:
    """At α = 0 the velocity is α̇ z + σ̇ x/σ, so z is found to the size of σ̇/α̇; that is at most 10⁴ (VP's end)."""
    z, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for t in (0.0, 1.0):
        point = path.at(t)
        x = point.alpha * z + point.sigma * eps
        for name in ("velocity", "v"):
            estimate = read(name, x, output_of(name, point, z, eps), point)
            assert_close(estimate.data, z, 1e-11)
            assert_close(estimate.noise, eps, 1e-11)


@pytest.mark.parametrize("t", [1.0, torch.tensor([0.5, 1.0])])
def test_the_score_of_noiseless_data_is_an_error(t: Any) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(SingularEstimate, match=r"score at σ = 0 does not exist.*ask at t < 1"):
        _ = read("velocity", x, x, CondOT().at(t)).score
    assert issubclass(SingularEstimate, ValueError)


# --- names and rows -------------------------------------------------------------------------------------------------


def test_the_five_predictions_are_named() -> None:
    assert set(PREDICTIONS) == set(NAMES)
    for name in NAMES:
        assert resolve(name) is PREDICTIONS[name]
        assert resolve(PREDICTIONS[name]) is PREDICTIONS[name]


@pytest.mark.parametrize("wrong", ["epsilon", "", 3, None, ["noise"]])
def test_an_unknown_prediction_is_an_error_that_lists_the_names(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"not known; expected one of .*'epsilon' is 'noise'.*'v_prediction' is 'v'"
    ) as e:
        resolve(wrong)
    assert all(name in str(e.value) for name in NAMES)


def test_a_prediction_of_ones_own_is_a_row() -> None:
    """The residual x − z of some denoisers: (α − 1, σ)."""
    residual = Prediction("residual", lambda p: Row(p.alpha - 1.0, p.sigma))
    point = Trig().at(0.3)
    z, eps = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x = point.alpha * z + point.sigma * eps
    estimate = Estimate(x, x - z, point, resolve(residual).row(point))
    assert_close(estimate.data, z, 1e-13)
    assert_close(estimate.noise, eps, 1e-13)


def test_weights_of_zero_and_one_are_exact() -> None:
    """A prediction of what is asked for comes back to the bit."""
    x, o = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(7))
    point = CondOT().at(0.5)
    for name, what in (("data", "data"), ("noise", "noise")):
        assert torch.equal(getattr(read(name, x, o, point), what), o)
