"""Normals from their addresses for CUDA, by Triton: `flowsolve.kernels.philox` in one launch for up to TERMS intervals.

A program computes 256 blocks of four words, whichever rows they belong to, and writes their 1024 numbers in one piece.
What is asked for travels as arguments: nothing is sent to the device, so that steps can be captured as CUDA graphs.
Quotients and roots are those of IEEE 754 and nothing is contracted (`enable_fp_fusion=False`): results are the twin's,
bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.kernels.cuda import INTERPRETED, KINDS, _bits, _float, _on, launch

__all__ = ["normals", "probe"]

TERMS = 8  # intervals of a launch
BLOCKS = 256
KNOWN = [1.0118, 0.4173, -0.8711]  # the first normals of sample 3 of key (1, 2) in interval 5

ARGUMENTS = (  # integers of whatever value: without this, kernels would be compiled again for 1 and for multiples of 16
    "out", "table", "stream", "width", "rows", *(f"i{j}" for j in range(TERMS)), *(f"w{j}" for j in range(TERMS)),
)  # fmt: skip


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
    low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
    return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0, k0 + 0x9E3779B9, k1 + 0xBB67AE85


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in tl.static_range(10):
        c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3


@triton.jit
def _pair(first, second, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two normals from two words; see `flowsolve.kernels.philox.gaussian`."""
    v = first.to(tl.int32, bitcast=True)
    sign = v >> 31
    p = ((v ^ sign).to(KIND) + 0.5) * 2.3283064365386963e-10  # 2⁻³²
    x = tl.where(sign != 0, 1.0 - p, p)
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
        exponent = bits >> 23
        m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    else:
        bits = x.to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD
        exponent = bits >> 52
        m = ((bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).to(tl.float64, bitcast=True)
    f = tl.where(exponent == 0, -p, m - 1.0)
    quarter = (second + 0x20000000) >> 30
    y = ((second - (quarter << 30)).to(tl.int32, bitcast=True).to(KIND) + 0.5) * 9.313225746154785e-10  # 2⁻³⁰
    u = y * y
    if x.dtype == tl.float32:
        t = tl.div_rn(f, f + 2.0)
        z = t * t
        log = ((0.2957994939197279 * z + 0.3998878056602198) * z + 0.6666668503957586) * z
        sine = ((-0.004602149212814176 * u + 0.07968021764775542) * u - 0.6459634776648118) * u + 1.5707963219532366
        cosine = (0.0009036280663802505 * u - 0.02086006950026408) * u + 0.2536692036551135
        cosine = (cosine * u - 1.2337005406331623) * u + 0.9999999999524894
    else:
        t = f / (f + 2.0)
        z = t * t
        log = (0.14616449685043406 * z + 0.15331721600556042) * z + 0.18182889125261723
        log = ((log * z + 0.2222221113479508) * z + 0.28571428625975487) * z + 0.39999999999899505
        log = (log * z + 0.666666666666667) * z
        sine = (5.633933781537854e-08 * u - 3.59864335298231e-06) * u + 0.0001604411507421909
        sine = ((sine * u - 0.004681754132340976) * u + 0.07969262624604301) * u - 0.6459640975062443
        sine = sine * u + 1.5707963267948966
        cosine = (-6.321256869628588e-09 * u + 4.710609726757823e-07) * u - 2.520203677046026e-05
        cosine = ((cosine * u + 0.0009192602741831558) * u - 0.02086348076331121) * u + 0.2536695079010467
        cosine = (cosine * u - 1.2337005501361697) * u + 1.0
    square = ((log + 2.0) * t + exponent.to(KIND) * 0.6931471805599453) * -2.0
    radius = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
    sine = sine * y
    odd = (quarter & 1) != 0
    a, b = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    a = tl.where(((quarter + 1) & 2) != 0, -a, a)
    b = tl.where((quarter & 2) != 0, -b, b)
    return a * radius, b * radius


@triton.jit
def _term(total, block, number, k0, k1, stream, interval, weight, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + weight · the normals of an interval, in the order in which they are stored."""
    low, high = interval.to(tl.uint32), (stream.to(tl.int64) | ((interval.to(tl.int64) >> 32) << 8)).to(tl.uint32)
    w0, w1, w2, w3 = _philox(block, tl.zeros_like(block) + low, number, tl.zeros_like(block) + high, k0, k1)
    a, b = _pair(w0, w1, KIND)
    c, d = _pair(w2, w3, KIND)
    normals = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return total + _float(weight, KIND) * normals


@triton.jit(do_not_specialize=ARGUMENTS)
def _normals(  # type: ignore[no-untyped-def]
    out: tl.int64, table: tl.int64, stream: tl.int64, width: tl.int64, rows: tl.int64,
    i0: tl.int64, i1: tl.int64, i2: tl.int64, i3: tl.int64, i4: tl.int64, i5: tl.int64, i6: tl.int64, i7: tl.int64,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    M: tl.constexpr, ADD: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    blocks = (width + 3) // 4
    start = tl.program_id(0).to(tl.int64) * N
    place = start + tl.arange(0, N)
    row = place // blocks
    exists = row < rows
    source = table.to(tl.pointer_type(tl.int64)) + 3 * row
    number = tl.load(source, mask=exists, other=0).to(tl.uint32)
    k0 = tl.load(source + 1, mask=exists, other=0).to(tl.uint32)
    k1 = tl.load(source + 2, mask=exists, other=0).to(tl.uint32)
    block = (place - row * blocks).to(tl.uint32)

    lane = tl.arange(0, 4 * N)
    its = start + lane // 4
    its_row = its // blocks
    column = (its - its_row * blocks) * 4 + lane % 4
    target = out.to(tl.pointer_type(KIND)) + its_row * width + column
    inside = (its_row < rows) & (column < width)
    total = tl.load(target, mask=inside, other=0.0) if ADD else tl.zeros([4 * N], KIND)
    total = _term(total, block, number, k0, k1, stream, i0, w0, KIND)
    if M > 1:
        total = _term(total, block, number, k0, k1, stream, i1, w1, KIND)
        total = _term(total, block, number, k0, k1, stream, i2, w2, KIND)
        total = _term(total, block, number, k0, k1, stream, i3, w3, KIND)
        total = _term(total, block, number, k0, k1, stream, i4, w4, KIND)
        total = _term(total, block, number, k0, k1, stream, i5, w5, KIND)
        total = _term(total, block, number, k0, k1, stream, i6, w6, KIND)
        total = _term(total, block, number, k0, k1, stream, i7, w7, KIND)
    tl.store(target, total, mask=inside)


def normals(
    table: Tensor, stream: int, intervals: NDArray[np.int64] | int, weights: NDArray[np.float64] | float, like: Tensor
) -> Tensor:
    """Σ_i w_i ξ_i, or w ξ of one interval; see `flowsolve.kernels.normals`."""
    out, rows = torch.empty_like(like, memory_format=torch.contiguous_format), len(like)
    width, kind = out.numel() // rows, KINDS[like.dtype]
    each: Any = [intervals] if isinstance(intervals, int) else intervals.tolist()
    bits = _bits(weights if isinstance(weights, np.ndarray) else (weights,))
    head, programs = (out.data_ptr(), table.data_ptr(), stream, width, rows), -(-rows * -(-width // 4) // BLOCKS)
    with _on(like.device):
        for first in range(0, len(each), TERMS):
            i, w = each[first : first + TERMS], bits[first : first + TERMS]
            spare = (0,) * (TERMS - len(i))  # of weight 0
            constants = (1 if len(i) == 1 else TERMS, first > 0, kind, BLOCKS)
            launch(_normals, programs, (*head, *i, *spare, *w, *spare), constants, enable_fp_fusion=False)
    return out


def probe() -> None:
    """Compile and run something small on the current device; raise if that cannot be done or a number is wrong."""
    device = "cpu" if INTERPRETED else "cuda"
    table, like = torch.tensor([[3, 1, 2]], device=device), torch.empty(1, 3, device=device)
    for _ in range(2):  # compiled and launched, then launched directly
        found = normals(table, 0, 5, 1.0, like).tolist()[0]
        if not np.allclose(found, KNOWN, atol=1e-4):
            raise RuntimeError(f"the first normals of an interval came to {found} on {device}; expected {KNOWN}")
