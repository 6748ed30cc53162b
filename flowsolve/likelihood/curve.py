r"""log p along a curve: a likelihood from a handful of evaluations.

**The line integral.** $\log p_t(x)$ is a function of state and time whose derivatives a flow knows everywhere. With
$y = x/\alpha$, $s = \sigma/\alpha$, $\ell = \log s = -\lambda$, one evaluation gives

$$ \nabla_y \log p = -\frac{\hat\varepsilon}{s}, \qquad
   \partial_\ell \log p = \|\hat\varepsilon\|^2 - T, \qquad
   T = D - \operatorname{tr}\frac{\partial\hat z}{\partial y}
     = \sigma\operatorname{tr}\frac{\partial\hat\varepsilon}{\partial x} , $$

the second because y moves by $dy/d\ell = s\hat\varepsilon$ along the ODE and $\log p$ falls by $T$. Hence along *any*
curve from data to noise

$$ \log p(y_0) = \log p(y_n) + \int T\,d\ell
   + \int \frac{\hat\varepsilon}{s}\cdot\bigl(dy - s\hat\varepsilon\,d\ell\bigr), $$

and the curve need not be a solution: how far a solver strays is the second integral. It removes the first-order effect
of the solver's error on the density, at no cost, and what is left is of second order in that error.

The identity is exact for a network that is the true conditional expectation. For any other field $-\hat\varepsilon/s$
is not the gradient of the density, but it only weighs the second integral, which vanishes as the solver converges, and
with it what the weight has wrong: the limit is the change-of-variables density of the field at hand. One part of the
weight is known to be wrong: a density has a finite score where σ = 0, so that what is left of ε̂ there (`residue`) is no
part of one, while $1/s$ makes it the largest weight of all. It is taken off: $\hat\varepsilon - \hat\varepsilon_0\,
\alpha/(\alpha+\sigma)$.

**Quadrature.** Let the evaluations be at nodes $\lambda_0 > \dots > \lambda_n$. T goes smoothly from 0 (data) to D
(noise), flat at both ends, where every rule that treats interior nodes alike is accurate far beyond its order: the
weights here are those of the cubic through the four nodes around each interval. On equal steps of λ these are the
trapezoidal rule with corrected ends. For the second integral, the step from node k to k+1 is taken once more,
exponentially in data form, with ẑ the cubic in λ through the same four nodes (`flowsolve.solvers.exponential`), two of
which the solver did not know. With $\delta_k$ the difference to the state that the solver evaluated there,

$$ \int_k^{k+1} \frac{\hat\varepsilon}{s}\cdot(dy - s\hat\varepsilon\,d\ell) \approx
   \frac{\hat\varepsilon_k + \hat\varepsilon_{k+1}}2\cdot\frac{\delta_k}{\sigma_{k+1}} , $$

since a perturbation made in the step grows like σ until its end.

**Second looks.** An extrapolating solver errs most where the state settles between modes of the data, a few steps for
each sample. The `repeats` consecutive nodes where $\sum\|\delta_k\|/\sigma_{k+1}$ is largest are evaluated again,
sample by sample, each at the state of the centred step from the node before: now the evaluations beyond are known, if
roughly. A sample keeps the new curve if that lowers $\sum(\|\delta_k\|/\sigma_{k+1})^2$, and else the smoother old one.

**Ends.** Where σ = 0 or α = 0 the outermost node is at the end of a window of λ, and the rest of the way is that of
`flowsolve.likelihood.ends`, evaluated at the end itself: nothing is assumed of the density there.

**The error.** Two things can be wrong. The quadrature: the same formula is read on every second node, the even ones and
the odd ones, and what that changes, small and large, is about the error of half the budget, 2 to 16 times that of the
whole. And the weight: the second integral is true as far as the network is a conditional expectation. Of a mixture it
removes nine tenths of the error and more; of a random network it is itself the error, often to two digits; trained
networks lie between. So all of it is claimed, and a share of Σ|corrections|, in whose sum such errors may cancel:

$$ \tfrac14\,\text{small} + \tfrac1{16}\,\text{large} + \Bigl|\sum_k c_k\Bigr| + \tfrac18\sum_k|c_k|
   + \text{the roundings of }\int T\,d\ell . $$

The numbers are those of a small table that cover 90 % of the samples within twice the error and 97 % within four times
it on the fields of `FIT` in `benchmarks/calibration.py`, at 12 to 192 evaluations, with few claims beyond five times
the distance. What holds on other fields is in its record.

Sources: the instantaneous change of variables is Chen et al. 2018; that a dual-weighted residual corrects a functional
of an approximate solution is Becker & Rannacher 2001. The line integral is the
chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import send
from flowsolve._surroundings import array
from flowsolve.paths import Path
from flowsolve.solvers.exponential import FORMS, update

__all__ = ["WINDOW", "Curve", "Rule", "nodes"]

CENTER, WIDTH = 1.75, 5.0
WINDOW, RESOLVED = (-math.log(80.0), -math.log(0.002)), 48
STENCIL = 4
HALVES, SPREAD = (1 / 4, 1 / 16), 1 / 8
Vector = NDArray[np.float64]


def nodes(path: Path, start: float, end: float, count: int, window: tuple[float, float] = WINDOW) -> list[float]:
    """Flow times of `count` evaluations between data (start) and noise (end), the nodes of a curve.

    Equal steps of arctan((λ − 1.75)/5), ends included: somewhat denser where noise is as large as data. An end where λ
    is infinite is replaced by that of the window, which beyond 48 nodes widens as they multiply: what lies outside it
    has so many times less width, whatever a network does there. Fewer nodes leave up to twice as much at the data end.
    """
    wider = math.log(count / RESOLVED)
    window = window[0] - max(0.0, wider), window[1] + max(-math.log(2.0), wider)
    here, there = path.at(start), path.at(end)
    high = window[1] if here.sigma == 0.0 else float(here.log_snr)
    low = window[0] if there.alpha == 0.0 else float(there.log_snr)
    if not low < high:
        raise ValueError(
            f"between t = {start:g} and t = {end:g} the log-SNR runs from {high:.4g} to {low:.4g}; expected it to fall "
            f"(infinite ends are cut to the window {window})"
        )
    a, b = math.atan((high - CENTER) / WIDTH), math.atan((low - CENTER) / WIDTH)
    inner = [CENTER + WIDTH * math.tan((a * (count - 1 - i) + b * i) / (count - 1)) for i in range(1, count - 1)]
    first = path.time(high) if here.sigma == 0.0 else start
    last = path.time(low) if there.alpha == 0.0 else end
    return [first, *(path.time(v) for v in inner), last]


class Rule:
    """The numbers of the page for the nodes of a curve: quadrature weights, and the centred steps.

    Attributes:
        times: flow times, from data to noise.
        weights: of T at the nodes, for the integral over ℓ.
    """

    def __init__(self, path: Path, times: Sequence[float]) -> None:
        self.path, self.times = path, tuple(times)
        self.points = [path.at(t) for t in times]
        self.log_snr = np.array([float(p.log_snr) for p in self.points])
        if len(times) < 2 or not bool((np.diff(self.log_snr) < 0.0).all()):
            raise ValueError(f"nodes at t = {self.times}; expected two or more whose log-SNR falls, from data to noise")
        self.sigma = [float(p.sigma) for p in self.points]

    def __len__(self) -> int:
        return len(self.times)

    def stencil(self, k: int) -> range:
        """The nodes around the interval from k to k + 1."""
        first = max(0, min(k - STENCIL // 2 + 1, len(self) - STENCIL))
        return range(first, min(first + STENCIL, len(self)))

    @cached_property
    def weights(self) -> Vector:
        """∫ T dℓ = Σ weights · T."""
        total = np.zeros(len(self))
        x, w = np.polynomial.legendre.leggauss(STENCIL)
        for k in range(len(self) - 1):
            near = list(self.stencil(k))
            places = self.log_snr[near]
            size = self.log_snr[k] - self.log_snr[k + 1]
            v = self.log_snr[k + 1] + 0.5 * size * (x + 1.0)
            for i, j in enumerate(near):
                others = np.delete(places, i)
                basis = np.prod((v[:, None] - others) / (places[i] - others), axis=1)
                total[j] += 0.5 * size * float(w @ basis)
        return total

    @cached_property
    def steps(self) -> tuple[Vector, Vector]:
        """x_{k+1} = state[k] x_k + Σ_j weights[k, j] ẑ_{stencil(k)[j]}: (n,) and (n, 4)."""
        state, weights = np.zeros(len(self) - 1), np.zeros((len(self) - 1, min(STENCIL, len(self))))
        for k in range(len(self) - 1):
            near = [self.times[j] for j in self.stencil(k)]
            made = update(self.path, FORMS["data"], self.times[k], self.times[k + 1], near)
            state[k], weights[k] = made.state, made.weights
        return state, weights

    def halved(self) -> tuple[list[int], list[int]]:
        """The even nodes and the odd ones, each with both ends."""
        last = len(self) - 1
        even, odd = set(range(0, last, 2)), set(range(1, last, 2))
        return sorted(even | {last}), sorted({0} | odd | {last})


@dataclass(frozen=True)
class Curve:
    """The evaluations at the nodes of a rule, (n, B, …): all that the page needs.

    Attributes:
        rule: the nodes.
        x: states, (n, B, D).
        data: ẑ, (n, B, D).
        trace: T, (n, B, P), a column an estimate.
        residue: ε̂ at σ = 0, (B, D), where it was looked at.
    """

    rule: Rule
    x: Tensor
    data: Tensor
    trace: Tensor
    residue: Tensor | None = None

    def noise(self, k: int) -> Tensor:
        """ε̂ at a node, (B, D)."""
        point = self.rule.points[k]
        return (self.x[k] - float(point.alpha) * self.data[k]) / float(point.sigma)

    def pull(self, k: int) -> Tensor:
        """σ times the score's negative at a node, (B, D): ε̂ less what is no part of a score."""
        noise = self.noise(k)
        return noise if self.residue is None else noise - self.residue / (1.0 + math.exp(-self.rule.log_snr[k]))

    def centred(self, k: int) -> Tensor:
        """The state at node k + 1 by the centred step from node k, (B, D)."""
        state, weights = self.rule.steps
        total = self.x[k] * float(state[k])
        for j, w in zip(self.rule.stencil(k), weights[k], strict=True):
            total = total.add(self.data[j], alpha=float(w))
        return total

    def missed(self) -> Tensor:
        """‖δ‖/σ at the end of each step, (n − 1, B), without derivatives."""
        made = range(len(self.rule) - 1)
        found = [(self.x[k + 1] - self.centred(k)).detach().norm(dim=1) / self.rule.sigma[k + 1] for k in made]
        return torch.stack(found).nan_to_num(nan=math.inf)

    def strayed(self) -> Tensor:
        """How far a sample's states are from a solution, Σ(‖δ‖/σ)², (B,)."""
        return self.missed().square().sum(0)

    def where(self, chosen: Tensor, other: Curve) -> Curve:
        """This curve for the samples chosen, (B,), and the other for the rest; both of one rule."""
        pairs = ((self.x, other.x), (self.data, other.data), (self.trace, other.trace))
        return Curve(self.rule, *(torch.where(chosen.reshape(1, -1, 1), a, b) for a, b in pairs))

    def change(self) -> Tensor:
        """log p(y) at the first node less that at the last, (B, P): the two integrals."""
        weights = send(torch.from_numpy(self.rule.weights), self.trace, self.trace.dtype)
        total: Tensor = (weights[:, None, None] * self.trace).sum(0)  # no matrix product: autocast would round it
        return total + self.corrections.sum(0)

    @cached_property
    def corrections(self) -> Tensor:
        """The second integral's share of each step, (n − 1, B, 1)."""
        before, found = self.pull(0), []
        for k in range(len(self.rule) - 1):
            after = self.pull(k + 1)
            step = self.x[k + 1] - self.centred(k)
            found.append(((before + after) * step).sum(1, keepdim=True) * (0.5 / self.rule.sigma[k + 1]))
            before = after
        return torch.stack(found)

    @property
    def error(self) -> Tensor:
        """An estimate of the error of `change`, (B, 1); NaN with too few nodes to leave some out."""
        if len(self.rule) <= STENCIL:
            return torch.full_like(self.trace[0, :, :1], math.nan)
        change = self.change()
        halves = [(change - self.thinned(kept).change()).mean(1, keepdim=True).abs() for kept in self.rule.halved()]
        untrue = self.corrections.sum(0).abs() + SPREAD * self.corrections.abs().sum(0)
        weights = send(torch.from_numpy(self.rule.weights), self.trace, self.trace.dtype)[:, None, None]
        rounded = torch.finfo(self.trace.dtype).eps * (weights * self.trace).abs().sum(0).mean(1, keepdim=True)
        small, large = torch.minimum(*halves), torch.maximum(*halves)
        return HALVES[0] * small + HALVES[1] * large + untrue + rounded

    def thinned(self, kept: list[int]) -> Curve:
        """The curve through some of the nodes."""
        rule = Rule(self.rule.path, [self.rule.times[k] for k in kept])
        return Curve(rule, self.x[kept], self.data[kept], self.trace[kept], self.residue)

    def worst(self, count: int) -> NDArray[np.int64]:
        """For each sample the first of the `count` consecutive nodes that the solver missed most, (B,)."""
        missed = np.nan_to_num(array(self.missed().double()), posinf=0.0).cumsum(0)
        before = np.concatenate((np.zeros_like(missed[:1]), missed))
        found: NDArray[np.int64] = (before[count:] - before[:-count]).argmax(0) + 1
        return found

    def approach(self, k: NDArray[np.int64]) -> Tensor:
        """The centred step to node k of each sample, (B, D)."""
        own = torch.arange(self.x.shape[1], device=self.x.device)
        state, weights = self.rule.steps
        at = send(torch.from_numpy(k - 1), self.x)
        total = self.x[at, own] * self._column(state[k - 1])
        near = np.array([self.rule.stencil(i).start for i in range(len(self.rule) - 1)])
        for j in range(weights.shape[1]):
            node = send(torch.from_numpy(near[k - 1] + j), self.x)
            total = total + self.data[node, own] * self._column(weights[k - 1, j])
        return total

    def replaced(self, k: NDArray[np.int64], x: Tensor, data: Tensor, trace: Tensor) -> Curve:
        """The curve with another evaluation at node k of each sample."""
        at = send(torch.from_numpy(k), self.x), torch.arange(self.x.shape[1], device=self.x.device)
        pairs: list[Any] = [(self.x, x), (self.data, data), (self.trace, trace)]
        return Curve(self.rule, *(old.index_put(at, new) for old, new in pairs))

    def _column(self, values: Vector) -> Tensor:
        return send(torch.from_numpy(values), self.x, self.x.dtype).unsqueeze(1)
