r"""`solver="auto"` against our own best in hindsight and that of diffusers and k-diffusion, on problems not chosen on.

    python benchmarks/auto.py                                 # the judging half, without networks: some minutes
    python benchmarks/auto.py --only digits-ddpm patches-condot
    python benchmarks/auto.py --search                        # the choosing half: what the rules were chosen by

**The split** is in `sections/fields.py`, and was written down before the search.

**The rule.** Rows of `flowsolve.solvers.auto` were found, for bands of budgets, by random and then local search over
orders, forms, variables, correctors and `Arctan` grids on the choosing half: each error is divided by a small quantile
of those that the random search found on that problem, and the smallest 8-norm of these ratios wins, which is nearly
the smallest largest: what is never bad, rather than best on average. `--search` ranks the pairs of
`sections/choices.py` and `auto` by their largest ratio.

**Judged** are the errors of `auto` over the best in hindsight, at each budget and problem: of ours, over the pairs of
`sections/choices.py` and the named solvers on plain grids; of the peers, over all their samplers × grids
(`sections/samplers.py`), on the paths that they know. Targets: within 1.5 × ours in the geometric mean and 3 × at
worst; never behind the peers'.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from sections import choices, draw_auto, fields
from sections.fields import Case
from sections.measure import target
from sections.samplers import Ask, absent, peers, versions

import flowsolve as fs
from flowsolve.bench.record import environment

RESULTS = Path(__file__).parent / "results" / "auto.json"
NETWORKS = Path(__file__).parent / "networks"
THREADS = 1
BUDGETS = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
DEAR = (5, 8, 10, 15, 20)
"""Budgets of the networks of photographs, where an evaluation takes long."""

NEAR, WORST, AHEAD = 1.5, 3.0, 1.0
KINDS = ("auto", "ours", "peer")


def main() -> None:
    """Measure, print, and write the record and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*fields.JUDGED_PATHS, *fields.NETWORKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="paths and networks to measure")
    parser.add_argument(
        "--data", nargs="+", choices=list(fields.JUDGED_ON), default=list(fields.JUDGED_ON), metavar="NAME"
    )
    parser.add_argument("--checkpoints", type=Path, default=NETWORKS, help="the folder of the networks of photographs")
    parser.add_argument("--renew", action="store_true", help="measure auto alone; the rest is kept from the record")
    parser.add_argument("--search", nargs="+", choices=list(fields.CHOSEN_PATHS), metavar="PATH", help="rank pairs")
    parser.add_argument("--budgets", nargs="+", type=int, help="other budgets")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        if given.search:
            search(given.search, given.budgets or BUDGETS)
            return
        judge(given, given.only or names)


def judge(given: argparse.Namespace, names: Iterable[str]) -> None:
    """The judging half, or a part of it, into the record."""
    head = {"environment": {**environment(), "peers": versions(), "absent": list(absent())}}
    some = given.only or given.renew
    kept = json.loads(given.out.read_text())["problems"] if given.out.exists() and some else {}
    for name in names:
        begun = time.perf_counter()
        if name in fields.NETWORKS:
            dear = name.startswith("patches")
            case = fields.network(name, given.checkpoints, 4 if dear else 16, 512 if dear else 1024)
            made = compare([case], given.budgets or (DEAR if dear else BUDGETS), given.renew)
        else:
            on = {data: make for data, make in fields.JUDGED_ON.items() if data in given.data}
            cases = fields.cases(on, fields.JUDGED_PATHS[name])
            found = compare(cases, given.budgets or BUDGETS, given.renew)
            made = {f"{data}, {name}": rows for data, rows in found.items()}
        if given.renew:
            made = {problem: _renewed(kept[problem], rows) for problem, rows in made.items()}
        kept.update(made)
        for problem, rows in made.items():
            print(f"\n{problem}", *table(rows), sep="\n", flush=True)
        print(f"({time.perf_counter() - begun:.0f} s)")
    record = {**head, "problems": kept, "summary": summary(kept), "targets": aims(kept)}
    print("", *_told(record), sep="\n")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n")
    draw_auto.draw(given.out.with_suffix(".png"), kept)


