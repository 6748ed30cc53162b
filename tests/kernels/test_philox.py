"""Words and normals from their addresses: known answers, accuracy, and the same bits from all versions.

Tests that need a device run on CUDA, or, where TRITON_INTERPRET=1 says so, on the CPU; `test_in_the_interpreter` runs
them so.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowsolve import kernels
from flowsolve.kernels import philox as twin
from flowsolve.noise import START, STEP, Noise

ROOT = Path(__file__).parents[2]
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FULL = 0xFFFFFFFF
DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (16, 2), (1000, 5), (3, 4096), (7, 1023), (2, 3, 16, 17)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::UserWarning:triton")
on_device = pytest.mark.skipif(not TRITON, reason="no Triton") if INTERPRETED else pytest.mark.gpu


@pytest.fixture(scope="module")
def cpu() -> ModuleType:
    """The compiled module."""
    with kernels.use("fused"):
        Noise.of(0, 1).normal(START, 0, torch.empty(1, 1))
    module = kernels._loaded["noise on cpu"]
    assert module is not None
    return module


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def table_of(count: int, seed: int = 0) -> Tensor:
    """Numbers and keys that use all their bits."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**32, (count, 3)))


def terms(count: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**56, count), rng.normal(size=count)


def plain(table: Tensor, stream: int, intervals: Any, weights: Any, like: Tensor) -> Tensor:
    """The sum of normals by the twin, one after the other."""
    width = math.prod(like.shape[1:])
    each = twin.words(table[:, :1], (table[:, 1:2], table[:, 2:]), stream, intervals.tolist(), -(-width // 4))
    total = torch.zeros((), dtype=like.dtype)
    for x, w in zip(twin.gaussian(each, like.dtype), weights.tolist(), strict=True):
        total = x * w + total
    return total[:, :width].reshape(like.shape)


# --- the twin against mathematics ------------------------------------------------------------------------------------


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
def test_known_answers_of_random123(counter: list[int], key: list[int], words: str, cpu: ModuleType) -> None:
    """kat_vectors of Salmon et al.: the twin's words, and what the compiled loop makes of the counter."""
    expected = [int(w, 16) for w in words.split()]
    assert [int(w) for w in twin.philox([torch.tensor(c) for c in counter], (key[0], key[1]))] == expected
    laid = np.zeros((4, cpu.CHUNK), dtype=np.uint32)
    laid[:, 0] = counter[0], counter[2], *key
    made = np.zeros_like(laid)
    cpu._words(laid.ctypes.data, made.ctypes.data, 1, np.uint64(counter[1]), np.uint64(counter[3]))
    assert made[:, 0].tolist() == expected


def corners() -> Tensor:
    """Words in steps of a prime, and all around the places where the transform's formulas change."""
    near = torch.arange(-3000, 3000)
    places = [0, 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, round(2**31.5), 2**32 - round(2**31.5), 2**32]
    found = torch.cat([torch.arange(0, 2**32, 65_537), *[near + p for p in places]])
    return found[(found >= 0) & (found <= FULL)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-16), (torch.float32, 3.5e-7)])
def test_the_transform_is_as_accurate_as_its_page_says(dtype: torch.dtype, bound: float) -> None:
    """Against Box and Muller in 80 bits, in which u and 1 − u are exact and angles are reduced exactly."""
    first = corners()
    second = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))]
    got = twin.gaussian(torch.stack((first, second), 1), dtype).numpy().astype(np.longdouble)
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("no long double here")
    half = np.longdouble(0.5)
    u, rest, angle = ((v.numpy().astype(np.longdouble) + half) / 2**32 for v in (first, FULL - first, second))
    radius = np.sqrt(-2 * np.where(rest < half, np.log1p(-rest), np.log(u)))
    quarter = np.floor(4 * angle + half)
    theta = (angle - quarter / 4) * np.longdouble("6.28318530717958647692528676655900577")
    c, s, q = np.cos(theta), np.sin(theta), quarter.astype(int) % 4
    truth = np.stack((np.choose(q, [c, -s, -c, s]), np.choose(q, [s, c, -s, -c])), 1) * radius[:, None]
    error = np.abs(got - truth) / np.abs(truth)
    print(dtype, float(error.max()), float(np.sqrt((error**2).mean())))
    assert float(error.max()) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_words_give_the_largest_and_the_smallest_normals(dtype: torch.dtype) -> None:
    x = twin.gaussian(torch.tensor([[0, 0], [FULL, 0], [0, FULL], [FULL, FULL]]), dtype)
    assert float(x[0, 0]) == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)  # u = 2⁻³³
    assert float(x[1, 0]) == pytest.approx(math.sqrt(2) * 2.0**-16.5, rel=1e-6)
    assert bool((x[2:, 1] < 0).all())  # just below a whole turn


