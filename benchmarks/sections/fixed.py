r"""`fixed`: what a solver costs beside the network on a fixed grid, for each evaluation.

1,000 evaluations of $-y$ at (16, 2) in float32, by Euler and by RK4. `overhead` is the time of the solve less that of
as many calls of the field alone, over their number. torchdiffeq steps by its option step_size, whose grid may have one
step more than asked for: evaluations are counted, not assumed. diffrax (Euler only, with the field compiled into its
loop, so that nothing is to be taken off) is for information.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from sections.measure import interleaved, quartiles, ratio, target
from sections.peers import Counted, available

__all__ = ["measure", "table"]

SHAPE, EVALUATIONS = (16, 2), 1000
METHODS = {"Euler": ("euler", 1), "RK4": ("rk4", 4)}
LIMIT = 1 / 3


def decay(t: Any, y: Tensor) -> Tensor:
    """The field."""
    return -y


def _solves(method: str, y0: Tensor) -> dict[str, Callable[[Any], Any]]:
    """Every library's solve for a field."""
    theirs, stages = METHODS[method]
    solver = getattr(fs.solvers, method)()

    def ours(mode: str) -> Callable[[Any], Any]:
        def solve(f: Any) -> Any:
            with kernels.use(mode):
                return fs.solve(f, y0, 0.0, 1.0, solver=solver, nfe=EVALUATIONS)

        return solve

    found = {"flowsolve fused": ours("fused"), "flowsolve torch": ours("torch")}
    peer = available("torchdiffeq")
    if peer is not None:
        times, options = torch.tensor([0.0, 1.0]), {"step_size": stages / EVALUATIONS}
        found["torchdiffeq"] = lambda f: peer.odeint(f, y0, times, method=theirs, options=options)
    return found


def _diffrax(y0: Tensor) -> Callable[[], Any]:
    import jax

    dfx, start = available("diffrax"), jax.numpy.asarray(y0.numpy())
    assert dfx is not None
    single = jax.numpy.float32

    @jax.jit
    def solve(y: Any) -> Any:
        term, size = dfx.ODETerm(lambda t, y, args: -y), single(1.0 / EVALUATIONS)
        return dfx.diffeqsolve(term, dfx.Euler(), single(0.0), single(1.0), size, y, max_steps=EVALUATIONS + 8).ys

    return lambda: jax.block_until_ready(solve(start))


def _alone(y0: Tensor) -> None:
    t, y = torch.zeros(()), y0
    for _ in range(EVALUATIONS):
        y = decay(t, y)


def _method(method: str, quick: bool) -> dict[str, Any]:
    y0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    solves, calls = _solves(method, y0), {}
    for name, solve in solves.items():
        f = Counted(decay)
        solve(f)
        calls[name] = f.calls
    cases: dict[str, Callable[[], Any]] = {name: (lambda solve=solve: solve(decay)) for name, solve in solves.items()}
    cases["field"] = lambda: _alone(y0)
    if method == "Euler" and available("diffrax"):
        cases["diffrax"], calls["diffrax"] = _diffrax(y0), EVALUATIONS
    seconds = interleaved(cases, 5 if quick else 31)
    field = [s / EVALUATIONS for s in seconds["field"]]
    less = {name: [0.0] * len(field) if name == "diffrax" else field for name in calls}
    overhead = {name: [s / n - f for s, f in zip(seconds[name], less[name], strict=True)] for name, n in calls.items()}
    return {
        "method": method,
        "field": quartiles(field),
        "rows": [
            {
                "name": name,
                "evaluations": calls[name],
                "overhead": quartiles(overhead[name]),
                "ratio": ratio(overhead["flowsolve fused"], overhead[name]),
            }
            for name in calls
        ],
    }


@torch.no_grad()
def measure(quick: bool) -> dict[str, Any]:
    """Seconds of overhead for each evaluation."""
    found = [_method(method, quick) for method in METHODS]
    targets = []
    for record in found:
        by_name = {row["name"]: row["ratio"]["median"] for row in record["rows"]}
        name = f"overhead of an evaluation over torchdiffeq's, {record['method']}"
        targets.append(target(name, by_name.get("torchdiffeq"), LIMIT))
    return {"methods": found, "targets": targets}


def table(record: Mapping[str, Any]) -> list[str]:
    """Microseconds of overhead, as lines."""
    lines = []
    for found in record["methods"]:
        lines.append(f"{found['method']:<16}{'calls':>7}{'overhead, µs each [quartiles]':>30}{'ours / it':>24}")
        for row in found["rows"]:
            s, r = row["overhead"], row["ratio"]
            times = f"{1e6 * s['median']:.2f} [{1e6 * s['q1']:.2f}, {1e6 * s['q3']:.2f}]"
            shares = f"{r['median']:.3f} [{r['q1']:.2f}, {r['q3']:.2f}]"
            lines.append(f"{row['name']:<16}{row['evaluations']:7d}{times:>30}{shares:>24}")
        lines.append(f"the field alone: {1e6 * found['field']['median']:.2f} µs")
    return lines
