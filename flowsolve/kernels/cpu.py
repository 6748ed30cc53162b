"""The kernels for the CPU, by numba: one pass over memory, in blocks that stay in the first cache.

A step is described by a *plan*, an array of integers: the size of its state and where in memory the state and its
slopes are. So a call passes few arguments, and one compiled function serves any number of slopes. The element type is
that of a scalar `one` in the inner functions. Large states are split over torch's number of threads where numba has a
threading layer that may be called from several threads at once. Sums of squares are kept in float64.

No product is fused with a sum and nothing but squares is added up in another order than the twins add it: every number
of a state has the bits that plain torch gives it, wherever it stands in a batch (`flowsolve.kernels.twin`).

Beside them stands the arithmetic of step control on the host (`aim` and `judge`), whose twin is
`flowsolve.kernels.control`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.kernels.control import (
    FINEST,
    LEAST,
    MAX_REJECTIONS,
    MAX_STEPS,
    NONFINITE,
    RESOLUTION,
    RUNNING,
    SUCCESS,
    UNDERFLOW,
)  # fmt: skip
from flowsolve.kernels.twin import largest

__all__ = ["advance", "aim", "error_norm", "judge", "merge", "plan", "probe"]

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

SIZE, NUMBERS, WIDTH, STATE, PARTS, FIRST = range(6)  # entries of a plan; the slopes from FIRST on
BLOCK = 2048
NARROW = 8
SPLIT = 1 << 16  # numbers to read for which a second thread pays
MOST = 16  # slopes of a step
VACANT = np.zeros(FIRST + MOST, dtype=np.int64)
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
TINY = {dtype: torch.finfo(dtype).tiny for dtype in DTYPES}
REORDERED = {"reassoc"}  # of squares in float64, whose sum is rounded to float32 in the end

PROCESS = os.getpid()
THREADED = any(find_spec(f"numba.np.ufunc.{layer}") for layer in ("tbbpool", "omppool"))


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function compiled on first use, and kept on disk where there is a place for it."""
    settings = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **settings)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no directory can be written to
        return numba.njit(**settings)(function)  # type: ignore[no-any-return]


_split = partial(_compiled, parallel=True)
_squared = partial(_compiled, fastmath=REORDERED)


@intrinsic
def _at(typing: Any, address: Any, one: Any) -> Any:
    """A pointer to numbers of the type of `one`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(one)(address, one), build


@intrinsic
def _as(typing: Any, value: Any, one: Any) -> Any:
    """A number in the type of `one`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], signature.args[0], signature.args[1])

    return one(value, one), build


@_compiled
def _accumulate(one, n, out, base, offset, plan, stages, weights, h):  # type: ignore[no-untyped-def]
    """n numbers of out = base + Σ (h w) k, from an offset in bytes into the plan's slopes."""
    m = stages.size
    if m == 0:
        for i in range(n):
            out[i] = base[i]
    j = 0
    while j < m:  # three streams at a time, added in their order
        k0, w0 = _at(plan[FIRST + stages[j]] + offset, one), _as(h * weights[j], one)
        if j + 2 < m:
            k1, w1 = _at(plan[FIRST + stages[j + 1]] + offset, one), _as(h * weights[j + 1], one)
            k2, w2 = _at(plan[FIRST + stages[j + 2]] + offset, one), _as(h * weights[j + 2], one)
            for i in range(n):
                out[i] = ((base[i] + w0 * k0[i]) + w1 * k1[i]) + w2 * k2[i]
            j += 3
        elif j + 1 < m:
            k1, w1 = _at(plan[FIRST + stages[j + 1]] + offset, one), _as(h * weights[j + 1], one)
            for i in range(n):
                out[i] = (base[i] + w0 * k0[i]) + w1 * k1[i]
            j += 2
        else:
            for i in range(n):
                out[i] = base[i] + w0 * k0[i]
            j += 1
        base = out


