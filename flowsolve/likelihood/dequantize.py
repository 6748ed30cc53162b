r"""Dequantisation: where in its cell an integer is placed, and what that choice costs.

A flow reads the density $\hat p$ of states; the integers $k$ have the probability of their cell
(`flowsolve.transforms`). For *any* density $q(u\mid k)$ on $(0,1)^D$

$$ \log P(k) = \log\mathbb E_q\,w \ \ge\ \mathbb E_q\log w, \qquad
   \log w = \log\hat p\bigl(T(k+u)\bigr) + \log|\det T'(k+u)| - \log q(u\mid k), $$

with equality where $q$ is the model's own posterior of $u$. With K draws,
$\log\frac1K\sum_j w_j$ lies between the two in expectation and rises to $\log P(k)$ (Burda et al. 2016); without the
$-\log K$ it would be no bound at all.

| dequantiser | $q(u \mid k)$ | for a model trained |
|---|---|---|
| `Uniform` (Theis et al. 2016) | 1 | on data with uniform noise within a level |
| `TruncatedNormal` (Zheng et al. 2023) | $N(\tfrac12, r^2)$ on $(0, 1)$ | on bare integers, seen noised only |
| your own (Ho et al. 2019) | learnt | any |

**Truncated normal.** A flow trained on undequantised data knows states $x_t = \alpha T(k+\tfrac12) + \sigma\varepsilon$
only, $t \le t_\varepsilon$. Read at $t_\varepsilon$, the model of data is
$\hat p(z) = \alpha^D p_{t_\varepsilon}(\alpha z)$, and noise of the same width, cut off at the cell, is what
$\hat p$ has around the integer it knows:

$$ r = \frac{\sigma(t_\varepsilon)}{\alpha(t_\varepsilon)\,|T'(k+\tfrac12)|}, \qquad
   -\log q(u\mid k) = \sum_i \frac{(u_i-\tfrac12)^2}{2r^2} + \log\Bigl(r\sqrt{2\pi}\,\operatorname{erf}\frac{1}{2\sqrt
   2\,r}\Bigr), $$

whose mean is the entropy term of the bound. Nothing is approximated: $q$ integrates to 1 on the cell, and $P(k)$ is the
mass that $\hat p$ puts on it.

**Your own.** Any object with `sample(images, noise, draw) -> (u, log_q)`. `FlowDequantizer` makes one of a conditional
flow on the line: $u = \operatorname{sigmoid}(w)$, $\log q(u) = \log q(w) - \sum_i\log u_i(1-u_i)$.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flowsolve._batch import hosted, rows
from flowsolve.flow import Flow
from flowsolve.likelihood.log_prob import sample_log_prob
from flowsolve.likelihood.trace import Exact, Trace
from flowsolve.noise import DEQUANTIZE, Noise
from flowsolve.transforms import Latent, Transform

__all__ = ["Dequantizer", "FlowDequantizer", "TruncatedNormal", "Uniform", "resolve"]

FILL = 3.0  # standard deviations of the noise in half a cell, where a path goes on to less noise than that


class Dequantizer(Protocol):
    """A density q(u | k) on the cells of integers."""

    def sample(self, images: Tensor, noise: Noise, draw: int) -> tuple[Tensor, Tensor]:
        """One draw for each image.

        Args:
            images: integers k, int64 of shape (B, *S).
            noise: the noise of these samples; `noise.uniform(DEQUANTIZE, draw, like)` is the same for an image in any
                batch.
            draw: the number of the draw.

        Returns:
            u in (0, 1), floating, shape (B, *S), and log q(u | k) in nats, shape (B,).
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """u uniform in the cell; log q = 0."""

    def sample(self, images: Tensor, noise: Noise, draw: int) -> tuple[Tensor, Tensor]:
        """A `Dequantizer`'s draw."""
        u = noise.uniform(DEQUANTIZE, draw, torch.empty(images.shape, dtype=_dtype(images), device=images.device))
        return u, u.new_zeros(len(u))


