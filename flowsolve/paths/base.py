"""What every path answers: its curve, its log-SNR and the inverse of that, and its native time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar, cast
from weakref import finalize

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flowsolve._batch import linear, saturating_log

__all__ = ["Path", "Point", "T"]

T = TypeVar("T", float, Tensor)
REMEMBERED = 1 << 14  # values kept of a path

_memory: dict[int, dict[Hashable, Any]] = {}  # by the address of the path, whose copies shall not carry it along


class Point(NamedTuple):
    """Where a path is at one time: α, σ and their derivatives in flow time, as floats or as tensors of shape (B,)."""

    alpha: Any
    sigma: Any
    alpha_dot: Any
    sigma_dot: Any

    @property
    def log_snr(self) -> Any:
        """λ = log(α/σ), saturating at ±708.4."""
        return saturating_log(self.alpha) - saturating_log(self.sigma)

    @property
    def log_snr_dot(self) -> Any:
        """λ' = α̇/α − σ̇/σ; infinite (or a ZeroDivisionError for floats) where α or σ vanishes."""
        return self.alpha_dot / self.alpha - self.sigma_dot / self.sigma


class Path:
    """A Gaussian path x_t = α(t) z + σ(t) ε. A subclass gives its curve and the inverse of its log-SNR.

    Examples:
        >>> path = fs.paths.CondOT()
        >>> path.alpha(0.25), path.sigma(0.25), round(path.time(0.0), 12)
        (0.25, 0.75, 0.5)

    All methods take flow time t in [0, 1] as a float (and return a float) or as a tensor of any shape (and return a
    float64 tensor of that shape on the same device).
    """

    def _curve(self, t: Any, m: Any) -> tuple[Any, Any, Any, Any]:
        """(α, σ, α̇, σ̇) at t, with m the namespace (math or torch) whose functions suit t."""
        raise NotImplementedError

    def _time(self, log_snr: Any, m: Any) -> Any:
        """The inverse of λ strictly inside the path's range."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the state that sampling starts from at t = 0."""
        return 1.0

    @property
    def window(self) -> tuple[float, float]:
        """The flow times at which the network may be asked; beyond it a step uses the estimate at the window's edge."""
        return (0.0, 1.0)

    def at(self, t: float | Tensor) -> Point:
        """(α, σ, α̇, σ̇) at flow time t.

        Raises:
            ValueError: t lies outside [0, 1] (tensors are checked where that needs no wait for a device).
        """
        if isinstance(t, Tensor):
            t = t.to(torch.float64)
            if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
                worst = t[~((t >= 0) & (t <= 1))].flatten()[0].item()
                raise ValueError(_outside(worst))
            return Point(*self._curve(t, torch))
        t = float(t)
        if not 0.0 <= t <= 1.0:
            raise ValueError(_outside(t))
        point: Point = self.remembered(t, lambda: Point(*self._curve(t, math)))
        return point

    def remembered(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), or what it gave for an equal key before: for what follows from the path and the key alone.

        The coefficients of a grid are the same in every solve, and cost more than the arithmetic on a small state.
        Nothing is remembered of a path that may change (one that is no frozen dataclass), nor under a key that holds
        what may (a chart of a caller's own).
        """
        if is_compiling():
            return make()
        known = _memory.get(id(self))
        if known is None:
            settings: Any = getattr(type(self), "__dataclass_params__", None)
            if settings is None or not settings.frozen:
                return make()
            mine = id(self)
            known = _memory[mine] = {}
            finalize(self, _memory.pop, mine, None)
        try:
            found = known.get(key)
        except TypeError:  # a part of it has no hash, because it may change
            return make()
        if found is None:
            if not _constant(key):
                return make()
            if len(known) >= REMEMBERED:
                for old in [k for k in known if not isinstance(k, torch.device)]:  # a recorded solve may read those
                    del known[old]
            found = known[key] = make()
        return found

    def alpha(self, t: T) -> T:
        """α(t), the weight of the data."""
        return self.at(t).alpha  # type: ignore[no-any-return]

    def sigma(self, t: T) -> T:
        """σ(t), the weight of the noise."""
        return self.at(t).sigma  # type: ignore[no-any-return]

    def alpha_dot(self, t: T) -> T:
        """dα/dt."""
        return self.at(t).alpha_dot  # type: ignore[no-any-return]

    def sigma_dot(self, t: T) -> T:
        """dσ/dt."""
        return self.at(t).sigma_dot  # type: ignore[no-any-return]

    def log_snr(self, t: T) -> T:
        """λ(t) = log(α/σ), strictly increasing; saturates at ±708.4 where α or σ vanishes."""
        return self.at(t).log_snr  # type: ignore[no-any-return]

    def time(self, log_snr: T) -> T:
        """The flow time at which the path has the given log-SNR; values beyond the path's ends give 0 and 1 exactly."""
        lo, hi = self.log_snr(0.0), self.log_snr(1.0)
        if isinstance(log_snr, Tensor):
            lam = log_snr.to(torch.float64)
            t = self._time(lam.clamp(lo, hi), torch).clamp(0.0, 1.0)
            return torch.where(lam <= lo, 0.0, torch.where(lam >= hi, 1.0, t))
        lam = float(log_snr)
        if lam <= lo or lam >= hi:
            return 0.0 if lam <= lo else 1.0
        return min(max(float(self._time(lam, math)), 0.0), 1.0)

    def time_of_share(self, share: T) -> T:
        """The flow time at which α/(α+σ) is the given share, in [0, 1]: the clock of the straight chart."""
        return self.time(saturating_log(share) - saturating_log(1.0 - share))  # type: ignore[no-any-return]

    def native_time(self, t: T) -> T:
        """The clock the network was trained with, at flow time t."""
        return cast(T, self._to_native(_wide(t)))

    def time_from_native(self, native: T) -> T:
        """The flow time of a native time; the inverse of `native_time`."""
        return cast(T, self._from_native(_wide(native)))

    def _to_native(self, t: Any) -> Any:
        raise NotImplementedError

    def _from_native(self, native: Any) -> Any:
        raise NotImplementedError

    def interpolate(self, data: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x_t = α(t) z + σ(t) ε for data and noise of shape (B, *S) and t a float or of shape (B,)."""
        point = self.at(t)
        return linear(point.alpha, data, point.sigma, noise)


def _constant(key: Any) -> bool:
    """Whether a key can be relied on to mean the same tomorrow: numbers, names, frozen values, and what is ours."""
    if isinstance(key, tuple):
        return all(map(_constant, key))
    if isinstance(key, bool | int | float | str | torch.device | None):
        return True
    settings = getattr(type(key), "__dataclass_params__", None)
    return (settings is not None and settings.frozen) or type(key).__module__.startswith("flowsolve.")


def _wide(t: Any) -> Any:
    return t.to(torch.float64) if isinstance(t, Tensor) else float(t)


def _outside(t: float) -> str:
    return (
        f"t = {t!r} is outside the path: flow time runs from noise at t = 0 to data at t = 1. "
        "If this is a network's own time, convert it with path.time_from_native(...)."
    )
