r"""Solvers tuned to one network (`flowsolve.tuning`) against the best generic ones in hindsight, ours and the peers'.

    python benchmarks/tuned.py                                  # digits: some minutes on one core
    python benchmarks/tuned.py --only patches-condot            # a quarter of an hour
    python benchmarks/tuned.py --only digits-condot --studies   # the ablation, and the number of trajectories

**Judged** is the median relative error of the end state, against a fine Runge–Kutta solve's (`fields.network`), on
noise that no part of the tuning has seen: another generator's. The generic solvers (the pairs of
`sections/choices.py`, and `auto`) and those of diffusers and k-diffusion (`sections/samplers.py`) are chosen in
hindsight, on the very noise that they are judged on, at each budget; the tuned solver was chosen before. All pairs are
ranked on a few samples first (8 digits, 2 patches), and 8 of each kind are then judged on all.

*Ratio* is tuned over the best generic of ours; its interval is two standard errors of the mean of the logarithm of the
ratio over samples. Target: at most 0.5, and at most 0.5 × the peers'.

**Sliced Wasserstein** distances are those of more samples (256 digits, 32 patches) to data, for tuned and the best
generic from the same noise.

**Studies** (`--studies`): times alone, coefficients alone, both; and the number of trajectories that are fitted to.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sections import choices, draw_tuned, fields, generative
from sections.fields import Case
from sections.measure import target
from sections.samplers import Ask, absent, peers, versions
from torch import Tensor

import flowsolve as fs
from flowsolve.bench.record import environment
from flowsolve.kernels import rms
from flowsolve.problems import patches

RESULTS = Path(__file__).parent / "results" / "tuned.json"
NETWORKS = Path(__file__).parent / "networks"
BUDGETS = (4, 6, 8, 10)
HALF = 0.5
SEED = 17
COUNTS = (4, 8, 16, 32, 64)
FIRST, LEFT = {"digits": 8, "patches": 2}, 8
CLOUD = 4096


def main() -> None:
    """Measure, print, and write the record and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=fields.NETWORKS, default=["digits-ddpm", "digits-condot"])
    parser.add_argument("--checkpoints", type=Path, default=NETWORKS, help="the folder of the networks of photographs")
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--minutes", type=float, default=5.0, help="of the tuning of a network")
    parser.add_argument("--count", type=int, default=64, help="trajectories to fit on")
    parser.add_argument("--studies", action="store_true", help="the studies instead, at the budgets given")
    parser.add_argument("--cache", type=Path, help="folder of converged trajectories")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for name in given.only:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            cache = given.cache or Path(folder)
            made = (studies if given.studies else compare)(name, given, cache)
        record = json.loads(given.out.read_text()) if given.out.exists() else {"networks": {}}
        record["environment"] = {**environment(), "peers": versions(), "absent": list(absent())}
        kept = record["networks"].setdefault(name, {})
        for key, rows in made.items():  # a row of the same budget is renewed
            ours = {_key(row): row for row in (*kept.get(key, ()), *rows)}
            kept[key] = [ours[k] for k in sorted(ours)]
        record["targets"] = aims(record["networks"])
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n")
        draw_tuned.draw(given.out.with_suffix(".png"), record["networks"])
        print(f"\n{name}", *table(made), sep="\n", flush=True)
    print(
        "", *(f"{a['name']:<58}{a['value']:6.3f} <= {a['limit']:.2f} {a['met']}" for a in record["targets"]), sep="\n"
    )


def _key(row: dict[str, Any]) -> tuple[int, int]:
    return row["budget"], row.get("count", 0)


