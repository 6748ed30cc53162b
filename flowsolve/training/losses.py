r"""Regression losses of generative flows: flow matching and denoising score matching are one loss.

Draw a data point $z$, noise $\varepsilon$ and a time $t$, and form $x_t = \alpha z + \sigma\varepsilon$. For
a target row $(a, b)$ with scale $s$ (`flowsolve.predictions`), the loss is

$$ L = \mathbb E\; w(t)\,\bigl\| \hat o_\theta(x_t, t) - (a z + b\,\varepsilon)/s \bigr\|^2 , \qquad
   \hat o_\theta = (a\,\hat z_\theta + b\,\hat\varepsilon_\theta)/s . $$

Its minimiser is the conditional expectation $\mathbb E[(a z + b\varepsilon)/s \mid x_t]$, and its gradient
equals that of the regression on this expectation, which nobody can draw from: for the velocity that is the
theorem of conditional flow matching (Lipman et al. 2022), for the score that of denoising score matching
(Vincent 2011).

* `cfm_loss`: target velocity, row $(\dot\alpha, \dot\sigma)$, whatever the network predicts;
* `dsm_loss`: any target; by default the flow's own prediction, so that the raw output is regressed. Denoising
  score matching proper is target "score" with weight $\sigma^2$, which equals target "noise" with weight 1:
  $\sigma^2\|\hat s + \varepsilon/\sigma\|^2 = \|\hat\varepsilon - \varepsilon\|^2$.

Two targets differ by a factor that depends on $t$ only, so a target is a weight in other words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from flowsolve._batch import linear, per_sample, state_dtype
from flowsolve.conditioning import arguments
from flowsolve.flow import Flow
from flowsolve.predictions import Prediction, SingularEstimate, resolve
from flowsolve.training import times
from flowsolve.training.times import Density
from flowsolve.training.weights import Weight

__all__ = ["cfm_loss", "dsm_loss"]

Times = float | Tensor | Density | None


def cfm_loss(
    flow: Flow,
    data: Tensor,
    *,
    t: Times = None,
    noise: Tensor | None = None,
    weight: Weight | None = None,
    generator: torch.Generator | None = None,
    reduction: Literal["mean", "none"] = "mean",
    cond: Mapping[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    """Conditional flow matching: E w ‖u_θ(x_t, t) − (α̇ z + σ̇ ε)‖² per dimension (Lipman et al. 2022).

    Args:
        flow: its velocity is regressed, whatever its network predicts.
        data: z, floating, shape (B, *S).
        t: flow times, a float or a tensor of shape (B,); or a density from `training.times`, mapped into the
            path's window; by default uniform on the window.
        noise: ε of data's shape; by default standard normal. A coupling of noise and data enters here.
        weight: a function of the path's `Point` that returns shape (B,).
        generator: what t and ε are drawn from, in this order.
        reduction: "mean" over samples and dimensions, a scalar; or "none": the mean over dimensions, shape
            (B,).
        cond: the network's keyword arguments, as in `flowsolve.sample`.
        **more: more of them.

    Raises:
        TypeError: data is not floating.
        ValueError: shapes that do not match, or an unknown reduction.
        SingularEstimate: a given t at which the velocity cannot be told from the prediction.
    """
    return _regress(
        flow, data, resolve("velocity"), t, noise, weight, generator, reduction, arguments(cond, more, len(data))
    )


def dsm_loss(
    flow: Flow,
    data: Tensor,
    *,
    target: str | Prediction | None = None,
    t: Times = None,
    noise: Tensor | None = None,
    weight: Weight | None = None,
    generator: torch.Generator | None = None,
    reduction: Literal["mean", "none"] = "mean",
    cond: Mapping[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    """Denoising regression on any target: E w ‖ô_θ − (a z + b ε)/s‖² per dimension (Vincent 2011).

    Args:
        flow: the flow to train.
        data: z, floating, shape (B, *S).
        target: "noise", "score", "data", "velocity", "v" or a `Prediction`; by default the flow's own, which
            regresses the network's raw output and exists at every time. Target "score" with weight σ²
            (`weights.sigma_squared`) is denoising score matching and equals target "noise".
        t: as in `cfm_loss`.
        noise: as in `cfm_loss`.
        weight: as in `cfm_loss`.
        generator: as in `cfm_loss`.
        reduction: as in `cfm_loss`.
        cond: the network's keyword arguments, as in `flowsolve.sample`.
        **more: more of them.

    Raises:
        TypeError: data is not floating.
        ValueError: shapes that do not match, an unknown target or reduction.
        SingularEstimate: a given t at which the target does not exist or cannot be told from the prediction.
    """
    row = flow.prediction if target is None else resolve(target)
    return _regress(flow, data, row, t, noise, weight, generator, reduction, arguments(cond, more, len(data)))


def _regress(
    flow: Flow,
    data: Tensor,
    target: Prediction,
    t: Times,
    noise: Tensor | None,
    weight: Weight | None,
    generator: torch.Generator | None,
    reduction: str,
    cond: dict[str, Any],
) -> Tensor:
    """The one loss: the estimate's combination of a target row against that of the true (z, ε)."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction = {reduction!r}; expected 'mean' or 'none'")
    if not data.dtype.is_floating_point:
        raise TypeError(f"data has dtype {data.dtype}; expected floats (integer images must be dequantised first)")
    data = data.to(state_dtype(data))
    when = _times(flow, len(data), t, generator)
    if noise is None:
        place = generator.device if generator is not None else data.device
        noise = torch.randn(data.shape, generator=generator, device=place, dtype=data.dtype).to(data.device)
    elif noise.shape != data.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected that of data, {tuple(data.shape)}")
    noise = noise.to(data.dtype)

    point = flow.path.at(when)
    a, b, scale = target.row(point)
    if isinstance(scale, Tensor):
        if bool((scale == 0).any()):
            raise SingularEstimate(f"the target {target.name!r} does not exist at some t; ask at t < 1")
        a, b = a / scale, b / scale
    x = linear(point.alpha, data, point.sigma, noise)
    flow.arm(False)  # dropout is welcome here
    if target is flow.prediction:  # the raw output: no 2×2 solve, hence no time at which it fails
        predicted = flow.call(x, when, **cond)
    else:
        predicted = flow.estimate(x, when, **cond).combine(a, b)
    loss = (predicted - linear(a, data, b, noise)).square().flatten(1).mean(1)
    if weight is not None:
        loss = per_sample(weight(point), loss) * loss
    return loss.mean() if reduction == "mean" else loss


def _times(flow: Flow, n: int, t: Times, generator: torch.Generator | None) -> Tensor:
    """Flow times of shape (n,), float64 on the host: as given, or drawn inside the path's window."""
    if t is None or callable(t):
        first, last = flow.path.window
        u = (times.uniform if t is None else t)(n, generator)
        return first + (last - first) * u
    when = torch.as_tensor(t, dtype=torch.float64).cpu()
    if when.ndim == 0:
        return when.expand(n)
    if when.shape != (n,):
        raise ValueError(f"t has shape {tuple(when.shape)}; expected a float or one time a sample, ({n},)")
    return when
