"""Weights: the formulas of their sources, and a learned variance that finds the true one."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.paths import VP, CondOT, Trig
from flowsolve.training import Objective, named, times, weights

F64 = torch.float64
POINT = VP().at(torch.linspace(0.05, 0.95, 19, dtype=F64))


def test_formulas_of_the_sources() -> None:
    ratio = (POINT.alpha / POINT.sigma).square()
    torch.testing.assert_close(weights.snr(POINT), ratio)
    torch.testing.assert_close(weights.truncated_snr(POINT), ratio.clamp_min(1.0))
    # Hang et al. 2023: min(SNR, γ) on the data, min(SNR, γ)/SNR on the noise, min(SNR, γ)/(SNR + 1) on v
    for target, expected in (
        ("data", ratio.clamp_max(5.0)),
        ("noise", ratio.clamp_max(5.0) / ratio),
        ("v", ratio.clamp_max(5.0) / (ratio + 1.0)),
    ):
        torch.testing.assert_close(weights.min_snr(5.0, on=target)(POINT), expected, rtol=1e-9, atol=0)
    # Karras et al. 2022, Table 1: (σ² + σ_d²)/(σ σ_d)²
    level = POINT.sigma / POINT.alpha
    torch.testing.assert_close(weights.edm(0.5)(POINT), (level**2 + 0.25) / (level * 0.5) ** 2)
    # diffusers' and SD3's cosmap: 2/(π (1 − 2σ + 2σ²)) with σ the noise's share
    sigma = torch.linspace(0.1, 0.9, 9, dtype=F64)
    found = weights.cosmap(CondOT().at(1.0 - sigma))
    torch.testing.assert_close(found, 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2)))
    both = weights.sigma_squared * weights.snr
    torch.testing.assert_close(both(POINT), POINT.alpha.square())


def test_cosmap_is_a_density_and_a_weight_with_one_product() -> None:
    """As a density with weight 1, and as a weight with uniform times: each integrates the same (SD3's pair)."""
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000

    def mean(t: Tensor, weight: weights.Weight) -> float:
        return float((weight(CondOT().at(t)) * torch.exp(-3.0 * t)).mean())

    drawn = mean(times.cosmap.quantile(u, CondOT()), weights.one)
    assert drawn == pytest.approx(mean(u, weights.cosmap), rel=1e-6)


def test_the_likelihood_weight_bounds_the_likelihood() -> None:
    """½∫g²E‖s_θ − s‖² is the KL's rate: for normal data and a wrong normal model it gives the KL in closed form."""
    path, s, wrong = VP(), 0.6, 1.1
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    point = path.at(u)
    variance, other = (point.alpha**2 * v**2 + point.sigma**2 for v in (s, wrong))
    rate = 0.5 * weights.likelihood(point) * (1.0 / variance - 1.0 / other) ** 2 * variance

    def kl(v: Tensor, w: Tensor) -> Tensor:
        return 0.5 * (v / w - 1.0 - (v / w).log())

    ends = path.at(torch.tensor([0.0, 1.0], dtype=F64))
    at = [kl(ends.alpha**2 * s**2 + ends.sigma**2, ends.alpha**2 * wrong**2 + ends.sigma**2)[i] for i in (0, 1)]
    assert float(rate.mean()) == pytest.approx(float(at[1] - at[0]), rel=1e-5)


def test_a_learned_log_variance_finds_the_error_of_each_level() -> None:
    """At the optimum e^v = E[w‖·‖² | λ]; for data that are 0 and a network that says 0 it is known: E‖σε‖²/… = σ²."""
    torch.manual_seed(0)
    weight = weights.LearnedLogVariance(features=64)
    objective = Objective("velocity", weight=weight)
    path = Trig()
    flow = Flow(lambda x, t: torch.zeros_like(x), path)
    assert len(objective.parameters()) == 2
    optimiser = torch.optim.LBFGS(objective.parameters(), max_iter=60, line_search_fn="strong_wolfe")
    t = times.stratified(2000, torch.Generator().manual_seed(1)) * 0.8 + 0.1
    data = torch.zeros(2000, 100)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = objective(flow, data, t=t, generator=torch.Generator().manual_seed(2))
        value.backward()
        return value.detach()

    optimiser.step(loss)
    where = path.at(torch.linspace(0.15, 0.85, 15, dtype=F64))
    expected = 2.0 * where.sigma_dot.abs().log()  # E‖σ̇ε‖² per dimension
    assert float((weight.log_variance(where).detach() - expected).abs().max()) < 0.1
    again = pickle.loads(pickle.dumps(objective))  # noqa: S301
    torch.testing.assert_close(again.weight(where), weight(where))
    assert named.edm2().parameters()
    assert not named.edm().parameters()


def test_errors() -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        weights.edm(0.0)
    with pytest.raises(ValueError, match="features"):
        weights.LearnedLogVariance(features=0)
    with pytest.raises(TypeError, match="base"):
        weights.LearnedLogVariance(lambda p: p.sigma)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not known"):
        weights.equivalent("epsilon", on="noise")
