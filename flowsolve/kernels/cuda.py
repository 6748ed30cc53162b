r"""The kernels for CUDA, by Triton: one launch each, and each number of the state and the slopes read once.

| kernel | reads | writes | launches |
|---|---|---|---|
| `advance` | y and m slopes | a state | 1 |
| `error_norm` | y, m slopes and the state ahead | one number for each 1024 of a row | 1, 2 for rows that are wider |
| `merge` | one of two states | a state | 1 |

**Layout.** A program takes a tile of R rows by C numbers, R·C = 1024, where C is the power of 4 that a row fits in:
a batch of small states fills the device as well as a few large ones. Where all samples share h and the weights, rows
do not matter and the state is one long row. Kernels are compiled for the number of slopes, the tile and the dtype, but
neither for the shape of a state nor for the size of a batch, which shrinks as samples finish.

**What goes to the device.** Numbers that all samples share travel as arguments of a launch and are not copied; step
sizes of the samples' own are sent once for an attempt, and nothing is waited for. Triton rounds floats among the
arguments to float32, so they are passed as the bits of a float64, and weights are multiplied out in float64 as on the
host. Addresses are passed as integers: `flowsolve.kernels.Slopes` keeps the tensors alive.

**What is not finite stays visible.** An infinite state is an infinite error (∞ · 0 is not a number), and NaN outlives
maxima: among magnitudes, the order of floats is that of their bits as integers, in which NaN comes after ∞.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import or_
from struct import pack, unpack
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.kernels.twin import largest

__all__ = ["advance", "combination", "error_norm", "launch", "merge", "plan", "probe"]

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]
Plan = list[Any]
"""Addresses of the state and of up to MOST slopes; the step sizes last sent to the device, and where they are there."""

MOST = 16  # slopes of a step
STATE, FIRST, SENT, STEPS = 0, 1, MOST + 1, MOST + 2
TILE = 1024
WIDTHS = (4, 16, 64, 256, TILE)
WARPS = {torch.float32: 4, torch.float64: 8}  # 32 bytes of each operand a thread
KINDS = {torch.float32: tl.float32, torch.float64: tl.float64}
VACANT = (0,) * MOST

ARGUMENTS = (  # integers of whatever value: without this, kernels would be compiled again for 1 and for multiples of 16
    *(f"k{j}" for j in range(MOST)), *(f"w{j}" for j in range(MOST)), "out", "y", "ahead", "atol", "rtol", "steps",
    "width", "rows", "blocks", "parts", "accepted", "new", "old",
)  # fmt: skip


@triton.jit
def _float(bits, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number from the bits of a float64."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(KIND)


@triton.jit
def _at(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A pointer to numbers."""
    pointer = address.to(tl.pointer_type(KIND))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _tile(width, rows, blocks, R: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows, where each of them starts, its columns from there, and which numbers exist."""
    if ALIGNED:
        width = width // 4 * 4  # visibly a multiple of 4
    program = tl.program_id(0).to(tl.int64)
    row = (program // blocks) * R + tl.arange(0, R)
    start = (program % blocks) * C
    column = tl.arange(0, C)
    exists = (row < rows)[:, None] & (column < width - start)[None, :]
    return row, (row * width + start)[:, None], column[None, :], exists


@triton.jit
def _term(  # type: ignore[no-untyped-def]
    total, slope, weight, j, steps, row, rows, offset, column, exists,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """total + w k; w is the weight, times the number of its row in a table with one column, or there in column j."""
    k = tl.load(_at(slope, KIND, ALIGNED) + offset + column, mask=exists, other=0.0)
    if COLUMNS == 0:
        total += _float(weight, KIND) * k
    else:
        table = steps.to(tl.pointer_type(tl.float64)) + row * COLUMNS
        if COLUMNS == 1:
            w = tl.load(table, mask=row < rows, other=0.0) * _float(weight, tl.float64)
        else:
            w = tl.load(table + j, mask=row < rows, other=0.0)
        total += w.to(KIND)[:, None] * k
    return total


@triton.jit
def _increment(  # type: ignore[no-untyped-def]
    total,
    k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15,
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
    steps, row, rows, offset, column, exists,
    M: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """total + Σ_j w_j k_j, unrolled by hand: not all versions of Triton have tuples."""
    if M > 0:
        total = _term(total, k0, w0, 0, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 1:
        total = _term(total, k1, w1, 1, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 2:
        total = _term(total, k2, w2, 2, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 3:
        total = _term(total, k3, w3, 3, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 4:
        total = _term(total, k4, w4, 4, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 5:
        total = _term(total, k5, w5, 5, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 6:
        total = _term(total, k6, w6, 6, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 7:
        total = _term(total, k7, w7, 7, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 8:
        total = _term(total, k8, w8, 8, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 9:
        total = _term(total, k9, w9, 9, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 10:
        total = _term(total, k10, w10, 10, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 11:
        total = _term(total, k11, w11, 11, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 12:
        total = _term(total, k12, w12, 12, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 13:
        total = _term(total, k13, w13, 13, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 14:
        total = _term(total, k14, w14, 14, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    if M > 15:
        total = _term(total, k15, w15, 15, steps, row, rows, offset, column, exists, COLUMNS, KIND, ALIGNED)
    return total


@triton.jit
def _largest(x, AXIS: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest |x|, NaN where there is one: found among the bits as integers."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, AXIS).to(KIND, bitcast=True)


@triton.jit(do_not_specialize=ARGUMENTS)
def _advance(  # type: ignore[no-untyped-def]
    out: tl.int64, y: tl.int64,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64, k5: tl.int64, k6: tl.int64, k7: tl.int64,
    k8: tl.int64, k9: tl.int64, k10: tl.int64, k11: tl.int64, k12: tl.int64, k13: tl.int64, k14: tl.int64,
    k15: tl.int64,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64, w14: tl.int64,
    w15: tl.int64,
    steps: tl.int64, width: tl.int64, rows: tl.int64, blocks: tl.int64,
    M: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, BASE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    row, offset, column, exists = _tile(width, rows, blocks, R, C, ALIGNED)
    base = tl.load(_at(y, KIND, ALIGNED) + offset + column, mask=exists, other=0.0) if BASE else tl.zeros([R, C], KIND)
    total = _increment(
        base,
        k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15,
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
        steps, row, rows, offset, column, exists, M, COLUMNS, KIND, ALIGNED,
    )  # fmt: skip
    tl.store(_at(out, KIND, ALIGNED) + offset + column, total, mask=exists)


@triton.jit(do_not_specialize=ARGUMENTS)
def _error(  # type: ignore[no-untyped-def]
    out: tl.int64, atol: tl.int64, rtol: tl.int64, y: tl.int64, ahead: tl.int64,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64, k5: tl.int64, k6: tl.int64, k7: tl.int64,
    k8: tl.int64, k9: tl.int64, k10: tl.int64, k11: tl.int64, k12: tl.int64, k13: tl.int64, k14: tl.int64,
    k15: tl.int64,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64, w14: tl.int64,
    w15: tl.int64,
    steps: tl.int64, width: tl.int64, rows: tl.int64, blocks: tl.int64,
    M: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, MAXIMUM: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The sum of squares, or the largest magnitude, of each row of a tile; the norm where a tile holds whole rows."""
    row, offset, column, exists = _tile(width, rows, blocks, R, C, ALIGNED)
    a = tl.load(_at(y, KIND, ALIGNED) + offset + column, mask=exists, other=0.0)
    b = tl.load(_at(ahead, KIND, ALIGNED) + offset + column, mask=exists, other=0.0)
    local = b * 0.0  # an infinite state is an infinite error, whatever the scale
    local = _increment(
        local,
        k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15,
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
        steps, row, rows, offset, column, exists, M, COLUMNS, KIND, ALIGNED,
    )  # fmt: skip
    size = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    scale = _float(atol, KIND) + _float(rtol, KIND) * size
    if b.dtype == tl.float64:
        scale = tl.maximum(scale, 2.2250738585072014e-308, propagate_nan=tl.PropagateNan.ALL)
    else:
        scale = tl.maximum(scale, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    local = local / scale
    if MAXIMUM:
        norm = _largest(local, 1, KIND)
    else:
        norm = tl.sum(local * local, 1)
        norm = tl.where(blocks == 1, tl.sqrt(norm / width), norm)
    block = tl.program_id(0) % blocks
    tl.store(out.to(tl.pointer_type(KIND)) + row * blocks + block, norm, mask=row < rows)


@triton.jit(do_not_specialize=ARGUMENTS)
def _gather(  # type: ignore[no-untyped-def]
    out: tl.int64, parts: tl.int64, width: tl.int64, blocks: tl.int64,
    C: tl.constexpr, KIND: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """The norm of a row from what its tiles came to."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    source = parts.to(tl.pointer_type(KIND)) + row * blocks
    total = tl.zeros([C], KIND)
    for start in range(0, blocks, C):
        part = tl.load(source + start + column, mask=column < blocks - start, other=0.0)
        if MAXIMUM:
            total = tl.maximum(total, part, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += part
    norm = _largest(total, 0, KIND) if MAXIMUM else tl.sqrt(tl.sum(total, 0) / width)
    tl.store(out.to(tl.pointer_type(KIND)) + row, norm)


@triton.jit(do_not_specialize=ARGUMENTS)
def _merge(  # type: ignore[no-untyped-def]
    accepted: tl.int64, out: tl.int64, new: tl.int64, old: tl.int64, width: tl.int64, rows: tl.int64, blocks: tl.int64,
    R: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows of 4-byte words, of `new` where accepted, of `old` elsewhere."""
    row, offset, column, exists = _tile(width, rows, blocks, R, C, ALIGNED)
    chosen = tl.load(accepted.to(tl.pointer_type(tl.int8)) + row, mask=row < rows, other=0)[:, None] != 0
    mine = tl.load(_at(new, tl.int32, ALIGNED) + offset + column, mask=exists & chosen, other=0)
    theirs = tl.load(_at(old, tl.int32, ALIGNED) + offset + column, mask=exists & (chosen == 0), other=0)
    tl.store(_at(out, tl.int32, ALIGNED) + offset + column, mine | theirs, mask=exists)


INTERPRETED = not isinstance(_advance, triton.JITFunction)  # TRITON_INTERPRET=1: on tensors of the CPU
# Earlier versions take their constants another way.
DIRECT = not INTERPRETED and tuple(int(v) for v in triton.__version__.split(".")[:2]) >= (3, 3)
_compiled: dict[Any, Any] = {}


def plan(y: Tensor) -> Plan:
    """The plan of a step from y, without slopes."""
    return [y.data_ptr(), *VACANT, None, None]


def advance(y: Tensor, plan: Plan, h: Vector, stages: Indices, weights: Vector) -> Tensor:
    """y + h Σ_j w_j k_j; see `flowsolve.kernels.Slopes.advance`."""
    out = torch.empty_like(y)
    columns, slopes, numbers = _operands(y, plan, h, stages, weights)
    rows, width = (len(y), y.numel() // len(y)) if columns else (1, y.numel())
    addresses = (out.data_ptr(), plan[STATE], *slopes)
    with _on(y.device):
        _launch(
            _advance, rows, width, (*addresses, *numbers), len(stages), columns, KINDS[y.dtype], True,
            aligned=_aligned(width, *addresses), warps=WARPS[y.dtype],
        )  # fmt: skip
    return out


def combination(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ_j w_j v_j; see `flowsolve.kernels.combination`."""
    like, spare = tensors[0], VACANT[len(tensors) :]
    out, places = torch.empty_like(like), [v.data_ptr() for v in tensors]
    addresses, size = (out.data_ptr(), places[0], *places, *[places[0]] * len(spare)), like.numel()
    with _on(like.device):
        _launch(
            _advance, 1, size, (*addresses, *_bits(weights), *spare, 0), len(tensors), 0, KINDS[like.dtype], False,
            aligned=_aligned(size, *addresses), warps=WARPS[like.dtype],
        )  # fmt: skip
    return out


def error_norm(
    y: Tensor,
    plan: Plan,
    h: Vector,
    stages: Indices,
    weights: Vector,
    ahead: Tensor,
    atol: float,
    rtol: float,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The norm of the local error in units of the tolerance; see `flowsolve.kernels.Slopes.error_norm`."""
    columns, slopes, numbers = _operands(y, plan, h, stages, weights)
    rows, width, maximum, kind = len(y), y.numel() // len(y), norm is largest, KINDS[y.dtype]
    addresses, blocks = (plan[STATE], ahead.data_ptr(), *slopes), -(-width // TILE)
    parts = y.new_empty(rows * blocks)
    with _on(y.device):
        _launch(
            _error, rows, width, (parts.data_ptr(), *_bits((atol, rtol)), *addresses, *numbers), len(stages), columns,
            kind, maximum, aligned=_aligned(width, *addresses), warps=WARPS[y.dtype],
        )  # fmt: skip
        if blocks == 1:
            return parts
        out = y.new_empty(rows)
        arguments, constants = (out.data_ptr(), parts.data_ptr(), width, blocks), (TILE, kind, maximum)
        launch(_gather, rows, arguments, constants, num_warps=4, enable_fp_fusion=True)
    return out


def merge(accepted: NDArray[np.bool_], new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where accepted, those of `old` elsewhere."""
    out, mask = torch.empty_like(old), torch.from_numpy(accepted).to(old.device, non_blocking=True)
    rows, width = len(old), old.numel() // len(old) * old.element_size() // 4
    addresses = (out.data_ptr(), new.data_ptr(), old.data_ptr())
    with _on(old.device):
        _launch(_merge, rows, width, (mask.data_ptr(), *addresses), aligned=_aligned(width, *addresses))
    return out


def probe() -> None:
    """Compile and run something small on the current device; raise if that cannot be done or the result is wrong."""
    y = torch.ones(2, 3, device="cpu" if INTERPRETED else "cuda")
    step, h = plan(y), np.array([1.0, 2.0])
    step[FIRST] = y.data_ptr()
    first, one = np.zeros(1, dtype=np.int64), np.ones((1, 1))
    for _ in range(2):  # compiled and launched, then launched directly
        ahead = merge(np.array([True, False]), advance(y, step, h, first, one), y)
        found = error_norm(y, step, h, first, one, ahead, 0.0, 1.0, largest).tolist()
        if not np.allclose(found, [0.5, 2.0]):
            raise RuntimeError(
                f"the relative size of two small steps came to {found} on {y.device}; expected [0.5, 2.0]"
            )


def _operands(
    y: Tensor, plan: Plan, h: Vector, stages: Indices, weights: Vector
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The columns of the table on the device, the slopes' addresses, and the weights and the table as arguments."""
    spare = VACANT[len(stages) :]
    slopes = (*[plan[FIRST + j] for j in stages.tolist()], *[plan[STATE]] * len(spare))
    if len(weights) > 1:
        table, plan[SENT] = h[:, None] * weights, None
        weights = np.ones_like(weights)  # what a table of a single column is multiplied by
    elif len(h) > 1 or plan[SENT] is h:
        table = h
    else:
        return 0, slopes, (*_bits(h[0] * weights[0]), *spare, 0)
    if plan[SENT] is not h:  # all stages of an attempt share their h, which nobody writes to
        plan[STEPS] = torch.from_numpy(np.ascontiguousarray(table)).to(y.device, non_blocking=True)
        plan[SENT] = table if table is h else None
    return table.size // len(table), slopes, (*_bits(weights[0]), *spare, plan[STEPS].data_ptr())


def _launch(
    kernel: Any, rows: int, width: int, arguments: tuple[int, ...], *constants: Any, aligned: bool, warps: int = 4
) -> None:
    """Launch a kernel over tiles: a row takes as many columns as it fits in, and a tile as many rows as fit in it."""
    c = next((c for c in WIDTHS if width <= c), TILE)
    r, blocks = TILE // c, -(-width // c)
    # Fusion is asked for, since Triton is about to change its default.
    launch(
        kernel, -(-rows // r) * blocks, (*arguments, width, rows, blocks), (*constants, r, c, aligned),
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


def launch(kernel: Any, programs: int, arguments: tuple[int, ...], constants: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel whose arguments are all int64: what was compiled for these constants before, directly.

    Triton's own launch looks at each argument to find what it has compiled, which takes five times as long.
    """
    place = -1 if INTERPRETED else torch.cuda.current_device()
    key = kernel, constants, place
    known = _compiled.get(key)
    if known is not None:
        run, function, packed = known
        stream = torch._C._cuda_getCurrentRawStream(place)
        run(programs, 1, 1, stream, function, packed, None, None, None, *arguments, *constants)
        return
    compiled = kernel[(programs,)](*arguments, *constants, **options)
    if DIRECT:
        _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata


def _aligned(width: int, *addresses: int) -> bool:
    """Whether all rows of all operands can be read 16 bytes at a time."""
    return width % 4 == 0 and not reduce(or_, addresses) % 16


def _bits(numbers: Any) -> tuple[int, ...]:
    """Float64 numbers as the integers that their bits are."""
    values = numbers.tolist() if isinstance(numbers, np.ndarray) else numbers
    return unpack(f"{len(values)}q", pack(f"{len(values)}d", *values))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)
