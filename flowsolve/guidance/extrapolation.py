"""Guidance by extrapolation from a weaker estimate to a better one: classifier-free, and by another flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import MARK, per_sample, send, state_dtype, take
from flowsolve.flow import Flow
from flowsolve.guidance.base import STRAIGHT, Guided, Interval, Schedule, host, straight
from flowsolve.guidance.conditioning import RESERVED, join, own, replaced, select
from flowsolve.guidance.rules import Rule, ZeroStar, rescaled
from flowsolve.predictions import PREDICTIONS, Prediction

__all__ = ["Autoguidance", "ClassifierFree"]

UNCONDITIONAL = RESERVED[0]
NEAR = 1e-7  # of α/(α+σ): ends of two paths that are no further apart are the same, for a state in float32


class _Extrapolation(Guided):
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
        if not isinstance(flow, Flow):
            raise TypeError(f"flow is a {type(flow).__name__}; expected a flowsolve.Flow")
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
        self.linear = rule is None and not rescale
        self._timed = not schedule.constant or self._zero_until > -math.inf or extra[0] == 0
        least, most = flow.nfe_range
        if not schedule.constant:
            most += extra[1]
        elif schedule.scale != schedule.off:
            least, most = least + extra[0], most + extra[1]
        if self._zero_until > flow.path.log_snr(0.0):
            least = 0
        super().__init__(flow, prediction if self.linear else STRAIGHT, (least, most))

    def _weights(self, t: Any) -> Any:
        """w at a flow time on the host: a float, or float64 of t's shape; 1 where only the flow itself is asked."""
        return self.schedule.weight(self.path, t)

    def _still(self, t: Any) -> Any:
        """Whether nothing moves at a flow time on the host: a bool, or bools of t's shape."""
        if self._zero_until == -math.inf:
            return False
        still = self.path.log_snr(t) < self._zero_until
        return still.numpy() if isinstance(still, Tensor) else still

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
        marks = own(cond, len(x)) if marks is None else marks
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
        if self.linear and self.prediction is self.base.prediction:
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

    def _settings(self) -> str:
        rule = "" if self.rule is None else f", rule={self.rule!r}"
        rescale = f", rescale={self.rescale:g}, rescale_in={self.rescale_in!r}" if self.rescale else ""
        return f"{self.schedule}{rule}{rescale}"


def _placed(whole: Tensor, index: Any, part: Tensor) -> Tensor:
    """`whole` with `part` for the samples in `index`; the part itself where it is all of them."""
    return part if index is None else whole.index_copy(0, send(torch.from_numpy(index), whole), part)


