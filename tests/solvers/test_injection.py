r"""Ancestral steps and churn: the updates of their sources, exact moments, and what they converge to.

**Moments.** For a Gaussian a step of either wrapper is affine in the state and in ξ, x' = A x + b + τ ξ. The three
numbers are read off the solver's own step (ξ = 0, and ξ = 1 at one probe), so mean and variance of a chain are exact.
Both wrappers keep the marginals as well as the inner solver does: the variance's error falls with the order of the
inner solver, and vanishes where that is exact.

**The process.** Marginals do not tell one member of the SDE family from another; the covariance of a chain's end with
its start does. For data of variance s² and v = α²s² + σ² the drift of the member η is (v'/2 − η²σ²λ')/v, hence

$$ \frac{\mathrm{Cov}(x_1, x_0)}{\mathrm{Var}(x_0)}
   = \sqrt{\frac{v_1}{v_0}}\exp\Bigl(-\eta^2\int\frac{d\lambda}{1+s^2e^{2\lambda}}\Bigr). $$
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.charts import resolve
from flowsolve.noise import Noise
from flowsolve.paths import EDM, VE, VP, CondOT, Discrete, Path
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import (
    DDIM,
    DDPM,
    RK4,
    Dopri5,
    Dopri8,
    DPMSolverPP,
    DPMSolverPPS,
    Euler,
    EulerMaruyama,
    Heun,
    Solver,
    State,
)  # fmt: skip
from flowsolve.solvers.base import run
from flowsolve.solvers.bridges import Torchdiffeq
from flowsolve.solvers.injection import Ancestral, Churn

PATHS = [CondOT(), VP(), VE()]
path_cases = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
MEAN, SPREAD = 1.5, 0.5


def mixture(dims: int = 2) -> GaussianMixture:
    axis = torch.tensor([[1.0]] if dims == 1 else [[0.6, 0.8]], dtype=torch.float64)
    means = torch.tensor([-1.0, 1.2], dtype=torch.float64)[:, None] * axis
    return GaussianMixture(means, torch.tensor(0.6, dtype=torch.float64), torch.tensor([0.6, 0.4]))


def gaussian() -> GaussianMixture:
    return GaussianMixture(torch.tensor([[MEAN]], dtype=torch.float64), torch.tensor(SPREAD, dtype=torch.float64))


def lambda_grid(path: Path, lo: float, hi: float, steps: int) -> list[float]:
    return [path.time(lo + (hi - lo) * i / steps) for i in range(steps + 1)]


def states(path: Path, t: float, count: int = 6) -> Tensor:
    return mixture().marginal(path, t).sample(count, seed=4)


class Given:
    """In the place of a batch's noise: ξ itself."""

    def __init__(self, xi: Tensor) -> None:
        self.xi = xi

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        return self.xi


def advance(solver: Solver, flow: fs.Flow, x: Tensor, t: float, t_next: float, xi: Tensor, chart: str | None) -> Tensor:
    """One full step, driven by hand."""
    step = solver.on(flow.path, None if chart is None else resolve(chart))
    state = State(x, noise=Given(xi))  # type: ignore[arg-type]
    out: State = run(step(state, t, t_next, solver.evaluations), lambda query: flow.estimate(query.x, query.t))
    return out.x


def chain(solver: Solver, path: Path, times: list[float], chart: str | None = None) -> tuple[float, float, float]:
    """Mean and variance at the end, from the marginal at the start, and Cov(end, start)/Var(start)."""
    problem = gaussian()
    flow, start = problem.flow(path), problem.marginal(path, times[0])
    mean, variance, memory = float(start.mean), float(start.cov), 1.0
    for t, t_next in pairwise(times):
        x = torch.tensor([[0.0], [1.0], [2.0], [2.0], [0.0]], dtype=torch.float64)
        xi = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0]], dtype=torch.float64)
        b, at_one, at_two, moved, twice = advance(solver, flow, x, t, t_next, xi, chart)[:, 0].tolist()
        a, tau = at_one - b, moved - at_two
        assert at_two == pytest.approx(2 * a + b, rel=1e-9, abs=1e-9)  # affine in x
        assert twice == pytest.approx(b + 2 * tau, rel=1e-9, abs=1e-9)  # and in ξ
        mean, variance, memory = a * mean + b, a * a * variance + tau * tau, a * memory
    return mean, variance, memory


