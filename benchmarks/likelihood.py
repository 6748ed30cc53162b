r"""Likelihoods: evaluations against the error of log p, and what a trace costs, beside the peers in one run.

    python benchmarks/likelihood.py                         # everything: about an hour on one core
    python benchmarks/likelihood.py --only digits-ddpm      # renews these parts of the record
    python benchmarks/likelihood.py --quick --out /tmp/likelihood.json

**Accuracy** (`sections/densities.py`, `sections/likelihoods.py`): bias, rms and median of the error in bits/dim against
passes of the network, on mixtures and power-law fields whose density is known, and on trained networks.

**Protocol**: 100 held-out digits with one probe each, the same for all: the score_sde protocol (RK45 at 1e-5, two
passes an evaluation) and the curve at fewer passes.

**Probes**: the standard error of log p from m products an evaluation, over seeds, against the exact trace on the same
curve; with the time that an evaluation takes. For the log-density of one image error² × time says what is worth most
(where D is small that is the exact trace, with no error at all). For the mean over a data set it is
(error² + spread²) × time, the spread being that of the images, since time may also be spent on more of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sections import draw_likelihood
from sections.densities import EXACT, PROBES, PROBLEMS, Density, digits
from sections.likelihoods import Way, ours, peers, versions
from sections.measure import interleaved, quartiles, target

import flowsolve as fs
from flowsolve import likelihood, solvers
from flowsolve.bench.record import environment
from flowsolve.likelihood.along import automatic

RESULTS = Path(__file__).parent / "results" / "likelihood.json"
BUDGETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
DEAR = (16, 24, 32, 48, 64)
TOLERANCES = (1e-3, 1e-4, 1e-5)
QUICK = ("mixture 2, straight",)
IMAGES, SEEDS = 100, 8
ESTIMATORS: dict[str, likelihood.Trace] = {
    "hutchinson 1": likelihood.Hutchinson(1),
    "hutchinson 1, gaussian": likelihood.Hutchinson(1, kind="gaussian"),
    "hutchinson 2": likelihood.Hutchinson(2),
    "hutchinson 6": likelihood.Hutchinson(6),
    "hutchinson 12": likelihood.Hutchinson(12),
    "hutch++ 6": likelihood.HutchPP(6),
    "hutch++ 12": likelihood.HutchPP(12),
    "xtrace 6": likelihood.XTrace(6),
    "xtrace 12": likelihood.XTrace(12),
}


def main() -> None:
    """Measure, print, and write the record and its picture."""
    parts = {**dict.fromkeys(PROBLEMS, accuracy), "protocol": protocol, "probes": probes}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(parts), metavar="NAME", help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="one problem, few budgets, for a test of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    torch.set_num_threads(min(1, os.cpu_count() or 1))
    warnings.simplefilter("ignore")
    head = {"environment": {**environment(), "peers": versions()}, "quick": given.quick}
    record: dict[str, Any] = {**head, "parts": _kept(given.out, head) if given.only else {}}
    for name in given.only or (QUICK if given.quick else parts):
        start = time.perf_counter()
        found = parts[name](name, given.quick)
        record["parts"][name] = {"seconds": round(time.perf_counter() - start), **found}
        print(f"\n{name} ({record['parts'][name]['seconds']} s)", *_lines(found), sep="\n", flush=True)
        record["parts"] = {k: record["parts"][k] for k in parts if k in record["parts"]}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(_slim(record), separators=(",", ":"), ensure_ascii=False) + "\n")
    aims = [aim for part in record["parts"].values() for aim in part.get("targets", [])]
    print(
        "\ntargets",
        *(f"{'met' if a['met'] else 'NOT MET':>8} {a['value']:.5f} (≤ {a['limit']}) {a['name']}" for a in aims),
        sep="\n",
    )
    draw_likelihood.draw(
        given.out.with_suffix(".png"), {k: record["parts"][k] for k in PROBLEMS if k in record["parts"]}
    )


def accuracy(name: str, quick: bool) -> dict[str, Any]:
    """Every method on one problem."""
    problem = PROBLEMS[name]()
    trained = name.startswith(("digits", "patches"))
    dear = trained or name.startswith("mixture 3072")
    budgets = (16, 48) if quick else DEAR if dear else BUDGETS
    tolerances = TOLERANCES[:1] if quick else TOLERANCES
    kept = problem.flow.path.at(0.0).alpha > 0.0
    ways = ours(budgets, () if trained else tolerances, kept)
    if trained:
        ways = [w for w in ways if w.name == "curve"]  # an evaluation is dear: of 3,072 numbers, or with 64 products
    else:
        ways += peers(problem, tolerances)
    rows = [_measured(problem, way) for way in ways]
    rule = {str(n): repr(automatic(n)) for n in (48, 96)}
    return {"truth": problem.facts, "rule": rule, "samples": len(problem.x), "rows": rows, "targets": _aims(name, rows)}


def _measured(problem: Density, way: Way) -> dict[str, Any]:
    row: dict[str, Any] = {"method": way.name, "setting": way.setting}
    start = time.perf_counter()
    try:
        value, passes, known = way.run(problem)
    except Exception as error:  # whatever a peer may raise is a finding
        return {**row, "failed": f"{type(error).__name__}: {error}"[:120]}
    error = problem.bits(value)
    row |= {
        "passes": passes,
        "seconds": time.perf_counter() - start,
        "bias": float(error.mean()),
        "rms": float(error.square().mean().sqrt()),
        "median": float(error.abs().median()),
    }
    if known is not None and bool(known.isfinite().all()):
        nats = problem.x[0].numel() * math.log(2.0)
        row |= {"covered": float((error.abs() <= known / nats).double().mean()), "claimed": float(known.mean() / nats)}
    return row


def _aims(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the curve, at 16 and 48 evaluations."""
    aims = []
    for n, bias, rms in ((16, 0.005, 0.02), (48, 0.0005, 0.002)):
        row = next(r for r in rows if r["method"] == "curve" and r["setting"] == n)
        aims.append(target(f"{name}: |bias| at {n}", abs(row["bias"]), bias))
        aims.append(target(f"{name}: rms at {n}", row["rms"], rms))
    return aims


