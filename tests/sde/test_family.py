"""SDE families of flows keep the marginals: of a Gaussian without sampling, of a mixture with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import flowsolve as fs
from flowsolve.paths import VP, CondOT, Path
from flowsolve.problems import GaussianMixture
from flowsolve.sde import SRK, EulerMaruyama, FlowSDE, Scheme, StochasticHeun
from flowsolve.sde.problem import Problem

PATHS = [CondOT(), VP()]
FORMS: list[Any] = [
    (0.5, 1.0), (1.0, 1.0), (lambda t: 1.5 * (1 - t), 1.0), ("sbdm", 0.7), ("constant", 0.4), ("sigma", 1.0),
    ("linear", 0.8), ("decreasing", 0.9), ("increasing-decreasing", 1.2),
]  # fmt: skip
path_cases = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
form_cases = pytest.mark.parametrize(("form", "scale"), FORMS, ids=lambda v: v if isinstance(v, str) else "eta")


def times(path: Path, steps: int) -> list[float]:
    return [path.time(-1.5 + 3.0 * i / steps) for i in range(steps + 1)]


def chain(sde: FlowSDE, scheme: Scheme, nodes: list[float], variance: float) -> float:
    """The variance at the end of a Gaussian's chain, x' = a x + b W + c H with coefficients read off the steps."""
    probes = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    w = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    p = Problem(sde.f, sde.g, probes, "additive", "ito")
    p.begin(nodes[0], probes, scheme.kind)
    for t, t_next in pairwise(nodes):
        (x,) = scheme.step(p, (probes,), t, t_next, (w, w.roll(1, 0)))
        a, b, c = x[:, 0].tolist()
        h = t_next - t
        variance = a * a * variance + b * b * h + c * c * h / 12
    return variance


@path_cases
@form_cases
def test_the_variance_of_a_gaussian_is_kept(path: Path, form: Any, scale: float) -> None:
    problem = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    sde = FlowSDE(problem.flow(path), form, scale)
    start, end = path.time(-1.5), path.time(1.5)
    truth = float(problem.marginal(path, end).cov)
    for scheme, order in ((SRK(), 2.0), (EulerMaruyama(), 1.0), (StochasticHeun(), 2.0)):
        errors = [
            abs(chain(sde, scheme, times(path, n), float(problem.marginal(path, start).cov)) - truth) for n in (64, 128)
        ]
        print(f"FAMILY {type(path).__name__} {form} {scheme!r} {math.log2(errors[0] / errors[1]):.2f} {errors[1]:.1e}")
        assert math.log2(errors[0] / errors[1]) > order - 0.35 or errors[1] < 1e-6
    assert errors[1] < 1e-3 * truth


@path_cases
@form_cases
def test_the_marginals_of_a_mixture_are_kept(path: Path, form: Any, scale: float) -> None:
    """Mean, variance, and the share right of 0, of 4,000 samples: five standard errors of the true moments."""
    law = GaussianMixture(
        torch.tensor([[-1.0], [1.2]], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64), [0.6, 0.4]
    )
    count, nodes = 4000, times(path, 48)
    y0 = law.marginal(path, nodes[0]).sample(count, seed=1)
    sde = FlowSDE(law.flow(path), form, scale)
    x = fs.solve_sde(sde.f, sde.g, y0, nodes[0], nodes[-1], steps=nodes, noise_type="additive", solver=SRK()).x[:, 0]
    end = law.marginal(path, nodes[-1])
    mean, v = float(end.mean), float(end.cov)
    off, s2 = (end.means.flatten() - mean).numpy(), float(end.std[0]) ** 2
    weights = end.weights.numpy()
    fourth = float((weights * (off**4 + 6 * off**2 * s2 + 3 * s2**2)).sum())
    right = float(sum(w * 0.5 * math.erfc(-(m + mean) / math.sqrt(2 * s2)) for w, m in zip(weights, off, strict=True)))
    z = np.array([
        (float(x.mean()) - mean) / math.sqrt(v / count),
        (float(x.var()) - v) / math.sqrt((fourth - v * v) / count),
        (float((x > 0).double().mean()) - right) / math.sqrt(right * (1 - right) / count),
    ])  # fmt: skip
    print(f"FAMILY mixture {type(path).__name__} {form} z {np.round(z, 2)}")
    assert (np.abs(z) < 5).all()


@path_cases
def test_temperature_is_the_variance_of_the_noise(path: Path) -> None:
    """A Gaussian's variance obeys V' = 2 (a − D/v) V + 2 D T, with u = a x and marginal variance v."""
    problem = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    heat, c = 0.3, 2.0
    sde = FlowSDE(problem.flow(path), "sigma", c, temperature=heat)
    nodes = times(path, 2048)
    start = value = float(problem.marginal(path, nodes[0]).cov)

    def slope(t: float, value: float) -> float:
        p = path.at(t)
        v = p.alpha**2 * 0.36 + p.sigma**2
        a = (p.alpha * p.alpha_dot * 0.36 + p.sigma * p.sigma_dot) / v
        return 2 * (a - c * p.sigma / v) * value + 2 * c * p.sigma * heat

    for t, t_next in pairwise(nodes):
        h = t_next - t
        k1 = slope(t, value)
        k2 = slope(t + h / 2, value + h / 2 * k1)
        k3 = slope(t + h / 2, value + h / 2 * k2)
        value += h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(t_next, value + h * k3))
    assert chain(sde, SRK(), times(path, 128), start) == pytest.approx(value, rel=1e-3)
    assert value < 0.9 * float(problem.marginal(path, nodes[-1]).cov)


def test_eta_zero_is_the_ode() -> None:
    law = GaussianMixture(torch.tensor([[-1.0], [1.2]], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64))
    flow, x = law.flow(CondOT()), torch.randn(8, 1, dtype=torch.float64)
    sde = FlowSDE(flow, 0.0)
    ours = fs.solve_sde(sde.f, sde.g, x, 0.0, 1.0, steps=20, noise_type="additive", solver=EulerMaruyama()).x
    ode = fs.sample(flow, start=x, solver=fs.solvers.Euler(), chart="native", nfe=20, grid="uniform").x
    torch.testing.assert_close(ours, ode, rtol=1e-12, atol=1e-12)


def test_names_as_sit_writes_them() -> None:
    flow = GaussianMixture([[0.0]], std=1.0).flow(CondOT())
    assert FlowSDE(flow, "SBDM") == FlowSDE(flow, "sbdm")
    assert FlowSDE(flow, "inccreasing-decreasing").diffusion == "increasing-decreasing"


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda flow: FlowSDE(flow, "sine"), "sbdm, sigma, constant"),
        (lambda flow: FlowSDE(flow, -1.0), "finite number >= 0"),
        (lambda flow: FlowSDE(flow, temperature=math.inf), "temperature = inf"),
        (lambda flow: FlowSDE(flow, 1.0).f(torch.tensor(0.0), torch.zeros(1, 1)), "α = 0; begin inside"),
        (lambda flow: FlowSDE(flow, "constant").f(torch.tensor(1.0), torch.zeros(1, 1)), "σ = 0; end before"),
    ],
)
def test_what_is_refused(call: Callable[[fs.Flow], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(GaussianMixture([[0.0]], std=1.0).flow(CondOT()))
