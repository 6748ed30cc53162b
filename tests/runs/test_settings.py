"""Fingerprints: what changes a result changes them, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flowsolve as fs
from flowsolve import runs, solvers
from flowsolve.guidance import APG, Autoguidance, Classifier, ClassifierFree, Clip, Posterior, Transformed, ZeroStar
from flowsolve.runs.settings import fingerprint, spell
from flowsolve.transforms import Elementwise, Latent, Logit, Range


class Net(nn.Module):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: Any = 0.0) -> torch.Tensor:
        return -self.weight * x + y


def flow(weight: float = 1.0, transform: Any = None, path: Any = None) -> fs.Flow:
    return fs.Flow(Net(weight), path or fs.paths.VP(), "noise", transform=transform)


def free(scale: Any = 2.0, **options: Any) -> ClassifierFree:
    return ClassifierFree(flow(), scale, **{"unconditional": {"y": 0.0}, **options})


def loss(z: torch.Tensor, *_: Any) -> torch.Tensor:
    return -z.square().sum(1)


def other_loss(z: torch.Tensor, *_: Any) -> torch.Tensor:
    return -z.abs().sum(1)


DIFFERENT: list[tuple[Any, Any]] = [
    (lambda: flow(1.0), lambda: flow(1.0 + 1e-6)),
    (lambda: flow(), lambda: flow(path=fs.paths.VP(beta_max=19.0))),
    (lambda: flow(transform=Range(levels=17)), lambda: flow(transform=Range(levels=16))),
    (lambda: flow(transform=Range()), lambda: flow(transform=Range(centred=True))),
    (lambda: flow(transform=Range(0, 1).then(Logit(0.05))), lambda: flow(transform=Range(0, 1).then(Logit(0.06)))),
    (lambda: flow(transform=Latent(0.18215)), lambda: flow(transform=Latent(0.18215, 0.1))),
    (lambda: flow(), lambda: free(1.0)),
    (lambda: free(2.0), lambda: free(2.0 + 1e-9)),
    (lambda: free(2.0), lambda: free(2.0, interval=(-1.0, 1.0))),
    (lambda: free(2.0, interval=(-1.0, 1.0)), lambda: free(2.0, interval=(-1.0, 1.0 + 1e-9))),
    (lambda: free(lambda lam: 2.0 + lam), lambda: free(lambda lam: 3.0 + lam)),
    (lambda: free(), lambda: free(unconditional={"y": 1.0})),
    (lambda: free(unconditional={"y": torch.zeros(3)}), lambda: free(unconditional={"y": torch.ones(3)})),
    (lambda: free(rule=APG()), lambda: free(rule=APG(0.5))),
    (lambda: free(rule=APG()), lambda: free(rule=ZeroStar())),
    (lambda: free(rescale=0.5), lambda: free(rescale=0.5, rescale_in="noise")),
    (lambda: free(), lambda: free(batched=False)),
    (lambda: Autoguidance(flow(), flow(0.5), 2.0), lambda: Autoguidance(flow(), flow(0.25), 2.0)),
    (lambda: Autoguidance(flow(), flow(0.5), 2.0), lambda: Autoguidance(flow(), flow(0.5), 3.0)),
    (lambda: Classifier(flow(), loss, 1.0), lambda: Classifier(flow(), other_loss, 1.0)),
    (lambda: Classifier(flow(), Net(1.0), 1.0), lambda: Classifier(flow(), Net(2.0), 1.0)),
    (lambda: Classifier(flow(), loss, 1.0), lambda: Classifier(flow(), loss, 1.0, time="native")),
    (lambda: Classifier(flow(), loss, 1.0), lambda: Posterior(flow(), loss, 1.0, evaluations=1)),
    (lambda: Transformed(flow(), Clip(-1, 1)), lambda: Transformed(flow(), Clip(-1, 2))),
    (lambda: Transformed(free(2.0), Clip(-1, 1)), lambda: Transformed(free(3.0), Clip(-1, 1))),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DIFFERENT)))
def test_what_changes_a_result_changes_the_fingerprint(number: int) -> None:
    one, other = (json.dumps(fingerprint(make())) for make in DIFFERENT[number])
    assert one != other
    again = (json.dumps(fingerprint(make())) for make in DIFFERENT[number])
    assert [one, other] == list(again)


def curved() -> fs.Flow:
    return flow(transform=Range(1, 2).then(Elementwise(torch.square, torch.sqrt, lambda y: (2 * y).log())))


def test_a_learnt_dequantiser_is_known_by_its_weights() -> None:
    learnt = [fs.likelihood.FlowDequantizer(flow(weight), dict) for weight in (1.0, 1.0, 2.0)]
    one, same, other = (json.dumps(spell(d)) for d in learnt)
    assert one == same
    assert one != other


def test_functions_are_the_same_in_another_process() -> None:
    """No address of an object is in it."""
    own = Transformed(flow(), lambda z: z)
    for made in (curved(), free(lambda v: v, rule=lambda *given: given[0]), Classifier(flow(), loss, 1.0), own):
        assert " at 0x" not in json.dumps(fingerprint(made))
    assert " at 0x" in repr(curved().transform)  # which is why it is not in there as it stands


def test_a_run_at_another_scale_is_refused(tmp_path: Path) -> None:
    common: dict[str, Any] = {"solver": solvers.DDIM(), "nfe": 6, "shape": (2,), "cond": {"y": 0.5}}
    runs.sample(free(2.0, interval=(-1.0, 1.0), batched=False), 2, tmp_path, **common)
    with pytest.raises(runs.RunError, match=r"other settings \(flow.settings.scale: 2.0 → 2.5\)"):
        runs.sample(free(2.5, interval=(-1.0, 1.0), batched=False), 2, tmp_path, **common)
