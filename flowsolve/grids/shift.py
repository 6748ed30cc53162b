r"""The resolution shift: a larger image keeps more of itself at the same noise, so its grid spends more steps there.

With the noise fraction $\tau = \sigma/(\alpha+\sigma)$, the $1 - t$ of `CondOT`, Stable Diffusion 3 (Esser et al. 2024,
eq. 23) moves the nodes of a grid to

$$ \tau' = \frac{s\,\tau}{1 + (s - 1)\,\tau} \quad\Longleftrightarrow\quad \lambda' = \lambda - \log s , $$

because $e^{-\lambda} = \tau/(1-\tau)$. The second form is the definition here, so a shift means the same on any path.
Shifts of $s_1$ and then $s_2$ are one of $s_1 s_2$: to shift twice by mistake goes unnoticed, as in diffusers, which
shifts the ends of its default grid before it shifts the grid (diffusers#13243). Here it is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolve.grids.base import Spacing
from flowsolve.grids.explicit import At
from flowsolve.grids.names import resolve
from flowsolve.paths import Path

__all__ = ["Shifted", "dynamic_shift"]


@dataclass(frozen=True)
class Shifted:
    """The nodes of a spacing moved by the resolution shift, λ' = λ − log(shift), exactly once.

    The ends of the interval stay. Where the noise end has a finite log-SNR and shift > 1, the spacing is laid out from
    λ + log(shift) on, which the shift takes to the end itself (and likewise at the data end for shift < 1): nodes never
    leave the interval.

    Args:
        spacing: a spacing or its name.
        shift: s > 0; 1 does nothing, 3 is Stable Diffusion 3's, `dynamic_shift` gives Flux's.

    Raises:
        ValueError: a spacing that is shifted already, or explicit times; a shift that is not positive.

    Examples:
        >>> fs.grids.Shifted("uniform", 3.0).times(fs.paths.CondOT(), 0.0, 1.0, 2)  # τ = ½ goes to ¾
        [0.0, 0.25, 1.0]
    """

    spacing: Spacing | str
    shift: float

    def __post_init__(self) -> None:
        base = self.spacing if isinstance(self.spacing, At) else resolve(self.spacing)
        if isinstance(base, Shifted):
            raise ValueError(
                f"{base!r} is shifted already, and the shift is applied once; two of them are one by their product: "
                f"shift={base.shift * self.shift:g}"
            )
        if isinstance(base, list | At):
            raise ValueError("explicit times say where the steps are; shift them yourself, or give a spacing")
        if not (math.isfinite(self.shift) and self.shift > 0.0):
            raise ValueError(f"shift = {self.shift!r}; expected a finite number > 0 (for a mu, its exponential)")
        object.__setattr__(self, "spacing", base)

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        if end < start:
            return self.times(path, end, start, steps)[::-1]
        assert not isinstance(self.spacing, str)
        move = math.log(self.shift)
        lo = path.time(path.log_snr(start) + move) if move > 0.0 and path.at(start).alpha > 0.0 else start
        hi = path.time(path.log_snr(end) + move) if move < 0.0 and path.at(end).sigma > 0.0 else end
        if not lo < hi:
            raise ValueError(
                f"a shift of {self.shift:g} moves log-SNRs by {-move:.4g}, and the interval [{start:g}, {end:g}] holds "
                f"only {path.log_snr(start):.4g} to {path.log_snr(end):.4g}; take a shift nearer to 1"
            )
        nodes = self.spacing.times(path, lo, hi, steps)[1:-1]
        return [start, *(path.time(path.log_snr(t) - move) for t in nodes), end]


def dynamic_shift(
    tokens: float,
    base: tuple[float, float] = (256, 0.5),
    most: tuple[float, float] = (4096, 1.15),
    kind: str = "exponential",
) -> float:
    """The shift for an image of so many tokens: e^μ with μ linear in their number (Flux), or μ itself ("linear").

    Args:
        tokens: image tokens the network sees (Flux: pixels / 256).
        base: a number of tokens and its μ.
        most: another.
        kind: "exponential" or "linear", diffusers' `time_shift_type`.

    Examples:
        >>> round(fs.grids.dynamic_shift(4096), 4)  # a megapixel: e^1.15
        3.1582
    """
    if not tokens > 0:
        raise ValueError(f"tokens = {tokens!r}; expected a number > 0")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"kind = {kind!r}; expected 'exponential' or 'linear'")
    (low, low_mu), (high, high_mu) = base, most
    if low == high:
        raise ValueError(f"base = {base} and most = {most} have the same number of tokens; expected two")
    mu = low_mu + (high_mu - low_mu) * (tokens - low) / (high - low)
    shift = math.exp(mu) if kind == "exponential" else mu
    if not shift > 0.0:
        raise ValueError(f"{tokens} tokens give a shift of {shift:g} with kind={kind!r}; expected one > 0")
    return shift
