r"""What rounds of rectified flow do to the bundled digits: straightness, few-step error, samples, likelihood.

    python benchmarks/reflow.py                       # four minutes on one core
    python benchmarks/reflow.py --work /tmp/reflow    # keeps the checkpoints there, and goes on from what is there

The rounds are those of `flowsolve reflow digits-condot`, whose table is the first half of the record. The second has,
for each flow, the energy distance 2E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ of 600 samples of 1, 4 and 32 Euler steps to the
training digits (dequantised), that of the held-out digits to them beside it, and bits/dim of 64 held-out digits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters
from flowsolve.bench.record import environment
from flowsolve.cli.reflow import Plan, carry_out, draw
from flowsolve.problems import digits

RESULTS = Path(__file__).parent / "results" / "reflow.json"
PLAN = Plan("digits-condot", 3000, 2, 1, 700, 64, 3e-4, 0.999, "auto", 20, 0)
STEPS = (1, 4, 32)
SAMPLES, HELD_OUT = 600, 64


def energy(x: Tensor, y: Tensor) -> float:
    """The unbiased energy distance of two sets of points, shape (N, D) and (M, D)."""

    def within(v: Tensor) -> Tensor:
        return torch.cdist(v, v).sum() / (len(v) * (len(v) - 1))

    return float(2.0 * torch.cdist(x, y).mean() - within(x) - within(y))


def quality(flow: fs.Flow, real: Tensor, held: Tensor) -> dict[str, Any]:
    """Energy distances of samples, and bits/dim."""
    found = {}
    for k in STEPS:
        x = fs.sample(flow, (SAMPLES, 1, 8, 8), solver="euler", nfe=k, seed=77).x
        found[str(k)] = energy(x.flatten(1), real)
    bits = fs.bits_per_dim(flow, held[:HELD_OUT], nfe=48, seed=3)
    return {"energy": found, "bits_per_dim": {"mean": bits.mean, "stderr": bits.stderr}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="directory of the run, which is kept")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    record = carry_out(PLAN, work)
    real, held = digits.load("train").images, digits.load("held_out").images
    points = [digits.dequantize(v, torch.Generator().manual_seed(i)).flatten(1) for i, v in enumerate((real, held))]
    for row in record["flows"]:
        root = adapters.bundled(PLAN.source) if row["name"] == "source" else work / row["name"]
        row |= quality(adapters.load(root), points[0], held)
        print(row["name"], f"{row['straightness']:.5f}", {k: round(v, 4) for k, v in row["energy"].items()})
    whole = {"environment": environment(), **record, "energy_of_held_out": energy(points[1], points[0])}
    options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    draw(record, options.out.with_suffix(".png"))
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
