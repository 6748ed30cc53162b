r"""Butcher tableaus: explicit Runge–Kutta methods as data.

A method with stages $i = 1 … m$ computes

$$ k_i = f\bigl(s + c_i h,\; y + h\textstyle\sum_{j<i} a_{ij} k_j\bigr), \qquad y' = y + h\textstyle\sum_i b_i k_i, $$

and, where it has an embedded companion $\hat b$, the local error estimate $h\sum_i (b_i - \hat b_i)\,k_i$. If the last
row of $a$ is $b$, the last stage is the first of the next step ("first same as last"): a fixed step then needs one
evaluation less than the tableau has stages. Entries are Python floats.

Sources: Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, chapter II; Dormand & Prince 1980;
Kutta 1901.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

__all__ = ["CLASSIC4", "DOPRI5", "EULER", "HEUN", "KUTTA3", "MIDPOINT", "Tableau"]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method.

    Attributes:
        name: the method's name.
        order: order of the solution that is carried on.
        c: nodes, one a stage.
        a: rows of the strictly lower triangle, the first one empty.
        b: weights of the solution.
        error: b − b̂, the weights of the local error estimate; empty without a companion.
        error_order: order of the companion b̂.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()
    error_order: int = 0

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.c)

    @property
    def fsal(self) -> bool:
        """Whether the last stage is the first of the next step."""
        return self.b[-1] == 0.0 and self.a[-1] == self.b[:-1] and self.c[-1] == 1.0

    @property
    def evaluations(self) -> int:
        """Slopes needed for a step without error estimate."""
        return self.stages - self.fsal


def _tableau(name: str, order: int, a: str, b: str, companion: str = "", error_order: int = 0) -> Tableau:
    """Rows as text of exact fractions; the nodes are the row sums."""
    rows = [[Fraction(v) for v in line.split()] for line in a.strip().split("\n")] if a else []
    rows = [[], *rows]
    weights = [Fraction(v) for v in b.split()]
    other = [Fraction(v) for v in companion.split()]
    return Tableau(
        name,
        order,
        c=tuple(float(sum(row)) for row in rows),
        a=tuple(tuple(map(float, row)) for row in rows),
        b=tuple(map(float, weights)),
        error=tuple(float(x - y) for x, y in zip(weights, other, strict=True)) if other else (),
        error_order=error_order,
    )


EULER = _tableau("euler", 1, "", "1")
MIDPOINT = _tableau("midpoint", 2, "1/2", "0 1")
HEUN = _tableau("heun", 2, "1", "1/2 1/2")
KUTTA3 = _tableau("kutta3", 3, "1/2\n-1 2", "1/6 2/3 1/6")
CLASSIC4 = _tableau("rk4", 4, "1/2\n0 1/2\n0 0 1", "1/6 1/3 1/3 1/6")
DOPRI5 = _tableau(
    "dopri5",
    5,
    """
    1/5
    3/40 9/40
    44/45 -56/15 32/9
    19372/6561 -25360/2187 64448/6561 -212/729
    9017/3168 -355/33 46732/5247 49/176 -5103/18656
    35/384 0 500/1113 125/192 -2187/6784 11/84
    """,
    "35/384 0 500/1113 125/192 -2187/6784 11/84 0",
    "5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40",
    4,
)
