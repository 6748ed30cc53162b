r"""The entries of a discrete table that a few steps visit.

With T entries and N steps, entry $i = 0, \dots, N-1$ in the order of sampling is (Lin et al. 2024, Table 2)

| kind | entry $k_i$ | |
|---|---|---|
| `leading` | $(N-1-i)\,\lfloor T/N\rfloor + \text{offset}$ | does not begin at the noise, entry T − 1 |
| `trailing` | $T(N-i)/N - 1$ | does not end at entry 0 |
| `linspace` | $(T-1)(N-1-i)/(N-1)$ | both |

These are the `timestep_spacing`s of diffusers' schedulers, rounded to integers, half to even, as there. diffusers'
own integers differ where its float arithmetic decides: $k_i$ exactly between two integers may go to the other of them,
`trailing` has one time step too many, −1, for some N (61, 103, 121, … with T = 1000), and `linspace` with N = 1 is the
*last* entry, 0. Here the arithmetic is exact and a single step starts from the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from flowsolve.paths import Discrete, Path

__all__ = ["Timesteps"]

KINDS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Timesteps:
    """Entries of a discrete table: "leading", "trailing" or "linspace".

    N steps ask the network at N entries and end where the interval ends. The first entry must be where it starts:
    always so on the whole path for "trailing" and "linspace"; for "leading", `sample` starts the interval there by
    itself, and wants to be told the state (diffusers takes pure noise for it).

    Args:
        kind: where the entries are.
        steps_offset: added to the entries of "leading".
        whole: round to whole entries. EulerDiscreteScheduler does not with "linspace"; whole=False is that.
    """

    kind: str = "trailing"
    steps_offset: int = 0
    whole: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.steps_offset and self.kind != "leading":
            raise ValueError(f"steps_offset = {self.steps_offset} moves the entries of 'leading', not {self.kind!r}")

    def entries(self, path: Path, steps: int) -> list[float]:
        """The (fractional) entries at which the network is asked, from noise to data.

        Raises:
            ValueError: the path has no table, or not so many entries.
        """
        if not isinstance(path, Discrete):
            raise ValueError(
                f"{self.kind!r} visits the entries of a discrete table and {path!r} has none; use a paths.Discrete, "
                "or another grid such as 'uniform'"
            )
        size = len(path.alphas_cumprod)
        if not 1 <= steps <= size:
            raise ValueError(
                f"{self.kind!r} with {steps} steps on a table of {size} entries; expected 1 to {size} of them, or "
                "another grid such as 'uniform'"
            )
        if self.kind == "leading":
            found = [Fraction(i * (size // steps) + self.steps_offset) for i in reversed(range(steps))]
        elif self.kind == "trailing":
            found = [Fraction(size * i, steps) - 1 for i in range(steps, 0, -1)]
        else:
            found = [Fraction((size - 1) * i, max(steps - 1, 1)) for i in reversed(range(steps))]
            found = found if steps > 1 else [Fraction(size - 1)]
        if not 0 <= found[-1] <= found[0] <= size - 1:
            raise ValueError(
                f"{self.kind!r} with {steps} steps asks for entries {float(found[0]):g} … {float(found[-1]):g}; "
                f"expected 0 … {size - 1} (another steps_offset)"
            )
        return [float(round(k) if self.whole else k) for k in found]

    def span(self, path: Path, steps: int) -> tuple[float, float]:
        """Where the first of so many steps starts, and the end of the path."""
        return path.time_from_native(self.entries(path, steps)[0]), 1.0

    def times(self, path: Path, start: float, end: float, steps: int) -> list[float]:
        """The steps + 1 times from start to end."""
        if end < start:
            return self.times(path, end, start, steps)[::-1]
        entries = self.entries(path, steps)
        asked = [path.time_from_native(k) for k in entries]
        if abs(asked[0] - start) > 1e-9:
            raise ValueError(
                f"{self.kind!r} with {steps} steps starts at entry {entries[0]:g}, t = {asked[0]!r}, and the interval "
                f"at t = {start:g}; give interval=({asked[0]!r}, …) and start= the state there, or use 'trailing'"
            )
        if asked[-1] >= end:
            raise ValueError(
                f"{self.kind!r} with {steps} steps asks for the last at entry {entries[-1]:g}, t = {asked[-1]:g}, and "
                f"the interval ends at t = {end:g}; end it later (the clean data of a table are at t = 1), or take "
                "fewer steps or another grid such as 'uniform'"
            )
        return [start, *asked[1:], end]
