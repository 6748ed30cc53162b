"""The comparison of tuned solvers: who is the best in hindsight, and what the record says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORD = BENCHMARKS / "results" / "tuned.json"


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tuned

    return tuned


def test_the_best_in_hindsight_keeps_to_the_budget_and_does_not_fail(tuned: Any) -> None:
    exact = torch.ones(4, 3)
    case = tuned.Case(None, torch.zeros(4, 3), None, exact)

    def ends(off: float, calls: int) -> Any:
        return lambda start: (torch.full_like(start, 1.0 + off), calls), off

    def crash(start: Any) -> Any:
        raise RuntimeError("as a peer may")

    tried = {
        "good": ends(0.1, 5), "dear": ends(0.01, 6), "crash": (crash, None), "nan": ends(math.nan, 5),
        "worse": ends(0.2, 4),
    }  # fmt: skip
    for dear in (False, True):
        errors, name, choice = tuned._best(case, 5, tried, dear)
        assert (name, choice) == ("good", 0.1)
        torch.testing.assert_close(errors, torch.full((4,), 0.1).double(), rtol=1e-5, atol=0.0)
    assert tuned._best(case, 5, {"crash": (crash, None)}, False) is None


def test_the_record_has_its_ratios_and_targets(tuned: Any) -> None:
    record = json.loads(RECORD.read_text())
    for made in record["networks"].values():
        for row in made.get("rows", ()):
            for kind in ("ours", "peer"):
                if kind in row:
                    ratio = row["tuned"]["median"] / row[kind]["median"]
                    assert abs(ratio / row[f"ratio to {kind}"]["median"] - 1.0) < 2e-3  # of figures to four digits
            assert row["ours"]["median"] <= row["auto"]["median"] * 1.001  # auto is one of ours
    assert record["targets"] == tuned.aims(record["networks"])
    assert any("ours" in aim["name"] for aim in record["targets"])
