"""The comparison of `auto`: its split, its exact answers, and what the script makes of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowsolve as fs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fields(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sections import fields

    return fields


def test_no_problem_is_on_both_sides(fields):
    assert not set(fields.CHOSEN_ON) & set(fields.JUDGED_ON)
    made = {side: [make() for make in on.values()] for side, on in (("a", fields.CHOSEN_ON), ("b", fields.JUDGED_ON))}
    laws = {side: {str(p.std.flatten()[:9].tolist()) for p in all_ if hasattr(p, "std")} for side, all_ in made.items()}
    assert len(laws["a"]) >= 5
    assert not laws["a"] & laws["b"]


@pytest.mark.parametrize("name", ["table", "CondOT", "VE"])
def test_a_row_of_gains_is_the_error_of_a_field(fields, name):
    """The expected error from one row is that of solves from random starts, within the spread over starts."""
    path = fields.JUDGED_PATHS[name]
    problem = fs.problems.PowerLaw((3, 16, 16), noise=0.01, dtype=torch.float64)
    case = fields.cases({"field": lambda: problem}, path)[0]
    how = {"solver": fs.solvers.UniPC(2), "nfe": 6, "grid": "log_snr"}
    expected = case.judge(fs.sample(case.flow, start=case.start, **how).x)["field"]
    x = path.prior_std * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = path.window[1]
    exact = problem.flow_map(path, x, 0.0, end)
    exact = problem.data(exact, path.at(end)) if end < 1.0 else exact
    off = fs.sample(problem.flow(path, "noise" if name == "table" else "velocity"), start=x, **how).x - exact
    square = off.flatten(1).square().sum(1)
    norm = exact.flatten(1).square().sum(1)
    found, spread = (
        float((square.mean() / norm.mean()).sqrt()),
        float((square.std() / square.mean() + norm.std() / norm.mean()) / 8),
    )
    assert abs(found / expected - 1.0) < 5 * spread


def test_the_script_measures_and_renews(tmp_path):
    out = tmp_path / "auto.json"
    run = [
        sys.executable,
        "auto.py",
        "--only",
        "VE",
        "--budgets",
        "5",
        "8",
        "--data",
        "law 1.2",
        "scales, wider",
        "--out",
        str(out),
    ]
    subprocess.run(run, cwd=BENCHMARKS, check=True, capture_output=True)
    first = json.loads(out.read_text())
    assert list(first["problems"]) == ["law 1.2, VE", "scales, wider, VE"]
    for rows in first["problems"].values():
        assert [row["budget"] for row in rows] == [5, 8]
        assert all(0.0 < row[kind]["median"] < 1.0 for row in rows for kind in ("auto", "ours"))
    assert first["summary"]["all"]["ours"]["mean"] >= 1.0
    assert out.with_suffix(".png").exists()
    subprocess.run([*run, "--renew"], cwd=BENCHMARKS, check=True, capture_output=True)
    assert json.loads(out.read_text())["problems"] == first["problems"]
