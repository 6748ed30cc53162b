r"""The final step: where a solve on the way to the data stops, and what it makes of the state there.

The networks know nothing of the last stretch: below some noise level an estimate of $\varepsilon$ is lost in rounding,
and a table ends before the clean data does. What a sampler does there is part of the method and of its cost, so it has
a name and its evaluation is counted. With $t_*$ where the steps end and $\hat z = \hat z(x, t_*)$:

| policy | the steps end | the result | evaluations |
|---|---|---|---|
| `path` | at the end of the interval, or of the window | the state there | N |
| `sigma_min` | at $\sigma/\alpha$ = `sigma` | the state, as it is there | N |
| `denoise` | at $\sigma/\alpha$ = `sigma` | $\hat z$ | N − 1, and 1 |
| `tweedie` | at $\sigma/\alpha$ = `sigma` | $\alpha\hat z$ with $\alpha$ of the end of the interval | N − 1, and 1 |

`tweedie` is the mean of the signal in the state that the solve was asked for: Tweedie's formula
$x + \sigma^2\,\nabla\log p_t(x) = \alpha\,\hat z$ (Efron 2011; Jolicoeur-Martineau et al. 2021), scaled to the end of
the interval. Paths end with $\alpha = 1$, to 1e-6 at least, and there the two are the same; after an interval that
stops early `denoise` gives data and `tweedie` the signal of a state.

With `path`, the last step from the edge of a network's window (a table's entry 0) is
$x' = \alpha'\hat z + \sigma'\hat\varepsilon$. With the others, an interval or a window that ends before
$\sigma/\alpha$ = `sigma` ends the steps itself. So do explicit times, wherever they end; but that must be above
$\sigma = 0$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from flowsolve.paths import Path

__all__ = ["POLICIES", "Closing", "Final"]

POLICIES = ("path", "sigma_min", "denoise", "tweedie")


class Closing(NamedTuple):
    """A last evaluation, where the steps end: the result is data·ẑ + noise·ε̂.

    Attributes:
        t: the flow time of the result.
        data: weight of ẑ.
        noise: weight of ε̂.
    """

    t: float
    data: float
    noise: float


@dataclass(frozen=True)
class Final:
    """A policy for the final step: "path", "sigma_min", "denoise" or "tweedie".

    Args:
        policy: its name; a solver's `final=` takes the name alone as well.
        sigma: the noise level σ/α at which the steps end with all but "path".
    """

    policy: str = "path"
    sigma: float = 0.002

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"final = {self.policy!r} is not known; expected one of {', '.join(POLICIES)}")
        if not (math.isfinite(self.sigma) and self.sigma > 0.0):
            raise ValueError(f"sigma = {self.sigma!r}; expected a finite noise level σ/α > 0")

    @staticmethod
    def resolve(final: str | Final) -> Final:
        """A policy by its name, or itself."""
        if isinstance(final, Final):
            return final
        if not isinstance(final, str):
            raise TypeError(f"final is a {type(final).__name__}; expected one of {', '.join(POLICIES)}, or a Final")
        return Final(final)

    @property
    def evaluations(self) -> int:
        """Estimates of the budget that the policy takes after the steps."""
        return int(self.policy in ("denoise", "tweedie"))

    def stop(self, path: Path, interval: tuple[float, float], given: float | None = None) -> float:
        """Where the steps end.

        Args:
            path: the path.
            interval: where the solve starts, and where it was asked to end.
            given: the last of explicit times, if the steps are.

        Raises:
            ValueError: an interval towards the noise, or with nothing in it before that time; explicit times that end
                in clean data.
        """
        start, end = interval
        if self.policy == "path":
            return end
        if end < start:
            raise ValueError(f"final={self.policy!r} is for the way to the data; drop it for the interval {interval}")
        if given is not None:
            if given > path.window[1] or path.at(given).sigma == 0.0:
                raise ValueError(
                    f"the times given end at t = {given:g}, and final={self.policy!r} acts at the last time before the "
                    "clean data: drop the last of them (and end interval= there, if one is given)"
                )
            return end
        stop = min(end, path.window[1], path.time(-math.log(self.sigma)))
        if not start < stop:
            raise ValueError(
                f"the interval {interval} starts after t = {stop:g}, where final={self.policy!r} ends the steps; start "
                "it earlier" + ("" if stop in (end, path.window[1]) else f", or lower sigma={self.sigma:g}")
            )
        return stop

    def closing(self, path: Path, end: float) -> Closing | None:
        """The evaluation after the steps, for a solve that was asked to end at flow time `end`."""
        if self.policy == "denoise":
            return Closing(end, 1.0, 0.0)
        if self.policy == "tweedie":
            return Closing(end, path.alpha(end), 0.0)
        return None
