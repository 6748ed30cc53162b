"""Batching: a sample comes out as it does alone, the network sees full batches, and sources may be streams."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import Status
from flowsolve.paths import CondOT, Discrete, Path
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import DDIM, DDPM, RK4, Dopri5, Heun, Tsit5

MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.5], [1.0, 1.0]], dtype=torch.float64), torch.tensor([0.05, 0.7], dtype=torch.float64)
)


class Counted:
    """The exact network of the mixture, and the rows of each of its calls."""

    def __init__(self, path: Path) -> None:
        self.exact, self.rows = MIXTURE.flow(path), []
        self.flow = fs.Flow(self, path)

    def __call__(self, x: Tensor, t: Tensor, gain: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        velocity = self.exact.net(x, t)
        return velocity if gain is None else velocity * gain[:, None]


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.x, b.x, rtol=tolerance, atol=tolerance)
    for field in ("nfe", "status", "accepted", "rejected"):
        assert (getattr(a, field) == getattr(b, field)).all(), field
    torch.testing.assert_close(a.t, b.t, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("path", [CondOT(), Discrete.linear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("batch", [1, 7, 16, 100])
def test_batches_do_not_change_a_sample(path: Path, batch: int) -> None:
    counted = Counted(path)
    whole = fs.sample(counted.flow, start=normal(40), solver=Dopri5())
    counted.rows.clear()
    parts = fs.sample(counted.flow, start=normal(40), solver=Dopri5(), batch=batch)
    same(parts, whole, 1e-11)
    assert max(counted.rows) <= batch
    assert sum(counted.rows) == int(parts.nfe.sum()), "a sample is evaluated when it is not its turn, or NFE miscounted"


@pytest.mark.parametrize(("solver", "nfe"), [(Heun(), 12), (RK4(), 13), (DDIM(), 5), (DDPM(), 6), (DDIM(eta=0.5), 6)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_fixed_grids_too_and_the_noise_stays_with_its_sample(solver: Any, nfe: int, batch: int) -> None:
    flow = MIXTURE.flow(CondOT())
    whole = fs.sample(flow, (20, 2), solver=solver, nfe=nfe, seed=3, dtype=torch.float64)
    same(fs.sample(flow, (20, 2), solver=solver, nfe=nfe, seed=3, dtype=torch.float64, batch=batch), whole)
    pieces = list(fs.batching.sample(flow, (20, 2), solver=solver, nfe=nfe, seed=3, dtype=torch.float64, batch=batch))
    assert [len(p.x) for p in pieces] == [min(batch, 20 - i) for i in range(0, 20, batch)]
    torch.testing.assert_close(torch.cat([p.x for p in pieces]), whole.x, rtol=1e-12, atol=1e-12)


def test_the_network_sees_nearly_full_batches_and_every_row_is_paid_for() -> None:
    """1,000 samples with needs 3:1 through a batch of 50: full until the source is dry."""
    counted = Counted(CondOT())
    gain = torch.logspace(-0.7, 0.7, 1000, dtype=torch.float64)[
        torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    ]
    sol = fs.sample(counted.flow, start=normal(1000), solver=Tsit5(), batch=50, cond={"gain": gain})
    rows = counted.rows
    assert sum(rows) == int(sol.nfe.sum())
    assert int(sol.nfe.max()) > 2 * int(sol.nfe.min())
    until_dry = rows[: int(0.9 * len(rows))]
    fill = sum(until_dry) / len(until_dry) / 50
    print("FILL", fill)
    assert fill > 0.9
    assert max(rows) == 50
    whole = fs.sample(counted.flow, start=normal(1000), solver=Tsit5(), cond={"gain": gain})
    same(sol, whole, 1e-11)


def test_encoding_a_stream_of_uneven_chunks_with_their_conditioning() -> None:
    counted = Counted(CondOT())
    x = MIXTURE.sample(50, seed=1)
    gain = torch.linspace(0.5, 1.5, 50, dtype=torch.float64)
    whole = fs.encode(counted.flow, x, solver=Dopri5(), cond={"gain": gain})
    sizes = [3, 0, 20, 1, 26]
    drawn: list[int] = []

    def source() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        first = 0
        for n in sizes:
            drawn.append(n)
            yield x[first : first + n], {"gain": gain[first : first + n]}
            first += n

    counted.rows.clear()
    results = fs.batching.encode(counted.flow, source(), solver=Dopri5(), batch=8)
    assert drawn == [], "nothing is drawn before it is asked for"
    parts = []
    for part in results:
        parts.append(part)
        if len(parts) == 1:
            assert drawn == sizes[:3], "chunks are drawn when there is room, not before"
    assert [len(p.x) for p in parts] == sizes
    joined = torch.cat([p.x for p in parts])
    torch.testing.assert_close(joined, whole.x, rtol=1e-11, atol=1e-11)
    assert torch.cat([p.nfe for p in parts]).tolist() == whole.nfe.tolist()
    assert max(counted.rows) == 8


@pytest.mark.parametrize(("solver", "nfe"), [(Dopri5(), None), (RK4(), 40)], ids=["adaptive", "fixed"])
def test_likelihood_of_a_stream(solver: Any, nfe: int | None) -> None:
    flow = MIXTURE.flow(CondOT())
    x = MIXTURE.sample(30, seed=1)
    for options in ({"trace": "exact"}, {"probes": 2, "seed": 5}):
        whole = fs.log_prob(flow, x, solver=solver, nfe=nfe, **options)
        batched = fs.log_prob(flow, x, solver=solver, nfe=nfe, batch=7, **options)
        streamed = list(fs.batching.log_prob(flow, x.split(11), solver=solver, nfe=nfe, batch=7, **options))
        for field in ("log_prob", "latent", "stderr"):
            torch.testing.assert_close(getattr(batched, field), getattr(whole, field), rtol=1e-9, atol=1e-9)
            joined = torch.cat([getattr(p, field) for p in streamed])
            torch.testing.assert_close(joined, getattr(whole, field), rtol=1e-9, atol=1e-9)
        assert (batched.nfe == whole.nfe).all()
        assert not streamed[0].log_prob.requires_grad
    if nfe is None:
        truth = MIXTURE.log_prob(x)
        out = torch.cat([p.log_prob for p in fs.batching.log_prob(
            flow, x.split(11), solver=Dopri5(1e-8, 1e-8), batch=7, trace="exact")])  # fmt: skip
        torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-6)


def test_a_failing_sample_leaves_the_stream_running() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            bad = (x[:, :1] > 2.0) & (t[:, None] > 0.5)
            return torch.where(bad, torch.nan, torch.zeros_like(x))

    flow = fs.Flow(Broken(), CondOT())
    x = torch.tensor([[0.0], [3.0], [1.0], [5.0], [0.5]], dtype=torch.float64)
    sol = fs.sample(flow, start=x, solver=Dopri5(), batch=2, throw=False)
    assert sol.status.tolist() == [0, Status.NONFINITE, 0, Status.NONFINITE, 0]
    with pytest.raises(fs.SolverError, match="2 of 5 samples"):
        fs.sample(flow, start=x, solver=Dopri5(), batch=2)
    parts = list(fs.batching.encode(flow, [x[:2], x[2:]], solver=Heun(), nfe=8, batch=2))
    assert torch.cat([p.status for p in parts]).tolist() == [0, 1, 0, 1, 0]


def test_budgets_hold_in_batches() -> None:
    counted = Counted(CondOT())
    sol = fs.sample(counted.flow, start=normal(20), solver=Dopri5(1e-9, 1e-9), nfe=60, batch=6, throw=False)
    whole = fs.sample(counted.flow, start=normal(20), solver=Dopri5(1e-9, 1e-9), nfe=60, throw=False)
    same(sol, whole, 1e-11)
    assert (sol.status == Status.BUDGET).any()
    assert (sol.nfe <= 60).all()


def test_gradients_flow_through_batches() -> None:
    flow = MIXTURE.flow(CondOT())
    found = []
    for batch in (None, 3):
        x = normal(8).requires_grad_()
        sol = fs.sample(flow, start=x, solver=Dopri5(), batch=batch)
        found.append(torch.autograd.grad(sol.x.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="drop batch=3"):
        fs.sample(flow, start=normal(8).requires_grad_(), solver=Dopri5(), batch=3, gradient="checkpoint")


def test_empty_streams_and_samples() -> None:
    flow = MIXTURE.flow(CondOT())
    for solver, nfe in ((Dopri5(), None), (Heun(), 8)):
        assert fs.sample(flow, (0, 2), solver=solver, nfe=nfe, batch=4).x.shape == (0, 2)
        assert list(fs.batching.encode(flow, [], solver=solver, nfe=nfe, batch=4)) == []
        assert list(fs.batching.sample(flow, (0, 2), solver=solver, nfe=nfe, batch=4)) == []


@pytest.mark.parametrize("batch", [0, -1, 2.5, True])
def test_widths_that_are_not_counts(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch"):
        fs.sample(MIXTURE.flow(CondOT()), (4, 2), solver=Dopri5(), batch=batch)


def test_sources_that_give_something_else() -> None:
    flow = MIXTURE.flow(CondOT())
    with pytest.raises(TypeError, match="the source gave a list"):
        next(fs.batching.encode(flow, [[1.0, 2.0]], solver=Dopri5(), batch=4))
    with pytest.raises(ValueError, match="one shape"):
        list(fs.batching.log_prob(flow, [normal(2), torch.zeros(2, 3)], solver=Dopri5(), batch=4))


def test_progress_tells_the_mean_nfe(capsys: pytest.CaptureFixture[str]) -> None:
    flow = MIXTURE.flow(CondOT())
    sol = fs.sample(flow, start=normal(12), solver=Dopri5(), batch=4, progress=True)
    shown = capsys.readouterr().err
    assert "12/12" in shown
    assert f"mean NFE {sol.nfe.double().mean():.1f}" in shown
    assert math.isclose(float(sol.t[0]), 1.0)


# --- ODEs ------------------------------------------------------------------------------------------------------------


def decay(t: torch.Tensor, y: torch.Tensor, rate: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return -rate.reshape(-1, *[1] * (y.ndim - 1)) * (y - shift)


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("solver", [fs.solvers.Dopri5(1e-9, 1e-9), fs.solvers.RK4()], ids=lambda s: type(s).__name__)
def test_odes_are_solved_as_one_by_one(solver: Any, batch: int) -> None:
    """Parameters, intervals (one backwards) and tolerances follow their samples across the borders of items."""
    nfe = None if solver.chooses_steps else 400
    rate, end = torch.linspace(0.1, 3.0, 11, dtype=torch.float64), torch.linspace(2.0, -0.5, 11, dtype=torch.float64)
    y0, shift = torch.linspace(1.0, 3.0, 22, dtype=torch.float64).reshape(11, 2), torch.tensor(0.25)
    rtol = torch.logspace(-9, -4, 11, dtype=torch.float64)
    own = {"rtol": rtol, "atol": rtol / 10} if solver.chooses_steps else {}

    def items() -> Any:
        for part in torch.arange(11).split([3, 1, 7]):
            yield y0[part], {"args": (rate[part],), "t1": end[part], **{k: v[part] for k, v in own.items()}}

    found = list(fs.batching.solve(decay, items(), 0.0, args=(shift,), solver=solver, batch=batch, nfe=nfe))
    assert [len(s.x) for s in found] == [3, 1, 7]
    x, t = torch.cat([s.x for s in found]), torch.cat([s.t for s in found])
    assert torch.equal(t, end)
    truth = 0.25 + (y0 - 0.25) * torch.exp(-rate * end)[:, None]
    torch.testing.assert_close(x, truth, rtol=1e-3 if own else 1e-6, atol=0.0)
    whole = fs.solve(decay, y0, 0.0, end, args=(rate, shift), solver=solver, nfe=nfe, **own)
    torch.testing.assert_close(x, whole.x, rtol=1e-12, atol=0.0)
    assert torch.equal(torch.cat([s.nfe for s in found]), whole.nfe)


def test_trees_of_odes_stream() -> None:
    source = [{"x": torch.ones(n, 2), "v": torch.zeros(n)} for n in (2, 3)]
    f = lambda t, y: {"x": -y["x"], "v": y["x"].sum(1)}  # noqa: E731
    found = list(fs.batching.solve(f, source, 0.0, 1.0, solver="dopri5", batch=2))
    assert [s.x["x"].shape for s in found] == [(2, 2), (3, 2)]
    torch.testing.assert_close(found[1].x["v"], torch.full((3,), 2 * (1 - math.exp(-1.0))), rtol=1e-4, atol=0.0)


def test_what_a_stream_of_odes_needs() -> None:
    f, y = lambda t, y: -y, torch.ones(3, 1)
    with pytest.raises(ValueError, match="t1 is neither given nor with the items"):
        list(fs.batching.solve(f, [y], 0.0, solver="dopri5", batch=2))
    with pytest.raises(ValueError, match="other shapes than the first"):
        list(fs.batching.solve(f, [y, torch.ones(3, 2)], 0.0, 1.0, solver="dopri5", batch=2))
    with pytest.raises(ValueError, match=r"gave \['t1'\] with one item and \[\] with the first"):
        list(fs.batching.solve(f, [y, (y, {"t1": 1.0})], 0.0, 1.0, solver="dopri5", batch=2))
    with pytest.raises(ValueError, match="RK4 steps on a fixed grid: give nfe="):
        list(fs.batching.solve(f, [y], 0.0, 1.0, solver="rk4", batch=2))
    assert list(fs.batching.solve(f, [], 0.0, 1.0, solver="dopri5", batch=2)) == []