def _renewed(kept: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a record with `auto` as it is now."""
    now = {row["budget"]: row["auto"] for row in rows}
    return [{**row, "auto": now[row["budget"]]} for row in kept]


def compare(cases: Iterable[Case], budgets: Iterable[int], renew: bool = False) -> dict[str, list[dict[str, Any]]]:
    """By problem, a row a budget: errors of `auto`, of our best and of the best peer in hindsight."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        path = case.flow.path
        best: dict[str, dict[str, list[Any]]] = {}
        for n in budgets:
            runs = [("auto", "auto", *_ours(case, choices.auto(path, n), n))]
            if not renew:
                tried = (*choices.candidates(path), *choices.wide(path), *choices.plain(path))
                runs += [("ours", c.name, *_ours(case, c, n)) for c in tried]
                known = path == fs.paths.CondOT() or isinstance(path, fs.paths.Discrete)
                runs += [("peer", p.name, *_theirs(case, p, n)) for p in (peers(case.flow) if known else ())]
            for kind, name, errors, calls in runs:
                for problem, error in errors.items():
                    # who leaves some of a budget stands for larger ones too
                    if math.isfinite(error) and calls <= n:
                        kinds = best.setdefault(problem, {})
                        old = kinds.setdefault(kind, [math.inf, ""])
                        kinds[kind] = [error, name] if kind == "auto" or error < old[0] else old
            for problem, kinds in best.items():
                row: dict[str, Any] = {"budget": n}
                for kind in KINDS:
                    if kind in kinds:
                        row[kind] = {"median": float(f"{kinds[kind][0]:.4g}"), "solver": kinds[kind][1]}
                found.setdefault(problem, []).append(row)
    return found


def _ours(case: Case, choice: choices.Choice, nfe: int) -> tuple[dict[str, float], int]:
    if choice.solver.evaluations > nfe:
        return {}, 0
    try:
        made = fs.sample(case.flow, start=case.start, solver=choice.solver, nfe=nfe, grid=choice.grid)
    except ValueError:  # some grids without a window cannot tell so many times from the end
        return {}, 0
    return case.judge(made.x), int(made.nfe.max())


def _theirs(case: Case, peer: Any, nfe: int) -> tuple[dict[str, float], int]:
    ask = Ask(case.flow, case.start.dtype)
    try:
        return case.judge(peer.run(ask, case.start.clone(), nfe)), ask.calls
    except Exception:  # whatever a peer may raise; it is not the best then
        return {}, 0


def ratios(rows: Iterable[Mapping[str, Any]], kind: str) -> list[float]:
    """auto's error over the best of a kind; `auto` is one of ours, so that there it is 1 at least."""
    found = [row["auto"]["median"] / row[kind]["median"] for row in rows if kind in row]
    return [max(v, 1.0) for v in found] if kind == "ours" else found


def summary(problems: Mapping[str, Any]) -> dict[str, Any]:
    """The geometric mean and the largest of the ratios, by problem and over all."""
    found = {}
    whole = {**problems, "all": [row for rows in problems.values() for row in rows]}
    for name, rows in whole.items():
        found[name] = {}
        for kind in ("ours", "peer"):
            if known := ratios(rows, kind):
                mean = math.exp(math.fsum(map(math.log, known)) / len(known))
                found[name][kind] = {"mean": round(mean, 3), "largest": round(max(known), 3)}
    return found


def aims(problems: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets over all problems and budgets."""
    found = summary(problems)["all"]
    peer = found.get("peer", {}).get("largest")
    return [
        target("auto / our best in hindsight, geometric mean", found["ours"]["mean"], NEAR),
        target("auto / our best in hindsight, largest", found["ours"]["largest"], WORST),
        target("auto / best peer in hindsight, largest", peer, AHEAD),
    ]


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line a budget."""
    lines = [f"{'NFE':>4} {'auto':>8} {'ours':>8} {'peer':>8} {'/ours':>6} {'/peer':>6}  our best; the best peer"]
    for row in rows:
        errors = [f"{row[k]['median']:8.1e}" if k in row else f"{'–':>8}" for k in KINDS]
        shares = [f"{ratios([row], k)[0]:6.2f}" if k in row else f"{'–':>6}" for k in ("ours", "peer")]
        named = "; ".join(row[k]["solver"] for k in ("ours", "peer") if k in row)
        lines.append(f"{row['budget']:4d} {' '.join(errors)} {' '.join(shares)}  {named}")
    return lines


def _told(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in record["summary"].items():
        parts = [f"{k}: mean {v['mean']:.2f}, largest {v['largest']:.2f}" for k, v in found.items()]
        lines.append(f"{name:<26} auto over {'; '.join(parts)}")
    known = [aim for aim in record["targets"] if aim["value"] is not None]
    return lines + [f"{aim['name']:<50}{aim['value']:6.2f} <= {aim['limit']:.2f} {aim['met']}" for aim in known]


def search(paths: Iterable[str], budgets: Iterable[int], shown: int = 8) -> None:
    """Print, at each budget, the pairs with the smallest largest ratio to the best on the choosing half."""
    made = {name: fields.cases(fields.CHOSEN_ON, fields.CHOSEN_PATHS[name]) for name in paths}
    for n in budgets:
        errors: dict[str, dict[str, float]] = {}
        for name, cases in made.items():
            path = fields.CHOSEN_PATHS[name]
            tried = [*choices.wide(path), *choices.plain(path), choices.auto(path, n)]
            for case in cases:
                for choice in tried:
                    for problem, error in _ours(case, choice, n)[0].items():
                        errors.setdefault(choice.name, {})[f"{problem}, {name}"] = error
        full = {k: e for k, e in errors.items() if len(e) == len(errors["auto"])}
        best = {p: min(e[p] for e in full.values() if math.isfinite(e[p])) for p in errors["auto"]}
        over = {k: {p: e[p] / best[p] for p in best} for k, e in full.items() if all(map(math.isfinite, e.values()))}
        ranked = sorted(over, key=lambda k: max(over[k].values()))
        print(f"\n{n} evaluations; best: " + ", ".join(f"{p} {v:.2g}" for p, v in best.items()))
        for name in dict.fromkeys([*ranked[:shown], "auto"]):
            mean = math.exp(math.fsum(map(math.log, over[name].values())) / len(best))
            print(f"  largest {max(over[name].values()):6.2f}, mean {mean:5.2f}  {name}", flush=True)


if __name__ == "__main__":
    main()
