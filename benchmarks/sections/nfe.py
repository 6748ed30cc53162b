r"""`nfe`: evaluations at equal achieved error, on the systems of `sections.problems`.

Every solver solves every system, as one system, in float64, at rtol = atol = 10⁻³ … 10⁻¹² by half decades, and the
field counts. The error is that of the end state, the largest of $|y_i - y_i^*| / \max(1, |y_i^*|)$. A solver's curve is
the lower left envelope of its points (no point with fewer evaluations is as accurate), log–log linear between them; it
is read at the errors 10⁻⁴, 10⁻⁶, 10⁻⁸, 10⁻¹⁰, never beyond its ends.

Figures are ratios of evaluations, ours over the peer's, as geometric means over the systems that both curves reach:

* `best`: our cheapest method against the cheapest of scipy, torchdiffeq and torchode (the target), of all peers, and
  of each library alone. The least of several curves is less than each of them for what is mere scatter too, so the
  more peers there are, the larger this ratio is for solvers that are as good;
* `like`: the same method by different hands.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import flowsolve as fs
from sections.measure import target
from sections.peers import Counted, available, diffrax_solver, scalar_field, torchode_solve
from sections.problems import END, PROBLEMS, Problem

__all__ = ["LIKE", "OURS", "TARGETS", "geometric_mean", "measure", "needed", "table"]

TOLERANCES = tuple(10.0 ** (-k / 2) for k in range(6, 25))
LOOSE = tuple(t for t in TOLERANCES if t > 5e-8)  # for methods of order 3, hopeless beyond
TARGETS = (1e-4, 1e-6, 1e-8, 1e-10)
OURS = ("Bosh3", "Dopri5", "Tsit5", "Dopri8")
LIKE = (
    ("Bosh3", "scipy RK23"),
    ("Dopri5", "scipy RK45"),
    ("Dopri5", "torchdiffeq dopri5"),
    ("Dopri5", "torchode Dopri5"),
    ("Tsit5", "torchode Tsit5"),
    ("Tsit5", "diffrax Tsit5"),
    ("Dopri8", "scipy DOP853"),
    ("Dopri8", "torchdiffeq dopri8"),
    ("Dopri8", "diffrax Dopri8"),
)
LIMIT = 1.05

Point = tuple[float, int]
Solve = Callable[[Problem, float], tuple[Any, int]]


def _ours(solver: Callable[..., Any], problem: Problem, tolerance: float) -> tuple[Any, int]:
    f = Counted(scalar_field(problem.field))
    y0 = torch.tensor(problem.y0, dtype=torch.float64)
    found = fs.solve(f, y0, 0.0, END, solver=solver(rtol=tolerance, atol=tolerance, max_steps=10**7), batched=False)
    return found.x.numpy(), f.calls


def _scipy(method: str, problem: Problem, tolerance: float) -> tuple[Any, int]:
    from scipy.integrate import solve_ivp

    calls = 0

    def f(t: float, y: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return problem.field(t, y.tolist(), math)

    found = solve_ivp(f, (0.0, END), problem.y0, method=method, rtol=tolerance, atol=tolerance)
    return found.y[:, -1], calls


def _torchdiffeq(method: str, problem: Problem, tolerance: float) -> tuple[Any, int]:
    f = Counted(scalar_field(problem.field))
    y0, times = torch.tensor(problem.y0, dtype=torch.float64), torch.tensor([0.0, END], dtype=torch.float64)
    peer = available("torchdiffeq")
    assert peer is not None
    return peer.odeint(f, y0, times, method=method, rtol=tolerance, atol=tolerance)[-1].numpy(), f.calls


def _torchode(method: str, problem: Problem, tolerance: float) -> tuple[Any, int]:
    f = Counted(scalar_field(problem.field))
    y0 = torch.tensor([problem.y0], dtype=torch.float64)
    return torchode_solve(f, y0, END, method, tolerance).ys[0, -1].numpy(), f.calls


class _Diffrax:
    """One compilation a problem, for all tolerances."""

    def __init__(self, method: str) -> None:
        self.method, self.calls = method, 0
        self.problem: Problem | None = None

    def _count(self) -> None:
        self.calls += 1

    def __call__(self, problem: Problem, tolerance: float) -> tuple[Any, int]:
        if problem is not self.problem:
            self.problem, self.solve = problem, diffrax_solver(problem.field, self.method, count=self._count)
        self.calls = 0
        return self.solve(problem.y0, END, tolerance), self.calls


def solvers() -> dict[str, tuple[Solve, Sequence[float]]]:
    """Every solver at hand by name, and the tolerances it is run at."""
    found: dict[str, tuple[Solve, Sequence[float]]] = {}
    for name in OURS:
        found[name] = partial(_ours, getattr(fs.solvers, name)), LOOSE if name == "Bosh3" else TOLERANCES
    if available("scipy"):
        found["scipy RK23"] = partial(_scipy, "RK23"), LOOSE
        found["scipy RK45"] = partial(_scipy, "RK45"), TOLERANCES
        found["scipy DOP853"] = partial(_scipy, "DOP853"), TOLERANCES
    if available("torchdiffeq"):
        found["torchdiffeq dopri5"] = partial(_torchdiffeq, "dopri5"), TOLERANCES
        found["torchdiffeq dopri8"] = partial(_torchdiffeq, "dopri8"), TOLERANCES
    if available("torchode"):
        found["torchode Dopri5"] = partial(_torchode, "Dopri5"), TOLERANCES
        found["torchode Tsit5"] = partial(_torchode, "Tsit5"), TOLERANCES
    if available("diffrax"):
        found["diffrax Tsit5"] = _Diffrax("Tsit5"), TOLERANCES
        found["diffrax Dopri8"] = _Diffrax("Dopri8"), TOLERANCES
    return found


def curve(solve: Solve, problem: Problem, truth: Any, tolerances: Sequence[float]) -> list[Point]:
    """(error, evaluations) at each tolerance that the solver gets through."""
    points = []
    for tolerance in tolerances:
        with torch.no_grad(), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                y, calls = solve(problem, tolerance)
            except (AssertionError, RuntimeError):  # underflow in dt
                continue
        error = float(np.max(np.abs(y - truth) / np.maximum(1.0, np.abs(truth))))
        if math.isfinite(error):
            points.append((max(error, 1e-16), calls))
    return points


def needed(points: Sequence[Point], error: float) -> float | None:
    """Evaluations for an error, on the lower left envelope; None beyond its ends."""
    front: list[Point] = []
    for e, n in sorted(points, key=lambda point: (point[1], point[0])):
        if not front or e < front[-1][0]:
            front.append((e, n))
    for (e0, n0), (e1, n1) in pairwise(front):
        if e1 <= error <= e0:
            share = math.log(e0 / error) / math.log(e0 / e1)
            return math.exp(math.log(n0) + share * math.log(n1 / n0))
    return None


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean, None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _cheapest(curves: Mapping[str, Sequence[Point]], names: Sequence[str], error: float) -> tuple[float, str] | None:
    found = [(n, name) for name in names if (n := needed(curves[name], error)) is not None]
    return min(found, default=None)


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Geometric means of ratios: for each error, and over all."""
    means = {f"{e:.0e}": geometric_mean([r["ratio"] for r in rows if r["error"] == e]) for e in TARGETS}
    return {**means, "all": geometric_mean([r["ratio"] for r in rows])}


