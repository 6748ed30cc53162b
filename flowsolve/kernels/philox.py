r"""Random words and normals from their addresses, in plain torch: the twin of `philox_cpu` and `philox_cuda`.

**Words** are those of Philox4x32-10 (Salmon et al. 2011): four 32-bit words from a counter of four and a key of two.
The counter of a sample's numbers 4j … 4j + 3 is (j, low word of the interval, the sample's number, stream + 2⁸ · the
interval's high bits); the key belongs to the seed.

**Normals** are Box and Muller's transform of two words, with $u = (w + \tfrac12)\,2^{-32}$ in (0, 1):

$$ \sqrt{-2\ln u_1}\,(\cos 2\pi u_2,\ \sin 2\pi u_2). $$

It is written in operations that IEEE 754 rounds in one way only (sums, products, quotients, roots, conversions), none
of them contracted, so that **all versions return the same bits**, whatever compiles them and wherever they run;
libraries' log, sin and cos differ from each other. The three functions are polynomials, interpolated at Chebyshev
nodes:

* $\ln u$: where u > ½, all is said by p = 1 − u, which the complement of w gives without cancellation. With
  u = m 2ᵉ, m in [√½, √2) and f = m − 1 (f = −p where e = 0), ln(1 + f) = 2 artanh t, t = f / (2 + f).
* The angle is reduced to an octant either side of a multiple of π/2 on the word itself, which is exact. On y in
  [−½, ½], sin(πy/2) = y S(y²) and cos(πy/2) = C(y²).

Relative errors against the transform in exact arithmetic, over words in steps of 65,537 and all around the places where
formulas change: below 5·10⁻¹⁶ in float64, 3.5·10⁻⁷ in float32. The largest magnitude is √(66 ln 2) = 6.76.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FORMATS", "MASK", "Format", "gaussian", "philox", "words"]

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LN2 = 0.6931471805599453


class Format(NamedTuple):
    """A floating-point format and the polynomials that suffice for it, by rising powers.

    Attributes:
        whole: the integers of its size.
        mantissa: bits of its mantissa.
        half: the bits of √½ in it.
        log: 2 artanh t = t (2 + z log(z)), z = t² <= 0.0295.
        sine, cosine: S and C on [0, ¼].
    """

    whole: torch.dtype
    mantissa: int
    half: int
    log: tuple[float, ...]
    sine: tuple[float, ...]
    cosine: tuple[float, ...]


FORMATS = {
    torch.float32: Format(
        torch.int32, 23, 0x3F3504F3,
        (0.6666668503957586, 0.3998878056602198, 0.2957994939197279),
        (1.5707963219532366, -0.6459634776648118, 0.07968021764775542, -0.004602149212814176),
        (0.9999999999524894, -1.2337005406331623, 0.2536692036551135, -0.02086006950026408, 0.0009036280663802505),
    ),
    torch.float64: Format(
        torch.int64, 52, 0x3FE6A09E667F3BCD,
        (0.666666666666667, 0.39999999999899505, 0.28571428625975487, 0.2222221113479508, 0.18182889125261723,
         0.15331721600556042, 0.14616449685043406),
        (1.5707963267948966, -0.6459640975062443, 0.07969262624604301, -0.004681754132340976, 0.0001604411507421909,
         -3.59864335298231e-06, 5.633933781537854e-08),
        (1.0, -1.2337005501361697, 0.2536695079010467, -0.02086348076331121, 0.0009192602741831558,
         -2.520203677046026e-05, 4.710609726757823e-07, -6.321256869628588e-09),
    ),
}  # fmt: skip


def philox(counter: Sequence[Tensor], key: tuple[Any, Any]) -> list[Tensor]:
    """Philox4x32-10: four words from a counter of four words, as int64 tensors with values in [0, 2³²).

    Args:
        counter: four int64 tensors of broadcastable shapes.
        key: two words, integers or int64 tensors that broadcast with the counter.

    Returns:
        Four int64 tensors of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps the bits; those above 32 are cut off before the next product.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK),
            p1,
            (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK),
            p0,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1 & MASK, c2, c3 & MASK]


def words(samples: Tensor, key: tuple[Any, Any], stream: int, intervals: Sequence[int], blocks: int) -> Tensor:
    """(T, B, 4·blocks) random words as int64: of T intervals, for the samples numbered in an int64 tensor (B, 1).

    Args:
        key: two words, integers or int64 tensors (B, 1).
    """
    device, low, high = samples.device, [i & MASK for i in intervals], [stream | (i >> 32) << 8 for i in intervals]
    if len(intervals) == 1:  # without sending a tensor to the device
        c1, c3 = samples.new_full((1, 1, 1), low[0]), samples.new_full((1, 1, 1), high[0])
    else:
        c1, c3 = torch.tensor([low, high], device="cpu").to(device, non_blocking=True).view(2, -1, 1, 1).unbind(0)
    counter = (torch.arange(blocks, device=device), c1, samples, c3)
    return torch.stack(philox(counter, key), dim=-1).flatten(2)


def gaussian(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normals, of float32 or float64, from an even number of words (…, n): the same shape."""
    form = FORMATS[dtype]
    first, second = w.unflatten(-1, (-1, 2)).unbind(-1)
    high = first > MASK >> 1
    p = torch.where(high, MASK - first, first).to(dtype).add_(0.5).mul_(2.0**-32)
    bits = torch.where(high, 1.0 - p, p).view(form.whole).sub_(form.half)
    exponent = bits >> form.mantissa
    m = bits.bitwise_and_((1 << form.mantissa) - 1).add_(form.half).view(dtype)
    f = torch.where(exponent == 0, -p, m.sub_(1.0))
    t = f / (f + 2.0)
    z = t * t
    log = _horner(form.log, z).mul_(z).add_(2.0).mul_(t)
    radius = _root(log.add_(exponent.to(dtype).mul_(LN2)).mul_(-2.0))
    quarter = (second + (1 << 29)) >> 30
    y = (second - (quarter << 30)).to(dtype).add_(0.5).mul_(2.0**-30)
    z = y * y
    sine, cosine = _horner(form.sine, z).mul_(y), _horner(form.cosine, z)
    odd = (quarter & 1).bool()
    a, b = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    a = torch.where(((quarter + 1) & 2).bool(), -a, a).mul_(radius)
    b = torch.where((quarter & 2).bool(), -b, b).mul_(radius)
    return torch.stack((a, b), dim=-1).flatten(-2)


def _root(v: Tensor) -> Tensor:
    """√v rounded correctly, which torch's own (by MKL on the CPU) is to one in a hundred numbers not."""
    if v.dtype is torch.float32:
        return v.sqrt() if v.device.type == "mps" else v.double().sqrt_().float()
    r = v.sqrt()
    split = r * 134217729.0  # Dekker 1971: r = high + low with halves of its bits, so that r² is known exactly
    high = split - (split - r)
    low, square = r - high, r * r
    error = (high * high - square).add_(high.mul_(low), alpha=2.0).add_(low * low)
    return r.add_((v - square).sub_(error).div_(2.0 * r))


def _horner(coefficients: Sequence[float], z: Tensor) -> Tensor:
    total = z * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        total = total.add_(c).mul_(z)
    return total.add_(coefficients[0])