def remembered(path: Path, t0: float, t1: float, eta: float) -> float:
    """Cov(x_1, x_0)/Var(x_0) of the member η."""
    integrals, variances = [], []
    for t in (t0, t1):
        p = path.at(t)
        variances.append(p.alpha**2 * SPREAD**2 + p.sigma**2)
        integrals.append(p.log_snr - 0.5 * math.log1p(SPREAD**2 * math.exp(2.0 * p.log_snr)))
    return math.sqrt(variances[1] / variances[0]) * math.exp(-(eta**2) * (integrals[1] - integrals[0]))


def slope(steps: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# --- Ancestral: one formula, several names ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, EDM(), Discrete.linear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("inner", "chart"), [(DDIM(), None), (Euler(), None), (Euler(), "straight"), (Euler(), "noise"), (Euler(), "data")]
)
def test_around_an_euler_step_it_is_ddim(path: Path, eta: float, inner: Solver, chart: str | None) -> None:
    flow, times = mixture().flow(path, "noise"), lambda_grid(path, -2.0, 2.5, 9)
    start = states(path, times[0])
    common: dict[str, Any] = {"start": start, "interval": (times[0], times[-1]), "grid": times, "seed": 3}
    ours = fs.sample(flow, solver=Ancestral(inner, eta), chart=chart, **common)
    theirs = fs.sample(flow, solver=DDIM(eta), **common)
    assert ours.nfe.tolist() == theirs.nfe.tolist() == [9] * len(start)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inner", [DDIM(), Euler()], ids=repr)
def test_around_an_euler_step_it_is_ddim_from_pure_noise_to_pure_data(inner: Solver) -> None:
    """At α = 0 the step goes to the data and back, at σ = 0 it draws nothing."""
    flow = mixture().flow(CondOT())
    for eta in (0.5, 1.0):
        ours = fs.sample(flow, (5, 2), solver=Ancestral(inner, eta), nfe=8, seed=1, dtype=torch.float64)
        theirs = fs.sample(flow, (5, 2), solver=DDIM(eta), nfe=8, seed=1, dtype=torch.float64)
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inner", [Euler(), Heun(), RK4()], ids=repr)
@pytest.mark.parametrize("make", [lambda s: Ancestral(s, eta=0.0), lambda s: Churn(s, churn=0.0)], ids=["eta", "gamma"])
def test_without_noise_it_is_the_inner_solver(inner: Solver, make: Callable[[Solver], Solver]) -> None:
    flow, start = mixture().flow(CondOT()), states(CondOT(), 0.0)
    alone, around = (fs.sample(flow, start=start, solver=s, nfe=24) for s in (inner, make(inner)))
    assert torch.equal(alone.x, around.x)
    back = [fs.encode(flow, alone.x, solver=s, nfe=24).x for s in (inner, make(inner))]
    assert torch.equal(back[0], back[1])


# --- EDM ------------------------------------------------------------------------------------------------------------

SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 20.0, 7.0


def karras(steps: int) -> list[float]:
    """Equation 5 of Karras et al. 2022, without the final 0."""
    a, b = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(a + i / (steps - 1) * (b - a)) ** RHO for i in range(steps)]


