"""SDEs as torchsde's users write them: objects with f and g, both at once, or products with increments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowsolve.sde.problem import NOISE_TYPES, SDE_TYPES

__all__ = ["check_kinds", "functions", "with_ratio"]


def check_kinds(noise_type: str, sde_type: str) -> None:
    """Raise ValueError unless these are kinds of noise and of calculus."""
    if noise_type not in NOISE_TYPES:
        raise ValueError(f"noise_type = {noise_type!r}; expected one of {', '.join(NOISE_TYPES)}")
    if sde_type not in SDE_TYPES:
        raise ValueError(f"sde_type = {sde_type!r}; expected one of {', '.join(SDE_TYPES)}")


def functions(sde: Any, names: Mapping[str, str], bm: Any) -> tuple[Any, Any, Any]:
    """Drift, diffusion and prior drift."""
    for name in ("noise_type", "sde_type"):
        if not hasattr(sde, name):
            raise ValueError(f"the sde has no attribute {name}")
    check_kinds(sde.noise_type, sde.sde_type)

    def known(role: str, plain: str) -> Any:
        return getattr(sde, names.get(role, plain), None)

    f, g, both = known("drift", "f"), known("diffusion", "g"), known("drift_and_diffusion", "f_and_g")
    if both is not None:
        f = f or (lambda t, y: both(t, y)[0])
        g = g or (lambda t, y: both(t, y)[1])
    joint, product = known("drift_and_diffusion_prod", "f_and_g_prod"), getattr(sde, "g_prod", None)
    if joint is not None:
        product = product or (lambda t, y, v: joint(t, y, v)[1])
    if g is None and product is not None:
        g = _columns(product, sde.noise_type, bm)
    if f is None and joint is not None:
        channels = _channels(bm)
        f = lambda t, y: joint(t, y, y.new_zeros(len(y), channels))[0]  # noqa: E731
    if f is None or g is None:
        missing = "f" if f is None else "g"
        raise ValueError(f"the sde has no {missing}; expected f and g, f_and_g, or products such as g_prod")
    return f, g, known("prior_drift", "h")


def _columns(product: Any, noise_type: str, bm: Any) -> Any:
    """g from products g v: its columns, one call each; with diagonal noise, one call."""
    if noise_type == "diagonal":
        return lambda t, y: product(t, y, torch.ones_like(y))
    channels = 1 if noise_type == "scalar" else _channels(bm)

    def columns(t: Tensor, y: Tensor) -> Tensor:
        units = torch.eye(channels, dtype=y.dtype, device=y.device)
        return torch.stack([product(t, y, v.expand(len(y), -1)) for v in units], -1)

    return columns


def _channels(bm: Any) -> int:
    """How many Brownian motions a sample has."""
    if bm is None:
        raise ValueError("an sde with products such as g_prod alone does not tell how many motions it has; give bm=")
    return int(bm.shape[-1])


def with_ratio(f: Any, g: Any, h: Any, noise_type: str) -> tuple[Any, Any]:
    """Drift and diffusion of (y, ∫ ½ |g⁻¹ (f − h)|² dt)."""
    if h is None:
        raise AttributeError("logqp=True needs the prior drift, h(t, y), beside f and g")

    def drift(t: Tensor, y: Tensor) -> Tensor:
        y = y[:, :-1]
        along, across = f(t, y), g(t, y)
        if noise_type == "diagonal":
            least = across.new_tensor(1e-7)
            u = (along - h(t, y)) / torch.where(across.abs() > least, across, least.copysign(across))
        else:
            u = (across.pinverse() @ (along - h(t, y)).unsqueeze(-1)).squeeze(-1)
        return torch.cat((along, 0.5 * u.square().sum(1, keepdim=True)), 1)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        across = g(t, y[:, :-1])
        return torch.cat((across, torch.zeros_like(across[:, :1])), 1)

    return drift, diffusion
