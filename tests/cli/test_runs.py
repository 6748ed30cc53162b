"""`flowsolve nll` and `flowsolve sample` on the bundled checkpoints."""

from __future__ import annotations

import json
import shlex
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowsolve as fs
from flowsolve.cli import build

for package in ("typer", "diffusers", "sklearn", "matplotlib", "PIL", "tqdm", "pyarrow"):
    pytest.importorskip(package)


def run(*words: object) -> Any:
    from typer.testing import CliRunner

    return CliRunner().invoke(build(), [str(w) for w in words])


def test_nll_of_held_out_digits(tmp_path: Path) -> None:
    """The report, the table and the terminal agree with `fs.bits_per_dim` on the same images."""
    common = ["nll", "digits-condot", "digits:held_out", "--solver", "heun", "--nfe", 8, "--limit", 24, "--batch", 10]
    result = run(*common, "--seed", 1, "--parquet", "--no-progress", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    flow = fs.adapters.load(fs.adapters.bundled("digits-condot"))
    images = fs.problems.digits.load("held_out").images[:24]
    right = fs.bits_per_dim(flow, images, solver=fs.solvers.Heun(), nfe=8, seed=1)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["mean"] == pytest.approx(right.mean, abs=1e-4)
    assert report["stderr"] == pytest.approx(right.stderr, rel=1e-3)
    assert f"bits/dim  {report['mean']:.4f} ± {report['stderr']:.4f}  (24 images)" in result.output
    assert max(len(line.replace(str(tmp_path), "")) for line in result.output.splitlines()) <= 80
    with sqlite3.connect(tmp_path / "out/results.sqlite") as db:
        rows = db.execute("SELECT * FROM items").fetchall()
    from pyarrow import parquet

    columns = parquet.read_table(tmp_path / "out/results.parquet").to_pydict()
    assert list(zip(*columns.values(), strict=True)) == rows
    assert (tmp_path / "out/report.png").read_bytes()[:4] == b"\x89PNG"
    again = run(*common, "--seed", 2, "--no-progress", "--out", tmp_path / "out")
    assert again.exit_code == 1
    assert "begun with other settings (seed: 1 → 2)" in " ".join(again.output.split())


def test_nll_needs_no_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 evaluations along a curve, every figure with its errors: in the table, the report, the bar and the summary."""
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--limit", 6, "--trace", "hutch++", "--probes", 6, "--draws", 2, "--repeats", 2, "--prior", "marginal"]
    result = run("nll", "digits-ddpm", "digits:held_out", *options, "--no-plot", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    flow = fs.adapters.load(fs.adapters.bundled("digits-ddpm"))
    images = fs.problems.digits.load("held_out").images[:6]
    right = fs.bits_per_dim(flow, images, trace="hutch++", probes=6, draws=2, repeats=2, prior="marginal")
    with sqlite3.connect(tmp_path / "results.sqlite") as db:
        rows = db.execute("SELECT bpd, nfe, probe_stderr, draw_stderr, solver_error FROM items").fetchall()
    found = (right.bpd, right.nfe, right.probe_stderr, right.draw_stderr, right.solver_error)
    for mine, theirs in zip(zip(*rows, strict=True), found, strict=True):
        assert mine == pytest.approx(theirs.tolist(), abs=2e-5)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["nfe"]["mean"] == 96.0
    assert report["settings"]["levels"] == 17
    error = float(right.solver_error.abs().mean())
    assert report["mean_abs_solver_error"] == pytest.approx(error, abs=1e-5)
    assert f"solver    {error:.4f} bits/dim, its error by its own estimate" in result.output
    lines = result.stderr.replace("\r", "\n").splitlines()
    assert f"{report['mean']:.4f} ± {report['stderr']:.4f} bpd, NFE 96, solver {error:.4f}" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_checkpoints_may_be_declared(tmp_path: Path) -> None:
    """As `flowsolve inspect` has it; the command in the metadata declares the same again."""
    given = ["--format", "diffusers", "--declare", "transform=Range(-1, 1, levels=4)", "--declare", "distilled=False"]
    common = ["--solver", "ddim", "--nfe", 3, "--n", 2, "--no-progress"]
    result = run("sample", "digits-ddpm", *given, *common, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "a/metadata.json").read_text())
    assert record["levels"] == 4
    with np.load(tmp_path / "a/samples.npz") as held:
        assert set(np.unique(held["images"])) <= {0, 1, 2, 3}
    assert run(*shlex.split(record["command"])[1:], "--no-progress", "--out", tmp_path / "b").exit_code == 0
    assert json.loads((tmp_path / "b/metadata.json").read_text())["digest"] == record["digest"]
    read = ["nll", "digits-ddpm", "digits", "--declare", "transform=Range(-1, 1, levels=4)", "--no-progress"]
    result = run(*read, "--out", tmp_path / "c")
    assert result.exit_code == 1
    assert "the data have 17 levels, but the flow's transform" in " ".join(result.output.split())


def test_codes_have_no_pictures_and_no_bits(tmp_path: Path) -> None:
    declared = ["digits-condot", "--declare", "transform=Latent(0.18215)", "--no-progress"]
    made = run("sample", *declared, "--solver", "ddim", "--nfe", 3, "--n", 2, "--out", tmp_path / "a")
    assert made.exit_code == 0, made.output
    assert "no pictures: the flow models codes, Latent(scale=0.18215, shift=0.0); samples.npz" in made.output
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"metadata.json", "parts", "run.json", "samples.npz"}
    read = run("nll", *declared[:1], "digits", *declared[1:], "--out", tmp_path / "b")
    assert read.exit_code == 1
    assert "its images have no bits per dimension" in " ".join(read.output.split())


def test_the_progress_bar_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is found: the mean of what is finished, its error, and the NFE."""
    monkeypatch.setenv("COLUMNS", "80")
    result = run(
        "nll", "digits-condot", "digits", "--solver", "heun", "--nfe", 8, "--limit", 24, "--no-plot", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    lines = result.stderr.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['mean']:.4f} ± {report['stderr']:.4f} bpd, NFE 8" in lines[-1]
    assert "24/24" in lines[-1]


def test_sample_writes_what_its_metadata_reproduces(tmp_path: Path) -> None:
    options = ["--solver", "unipc:order=2", "--nfe", 6, "--n", 9, "--seed", 3, "--batch", 4, "--grid", "log_snr"]
    result = run("sample", "digits-ddpm", *options, "--no-progress", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "9 samples, NFE 6\n" in result.output
    flow = fs.adapters.load(fs.adapters.bundled("digits-ddpm"))
    right = fs.sample(flow, (9, 1, 8, 8), solver=fs.solvers.UniPC(2), nfe=6, seed=3, grid="log_snr").x
    pixels = ((right.double() + 1.0) * 8.5).floor().clamp(0, 16).numpy()  # 17 levels on [−1, 1]
    with np.load(tmp_path / "a/samples.npz") as held:
        assert np.abs(held["images"][..., 0] - pixels[:, 0]).max() <= 1  # a number on the edge of two levels
    record = json.loads((tmp_path / "a/metadata.json").read_text())
    words = shlex.split(record["command"])
    assert words[0] == "flowsolve"
    assert run(*words[1:], "--no-progress", "--out", tmp_path / "b").exit_code == 0
    for name in ["samples.npz", "grid.png", *(f"images/{i:06d}.png" for i in range(9))]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_images_in(tmp_path: Path) -> None:
    """A sample of one checkpoint starts those of the other, and is carried to the noise and back."""
    common = ["--solver", "heun", "--nfe", 8, "--no-progress"]
    assert run("sample", "digits-ddpm", "--n", 2, *common, "--out", tmp_path / "a").exit_code == 0
    image = tmp_path / "a/images/000001.png"
    variants = run(
        "sample", "digits-condot", "--n", 3, *common, "--init", image, "--strength", 0.3, "--out", tmp_path / "b"
    )
    assert variants.exit_code == 0, variants.output
    assert json.loads((tmp_path / "b/metadata.json").read_text())["settings"]["start"] == pytest.approx(0.7)
    back = run("sample", "digits-condot", *common, "--invert", image, "--out", tmp_path / "c")
    assert back.exit_code == 0, back.output
    assert "round trip of 1 samples" in back.output
    with np.load(tmp_path / "c/latent.npz") as held:
        assert held["latent"].shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sample", "digits-condot", "--solver", "unpc"],
            "flowsolve sample: solver = 'unpc' is not known; expected one",
        ),
        (["sample", "digits-condot", "--solver", "heun"], "Heun steps on a fixed grid: give nfe=… or explicit times"),
        (["sample", "absent"], "flowsolve sample: 'absent' is not a directory"),
        (["sample", "digits-condot", "--shape", "8x8"], "--shape '8x8'; expected whole numbers between commas"),
        (["sample", "digits-condot", "--init", "a.png"], "go together; give both or neither"),
        (["sample", "digits-condot", "--init", "a.png", "--invert", "b.png"], "--invert and --init do two different"),
        (["nll", "digits-condot", "absent"], "flowsolve nll: there is no 'absent'; expected a folder of images"),
        (["nll", "digits-condot", "digits", "--grid", "karas"], "grid = 'karas' is not known; expected one of"),
        (["nll", "digits-condot", "digits", "--bits", "4", "--levels", "17"], "both say how many levels there are"),
        (["nll", "digits-condot", "digits", "--levels", "9"], "levels=17, centred=False) fixes 17; drop levels="),
        (
            ["nll", "digits-condot", "digits", "--solver", "ddpm"],
            "a likelihood is of the ODE: give a Runge–Kutta",
        ),
        (
            ["sample", "digits-condot", "--declare", "transform=Range(1)"],
            "transform='Range(1)' is no transform",
        ),
    ],
)
def test_errors_are_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    result = run(*words, "--no-progress", "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())
    assert len(result.output.strip().splitlines()) == 1


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowsolve.runs.measuring.bits_per_dim", interrupted)
    result = run("nll", "digits-condot", "digits", "--no-progress", "--out", tmp_path)
    assert result.exit_code == 130
    assert f"interrupted; {tmp_path} keeps what is finished, the same command goes on" in " ".join(
        result.output.split()
    )
