r"""The stochastic exponential solvers keep the marginals: weak orders without sampling, then moments with it.

**For a Gaussian** every estimate is affine in the state, so x at the end is affine in the start and in each normal
that was drawn. One solve of a batch of basis vectors (the origin; the start's; one for each draw) gives all
coefficients, and mean and variance at the end follow exactly, for solvers with a memory too. Uniform steps in λ from −2
to 2.

**For a mixture** on the line a one-step solver is a Markov chain x' = Φ(x, ξ). For a function g, u_N = g and
u_k(x) = E u_{k+1}(Φ(x, ξ)) is carried backwards on a grid of x by Gauss–Hermite quadrature over the step's normals and
a cubic spline; E g(x_N) is then a quadrature over the start. Nothing is random.
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

import flowsolve as fs
from flowsolve.paths import VE, VP, CondOT, Path
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import (
    ERSDE,
    SEEDS,
    DPMSolverPPS,
    Multistep,
    SASolver,
    SDEDPMSolverPP,
    State,
    StochasticHeun,
)  # fmt: skip
from flowsolve.solvers.base import run

LOW, HIGH = -2.0, 2.0


class Basis:
    """In the place of noise: the k-th draw of a solve is the basis vector of sample 2 + k."""

    def __init__(self) -> None:
        self.draws: dict[tuple[float, float], int] = {}

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        k = self.draws.setdefault((t, t_next), len(self.draws))
        xi = torch.zeros_like(like)
        if len(like) > 2:
            xi[2 + k] = 1.0
        return xi


def carried(solver: Any, flow: fs.Flow, x: Tensor, noise: Any, times: list[float]) -> Tensor:
    """x at the last time."""
    grid = [(a, b, solver.evaluations) for a, b in pairwise(times)]
    step, state = solver.on(flow.path, None, grid), State(x, noise=noise)
    for interval in grid:
        state = run(step(state, *interval), lambda query: flow.estimate(query.x, query.t))
    return state.x


def gaussian_moments(solver: Any, problem: GaussianMixture, path: Path, times: list[float]) -> tuple[float, float]:
    """Mean and variance at the end, exactly."""
    flow, probe, noise = problem.flow(path), Basis(), Basis()
    carried(solver, flow, torch.zeros(1, 1, dtype=torch.float64), probe, times)
    basis = torch.zeros(2 + len(probe.draws), 1, dtype=torch.float64)
    basis[1] = 1.0
    ends = carried(solver, flow, basis, noise, times)[:, 0]
    slopes, start = ends[1:] - ends[0], problem.marginal(path, times[0])
    mean = float(ends[0] + slopes[0] * start.mean[0])
    return mean, float(slopes[0] ** 2 * start.cov[0, 0] + slopes[1:].square().sum())


def lambdas(path: Path, steps: int, low: float = LOW, high: float = HIGH) -> list[float]:
    return [path.time(low + (high - low) * i / steps) for i in range(steps + 1)]


GAUSSIAN: list[tuple[Any, float, bool]] = [  # solver, weak order of the variance, whether it is that and no more
    (SDEDPMSolverPP(1), 1, True),
    (SDEDPMSolverPP(2), 2, True),
    (SDEDPMSolverPP(2, rule="exact", eta=0.3), 2, True),
    (SDEDPMSolverPP(2, eta=1.5), 2, False),
    (SDEDPMSolverPP(2, eta=lambda t: 0.5 + t), 2, False),
    (SDEDPMSolverPP(2, form="straight"), 2, True),
    (SDEDPMSolverPP(2, form="noise"), 2, True),
    (SDEDPMSolverPP(3), 2, False),
    (SASolver(1, corrector=1), 2, True),
    (SASolver(2, corrector=1), 2, False),
    (SASolver(3, corrector=3), 2, False),
    (SASolver(2, corrector=0), 2, True),
    (Multistep(2, "data", 1, eta=1.0), 2, False),  # what Auto(eta=1.0) chooses
    (ERSDE(1), 1, True),
    (ERSDE(2), 2, False),
    (ERSDE(3), 2, False),
    (SEEDS(1), 1, True),
    (SEEDS(2, form="data"), 2, True),
    (SEEDS(3), 2, False),
    (DPMSolverPPS(2, eta=1.0), 2, True),
    (DPMSolverPPS(2, eta=0.5), 2, True),
    (StochasticHeun(), 2, True),
    (StochasticHeun(form="straight"), 2, True),
    (StochasticHeun(eta=0.5), 2, True),
]


@pytest.mark.parametrize("path", [CondOT(), VP(), VE()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("solver", "order", "sharp"), GAUSSIAN)
def test_weak_order_for_a_gaussian(path: Path, solver: Any, order: int, sharp: bool) -> None:
    problem = GaussianMixture(torch.tensor([[1.5]], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    end, steps, errors = problem.marginal(path, path.time(HIGH)), (64, 128), []
    for n in steps:
        mean, variance = gaussian_moments(solver, problem, path, lambdas(path, n))
        assert mean == pytest.approx(float(end.mean), abs=1e-12)  # a frozen estimate keeps it exactly
        errors.append(abs(variance / float(end.cov) - 1.0))
    slope = -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    print(f"WEAK {solver!r:.70} {type(path).__name__:8} {slope:.3f} {errors[-1]:.1e}")
    assert errors[-1] < 0.05
    assert slope >= order - 0.2
    assert slope <= order + 0.2 or not sharp


MIXTURE: list[tuple[Any, float]] = [
    (SDEDPMSolverPP(1), 1), (DPMSolverPPS(2, eta=1.0), 1), (StochasticHeun(), 2), (StochasticHeun(form="straight"), 2),
    (StochasticHeun(eta=0.5), 2),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "order"), MIXTURE)
def test_weak_order_for_a_mixture(solver: Any, order: int) -> None:
    """Second moment and E cos(1.5 x) at the end."""
    path, steps = VP(), (12, 24, 48)
    data = [torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [1.2]], 0.6, [0.6, 0.4])]
    problem = GaussianMixture(*data)
    flow, end = problem.flow(path), problem.marginal(path, path.time(HIGH))
    tests = [lambda x: x**2, lambda x: np.cos(1.5 * x)]
    truths = []
    for k in range(2):
        parts = zip(end.weights.tolist(), end.means[:, 0].tolist(), end.std[:, 0].tolist(), strict=True)
        truths.append(
            sum(w * ((m * m + s * s) if k == 0 else math.cos(1.5 * m) * math.exp(-1.125 * s * s)) for w, m, s in parts)
        )
    errors = []
    for n in steps:
        found = chain(solver, flow, problem, lambdas(path, n), tests)
        errors.append([abs(f - v) for f, v in zip(found, truths, strict=True)])
    slopes = -np.polyfit(np.log(steps), np.log(np.array(errors)), 1)[0]
    print(f"WEAK {solver!r:.70} mixture {slopes} {errors[-1]}")
    assert min(slopes) >= order - 0.2, (slopes, errors)
    if order == 2 or isinstance(solver, SDEDPMSolverPP):
        assert min(slopes) <= order + 0.25, (slopes, errors)


def chain(solver: Any, flow: fs.Flow, problem: GaussianMixture, times: list[float], tests: list[Any]) -> list[float]:
    """E g(x) at the end, for each g."""
    path, grid = flow.path, np.linspace(-9.0, 9.0, 721)
    probe = Basis()
    carried(solver, flow, torch.zeros(1, 1, dtype=torch.float64), probe, times[:2])
    nodes, weights = np.polynomial.hermite_e.hermegauss(24 if len(probe.draws) == 1 else 12)
    weights = weights / weights.sum()
    combos = list(product(range(len(nodes)), repeat=len(probe.draws)))
    mass = np.array([np.prod([weights[i] for i in c]) for c in combos])
    x = torch.from_numpy(np.repeat(grid, len(combos)))[:, None]

    class Given:
        """The combination's normals, draw by draw."""

        def __init__(self) -> None:
            self.draws: dict[tuple[float, float], int] = {}

        def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
            k = self.draws.setdefault((t, t_next), len(self.draws))
            return torch.from_numpy(np.tile([nodes[c[k]] for c in combos], len(grid)))[:, None]

    functions: list[Any] = list(tests)
    for a, b in reversed(list(pairwise(times))):
        ahead = carried(solver, flow, x, Given(), [a, b])[:, 0].numpy()
        values = [g(ahead).reshape(len(grid), -1) @ mass for g in functions]
        functions = [CubicSpline(grid, v) for v in values]
    start = problem.marginal(path, times[0])
    x0, w0 = np.polynomial.hermite_e.hermegauss(80)
    found = []
    for g in functions:
        parts = zip(start.weights.tolist(), start.means[:, 0].tolist(), start.std[:, 0].tolist(), strict=True)
        found.append(float(sum(w * (w0 / w0.sum()) @ g(m + s * x0) for w, m, s in parts)))
    return found