@dataclass(frozen=True)
class TruncatedNormal:
    """u normal about the middle of the cell, cut off at its ends.

    Attributes:
        std: r in units of a level: a number, or what gives that of each number of an image, k → r, shape (B, *S).
    """

    std: float | Callable[[Tensor], Tensor]

    def sample(self, images: Tensor, noise: Noise, draw: int) -> tuple[Tensor, Tensor]:
        """A `Dequantizer`'s draw, by the inverse of the distribution function."""
        v, _ = Uniform().sample(images, noise, draw)
        std = self.std(images) if callable(self.std) else hosted(self.std, dtype=v.dtype)
        r = std.to(v).expand(v.shape)
        if not bool((r > 0).all() & r.isfinite().all()):
            raise ValueError(
                f"the truncated normal's std is {float(r.min()):g} of a level; expected a finite number > 0"
            )
        inside = torch.erf(math.sqrt(0.125) / r)
        off = math.sqrt(2.0) * torch.erfinv((2.0 * v - 1.0) * inside)
        log_q = -0.5 * off.square() - (r * inside).log() - 0.5 * math.log(2.0 * math.pi)
        return (0.5 + r * off).clamp(0.0, 1.0), rows(log_q).sum(1)


@dataclass(frozen=True)
class FlowDequantizer:
    """A dequantiser made of a conditional flow on the line, by the logistic function.

    It costs one pass of that flow a draw (`flowsolve.sample_log_prob`), which the NFE of the likelihood do not count.

    Attributes:
        flow: a flow of states w of the images' shape.
        condition: images, int64 of shape (B, *S) → the keyword arguments of the flow's network.
        trace: how the density's divergence is found; an estimate leaves a bound for one draw, not for several.
        options: for `sample_log_prob`: solver, nfe, grid, chart, ….
    """

    flow: Flow
    condition: Callable[[Tensor], Mapping[str, Any]]
    trace: str | Trace = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether log q is known and not estimated."""
        return self.trace == "exact" or isinstance(self.trace, Exact)

    def sample(self, images: Tensor, noise: Noise, draw: int) -> tuple[Tensor, Tensor]:
        """A `Dequantizer`'s draw: a sample w of the flow, and its density."""
        like = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        made = sample_log_prob(
            self.flow, start=noise.normal(DEQUANTIZE, draw, like) * self.flow.path.prior_std, trace=self.trace,
            seed=noise.seed, samples=noise.samples, cond=self.condition(images), **self.options,
        )  # fmt: skip
        w = made.x.to(_dtype(made.x))
        squash = torch.nn.functional.logsigmoid(w) + torch.nn.functional.logsigmoid(-w)
        return w.sigmoid(), made.log_prob.to(w.dtype) - rows(squash).sum(1)


def declared(flow: Flow) -> Transform:
    """The flow's transform of integers.

    Raises:
        ValueError: the flow models codes of an autoencoder.
    """
    if isinstance(flow.transform, Latent):
        raise ValueError(
            f"the flow models codes of an autoencoder ({flow.transform!r}): its images have no bits per dimension. The "
            "decoder is not invertible, and the density of an image is not that of its code. "
            "log_prob(flow, flow.transform.forward(codes)) is the density of codes"
        )
    return flow.transform


def readable(images: Tensor, levels: int) -> Tensor:
    """The images as int64, if they are integers of so many levels.

    Warns:
        UserWarning: they use a quarter of the levels or less, as images of another bit depth do.

    Raises:
        TypeError: images that are not integers.
        ValueError: no images, or some outside the levels.
    """
    if (
        not isinstance(images, Tensor)
        or images.is_floating_point()
        or images.is_complex()
        or images.dtype == torch.bool
    ):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images are {got}; expected integers 0 … {levels - 1}. Scaled or dequantised images have a density, not a "
            "probability: give the integers, and the flow's transform says where they lie"
        )
    if images.ndim == 0 or not images.numel():
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, *S) with at least one image")
    k = images.to(torch.int64)
    low, high = int(k.min()), int(k.max())
    if not 0 <= low <= high < levels:
        raise ValueError(
            f"images run from {low} to {high}; expected 0 … {levels - 1} (set bits= or levels= to what the images have)"
        )
    _warn_of_depth(k, high, levels)
    return k


