"""Stochastic interpolants: the minimisers of both heads, Schrödinger bridges, and what antithetic draws are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.paths import CondOT, Trig
from flowsolve.training import Objective, bridges, named

F64 = torch.float64
MEAN, STD = 1.3, 0.6


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ends(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Data N(1.3, 0.6²) and a source N(−1, 0.8²)."""
    z, e = torch.randn(2, n, 1, generator=rng(seed), dtype=F64)
    return MEAN + STD * z, -1.0 + 0.8 * e


@pytest.mark.parametrize("bridge", [bridges.Brownian(0.7), bridges.Sine(0.5)], ids=repr)
@pytest.mark.parametrize("path", [CondOT(), Trig()], ids=repr)
def test_the_minimisers_are_the_conditional_means(path: CondOT | Trig, bridge: bridges.Bridge) -> None:
    """All is normal, so E[ẋ | x] and E[ζ | x] are lines; their residuals are orthogonal to 1, x and x²."""
    n = 100_000
    data, source = ends(n)
    flow = Flow(lambda x, t: torch.zeros_like(x), path)
    draw = Objective("velocity", bridge=bridge).draw(flow, data, noise=source, t=0.37, generator=rng(1))
    p = path.at(0.37)
    t = torch.tensor(0.37, dtype=F64)
    gamma, gamma_dot = float(bridge.gamma(t)), float(bridge.gamma_dot(t))
    middle, variance = p.alpha * MEAN - p.sigma, (p.alpha * STD) ** 2 + (p.sigma * 0.8) ** 2 + gamma**2
    off = (draw.x - middle) / variance
    slope = p.alpha_dot * p.alpha * STD**2 + p.sigma_dot * p.sigma * 0.64 + gamma_dot * gamma
    velocity = p.alpha_dot * MEAN - p.sigma_dot + slope * off
    assert draw.bridge is not None
    for target, exact in ((draw.target, velocity), (draw.bridge, gamma * off)):
        for feature in (torch.ones_like(off), off, off.square()):
            product = (target - exact) * feature
            assert abs(float(product.mean())) < 5.0 * float(product.std()) / math.sqrt(n)
    with torch.no_grad():  # the score: −η/γ
        score = -off
        torch.testing.assert_close(-gamma * off / gamma, score)


def test_the_rates_of_bridges() -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=F64)
    for bridge in (bridges.Brownian(1.3), bridges.Sine(0.4)):
        slope = (bridge.gamma(t + 1e-6) - bridge.gamma(t - 1e-6)) / 2e-6
        torch.testing.assert_close(bridge.gamma_dot(t), slope, rtol=1e-6, atol=1e-8)
        assert float(bridge.gamma(torch.tensor(1.0, dtype=F64))) == pytest.approx(0.0, abs=1e-12)


def test_both_heads_and_their_gradients() -> None:
    """The value has no infinite constant, and the gradient is that of the squared error."""
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.3, -0.2))
    flow = Flow(lambda x, t: a * x, CondOT())
    data, source = ends(50)
    loss = named.interpolant(bridges.Brownian(0.5))
    found = torch.autograd.grad(loss(flow, lambda x, t: b * x, data, noise=source, generator=rng(3)), (a, b))
    draw = loss.objective.draw(flow, data, noise=source, generator=rng(3))
    assert draw.bridge is not None
    x = draw.x
    torch.testing.assert_close(found[0], (2.0 * (a * x - draw.target) * x).mean())
    torch.testing.assert_close(found[1], (2.0 * (b * x - draw.bridge) * x).mean())
    assert bool(torch.isfinite(loss(flow, lambda x, t: b * x, data, generator=rng(4))))
    each = loss(flow, lambda x, t: b * x, data, noise=source, generator=rng(3), reduction="none")
    assert each.shape == (50,)


def test_antithetic_draws_remove_the_variance_at_the_ends() -> None:
    """γ̇ζ grows like t^(−1/2); with both signs of ζ the gradient's variance stays bounded."""
    a = torch.tensor(0.3, dtype=F64, requires_grad=True)
    flow = Flow(lambda x, t: torch.sin(x) * a, CondOT())
    data, source = ends(20_000)
    spread, middle = {}, {}
    for antithetic in (False, True):
        objective = Objective("velocity", bridge=bridges.Brownian(1.0), antithetic=antithetic)
        for t in (1e-6, 1e-2):
            draw = objective.draw(flow, data, noise=source, t=t, generator=rng(5))
            error = (a * torch.sin(draw.x) - draw.target) * torch.sin(draw.x)
            each = error.detach().reshape(-1, len(data)).mean(0)
            spread[antithetic, t], middle[antithetic, t] = float(each.std()), float(each.mean())
    assert spread[True, 1e-6] < 0.01 * spread[False, 1e-6]
    assert spread[True, 1e-6] < 3.0 * spread[True, 1e-2]
    se = spread[False, 1e-2] / math.sqrt(len(data))
    assert abs(middle[True, 1e-2] - middle[False, 1e-2]) < 5.0 * se