@pytest.mark.parametrize("dtype", DTYPES)
def test_roots_are_rounded_correctly(dtype: torch.dtype) -> None:
    v = torch.rand(100_000, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 46 + 1e-9
    assert (twin._root(v).numpy() == np.sqrt(v.numpy())).all()


# --- compiled versions against the twin ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_on_the_cpu(shape: tuple[int, ...], dtype: torch.dtype, cpu: ModuleType) -> None:
    table, like = table_of(shape[0]), torch.empty(shape, dtype=dtype)
    for count in (1, 2, 5):
        intervals, weights = terms(count)
        assert torch.equal(cpu.normals(table, 4, intervals, weights, like), plain(table, 4, intervals, weights, like))
    one = intervals[:1]
    assert torch.equal(cpu.normals(table, 0, int(one[0]), 1.0, like), plain(table, 0, one, np.ones(1), like))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 600_001), (256, 2_100), (200_000, 3)])
def test_threads_change_nothing(
    shape: tuple[int, int], dtype: torch.dtype, cpu: ModuleType, threads: Callable[[int], None]
) -> None:
    table, like, found = table_of(shape[0]), torch.empty(shape, dtype=dtype), []
    for count in (1, 2):
        threads(count)
        found.append(cpu.normals(table, 1, 7, 1.0, like))
    assert torch.equal(*found)


def test_the_loops_are_vectorised(tmp_path: Path) -> None:
    """What makes the kernel fast: products of several words, and roots of several numbers, at a time."""
    script = """
        import re
        import numpy as np
        from flowsolve.kernels import philox_cpu as cpu
        word, single = np.uint64(1), np.float32(1.0)
        cases = {"_words": (word, word), "_set32": (single,), "_add32": (single,), "_set64": (1.0,), "_add64": (1.0,)}
        for name, last in cases.items():
            function = getattr(cpu, name)
            function(0, 0, 0, *last)
            code = function.inspect_llvm(function.signatures[0])
            sought = r"mul .*<\\d+ x i64>" if name == "_words" else r"call <\\d+ x \\w+> @llvm.sqrt"
            print(name, len(re.findall(sought, code)))
    """
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert len(found) == 5
    assert int(found.pop("_words")) >= 20
    assert all(int(n) >= 2 for n in found.values()), found


# --- when which version serves ---------------------------------------------------------------------------------------


