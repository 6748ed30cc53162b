r"""Times that belong to samples, and times that steps must meet: solves that are made of others.

* **Intervals of their own.** With $t = t_0 + (t_1 - t_0) u$ for each sample, all of them go from u = 0 to 1, by

$$ \frac{dy}{du} = (t_1 - t_0)\, f\bigl(t_0 + (t_1 - t_0) u,\; y\bigr) . $$

* **Corners.** A step ends at a given time where one solve ends there and another begins; so a field that jumps is asked
  on one side only, and no step is tried across. Samples that ended (an event, a failure) take no part in what follows.
* **Tolerances of their own** are columns that go with the samples (`Context.columns`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from flowsolve._batch import Context, Whose, hosted, state_dtype, take
from flowsolve.events import Event, Occurrences
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, Status

__all__ = ["columns", "cornered", "of_their_own", "owned", "rows_of_times"]

Solve = Callable[..., Solution]


def owned(solver: Any, rtol: Any, atol: Any, first_step: Any) -> tuple[Any, dict[str, Any]]:
    """The solver with the numbers given in place of its own, and what has one a sample."""
    given = {k: v for k, v in (("rtol", rtol), ("atol", atol), ("first_step", first_step)) if v is not None}
    if not given:
        return solver, {}
    if not (isinstance(solver, Adaptive) and solver.adaptive):
        raise TypeError(
            f"{', '.join(given)} given, but {type(solver).__name__} has none: give it to an adaptive solver"
        )
    own = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.ndim}
    for name, value in own.items():
        least = 0.0 if name != "first_step" else math.ulp(0.0)
        if value.ndim != 1 or not bool((torch.isfinite(value) & (value >= least)).all()):
            raise ValueError(f"{name} = {value}; expected finite numbers >= 0 of shape (B,), the first steps > 0")
    plain: dict[str, Any] = {k: float(v) for k, v in given.items() if k not in own}
    return replace(solver, **plain) if plain else solver, {
        **own, **({"rtol": solver.rtol, "atol": solver.atol} | plain if own else {}), **own
    }  # fmt: skip


def columns(own: dict[str, Any], count: int) -> NDArray[np.float64]:
    """rtol, atol and first step of each sample, (3, B); a first step that is to be chosen is NaN."""
    table = np.full((3, count), np.nan)
    for i, name in enumerate(("rtol", "atol", "first_step")):
        value = own.get(name)
        if isinstance(value, Tensor):
            if value.shape != (count,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one a sample, ({count},)")
            table[i] = value.detach().cpu().double().numpy()
        elif value is not None:
            table[i] = float(value)
    if ((table[0] == 0.0) & (table[1] == 0.0)).any():
        raise ValueError("rtol and atol of a sample are both 0, which no step can meet; give at least one of them > 0")
    return table


def rows_of_times(t_eval: Any) -> bool:
    """Whether times have a row a sample."""
    return isinstance(t_eval, Tensor | np.ndarray) and t_eval.ndim == 2


def of_their_own(
    solve: Solve, f: Callable[..., Any], y0: Any, t0: Any, t1: Any, t_eval: Any, *, batched: bool, throw: bool,
    args: Sequence[Any], event: Any, dense: bool, **settings: Any,
) -> Solution:  # fmt: skip
    """`solve` where each sample has an interval, or times of output, of its own."""
    if not batched:
        raise ValueError("times of shape (B,) go with no batched=False; give the samples one interval")
    leaves = tree_flatten(y0)[0]
    count, device = len(leaves[0]), leaves[0].device
    looks = None
    if t_eval is not None:
        looks = hosted(t_eval, torch.float64).to("cpu") if rows_of_times(t_eval) else None
        looks = _looks(
            torch.as_tensor(t_eval, device="cpu").double().expand(count, -1) if looks is None else looks, count
        )
    times = [hosted(t, dtype=torch.float64).to(device) for t in (t0, t1)]
    if wrong := [tuple(t.shape) for t in times if t.ndim and t.shape != (count,)]:
        raise ValueError(f"t0 or t1 has shape {wrong[0]}; expected a number, or one a sample, ({count},)")
    begin, end = (t.expand(count) for t in times)
    if not bool(torch.isfinite(begin).all() & torch.isfinite(end).all()):
        raise ValueError("t0 or t1 holds a number that is not finite; expected finite times")
    if looks is not None:
        sign = torch.where(end >= begin, 1.0, -1.0).cpu()[:, None]
        line = sign * torch.cat((begin.detach().cpu()[:, None], looks.detach(), end.detach().cpu()[:, None]), 1)
        if not bool((line.diff(dim=1) >= 0).all()):
            raise ValueError("t_eval has rows that do not run from t0 towards t1; expected monotone times, (B, T)")
        if rows_of_times(t_eval):
            end = looks[:, -1].to(device)

    def clock(u: Tensor, y: Any, begin: Tensor, span: Tensor) -> Tensor:
        wide = [v.ndim for v in tree_flatten(y)[0]]
        shape = (-1, *[1] * ((wide[0] if isinstance(y, Tensor) else 2) - 1))
        return (begin.reshape(shape) + span.reshape(shape) * u).to(u.dtype)

    def g(u: Tensor, y: Any, begin: Tensor, span: Tensor, *more: Any) -> Any:
        slope = f(clock(u, y, begin, span), y, *more)
        return tree_map(lambda v: (span.reshape(-1, *[1] * (v.ndim - 1)) * v).to(v.dtype), slope)

    def along(e: Any) -> Event:
        e = e if isinstance(e, Event) else Event(e)
        made: Event = replace(e, g=lambda u, y, begin, span, *more: e.g(clock(u, y, begin, span), y, *more))
        return made

    if event is not None:
        event = [along(e) for e in (event if isinstance(event, list | tuple) else [event])]
    if isinstance(first := settings.get("first_step"), Tensor):
        settings["first_step"] = first / (end - begin).abs().clamp_min(torch.finfo(torch.float64).tiny).to(first)
    own = (Whose(begin, True), Whose(end - begin, True), *args)
    keep = dense or looks is not None
    solution = solve(g, y0, 0.0, 1.0, args=own, throw=False, event=event, dense=keep, **settings)
    first_t, last = begin.detach().cpu(), end.detach().cpu()
    span = (end - begin).cpu()
    reached = torch.where(solution.t == 1.0, last, first_t + (last - first_t) * solution.t)
    if event is not None:  # differentiable, in its interval too
        moved = begin.cpu() + span * solution.t
        reached = torch.where(solution.status == Status.EVENT, moved, reached)
    met = tuple(o._replace(t=begin.cpu()[o.sample] + span[o.sample] * o.t) for o in solution.events)
    solution = replace(solution, t=reached, events=met)
    if keep:
        whole = solution.dense.on_clock(begin.detach().cpu().numpy(), span.detach().numpy())
        solution = replace(solution, dense=whole if dense else None)
        if looks is not None:
            solution = replace(solution, x=whole(looks), t_eval=looks.detach())
    return solution.raise_on_failure() if throw else solution


def _looks(looks: Tensor, count: int) -> Tensor:
    if looks.ndim != 2 or len(looks) != count or not looks.shape[1] or not bool(torch.isfinite(looks).all()):
        raise ValueError(
            f"t_eval has shape {tuple(looks.shape)}; expected finite times (T,), or (B, T) with B = {count}"
        )
    return looks


def cornered(
    solve: Solve, f: Callable[..., Any], y0: Any, t0: Any, t1: Any, t_eval: Any, step_t: Any, jump_t: Any, *,
    solver: Any, batched: bool, throw: bool, args: Sequence[Any], event: Any, dense: bool, nfe: Any, **settings: Any,
) -> Solution:  # fmt: skip
    """`solve` from corner to corner."""
    if not (isinstance(solver, Adaptive) and solver.adaptive) or nfe is not None:
        raise ValueError(
            "step_t= and jump_t= are for adaptive solvers without nfe=; on a fixed grid, solve from one such time to "
            "the next"
        )
    if any(
        isinstance(e, Event) and int(e.terminal) > 1 for e in (event if isinstance(event, list | tuple) else [event])
    ):
        raise ValueError(
            "an event that ends a sample at its n-th goes with no step_t= and jump_t=; count its occurrences"
        )
    start, stop = (float(t.detach() if isinstance(t, Tensor) else t) for t in (t0, t1))
    sign = 1.0 if stop >= start else -1.0
    given = {name: _finite(v, name) for name, v in (("step_t", step_t), ("jump_t", jump_t))}
    jumps = set(given["jump_t"])
    inside = sorted(
        {v for v in (*given["step_t"], *jumps) if sign * start < sign * v < sign * stop}, key=lambda v: sign * v
    )
    looks = None if t_eval is None else list(t_eval)
    places = None if looks is None else [float(v.detach() if isinstance(v, Tensor) else v) for v in looks]
    if places:  # the last time of output ends the solve
        inside = [v for v in inside if sign * v < sign * places[-1]]
    dtype = state_dtype(tree_flatten(y0)[0][0])
    leaves = tree_flatten(y0)[0]
    count = len(leaves[0]) if batched and all(v.ndim for v in leaves) else 1
    single = not batched or not all(v.ndim for v in leaves)
    whose, alive, y = Context({"args": tuple(args)}, count), np.arange(count), y0
    edges: list[Any] = [t0, *inside, t1 if not looks else looks[-1]]
    total: Solution | None = None
    x: Any = None
    frames: list[tuple[Any, NDArray[np.int64]]] = []
    pieces, met = [], []
    for k, (a, b) in enumerate(pairwise(edges)):
        low, high = (float(v.detach() if isinstance(v, Tensor) else v) for v in (a, b))
        inner = [] if places is None or looks is None else [
            v for v, p in zip(looks, places, strict=True)
            if (sign * low < sign * p <= sign * high) or (k == 0 and p == low)
        ]  # fmt: skip
        ends = inner if inner and float(inner[-1]) == high else [*inner, b]
        more = whose if single else whose.select(alive)
        part = solve(
            _beside(f, low, high, jumps, dtype), y, a, b, solver=solver, args=more.marked["args"] if args else (),
            t_eval=ends if inner else None, event=event, dense=dense, batched=batched, throw=False, **settings,
        )  # fmt: skip
        states = part.x if inner else tree_map(lambda v: v[None], part.x)
        frames += [(tree_map(lambda v, j=j: v[j], states), alive) for j in range(len(inner))]
        last = tree_map(lambda v: v[-1], states)
        if dense:
            pieces += [p._replace(ids=alive[p.ids]) for p in part.dense.pieces]
        met.append([o._replace(sample=torch.from_numpy(alive)[o.sample]) for o in part.events])
        total = part if total is None else _merged(total, part, alive)
        x = last if k == 0 else tree_map(lambda whole, v, i=alive: _placed(whole, v, i, single), x, last)
        if dense and k == 0:
            opening = part.dense
        on = np.flatnonzero((part.status == Status.SUCCESS).numpy())
        alive, y = alive[on], last if single else tree_map(lambda v, on=on: take(v, on), last)
        if not len(alive):
            break
    assert total is not None
    events = tuple(_sorted([m[e] for m in met if len(m[e].t)] or [met[0][e]]) for e in range(len(met[0])))
    total = replace(total, x=x, events=events, dense=None)
    if dense:
        end = edges[-1].detach() if isinstance(edges[-1], Tensor) else edges[-1]
        total = replace(total, dense=opening.extended(pieces, total.t.detach().numpy(), float(end)))
    if looks is not None and places is not None:
        blank = tree_map(lambda v: torch.full_like(v, torch.nan), x)
        rows = [tree_map(lambda whole, v, i=i: _placed(whole, v, i, single), blank, frame) for frame, i in frames] + [
            blank
        ] * (len(places) - len(frames))
        stacked = tree_map(lambda *v: torch.stack(v), rows[0], *rows[1:])
        total = replace(total, x=stacked, t_eval=torch.tensor(places, dtype=torch.float64, device="cpu"))
    return total.raise_on_failure() if throw else total


def _finite(times: Any, name: str) -> list[float]:
    found = [] if times is None else [float(v) for v in times]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name} = {found}; expected finite times")
    return found


def _beside(f: Callable[..., Any], a: float, b: float, jumps: set[float], dtype: torch.dtype) -> Callable[..., Any]:
    """f, which is asked beside the ends of an interval where it jumps."""
    if a not in jumps and b not in jumps:
        return f
    low, high = (a, b) if a <= b else (b, a)
    near, far = (torch.tensor(v, dtype=dtype, device="cpu") for v in (low, high))
    least = float(torch.nextafter(near, far)) if low in jumps else -math.inf
    most = float(torch.nextafter(far, near)) if high in jumps else math.inf
    return lambda t, y, *more: f(t.clamp(least, most), y, *more)


def _placed(whole: Tensor, part: Tensor, index: NDArray[np.int64], single: bool) -> Tensor:
    if single or len(index) == len(whole):
        return part
    return whole.index_copy(0, torch.from_numpy(index).to(whole.device), part)


def _merged(total: Solution, part: Solution, index: NDArray[np.int64]) -> Solution:
    """The accounts of two solves, one after the other."""
    i = torch.from_numpy(index)
    sums = {n: getattr(total, n).index_add(0, i, getattr(part, n)) for n in ("nfe", "accepted", "rejected")}
    return replace(total, t=total.t.index_copy(0, i, part.t), status=total.status.index_copy(0, i, part.status), **sums)


def _sorted(parts: list[Occurrences]) -> Occurrences:
    who, t = torch.cat([p.sample for p in parts]), torch.cat([p.t for p in parts])
    order = torch.from_numpy(np.argsort(who.numpy(), kind="stable"))
    y = tree_map(lambda *v: torch.cat(v)[order.to(v[0].device)], parts[0].y, *[p.y for p in parts[1:]])
    return Occurrences(who[order], t[order], y)