@_compiled
def _accumulate_rows(one, width, n, out, base, spread, first, plan, stages, weights, h):  # type: ignore[no-untyped-def]
    """The same for short rows: n numbers of out from number `first` on, with each row's h w spread over its numbers."""
    offset = first * plan[SIZE]
    if stages.size == 0:
        for i in range(n):
            out[i] = base[i]
    for j in range(stages.size):
        row, i = first // width, 0
        while i < n:
            w = _as(h[row if h.size > 1 else 0] * weights[row if weights.shape[0] > 1 else 0, j], one)
            row += 1
            stop = min(n, row * width - first)
            while i < stop:
                spread[i] = w
                i += 1
        k = _at(plan[FIRST + stages[j]] + offset, one)
        for i in range(n):
            out[i] = base[i] + spread[i] * k[i]
        base = out


@_compiled
def _advance_part(one, plan, work, out, h, stages, weights, first, last):  # type: ignore[no-untyped-def]
    """Numbers first … last of y + h Σ w k."""
    size, width = plan[SIZE], plan[WIDTH]
    spread = _at(work.ctypes.data, one)
    i = first
    while width <= NARROW and h.size > 1 and i < last:
        n, offset = min(BLOCK, last - i), i * size
        base = _at(plan[STATE] + offset, one)
        _accumulate_rows(one, width, n, _at(out + offset, one), base, spread, i, plan, stages, weights, h)
        i += n
    while i < last:
        row = i // width
        n = min(BLOCK, last - i, (row + 1) * width - i)
        offset = i * size
        step = h[row if h.size > 1 else 0]
        w = weights[row if weights.shape[0] > 1 else 0]
        _accumulate(one, n, _at(out + offset, one), _at(plan[STATE] + offset, one), offset, plan, stages, w, step)
        i += n


@_compiled
def _advance(plan, work, out, h, stages, weights):  # type: ignore[no-untyped-def]
    if plan[SIZE] == 4:
        _advance_part(np.float32(1.0), plan, work[0], out, h, stages, weights, 0, plan[NUMBERS])
    else:
        _advance_part(1.0, plan, work[0], out, h, stages, weights, 0, plan[NUMBERS])


@_split
def _advance_split(plan, work, out, h, stages, weights):  # type: ignore[no-untyped-def]
    parts, numbers = plan[PARTS], plan[NUMBERS]
    for p in prange(parts):
        first, last = numbers * p // parts, numbers * (p + 1) // parts
        if plan[SIZE] == 4:
            _advance_part(np.float32(1.0), plan, work[p], out, h, stages, weights, first, last)
        else:
            _advance_part(1.0, plan, work[p], out, h, stages, weights, first, last)


@_squared
def _squares(local, first, last):  # type: ignore[no-untyped-def]
    """The sum of their squares."""
    total = 0.0
    for k in range(first, last):
        v = np.float64(local[k])
        total += v * v
    return total


@_compiled
def _error_part(one, plan, work, totals, ahead, h, stages, weights, tolerances, maximum, first, last):  # type: ignore[no-untyped-def]
    """Add up squares, or keep the largest, of numbers first … last of the scaled error: one total a row."""
    size, width = plan[SIZE], plan[WIDTH]
    atol, rtol, tiny = _as(tolerances[0], one), _as(tolerances[1], one), _as(tolerances[2], one)
    local, zero = _at(work[0].ctypes.data, one), _at(work[1].ctypes.data, one)
    spread = _at(work[2].ctypes.data, one)
    short = width <= NARROW and h.size > 1
    i = first
    while i < last:
        row = i // width
        n = min(BLOCK, last - i, last if short else (row + 1) * width - i)
        offset = i * size
        a, b = _at(plan[STATE] + offset, one), _at(ahead + offset, one)
        if short:
            _accumulate_rows(one, width, n, local, zero, spread, i, plan, stages, weights, h)
        else:
            step = h[row if h.size > 1 else 0]
            w = weights[row if weights.shape[0] > 1 else 0]
            _accumulate(one, n, local, zero, offset, plan, stages, w, step)
        for j in range(n):  # an infinite state is an infinite error, whatever the scale: ∞ · 0 is not a number
            local[j] = (local[j] + b[j] * _as(0.0, one)) / max(atol + rtol * max(abs(a[j]), abs(b[j])), tiny)
        j = 0
        while j < n:
            stop = min(n, (row + 1) * width - i)
            if maximum:
                most = totals[row]
                for k in range(j, stop):
                    v = abs(np.float64(local[k]))
                    if v > most or v != v:
                        most = v
                totals[row] = most
            else:
                totals[row] += _squares(local, j, stop)
            j, row = stop, row + 1
        i += n


