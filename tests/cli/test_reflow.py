"""`flowsolve reflow`: rounds on a small checkpoint, stopped and continued, with classes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowsolve import adapters
from flowsolve.cli import build
from flowsolve.training import Trainer

for package in ("typer", "diffusers", "sklearn", "matplotlib"):
    pytest.importorskip(package)

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def invoke(*options: str) -> Any:
    from typer.testing import CliRunner

    return CliRunner().invoke(build(), list(options))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a conditional network of a few steps."""
    root = tmp_path_factory.mktemp("checkpoints")
    common = ("train", "--width", "16", "--steps", "4", "--batch", "8", "--no-progress")
    assert invoke(*common, "--out", str(root / "plain")).exit_code == 0
    assert invoke(*common, "--out", str(root / "classes"), "--classes").exit_code == 0
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EVERY", 2), ("SHARD", 8), ("MEASURED", 6)):
        monkeypatch.setattr(f"flowsolve.cli.reflow.{name}", value)


def run(source: Path | str, out: Path, *options: str) -> Any:
    common = ("--pairs", "12", "--steps", "5", "--nfe", "3", "--batch", "8", "--no-progress")
    return invoke("reflow", str(source), "--out", str(out), *common, *options)


def test_rounds_and_distillation_stopped_and_continued(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--rounds", "2", "--distil", "2")
    done = run(checkpoints / "plain", tmp_path / "whole", *options)
    assert done.exit_code == 0, done.output
    names = ["source", "round-1", "round-2", "distilled"]
    assert [line.split()[0] for line in done.output.splitlines()[1:]] == names
    record = json.loads((tmp_path / "whole/reflow.json").read_text())
    assert [row["name"] for row in record["flows"]] == names
    assert (tmp_path / "whole/reflow.png").stat().st_size > 1000
    advance = Trainer._advance
    left = [3, 4, 6]  # steps until each interrupt

    def interrupted(self: Trainer) -> None:
        if left and not left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        if left:
            left[0] -= 1
        advance(self)

    monkeypatch.setattr(Trainer, "_advance", interrupted)
    for _ in range(3):
        stopped = run(checkpoints / "plain", tmp_path / "broken", *options)
        assert stopped.exit_code == 130
        assert "the same command goes on" in stopped.output
    assert run(checkpoints / "plain", tmp_path / "broken", *options).exit_code == 0
    for name in names[1:]:
        whole, broken = ((tmp_path / d / name / WEIGHTS).read_bytes() for d in ("whole", "broken"))
        assert whole == broken
        flow = adapters.load(tmp_path / "broken" / name)
        assert flow.transform.levels == 17
    assert json.loads((tmp_path / "broken/reflow.json").read_text())["flows"] == record["flows"]
    other = run(checkpoints / "plain", tmp_path / "broken", *options, "--lr", "0.1")
    assert other.exit_code == 1
    assert "lr: 0.0003 → 0.1" in other.output


def test_classes_go_with_their_pairs(checkpoints: Path, tmp_path: Path) -> None:
    done = run(checkpoints / "classes", tmp_path / "out")
    assert done.exit_code == 0, done.output
    flow = adapters.load(tmp_path / "out/round-1")
    assert flow.velocity(torch.zeros(2, 1, 8, 8), 0.5, class_labels=torch.tensor([3, 10])).isfinite().all()


def test_what_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    full = run(checkpoints / "plain", tmp_path / "full")
    assert full.exit_code == 1
    assert "is not empty" in full.output
    assert run(tmp_path / "nowhere", tmp_path / "out").exit_code == 1
