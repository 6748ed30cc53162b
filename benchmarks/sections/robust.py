r"""`robust`: what each library makes of a case that ought to be handled, or refused in words.

All solve by their Dopri5 at rtol = atol = 10⁻⁵ in float64 unless the case says otherwise. `outcome` is "solved", the
status of each sample that did not make it, or the first line of the exception; a field that is asked more than 20,000
times stops the attempt. `others` is the largest error of the samples that have a solution, |y − y*| / max(1, |y*|), and
`right` whether it is below the case's bound (10⁻³ unless said otherwise: at a jump no embedded pair can promise more)
and the statuses name those without a solution and no others; with an exception there is nothing to be right.

| case | field and start | has a solution |
|---|---|---|
| nan | $-y$, NaN where −0.95 < y < 0; from 1, 2, −1, 3 to t = 4 | all but the third |
| blow-up | $y^2$ from −1, 0.2, 2, 0.5 to t = 1 (2 ends at t = ½) | all but the third |
| jump | slope −2 above y = 1, −1 below; from 1.2, 2, 3, 0.5 | all, to 1 % |
| no interval | $-y$ from t = 1 to t = 1 | all |
| far time | $-y$ in float32 from t = 10⁸ over 1, where float32 numbers are 8 apart | a refusal is right |
| zero tolerances | $-y$, rtol = atol = 0 | a refusal is right |
| rtol = 0 | $-y$, atol = 10⁻⁶ | all |
| atol = 0 | $-y$, rtol = 10⁻⁶, one sample starting at 0 | all |
| bfloat16 | $-y$, y in bfloat16, to t = 1 | all, to 1 % |
| batch of 1, of 0 | $-y$ | all |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from sections.measure import target
from sections.peers import Counted, available

__all__ = ["CASES", "Case", "measure", "table"]

MOST = 20_000
Solve = Callable[["Case", Counted, Tensor], tuple[Tensor, list[str]]]


@dataclass(frozen=True)
class Case:
    """A field, starts, and the ends of those that have one (None: a refusal is the right answer)."""

    name: str
    field: Callable[[Any, Tensor], Tensor]
    start: Sequence[float]
    end: Sequence[float] | None
    t0: float = 0.0
    t1: float = 1.0
    rtol: float = 1e-5
    atol: float = 1e-5
    dtype: torch.dtype = torch.float64
    bound: float = 1e-3


class Exhausted(RuntimeError):
    """The field was asked too often."""


def _decay(t: Any, y: Tensor) -> Tensor:
    return -y


def _poisoned(t: Any, y: Tensor) -> Tensor:
    return torch.where((y > -0.95) & (y < 0.0), math.nan, -y)


def _jump(t: Any, y: Tensor) -> Tensor:
    return torch.where(y > 1.0, -2.0, -1.0).to(y.dtype)


def _decayed(*start: float, t: float = 1.0) -> tuple[float, ...]:
    return tuple(v * math.exp(-t) for v in start)


FOUR = (1.0, 2.0, 3.0, 4.0)
CASES = (
    Case("nan", _poisoned, (1.0, 2.0, -1.0, 3.0), _decayed(1.0, 2.0, math.nan, 3.0, t=4.0), t1=4.0),
    Case("blow-up", lambda t, y: y * y, (-1.0, 0.2, 2.0, 0.5), (-0.5, 0.25, math.nan, 1.0)),
    Case("jump", _jump, (1.2, 2.0, 3.0, 0.5), (0.1, 0.5, 1.0, -0.5), bound=1e-2),
    Case("no interval", _decay, FOUR, FOUR, t0=1.0),
    Case("far time", _decay, FOUR, None, t0=1e8, t1=1e8 + 1, dtype=torch.float32),
    Case("zero tolerances", _decay, FOUR, None, rtol=0.0, atol=0.0),
    Case("rtol = 0", _decay, FOUR, _decayed(*FOUR), rtol=0.0, atol=1e-6),
    Case("atol = 0", _decay, (0.0, 1.0, 2.0, 3.0), _decayed(0.0, 1.0, 2.0, 3.0), rtol=1e-6, atol=0.0),
    Case("bfloat16", _decay, FOUR, _decayed(*FOUR), dtype=torch.bfloat16, bound=1e-2),
    Case("batch of 1", _decay, (1.0,), _decayed(1.0)),
    Case("batch of 0", _decay, (), ()),
)


def _flowsolve(case: Case, f: Counted, y0: Tensor) -> tuple[Tensor, list[str]]:
    solver = fs.solvers.Dopri5(rtol=case.rtol, atol=case.atol)
    found = fs.solve(f, y0, case.t0, case.t1, solver=solver, throw=False)
    names = [fs.solvers.Status(s).name for s in found.status.tolist()]
    return found.x, [f"sample {i} {name}" for i, name in enumerate(names) if name != "SUCCESS"]


def _torchdiffeq(case: Case, f: Counted, y0: Tensor) -> tuple[Tensor, list[str]]:
    peer = available("torchdiffeq")
    assert peer is not None
    dtype = torch.float32 if case.dtype is torch.bfloat16 else case.dtype
    times = torch.tensor([case.t0, case.t1], dtype=dtype)
    return peer.odeint(f, y0, times, method="dopri5", rtol=case.rtol, atol=case.atol)[-1], []


def _torchode(case: Case, f: Counted, y0: Tensor) -> tuple[Tensor, list[str]]:
    to = available("torchode")
    assert to is not None
    term = to.ODETerm(f, with_stats=False)
    solver = to.AutoDiffAdjoint(to.Dopri5(term), to.IntegralController(case.atol, case.rtol, term=term))
    dtype = torch.float32 if case.dtype is torch.bfloat16 else case.dtype
    t0, t1 = (torch.full((len(y0),), t, dtype=dtype) for t in (case.t0, case.t1))
    found = solver.solve(to.InitialValueProblem(y0=y0, t_start=t0, t_end=t1))
    names = [to.Status(s).name for s in found.status.tolist()]
    return found.ys[:, -1], [f"sample {i} {name}" for i, name in enumerate(names) if name != "SUCCESS"]


SOLVES: dict[str, Solve] = {"flowsolve": _flowsolve, "torchdiffeq": _torchdiffeq, "torchode": _torchode}


def _try(solve: Solve, case: Case) -> dict[str, Any]:
    """What a library makes of a case."""

    def guarded(t: Any, y: Tensor) -> Tensor:
        if f.calls > MOST:
            raise Exhausted(f"more than {MOST} evaluations")
        return case.field(t, y)

    f = Counted(guarded)
    y0 = torch.tensor(case.start, dtype=case.dtype).reshape(-1, 1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, failures = solve(case, f, y0)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        refused = case.end is None and isinstance(error, ValueError | TypeError)
        return {"outcome": f"{type(error).__name__}: {lines[0]}", "others": None, "right": refused, "calls": f.calls}
    outcome = ", ".join(failures) or "solved"
    if case.end is None:
        return {"outcome": outcome, "others": None, "right": False, "calls": f.calls}
    end = torch.tensor(case.end, dtype=torch.float64)
    has = ~torch.isnan(end)
    errors = ((y.double().flatten() - end).abs() / end.abs().clamp_min(1.0))[has]
    worst = float(errors.nan_to_num(math.inf).max()) if len(errors) else 0.0
    named = {int(failure.split()[1]) for failure in failures}
    told = named == set(torch.nonzero(~has).flatten().tolist())
    return {"outcome": outcome, "others": worst, "right": worst <= case.bound and told, "calls": f.calls}


def measure(quick: bool) -> dict[str, Any]:
    """All cases with all libraries."""
    rows = []
    for case in CASES:
        by_library = {
            name: _try(solve, case) for name, solve in SOLVES.items() if name == "flowsolve" or available(name)
        }
        rows.append({"case": case.name, **by_library})
    wrong = sum(not row["flowsolve"]["right"] for row in rows)
    return {"rows": rows, "targets": [target("cases that flowsolve handles wrongly", wrong, 0)]}


def table(record: Mapping[str, Any]) -> list[str]:
    """A line for each case and library."""
    lines = []
    for row in record["rows"]:
        for name in [name for name in SOLVES if name in row]:
            found = row[name]
            others = "–" if found["others"] is None else f"{found['others']:.0e}"
            head = row["case"] if name == "flowsolve" else ""
            mark = "right" if found["right"] else "WRONG"
            lines.append(f"{head:<16}{name:<12}{mark:<6}{others:>6}  {found['outcome'][:38]}")
    return lines
