"""The Triton kernels against their twins: on CUDA, and without it in Triton's interpreter, in a process of their own.

Tests that need a device run on CUDA, or, where TRITON_INTERPRET=1 says so, on the CPU; `test_in_the_interpreter` runs
this file so. What the interpreter does not see, that the kernels compile and read 16 bytes at a time, is checked by
compiling them for a device that need not be there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.kernels import Slopes, largest, rms, twin

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64]
NORMS = [rms, largest]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::UserWarning:triton")


def on_device(test: Any) -> Any:
    """Marks a test of what runs on a device."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, which serves the device."""
    from flowsolve.kernels import cuda

    monkeypatch.setattr(kernels, "_loaded", {DEVICE: cuda})
    monkeypatch.setattr(kernels, "_host", lambda: None)
    with kernels.use("fused"):
        yield cuda


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    v = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v.to(DEVICE, dtype)


def slopes_from(y: Tensor, ks: list[Tensor]) -> Slopes:
    slopes = Slopes(y)
    for k in ks:
        slopes.append(k)
    return slopes


def agree(y: Tensor, ks: list[Tensor], ahead: Tensor, h: Any, stages: Any, weights: Any) -> None:
    """A sum and its norms against the twin in float64, to (m + 2) roundings of what is added up."""
    slopes, eps, m = slopes_from(y, ks), torch.finfo(y.dtype).eps, len(stages)
    assert slopes._kernels is not None
    products, chosen, state, after = h[:, None] * weights, [ks[i].double() for i in stages], y.double(), ahead.double()
    added = twin.weighted([k.abs() for k in chosen], np.abs(products), state.abs())
    found = slopes.advance(h, stages, weights)
    assert found.dtype is y.dtype
    error = (found.double() - twin.weighted(chosen, products, state)).abs()
    assert bool((error <= (m + 2) * eps * added).all())
    most = (added - state.abs()) / twin.scale(torch.maximum(state.abs(), after.abs()), 1e-3, 1e-2)
    for norm in NORMS:
        found = slopes.error_norm(h, stages, weights, ahead, 1e-3, 1e-2, norm)
        truth = twin.error_norm(chosen, products, state, after, 1e-3, 1e-2, norm)
        assert found.dtype is y.dtype
        assert found.shape == (len(y),)
        # Sums of squares are of the state's dtype, and division and root those of the device: a few roundings each.
        assert bool(((found.double() - truth).abs() <= (m + 16) * eps * norm(most)).all())


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 9, 64, 100, 1025, 3072])
def test_sums_and_norms(width: int, dtype: torch.dtype, cuda: ModuleType) -> None:
    """Rows of any width in tiles that they fit and in several, of few samples and of more than a tile holds."""
    rng = np.random.default_rng(width)
    for count in (1, 300 if width < 4 else 70 if width < 16 else 6 if width < 1024 else 2):
        ks = list(numbers(3, count, width, dtype=dtype).unbind(0))
        y, ahead = numbers(count, width, dtype=dtype, seed=1), numbers(count, width, dtype=dtype, seed=2)
        for own_h in {1, count}:
            for own_weights in {1, count}:
                agree(y, ks, ahead, rng.normal(size=own_h), np.array([2, 0]), rng.normal(size=(own_weights, 2)))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_slope_to_sixteen(dtype: torch.dtype, cuda: ModuleType) -> None:
    rng = np.random.default_rng(0)
    ks = list(numbers(16, 3, 40, dtype=dtype).unbind(0))
    y, ahead = numbers(3, 40, dtype=dtype, seed=1), numbers(3, 40, dtype=dtype, seed=2)
    for m in (1, 2, 3, 7, 16):
        for own_h in (1, 3):
            agree(y, ks, ahead, rng.normal(size=own_h), rng.permutation(m), rng.normal(size=(1, m)))
        agree(y, ks, ahead, rng.normal(size=3), rng.permutation(m), rng.normal(size=(3, m)))


@on_device
def test_a_sum_of_nothing(cuda: ModuleType) -> None:
    y, nothing = numbers(3, 40), (np.zeros(0, dtype=np.int64), np.zeros((1, 0)))
    for h in (np.full(1, 0.5), np.full(3, 0.5)):
        assert (slopes_from(y, [y]).advance(h, *nothing) == y).all()
        assert not slopes_from(y, [y]).error_norm(h, *nothing, y, 1.0, 1.0, rms).any()


