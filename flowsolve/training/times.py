r"""Time densities: where on the path a loss looks.

A density is a callable `density(n, generator)` that returns n numbers in the *open* interval (0, 1), float64
on the host; the losses map them linearly into the path's window. Open, because a path may be singular at its
ends and a draw that is exactly 0 or 1 has probability zero.

| density | law | source |
|---|---|---|
| `uniform` | $U(0, 1)$, independent | Lipman et al. 2022 |
| `stratified` | $(u + i/n) \bmod 1$, shuffled: each $U(0, 1)$, jointly even | Kingma et al. 2021 (VDM) |
| `logit_normal` | $\mathrm{sigmoid}(N(m, s^2))$ | Esser et al. 2024 |

`stratified` leaves every expectation as it is and removes most of the variance that comes from the times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["Density", "logit_normal", "stratified", "uniform"]

Density = Callable[[int, torch.Generator | None], Tensor]

HALF_ULP = 2.0**-54  # half the spacing of torch's float64 uniforms: what a drawn 0 is moved to


def _rand(n: int, generator: torch.Generator | None) -> Tensor:
    place = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(n, generator=generator, device=place, dtype=torch.float64).cpu()


def _open(u: Tensor) -> Tensor:
    return u.clamp(HALF_ULP, 1.0 - 2.0 * HALF_ULP)


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n independent times, uniform on (0, 1)."""
    return _open(_rand(n, generator))


def stratified(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n times with one in every interval of length 1/n (up to a common shift), in random order."""
    shift = _rand(1, generator)
    place = generator.device if generator is not None else torch.device("cpu")
    order = torch.randperm(n, generator=generator, device=place).cpu()
    return _open((shift + order.to(torch.float64) / max(n, 1)) % 1.0)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """The density of sigmoid(mean + std·N(0, 1)): more times in the middle; mean > 0 leans towards the data.

    Raises:
        ValueError: std is not > 0.
    """
    if not std > 0:
        raise ValueError(f"std = {std!r}; expected a number > 0")
    return partial(_logit_normal, mean=mean, std=std)


def _logit_normal(n: int, generator: torch.Generator | None = None, *, mean: float, std: float) -> Tensor:
    place = generator.device if generator is not None else torch.device("cpu")
    normal = torch.randn(n, generator=generator, device=place, dtype=torch.float64).cpu()
    return _open(torch.sigmoid(mean + std * normal))
