"""`tune`: trajectories, search, coefficients and times, and what comes of them on noise that was held out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve import _version
from flowsolve._arguments import check_flow, device_of, shape_of
from flowsolve._batch import rows
from flowsolve.conditioning import rows_of, settled
from flowsolve.fingerprint import marks
from flowsolve.flow import Flow
from flowsolve.planning import estimates
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.fitted import Fitted, Tuned
from flowsolve.tuning import search
from flowsolve.tuning.fitting import RIDGES, fit, weights_of
from flowsolve.tuning.refining import refine
from flowsolve.tuning.result import Row, Tuning
from flowsolve.tuning.search import Generic, typical
from flowsolve.tuning.trajectories import Trajectories, converged, march, relative

__all__ = ["STAGES", "tune"]

STAGES = ("grid", "coefficients", "both")
FEWEST = 4
STARTS, NEAR, FIRST = 2, 1.5, 0.65
"""Generic solvers that are fitted from, how near the second must be to the best, and the share of the first in time."""
LEAST, NUMBERS, ROUNDS = 6, 2048, 6
"""The samples at least that times are moved on, and the numbers in them (or 32 samples), and the rounds that there
should be time for."""
SHARES = {"trajectories": 0.3, "search": 0.25}
"""Of the minutes what trajectories may take; of a budget's share of the rest, what its search may."""

Tell = Callable[[str], object]


@dataclass(frozen=True)
class _Sets:
    """Trajectories to fit on, to choose on, and to judge on."""

    fitted: Trajectories
    chosen: Trajectories
    judged: Trajectories