def normals() -> Tensor:
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def denoise(x: Tensor, sigma: float) -> Tensor:
    """D(x; σ) = E[z | z + σε = x] of the mixture, written out."""
    problem = mixture()
    off = x[:, None] - problem.means
    variance = 0.6**2 + sigma**2
    share = (problem.weights.log() - 0.5 * off.square().sum(2) / variance).softmax(1)
    return (share[..., None] * (problem.means + 0.6**2 / variance * off)).sum(1)


def algorithm(
    x: Tensor,
    levels: list[float],
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    xi: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Algorithm 2 of Karras et al. 2022 with σ(t) = t and s(t) = 1; with churn = 0 it is algorithm 1."""
    steps = len(levels) - 1
    for i, (t, t_next) in enumerate(pairwise(levels)):
        gamma = min(churn / steps, math.sqrt(2.0) - 1.0) if s_min <= t <= s_max else 0.0
        raised = t + gamma * t
        if gamma:
            assert xi is not None
            x = x + math.sqrt(raised**2 - t**2) * s_noise * xi(i)
        d = (x - denoise(x, raised)) / raised
        ahead = x + (t_next - raised) * d
        if t_next:
            d_next = (ahead - denoise(ahead, t_next)) / t_next
            ahead = x + (t_next - raised) * (0.5 * d + 0.5 * d_next)
        x = ahead
    return x


EDM_PATHS = [EDM(SIGMA_MIN / 2, 3.0 * SIGMA_MAX), VE(SIGMA_MIN / 2, 3.0 * SIGMA_MAX), VP(), CondOT()]
edm_cases = pytest.mark.parametrize("path", EDM_PATHS, ids=lambda p: type(p).__name__)


@edm_cases
@pytest.mark.parametrize("churn", [0.0, 3.0, 30.0])
def test_heun_in_the_noise_chart_is_edm_s(path: Path, churn: float) -> None:
    """Algorithms 1 and 2 up to the last σ > 0, on any path, in the coordinates x/α."""
    levels = karras(12)
    times = [path.time(-math.log(s)) for s in levels]
    solver: Solver = Heun()
    if churn:
        solver = Churn(Heun(), churn, s_min=0.05, s_max=10.0, s_noise=1.003)
    x = mixture().sample(6, seed=2) + SIGMA_MAX * normals()
    ours = fs.sample(
        mixture().flow(path), start=path.alpha(times[0]) * x, interval=(times[0], times[-1]), solver=solver, grid=times,
        chart="noise", seed=7,
    )  # fmt: skip
    noise = Noise.of(7, 6)
    expected = algorithm(
        x, levels, churn, 0.05, 10.0, 1.003, lambda i: noise.step(times[i], times[i + 1], x)
    )  # fmt: skip
    assert ours.nfe.tolist() == [22] * 6
    torch.testing.assert_close(ours.x / path.alpha(times[-1]), expected, rtol=1e-9, atol=1e-9)


@edm_cases
@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_edm_s_last_step_is_one_evaluation(path: Path, churn: float) -> None:
    """The step to σ = 0 is Euler's, which is ẑ: final="denoise". It is not among the steps that share out the churn."""
    levels = karras(12)
    solver: Solver = Churn(Heun(), gamma=churn / 12, s_min=0.05) if churn else Heun()
    x = mixture().sample(6, seed=2) + SIGMA_MAX * normals()
    times = [path.time(-math.log(s)) for s in levels]
    ours = fs.sample(
        mixture().flow(path), start=path.alpha(times[0]) * x, interval=(times[0], times[-1]), solver=solver, grid=times,
        chart="noise", final="denoise", seed=7,
    )  # fmt: skip
    noise = Noise.of(7, 6)
    expected = algorithm(
        x, [*levels, 0.0], churn, s_min=0.05, xi=lambda i: noise.step(times[i], times[i + 1], x)
    )  # fmt: skip
    assert ours.nfe.tolist() == [2 * 12 - 1] * 6
    torch.testing.assert_close(ours.x, expected, rtol=1e-9, atol=1e-9)


def test_churn_goes_no_further_than_the_path() -> None:
    """From the noisiest point nothing is added; from near it, as much as leads there."""
    path, flow = VE(), mixture().flow(VE())
    x, xi = states(path, 0.0), torch.ones(6, 2, dtype=torch.float64)
    solver, plain = Churn(Heun(), gamma=0.4), Heun()
    here = advance(solver, flow, x, 0.0, 0.1, xi, "noise")
    assert torch.equal(here, advance(plain, flow, x, 0.0, 0.1, xi, "noise"))
    t = path.time(-math.log(45.0))
    raised = x + math.sqrt(50.0**2 - 45.0**2) * xi
    torch.testing.assert_close(
        advance(solver, flow, x, t, 0.1, xi, "noise"), advance(plain, flow, raised, 0.0, 0.1, xi, "noise")
    )


def test_churn_from_pure_noise_adds_none() -> None:
    flow = mixture().flow(CondOT())
    x, xi = states(CondOT(), 0.0), torch.ones(6, 2, dtype=torch.float64)
    here = advance(Churn(Heun(), gamma=0.4), flow, x, 0.0, 0.1, xi, None)
    assert torch.equal(here, advance(Heun(), flow, x, 0.0, 0.1, xi, None))


def test_a_step_to_the_last_time_of_a_path_draws_nothing() -> None:
    path, flow = VE(), mixture().flow(VE())
    t = path.time(-math.log(0.03))
    x = states(path, t)
    outs = [advance(Ancestral(Heun()), flow, x, t, 1.0, xi * torch.ones_like(x), "noise") for xi in (0.0, 1.0)]
    assert torch.equal(outs[0], outs[1])


# --- the marginals ---------------------------------------------------------------------------------------------------


@path_cases
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Ancestral(DDIM(), 0.5), 1), (Ancestral(Heun(), 0.5), 2), (Ancestral(Heun(), 1.0), 2),
        (Ancestral(DPMSolverPPS(2), 0.7), 2), (Ancestral(RK4(), 1.0), 4),
    ],
    ids=repr,
)  # fmt: skip
def test_the_variance_has_the_order_of_the_inner_solver(path: Path, solver: Solver, order: int) -> None:
    steps = [24, 36, 54] if order > 2 else [48, 72, 108]
    truth = gaussian().marginal(path, path.time(1.5))
    found = [chain(solver, path, lambda_grid(path, -1.5, 1.5, n)) for n in steps]
    errors = [abs(v - float(truth.cov)) for _, v, _ in found]
    print(f"WEAK {solver!r:60} {type(path).__name__:8} {slope(steps, errors):.2f} {errors}")
    assert slope(steps, errors) == pytest.approx(order, abs=0.25), errors


