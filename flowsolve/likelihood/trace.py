r"""Traces of a network's Jacobian, from the very call that gives its value.

One pass of the network linearises its output $o(x)$, and from then on products with the Jacobian $J = \partial
o/\partial x$ are to be had: $v^\top J$ by reverse mode, one backward pass over the same graph, or $J v$ by forward
mode, in which the pass carries a tangent along. Either serves a trace, since $\operatorname{tr} J = \operatorname{tr}
J^\top$.

| `trace=` | products an evaluation | the estimate |
|---|---|---|
| `exact` | D | $\sum_i e_i^\top J e_i$ |
| `hutchinson` | m | $v^\top J v$, the mean over m probes $v$ |
| `hutch++` | m | $\operatorname{tr} Q^\top J Q$ for the range $Q$ of $JS$, and Hutchinson's for what is left |
| `xtrace` | m | the same, with each probe tested against the range of the others |

**Hutchinson** (1990) with random signs has the variance $2\,(\|A\|_F^2 - \sum_i A_{ii}^2)$, $A$ the symmetric part of
$J$: the least among independent probes. The diagonal, and with it every multiple of the identity, is exact, so the
prediction that a network was trained on makes no difference. Gaussian probes have $2\|A\|_F^2$.

**Hutch++** (Meyer et al. 2021) takes the trace on the k = m/3 directions Q that J stretches most exactly. The rest is
Hutchinson's on what is orthogonal to them: with $u = (I - QQ^\top)g$ for k further probes g,

$$ \operatorname{tr} Q^\top J Q + (D - k)\,\frac{u^\top J u}{\|u\|^2} . $$

**XTrace** (Epperly, Tropp & Webber 2024) uses k = m/2 probes $\Omega$ for both. Let $J\Omega = QR$, $Z = JQ$,
$H = Q^\top Z$, $W = Q^\top\Omega$, and let $s_i$ be the unit vector orthogonal to all columns of $R$ but the i-th, so
that $Q(I - s_i s_i^\top)Q^\top$ projects on the range without probe i. With $x_i = w_i - s_i s_i^\top w_i$ and
$u_i = \omega_i - Q x_i$ the i-th estimate is

$$ \operatorname{tr} H - s_i^\top H s_i + (D - k + 1)\,
   \frac{(w_i - x_i)^\top r_i - \omega_i^\top Z x_i + x_i^\top H x_i}{\|\omega_i\|^2 - \|x_i\|^2} , $$

unbiased, because probe i is independent of the range it is tested against. The quotient is $u^\top J u/\|u\|^2$, which
makes both exact on multiples of the identity as well, most of what a denoiser's Jacobian is. It needs directions that
are uniform in what is left, hence Gaussian probes.

The probes of a sample are fixed for a whole solve, so that the integrand stays a smooth function of time. All estimates
are returned side by side, one a column: what is linear in the trace can be computed for each, and their spread is its
standard error, but for XTrace, whose estimates lean on one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowsolve._batch import per_sample
from flowsolve._surroundings import bare
from flowsolve.capture import Record, filled, recorded, split
from flowsolve.flow import Flow, network_time
from flowsolve.likelihood.products import AT_ONCE, Forward, Function, Product, Pulled, Reverse, Unseen, full
from flowsolve.noise import PROBE, Noise
from flowsolve.paths import Point
from flowsolve.predictions import Estimate

__all__ = ["Exact", "HutchPP", "Hutchinson", "Trace", "XTrace", "estimated", "of_noise", "resolve"]

KINDS = ("rademacher", "gaussian")
MODES = ("auto", "reverse", "forward")


@dataclass(frozen=True)
class Trace:
    """An estimator of tr ∂o/∂x for each sample.

    Attributes:
        probes: products with the Jacobian an evaluation.
        kind: of the random vectors: "rademacher" (signs) or "gaussian".
        shared: the same vectors for all samples: their estimates then err alike, which helps where two are compared
            and hurts where many are averaged.
        mode: how products are made: "reverse", "forward", or "auto": reverse, and forward for a network whose graph
            autograd does not see. Forward mode stores no graph, but repeats the pass for every product.
        verify: look once a solve, on one sample, whether autograd sees all of the network
            (`flowsolve.likelihood.visible`).
        learnt: what a solve finds out about its network.
    """

    probes: int = 1
    kind: str = "rademacher"
    shared: bool = False
    mode: str = "auto"
    verify: bool = True
    learnt: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    group: ClassVar[int] = 1
    """Products behind each column of the estimate."""

    def __post_init__(self) -> None:
        for name, value, choices in (("kind", self.kind, KINDS), ("mode", self.mode, MODES)):
            if value not in choices:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, choices))}")
        least = self.group if self.group == 1 else 2 * self.group
        whole = isinstance(self.probes, int) and not isinstance(self.probes, bool)
        if not whole or self.probes < least or self.probes % self.group:
            multiple = "" if self.group == 1 else f" and a multiple of {self.group}"
            raise ValueError(f"probes = {self.probes!r}; expected an integer >= {least}{multiple}")

    @property
    def count(self) -> int:
        """Estimates of the trace at once."""
        return self.probes // self.group

    def draw(self, x: Tensor, noise: Noise) -> Tensor | None:
        """The probes of the samples of x, (B, K, *S); None if it needs none."""
        if self.shared:
            noise = type(noise)(noise.seed, torch.zeros_like(noise.samples))
        make = noise.rademacher if self.kind == "rademacher" else noise.normal
        return torch.stack([make(PROBE, k, x) for k in range(self._drawn(x))], 1)

    def _drawn(self, x: Tensor) -> int:
        """How many vectors a sample has."""
        return self.probes

    def __call__(
        self, function: Function, x: Tensor, probes: Tensor | None, graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The output o(x) of shape (B, *S) by one call, and (B, count) estimates of its trace.

        Args:
            function: from x to the output.
            x: shape (B, *S).
            probes: what `draw` gave.
            graph: keep derivatives of both.
        """
        first = None if probes is None else probes[:, 0]
        output, product = self.linearised(function, x, first, graph)
        try:
            found = self._estimate(product, x, probes)
        except (Unseen, RuntimeError) as error:
            # No backward pass through some of its operations: there may be a forward one.
            if not isinstance(product, Reverse) or self.mode != "auto" or graph or full(error):
                raise
            self.learnt["mode"] = "forward"
            output, product = self.linearised(function, x, first, graph)
            found = self._estimate(product, x, probes)
        return (output, found) if graph else (output.detach(), found.detach())

    def _estimate(self, product: Product, x: Tensor, probes: Tensor | None) -> Tensor:
        raise NotImplementedError

    def stderr(self, totals: Tensor) -> Tensor:
        """Standard error of the mean of (B, count) estimates: NaN for a single one, which cannot tell."""
        if totals.shape[1] == 1:
            return torch.full_like(totals[:, 0], math.nan)
        if not len(totals):
            return totals.new_zeros(0)
        return totals.std(1) / math.sqrt(totals.shape[1])

    def linearised(self, function: Function, x: Tensor, first: Tensor | None, graph: bool) -> tuple[Tensor, Product]:
        """One call of the network, and products with its Jacobian, the first of them with `first`."""
        if not bare():
            pulled = Pulled(function, x)
            return pulled.output, pulled
        mode = self.learnt.get("mode", self.mode)
        if mode != "forward":
            with torch.enable_grad():
                inner = x if graph and x.requires_grad else x.detach().requires_grad_()
                try:
                    output = function(inner)
                except RuntimeError as error:
                    if "numpy()" in str(error):
                        raise Unseen("") from error
                    raise
            if output.requires_grad:
                return output, Reverse(output, inner, graph, self.learnt)
            if mode == "reverse" or graph:
                raise Unseen("")
        if graph:
            raise ValueError("mode='forward' keeps no derivatives of the trace; use mode='reverse' beside grad=True")
        made = Forward(function, x.detach().contiguous(), first)  # some forward derivatives take no other layout
        self.learnt["mode"] = "forward"
        return made.output, made