@pytest.mark.parametrize(
    "solver", [SDEDPMSolverPP(2), SASolver(2, corrector=2), SEEDS(2, form="data"), StochasticHeun(), ERSDE()], ids=repr
)
def test_sampled_moments(solver: Any) -> None:
    """Mean and covariance of 20,000 samples from pure noise to the data, within five standard errors."""
    data = [torch.tensor(v, dtype=torch.float64) for v in ([[-1.0, 0.5], [1.0, -0.3]], 0.5, [0.6, 0.4])]
    problem, count = GaussianMixture(*data), 20_000
    x = fs.sample(problem.flow(CondOT()), shape=(count, 2), solver=solver, nfe=80, grid="log_snr", seed=1).x.double()
    spread = problem.cov.diagonal().sqrt()
    assert bool(((x.mean(0) - problem.mean).abs() < 5 * spread / math.sqrt(count)).all())
    off = x - problem.mean
    products = off[:, :, None] * off[:, None, :]
    error = (products.mean(0) - problem.cov).abs()
    assert bool((error < 5 * products.std(0) / math.sqrt(count)).all()), error


@pytest.mark.parametrize("solver", [StochasticHeun(), StochasticHeun(form="straight"), SDEDPMSolverPP(1)], ids=repr)
def test_strong_order_on_a_brownian_path(solver: Any) -> None:
    """What solves of one Brownian path at n and 2n steps differ by falls like 1/n: root mean square of 400 samples."""
    data = [torch.tensor(v, dtype=torch.float64) for v in ([[-1.0, 0.5], [1.0, -0.3]], 0.5)]
    problem, path, steps = GaussianMixture(*data), CondOT(), (16, 32, 64, 128)
    start, end = path.time(LOW), path.time(HIGH)
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    common = {"start": path.interpolate(problem.sample(400, seed=1), noise, start), "interval": (start, end)}
    ends = []
    for n in steps:
        times = [start + (end - start) * i / n for i in range(n)] + [end]
        solved = fs.sample(problem.flow(path), solver=solver, grid=times, noise="brownian", seed=5, **common)
        ends.append(solved.x)
    gaps = [float((a - b).square().mean().sqrt()) for a, b in pairwise(ends)]
    assert -np.polyfit(np.log(steps[:-1]), np.log(gaps), 1)[0] == pytest.approx(1.0, abs=0.2), gaps
