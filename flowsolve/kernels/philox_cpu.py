"""Normals from their addresses for the CPU, by numba: `flowsolve.kernels.philox` in chunks that fit the first cache.

Counters are laid out for a chunk of blocks, whichever rows they belong to, so that the two loops over it (words from
counters, normals from words) run through vector units for short rows as for long ones. LLVM vectorises them because
nothing in them is a call, a branch or a library's function; products of 32-bit words are those of 64-bit lanes whose
upper half is 0. No floating-point flags: results are the twin's, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numba import prange
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.kernels.cpu import _at, _compiled, _parts
from flowsolve.kernels.philox import FORMATS, LN2, MULTIPLIERS, WEYL

__all__ = ["normals", "probe"]

CHUNK = 256  # blocks of four words
COST = 8  # normals that take as long as what `cpu` calls a read: a second thread pays from a millisecond on
KNOWN = [1.0118, 0.4173, -0.8711]  # the first normals of sample 3 of key (1, 2) in interval 5

U32, U64, I32, I64, F32 = np.uint32, np.uint64, np.int32, np.int64, np.float32
LOW = U64(0xFFFFFFFF)
M0, M1 = (U64(m) for m in MULTIPLIERS)
W0, W1 = (U64(w) for w in WEYL)
SINGLE, DOUBLE = FORMATS[torch.float32], FORMATS[torch.float64]
A0, A1, A2 = (F32(c) for c in SINGLE.log)
S0, S1, S2, S3 = (F32(c) for c in SINGLE.sine)
C0, C1, C2, C3, C4 = (F32(c) for c in SINGLE.cosine)
D0, D1, D2, D3, D4, D5, D6 = DOUBLE.log
T0, T1, T2, T3, T4, T5, T6 = DOUBLE.sine
E0, E1, E2, E3, E4, E5, E6, E7 = DOUBLE.cosine
HALF32, HALF64 = I32(SINGLE.half), I64(DOUBLE.half)
MANTISSA32, MANTISSA64 = I32((1 << 23) - 1), I64((1 << 52) - 1)

_exact = partial(_compiled, fastmath=False)
_inline = partial(_exact, forceinline=True)  # a call would keep a loop from being vectorised
_split = partial(_exact, parallel=True)


@intrinsic
def _bits(typing: Any, value: Any, one: Any) -> Any:
    """The bits of a number as another of the type of `one`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return one(value, one), build


@_inline
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """A round, on words in 64 bits."""
    p0, p1 = (c0 & LOW) * M0, (c2 & LOW) * M1
    return (p1 >> U64(32)) ^ c1 ^ k0, p1 & LOW, (p0 >> U64(32)) ^ c3 ^ k1, p0 & LOW, (k0 + W0) & LOW, (k1 + W1) & LOW


