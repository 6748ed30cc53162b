"""`flowsolve tune`: a file, its pictures and what is told; added to, used by name, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flowsolve as fs
from flowsolve import adapters
from flowsolve.cli import build
from flowsolve.tuning import Tuning

for package in ("typer", "diffusers", "matplotlib"):
    pytest.importorskip(package)


def invoke(*options: str) -> Any:
    from typer.testing import CliRunner

    return CliRunner().invoke(build(), list(options))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tuned")
    out = folder / "digits.json"
    common = ("--out", str(out), "-n", "8", "--minutes", "0.05")
    return out, (invoke("tune", "digits-ddpm", "--nfe", "3", "4", *common), common)


def test_it_writes_a_file_and_says_what_to_do_next(made: Any) -> None:
    out, (result, _) = made
    assert result.exit_code == 0, result.output
    found = Tuning.load(out)
    assert [row.nfe for row in found.rows] == [3, 4]
    assert all(row.ratio <= 1.0 or row.kept == "tuned" for row in found.rows)
    for word in ("tuned/generic", "pipe.scheduler = Scheduler.from_config", "held out", "fs.solvers.load"):
        assert word in result.output
    assert {p.name for p in out.parent.glob("*.png")} == {"digits.png", "digits-samples.png"}
    assert found.provenance["command"].startswith("flowsolve tune digits-ddpm")
    flow = adapters.load(adapters.bundled("digits-ddpm"))
    assert fs.sample(flow, (2, 1, 8, 8), solver=fs.solvers.load(out), nfe=3).nfe.tolist() == [3, 3]


def test_budgets_are_added_and_trajectories_used_again(made: Any) -> None:
    out, (_, common) = made
    folder = out.with_name("digits-trajectories")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = invoke("tune", "digits-ddpm", "--nfe", "5", *common)
    assert again.exit_code == 0, again.output
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name in before} == before
    assert [row.nfe for row in Tuning.load(out).rows] == [3, 4, 5]
    other = invoke("tune", "digits-condot", "--nfe", "5", *common)
    assert other.exit_code == 1
    assert "different checkpoint" in other.output


def test_it_is_a_solver_by_name(made: Any, tmp_path: Path) -> None:
    out, _ = made
    common = ("--nfe", "4", "-n", "3", "--no-progress", "--no-png")
    done = invoke("sample", "digits-ddpm", "--out", str(tmp_path / "run"), "--solver", str(out), *common)
    assert done.exit_code == 0, done.output
    assert "NFE 4" in done.output
    wrong = invoke("sample", "digits-condot", "--out", str(tmp_path / "no"), "--solver", str(out), *common)
    assert wrong.exit_code == 1
    assert "another path" in wrong.output
    told = json.loads(out.read_text())
    told["solvers"][0]["times"][1] += 1e-6
    (tmp_path / "changed.json").write_text(json.dumps(told))
    bad = invoke(
        "sample", "digits-ddpm", "--out", str(tmp_path / "no"), "--solver", str(tmp_path / "changed.json"), *common
    )
    assert bad.exit_code == 1
    assert "changed after it was written" in bad.output
