"""Clocks of networks, as values that can be compared, copied and pickled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowsolve.paths import Path

__all__ = ["Linear", "Preconditioned"]


@dataclass(frozen=True)
class Linear:
    """scale · s, or scale · (1 − s), with s the flow time or the native time of a path.

    Attributes:
        scale: the factor.
        path: whose native time it is; None for flow time.
        falling: 1 − s in place of s.
    """

    scale: float
    path: Path | None = None
    falling: bool = False

    def __call__(self, t: Any) -> Any:
        """The network's time at flow time t, a float or a tensor."""
        s = t if self.path is None else self.path.native_time(t)
        return self.scale * (1.0 - s if self.falling else s)


@dataclass(frozen=True)
class Preconditioned:
    """What a network behind EDM's preconditioning is told of σ.

    Attributes:
        asked: how it is asked, a `flowsolve.adapters.networks.Preconditioning`.
        path: whose native time is σ.
    """

    asked: Any
    path: Path

    def __call__(self, t: Any) -> Any:
        """The network's time at flow time t, a float or a tensor."""
        return self.asked.time(self.path.native_time(t))