@_inline
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Four words from a counter and a key, unrolled: a loop within would keep the one around it from its vectors."""
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3


@_exact
def _words(counters, out, n, low, high):  # type: ignore[no-untyped-def]
    """Words of n blocks in four rows of CHUNK, from counters laid out likewise: block, sample, and the two of a key."""
    given, made = _at(counters, U32(0)), _at(out, U32(0))
    for j in range(n):
        number, k0, k1 = U64(given[j + CHUNK]), U64(given[j + 2 * CHUNK]), U64(given[j + 3 * CHUNK])
        a, b, c, d = _philox(U64(given[j]), low, number, high, k0, k1)
        made[j], made[j + CHUNK], made[j + 2 * CHUNK], made[j + 3 * CHUNK] = U32(a), U32(b), U32(c), U32(d)


@_inline
def _pair32(first, second):  # type: ignore[no-untyped-def]
    """Two normals of float32 from two words; see `flowsolve.kernels.philox.gaussian`."""
    v = I32(first)
    sign = I32(v >> I32(31))
    p = (F32(I32(v ^ sign)) + F32(0.5)) * F32(2.0**-32)
    x = F32(1.0) - p if sign != 0 else p
    bits = I32(_bits(x, I32(0)) - HALF32)
    exponent = I32(bits >> I32(23))
    m = _bits(I32(I32(bits & MANTISSA32) + HALF32), F32(0.0))
    f = m - F32(1.0) if exponent != 0 else -p
    t = f / (f + F32(2.0))
    z = t * t
    log = (((A2 * z + A1) * z + A0) * z + F32(2.0)) * t
    radius = np.sqrt((log + F32(exponent) * F32(LN2)) * F32(-2.0))
    quarter = U32(U32(second + U32(1 << 29)) >> U32(30))
    y = (F32(I32(U32(second - U32(quarter << U32(30))))) + F32(0.5)) * F32(2.0**-30)
    z = y * y
    sine = (((S3 * z + S2) * z + S1) * z + S0) * y
    cosine = (((C4 * z + C3) * z + C2) * z + C1) * z + C0
    odd = (quarter & U32(1)) != 0
    a, b = sine if odd else cosine, cosine if odd else sine
    a = -a if (U32(quarter + U32(1)) & U32(2)) != 0 else a
    b = -b if (quarter & U32(2)) != 0 else b
    return a * radius, b * radius


@_inline
def _pair64(first, second):  # type: ignore[no-untyped-def]
    """Two normals of float64 from two words."""
    v = I32(first)
    sign = I32(v >> I32(31))
    p = (float(I32(v ^ sign)) + 0.5) * 2.0**-32
    x = 1.0 - p if sign != 0 else p
    bits = _bits(x, I64(0)) - HALF64
    exponent = bits >> I64(52)
    m = _bits((bits & MANTISSA64) + HALF64, 0.0)
    f = m - 1.0 if exponent != 0 else -p
    t = f / (f + 2.0)
    z = t * t
    log = (((((((D6 * z + D5) * z + D4) * z + D3) * z + D2) * z + D1) * z + D0) * z + 2.0) * t
    radius = np.sqrt((log + float(I32(exponent)) * LN2) * -2.0)
    quarter = U32(U32(second + U32(1 << 29)) >> U32(30))
    y = (float(I32(U32(second - U32(quarter << U32(30))))) + 0.5) * 2.0**-30
    z = y * y
    sine = ((((((T6 * z + T5) * z + T4) * z + T3) * z + T2) * z + T1) * z + T0) * y
    cosine = ((((((E7 * z + E6) * z + E5) * z + E4) * z + E3) * z + E2) * z + E1) * z + E0
    odd = (quarter & U32(1)) != 0
    a, b = sine if odd else cosine, cosine if odd else sine
    a = -a if (U32(quarter + U32(1)) & U32(2)) != 0 else a
    b = -b if (quarter & U32(2)) != 0 else b
    return a * radius, b * radius


@_exact
def _set32(words, out, n, weight):  # type: ignore[no-untyped-def]
    """4n numbers of out = weight · normals."""
    w, o = _at(words, U32(0)), _at(out, F32(0.0))
    for j in range(n):
        a, b = _pair32(w[j], w[j + CHUNK])
        c, d = _pair32(w[j + 2 * CHUNK], w[j + 3 * CHUNK])
        o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3] = weight * a, weight * b, weight * c, weight * d


@_exact
def _add32(words, out, n, weight):  # type: ignore[no-untyped-def]
    """4n numbers of out += weight · normals."""
    w, o = _at(words, U32(0)), _at(out, F32(0.0))
    for j in range(n):
        a, b = _pair32(w[j], w[j + CHUNK])
        c, d = _pair32(w[j + 2 * CHUNK], w[j + 3 * CHUNK])
        o[4 * j] += weight * a
        o[4 * j + 1] += weight * b
        o[4 * j + 2] += weight * c
        o[4 * j + 3] += weight * d


@_exact
def _set64(words, out, n, weight):  # type: ignore[no-untyped-def]
    w, o = _at(words, U32(0)), _at(out, 0.0)
    for j in range(n):
        a, b = _pair64(w[j], w[j + CHUNK])
        c, d = _pair64(w[j + 2 * CHUNK], w[j + 3 * CHUNK])
        o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3] = weight * a, weight * b, weight * c, weight * d


@_exact
def _add64(words, out, n, weight):  # type: ignore[no-untyped-def]
    w, o = _at(words, U32(0)), _at(out, 0.0)
    for j in range(n):
        a, b = _pair64(w[j], w[j + CHUNK])
        c, d = _pair64(w[j + 2 * CHUNK], w[j + 3 * CHUNK])
        o[4 * j] += weight * a
        o[4 * j + 1] += weight * b
        o[4 * j + 2] += weight * c
        o[4 * j + 3] += weight * d


@_exact
def _count(counters, n, start, blocks, table):  # type: ignore[no-untyped-def]
    """Lay out the counters of n blocks of the batch from number `start` on."""
    made, numbers = _at(counters, U32(0)), _at(table, I64(0))
    row, first, i = start // blocks, start % blocks, 0
    while i < n:
        m = min(n - i, blocks - first)
        number, k0, k1 = U32(numbers[3 * row]), U32(numbers[3 * row + 1]), U32(numbers[3 * row + 2])
        for j in range(m):
            made[i + j] = U32(first + j)
            made[i + j + CHUNK] = number
            made[i + j + 2 * CHUNK] = k0
            made[i + j + 3 * CHUNK] = k1
        i, row, first = i + m, row + 1, 0


@_exact
def _place(local, out, size, n, start, blocks, width):  # type: ignore[no-untyped-def]
    """Copy n blocks from number `start` on to rows that do not hold whole blocks; in words of 4 bytes."""
    each, i = size // 4, 0
    while i < n:
        row, first = (start + i) // blocks, (start + i) % blocks
        m = min(n - i, blocks - first)
        source = _at(local + 4 * i * size, U32(0))
        target = _at(out + (row * width + 4 * first) * size, U32(0))
        for j in range(min(4 * m, width - 4 * first) * each):
            target[j] = source[j]
        i += m


@_exact
def _part(out, size, width, table, stream, interval, weight, more, intervals, weights, start, stop):  # type: ignore[no-untyped-def]
    """Blocks start … stop of the batch: the normals of an interval, times its weight, and those of more of them."""
    others, factors = _at(intervals, I64(0)), _at(weights, 0.0)
    blocks = (width + 3) // 4
    work = np.empty(16 * CHUNK, dtype=np.uint32)
    counters = work.ctypes.data
    words, local = counters + 16 * CHUNK, counters + 32 * CHUNK
    whole = width % 4 == 0
    while start < stop:
        n = min(CHUNK, stop - start)
        _count(counters, n, start, blocks, table)
        target = out + 4 * start * size if whole else local
        for i in range(-1, more):
            address, w = (interval, weight) if i < 0 else (others[i], factors[i])
            _words(counters, words, n, U64(address) & LOW, U64(stream | (address >> 32) << 8) & LOW)
            if size == 4:
                if i < 0:
                    _set32(words, target, n, F32(w))
                else:
                    _add32(words, target, n, F32(w))
            elif i < 0:
                _set64(words, target, n, w)
            else:
                _add64(words, target, n, w)
        if not whole:
            _place(local, out, size, n, start, blocks, width)
        start += n


@_exact
def _normals(out, size, rows, width, table, stream, interval, weight, more, intervals, weights):  # type: ignore[no-untyped-def]
    total = rows * ((width + 3) // 4)
    _part(out, size, width, table, stream, interval, weight, more, intervals, weights, 0, total)


@_split
def _normals_split(parts, out, size, rows, width, table, stream, interval, weight, more, intervals, weights):  # type: ignore[no-untyped-def]
    total = rows * ((width + 3) // 4)
    for p in prange(parts):
        start, stop = total * p // parts, total * (p + 1) // parts
        _part(out, size, width, table, stream, interval, weight, more, intervals, weights, start, stop)


def normals(
    table: Tensor, stream: int, intervals: NDArray[np.int64] | int, weights: NDArray[np.float64] | float, like: Tensor
) -> Tensor:
    """Σ_i w_i ξ_i, or w ξ of one interval; see `flowsolve.kernels.normals`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    numbers, rows, more = out.numel(), out.shape[0], 0
    first, weight, others, factors = intervals, weights, 0, 0
    if not isinstance(intervals, int):
        assert not isinstance(weights, float)
        more, first, weight = len(intervals) - 1, int(intervals[0]), float(weights[0])
        others, factors = intervals[1:].ctypes.data, weights[1:].ctypes.data
    parts = _parts(numbers * (more + 1) // COST)
    size, table_at = 4 if out.dtype is torch.float32 else 8, table.data_ptr()
    width, out_at = numbers // rows, out.data_ptr()
    if parts:
        _normals_split(parts, out_at, size, rows, width, table_at, stream, first, weight, more, others, factors)
    else:
        _normals(out_at, size, rows, width, table_at, stream, first, weight, more, others, factors)
    return out


def probe() -> None:
    """Compile, or load, what small tensors need; raise if that cannot be done or a number is wrong."""
    table = torch.tensor([[3, 1, 2]], device="cpu")
    for dtype in FORMATS:
        found = normals(table, 0, 5, 1.0, torch.empty(1, 3, dtype=dtype, device="cpu")).tolist()[0]
        if not np.allclose(found, KNOWN, atol=1e-4):
            raise RuntimeError(f"the first normals of an interval came to {found}; expected {KNOWN}")