def compare(name: str, given: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """The tuned solvers of one network beside the others."""
    dear = name.startswith("patches")
    case = fields.network(name, given.checkpoints, 8 if dear else 32, 160 if dear else 512)
    begun = time.perf_counter()
    tuning = fs.tune(
        case.flow, (given.count, *case.start.shape[1:]), nfe=given.budgets, minutes=given.minutes, seed=SEED,
        evaluations=64 if dear else 96, cache=cache, progress=lambda text: print(text, flush=True),
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    print(tuning, flush=True)
    rows = []
    for n, own in zip(given.budgets, tuning.rows, strict=True):
        ours, theirs = _best(case, n, _ours(case, n), dear), _best(case, n, _theirs(case, n), dear)
        mine = _errors(case, fs.sample(case.flow, start=case.start, solver=tuning.solver, nfe=n).x)
        auto = _errors(case, fs.sample(case.flow, start=case.start, nfe=n).x)
        row: dict[str, Any] = {
            "budget": n, "auto": _figure(auto), "tuned": _figure(mine), "kept": own.kept,
            "fitted": tuning.provenance["fitted"], "seconds": round(seconds / len(given.budgets), 1),
            "found": {"generic": own.name, "ratio": _short(own.ratio), "spread": _short(own.spread)},
        }  # fmt: skip
        for kind, found in (("ours", ours), ("peer", theirs)):
            if found is not None:
                errors, who, _ = found
                gain = (mine / errors).log()
                row[kind] = {**_figure(errors), "solver": who}
                row[f"ratio to {kind}"] = {
                    "median": _short(float(mine.median() / errors.median())),
                    "mean": _short(math.exp(float(gain.mean()))),
                    "spread": _short(float(gain.std()) / math.sqrt(len(gain))),
                }
        if ours is not None:
            row["distance"] = _distances(name, case, tuning.solver, ours[2], n)
        rows.append(row)
        print(*table({"rows": [row]}), sep="\n", flush=True)
    return {"rows": rows}


def studies(name: str, given: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """What times and coefficients do alone, and how many trajectories it takes."""
    dear = name.startswith("patches")
    case = fields.network(name, given.checkpoints, 8 if dear else 32, 160 if dear else 512)

    def tuned(count: int, stages: str, n: int) -> dict[str, Any]:
        begun = time.perf_counter()
        found = fs.tune(
            case.flow, (count, *case.start.shape[1:]), nfe=n, minutes=given.minutes, seed=SEED, stages=stages,
            evaluations=64 if dear else 96, cache=cache,
        )  # fmt: skip
        errors = _errors(case, fs.sample(case.flow, start=case.start, solver=found.solver, nfe=n).x)
        made = {**_figure(errors), "seconds": round(time.perf_counter() - begun, 1), "kept": found.rows[0].kept}
        print(name, n, count, stages, made, flush=True)
        return made

    ablation = [
        {"budget": n, **{stages: tuned(given.count, stages, n) for stages in ("grid", "coefficients", "both")}}
        for n in given.budgets
    ]
    n = given.budgets[len(given.budgets) // 2]
    counts = [{"budget": n, "count": count, **tuned(count, "both", n)} for count in COUNTS if count <= given.count]
    return {"ablation": ablation, "counts": counts}


Solve = Callable[[Tensor], tuple[Tensor, int]]


def _ours(case: Case, n: int) -> dict[str, tuple[Solve, Any]]:
    """Our generic solvers by name."""
    path = case.flow.path
    tried = (choices.auto(path, n), *choices.candidates(path), *choices.wide(path), *choices.plain(path))

    def solve(choice: choices.Choice) -> Solve:
        def run(start: Tensor) -> tuple[Tensor, int]:
            made = fs.sample(case.flow, start=start, solver=choice.solver, nfe=n, grid=choice.grid)
            return made.x, int(made.nfe.max())

        return run

    return {c.name: (solve(c), c) for c in tried}


def _theirs(case: Case, n: int) -> dict[str, tuple[Solve, Any]]:
    """The peers' by name, on the paths that they know."""
    path = case.flow.path
    if not (path == fs.paths.CondOT() or isinstance(path, fs.paths.Discrete)):
        return {}

    def solve(peer: Any) -> Solve:
        def run(start: Tensor) -> tuple[Tensor, int]:
            ask = Ask(case.flow, start.dtype)
            return peer.run(ask, start.clone(), n), ask.calls

        return run

    return {p.name: (solve(p), None) for p in peers(case.flow)}


def _best(case: Case, n: int, tried: dict[str, tuple[Solve, Any]], dear: bool) -> tuple[Tensor, str, Any] | None:
    """The errors, the name and the choice of the best in hindsight."""

    def ranked(names: Iterable[str], samples: int) -> list[tuple[float, str, Tensor]]:
        found = []
        for name in names:
            try:
                x, calls = tried[name][0](case.start[:samples])
            except Exception:  # whatever a peer may raise, or a grid without room: it is not the best then
                continue
            errors = _errors(case, x, samples)
            median = float(errors.median())
            if calls <= n and math.isfinite(median):
                found.append((median, name, errors))
        return sorted(found, key=lambda entry: entry[0])

    first = ranked(tried, FIRST["patches" if dear else "digits"])
    left = dict.fromkeys([*(name for _, name, _ in first[:LEFT]), *({"auto"} & {*tried})])
    found = ranked(left, len(case.start))
    return (found[0][2], found[0][1], tried[found[0][1]][1]) if found else None


def _errors(case: Case, x: Tensor, samples: int | None = None) -> Tensor:
    exact = case.exact[:samples].double()
    return rms(x.double() - exact) / rms(exact)


def _figure(errors: Tensor) -> dict[str, float]:
    return {"median": _short(float(errors.median())), "mean": _short(math.exp(float(errors.log().mean())))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _distances(name: str, case: Case, solver: Any, choice: choices.Choice, n: int) -> dict[str, float]:
    """Sliced Wasserstein distances to data, tuned and generic from the same noise."""
    dear = name.startswith("patches")
    shape = (32 if dear else 256, *case.start.shape[1:])
    if dear:
        photos = patches.photographs()
        images = patches.draw(photos, CLOUD // 4, torch.Generator().manual_seed(1)).images
        data = patches.dequantize(images, torch.Generator().manual_seed(2)).flatten(1).double()
    else:
        data = generative._train(CLOUD, 1)
    made = {
        "tuned": fs.sample(case.flow, shape, solver=solver, nfe=n, seed=5, batch=32),
        "ours": fs.sample(case.flow, shape, solver=choice.solver, grid=choice.grid, nfe=n, seed=5, batch=32),
    }
    return {k: _short(generative.sliced_wasserstein(v.x.flatten(1), data)) for k, v in made.items()}


def aims(networks: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, network by network: the largest ratio over the budgets."""
    found = []
    for name, made in networks.items():
        for kind in ("ours", "peer"):
            ratios = [row[f"ratio to {kind}"]["median"] for row in made.get("rows", ()) if kind in row]
            if ratios:
                found.append(target(f"{name}: tuned / best {kind} in hindsight, largest", max(ratios), HALF))
    return found


def table(made: dict[str, Any]) -> list[str]:
    """A line a budget."""
    lines = []
    for row in made.get("rows", ()):
        line = f"{row['budget']:4d} auto {row['auto']['median']:.2e} tuned {row['tuned']['median']:.2e}"
        for kind in ("ours", "peer"):
            if kind in row:
                ratio = row[f"ratio to {kind}"]
                line += f"  {kind} {row[kind]['median']:.2e} ratio {ratio['median']:.2f} ({row[kind]['solver']})"
        lines.append(line + f"  SW {row.get('distance')}")
    for row in made.get("ablation", ()):
        told = [f"{k} {row[k]['median']:.2e}" for k in ("grid", "coefficients", "both")]
        lines.append(f"{row['budget']:4d} {', '.join(told)}")
    lines += [
        f"{row['count']:4d} trajectories: {row['median']:.2e}, {row['seconds']} s" for row in made.get("counts", ())
    ]
    return lines


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
