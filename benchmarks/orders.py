r"""The measured order of every solver of `flowsolve.solvers`, and the table of docs/solvers.md.

    python benchmarks/orders.py                      # everything: two minutes on one core
    python benchmarks/orders.py --only UniPC         # solvers of this class, renewed in the record
    python benchmarks/orders.py --docs               # measures, then writes the table into docs/solvers.md
    python benchmarks/orders.py --docs --keep        # writes it from the figures of the record
    python benchmarks/orders.py --quick --out /tmp/orders.json

All orders are least-squares slopes of log error over log steps, in float64, between λ = −1.5 and 1.5 (weak ones: ±2),
where the trajectories part, on `CondOT`, `VP` and `VE`.

| figure | problem | error |
|---|---|---|
| `order` | a mixture of three components in the plane, eight trajectories | RMS, less scipy's DOP853 at rtol 3e-14 |
| `ramp` | the same on `VP`, where a multistep method starts with the few nodes it has | the same |
| `plain` | y' = (5 + 2t) K y, which turns y by 5t + t² | the same, of solvers that reach rounding too soon above |
| `weak` | a Gaussian on the line, on which all solvers are affine | of the variance at the end, without sampling |
| `mixture` | two components on the line, `VP`: E x² and E cos(1.5 x) of the chain by quadrature | the lesser slope |
| `strong` | the mixture in the plane, `VP`, 256 Brownian paths | RMS, less 2048 steps of `StochasticHeun` |
| `control` | evaluations of an adaptive solver against its tolerance, p of N ∝ tol^(−1/p) | |

In the straight chart every Gaussian path is y = (1−s) ε + s z, so that one field, written here in numpy from Bayes'
rule, is the truth of all. *Grids* are even in λ (exponential and stochastic methods), in flow time (Runge–Kutta) or in
σ/α (`IPNDM`). Multistep methods start with warmup="single", so that the order is theirs and not that of their start.

`weak`: every estimate is affine in the state, so x at the end is affine in the start and in each normal drawn. One
solve of a batch of basis vectors gives all coefficients, hence the variance, exactly. A Gaussian's drift is linear;
`mixture`, for solvers that remember nothing, says what is left of the order where it is not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sections.catalogue import AROUND, ENTRIES, FIXED, FROZEN, MULTI, OWN, RANDOM, Entry
from torch import Tensor

import flowsolve as fs
from flowsolve.bench.record import environment
from flowsolve.charts import resolve
from flowsolve.paths import VE, VP, CondOT, Path
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import (
    Adaptive,
    Churn,
    Multistep,
    RungeKutta,
    Solver,
    State,
    StochasticHeun,
)  # fmt: skip
from flowsolve.solvers.base import run

Array = NDArray[np.float64]

ROOT = File(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "orders.json"
PAGE = ROOT / "docs" / "solvers.md"
MARKS = ("<!-- orders: written by benchmarks/orders.py --docs -->", "<!-- /orders -->")

PATHS: dict[str, Path] = {"CondOT": CondOT(), "VP": VP(), "VE": VE()}
LOW, HIGH, WIDE = -1.5, 1.5, 2.0
CLOSE = 0.2
"""What a measured order may miss its claim by."""


# --- the ODE ---------------------------------------------------------------------------------------------------------

MEANS, STD, SHARES = np.array([[-1.0, 0.5], [1.0, 1.0], [0.3, -1.0]]), np.array([0.7, 1.0, 0.8]), [0.5, 0.3, 0.2]


@cache
def mixture() -> GaussianMixture:
    """Three overlapping components in the plane."""
    return GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in (MEANS.tolist(), STD.tolist(), SHARES)))


def rectified(s: float, y: Array) -> Array:
    """E[z − ε | (1−s) ε + s z = y] for y of shape (B, 2)."""
    variance = s**2 * STD**2 + (1.0 - s) ** 2
    off = y[:, None, :] - s * MEANS
    exponent = np.log(SHARES) - np.log(variance) - 0.5 * (off**2).sum(2) / variance
    share = np.exp(exponent - exponent.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    gain = (s * STD**2 - (1.0 - s)) / variance  # Cov(z − ε, x) / Var(x) of each component
    found: Array = (share[:, :, None] * (MEANS + gain[:, None] * off)).sum(1)
    return found


@cache
def case(path: Path, count: int = 8) -> tuple[float, float, Tensor, Tensor]:
    """From where to where, states of the marginal there, and where the ODE takes them."""
    from scipy.integrate import solve_ivp

    start, end = path.time(LOW), path.time(HIGH)
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    x = path.interpolate(mixture().sample(count, seed=3), noise, start)
    (a0, b0), (a1, b1) = path.at(start)[:2], path.at(end)[:2]
    found = solve_ivp(
        lambda s, y: rectified(s, y.reshape(x.shape)).ravel(), (a0 / (a0 + b0), a1 / (a1 + b1)),
        (x / (a0 + b0)).numpy().ravel(), method="DOP853", rtol=3e-14, atol=1e-14,
    )  # fmt: skip
    return start, end, x, torch.from_numpy(found.y[:, -1].reshape(x.shape)) * (a1 + b1)


def spent(solver: Solver, steps: int) -> int:
    """Evaluations of a solve of so many steps."""
    return sum(solver.schedule(8 * steps)[:steps]) if isinstance(solver, Multistep) else steps * solver.evaluations


def ode_errors(path: Path, solver: Solver, steps: Sequence[int], grid: str) -> list[float]:
    """Against DOP853, relative to the scale α+σ at the end."""
    start, end, x, truth = case(path)
    flow, scale, errors = mixture().flow(path), path.alpha(end) + path.sigma(end), []
    for n in steps:
        if grid == "sigma":
            errors.append(float((_on_levels(solver, flow, x, start, end, n) - truth).square().mean().sqrt() / scale))
            continue
        nfe = spent(solver, n)
        sol = fs.sample(flow, start=x, interval=(start, end), solver=solver, nfe=nfe, grid=grid)
        if sol.nfe.tolist() != [nfe] * len(x):
            raise AssertionError(f"{solver!r}: {sol.nfe.tolist()} evaluations instead of {nfe}")
        errors.append(float((sol.x - truth).square().mean().sqrt() / scale))
    return errors


def _on_levels(solver: Any, flow: fs.Flow, x: Tensor, start: float, end: float, steps: int) -> Tensor:
    """x at the end of steps that are even in σ/α, also the first ones with warmup="single"."""
    a, b = (math.exp(-flow.path.log_snr(t)) for t in (start, end))
    times = [start, *(flow.path.time(-math.log(a + (b - a) * i / steps)) for i in range(1, steps)), end]
    return carried(solver, flow, x, None, times, solver.schedule(8 * steps)[:steps])


def plain_errors(solver: RungeKutta, steps: Sequence[int]) -> list[float]:
    """On y' = (5 + 2t) K y from 0 to 2, K skew."""
    k, y0 = (torch.tensor(v, dtype=torch.float64) for v in ([[0.0, 1.0], [-1.0, 0.0]], [[1.0, 0.5], [0.25, 2.0]]))
    c, s = math.cos(14.0), math.sin(14.0)
    truth = y0 @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    solves = [
        fs.solve(lambda t, y: (5.0 + 2.0 * t) * y @ k, y0, 0.0, 2.0, solver=solver, nfe=n * solver.evaluations)
        for n in steps
    ]
    return [float((sol.x - truth).square().mean().sqrt()) for sol in solves]


