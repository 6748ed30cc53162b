"""`train`: it learns flows, scores and ε; what is fed is what was asked; killed runs end in the same bits."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.paths import EDM, VP, CondOT
from flowsolve.problems import GaussianMixture
from flowsolve.training import Objective, couplings, named, posthoc, preconditioning, times, train, weights
from flowsolve.transforms import Range

MIXTURE = GaussianMixture(torch.tensor([[2.0, 0.0], [-2.0, 1.0]]), 0.3)
DATA = MIXTURE.sample(2000)


class Net(nn.Module):
    """net(x, t, label): labels 0 and 1, and 2 for none."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        label = torch.full((len(x),), 2, device=x.device) if label is None else label
        one = nn.functional.one_hot(label, 3).to(x)
        return self.layers(torch.cat((x, t[:, None], one), 1))  # type: ignore[no-any-return]


def flow(path: Any = None, prediction: str = "velocity", seed: int = 0, width: int = 64) -> fs.Flow:
    torch.manual_seed(seed)
    path = CondOT() if path is None else path
    return fs.Flow(Net(width), path, prediction, time="flow")


QUICK: dict[str, Any] = {"steps": 300, "batch": 128, "lr": 5e-3, "warmup": 20, "ema_decay": 0.98, "log_every": 50}


@pytest.mark.parametrize(
    ("made", "objective"),
    [
        (lambda: flow(), None),
        (lambda: flow(VP(), "noise"), named.ddpm()),
        (lambda: flow(VP(), "velocity"), named.score_flow()),
        (lambda: flow(CondOT(), "data"), named.sd3("lognorm")),
        (lambda: flow(), named.ot_flow_matching()),
        (
            lambda: preconditioning.preconditioned(flow().net, EDM(), sigma_data=1.5),
            named.edm2(1.5),
        ),
    ],
    ids=["flow matching", "DDPM", "ScoreFlow", "SD3 on data", "OT", "EDM2"],
)
def test_what_comes_out_samples_the_data(made: Any, objective: Objective | None) -> None:
    """A user's job: a network, data, one call; then the sampler on the result, whose moments are the data's."""
    if objective is not None and isinstance(objective.coupling, couplings.Exact):
        pytest.importorskip("scipy")
    trained = train(made(), DATA, objective=objective, **QUICK)
    assert len(trained.losses) == 6
    x = fs.sample(trained.flow, (2000, 2), nfe=20, seed=0).x
    right = x[:, 0] > 0
    assert abs(float(right.float().mean()) - 0.5) < 0.2  # other seeds: up to 0.09
    for part, middle in ((x[right], (2.0, 0.0)), (x[~right], (-2.0, 1.0))):
        # an eighth of the way to the other mode; other seeds: up to 0.41 (DDPM)
        assert float((part.median(0).values - torch.tensor(middle)).abs().max()) < 0.6


