"""The overhead benchmark: its arithmetic, and the script from end to end on small cases."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PEERS = ("torchdiffeq", "torchode", "diffrax", "scipy")


@pytest.fixture
def section(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: import_module(f"sections.{name}")


def test_evaluations_are_read_from_the_lower_left_envelope(section):
    nfe = section("nfe")
    points = [(1e-2, 10), (1e-4, 1000), (1e-3, 100), (5e-2, 50)]  # the last is worse in both respects
    assert nfe.needed(points, 1e-3) == pytest.approx(100)
    assert nfe.needed(points, 10**-3.5) == pytest.approx(10**2.5)
    assert nfe.needed(points, 1e-5) is None
    assert nfe.needed(points, 1e-1) is None
    assert nfe.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert nfe.geometric_mean([]) is None


def test_closed_forms_agree_with_a_tight_solve(section):
    pytest.importorskip("scipy")
    problems = section("problems").PROBLEMS
    assert len(problems) == 14
    for problem in problems:
        if problem.exact is not None:
            assert np.allclose(problem.exact, replace(problem, exact=None).truth(), rtol=0, atol=2e-11), problem.name


def test_repetitions_take_turns_and_ratios_are_taken_within_them(section):
    measure = section("measure")
    order = []
    seconds = measure.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 4)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4}
    assert measure.ratio([1.0, 2.0, 6.0], [2.0, 2.0, 3.0]) == {"median": 1.0, "q1": 0.75, "q3": 1.5}
    assert measure.target("x", 0.2, 0.2)["met"] is True
    assert measure.target("x", None, 0.2)["met"] is None


@pytest.mark.slow
def test_the_script_runs_from_end_to_end(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    out = tmp_path / "overhead.json"
    script = ROOT / "benchmarks" / "overhead.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    record = json.loads(out.read_text())
    assert set(record["environment"]["absent"]) == {name for name in PEERS if not find_spec(name)}
    sections = record["sections"]
    assert list(sections) == ["step", "fixed", "mixed", "nfe", "gradients", "robust"]
    mixed = sections["mixed"]
    assert mixed["nfe_same_alone"]
    assert mixed["rows"][0]["work"] == pytest.approx(1.0)
    assert mixed["rows"][0]["worst_error"] < 1e-3
    for case in sections["step"]["cases"]:
        ours = case["rows"][0]
        assert ours["name"] == "flowsolve fused"
        assert ours["ratio"]["median"] == 1.0
        assert 0.0 < ours["seconds"]["q1"] <= ours["seconds"]["median"]
    assert math.isfinite(sections["nfe"]["best"]["all"])
    assert all(row["flowsolve"]["right"] for row in sections["robust"]["rows"])
    if "series" in sections["gradients"]:
        by_mode = sections["gradients"]["series"]["RK4"]
        assert by_mode["checkpoint"]["exponent"] < 0.8 < by_mode["direct"]["exponent"]
        assert by_mode["checkpoint"]["runs"][-1]["difference"] < 1e-12
        assert out.with_name("overhead-gradients.png").stat().st_size > 10_000
    assert out.with_name("overhead-nfe.png").stat().st_size > 10_000
