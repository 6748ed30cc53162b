"""Killed, out of room, or misused: what is finished is kept, and the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flowsolve as fs
from flowsolve import runs, solvers
from flowsolve.runs import manifest, parts
from tests.runs import work

pytest.importorskip("PIL")
SCRIPT = Path(work.__file__)


def start(out: Path, **environment: str) -> subprocess.Popen[bytes]:
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), **environment}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(out)], env=here)


def finished(out: Path) -> int:
    return sum(1 for _ in parts.Parts(out / "parts").rows("idx"))


def table(out: Path) -> list[Any]:
    with sqlite3.connect(out / "results.sqlite") as db:
        return db.execute("SELECT * FROM items ORDER BY idx").fetchall()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "nll"
    assert work.nll(out)["images"] == work.COUNT
    return out


def test_killed_at_random_points_the_table_is_the_undisturbed_one(tmp_path: Path, whole: Path) -> None:
    """Each time it has finished something more, and is at work on one of its 8 batches, of a third of a second each."""
    chance = random.Random(0)
    for _ in range(3):
        process, before = start(tmp_path, WORK_CALL="0.008"), finished(tmp_path / "nll")
        while finished(tmp_path / "nll") == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < finished(tmp_path / "nll") < work.COUNT
    work.nll(tmp_path / "nll")
    assert (tmp_path / "nll/results.sqlite").read_bytes() == (whole / "results.sqlite").read_bytes()


@pytest.mark.parametrize(("point", "kept"), [("inside", 8), ("after", 12)])
def test_killed_around_a_commit(tmp_path: Path, whole: Path, point: str, kept: int) -> None:
    """The batch under way is lost, and no other; none is computed twice."""
    assert start(tmp_path, WORK_FAULT=f"{point}:3").wait() == -signal.SIGKILL
    assert finished(tmp_path / "nll") == kept
    work.nll(tmp_path / "nll")
    assert table(tmp_path / "nll") == table(whole)
    with sqlite3.connect(tmp_path / "nll/parts/rank-00000.sqlite") as db:
        assert db.execute("SELECT COUNT(*), COUNT(DISTINCT idx) FROM items").fetchone() == (work.COUNT, work.COUNT)


@pytest.mark.slow
def test_ten_kills_in_the_digits(tmp_path: Path) -> None:
    """The 1,797 digits under a bundled checkpoint, from the command line."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    line = [
        "nll",
        "digits-condot",
        "digits",
        "--solver",
        "heun",
        "--nfe",
        "8",
        "--batch",
        "16",
        "--no-progress",
        "--no-plot",
        "--out",
    ]
    command = [sys.executable, "-c", "from flowsolve.cli import main; main()", *line]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    subprocess.run([*command, str(tmp_path / "whole")], env=here, check=True)
    chance, out = random.Random(1), tmp_path / "killed"
    for _ in range(10):
        process, before = subprocess.Popen([*command, str(out)], env=here), finished(out)
        while finished(out) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was at work still
    assert 0 < finished(out) < 1797
    subprocess.run([*command, str(out)], env=here, check=True)
    assert len(table(out)) == 1797
    assert (out / "results.sqlite").read_bytes() == (tmp_path / "whole/results.sqlite").read_bytes()


