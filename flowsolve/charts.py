r"""Charts: the coordinates in which the flow's ODE has no linear term.

A chart measures the state as $y = x / c(t)$ against a clock $s(t)$. With the estimate $(\hat z, \hat\varepsilon)$
frozen, $x_t = \alpha\hat z + \sigma\hat\varepsilon$, so $dy/ds$ is a combination of $\hat z$ and $\hat\varepsilon$
alone:

| chart | $c$ | $s$ | $dy/ds$ | finite at |
|---|---|---|---|---|
| `straight` | $\alpha+\sigma$ | $\alpha/(\alpha+\sigma)$ | $\hat z-\hat\varepsilon$ | both ends |
| `data` | $\sigma$ | $\alpha/\sigma$ | $\hat z$ | the noise end |
| `noise` | $\alpha$ | $\sigma/\alpha$ | $\hat\varepsilon$ | the data end |
| `trig` | $\sqrt{\alpha^2+\sigma^2}$ | $\arctan(\alpha/\sigma)$ | $\hat z\cos s-\hat\varepsilon\sin s$ | both ends |
| `native` | $1$ | $t$ | $\dot\alpha\hat z+\dot\sigma\hat\varepsilon$ | as the path |

In the first three $dy/ds$ has constant coefficients, so an Euler step is exact for a frozen estimate: it is DDIM,
$x' = \alpha'\hat z + \sigma'\hat\varepsilon$, whatever the path. In the straight chart
$y = (1-s)\,\varepsilon + s\,z$: every Gaussian path is a rectified flow.

Except in the native chart, $s$ is a function of the log-SNR alone, so a clock means the same on every path.
Log-densities follow the chart: $\log p_x(x) = \log p_y(y) - D\log c$ for a state of $D$ numbers.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowsolve._batch import saturating_log
from flowsolve.paths import Path, Point

__all__ = ["CHARTS", "Chart", "resolve"]


class Chart:
    """A ruler y = x / c for the state and a clock s for time. Floats and tensors of shape (B,) are served alike."""

    name: ClassVar[str]

    def scale(self, point: Point) -> Any:
        """c at a point of the path."""
        raise NotImplementedError

    def clock(self, path: Path, t: Any) -> Any:
        """s at flow time t."""
        return self._clock(path.at(t), torch if isinstance(t, Tensor) else math)

    def time(self, path: Path, s: Any) -> Any:
        """Flow time at clock s."""
        return path.time(self._log_snr(s, torch if isinstance(s, Tensor) else math))

    def row(self, point: Point, s: Any) -> tuple[Any, Any]:
        """The weights of ẑ and ε̂ in dy/ds."""
        raise NotImplementedError

    def _clock(self, point: Point, m: Any) -> Any:
        raise NotImplementedError

    def _log_snr(self, s: Any, m: Any) -> Any:
        raise NotImplementedError

    def singular(self, point: Point) -> str:
        """Which of α and σ vanishes at a point and takes the chart to infinity there; empty if neither."""
        return ""

    def require(self, path: Path, t: float) -> None:
        """Raise ValueError unless the chart is finite at flow time t."""
        if zero := self.singular(path.at(t)):
            raise ValueError(
                f"chart {self.name!r} is infinite at t = {t:g} of {path!r}, where {zero} = 0; use chart='straight', "
                "which is finite at both ends, or an interval that stops short of it"
            )

    @property
    def settings(self) -> Any:
        """What a chart is and holds, for the keys of recordings: equal only while it makes the same solve."""
        return type(self), repr(sorted(vars(self).items()))

    def __repr__(self) -> str:
        return f"<chart {self.name}>"


class Straight(Chart):
    """y = x/(α+σ) against s = α/(α+σ), where every path is y = (1−s) ε + s z."""

    name = "straight"

    def scale(self, point: Point) -> Any:
        return point.alpha + point.sigma

    def row(self, point: Point, s: Any) -> tuple[Any, Any]:
        return 1.0, -1.0

    def time(self, path: Path, s: Any) -> Any:
        return path.time_of_share(s)

    def _clock(self, point: Point, m: Any) -> Any:
        return point.alpha / (point.alpha + point.sigma)


class Data(Chart):
    """y = x/σ against s = α/σ; dy/ds = ẑ."""

    name = "data"

    def scale(self, point: Point) -> Any:
        return point.sigma

    def row(self, point: Point, s: Any) -> tuple[Any, Any]:
        return 1.0, 0.0

    def _clock(self, point: Point, m: Any) -> Any:
        return point.alpha / point.sigma

    def _log_snr(self, s: Any, m: Any) -> Any:
        return saturating_log(s)

    def singular(self, point: Point) -> str:
        return "σ" if point.sigma == 0.0 else ""


class Noise(Chart):
    """y = x/α against s = σ/α, which falls from noise to data; dy/ds = ε̂."""

    name = "noise"

    def scale(self, point: Point) -> Any:
        return point.alpha

    def row(self, point: Point, s: Any) -> tuple[Any, Any]:
        return 0.0, 1.0

    def _clock(self, point: Point, m: Any) -> Any:
        return point.sigma / point.alpha

    def _log_snr(self, s: Any, m: Any) -> Any:
        return -saturating_log(s)

    def singular(self, point: Point) -> str:
        return "α" if point.alpha == 0.0 else ""


class Trig(Chart):
    """y = x/√(α²+σ²) against the angle s = atan2(α, σ): the unit circle from noise (0) to data (π/2)."""

    name = "trig"

    def scale(self, point: Point) -> Any:
        return (point.alpha * point.alpha + point.sigma * point.sigma) ** 0.5

    def row(self, point: Point, s: Any) -> tuple[Any, Any]:
        c = self.scale(point)
        return point.sigma / c, -point.alpha / c

    def _clock(self, point: Point, m: Any) -> Any:
        return m.atan2(point.alpha, point.sigma)

    def _log_snr(self, s: Any, m: Any) -> Any:
        return saturating_log(m.sin(s)) - saturating_log(m.sin(0.5 * math.pi - s))


class Native(Chart):
    """The state as it is against flow time; dy/ds is the probability-flow velocity u."""

    name = "native"

    def scale(self, point: Point) -> Any:
        return 1.0

    def clock(self, path: Path, t: Any) -> Any:
        return t

    def time(self, path: Path, s: Any) -> Any:
        return s.clamp(0.0, 1.0) if isinstance(s, Tensor) else min(max(s, 0.0), 1.0)

    def row(self, point: Point, s: Any) -> tuple[Any, Any]:
        return point.alpha_dot, point.sigma_dot


CHARTS: dict[str, Chart] = {c.name: c for c in (Straight(), Data(), Noise(), Trig(), Native())}


def resolve(chart: str | Chart) -> Chart:
    """A chart by its name, or itself."""
    if isinstance(chart, Chart):
        return chart
    try:
        return CHARTS[chart]
    except (KeyError, TypeError):
        raise ValueError(f"chart = {chart!r} is not known; expected one of {', '.join(CHARTS)}") from None
