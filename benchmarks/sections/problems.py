r"""Fourteen non-stiff systems from Hull, Enright, Fellen & Sedgwick 1972 ("DETEST"), 0 ≤ t ≤ 20.

| class | here | |
|---|---|---|
| A, single equations | A2, A3, A4 | $-y^3/2$; $y\cos t$; logistic |
| B, small systems | B1, B4, B5 | Lotka–Volterra; a curve on a torus; Euler's rigid body |
| C, moderate systems | C1 | a chain of ten decays |
| D, orbits | D1 … D5 | Kepler's problem, eccentricity 0.1, 0.3, 0.5, 0.7, 0.9 |
| E, second order | E2, E3 | van der Pol's equation, Duffing's with a driving force |

A2 stands for A1 ($-y$), whose solution is $2\cdot10^{-9}$ at the end, so that an error there says nothing.

Fields are written once, on lists of numbers, with the functions of a module (`math`, `jax.numpy`): every solver is
given the same arithmetic. The truth is the closed form where there is a plain one (A, C1 by its Poisson sum, D by
Kepler's equation), and else scipy's DOP853 at rtol = 1e-13, atol = 1e-15, which an extrapolation method in extended
precision has been found to agree with to 4e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["END", "PROBLEMS", "Problem"]

END = 20.0
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y, functions) from y0 at t = 0, and y at t = END if it is known in closed form."""

    name: str
    field: Callable[[Any, Sequence[Any], Any], list[Any]]
    y0: tuple[float, ...]
    exact: tuple[float, ...] | None = None

    def truth(self) -> Vector:
        """y(END)."""
        if self.exact is not None:
            return np.array(self.exact)
        from scipy.integrate import solve_ivp

        found = solve_ivp(
            lambda t, y: self.field(t, y.tolist(), math), (0.0, END), self.y0, method="DOP853", rtol=1e-13, atol=1e-15
        )
        return np.asarray(found.y[:, -1], dtype=np.float64)


def _lotka_volterra(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    return [2.0 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])]


def _torus(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    r = m.sqrt(y[0] * y[0] + y[1] * y[1])
    return [-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r]


def _rigid_body(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    return [y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]


def _chain(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    return [-y[0], *(y[i - 1] - y[i] for i in range(1, 9)), y[8]]


def _kepler(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    square = y[0] * y[0] + y[1] * y[1]
    cube = square * m.sqrt(square)
    return [y[2], y[3], -y[0] / cube, -y[1] / cube]


def _van_der_pol(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    return [y[1], (1.0 - y[0] * y[0]) * y[1] - y[0]]


def _duffing(t: Any, y: Sequence[Any], m: Any) -> list[Any]:
    return [y[1], y[0] ** 3 / 6.0 - y[0] + 2.0 * m.sin(2.78535 * t)]


def _decayed() -> tuple[float, ...]:
    terms = [math.exp(-END) * END**k / math.factorial(k) for k in range(9)]
    return (*terms, 1.0 - math.fsum(terms))


def _orbit(e: float) -> Problem:
    """The orbit of eccentricity e from its pericentre; its eccentric anomaly u solves u − e sin u = t."""
    u = END
    for _ in range(200):
        u -= (u - e * math.sin(u) - END) / (1.0 - e * math.cos(u))
    w = 1.0 / (1.0 - e * math.cos(u))
    flat = math.sqrt(1.0 - e * e)
    end = (math.cos(u) - e, flat * math.sin(u), -math.sin(u) * w, flat * math.cos(u) * w)
    start = (1.0 - e, 0.0, 0.0, math.sqrt((1.0 + e) / (1.0 - e)))
    return Problem(f"D{round(5 * e + 0.5)}", _kepler, start, end)


PROBLEMS = (
    Problem("A2", lambda t, y, m: [-0.5 * y[0] ** 3], (1.0,), (1.0 / math.sqrt(1.0 + END),)),
    Problem("A3", lambda t, y, m: [y[0] * m.cos(t)], (1.0,), (math.exp(math.sin(END)),)),
    Problem("A4", lambda t, y, m: [0.25 * y[0] * (1.0 - 0.05 * y[0])], (1.0,), (20.0 / (1.0 + 19.0 * math.exp(-5.0)),)),
    Problem("B1", _lotka_volterra, (1.0, 3.0)),
    Problem("B4", _torus, (3.0, 0.0, 0.0)),
    Problem("B5", _rigid_body, (0.0, 1.0, 1.0)),
    Problem("C1", _chain, (1.0, *[0.0] * 9), _decayed()),
    *(_orbit(e) for e in (0.1, 0.3, 0.5, 0.7, 0.9)),
    Problem("E2", _van_der_pol, (2.0, 0.0)),
    Problem("E3", _duffing, (0.0, 0.0)),
)
