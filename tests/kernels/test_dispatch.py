"""What a step asks of the device: no reads and no copies on a fixed grid, one read an adaptive step, few operations.

Operations are counted as torch dispatches them. The device is the host itself, whose own small sums (times and
coefficients) are counted too; or it is `meta`, which has no values, so that a read raises wherever it is made, and a
tensor sent there from the host is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowsolve as fs
from flowsolve import kernels
from flowsolve.drivers import checks
from flowsolve.paths import CondOT
from flowsolve.solvers import DDIM, DDPM, RK4, Dopri5, Dopri8, Euler, EulerMaruyama, ExactSDE, Heun, adaptive

READS = {"_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select", "unique", "_unique2"}
FIXED = [Euler(), Heun(), RK4(), DDIM(), DDIM(eta=0.5), DDPM(), ExactSDE(), EulerMaruyama()]
PLACES = [("torch", "cpu"), ("fused", "cpu"), ("torch", "meta")]


class Dispatched(TorchDispatchMode):
    """Counts operations by name: all, those that read values, and those that send tensors from the host to `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.all[name] += 1
        if name in READS:
            self.reads[name] += 1
        if isinstance(out, Tensor) and out.is_meta and any(isinstance(v, Tensor) and v.is_cpu for v in args):
            self.sent[name] += 1
        return out


def sampled(solver: Any, nfe: int, device: str) -> tuple[Dispatched, int]:
    """What a sample of a trivial flow on a fixed grid dispatched, and how often it called the network."""
    calls = 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x

    interval = (0.1, 0.9) if isinstance(solver, EulerMaruyama) else (0.0, 1.0)
    flow, start = fs.Flow(net, CondOT()), torch.zeros(3, 4, device=device)
    with Dispatched() as seen:
        if device == "meta":  # the status at the end is read, once
            with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
                fs.sample(flow, start=start, solver=solver, nfe=nfe, interval=interval)
        else:
            fs.sample(flow, start=start, solver=solver, nfe=nfe, interval=interval)
    return seen, calls


@pytest.mark.parametrize(("mode", "device"), PLACES)
@pytest.mark.parametrize("solver", FIXED, ids=repr)
def test_a_fixed_grid_reads_nothing_before_the_end(solver: Any, mode: str, device: str) -> None:
    """The reads do not grow with the steps, and only the last one needs values."""
    few, many = (4, 16) if solver.random else (8, 64)
    with kernels.use(mode):
        (short, n), (long, m) = (sampled(solver, nfe, device) for nfe in (few, many))
    assert (n, m) == (few, many), "the network was not called to the end"
    assert long.reads == short.reads
    operations, sent = ((getattr(long, v).total() - getattr(short, v).total()) / (many - few) for v in ("all", "sent"))
    print(solver, mode, device, operations, sent)
    if solver.random:
        assert operations <= (12 if mode == "fused" else 210)  # most of them arithmetic for the noise
    else:
        assert operations <= 7
    assert sent == 0


@pytest.mark.parametrize(("mode", "device"), PLACES)
@pytest.mark.parametrize("solver", [Euler(), RK4(), Dopri5(adaptive=False)], ids=lambda s: type(s).__name__)
def test_a_fixed_grid_on_an_ode(solver: Any, mode: str, device: str) -> None:
    def dispatched(nfe: int) -> Dispatched:
        y = torch.ones(3, 4, device=device)
        with kernels.use(mode), Dispatched() as seen:
            if device == "meta":
                with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
                    fs.solve(lambda t, y: -y, y, 0.0, 1.0, solver=solver, nfe=nfe)
            else:
                fs.solve(lambda t, y: -y, y, 0.0, 1.0, solver=solver, nfe=nfe)
        return seen

    short, long = dispatched(12), dispatched(60)
    assert long.reads == short.reads
    assert not long.sent
    assert long.all["amax"] == len(checks(60 // solver.evaluations))  # one magnitude, set aside there


def test_at_most_16_magnitudes_are_set_aside() -> None:
    seen, _ = sampled(Euler(), 640, "cpu")
    assert seen.all["amax"] == 16


# --- adaptive steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what adaptive steps read; on `meta` every error is a tenth of the tolerance."""
    sizes: list[int] = []

    def host(v: Tensor) -> Any:
        sizes.append(v.numel())
        return np.full(v.shape, 0.1) if v.is_meta else kernels.host(v)

    monkeypatch.setattr(adaptive, "host", host)
    return sizes


def solved(what: str, solver: Any, device: str, end: float) -> tuple[Dispatched, int]:
    """What an adaptive solve dispatched, and its attempts."""
    y = torch.full((3, 4), 0.1, device=device)
    with Dispatched() as seen:
        if what == "solve":
            sol = fs.solve(lambda t, y: -y, y, 0.0, end, solver=solver)
        else:
            sol = fs.sample(fs.Flow(lambda x, t: -x, CondOT()), start=y, solver=solver, interval=(0.0, end))
    return seen, int((sol.accepted + sol.rejected).max())


def per_attempt(count: Callable[[Dispatched], int], *runs: tuple[Dispatched, int]) -> float:
    (short, n), (long, m) = runs
    assert m - n >= 5
    return (count(long) - count(short)) / (m - n)


@pytest.mark.parametrize(("mode", "device"), PLACES)
@pytest.mark.parametrize("what", ["solve", "sample"])
@pytest.mark.parametrize("solver", [Dopri5(max_step=0.1), Dopri8(max_step=0.1)], ids=lambda s: type(s).__name__)
def test_an_adaptive_step_reads_once(solver: Any, what: str, mode: str, device: str, reads: list[int]) -> None:
    """One number a sample (Dopri8: two) an attempt, and twice to begin with; on `meta` any other read would raise."""
    with kernels.use(mode):
        seen, attempts = solved(what, solver, device, 1.0)
    assert attempts >= 10
    assert reads == [6, 3, *[3 * len(solver.pair.errors)] * attempts]
    if what == "solve":
        assert seen.reads.total() <= 2


def test_a_first_step_that_is_given_saves_a_read(reads: list[int]) -> None:
    _, attempts = solved("solve", Dopri5(first_step=0.01, max_step=0.05), "meta", 1.0)
    assert reads == [3] * (1 + attempts)


BOUNDS = {  # dispatched operations of an attempt with 6 evaluations, one of them the field's own
    ("solve", "torch"): 101,  # a product and a sum for each slope, not one operation that may fuse them
    ("solve", "fused"): 19,
    ("sample", "torch"): 164,
    ("sample", "fused"): 82,
}


@pytest.mark.parametrize(("what", "mode"), BOUNDS)
def test_the_operations_of_an_adaptive_step_are_few(what: str, mode: str) -> None:
    """As many as there were when this was written, and a twentieth more; none reads the state."""
    with kernels.use(mode):
        runs = [solved(what, Dopri5(max_step=0.05), "cpu", end) for end in (0.5, 1.0)]
    found = per_attempt(lambda seen: seen.all.total(), *runs)
    scalars = per_attempt(lambda seen: seen.reads.total(), *runs)
    names = {name: (runs[1][0].all[name] - n) / (runs[1][1] - runs[0][1]) for name, n in runs[0][0].all.items()}
    print(what, mode, found, dict(sorted(names.items(), key=lambda item: -item[1])))
    assert found <= 1.05 * BOUNDS[what, mode]
    assert scalars == (0 if what == "solve" else 1)  # whether any sample's time has no estimate: times are on the host


@pytest.mark.parametrize(("what", "most"), [("solve", 8), ("sample", 8)])
def test_what_an_adaptive_step_sends_to_a_device(what: str, most: int, reads: list[int]) -> None:
    """The weights of each stage, by the twin, of Dopri5; times and coefficients of a flow go as one."""
    runs = [solved(what, Dopri5(max_step=0.05), "meta", end) for end in (0.5, 1.0)]
    found = per_attempt(lambda seen: seen.sent.total(), *runs)
    print(what, found)
    assert found <= most
