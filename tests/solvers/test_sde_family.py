r"""The SDE family keeps the marginals: moments of its chains without sampling, then with it.

**Moments without sampling.** One step of a chain is x' = a(x) + τ ξ. Its two coefficients are read off the solver's own
step, driven with ξ = 0 and ξ = 1 given. For a function g, u_N = g and u_k(x) = E_ξ u_{k+1}(a_k(x) + τ_k ξ) is carried
backwards on a grid of x by Gauss–Hermite quadrature and a cubic spline, and E g(x_N) = E u_0(x_0) is a quadrature over
the start. Nothing is random, so weak orders are measured to many digits, on a mixture too. For a Gaussian a(x) is
affine, and mean and variance obey m' = A m + b, v' = A² v + τ² exactly.

**Geometry.** The data in the plane are a mixture along one axis e, with a Gaussian across it. All of it is invariant
under rotations, so along e the chain is that of the mixture on the line and across it that of the Gaussian. Its exact
moments are known in the plane too: what sampling should give, and how far (the bias) that is from the truth.

**Bounds.** Sampled means and covariances are compared with the marginal's at five standard errors, those from the true
fourth moments, and the exact bias of the steps taken is shown to be below half of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from torch import Tensor

import flowsolve as fs
from flowsolve import grids
from flowsolve.noise import interval as address
from flowsolve.paths import VE, VP, CondOT, Path, Trig
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import DDIM, DDPM, EstimateSolver, EulerMaruyama, ExactSDE, State
from flowsolve.solvers.base import run

Array = NDArray[np.float64]

MEANS, SPREAD, SHARES = [-1.0, 1.2], 0.6, [0.6, 0.4]
PATHS = [CondOT(), VP(), VE()]
path_cases = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def mixture(dims: int = 1) -> GaussianMixture:
    axis = torch.tensor([[1.0]] if dims == 1 else [[0.6, 0.8]], dtype=torch.float64)
    means = torch.tensor(MEANS, dtype=torch.float64)[:, None] * axis
    return GaussianMixture(means, torch.tensor(SPREAD, dtype=torch.float64), torch.tensor(SHARES, dtype=torch.float64))


def gaussian(mean: float = 0.0, spread: float = SPREAD) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), torch.tensor(spread, dtype=torch.float64))


class Given:
    """In the place of a batch's noise: ξ itself."""

    def __init__(self, xi: Tensor) -> None:
        self.xi = xi

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        return self.xi


def stepper(solver: EstimateSolver, flow: fs.Flow) -> Callable[[Array, float, float], tuple[Array, float]]:
    """x ↦ (a(x), τ) of one step: the solver's own, with the last probe repeated at ξ = 1."""
    advance = solver.on(flow.path, None)

    def step(x: Array, t: float, t_next: float) -> tuple[Array, float]:
        probes = torch.from_numpy(np.append(x, x[-1]))[:, None]
        xi = torch.zeros_like(probes)
        xi[-1] = 1.0
        state = State(probes, noise=Given(xi))  # type: ignore[arg-type]
        out = run(advance(state, t, t_next, 1), lambda query: flow.estimate(query.x, query.t)).x[:, 0].numpy()
        return out[:-1], float(out[-1] - out[-2])

    return step


def linear_moments(
    solver: EstimateSolver, problem: GaussianMixture, path: Path, times: list[float]
) -> tuple[float, float]:
    """Mean and variance of the chain for one Gaussian, exactly, from the marginal at times[0]."""
    step = stepper(solver, problem.flow(path))
    start = problem.marginal(path, times[0])
    mean, variance = float(start.mean), float(start.cov)
    for t, t_next in pairwise(times):
        (b, at_one, at_two), tau = step(np.array([0.0, 1.0, 2.0]), t, t_next)
        a = at_one - b
        assert at_two == pytest.approx(2 * a + b, rel=1e-9, abs=1e-9)  # affine
        mean, variance = a * mean + b, a * a * variance + tau * tau
    return mean, variance