@_compiled
def _error(plan, work, totals, ahead, h, stages, weights, tolerances, maximum):  # type: ignore[no-untyped-def]
    n = plan[NUMBERS]
    totals[:] = 0.0
    work[:] = 0
    if plan[SIZE] == 4:
        one = np.float32(1.0)
        _error_part(one, plan, work[0], totals[0], ahead, h, stages, weights, tolerances, maximum, 0, n)
    else:
        _error_part(1.0, plan, work[0], totals[0], ahead, h, stages, weights, tolerances, maximum, 0, n)
    if not maximum:
        for row in range(totals.shape[1]):
            totals[0, row] = np.sqrt(totals[0, row] / plan[WIDTH])


@_split
def _error_split(plan, work, totals, ahead, h, stages, weights, tolerances, maximum):  # type: ignore[no-untyped-def]
    parts, numbers = plan[PARTS], plan[NUMBERS]
    totals[:] = 0.0
    work[:] = 0
    for p in prange(parts):
        i, j = numbers * p // parts, numbers * (p + 1) // parts
        if plan[SIZE] == 4:
            one = np.float32(1.0)
            _error_part(one, plan, work[p], totals[p], ahead, h, stages, weights, tolerances, maximum, i, j)
        else:
            _error_part(1.0, plan, work[p], totals[p], ahead, h, stages, weights, tolerances, maximum, i, j)


@_compiled
def _merge(out, accepted, new, old, words):  # type: ignore[no-untyped-def]
    """Rows of so many 4-byte words, of `new` where accepted, of `old` elsewhere."""
    one = np.uint32(1)
    for row in range(accepted.size):
        offset = row * words * 4
        target, source = _at(out + offset, one), _at((new if accepted[row] else old) + offset, one)
        for j in range(words):
            target[j] = source[j]


@_compiled
def aim(real, s_end, c):  # type: ignore[no-untyped-def]
    """See `flowsolve.kernels.control.aim`."""
    count = real.shape[1]
    h, s_next, nodes = np.empty(count), np.empty(count), np.empty((c.size, count))
    for b in range(count):
        s, planned = real[0, b], real[1, b]
        left = s_end - s
        arrives = abs(planned) * 1.000001 >= abs(left)
        h[b] = left if arrives else planned
        s_next[b] = s_end if arrives else s + planned
        for i in range(c.size):
            nodes[i, b] = s_next[b] if c[i] == 1.0 else s + c[i] * h[b]
    return h, s_next, nodes


@_compiled
def judge(error, real, counts, h, s_next, s_end, law):  # type: ignore[no-untyped-def]
    """See `flowsolve.kernels.control.judge`."""
    safety, lowest, highest, opening, beta1, beta2, beta3, elementary = law[:8]
    min_step, max_step, max_steps, max_rejections, nfe = law[8:13]
    count = error.size
    accepted = np.empty(count, dtype=np.bool_)
    after, tally = np.empty_like(real), counts.copy()
    passed, ended = 0, 0
    for b in range(count):
        e, s, planned, step = error[b], real[0, b], real[1, b], h[b]
        good = e <= 1.0
        finite = np.isfinite(e)
        arrives = s_next[b] == s_end
        log_error = np.float64(np.float32(np.log(max(e if finite else 1.0, FINEST))))
        factor = 0.1
        if good:
            power = -beta1 * log_error - beta2 * real[2, b] - beta3 * real[3, b]
            factor = min(
                safety * np.float64(np.float32(np.exp(power))), opening if tally[0, b] + tally[1, b] == 0 else highest
            )
            factor = max(factor, lowest)
        elif finite:
            factor = max(min(safety * np.float64(np.float32(np.exp(-elementary * log_error))), 1.0), lowest)
        if tally[2, b] > 0:
            factor = min(factor, 1.0)
        size = abs(step * factor)
        if good and arrives:
            size = max(size, abs(planned))
        size = min(size, max_step)
        stuck = size <= RESOLUTION * max(abs(s), abs(s_end)) or (not good and size < min_step)
        size = max(size, min_step)
        after[1, b] = size if step >= 0.0 else -size
        if good:
            after[0, b] = s_next[b]
            after[2, b] = max(log_error, LEAST)
            after[3, b] = real[2, b]
            tally[0, b] += 1
            tally[2, b] = 0
            passed += 1
        else:
            after[0, b] = s
            after[2, b] = real[2, b]
            after[3, b] = real[3, b]
            tally[1, b] += 1
            tally[2, b] += 1
        tally[3, b] += int(nfe)
        status = tally[4, b]
        if tally[0, b] + tally[1, b] >= max_steps:
            status = MAX_STEPS
        if tally[2, b] >= max_rejections:
            status = MAX_REJECTIONS
        if stuck:
            status = UNDERFLOW if finite else NONFINITE
        if good and arrives:
            status = SUCCESS
        tally[4, b] = status
        accepted[b] = good
        ended += status != RUNNING
    return accepted, passed, ended, after, tally


