r"""`step`: the time of one attempted Dopri5 step, beside what its memory traffic alone would take.

$\dot y = -y$ on the CPU in float32, rtol = atol = 10⁻⁴, under `torch.no_grad`, two threads, from a normal start to
times at which well over 100 steps, or 20 of the large state, have been made: most of the way the step size is held by
stability, so that some attempts of some samples are rejected. A step is an attempt of the batch: evaluations asked for,
less those that choose the first step, over 6. Each library is charged by its own number of them; they are counted in
runs of their own. A repetition runs all of them in turn, and a ratio is taken within a repetition.

**The floor.** An ideal step of the fused kind reads and writes, in units of the state,

    stage 2:      y, k₁ → 1                         3
    stages 3-6:   y, k₁ … kₘ → 1, m = 2, 3, 4, 5    4 + 5 + 6 + 7
    solution:     y, k₁, k₃, k₄, k₅, k₆ → 1         7
    error norm:   k₁, k₃, k₄, k₅, k₆, k₇, y, y'     8

that is 40. Divided by the bandwidth at which torch copies between nine buffers of the state's size in turn (a copy
moves 2), that is `floor`. The field's own share is 6 times its time alone, on the nine buffers in turn as well.
`overhead` is the step less that share, `distance` overhead over floor, `distance_whole` the step over floor and share
together. At (256, 2), where everything is in the first cache, the floor is the cost of calls and says little.

diffrax compiles its whole loop, under `vmap` with per-sample steps; `compile` is the time of its first call less that
of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from sections.measure import interleaved, quartiles, ratio, target
from sections.peers import Counted, available, torchode_solve

__all__ = ["TRAFFIC", "measure", "table"]

CASES = {(256, 2): 400.0, (64, 3, 32, 32): 100.0}
TOLERANCE = 1e-4
TRAFFIC = 3 + (4 + 5 + 6 + 7) + 7 + 8
BUFFERS = 9
STARTUP = {"flowsolve fused": 2, "flowsolve torch": 2, "torchdiffeq": 2, "torchode": 2}
LIMITS = {
    ("torchdiffeq", (256, 2)): 1 / 5,
    ("torchdiffeq", (64, 3, 32, 32)): 1 / 8,
    ("torchode", (256, 2)): 1 / 2,
    ("torchode", (64, 3, 32, 32)): 1 / 2,
}
FLOOR_LIMIT = 2.0
Field = Callable[[Any, Tensor], Tensor]


def decay(t: Any, y: Tensor) -> Tensor:
    """The field."""
    return -y


def _flowsolve(mode: str, y0: Tensor, end: float) -> Callable[[Field], Any]:
    solver = fs.solvers.Dopri5(rtol=TOLERANCE, atol=TOLERANCE)

    def solve(f: Field) -> Any:
        with kernels.use(mode):
            return fs.solve(f, y0, 0.0, end, solver=solver)

    return solve


def _torchdiffeq(y0: Tensor, end: float) -> Callable[[Field], Any]:
    peer, times = available("torchdiffeq"), torch.tensor([0.0, end])
    assert peer is not None
    return lambda f: peer.odeint(f, y0, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)


def _torchode(y0: Tensor, end: float) -> Callable[[Field], Any]:
    flat = y0.flatten(1)
    return lambda f: torchode_solve(f, flat, end, "Dopri5", TOLERANCE)


def _diffrax(y0: Tensor, end: float) -> Callable[[], Any]:
    """One call of diffrax's compiled solve of the batch: the attempts of its slowest sample."""
    import jax

    dfx = available("diffrax")
    assert dfx is not None
    single = jax.numpy.float32

    def one(y: Any) -> Any:
        found = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y), dfx.Dopri5(), single(0.0), single(end), None, y, max_steps=None,
            stepsize_controller=dfx.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        )  # fmt: skip
        return found.ys[-1], found.stats["num_steps"]

    solve, start = jax.jit(jax.vmap(one)), jax.numpy.asarray(y0.numpy())

    def run() -> int:
        y, steps = jax.block_until_ready(solve(start))
        assert y.dtype == np.float32
        return int(steps.max())

    return run


def _cycle(shape: tuple[int, ...], act: Callable[[Tensor, Tensor], Any], calls: int) -> Callable[[], None]:
    """So many calls of `act` on neighbours among `BUFFERS` states."""
    states = [torch.randn(shape) for _ in range(BUFFERS)]

    def run() -> None:
        for i in range(calls):
            act(states[i % BUFFERS], states[(i + 1) % BUFFERS])

    return run