@pytest.mark.gpu
def test_a_row_of_many_tiles(cuda: ModuleType) -> None:
    for width in (786_432, 3_000_001):
        y, ks = (
            numbers(1, width, dtype=torch.float32),
            list(numbers(2, 1, width, dtype=torch.float32, seed=1).unbind(0)),
        )
        agree(y, ks, y + ks[0], np.array([0.1]), np.arange(2), np.array([[0.5, -0.3]]))


@on_device
def test_the_norms_of_more_tiles_than_are_read_at_a_time(cuda: ModuleType) -> None:
    whole, width, kind = numbers(2, 2_500).abs(), 2_500 * cuda.TILE, cuda.KINDS[torch.float64]
    broken = whole.clone()
    broken[1, -1] = torch.nan
    for parts in (whole, broken):
        for maximum, truth in ((True, parts.amax(1)), (False, (parts.sum(1) / width).sqrt())):
            out = torch.empty_like(truth)
            cuda._gather[(2,)](out.data_ptr(), parts.data_ptr(), width, 2_500, cuda.TILE, kind, maximum)
            torch.testing.assert_close(out, truth, rtol=1e-14, atol=0.0, equal_nan=True)


@on_device
def test_many_short_rows(cuda: ModuleType) -> None:
    ks, y = list(numbers(2, 5_000, 2).unbind(0)), numbers(5_000, 2, seed=1)
    agree(y, ks, y + ks[0], np.linspace(0.1, 1.0, 5_000), np.arange(2), np.array([[0.5, -0.3]]))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_do_not_begin_at_16_bytes(dtype: torch.dtype, cuda: ModuleType) -> None:
    """A view into a batch is contiguous, but need not be aligned."""
    whole, rng = numbers(5, 3, 41, dtype=dtype), np.random.default_rng(0)
    y, *ks = (v.flatten()[1:121].view(3, 40) for v in whole)
    assert y.is_contiguous()
    assert y.data_ptr() % 16
    agree(y, ks, whole[0].flatten()[2:122].view(3, 40), rng.normal(size=3), np.arange(4), rng.normal(size=(1, 4)))


@on_device
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(
    bad: float, norm: Callable[[Tensor], Tensor], cuda: ModuleType
) -> None:
    h, stages, weights = np.full(3, 0.1), np.arange(2), np.array([[0.5, -0.25]])
    for width in (5, 1_100):
        y, ahead = numbers(3, width), numbers(3, width, seed=1)
        ks = [numbers(3, width, seed=2), numbers(3, width, seed=3)]
        clean = slopes_from(y, ks).error_norm(h, stages, weights, ahead, 1e-3, 1e-2, norm)
        broken, infinite = ks[1].clone(), ahead.clone()
        broken[1, -1] = infinite[1, -1] = bad
        slopes = slopes_from(y, [ks[0], broken])
        assert (~slopes.advance(h, stages, weights).isfinite()).nonzero().tolist() == [[1, width - 1]]
        for error in (
            slopes.error_norm(h, stages, weights, ahead, 1e-3, 1e-2, norm),
            slopes_from(y, ks).error_norm(h, stages, weights, infinite, 1e-3, 1e-2, norm),
        ):
            assert error.isfinite().tolist() == [True, False, True]
            assert (error[[0, 2]] == clean[[0, 2]]).all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tolerance_and_no_state_is_no_error(dtype: torch.dtype, cuda: ModuleType) -> None:
    y, one = torch.zeros(2, 3, dtype=dtype, device=DEVICE), (np.ones(1), np.array([0]), np.ones((1, 1)))
    slopes = slopes_from(y, [torch.zeros_like(y)])
    assert slopes.error_norm(*one, y, 0.0, 1e-3, rms).tolist() == [0.0, 0.0]
    slopes = slopes_from(y, [torch.ones_like(y)])
    assert bool((slopes.error_norm(*one, torch.ones_like(y), 0.0, 1e-3, rms) > 900.0).all())


