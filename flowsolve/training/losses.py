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

Two targets differ by a factor that depends on $t$ only, so a target is a weight in other words. Both functions are
`Objective`s (`training.objective`), which has all that can be chosen; `training.named` has the literature's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.paths import Point
from flowsolve.predictions import Prediction
from flowsolve.training import times, weights
from flowsolve.training.objective import Objective
from flowsolve.training.times import Density
from flowsolve.training.weights import Weight

__all__ = ["cfm_loss", "dsm_loss"]

Times = float | Tensor | Density | Callable[[int, torch.Generator | None], Tensor] | None
Weights = Weight | Callable[[Point], Any] | None


def cfm_loss(
    flow: Flow,
    data: Tensor,
    *,
    t: Times = None,
    noise: Tensor | None = None,
    weight: Weights = None,
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
        TypeError: data is not floating, or a weight and a density are taken for each other.
        ValueError: shapes that do not match, or an unknown reduction.
        SingularEstimate: a given t at which the velocity cannot be told from the prediction.
    """
    objective, when = _objective("velocity", t, weight)
    return objective(flow, data, t=when, noise=noise, generator=generator, reduction=reduction, cond=cond, **more)


def dsm_loss(
    flow: Flow,
    data: Tensor,
    *,
    target: str | Prediction | None = None,
    t: Times = None,
    noise: Tensor | None = None,
    weight: Weights = None,
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
        TypeError: data is not floating, or a weight and a density are taken for each other.
        ValueError: shapes that do not match, an unknown target or reduction.
        SingularEstimate: a given t at which the target does not exist or cannot be told from the prediction.
    """
    objective, when = _objective(target, t, weight)
    return objective(flow, data, t=when, noise=noise, generator=generator, reduction=reduction, cond=cond, **more)


def _objective(target: str | Prediction | None, t: Times, weight: Weights) -> tuple[Objective, float | Tensor | None]:
    """The objective of a call, and its times where they are given; functions are what their keyword says."""
    given = not (callable(t) or isinstance(t, Density | Weight)) or isinstance(t, Tensor)
    if not given and callable(t) and not isinstance(t, Density | Weight):
        t = times.Drawn(t)
    if weight is not None and callable(weight) and not isinstance(weight, Density | Weight):
        weight = weights.Own(weight)
    density = times.uniform if given else t
    objective = Objective(target, density, weights.one if weight is None else weight)  # type: ignore[arg-type]
    return objective, t if given else None  # type: ignore[return-value]
