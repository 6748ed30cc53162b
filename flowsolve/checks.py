r"""A numerical self-check of a flow's conventions, from a few data points.

A checkpoint rarely says all of how it was trained: which way time runs, whether it counts to 1 or to 1000, what the
output stands for, how the data was scaled. Each of these can be tested: noise known data $z$ by known $\varepsilon$,
ask the network, read its output under every convention, and see which one finds $z$ and $\varepsilon$ again.

The measure is the error of the straight-chart velocity relative to its size,

$$ e^2 = \frac{\sum\,\|(\hat z-\hat\varepsilon)-(z-\varepsilon)\|^2}{\sum\,\|z-\varepsilon\|^2}
       = \frac{\sum\,(1+\alpha/\sigma)^2\,\|\hat z - z\|^2}{\sum\,\|z-\varepsilon\|^2}, $$

over several log-SNRs. It weighs data and noise alike, 0 is perfect, and a network that knows nothing but a fixed
average scores about 1. Wrong conventions score far above the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowsolve._batch import per_sample, state_dtype
from flowsolve.conditioning import arguments
from flowsolve.predictions import PREDICTIONS, Prediction, Row

if TYPE_CHECKING:
    from flowsolve.flow import Flow

__all__ = ["CheckReport", "check"]

LOG_SNRS = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)

SCALES: dict[str, tuple[float, float]] = {
    "data as given": (1.0, 0.0),
    "data mapped from [0, 1] to [-1, 1]": (2.0, -1.0),
    "data mapped from [-1, 1] to [0, 1]": (0.5, 0.5),
}


@dataclass(frozen=True)
class CheckReport:
    """The outcome of `Flow.check`.

    Attributes:
        ok: whether the declared conventions explain the network about as well as any that was tried.
        error: relative error under the declared conventions (0 perfect, about 1 for a network that knows nothing).
        best: the conventions that fit best, as (prediction, time, data).
        best_error: relative error under those.
        errors: relative error of every convention tried.
        message: the finding in words.
    """

    ok: bool
    error: float
    best: tuple[str, str, str]
    best_error: float
    errors: dict[tuple[str, str, str], float]
    message: str

    def __str__(self) -> str:
        return self.message


def check(
    flow: Flow, data: Tensor, *, seed: int = 0, slack: float = 1.05, cond: Mapping[str, Any] | None = None, **more: Any
) -> CheckReport:
    """Test whether the path, prediction and time declared for a network fit what it does on noised data.

    Every reading of time (as declared, flow, native, each of them reversed, flow times 1000 both ways) is tried with
    every prediction (and its negative), on the data as given; other scalings of the data are tried with the declared
    time. It costs one network call for each of 6 log-SNRs and about 10 readings.

    Args:
        flow: the flow.
        data: a few data points z of shape (B, *S), as the network was trained on them; 16 are plenty.
        seed: seed of the noise added to them.
        slack: how much worse than the best the declared conventions may be and still pass.
        cond: the network's keyword arguments, as in `flowsolve.sample`.
        **more: more of them.

    Returns:
        A `CheckReport`; its message says which convention fits better, if one does.
    """
    path, given = flow.path, arguments(cond, more, len(data))
    data = data.to(state_dtype(data))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed), dtype=data.dtype, device="cpu").to(
        data.device
    )
    times = sorted({path.time(v) for v in LOG_SNRS} - {0.0, 1.0}) or [0.5]
    rows: dict[str, Prediction] = {**PREDICTIONS, flow.prediction.name: flow.prediction}
    rows |= {f"minus {name}": _negative(p) for name, p in rows.items() if name in ("noise", "velocity", "v")}

    errors: dict[tuple[str, str, str], float] = {}
    for scale, (factor, shift) in SCALES.items():
        z = factor * data + shift
        for name, clock in (_clocks(flow) if scale == "data as given" else {"declared": flow.clock}).items():
            errors |= {(p, name, scale): e for p, e in _errors(flow, z, noise, times, clock, rows, given).items()}

    declared = (flow.prediction.name, "declared", "data as given")
    error = errors.get(declared, math.inf)
    least = min(errors.values())
    # Readings that nearly agree (a reversed native clock is often flow time) tie: the fewest changes explain most.
    tied = [k for k, e in errors.items() if e <= 1.02 * least]
    best = min(tied, key=lambda k: (sum(a != b for a, b in zip(k, declared, strict=True)), errors[k]))
    low, high = flow.data_range
    margin = 0.5 * (high - low)  # latents and continuous data overshoot; other units do so by far
    ok = error <= slack * least and error < 1.0
    if ok:
        message = f"the declared conventions fit: relative error {error:.3f} (0 perfect, 1 knows nothing)"
    elif bool((data < low - margin).any() | (data > high + margin).any()):
        message = (
            f"the data run from {float(data.min()):.4g} to {float(data.max()):.4g}, far outside the declared "
            f"data_range ({low:g}, {high:g}); scale them as the network was trained on them, then check again"
        )
    elif errors[best] >= 0.9 or best == declared:
        message = (
            f"no convention fits: relative error {error:.3g} as declared and {errors[best]:.3g} at best. Either the "
            "network is untrained, or its path or its data are not these"
        )
    else:
        changes = [
            f"{what} {new!r} instead of {old!r}"
            for what, new, old in zip(("prediction", "time", "data scale"), best, declared, strict=True)
            if new != old
        ]
        message = (
            f"the declared conventions do not fit (relative error {error:.3g}): {' and '.join(changes)} fits better "
            f"(relative error {errors[best]:.3g})"
        )
    return CheckReport(ok, error, best, errors[best], errors, message)


def _clocks(flow: Flow) -> dict[str, Callable[[float], float]]:
    """Readings of time that networks are known to use, the declared one first."""
    native: Callable[[float], float] = flow.path.native_time
    return {
        "declared": flow.clock,
        "flow": lambda t: t,
        "flow, reversed": lambda t: 1.0 - t,
        "native": native,
        "native, reversed": lambda t: native(1.0 - t),
        "1000 × flow": lambda t: 1000.0 * t,
        "1000 × flow, reversed": lambda t: 1000.0 * (1.0 - t),
    }


def _errors(
    flow: Flow,
    z: Tensor,
    noise: Tensor,
    times: list[float],
    clock: Callable[[Any], Any],
    rows: dict[str, Prediction],
    cond: dict[str, Any],
) -> dict[str, float]:
    """The relative error of each prediction under one clock; a network that fails under it is left out."""
    wrong = dict.fromkeys(rows, 0.0)
    with torch.no_grad():
        for t in times:
            point = flow.path.at(t)
            x = flow.path.interpolate(z, noise, t)
            try:
                output = flow.call(x, t, clock=clock, **cond)
            except (IndexError, RuntimeError, ValueError):  # such as a table of embeddings read beyond its end
                if clock is flow.clock:
                    raise
                return {}
            for name, prediction in rows.items():
                a, b, w = prediction.row(point)
                # w·o − (a z + b ε), with x known, lies along one direction: ẑ − z = −σ (…)/(αb − σa)
                miss = (w * output - (a * z + b * noise)) * (-point.sigma / prediction.determinant(point))
                wrong[name] += float((per_sample(1.0 + point.alpha / point.sigma, miss) * miss).double().square().sum())
    size = len(times) * float((z - noise).double().square().sum())
    return {name: math.sqrt(e / size) if math.isfinite(e) else math.inf for name, e in wrong.items()}


def _negative(prediction: Prediction) -> Prediction:
    def row(point: Any) -> Row:
        a, b, w = prediction.row(point)
        return Row(-a, -b, w)

    return Prediction(f"minus {prediction.name}", row)
