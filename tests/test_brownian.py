"""The Brownian path: increments that add up, their covariance with error bars, and solves that follow one path."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.brownian import Brownian
from flowsolve.noise import START, STEP, Noise

LIKE = torch.zeros(2, 3, dtype=torch.float64)
MODES = ["torch", "fused"]


def increment(noise: Noise, a: float, b: float, like: Tensor = LIKE) -> Tensor:
    """W(b) − W(a)."""
    return noise.step(a, b, like) * math.sqrt(abs(b - a))


# --- additivity ------------------------------------------------------------------------------------------------------

times = st.one_of(
    st.floats(0.0, 1.0), st.integers(0, 64).map(lambda k: k / 64), st.integers(0, 50).map(lambda k: k / 50)
)


@given(times, times, times, st.integers(-(2**63), 2**63))
def test_increments_add_up(a: float, b: float, c: float, seed: int) -> None:
    """In any order and direction; a time is known to 2⁻⁵³, which an interval of 2⁻²⁶ feels in the eighth digit."""
    noise = Brownian.of(seed, 2)
    for s, t in itertools.permutations((a, b, c), 2):
        if s != t and abs(s - t) < 2.0**-26:
            return
    whole = increment(noise, a, c) if a != c else torch.zeros_like(LIKE)
    parts = sum(increment(noise, s, t) if s != t else torch.zeros_like(LIKE) for s, t in ((a, b), (b, c)))
    torch.testing.assert_close(whole, parts, rtol=0.0, atol=1e-13)


@given(times, times)
def test_the_way_back_is_the_way_there(a: float, b: float) -> None:
    if abs(a - b) > 2.0**-53:
        noise = Brownian.of(3, 2)
        torch.testing.assert_close(increment(noise, a, b), -increment(noise, b, a), rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_small_steps_are_a_large_one(dtype: torch.dtype, mode: str) -> None:
    like, noise = torch.zeros(3, 5, dtype=dtype), Brownian.of(1, 3)
    with kernels.use(mode):
        whole = increment(noise, 0.0, 1.0, like)
        for n in (7, 50, 64):
            parts = sum(increment(noise, i / n, (i + 1) / n, like).double() for i in range(n))
            assert isinstance(parts, Tensor)
            torch.testing.assert_close(parts, whole.double(), rtol=0.0, atol=64 * torch.finfo(dtype).eps)


def test_short_intervals_add_up_to_their_own_rounding() -> None:
    """At 1/4, where floats are multiples of 2⁻⁵⁴ and the path's times of 2⁻⁵³, steps of multiples of 2⁻⁴⁴."""
    noise, unit = Brownian.of(0, 2), 2.0**-44
    a, b, c = 0.25 + 3 * unit, 0.25 + 8 * unit, 0.25 + 17 * unit
    for like, close in ((LIKE, 1e-14), (LIKE.float(), 1e-5)):
        whole, parts = increment(noise, a, c, like), increment(noise, a, b, like) + increment(noise, b, c, like)
        torch.testing.assert_close(whole / 2**-22, parts / 2**-22, rtol=0.0, atol=close)


def test_what_was_asked_before_changes_no_bit() -> None:
    """The end of the last step is kept: with and without it, and after others, the same."""
    grid = [0.0, 0.02, 0.04, 0.1, 0.5, 0.53, 0.7]
    noise, fresh = Brownian.of(9, 2), []
    for a, b in itertools.pairwise(grid):
        fresh.append(Brownian.of(9, 2).step(a, b, LIKE))
        assert torch.equal(noise.step(a, b, LIKE), fresh[-1])
    for (a, b), x in reversed(list(zip(itertools.pairwise(grid), fresh, strict=True))):
        assert torch.equal(noise.step(a, b, LIKE), x)
    assert torch.equal(noise.step(0.0, 0.02, LIKE[:, :2]), fresh[0][:, :2])  # numbers, not shapes, have noise
    torch.testing.assert_close(noise.step(0.02, 0.04, LIKE.float()), fresh[1].float(), rtol=2e-6, atol=2e-6)