def protocol(name: str, quick: bool) -> dict[str, Any]:
    """The mean over digits by the protocol, and by the curve with the same probes at fewer passes."""
    rows, aims = [], []
    for checkpoint in fs.adapters.BUNDLED:
        blank = torch.zeros(IMAGES)
        problem = digits(checkpoint, IMAGES, PROBES, blank)
        theirs = next(w for w in peers(problem, (1e-5,)) if "scipy" in w.name)
        value, passes, _ = theirs.run(problem)
        problem = digits(checkpoint, IMAGES, PROBES, value)
        rows.append(
            {
                "checkpoint": checkpoint,
                "method": theirs.name,
                "passes": passes,
                "mean": -mean_bits(problem, value),
            }
        )
        for n in DEAR:
            out = fs.log_prob(problem.flow, problem.x, nfe=n, **PROBES)
            error = problem.bits(out.log_prob)
            nfe = float(out.nfe.double().mean())
            rows.append(
                {
                    "checkpoint": checkpoint, "method": "curve", "passes": nfe,
                    "mean": -mean_bits(problem, out.log_prob),
                    "bias": float(error.mean()), "rms": float(error.square().mean().sqrt()), "share": nfe / passes,
                }
            )  # fmt: skip
        within = [r for r in rows if r["checkpoint"] == checkpoint and abs(r.get("bias", 1.0)) <= 0.005]
        share = min((r["share"] for r in within), default=math.inf)
        aims.append(target(f"{checkpoint}: share of the protocol's passes to its mean ± 0.005 bits/dim", share, 0.25))
    return {"images": IMAGES, "rows": rows, "targets": aims}


def mean_bits(problem: Density, value: torch.Tensor) -> float:
    """Mean log-density in bits per dimension."""
    return float(value.double().mean()) / (problem.x[0].numel() * math.log(2.0))


def probes(name: str, quick: bool) -> dict[str, Any]:
    """Standard error of log p from each estimator, and the time of an evaluation with it."""
    rows = []
    for checkpoint in fs.adapters.BUNDLED:
        problem = digits(checkpoint, 16, EXACT, torch.zeros(16))
        options: dict[str, Any] = {"nfe": 24, "solver": solvers.DPMSolverPP(3)}
        exact = fs.log_prob(problem.flow, problem.x, trace="exact", **options).log_prob
        problem = Density(problem.flow, problem.x, exact, EXACT, {})
        spread = float(problem.bits(exact + exact).std())  # bits() takes the truth off
        cases = {
            label: _evaluation(problem, trace) for label, trace in {**ESTIMATORS, "exact": likelihood.Exact()}.items()
        }
        seconds = interleaved(cases, 5)
        for label, trace in ESTIMATORS.items():
            errors = torch.stack(
                [
                    problem.bits(fs.log_prob(problem.flow, problem.x, trace=trace, seed=seed, **options).log_prob)
                    for seed in range(SEEDS)
                ]
            )
            spent = quartiles(seconds[label])["median"]
            rms = float(errors.square().mean().sqrt())
            rows.append(
                {
                    "checkpoint": checkpoint, "trace": label, "products": trace.probes, "rms": rms, "seconds": spent,
                    "of one": rms**2 * spent,
                    "of a mean": (rms**2 + spread**2) * spent,
                }
            )  # fmt: skip
        rows.append(
            {
                "checkpoint": checkpoint,
                "trace": "exact",
                "products": 64,
                "rms": 0.0,
                "seconds": quartiles(seconds["exact"])["median"],
                "of a mean": spread**2 * quartiles(seconds["exact"])["median"],
            }
        )
    aims = []
    for checkpoint in fs.adapters.BUNDLED:
        merits = {r["trace"]: r["of a mean"] for r in rows if r["checkpoint"] == checkpoint and "of a mean" in r}
        name = f"{checkpoint}: (error² + spread²) × time of the default over the best estimator's"
        aims.append(target(name, merits["hutchinson 1"] / min(merits.values()), 1.25))
        single = {r["trace"]: r["of one"] for r in rows if r["checkpoint"] == checkpoint and "of one" in r}
        name = f"{checkpoint}: error² × time of the default over the best estimator's"
        aims.append(target(name, single["hutchinson 1"] / min(single.values()), 1.25))
    return {"images": 16, "seeds": SEEDS, "rows": rows, "targets": aims}


def _evaluation(problem: Density, trace: likelihood.Trace) -> Any:
    """One evaluation with its trace, at the middle of the path."""
    from flowsolve.likelihood.trace import estimated
    from flowsolve.noise import Noise

    t = problem.flow.path.time(1.0)
    tree = {"cond": {}, "probes": trace.draw(problem.x, Noise.for_batch(0, len(problem.x)))}
    return lambda: estimated(problem.flow, trace, problem.x, t, problem.flow.path.at(t), tree, False)


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for row in found["rows"]:
        parts = [f"{k} {v:.5g}" if isinstance(v, float) else f"{v}" for k, v in row.items()]
        lines.append("  ".join(parts))
    return lines


def _kept(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier record made in the same circumstances."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    return dict(earlier["parts"]) if all(earlier.get(key) == value for key, value in head.items()) else {}


def _slim(value: Any) -> Any:
    """A record to four digits."""
    if isinstance(value, dict):
        return {k: _slim(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_slim(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
