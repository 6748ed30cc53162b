"""On the CPU a sample has one result: whoever serves, wherever it stands in a batch, whatever ran before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels, solvers

SOLVERS = [solvers.Bosh3(1e-5, 1e-5), solvers.Dopri5(1e-5, 1e-6), solvers.Tsit5(1e-6, 1e-6), solvers.Dopri8(1e-5, 1e-5)]
STOPS = [0.3, 1.1, 2.0]


def field(t: Tensor, y: Tensor) -> Tensor:
    """Products, sums and roots of single numbers: its own bits do not depend on where they stand."""
    return -y * y * y + (1.0 + t * t) * y.abs().sqrt() - 0.3 * y


def solved(y: Tensor, solver: Any, mode: str) -> fs.Solution:
    with kernels.use(mode):
        return fs.solve(field, y, 0.0, 2.0, solver=solver, t_eval=STOPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 9, 2500])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_modes_and_batches(solver: Any, size: int, dtype: torch.dtype) -> None:
    y = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    right = solved(y, solver, "torch")
    for mode in ("torch", "fused"):
        whole = solved(y, solver, mode)
        assert torch.equal(whole.x, right.x)
        assert torch.equal(whole.nfe, right.nfe)
        for i in (0, 3):
            alone = solved(y[i : i + 1], solver, mode)
            assert torch.equal(alone.x[:, 0], right.x[:, i])
            assert alone.nfe[0] == right.nfe[i]


def test_threads() -> None:
    """One attempt beyond the size from which large states are split over threads."""
    y, before = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    solver, found = solvers.Dopri5(0.1, 0.1, first_step=0.1), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for mode in ("torch", "fused"):
                with kernels.use(mode):
                    found.append(fs.solve(field, y, 0.0, 0.1, solver=solver).x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_flow(solver: Any) -> None:
    """From all states of a batch, and cut into pieces that others leave and enter."""
    path = fs.paths.CondOT()
    flow = fs.Flow(lambda x, t: -x * x * x + (t * t)[:, None] * x.abs().sqrt(), path)
    runs = []
    for mode in ("torch", "fused"):
        for batch in (None, 7):
            with kernels.use(mode):
                runs.append(fs.sample(flow, (20, 3), solver=solver, batch=batch, seed=3))
    for other in runs[1:]:
        assert torch.equal(other.x, runs[0].x)
        assert torch.equal(other.nfe, runs[0].nfe)
