r"""What a step of an SDE costs, and how wrong it is, beside torchsde, all in one process.

    python benchmarks/sde.py                            # two minutes on two quiet cores
    python benchmarks/sde.py --quick --out /tmp/sde.json

**Time.** $dy = -y\,dt + g\,dW$ with g = 0.3 y (diagonal, scalar) or 0.3 (additive, as a matrix (B, D, 1)), whose f and
g cost little, in float32 without gradients, one thread: `fs.solve_sde` with fresh noise, and `torchsde.sdeint` with a
new `BrownianInterval` that is told dt, its best setting. Whole solves are divided by their steps, so that what a solve
costs once is part of it. Libraries take turns within a repetition, ratios are taken repetition by repetition.

**Error.** The root mean square distance to the closed form on the same path (a `BrownianInterval` of
`flowsolve.compat.torchsde`, handed to both), in float64, at the same steps: geometric Brownian motion,
$X = \arctan(pW + \tan X_0)$, and a linear equation with additive noise (Kloeden & Platen 1992, 4.4); and the slope of
log error over log steps; and how often the drift is asked for in a step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sections.measure import interleaved, quartiles, ratio, target
from sections.peers import available, facts
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.bench.record import environment
from flowsolve.compat.torchsde import BrownianInterval

RESULTS = Path(__file__).parent / "results" / "sde.json"
LIMIT = 0.5
SIZES = [((16, 2), 200), ((64, 3072), 20)]
CASES = [
    ("diagonal", "ito", "euler"), ("diagonal", "ito", "milstein"), ("diagonal", "ito", "srk"),
    ("scalar", "ito", "euler"), ("additive", "ito", "srk"), ("diagonal", "stratonovich", "heun"),
    ("diagonal", "stratonovich", "midpoint"), ("diagonal", "stratonovich", "reversible_heun"),
]  # fmt: skip
AREAS = {"srk": "space-time"}
STEPS = [16, 32, 64, 128]
P = 0.6


def _diffusion(noise: str, columns: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """g of the timing problem; torchsde has a column for scalar noise."""
    if noise == "additive":
        return lambda t, y: torch.full((*y.shape, 1), 0.3)
    if noise == "scalar" and columns:
        return lambda t, y: (0.3 * y).unsqueeze(-1)
    return lambda t, y: 0.3 * y


def _timed(shape: tuple[int, int], steps: int, quick: bool) -> list[dict[str, Any]]:
    """Seconds a step of every case at one shape."""
    torchsde, y0 = available("torchsde"), torch.ones(shape)
    ends, rows = torch.tensor([0.0, 1.0]), []
    for noise, kind, method in CASES:
        ours_g, theirs_g = _diffusion(noise, False), _diffusion(noise, True)
        channels = shape[1] if noise == "diagonal" else 1
        sde = SimpleNamespace(f=lambda t, y: -y, g=theirs_g, noise_type=noise, sde_type=kind)

        def ours(noise: str = noise, kind: str = kind, method: str = method, g: Any = ours_g) -> None:
            fs.solve_sde(lambda t, y: -y, g, y0, 0.0, 1.0, steps=steps, solver=method, noise_type=noise, sde_type=kind)

        def theirs(method: str = method, channels: int = channels, sde: Any = sde) -> None:
            bm = torchsde.BrownianInterval(
                0.0, 1.0, size=(shape[0], channels), dt=1.0 / steps,
                levy_area_approximation=AREAS.get(method, "none"),
            )  # fmt: skip
            torchsde.sdeint(sde, y0, ends, bm=bm, method=method, dt=1.0 / steps)

        found = interleaved({"ours": ours, **({"torchsde": theirs} if torchsde else {})}, 3 if quick else 11)
        per = {name: [s / steps for s in seconds] for name, seconds in found.items()}
        row: dict[str, Any] = {"shape": shape, "noise": noise, "kind": kind, "method": method, "steps": steps}
        row |= {name: quartiles(s) for name, s in per.items()}
        row["ratio"] = ratio(per["ours"], per["torchsde"]) if torchsde else None
        rows.append(row)
        known = "" if not torchsde else f"{1e6 * row['torchsde']['median']:10.0f}{row['ratio']['median']:8.2f}"
        print(f"{shape!s:<12}{noise:<10}{kind:<14}{method:<16}{1e6 * row['ours']['median']:8.0f}{known}", flush=True)
    return rows


def _problems() -> list[tuple[str, str, str, str, Any, Any, Any]]:
    """(name, noise, calculus, method, f, g, X(1) from X₀ and W(1))."""
    geometric = (lambda t, y: 0.3 * y, lambda t, y: 0.5 * y, lambda x, w: x * torch.exp(0.3 - 0.125 + 0.5 * w))
    tangent = (
        lambda t, y: -(P**2) * y.sin() * y.cos() ** 3,
        lambda t, y: P * y.cos() ** 2,
        lambda x, w: torch.atan(P * w + torch.tan(x)),
    )
    linear = (
        lambda t, y: 0.8 / (1 + t).sqrt() - y / (2 * (1 + t)),
        lambda t, y: torch.diag_embed((0.56 / (1 + t).sqrt()).expand_as(y)),
        lambda x, w: (x + 0.8 * (1 + 0.7 * w)) / math.sqrt(2.0),
    )
    named = {"geometric": geometric, "tangent": tangent}
    rows = [(n, "diagonal", "ito", m, *p) for n, p in named.items() for m in ("euler", "milstein", "srk")]
    return [*rows, *(("linear", "additive", "ito", m, *linear) for m in ("euler", "srk"))]


def _evaluations(f: Any, g: Any, noise: str, kind: str, method: str, y0: Tensor) -> dict[str, float]:
    """How often each library asks for the drift in a step, from solves of 64 and 128 steps."""
    torchsde, calls = available("torchsde"), 0

    def counted(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(t, y)

    def ours(n: int) -> None:
        fs.solve_sde(counted, g, y0, 0.0, 1.0, steps=n, solver=method, noise_type=noise, sde_type=kind)

    def theirs(n: int) -> None:
        sde = SimpleNamespace(f=counted, g=g, noise_type=noise, sde_type=kind)
        torchsde.sdeint(sde, y0, torch.tensor([0.0, 1.0], dtype=torch.float64), method=method, dt=1.0 / n)

    found = {}
    for name, solve in {"ours": ours, **({"torchsde": theirs} if torchsde else {})}.items():
        counts = []
        for n in (64, 128):
            calls = 0
            solve(n)
            counts.append(calls)
        found[name] = (counts[1] - counts[0]) / 64
    return found


def _errors(quick: bool) -> list[dict[str, Any]]:
    """Root mean square errors of both libraries on the same path."""
    torchsde, count = available("torchsde"), 50 if quick else 400
    y0 = torch.full((count, 2), 0.7, dtype=torch.float64)
    rows = []
    for name, noise, kind, method, f, g, solution in _problems():
        bm = BrownianInterval(
            0.0, 1.0, size=(count, 2), dtype=torch.float64, entropy=11, levy_area_approximation="space-time"
        )
        truth = solution(y0, bm(0.0, 1.0))
        sde = SimpleNamespace(f=f, g=g, noise_type=noise, sde_type=kind)

        def error(x: Tensor, truth: Tensor = truth) -> float:
            return float((x - truth).square().mean().sqrt())

        row: dict[str, Any] = {"problem": name, "noise": noise, "kind": kind, "method": method, "steps": STEPS}
        row["ours"] = [
            error(
                fs.solve_sde(
                    f, g, y0, 0.0, 1.0, steps=n, solver=method, noise_type=noise, sde_type=kind, noise=bm.path
                ).x
            )
            for n in STEPS
        ]
        if torchsde:
            ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
            row["torchsde"] = [
                error(torchsde.sdeint(sde, y0, ends, bm=bm, method=method, dt=1.0 / n)[-1]) for n in STEPS
            ]
        row["evaluations"] = _evaluations(f, g, noise, kind, method, y0[:1])
        row["order"] = -float(np.polyfit(np.log(STEPS), np.log(row["ours"]), 1)[0])
        rows.append(row)
        known = f"{row['torchsde'][-1]:12.2e}" if torchsde else ""
        told = f"   order {row['order']:.2f}   f a step {row['evaluations']}"
        print(f"{name:<12}{noise:<10}{method:<12}{row['ours'][-1]:12.2e}{known}{told}", flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a test of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchsde")
    torch.set_num_threads(1)
    load, targets = os.getloadavg()[0], []
    with kernels.use("fused"):
        times = [row for shape, steps in SIZES for row in _timed(shape, steps, given.quick)]
        errors = _errors(given.quick)
    for row in times:
        name = f"a step over torchsde's, {row['shape']}, {row['noise']} {row['method']}"
        targets.append(target(name, row["ratio"] and row["ratio"]["median"], LIMIT))
    print("\ntargets")
    for aim in targets:
        if aim["value"] is not None:
            met = "met" if aim["met"] else "MISSED"
            print(f"{aim['name']:<68}{aim['value']:6.3f} <= {aim['limit']:.3f}  {met}")
    peer = available("torchsde")
    head = {**environment(), **facts(), "torchsde": None if peer is None else peer.__version__, "load_before": load}
    record = {"environment": head, "quick": given.quick, "times": times, "errors": errors, "targets": targets}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