@on_device
def test_weights_and_tolerances_keep_float64(cuda: ModuleType) -> None:
    """Triton takes floats for float32; ours have 53 bits."""
    y, k, third = numbers(1, 3), numbers(2, 1, 3, seed=1), np.array([[1.0 / 3.0, 1e-300]])
    found = slopes_from(y, list(k)).advance(np.ones(1), np.arange(2), third)
    torch.testing.assert_close(found, y + k[0] / 3.0, rtol=4e-16, atol=0.0)
    for atol, rtol in ((1.0 / 3.0, 0.0), (0.0, 1e-11), (1e-300, 0.0)):
        error = slopes_from(y, list(k)).error_norm(np.ones(1), np.arange(2), third, y, atol, rtol, largest)
        truth = ((k[0] / 3.0).abs() / (atol + rtol * y.abs())).amax(1)
        torch.testing.assert_close(error, truth, rtol=1e-15, atol=0.0)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (300, 7), (5, 2, 1000)])
def test_merge_copies_bits(shape: tuple[int, ...], dtype: torch.dtype, cuda: ModuleType) -> None:
    new, old = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    ints, nan = (torch.int32, 0x7F800001) if dtype == torch.float32 else (torch.int64, 0x7FF0000000000001)
    for v in (new, old):
        v.view(ints).view(-1)[::2] = nan
        v.view(-1)[-1] = -0.0
    accepted = np.random.default_rng(0).random(shape[0]) < 0.5
    accepted[:2] = True, False
    found = Slopes(new).merge(accepted, int(accepted.sum()), new, old)
    mask = torch.from_numpy(accepted).to(DEVICE).reshape(-1, *[1] * (len(shape) - 1))
    assert bool((found.view(ints) == torch.where(mask, new.view(ints), old.view(ints))).all())


@on_device
def test_the_probe(cuda: ModuleType) -> None:
    cuda.probe()


@on_device
def test_step_sizes_are_sent_once_an_attempt(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    from_numpy = torch.from_numpy

    def spy(array: Any) -> Tensor:
        sent.append(array.size)
        return from_numpy(array)

    y, k, w = numbers(3, 4), numbers(3, 4, seed=1), np.ones((1, 2))
    monkeypatch.setattr(torch, "from_numpy", spy)
    for _ in range(2):
        slopes, h = slopes_from(y, [k, k]), np.array([1.0, 2.0, 3.0])
        for _ in range(3):
            slopes.advance(h, np.arange(2), w)
        slopes.error_norm(h, np.arange(2), w, y, 1.0, 1.0, rms)
        for m in (1, 2):
            slopes.advance(np.ones(1), np.arange(m), w[:, :m])
    assert sent == [3, 3]
    slopes = slopes_from(y, [k, k])
    for h in (np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])):  # another h is another matter, …
        found = slopes.advance(h, np.arange(2), w)
        torch.testing.assert_close(found, y + 2 * from_numpy(h).to(DEVICE)[:, None] * k)
        found = slopes.advance(h, np.arange(2), np.repeat(w, 3, 0))  # … and weights of one's own come between
        torch.testing.assert_close(found, y + 2 * from_numpy(h).to(DEVICE)[:, None] * k)


@on_device
@pytest.mark.parametrize("solver", [fs.solvers.Dopri5, fs.solvers.Dopri8])
def test_solves_are_the_same_with_either_kernels(solver: Any, cuda: ModuleType) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        k = y[:, 1:]
        return torch.cat((k * torch.cos(k * t) * (1.0 + y[:, :1].square()) / 2.0, torch.zeros_like(k)), 1)

    tol = 1e-3 if INTERPRETED else 1e-6
    y0 = torch.stack((numbers(6), torch.linspace(0.0, 6.0, 6, dtype=torch.float64, device=DEVICE)), 1)
    fused = fs.solve(f, y0, 0.0, 1.0, solver=solver(tol, tol), t_eval=[0.3, 1.0])
    with kernels.use("torch"):
        plain = fs.solve(f, y0, 0.0, 1.0, solver=solver(tol, tol), t_eval=[0.3, 1.0])
    for field in ("nfe", "status", "accepted", "rejected"):
        assert getattr(plain, field).tolist() == getattr(fused, field).tolist(), field
    torch.testing.assert_close(fused.x, plain.x, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="of streams and devices")