def test_rows_are_those_of_one_call(whole: Path) -> None:
    """Batches of 4 are nothing that shows in the results, and the mean is that of the rows."""
    found = fs.bits_per_dim(work.flow(), work.IMAGES, levels=work.LEVELS, solver=solvers.Dopri5(1e-4, 1e-4), seed=3)
    rows = table(whole)
    assert [row[1] for row in rows][:2] == ["image 0", "image 1"]
    assert torch.tensor([row[3] for row in rows]).sub(found.bpd).abs().max() < 1e-5
    assert [row[4] for row in rows] == found.nfe.tolist()
    report = json.loads((whole / "report.json").read_text())
    assert report["mean"] == pytest.approx(found.mean, abs=1e-5)
    assert report["stderr"] == pytest.approx(found.stderr, rel=1e-3)
    assert [e["idx"] for e in report["worst"][:3]] == found.bpd.argsort(descending=True)[:3].tolist()
    assert report["nfe"]["total"] == int(found.nfe.sum())


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite is given no more pages: the error it reports is that of a full disk."""
    opened = parts.Part.__init__

    def small(self: parts.Part, *args: Any) -> None:
        opened(self, *args)
        self.db.execute("PRAGMA page_size")
        self.db.execute("PRAGMA max_page_count = 4")

    columns = {"name": "TEXT", "text": "TEXT"}
    with monkeypatch.context() as patch:
        patch.setattr(parts.Part, "__init__", small)
        (tmp_path / "parts").mkdir()
        with parts.Part(tmp_path / "parts", 0, columns) as part:
            part.commit(0, [(0, "a", "x" * 100)], 0.0)
            with pytest.raises(runs.RunError, match=r"rank-00000\.sqlite: database or disk is full. Make room"):
                part.commit(1, [(1, "b", "x" * 20_000)], 0.0)
    with parts.Part(tmp_path / "parts", 0, columns) as part:
        assert parts.Parts(tmp_path / "parts").where.keys() == {0}
        part.commit(1, [(1, "b", "x" * 20_000)], 0.0)
    assert [row[0] for row in parts.Parts(tmp_path / "parts").rows("idx")] == [0, 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 64 KiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    except OSError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("a disk of its own may not be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_is_filled_by_samples(small_disk: Path, tmp_path: Path) -> None:
    """PNG files fill it; with more room the run goes on to the samples of an undisturbed one."""
    with pytest.raises(runs.RunError, match=r"No space left on device: '.*|disk is full.*") as error:
        work.sample(small_disk / "run")
    assert f"{small_disk}/run/" in str(error.value)
    assert "is kept" in str(error.value)
    kept = finished(small_disk / "run")
    assert 0 < kept < 14
    assert not list((small_disk / "run/images").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    again = work.sample(small_disk / "run")
    assert again["digest"] == work.sample(tmp_path / "undisturbed")["digest"]


def test_a_disk_that_fills_at_the_very_end(small_disk: Path, whole: Path) -> None:
    """All is computed; there is no room for the table."""
    work.nll(small_disk / "run")
    (small_disk / "run/results.sqlite").unlink()
    room = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(room - 8192))
    with pytest.raises(runs.RunError, match=r"run/results.sqlite: database or disk is full. Make room and start"):
        work.nll(small_disk / "run")
    (small_disk / "filler").unlink()
    work.nll(small_disk / "run")
    assert (small_disk / "run/results.sqlite").read_bytes() == (whole / "results.sqlite").read_bytes()


def test_other_settings_are_refused_by_name(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    work.nll(out, limit=6)
    with pytest.raises(runs.RunError, match=r"other settings \(seed: 3 → 4\); restore them to go on, or choose"):
        work.nll(out, limit=6, seed=4)
    with pytest.raises(runs.RunError, match=r"solver: \"Dopri5\(rtol=0.0001, atol=0.0001\)\" → \"RK4\(\)\""):
        work.nll(out, limit=6, solver=solvers.RK4(), nfe=8)
    with pytest.raises(runs.RunError, match=r"data.count: 6 → 7"):
        work.nll(out, limit=7)
    other = work.flow()
    with torch.no_grad():
        other.net.scale.fill_(0.9)
    with pytest.raises(runs.RunError, match=r"flow.weights: \"\w+\" → \"\w+\""):
        runs.nll(
            other, work.IMAGES, out, solver=solvers.Dopri5(1e-4, 1e-4), levels=16, batch=4, seed=3, limit=6, plot=False
        )
    with pytest.raises(FileExistsError, match="holds a run already; choose another directory, or resume it"):
        work.nll(out, limit=6, resume=False)
    with pytest.raises(runs.RunError, match="sample"):
        work.sample(out)
    assert work.nll(out, limit=6)["images"] == 6  # finished: the report again


def test_another_version_is_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work.nll(tmp_path, limit=4)
    monkeypatch.setattr("flowsolve.runs.engine.versions", lambda: {"flowsolve": "9.9", "torch": torch.__version__})
    with pytest.raises(runs.RunError, match=r"flowsolve: \".*\" → \"9.9\""):
        work.nll(tmp_path, limit=4)


def test_changed_images_are_refused(tmp_path: Path) -> None:
    images = work.IMAGES.clone()
    work.nll(tmp_path, images, limit=8)
    images[0, 0, 0, 0] = (images[0, 0, 0, 0] + 1) % work.LEVELS
    with pytest.raises(runs.RunError, match="image 0 has changed since its result was written"):
        work.nll(tmp_path, images, limit=8)


def test_a_mistake_before_the_first_batch_can_be_mended(tmp_path: Path) -> None:
    """Nothing is finished that other settings could spoil."""
    with pytest.raises(ValueError, match="trace = 'exakt'"):
        work.nll(tmp_path, limit=4, trace="exakt")
    assert work.nll(tmp_path, limit=4, trace="exact")["images"] == 4


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no run \(there is thesis.tex\)"):
        work.nll(tmp_path, limit=4)
    (tmp_path / "run/parts").mkdir(parents=True)
    with (
        parts.Part(tmp_path / "run/parts", 0, {"a": "TEXT"}),
        pytest.raises(runs.RunError, match=r"is being written by another process: the run in .* is already going"),
    ):
        work.nll(tmp_path / "run", limit=4)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    work.nll(tmp_path, limit=4)
    (tmp_path / "parts/rank-00000.sqlite").write_bytes(b"no database, and long enough to be seen as none" * 20)
    with pytest.raises(runs.RunError, match=r"rank-00000.sqlite: file is not a database. Move that file away"):
        work.nll(tmp_path, limit=4)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(runs.RunError, match=r"run.json is not valid JSON"):
        work.nll(tmp_path, limit=4)


def test_the_manifest_is_made_once(tmp_path: Path) -> None:
    """Of processes that start together one writes it, and none finds half of it."""
    file = tmp_path / manifest.NAME
    assert manifest._created(file, {"a": 1})
    assert not manifest._created(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == [manifest.NAME]


def test_errors_of_an_image_have_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `bits_per_dim` says how sure it is of each image."""
    from flowsolve.runs import measuring

    read = measuring.bits_per_dim

    def sure(*given: Any, **options: Any) -> Any:
        own = torch.tensor(options["samples"]) / 8
        return replace(read(*given, **options), probe_stderr=own, solver_error=-own)

    monkeypatch.setattr(measuring, "bits_per_dim", sure)
    report = work.nll(tmp_path, limit=6)
    assert report["mean_probe_stderr"] == pytest.approx((0 + 1 + 4 + 9 + 16 + 25) ** 0.5 / 8 / 6)
    assert report["mean_draw_stderr"] is None  # one draw cannot tell
    assert report["mean_abs_solver_error"] == pytest.approx((0 + 1 + 2 + 3 + 4 + 5) / 8 / 6)
    with sqlite3.connect(tmp_path / "results.sqlite") as db:
        rows = db.execute("SELECT probe_stderr, draw_stderr, solver_error FROM items ORDER BY idx").fetchall()
    assert rows == [(i / 8, None, -i / 8) for i in range(6)]
