"""Brownian motion with its space-time Lévy area: laws from the weights exactly, then what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowsolve import kernels
from flowsolve.noise import Noise
from flowsolve.sde.motion import BrownianPath, Fresh, _place
from flowsolve.sde.tree import DEPTH, unit, weights

EPS = 2.0**-52
INTERVALS = [
    (0.0, 1.0), (0.0, 0.5), (0.25, 0.5), (0.1, 0.3), (0.3, 0.3 + 1e-9), (0.5 - 1e-12, 0.5 + 1e-12), (0.49999, 0.7),
    (0.123, 0.987), (0.0, 1e-14), (0.75, 1.0),
]  # fmt: skip


def shares(a: int, b: int) -> dict[int, tuple[float, float]]:
    found = weights(a, b)
    assert len(set(found.nodes.tolist())) == len(found.nodes)
    assert found.nodes.max() < 1 << 56
    return {n: (w, h) for n, w, h in zip(found.nodes.tolist(), found.increment, found.area, strict=True)}


@pytest.mark.parametrize(("first", "last"), INTERVALS)
def test_increment_and_area_have_their_law_however_short(first: float, last: float) -> None:
    """Var W = h, Var H = h/12, Cov = 0, from some 200 weights each rounded a few times."""
    a, b = unit(first), unit(last)
    found, h = weights(a, b), math.ldexp(b - a, -DEPTH)
    close = pytest.approx(1.0, rel=0, abs=1000 * EPS)
    assert (found.increment**2).sum() / h == close
    assert 12 * (found.area**2).sum() / h == close
    assert abs((found.increment * found.area).sum()) / h < 1000 * EPS


def test_parts_add_up() -> None:
    """W and the integral A = h (W/2 + H) of two neighbours, node by node; A gains W times what follows."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, c, b = sorted(int(n) for n in rng.integers(0, 1 << DEPTH, 3))
        one, two = (c - a) * 2.0**-DEPTH, (b - c) * 2.0**-DEPTH
        left, right, whole = shares(a, c), shares(c, b), shares(a, b)
        for node in left.keys() | right.keys():
            (w, h), (v, k), (u, m) = (part.get(node, (0.0, 0.0)) for part in (left, right, whole))
            integral = one * (w / 2 + h) + two * (v / 2 + k) + w * two
            assert w + v == pytest.approx(u, abs=1e-15)
            assert integral / (one + two) - (w + v) / 2 == pytest.approx(m, abs=1e-15)


def test_disjoint_intervals_are_independent() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b, c, d = sorted(int(n) for n in rng.integers(0, 1 << DEPTH, 4))
        left, right = shares(a, b), shares(c, d)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            together = sum(left[n][i] * right[n][j] for n in left.keys() & right.keys())
            assert abs(together) < 1e-15


def test_few_normals_on_dyadic_steps() -> None:
    for i in range(64):
        assert len(weights(i << (DEPTH - 6), (i + 1) << (DEPTH - 6)).nodes) <= 4 * 6 + 2


