r"""What all guided flows share: the flow that is guided, where, and how much.

A guided flow whose rule is not linear gives its output in the straight row $o = \hat z - \hat\varepsilon$, which exists
at every point of every path: its determinant with x is −(α + σ), and

$$ \hat z = \frac{x + \sigma o}{\alpha+\sigma}, \qquad \hat\varepsilon = \frac{x - \alpha o}{\alpha+\sigma}. $$

A quantity $q = c\,\hat z + d\,\hat\varepsilon$ changed by Δq, with $x = \alpha\hat z + \sigma\hat\varepsilon$ kept, is

$$ \Delta\hat z = \frac{\sigma\,\Delta q}{c\sigma - d\alpha}, \qquad
   \Delta o = \Delta\hat z - \Delta\hat\varepsilon = \frac{\alpha+\sigma}{c\sigma - d\alpha}\,\Delta q . $$

Where the denominator vanishes q is a multiple of x and has nothing to say: there the estimate stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import MARK, per_sample, take
from flowsolve._surroundings import array
from flowsolve.checks import CheckReport
from flowsolve.flow import Flow
from flowsolve.guidance.conditioning import own
from flowsolve.paths import Path, Point
from flowsolve.predictions import Prediction, Row

__all__ = ["STRAIGHT", "Guided", "Interval", "Schedule", "host", "moved", "require_flow", "straight"]


def _straight(point: Point) -> Row:
    return Row(1.0, -1.0)


STRAIGHT = Prediction("straight", _straight)
"""ẑ − ε̂: the velocity in the straight chart."""

PROBED = tuple(0.5 * i for i in range(-24, 25))
"""Log-SNRs at which two functions of them are compared."""

CAVEAT = (
    "the flow is guided: this is the density of what the guided ODE makes of the prior, not p(x | y), because a guided "
    "field is not the velocity of a family of noised data"
)


@dataclass(frozen=True)
class Interval:
    """The noise levels low <= λ < high at which guidance acts, λ = log(α/σ).

    Attributes:
        low: towards the noise; −inf for its end.
        high: towards the data; inf for its end.

    Raises:
        ValueError: low >= high, or not numbers.

    Examples:
        >>> fs.guidance.Interval.sigma(0.5, 2.0) == fs.guidance.Interval(-0.6931471805599453, 0.6931471805599453)
        True
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"interval = ({self.low!r}, {self.high!r}); expected log-SNRs low < high, noise first (for noise "
                "levels σ/α use Interval.sigma(low, high))"
            )

    @classmethod
    def sigma(cls, low: float = 0.0, high: float = math.inf) -> Interval:
        """The noise levels low < σ/α <= high, as Kynkäänniemi et al. (2024) give them."""
        if not 0.0 <= low < high:
            raise ValueError(f"Interval.sigma({low!r}, {high!r}); expected noise levels σ/α with 0 <= low < high")
        return cls(-math.log(high) if high < math.inf else -math.inf, -math.log(low) if low > 0.0 else math.inf)

    @property
    def everywhere(self) -> bool:
        """Whether all noise levels are in it."""
        return self.low == -math.inf and self.high == math.inf

    def __contains__(self, log_snr: float) -> bool:
        return self.low <= log_snr < self.high


@dataclass(frozen=True)
class Schedule:
    """How much guidance there is at each noise level.

    Attributes:
        scale: a number, or a function of the log-SNR (a float) to one.
        interval: where it holds; elsewhere the scale is `off`.
        off: the scale that leaves a flow as it is.
    """

    scale: float | Callable[[float], float]
    interval: Interval
    off: float

    @staticmethod
    def of(scale: Any, interval: Any, off: float) -> Schedule:
        """A schedule from what a user gives; an interval may be a pair of log-SNRs.

        Raises:
            TypeError, ValueError: a scale that is no finite number and no function, or no interval.
        """
        if not callable(scale):
            if isinstance(scale, bool) or not isinstance(scale, Real):
                raise TypeError(f"scale is a {type(scale).__name__}; expected a number, or a function of the log-SNR")
            if not math.isfinite(scale):
                raise ValueError(f"scale = {scale!r}; expected a finite number")
            scale = float(scale)
        if interval is None:
            interval = Interval()
        elif not isinstance(interval, Interval):
            try:
                low, high = interval
            except (TypeError, ValueError):
                raise TypeError(
                    f"interval = {interval!r}; expected log-SNRs (low, high), or an Interval such as "
                    "Interval.sigma(0.3, 3.0)"
                ) from None
            interval = Interval(float(low), float(high))
        return Schedule(scale, interval, off)

    @property
    def constant(self) -> bool:
        """Whether the scale is the same at all times."""
        return not callable(self.scale) and (self.interval.everywhere or self.scale == self.off)

    @property
    def settings(self) -> dict[str, Any]:
        """What there is of it to know; of a function, its values at some noise levels within the interval."""
        made: dict[str, Any] = {"scale": self.scale, "interval": [self.interval.low, self.interval.high]}
        if callable(self.scale):
            made["values"] = [float(self.scale(v)) for v in PROBED if v in self.interval]
        return made

    def weight(self, path: Path, t: Any) -> Any:
        """The scale at flow time t: a float, or a float64 array of the shape of t where it depends on time."""
        if self.constant:
            return self.scale
        lam = path.log_snr(t)
        if not isinstance(lam, Tensor):
            return self._at(lam)
        if callable(self.scale):
            return np.array([self._at(v) for v in array(lam).ravel().tolist()]).reshape(lam.shape)
        inside = (lam >= self.interval.low) & (lam < self.interval.high)
        return np.where(array(inside), self.scale, self.off)

    def _at(self, lam: float) -> float:
        if lam not in self.interval:
            return self.off
        return float(self.scale(lam)) if callable(self.scale) else self.scale

    def __str__(self) -> str:
        scale = getattr(self.scale, "__name__", repr(self.scale)) if callable(self.scale) else f"{self.scale:g}"
        where = "" if self.interval.everywhere else f", interval=({self.interval.low:.6g}, {self.interval.high:.6g})"
        return f"scale={scale}{where}"


