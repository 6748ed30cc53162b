"""Auto-guidance: a flow led away from what a weaker one would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from flowsolve._batch import MARK, per_sample, take
from flowsolve._surroundings import array
from flowsolve.flow import Flow
from flowsolve.guidance.base import STRAIGHT, Guided, Interval, Schedule, require_flow, straight
from flowsolve.guidance.conditioning import RESERVED, select
from flowsolve.guidance.extrapolation import Extrapolation, many
from flowsolve.guidance.rules import Rule

__all__ = ["Autoguidance"]

NEAR = 1e-7  # of α/(α+σ): ends of two paths that are no further apart are the same, for a state in float32


class Autoguidance(Extrapolation):
    r"""Guidance by a weaker version of the model itself (Karras et al. 2024): u + w (c − u), u by a second flow.

    The two flows may differ in prediction and in path. They are asked at the same log-SNR: there the state of one path
    is that of the other times a number, and both estimate the same z and ε. Where the weaker path knows no such noise
    level, the flow is not guided.

    Args:
        flow: the flow.
        weak: a weaker one of the same data: smaller, or less trained. It is given the same conditioning.
        scale: w, a number or a function of the log-SNR λ; 1 is the flow itself.
        interval, rule, rescale, rescale_in: as for `ClassifierFree`.

    Raises:
        ValueError, TypeError: settings as above.
    """

    def __init__(
        self,
        flow: Flow,
        weak: Flow,
        scale: float | Callable[[float], float],
        *,
        interval: tuple[float, float] | Interval | None = None,
        rule: Rule | None = None,
        rescale: float = 0.0,
        rescale_in: str = "data",
    ) -> None:
        require_flow(flow)
        require_flow(weak, "weak")
        self.weak = weak
        self._same = weak.path == flow.path
        low, high = (_share(weak.path, t) for t in weak.path.window)
        first, last = (_share(flow.path, t) for t in flow.path.window)
        self._range = (low - NEAR, high + NEAR)
        self._whole = self._same or (self._range[0] <= first and last <= self._range[1])
        least, most = weak.nfe_range
        schedule = Schedule.of(scale, interval, off=1.0)
        super().__init__(flow, schedule, STRAIGHT, (least if self._whole else 0, most), rule, rescale, rescale_in)

    def _weights(self, t: Any) -> Any:
        weights = self.schedule.weight(self.path, t)
        if self._whole:
            return weights
        share = _share(self.path, t)
        known = (share >= self._range[0]) & (share <= self._range[1])
        if isinstance(known, Tensor):
            return weights if bool(known.all()) else np.where(array(known), weights, 1.0)
        return weights if known else 1.0

    def _time(self, t: Any) -> Any:
        """The weaker flow's time of a flow time."""
        if self._same:
            return t
        when, edge = self.weak.path.time(self.path.log_snr(t)), self.weak.path.window[1]
        return when.clamp_max(edge) if isinstance(when, Tensor) else min(when, edge)

    def _extra(self, t: Any) -> Any:
        return self.weak.cost(self._time(t))

    def _weak(
        self, x: Tensor, t: Any, index: Any, clock: Any, cond: dict[str, Any], marks: Any
    ) -> tuple[Tensor, Tensor]:
        strong = self._strong(x, t, clock, cond, marks)
        if index is not None:
            x, t, cond = take(x, index), take(t, index) if many(t) else t, select(cond, marks, index)
        if not isinstance(self.weak, Guided):
            cond = {name: value for name, value in cond.items() if name not in RESERVED}
        when = self._time(t)
        there = self.weak.path.at(when)
        if not self._same:
            here = self.path.at(t)
            x = per_sample((there.alpha + there.sigma) / (here.alpha + here.sigma), x) * x
        output = self.weak.call(x, when, **cond, **{MARK: marks})
        return strong, straight(self.weak, x, output, there)

    def _straight(self, weak: Tensor, x: Tensor, point: Any) -> Tensor:
        return weak

    @property
    def nets(self) -> tuple[Any, ...]:
        """Every callable that an estimate may call."""
        return (*self.base.nets, *self.weak.nets)

    def arm(self, armed: bool = True) -> None:
        """A solve begins (or none does): the next call must find that the networks are functions of their arguments."""
        self.base.arm(armed)
        self.weak.arm(armed)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        return {**super().settings, "weak": self.weak}

    def require(self, t: float, what: str = "the grid") -> None:
        """Raise SingularEstimate unless both estimates exist at flow time t."""
        super().require(t, what)
        if self._weights(t) != 1.0 and not self._still(t):
            self.weak.require(self._time(t), f"guidance, through {what},")

    def __repr__(self) -> str:
        return f"Autoguidance({self.base!r}, {self.weak!r}, {self._settings()})"


def _share(path: Any, t: Any) -> Any:
    """α/(α+σ), the clock of the straight chart."""
    point = path.at(t)
    return point.alpha / (point.alpha + point.sigma)
