"""A solver of another package: known by its name wherever a solver is text, JSON or part of a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import flowsolve as fs
from flowsolve.problems import GaussianMixture
from flowsolve.runs.settings import spell
from flowsolve.solvers import Multistep, SingleStep, names, registry
from flowsolve.solvers.base import Query, State, Step


@dataclass(frozen=True)
class Shortened(fs.solvers.EstimateSolver):
    """DDIM with an estimate of the noise that is scaled down."""

    factor: float = 1.0

    def step(self, path: fs.paths.Path, state: State, t: float, t_next: float) -> Step:
        estimate = yield Query(state.x, t)
        there = path.at(t_next)
        return state.advance(estimate.combine(there.alpha, self.factor * there.sigma))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> type[Shortened]:
    monkeypatch.setattr(registry, "REGISTERED", dict(registry.REGISTERED))
    monkeypatch.setattr(names, "SOLVERS", registry.REGISTERED)
    return fs.solvers.register(Shortened)


def test_by_text(known: type[Shortened]) -> None:
    flow = GaussianMixture([[-1.0], [1.0]], 0.3).flow(fs.paths.CondOT())
    found = fs.sample(flow, (3, 1), solver="shortened", nfe=4, grid="uniform")
    assert torch.equal(found.x, fs.sample(flow, (3, 1), solver=fs.solvers.DDIM(), nfe=4, grid="uniform").x)
    assert names.solver("Shortened:factor=0.5") == Shortened(0.5)


def test_in_a_scheduler_and_a_fingerprint(known: type[Shortened]) -> None:
    settings = pytest.importorskip("flowsolve.adapters.diffusers.settings", reason="diffusers is not installed")
    said = settings.to_json(fs.solvers.Churn(Shortened(0.5), gamma=0.1))
    assert said["inner"] == {"class": "Shortened", "factor": 0.5}
    assert settings.from_json(said) == fs.solvers.Churn(Shortened(0.5), gamma=0.1)
    assert spell(Shortened(0.5)) == "Shortened(factor=0.5)"


def test_what_is_not_registered_is_told_apart() -> None:
    assert spell(Shortened()) == f"{__name__}.Shortened()"
    with pytest.raises(ValueError, match="shortened"):
        names.solver("shortened")


def test_names_are_unique(known: type[Shortened]) -> None:
    @dataclass(frozen=True)
    class DDIM(fs.solvers.EstimateSolver): ...

    with pytest.raises(ValueError, match=r"DDIM is the name of flowsolve\.solvers\.discrete\.DDIM already"):
        fs.solvers.register(DDIM)
    assert fs.solvers.register(known) is known


class Undeclared(Shortened):
    pass


@dataclass
class Changeable:
    order: int = 1


@pytest.mark.parametrize("kind", [Undeclared, Changeable, int, fs.solvers.DDIM()])
def test_what_cannot_be_registered(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"frozen dataclass|itself a dataclass"):
        fs.solvers.register(kind)


METHODS = sorted(set(registry.REGISTERED.values()) - {fs.solvers.Auto, fs.solvers.RePaint}, key=lambda k: k.__name__)


@pytest.mark.parametrize("kind", METHODS)
def test_every_solver_declares_the_contract(kind: type[Any]) -> None:
    """No driver has to ask whether an attribute is there."""
    solver = kind(churn=1.0) if kind is fs.solvers.Churn else kind()
    assert solver.order >= 1
    assert solver.evaluations >= 1
    assert isinstance(solver.random, bool)
    assert isinstance(solver.cooldown, bool)
    assert solver.remembers == isinstance(solver, Multistep)
    if not solver.chooses_steps:
        assert kind is fs.solvers.Restart or len(solver.counts(7)) == 7
        assert sum(solver.schedule(24)) == 24


@pytest.mark.parametrize("kind", [Multistep, SingleStep])
@pytest.mark.parametrize("eta", [0.5, lambda t: 0.5])
def test_eta_as_a_number_and_as_a_function(kind: Any, eta: Any) -> None:
    flow = GaussianMixture([[-1.0], [1.0]], 0.3).flow(fs.paths.CondOT())
    found = fs.sample(flow, (3, 1), solver=kind(2, eta=eta), nfe=8)
    assert torch.equal(found.x, fs.sample(flow, (3, 1), solver=kind(2, eta=0.5), nfe=8).x)
    with pytest.raises(ValueError, match="eta = -1"):
        kind(2, eta=-1.0)
