"""The benchmark of SDEs: the script from end to end on few repetitions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_writes_a_record(tmp_path):
    out = tmp_path / "sde.json"
    subprocess.run([sys.executable, "benchmarks/sde.py", "--quick", "--out", out], cwd=ROOT, check=True)
    record = json.loads(out.read_text())
    assert len(record["times"]) == 16
    for row in record["errors"]:
        assert len(row["ours"]) == len(row["steps"])


def test_the_record_holds_its_targets():
    record = json.loads((ROOT / "benchmarks/results/sde.json").read_text())
    assert not record["quick"]
    assert all(aim["met"] in (True, None) for aim in record["targets"]), record["targets"]
    for row in record["errors"]:
        if "torchsde" in row:
            assert row["ours"][-1] < 2 * row["torchsde"][-1]