def test_the_path_belongs_to_the_sample() -> None:
    like = torch.zeros(4, 5)
    whole = Brownian.of(2, 4).step(0.1, 0.3, like)
    assert torch.equal(Brownian.of(2, [3, 1]).step(0.1, 0.3, like[:2]), whole[[3, 1]])
    chosen = Brownian.of(2, 4).select(torch.tensor([2]))
    assert isinstance(chosen, Brownian)
    assert torch.equal(chosen.step(0.1, 0.3, like[:1]), whole[[2]])
    own = Brownian.of([2, 8], 2).step(0.1, 0.3, like[:2])
    assert torch.equal(own[0], whole[0])
    assert torch.equal(own[1], Brownian.of(8, 1).step(0.1, 0.3, like[:1])[0])


def test_fused_and_plain_paths_are_the_same_bits() -> None:
    like, found = torch.zeros(3, 7), []
    for mode in MODES:
        with kernels.use(mode):
            found.append(Brownian.of(2, 3).step(0.1, 0.3, like))
    assert torch.equal(*found)


def test_all_else_is_as_other_noise() -> None:
    for kind in ("normal", "uniform", "rademacher"):
        mine, other = (getattr(cls.of(4, 2), kind)(START, 0, LIKE) for cls in (Brownian, Noise))
        assert torch.equal(mine, other)


def test_times_beyond_the_path() -> None:
    noise = Brownian.of(0, 2)
    assert torch.isfinite(noise.step(0.5, math.nextafter(0.5, 0.0), LIKE)).all()  # closer than the path is known
    assert torch.equal(noise.step(0.3, 0.3, LIKE), noise.normal(STEP, round(0.3 * 2**53), LIKE))
    with pytest.raises(ValueError, match=r"from t = 0.5 to 1.5.*\[0, 1\]"):
        noise.step(0.5, 1.5, LIKE)


# --- distribution; one fixed seed, bounds of five standard errors ----------------------------------------------------

COUNT = 40_000


