"""Explicit nodes in any coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from flowsolve.paths import Discrete, Path

__all__ = ["At"]

SNAP_LOG_SNR, SNAP_TIME = 1e-6, 1e-9
"""How near to an end of the path a node stands for it: the rounding of a σ in float32, and of a time in float64."""


@dataclass(frozen=True, init=False)
class At:
    """Nodes given in a coordinate other than flow time; the interval of the solve is theirs unless one is given.

    Args:
        t: flow times.
        log_snr: λ = log(α/σ), rising from noise to data; ±inf for the ends of a path that has them.
        sigma: σ/α, falling from noise to data, as EDM and k-diffusion list them; a trailing 0 is the clean end of a
            path that has one.
        timesteps: native times of the path (indices of a table, σ of an exploding path, …); −1 is the clean end of a
            table that has one.

    Raises:
        ValueError: none or several coordinates, fewer than two values, or values that are not strictly monotone.

    Examples:
        >>> fs.grids.At(sigma=[80.0, 5.0, 0.5, 0.002]).on(fs.paths.EDM())[::3]
        [0.0, 1.0]
    """

    coordinate: str
    values: tuple[float, ...]

    def __init__(
        self,
        *,
        t: Sequence[float] | Tensor | None = None,
        log_snr: Sequence[float] | Tensor | None = None,
        sigma: Sequence[float] | Tensor | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        given = {"t": t, "log_snr": log_snr, "sigma": sigma, "timesteps": timesteps}
        given = {name: values for name, values in given.items() if values is not None}
        if len(given) != 1:
            raise ValueError(
                f"At() was given {', '.join(given) or 'nothing'}; expected one of t, log_snr, sigma, timesteps"
            )
        ((name, listed),) = given.items()
        assert listed is not None
        values = tuple(float(v) for v in listed)
        if len(values) < 2:
            raise ValueError(f"At({name}=…) has {len(values)} values; expected at least 2, where to start and to end")
        rising = values[-1] > values[0]
        for i, (a, b) in enumerate(pairwise(values)):
            if not (a < b if rising else b < a):
                raise ValueError(
                    f"At({name}=…): values {i} and {i + 1} are {a!r} and {b!r}; expected strictly "
                    f"{'increasing' if rising else 'decreasing'} values"
                )
        object.__setattr__(self, "coordinate", name)
        object.__setattr__(self, "values", values)

    def __repr__(self) -> str:
        return f"At({self.coordinate}={list(self.values)})"

    def on(self, path: Path) -> list[float]:
        """The flow times of the nodes.

        Raises:
            ValueError: a value that the path does not pass through.
        """
        convert: Callable[[Path, float], float | None] = CONVERT[self.coordinate]
        found = []
        for i, value in enumerate(self.values):
            t = convert(path, value)
            if t is None:
                raise ValueError(f"At({self.coordinate}=…): value {i} is {value!r}; {_expected(self.coordinate, path)}")
            found.append(t)
        return found

    def span(self, path: Path) -> tuple[float, float]:
        """The first and the last time."""
        times = self.on(path)
        return times[0], times[-1]


def _of_t(path: Path, t: float) -> float | None:
    return t if 0.0 <= t <= 1.0 else None


def _of_log_snr(path: Path, lam: float) -> float | None:
    for t in (0.0, 1.0):
        point = path.at(t)
        open_end = point.alpha == 0.0 or point.sigma == 0.0
        edge = math.copysign(math.inf, point.log_snr) if open_end else point.log_snr
        if lam == edge or abs(lam - edge) <= SNAP_LOG_SNR:
            return t
    return path.time(lam) if path.log_snr(0.0) < lam < path.log_snr(1.0) else None


def _of_sigma(path: Path, sigma: float) -> float | None:
    if not sigma >= 0.0:
        return None
    return _of_log_snr(path, -math.log(sigma) if sigma > 0.0 else math.inf)


def _of_timestep(path: Path, native: float) -> float | None:
    if not math.isfinite(native):
        return None
    if isinstance(path, Discrete) and path.clean and native == -1.0:
        return 1.0
    t = path.time_from_native(native)
    t = next((end for end in (0.0, 1.0) if abs(t - end) <= SNAP_TIME), t)
    # A path may clamp what lies beyond its ends; only what comes back is a time of its own.
    near = 0.0 <= t <= 1.0 and abs(path.native_time(t) - native) <= 1e-6 * max(1.0, abs(native))
    return t if near else None


CONVERT: dict[str, Callable[[Path, float], float | None]] = {
    "t": _of_t, "log_snr": _of_log_snr, "sigma": _of_sigma, "timesteps": _of_timestep,
}  # fmt: skip


def _expected(coordinate: str, path: Path) -> str:
    if coordinate == "t":
        return "expected flow times in [0, 1], noise at 0 and data at 1"
    if coordinate == "timesteps":
        clean = ", and -1 for the clean end" if isinstance(path, Discrete) and path.clean else ""
        return f"expected native times of {path!r}, from {path.native_time(0.0):g} to {path.native_time(1.0):g}{clean}"
    first, last = path.at(0.0), path.at(1.0)
    if coordinate == "sigma":
        high = math.inf if first.alpha == 0.0 else first.sigma / first.alpha
        low = last.sigma / last.alpha
        mend = ""
        if low > 0.0:
            mend = "; for a last step to clean data end above 0 and give final='denoise'"
        return f"expected σ/α between {high:.6g} and {low:.6g}, those of {path!r}{mend}"
    return f"expected λ between {first.log_snr:.6g} and {last.log_snr:.6g}, those of {path!r}"
