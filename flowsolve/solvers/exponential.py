r"""Exponential integrators: one formula behind the fast samplers.

**The equation.** A *form* (p, q) measures the state by $c = p\alpha + q\sigma$ and freezes the combination

$$ F = q\,\hat z - p\,\hat\varepsilon: \qquad
   \text{data } (0, 1),\quad \text{noise } (1, 0),\quad \text{straight } (1, 1),\quad \text{blends } (\kappa, 1). $$

With $r = c/\alpha = p + q e^{-\lambda}$, $s_1 = \alpha/c = 1/r$ and $s_2 = \sigma/c = e^{-\lambda}/r$, the state
$y = x/c$ of the member η of the SDE family obeys, in the log-SNR λ,

$$ dy = (1+\eta^2)\,s_1 s_2\,F\,d\lambda \;-\; \eta^2\,q\,s_2\,y\,d\lambda \;+\; \sqrt2\,\eta\,s_2\,dW_\lambda . $$

Proof: $y = s_1\hat z + s_2\hat\varepsilon$ with $p s_1 + q s_2 = 1$, so $ds_1 = q s_1 s_2 d\lambda$ and
$ds_2 = -p s_1 s_2 d\lambda$, which is the ODE; the family adds $-\eta^2 s_2\hat\varepsilon\,d\lambda$, and
$\hat\varepsilon = q y - s_1 F$. The linear part is solved exactly, its factor being $(r_b/r_a)^{\eta^2}$:

$$ x_b = \frac{c_b}{c_a}\Bigl(\frac{r_b}{r_a}\Bigr)^{\eta^2} x_a
   + (1+\eta^2)\,c_b\int_{\lambda_a}^{\lambda_b} \Bigl(\frac{r_b}{r}\Bigr)^{\eta^2} s_1 s_2\,F\,d\lambda
   + \tau\,\xi, \qquad
   \tau^2 = 2\eta^2 c_b^2\int_{\lambda_a}^{\lambda_b} \Bigl(\frac{r_b}{r}\Bigr)^{2\eta^2} s_2^2\,d\lambda . $$

**The weights.** F is interpolated through evaluations at nodes $\lambda_j$ by the Lagrange polynomial in a *variable*
$v$ (λ itself, the form's clock, or flow time), which gives $x_b = X x_a + \sum_j w_j F_j + \tau\xi$ with
$w_j = w\,\omega_j$: $w$ the integral of the kernel, in closed form, and $\omega_j$ the mean of the j-th Lagrange basis
polynomial under it, by Gauss–Legendre quadrature in float64. k nodes make a step of order k.

| method | form | variable | nodes |
|---|---|---|---|
| DDIM | any | | the start of the step |
| DPM-Solver (Lu et al. 2022a), DPM-Solver++ (2022b) | noise, data | λ | in the step, or before it |
| DEIS: tAB, ρAB, log-ρ AB (Zhang & Chen 2023); LMS | noise | flow time, clock, λ | before the step |
| UniPC (Zhao et al. 2023) | data or noise | λ | before the step, then its end too |
| SA-Solver (Xue et al. 2023) | data, with η | λ | the same |
| SEEDS (Gonzalez et al. 2023), SDE-DPM-Solver++ | noise, data, with η = 1 | λ | in the step, or before it |

**Two nodes.** Published methods replace $\omega_1$, the weight of the second of two nodes, by its limit for small
steps: with $\rho = (\lambda_1 - \lambda_a)/h$,

* `exact`: the integral (DPM-Solver++'s "heun");
* `bh2`: $\omega_1 = 1/(2\rho)$ (its "midpoint", UniPC's $B(h) = e^h - 1$);
* `bh1`: $\omega_1 = A h/(2\rho w)$, $A = (1+\eta^2)\alpha_b\sigma_b/c_b$ (UniPC's $B(h) = h$).

All are of order 2; with three nodes and more the published methods and the integral are one.

**Ends.** At an end of the path λ may be infinite. A node there is left out of a polynomial in λ, and a step that ends
at σ = 0 uses the latest node alone and no noise: it ends in the denoised state $\alpha_b\hat z$, as DDIM's does. Where
c vanishes (noise form at α = 0, data form at σ = 0) F says nothing of x, and a step that sets out there is DDIM's too,
which no form distinguishes; with noise it draws all of it anew, $x_b = \alpha_b\hat z + \sigma_b\xi$.

**Long steps.** Where a step is more than 5 times as long in the variable as the one before (the last of a grid that is
uniform in the time of a VP path, say), a polynomial through earlier nodes is extrapolated too far to be of use, and the
latest node stands alone. On a sequence of refined grids this does not happen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve import kernels
from flowsolve._surroundings import array, within
from flowsolve.charts import Chart
from flowsolve.paths import Path, Point
from flowsolve.predictions import Estimate
from flowsolve.solvers.base import State

__all__ = [
    "FORMS", "RULES", "VARIABLES", "Form", "Update", "applied", "check_choice", "form_of", "frozen", "refuse_chart",
    "update",
]  # fmt: skip

Vector = NDArray[np.float64]

RULES = ("exact", "bh2", "bh1")
VARIABLES = ("log_snr", "clock", "time")
STRETCH = 5.0
REACH = 60.0  # beyond this distance in λ the kernel is below the rounding of float64
POINTS, PANEL = 16, 2.0  # Gauss–Legendre points to a panel, and its width in units of the kernel's scale


@dataclass(frozen=True)
class Form:
    """F = q ẑ − p ε̂, measured by c = pα + qσ."""

    p: float
    q: float

    def __post_init__(self) -> None:
        if not (0.0 <= self.p < math.inf and 0.0 <= self.q < math.inf and self.p + self.q > 0.0):
            raise ValueError(f"a form ({self.p!r}, {self.q!r}); expected two finite numbers >= 0, one of them > 0")

    def scale(self, point: Point) -> float:
        """c at a point of the path."""
        return float(self.p * point.alpha + self.q * point.sigma)

    def value(self, estimate: Estimate) -> Tensor:
        """F of an estimate, shape (B, *S)."""
        return estimate.combine(self.q, -self.p)

    def log_ratio(self, log_snr: Vector) -> Vector:
        """log r = log(p + q e^(−λ))."""
        with np.errstate(divide="ignore"):
            found: Vector = np.logaddexp(np.log(self.p), np.log(self.q) - log_snr)
        return found


FORMS = {"data": Form(0.0, 1.0), "noise": Form(1.0, 0.0), "straight": Form(1.0, 1.0)}


def form_of(form: str | float | Form) -> Form:
    """A form by its name, by the κ of the blend κ : 1 of noise and data, or itself."""
    if isinstance(form, Form):
        return form
    if isinstance(form, str) and form in FORMS:
        return FORMS[form]
    if isinstance(form, int | float) and not isinstance(form, bool):
        return Form(float(form), 1.0)
    raise ValueError(f"form = {form!r}; expected one of {', '.join(FORMS)}, or the number κ of the blend ẑ − κ ε̂")


class Update(NamedTuple):
    """x_b = state · x_a + Σ_j weights[j] · F_j + noise · ξ.

    Attributes:
        state: X.
        weights: one for each node, 0 for a node that is left out.
        noise: τ.
    """

    state: float
    weights: tuple[float, ...]
    noise: float


def update(
    path: Path,
    form: Form,
    a: float,
    b: float,
    nodes: Sequence[float],
    *,
    eta: float = 0.0,
    variable: str = "log_snr",
    rule: str = "exact",
) -> Update:
    """The coefficients of a step.

    Args:
        path: the path.
        form: what is frozen.
        a, b: flow times of the step's start and end.
        nodes: flow times of the evaluations, the latest first, so that the first is the one to fall back on.
        eta: the member of the SDE family, for a step towards the data.
        variable: in what F is a polynomial.
        rule: the weight of the second of two nodes in λ.
    """

    def made() -> Update:
        interval = _Interval(path, form, a, b, eta, nodes)
        kept = interval.kept(variable)
        share = [1.0] if len(kept) == 1 else interval.means(kept, variable, rule)
        weights = dict(zip(kept, share, strict=True))
        return Update(interval.decay, tuple(interval.whole * weights.get(t, 0.0) for t in nodes), interval.fresh)

    found: Update = path.remembered((form, a, b, *nodes, eta, variable, rule), made)
    return found


class _Interval:
    """A step's interval: the integrals of the page, in float64.

    Attributes:
        mixing: η²; what ends at the data holds no noise.
        shrink: r_b/r_a.
        decay: X = (c_b/c_a) (r_b/r_a)^η².
        whole: w = (1+η²) c_b ∫ (r_b/r)^η² s₁ s₂ dλ.
    """

    def __init__(self, path: Path, form: Form, a: float, b: float, eta: float, nodes: Sequence[float]) -> None:
        self.path, self.form, self.a, self.b, self.nodes = path, form, a, b, nodes
        self.points = {t: path.at(t) for t in (a, b, *nodes)}
        self.here, self.there = here, there = self.points[a], self.points[b]
        self.mixing = mixing = eta * eta if there.sigma else 0.0
        c_a, self.c = form.scale(here), form.scale(there)
        self.shrink = float(self.c * here.alpha / (there.alpha * c_a)) if there.alpha else math.inf
        self.decay = self.c / c_a * (1.0 if mixing == 0.0 or form.q == 0.0 else self.shrink**mixing)
        if form.q == 0.0:
            self.whole = (1.0 + mixing) * float(there.alpha * here.sigma / here.alpha - there.sigma)
        elif mixing == 0.0:
            self.whole = float(there.alpha - self.c * here.alpha / c_a) / form.q
        else:
            self.whole = float(there.alpha) * _lost(self.shrink, 1.0 + mixing) / form.q

    @property
    def fresh(self) -> float:
        """τ: for q > 0 the integral over r is elementary, dλ = −dr/(r − p)."""
        form, mixing, there = self.form, self.mixing, self.there
        if mixing == 0.0:
            return 0.0
        if form.q == 0.0:
            ratio = float(there.alpha * self.here.sigma / self.here.alpha)
            return math.sqrt(mixing * (ratio - there.sigma) * (ratio + there.sigma))
        drawn = _lost(self.shrink, 2.0 * mixing)
        s1 = float(there.alpha) / self.c
        held = 2.0 * mixing / (1.0 + 2.0 * mixing) * form.p * s1 * _lost(self.shrink, 1.0 + 2.0 * mixing)
        return self.c / form.q * math.sqrt(max(drawn - held, 0.0))

    def place(self, t: float, variable: str) -> float:
        """The variable at one of the times."""
        if variable == "time":
            return t
        point = self.points[t]
        if variable == "log_snr":
            return float(point.log_snr)
        # s₁ = α/c, or −s₂ = −σ/α in the noise form, where s₁ is constant
        return float(point.alpha) / self.form.scale(point) if self.form.q else -float(point.sigma / point.alpha)

    def kept(self, variable: str) -> list[float]:
        """The nodes that the polynomial goes through."""
        kept, ruler = list(self.nodes), "clock" if variable == "clock" else "log_snr"
        if self.c == 0.0 or (ruler == "log_snr" and not (self.there.alpha and self.there.sigma)):
            return kept[:1]
        if ruler == "log_snr":
            kept = [t for t in kept if self.points[t].alpha and self.points[t].sigma] or kept[:1]
        if kept[0] == self.a and len(kept) > 1:  # what follows reaches beyond its nodes
            first, second, end = (self.place(t, ruler) for t in (self.a, kept[1], self.b))
            kept = kept[:1] if abs(end - first) > STRETCH * abs(first - second) else kept
        return kept

    def means(self, nodes: Sequence[float], variable: str, rule: str) -> list[float]:
        """ω: the means of the Lagrange basis polynomials under the kernel."""
        a, b = ((self.place(t, "clock" if variable == "clock" else "log_snr")) for t in (self.a, self.b))
        if len(nodes) == 2 and self.a in nodes and rule != "exact" and variable == "log_snr":
            size = 1.0
            if rule == "bh1":
                rate = (1.0 + self.mixing) * float(self.there.alpha * self.there.sigma) / self.c
                size = rate * (b - a) / self.whole
            other = nodes[1 - nodes.index(self.a)]
            second = size * (b - a) / (2.0 * (self.place(other, variable) - a))
            return [1.0 - second if t == self.a else second for t in nodes]
        if variable == "clock":
            v, w = _quadrature(a, b, math.inf)
            if self.mixing and self.form.q:
                w = w * (v / b) ** self.mixing  # r_b/r
        else:
            a, b = min(max(a, b - REACH), b + REACH), min(max(b, a - REACH), a + REACH)
            v, w = _quadrature(a, b, 1.0 + self.mixing)
            exponent = -(self.mixing + 2.0) * self.form.log_ratio(v) - v
            w = w * np.exp(exponent - exponent.max())
            if variable == "time":
                v = array(self.path.time(torch.from_numpy(v)))
        w, places = w / w.sum(), [self.place(t, variable) for t in nodes]
        share = []
        for j, x in enumerate(places):
            others = [y for i, y in enumerate(places) if i != j]
            share.append(float(w @ np.prod([(v - y) / (x - y) for y in others], axis=0)))
        return share


def _lost(base: float, power: float) -> float:
    """1 − base^power."""
    return -math.expm1(power * math.log(base)) if base else 1.0


@cache
def _gauss() -> tuple[Vector, Vector]:
    """Nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(POINTS)
    return 0.5 * (x + 1.0), 0.5 * w