def draw(a: float, b: float, **options: Any) -> np.ndarray[Any, Any]:
    """W(b) − W(a), COUNT of them."""
    with kernels.use("fused"):
        return increment(Brownian.of(0, 400), a, b, torch.zeros(400, COUNT // 400, dtype=torch.float64)).numpy().ravel()


@pytest.mark.parametrize("a", [0.0, 0.25, 1 / 3, 0.7])
@pytest.mark.parametrize("size", [2.0**-k for k in (1, 2, 5, 10, 20, 30, 40, 45)] + [0.02, 0.3])
def test_the_variance_of_an_increment_is_its_length(a: float, size: float) -> None:
    """Of short ones, the length between times as they are known, 2⁻⁵³ apart."""
    if a + size > 1.0:
        a = 1.0 - size
    b = a + size
    length = abs(round(b * 2**53) - round(a * 2**53)) / 2**53
    x = draw(a, b) / math.sqrt(abs(b - a))  # as the solver sees it, of variance 1
    assert abs(x.mean()) < 5 / math.sqrt(COUNT)
    assert abs((x**2).mean() - 1.0) < 5 * math.sqrt(2 / COUNT)
    assert abs((x**4).mean() - 3.0) < 5 * math.sqrt(96 / COUNT)
    assert length == pytest.approx(size, rel=2.0**-7)


@pytest.mark.parametrize(
    "times",
    [
        [0.0, 0.1, 0.35, 0.5, 0.8, 1.0],
        [i / 8 for i in range(9)],
        [1 / 3, 1 / 3 + 2.0**-41, 1 / 3 + 2.0**-40, 1 / 3 + 2.0**-20, 0.9],
    ],
)
def test_increments_of_disjoint_intervals_are_independent(times: list[float]) -> None:
    steps = [draw(a, b) / math.sqrt(b - a) for a, b in itertools.pairwise(times)]
    for x, y in itertools.combinations(steps, 2):
        assert abs((x * y).mean()) < 5 / math.sqrt(COUNT)
        assert abs(((x**2 - 1) * (y**2 - 1)).mean()) < 5 * 2 / math.sqrt(COUNT)


def test_the_covariance_is_that_of_a_brownian_motion() -> None:
    """E W(s) W(t) = min(s, t); the standard error of its estimate is √(st + min²) / √n."""
    points = [0.03, 0.25, 0.3, 0.55, 1.0]
    paths = {t: draw(0.0, t) for t in points}
    for s, t in itertools.combinations_with_replacement(points, 2):
        bound = 5 * math.sqrt((s * t + min(s, t) ** 2) / COUNT)
        assert abs((paths[s] * paths[t]).mean() - min(s, t)) < bound


# --- in a solve ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow() -> fs.Flow:
    return fs.problems.GaussianMixture([[-1.0, 0.3], [1.0, 0.0]], std=0.3).flow(fs.paths.CondOT())


def test_noise_is_named(flow: fs.Flow) -> None:
    with pytest.raises(ValueError, match=r"noise = 'white'; expected one of fresh, brownian"):
        fs.sample(flow, shape=(1, 2), solver=fs.solvers.DDPM(), nfe=4, noise="white")


def test_brownian_noise_reaches_the_steps(flow: fs.Flow) -> None:
    options: dict[str, Any] = {"solver": fs.solvers.DDPM(), "nfe": 8}
    whole = fs.sample(flow, shape=(5, 2), noise="brownian", **options).x
    assert not torch.equal(whole, fs.sample(flow, shape=(5, 2), noise="fresh", **options).x)
    assert torch.equal(
        fs.sample(flow, shape=(5, 2), **options).x, fs.sample(flow, shape=(5, 2), noise="fresh", **options).x
    )
    again = fs.sample(flow, shape=(2, 2), noise="brownian", samples=[4, 1], **options).x
    torch.testing.assert_close(again, whole[[4, 1]])
    parts = fs.batching.sample(flow, (5, 2), noise="brownian", batch=2, **options)
    torch.testing.assert_close(torch.cat([part.x for part in parts]), whole)


def test_a_captured_plan_knows_its_noise(flow: fs.Flow) -> None:
    from flowsolve.passage import Passage

    plans = [Passage(flow, (0.0, 1.0), solver=fs.solvers.DDPM(), nfe=4, noise=kind) for kind in (Noise, Brownian)]
    assert plans[0].key() != plans[1].key()


@pytest.mark.parametrize("kind", [Noise, Brownian])
@pytest.mark.parametrize("seed", [-5, [3, 2**63 + 1, 7]])
def test_a_captured_solve_draws_the_same(kind: type[Noise], seed: Any, flow: fs.Flow) -> None:
    """The recording is a function of tensors, seeds and samples among them; replayed here without a graph."""
    from flowsolve.capture import captured
    from flowsolve.passage import Passage
    from flowsolve.streaming import Chunk

    noise, x = kind.of(seed, 3), torch.zeros(3, 2)
    plan = Passage(flow, (0.0, 1.0), solver=fs.solvers.DDPM(), nfe=6, seed=noise.seed, noise=kind)
    y, context = plan.enter(Chunk(x, {}, noise.samples))
    plain = plan.run(y, context, False).x
    replayed = captured(plan, y, {}, noise.samples, record=lambda solve, inputs: solve).x
    assert torch.equal(replayed, plain)


def test_strong_convergence(flow: fs.Flow) -> None:
    """Euler and Maruyama's steps on one path: order 1, since the noise does not depend on the state.

    On the fresh noise of each grid, solves with more steps do not come closer to one another.
    """
    steps, gaps = [16, 32, 64, 128, 256], {}
    start = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for noise in ("brownian", "fresh"):
        ends = [
            fs.sample(flow, start=start, solver=fs.solvers.EulerMaruyama(), nfe=n, interval=(0.2, 0.8), noise=noise).x
            for n in steps
        ]
        gaps[noise] = [float((b - a).square().mean().sqrt()) for a, b in itertools.pairwise(ends)]
    slope = np.polyfit(np.log(steps[1:]), np.log(gaps["brownian"]), 1)[0]
    print(gaps, slope)
    assert -1.25 < slope < -0.8
    assert min(gaps["fresh"]) > 10 * gaps["brownian"][-1]