@dataclass(frozen=True)
class Exact(Trace):
    """The sum of the diagonal, by one product for each of the D numbers of a sample."""

    @property
    def count(self) -> int:
        """One."""
        return 1

    def draw(self, x: Tensor, noise: Noise) -> Tensor | None:
        """Nothing."""
        return None

    def _estimate(self, product: Product, x: Tensor, probes: Tensor | None) -> Tensor:
        size, total = math.prod(x.shape[1:]), x.new_zeros(x.shape[0])
        for first in range(0, size, AT_ONCE):
            count = min(size - first, AT_ONCE)
            units = torch.eye(count, size, dtype=x.dtype, device=x.device).roll(first, 1)
            basis = units.unsqueeze(1).expand(-1, x.shape[0], -1).reshape(count, *x.shape)
            found = _flat(product(basis))[..., first : first + count]
            total = total + found.diagonal(0, 0, 2).T.sum(0)
        return total.unsqueeze(1)

    def stderr(self, totals: Tensor) -> Tensor:
        """None: 0."""
        return torch.zeros_like(totals[:, 0])


@dataclass(frozen=True)
class Hutchinson(Trace):
    """vᵀJv for fixed probes, one estimate a probe."""

    def _estimate(self, product: Product, x: Tensor, probes: Tensor | None) -> Tensor:
        vectors = _given(probes)
        return _flat(vectors * product(vectors)).sum(2).T


