"""`flowsolve train`: a few steps write a directory that loads; an interrupted run resumes to the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowsolve as fs
from flowsolve import adapters
from flowsolve._optional import install
from flowsolve.cli import build, main
from flowsolve.paths import CondOT, Discrete
from flowsolve.training import Trainer
from flowsolve.transforms import Range

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
    assert names == {"losses.csv", "model_index.json", "scheduler", "training.json", "unet"}
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


def shades(n: int, size: int = 12, channels: int = 3, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    shape = (n, size, size, channels) if channels > 1 else (n, size, size)
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("classes", [False, True])
def test_a_folder_of_pngs_from_end_to_end(tmp_path: Path, classes: bool) -> None:
    """What a user does: a folder, train, load, sample, bits/dim, and with classes guidance."""
    image = pytest.importorskip("PIL.Image")
    for i, pixels in enumerate(shades(24)):
        file = tmp_path / "images" / ("cats" if i % 3 else "dogs") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(file)
    options = ["--classes"] if classes else []
    result = run(tmp_path / "out", "--data", str(tmp_path / "images"), *options)
    assert result.exit_code == 0, result.output
    flow = adapters.load(tmp_path / "out")
    assert flow.transform == Range(-1.0, 1.0, levels=256)
    cond = {"class_labels": torch.tensor([0, 1, 2])} if classes else {}
    x = fs.sample(flow, (3, 3, 12, 12), nfe=4, seed=0, cond=cond).x
    assert flow.transform.pixels(x).dtype == torch.uint8
    images = torch.as_tensor(shades(3, seed=1)).permute(0, 3, 1, 2)
    assert fs.bits_per_dim(flow, images, nfe=16, cond=cond).bpd.isfinite().all()
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["images"] == {"train": 22, "held_out": 2}
    assert record["classes"] == (["cats", "dogs"] if classes else [])
    assert set(record["loss"]) == {"train", "held_out"}
    if classes:
        null = {"class_labels": torch.tensor([2])}
        guided = fs.guidance.ClassifierFree(flow, 2.0, unconditional=null)
        assert guided.velocity(x[:1], 0.5, class_labels=torch.tensor([1])).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.npy", []),
        ("a.npz", ["--classes", "--coupling", "exact", "--times", "logit-normal"]),
        ("a.npz:images", ["--times", "cosmap", "--accumulate", "2", "--clip", "0"]),
        ("few.npy", ["--levels", "4", "--times", "stratified"]),
    ],
)
def test_arrays(tmp_path: Path, name: str, options: list[str]) -> None:
    grey = shades(12, size=8, channels=1)
    np.save(tmp_path / "a.npy", grey)
    np.savez(tmp_path / "a.npz", images=grey, labels=np.arange(12) % 3)
    np.save(tmp_path / "few.npy", grey // 64)
    result = run(tmp_path / "out", "--data", str(tmp_path / name), *options)
    assert result.exit_code == 0, result.output
    flow = adapters.load(tmp_path / "out")
    assert flow.transform == Range(-1.0, 1.0, levels=4 if "few" in name else 256)


def test_images_that_do_not_do(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def refused(data: Path | str, *options: str) -> str:
        result = run(tmp_path / f"out{len(list(tmp_path.iterdir()))}", "--data", str(data), *options)
        assert result.exit_code == 1
        return " ".join(result.output.split())

    folder = tmp_path / "images"
    folder.mkdir()
    image.fromarray(shades(1)[0]).save(folder / "a.png")
    assert "lies in no folder of its own" in refused(folder, "--classes")
    image.fromarray(shades(1, size=14)[0]).save(folder / "b.png")
    assert "b.png has shape (3, 14, 14); expected that of" in refused(folder)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:100])
    assert "b.png: it cannot be read as an image" in refused(folder)
    np.save(tmp_path / "odd.npy", shades(4, size=9, channels=1))
    assert "9×9 pixels; expected even numbers" in refused(tmp_path / "odd.npy")
    assert "the images run from" in refused(tmp_path / "odd.npy", "--levels", "4")
    assert "has no classes" in refused(tmp_path / "odd.npy", "--classes")
    np.savez(tmp_path / "bad.npz", images=shades(4, channels=1), labels=np.arange(3))
    assert "labels have shape (3,)" in refused(tmp_path / "bad.npz", "--classes")
    assert "times = 'sometimes' is not known" in refused("digits", "--times", "sometimes")


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
