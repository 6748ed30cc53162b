"""The fused kernels against their twins, when they serve and when they do not, and the arithmetic of step control."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.kernels import Law, Slopes, control, largest, rms, twin
from flowsolve.solvers import PI, PID, Bosh3, Dopri5, Dopri8, I, Tsit5

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float64]
SIGNALLING = {torch.float32: (torch.int32, 0x7F800001), torch.float64: (torch.int64, 0x7FF0000000000001)}
SHAPES = [(b, d) for b in (1, 3, 64) for d in (1, 2, 8, 9, 2047, 2049, 5000)]
NORMS = [rms, largest]
RUNNING, SUCCESS, NONFINITE, UNDERFLOW, BUDGET, MAX_STEPS, MAX_REJECTIONS = range(-1, 6)


@pytest.fixture(scope="module")
def cpu() -> ModuleType:
    """The compiled module, which serves whatever comes from then on."""
    with kernels.use("fused"):
        Slopes(torch.ones(1, 1))
    module = kernels._loaded["cpu"]
    assert module is not None
    return module


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def served(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled kernels as they are called."""
    calls: list[str] = []

    def spied(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any) -> Any:
            calls.append(name)
            return kernel(*arguments)

        return spy

    for name in ("advance", "error_norm", "merge"):
        monkeypatch.setattr(cpu, name, spied(name, getattr(cpu, name)))
    return calls


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slopes_from(y: Tensor, ks: list[Tensor]) -> Slopes:
    slopes = Slopes(y)
    for k in ks:
        slopes.append(k)
    return slopes


def sums(b: int, m: int, seed: int = 0) -> Iterator[tuple[Any, Any, Any]]:
    """(h, stages, weights): shared and per sample, with m of the slopes in another order than theirs."""
    rng = np.random.default_rng((seed, b, m))
    for own_h in {1, b}:
        for own_weights in {1, b}:
            yield rng.normal(size=own_h), rng.permutation(m), rng.normal(size=(own_weights, m))


