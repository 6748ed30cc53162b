r"""Inversion: data to noise and back, with what was lost on the way.

An image is edited by carrying it to the noise (`encode`), changing the conditioning, and carrying it back (`sample`).
The ODE is its own inverse; a solver is not, and what a round trip loses with the conditioning unchanged is the least
that an edit will lose. Error estimates of one direction do not show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve._surroundings import refuse
from flowsolve.flow import Flow
from flowsolve.integrate import encode, sample
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Solver

__all__ = ["RoundTrip", "round_trip"]


@dataclass(frozen=True)
class RoundTrip:
    """Data carried to the noise and back, one entry a sample.

    Attributes:
        latent: the state at the noise end, shape (B, *S).
        x: the state after the way back, shape (B, *S).
        error: root mean square of x less the data, float64 of shape (B,).
        psnr: 20 log₁₀(range/error), in dB, with the flow's `data_range`; NaN if that is infinite (codes); float64
            of shape (B,).
        latent_std: root mean square of the latent over the path's prior_std; 1 on average where the model fits.
        nfe: network evaluations of both ways, int64 of shape (B,).
    """

    latent: Tensor
    x: Tensor
    error: Tensor
    psnr: Tensor
    latent_std: Tensor
    nfe: Tensor

    def __str__(self) -> str:
        """A line for each figure: median and worst."""
        lines = [f"round trip of {len(self.error)} samples, NFE {float(self.nfe.double().mean()):.1f} on average"]
        for name, v, worst in (("error", self.error, "max"), ("PSNR, dB", self.psnr, "min")):
            lines.append(f"  {name:<10} median {float(v.median()):.4g}, worst {float(getattr(v, worst)()):.4g}")
        lines.append(f"  latent std median {float(self.latent_std.median()):.4g} (1 is the prior's)")
        return "\n".join(lines)


@torch.no_grad()
def round_trip(
    flow: Flow,
    x: Tensor,
    *,
    solver: Solver | Auto | str = "auto",
    cond: Mapping[str, Any] | None = None,
    **options: Any,
) -> RoundTrip:
    """Carry data to the noise and back by the same solver, and report what was lost.

    Args:
        flow: the flow.
        x: data at the end of the network's window, shape (B, *S).
        solver: a solver that draws no noise, or "auto".
        cond: passed to the network, both ways.
        **options: nfe, grid, chart, interval, batch and progress, as for `encode`. A grid of explicit times is turned
            for the way back.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> x = torch.tensor([[0.9], [-1.1]], dtype=torch.float64)
        >>> report = fs.round_trip(flow, x, solver=fs.solvers.RK4(), nfe=80)
        >>> bool((report.error < 1e-4).all()), report.nfe.tolist()
        (True, [160, 160])
    """
    refuse("round_trip, whose result has no derivatives,", "use encode and sample")
    interval = options.pop("interval", None) or (flow.path.window[1], 0.0)
    there = encode(flow, x, solver=solver, cond=cond, interval=interval, **options)
    grid = options.pop("grid", None)
    if isinstance(grid, list | tuple):
        grid = list(reversed(grid))
    back = sample(flow, start=there.x, solver=solver, cond=cond, interval=interval[::-1], grid=grid, **options)
    error = rows(back.x - x.to(back.x)).double().square().mean(1).sqrt()
    low, high = flow.data_range
    span = high - low if math.isfinite(high - low) else math.nan
    return RoundTrip(
        there.x,
        back.x,
        error,
        20.0 * torch.log10(span / error),
        rows(there.x).double().square().mean(1).sqrt() / flow.path.prior_std,
        there.nfe + back.nfe,
    )
