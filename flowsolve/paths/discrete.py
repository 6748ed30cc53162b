"""The path of a discrete table, exact at its entries and continuous in between."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowsolve.paths.base import Path, T

__all__ = ["Discrete"]


@dataclass(frozen=True)
class Discrete(Path):
    """The path of a discrete table ᾱ_0 > ᾱ_1 > … > ᾱ_{N−1}: exact at its entries, continuous in between.

    With `clean` (the default) the path ends in the data itself: entry k sits at t = 1 − (k+1)/N and t = 1 has ᾱ = 1,
    so N uniform steps visit every entry and end where DDPM ends. The network knows only the entries, hence the
    window [0, 1 − 1/N]. Without `clean` the path ends at entry 0.

    Between entries α/(α+σ), the clock of the straight chart, is linear in t: the one interpolation that is finite at
    both ends, also for tables with zero terminal SNR. Its slope jumps at the entries, so that a *velocity* in flow
    time is ambiguous there (the slope towards the data is taken); the other predictions do not see it. Native time is
    the (fractional) index k.
    """

    alphas_cumprod: tuple[float, ...]
    clean: bool = True
    _nodes: tuple[list[float], list[float]] = field(init=False, repr=False, compare=False)
    _tensors: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __init__(self, alphas_cumprod: Iterable[float] | Tensor, clean: bool = True) -> None:
        if isinstance(alphas_cumprod, Tensor):
            alphas_cumprod = alphas_cumprod.detach().cpu().double().tolist()
        table = tuple(float(a) for a in alphas_cumprod)
        if len(table) < 2:
            raise ValueError(f"alphas_cumprod has {len(table)} entries; expected a 1-D table of at least 2")
        falling = all(x > y for x, y in pairwise(table))
        if not falling or not (table[0] < 1.0 and table[-1] >= 0.0):
            raise ValueError(
                f"alphas_cumprod runs from {table[0]:.6g} to {table[-1]:.6g}; expected values in [0, 1) that strictly "
                "decrease with the index (the noise grows). Pass the cumulative products, not the betas: "
                "Discrete.from_betas(betas) builds them."
            )
        roots = [(math.sqrt(a), math.sqrt(1.0 - a)) for a in ((1.0, *table) if clean else table)]
        nodes = ([a / (a + s) for a, s in roots], [s / (a + s) for a, s in roots])
        tensors = tuple(torch.tensor(n, dtype=torch.float64) for n in nodes)
        fields = {"alphas_cumprod": table, "clean": clean, "_nodes": nodes, "_tensors": tensors}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_betas(cls, betas: Iterable[float] | Tensor, clean: bool = True) -> Discrete:
        """The table ᾱ_k = Π_{j≤k} (1 − β_j) of Ho et al. 2020."""
        if isinstance(betas, Tensor):
            betas = betas.detach().cpu().double().tolist()
        table: list[float] = []
        product = 1.0
        for beta in betas:
            if not 0.0 < beta <= 1.0:
                raise ValueError(f"beta {len(table)} is {beta!r}; expected 0 < beta <= 1")
            product *= 1.0 - float(beta)
            table.append(product)
        return cls(table, clean)

    @classmethod
    def linear(
        cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, clean: bool = True
    ) -> Discrete:
        """DDPM's table: betas linear from beta_start to beta_end (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), clean)

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"Discrete({len(self.alphas_cumprod)} entries, {first:.6g} … {last:.6g}, clean={self.clean})"

    @property
    def _intervals(self) -> int:
        return len(self._nodes[0]) - 1

    @property
    def window(self) -> tuple[float, float]:
        return (0.0, 1.0 - 1.0 / self._intervals) if self.clean else (0.0, 1.0)

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        n = self._intervals
        place = (1.0 - t) * n
        data, noise = self._table(t)
        # At an entry the interval towards the data counts: its slope is that of a step that starts there.
        upper = _snap(place)
        i: Any = (upper.ceil() - 1.0).clamp(0, n - 1).long() if m is torch else min(max(math.ceil(upper) - 1, 0), n - 1)
        w = place - i
        a, b = (1.0 - w) * data[i] + w * data[i + 1], (1.0 - w) * noise[i] + w * noise[i + 1]
        rate_a, rate_b = n * (data[i] - data[i + 1]), n * (noise[i] - noise[i + 1])
        norm = m.sqrt(a * a + b * b)
        twist = (rate_a * b - a * rate_b) / (norm * norm * norm)
        return a / norm, b / norm, b * twist, -a * twist

    def _time(self, log_snr: Any, m: Any) -> Any:
        return self._time_of_noise(1.0 / (1.0 + m.exp(log_snr)), m)

    def time_of_share(self, share: T) -> T:
        """The table is linear in the share."""
        if isinstance(share, Tensor):
            times: Tensor = self._time_of_noise(1.0 - share.to(torch.float64), torch).clamp(0.0, 1.0)
            return times
        return min(max(float(self._time_of_noise(1.0 - float(share), math)), 0.0), 1.0)

    def _time_of_noise(self, share: Any, m: Any) -> Any:
        """The time at which σ/(α+σ), which increases with the index, is the given share."""
        noise = self._table(share)[1]
        last = self._intervals - 1
        i: Any
        if m is torch:
            i = (torch.searchsorted(noise, share.contiguous(), right=True) - 1).clamp(0, last)
        else:
            i = min(max(bisect_right(noise, share) - 1, 0), last)
        return 1.0 - (i + (share - noise[i]) / (noise[i + 1] - noise[i])) / self._intervals

    def _table(self, like: Any) -> tuple[Any, Any]:
        """α/(α+σ) and σ/(α+σ) at the nodes, as lists for a float and as tensors beside a tensor."""
        if not isinstance(like, Tensor):
            return self._nodes
        place = like.device
        if place.type == "cpu":
            return self._tensors
        found: tuple[Tensor, Tensor] = self.remembered(place, lambda: tuple(v.to(place) for v in self._tensors))
        return found

    def _to_native(self, t: Any) -> Any:
        """The index k: fractional between entries, exact at them, 0 beyond the last."""
        k = _snap((1.0 - t) * self._intervals) - (1.0 if self.clean else 0.0)
        return k.clamp_min(0.0) if isinstance(k, Tensor) else max(k, 0.0)

    def _from_native(self, native: Any) -> Any:
        return 1.0 - (native + (1.0 if self.clean else 0.0)) / self._intervals


def _snap(place: Any) -> Any:
    """A place in the table, made a whole number where only rounding keeps it from being one."""
    if isinstance(place, Tensor):
        return torch.where((place - place.round()).abs() < 1e-9, place.round(), place)
    return float(round(place)) if abs(place - round(place)) < 1e-9 else place