def test_conditions_dropout_and_classes() -> None:
    """Labels stay with their data, are lost at the rate asked for, and the coupling sees those that were not."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Net):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            assert label is not None
            seen.append((x.detach(), label))
            return super().forward(x, t, label)

    data = torch.arange(50.0)[:, None].repeat(1, 2)
    labels = (torch.arange(50) >= 25).long()
    asked = fs.Flow(Watched(), CondOT())
    objective = Objective("velocity", times.Drawn(lambda n, g: torch.full((n,), 1.0 - 1e-6)))  # x is the data
    common = {"cond": {"label": labels}, "dropout": 0.3, "null": {"label": 2}, "batch": 200, "lr": 1e-4}
    train(asked, data, objective=objective, steps=20, **common)  # type: ignore[arg-type]
    x, label = (torch.cat([s[i] for s in seen]) for i in (0, 1))
    lost = label == 2
    n = len(label)
    assert abs(float(lost.float().mean()) - 0.3) < 5.0 * (0.21 / n) ** 0.5
    right = (x[:, 0].round() >= 25).long()
    assert torch.equal(right[~lost], label[~lost])
    pytest.importorskip("scipy")
    by_label = Objective("velocity", coupling=couplings.ByLabel())
    train(asked, data, objective=by_label, labels="label", steps=2, **common)  # type: ignore[arg-type]


def test_pairs_sources_and_integers() -> None:
    source = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    pairs: list[Tensor] = []

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.by.expand_as(x)

    # pairs that differ by (3, −1) exactly: rectified flow on them has loss 0 at that shift
    moved = train(
        fs.Flow(Shift(), CondOT()), source + torch.tensor([3.0, -1.0]), source=source, objective=named.rectified_flow(),
        steps=300, batch=32, lr=0.1, warmup=0, ema_decay=0.9,
    )  # fmt: skip
    torch.testing.assert_close(moved.flow.net.by, torch.tensor([3.0, -1.0]), rtol=0, atol=2e-3)  # type: ignore[union-attr]
    # a function as source and as data
    drawn = train(
        fs.Flow(Shift(), CondOT()), lambda n, g: torch.randn(n, 2, generator=g) + 5.0,
        source=lambda n, g: torch.randn(n, 2, generator=g), steps=300, batch=64, lr=0.1, warmup=0, ema_decay=0.9,
    )  # fmt: skip
    assert float((drawn.flow.net.by - 5.0).abs().max()) < 0.3  # type: ignore[union-attr]

    class Seen(Shift):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            pairs.append(x.detach())
            return super().forward(x, t)

    images = torch.tensor([[0, 255]], dtype=torch.uint8)
    last = Objective("velocity", times.Drawn(lambda n, g: torch.full((n,), 1.0 - 1e-9)))
    train(fs.Flow(Seen(), CondOT(), transform=Range(-1.0, 1.0)), images, objective=last, steps=3, batch=500)
    x = torch.cat(pairs)
    cell = 2.0 / 256
    assert -1.0 <= float(x[:, 0].min()) < float(x[:, 0].max()) <= -1.0 + cell
    assert abs(float(x[:, 0].mean()) - (-1.0 + 0.5 * cell)) < 5.0 * cell / (12.0 * len(x)) ** 0.5


def options(out: Path | None = None, **more: Any) -> dict[str, Any]:
    """A run with everything that has a state: accumulation, two widths, a learned density and a learned weight."""
    objective = Objective("velocity", times.Learned(bins=8), weights.LearnedLogVariance(features=8), importance=True)
    return {
        "objective": objective, "steps": 60, "batch": 16, "lr": 5e-3, "warmup": 5, "accumulate": 2, "log_every": 10,
        "ema_widths": (0.05, 0.1), "every": 7, "out": out, "cond": {"label": (DATA[:, 0] > 0).long()},
        "dropout": 0.2, "null": {"label": 2}, **more,
    }  # fmt: skip


def ends(trained: fs.training.Trained, out: Path | None = None) -> list[Tensor]:
    trainer = trained.trainer
    modules = [trainer.module, trainer.ema.module, *(p.module for p in trainer.powers), trainer.extra[0]]
    return [p.detach().clone() for m in modules for p in m.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_device(device: torch.device, tmp_path: Path) -> None:
    """Everything that has a state, with data on the host and the network on the device; and resumed."""
    made = flow(width=16)
    assert isinstance(made.net, nn.Module)
    made.net.to(device)
    first = train(made, DATA, **options(tmp_path, steps=9))
    assert all(p.device.type == device.type for p in ends(first))
    again = train(made, DATA, **options(tmp_path, steps=9, resume=True))
    assert same(ends(first), ends(again))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """SIGKILL, also in the middle of a save: the resumed run ends in the bits of one that was never touched."""
    begun = time.perf_counter()
    whole = train(flow(width=16), DATA, **options(tmp_path / "whole", steps=160))
    took = time.perf_counter() - begun
    out = tmp_path / "killed"
    chance = random.Random(0)
    killed = 0
    for _ in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child uses torch's one
            child = os.fork()
        if child == 0:
            try:
                train(flow(width=16), DATA, **options(out, resume=True, steps=160))
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.0, 0.09) * took)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed >= 5
    resumed = train(flow(width=16), DATA, **options(out, resume=True, steps=160))
    assert same(ends(whole), ends(resumed))
    assert whole.losses == resumed.losses
    assert (out / "losses.csv").read_bytes() == (tmp_path / "whole/losses.csv").read_bytes()
    for std in (0.05, 0.08):
        one, other = (posthoc(f / "snapshots", std) for f in (tmp_path / "whole", out))
        assert all(torch.equal(one[k], other[k]) for k in one)
    rows = list(csv.reader((out / "losses.csv").read_text().splitlines()))
    assert rows[0] == ["step", "loss", "lr"]
    assert [r[0] for r in rows[1:]] == [str(k) for k in range(10, 161, 10)]


def test_a_killed_save_leaves_the_former_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(flow(width=16), DATA, **options(tmp_path, steps=14))
    kept = (tmp_path / "training.pt").read_bytes()

    def torn(state: Any, stream: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        fs.training.Trainer.save(
            train(flow(width=16), DATA, **options(None, steps=1)).trainer, tmp_path / "training.pt"
        )
    assert (tmp_path / "training.pt").read_bytes() == kept


def test_accumulation_is_the_mean_gradient() -> None:
    """With equal batches in each part, two half-size parts step as one; with clipping left out."""
    shared = {"steps": 5, "lr": 1e-2, "warmup": 0, "clip": None}

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return DATA[:n]

    fixed = Objective("velocity", times.Drawn(lambda n, g: torch.linspace(0.1, 0.9, n)))
    source = torch.zeros(32, 2)
    one, two = (
        train(flow(), draw, source=lambda n, g: source[:n], objective=fixed, batch=32, accumulate=k, **shared)  # type: ignore[arg-type]
        for k in (1, 3)
    )
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(one.trainer.module.parameters(), two.trainer.module.parameters(), strict=True)
    )


def test_a_run_of_something_else_is_not_continued(tmp_path: Path) -> None:
    train(flow(width=16), DATA, **options(tmp_path, steps=7))
    with pytest.raises(FileExistsError, match="resume=True"):
        train(flow(width=16), DATA, **options(tmp_path, steps=7))
    for changed, match in (
        ({"batch": 8}, "batch = 16, this run has 8"),
        ({"objective": named.ddpm()}, "the state has objective"),
        ({"dropout": 0.1}, "dropout"),
        ({"accumulate": 1}, "accumulate"),
    ):
        with pytest.raises(ValueError, match=match):
            train(flow(width=16), DATA, **options(tmp_path, **{"steps": 7, "resume": True, **changed}))
    with pytest.raises(ValueError, match="the state has data"):
        train(flow(width=16), DATA + 1.0, **options(tmp_path, steps=7, resume=True))
    with pytest.raises(ValueError, match="the state has flow"):
        train(flow(VP(), width=16), DATA, **options(tmp_path, steps=7, resume=True))
    with pytest.raises(ValueError, match="resume needs out"):
        train(flow(width=16), DATA, **options(None, resume=True))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"cond": {"label": torch.zeros(3)}}, ValueError, "a row for each of 2000 data"),
        ({"cond": {}, "null": {"label": 2}}, ValueError, "null has label"),
        ({"dropout": 1.0}, ValueError, "dropout = 1.0"),
        ({"labels": "class"}, ValueError, "labels = 'class'"),
        ({"objective": named.rectified_flow()}, ValueError, "takes pairs"),
        ({"batch": 0}, ValueError, "batch = 0"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"ema_widths": (0.4,)}, ValueError, "relative width"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        train(flow(width=16), DATA, **options(None, **changed))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        train(fs.Flow(lambda x, t: x, CondOT()), DATA)
    with pytest.raises(ValueError, match="data is a function"):
        train(flow(width=16), lambda n, g: DATA[:n], cond={"label": torch.zeros(2000)}, steps=1)
