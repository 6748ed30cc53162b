r"""The last stretch to an end of a path where the log-SNR is infinite.

Between the outermost node of a curve and such an end no scale in λ serves, but one chart is finite: with clean data
(σ = 0) the noise chart $y = x/\alpha$, $s = \sigma/\alpha$, $dy/ds = \hat\varepsilon$; with pure noise (α = 0) the data
chart $y = x/\sigma$, $s = \alpha/\sigma$, $dy/ds = \hat z$ (`flowsolve.charts`). In both s vanishes at the end, and the
change of variables of *any* field is

$$ y(0) = y(s_0) - \int_0^{s_0} f\,ds , \qquad
   \log p_y(y(0)) = \log p_y(y(s_0)) + \int_0^{s_0} \operatorname{tr}\frac{\partial f}{\partial y}\,ds , \qquad
   \operatorname{tr}\frac{\partial\hat\varepsilon}{\partial y} = \frac Ts, \quad
   \operatorname{tr}\frac{\partial\hat z}{\partial y} = \frac{D - T}s , $$

with T of `flowsolve.likelihood.curve`. No score is needed here, so what holds for a network that is no conditional
expectation is what holds for one that is. Both integrals are those of the polynomial through the end itself, which is
evaluated, and the two nodes next to it: $O(s_0 s_1^3)$. Where the prediction tells nothing at the end (noise at α = 0,
data at σ = 0), they are those of the line through the two nodes, $O(s_0 s_1^2)$.

A stretch is set out on from one side. That is where the state is known; to the other side it is taken by Euler's step,
evaluated there, and taken again by the trapezoidal rule, the output being kept: the second state is off by
$O(s_0^3)$. Neither side needs an evaluation more than the quadrature has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flowsolve import charts
from flowsolve._batch import per_sample, rows
from flowsolve.flow import Flow
from flowsolve.likelihood.curve import Curve
from flowsolve.predictions import Estimate

__all__ = ["Stretch", "Tip"]

Tip = tuple[Tensor, Tensor]
"""At the end itself: dy/ds, shape (B, D), and tr ∂(dy/ds)/∂y, (B, P)."""


class Stretch:
    """From the outermost nodes of a curve to the end beyond them.

    Args:
        flow: the flow.
        t: flow time of the end, where α = 0 or σ = 0.
        near: flow times of the two nodes next to it, the nearest first.

    Attributes:
        clean: whether it is the data end.
        seen: whether the flow's prediction tells an estimate at the end.
        scale: c at the end.
        near: c at the nearest node.
        width: s at the nearest node.
    """

    def __init__(self, flow: Flow, t: float, near: Sequence[float]) -> None:
        path, end = flow.path, flow.path.at(t)
        self.t, self.clean, self.seen = t, end.sigma == 0.0, not flow.prediction.singular(end)
        chart = charts.CHARTS["noise" if self.clean else "data"]
        self.row = (0.0, 1.0) if self.clean else (1.0, 0.0)
        self.scale, self.near = float(chart.scale(end)), float(chart.scale(path.at(near[0])))
        self.places = [float(chart.clock(path, v)) for v in near]
        self.width = self.places[0]

    def slope(self, estimate: Estimate) -> Tensor:
        """dy/ds of an estimate, (B, D)."""
        return rows(estimate.combine(*self.row))

    def divergence(self, estimate: Estimate, trace: Tensor, size: int) -> Tensor:
        """tr ∂(dy/ds)/∂y at the end, (B, P), from the traces of the output's Jacobian."""
        k_x, k_o = (per_sample(k, trace) for k in estimate.coefficients(*self.row))
        found: Tensor = self.scale * (k_x * size + k_o * trace)
        return found

    def entered(self, y: Tensor, outer: Tensor | None, inner: Tensor) -> Tensor:
        """y at the nearest node, (B, D), from y at the end and dy/ds on both sides; unseen, it vanishes at the end."""
        return y + 0.5 * self.width * (inner if outer is None else outer + inner)

    def left(self, curve: Curve, outer: Tensor | None) -> Tensor:
        """y at the end, (B, D), from the states and slopes of a curve; without `outer`, a prediction."""
        indices = self._indices(curve)
        slopes = [curve.noise(k) if self.clean else curve.data[k] for k in indices]
        return curve.x[indices[0]] / self.near - self._integral(slopes, outer)

    def gained(self, curve: Curve, outer: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p_y at the end less that at the nearest node, (B, P), and by how much a lower order differs, (B, 1)."""
        traces = []
        for k, s in zip(self._indices(curve), self.places, strict=True):
            traces.append((curve.trace[k] if self.clean else curve.x.shape[2] - curve.trace[k]) / s)
        found, rough = self._integral(traces, outer), self._integral(traces[:1], outer)
        return found, (found - rough).mean(1, keepdim=True).abs()

    def _indices(self, curve: Curve) -> tuple[int, int]:
        return (0, 1) if self.clean else (len(curve.rule) - 1, len(curve.rule) - 2)

    def _integral(self, values: Sequence[Tensor], outer: Tensor | None) -> Tensor:
        """∫ from 0 to the nearest node of the polynomial through values there, farther in, and at the end if known."""
        places = [*([] if outer is None else [0.0]), *self.places[: len(values)]]
        known = [*([] if outer is None else [outer]), *values]
        powers = np.arange(len(places))
        moments = self.width ** (powers + 1) / (powers + 1)
        weights = np.linalg.solve(np.vander(places, increasing=True).T, moments)
        total = known[0] * float(weights[0])
        for v, w in zip(known[1:], weights[1:], strict=True):
            total = total + v * float(w)
        return total
