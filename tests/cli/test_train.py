"""`flowsolve train`: a few steps write a directory that loads; an interrupted run resumes to the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowsolve import adapters
from flowsolve._optional import install
from flowsolve.cli import build, main
from flowsolve.paths import CondOT, Discrete
from flowsolve.training import Trainer

for package in ("typer", "diffusers", "sklearn"):
    pytest.importorskip(package)

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def run(out: Path, *options: str) -> Any:
    from typer.testing import CliRunner

    common = ["train", "--out", str(out), "--width", "16", "--steps", "4", "--batch", "8", "--no-progress"]
    return CliRunner().invoke(build(), [*common, *options])


@pytest.mark.parametrize(("model", "path"), [("ddpm", Discrete.linear()), ("condot", CondOT())], ids=["ddpm", "condot"])
def test_a_few_steps_write_a_checkpoint(tmp_path: Path, model: str, path: object) -> None:
    result = run(tmp_path / "out", "--model", model, "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "parameters, 4 steps" in result.output
    flow = adapters.load(tmp_path / "out")
    assert flow.path == path
    assert flow.velocity(torch.zeros(2, 1, 8, 8), 0.5).shape == (2, 1, 8, 8)
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["recipe"]["seed"] == 3
    assert set(record["loss"]) == {"train", "held_out"}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model_index.json", "scheduler", "training.json", "unet"}
    again = run(tmp_path / "again", "--model", model, "--seed", "3")
    assert again.exit_code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_resuming_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "whole").exit_code == 0
    advance = Trainer._advance

    def interrupted(self: Trainer) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", interrupted)
        patch.setattr("flowsolve.cli.train.CHECKPOINT_EVERY", 2)
        assert run(tmp_path / "broken").exit_code != 0
    assert (tmp_path / "broken/training.pt").is_file()
    refused = run(tmp_path / "broken")
    assert refused.exit_code == 1
    assert "is not empty" in refused.output
    other = run(tmp_path / "broken", "--resume", "--lr", "0.5")
    assert other.exit_code == 1
    assert "lr: 0.001 → 0.5" in other.output
    assert run(tmp_path / "broken", "--resume").exit_code == 0
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "mnist"], 1, "data = 'mnist' is not known; expected one of digits"),
        (["--model", "edm"], 1, "model = 'edm' is not known; expected one of ddpm, condot"),
        (["--resume"], 1, "no unfinished run"),
        (["--width", "24"], 2, "not a multiple of 16"),
        (["--steps", "0"], 2, "--steps"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    result = run(tmp_path / "out", *options)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


def test_help_lists_the_command() -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(build(), ["--help"])
    assert result.exit_code == 0
    assert "train" in result.output


def test_without_typer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert install("cli") in error
    assert error.count("\n") == 1
