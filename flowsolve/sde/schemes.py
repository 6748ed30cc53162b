r"""Schemes for SDEs of one's own: $dy = f(t, y)\,dt + g(t, y)\,dW$, Itô's or Stratonovich's.

| scheme | calculus | noise | strong order | evaluations of f, g a step |
|---|---|---|---|---|
| `EulerMaruyama` | Itô | all | ½; 1 if additive | 1, 1 |
| `Milstein` | both | diagonal, scalar, additive | 1 | 1, 1 with ∂g/∂y g beside it |
| `Milstein(derivatives=False)` | both | diagonal, scalar, additive | 1 | 1, 2 |
| `EulerHeun` | Stratonovich | all | 1; ½ if general | 1, 2 |
| `StochasticHeun`, `Midpoint` | Stratonovich | all | 1; ½ if general | 2, 2 |
| `ReversibleHeun` | Stratonovich | all | 1 if additive, else ½ | 1, 1 |
| `SRK` | Itô | additive; diagonal and scalar | 1.5 | 2, 2; 2, 4 |

With general noise, order 1 needs Lévy areas of pairs of Brownian motions, which are not drawn. A scheme of the other
calculus than the equation's is given the drift that has the same solution (`flowsolve.sde.problem`), which costs a
derivative of g.

Over a step of length h, with W its increment and H its space-time Lévy area (`flowsolve.sde.motion`):

**Milstein** adds $\tfrac12 g'g\,(W^2 - h)$ to Euler and Maruyama's step, or $\tfrac12 g'g\,W^2$ for Stratonovich;
without derivatives $g'g \approx (g(t, y + f h + g\sqrt h) - g)/\sqrt h$ for Itô, where W² − h has no mean, and a
central difference with $y \pm g\sqrt h$ for Stratonovich, where W² has one (3 evaluations of g).

**Heun and its kin** average g, which is what Stratonovich's integral does: $\hat y = y + f h + g W$ and then
$y' = y + \tfrac12 (f + \hat f) h + \tfrac12 (g + \hat g) W$. `EulerHeun` averages g alone, over $y$ and $y + gW$;
`Midpoint` evaluates both at $y + \tfrac12 (f h + g W)$. **Reversible Heun** (Kidger et al. 2021) keeps the predicted
state, $\hat y' = 2y - \hat y + \hat f h + \hat g W$, and uses its evaluations in two steps: one a step suffices, and a
step can be undone exactly. It is stable for short steps only.

**Runge–Kutta of strong order 1.5** (Rößler 2010). With $I_1 = W$, $I_{10} = h(\tfrac12 W + H)$,
$I_{11} = \tfrac12(W^2 - h)$, $I_{111} = \tfrac16(W^3 - 3hW)$ and stages

$$ \begin{aligned}
   Y^0_i &= y + h\sum_j A^0_{ij} f(t + c^0_j h, Y^0_j) + \tfrac{I_{10}}h \sum_j B^0_{ij}\, g(t + c^1_j h, Y^1_j), \\
   Y^1_i &= y + h\sum_j A^1_{ij} f(t + c^0_j h, Y^0_j) + \sqrt h \sum_j B^1_{ij}\, g(t + c^1_j h, Y^1_j), \\
   y' &= y + h \sum_i \alpha_i f(t + c^0_i h, Y^0_i) + \sum_i \Bigl(\beta^1_i I_1 + \beta^2_i \tfrac{I_{11}}{\sqrt h}
       + \beta^3_i \tfrac{I_{10}}h + \beta^4_i \tfrac{I_{111}}h\Bigr)\, g(t + c^1_i h, Y^1_i),
   \end{aligned} $$

the expansion of y' meets Itô's and Taylor's up to the terms of $h^{3/2}$ if, with $e = (1, …, 1)$ and products of
vectors taken entry by entry,

| | I₁ | I₁₁/√h | I₁₀/h | I₁₁₁/h |
|---|---|---|---|---|
| $\beta^\top e$ | 1 | 0 | 0 | 0 |
| $\beta^\top B^1 e$ | 0 | 1 | 0 | 0 |
| $\beta^\top A^1 e$ and $\beta^\top c^1$ | 1 | 0 | −1 | 0 |
| $\beta^\top (B^1 e)^2$ | 1 | 0 | −1 | 2 |
| $\beta^\top B^1 B^1 e$ | 0 | 0 | 0 | 1 |

and $\alpha^\top e = 1$, $\alpha^\top A^0 e = \alpha^\top c^0 = \tfrac12$, $\alpha^\top B^0 e = 1$,
$\alpha^\top (B^0 e)^2 = \tfrac32$, the last three for the means of what is of order 2; for g along the drift's stages
$\tfrac12\beta^{1\top} A^1 B^0 e + \tfrac13\beta^{3\top} A^1 B^0 e = 0$, for the same reason. Additive noise is a
special case with fewer conditions: $\beta^1, \beta^3$ and the row of $c^1$.

Sources: Maruyama 1955; Milstein 1975; Kloeden & Platen 1992; Rößler 2010, whose tableaus SRA1 and SRI1W1 these are;
Kidger, Foster, Li & Lyons 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowsolve.sde.motion import Drive
from flowsolve.sde.problem import Problem

__all__ = [
    "SCHEMES", "SRA1", "SRI1", "SRK", "EulerHeun", "EulerMaruyama", "Midpoint", "Milstein", "ReversibleHeun", "Scheme",
    "StochasticHeun", "Tableau", "along",
]  # fmt: skip

Carry = tuple[Tensor, ...]
"""What goes from step to step, the state first."""

COMMUTATIVE = ("diagonal", "scalar", "additive")


class Scheme:
    """A scheme for SDEs. Schemes are frozen dataclasses: equal settings are equal schemes."""

    kind: ClassVar[str] = "ito"
    """The calculus: "ito", "stratonovich", or "" for both."""

    noises: ClassVar[Sequence[str]] = (*COMMUTATIVE, "general")

    def nodes(self, noise_type: str) -> Sequence[float]:
        """Where in a step it asks, as fractions."""
        return (0.0,)

    def area(self, noise_type: str) -> bool:
        """Whether it needs H."""
        return False

    def order(self, noise_type: str) -> float:
        """The strong order."""
        return 0.5 if noise_type == "general" else 1.0

    def begin(self, p: Problem, t: float, y: Tensor) -> Carry:
        """What is carried at the start."""
        return (y,)

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        raise NotImplementedError


@dataclass(frozen=True)
class EulerMaruyama(Scheme):
    """Euler and Maruyama's scheme, for Itô's equation and all noise: strong order ½ (additive: 1), weak order 1."""

    def order(self, noise_type: str) -> float:
        """The strong order."""
        return 1.0 if noise_type == "additive" else 0.5

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        (y,) = carry
        f = p.f(t, y)
        return (p.added(along(y, f, p.size(t, t_next)), p.g(t, y), drive[0]),)


@dataclass(frozen=True)
class Milstein(Scheme):
    """Milstein's scheme, of strong order 1, for diagonal, scalar and additive noise in either calculus.

    Attributes:
        derivatives: use ∂g/∂y g, by forward-mode differentiation; False takes differences of g instead.
    """

    kind: ClassVar[str] = ""
    noises: ClassVar[Sequence[str]] = COMMUTATIVE
    derivatives: bool = True

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        (y,), h, w = carry, p.size(t, t_next), drive[0]
        f = p.own(t, y)
        if p.noise_type == "additive":
            return (p.added(along(y, f, h), p.g(t, y), w),)
        ito = p.sde_type == "ito"
        square = w.square()
        if ito:
            square = square - h
        if self.derivatives:
            g, bend = p.slope(t, y)
        else:
            g, root = p.g(t, y), _root(h)
            if ito:
                bend = (p.g(t, along(along(y, f, h), g, root)) - g) / root
            else:
                bend = (p.g(t, y + g * root) - p.g(t, y - g * root)) / (2.0 * root)
        return (along(y, f, h).addcmul(g, w).addcmul(bend, square, value=0.5),)


@dataclass(frozen=True)
class EulerHeun(Scheme):
    """Euler's step for f, Heun's for g, for Stratonovich's equation: one evaluation of f a step."""

    kind: ClassVar[str] = "stratonovich"

    def nodes(self, noise_type: str) -> Sequence[float]:
        """Where in a step it asks, as fractions."""
        return (0.0, 1.0)

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        (y,), w = carry, drive[0]
        first = p.g(t, y)
        second = p.g(t_next, p.added(y, first, w))
        return (p.added(along(y, p.f(t, y), p.size(t, t_next)), first + second, 0.5 * w),)