def _warn_of_depth(k: Tensor, high: int, levels: int) -> None:
    if levels < 8:
        return
    used = f"the levels 0 … {high} only" if 4 * (high + 1) <= levels else None
    if used is None and k.numel() >= 16 * levels:
        step = math.gcd(*k.unique().tolist())
        used = f"multiples of {step} only" if step > 1 else None
    if used is not None:
        warnings.warn(
            f"of {levels} levels the images use {used}, as images of another bit depth do; their bits per dimension "
            "would be wrong. Give bits= or levels= as the images have them; ignore this if they are truly so",
            UserWarning,
            stacklevel=4,
        )


def resolve(dequantize: str | Dequantizer, flow: Flow, t: float, transform: Transform, levels: int) -> Dequantizer:
    """A dequantiser by its name, or itself; "truncated_normal" is matched to the path's noise at flow time t."""
    if dequantize == "uniform":
        return Uniform()
    if dequantize == "truncated_normal":
        return matched(flow, t, transform, levels)
    if isinstance(dequantize, str) or not callable(getattr(dequantize, "sample", None)):
        raise ValueError(
            f"dequantize = {dequantize!r} is not known; expected 'uniform', 'truncated_normal', or an object with "
            "sample(images, noise, draw) -> (u, log_q), such as a FlowDequantizer"
        )
    return dequantize


def matched(flow: Flow, t: float, transform: Transform, levels: int) -> TruncatedNormal:
    """The truncated normal of the noise that the path has at flow time t.

    Raises:
        ValueError: the path has no noise there.
    """
    point = flow.path.at(t)
    if point.sigma == 0.0:
        raise ValueError(
            f"at t = {t:g} the path has no noise for a truncated normal to match; end the likelihood before, with "
            f"interval=({flow.path.time(6.0):.6g}, 0.0) for example"
        )
    noise = math.log(point.sigma / point.alpha)

    def std(k: Tensor) -> Tensor:
        middle = k.to(_dtype(k)) + 0.5
        return (noise - transform.log_slope(middle, levels)).exp()

    return TruncatedNormal(std)


def filled(flow: Flow, transform: Transform, levels: int, shape: tuple[int, ...]) -> float:
    """The last flow time at which the noise fills a cell: its deviation is at least a third of half the middle cell."""
    middle = torch.full((1, *shape), 0.5 * levels, dtype=torch.float64, device="cpu")
    slope = float(transform.log_slope(middle, levels).min())
    return min(flow.path.window[1], flow.path.time(math.log(2.0 * FILL) - slope))


def placed(dequantizer: Dequantizer, k: Tensor, noise: Noise, draw: int) -> tuple[Tensor, Tensor]:
    """A draw of a dequantiser, checked: the points k + u of the cells, and log q, shape (B,)."""
    u, log_q = dequantizer.sample(k, noise, draw)
    if u.shape != k.shape or log_q.shape != k.shape[:1]:
        raise ValueError(
            f"{type(dequantizer).__name__}.sample returned u of shape {tuple(u.shape)} and log q of "
            f"{tuple(log_q.shape)}; expected {tuple(k.shape)} and ({len(k)},)"
        )
    if not bool(((u >= 0) & (u <= 1)).all() & log_q.isfinite().all()):  # NaN is in no interval
        raise ValueError(
            f"{type(dequantizer).__name__}.sample returned u outside [0, 1] or a log q that is not finite; expected "
            "points of the cell and their log-density"
        )
    return k.to(_dtype(k)) + u.to(_dtype(k)), log_q


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
