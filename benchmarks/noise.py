r"""What the noise of a step costs, beside `torch.randn` and torchsde's Brownian motions, all in one process.

    python benchmarks/noise.py                          # under a minute on two quiet cores
    python benchmarks/noise.py --quick --out /tmp/noise.json

A case draws the noise of every step of a solve on a uniform grid of 50 in float32, by the direct call a solver makes:

| name | what is drawn |
|---|---|
| `randn` | `torch.randn` of the state's shape from torch's generator, which knows no samples |
| `fused`, `torch` | `Noise.step`: by the kernel, and by its twin |
| `randn, a sample each` | `torch.randn` from one generator a sample: what per-sample seeds cost in other packages |
| `Brownian` | `Brownian.step`, by the kernel; `dyadic` on a grid of 64, whose times the path knows after 6 levels |
| `BrownianInterval`, `BrownianTree` | torchsde's, of the same shape: a new one for every solve, asked for W(t, t') |

torchsde is told its own best settings for such a grid (`dt`); its tree searches to the tolerance 10⁻⁶ of its default.
Cases take turns within a repetition, slow ones with fewer steps; ratios are taken repetition by repetition, and all
figures have their quartiles. A device other than the CPU is waited for after every solve.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sections.measure import interleaved, quartiles, ratio, target
from sections.peers import available, facts

from flowsolve import kernels
from flowsolve.bench.record import environment
from flowsolve.brownian import Brownian
from flowsolve.noise import Noise

RESULTS = Path(__file__).parent / "results" / "noise.json"
SHAPES = [(16, 2), (64, 3072), (256, 3072)]
STEPS, DYADIC = 50, 64
LIMITS = {"cpu": 3.0, "cuda": 1.2}
Solve = Callable[[], Any]


def _peers(shape: tuple[int, ...], device: str, grid: list[tuple[float, float]]) -> dict[str, Solve]:
    """torchsde's Brownian motions along a grid."""
    torchsde = available("torchsde")
    if torchsde is None:
        return {}

    def along(make: Callable[[], Any]) -> Solve:
        def solve() -> None:
            path = make()
            for a, b in grid:
                path(a, b)

        return solve

    def interval() -> Any:
        return torchsde.BrownianInterval(0.0, 1.0, size=shape, device=device, entropy=0, dt=1.0 / STEPS)

    def tree() -> Any:
        return torchsde.BrownianTree(t0=0.0, t1=1.0, w0=torch.zeros(shape, device=device), entropy=0)

    return {"BrownianInterval": along(interval), "BrownianTree": along(tree)}


def _case(shape: tuple[int, ...], device: str, threads: int, quick: bool) -> dict[str, Any]:
    """All of them at one shape."""
    torch.set_num_threads(threads)
    like, noise = torch.empty(shape, device=device), Noise.of(0, shape[0])
    generators = [torch.Generator(device).manual_seed(i) for i in range(shape[0])]
    fewer = STEPS if like.numel() < 100_000 else 5 if like.numel() < 500_000 else 2
    grid = [(i / STEPS, (i + 1) / STEPS) for i in range(STEPS)]
    dyadic = [(i / DYADIC, (i + 1) / DYADIC) for i in range(STEPS)]

    def steps(draw: Callable[[float, float], Any], mode: str, times: list[tuple[float, float]]) -> Solve:
        def solve() -> None:
            with kernels.use(mode):
                for a, b in times:
                    draw(a, b)
            if device == "cuda":
                torch.cuda.synchronize()

        return solve

    def each(a: float, b: float) -> Any:
        return torch.stack([torch.randn(shape[1:], generator=g, device=device) for g in generators])

    def path(times: list[tuple[float, float]]) -> Solve:
        return lambda: steps(partial(Brownian.of(0, shape[0]).step, like=like), "fused", times)()

    cases: dict[str, tuple[Solve, int]] = {
        "randn": (steps(lambda a, b: torch.randn(shape, device=device), "torch", grid), STEPS),
        "fused": (steps(lambda a, b: noise.step(a, b, like), "fused", grid), STEPS),
        "torch": (steps(lambda a, b: noise.step(a, b, like), "torch", grid[:fewer]), fewer),
        "randn, a sample each": (steps(each, "torch", grid[:fewer]), fewer),
        "Brownian": (path(grid[:fewer]), fewer),
        "Brownian, dyadic": (path(dyadic[:fewer]), fewer),
        **{name: (solve, fewer) for name, solve in _peers(shape, device, grid[:fewer]).items()},
    }
    repeats = 3 if quick else 21 if fewer == STEPS else 5
    seconds = interleaved({name: solve for name, (solve, _) in cases.items()}, repeats)
    per = {name: [s / cases[name][1] for s in seconds[name]] for name in cases}
    rows = [
        {"name": name, "seconds": quartiles(s), "ratio": ratio(s, per["randn"]), "path": ratio(per["Brownian"], s)}
        for name, s in per.items()
    ]
    return {"shape": shape, "device": device, "threads": threads, "rows": rows}


def _table(found: dict[str, Any]) -> list[str]:
    head = f"{found['shape']} on {found['device']}, {found['threads']} threads"
    lines = [f"{head:<32}{'µs a step [quartiles]':>34}{'/ randn':>26}{'Brownian / it':>16}"]
    for row in found["rows"]:
        s, r = row["seconds"], row["ratio"]
        times = f"{1e6 * s['median']:.1f} [{1e6 * s['q1']:.1f}, {1e6 * s['q3']:.1f}]"
        shares = f"{r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}]"
        lines.append(f"{row['name']:<32}{times:>34}{shares:>26}{row['path']['median']:16.2f}")
    return lines


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a test of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchsde")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    load = os.getloadavg()[0]
    found, targets = [], []
    for device in devices:
        for threads in [1, 2] if device == "cpu" else [1]:
            for shape in SHAPES[:2] if given.quick else SHAPES:
                case = _case(shape, device, threads, given.quick)
                found.append(case)
                print("", *_table(case), sep="\n", flush=True)
                value = next(row["ratio"]["median"] for row in case["rows"] if row["name"] == "fused")
                name = f"noise of a step over randn, {shape} on {device}, {threads} threads"
                targets.append(target(name, value, LIMITS[device]))
    print("\ntargets")
    for aim in targets:
        print(f"{aim['name']:<58}{aim['value']:6.3f} <= {aim['limit']:.3f}  {'met' if aim['met'] else 'MISSED'}")
    peer = available("torchsde")
    head = {**environment(), **facts(), "torchsde": None if peer is None else peer.__version__, "load_before": load}
    record = {"environment": head, "quick": given.quick, "cases": found, "targets": targets}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
