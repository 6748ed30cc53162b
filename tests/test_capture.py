"""Captured solves: the real thing on CUDA, and on the CPU the same solve traced under fake tensors instead.

A trace (torch.fx, with fake tensors that hold no numbers) is as strict as a CUDA graph: a value read on the host is an
error, and whatever is no input is a constant of it. If it answers other inputs like the eager solve, so can a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import flowsolve as fs
from flowsolve import capture
from flowsolve.passage import Passage
from flowsolve.paths import VP, CondOT, Discrete, Path
from flowsolve.solvers import DDIM, DDPM, RK4, Dopri5, Euler, EulerMaruyama, ExactSDE, Heun, Solver


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        out: Tensor = scale * self.body(torch.cat((x, t[:, None].to(x)), 1))
        return out if shift is None else out + shift[:, None]


def traced(solve: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> Any:
    """A recording by tracing instead of by a CUDA graph."""
    return make_fx(solve, tracing_mode="fake", _allow_non_fake_inputs=True)(inputs)


CASES = [
    (CondOT(), Euler(), 5), (CondOT(), RK4(), 9), (VP(), Heun(), 8), (CondOT(), Dopri5(adaptive=False), 12),
    (Discrete.linear(), Heun(), 7), (Discrete.linear(), DDPM(), 6), (CondOT(), DDIM(eta=0.7), 5),
    (VP(), ExactSDE(0.5), 5), (VP(), EulerMaruyama(), 5),
]  # fmt: skip


@pytest.mark.parametrize(("path", "solver", "nfe"), CASES, ids=lambda v: type(v).__name__)
def test_a_recording_answers_other_inputs_like_the_eager_solve(path: Path, solver: Solver, nfe: int) -> None:
    flow = fs.Flow(Net(), path, "v")
    recorded = 0

    def record(solve: Any, inputs: list[Tensor]) -> Any:
        nonlocal recorded
        recorded += 1
        return traced(solve, inputs)

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for seed, first in ((0, 0), (7, 100), (-(2**62) - 5, 3)):
            x = torch.randn(4, 3, generator=generator)
            cond = {"shift": torch.randn(4, generator=generator), "scale": 0.5}
            samples = torch.arange(first, first + 4)
            plan = Passage(flow, (0.0, 1.0), solver=solver, nfe=nfe, seed=seed)
            found = capture.captured(plan, x, cond, samples, record)
            eager = fs.sample(flow, start=x, solver=solver, nfe=nfe, seed=seed, samples=samples, cond=cond)
            torch.testing.assert_close(found.x, eager.x, rtol=1e-6, atol=1e-6)
            assert found.nfe.tolist() == eager.nfe.tolist()
            assert found.status.tolist() == eager.status.tolist()
            assert found.t.tolist() == eager.t.tolist()
            assert found.accepted.tolist() == eager.accepted.tolist()
        assert recorded == 1, "another seed, state or number needs no other recording"


def test_recordings_are_kept_for_their_shapes_and_constants() -> None:
    flow, recorded = fs.Flow(Net(), CondOT()), []

    def record(solve: Any, inputs: list[Tensor]) -> Any:
        recorded.append(len(inputs[0]))
        return solve

    x = torch.ones(4, 3)
    with torch.no_grad():
        for n, scale, nfe in ((4, 1.0, 4), (2, 1.0, 4), (4, 0.5, 4), (4, 1.0, 8), (4, 1.0, 4), (2, 1.0, 4)):
            plan = Passage(flow, (0.0, 1.0), solver=Euler(), nfe=nfe)
            found = capture.captured(plan, x[:n], {"scale": scale}, torch.arange(n), record)
            eager = fs.sample(flow, start=x[:n], solver=Euler(), nfe=nfe, cond={"scale": scale})
            torch.testing.assert_close(found.x, eager.x)
        assert recorded == [4, 2, 4, 4]
        for scale in range(20):
            capture.captured(plan, x, {"scale": float(scale)}, torch.arange(4), record)
        assert len(capture._recordings[flow]) == capture.KEPT


def test_a_failed_sample_is_seen_after_a_replay() -> None:
    flow = fs.Flow(lambda x, t: torch.where((x > 2.0) & (t[:, None] > 0.5), torch.nan, torch.zeros_like(x)), CondOT())
    x = torch.tensor([[0.5], [3.0]])
    with torch.no_grad():
        plan = Passage(flow, (0.0, 1.0), solver=Euler(), nfe=4)
        found = capture.captured(plan, x, {}, torch.arange(2), traced)
    eager = fs.sample(flow, start=x, solver=Euler(), nfe=4, throw=False)
    assert found.status.tolist() == eager.status.tolist() == [0, 1]
    assert found.t.tolist() == eager.t.tolist() == [1.0, 1.0]


def test_a_network_that_reads_from_the_device_is_refused_in_words() -> None:
    flow = fs.Flow(lambda x, t: -x * float(x.abs().max()), CondOT())
    plan = Passage(flow, (0.0, 1.0), solver=Euler(), nfe=4)
    match = r"(?s)cannot be captured as a CUDA graph.*reads values back"
    with torch.no_grad(), pytest.raises(RuntimeError, match=match):
        capture.captured(plan, torch.ones(2, 1), {}, torch.arange(2), traced)


def test_where_nothing_can_be_captured() -> None:
    flow = fs.Flow(Net(), CondOT())
    with pytest.raises(ValueError, match="the state is on cpu; drop capture=True"):
        fs.sample(flow, (2, 3), solver=Euler(), nfe=4, capture=True)
    with pytest.raises(ValueError, match="the state is on cpu; drop capture=True"):
        fs.sample(flow, (2, 3), solver=Dopri5(), capture=True)
    with pytest.raises(ValueError, match="the state is on cpu; drop capture=True"):
        fs.sample(flow, (5, 3), solver=Dopri5(), capture=True, batch=2)
    with pytest.raises(ValueError, match="the state is on cpu; drop capture=True"):
        fs.log_prob(flow, torch.zeros(2, 3), nfe=16, capture=True)
    with pytest.raises(TypeError, match="without gradients"):
        fs.sample(flow, (2, 3), solver=Euler(), nfe=4, capture=True, gradient="checkpoint")


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "solver", "nfe"), CASES, ids=lambda v: type(v).__name__)
def test_cuda_graphs_equal_the_eager_solve(path: Path, solver: Solver, nfe: int) -> None:
    flow = fs.Flow(Net().cuda(), path, "v")
    for seed in (0, 1, 2):
        options: dict[str, Any] = {"solver": solver, "nfe": nfe, "seed": seed, "cond": {"scale": 0.5}}
        eager = fs.sample(flow, (16, 3), **options)
        found = fs.sample(flow, (16, 3), capture=True, **options)
        torch.testing.assert_close(found.x, eager.x, rtol=1e-5, atol=1e-5)
        assert found.nfe.tolist() == eager.nfe.tolist()
    assert len(capture._recordings[flow]) == 1
    with torch.no_grad():
        flow.net.body.weight.mul_(2.0)
    torch.testing.assert_close(
        fs.sample(flow, (16, 3), capture=True, **options).x, fs.sample(flow, (16, 3), **options).x, rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
def test_a_network_that_reads_from_the_device_cannot_be_captured_on_cuda() -> None:
    flow = fs.Flow(lambda x, t: -x * float(x.abs().max()), CondOT())
    with pytest.raises(RuntimeError, match="cannot be captured"):
        fs.sample(flow, start=torch.ones(2, 1, device="cuda"), solver=Euler(), nfe=4, capture=True)