def test_the_area_is_the_integral_of_the_path() -> None:
    """H of [0, 1] against the trapezoidal rule on 2¹⁰ points, whose error is h/√12 · √(1/N) in the mean square."""
    like, n = torch.zeros(500, 1, dtype=torch.float64), 256
    path = BrownianPath.of(0.0, 1.0, seed=3, samples=500)
    steps = torch.stack([w for w, _ in path.drives([i / n for i in range(n + 1)], like, area=False)])
    along = torch.cat((torch.zeros_like(steps[:1]), steps.cumsum(0)))
    w, area = path.drive(0.0, 1.0, like)
    assert area is not None
    torch.testing.assert_close(along[-1], w, rtol=0, atol=1e-12)
    error = torch.trapezoid(along, dx=1 / n, dim=0) - (w / 2 + area)
    assert float(error.square().mean().sqrt()) == pytest.approx(1 / (n * math.sqrt(12.0)), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_moments(dtype: torch.dtype) -> None:
    """Fresh drives of uneven steps: five standard errors of 40,000 numbers."""
    like, nodes = torch.zeros(4000, 10, dtype=dtype), [0.0, 0.1, 0.5]
    for (w, area), h in zip(Fresh(Noise.of(7, 4000)).drives(nodes, like, area=True), (0.1, 0.4), strict=True):
        assert area is not None
        assert w.dtype == area.dtype == dtype
        n = w.numel()
        assert abs(float(w.mean())) < 5 * math.sqrt(h / n)
        assert abs(float(w.var()) / h - 1) < 5 * math.sqrt(2 / n)
        assert abs(float(area.var()) * 12 / h - 1) < 5 * math.sqrt(2 / n)
        assert abs(float((w * area).mean())) < 5 * h / math.sqrt(12 * n)


def test_fresh_steps_are_the_same_in_any_batch_and_piece() -> None:
    like, nodes = torch.zeros(6, 5, dtype=torch.float64), [i / 16 for i in range(17)]
    whole = list(Fresh(Noise.of(1, 6)).drives(nodes, like, area=True))
    some = torch.tensor([4, 1])
    parts = [
        *Fresh(Noise.of(1, [4, 1])).drives(nodes[:8], like[some], area=True),
        *Fresh(Noise.of(1, [4, 1])).drives(nodes[7:], like[some], area=True),
    ]
    for (w, h), (v, k) in zip(whole, parts, strict=True):
        assert h is not None
        assert k is not None
        assert torch.equal(w[some], v)
        assert torch.equal(h[some], k)


def test_large_states_are_drawn_step_by_step_to_the_same_bits() -> None:
    large, nodes = torch.zeros(4, 50_000), [0.0, 0.25, 1.0]
    small = torch.zeros(4, 8)
    for mode in ("torch", "fused"):
        with kernels.use(mode):
            for (w, _), (v, _) in zip(
                Fresh(Noise.of(1, 4)).drives(nodes, large, area=False),
                Fresh(Noise.of(1, 4)).drives(nodes, small, area=False),
                strict=True,
            ):
                assert torch.equal(w[:, :8], v)


def test_a_part_of_a_fresh_step_follows_the_bridge() -> None:
    """Given the step's W and H, W(t) has mean x W + 6 x (1 − x) H, and the variance that makes x h in all."""
    like, x = torch.zeros(20_000, 1, dtype=torch.float64), 0.3
    motion = Fresh(Noise.of(2, 20_000))
    ((w, area),) = motion.drives([1.0, 3.0], like, area=True)
    assert area is not None
    part, part_area = motion.part(1.0, 3.0, 1.0 + 2.0 * x, like, area=True)
    assert part_area is not None
    h = 2.0
    rest = part - (x * w + 6 * x * (1 - x) * area)
    expected = h * (x - x**2 - 3 * (x * (1 - x)) ** 2)
    n = len(like)
    assert abs(float(rest.mean())) < 5 * math.sqrt(expected / n)
    assert float(rest.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / n))
    assert abs(float((rest * w).mean())) < 5 * math.sqrt(expected * h / n)
    assert float(part_area.var()) == pytest.approx(x * h / 12, rel=5 * math.sqrt(2 / n))
    whole, _ = motion.part(1.0, 3.0, 3.0, like, area=True)
    torch.testing.assert_close(whole, w, rtol=0, atol=1e-14)


def test_a_finer_look_continues_a_coarser_one() -> None:
    """The parts of a step are one path: two looks are apart by what lies between them."""
    like = torch.zeros(20_000, 1, dtype=torch.float64)
    motion = Fresh(Noise.of(2, 20_000))
    first, _ = motion.part(0.0, 1.0, 0.6, like, area=False)
    second, _ = motion.part(0.0, 1.0, 0.61, like, area=False)
    assert float((second - first).var()) == pytest.approx(0.01, rel=5 * math.sqrt(2 / 20_000))


def test_addresses_of_times() -> None:
    times = [-2.0, -1.0, -1e-3, 1e-300, 1e-3, 1.0, 1.0 + 2.0**-43, 1e300]
    assert len({_place(t) for t in times}) == len(times)
    assert all(0 <= _place(t) < 1 << 56 for t in times)
    assert _place(0.0) == _place(-0.0)
    with pytest.raises(ValueError, match="too short to be told apart"):
        list(Fresh(Noise.of(0, 1)).drives([1.0, 1.0 + 2.0**-50], torch.zeros(1, 1), area=False))


def test_a_path_is_asked_within_its_interval() -> None:
    path = BrownianPath.of(0.0, 2.0, seed=0, samples=1)
    with pytest.raises(ValueError, match=r"over \[0.0, 2.0\]"):
        path(1.0, 2.5, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="t0 < t1"):
        BrownianPath.of(1.0, 1.0, seed=0, samples=1)
