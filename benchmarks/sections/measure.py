"""Timing: solvers in turn, many times over, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["interleaved", "quartiles", "ratio", "target"]


def interleaved(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every case in every repetition; all run once before, and in each repetition another one is first."""
    names = list(cases)
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    q1, median, q3 = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratio, taken repetition by repetition."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def target(name: str, value: float | None, limit: float) -> dict[str, Any]:
    """A figure that is to stay at or below a limit, and whether it does."""
    return {"name": name, "value": value, "limit": limit, "met": None if value is None else value <= limit}