def effort(path: Path, solver: Adaptive, tolerances: Sequence[float]) -> list[float]:
    """Evaluations a sample at each tolerance."""
    start, end, x, _ = case(path, 32)
    flow, found = mixture().flow(path), []
    for tol in tolerances:
        sol = fs.sample(flow, start=x, interval=(start, end), solver=replace(solver, rtol=tol, atol=tol))
        found.append(float(sol.nfe.double().mean()))
    return found


# --- the SDE ---------------------------------------------------------------------------------------------------------


class Basis:
    """In the place of noise: the k-th draw of a solve is the basis vector of sample 2 + k."""

    def __init__(self) -> None:
        self.draws: dict[tuple[float, float], int] = {}

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        """The basis vector of an interval."""
        k = self.draws.setdefault((t, t_next), len(self.draws))
        xi = torch.zeros_like(like)
        if len(like) > 2:
            xi[2 + k] = 1.0
        return xi


class Given(Basis):
    """In the place of noise: values for each draw of a step, in turn."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self.values = values

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        """The values of an interval."""
        return self.values[self.draws.setdefault((t, t_next), len(self.draws))]


def carried(
    solver: Solver, flow: fs.Flow, x: Tensor, noise: Any, times: Sequence[float], counts: Sequence[int] = ()
) -> Tensor:
    """x at the last time."""
    counts = counts or [solver.evaluations] * (len(times) - 1)
    grid = [(a, b, n) for (a, b), n in zip(pairwise(times), counts, strict=True)]
    step, state = solver.on(flow.path, _chart(solver), grid), State(x, noise=noise)
    for interval in grid:
        state = run(step(state, *interval), lambda query: flow.estimate(query.x, query.t))
    return state.x


def _chart(solver: Solver) -> Any:
    return resolve("straight") if isinstance(getattr(solver, "inner", solver), RungeKutta) else None


def even(path: Path, steps: int, half: float) -> list[float]:
    """Times of even steps in λ from −half to half."""
    return [path.time(half * (2 * i - steps) / steps) for i in range(steps + 1)]


def variance_errors(path: Path, solver: Solver, steps: Sequence[int]) -> list[float]:
    """Of the variance at the end, relative, for N(1.5, ½²)."""
    problem = GaussianMixture(torch.tensor([[1.5]], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    flow, truth, errors = problem.flow(path), float(problem.marginal(path, path.time(WIDE)).cov), []
    for n in steps:
        times, probe = even(path, n, WIDE), Basis()
        carried(solver, flow, torch.zeros(1, 1, dtype=torch.float64), probe, times)
        basis = torch.zeros(2 + len(probe.draws), 1, dtype=torch.float64)
        basis[1] = 1.0
        ends = carried(solver, flow, basis, Basis(), times)[:, 0]
        slopes, before = ends[1:] - ends[0], problem.marginal(path, times[0])
        variance = float(slopes[0] ** 2 * before.cov[0, 0] + slopes[1:].square().sum())
        errors.append(abs(variance / truth - 1.0))
    return errors


FUNCTIONS: tuple[Callable[[Array], Array], ...] = (lambda x: x**2, lambda x: np.cos(1.5 * x))


def moment_errors(solver: Solver, steps: Sequence[int]) -> list[list[float]]:
    """Of E x² and E cos(1.5 x) at the end, for two components on the line and a solver that remembers nothing.

    The solver is a Markov chain x' = Φ(x, ξ). u_k(x) = E u_{k+1}(Φ(x, ξ)) is carried backwards on a grid of x by
    Gauss–Hermite quadrature over the normals of a step and a cubic spline.
    """
    from scipy.interpolate import CubicSpline

    path = PATHS["VP"]
    problem = GaussianMixture(
        *(torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [1.2]], 0.6, [0.6, 0.4]))
    )  # fmt: skip
    flow, grid = problem.flow(path), np.linspace(-9.0, 9.0, 721)
    start, end = (problem.marginal(path, path.time(v)) for v in (-WIDE, WIDE))

    def parts(law: Any) -> Any:
        return zip(law.weights.tolist(), law.means[:, 0].tolist(), law.std[:, 0].tolist(), strict=True)

    truths = [
        sum(w * (m * m + s * s) for w, m, s in parts(end)),
        sum(w * math.cos(1.5 * m) * math.exp(-1.125 * s * s) for w, m, s in parts(end)),
    ]
    x0, w0 = np.polynomial.hermite_e.hermegauss(80)
    errors = []
    for n in steps:
        times, probe = even(path, n, WIDE), Basis()
        carried(solver, flow, torch.zeros(1, 1, dtype=torch.float64), probe, times[:2])
        nodes, weights = np.polynomial.hermite_e.hermegauss(24 if len(probe.draws) == 1 else 12)
        weights = weights / weights.sum()
        combos = list(product(range(len(nodes)), repeat=len(probe.draws)))
        mass = np.array([np.prod([weights[i] for i in c]) for c in combos])
        x = torch.from_numpy(np.repeat(grid, len(combos)))[:, None]
        values = [
            torch.from_numpy(np.tile([nodes[c[k]] for c in combos], len(grid)))[:, None]
            for k in range(len(probe.draws))
        ]  # fmt: skip
        functions: list[Any] = list(FUNCTIONS)
        for a, b in reversed(list(pairwise(times))):
            ahead = carried(_share(solver, n), flow, x, Given(values), [a, b])[:, 0].numpy()
            functions = [CubicSpline(grid, g(ahead).reshape(len(grid), -1) @ mass) for g in functions]
        found = [sum(w * (w0 / w0.sum()) @ g(m + s * x0) for w, m, s in parts(start)) for g in functions]
        errors.append([float(abs(f - v)) for f, v in zip(found, truths, strict=True)])
    return errors


def _share(solver: Solver, steps: int) -> Solver:
    """The solver of one of so many steps: churn is shared out."""
    return replace(solver, churn=None, gamma=solver.share(steps)) if isinstance(solver, Churn) else solver


@cache
def followed(path: Path, solver: Solver, steps: int) -> Tensor:
    """Where 256 Brownian paths lead."""
    start, end, x, _ = case(path, 256)
    return fs.sample(
        mixture().flow(path), start=x, interval=(start, end), solver=solver, nfe=steps * solver.evaluations,
        grid="log_snr", noise="brownian", seed=4,
    ).x  # fmt: skip


def path_errors(path: Path, solver: Solver, steps: Sequence[int], finest: int) -> list[float]:
    """Against StochasticHeun with many steps on the same Brownian paths."""
    end = path.time(HIGH)
    truth, scale = followed(path, StochasticHeun(), finest), path.alpha(end) + path.sigma(end)
    return [float((followed(path, solver, n) - truth).square().mean().sqrt() / scale) for n in steps]


# --- the record ------------------------------------------------------------------------------------------------------


def slope(steps: Sequence[float], errors: Sequence[float]) -> float:
    """The order."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def measure(entry: Entry, quick: bool = False) -> dict[str, Any]:
    """All figures of an entry."""
    began, solver = time.perf_counter(), entry.solver
    paths = {"VP": PATHS["VP"]} if quick else PATHS
    found: dict[str, Any] = {}

    def fit(errors: Callable[[Path], list[float]], steps: Sequence[int], of: dict[str, Path] = paths) -> dict[str, Any]:
        made = {name: errors(path) for name, path in of.items()}
        return {
            "steps": list(steps), "errors": made, "slopes": {name: slope(steps, e) for name, e in made.items()}
        }  # fmt: skip

    one = {"VP": PATHS["VP"]}
    if entry.order:
        fixed = replace(solver, adaptive=False) if isinstance(solver, Adaptive) else solver
        if isinstance(solver, Multistep):
            fixed = replace(solver, warmup="single")
        steps = [n // 2 for n in entry.steps] if quick else entry.steps
        found["order"] = fit(lambda path: ode_errors(path, fixed, steps, entry.grid), steps)
        if entry.ramp:
            found["ramp"] = fit(lambda path: ode_errors(path, solver, steps, entry.grid), steps, one)
        if entry.plain and isinstance(fixed, RungeKutta):
            errors = plain_errors(fixed, entry.plain)
            found["plain"] = {
                "steps": list(entry.plain), "errors": {"": errors}, "slopes": {"": slope(entry.plain, errors)}
            }  # fmt: skip
    if entry.weak:
        steps = (16, 32) if quick else entry.weak_steps
        found["weak"] = fit(lambda path: variance_errors(path, solver, steps), steps)
    if entry.mixture and not quick:
        steps = (12, 24, 48)
        moments = moment_errors(solver, steps)
        each = [slope(steps, e) for e in zip(*moments, strict=True)]
        found["mixture"] = {"steps": list(steps), "errors": {"VP": moments}, "slopes": {"VP": min(each)}}
    if entry.strong:
        steps, finest = ((16, 32), 128) if quick else ((32, 64, 128), 2048)
        found["strong"] = fit(lambda path: path_errors(path, solver, steps, finest), steps, one)
    if entry.control and isinstance(solver, Adaptive):
        made = {name: effort(path, solver, entry.tolerances) for name, path in paths.items()}
        found["control"] = {
            "tolerances": list(entry.tolerances), "evaluations": made,
            "slopes": {n: -1.0 / float(np.polyfit(np.log(entry.tolerances), np.log(e), 1)[0]) for n, e in made.items()},
        }  # fmt: skip
    return {**described(entry), "measured": found, "seconds": time.perf_counter() - began}


CLAIMS = ("order", "ramp", "weak", "mixture", "strong", "control")


def described(entry: Entry) -> dict[str, Any]:
    """What a record says of an entry besides figures."""
    shared = {name: getattr(entry, name) for name in ("kind", "companion", "form", "grid", "source")}
    return {
        "solver": entry.name,
        **shared,
        "evaluations": entry.solver.evaluations,
        "claimed": {name: value for name in CLAIMS if (value := getattr(entry, name)) is not None},
        "peers": {"diffusers": entry.diffusers, "k-diffusion": entry.k},
    }


def short_of(row: dict[str, Any]) -> list[str]:
    """Measured orders that are less than claimed, in words."""
    lines = []
    for name, claim in row["claimed"].items():
        if name in row["measured"]:
            least = min(row["measured"][name]["slopes"].values())
            if least < claim - CLOSE:
                lines.append(f"{row['solver']}: {name} {claim:g} claimed, {least:.2f} measured")
    return lines


# --- tables ----------------------------------------------------------------------------------------------------------


def spread(row: dict[str, Any], name: str) -> str:
    """A measured order, the least and the greatest of the paths where they differ."""
    if name not in row["measured"]:
        return ""
    values = sorted(f"{v:.2f}" for v in row["measured"][name]["slopes"].values())
    return values[0] if values[0] == values[-1] else f"{values[0]}–{values[-1]}"


def claimed(row: dict[str, Any], name: str) -> str:
    """A claim, empty if there is none."""
    return f"{row['claimed'][name]:g}" if name in row["claimed"] else ""


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Aligned, for a terminal: claimed and measured, side by side."""
    head = ["solver", "NFE", *CLAIMS, "plain"]
    body = [
        [r["solver"], str(r["evaluations"])]
        + [f"{claimed(r, n):<2}{spread(r, n)}".rstrip() for n in CLAIMS]
        + [spread(r, "plain")]
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in [head, *body]]


def tables(record: dict[str, Any]) -> str:
    """Markdown, for the page."""
    lines: list[str] = []
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["kind"] == kind]
        lines += [f"**{kind}**", ""]
        columns = _columns(kind)
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(f(row) for f in columns.values()) + " |" for row in rows]
        lines.append("")
    lines += ["**The same method elsewhere**", "", "| solver | diffusers | k-diffusion |", "|---|---|---|"]
    for row in record["rows"]:
        theirs, k = row["peers"]["diffusers"], row["peers"]["k-diffusion"]
        if theirs or k:
            lines.append(f"| `{row['solver']}` | {_code(theirs)} | {_code(k)} |")
    return "\n".join(lines)


def _columns(kind: str) -> dict[str, Callable[[dict[str, Any]], str]]:
    """The columns of a kind's table: their heads, and what they hold."""
    found: dict[str, Callable[[dict[str, Any]], str]] = {"solver": lambda r: f"`{r['solver']}`"}
    if kind in (FROZEN, RANDOM, AROUND):
        found["order"] = lambda r: claimed(r, "order") or f"weak {claimed(r, 'weak')}"
        found["measured"] = lambda r: spread(r, "order") or spread(r, "weak")
        found["on a mixture"] = lambda r: spread(r, "mixture")
        found["strong"] = lambda r: spread(r, "strong")
    else:
        found["order"] = lambda r: claimed(r, "order") + (f" ({r['companion']})" if r["companion"] else "")
        found["measured"] = lambda r: spread(r, "plain") or spread(r, "order")
    if kind == MULTI:
        found["with a ramp"] = lambda r: spread(r, "ramp")
    if kind == OWN:
        found["of the step control"] = lambda r: spread(r, "control")
    found["evaluations a step"] = lambda r: str(r["evaluations"])
    found["chart" if kind in (FIXED, OWN) else "form"] = lambda r: r["form"]
    found["source"] = lambda r: r["source"]
    return found


def _code(names: str) -> str:
    """Names as code, what is said of them in parentheses as it is."""
    if not names:
        return ""
    if names.startswith("("):
        return f"(`{names[1:-1]}`)"
    parts, depth, last = [], 0, 0
    for i, c in enumerate(names + ","):
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append(names[last:i].strip())
            last = i + 1
    cut = [p.partition(" (") for p in parts]
    return ", ".join(f"`{name}`" + (f" ({said}" if said else "") for name, _, said in cut)


def written(page: str, record: dict[str, Any]) -> str:
    """A page with the tables between its two marks."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{tables(record)}\n\n{MARKS[1]}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the record and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="solvers of these classes, renewed in the record")
    parser.add_argument("--quick", action="store_true", help="one path and few steps, for a test of the script")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/solvers.md")
    parser.add_argument("--keep", action="store_true", help="measure nothing: keep the figures of the record")
    parser.add_argument("--out", type=File, default=RESULTS, help="the record")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = _kept(given.out) if given.keep else _made(given)
    print(*report(record["rows"]), sep="\n")
    print(*(["", "less than claimed:", *lines] if (lines := [t for r in record["rows"] for t in short_of(r)]) else []),
          sep="\n")  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.docs:
        PAGE.write_text(written(PAGE.read_text(), record))


def _kept(file: File) -> dict[str, Any]:
    """The record as it is, with what the list says now besides figures."""
    record: dict[str, Any] = json.loads(file.read_text())
    about = {entry.name: described(entry) for entry in ENTRIES}
    return {**record, "rows": [{**row, **about.get(row["solver"], {})} for row in record["rows"]]}


def _made(given: argparse.Namespace) -> dict[str, Any]:
    head = {"environment": environment(), "quick": given.quick}
    kept: dict[str, Any] = {}
    if given.only and given.out.exists():
        earlier = json.loads(given.out.read_text())
        if all(earlier.get(key) == value for key, value in head.items()):
            kept = {row["solver"]: row for row in earlier["rows"]}
    rows = []
    for entry in ENTRIES:
        if not given.only or type(entry.solver).__name__ in given.only:
            rows.append(measure(entry, given.quick))
        elif entry.name in kept:
            rows.append({**kept[entry.name], **described(entry)})
    return {**head, "rows": rows}


if __name__ == "__main__":
    main()
