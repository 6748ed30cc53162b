r"""The density at the noise end.

* **normal**: $N(0, \sigma_0^2)$ with the path's `prior_std`, where sampling starts from. On a path that keeps signal at
  t = 0 (VP, VE, EDM) the likelihood is that of the model one samples from, a normalised density.
* **marginal**: the density of $x_0 = \alpha_0 z + \sigma_0\varepsilon$ as far as the network knows it. With
  $y = x/\alpha$ and $s = \sigma/\alpha$ large, $y$ is normal with the mean and the variance of z added; for an
  isotropic variance v, $\hat z$ is affine in y with $\operatorname{tr}\partial\hat z/\partial y = Dv/(s^2+v)$. So one
  estimate tells both,

$$ \log p(x_0) = -\tfrac12\,\|\hat\varepsilon\|^2\,\tfrac DT - \tfrac D2\log\bigl(2\pi\sigma_0^2\,\tfrac DT\bigr),
   \qquad T = \sigma\operatorname{tr}\frac{\partial\hat\varepsilon}{\partial x}
     = D - \operatorname{tr}\frac{\partial\hat z}{\partial y}, $$

  exact for isotropic normal data. Not normalised: no bound for publication. For another covariance C the quadratic form
  lacks $-\tfrac12\hat\varepsilon^\top(C - v)\hat\varepsilon/s^2$, which averages to 0 over the samples. A curve has
  one more node, at $s'$, and knows it: $\hat z = \mathrm E z + C\hat\varepsilon/s$, so that
  $\hat z' - \hat z = C\,(\hat\varepsilon'/s' - \hat\varepsilon/s)$ is $C$'s product with a vector along
  $\hat\varepsilon$ to the next order in $1/s^2$.
* a function of the state, (B, *S) → (B,), for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from flowsolve._batch import rows

__all__ = ["MARGINAL", "NORMAL", "Prior", "marginal_log_prob", "normal_log_prob", "resolve", "stretch"]

Prior = str | Callable[[Tensor], Tensor] | None
NORMAL, MARGINAL = "normal", "marginal"


def resolve(prior: Prior, end: float) -> Prior:
    """A prior that is there at flow time `end`.

    Raises:
        ValueError: an unknown name, or none given where the path does not end.
    """
    if prior is None or prior == NORMAL:
        if end != 0.0:
            raise ValueError(
                f"the interval ends at t = {end:g}, where the density is not the prior's; give prior=…: a function of "
                "the state, or 'marginal'"
            )
        return NORMAL
    if prior != MARGINAL and not callable(prior):
        raise ValueError(
            f"prior = {prior!r}; expected 'normal', 'marginal' or a function of the state at the noise end"
        )
    return prior


def normal_log_prob(x: Tensor, std: float) -> Tensor:
    """log N(x; 0, std² I), summed over all but the first dimension."""
    x = rows(x)
    return -0.5 * (x / std).square().sum(1) - x.shape[1] * (math.log(std) + 0.5 * math.log(2.0 * math.pi))


def stretch(trace: Tensor, size: int) -> Tensor:
    """D/T = 1 + v/s², from (B, P) estimates of T; kept within a factor of two, where the formula has any meaning."""
    return size / trace.clamp(0.5 * size, 2.0 * size)


def marginal_log_prob(noise: Tensor, trace: Tensor, sigma: float, lean: Tensor | float = 0.0) -> Tensor:
    """The marginal's log-density, (B, P), from ε̂ of shape (B, D), T of shape (B, P), σ and ε̂ᵀ(C − v)ε̂/s², if known."""
    size = noise.shape[1]
    wide = stretch(trace, size)
    square = noise.square().sum(1, keepdim=True) * wide + lean
    return -0.5 * (square + size * wide.log()) - size * (math.log(sigma) + 0.5 * math.log(2.0 * math.pi))