@pytest.fixture
def served(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the compiled kernel is called for."""
    calls: list[tuple[int, ...]] = []
    kernel = cpu.normals

    def spy(*arguments: Any) -> Any:
        calls.append(tuple(arguments[-1].shape))
        return kernel(*arguments)

    monkeypatch.setattr(cpu, "normals", spy)
    return calls


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16])
def test_noise_is_the_same_whoever_serves(dtype: torch.dtype, served: list[tuple[int, ...]]) -> None:
    like, found = torch.zeros(5, 3, 7, dtype=dtype), {}
    for mode in ("torch", "fused"):
        with kernels.use(mode):
            found[mode] = Noise.of(-3, 5).normal(STEP, 2**53, like)
    assert torch.equal(found["torch"], found["fused"])
    assert served == ([(5, 3, 7)] if dtype in DTYPES else [])


def test_layout_and_gradients_do_not_matter(served: list[tuple[int, ...]]) -> None:
    noise = Noise.of(0, 2)
    with kernels.use("fused"):
        plain = noise.normal(STEP, 1, torch.zeros(2, 3, 4, 4))
        for like in (
            torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.zeros(2, 3, 4, 4, requires_grad=True),
            torch.zeros(1, 1, 1, 1).expand(2, 3, 4, 4),
        ):
            again = noise.normal(STEP, 1, like)
            assert torch.equal(again, plain)
            assert again.is_contiguous()
            assert not again.requires_grad
    assert len(served) == 4


def test_the_twin_serves_transforms_and_what_is_empty(served: list[tuple[int, ...]]) -> None:
    noise, like = Noise.of(0, 2), torch.zeros(4, 2, 3)
    with kernels.use("fused"):
        assert noise.normal(STEP, 0, torch.zeros(2, 0)).shape == (2, 0)
        found = torch.vmap(lambda x: x + noise.normal(STEP, 0, x))(like)
        with pytest.raises(RuntimeError):  # not as many samples
            noise.normal(STEP, 0, torch.zeros(3, 3))
    assert torch.equal(found[1], noise.normal(STEP, 0, like[0]))
    assert not served


def test_the_twin_serves_until_it_has_cost_as_much_as_loading(
    cpu: ModuleType, served: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_loaded", {})
    noise, like = Noise.of(0, 10), torch.zeros(10, 100)
    price = kernels.NOISE_CALL + kernels.NOISE_BYTE * 4 * like.numel()
    monkeypatch.setattr(kernels, "_rent", {"noise on cpu": kernels.PRICE - 4.5 * price})
    with kernels.use("auto"):
        found = [noise.normal(STEP, 0, like) for _ in range(6)]
    assert served == [(1, 3), (1, 3), (10, 100), (10, 100)]  # the probe's, and two of the six
    assert all(torch.equal(x, found[0]) for x in found)


# --- Triton ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> ModuleType:
    pytest.importorskip("triton")
    from flowsolve.kernels import philox_cuda

    return philox_cuda


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 2), (2, 1023), (2, 3, 4, 4)])
def test_the_same_bits_from_triton(shape: tuple[int, ...], dtype: torch.dtype, cuda: ModuleType) -> None:
    table, like = table_of(shape[0]), torch.empty(shape, dtype=dtype)
    for count in (2, 9):
        intervals, weights = terms(count)
        found = cuda.normals(table.to(DEVICE), 4, intervals, weights, like.to(DEVICE))
        assert torch.equal(found.cpu(), plain(table, 4, intervals, weights, like))
    found = cuda.normals(table.to(DEVICE), 0, 2**53, 1.0, like.to(DEVICE))
    assert torch.equal(found.cpu(), plain(table, 0, np.array([2**53]), np.ones(1), like))


@on_device
def test_the_probe(cuda: ModuleType) -> None:
    cuda.probe()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="of devices")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_draws_the_same_bits_as_the_cpu(dtype: torch.dtype) -> None:
    noise, like = Noise.of(5, 64), torch.zeros(64, 3072, dtype=dtype)
    with kernels.use("torch"):
        plain = noise.normal(STEP, 3, like)
        assert torch.equal(noise.normal(STEP, 3, like.cuda()).cpu(), plain)
    with kernels.use("fused"):
        assert torch.equal(noise.normal(STEP, 3, like.cuda()).cpu(), plain)


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="is what runs this, or there is no Triton")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton or probe", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"7 passed", done.stdout), done.stdout


@pytest.mark.skipif(INTERPRETED, reason="of the compiler")
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_the_compiler_rounds_as_ieee_says(
    kind: str, cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an H100, whether or not there is one: nothing contracted, nothing approximate, constants in full."""
    pytest.importorskip("triton", minversion="3.3")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    settings = {"M": 1, "ADD": False, "KIND": getattr(cuda.tl, kind), "N": cuda.BLOCKS}
    function = cuda._normals
    constants = {p.name: settings[p.name] for p in function.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else "i64" for p in function.params}
    source = compiler.ASTSource(function, signature, constants)
    code = compiler.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert not re.search(r"\bfma\.|\.approx|div\.full", code)
    assert len(re.findall(r"div\.rn", code)) == len(re.findall(r"sqrt\.rn", code)) > 0
    form = twin.FORMATS[getattr(torch, kind)]
    digits, number = (16, np.float64) if kind == "float64" else (8, np.float32)
    found = {int(v, 16) for v in re.findall(rf"0[df]([0-9A-F]{{{digits}}})\b", code)}
    for c in (*form.log, *form.sine, *form.cosine, twin.LN2):
        assert {int.from_bytes(number(v).tobytes(), "little") for v in (c, -c)} & found, c
