r"""The noise level η of the SDE family as a solver is given it: a number, or a function of flow time.

η = 0 is the probability-flow ODE, η = 1 the reverse-time SDE (`flowsolve.solvers.discrete`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Eta", "check_eta"]


def check_eta(eta: float, most: float = math.inf) -> None:
    """Raise ValueError unless 0 <= eta <= most."""
    if not 0.0 <= eta <= most or math.isinf(eta):
        bound = f" in [0, {most:g}]" if math.isfinite(most) else " >= 0"
        raise ValueError(f"eta = {eta!r}; expected a finite number{bound}: 0 is the ODE, 1 the reverse-time SDE")


@dataclass(frozen=True)
class Eta:
    """η, checked.

    Args:
        value: a number >= 0, or a function of flow time, read at the start of each step.

    Raises:
        ValueError: a number that is negative or not finite.
    """

    value: float | Callable[[float], float]

    def __post_init__(self) -> None:
        if not callable(self.value):
            check_eta(self.value)

    @property
    def random(self) -> bool:
        """Whether steps draw noise: a function is taken to be positive somewhere."""
        return callable(self.value) or self.value > 0.0

    def at(self, t: float) -> float:
        """η for a step that starts at flow time t."""
        return float(self.value(t)) if callable(self.value) else float(self.value)
