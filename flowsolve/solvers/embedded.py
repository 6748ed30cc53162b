r"""DPM-Solver-12 and -23: exponential pairs on the per-sample step control.

In the noise chart dy/ds = ε̂ with s = σ/α, in the data chart ẑ with s = α/σ; in both log s = ∓λ. A pair of single-step
DPM-Solvers (Lu et al. 2022a, appendix C) interpolates the slope by a polynomial in log s rather than in s. With
L = log(s_b/s_a), $u = \log(s/s_a)/L$ and nodes at $s_a e^{c_i L}$, the mean of u over the step's ds is

$$ m(L) = \frac{1}{1-e^{-L}} - \frac1L \;\to\; \tfrac12 , $$

so that two nodes 0 and c have the weights $1 - m/c$ and $m/c$ (times $s_b - s_a$). As L → 0 all of it tends to a
Runge–Kutta pair, whose tableau the solver carries (`adaptive=False` runs that one on a fixed grid).

| solver | carried on | companion | evaluations an attempt |
|---|---|---|---|
| `DPMSolver12` | DPM-Solver-2: stage ½, of weight 1 | DPM-Solver-1 | 2 |
| `DPMSolver23` | DPM-Solver-3: stages ⅓, ⅔ | DPM-Solver-2 with its stage at ⅓ | 3 |

One of the evaluations is at the end of the step, and the first of the next one: a rejected attempt of DPM-Solver-12
costs 2 evaluations, as in its authors' code. Every chart whose clock is positive serves, between finite ends.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowsolve.kernels import Slopes, aim, host
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Attempt
from flowsolve.solvers.base import Nodes, Query
from flowsolve.solvers.tableaus import Tableau

__all__ = ["DPMSolver12", "DPMSolver23"]

Vector = NDArray[np.float64]

DPM12 = Tableau("dpm12", 2, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0), error=((-1.0, 1.0),), error_order=1)
DPM23 = Tableau(
    "dpm23",
    3,
    (0.0, 1 / 3, 2 / 3),
    ((), (1 / 3,), (0.0, 2 / 3)),
    (1 / 4, 0.0, 3 / 4),
    error=((3 / 4, -3 / 2, 3 / 4),),
    error_order=2,
)
END = np.ones(1)


def first_moment(span: Vector) -> Vector:
    """m(L), with its series where the terms cancel."""
    small = np.abs(span) < 1e-2
    safe = np.where(small, 1.0, span)
    found: Vector = np.where(small, 0.5 + span / 12.0 - span**3 / 720.0, -1.0 / np.expm1(-safe) - 1.0 / safe)
    return found


@dataclass(frozen=True)
class _ExponentialPair(Adaptive):
    """An embedded pair in log s; a subclass gives its weights, which depend on L."""

    ruler: ClassVar[str] = "noise"

    def stage(self, i: int, span: Vector) -> Vector:
        """The weights of stage i > 0 over its own span, (B, i)."""
        raise NotImplementedError

    def weights(self, span: Vector) -> tuple[Vector, Vector]:
        """The weights of the step and of its error estimate, (B, stages)."""
        raise NotImplementedError

    def begin(
        self, y: Tensor, s: float, s_end: float, own: Vector | None = None
    ) -> Generator[Query, Tensor, AdaptiveState]:
        """Ask for the first slope, choose the first step of each sample, and return the state at s."""
        if not (0.0 < s < np.inf and 0.0 < s_end < np.inf):
            raise ValueError(
                f"{type(self).__name__} steps in log-SNR, and the clock of the chart runs from {s:g} to {s_end:g}; "
                "expected finite numbers > 0. Give an interval that stops short of α = 0 and σ = 0: at the data "
                "final='sigma_min' or 'denoise' does; at the noise, start= a state at path.time(-6.0), say"
            )
        return (yield from super().begin(y, s, s_end, own))

    def ahead(self, state: AdaptiveState, s_end: float) -> Vector:
        """The times that the next attempt asks about, (m, B)."""
        _, s_next, _ = aim(state.real, s_end, END)
        c = np.array(self.tableau.c[1:])[:, None]
        return np.concatenate((state.s * np.exp(c * np.log(s_next / state.s)), s_next[None]))

    def attempt(
        self, state: AdaptiveState, s_end: float, errors: Vector | None = None, own: Vector | None = None
    ) -> Generator[Query, Tensor, Attempt]:
        """One attempted step of every sample towards s_end."""
        h, s_next, _ = aim(state.real, s_end, END)
        s, span = state.s, np.log(s_next / state.s)
        c = np.array(self.tableau.c[1:])[:, None]
        nodes = Nodes(self.ahead(state, s_end))
        inner = nodes.table[:-1]
        slopes, count = Slopes(state.y), len(c)
        slopes.append(state.slope)
        for i in range(count):
            ahead = slopes.advance(inner[i] - s, np.arange(i + 1), self.stage(i + 1, c[i] * span))
            slopes.append((yield Query(ahead, None, nodes, i)))
        carried, estimate = self.weights(span)
        stages = np.arange(count + 1)
        ahead = slopes.advance(h, stages, carried)
        error = errors
        if error is None:
            norm = slopes.error_norm(h, stages, estimate, ahead, *self.tolerances(ahead, own), self.norm)
            error = host(norm)
        slopes.append((yield Query(ahead, None, nodes, count)))
        return self._judged(state, s_end, h, s_next, slopes, ahead, error)


@dataclass(frozen=True)
class DPMSolver12(_ExponentialPair):
    """DPM-Solver-12 (Lu et al. 2022a): orders 2 and 1, 2 evaluations an attempt, for loose tolerances."""

    tableau = DPM12

    def stage(self, i: int, span: Vector) -> Vector:
        """Euler's."""
        return np.ones((1, 1))

    def weights(self, span: Vector) -> tuple[Vector, Vector]:
        """The stage's slope, and what it differs by from the first."""
        return np.array([[0.0, 1.0]]), np.array([[-1.0, 1.0]])


@dataclass(frozen=True)
class DPMSolver23(_ExponentialPair):
    """DPM-Solver-23 (Lu et al. 2022a): orders 3 and 2, 3 evaluations an attempt."""

    tableau = DPM23

    def stage(self, i: int, span: Vector) -> Vector:
        """Euler's; then through 0 and ⅓, which is ½ of the way to ⅔."""
        if i == 1:
            return np.ones((1, 1))
        second = 2.0 * first_moment(span)
        return np.stack((1.0 - second, second), 1)

    def weights(self, span: Vector) -> tuple[Vector, Vector]:
        """Through 0 and ⅔; less DPM-Solver-2's, with weight 3/2 at ⅓."""
        last, zero = 1.5 * first_moment(span), np.zeros_like(span)
        return np.stack((1.0 - last, zero, last), 1), np.stack((1.5 - last, zero - 1.5, last), 1)
