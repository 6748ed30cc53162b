r"""What flowsolve costs beside the network, against torchdiffeq, torchode, diffrax and scipy, all in one process.

    python benchmarks/overhead.py                       # everything: a quarter of an hour on two cores
    python benchmarks/overhead.py --only step fixed     # renews these sections of the record
    python benchmarks/overhead.py --quick --out /tmp/overhead.json

| section | what is measured |
|---|---|
| `step` | time of a Dopri5 step, and of its memory traffic alone |
| `fixed` | overhead of an evaluation on a fixed grid |
| `mixed` | rows of the network for samples of unequal needs |
| `nfe` | evaluations at equal achieved error, on fourteen systems of DETEST |
| `gradients` | memory of a gradient against the number of steps |
| `robust` | what becomes of cases that go wrong |

How is on the page of each section (`benchmarks/sections/`). Libraries take turns within a repetition; ratios are taken
repetition by repetition; every figure of time has its quartiles. The record (JSON) says of every target what it is and
whether it was met. Peers that are not installed are left out. Pictures lie beside the record.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from sections import draw, fixed, gradients, mixed, nfe, robust, step
from sections.peers import facts

from flowsolve.bench.record import environment

SECTIONS = {"step": step, "fixed": fixed, "mixed": mixed, "nfe": nfe, "gradients": gradients, "robust": robust}
RESULTS = Path(__file__).parent / "results" / "overhead.json"
THREADS = 2


def main() -> None:
    """Measure, print, and write the record and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="NAME", help="sections to measure")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, for a test of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    head = {"environment": {**environment(), **facts()}, "quick": given.quick}
    record: dict[str, Any] = {**head, "sections": _kept(given.out, head) if given.only else {}}
    for name in given.only or SECTIONS:
        start = time.perf_counter()
        found = SECTIONS[name].measure(given.quick)
        record["sections"][name] = {"seconds": time.perf_counter() - start, **found}
        print(
            f"\n{name} ({record['sections'][name]['seconds']:.0f} s)",
            *SECTIONS[name].table(found),
            sep="\n",
            flush=True,
        )
    print("\ntargets", *_targets(record), sep="\n")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record["sections"] = {name: record["sections"][name] for name in SECTIONS if name in record["sections"]}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    _draw(given.out, record["sections"])


def _kept(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The sections of an earlier record made in the same circumstances."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    same = all(earlier.get(key) == value for key, value in head.items())
    return dict(earlier["sections"]) if same else {}


def _targets(record: dict[str, Any]) -> list[str]:
    lines = []
    for found in record["sections"].values():
        for aim in found["targets"]:
            if aim["value"] is not None:
                verdict = "met" if aim["met"] else "MISSED"
                lines.append(f"{aim['name']:<58}{aim['value']:6.3f} <= {aim['limit']:.3f}  {verdict}")
    return lines


def _draw(file: Path, sections: dict[str, Any]) -> None:
    if "nfe" in sections:
        draw.draw_nfe(file.with_name(f"{file.stem}-nfe.png"), sections["nfe"])
    if "series" in sections.get("gradients", {}):
        draw.draw_gradients(file.with_name(f"{file.stem}-gradients.png"), sections["gradients"])


if __name__ == "__main__":
    main()