@path_cases
@pytest.mark.parametrize(("inner", "order"), [(Euler(), 1), (Heun(), 2)], ids=repr)
def test_the_variance_has_the_order_of_the_inner_solver_with_churn(path: Path, inner: Solver, order: int) -> None:
    """With γ = h/2, so that the noise of a step shrinks with it."""
    steps = [48, 72, 108]
    truth = gaussian().marginal(path, path.time(1.5))
    errors = []
    for n in steps:
        _, v, _ = chain(Churn(inner, gamma=1.5 / n), path, lambda_grid(path, -1.5, 1.5, n))
        errors.append(abs(v - float(truth.cov)))
    assert slope(steps, errors) == pytest.approx(order, abs=0.25), errors


@path_cases
@pytest.mark.parametrize(
    "make",
    [lambda s: Ancestral(s, 1.0), lambda s: Ancestral(s, 0.3), lambda s: Churn(s, gamma=0.4)],
    ids=["eta=1", "eta=0.3", "churn"],
)
def test_an_exact_inner_solver_keeps_the_marginals_in_few_steps(path: Path, make: Callable[[Solver], Solver]) -> None:
    """Six steps of order 8 with much noise: nothing but the inner solver's error is left."""
    times = lambda_grid(path, -1.5, 1.5, 6)
    mean, variance, _ = chain(make(Dopri8(adaptive=False)), path, times)
    truth = gaussian().marginal(path, times[-1])
    assert mean == pytest.approx(float(truth.mean), rel=1e-6)
    assert variance == pytest.approx(float(truth.cov), rel=1e-6)


