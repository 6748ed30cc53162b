"""Noise: Philox against its published vectors and a plain-Python twin; addresses; distributions with error bars."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.noise import DEQUANTIZE, PROBE, START, STEP, Noise, philox

FULL = 0xFFFFFFFF
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "uniform", "rademacher"]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. 2011 write it, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([FULL] * 4, [FULL] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: list[int], words: str) -> None:
    expected = [int(w, 16) for w in words.split()]
    got = philox([torch.tensor(c) for c in counter], (key[0], key[1]))
    assert [int(w) for w in got] == expected
    assert all(w.dtype == torch.int64 for w in got)
    assert plain_philox(counter, key) == expected


word = st.integers(0, FULL)


@given(counter=st.lists(word, min_size=4, max_size=4), key=st.lists(word, min_size=2, max_size=2))
def test_philox_is_the_plain_text_of_the_paper(counter: list[int], key: list[int]) -> None:
    got = philox([torch.tensor([c]) for c in counter], (key[0], key[1]))
    assert [int(w) for w in got] == plain_philox(counter, key)


def test_philox_leaves_its_counter_alone_and_broadcasts() -> None:
    counter = [torch.arange(3).unsqueeze(0), torch.tensor([[7]]), torch.arange(2).unsqueeze(1), torch.tensor([[9]])]
    before = [c.clone() for c in counter]
    got = philox(counter, (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(counter, before, strict=True))
    assert all(w.shape == (2, 3) for w in got)
    assert [int(w[1, 2]) for w in got] == plain_philox([2, 7, 1, 9], [1, 2])


@given(seed=st.integers(-(2**70), 2**70), sample=word, interval=st.integers(0, FULL), stream=st.integers(0, 3))
def test_a_number_is_a_function_of_its_address(seed: int, sample: int, interval: int, stream: int) -> None:
    """Key: the low 64 bits of the seed. Counter: (block, interval, sample, stream). Normals: Box and Muller."""
    noise = Noise.of(seed, [sample])
    key = [seed % 2**32, (seed >> 32) % 2**32]
    words = [w for block in range(2) for w in plain_philox([block, interval, sample, stream], key)]
    like = torch.zeros(1, 7, dtype=torch.float64)
    assert noise.words(stream, interval, 7, like.device).tolist() == [words]
    u = [(w + 0.5) / 2**32 for w in words]
    assert noise.uniform(stream, interval, like).tolist()[0] == u[:7]
    assert noise.rademacher(stream, interval, like).tolist()[0] == [1.0 if w >= 2**31 else -1.0 for w in words[:7]]
    normals = []
    for u1, u2 in zip(u[::2], u[1::2], strict=True):
        radius = math.sqrt(-2.0 * math.log(u1))
        normals += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    # cos and sin of an angle up to 2π, rounded to 1e-15 of it; a radius is at most √(2·33 ln 2) = 6.8
    assert noise.normal(stream, interval, like).tolist()[0] == pytest.approx(normals[:7], rel=1e-12, abs=2e-14)


# --- a sample's noise is its own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 4)])
def test_a_sample_has_the_same_noise_in_any_batch_and_order(kind: str, shape: tuple[int, ...]) -> None:
    whole = getattr(Noise.of(3, 8), kind)(STEP, 2, torch.zeros(8, *shape))
    assert whole.shape == (8, *shape)
    for numbers in ([5], [7, 0, 3], list(range(7, -1, -1)), torch.tensor([2, 2])):
        part = getattr(Noise.of(3, numbers), kind)(STEP, 2, torch.zeros(len(numbers), *shape))
        assert torch.equal(part, whole[torch.as_tensor(numbers)])
    assert torch.equal(getattr(Noise.of(3, 8).select(torch.tensor([6, 1])), kind)(STEP, 2, torch.zeros(2, *shape)),
                       whole[[6, 1]])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_has_the_same_noise_in_any_dtype_to_rounding(kind: str, dtype: torch.dtype) -> None:
    exact = getattr(Noise.of(3, 64), kind)(START, 0, torch.zeros(64, 9, dtype=torch.float64))
    rounded = getattr(Noise.of(3, 64), kind)(START, 0, torch.zeros(64, 9, dtype=dtype))
    assert rounded.dtype == dtype
    # rounding to the dtype, and what the transform in float32 loses
    torch.testing.assert_close(rounded.double(), exact, rtol=max(torch.finfo(dtype).eps, 3.5e-7), atol=0.0)


def test_the_shape_of_a_sample_does_not_matter_only_its_numbers_do() -> None:
    noise = Noise.of(1, 2)
    flat = noise.normal(START, 0, torch.zeros(2, 12))
    assert torch.equal(noise.normal(START, 0, torch.zeros(2, 3, 2, 2)).flatten(1), flat)
    assert torch.equal(noise.normal(START, 0, torch.zeros(2, 5)), flat[:, :5])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_sees_the_same_noise(kind: str) -> None:
    here = getattr(Noise.of(9, 16), kind)(STEP, 1, torch.zeros(16, 33))
    there = getattr(Noise.of(9, 16), kind)(STEP, 1, torch.zeros(16, 33, device="cuda")).cpu()
    assert torch.equal(there, here)


# --- seeds of their own ----------------------------------------------------------------------------------------------

SEEDS = [5, -1, 2**64 + 5, 2**63, 7]


@pytest.mark.parametrize("mode", ["torch", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_with_a_seed_of_its_own_is_sample_0_of_that_seed(kind: str, mode: str) -> None:
    with kernels.use(mode):
        found = getattr(Noise.of(SEEDS, 5), kind)(STEP, 3, torch.zeros(5, 6))
        for x, seed in zip(found, SEEDS, strict=True):
            assert torch.equal(x, getattr(Noise.of(seed, 1), kind)(STEP, 3, torch.zeros(1, 6))[0])
    assert torch.equal(found[0], found[2])  # modulo 2⁶⁴


def test_seeds_of_their_own_with_numbers_of_their_own() -> None:
    like = torch.zeros(3, 4)
    found = Noise.of([7, 7, 8], [4, 9, 4]).normal(STEP, 0, like)
    assert torch.equal(found[:2], Noise.of(7, [4, 9]).normal(STEP, 0, like[:2]))
    assert torch.equal(found[2:], Noise.of(8, [4]).normal(STEP, 0, like[:1]))


def test_lists_of_seeds_in_all_forms_and_any_order() -> None:
    like = torch.zeros(3, 4)
    whole = Noise.for_batch([3, 1, 2], 3)
    for seeds in ((3, 1, 2), torch.tensor([3, 1, 2]), np.array([3, 1, 2])):
        assert torch.equal(Noise.for_batch(seeds, 3).normal(STEP, 0, like), whole.normal(STEP, 0, like))
    ordered = Noise.for_batch(range(1, 4), 3).normal(STEP, 0, like)
    assert torch.equal(ordered[[2, 0, 1]], whole.normal(STEP, 0, like))
    chosen = whole.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.normal(STEP, 0, like[:2]), whole.normal(STEP, 0, like)[[2, 0]])
    assert Noise.for_batch([], 0).normal(STEP, 0, torch.zeros(0, 2)).shape == (0, 2)


def test_as_many_seeds_as_samples() -> None:
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        Noise.for_batch([1, 2], 3)
    with pytest.raises(ValueError, match="2 seeds for 1 samples"):
        Noise.of([1, 2], [4])


@pytest.mark.parametrize(
    "solver", [fs.solvers.DDPM(), fs.solvers.Euler(), fs.solvers.Tsit5(1e-4, 1e-4)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("batch", [None, 2])
def test_sampling_by_seed(solver: Any, batch: int | None) -> None:
    """A sample is its seed: alone, in a batch, cut to pieces, and refilled."""
    flow = fs.problems.GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], std=0.2).flow(fs.paths.CondOT())
    options: dict[str, Any] = {"solver": solver, "nfe": None if isinstance(solver, fs.solvers.Tsit5) else 8}
    whole = fs.sample(flow, shape=(3, 2), seed=[11, 12, 13], batch=batch, **options).x
    for x, seed in zip(whole, (11, 12, 13), strict=True):
        torch.testing.assert_close(x, fs.sample(flow, shape=(1, 2), seed=seed, **options).x[0])
    if batch is not None:
        parts = fs.batching.sample(flow, (3, 2), seed=[11, 12, 13], batch=batch, **options)
        torch.testing.assert_close(torch.cat([part.x for part in parts]), whole)


def test_torchsde_takes_seeds_of_their_own() -> None:
    pytest.importorskip("torchsde")
    flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
    start, solver = torch.zeros(2, 1), fs.solvers.bridges.Torchsde("euler")
    options: dict[str, Any] = {"solver": solver, "start": start, "interval": (0.1, 0.9), "nfe": 8}
    found = [fs.sample(flow, seed=seeds, **options).x for seeds in ([1, 2], [1, 2], [1, 3])]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- distributions; one fixed seed, bounds of five standard errors --------------------------------------------------

COUNT = 200_000


def draw(kind: str, *, seed: int = 0, stream: int = STEP, interval: int = 0, first: int = 0) -> np.ndarray[Any, Any]:
    """COUNT numbers as (2000, 100): 2000 samples from number `first` on."""
    numbers = torch.arange(first, first + 2000)
    like = torch.zeros(2000, COUNT // 2000, dtype=torch.float64)
    values: Tensor = getattr(Noise.of(seed, numbers), kind)(stream, interval, like)
    return values.numpy()


def test_normals_have_the_moments_of_a_normal() -> None:
    x = draw("normal").ravel()
    for k, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():  # of xᵏ
        assert abs((x**k).mean() - mean) < 5 * math.sqrt(variance / COUNT), k


def test_normals_pass_kolmogorov_smirnov() -> None:
    assert stats.kstest(draw("normal").ravel(), "norm").pvalue > 1e-3
    with kernels.use("fused"):  # 3 million in float32: the distribution function is within 1e-3 of a normal's
        many = Noise.of(1, 1000).normal(STEP, 0, torch.empty(1000, 3000)).double().numpy().ravel()
    assert stats.kstest(many, "norm").pvalue > 1e-3
    for level in (3.0, 4.0, 4.5):
        expected = len(many) * stats.norm.sf(level)
        for tail in (many > level, many < -level):
            assert abs(tail.sum() - expected) < 5 * math.sqrt(expected)
    assert stats.kstest(draw("uniform").ravel(), "uniform").pvalue > 1e-3


def test_normal_tails_are_as_heavy_as_they_should_be() -> None:
    x = np.abs(draw("normal").ravel())
    for level in (3.0, 4.0):
        expected = COUNT * 2 * stats.norm.sf(level)
        assert abs((x > level).sum() - expected) < 5 * math.sqrt(expected)


def test_rademacher_is_plus_or_minus_one_and_fair() -> None:
    x = draw("rademacher").ravel()
    assert set(np.unique(x)) == {-1.0, 1.0}
    assert abs(x.mean()) < 5 / math.sqrt(COUNT)


def test_uniform_has_the_moments_of_a_uniform() -> None:
    x = draw("uniform").ravel()
    assert abs(x.mean() - 0.5) < 5 * math.sqrt(1 / 12 / COUNT)
    assert abs((x**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / COUNT)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize(
    "other",
    [
        {"stream": START},
        {"stream": PROBE},
        {"stream": DEQUANTIZE},
        {"interval": 1},
        {"interval": 2**16},
        {"first": 2000},
        {"seed": 1},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_streams_intervals_samples_and_seeds_are_independent(kind: str, other: dict[str, int]) -> None:
    """Correlation of n pairs of independent variables of unit variance: standard error 1/√n; of squares likewise."""
    x, y = draw(kind).ravel(), draw(kind, **other).ravel()
    assert abs((x * y).mean()) < 5 / math.sqrt(COUNT)
    if kind == "normal":
        assert abs(((x**2 - 1) * (y**2 - 1)).mean()) < 5 * 2 / math.sqrt(COUNT)


def test_the_numbers_of_one_sample_and_of_neighbours_are_independent() -> None:
    x = draw("normal")
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x[:, :-4], x[:, 4:])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size)
    pairs = x.reshape(-1, 2) ** 2 - 1  # cosine and sine of one angle share a radius
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 * 2 / math.sqrt(len(pairs))


def test_the_streams_are_different_numbers() -> None:
    assert len({START, STEP, PROBE, DEQUANTIZE}) == 4


# --- ends of the range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0, 1, FULL - 1, FULL])
def test_extreme_words_stay_inside_the_open_interval_and_finite(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: int
) -> None:
    monkeypatch.setattr(Noise, "words", lambda self, *a: torch.full((1, 8), value))
    like = torch.zeros(1, 8, dtype=dtype)
    u = Noise.of(0, 1).uniform(START, 0, like)
    assert bool(((u > 0) & (u < 1)).all())
    assert u.dtype == dtype
    x = Noise.of(0, 1).normal(START, 0, like)
    assert bool(torch.isfinite(x).all())
    assert float(x.abs().max()) < 7.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0), (2, 0, 4)])
def test_empty_batches_and_empty_samples_are_empty(kind: str, shape: tuple[int, ...]) -> None:
    out = getattr(Noise.of(0, shape[0]), kind)(START, 0, torch.zeros(shape))
    assert out.shape == shape


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1, 2**64, 2**100 + 17, -(2**80) - 5])
def test_any_integer_is_a_seed_modulo_two_to_the_64(seed: int) -> None:
    like = torch.zeros(2, 3)
    x = Noise.of(seed, 2).normal(START, 0, like)
    assert bool(torch.isfinite(x).all())
    assert torch.equal(x, Noise.of(seed % 2**64, 2).normal(START, 0, like))


def test_the_largest_sample_number_is_allowed() -> None:
    assert Noise.of(0, [FULL]).normal(START, 0, torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("seed", [0.5, 1.0, True, None, "0", torch.tensor(1), [0.5, 1], [True, False], [[0], [1]],
                                  torch.tensor([0.0, 1.0])], ids=str)  # fmt: skip
def test_a_seed_that_is_no_integer_is_refused(seed: Any) -> None:
    with pytest.raises(TypeError, match=r"seed = .*; expected an int"):
        Noise.of(seed, 2)


@pytest.mark.parametrize(
    "samples",
    [[-1], [0, 2**32], [[0, 1]], torch.zeros(2, 2, dtype=torch.int64), torch.tensor(3), -3, [0.5, 1.5],
     torch.tensor([0.5])],
    ids=str,
)  # fmt: skip
def test_bad_sample_numbers_are_refused(samples: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="integers"):
        Noise.of(0, samples)