def tune(
    flow: Flow,
    shape: Sequence[int] | None = None,
    *,
    nfe: int | Sequence[int] = (4, 6, 8, 10),
    minutes: float = 5.0,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    stages: str = "both",
    evaluations: int = 96,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool | Tell = False,
) -> Tuning:
    """Fit solvers to one checkpoint.

    Args:
        flow: the flow; under guidance, the guided one: another scale is another flow.
        shape: (B, *S): B trajectories to fit on, and half as many each to choose and to judge on; 64 is enough.
        nfe: the budgets, in network evaluations of a sample.
        minutes: what it may take, about; with less time fewer trajectories are made (4 at least) and less is tried.
        cond: the network's conditions, as in `fs.sample`, for B samples; those to choose and judge on have them again.
        seed: of the noise.
        stages: "grid" (times alone), "coefficients" (on the generic solver's times) or "both".
        evaluations: of a converged trajectory.
        cache: a folder in which converged trajectories are kept, so that the next call need not make them again.
        device: where to solve; by default where the network is.
        progress: print what is going on, or a function that is told.

    Returns:
        A `flowsolve.tuning.Tuning`: `.solver` for `fs.sample`, `.save(file)` for `fs.solvers.load(file)`, and the
        figures on held-out noise, `.rows` or as text. A tuned solver that was not better than the best generic one on
        the noise to choose on is replaced by it.

    Raises:
        ValueError: fewer than 4 samples, a budget that is no number of estimates or less than 2 of them, an unknown
            stage, or a flow whose converged solve fails.
        TypeError: something that is no flow.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> tuning = fs.tune(flow, (16, 1), nfe=4, minutes=0.2, evaluations=64)
        >>> fs.sample(flow, (2, 1), solver=tuning.solver, nfe=4).nfe
        tensor([4, 4])
        >>> tuning.rows[0].ratio < 1.0
        True
    """
    check_flow(flow, cond)
    sizes = shape_of(shape)
    if sizes[0] < FEWEST:
        raise ValueError(f"shape = {sizes}; expected at least {FEWEST} samples to fit on (64 is enough)")
    if stages not in STAGES:
        raise ValueError(f"stages = {stages!r}; expected one of {', '.join(STAGES)}")
    if not 0.0 < minutes < math.inf:
        raise ValueError(f"minutes = {minutes!r}; expected a finite number > 0")
    budgets = sorted({*([nfe] if isinstance(nfe, int) else nfe)})
    counts = [int(estimates(n, flow) or 0) for n in budgets]
    if not counts or min(counts) < 2:
        raise ValueError(f"nfe = {nfe!r}; expected budgets of at least 2 estimates, each of {flow.nfe_per_call}")
    tell: Tell = progress if callable(progress) else print if progress else lambda text: None
    began, place = time.perf_counter(), device or device_of(flow.net)
    with torch.no_grad():
        sets = _sets(flow, sizes, cond, seed, evaluations, cache, place, 60.0 * minutes * SHARES["trajectories"], tell)
        fits, rows = [], []
        for i, n in enumerate(counts):
            left = 60.0 * minutes - (time.perf_counter() - began)
            share = max(left, 0.1 * 60.0 * minutes) * n / sum(counts[i:])
            made, row = _budget(sets, n, share, stages, seed, _numbered(tell, n))
            fits.append(made)
            rows.append(replace(row, nfe=budgets[i]))
    found = marks(flow)
    own = tuple(sorted(found.items()))
    provenance = {
        "flowsolve": _version.__version__, "torch": str(torch.__version__), "seed": seed, "stages": stages,
        "shape": list(sizes[1:]), "fitted": len(sets.fitted), "chosen": len(sets.chosen), "judged": len(sets.judged),
        "evaluations": evaluations, "minutes": minutes, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return Tuning(Tuned(fits=tuple(replace(f, marks=own) for f in fits)), tuple(rows), found, provenance)


def _numbered(tell: Tell, n: int) -> Tell:
    return lambda text: tell(f"{n:3d} evaluations: {text}")


def _sets(
    flow: Flow,
    shape: tuple[int, ...],
    cond: Mapping[str, Any] | None,
    seed: int,
    evaluations: int,
    cache: Any,
    place: Any,
    seconds: float,
    tell: Tell,
) -> _Sets:
    """The three sets, shortened alike if time is up before all are made."""
    count, event = shape[0], shape[1:]
    end = time.perf_counter() + seconds
    # one solve, of which the last half are to choose and to judge on: with less time all three are smaller
    whole = converged(
        flow, (2 * count, *event), cond=_twice(flow, cond, count), seed=seed, evaluations=evaluations, cache=cache,
        device=place, tell=lambda made, of: tell(f"converged trajectories: {made} of {of}"),
        until=lambda: time.perf_counter() > end,
    )  # fmt: skip
    made = len(whole)
    half, quarter = made - 2 * (made // 4), made // 4
    return _Sets(whole.take(0, half), whole.take(half, half + quarter), whole.take(half + quarter, made))


def _twice(flow: Flow, cond: Mapping[str, Any] | None, count: int) -> Mapping[str, Any] | None:
    """Conditions of 2B samples from those of B."""
    if cond is None:
        return None
    again = np.arange(2 * count) % count
    return {k: rows_of(v, again) for k, v in settled(cond, count).items()}


def _budget(sets: _Sets, n: int, seconds: float, stages: str, seed: int, tell: Tell) -> tuple[Fitted, Row]:
    """The solver for N estimates, and its figures."""
    begun = time.perf_counter()

    def late(share: str) -> Callable[[], bool]:
        return lambda: time.perf_counter() - begun > seconds * SHARES[share]

    def ending() -> bool:
        return time.perf_counter() - begun > 0.9 * seconds

    flow, data = sets.fitted.flow, sets.fitted
    ranked = search.best(data, n, lambda text: tell(f"generic {text}"), late("search"), seed)

    def errors(solver: Any, times: Sequence[float], on: Trajectories) -> Tensor:
        return relative(march(solver, flow, times, on.start, on.context), on.end)

    placed = [(pair, times) for _, pair in ranked if (times := pair.times(flow, n)) is not None]
    on_choice = [typical(errors(pair.solver, times, sets.chosen)) for pair, times in placed]
    first = min(range(len(placed)), key=lambda i: on_choice[i])
    generic, times = placed[first]
    best: tuple[float, Fitted] = (on_choice[first], Fitted(generic.solver, times))
    kept = "generic"

    def offer(made: Fitted, what: str) -> float:
        nonlocal best, kept
        error = typical(errors(made, made.times, sets.chosen))
        if error < best[0]:
            best, kept = (error, made), "tuned"
        tell(f"{what} {error:.3g}, best {best[0]:.3g} (generic {on_choice[first]:.3g})")
        return error

    starts = [
        (generic, times),
        *(p for i, p in enumerate(placed) if i != first and on_choice[i] < NEAR * on_choice[first]),
    ]
    for i, (pair, nodes) in enumerate(starts[:STARTS]):
        now = time.perf_counter()
        if ending():
            break
        end = now + (begun + 0.9 * seconds - now) * (FIRST if i == 0 and len(starts) > 1 else 1.0)
        omega = weights_of(data, errors(pair.solver, nodes, data))
        tried = []
        for ridge in RIDGES if stages != "grid" else ():
            now = time.perf_counter()
            made, _ = fit(pair.solver, nodes, data, ridge, omega)
            cost = (time.perf_counter() - now) / len(data)
            tried.append((offer(made, f"coefficients (ridge {ridge:g})"), ridge, cost))
            if time.perf_counter() > end:
                break
        if stages == "grid":
            now = time.perf_counter()
            errors(pair.solver, nodes, data)
            tried = [(0.0, math.nan, (time.perf_counter() - now) / len(data))]
        if stages != "coefficients":
            _refined(pair, nodes, data, omega, min(tried)[1:], end, offer)
    chosen: Any = Auto().choose(flow.path, n)
    auto_times = Generic(*chosen).times(flow, n)
    auto = typical(errors(chosen[0], auto_times, sets.judged)) if auto_times else math.nan
    before = errors(generic.solver, times, sets.judged)
    after = errors(best[1], best[1].times, sets.judged)
    gain = after.clamp_min(1e-300).log() - before.clamp_min(1e-300).log()
    spread = float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else 0.0
    row = Row(
        n, auto, typical(before), typical(after), math.exp(float(gain.mean())), spread,
        (float(before.median()), float(after.median())), str(generic), kept, len(gain),
    )  # fmt: skip
    return best[1], row


def _refined(
    pair: Generic,
    times: Sequence[float],
    data: Trajectories,
    omega: Tensor,
    known: tuple[float, float],
    end: float,
    offer: Callable[[Fitted, str], float],
) -> None:
    """Offer what comes of moving the times, with the coefficients or alone.

    The times are moved on as many samples as a few rounds leave time for, and the coefficients then fitted on all.

    Args:
        known: the ridge, NaN for no coefficients, and the seconds that a solve takes for each sample.
        end: when to be done.
    """
    ridge, cost = known
    left = end - time.perf_counter()
    count = int(left / (ROUNDS * (0.5 * len(times) + 2) * cost)) if cost else len(data)
    least = max(LEAST, min(32, NUMBERS // rows(data.end).shape[1]))
    some = data.take(0, max(least, count))
    weights = omega[: len(some)]

    memory: dict[tuple[float, ...], Any] = {}

    def make(at: Sequence[float], on: Trajectories = some, ruled: Tensor = weights) -> tuple[Fitted, Tensor]:
        if not math.isnan(ridge):
            return fit(pair.solver, at, on, ridge, ruled, memory=memory)
        return Fitted(pair.solver, tuple(at)), march(pair.solver, on.flow, at, on.start, on.context, memory=memory)

    stop = end - 2.0 * cost * len(data)
    made, error = refine(make, times, some, weights, typical, late=lambda: time.perf_counter() > stop)
    if math.isnan(ridge):
        offer(made, f"times ({error:.3g} where fitted):")
        return
    off = relative(march(made, data.flow, made.times, data.start, data.context), data.end)
    made, _ = fit(pair.solver, made.times, data, ridge, weights_of(data, off))
    offer(made, f"times ({error:.3g} where fitted):")
