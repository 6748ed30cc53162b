r"""Predictions and estimates: what a network's output says about data and noise.

At a point $(\alpha, \sigma)$ of its path the state is $x = \alpha z + \sigma\varepsilon$. A network's output $o$ is an
estimate of one more combination of the same two unknowns,

$$ w\,o \approx a\,z + b\,\varepsilon , $$

so a *prediction* is the row $(a, b)$ with its scale $w$:

| prediction | $a$ | $b$ | $w$ | source |
|---|---|---|---|---|
| `data` | $1$ | $0$ | $1$ | |
| `noise` | $0$ | $1$ | $1$ | Ho et al. 2020 |
| `score` | $0$ | $-1$ | $\sigma$ | Song et al. 2021: $\nabla\log p_t = -\hat\varepsilon/\sigma$ |
| `velocity` | $\dot\alpha$ | $\dot\sigma$ | $1$ | Lipman et al. 2022 |
| `v` | $-\sigma$ | $\alpha$ | $1$ | Salimans & Ho 2022 |
| `flow` | $-\dot\alpha$ | $-\dot\sigma$ | $1$ | the velocity towards the noise, as SD 3 and FLUX predict it |

Two rows, $(\alpha, \sigma)$ for $x$ and $(a, b)$ for $o$, determine $(\hat z, \hat\varepsilon)$, and with them *every*
combination $c\,\hat z + d\,\hat\varepsilon$, by one 2×2 solve (Cramer's rule):

$$ c\,\hat z + d\,\hat\varepsilon = \frac{(cb - da)\,x + w\,(\alpha d - \sigma c)\,o}{\alpha b - \sigma a}. $$

That is the only conversion formula in the package. The data estimate is $(c, d) = (1, 0)$, the velocity
$(\dot\alpha, \dot\sigma)$, a DDIM step to $(\alpha', \sigma')$ is $(c, d) = (\alpha', \sigma')$ itself; for $w\,o = u$
it contains the textbook $u = (\sigma^2\dot\alpha/\alpha - \dot\sigma\sigma)\nabla\log p + (\dot\alpha/\alpha)\,x$.

Where the determinant $\alpha b - \sigma a$ vanishes the output repeats what $x$ already says and the estimate does not
exist: a noise or score prediction at $\alpha = 0$, a data prediction at $\sigma = 0$. Asking for it is an error,
never a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from flowsolve import kernels
from flowsolve._batch import linear
from flowsolve.paths import Point

__all__ = ["FLOW", "PREDICTIONS", "Estimate", "Prediction", "Row", "SingularEstimate", "resolve"]


class SingularEstimate(ValueError):
    """The network's output and the state carry the same information, so data and noise cannot be told apart."""


class Row(NamedTuple):
    """scale · output ≈ data · z + noise · ε, as floats or tensors of shape (B,)."""

    data: Any
    noise: Any
    scale: Any = 1.0


@dataclass(frozen=True)
class Prediction:
    """What a network was trained to output: a name, and its row at a point of the path."""

    name: str
    row: Callable[[Point], Row]

    def determinant(self, point: Point) -> Any:
        """αb − σa at a point; zero where the estimate does not exist."""
        row = self.row(point)
        return point.alpha * row.noise - point.sigma * row.data

    def singular(self, point: Point) -> bool:
        """Whether the estimate fails to exist at a point (at any of its times)."""
        det = self.determinant(point)
        return bool((det == 0).any()) if isinstance(det, Tensor) else det == 0.0


def _data(point: Point) -> Row:
    return Row(1.0, 0.0)


def _noise(point: Point) -> Row:
    return Row(0.0, 1.0)


def _score(point: Point) -> Row:
    return Row(0.0, -1.0, point.sigma)


def _velocity(point: Point) -> Row:
    return Row(point.alpha_dot, point.sigma_dot)


def _v(point: Point) -> Row:
    return Row(-point.sigma, point.alpha)


def _flow(point: Point) -> Row:
    return Row(-point.alpha_dot, -point.sigma_dot)


PREDICTIONS: dict[str, Prediction] = {
    p.name: p
    for p in (
        Prediction("data", _data),
        Prediction("noise", _noise),
        Prediction("score", _score),
        Prediction("velocity", _velocity),
        Prediction("v", _v),
    )
}


FLOW = Prediction("flow", _flow)
"""The velocity towards the noise, −u, as diffusers' flow-matching models (SD 3, FLUX) predict it."""


def resolve(prediction: str | Prediction) -> Prediction:
    """A prediction by its name, or itself."""
    if isinstance(prediction, Prediction):
        return prediction
    if prediction == FLOW.name:
        return FLOW
    try:
        return PREDICTIONS[prediction]
    except (KeyError, TypeError):
        names = ", ".join((*PREDICTIONS, FLOW.name))
        raise ValueError(
            f"prediction = {prediction!r} is not known; expected one of {names}, or a Prediction of your own "
            "(diffusers' 'epsilon' is 'noise', 'sample' is 'data', 'v_prediction' is 'v')"
        ) from None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one network call at (x, t) says: x, the output, and the rows that relate both to data and noise.

    Attributes:
        x: the state, shape (B, *S).
        output: the network's output, same shape and dtype.
        point: the path's point at t.
        row: the row of the output.
    """

    x: Tensor
    output: Tensor
    point: Point
    row: Row

    def coefficients(self, data: Any, noise: Any) -> tuple[Any, Any]:
        """(k_x, k_o) with data·ẑ + noise·ε̂ = k_x x + k_o o; floats, or tensors of shape (B,)."""
        (alpha, sigma, *_), (a, b, w) = self.point, self.row
        det = alpha * b - sigma * a
        return (data * b - noise * a) / det, w * (alpha * noise - sigma * data) / det

    def combine(self, data: Any, noise: Any) -> Tensor:
        """data·ẑ + noise·ε̂, shape (B, *S), with weights that are floats or of shape (B,)."""
        k_x, k_o = self.coefficients(data, noise)
        if not self.x.is_cpu and isinstance(k_x, float) and isinstance(k_o, float) and k_x and k_o:
            fused = kernels.combination((k_x, k_o), (self.x, self.output))
            if fused is not None:
                return fused
        return linear(k_x, self.x, k_o, self.output)

    @property
    def data(self) -> Tensor:
        """ẑ, the expected data given x."""
        return self.combine(1.0, 0.0)

    @property
    def noise(self) -> Tensor:
        """ε̂, the expected noise given x."""
        return self.combine(0.0, 1.0)

    @property
    def velocity(self) -> Tensor:
        """u = α̇ ẑ + σ̇ ε̂, the probability-flow velocity in flow time."""
        return self.combine(self.point.alpha_dot, self.point.sigma_dot)

    @property
    def v(self) -> Tensor:
        """α ε̂ − σ ẑ (Salimans & Ho 2022)."""
        return self.combine(-self.point.sigma, self.point.alpha)

    @property
    def score(self) -> Tensor:
        """∇ log p_t(x) = −ε̂/σ. Raises SingularEstimate where σ = 0."""
        sigma = self.point.sigma
        if bool((sigma == 0).any()) if isinstance(sigma, Tensor) else sigma == 0.0:
            raise SingularEstimate("the score at σ = 0 does not exist (the data has no noise left); ask at t < 1")
        return self.combine(0.0, -1.0 / sigma)