def mixture_moments(solver: EstimateSolver, path: Path, times: list[float]) -> tuple[float, float]:
    """Mean and variance of the chain for the mixture on the line, by the backward recursion."""
    problem = mixture()
    step = stepper(solver, problem.flow(path))
    nodes, weights = np.polynomial.hermite_e.hermegauss(10)
    weights = weights / weights.sum()
    u: Callable[[Array], Array] = lambda x: np.stack((x, x * x), -1)  # noqa: E731
    for t, t_next in zip(times[-2::-1], times[:0:-1], strict=True):
        law = problem.marginal(path, t)
        reach = 7.0 * float(law.std.max())
        grid = np.linspace(float(law.means.min()) - reach, float(law.means.max()) + reach, 201)
        ahead, tau = step(grid, t, t_next)
        values = np.tensordot(weights, u(ahead + tau * nodes[:, None]), 1)
        u = CubicSpline(grid, values)  # quadratics extrapolate well: it is exact for the tails of x and x²
    law = problem.marginal(path, times[0])
    points, share = np.polynomial.hermite_e.hermegauss(80)
    first, second = sum(
        float(w) * np.tensordot(share / share.sum(), u(float(m) + float(s) * points), 1)
        for w, m, s in zip(law.weights, law.means, law.std, strict=True)
    )
    return first, second - first**2


def lambda_grid(path: Path, lo: float, hi: float, steps: int) -> list[float]:
    return [path.time(lo + (hi - lo) * i / steps) for i in range(steps + 1)]


