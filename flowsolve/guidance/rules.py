r"""Rules of extrapolation that are not linear: where each acts, and by what formula.

All are per sample; $\langle\cdot,\cdot\rangle$ and norms are over the numbers of one. In terms of the straight outputs
$o = \hat z - \hat\varepsilon$ of the two estimates the gap of the data estimates is
$\hat z_c - \hat z_u = \frac{\sigma}{\alpha+\sigma}(o_c - o_u)$: a rule that scales or projects it can work on the gap
of the outputs, which does not vanish with σ.

| rule | acts on | formula | source |
|---|---|---|---|
| `APG(eta, norm_threshold)` | ẑ | $\hat z_c + (w-1)\,[\Delta_\perp + \eta\,\Delta_\parallel]$ | Sadat et al. 2024 |
| `ZeroStar(zero_until)` | ẑ − ε̂ | $s^\star o_u + w\,(o_c - s^\star o_u)$ | Fan et al. 2025 |
| `rescale=φ` | ẑ, or `rescale_in` | $q\,[\varphi\rho + 1 - \varphi]$, $\rho$ = std $q_c$ / std $q$ | Lin et al. 2024 |

**APG**: $\Delta = (\hat z_c-\hat z_u)\min(1, r/\lVert\hat z_c-\hat z_u\rVert)$. Its part $\Delta_\parallel$ along
$\hat z_c$ is what saturates, $\Delta_\perp$ is the rest. η = 1 without a threshold is classifier-free guidance. The
paper's momentum is an average over the sampler's last evaluations. With it an estimate would be no function of (x, t):
other stages, a rejected step or a batch mate would change a sample. It is refused.

**CFG-Zero★**: $s^\star = \langle o_c, o_u\rangle/\lVert o_u\rVert^2$. It is stated for the velocity of the straight
path, which is $z - \varepsilon$ in this package's direction of time; on other paths it acts on the velocity in the
straight chart, in which all of them are that path. Its weights $(1-w)s^\star + w$ do not add up to 1, so the space
matters. Zero-init, no velocity in the first steps, is one for noise levels: below λ = `zero_until` the straight
velocity is 0 (ẑ = ε̂ = x/(α+σ)), no network runs, and nothing is counted.

**Rescale** brings the spread of a guided estimate back to that of the conditional one. The paper and diffusers'
`rescale_noise_cfg` act on whatever the network outputs: that is `rescale_in="output"`. By default it acts on ẑ, the
same for every network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flowsolve._batch import per_sample, rows
from flowsolve.guidance.base import moved
from flowsolve.paths import Point
from flowsolve.predictions import Estimate, Row

__all__ = ["APG", "Rule", "ZeroStar", "rescaled"]


class Rule(Protocol):
    """A rule of extrapolation."""

    def __call__(self, strong: Tensor, weak: Tensor, x: Tensor, point: Point, scale: Any, /) -> Tensor:
        """The guided straight output, from those of the two estimates, shape (B, *S).

        Args:
            strong: ẑ − ε̂ of the conditional (or better) estimate.
            weak: that of the other.
            x: the state.
            point: the point of the path.
            scale: w, a float or a tensor of shape (B,).
        """
        ...


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al. 2024); see `flowsolve.guidance.rules`.

    Attributes:
        eta: the share of the part along the conditional estimate that is kept; 0 in the paper.
        norm_threshold: r, the longest gap ‖ẑ_c − ẑ_u‖ of a sample; inf for no limit. In the units of the data: the
            paper has 7.5 for Stable Diffusion 2.1's latents, 15 for SDXL's.
        momentum: 0; see there why.
    """

    eta: float = 0.0
    norm_threshold: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.momentum:
            raise ValueError(
                f"momentum = {self.momentum!r}; expected 0: it averages over the sampler's last evaluations, so that "
                "an estimate would depend on more than (x, t), and a sample on its solver's stages and batch mates"
            )
        if not self.norm_threshold > 0.0:
            raise ValueError(f"norm_threshold = {self.norm_threshold!r}; expected a norm > 0, or inf for no limit")

    def __call__(self, strong: Tensor, weak: Tensor, x: Tensor, point: Point, scale: Any) -> Tensor:
        """ẑ_c + (w − 1)(Δ⊥ + η Δ∥), as a straight output."""
        alpha, sigma, *_ = point
        gap = strong - weak
        if self.norm_threshold < math.inf:
            length = per_sample(sigma / (alpha + sigma), x) * per_sample(torch.linalg.vector_norm(rows(gap), dim=1), x)
            gap = gap * (self.norm_threshold / length.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
        if self.eta != 1.0:
            data = Estimate(x, strong, point, Row(1.0, -1.0)).data
            along = per_sample(_ratio(_dot(gap, data), _dot(data, data)), x) * data
            gap = gap - (1.0 - self.eta) * along
        made: Tensor = strong + per_sample(scale - 1.0, x) * gap
        return made


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero★ (Fan et al. 2025); see `flowsolve.guidance.rules`.

    Attributes:
        zero_until: the log-SNR below which nothing moves; −inf for no zero-init.
    """

    zero_until: float = -math.inf

    def __post_init__(self) -> None:
        if not self.zero_until < math.inf:
            raise ValueError(f"zero_until = {self.zero_until!r}; expected a log-SNR, or -inf for no zero-init")

    def __call__(self, strong: Tensor, weak: Tensor, x: Tensor, point: Point, scale: Any) -> Tensor:
        """s★ o_u + w (o_c − s★ o_u)."""
        weak = per_sample(_ratio(_dot(strong, weak), _dot(weak, weak)), x) * weak
        made: Tensor = weak + per_sample(scale, x) * (strong - weak)
        return made


def rescaled(output: Tensor, strong: Tensor, x: Tensor, point: Point, row: Row, share: float) -> Tensor:
    """A guided straight output after a `share` of the way back to the conditional's spread (Lin et al. 2024).

    Args:
        output: ẑ − ε̂ of the guided estimate, shape (B, *S).
        strong: that of the conditional one.
        x: the state.
        point: the point of the path.
        row: the space to rescale in.
        share: φ.
    """
    if rows(x).shape[1] < 2:
        raise ValueError(f"rescale compares the spread within a sample, and one has shape {tuple(x.shape[1:])}")
    guided, wanted = (Estimate(x, o, point, Row(1.0, -1.0)).combine(row.data, row.noise) for o in (output, strong))
    ratio = _ratio(rows(wanted).std(1, correction=0), rows(guided).std(1, correction=0), otherwise=1.0)
    return moved(output, point, row, share * per_sample(ratio - 1.0, x) * guided)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample, shape (B,)."""
    return (rows(a) * rows(b)).sum(1)


def _ratio(a: Tensor, b: Tensor, otherwise: float = 0.0) -> Tensor:
    """a/b, and `otherwise` where b is 0."""
    none = b == 0.0
    return torch.where(none, otherwise, a / torch.where(none, 1.0, b))
