r"""The weights by which W and its time integral over any interval are sums of normals of a dyadic tree.

**The basis.** Brownian motion on [0, 1] is the integral of white noise, expanded here in piecewise linear wavelets
(Alpert 1993), two for each node [k 2⁻ˡ, (k + 1) 2⁻ˡ] of the dyadic tree:

$$ W(x) = x\,\xi + \sqrt3\,x(1-x)\,\eta
        + \sum_{l\ge0} 2^{-l/2} \sum_{k=0}^{2^l-1}
          \bigl[\varphi(2^l x-k)\,\xi_{l,k} + \psi(2^l x-k)\,\eta_{l,k}\bigr] . $$

On each half of the node, with p in [0, 1] along it, φ' = 3p − 1 on the first and 1 − 3(1 − p) on the second half, and
ψ' = ±√3 (1 − 2p). The slopes are orthonormal, and those of a node are orthogonal to 1 and x on it: **φ and ψ vanish at
the ends of their node, and so do their integrals.** That is what the hats of `flowsolve.brownian` lack, whose integrals
do not vanish. An increment

$$ W_{a,b} = W(b) - W(a), \qquad A_{a,b} = \int_a^b (W(r) - W(a))\,dr = h\bigl(\tfrac12 W_{a,b} + H_{a,b}\bigr),
   \qquad h = b - a, $$

takes from each level the normals of at most two nodes, above a and above b, and nothing of what lies between. H is the
space-time Lévy area of the interval: N(0, h/12), independent of W_{a,b} ~ N(0, h). On a node they are ξ and η
themselves; going down the tree is the conditional law of (W, H) on the halves given the whole (Foster, Lyons and
Oberhauser 2020).

**Accuracy.** Times are multiples of 2⁻⁵³ and nodes are told apart by integers. On one half of a node φ and ψ are
quadratic, so that increments are written with the difference of times as a factor: short intervals lose no accuracy.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEPTH", "Weights", "unit", "weights"]

DEPTH = 53  # times are multiples of 2⁻⁵³
LEVELS = np.arange(DEPTH, dtype=np.int64)
HALVES = 1 << (DEPTH - 1 - LEVELS)  # the width of half a node, in units of time
ROOT3 = math.sqrt(3.0)

Integers = NDArray[np.int64]
Vector = NDArray[np.float64]


class Weights(NamedTuple):
    """W and H of an interval of [0, 1], as sums of normals.

    Attributes:
        nodes: addresses of normals: 0 and 1 of the whole, 2 (2ˡ + k) and the next of node k of level l.
        increment: what each counts for in W.
        area: what each counts for in H.
    """

    nodes: Integers
    increment: Vector
    area: Vector


class _Part(NamedTuple):
    """φ and ψ along a part of an interval: their increments, and the integrals of what they gain; each (2, levels)."""

    gain: Vector
    integral: Vector
    length: Vector


def unit(x: float) -> int:
    """A time in [0, 1] as a multiple of 2⁻⁵³."""
    return round(x * 2.0**DEPTH)


@lru_cache(maxsize=4096)
def weights(a: int, b: int) -> Weights:
    """The weights of the interval from a to b, multiples of 2⁻⁵³ with 0 <= a < b <= 2⁵³."""
    h = math.ldexp(b - a, -DEPTH)
    first, last = math.ldexp(a, -DEPTH), math.ldexp(b, -DEPTH)
    # x ξ + √3 x (1 − x) η, of the whole.
    root = np.array([h, ROOT3 * h * (1.0 - first - last)])
    root_area = np.array([0.0, ROOT3 * h * h / 6.0])
    left, right = a // HALVES, b // HALVES
    same_half, same_node = left == right, left >> 1 == right >> 1
    # Above a and b alike: one half, or the rest of the first half and the beginning of the second.
    starts = a - left * HALVES
    near = _part(left & 1, starts, np.where(same_half, b - a, HALVES - starts))
    rest = _part(right & 1, np.zeros_like(starts), np.where(same_half, 0, b - right * HALVES))
    both = _joined(near, rest)
    # Above a alone: up to the end of the node, and nothing from there on.
    second = _part(np.ones_like(left), np.zeros_like(starts), np.where(left & 1, 0, HALVES))
    ended = _joined(_part(left & 1, starts, HALVES - starts), second)
    beyond = (b - ((left >> 1) + 1) * 2 * HALVES) * 2.0**-DEPTH
    ended = _joined(ended, _Part(np.zeros_like(ended.gain), np.zeros_like(ended.gain), beyond))
    # Above b alone: nothing until its node begins.
    begun = _part(np.zeros_like(right), np.zeros_like(starts), np.where(right & 1, HALVES, 0))
    begun = _joined(begun, _part(right & 1, np.zeros_like(starts), b - right * HALVES))
    of_a = [np.where(same_node, p, q) for p, q in zip(both[:2], ended[:2], strict=True)]
    of_b = [np.where(same_node, 0.0, p) for p in begun[:2]]
    addresses = [2 * ((1 << LEVELS) + (side >> 1)) + i for side in (left, right) for i in (0, 1)]
    nodes = np.concatenate(([0, 1], *addresses))
    gain = np.concatenate((root, *of_a[0], *of_b[0]))
    integral = np.concatenate((h * (0.5 * root + root_area), *of_a[1], *of_b[1]))
    area = integral / h - 0.5 * gain
    area[:2] = root_area
    some = np.flatnonzero((gain != 0.0) | (area != 0.0))
    return Weights(nodes[some], gain[some], area[some])


def _part(second: Integers, start: Integers, length: Integers) -> _Part:
    """φ and ψ of each level on a part of one half of a node, the second half where `second` is 1."""
    p, d = start / HALVES, length / HALVES
    scale = 2.0 ** (-LEVELS / 2)
    half = 2.0 ** (-LEVELS - 1.0)  # its length
    # Slopes along the half, in p: half of those along the node.
    at = np.stack((np.where(second, 3.0 * p - 2.0, 3.0 * p - 1.0), ROOT3 * (1.0 - 2.0 * p) * (1 - 2 * second)))
    bend = np.stack((np.full_like(p, 3.0), -2.0 * ROOT3 * (1 - 2 * second)))
    gain = 0.5 * scale * d * (at + 0.5 * bend * d)
    integral = 0.5 * scale * half * d * d * (0.5 * at + bend * d / 6.0)
    return _Part(gain, integral, np.asarray(half * d, dtype=np.float64))


def _joined(first: _Part, then: _Part) -> _Part:
    """One part and then the next."""
    integral = first.integral + then.integral + first.gain * then.length
    return _Part(first.gain + then.gain, integral, first.length + then.length)
