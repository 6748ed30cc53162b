"""What is printed commands no terminal, whatever the files, names, configurations and errors hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowsolve import adapters

for package in ("typer", "rich", "diffusers"):
    pytest.importorskip(package)

from flowsolve.cli import build  # noqa: E402
from flowsolve.cli._terminal import COMMANDS, LONGEST, plain  # noqa: E402

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\r\b\u202egnp\u2066\u2028\u200b\nflowsolve inspect: forged\x7f"
"""Clears the screen, sets the title, colours, turns the writing and forges a line."""


def run(*arguments: str) -> Any:
    from typer.testing import CliRunner

    return CliRunner(env={"COLUMNS": "80", "TERM": "xterm-256color"}).invoke(build(), list(arguments))


def harmless(output: str) -> bool:
    return all(c == "\n" or unicodedata.category(c) not in COMMANDS for c in output) and "\nflowsolve" not in output


def test_plain() -> None:
    assert plain("naïve – 8×8, λ ≤ ∞, 日本語") == "naïve – 8×8, λ ≤ ∞, 日本語"
    assert plain("\x1b[31m\x9b\u202e\n\t") == r"\u001b[31m\u009b\u202e\n\t"
    assert plain("a\nb", lines=True) == "a\nb"
    assert plain("\udcff\U000e0001") == r"\udcff\udb40\udc01"  # half a file name, a tag: both can be encoded
    assert json.loads(f'"{plain(EVIL)}"') == EVIL
    assert plain("x" * (LONGEST + 5)) == "x" * LONGEST + "… (5 more characters)"
    assert plain("x" * (LONGEST + 5), whole=True) == "x" * (LONGEST + 5)


def weights(root: Path) -> Path:
    file = root / "net.safetensors"
    names = {EVIL: torch.zeros(1), "model.diffusion_model.input_blocks.1.1.attn2.to_k.weight": torch.zeros(1, 768)}
    save_file(names, file, metadata={"modelspec.title": EVIL, "modelspec.prediction_type": EVIL})
    return file


def directory(root: Path, **changes: Any) -> Path:
    for part, content in (
        ("unet/config", {"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, **changes.get("unet", {})}),
        ("scheduler/scheduler_config", {"_class_name": "DDPMScheduler", **changes.get("scheduler", {})}),
        ("model_index", {"_class_name": "DDPMPipeline", **changes.get("index", {})}),
    ):
        (root / part).parent.mkdir(exist_ok=True, parents=True)
        (root / f"{part}.json").write_text(json.dumps(content))
    save_file({"w": torch.zeros(1)}, root / "unet/diffusion_pytorch_model.safetensors")
    return root


CASES = {
    "tensors and metadata": weights,
    "one tensor": lambda root: weights(root / ".."),
    "file": lambda root: root / f"no{EVIL}",
    "class": lambda root: directory(root / "m", unet={"_class_name": EVIL}),
    "pipeline": lambda root: directory(root / "m", index={"_class_name": EVIL}),
    "scheduler": lambda root: directory(root / "m", scheduler={"_class_name": EVIL}),
    "prediction": lambda root: directory(root / "m", scheduler={"prediction_type": EVIL}),
    "schedule": lambda root: directory(root / "m", scheduler={"beta_schedule": EVIL}),
    "steps": lambda root: directory(root / "m", scheduler={"num_train_timesteps": EVIL}),
    "folder": lambda root: directory(root / EVIL.replace("/", "")),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("options", [(), ("--json",), ("--format", "stable-diffusion")], ids=str)
def test_inspect(make: Any, options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    source = make(tmp_path / "inner")
    result = run("inspect", str(source), *options)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert harmless(result.output), repr(result.output)
    if options == ("--json",) and result.stdout:
        assert json.loads(result.stdout)["evidence"] == list(adapters.inspect(source).evidence)


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.safetensors")
    try:
        save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
        (tmp_path / "w.safetensors").rename(tmp_path / name)
    except OSError:
        pytest.skip("the file system has names in UTF-8 only")
    result = run("inspect", str(tmp_path / name))
    assert r"caf\udce9.safetensors" in result.output


@pytest.mark.parametrize("command", ["nll", "sample"])
def test_runs(command: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    name = EVIL.replace("/", "") + ".png"
    image.linear_gradient("L").resize((8, 8), 0).save(folder / name)
    (folder / f"z{name}").write_bytes(b"no picture")
    options = ["--nfe", "8", "--no-plot", "--on-error", "skip"] if command == "nll" else ["--nfe", "2", "-n", "2"]
    data = [str(folder)] if command == "nll" else []
    out = str(tmp_path / name)
    result = run(command, "digits-condot", *data, "--out", out, "--no-progress", *options)
    assert result.exit_code == 0, result.output
    assert harmless(result.output), repr(result.output)
    for bad in ("--solver", "--grid", "--format", "--declare"):
        result = run(command, "digits-condot", *data, "--out", out, "--no-progress", bad, EVIL)
        assert result.exit_code == 1
        assert harmless(result.output), repr(result.output)


def test_warnings_and_the_trace_of_an_unforeseen_error() -> None:
    program = (
        "import sys, warnings\nimport flowsolve.cli\nfrom flowsolve.cli._terminal import guard\nguard()\n"
        "warnings.warn(sys.argv[1])\nraise RuntimeError(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, EVIL], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\\u001b") == 4
    assert all(c == "\n" or unicodedata.category(c) not in COMMANDS for c in done.stderr)
