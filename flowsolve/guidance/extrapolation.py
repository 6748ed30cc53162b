"""Extrapolation from a weaker estimate to a better one: what classifier-free guidance and auto-guidance share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import MARK, per_sample, send, state_dtype, take
from flowsolve._surroundings import array
from flowsolve.conditioning import plain
from flowsolve.flow import Flow
from flowsolve.guidance.base import STRAIGHT, Guided, Schedule, host, straight
from flowsolve.guidance.conditioning import own, select
from flowsolve.guidance.rules import Rule, ZeroStar, rescaled
from flowsolve.predictions import PREDICTIONS, Prediction

__all__ = ["Extrapolation", "many"]


class Extrapolation(Guided):
    """u + w (c − u), or a rule in its place: c by the flow itself, u as a subclass says, in `_weak`."""

    def __init__(
        self,
        flow: Flow,
        schedule: Schedule,
        prediction: Prediction,
        extra: tuple[int, int],
        rule: Rule | None,
        rescale: float,
        rescale_in: str,
    ) -> None:
        if rule is not None and not callable(rule):
            raise TypeError(
                f"rule is {rule!r}; expected a rule such as APG() or ZeroStar(), or None for the linear one"
            )
        if not 0.0 <= rescale <= 1.0:
            raise ValueError(f"rescale = {rescale!r}; expected a share between 0 (off) and 1")
        spaces = {**PREDICTIONS, "output": flow.prediction}
        if rescale_in not in spaces:
            raise ValueError(f"rescale_in = {rescale_in!r}; expected one of {', '.join(spaces)}")
        self.schedule, self.rule, self.rescale, self.rescale_in = schedule, rule, float(rescale), rescale_in
        self._space = spaces[rescale_in]
        self._zero_until = rule.zero_until if isinstance(rule, ZeroStar) else -math.inf
        self._linear = rule is None and not rescale
        self._timed = not schedule.constant or self._zero_until > -math.inf or extra[0] == 0
        least, most = flow.nfe_range
        if not schedule.constant:
            most += extra[1]
        elif schedule.scale != schedule.off:
            least, most = least + extra[0], most + extra[1]
        if self._zero_until > flow.path.log_snr(0.0):
            least = 0
        super().__init__(flow, prediction if self._linear else STRAIGHT, (least, most))

    def _weights(self, t: Any) -> Any:
        """w at a flow time on the host: a float, or float64 of t's shape; 1 where only the flow itself is asked."""
        return self.schedule.weight(self.path, t)

    def _still(self, t: Any) -> Any:
        """Whether nothing moves at a flow time on the host: a bool, or bools of t's shape."""
        if self._zero_until == -math.inf:
            return False
        still = self.path.log_snr(t) < self._zero_until
        return array(still) if isinstance(still, Tensor) else still

    def _extra(self, t: Any) -> Any:
        """Evaluations that the weaker estimate costs at a flow time on the host."""
        raise NotImplementedError

    def _weak(
        self, x: Tensor, t: Any, index: Any, clock: Any, cond: dict[str, Any], marks: Any
    ) -> tuple[Tensor, Tensor]:
        """The output of the flow itself for all samples, and the weaker one for those in `index` (None for all)."""
        raise NotImplementedError

    def cost(self, t: Any) -> Any:
        """Network evaluations that an estimate at flow time t costs: an int, or int64 of t's shape for a tensor."""
        t = host(t)
        weights, base = self._weights(t), self.base.cost(t)
        total = base + (np.asarray(weights) != 1.0) * self._extra(t)
        total = np.where(self._still(t), 0, total)
        return total.astype(np.int64) if isinstance(t, Tensor) else int(total)

    def call(self, x: Tensor, t: float | Tensor, *, clock: Callable[[Any], Any] | None = None, **cond: Any) -> Tensor:
        """The output at (x, t) in the row of `prediction`, in x's dtype (float32 at least)."""
        marks = cond.pop(MARK, None)
        if marks is None:
            marks, cond = own(cond, len(x)), plain(cond)
        when: Any = t  # a time on a device is read only where something depends on it
        if self._timed:
            when = host(t)
            still = self._still(when)
            if np.any(still):
                return self._unmoved(x, t, still, clock, cond, marks)
        weights = self._weights(when)
        index: Any = None
        if isinstance(weights, np.ndarray):
            guided = weights != 1.0
            if not guided.all():
                index = np.flatnonzero(guided)
                weights = weights[index]
            weights = torch.from_numpy(weights)
        elif weights == 1.0:
            index = np.zeros(0, dtype=np.int64)
        if index is not None and not len(index):
            return self._alone(x, t, clock, cond, marks)
        strong, weak = self._weak(x, t, index, clock, cond, marks)
        return self._combined(x, t, index, weights, strong, weak)

    def _alone(self, x: Tensor, t: Any, clock: Any, cond: dict[str, Any], marks: Any) -> Tensor:
        """The output of the flow itself, in the row of this one."""
        output = self._strong(x, t, clock, cond, marks)
        if self.prediction is self.base.prediction:
            return output
        return straight(self.base, x, output, self.path.at(t))

    def _strong(self, x: Tensor, t: Any, clock: Any, cond: dict[str, Any], marks: Any) -> Tensor:
        return self.base.call(x, t, clock=clock, **cond, **{MARK: marks})

    def _unmoved(self, x: Tensor, t: Any, still: Any, clock: Any, cond: dict[str, Any], marks: Any) -> Tensor:
        """The straight output, 0 where nothing moves."""
        moving = np.flatnonzero(~still) if isinstance(still, np.ndarray) else np.zeros(0, dtype=np.int64)
        nothing = torch.zeros_like(x, dtype=state_dtype(x))
        if not len(moving):
            return nothing
        part = self.call(take(x, moving), take(t, moving), clock=clock, **select(cond, marks, moving), **{MARK: marks})
        return nothing.index_copy(0, send(torch.from_numpy(moving), x), part)

    def _combined(self, x: Tensor, t: Any, index: Any, weights: Any, strong: Tensor, weak: Tensor) -> Tensor:
        """The guided output from those of the flow and of the weaker estimate, which are in its row or straight."""
        if self._linear and self.prediction is self.base.prediction:
            part = strong if index is None else take(strong, index)
            return _placed(strong, index, torch.lerp(weak, part, per_sample(weights, part)))
        point = self.path.at(t)
        strong = straight(self.base, x, strong, point)
        if index is None:
            part, here, at = strong, x, point
        else:
            part, here, at = take(strong, index), take(x, index), self.path.at(take(t, index))
        weak = self._straight(weak, here, at)
        here = here.to(part.dtype)
        if self.rule is None:
            made = torch.lerp(weak, part, per_sample(weights, part))
        else:
            made = self.rule(part, weak, here, at, weights)
        if self.rescale:
            made = rescaled(made, part, here, at, self._space.row(at), self.rescale)
        return _placed(strong, index, made)

    def _straight(self, weak: Tensor, x: Tensor, point: Any) -> Tensor:
        """The weaker output as a straight one."""
        return straight(self.base, x, weak, point)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        return {
            **self.schedule.settings, "rule": self.rule, "rescale": self.rescale, "rescale_in": self.rescale_in
        }  # fmt: skip

    def _settings(self) -> str:
        rule = "" if self.rule is None else f", rule={self.rule!r}"
        rescale = f", rescale={self.rescale:g}, rescale_in={self.rescale_in!r}" if self.rescale else ""
        return f"{self.schedule}{rule}{rescale}"


def _placed(whole: Tensor, index: Any, part: Tensor) -> Tensor:
    """`whole` with `part` for the samples in `index`; the part itself where it is all of them."""
    return part if index is None else whole.index_copy(0, send(torch.from_numpy(index), whole), part)


def many(t: Any) -> bool:
    """Whether there is a time for each sample."""
    return isinstance(t, Tensor) and t.ndim > 0