def _best(curves: Mapping[str, Mapping[str, Sequence[Point]]], peers: Sequence[str]) -> list[dict[str, Any]]:
    """Our cheapest method against the cheapest of the peers, for each problem and error."""
    rows = []
    for name, by_solver in curves.items():
        for error in TARGETS:
            ours, theirs = _cheapest(by_solver, OURS, error), _cheapest(by_solver, peers, error)
            if ours and theirs:
                ratio = ours[0] / theirs[0]
                rows.append({"problem": name, "error": error, "ratio": ratio, "ours": ours[1], "theirs": theirs[1]})
    return rows


def _ratios(curves: Mapping[str, Mapping[str, Sequence[Point]]], ours: str, theirs: str) -> dict[str, Any]:
    """Geometric means of the ratio of two methods: for each error, and over all."""
    rows = []
    for by_solver in curves.values():
        for error in TARGETS:
            a, b = needed(by_solver[ours], error), needed(by_solver[theirs], error)
            if a is not None and b is not None:
                rows.append({"error": error, "ratio": a / b})
    return {"ours": ours, "theirs": theirs, **_summary(rows)}


def measure(quick: bool) -> dict[str, Any]:
    """Curves of all solvers on all problems, and the ratios read from them."""
    problems = [p for p in PROBLEMS if p.name in ("A3", "B5", "D2")] if quick else PROBLEMS
    curves: dict[str, dict[str, list[Point]]] = {}
    cast = solvers()
    for problem in problems:
        truth = problem.truth()
        curves[problem.name] = {
            name: curve(solve, problem, truth, tolerances[:8:2] if quick else tolerances)
            for name, (solve, tolerances) in cast.items()
        }
    peers = [name for name in cast if name not in OURS]
    rows = _best(curves, [name for name in peers if not name.startswith("diffrax ")])
    libraries = dict.fromkeys(name.split()[0] for name in peers)
    best = _summary(rows)
    return {
        "curves": curves,
        "best": best,
        "with diffrax": _summary(_best(curves, peers)),
        "libraries": {
            library: _summary(_best(curves, [name for name in peers if name.startswith(library + " ")]))
            for library in libraries
        },
        "worst": max(rows, key=lambda r: r["ratio"], default=None),
        "rows": rows,
        "like": [_ratios(curves, a, b) for a, b in LIKE if b in cast],
        "targets": [target("evaluations at equal error, our best over the peers' best", best["all"], LIMIT)],
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """The ratios, as lines."""
    errors = [*(f"{error:.0e}" for error in TARGETS), "all"]

    def line(name: str, means: Mapping[str, float | None]) -> str:
        return f"{name:<38}" + "".join("       –" if (v := means[e]) is None else f"{v:8.2f}" for e in errors)

    lines = [f"{'evaluations, ours / theirs, at error':<38}" + "".join(f"{e:>8}" for e in errors)]
    lines.append(line("our best / best of the three", record["best"]))
    lines.append(line("our best / best of these and diffrax", record["with diffrax"]))
    lines += [line(f"our best / best of {name}", means) for name, means in record["libraries"].items()]
    lines += [line(f"{row['ours']} / {row['theirs']}", row) for row in record["like"]]
    worst = record["worst"]
    if worst:
        lines.append(
            f"worst: {worst['problem']} at {worst['error']:.0e}: {worst['ratio']:.2f} "
            f"({worst['ours']} / {worst['theirs']})"
        )
    return lines
