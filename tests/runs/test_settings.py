"""Fingerprints: what changes a result changes them, and nothing else does."""

from __future__ import annotations

import json
from functools import partial
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


def behind(weight: float) -> Any:
    """A function that closes over a network."""
    net = Net(weight)
    return lambda x, t: net(x, t)


class Holder:
    def __init__(self, weight: float) -> None:
        self.nets = {"a": [Net(weight)]}

    def call(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.nets["a"][0](x, t)

    __call__ = call


def table(bend: float) -> fs.paths.Discrete:
    """Tables with the same ends, which print the same."""
    return fs.paths.Discrete([0.9, 0.5 + bend, 0.1])


def own(row: Any) -> Any:
    return fs.Prediction("mine", row)


def moved(path: Any) -> fs.Flow:
    made = flow(path=fs.paths.CondOT())
    made.path = path
    return made


GLOBAL = Net(1.0)


def globally(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return GLOBAL(x, t)


def bare(net: Any) -> fs.Flow:
    return fs.Flow(net, fs.paths.VP(), "noise")


DIFFERENT: list[tuple[Any, Any]] = [
    (lambda: bare(behind(1.0)), lambda: bare(behind(2.0))),
    (lambda: bare(partial(Net(1.0), y=0.0)), lambda: bare(partial(Net(2.0), y=0.0))),
    (lambda: bare(partial(Net(1.0), y=0.0)), lambda: bare(partial(Net(1.0), y=1.0))),
    (lambda: bare(Holder(1.0).call), lambda: bare(Holder(2.0).call)),
    (lambda: bare(Holder(1.0)), lambda: bare(Holder(2.0))),
    (lambda: bare(lambda x, t: -x), lambda: bare(lambda x, t: -2.0 * x)),
    (lambda: bare(lambda x, t: -x), lambda: bare(lambda x, t: +x)),
    (lambda: flow(path=table(0.0)), lambda: flow(path=table(1e-6))),
    (lambda: fs.Flow(Net(), fs.paths.VP(), own(lambda p: fs.Row(1.0, 0.0))),
     lambda: fs.Flow(Net(), fs.paths.VP(), own(lambda p: fs.Row(0.0, 1.0)))),
    (lambda: moved(fs.paths.CondOT()), lambda: moved(fs.paths.Trig())),
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


def test_a_global_network_counts() -> None:
    one = fingerprint(bare(globally))
    with torch.no_grad():
        GLOBAL.weight.mul_(2.0)
    other = fingerprint(bare(globally))
    with torch.no_grad():
        GLOBAL.weight.mul_(0.5)
    assert one != other
    assert one == fingerprint(bare(globally))


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
