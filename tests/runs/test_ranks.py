"""Processes that share a run: the same results for any number of them, and nobody waits."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowsolve.runs import Rank
from tests.runs import work

pytest.importorskip("PIL")
SCRIPT = Path(work.__file__)


def table(out: Path) -> list[Any]:
    with sqlite3.connect(out / "nll/results.sqlite") as db:
        return db.execute("SELECT * FROM items ORDER BY idx").fetchall()


def torchrun(out: Path, processes: int, **environment: str) -> int:
    """The exit status of the script under torchrun."""
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), **environment}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(SCRIPT), str(out)]
    return subprocess.run([sys.executable, *launch], env=here, timeout=120, capture_output=True).returncode


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    work.nll(out / "nll")
    work.sample(out / "sample")
    return out


def same(out: Path, alone: Path) -> None:
    assert table(out) == table(alone)
    assert (out / "nll/results.sqlite").read_bytes() == (alone / "nll/results.sqlite").read_bytes()
    pictures = sorted(p.name for p in (alone / "sample/images").iterdir())
    assert pictures == [f"{i:06d}.png" for i in range(14)]
    assert sorted(p.name for p in (out / "sample/images").iterdir()) == pictures
    for name in [*(f"images/{n}" for n in pictures), "grid.png", "samples.npz"]:
        assert (out / "sample" / name).read_bytes() == (alone / "sample" / name).read_bytes(), name
    records = [json.loads((root / "sample/metadata.json").read_text()) for root in (out, alone)]
    assert records[0]["digest"] == records[1]["digest"]
    nfe = {row[4] for row in table(out)}
    assert len(nfe) > 1  # images of different cost, in processes that take different numbers of steps


@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_gives_what_one_process_gives(tmp_path: Path, alone: Path, processes: int) -> None:
    """Eight batches for 2 or 3 processes, four of samples for them; an adaptive solver."""
    assert torchrun(tmp_path, processes) == 0
    assert len(list((tmp_path / "nll/parts").glob("*.sqlite"))) == processes
    same(tmp_path, alone)


def test_many_samples_have_the_same_bits_in_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 of an adaptive solver: plain torch here, there what the rule of the kernels makes of a process's work."""
    work.many(tmp_path / "alone")
    monkeypatch.setenv("FLOWSOLVE_KERNELS", "auto")
    monkeypatch.setenv("WORK_MANY", "1")
    assert torchrun(tmp_path, 2) == 0
    found, expected = (np.load(tmp_path / name / "samples.npz") for name in ("many", "alone"))
    assert len(found["nfe"]) == 600
    for key in expected.files:
        assert np.array_equal(found[key], expected[key]), key


def test_a_run_goes_on_with_other_numbers_of_processes(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of 3 alone, then rank 1 of 2, then one process for the rest. Each returns without waiting for the others;
    rank 5 of 9 has nothing to do.
    """
    for number, world in ((0, 3), (1, 2), (8, 9)):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert work.nll(tmp_path / "nll") is None
        assert work.sample(tmp_path / "sample") is None
        assert not (tmp_path / "nll/report.json").exists()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert work.nll(tmp_path / "nll")["images"] == work.COUNT
    work.sample(tmp_path / "sample")
    same(tmp_path, alone)


def test_the_rank_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Rank.here() == Rank(0, 1, 0)
    monkeypatch.setenv("RANK", "9")
    with pytest.raises(ValueError, match="only one of RANK and WORLD_SIZE is set"):
        Rank.here()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Rank.here() == Rank(9, 16, 1)
    assert [b for b in range(40) if Rank.here().mine(b)] == [9, 25]
    assert str(Rank.here().device("cpu")) == "cpu"
    assert str(Rank.here().device("cuda:3")) == "cuda:3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(Rank.here().device("cuda")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK = 1, but this machine has 1 CUDA devices"):
        Rank.here().device("cuda")
    monkeypatch.setenv("RANK", "16")
    with pytest.raises(ValueError, match=r"expected 0 <= RANK < WORLD_SIZE"):
        Rank.here()
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(ValueError, match="RANK = 'two' in the environment"):
        Rank.here()


def test_every_batch_is_somebodys_and_nobody_elses() -> None:
    for world in (1, 2, 3, 7):
        owners = np.array([[Rank(r, world).mine(b) for b in range(50)] for r in range(world)])
        assert (owners.sum(0) == 1).all()