@dataclass(frozen=True)
class HutchPP(Trace):
    """Hutch++: exact on the range of m/3 products, Hutchinson's on the rest; m/3 estimates of m = `probes`."""

    probes: int = 6
    kind: str = "gaussian"
    group: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_gaussian(self)

    def _drawn(self, x: Tensor) -> int:
        return 2 * self.count

    def _estimate(self, product: Product, x: Tensor, probes: Tensor | None) -> Tensor:
        sketch, tests = _given(probes).split(self.count)
        basis = torch.linalg.qr(_columns(product(sketch)))[0]
        g = _columns(tests)
        g = g - _times(basis, _times(basis.mT, g))
        vectors = torch.cat((basis, g), 2)
        found = _columns(product(_vectors(vectors, x)))
        each = (vectors * found).sum(1)
        count = basis.shape[2]
        inside = each[:, :count].sum(1, keepdim=True)
        estimates: Tensor = inside + (basis.shape[1] - count) * each[:, count:] / _size(g.square().sum(1))
        return estimates


@dataclass(frozen=True)
class XTrace(Trace):
    """XTrace: m/2 exchangeable estimates of m = `probes` products.

    They share their range, so that their spread does not tell the error of their mean: it is too small, most where few
    directions hold all of the trace. So no standard error is given; compare seeds.
    """

    probes: int = 6
    kind: str = "gaussian"
    group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_gaussian(self)

    def stderr(self, totals: Tensor) -> Tensor:
        """NaN: the estimates are no independent ones."""
        return torch.full_like(totals[:, 0], math.nan)

    def _drawn(self, x: Tensor) -> int:
        return self.count

    def _estimate(self, product: Product, x: Tensor, probes: Tensor | None) -> Tensor:
        omega = _columns(_given(probes))
        if omega.shape[2] > omega.shape[1]:
            raise ValueError(f"xtrace with {self.probes} products on {omega.shape[1]} numbers; use trace='exact'")
        q, r = torch.linalg.qr(_columns(product(_vectors(omega, x))))
        z = _columns(product(_vectors(q, x)))
        h, w = _times(q.mT, z), _times(q.mT, omega)
        away = _inverse(r).mT  # column i is orthogonal to all columns of r but the i-th
        s = away / away.norm(dim=1, keepdim=True)
        inner = w - s * (s * w).sum(1, keepdim=True)

        def form(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(1)

        inside = h.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - form(s, _times(h, s))
        left = form(w - inner, r) - form(omega, _times(z, inner)) + form(inner, _times(h, inner))
        width = _size(form(omega, omega) - form(inner, inner))
        found: Tensor = inside + (omega.shape[1] - omega.shape[2] + 1) * left / width
        return found


def _require_gaussian(estimator: Trace) -> None:
    """Raise ValueError for signs, whose directions are not uniform once some are projected out."""
    if estimator.kind != "gaussian":
        raise ValueError(f"kind = {estimator.kind!r}; {type(estimator).__name__} needs kind='gaussian'")


def _times(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product that rounds as the state does, whatever autocast or TF32 make of those around it."""
    with torch.autocast(a.device.type, enabled=False):
        return (a.double() @ b.double()).to(a.dtype) if a.is_cuda else a @ b


def _size(square: Tensor) -> Tensor:
    """‖u‖², away from 0: where nothing is left there is nothing to estimate."""
    return square.clamp_min(torch.finfo(square.dtype).tiny)


def _inverse(r: Tensor) -> Tensor:
    """The inverse of triangular matrices (B, K, K), singular ones moved by a rounding error off that."""
    size = r.detach().abs().amax((1, 2)).unsqueeze(1)
    least = torch.where(size > 0.0, size, 1.0) * torch.finfo(r.dtype).eps
    pivots = r.diagonal(dim1=1, dim2=2)
    shift = torch.where(pivots < 0.0, -least, least)
    one = torch.eye(r.shape[2], dtype=r.dtype, device=r.device)
    found: Tensor = torch.linalg.solve_triangular(r + torch.diag_embed(shift), one.expand_as(r), upper=True)
    return found


def _given(probes: Tensor | None) -> Tensor:
    """The vectors as (K, B, *S)."""
    if probes is None:
        raise ValueError("the estimator needs the probes that draw gives")
    return probes.transpose(0, 1)


def _flat(vectors: Tensor) -> Tensor:
    """Vectors (K, B, *S) as (K, B, D)."""
    return vectors.flatten(2) if vectors.ndim > 2 else vectors.unsqueeze(2)


def _columns(vectors: Tensor) -> Tensor:
    """Vectors (K, B, *S) as the columns of matrices (B, D, K)."""
    return _flat(vectors).permute(1, 2, 0)


def _vectors(columns: Tensor, x: Tensor) -> Tensor:
    """The columns of matrices (B, D, K) as vectors (K, B, *S)."""
    return columns.permute(2, 0, 1).reshape(-1, *x.shape)


NAMES: dict[str, type[Trace]] = {"exact": Exact, "hutchinson": Hutchinson, "hutch++": HutchPP, "xtrace": XTrace}


def resolve(trace: str | Trace, probes: int | None = None, verify: bool = True) -> Trace:
    """The estimator of a name, with so many products, or one given, that verifies the network or not."""
    made = _resolved(trace, probes)
    return made if verify else replace(made, verify=False)


def _resolved(trace: str | Trace, probes: int | None) -> Trace:
    if isinstance(trace, Trace):
        if probes not in (None, trace.probes):
            raise TypeError(f"probes = {probes!r} beside {trace!r}, which has its own; give one of them")
        return replace(trace)  # what it learns of a network is no other's
    if trace not in NAMES:
        raise ValueError(f"trace = {trace!r} is not known; expected one of {', '.join(map(repr, NAMES))}, or a Trace")
    kind = NAMES[trace]
    if probes is None:
        return kind()
    if kind is Exact:
        raise TypeError(f"probes = {probes!r} beside trace='exact', which draws none; drop it")
    return kind(probes)


def estimated(
    flow: Flow, trace: Trace, x: Tensor, t: Any, point: Point, tree: Any, graph: bool, record: Record | None = None
) -> tuple[Estimate, Tensor]:
    """The estimate at (x, t), and (B, count) estimates of the trace of the output's Jacobian, by one network call.

    Args:
        tree: a context with the conditioning "cond" and the "probes".
        graph: keep derivatives.
        record: makes recordings, if the call and its products are to be one (`flowsolve.capture`).
    """
    cond, probes = tree["cond"], tree["probes"]
    if record is None:
        output, found = trace(lambda v: flow.call(v, t, **cond), x, probes, graph)
        return flow.read(x, output, point), found
    given = cond, probes
    tensors, constants = split(given)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        state, time, *rest = inputs
        mine, vectors = filled(given, rest)
        return list(trace(lambda v: flow.output(v, time, mine), state, vectors))

    inputs = [x.detach().contiguous(), network_time(flow.clock(t), x), *(v.to(x.device) for v in tensors)]
    key = trace, flow.net, flow.path, flow.prediction, flow.clock, constants
    with recorded(flow, key, function, inputs, record) as replay:
        output, found = replay(inputs)
    return flow.read(x, output, point), found


def of_noise(estimate: Estimate, trace: Tensor) -> Tensor:
    """T = σ tr ∂ε̂/∂x, (B, count), from the traces of the output's Jacobian."""
    k_x, k_o = (per_sample(k, trace) for k in estimate.coefficients(0.0, 1.0))
    size = math.prod(estimate.x.shape[1:])
    found: Tensor = per_sample(estimate.point.sigma, trace) * (k_x * size + k_o * trace)
    return found