def _quadrature(a: float, b: float, rate: float) -> tuple[Vector, Vector]:
    """Nodes and weights on [a, b] for an integrand like e^(rate·v); a polynomial if the rate is infinite."""
    panels = 1 if math.isinf(rate) else max(1, math.ceil(abs(b - a) * rate / PANEL))
    x, w = _gauss()
    size = (b - a) / panels
    starts = a + size * np.arange(panels)
    return (starts[:, None] + size * x).ravel(), np.tile(size * w, panels)


def applied(made: Update, x: Tensor, values: Iterable[Tensor]) -> Tensor:
    """X x + Σ w F, without the noise."""
    terms = [(w, value) for w, value in zip(made.weights, values, strict=True) if w]
    fused = kernels.combination([made.state, *(w for w, _ in terms)], [x, *(value for _, value in terms)])
    if fused is not None:
        return fused
    total, kept = x * made.state, within() is not None  # what vmap maps cannot be written to a plain tensor
    for w, value in terms:
        total = total.add(value, alpha=w) if kept or total.requires_grad else total.add_(value, alpha=w)
    return total


def refuse_chart(solver: Any, chart: Chart | None) -> None:
    """Raise TypeError if a chart is given to a solver that has a form instead."""
    if chart is not None:
        raise TypeError(
            f"{type(solver).__name__} has no chart; drop chart={chart.name!r}. What it freezes is its form: "
            f"form='data', 'noise' or 'straight' (now {getattr(solver, 'form', None)!r})"
        )


def frozen(estimate: Estimate, path: Path, state: State, t: float, t_next: float, eta: float = 0.0) -> Tensor:
    """The step that sets out where c vanishes, at an end of the path."""
    there = path.at(t_next)
    if not eta:
        return estimate.combine(there.alpha, there.sigma)
    assert state.noise is not None
    x = estimate.combine(there.alpha, 0.0)
    return x.add(state.noise.step(t, t_next, x), alpha=float(there.sigma))


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless a setting is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, choices))}")