@path_cases
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_both_converge_to_the_member_of_the_family(path: Path, eta: float) -> None:
    """The end's covariance with the start, for Ancestral(η) and for churn with γ = η² h."""
    truth = remembered(path, path.time(-1.5), path.time(1.5), eta)
    steps = [64, 128, 256]
    for kind in ("ancestral", "churn"):
        errors = []
        for n in steps:
            solver = Ancestral(Heun(), eta) if kind == "ancestral" else Churn(Heun(), gamma=eta**2 * 3.0 / n)
            errors.append(abs(chain(solver, path, lambda_grid(path, -1.5, 1.5, n))[2] - truth))
        print(f"STRONG {kind} eta={eta} {type(path).__name__} {errors}")
        assert errors[-1] < 2e-2 * truth
        assert slope(steps, errors) > 0.8, errors


SAMPLES = 4000


@pytest.mark.parametrize(
    ("solver", "chart"),
    [(Ancestral(Heun(), 1.0), "noise"), (Ancestral(Heun(), 0.5), None), (Churn(Heun(), gamma=0.2), "noise"),
     (Churn(Heun(), 4.0, s_min=0.5, s_max=2.0), None)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("path", [CondOT(), VP()], ids=lambda p: type(p).__name__)
def test_mean_and_covariance_of_a_mixture_are_kept(path: Path, solver: Solver, chart: str | None) -> None:
    """Samples from the marginal at λ = −1.5 to 1.5, against the exact moments at five standard errors."""
    problem, times = mixture(), lambda_grid(path, -1.5, 1.5, 40)
    start = problem.marginal(path, times[0]).sample(SAMPLES, seed=17)
    x = fs.sample(
        problem.flow(path), start=start, interval=(times[0], times[-1]), solver=solver, grid=times, chart=chart, seed=23
    ).x
    law = problem.marginal(path, times[-1])
    off = x - law.mean
    products = off[:, :, None] * off[:, None, :]
    for found, expected in ((x, law.mean), (products, law.cov)):
        z = (found.mean(0) - expected) / (found.std(0) / math.sqrt(SAMPLES))
        assert z.abs().max() < 5.0, z


@pytest.mark.parametrize("solver", [Ancestral(Heun()), Ancestral(Heun(), 0.5), Churn(Heun(), 6.0)], ids=repr)
def test_from_pure_noise_to_pure_data(solver: Solver) -> None:
    """Both singular ends of CondOT in the straight chart; the noise is drawn by its address, so batches agree."""
    problem, flow = mixture(), mixture().flow(CondOT())
    x = fs.sample(flow, (SAMPLES, 2), solver=solver, nfe=120, grid="log_snr", dtype=torch.float64, seed=5).x
    z = (x.mean(0) - problem.mean) / (x.std(0) / math.sqrt(SAMPLES))
    assert z.abs().max() < 5.0, z
    torch.testing.assert_close(x.T.cov(), problem.cov, rtol=0.08, atol=0.03)
    few = fs.sample(flow, (7, 2), solver=solver, nfe=120, grid="log_snr", dtype=torch.float64, seed=5).x
    torch.testing.assert_close(few, x[:7], rtol=1e-12, atol=1e-12)


# --- what it costs, and what is refused ------------------------------------------------------------------------------


def churned(inner: Any) -> Churn:
    return Churn(inner, 3.0)


@pytest.mark.parametrize("wrap", [Ancestral, churned])
@pytest.mark.parametrize("inner", [Euler(), Heun(), RK4(), DDIM()], ids=repr)
def test_every_budget_is_spent_to_the_last_evaluation(wrap: Callable[[Solver], Solver], inner: Solver) -> None:
    solver, calls = wrap(inner), 0
    assert solver.evaluations == inner.evaluations
    assert [solver.asks_at_end(n) for n in (1, inner.evaluations)] == [
        inner.asks_at_end(n) for n in (1, inner.evaluations)
    ]

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x

    for path in (CondOT(), Discrete.linear()):
        for nfe in range(2, 12):
            calls = 0
            assert solver.schedule(nfe) == inner.schedule(nfe)
            sol = fs.sample(fs.Flow(net, path), (2, 3), solver=solver, nfe=nfe)
            assert sol.nfe.tolist() == [nfe] * 2 == [calls] * 2
            assert bool(torch.isfinite(sol.x).all())


@pytest.mark.parametrize("wrap", [Ancestral, churned])
def test_what_it_does_not_go_around(wrap: Callable[[Any], Solver]) -> None:
    for inner, word in [
        (DPMSolverPP(2), "multistep"), (DDPM(), "draws noise"), (DDIM(eta=0.1), "draws noise"),
        (wrap(Heun()), "draws noise"), (EulerMaruyama(), "draws noise"),
        (Dopri5(rtol=1e-3, atol=1e-3), "adaptive=False"),
        (Torchdiffeq("dopri5", rtol=1e-3, atol=1e-3), "chooses its own steps"), (Heun, "expected a solver"),
        ("heun", "expected a solver"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=word):
            wrap(inner)


def test_arguments_out_of_range() -> None:
    for options, word in [
        ({"gamma": -0.1}, "gamma = -0.1"), ({"gamma": math.inf}, "gamma"), ({"s_noise": 0.0}, "s_noise"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_min = 2.0"), ({"s_min": -1.0}, "s_min"), ({"churn": -1.0}, "churn = -1.0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Churn(**{"gamma": None if "churn" in options else 0.1, **options})
    for options in ({}, {"churn": 1.0, "gamma": 0.1}):
        with pytest.raises(ValueError, match="one of the two"):
            Churn(**options)
    with pytest.raises(ValueError, match="give gamma="):
        Churn(churn=1.0).on(CondOT(), None)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            Ancestral(eta=eta)


def test_noise_has_no_way_back_and_ends_are_checked_before_anything_is_computed() -> None:
    flow, data = mixture().flow(CondOT()), states(CondOT(), 1.0)
    for solver in (Ancestral(), Churn(churn=1.0)):
        with pytest.raises(ValueError, match="no way back"):
            fs.encode(flow, data, solver=solver, nfe=8)
    with pytest.raises(ValueError, match="infinite at t = 0"):
        fs.sample(flow, (2, 2), solver=Churn(Heun(), gamma=0.1), nfe=8, chart="noise")
    # From α = 0 with η = 1 the first step goes to σ = 0 and back: a data prediction with stages cannot be asked there.
    with pytest.raises(ValueError, match="at σ = 0 the state is the data"):
        fs.sample(
            mixture().flow(CondOT(), "data"), (2, 2), solver=Ancestral(Heun()), nfe=8, interval=(0.0, 0.9)
        )  # fmt: skip
    with pytest.raises(ValueError, match="infinite at t = 1"):
        fs.sample(flow, (2, 2), solver=Ancestral(Heun()), nfe=8, interval=(0.0, 0.9), chart="data")


def test_equal_settings_are_equal_solvers() -> None:
    assert Ancestral(Heun(), 0.5) == Ancestral(Heun(), 0.5) != Ancestral(Euler(), 0.5)
    assert hash(Churn(churn=40.0)) == hash(Churn(Heun(), 40.0))
    assert Churn(churn=18.0).share(180) == 0.1
    assert Churn(churn=40.0).share(18) == math.sqrt(2.0) - 1.0
