r"""The one training objective: a target × a path × a coupling × a time density × a weight.

Draw data $z$ and noise (or any source) $\varepsilon$ from a coupling, a time $t$ from a density $p$, and, for
stochastic interpolants, fresh noise $\zeta$; form

$$ x_t = \alpha z + \sigma\varepsilon + \gamma\zeta . $$

For a target row $(a, b)$ with scale $s$ (`flowsolve.predictions`) and a weight $w$ the loss is

$$ L = \mathbb E_{t\sim p}\; w(t)\,\bigl\|\hat o_\theta(x_t, t) - o\bigr\|^2, \qquad
   o = (a\,z + b\,\varepsilon)/s, \qquad \hat o_\theta = (a\,\hat z_\theta + b\,\hat\varepsilon_\theta)/s . $$

**The minimiser** is $\mathbb E[o \mid x_t]$, and the gradient is that of the regression on this expectation, which
nobody can draw from (Pythagoras for conditional expectations; §7 of the theory): for the velocity the theorem of
conditional flow matching (Lipman et al. 2022), for the score that of denoising score matching (Vincent 2011). It holds
for any coupling, with the expectation taken under it.

**What an objective is, in the end.** All targets err in proportion (`training.weights`), so in expectation an objective
on a Gaussian path is one function of the log-SNR,

$$ L = \int W(\lambda)\;\mathbb E\,\|\hat\varepsilon_\theta - \varepsilon\|^2\,d\lambda + \text{const}, \qquad
   W = \frac{p\,w}{\lambda'}\Bigl(\frac{\alpha b - \sigma a}{\alpha s}\Bigr)^2, $$

which `Objective.effective_weight` gives (Kingma & Gao 2023). The density enters only through $p\,w$; apart from that it
decides the variance. `importance=True` divides by $p$ relative to uniform times: $W$ no longer depends on it.

**Antithetic draws** take $+\zeta$ and $-\zeta$ ($\pm\varepsilon$ without $\gamma$) at once, as a batch twice as
long (Albergo, Boffi & Vanden-Eijnden 2023, §6.1): odd powers of the noise leave the gradient's variance, without which
the part $\dot\gamma\zeta$, which is infinite at the ends, would rule it. Where there is a $\gamma$ the value reported
is $w(\|\hat o\|^2 - 2\,\hat o\cdot o)$, the loss without the constant $\mathbb E\,w\|o\|^2$, which is infinite there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowsolve._batch import linear, per_sample, state_dtype
from flowsolve.conditioning import marked, plain, rows_of, settled
from flowsolve.flow import Flow
from flowsolve.paths import Point
from flowsolve.predictions import Prediction, SingularEstimate, resolve
from flowsolve.training import times, weights
from flowsolve.training.bridges import Bridge
from flowsolve.training.couplings import INDEPENDENT, Coupling, cost
from flowsolve.training.times import Density
from flowsolve.training.weights import Weight

__all__ = ["Draw", "Objective"]


@dataclass(frozen=True)
class Draw:
    """One batch of an objective: everything that was drawn, B rows (2B in two halves where they are antithetic).

    Attributes:
        t: flow times, float64 on the host, shape (B,).
        point: the path's point at t.
        x: the states, shape (B, *S).
        data: z, in the coupling's order.
        noise: ε, the noise or source, in the coupling's order.
        bridge: ζ; None without γ.
        target: o, shape (B, *S).
        cond: the network's keyword arguments.
        pairs: how many independent rows there are: B.
    """

    t: Tensor
    point: Point
    x: Tensor
    data: Tensor
    noise: Tensor
    bridge: Tensor | None
    target: Tensor
    cond: dict[str, Any]
    pairs: int

    @property
    def cost(self) -> Tensor:
        """The coupling's cost: the mean of ‖z − ε‖² over the pairs, a scalar."""
        return cost(self.noise[: self.pairs], self.data[: self.pairs])