def _case(shape: tuple[int, ...], end: float, quick: bool) -> dict[str, Any]:
    """All libraries at one shape."""
    y0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    solves = {"flowsolve fused": _flowsolve("fused", y0, end), "flowsolve torch": _flowsolve("torch", y0, end)}
    if available("torchdiffeq"):
        solves["torchdiffeq"] = _torchdiffeq(y0, end)
    if available("torchode"):
        solves["torchode"] = _torchode(y0, end)
    steps, fill = {}, {}
    for name, solve in solves.items():
        f = Counted(decay)
        solve(f)
        steps[name] = (f.calls - STARTUP[name]) / 6
        fill[name] = f.rows / (f.calls * len(y0))
    cases: dict[str, Callable[[], Any]] = {name: (lambda solve=solve: solve(decay)) for name, solve in solves.items()}
    calls = 2000 if y0.numel() < 10_000 else 200
    cases["copy"] = _cycle(shape, lambda a, b: b.copy_(a), calls)
    cases["field"] = _cycle(shape, lambda a, b: decay(None, a), calls)
    compile_seconds = None
    if available("diffrax"):
        run = _diffrax(y0, end)
        start = time.perf_counter()
        steps["diffrax"] = run()
        compile_seconds = time.perf_counter() - start
        cases["diffrax"] = run
    seconds = interleaved(cases, 3 if quick else 15)
    if compile_seconds is not None:
        compile_seconds -= float(np.median(seconds["diffrax"]))

    per = {name: [s / n for s in seconds[name]] for name, n in steps.items()}
    share = [6 * s / calls for s in seconds["field"]]
    bandwidth = [2 * y0.nbytes * calls / s for s in seconds["copy"]]
    floor = [TRAFFIC * y0.nbytes / rate for rate in bandwidth]
    overhead = {name: [s - f for s, f in zip(per[name], share, strict=True)] for name in per}
    ours = per["flowsolve fused"]
    whole = [a + b for a, b in zip(floor, share, strict=True)]
    found = {
        "shape": shape,
        "end": end,
        "bandwidth": quartiles(bandwidth),
        "floor": quartiles(floor),
        "field_share": quartiles(share),
        "distance": ratio(overhead["flowsolve fused"], floor),
        "distance_whole": ratio(ours, whole),
        "rows": [
            {
                "name": name,
                "steps": steps[name],
                "fill": fill.get(name),
                "seconds": quartiles(per[name]),
                "overhead": quartiles(overhead[name]),
                "ratio": ratio(ours, per[name]),
            }
            for name in per
        ],
    }
    if compile_seconds is not None:
        found["diffrax_compile"] = compile_seconds
        found["diffrax_with_compile"] = compile_seconds / steps["diffrax"] + float(np.median(per["diffrax"]))
    return found


@torch.no_grad()
def measure(quick: bool) -> dict[str, Any]:
    """Seconds a step at both shapes."""
    cases = [_case(shape, end / 4 if quick else end, quick) for shape, end in CASES.items()]
    targets = []
    for found in cases:
        by_name = {row["name"]: row["ratio"]["median"] for row in found["rows"]}
        for peer in ("torchdiffeq", "torchode"):
            name = f"time of a step over {peer}'s, {found['shape']}"
            targets.append(target(name, by_name.get(peer), LIMITS[peer, found["shape"]]))
    targets.append(target("overhead of a step over its floor", cases[-1]["distance"]["median"], FLOOR_LIMIT))
    return {"cases": cases, "traffic": TRAFFIC, "targets": targets}


def table(record: Mapping[str, Any]) -> list[str]:
    """Microseconds a step, as lines."""
    lines = []
    for found in record["cases"]:
        lines.append(f"{found['shape']!s:<16}{'steps':>7}{'µs a step [quartiles]':>30}{'ours / it':>24}")
        for row in found["rows"]:
            s, r = row["seconds"], row["ratio"]
            times = f"{1e6 * s['median']:.1f} [{1e6 * s['q1']:.1f}, {1e6 * s['q3']:.1f}]"
            shares = f"{r['median']:.3f} [{r['q1']:.2f}, {r['q3']:.2f}]"
            lines.append(f"{row['name']:<16}{row['steps']:7.0f}{times:>30}{shares:>24}")
        floor, share = 1e6 * found["floor"]["median"], 1e6 * found["field_share"]["median"]
        lines.append(
            f"field's share {share:.1f} µs; floor {floor:.1f} µs at {found['bandwidth']['median'] / 1e9:.1f} GB/s; "
            f"overhead / floor {found['distance']['median']:.2f}"
        )
        if "diffrax_compile" in found:
            lines.append(
                f"diffrax compiles for {found['diffrax_compile']:.2f} s: "
                f"{1e6 * found['diffrax_with_compile']:.0f} µs a step with that"
            )
    return lines