@dataclass(frozen=True)
class StochasticHeun(Scheme):
    """Heun's scheme for Stratonovich's equation: strong order 1 (general noise: ½), order 2 where g = 0."""

    kind: ClassVar[str] = "stratonovich"

    def nodes(self, noise_type: str) -> Sequence[float]:
        """Where in a step it asks, as fractions."""
        return (0.0, 1.0)

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        (y,), h, w = carry, p.size(t, t_next), drive[0]
        f, first = p.f(t, y), p.g(t, y)
        ahead = p.added(along(y, f, h), first, w)
        g = first + p.g(t_next, ahead)
        return (p.added(along(y, f + p.f(t_next, ahead), h, 0.5), g, 0.5 * w),)


@dataclass(frozen=True)
class Midpoint(Scheme):
    """The midpoint rule for Stratonovich's equation: strong order 1 (general noise: ½), order 2 where g = 0."""

    kind: ClassVar[str] = "stratonovich"

    def nodes(self, noise_type: str) -> Sequence[float]:
        """Where in a step it asks, as fractions."""
        return (0.0, 0.5)

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        (y,), h, w = carry, p.size(t, t_next), drive[0]
        middle, t_half = p.added(along(y, p.f(t, y), h, 0.5), p.g(t, y), 0.5 * w), t + 0.5 * h
        return (p.added(along(y, p.f(t_half, middle), h), p.g(t_half, middle), w),)


