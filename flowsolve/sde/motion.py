r"""Brownian motion for SDEs, with its space-time Lévy area: a function of (seed, sample, place), as all noise here is.

Over a step [a, b] of length h a scheme is driven by W ~ N(0, h), the increment, and, if of strong order 1.5, by the
space-time Lévy area H ~ N(0, h/12), independent of it:

$$ H = \frac1h\int_a^b \Bigl(W(r) - W(a) - \frac{r-a}h\,W_{a,b}\Bigr)dr, \qquad
   I_{(1,0)} = \int_a^b (W(r) - W(a))\,dr = h\,(\tfrac12 W + H) . $$

Two kinds of motion:

* **Fresh**: the two normals of a step are addressed by the time at which it begins, one each. Another grid has another
  path. Where a state between two nodes is wanted, the step's own (W, H) are refined by the tree of
  `flowsolve.sde.tree`, whose normals are addressed by the step and the node: looking does not change what is seen
  later, however often and in whatever order one looks.
* **A path**: W is one path over [t0, t1], the tree's, whatever the steps. Solves in more and in fewer steps, and by
  other schemes, follow it. A step costs two normals an element for each level of the tree that tells its ends apart:
  steps of (t1 − t0)/2ⁿ some 4n, others about 200.

The normals of several short steps are drawn at once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowsolve.noise import AREA, MOTION, TREE, WITHIN, Noise, Seed
from flowsolve.sde.tree import unit, weights

__all__ = ["BrownianPath", "Drive", "Fresh", "Motion"]

AT_ONCE = 1 << 17  # numbers drawn of several steps at a time
ROOT12 = math.sqrt(12.0)
MASK64 = (1 << 64) - 1

Drive = tuple[Tensor, Tensor | None]
"""W and, if asked for, H of an interval."""


class Motion:
    """What drives an SDE."""

    def drives(self, nodes: Sequence[float], like: Tensor, area: bool) -> Iterator[Drive]:
        """(W, H) of each step between consecutive nodes, of the shape (B, *M), dtype and device of `like`."""
        raise NotImplementedError

    def part(self, a: float, b: float, t: float, like: Tensor, area: bool) -> Drive:
        """(W, H) of the part [a, t] of a step [a, b]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fresh(Motion):
    """Independent increments, addressed by the time at which a step begins.

    Attributes:
        noise: names the seed and the samples.
    """

    noise: Noise

    def drives(self, nodes: Sequence[float], like: Tensor, area: bool) -> Iterator[Drive]:
        """See `Motion`."""
        places = [_place(t) for t in nodes]
        for t, (a, b) in zip(nodes, pairwise(places), strict=False):
            if a == b:
                raise ValueError(
                    f"steps near t = {t!r} are too short to be told apart, below 2⁻⁴⁴ of t; measure time from t0, or "
                    "take fewer steps"
                )
        roots = [math.sqrt(b - a) for a, b in pairwise(nodes)]
        many = max(1, AT_ONCE // max(1, like.numel()))
        for first in range(0, len(roots), many):
            some, root = places[first : min(first + many, len(roots))], roots[first : first + many]
            whole = self.noise.several(MOTION, some, root, like)
            if area:
                yield from zip(whole, self.noise.several(AREA, some, [r / ROOT12 for r in root], like), strict=True)
            else:
                yield from ((w, None) for w in whole)

    def part(self, a: float, b: float, t: float, like: Tensor, area: bool) -> Drive:
        """See `Motion`."""
        place, root = _place(a), math.sqrt(b - a)
        found = weights(0, unit((t - a) / (b - a)))
        trunk = found.nodes < 2
        results: list[Tensor | None] = []
        for rows in (found.increment, found.area)[: 1 + area]:
            x = torch.zeros_like(like)
            for node, share in zip(found.nodes[trunk].tolist(), rows[trunk].tolist(), strict=True):
                x = x.add_(self.noise.normal((MOTION, AREA)[node], place, like), alpha=root * share)
            within = np.array([_mixed(place, node) for node in found.nodes[~trunk].tolist()], dtype=np.int64)
            if len(within):
                x = x.add_(self.noise.combination(WITHIN, within, root * rows[~trunk], like))
            results.append(x)
        w = results[0]
        assert w is not None
        return w, results[1] if area else None


@dataclass(frozen=True)
class BrownianPath(Motion):
    r"""A Brownian path over [t0, t1] for each sample, and its space-time Lévy areas; see `flowsolve.sde.motion`.

    Increments of parts add up to that of the whole, to rounding, whatever was asked for before. Times are told apart
    to 2⁻⁵³ of the interval.

    Attributes:
        t0, t1: the interval.
        noise: names the seed and the samples; see `of`.

    Examples:
        >>> path = fs.sde.BrownianPath.of(0.0, 2.0, seed=0, samples=3)
        >>> like = torch.zeros(3, 2, dtype=torch.float64)
        >>> whole, parts = path(0.0, 1.7, like), path(0.0, 0.3, like) + path(0.3, 1.7, like)
        >>> torch.allclose(whole, parts)
        True
    """

    t0: float
    t1: float
    noise: Noise

    def __post_init__(self) -> None:
        if not (math.isfinite(self.t0) and math.isfinite(self.t1) and self.t0 < self.t1):
            raise ValueError(f"t0 = {self.t0!r}, t1 = {self.t1!r}; expected finite times with t0 < t1")

    @classmethod
    def of(cls, t0: float, t1: float, *, seed: Seed, samples: int | Sequence[int] | Tensor) -> BrownianPath:
        """The paths of samples numbered 0 … n−1, or of those listed; see `flowsolve.noise.Noise.of`."""
        return cls(float(t0), float(t1), Noise.of(seed, samples))

    def __call__(self, a: float, b: float, like: Tensor) -> Tensor:
        """W(b) − W(a), of the shape (B, *M), dtype and device of `like`."""
        return self.drive(a, b, like, area=False)[0]

    def drive(self, a: float, b: float, like: Tensor, area: bool = True) -> Drive:
        """(W, H) over [a, b]."""
        if not self.t0 <= a <= b <= self.t1:
            raise ValueError(f"an interval [{a!r}, {b!r}]; the path is one over [{self.t0!r}, {self.t1!r}]")
        first, last = self._unit(a), self._unit(b)
        if first == last:  # closer than the path is known
            return torch.zeros_like(like), torch.zeros_like(like) if area else None
        found, root = weights(first, last), math.sqrt(self.t1 - self.t0)
        w = self.noise.combination(TREE, found.nodes, root * found.increment, like)
        return w, self.noise.combination(TREE, found.nodes, root * found.area, like) if area else None

    def drives(self, nodes: Sequence[float], like: Tensor, area: bool) -> Iterator[Drive]:
        """See `Motion`."""
        for a, b in pairwise(nodes):
            yield self.drive(a, b, like, area)

    def part(self, a: float, b: float, t: float, like: Tensor, area: bool) -> Drive:
        """See `Motion`."""
        return self.drive(a, t, like, area)

    def _unit(self, t: float) -> int:
        return unit((t - self.t0) / (self.t1 - self.t0))


def _place(t: float) -> int:
    """The address of a step that begins at t, one of 2⁵⁶: the sign, exponent and 44 bits of the mantissa, rounded."""
    bits = int.from_bytes(struct.pack(">d", t + 0.0))  # 0.0 for −0.0
    return min(bits + 0x80, MASK64) >> 8


def _mixed(place: int, node: int) -> int:
    """An address of 2⁵⁶ for a node of the tree within a step: the two, mixed by splitmix64's finaliser."""
    z = (_finalised(place + 0x9E3779B97F4A7C15) + node) & MASK64
    return _finalised(z) >> 8


def _finalised(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)
