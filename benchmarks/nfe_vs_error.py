r"""Evaluations against error: our solvers, and `auto`, against the samplers of diffusers and k-diffusion, in one run.

    python benchmarks/nfe_vs_error.py                        # everything: a quarter of an hour on one core
    python benchmarks/nfe_vs_error.py --only digits-ddpm     # renews these problems of the record
    python benchmarks/nfe_vs_error.py --renew                # measures auto alone: a minute
    python benchmarks/nfe_vs_error.py --quick --out /tmp/nfe_vs_error.json

**Problems** (`sections/generative.py`): mixtures in D = 2, 64 and 3072 on DDPM's table and on the straight path, whose
networks are exact, and the two digits checkpoints. All solvers start from the same noise and are compared with the
converged end point of the same ODE; that page says what is compared at the data end, where samplers differ.

**Figures.** With $e_i = \|x_i - x_i^*\| / \|x_i^*\|$ for sample i, the *median* of $e_i$ judges. On data of several
modes a few samples on a border between two rule the RMSE; it is in the record, with the PSNR (of data in [−1, 1]) and
the sliced Wasserstein distance to independent samples of the data, whose floor is that of the converged samples.

**Evaluations** are the calls of the network that were made. A budget is never exceeded; what a sampler leaves of it is
its loss. The best at a budget is the best of those that cost so much or less, for them as for us.

**Peers** (`sections/samplers.py`) are about 75 pairs of sampler × grid on each path, **ours** (`sections/choices.py`)
about twenty, the winners of a wider search on these problems. The best of either is chosen in hindsight, at every
budget and on every problem; `auto` is one rule that knows the path and the budget, not the problem.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sections import choices, draw_nfe
from sections.generative import PROBLEMS, Problem, sliced_wasserstein, truth
from sections.measure import target
from sections.samplers import Ask, absent, peers, versions
from torch import Tensor

import flowsolve as fs
from flowsolve.bench.record import environment
from flowsolve.kernels import rms

RESULTS = Path(__file__).parent / "results" / "nfe_vs_error.json"
THREADS = 1
BUDGETS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 100)
JUDGED = (5, 50)
DEAR = (5, 8, 10, 15, 20, 30, 50)
"""Budgets where an evaluation takes long."""

QUICK = ("mixture 2, table", "mixture 2, straight")
AHEAD, NEAR = 1.0, 1.25
CLOUD = 4096


def main() -> None:
    """Measure, print, and write the record and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), metavar="NAME", help="problems to measure")
    parser.add_argument("--quick", action="store_true", help="fewer problems and budgets, for a test of the script")
    parser.add_argument("--renew", action="store_true", help="measure auto alone; the rest is kept from the record")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    logging.disable(logging.WARNING)  # schedulers tell about settings they complete
    warnings.simplefilter("ignore")
    head = {"environment": {**environment(), "peers": versions(), "absent": list(absent())}, "quick": given.quick}
    record: dict[str, Any] = {**head, "problems": _kept(given.out, head) if given.only or given.renew else {}}
    for name in given.only or (QUICK if given.quick else PROBLEMS):
        start = time.perf_counter()
        kept = record["problems"].get(name) if given.renew else None
        found = compare(name, (5, 10, 20) if given.quick else BUDGETS, kept)
        record["problems"][name] = {"seconds": time.perf_counter() - start, **found}
        print(f"\n{name} ({record['problems'][name]['seconds']:.0f} s)", *table(found), sep="\n", flush=True)
    print("\ntargets", *_targets(record), sep="\n")
    record["problems"] = {name: record["problems"][name] for name in PROBLEMS if name in record["problems"]}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(_slim(record), separators=(",", ":"), ensure_ascii=False) + "\n")
    draw_nfe.draw_errors(given.out.with_name(f"{given.out.stem}.png"), record["problems"])
    draw_nfe.draw_ratios(given.out.with_name(f"{given.out.stem}-ratios.png"), record["problems"], JUDGED, NEAR)


def compare(name: str, budgets: Iterable[int], kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """All solvers on one problem at all budgets, or `auto` alone beside what is kept."""
    problem = PROBLEMS[name]()
    if problem.dear:
        budgets = [n for n in budgets if n in DEAR]
    with torch.no_grad():
        exact, facts = truth(problem)
        judge = _Judge(problem, exact)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "auto": [], "peer": []}
        if kept:
            runs = {**kept["runs"], "auto": []}
        for n in budgets:
            for peer in [] if kept else peers(problem.flow):
                runs["peer"].append(judge(peer.name, n, _theirs(problem, peer.run, n)))
            for choice in [] if kept else choices.candidates(problem.flow.path):
                runs["ours"].append(judge(choice.name, n, _ours(problem, choice, n)))
            runs["auto"].append(judge("auto", n, _ours(problem, choices.auto(problem.flow.path, n), n)))
    rows = [_row(runs, n) for n in budgets]
    for i, row in enumerate(rows):
        for kind in ("ours", "auto", "peer"):
            if kept and kind != "auto":
                row[kind] = kept["rows"][i][kind]
            elif row[kind]:
                row[kind]["distance"] = judge.distance(row[kind]["budget"], row[kind]["solver"])
    return {
        "reference": {**facts, "distance": judge.apart(exact), "samples": len(exact)},
        "rows": rows,
        "targets": _aims(name, rows),
        "runs": runs,
    }


