r"""Averages of weights with a power-function profile, and any width of it after training (Karras et al. 2024, EDM2).

After $n$ updates the average of width $\gamma$ weighs the weights $\theta_k$ of step $k$ like $k^\gamma$:

$$ \bar\theta_n = \beta_n\bar\theta_{n-1} + (1-\beta_n)\,\theta_n, \qquad \beta_n = (1 - 1/n)^{\gamma+1}
   \;\Longrightarrow\; \bar\theta_n = \sum_{k=1}^n \frac{k^{\gamma+1} - (k-1)^{\gamma+1}}{n^{\gamma+1}}\,\theta_k . $$

The weights are the integrals of $p_{\gamma,n}(\tau) = (\gamma+1)\,\tau^\gamma/n^{\gamma+1}$ over the steps. The memory
grows with the run, and the initial weights are forgotten at once. The width is told as the profile's standard deviation
in units of $n$,

$$ \sigma_\mathrm{rel} = \frac{\sqrt{\gamma+1}}{(\gamma+2)\sqrt{\gamma+3}} , $$

0.05 to 0.10 as a rule.

**Post-hoc.** Snapshots of two widths, saved along the run, span profiles of others. The best combination
$\sum_i x_i\,p_{\gamma_i,n_i} \approx p_{\gamma,n}$ in the mean square solves $Ax = b$ with the inner products

$$ \langle p_{\gamma,n}, p_{\delta,m}\rangle
   = \frac{(\gamma+1)(\delta+1)}{\gamma+\delta+1}\;\frac{\min(n,m)^{\gamma+\delta+1}}{n^{\gamma+1}m^{\delta+1}} , $$

and the same combination of the snapshots is the average that was not kept. So the width is chosen after training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowsolve._bounds import require_plain

__all__ = ["PowerEMA", "combination", "exponent", "posthoc", "width"]

NAME = re.compile(r"ema-([0-9.]+)-([0-9]+)\.pt")
WIDEST = 12.0**-0.5
"""σ_rel of γ = 0, the plain mean of all weights."""


def width(exponent: float) -> float:
    """σ_rel of a profile τ^γ."""
    return math.sqrt((exponent + 1.0) / (exponent + 3.0)) / (exponent + 2.0)


def exponent(std: float) -> float:
    """γ ≥ 0 of a relative width σ_rel.

    Raises:
        ValueError: std outside (0, 12^(−1/2)].
    """
    if not 0.0 < std <= WIDEST * (1.0 + 1e-12):
        raise ValueError(f"std = {std!r}; expected a relative width in (0, {WIDEST:.4f}], such as 0.05 or 0.1")
    low, high = 0.0, 2.0 / std  # width(γ) < 1/(γ + 2)
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if width(middle) > std else (low, middle)
    return 0.5 * (low + high)


class PowerEMA:
    """The power-function average of a module's weights, kept as a module of its own.

    Args:
        module: the module being trained.
        std: σ_rel, the width relative to the length of the run.

    Attributes:
        module: the averaged copy, in evaluation mode, floating weights in float32 at least.
        updates: n.

    Raises:
        ValueError: std outside (0, 0.2887].
    """

    def __init__(self, module: nn.Module, std: float = 0.05) -> None:
        self.source = module
        self.std = float(std)
        self.exponent = exponent(self.std)
        self.updates = 0
        self.module = deepcopy(module).eval().requires_grad_(False)
        for p in self.module.parameters():
            if p.dtype.is_floating_point:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average; buffers and integer weights are copied."""
        self.updates += 1
        share = -math.expm1((self.exponent + 1.0) * math.log1p(-1.0 / self.updates)) if self.updates > 1 else 1.0
        for mean, p in zip(self.module.parameters(), self.source.parameters(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(p.to(mean.dtype), share)
            else:
                mean.copy_(p)
        for copy, b in zip(self.module.buffers(), self.source.buffers(), strict=True):
            copy.copy_(b)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, the width and the number of updates."""
        return {"std": self.std, "updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is of another width.
        """
        if state["std"] != self.std:
            raise ValueError(f"the state is of an average of width {state['std']}, this one has {self.std}")
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])

    def save(self, folder: str | Path) -> Path:
        """Write a snapshot, ema-WIDTH-UPDATES.pt, for `posthoc`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"ema-{self.std:.4f}-{self.updates:09d}.pt"
        part = file.with_name(file.name + ".part")
        torch.save(self.state_dict(), part)
        part.replace(file)
        return file


def combination(snapshots: Sequence[tuple[float, int]], std: float, updates: int) -> NDArray[np.float64]:
    """The coefficients of snapshots, pairs (σ_rel, n), whose profiles come nearest to that of width std at n = updates.

    Raises:
        ValueError: no snapshots, or one that is later than updates.
    """
    if not snapshots:
        raise ValueError("there are no snapshots to combine")
    gamma = np.array([exponent(s) for s, _ in snapshots])
    when = np.array([float(n) for _, n in snapshots])
    if float(when.max()) > updates:
        raise ValueError(f"a snapshot has {int(when.max())} updates; expected at most the {updates} asked for")
    products = _products(gamma[:, None], when[:, None], gamma[None], when[None])
    wanted = _products(gamma, when, np.float64(exponent(std)), np.float64(updates))
    # columns of unit norm: late and narrow profiles have norms that differ by orders of magnitude
    scale = 1.0 / np.sqrt(np.diag(products))
    found: NDArray[np.float64] = scale * np.linalg.lstsq(products * np.outer(scale, scale), scale * wanted, 1e-13)[0]
    return found


def _products(g: Any, n: Any, d: Any, m: Any) -> NDArray[np.float64]:
    """⟨p_{g,n}, p_{d,m}⟩ by logarithms: the powers overflow."""
    power = (g + d + 1.0) * np.log(np.minimum(n, m)) - (g + 1.0) * np.log(n) - (d + 1.0) * np.log(m)
    found: NDArray[np.float64] = (g + 1.0) * (d + 1.0) / (g + d + 1.0) * np.exp(power)
    return found


def posthoc(folder: str | Path, std: float, updates: int | None = None) -> dict[str, Tensor]:
    """The weights averaged with a width that was not kept, from the snapshots of a run.

    Args:
        folder: with the snapshots that `PowerEMA.save` and `train(..., ema_widths=)` write.
        std: σ_rel wanted.
        updates: n wanted; by default that of the last snapshot.

    Returns:
        A state dict for the network; numbers that are not floating are those of the last snapshot.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: none early enough, or a width outside (0, 0.2887].
    """
    folder = Path(folder)
    found = sorted((int(m[2]), f) for f in folder.glob("ema-*.pt") if (m := NAME.fullmatch(f.name)))
    if not found:
        raise FileNotFoundError(f"no snapshots ema-WIDTH-UPDATES.pt in {folder}")
    last = found[-1][0] if updates is None else updates
    files = [f for n, f in found if n <= last]
    if not files:
        raise ValueError(f"updates = {updates}, but the first snapshot in {folder} has {found[0][0]}")
    states = []
    for file in files:
        require_plain(file)
        states.append(torch.load(file, map_location="cpu", weights_only=True, mmap=True))  # read when it is summed
    share = combination([(s["std"], s["updates"]) for s in states], std, last)
    total: dict[str, Tensor] = {}
    for name, value in states[-1]["module"].items():
        if value.dtype.is_floating_point:
            parts = (float(x) * s["module"][name].double() for s, x in zip(states, share, strict=True))
            total[name] = sum(parts, torch.zeros_like(value, dtype=torch.float64)).to(value.dtype)
        else:
            total[name] = value.clone()
    return total
