"""Guided solves as one static sequence of operations: traced under fake tensors, they answer other inputs as well.

A trace is as strict as a CUDA graph: a value read on the host is an error (`tests/test_capture.py`).
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
from flowsolve.guidance import (
    APG,
    Autoguidance,
    Classifier,
    ClassifierFree,
    Clip,
    Posterior,
    Threshold,
    Transformed,
    ZeroStar,
)
from flowsolve.passage import Passage
from flowsolve.paths import EDM, VP, CondOT
from flowsolve.planning import unit
from flowsolve.solvers import DDIM, Heun, UniPC


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.body(torch.cat((x, t[:, None].to(x), y[:, None]), 1))
        return out


BASE, WEAK = fs.Flow(Net(0), CondOT()), fs.Flow(Net(1), EDM(), "data")
FREE: dict[str, Any] = {"unconditional": {"y": 0.0}}


def likely(x: Tensor, t: Tensor) -> Tensor:
    return -(x - t[:, None]).square().sum(1)


FLOWS = {
    "classifier-free": ClassifierFree(BASE, 3.0, **FREE),
    "interval": ClassifierFree(BASE, 3.0, interval=(-1.0, 1.0), **FREE),
    "two calls": ClassifierFree(BASE, lambda lam: 2.0 + 0.1 * lam if abs(lam) < 5 else 1.0, batched=False, **FREE),
    "apg": ClassifierFree(BASE, 3.0, rule=APG(norm_threshold=0.5), rescale=0.5, **FREE),
    "zero-star": ClassifierFree(BASE, 3.0, rule=ZeroStar(zero_until=-1.0), **FREE),
    "auto": Autoguidance(BASE, WEAK, 2.0),
    "classifier": Classifier(fs.Flow(Net(0), VP()), likely, 0.5, interval=(-2.0, 9.0)),
    "posterior": Posterior(BASE, lambda z: -z.square().sum(1), 0.1, interval=(-3.0, 9.0)),
    "transformed": Transformed(Transformed(ClassifierFree(BASE, 3.0, **FREE), Threshold(0.9)), Clip(-0.9, 0.9)),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("solver", [DDIM(), UniPC(order=2), Heun()], ids=lambda s: type(s).__name__)
def test_a_recording_answers_other_inputs_like_the_eager_solve(name: str, solver: Any) -> None:
    flow, recorded = FLOWS[name], 0

    def record(solve: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> Any:
        nonlocal recorded
        recorded += 1
        return make_fx(solve, tracing_mode="fake", _allow_non_fake_inputs=True)(inputs)

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for seed in (0, 7):
            x = torch.randn(4, 3, generator=generator)
            cond = flow.conditioned({"y": torch.randn(4, generator=generator)}, 4)
            plan = Passage(flow, (0.0, 1.0), solver=solver, nfe=8, grid="uniform", seed=seed)
            found = capture.captured(plan, x, cond, torch.arange(4), record)
            eager = fs.sample(flow, start=x, solver=solver, nfe=8, grid="uniform", seed=seed, cond={"y": cond["y"]})
            torch.testing.assert_close(found.x, eager.x, rtol=1e-5, atol=1e-5)
            assert (found.nfe * unit(flow)).tolist() == eager.nfe.tolist()
            assert 5 <= int(eager.nfe[0]) <= 8
    assert recorded == 1