Solve = Callable[[], tuple[Tensor, int]]


def _theirs(problem: Problem, run: Callable[[Ask, Tensor, int], Tensor], nfe: int) -> Solve:
    def solve() -> tuple[Tensor, int]:
        ask = Ask(problem.flow, problem.start.dtype)
        return run(ask, problem.start.clone(), nfe), ask.calls

    return solve


def _ours(problem: Problem, choice: choices.Choice, nfe: int) -> Solve:
    def solve() -> tuple[Tensor, int]:
        found = fs.sample(problem.flow, start=problem.start, solver=choice.solver, nfe=nfe, grid=choice.grid)
        return found.x, int(found.nfe.max())

    return solve


class _Judge:
    """Solves, measures the end state, and keeps the best for later."""

    def __init__(self, problem: Problem, exact: Tensor) -> None:
        self.problem, self.exact = problem, exact.double()
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.cloud = problem.exact(CLOUD, 1)

    def __call__(self, name: str, budget: int, solve: Solve) -> dict[str, Any]:
        run: dict[str, Any] = {"solver": name, "budget": budget}
        try:
            x, calls = solve()
        except Exception as error:  # whatever a peer may raise is a finding
            return {**run, "failed": f"{type(error).__name__}: {error}"[:120]}
        if calls > budget:
            return {**run, "failed": f"made {calls} calls"}
        each = rms(x.double() - self.exact) / rms(self.exact)
        median = float(each.median())
        if not math.isfinite(median):
            return {**run, "failed": "not finite"}
        self.kept[budget, name] = x
        rmse = float((x.double() - self.exact).square().mean().sqrt())
        psnr = 20.0 * math.log10(self.problem.peak / rmse) if rmse > 0.0 else math.inf
        return {**run, "nfe": calls, "median": median, "rmse": rmse, "psnr": psnr}

    def distance(self, budget: int, name: str) -> float:
        """Sliced Wasserstein distance of a run's end state to samples of the data."""
        return self.apart(self.kept[budget, name])

    def apart(self, x: Tensor) -> float:
        """The same of any state."""
        return sliced_wasserstein(x.flatten(1), self.cloud)


def _row(runs: dict[str, list[dict[str, Any]]], budget: int) -> dict[str, Any]:
    """The best of each kind at a budget, and the ratios to the best peer."""
    row: dict[str, Any] = {"budget": budget}
    for kind, made in runs.items():
        fit = [r for r in made if "median" in r and (r["budget"] == budget if kind == "auto" else r["nfe"] <= budget)]
        row[kind] = dict(min(fit, key=lambda r: r["median"])) if fit else None
    for kind in ("ours", "auto"):
        pair = row[kind], row["peer"]
        row[f"{kind} / peer"] = pair[0]["median"] / pair[1]["median"] if all(pair) else None
    return row


def _aims(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest ratios over the budgets that count."""
    aims = []
    for kind, limit in (("ours", AHEAD), ("auto", NEAR)):
        ratios = [r[f"{kind} / peer"] for r in rows if JUDGED[0] <= r["budget"] <= JUDGED[1]]
        known = [r for r in ratios if r is not None]
        aims.append(target(f"{name}: {kind} / best peer, largest", max(known) if known else None, limit))
    return aims


def table(found: dict[str, Any]) -> list[str]:
    """A line a budget."""
    lines = [f"{'NFE':>4} {'ours':>8} {'auto':>8} {'peer':>8} {'ours/':>6} {'auto/':>6}  our best, and the best peer"]
    for row in found["rows"]:
        errors = [f"{row[k]['median']:8.1e}" if row[k] else f"{'–':>8}" for k in ("ours", "auto", "peer")]
        ratios = [f"{row[k]:6.2f}" if row[k] is not None else f"{'–':>6}" for k in ("ours / peer", "auto / peer")]
        named = [row[k]["solver"] if row[k] else "–" for k in ("ours", "peer")]
        lines.append(f"{row['budget']:4d} {' '.join(errors)} {' '.join(ratios)}  {named[0]}")
        lines.append(f"{'':46}{named[1]}")
    at = found["reference"]
    failed = sum("failed" in r for r in found["runs"]["peer"])
    lines.append(
        f"reference: {at['samples']} samples, {at['nfe']} evaluations, median change {at['median']:.0e} from half of "
        f"them; peers' runs: {len(found['runs']['peer'])}, {failed} failed"
    )
    return lines


def _kept(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The problems of an earlier record made in the same circumstances."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    same = all(earlier.get(key) == value for key, value in head.items())
    return dict(earlier["problems"]) if same else {}


def _slim(value: Any) -> Any:
    """A record to four digits."""
    if isinstance(value, dict):
        return {key: _slim(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_slim(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _targets(record: dict[str, Any]) -> list[str]:
    lines = []
    for found in record["problems"].values():
        for aim in found["targets"]:
            if aim["value"] is not None:
                verdict = "met" if aim["met"] else "MISSED"
                lines.append(f"{aim['name']:<58}{aim['value']:6.3f} <= {aim['limit']:.3f}  {verdict}")
    return lines


if __name__ == "__main__":
    main()