def test_a_fixed_grid_does_not_wait(cuda: ModuleType) -> None:
    """Neither sums with shared steps nor those with a sample's own make the host wait for the device."""
    y, k = numbers(64, 3_072, dtype=torch.float32), numbers(64, 3_072, dtype=torch.float32, seed=1)
    h, own, w = np.array([0.1]), np.linspace(0.1, 1.0, 64), np.ones((1, 2))
    slopes = slopes_from(y, [k, k])
    try:
        for mode in ("default", "error"):  # compiled the first time
            torch.cuda.set_sync_debug_mode(mode)
            for size in (h, own):
                after = slopes.advance(size, np.arange(2), w)
                slopes.error_norm(size, np.arange(2), w, after, 1.0, 1.0, rms)
            slopes.merge(own > 0.5, int((own > 0.5).sum()), after, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="of streams and devices")
def test_a_fixed_step_can_be_captured(cuda: ModuleType) -> None:
    y, k, w = (
        numbers(8, 100, dtype=torch.float32),
        numbers(8, 100, dtype=torch.float32, seed=1),
        np.array([[0.5, 0.25]]),
    )
    slopes_from(y, [k, k]).advance(np.array([0.1]), np.arange(2), w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = slopes_from(y, [k, k]).advance(np.array([0.1]), np.arange(2), w)
    y.fill_(1.0)
    graph.replay()
    torch.testing.assert_close(out, 1.0 + 0.075 * k)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 8, 8), (1, 4099)])
def test_combinations(shape: tuple[int, ...], dtype: torch.dtype, cuda: ModuleType) -> None:
    """Against float64: each term is rounded once as a product and once as a sum at most."""
    for count in (2, 3, 4, 16):
        tensors = [numbers(*shape, dtype=dtype, seed=i) for i in range(count)]
        weights = [0.01, *(1.7 / (i + 1) for i in range(count - 1))]
        found = kernels.combination(weights, tensors)
        assert found is not None
        assert found.dtype is dtype
        terms = [w * v.double() for w, v in zip(weights, tensors, strict=True)]
        allowed = 2 * count * torch.finfo(dtype).eps * sum(t.abs() for t in terms)
        assert bool(((found.double() - sum(terms)).abs() <= allowed).all())
    assert kernels.combination([1.0], tensors[:1]) is None
    assert kernels.combination([1.0] * 17, [tensors[0]] * 17) is None
    assert kernels.combination([1.0] * 3, [tensors[0], tensors[0].to(torch.float16), tensors[0]]) is None


@pytest.mark.skipif(INTERPRETED, reason="is what runs this")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout


@pytest.mark.skipif(INTERPRETED, reason="of the compiler")
@pytest.mark.parametrize("kernel", ["_advance", "_error", "_gather", "_merge"])
def test_kernels_compile_and_read_16_bytes_at_a_time(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an H100, whether or not there is one."""
    pytest.importorskip("triton", minversion="3.3")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    from flowsolve.kernels import cuda

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(cuda, kernel)
    for dtype, kind in cuda.KINDS.items():
        settings = {
            "M": 6,
            "COLUMNS": 1,
            "KIND": kind,
            "BASE": True,
            "MAXIMUM": True,
            "R": 1,
            "C": cuda.TILE,
            "ALIGNED": True,
        }
        constants = {p.name: settings[p.name] for p in function.params if p.is_constexpr}
        signature = {p.name: "constexpr" if p.is_constexpr else "i64" for p in function.params}
        options = {"num_warps": cuda.WARPS[dtype], "enable_fp_fusion": True}
        source = compiler.ASTSource(function, signature, constants)
        code = compiler.compile(source, target=target, options=options).asm["ptx"]
        wide = len(re.findall(r"ld\.global\S*\.v[24]\.", code))
        at_once = cuda.TILE * (4 if kernel == "_merge" else dtype.itemsize) // (32 * 16)
        warps = cuda.WARPS[dtype]
        assert wide == {"_advance": 7, "_error": 8, "_gather": 0, "_merge": 2}[kernel] * at_once // warps