class Guided(Flow):
    """A flow made of another, `base`, whose network it calls. A subclass says how, in `call`, and what it
    depends on, in `settings`.

    Args:
        flow: the flow that is guided.
        prediction: the row of what `call` returns.
        nfe_range: the evaluations that an estimate costs at least and at most.

    Attributes:
        base: the flow that is guided.
    """

    def __init__(self, flow: Flow, prediction: Prediction, nfe_range: tuple[int, int]) -> None:
        super().__init__(flow.net, flow.path, prediction, time=flow.clock, dtype=flow._dtype, transform=flow.transform)
        self.base = flow
        self.nfe_range = nfe_range

    def call(self, x: Tensor, t: float | Tensor, *, clock: Callable[[Any], Any] | None = None, **cond: Any) -> Tensor:
        """The output at (x, t) in the row of `prediction`, in x's dtype (float32 at least)."""
        raise NotImplementedError

    def cost(self, t: Any) -> Any:
        """Network evaluations that an estimate at flow time t costs: an int, or int64 of t's shape for a tensor."""
        return self.base.cost(t)

    @property
    def nets(self) -> tuple[Any, ...]:
        """Every callable that an estimate may call."""
        return self.base.nets

    def arm(self, armed: bool = True) -> None:
        """A solve begins (or none does): the next call must find that the networks are functions of their arguments."""
        self.base.arm(armed)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        raise NotImplementedError

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a density read from this flow is not."""
        return CAVEAT, *(c for c in self.base.caveats if c != CAVEAT)

    def conditioned(self, cond: Mapping[str, Any], count: int) -> dict[str, Any]:
        """A batch's keyword arguments, with which of their tensors have a row a sample."""
        return dict(cond) if MARK in cond else {**cond, MARK: own(cond, count)}

    def require(self, t: float, what: str = "the grid") -> None:
        """Raise SingularEstimate unless an estimate exists at flow time t."""
        self.base.require(t, what)

    def check(self, data: Tensor, **options: Any) -> CheckReport:
        """Test the conventions of the flow that is guided, by its arguments; guidance means to move the estimate."""
        return self.base.check(data, **options)

    def _point(self, x: Tensor, t: float | Tensor) -> Point:
        return self.base._point(x, t)


def require_flow(flow: Any, name: str = "flow") -> None:
    """Raise TypeError unless it is a flow."""
    if not isinstance(flow, Flow):
        raise TypeError(
            f"{name} is a {type(flow).__name__}; expected a flowsolve.Flow, such as Flow(net, path, prediction)"
        )


def host(t: Any) -> Any:
    """A flow time as a float, or as a float64 tensor on the host."""
    if not isinstance(t, Tensor):
        return float(t)
    return t.detach().to("cpu", torch.float64) if t.ndim else float(t)


def straight(flow: Flow, x: Tensor, output: Tensor, point: Point) -> Tensor:
    """ẑ − ε̂, shape (B, *S), of what a flow returned at x and a point of the path."""
    return output if flow.prediction is STRAIGHT else flow.read(x, output, point).combine(1.0, -1.0)


def moved(output: Tensor, point: Point, row: Row, change: Tensor) -> Tensor:
    """A straight output after row.data·ẑ + row.noise·ε̂ has changed, at a point of the path."""
    denominator = row.data * point.sigma - row.noise * point.alpha
    size = point.alpha + point.sigma
    if isinstance(denominator, Tensor):
        factor = torch.where(denominator == 0.0, 0.0, size / denominator)
        change = per_sample(factor, change) * change
    elif denominator == 0.0:
        return output
    else:
        change = (size / denominator) * change
    return output + change


def at(point: Point, index: Any) -> Point:
    """The point of some samples, by position; of all of them where it is one."""
    return Point(*(take(v, index) if isinstance(v, Tensor) and v.ndim else v for v in point))
