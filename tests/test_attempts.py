"""Recorded adaptive solves: on CUDA by graphs; on the CPU with the recording replaced by the function itself.

That nothing is read from the device within an attempt is shown on `meta`, which has no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import attempts, capture
from flowsolve.kernels import control, largest
from flowsolve.passage import Passage
from flowsolve.paths import EDM, VP, CondOT, Discrete, Path
from flowsolve.solvers import Bosh3, Dopri5, Dopri8, Tsit5
from flowsolve.streaming import Chunk


class Net(nn.Module):
    """Stiffer for some samples than for others, so that steps differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, rate: Tensor | None = None, scale: float = 1.0) -> Tensor:
        out: Tensor = scale * torch.tanh(self.body(torch.cat((x, t[:, None].to(x)), 1)))
        return out if rate is None else out * rate[:, None]


class Rerun:
    """A recording that runs its function again."""

    made = 0

    def __init__(self, function: Any, inputs: Sequence[Tensor]) -> None:
        type(self).made += 1
        self.inputs, self.function, self.replays = [v.clone() for v in inputs], function, 0

    def fill(self, inputs: Sequence[Tensor]) -> None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)

    def replay(self) -> None:
        self.replays += 1
        self.outputs = self.function(self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self.fill(inputs)
        self.replay()
        return [v.clone() for v in self.outputs]


@pytest.fixture(autouse=True)
def rerun(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "gpu" in request.keywords:
        return
    Rerun.made = 0
    monkeypatch.setattr(attempts, "pursue", partial(attempts.pursue, record=Rerun))
    monkeypatch.setattr("flowsolve.passage.require_cuda", lambda x: None)
    monkeypatch.setattr("flowsolve.likelihood.joint.require_cuda", lambda x: None)
    monkeypatch.setattr("flowsolve.likelihood.along.require_cuda", lambda x: None)
    monkeypatch.setattr("flowsolve.likelihood.joint.Recording", Rerun)


CASES = [
    (CondOT(), Dopri5(1e-6, 1e-6), None), (VP(), Tsit5(1e-5, 1e-5), "noise"), (Discrete.linear(), Dopri5(), None),
    (EDM(), Bosh3(1e-4, 1e-4), None), (CondOT(), Dopri8(1e-8, 1e-8), "trig"), (CondOT(), Dopri5(norm=largest), None),
    (CondOT(), Dopri5(first_step=0.3, max_step=0.31), "native"), (CondOT(), Dopri5(min_step=0.02), None),
]  # fmt: skip


def compared(found: Any, eager: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.x, eager.x, rtol=tolerance, atol=tolerance)
    for name in ("nfe", "status", "accepted", "rejected"):
        assert getattr(found, name).tolist() == getattr(eager, name).tolist(), name
    torch.testing.assert_close(found.t, eager.t, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("path", "solver", "chart"), CASES, ids=lambda v: type(v).__name__)
def test_a_recorded_solve_is_the_eager_one(path: Path, solver: Any, chart: str | None) -> None:
    """The same arithmetic in float64: sums and norms round alike, logarithms are rounded to float32 in both."""
    flow = fs.Flow(Net(), path, "v")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64) * path.prior_std
    cond = {"rate": torch.linspace(0.1, 6.0, 9, dtype=torch.float64), "scale": 0.7}
    ends = (0.0, 1.0) if chart is None or chart in ("trig", "native") else (0.02, 1.0)
    options: dict[str, Any] = {"start": x, "solver": solver, "chart": chart, "interval": ends, "cond": cond}
    options["throw"] = False
    eager = fs.sample(flow, **options)
    compared(fs.sample(flow, capture=True, **options), eager)
    assert len(set(eager.nfe.tolist())) > 1 or solver.min_step
    compared(fs.sample(flow, capture=True, **options), eager)
    assert Rerun.made == 1


def test_the_way_back_and_streams() -> None:
    flow, solver = fs.Flow(Net(), CondOT(), "v"), Dopri5(1e-6, 1e-6)
    x = torch.randn(23, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cond = {"rate": fs.per_sample(torch.linspace(0.1, 6.0, 23, dtype=torch.float64))}
    eager = fs.sample(flow, start=x, solver=solver, cond=cond)
    for width in (1, 4, 23, 40):
        compared(fs.sample(flow, start=x, solver=solver, cond=cond, batch=width, capture=True), eager)
    given = {"solver": solver, "batch": 5, "seed": 3, "dtype": torch.float64}
    streams = [fs.batching.sample(flow, (17, 3), capture=c, **given) for c in (True, True, False)]
    for one, other, plain in zip(*streams, strict=True):  # two at a time share no buffers
        compared(one, plain)
        compared(other, plain)


def test_budgets_and_failures_end_samples_alike() -> None:
    flow = fs.Flow(Net(), CondOT(), "v")
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cond = {"rate": torch.linspace(0.1, 9.0, 7, dtype=torch.float64)}
    for solver, nfe in ((Dopri5(1e-7, 1e-7), 40), (Dopri5(1e-7, 1e-7, max_steps=4), None), (Dopri5(max_step=0.03), 61)):
        options: dict[str, Any] = {"start": x, "solver": solver, "nfe": nfe, "cond": cond, "throw": False}
        eager = fs.sample(flow, **options)
        assert not eager.ok.all()
        compared(fs.sample(flow, capture=True, **options), eager)
    late = fs.Flow(lambda x, t: torch.where((x > 2) & (t[:, None] > 0.5), torch.nan, torch.zeros_like(x)), CondOT())
    start = torch.tensor([[0.5], [3.0], [torch.inf]], dtype=torch.float64)
    eager = fs.sample(late, start=start, solver=Dopri5(), throw=False)
    found = fs.sample(late, start=start, solver=Dopri5(), throw=False, capture=True)
    assert found.status.tolist() == eager.status.tolist()
    assert found.nfe.tolist() == eager.nfe.tolist()


@pytest.mark.parametrize("path", [CondOT(), VP(), EDM(), Discrete.linear()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("solver", [Dopri5(), Dopri8()], ids=lambda v: type(v).__name__)
def test_an_attempt_reads_nothing(path: Path, solver: Any) -> None:
    flow = fs.Flow(lambda x, t: x * t[:, None].to(x), path, "v")
    passage = Passage(flow, (0.0, 1.0), solver=solver)
    start, end, ask, _ = passage.ode()
    meta = torch.device("meta")
    attempt = attempts.Attempt(solver, ask, end, 1000, {"cond": {}}, meta)
    flow.arm(False)
    flow.guard._trusted = torch.Size((5, 3))  # what the guard of networks learns in the first calls reads addresses
    y = torch.empty(5, 3, device=meta)
    real = torch.empty(4, 5, dtype=torch.float64, device=meta)
    attempt([y, y.clone(), real, torch.empty(5, 5, dtype=torch.int64, device=meta)])
    assert start != end


def test_decisions_are_those_of_the_host() -> None:
    """`Attempt` against `control.aim` and `control.judge`, over errors of all sizes, NaN and infinity among them."""
    generator = np.random.default_rng(0)
    count = 400
    real = np.stack(
        (generator.uniform(0, 0.99, count), generator.uniform(1e-9, 0.5, count), *generator.normal(-2, 3, (2, count)))
    )
    counts = np.zeros((5, count), dtype=np.int64)
    counts[:3] = generator.integers(0, 3, (3, count))
    counts[control.STATUS] = control.RUNNING
    error = np.exp(generator.normal(0, 6, count))
    error[:9] = [np.nan, np.inf, 0.0, 1.0, 1.0 + 1e-9, 1e-30, 1e30, np.nan, np.inf]
    error = control.rounded(error)
    for solver in (Dopri5(), Dopri5(min_step=0.01, max_step=0.2, max_steps=4), Bosh3(max_rejections=2)):
        later = solver.pair.later
        h, s_next, _ = control.aim(real, 1.0, later)
        verdict = control.judge(error, real, counts, h, s_next, 1.0, solver.law)
        attempt = attempts.Attempt(solver, None, 1.0, None, {}, torch.device("cpu"))  # type: ignore[arg-type]
        device = [torch.from_numpy(v.copy()) for v in (real, counts)]
        running = torch.ones(count, dtype=torch.bool)
        mine, ends = attempt._aim(device[0], running)
        assert (mine.numpy() == h).all()
        assert (ends.numpy() == s_next).all()
        accepted, after, tally = attempt._judge(torch.from_numpy(error), *device, mine, ends, running)
        assert (accepted.numpy() == verdict.accepted).all()
        assert (tally.numpy() == verdict.counts).all()
        np.testing.assert_allclose(after.numpy(), verdict.real, rtol=3e-7)  # a float32 rounding the other way


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_recorded_likelihoods(trace: str) -> None:
    mixture = fs.problems.GaussianMixture([[-1.0, 0.0, 0.5], [1.0, 0.0, 0.0]], std=0.3, dtype=torch.float64)
    flow, x = mixture.flow(CondOT()), mixture.sample(6, seed=0)
    for options in ({"nfe": 24}, {"solver": Dopri5(1e-6, 1e-6)}, {"solver": "rk4", "nfe": 24}):
        eager = fs.log_prob(flow, x, trace=trace, **options)
        found = fs.log_prob(flow, x, trace=trace, capture=True, **options)
        torch.testing.assert_close(found.log_prob, eager.log_prob, rtol=1e-10, atol=1e-10)
        assert found.nfe.tolist() == eager.nfe.tolist()
        streamed = fs.log_prob(flow, x, trace=trace, capture=True, batch=2, **options)
        torch.testing.assert_close(streamed.log_prob, eager.log_prob, rtol=1e-10, atol=1e-10)
    assert Rerun.made <= 12
    with pytest.raises(TypeError, match="records no derivatives"):
        fs.log_prob(flow, x, capture=True, grad=True)


def test_a_changed_flow_is_recorded_again() -> None:
    flow = fs.Flow(Net(), CondOT(), "v")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for path in (CondOT(), VP()):
        flow.path = path
        for _ in range(2):
            compared(fs.sample(flow, start=x, solver=Dopri5(), capture=True), fs.sample(flow, start=x, solver=Dopri5()))
    assert Rerun.made == 2
    assert len(capture._recordings[flow]) == 2


def test_what_cannot_be_recorded() -> None:
    flow, x = fs.Flow(Net(), CondOT(), "v"), torch.ones(2, 3, dtype=torch.float64)
    for options, match in (
        ({"t_eval": [0.0, 1.0]}, "t_eval="), ({"gradient": "adjoint"}, "without gradients"),
        ({"nfe": 5}, "needs 8 to take one step"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            fs.sample(flow, start=x, solver=Dopri5(), capture=True, **options)


@pytest.mark.parametrize("solver", [Dopri5(), fs.solvers.DDIM()], ids=lambda v: type(v).__name__)
def test_auto_records_what_pays_and_agrees(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowsolve.passage.captured", partial(capture.captured, record=Rerun))
    calls, cheats = 0, False

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x * (1.0 + 0.3 * calls * cheats)

    flow, x = fs.Flow(net, Discrete.linear(), "v"), torch.ones(3, 2, dtype=torch.float64)
    nfe = None if solver.chooses_steps else 6

    def solved() -> Any:
        passage = Passage(flow, (0.0, 1.0), solver=solver, nfe=nfe, capture="auto")
        y, context = passage.enter(Chunk(x, {}, torch.arange(3)))
        with torch.no_grad():
            pays = capture.pays(flow, passage.key(), y)
            solution = passage._tried(y, context, False) if pays else passage._run(y, context, False)
            return pays, passage.capture, passage.leave(solution, context)

    expected = fs.sample(flow, start=x, solver=solver, nfe=nfe)
    for i in range(7):
        pays, used, found = solved()
        assert pays == used == (i >= capture.REPAID)
        compared(found, expected)
    cheats, flow.path = True, Discrete.linear(500)
    for _ in range(capture.REPAID):
        assert solved()[:2] == (False, False)
    with pytest.warns(UserWarning, match="not recorded from here on: a replay gave other states"):
        assert solved()[:2] == (True, False)
    assert solved()[:2] == (False, False)
    cheats = False
    with pytest.raises(ValueError, match="expected True, False or 'auto'"):
        fs.sample(flow, start=x, solver=solver, nfe=nfe, capture="yes")
    fs.sample(flow, start=x, solver=Dopri5(), capture="auto", t_eval=[0.0, 0.5])  # what cannot be recorded is solved


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "solver", "chart"), CASES, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("batch", [None, 3])
def test_cuda_graphs_equal_the_eager_solve(path: Path, solver: Any, chart: str | None, batch: int | None) -> None:
    flow = fs.Flow(Net().cuda(), path, "v")
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cuda() * path.prior_std
    rate = torch.linspace(0.1, 6.0, 9, dtype=torch.float64).cuda()
    cond = {"rate": fs.per_sample(rate), "scale": 0.7}
    ends = (0.0, 1.0) if chart is None or chart in ("trig", "native") else (0.02, 1.0)
    options: dict[str, Any] = {"start": x, "solver": solver, "chart": chart, "interval": ends, "cond": cond}
    options.update(throw=False, batch=batch)
    eager = fs.sample(flow, **options)
    for _ in range(2):
        found = fs.sample(flow, capture=True, **options)
        torch.testing.assert_close(found.x, eager.x, rtol=1e-9, atol=1e-9)
        assert found.status.tolist() == eager.status.tolist()
        assert found.nfe.tolist() == eager.nfe.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_recorded_likelihoods_on_cuda(trace: str) -> None:
    mixture = fs.problems.GaussianMixture([[-1.0, 0.0, 0.5], [1.0, 0.0, 0.0]], std=0.3, dtype=torch.float64)
    flow, x = fs.Flow(Net().cuda(), CondOT(), "v"), mixture.sample(6, seed=0).cuda()
    for options in ({"nfe": 24}, {"solver": Dopri5(1e-6, 1e-6)}, {"solver": "rk4", "nfe": 24}):
        eager = fs.log_prob(flow, x, trace=trace, **options)
        for _ in range(2):
            found = fs.log_prob(flow, x, trace=trace, capture=True, **options)
            torch.testing.assert_close(found.log_prob, eager.log_prob, rtol=1e-8, atol=1e-8)
            assert found.nfe.tolist() == eager.nfe.tolist()