def plan(y: Tensor) -> Indices:
    """The plan of a step from y, without slopes."""
    numbers = y.numel()
    made = VACANT.copy()
    made[:FIRST] = y.element_size(), numbers, numbers // len(y), y.data_ptr(), _parts(numbers * 4)
    return made


def advance(y: Tensor, plan: Indices, h: Vector, stages: Indices, weights: Vector) -> Tensor:
    """y + h Σ_j w_j k_j; see `flowsolve.kernels.Slopes.advance`."""
    out, parts = torch.empty_like(y), int(plan[PARTS])
    spread = int(plan[WIDTH]) <= NARROW and len(h) > 1
    work = np.empty((parts or 1, min(BLOCK, y.numel()) if spread else 1))
    (_advance_split if parts else _advance)(plan, work, out.data_ptr(), h, stages, weights)
    return out


def error_norm(
    y: Tensor,
    plan: Indices,
    h: Vector,
    stages: Indices,
    weights: Vector,
    ahead: Tensor,
    atol: float,
    rtol: float,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The norm of the local error in units of the tolerance; see `flowsolve.kernels.Slopes.error_norm`."""
    parts, maximum, dtype, width = int(plan[PARTS]), norm is largest, DTYPES[y.dtype], int(plan[WIDTH])
    totals = np.empty((parts or 1, len(y)))
    work = np.empty((parts or 1, 3, min(BLOCK, y.numel())), dtype=dtype)
    tolerances = (atol, rtol, TINY[y.dtype])
    if not parts:
        _error(plan, work, totals, ahead.data_ptr(), h, stages, weights, tolerances, maximum)
        return torch.from_numpy(totals[0])
    _error_split(plan, work, totals, ahead.data_ptr(), h, stages, weights, tolerances, maximum)
    return torch.from_numpy(totals.max(0) if maximum else np.sqrt(totals.sum(0) / width))


def merge(accepted: NDArray[np.bool_], new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where accepted, those of `old` elsewhere."""
    out = torch.empty_like(old)
    words = old.numel() // len(old) * old.element_size() // 4
    _merge(out.data_ptr(), accepted, new.data_ptr(), old.data_ptr(), words)
    return out


def probe() -> None:
    """Compile, or load, what small states need; raise if that cannot be done."""
    ones, first = np.ones((1, 1)), np.zeros(1, dtype=np.int64)
    for dtype in DTYPES:
        v = torch.ones(1, 3, dtype=dtype, device="cpu")
        step = plan(v)
        step[FIRST] = v.data_ptr()
        error_norm(v, step, ones[0], first, ones, advance(v, step, ones[0], first, ones), 1.0, 1.0, largest)
        merge(np.array([True]), v, v)


def _parts(work: int) -> int:
    """The number of threads to split that many reads over; 0 for a call without threads.

    A forked child must not touch the threads of its parent.
    """
    if work < SPLIT or not THREADED or os.getpid() != PROCESS:
        return 0
    threads = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))
    if threads < 2:
        return 0
    numba.set_num_threads(threads)
    return threads
