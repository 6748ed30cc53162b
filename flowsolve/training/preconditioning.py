r"""EDM's preconditioning as a prediction (Karras et al. 2022, Table 1 and Appendix B.6).

The denoiser is $D(x) = c_\mathrm{skip}\,x + c_\mathrm{out}F(c_\mathrm{in}x;\,c_\mathrm{noise})$ on $x = z +
\tilde\sigma\varepsilon$, and the network proper is $F$. What $F$ is asked for is one more row of the plane of $z$ and
$\varepsilon$: with $\tilde\sigma = \sigma/\alpha$, $S^2 = \tilde\sigma^2 + \sigma_d^2$,

$$ c_\mathrm{skip} = \frac{\sigma_d^2}{S^2},\quad c_\mathrm{out} = \frac{\tilde\sigma\sigma_d}{S},\quad
   c_\mathrm{in} = \frac1S,\quad c_\mathrm{noise} = \tfrac14\ln\tilde\sigma; \qquad
   F \approx \frac{z - c_\mathrm{skip}(z + \tilde\sigma\varepsilon)}{c_\mathrm{out}}
   = \frac{\tilde\sigma}{S\sigma_d}\,z - \frac{\sigma_d}{S}\,\varepsilon . $$

For data of standard deviation $\sigma_d$ the input $c_\mathrm{in}x$ and the target have unit variance at every level.
The loss on $z$ with weight `weights.edm` is the loss on the raw output $F$ with weight 1. On a path with
$\alpha \ne 1$ the network is given $c_\mathrm{in}x/\alpha$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._batch import per_sample
from flowsolve.flow import Flow
from flowsolve.paths import EDM, Path, Point
from flowsolve.predictions import Prediction, Row

__all__ = ["Preconditioned", "preconditioned", "prediction"]


def prediction(sigma_data: float = 0.5) -> Prediction:
    """The row of the raw network F behind the preconditioning."""
    if not (math.isfinite(sigma_data) and sigma_data > 0):
        raise ValueError(f"sigma_data = {sigma_data!r}; expected a finite number > 0")
    return Prediction(f"EDM's F, sigma_data = {sigma_data:g}", partial(_row, sigma_data=float(sigma_data)))


def _row(point: Point, sigma_data: float) -> Row:
    norm = _norm(point, sigma_data)  # α S
    return Row(point.sigma / (norm * sigma_data), -sigma_data * point.alpha / norm)


def _norm(point: Point, sigma_data: float) -> Any:
    other = sigma_data * point.alpha
    if isinstance(point.sigma, Tensor):
        return torch.hypot(point.sigma, torch.as_tensor(other, dtype=point.sigma.dtype, device=point.sigma.device))
    return math.hypot(point.sigma, other)


class Preconditioned(nn.Module):
    """F(c_in x/α, c_noise) at flow time t: the network that a flow with `prediction` calls.

    Args:
        net: F, a network net(x, c_noise, **cond).
        path: the path.
        sigma_data: σ_d, the standard deviation of the data.
    """

    def __init__(self, net: Callable[..., Tensor], path: Path, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.net = net
        self.path = path
        self.sigma_data = float(sigma_data)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        point = self.path.at(t.to("cpu", torch.float64))
        scale = per_sample(1.0 / _norm(point, self.sigma_data), x)
        level = (-0.25 * point.log_snr).to(device=t.device, dtype=t.dtype)
        return self.net(scale * x, level, **cond)


def preconditioned(net: Callable[..., Tensor], path: Path | None = None, sigma_data: float = 0.5, **more: Any) -> Flow:
    """A network behind EDM's preconditioning, as a flow.

    Args:
        net: F, a network net(x, c_noise, **cond); c_noise is ¼ ln(σ/α), of shape (B,).
        path: by default `EDM()`.
        sigma_data: σ_d.
        **more: of `Flow`.
    """
    path = EDM() if path is None else path
    return Flow(Preconditioned(net, path, sigma_data), path, prediction(sigma_data), **more)