@dataclass(frozen=True)
class ReversibleHeun(Scheme):
    """The reversible Heun scheme for Stratonovich's equation: one evaluation a step, and steps that can be undone.

    It alone has `gradient="adjoint"`: memory of O(1), and the gradient of the steps made, to rounding.
    """

    kind: ClassVar[str] = "stratonovich"

    def nodes(self, noise_type: str) -> Sequence[float]:
        """Where in a step it asks, as fractions."""
        return (0.0, 1.0)

    def begin(self, p: Problem, t: float, y: Tensor) -> Carry:
        """The state and, beside it, its prediction with f and g there."""
        return (y, y, p.f(t, y), _whole(p, t, y))

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        y, hat, f, g = carry
        h, w = p.size(t, t_next), drive[0]
        hat = p.added(along(2.0 * y - hat, f, h), g, w)
        f_next, g_next = p.f(t_next, hat), _whole(p, t_next, hat)
        ahead = p.added(along(y, f + f_next, h, 0.5), g + g_next, 0.5 * w)
        return (ahead, hat, f_next, g_next)


def _whole(p: Problem, t: float, y: Tensor) -> Tensor:
    """g as a tensor."""
    g = p.g(t, y)
    return g if isinstance(g, Tensor) else y.new_full((), g)


@dataclass(frozen=True)
class Tableau:
    """The numbers of a Runge–Kutta scheme of strong order 1.5; see the module. Rows are lower triangular."""

    alpha: tuple[float, ...]
    beta: tuple[tuple[float, ...], ...]
    c0: tuple[float, ...]
    c1: tuple[float, ...]
    a0: tuple[tuple[float, ...], ...]
    b0: tuple[tuple[float, ...], ...]
    a1: tuple[tuple[float, ...], ...] = ()
    b1: tuple[tuple[float, ...], ...] = ()

    def row(self, matrix: tuple[tuple[float, ...], ...], i: int) -> tuple[float, ...]:
        """A row of a matrix, empty where it is 0."""
        return matrix[i] if matrix else ()


SRA1 = Tableau(
    alpha=(1 / 3, 2 / 3), beta=((1.0, 0.0), (0.0, 0.0), (-1.0, 1.0)), c0=(0.0, 0.75), c1=(1.0, 0.0),
    a0=((), (0.75,)), b0=((), (1.5,)),
)  # fmt: skip

