r"""A Brownian path that belongs to a sample: W(t) for flow times t in [0, 1], a function of (seed, sample) alone.

The noise of `Noise.step` is another one for each grid. Here it is the increment of one path, (W(s) − W(t)) / √|s − t|,
so that solves in more and in fewer steps, in pieces or in the other direction, follow the same path, and the strong
error of a solver can be measured: W(a, c) = W(a, b) + W(b, c) to rounding, whatever was asked for before.

The path is Lévy and Ciesielski's series: with hats Λ(x) = 1 − |2x − 1| on [0, 1] and independent normals ξ,

$$ W(t) = t\,\xi + \sum_{l \ge 0} 2^{-l/2-1} \sum_{k=0}^{2^l-1} \Lambda(2^l t - k)\ \xi_{l,k}. $$

Of each level one hat is not 0 at t. Times are taken to 2⁻⁵³, on which the series ends after level 52, and after level
n − 1 for a multiple of 2⁻ⁿ. Normals are computed from their addresses, the nodes of the dyadic tree, so that there is
no tree in memory: a step costs two normals an element for each level on which t and t' are apart and one for each on
which they share a hat. The weights of an increment are computed from integers, so that short intervals lose no
accuracy: increments of 2⁻⁴⁰ have their variance as others have.

Levels finer than a step serve one of its ends alone. Their sum at the end of a step is kept, since the next step begins
there: on the grid i/50 a step costs some 58 normals an element, on the grid i/64 seven or fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.noise import BROWNIAN, STEP, Noise, interval

__all__ = ["NOISES", "Brownian", "named"]

DEPTH = 53  # times are multiples of 2⁻⁵³
LEVELS = np.arange(DEPTH, dtype=np.int64)
WIDTHS = 1 << (DEPTH - LEVELS)  # of a node's interval
UNITS = 2.0 ** (LEVELS - DEPTH + 1) * 2.0 ** (-LEVELS / 2 - 1)  # what a height counts for

Integers = NDArray[np.int64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Brownian(Noise):
    """Noise whose steps are increments of a Brownian path; all else is drawn as by `Noise`.

    Examples:
        >>> noise, like = Brownian.of(seed=0, samples=2), torch.zeros(2, 3, dtype=torch.float64)
        >>> whole = noise.step(0.0, 0.5, like) * 0.5**0.5
        >>> parts = noise.step(0.0, 0.1, like) * 0.1**0.5 + noise.step(0.1, 0.5, like) * 0.4**0.5
        >>> torch.allclose(whole, parts)
        True
    """

    _end: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        """(W(t_next) − W(t)) / √|t_next − t|, of the shape, dtype and device of `like`."""
        a, b = interval(t), interval(t_next)
        if not (0 <= a <= 1 << DEPTH and 0 <= b <= 1 << DEPTH):
            raise ValueError(f"a step from t = {t:g} to {t_next:g}; the Brownian path is one of flow times in [0, 1]")
        if a == b:  # closer than the path is known
            return self.normal(STEP, a, like)
        size = abs(b - a)
        level = DEPTH + 1 - size.bit_length()  # from here on, a and b are under different nodes
        scale = 2.0 ** (DEPTH / 2) / math.sqrt(size)
        nodes, weights = _between(a, b, level)
        x = self.combination(BROWNIAN, nodes, scale * weights, like)
        for sign, end in ((1.0, b), (-1.0, a)):
            rest = self._beyond(end, level, like)
            if rest is not None:
                x = x.add_(rest, alpha=sign * scale * 2.0 ** (-level / 2))
        return x

    def _beyond(self, t: int, level: int, like: Tensor) -> Tensor | None:
        """The series at t from a level on, times 2^(level/2); None where it has ended."""
        kept = self._end.get((t, level))
        if kept is not None and kept.shape == like.shape and kept.dtype == like.dtype and kept.device == like.device:
            return kept
        nodes, weights = _from(t, level)
        if not len(nodes):
            return None
        found = self.combination(BROWNIAN, nodes, weights * 2.0 ** (level / 2), like)
        self._end.clear()
        self._end[t, level] = found
        return found


def _hats(t: int) -> tuple[Integers, Integers]:
    """Of each level, the address of the node above t, and the height of its hat at t in units of 2^(level − 52)."""
    inside = t & (WIDTHS - 1)
    return (t >> (DEPTH - LEVELS)) + (1 << LEVELS), np.minimum(inside, WIDTHS - inside)


@lru_cache(maxsize=1024)
def _from(t: int, level: int) -> tuple[Integers, Vector]:
    """Nodes and weights of the series at t from a level on."""
    nodes, heights = _hats(t)
    some = level + np.flatnonzero(heights[level:])
    return nodes[some], UNITS[some] * heights[some]


@lru_cache(maxsize=1024)
def _between(a: int, b: int, level: int) -> tuple[Integers, Vector]:
    """Nodes and weights of W(b) − W(a) before a level."""
    (first, low), (second, high) = (tuple(v[:level] for v in _hats(t)) for t in (a, b))
    apart = first != second
    nodes = np.concatenate(([0], second, first[apart]))
    weights = np.concatenate((
        [math.ldexp(b - a, -DEPTH)], UNITS[:level] * np.where(apart, high, high - low), -(UNITS[:level] * low)[apart],
    ))  # fmt: skip
    some = np.flatnonzero(weights)
    return nodes[some], weights[some]


NOISES: dict[str, type[Noise]] = {"fresh": Noise, "brownian": Brownian}
"""What a solver's steps draw: noise of their own, or the increments of a path."""


def named(noise: str) -> type[Noise]:
    """The kind of noise of a name; raise ValueError if there is none."""
    if noise not in NOISES:
        raise ValueError(f"noise = {noise!r}; expected one of {', '.join(NOISES)}")
    return NOISES[noise]