def script(text: str, **environment: str) -> str:
    """What a Python program prints in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "FLOWSOLVE_KERNELS"} | environment
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- fused kernels against their twins -------------------------------------------------------------------------------


def agree(y: Tensor, ks: list[Tensor], ahead: Tensor, counts: range) -> None:
    """All sums of m slopes and all norms against the twin in float64, to (m + 2) roundings of what is added up."""
    eps = torch.finfo(y.dtype).eps
    with kernels.use("fused"):
        slopes = slopes_from(y, ks)
    assert slopes._kernels is not None
    wide, state, after = [k.double() for k in ks], y.double(), ahead.double()
    for m in counts:
        for h, stages, weights in sums(len(y), m):
            products, chosen = h[:, None] * weights, [wide[i] for i in stages]
            added = twin.weighted([k.abs() for k in chosen], np.abs(products), state.abs())
            found = slopes.advance(h, stages, weights)
            assert found.dtype is y.dtype
            error = (found.double() - twin.weighted(chosen, products, state)).abs()
            assert bool((error <= (m + 2) * eps * added).all()), (y.shape, m, h.shape, weights.shape)
            for norm in NORMS:
                found = slopes.error_norm(h, stages, weights, ahead, 1e-3, 1e-2, norm)
                truth = twin.error_norm(chosen, products, state, after, 1e-3, 1e-2, norm)
                most = norm((added - state.abs()) / twin.scale(torch.maximum(state.abs(), after.abs()), 1e-3, 1e-2))
                error = (found.double() - truth).abs()
                assert found.shape == (len(y),)
                assert bool((error <= (m + 8) * eps * most).all()), (y.shape, m, h.shape, weights.shape, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_norms(shape: tuple[int, int], dtype: torch.dtype, cpu: ModuleType) -> None:
    """One slope to sixteen; of large states, fewer numbers of slopes."""
    ks = list(numbers(cpu.MOST, *shape, dtype=dtype).unbind(0))
    y, ahead = numbers(*shape, dtype=dtype, seed=1), numbers(*shape, dtype=dtype, seed=2)
    agree(y, ks, ahead, range(1, 17) if y.numel() < 10_000 else range(1, 17, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 20_001), (3, 9_000), (64, 2_047), (20_000, 2)])
def test_sums_and_norms_split_over_threads(
    shape: tuple[int, int], dtype: torch.dtype, cpu: ModuleType, threads: Callable[[int], None]
) -> None:
    """Parts that end within rows, and rows that are in one part or several."""
    if not cpu.THREADED or cpu.numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba has one thread here")
    ks = list(numbers(3, *shape, dtype=dtype).unbind(0))
    y, ahead = numbers(*shape, dtype=dtype, seed=1), numbers(*shape, dtype=dtype, seed=2)
    threads(2)
    assert cpu.plan(y)[cpu.PARTS] == 2
    agree(y, ks, ahead, range(3, 4))
    threads(1)
    assert cpu.plan(y)[cpu.PARTS] == 0


@pytest.mark.parametrize("shape", SHAPES[7:14])
def test_a_sum_of_nothing(shape: tuple[int, int], cpu: ModuleType) -> None:
    """A stage whose row is zero is the state itself, in memory of its own; an estimate of zeros is no error."""
    y, nothing = numbers(*shape), (np.zeros(0, dtype=np.int64), np.zeros((1, 0)))
    with kernels.use("fused"):
        found = slopes_from(y, [y]).advance(np.full(3, 0.5), *nothing)
        assert found.data_ptr() != y.data_ptr()
        assert (found == y).all()
        assert not slopes_from(y, [y]).error_norm(np.full(3, 0.5), *nothing, y, 1.0, 1.0, rms).any()


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 5)])
def test_any_shape_of_a_sample(shape: tuple[int, ...], cpu: ModuleType) -> None:
    y, k = numbers(*shape), numbers(*shape, seed=1)
    with kernels.use("fused"):
        slopes = slopes_from(y, [k])
        assert slopes._kernels is not None
        h = np.array([1.0, 2.0, 3.0, 4.0])
        found = slopes.advance(h, np.array([0]), np.array([[0.5]]))
        torch.testing.assert_close(found, y + k * torch.from_numpy(0.5 * h).reshape(-1, *[1] * (y.ndim - 1)))
        error = slopes.error_norm(h, np.array([0]), np.array([[0.5]]), found, 1.0, 0.0, rms)
        torch.testing.assert_close(error, rms(found - y), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(
    bad: float, norm: Callable[[Tensor], Tensor], count: int, cpu: ModuleType, threads: Callable[[int], None]
) -> None:
    """A slope, or the state ahead, with one bad number anywhere in a row: that row's error is not finite either."""
    threads(count)
    h, stages, weights = np.full(3, 0.1), np.arange(2), np.array([[0.5, -0.25]])
    for width in (1, 5, 8_000):
        y, ahead = numbers(3, width), numbers(3, width, seed=1)
        ks = [numbers(3, width, seed=2), numbers(3, width, seed=3)]
        clean = slopes_from(y, ks).error_norm(h, stages, weights, ahead, 1e-3, 1e-2, norm)
        others = [0, 2]
        for i in {0, width // 2, width - 1}:
            broken = [k.clone() for k in ks]
            broken[1][1, i] = bad
            with kernels.use("fused"):
                slopes = slopes_from(y, broken)
                after = slopes.advance(h, stages, weights)
                error = slopes.error_norm(h, stages, weights, ahead, 1e-3, 1e-2, norm)
            assert slopes._kernels is not None
            assert (~after.isfinite()).nonzero().tolist() == [[1, i]]
            assert not error[1].isfinite()
            torch.testing.assert_close(error[others], clean[others], rtol=1e-12, atol=0.0)
            infinite = ahead.clone()
            infinite[1, i] = bad
            with kernels.use("fused"):
                error = slopes_from(y, ks).error_norm(h, stages, weights, infinite, 1e-3, 1e-2, norm)
            assert not error[1].isfinite()
            torch.testing.assert_close(error[others], clean[others], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tolerance_and_no_state_is_no_error(dtype: torch.dtype, cpu: ModuleType) -> None:
    """atol = 0 and a number that is and stays 0: its error is 0, not 0/0; one that moves has a large one."""
    y, one = torch.zeros(2, 3, dtype=dtype), (np.ones(1), np.array([0]), np.ones((1, 1)))
    for mode in ("torch", "fused"):
        with kernels.use(mode):
            slopes = slopes_from(y, [torch.zeros_like(y)])
            assert slopes.error_norm(*one, y, 0.0, 1e-3, rms).tolist() == [0.0, 0.0]
            slopes = slopes_from(y, [torch.ones_like(y)])
            assert bool((slopes.error_norm(*one, torch.ones_like(y), 0.0, 1e-3, rms) > 900.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (64, 7), (5, 2, 333)])
def test_merge_copies_bits(shape: tuple[int, ...], dtype: torch.dtype, served: list[str]) -> None:
    """Any bits, those of signalling NaNs and −0 included."""
    ints, nan = SIGNALLING[dtype]
    new, old = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    for v in (new, old):
        v.view(ints).view(-1)[::2] = nan
        v.view(-1)[-1] = -0.0
    accepted = np.random.default_rng(0).random(shape[0]) < 0.5
    accepted[:2] = True, False
    with kernels.use("fused"):
        found = Slopes(new).merge(accepted, int(accepted.sum()), new, old)
    assert served == ["merge"]
    truth = torch.where(torch.from_numpy(accepted).reshape(-1, *[1] * (len(shape) - 1)), new.view(ints), old.view(ints))
    assert bool((found.view(ints) == truth).all())


def test_merge_is_free_where_all_agree(served: list[str]) -> None:
    new, old = numbers(3, 2), numbers(3, 2, seed=1)
    assert Slopes(new).merge(np.ones(3, dtype=bool), 3, new, old) is new
    assert Slopes(new).merge(np.zeros(3, dtype=bool), 0, new, old) is old
    assert served == []


# --- when they serve -------------------------------------------------------------------------------------------------


class Own(Tensor):
    """A subclass of tensors."""


def transposed(y: Tensor) -> Tensor:
    return y.mT.contiguous().mT


UNSERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "not contiguous": transposed,
    "recorded": lambda y: y.clone().requires_grad_(),
    "float16": lambda y: y.half(),
    "bfloat16": lambda y: y.bfloat16(),
    "complex": lambda y: y.to(torch.complex128),
    "a subclass": lambda y: y.as_subclass(Own),
    "a parameter": lambda y: torch.nn.Parameter(y.clone(), requires_grad=False),
    "on meta": lambda y: y.to("meta"),
    "empty": lambda y: y[:0],
    "of empty samples": lambda y: y[:, :0],
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_the_twin_serves_other_tensors(kind: str, served: list[str]) -> None:
    y, k = UNSERVED[kind](numbers(3, 4)), UNSERVED[kind](numbers(3, 4, seed=1))
    one, half = (
        (np.array([0.5]), np.array([0]), np.ones((1, 1))),
        (np.full(len(y), 0.5), np.array([0]), np.ones((1, 1))),
    )
    with kernels.use("fused"):
        slopes = slopes_from(y, [k])
        after = slopes.advance(*one)
        assert slopes.advance(*half).shape == y.shape
        if not (y.is_complex() or not y.numel()):
            assert slopes.error_norm(*one, after, 1e-3, 1e-3, rms).shape == (len(y),)
        if len(y):
            merged = slopes.merge(np.array([True, False, True]), 2, after, y)
            assert merged.dtype is y.dtype
    assert served == []
    assert type(after) is (Own if kind == "a subclass" else Tensor)
    if not y.is_meta:
        torch.testing.assert_close(after, y + 0.5 * k, rtol=0.0, atol=0.0, check_dtype=True)
    assert after.requires_grad == (kind == "recorded")


def test_one_slope_that_does_not_fit_is_enough(served: list[str]) -> None:
    """A slope in another layout or of another dtype, a recorded one, or too many."""
    y, one, two = numbers(3, 4), np.ones(1), np.ones((1, 2))
    fine = numbers(3, 4, seed=1)
    for odd in (transposed(fine), fine.clone().requires_grad_(), fine.as_subclass(Own)):
        with kernels.use("fused"):
            after = slopes_from(y, [fine, odd]).advance(one, np.arange(2), two)
        torch.testing.assert_close(after.detach().as_subclass(Tensor), y + fine + fine)
        assert after.requires_grad == odd.requires_grad
    with kernels.use("fused"):
        after = slopes_from(y, [fine] * 17).advance(one, np.arange(17), np.ones((1, 17)))
        torch.testing.assert_close(after, y + 17 * fine)
    assert served == []
    with kernels.use("fused"), torch.no_grad():  # nothing is recorded: gradients are no obstacle
        slopes_from(y, [fine.clone().requires_grad_()] * 16).advance(one, np.arange(2), two)
    assert served == ["advance"]


def test_a_norm_of_one_s_own_is_the_twin_s(served: list[str]) -> None:
    y = numbers(3, 4)
    with kernels.use("fused"):
        error = slopes_from(y, [y]).error_norm(
            np.ones(1), np.array([0]), np.ones((1, 1)), y, 1.0, 0.0, lambda e: e.abs().amin(1)
        )
    torch.testing.assert_close(error, y.abs().amin(1))
    assert served == []


def growth(t: Tensor, y: Tensor) -> Tensor:
    return y * torch.cos(t)


def final(y: Tensor) -> Tensor:
    return fs.solve(growth, y, 0.0, 2.0, solver=fs.solvers.RK4(), nfe=40, throw=False).x


def summed(y: Tensor, k: Tensor) -> Tensor:
    return slopes_from(y, [k]).advance(np.array([0.5]), np.array([0]), np.ones((1, 1)))


def test_transforms_of_functions_see_the_twin(served: list[str]) -> None:
    """A sum under jvp and vmap; and solves on a fixed grid, whose y(2) = y(0) exp(sin 2)."""
    y, v = numbers(3, 2), numbers(3, 2, seed=1)
    batches = numbers(5, 3, 2)
    with kernels.use("fused"):
        found = torch.func.jvp(summed, (y, v), (v, y))
        torch.testing.assert_close(found, (y + 0.5 * v, v + 0.5 * y))
        torch.testing.assert_close(torch.func.vmap(summed)(batches, batches), 1.5 * batches)
        assert served == []
        torch.testing.assert_close(summed(y, v), y + 0.5 * v)
        assert served == ["advance"]

        primal, tangent = torch.func.jvp(final, (y,), (v,))
        gain = float((primal / y)[0, 0])
        assert gain == pytest.approx(math.exp(math.sin(2.0)), rel=1e-4)
        torch.testing.assert_close(tangent, v * gain, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(torch.func.vmap(final)(batches), batches * gain, rtol=1e-12, atol=1e-15)
        jacobian = torch.func.jacfwd(lambda u: final(u[None])[0])(y[0])
        torch.testing.assert_close(jacobian, torch.eye(2, dtype=y.dtype) * gain, rtol=1e-12, atol=1e-15)


def test_a_traced_step_holds_the_twin(served: list[str]) -> None:
    """torch.compile sees torch operations, whatever serves outside."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    y, k = numbers(3, 2), numbers(3, 2, seed=1)
    with kernels.use("fused"):
        found = torch.compile(summed, backend=keep)(y, k)
    torch._dynamo.reset()
    torch.testing.assert_close(found, y + 0.5 * k)
    assert graphs or served == ["advance"], "neither traced nor served"


# --- which mode, and when the compiler is loaded ---------------------------------------------------------------------


def test_modes(served: list[str]) -> None:
    y, one = numbers(3, 4), (np.ones(1), np.array([0]), np.ones((1, 1)))
    with kernels.use("torch"):
        slopes_from(y, [y]).advance(*one)
        assert served == []
        with kernels.use("fused"):
            slopes_from(y, [y]).advance(*one)
            assert served == ["advance"]
        slopes_from(y, [y]).advance(*one)
    assert served == ["advance"]
    with kernels.use("auto"):  # loaded already
        slopes_from(y, [y]).advance(*one)
    assert served == ["advance", "advance"]


def test_an_unknown_mode() -> None:
    with (
        pytest.raises(ValueError, match=r"kernels\.use\('numba'\); expected one of auto, torch, fused"),
        kernels.use("numba"),
    ):
        pass


def test_the_environment_says_how_a_process_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("kernels_of_another_process", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    for mode in kernels.MODES:
        monkeypatch.setenv("FLOWSOLVE_KERNELS", mode)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        assert module._mode.get() == mode
    monkeypatch.setenv("FLOWSOLVE_KERNELS", "quick")
    with pytest.raises(ValueError, match=r"FLOWSOLVE_KERNELS is 'quick'; expected one of auto, torch, fused"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_short_programs_load_no_compiler() -> None:
    out = script(
        """
        import sys, torch
        names = {"numba", "llvmlite", "triton"}
        print(sorted(names & set(sys.modules)))
        import flowsolve as fs
        print(sorted(names & set(sys.modules)))
        fs.solve(lambda t, y: -y, torch.ones(16, 2), 0.0, 1.0, solver=fs.solvers.Dopri5())
        print(sorted(names & set(sys.modules)))
        from flowsolve import kernels
        kernels._rent["cpu"] = kernels.PRICE - 2.5 * kernels.CALL
        fs.solve(lambda t, y: -y, torch.ones(16, 2), 0.0, 1.0, solver=fs.solvers.Dopri5())
        print(sorted(names & set(sys.modules)), kernels._loaded["cpu"].__name__)
        """
    )
    before, imported, short, long = out.strip().splitlines()
    assert before == imported == short == "[]"
    assert long == "['llvmlite', 'numba'] flowsolve.kernels.cpu"


def test_the_twin_serves_until_it_has_cost_as_much_as_loading(
    cpu: ModuleType, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_loaded", {})
    y = numbers(10, 100)
    price = kernels.CALL + kernels.BYTE * 8 * y.numel()
    monkeypatch.setattr(kernels, "_rent", {"cpu": kernels.PRICE - 10.5 * price, "cuda": 0.0})
    with kernels.use("auto"):
        served_by = [Slopes(y)._kernels for _ in range(12)]
    assert served_by == [None] * 10 + [cpu] * 2
    with kernels.use("torch"):
        assert Slopes(y)._kernels is None


def test_without_a_compiler_the_twin_serves(
    cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried once, and the log says why it failed."""

    def broken() -> None:
        raise OSError("no compiler today")

    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(cpu, "probe", broken)
    y = numbers(3, 4)
    with kernels.use("fused"), caplog.at_level(logging.WARNING):
        for _ in range(3):
            after = slopes_from(y, [y]).advance(np.ones(1), np.array([0]), np.ones((1, 1)))
    torch.testing.assert_close(after, 2 * y)
    assert [r.getMessage() for r in caplog.records] == [
        "no fused kernels on cpu, plain torch serves: no compiler today"
    ]


def test_what_is_compiled_is_kept_on_disk(cpu: ModuleType) -> None:
    """Another process compiles nothing of what this one has."""
    cpu.aim(np.zeros((4, 2)), 1.0, np.zeros(3))
    out = script(
        """
        import numpy as np, torch
        from flowsolve.kernels import cpu
        cpu.probe()
        cpu.aim(np.zeros((4, 2)), 1.0, np.zeros(3))
        for name in ("_advance", "_error", "_merge", "aim"):
            stats = getattr(cpu, name).stats
            print(name, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
        """
    )
    assert out.split("\n")[:-1] == ["_advance 1 0", "_error 2 0", "_merge 1 0", "aim 1 0"], out


def test_where_nothing_can_be_kept_on_disk_it_is_compiled_anew(
    cpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba.core import caching

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        cpu.numba.njit(cache=True)(lambda x: x + 1)
    assert cpu._compiled(lambda x: x + 1)(2) == 3


def test_columns_in_any_order_of_memory_are_compiled_once(cpu: ModuleType) -> None:
    """Refilled batches pick columns by number, which transposes them in memory."""
    y0 = torch.stack((torch.ones(6), torch.arange(6.0)), 1).double()
    with kernels.use("fused"):
        sol = fs.solve(spinner, y0, 0.0, 3.0, solver=Dopri5(), t_eval=[0.5, 1.0, 2.9, 3.0])
    assert len(set(sol.nfe.tolist())) > 1
    for name in ("_advance", "_merge", "aim", "judge"):
        assert len(getattr(cpu, name).signatures) == 1, name


def test_a_forked_child_solves_too(cpu: ModuleType) -> None:
    """After the parent has used threads: they do not exist in the child."""
    if not hasattr(os, "fork") or not cpu.THREADED or cpu.numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("no fork, or no threads, here")
    out = script(
        """
        import os, signal, torch
        import flowsolve as fs
        from flowsolve import kernels
        from flowsolve.kernels import cpu
        torch.set_num_threads(2)
        y = torch.ones(4, 5000, dtype=torch.float64)  # large for the kernels, small for torch

        def solve():
            with kernels.use("fused"):
                return float(fs.solve(lambda t, y: -y, y, 0.0, 1.0, solver=fs.solvers.Dopri5(1e-9, 1e-9)).x.sum())

        mine = solve()
        assert cpu.plan(y)[cpu.PARTS] == 2 and cpu._advance_split.signatures
        child = os.fork()
        if not child:
            signal.alarm(60)  # rather than hang
            os._exit(0 if cpu.plan(y)[cpu.PARTS] == 0 and abs(solve() - mine) < 1e-9 else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), abs(solve() - mine) < 1e-9)
        """
    )
    assert out.strip() == "0 True"


# --- the arithmetic of step control ----------------------------------------------------------------------------------


def law_of(solver: Any, **limits: Any) -> Any:
    return np.array(Law(*solver.law.tolist())._replace(**limits))


DEFAULT = Dopri5()
errors = st.one_of(
    st.sampled_from([0.0, 1e-300, 1e-12, 0.5, 1.0, math.nextafter(1.0, 2.0), 2.0, 1e30, math.inf, math.nan]),
    st.floats(-8.0, 8.0).map(lambda v: 10.0**v),
)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Any, ...]:
    """(error, real, counts, h, s_next, s_end, law) of a few samples on their way."""
    count, sign = draw(st.integers(1, 6)), draw(st.sampled_from([-1.0, 1.0]))

    def row(element: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(element, min_size=count, max_size=count))

    s_end = draw(st.sampled_from([0.0, 1.0, -3.7]))
    left = np.array(row(st.sampled_from([1e-17, 1e-3, 0.5, 2.0])))
    planned = np.array(row(st.sampled_from([1e-18, 1e-9, 1e-3, 0.3, 0.4999999, 1.0, 50.0])))
    logs = st.floats(control.LEAST, 0.0)
    real = np.array([s_end - sign * left, sign * planned, row(logs), row(logs)])
    counts = np.array(
        [row(st.integers(0, 3)), row(st.integers(0, 3)), row(st.integers(0, 3)), row(st.integers(0, 99)), [-1] * count]
    )
    solver = draw(
        st.sampled_from(
            [DEFAULT, Bosh3(controller=I()), Dopri8(controller=PID(0.7, 0.4, 0.1)), Tsit5(controller=PI(beta=0.4))]
        )
    )
    law = law_of(
        solver,
        min_step=draw(st.sampled_from([0.0, 1e-6, 0.2])),
        max_step=draw(st.sampled_from([math.inf, 0.45])),
        max_steps=draw(st.sampled_from([4, 10_000])),
        max_rejections=draw(st.sampled_from([2, 100])),
    )
    return np.array(row(errors)), real, counts, s_end, law


@given(columns())
def test_compiled_step_control_decides_as_its_twin(cpu: ModuleType, given: tuple[Any, ...]) -> None:
    error, real, counts, s_end, law = given
    c = DEFAULT.pair.later
    h, s_next, nodes = control.aim(real, s_end, c)
    found = cpu.aim(real, s_end, c)
    np.testing.assert_array_equal(found[0], h)
    np.testing.assert_array_equal(found[1], s_next)
    np.testing.assert_array_equal(found[2][-1], s_next)
    assert bool((np.abs(found[2] - nodes) <= 4e-16 * (np.abs(real[0]) + np.abs(h))).all())
    before = real.copy(), counts.copy()
    with np.errstate(all="ignore"):
        truth = control.judge(error, real, counts, h, s_next, s_end, law)
    accepted, passed, ended, after, tally = cpu.judge(error, real, counts, h, s_next, s_end, law)
    np.testing.assert_array_equal(accepted, truth.accepted)
    assert (passed, ended) == (truth.passed, truth.ended)
    np.testing.assert_array_equal(tally, truth.counts)
    np.testing.assert_array_equal(after[control.S], truth.real[control.S])
    np.testing.assert_allclose(after, truth.real, rtol=1e-12, atol=0.0)
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(real, before[0])
    np.testing.assert_array_equal(counts, before[1])


@pytest.fixture(params=["twin", "compiled"])
def decide(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """What becomes of a step of size h of one sample from 0 towards `s_end`, by either implementation."""
    implementation: Any = control
    if request.param == "compiled":
        implementation = request.getfixturevalue("cpu")

    def decided(
        error: float, *, h: float = 1.0, s_end: float = 100.0, planned: float | None = None, last: float = 0.0,
        before: float = 0.0, streak: int = 0, taken: int = 5, solver: Any = DEFAULT, **limits: Any,
    ) -> dict[str, Any]:  # fmt: skip
        real = np.array([[0.0], [h if planned is None else planned], [last], [before]])
        counts = np.array([[taken], [streak], [streak], [30], [RUNNING]])
        sizes, s_next, _ = implementation.aim(real, s_end, DEFAULT.pair.later)
        law = law_of(solver, **limits)
        accepted, passed, ended, after, tally = implementation.judge(
            np.array([error]), real, counts, sizes, s_next, s_end, law
        )
        assert passed == int(accepted[0])
        assert ended == int(tally[4, 0] != RUNNING)
        assert tally[:4, 0].tolist() == [
            taken + passed, streak + 1 - passed, 0 if passed else streak + 1, 30 + solver.attempt_nfe
        ]  # fmt: skip
        size, made = float(after[1, 0]), float(sizes[0])
        return {"ok": bool(accepted[0]), "s": float(after[0, 0]), "size": size, "factor": size / made,
                "last": float(after[2, 0]), "before": float(after[3, 0]), "status": int(tally[4, 0])}  # fmt: skip

    return decided


ROUNDED = 2.0**-24 * 9
"""Of a factor: its exponential and the logarithms are rounded to float32, and those (23 at most) enter with exponents
whose sum is a third at most: 1 + 23/3 roundings."""


@pytest.mark.parametrize("h", [1.0, -1.0])
def test_the_formula_of_a_controller(decide: Any, h: float) -> None:
    """Dopri5's estimate is of order 4: k = 5."""
    e, e1, e2 = 0.3, 0.05, 0.2
    history = {"h": h, "s_end": 100.0 * h, "last": math.log(e1), "before": math.log(e2)}
    for controller, beta in (
        (I(), (1.0, 0.0, 0.0)),
        (PI(), (0.85, -0.2, 0.0)),
        (PI(beta=0.4, safety=0.8), (0.7, -0.4, 0.0)),
        (PID(0.4, 0.3, 0.1), (0.8, -0.6, 0.1)),
    ):
        found = decide(e, solver=Dopri5(controller=controller), **history)
        expected = controller.safety * e ** (-beta[0] / 5) * e1 ** (-beta[1] / 5) * e2 ** (-beta[2] / 5)
        assert found["factor"] == pytest.approx(expected, rel=ROUNDED)
        assert (found["ok"], found["s"], found["status"]) == (True, h, RUNNING)
        assert (found["last"], found["before"]) == (
            pytest.approx(math.log(e), rel=2.0**-24),
            pytest.approx(math.log(e1)),
        )
    # dop853's estimate is of order 7: k = 8.
    found = decide(e, solver=Dopri8(controller=I()), **history)
    assert found["factor"] == pytest.approx(0.9 * e ** (-1 / 8), rel=ROUNDED)


def test_a_step_is_accepted_up_to_an_error_of_one(decide: Any) -> None:
    assert decide(1.0)["ok"]
    assert decide(1.0)["factor"] == pytest.approx(0.9, rel=ROUNDED)
    assert not decide(math.nextafter(1.0, 2.0))["ok"]


def test_limits_of_growth(decide: Any) -> None:
    """At most tenfold, a hundredfold after the first attempt, and to a fifth at the least."""
    assert decide(0.0, s_end=1e6)["factor"] == 10.0
    assert decide(0.0, s_end=1e6, taken=0)["factor"] == pytest.approx(0.9 * 1e10**0.17, rel=ROUNDED)
    assert decide(0.0, s_end=1e6, taken=0, solver=Dopri5(controller=I()))["factor"] == pytest.approx(90.0)
    assert decide(0.0, s_end=1e6, taken=0, solver=Bosh3(controller=I()))["factor"] == 100.0
    assert decide(0.0, s_end=1e6, taken=0, streak=1)["factor"] == 1.0
    # A small error remembered shrinks the next step: 0.9 · 1e-4^(0.2/5) is above a fifth, 1e-4^(2/5) is not.
    assert decide(1.0, last=math.log(1e-4))["factor"] == pytest.approx(0.9 * 1e-4**0.04, rel=ROUNDED)
    assert decide(1.0, last=math.log(1e-4), solver=Dopri5(controller=PI(beta=1.0)))["factor"] == 0.2
    assert decide(0.0, s_end=1e6, max_step=3.0)["size"] == 3.0
    assert decide(0.0, last=-1.0)["last"] == math.log(1e-4)


def test_after_a_rejection(decide: Any) -> None:
    """The elementary exponent, never growth, and neither after the acceptance that follows; history stays."""
    found = decide(4.0, last=-1.0, before=-2.0)
    assert (found["ok"], found["s"], found["status"]) == (False, 0.0, RUNNING)
    assert found["factor"] == pytest.approx(0.9 * 4.0 ** (-1 / 5), rel=ROUNDED)
    assert (found["last"], found["before"]) == (-1.0, -2.0)
    assert decide(1.0 + 1e-12, solver=Dopri5(controller=I(safety=1.0)))["factor"] <= 1.0
    assert decide(1e30)["factor"] == 0.2
    assert decide(1e-6, streak=1)["factor"] == 1.0
    assert decide(1.0, streak=1)["factor"] == pytest.approx(0.9, rel=ROUNDED)
    for error in (math.nan, math.inf):
        found = decide(error)
        assert (found["ok"], found["factor"], found["status"]) == (False, 0.1, RUNNING)


def test_how_samples_end(decide: Any) -> None:
    assert decide(0.5, h=1.0, s_end=1.0)["status"] == SUCCESS
    assert decide(2.0, h=1.0, s_end=1.0)["status"] == RUNNING
    assert decide(0.5, taken=9, max_steps=10)["status"] == MAX_STEPS
    assert decide(0.5, taken=9, max_steps=10, s_end=1.0)["status"] == SUCCESS
    assert decide(2.0, streak=4, max_rejections=5)["status"] == MAX_REJECTIONS
    assert decide(2.0, streak=3, max_rejections=5)["status"] == RUNNING
    tiny = {"h": 1e-15, "s_end": 1.0}  # below 16 eps of the time
    assert decide(1e30, **tiny)["status"] == UNDERFLOW
    assert decide(math.nan, **tiny)["status"] == NONFINITE
    assert decide(1e30, h=1.0, min_step=0.5)["status"] == UNDERFLOW
    assert decide(math.inf, h=1.0, min_step=0.5)["status"] == NONFINITE
    found = decide(1.0, h=1.0, min_step=0.95)  # an accepted step is not ended by the least size, but kept to it
    assert (found["status"], found["size"]) == (RUNNING, 0.95)
    assert decide(1e30, h=1.0, min_step=0.1)["status"] == RUNNING


def test_steps_are_stretched_to_the_end_and_cut_there(decide: Any) -> None:
    """A step that is cut to arrive does not forget the size that was planned."""
    for implementation in (control, kernels):
        real = np.array([[0.0, 0.5, 0.9, 0.25], [0.999_999_5, 0.4, 0.3, 0.75], [0.0] * 4, [0.0] * 4])
        h, s_next, nodes = implementation.aim(real, 1.0, np.array([0.5, 1.0]))
        np.testing.assert_array_equal(s_next, [1.0, 0.9, 1.0, 1.0])
        np.testing.assert_array_equal(h, [1.0, 0.4, 1.0 - 0.9, 0.75])
        np.testing.assert_array_equal(nodes, [real[0] + 0.5 * h, s_next])
        back = implementation.aim(-real, -1.0, np.array([0.5, 1.0]))
        for mine, theirs in zip(back, (h, s_next, nodes), strict=True):
            np.testing.assert_array_equal(mine, -theirs)
    assert decide(1.0, planned=5.0, s_end=1.0)["size"] == 5.0
    assert decide(1.0, planned=-5.0, s_end=-1.0)["size"] == -5.0
    assert decide(2.0, planned=5.0, s_end=1.0)["size"] < 1.0
    assert decide(1.0, planned=5.0, s_end=1.0, max_step=2.0)["size"] == 2.0


# --- whole solves ----------------------------------------------------------------------------------------------------


def spinner(t: Tensor, y: Tensor) -> Tensor:
    """y = (u, k): u' = k cos(k t) (1 + u²)/2, stiffness k its own business; k' = 0."""
    k = y[:, 1:]
    return torch.cat((k * torch.cos(k * t) * (1.0 + y[:, :1].square()) / 2.0, torch.zeros_like(k)), 1)


@pytest.mark.parametrize(("solver", "close"), [(Dopri5, 1e-10), (Tsit5, 1e-10), (Bosh3, 1e-10), (Dopri8, 1e-9)])
def test_solves_are_the_same_with_either_kernels(solver: Any, close: float, served: list[str]) -> None:
    """Easy and stiff samples, one that blows up and one that is not finite from the start.

    At order 8 the error of a first small step is little but rounding, and the size of the next follows it.
    """
    y0 = torch.stack((numbers(12), torch.linspace(0.0, 20.0, 12, dtype=torch.float64)), 1)
    y0[5, 0], y0[9] = torch.nan, torch.tensor([3.0, 8.0])

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((y[:, 1:] == 8.0) & (t > 0.5), y * y.abs() * 100.0, spinner(t, y))

    solutions = []
    for mode in ("torch", "fused"):
        with kernels.use(mode):
            solutions.append(fs.solve(f, y0, 0.0, 1.0, solver=solver(1e-5, 1e-5), t_eval=[0.3, 0.77, 1.0], throw=False))
        assert bool(served) == (mode == "fused")
    plain, fused = solutions
    assert {"advance", "error_norm", "merge"} == set(served)
    for field in ("nfe", "status", "accepted", "rejected"):
        assert getattr(plain, field).tolist() == getattr(fused, field).tolist(), field
    assert plain.status[5] != SUCCESS
    assert plain.status[9] != SUCCESS
    assert int(plain.rejected.sum()) > 0
    torch.testing.assert_close(fused.x, plain.x, rtol=close, atol=close, equal_nan=True)
    torch.testing.assert_close(fused.t, plain.t, rtol=1e-10, atol=1e-10)
