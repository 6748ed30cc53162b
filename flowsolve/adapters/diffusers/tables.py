r"""The table $\bar\alpha_k$, $k = 0 \dots N-1$, that a scheduler's configuration describes.

With $\beta_k$ from the configuration and $\bar\alpha_k = \prod_{j\le k}(1-\beta_j)$:

| `beta_schedule` | $\beta_k$ | source |
|---|---|---|
| `linear` | evenly from `beta_start` to `beta_end` | Ho et al. 2020 |
| `scaled_linear` | the square of evenly spaced roots | Rombach et al. 2022 |
| `squaredcos_cap_v2` | $\min(1 - f_{k+1}/f_k,\ 0.999)$ | Nichol & Dhariwal 2021 |
| `laplace` | the same, from another $f$ | Hang et al. 2024 |
| `sigmoid` | a sigmoid over $[-6, 6]$, from `beta_start` to `beta_end` | Xu et al. 2022 |
| `trained_betas` | the list itself | |

with $f_k = \cos^2\bigl(\tfrac\pi2\,\tfrac{k/N+0.008}{1.008}\bigr)$. `snr_shift_scale` $s$ (CogVideoX) divides the
SNR $\bar\alpha/(1-\bar\alpha)$ by $s$. `rescale_betas_zero_snr` moves and stretches $\sqrt{\bar\alpha_k}$ so that the
last is 0 and the first stays (Lin et al. 2024); some schedulers put $2^{-24}$ for the 0 so that their σ stays finite.
Tables are computed in float64; diffusers' own, in float32, agree to its rounding.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import hosted

__all__ = ["MAX_STEPS", "alphas_cumprod", "table_size"]

MAX_STEPS = 1_000_000
"""Entries of a table; a file that claims more would cost memory and time before anything of it is used. The longest
that networks are trained on have 4,000."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The table ᾱ_k that a scheduler's configuration describes, float64 of shape (N,).

    Raises:
        ValueError: an unknown beta_schedule, a number of steps that is none, or trained_betas that are no list of
            numbers.
    """
    n, schedule, trained = table_size(config), config["beta_schedule"], config.get("trained_betas")
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if trained is not None:
        betas = _listed(trained)
    elif schedule == "linear":
        betas = torch.linspace(first, last, n, dtype=torch.float64, device="cpu")
    elif schedule == "scaled_linear":
        betas = torch.linspace(math.sqrt(first), math.sqrt(last), n, dtype=torch.float64, device="cpu").square()
    elif schedule == "sigmoid":
        betas = torch.linspace(-6.0, 6.0, n, dtype=torch.float64, device="cpu").sigmoid() * (last - first) + first
    elif schedule in ("squaredcos_cap_v2", "laplace"):
        s = torch.arange(n + 1, dtype=torch.float64, device="cpu") / n
        f = ((s + 0.008) / 1.008 * (0.5 * math.pi)).cos().square() if schedule != "laplace" else _laplace(s)
        betas = (1.0 - f[1:] / f[:-1]).clamp_max(0.999)
    else:
        known = ", ".join((*BETA_SCHEDULES, "trained_betas"))
        raise ValueError(f"beta_schedule = {schedule!r} is not supported; supported are {known}")
    table = (1.0 - betas).cumprod(0)
    if (scale := config.get("snr_shift_scale")) is not None:
        table = table / (scale + (1.0 - scale) * table)
    if config.get("rescale_betas_zero_snr"):
        root = table.sqrt()
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return table


def table_size(config: Mapping[str, Any], name: str = "num_train_timesteps") -> int:
    """The number of training steps that a configuration gives under a name, by default 1000.

    Raises:
        ValueError: it is not a whole number from 1 to `MAX_STEPS`.
    """
    value = config.get(name, 1000)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 <= value <= MAX_STEPS or value != int(value):
        raise ValueError(f"{name} = {reprlib.repr(value)}; expected a whole number from 1 to {MAX_STEPS:,}")
    return int(value)


def _listed(betas: Any) -> Tensor:
    try:
        found = hosted(betas, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty((), device="cpu")
    if found.ndim != 1 or not 1 <= len(found) <= MAX_STEPS:
        raise ValueError(f"trained_betas = {reprlib.repr(betas)}; expected a list of 1 to {MAX_STEPS:,} numbers")
    return found


def _laplace(s: Tensor) -> Tensor:
    """√(r/(1+r)), log r = ∓½ log(1 − |1 − 2s| + 10⁻⁶): diffusers' reading of the Laplace schedule."""
    r = (-0.5 * torch.where(s <= 0.5, 1.0, -1.0) * (1.0 - (1.0 - 2.0 * s).abs() + 1e-6).log()).exp()
    return (r / (1.0 + r)).sqrt()
