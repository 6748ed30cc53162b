"""The trainer: it learns, and an interrupted run ends in the same bits as one that was not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowsolve.flow import Flow
from flowsolve.paths import CondOT
from flowsolve.problems import GaussianMixture
from flowsolve.training import Trainer, cfm_loss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat((x, t[:, None]), 1))  # type: ignore[no-any-return]


POINTS = GaussianMixture(torch.tensor([[2.0, 0.0], [-2.0, 1.0]]), 0.2).sample(500)


def trainer(seed: int = 0, steps: int = 60, **options: object) -> Trainer:
    torch.manual_seed(0)
    flow = Flow(Net(), CondOT())

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(POINTS), (64,), generator=generator)
        return cfm_loss(flow, POINTS[rows], generator=generator)

    options = {"lr": 1e-2, "warmup": 5, "log_every": 10, **options}
    return Trainer(flow.net, loss, steps=steps, seed=seed, **options)  # type: ignore[arg-type]


def weights_of(run: Trainer) -> list[Tensor]:
    return [p.detach().clone() for m in (run.module, run.ema.module) for p in m.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_learns() -> None:
    run = trainer(steps=400)
    assert run.run() is run.ema.module
    assert run.step == 400
    assert len(run.losses) == 40
    assert run.losses[-1] < 0.7 * run.losses[0]


@pytest.mark.parametrize("stop", [1, 23, 30])
def test_resuming_is_exact(tmp_path: Path, stop: int) -> None:
    whole = trainer()
    whole.run()
    first = trainer()
    first.run(stop, checkpoint=tmp_path / "state.pt")
    second = trainer()
    torch.randn(17)  # what the process did in between does not matter
    second.load(tmp_path / "state.pt")
    assert second.step == stop
    second.run()
    assert same(weights_of(whole), weights_of(second))
    assert whole.losses == second.losses


def test_an_interrupt_resumes_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer()
    whole.run()
    broken = trainer()
    advance = broken._advance

    def interrupted() -> None:
        if broken.step == 47:
            raise KeyboardInterrupt
        advance()

    monkeypatch.setattr(broken, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run(checkpoint=tmp_path / "state.pt", every=20)
    resumed = trainer()
    resumed.load(tmp_path / "state.pt")
    assert resumed.step == 40
    resumed.run()
    assert same(weights_of(whole), weights_of(resumed))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    runs = [trainer(seed) for seed in (0, 0, 1)]
    torch.set_rng_state(before)
    for run in runs:
        run.run(10)
    assert torch.equal(before, torch.get_rng_state())
    assert same(weights_of(runs[0]), weights_of(runs[1]))
    assert not same(weights_of(runs[0]), weights_of(runs[2]))


def test_learning_rate() -> None:
    run = trainer(steps=100, warmup=10, final_lr=0.1)
    assert run.learning_rate(0) == pytest.approx(1e-3)
    assert run.learning_rate(9) == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(0.09 * math.pi))))
    assert run.learning_rate(50) == pytest.approx(1e-2 * 0.55)
    assert run.learning_rate(100) == pytest.approx(1e-3)


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run = trainer()
    run.run(20, checkpoint=tmp_path / "state.pt")
    loss = run.loss
    run.loss = lambda generator: loss(generator) * math.inf
    with pytest.raises(FloatingPointError, match="lower lr"):
        run.run(checkpoint=tmp_path / "state.pt", every=5)
    again = trainer()
    again.load(tmp_path / "state.pt")
    assert again.step == 20
    assert all(bool(w.isfinite().all()) for w in weights_of(again))


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="seed = 0, this run has 1"):
        trainer(seed=1).load(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="steps = 60"):
        trainer(steps=61).load(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="steps"):
        trainer(steps=0)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    trainer(steps=10).run(progress=True)
    assert "10/10" in capsys.readouterr().err
