r"""The clock of flow networks that are told the noise level before its shift.

CogView4, its Control variant and GLM-Image lay out levels σ′ and give a scheduler both `timesteps` = N σ′ and `sigmas`
= σ′. The scheduler shifts the levels, σ = s σ′ / (1 + (s − 1) σ′), and leaves the times. So their network, at a state
of level σ, reads N σ′, and its clock is

$$ k(t) = N\,\frac{\sigma}{s - (s-1)\,\sigma}, \qquad \sigma = 1 - t, $$

where s is the shift of the call ($e^\mu$, or μ for a linear one), and at pure noise k = N whatever s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowsolve.adapters.diffusers.nodes import shift_of
from flowsolve.adapters.diffusers.reading import Reading
from flowsolve.adapters.diffusers.tables import table_size

__all__ = ["Unshifted"]


@dataclass(frozen=True)
class Unshifted:
    """The clock k(t) for a shift."""

    scale: float
    shift: float

    @classmethod
    def of(cls, reading: Reading, timesteps: Any, sigmas: Any, mu: float | None) -> Unshifted:
        """The clock of a call that gives both.

        Raises:
            ValueError: they are not the same, up to the factor N, or the levels are not those of a shifted flow alone.
        """
        times, levels = [float(v) for v in timesteps], [float(v) for v in sigmas]
        n = float(table_size(reading.config))
        alike = len(times) == len(levels) and all(
            abs(k - n * v) <= 1e-3 * n for k, v in zip(times, levels, strict=True)
        )
        options = ("shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if not alike or not reading.straight or any(reading.config.get(k) for k in options):
            raise ValueError(
                "timesteps and sigmas together are for a flow whose network is told the level before the shift, with "
                f"timesteps = {n:g} sigmas (as CogView4); give one of them"
            )
        return cls(n, shift_of(reading.config, mu))

    def told(self, sigmas: Any, spaced: bool) -> list[float]:
        """The levels before the shift; where a grid is asked for even ones, which only say how many."""
        levels = [float(v) for v in sigmas]
        n = len(levels)
        usual = [1.0 - (1.0 - 1.0 / self.scale) * i / max(n - 1, 1) for i in range(n)]
        fewer = [1.0 - (1.0 - 1.0 / self.scale) * i / n for i in range(n)]
        even = any(all(abs(v - w) <= 1.5 / self.scale for v, w in zip(levels, e, strict=True)) for e in (usual, fewer))
        return [1.0 - i / n for i in range(n)] if spaced and even else levels

    def __call__(self, t: Any) -> Any:
        level = 1.0 - t
        return self.scale * level / (self.shift - (self.shift - 1.0) * level)

    def inverse(self, k: Any) -> Any:
        """The flow time at which the clock shows k."""
        level = k / self.scale
        return 1.0 - self.shift * level / (1.0 + (self.shift - 1.0) * level)