@dataclass(frozen=True)
class Objective:
    """A training loss; called with a flow and data, it gives the loss.

    Args:
        target: "noise", "score", "data", "velocity", "v" or a `Prediction`; None is the flow's own, whose raw output
            is regressed and which exists at every time.
        time: the density of times, from `training.times`.
        weight: from `training.weights`.
        coupling: from `training.couplings`.
        importance: divide by the density relative to uniform times, so that the density changes the variance only.
        bridge: γ, from `training.bridges`; needs a flow that predicts the target itself.
        antithetic: use each draw of Gaussian noise with both signs.

    Raises:
        TypeError: a density where a weight is expected or the other way round, or a plain function: say what it is by
            `times.Drawn(f)` or `weights.Own(f)`.
        ValueError: an unknown target.

    Examples:
        >>> flow = fs.Flow(lambda x, t: torch.zeros_like(x), fs.paths.CondOT())
        >>> objective = fs.training.Objective("velocity", time=fs.training.times.logit_normal())
        >>> objective(flow, torch.zeros(8, 2), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([])
    """

    target: str | Prediction | None = None
    time: Density = times.uniform
    weight: Weight = weights.one
    coupling: Coupling = INDEPENDENT
    importance: bool = False
    bridge: Bridge | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        expected = (
            ("time", Density, "a density of training.times; a function that draws is times.Drawn(f)"),
            ("weight", Weight, "a weight of training.weights; a function of the path's point is weights.Own(f)"),
            ("coupling", Coupling, "a coupling of training.couplings"),
        )
        for name, kind, what in expected:
            value = getattr(self, name)
            if not isinstance(value, kind):
                aside = next((f"; it is a {n}" for n, k, _ in expected if isinstance(value, k)), "")
                raise TypeError(f"{name} is {value!r}{aside}; expected {what}")
        if self.bridge is not None and not isinstance(self.bridge, Bridge):
            raise TypeError(f"bridge is {self.bridge!r}; expected one of training.bridges")
        if self.target is not None:
            object.__setattr__(self, "target", resolve(self.target))

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the objective itself has (of a learned weight); to be trained beside the network's."""
        return list(self.weight.parameters()) if isinstance(self.weight, nn.Module) else []

    def row(self, flow: Flow) -> Prediction:
        """The target on a flow."""
        return flow.prediction if self.target is None else resolve(self.target)

    def __call__(
        self,
        flow: Flow,
        data: Tensor,
        *,
        t: float | Tensor | None = None,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        reduction: Literal["mean", "none"] = "mean",
        cond: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        """The loss of one batch: a draw, compared.

        Args:
            flow: the flow to train.
            data: z, floating, shape (B, *S).
            t: flow times, a float or of shape (B,); by default drawn.
            noise: ε, or points of any source, of data's shape; by default standard normal.
            labels: classes of the data, for a coupling that needs them.
            generator: what t, ε, the coupling and ζ are drawn from, in this order.
            reduction: "mean" over samples and dimensions, a scalar; or "none": the mean over dimensions, shape (B,).
            cond: the network's keyword arguments, as in `flowsolve.sample`.
            **more: more of them.

        Raises:
            TypeError: data is not floating.
            ValueError: shapes that do not match, or an unknown reduction.
            SingularEstimate: a given t at which the target does not exist or cannot be told from the prediction.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction = {reduction!r}; expected 'mean' or 'none'")
        named = marked(cond, more, len(data))
        draw = self.draw(flow, data, t=t, noise=noise, labels=labels, generator=generator, cond=named)
        return self.compare(flow, draw, reduction)

    def draw(
        self,
        flow: Flow,
        data: Tensor,
        *,
        t: float | Tensor | None = None,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        cond: Mapping[str, Any] | None = None,
    ) -> Draw:
        """Everything of a batch that is random, and the target; arguments as of a call."""
        if not data.dtype.is_floating_point:
            raise TypeError(f"data has dtype {data.dtype}; expected floats (integer images must be dequantised first)")
        data = data.to(state_dtype(data))
        if self.antithetic and self.bridge is None and (noise is not None or self.coupling != INDEPENDENT):
            raise ValueError(
                "antithetic noise must be drawn here and paired independently: −ε is no point of another source or "
                "coupling; leave out noise= and coupling=, or give a bridge"
            )
        when = self._times(flow, len(data), t, generator)
        if noise is None:
            if self.coupling.given:
                raise ValueError(
                    f"{self.coupling!r} takes pairs as they are given; give noise=, the source of each data"
                )
            noise = _normal(data, generator)
        elif noise.shape != data.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected that of data, {tuple(data.shape)}")
        noise = noise.to(data)
        pairing = self.coupling.pair(noise, data, labels=labels, generator=generator)
        noise, data = pairing.apply(noise, data)
        cond = settled(cond, len(data))
        if pairing.data is not None:
            cond = rows_of(cond, pairing.data.numpy())
        zeta = _normal(data, generator) if self.bridge is not None else None
        n = len(data)
        if self.antithetic:
            when, data, noise = when.repeat(2), data.repeat(2, *[1] * (data.ndim - 1)), _signed(noise, zeta is None)
            zeta = None if zeta is None else _signed(zeta, True)
            cond = rows_of(cond, (torch.arange(2 * n) % n).numpy())
        return self._drawn(flow, when, data, noise, zeta, plain(cond), n)

    def _drawn(
        self, flow: Flow, t: Tensor, data: Tensor, noise: Tensor, zeta: Tensor | None, cond: dict[str, Any], n: int
    ) -> Draw:
        """The states and targets of what was drawn."""
        point = flow.path.at(t)
        row = self.row(flow)
        a, b, scale = row.row(point)
        if isinstance(scale, Tensor):
            if bool((scale == 0).any()):
                raise SingularEstimate(f"the target {row.name!r} does not exist at some t; ask at t < 1")
            a, b = a / scale, b / scale
        x = linear(point.alpha, data, point.sigma, noise)
        target = linear(a, data, b, noise)
        if self.bridge is not None and zeta is not None:
            if row.name != "velocity" or flow.prediction.name != "velocity":
                raise ValueError(
                    f"a bridge needs target 'velocity' and a flow that predicts it; got {row.name!r} and "
                    f"{flow.prediction.name!r}, which hold z and ε only"
                )
            x = x + per_sample(self.bridge.gamma(t), x) * zeta
            target = target + per_sample(self.bridge.gamma_dot(t), x) * zeta
        return Draw(t, point, x, data, noise, zeta, target, cond, n)

    def compare(self, flow: Flow, draw: Draw, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """The loss of a draw: the network's estimate of the target against the target."""
        row = self.row(flow)
        flow.arm(False)  # dropout is welcome here
        if row is flow.prediction:  # the raw output: no 2×2 solve, hence no time at which it fails
            predicted = flow.call(draw.x, draw.t, **draw.cond)
        else:
            a, b, scale = row.row(draw.point)
            if isinstance(scale, Tensor):
                a, b = a / scale, b / scale
            predicted = flow.estimate(draw.x, draw.t, **draw.cond).combine(a, b)
        return self.weighted(_squared(predicted, draw), draw, flow, reduction)

    def weighted(self, error: Tensor, draw: Draw, flow: Flow, reduction: str) -> Tensor:
        """Errors of shape (B,), weighted, with the halves of antithetic draws joined, and reduced."""
        loss = error
        if self.weight is not weights.one:
            factor, offset = self.weight(draw.point), self.weight.offset(draw.point)
            loss = per_sample(factor, error) * error + per_sample(offset, error)
        if isinstance(self.time, times.Learned):
            self.time.update(draw.t, loss, flow.path)
        if self.importance:
            first, last = flow.path.window
            loss = loss / per_sample((last - first) * self.time.pdf(draw.t, flow.path), loss)
        if len(loss) != draw.pairs:
            loss = loss.reshape(-1, draw.pairs).mean(0)
        return loss.mean() if reduction == "mean" else loss

    def _times(self, flow: Flow, n: int, t: float | Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Flow times of shape (n,), float64 on the host: as given, or drawn inside the path's window."""
        if t is None:
            return self.time.draw(n, flow.path, generator)
        when = torch.as_tensor(t, dtype=torch.float64).cpu()
        if when.ndim == 0:
            return when.expand(n)
        if when.shape != (n,):
            raise ValueError(f"t has shape {tuple(when.shape)}; expected a float or one time a sample, ({n},)")
        return when

    def effective_weight(self, flow: Flow, log_snr: Tensor) -> Tensor:
        """W(λ): the objective is ∫ W(λ) E‖ε̂ − ε‖² dλ per dimension, up to a constant.

        Args:
            flow: its path, and its prediction where the target is the flow's own.
            log_snr: λ = log(α/σ), any shape, inside the path's range. (Some papers call 2λ the log-SNR.)

        Returns:
            float64 of that shape; 0 outside the path's window.
        """
        path = flow.path
        shape = torch.as_tensor(log_snr).shape
        lam = torch.as_tensor(log_snr, dtype=torch.float64).cpu().reshape(-1)
        first, last = path.window
        inside = (lam > path.log_snr(first)) & (lam < path.log_snr(last))
        t = path.time(torch.where(inside, lam, torch.full_like(lam, path.log_snr(0.5 * (first + last)))))
        point = path.at(t)
        density = torch.full_like(t, 1.0 / (last - first)) if self.importance else self.time.pdf(t, path)
        with torch.no_grad():
            factor = torch.as_tensor(self.weight(point)).cpu().double()
        found = density * factor * weights.error_ratio(self.row(flow), point) ** 2 / point.log_snr_dot
        return torch.where(inside, found, torch.zeros_like(found)).reshape(shape)


def _squared(predicted: Tensor, draw: Draw) -> Tensor:
    """The squared error per dimension, shape (B,); without its constant where that is infinite."""
    if draw.bridge is not None:
        return (predicted * (predicted - 2.0 * draw.target)).flatten(1).mean(1)
    return (predicted - draw.target).square().flatten(1).mean(1)


def _normal(data: Tensor, generator: torch.Generator | None) -> Tensor:
    place = generator.device if generator is not None else data.device
    return torch.randn(data.shape, generator=generator, device=place, dtype=data.dtype).to(data.device)


def _signed(noise: Tensor, both: bool) -> Tensor:
    """Noise twice, the second time with the other sign."""
    return torch.cat((noise, -noise if both else noise))
