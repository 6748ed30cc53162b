r"""`mixed`: what a batch of unequal samples costs, in rows of the network.

$\dot y = |y|^2\, (-y_2, y_1)$ turns every sample at a rate of its own, the square of its radius, which stays as it is:
$y(t)$ is $y(0)$ turned by $|y|^2 t$. The rates are spread evenly in their logarithm, such that the dearest sample alone
needs about ten times the evaluations of the cheapest. 4,096 samples, 256 at a time, float64, rtol = atol = 10⁻⁶.

The field counts the rows it is given. `work` is their number over what the samples need one by one: the sum of
flowsolve's per-sample NFE, which does not depend on the company (checked on 64 samples that are really solved alone).

* flowsolve refills: a sample that is done makes room for the next. `fill` is the mean share of 256 rows in a call.
* torchode steps every sample by itself, but evaluates the batch until its last sample is done.
* torchdiffeq has one step size and one error norm for the batch; its `work` is in units of the same sum.

`error` is $|y - y^*| / |y^*|$ of a sample at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve._batch import Context
from flowsolve.pursuit import Arrivals, collect, pursue
from sections.measure import target
from sections.peers import Counted, available, torchode_solve

__all__ = ["measure", "table"]

COUNT, WIDTH, ALONE = 4096, 256, 64
END, FASTEST = 3.0, 10.0
TOLERANCE = 1e-6
LIMIT = 1.10


def spin(t: Any, y: Tensor) -> Tensor:
    """The field."""
    return torch.stack((-y[:, 1], y[:, 0]), 1) * (y * y).sum(1, keepdim=True)


def samples(count: int) -> tuple[Tensor, Tensor]:
    """States at the start and at the end, in random order."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.randperm(count, generator=generator, dtype=torch.float64) / max(1, count - 1)
    rate = FASTEST**rank
    angle = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    place = lambda phi: rate.sqrt()[:, None] * torch.stack((phi.cos(), phi.sin()), 1)  # noqa: E731
    return place(angle), place(angle + rate * END)


def refilled(f: Counted, y0: Tensor) -> fs.Solution:
    """flowsolve with `WIDTH` samples under way, taken from an iterator as others leave."""
    waiting = iter(y0.split(1))

    def arrive(n: int) -> tuple[Tensor, Context] | None:
        rows = [y for _, y in zip(range(n), waiting, strict=False)]
        return (torch.cat(rows), Context(None, len(rows))) if rows else None

    arrivals: Arrivals = arrive
    parts = list(pursue(_solver(), arrivals, 0.0, END, lambda query, _: f(query.t, query.x), width=WIDTH))
    return collect(parts, y0, 0)[1]


def _solver() -> Any:
    return fs.solvers.Dopri5(rtol=TOLERANCE, atol=TOLERANCE)


def _torchdiffeq(f: Counted, y: Tensor) -> Tensor:
    peer = available("torchdiffeq")
    assert peer is not None
    times = torch.tensor([0.0, END], dtype=y.dtype)
    return peer.odeint(f, y, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)[-1]


def _torchode(f: Counted, y: Tensor) -> Tensor:
    return torchode_solve(f, y, END, "Dopri5", TOLERANCE).ys[:, -1]


def _summary(name: str, f: Counted, y: Tensor, exact: Tensor, alone: int) -> dict[str, Any]:
    error = torch.linalg.vector_norm(y - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
    return {
        "name": name,
        "calls": f.calls,
        "rows": f.rows,
        "work": f.rows / alone,
        "fill": f.rows / (f.calls * WIDTH),
        "worst_error": float(error.max()),
        "median_error": float(error.median()),
    }


@torch.no_grad()
def measure(quick: bool) -> dict[str, Any]:
    """Rows evaluated by every library, and the errors."""
    y0, exact = samples(1024 if quick else COUNT)
    together = fs.solve(spin, y0, 0.0, END, solver=_solver())
    alone = int(together.nfe.sum())
    picked = torch.linspace(0, len(y0) - 1, 8 if quick else ALONE).long()
    single = [fs.solve(spin, y0[i : i + 1], 0.0, END, solver=_solver()).nfe.item() for i in picked]
    f = Counted(spin)
    solution = refilled(f, y0)
    rows = [_summary("flowsolve, refilling", f, solution.x, exact, alone)]
    f = Counted(spin)
    ends = [fs.solve(f, y, 0.0, END, solver=_solver()).x for y in y0.split(WIDTH)]
    rows.append(_summary("flowsolve, batch by batch", f, torch.cat(ends), exact, alone))
    for name, solve in (("torchdiffeq", _torchdiffeq), ("torchode", _torchode)):
        if available(name):
            f = Counted(spin)
            ends = [solve(f, y) for y in y0.split(WIDTH)]
            rows.append(_summary(name, f, torch.cat(ends), exact, alone))
    return {
        "samples": len(y0),
        "nfe_alone": {"min": int(together.nfe.min()), "max": int(together.nfe.max()), "sum": alone},
        "nfe_same_alone": [together.nfe[i].item() for i in picked] == single,
        "nfe_same_refilled": torch.equal(together.nfe, solution.nfe),
        "x_moved_refilled": float((together.x - solution.x).abs().max()),
        "rows": rows,
        "targets": [target("rows of the network over what samples need alone", rows[0]["work"], LIMIT)],
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Work and errors, as lines."""
    need = record["nfe_alone"]
    lines = [
        f"{record['samples']} samples, alone {need['min']} to {need['max']} evaluations each "
        f"(x {need['max'] / need['min']:.1f}); NFE as alone: {record['nfe_same_alone']}",
        f"{'':<26}{'work':>8}{'fill':>8}{'calls':>9}{'worst error':>14}{'median':>11}",
    ]
    lines += [
        f"{row['name']:<26}{row['work']:8.3f}{row['fill']:8.3f}{row['calls']:9d}"
        f"{row['worst_error']:14.1e}{row['median_error']:11.1e}"
        for row in record["rows"]
    ]
    return lines