SRI1 = Tableau(
    alpha=(1 / 3, 2 / 3, 0.0, 0.0),
    beta=(
        (-1.0, 4 / 3, 2 / 3, 0.0), (-1.0, 4 / 3, -1 / 3, 0.0), (2.0, -4 / 3, -2 / 3, 0.0), (-2.0, 5 / 3, -2 / 3, 1.0),
    ),
    c0=(0.0, 0.75, 0.0, 0.0), c1=(0.0, 0.25, 1.0, 0.25),
    a0=((), (0.75,), (), ()), b0=((), (1.5,), (), ()),
    a1=((), (0.25,), (1.0,), (0.0, 0.0, 0.25)), b1=((), (0.5,), (-1.0,), (-5.0, 3.0, 0.5)),
)  # fmt: skip


@dataclass(frozen=True)
class SRK(Scheme):
    """Rößler's Runge–Kutta schemes of strong order 1.5 for Itô's equation with additive, diagonal or scalar noise.

    Additive noise: SRA1, weak order 2; 2 evaluations of f, 2 of g a step. Diagonal and scalar noise: SRI1W1; 2 of f,
    4 of g, no derivatives.
    """

    noises: ClassVar[Sequence[str]] = COMMUTATIVE

    def nodes(self, noise_type: str) -> Sequence[float]:
        """Where in a step it asks, as fractions."""
        tableau = SRA1 if noise_type == "additive" else SRI1
        return tuple(dict.fromkeys((*tableau.c0, *tableau.c1)))

    def area(self, noise_type: str) -> bool:
        """Whether it needs H."""
        return True

    def order(self, noise_type: str) -> float:
        """The strong order."""
        return 1.5

    def step(self, p: Problem, carry: Carry, t: Any, t_next: Any, drive: Drive) -> Carry:
        """One step."""
        (y,), h = carry, p.size(t, t_next)
        w, area = drive
        assert area is not None
        mixed, root = 0.5 * w + area, _root(h)
        tableau = SRA1 if p.noise_type == "additive" else SRI1
        basis = [w, w, mixed, w]
        if tableau is SRI1:
            basis = [w, (w.square() - h) * (0.5 / root), mixed, w * (w.square() - 3.0 * h) * (1.0 / (6.0 * h))]
        f: list[Tensor] = []
        g: list[Any] = []
        total = y
        for i, share in enumerate(tableau.alpha):
            a1, b1 = tableau.row(tableau.a1, i), tableau.row(tableau.b1, i)
            g.append(p.g(_at(t, t_next, tableau.c1[i]), _added(_added(y, h, a1, f), root, b1, g)))
            a0, b0 = tableau.row(tableau.a0, i), tableau.row(tableau.b0, i)
            if not i or a0 or b0:
                stage = _added(y, h, a0, f)
                for c, v in zip(b0, g, strict=False):
                    stage = p.added(stage, v, c * mixed) if c else stage
                f.append(p.f(_at(t, t_next, tableau.c0[i]), stage))
                total = along(total, f[i], h, share)
            else:  # the first again
                f.append(f[0])
        for i, v in enumerate(g):
            terms = [row[i] * part for row, part in zip(tableau.beta, basis, strict=False) if row[i]]
            if terms:
                total = p.added(total, v, sum(terms[1:], start=terms[0]))
        return (total,)


def along(y: Tensor, slope: Tensor, h: Any, c: float = 1.0) -> Tensor:
    """y + c h slope, for h a number or one a sample."""
    if isinstance(h, Tensor):
        return torch.addcmul(y, slope, h, value=c)
    return torch.add(y, slope, alpha=c * h)


def _root(h: Any) -> Any:
    return h.sqrt() if isinstance(h, Tensor) else math.sqrt(h)


def _added(y: Tensor, scale: Any, row: Sequence[float], slopes: Sequence[Any]) -> Tensor:
    """y + scale Σ_j row_j slopes_j."""
    for c, v in zip(row, slopes, strict=False):
        y = along(y, v, scale, c) if c else y
    return y


def _at(t: Any, t_next: Any, c: float) -> Any:
    """A time within a step, with its ends to the bit."""
    return t_next if c == 1.0 else t + c * (t_next - t)


SCHEMES: dict[str, Scheme] = {
    "euler": EulerMaruyama(), "euler_maruyama": EulerMaruyama(), "milstein": Milstein(), "euler_heun": EulerHeun(),
    "heun": StochasticHeun(), "stochastic_heun": StochasticHeun(), "midpoint": Midpoint(),
    "reversible_heun": ReversibleHeun(), "srk": SRK(),
}  # fmt: skip
"""Name → scheme."""