def slope(steps: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


FAMILY: list[EstimateSolver] = [
    DDPM(), ExactSDE(eta=0.5), DDIM(eta=0.5), EulerMaruyama(eta=0.5), EulerMaruyama(eta=1.0), ExactSDE(eta=1.5),
]  # fmt: skip


@path_cases
@pytest.mark.parametrize("solver", FAMILY, ids=repr)
def test_weak_order_one_for_a_gaussian(path: Path, solver: EstimateSolver) -> None:
    """Error of mean and variance from λ = −2 to 2 (both ends finite: Euler–Maruyama has no step at α = 0), exactly."""
    problem, steps = gaussian(mean=1.5, spread=0.5), [128, 256]
    end = problem.marginal(path, path.time(2.0))
    chains = [linear_moments(solver, problem, path, lambda_grid(path, -2.0, 2.0, n)) for n in steps]
    means = [abs(m - float(end.mean)) for m, _ in chains]
    variances = [abs(v - float(end.cov)) for _, v in chains]
    print(f"WEAK {solver!r:24} {type(path).__name__:8} mean {means[-1]:.1e} var {slope(steps, variances):.3f}")
    assert variances[0] < 0.1
    if max(means) > 1e-12:  # a frozen estimate keeps the mean of a Gaussian exactly; so does a linear α (CondOT, VE)
        assert isinstance(solver, EulerMaruyama)
        assert abs(slope(steps, means) - 1) <= 0.2, means
    assert abs(slope(steps, variances) - 1) <= 0.2, variances


@path_cases
@pytest.mark.parametrize("solver", FAMILY, ids=repr)
def test_weak_order_one_for_a_mixture(path: Path, solver: EstimateSolver) -> None:
    steps = [40, 80]
    end = mixture().marginal(path, path.time(1.5))
    chains = [mixture_moments(solver, path, lambda_grid(path, -1.5, 1.5, n)) for n in steps]
    variances = [abs(v - float(end.cov)) for _, v in chains]
    print(f"WEAK mixture {solver!r:24} {type(path).__name__:8} var {slope(steps, variances):.3f} {variances}")
    assert abs(slope(steps, variances) - 1) <= 0.2, variances
    assert max(abs(m - float(end.mean)) for m, _ in chains) < 0.02


def test_the_backward_recursion_agrees_with_the_affine_one() -> None:
    """The check of the check, on the problem both can do."""
    path, solver = VP(), ExactSDE(eta=0.7)
    times = lambda_grid(path, -1.5, 1.5, 40)
    one = GaussianMixture(torch.tensor([[0.4], [0.4]], dtype=torch.float64), 0.6, [0.5, 0.5])
    exact = linear_moments(solver, one, path, times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "mixture", lambda dims=1: one)
        assert mixture_moments(solver, path, times) == pytest.approx(exact, rel=1e-5)


@path_cases
def test_ddim_between_its_ends_follows_the_family_member_of_its_eta(path: Path) -> None:
    """With h = λ_s − λ_t: τ² = η² σ²(1 − e^(−2h)) and σ²(1 − e^(−2η²h)) both are 2η²hσ² + O(h²), as η² g² Δt is."""
    problem, eta = mixture(), 0.6
    ratios = []
    for h in (0.02, 0.01, 0.005):
        t, t_next = path.time(0.3), path.time(0.3 + h)
        x = np.linspace(-2.0, 2.0, 5)
        taus, drifts = [], []
        for solver in (DDIM(eta=eta), ExactSDE(eta=eta), EulerMaruyama(eta=eta)):
            ahead, tau = stepper(solver, problem.flow(path))(x, t, t_next)
            taus.append(tau)
            drifts.append(ahead)
        limit = eta * path.sigma(t) * math.sqrt(2.0 * h)
        assert taus == pytest.approx([limit] * 3, rel=8 * h)
        ratios.append([float(np.abs(d - drifts[1]).max()) for d in (drifts[0], drifts[2])])
    for pair in zip(*ratios, strict=True):  # one-step drifts differ by O(h²)
        assert slope([1, 2, 4], list(pair)) == pytest.approx(2.0, abs=0.2)


# --- one formula, several names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, Trig()], ids=lambda p: type(p).__name__)
def test_the_members_agree_at_eta_0_and_1(path: Path) -> None:
    flow = mixture(2).flow(path)
    start = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * path.prior_std

    def at(solver: EstimateSolver, seed: int = 3) -> Tensor:
        return fs.sample(flow, start=start, solver=solver, nfe=25, grid="log_snr", seed=seed).x

    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(at(DDIM(eta=1.0)), at(DDPM()), **close)
    torch.testing.assert_close(at(ExactSDE(eta=1.0)), at(DDPM()), **close)
    torch.testing.assert_close(at(ExactSDE(eta=0.0)), at(DDIM(eta=0.0)), rtol=0, atol=0)
    torch.testing.assert_close(at(DDIM(eta=0.0), 3), at(DDIM(eta=0.0), 4), rtol=0, atol=0)
    assert (at(DDPM(), 3) - at(DDPM(), 4)).abs().max() > 0.1
    assert (at(DDIM(eta=0.5)) - at(ExactSDE(eta=0.5))).abs().max() > 1e-3  # but differ in between


@pytest.mark.parametrize(
    ("solver", "random"),
    [(DDIM(), False), (DDIM(eta=0.1), True), (DDPM(), True), (ExactSDE(0.0), False), (ExactSDE(2.0), True),
     (EulerMaruyama(0.0), False), (EulerMaruyama(), True)],
    ids=repr,
)  # fmt: skip
def test_a_solver_knows_whether_it_draws(solver: EstimateSolver, random: bool) -> None:
    assert solver.random is random


# --- sampled moments -------------------------------------------------------------------------------------------------

SAMPLES, STEPS = 2000, 224
BIAS = 0.5  # of the steps taken, in standard errors of that many samples
SOLVERS: list[EstimateSolver] = [
    *(DDIM(eta=eta) for eta in (0.0, 0.3, 0.7, 1.0)),
    *(ExactSDE(eta=eta) for eta in (0.3, 0.7, 1.0)),
    *(EulerMaruyama(eta=eta) for eta in (0.0, 0.3, 0.7, 1.0)),
]


def interval(path: Path, steps: int = STEPS) -> tuple[list[float], float, float]:
    """From λ = −1.5 to 1.5; Euler–Maruyama is singular at the noise of CondOT, and σ has no slope at the data of VP."""
    times = lambda_grid(path, -1.5, 1.5, steps)
    return times, times[0], times[-1]


@cache
def start_of(path: Path) -> Tensor:
    """Exact samples of the marginal at the start."""
    return mixture(2).marginal(path, interval(path)[1]).sample(SAMPLES, seed=17)


def truth(path: Path, end: float) -> tuple[Array, Array]:
    """(mean along, mean across, variance along, variance across, covariance) at the end, and their standard errors."""
    law = mixture().marginal(path, end)
    mean, v = float(law.mean), float(law.cov)
    off, s2 = (law.means.flatten() - law.mean).numpy(), float(law.std[0]) ** 2
    fourth = float((law.weights.numpy() * (off**4 + 6 * off**2 * s2 + 3 * s2**2)).sum())
    variances = np.array([v, s2, fourth - v * v, 2 * s2 * s2, v * s2])
    return np.array([mean, 0.0, v, s2, 0.0]), np.sqrt(variances / SAMPLES)


def rotated(x: Tensor) -> Array:
    """The same five moments of samples in the plane."""
    u, v = x.numpy() @ np.array([0.6, 0.8]), x.numpy() @ np.array([-0.8, 0.6])
    return np.array([u.mean(), v.mean(), u.var(), v.var(), ((u - u.mean()) * (v - v.mean())).mean()])


def kept_cases() -> list[Any]:
    """Every solver and η on VP; on the other paths one of each by default, the rest where slow tests are run."""
    brief = [DDIM(eta=0.7), ExactSDE(eta=0.7), EulerMaruyama(eta=0.7), EulerMaruyama(eta=1.0)]
    return [
        pytest.param(
            path, solver, id=f"{type(path).__name__}-{solver!r}",
            marks=() if isinstance(path, VP) or solver in brief else pytest.mark.slow,
        )
        for path in PATHS
        for solver in SOLVERS
    ]  # fmt: skip


@pytest.mark.parametrize(("path", "solver"), kept_cases())
def test_mean_and_covariance_are_kept(path: Path, solver: EstimateSolver) -> None:
    slow = isinstance(path, VE) and isinstance(solver, EulerMaruyama) and solver.eta < 0.5  # σ falls by Euler alone
    times, t0, t1 = interval(path, 512 if slow else STEPS)
    expected, error = truth(path, t1)

    along, across = mixture_moments(solver, path, times), linear_moments(solver, gaussian(), path, times)
    bias = np.array([along[0], across[0], along[1], across[1], 0.0]) - expected
    assert (np.abs(bias) < BIAS * error).all(), bias / error

    x = fs.sample(mixture(2).flow(path), start=start_of(path), interval=(t0, t1), solver=solver, grid=times, seed=23).x
    found = rotated(x)
    z = np.round((found - expected) / error, 2)
    print(f"KEPT {solver!r:24} {type(path).__name__:8} z {z} bias {np.round(bias / error, 2)}")
    assert (np.abs(found - expected) < 5 * error).all(), (found - expected) / error


@pytest.mark.parametrize("solver", [DDIM(), DDIM(eta=0.5), DDPM(), ExactSDE(eta=0.5)], ids=repr)
def test_from_pure_noise_to_pure_data(solver: EstimateSolver) -> None:
    """The frozen-estimate steps reach both singular ends of CondOT exactly: α = 0 and σ = 0.

    Over so wide a range of λ, 128 steps have a bias of 1 to 3 standard errors: it is known, and taken off.
    """
    path, flow = CondOT(), mixture(2).flow(CondOT())
    x = fs.sample(flow, (SAMPLES, 2), solver=solver, nfe=128, grid="log_snr", dtype=torch.float64, seed=5).x
    expected, error = truth(path, 1.0)
    times = grids.LogSNR().times(path, 0.0, 1.0, 128)
    along, across = mixture_moments(solver, path, times), linear_moments(solver, gaussian(), path, times)
    bias = np.array([along[0], across[0], along[1], across[1], 0.0]) - expected
    found = rotated(x)
    print(f"ENDS {solver!r:24} z {np.round((found - expected) / error, 2)} bias {np.round(bias / error, 2)}")
    assert (np.abs(found - expected - bias) < 5 * error).all()
    assert (np.abs(bias) < 4 * error).all()


def test_a_wrong_amount_of_noise_would_be_noticed() -> None:
    """The power of the test above: fresh noise added without taking ε̂ back misses the bound."""

    class Louder(DDPM):
        def step(self, path: Path, state: State, t: float, t_next: float) -> Any:
            after = yield from super().step(path, state, t, t_next)
            assert state.noise is not None
            extra = 0.15 * path.sigma(t_next) * state.noise.normal(1, address(t), after.x)
            return State(after.x + extra, after.noise)

    path = VP()
    times, t0, t1 = interval(path)
    expected, error = truth(path, t1)
    flow, start = mixture(2).flow(path), start_of(path)
    x = fs.sample(flow, start=start, interval=(t0, t1), solver=Louder(), grid=times, seed=23).x
    assert (np.abs(rotated(x) - expected) > 5 * error).any()