class ClassifierFree(_Extrapolation):
    r"""Classifier-free guidance (Ho & Salimans 2022): u + w (c − u), c with the conditioning, u without.

    Args:
        flow: the flow of a network that is trained with its conditioning dropped at times.
        scale: w, a number or a function of the log-SNR λ. 1 is the conditional flow, 0 the unconditional one. (The
            authors' own scale is w − 1; diffusers' `guidance_scale` is w.)
        unconditional: the network's keyword arguments that say that nothing is given, in place of those of `cond`:
            numbers, or tensors of shape (1, *S) or (*S), shared by all samples. Rows of their own, such as a negative
            prompt for each sample, go into the solve: cond={…, "unconditional": {…}}.
        interval: log-SNRs (low, high) within which the flow is guided, or an `Interval`, such as
            Interval.sigma(0.3, 3.0); outside only the conditional network runs (Kynkäänniemi et al. 2024).
        rule: None for the formula above, `APG(…)`, `ZeroStar(…)`, or a function with their arguments.
        rescale: share φ of the way back to the conditional estimate's spread (Lin et al. 2024); 0 for none.
        rescale_in: where: a prediction's name, or "output" for the network's own.
        batched: both estimates by one call of the network with the guided samples twice (tensors with a row a sample
            are joined, others passed once), or False for two calls, one after the other. NFE counts 2 either way.

    Raises:
        ValueError, TypeError: settings as above; in a solve, conditionings that one call cannot take for both.

    Examples:
        >>> labelled = lambda x, t, y: (torch.tensor([0.0, 1.0, -1.0])[y][:, None] - x) / (1.0 - 0.5 * t[:, None])
        >>> flow = fs.guidance.ClassifierFree(
        ...     fs.Flow(labelled, fs.paths.CondOT()), scale=3.0, unconditional={"y": 0}, interval=(-2.0, 2.0)
        ... )
        >>> sol = fs.sample(flow, (2, 1), solver=fs.solvers.Heun(), nfe=20, cond={"y": torch.tensor([1, 2])})
        >>> sol.nfe  # 2 for an estimate within the interval, 1 outside, and one more would cost 21
        tensor([19, 19])
    """

    def __init__(
        self,
        flow: Flow,
        scale: float | Callable[[float], float],
        *,
        unconditional: Mapping[str, Any] | None = None,
        interval: tuple[float, float] | Interval | None = None,
        rule: Rule | None = None,
        rescale: float = 0.0,
        rescale_in: str = "data",
        batched: bool = True,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow is a {type(flow).__name__}; expected a flowsolve.Flow")
        if unconditional is not None and not isinstance(unconditional, Mapping):
            raise TypeError(
                f"unconditional is a {type(unconditional).__name__}; expected a mapping of the network's keyword "
                'arguments, such as {"y": 1000}'
            )
        self.unconditional, self.batched = dict(unconditional or {}), batched
        schedule = Schedule.of(scale, interval, off=1.0)
        super().__init__(flow, schedule, flow.prediction, flow.nfe_range, rule, rescale, rescale_in)

    def _extra(self, t: Any) -> Any:
        return self.base.cost(t)

    def _strong(self, x: Tensor, t: Any, clock: Any, cond: dict[str, Any], marks: Any) -> Tensor:
        cond, marks = ({k: v for k, v in tree.items() if k != UNCONDITIONAL} for tree in (cond, marks))
        return super()._strong(x, t, clock, cond, marks)

    def _weak(
        self, x: Tensor, t: Any, index: Any, clock: Any, cond: dict[str, Any], marks: Any
    ) -> tuple[Tensor, Tensor]:
        cond, marks = dict(cond), dict(marks)
        given, its = cond.pop(UNCONDITIONAL, {}), marks.pop(UNCONDITIONAL, {})
        if not given and not self.unconditional:
            raise ValueError(
                "classifier-free guidance needs the arguments that say that nothing is given: "
                'ClassifierFree(flow, scale, unconditional={"y": …}), or cond={…, "unconditional": {…}} in the solve'
            )
        count = len(x)
        shared = {name: value for name, value in self.unconditional.items() if name not in given}
        null, flags = replaced(cond, marks, shared, None, count)
        null, flags = replaced(null, flags, given, its, count)
        null = select(null, flags, index)
        here, when = (x, t) if index is None else (take(x, index), take(t, index) if _many(t) else t)
        if not self.batched:
            strong = self.base.call(x, t, clock=clock, **cond, **{MARK: marks})
            return strong, self.base.call(here, when, clock=clock, **null, **{MARK: flags})
        both, own_rows = join(cond, marks, count, null, flags, len(here))
        times = torch.cat((t, when)) if _many(t) else t
        output = self.base.call(torch.cat((x, here)), times, clock=clock, **both, **{MARK: own_rows})
        return output[:count], output[count:]

    def __repr__(self) -> str:
        calls = "" if self.batched else ", batched=False"
        return f"ClassifierFree({self.base!r}, {self._settings()}{calls})"


class Autoguidance(_Extrapolation):
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
        for name, given in (("flow", flow), ("weak", weak)):
            if not isinstance(given, Flow):
                raise TypeError(f"{name} is a {type(given).__name__}; expected a flowsolve.Flow")
        self.weak = weak
        self.same = weak.path == flow.path
        low, high = (_share(weak.path, t) for t in weak.path.window)
        first, last = (_share(flow.path, t) for t in flow.path.window)
        self._range = (low - NEAR, high + NEAR)
        self._whole = self.same or (self._range[0] <= first and last <= self._range[1])
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
            return weights if bool(known.all()) else np.where(known.numpy(), weights, 1.0)
        return weights if known else 1.0

    def _time(self, t: Any) -> Any:
        """The weaker flow's time of a flow time."""
        if self.same:
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
            x, t, cond = take(x, index), take(t, index) if _many(t) else t, select(cond, marks, index)
        if not isinstance(self.weak, Guided):
            cond = {name: value for name, value in cond.items() if name not in RESERVED}
        when = self._time(t)
        there = self.weak.path.at(when)
        if not self.same:
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


def _many(t: Any) -> bool:
    """Whether there is a time for each sample."""
    return isinstance(t, Tensor) and t.ndim > 0
