r"""The noise levels that a scheduler's configuration asks for: where N steps begin, and where the last of them ends.

This is what diffusers' own scheduler of the solver visits on that configuration (`flowsolve.adapters.diffusers.peers`).
Tables list entries k (see `flowsolve.grids.Timesteps` for the spacings): those of DDIM, DDPM and Euler's
kin N of them, those of the DPM-Solvers' kin the first N of N + 1. Flow matching lists noise fractions
$\sigma_i$, evenly from 1 to $1/T$, and shifts them,

$$ \sigma' = \frac{s\,\sigma}{1 + (s-1)\,\sigma}, \qquad s = \texttt{shift},\ e^{\mu}\text{ or }\mu , $$

**once**. (diffusers shifts the end of its default grid first and then the grid: issue 13243.) `shift_terminal` then
stretches $1 - \sigma$ so that the last is as given. Karras, exponential and beta levels replace all but the ends.

Different from diffusers, on purpose: entries are not truncated to integers where they are not entries; a level that
stands twice in the list (the lowest, where the steps end in it) is visited once, and the step that is left over goes to
the clean data; RePaint's jumps back are left out; the inverse schedulers' grids are run from the noise as any other
(for inversion see `flowsolve.encode`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from flowsolve.adapters.diffusers.convention import EULERS, FLOW_SCHEDULERS
from flowsolve.adapters.diffusers.peers import RESPACED, TO_THE_LOWEST
from flowsolve.adapters.diffusers.reading import Reading
from flowsolve.adapters.diffusers.tables import alphas_cumprod, table_size
from flowsolve.grids.quantile import beta_quantile
from flowsolve.paths import Discrete, Trig

__all__ = ["from_sigmas", "from_timesteps", "own", "shift_of"]

ONE_MORE = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that lay out N + 1 entries for N steps."""


def shift_of(config: Mapping[str, Any], mu: float | None) -> float:
    """The resolution shift of a flow: `shift` or `flow_shift`, or what μ says where it is dynamic.

    Raises:
        ValueError: a dynamic shift without μ.
    """
    name = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    if not config.get("use_dynamic_shifting"):
        return float(config.get(name, 1.0))
    if mu is None:
        raise ValueError(
            "use_dynamic_shifting = True leaves the shift to the size of the image, and nothing says its μ. In a "
            "pipeline that does not hand μ on (it asks for the class of its own scheduler): Scheduler.from_config("
            f"pipe.scheduler, use_dynamic_shifting=False, {name}=s) with s = math.exp(μ) (μ itself where "
            "time_shift_type is 'linear'); in a loop of your own: set_timesteps(…, mu=μ)"
        )
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else float(mu)


Nodes = tuple[list[float], float | None]
"""Flow times at which steps begin, and the time at which the last ends; None for ẑ, where the path has no clean end."""


def own(reading: Reading, steps: int, mu: float | None = None) -> Nodes:
    """The configuration's own nodes for so many steps.

    Raises:
        ValueError: more steps than the table has entries, or a spacing that is not known.
    """
    config, path = reading.config, reading.path
    if reading.straight:
        span = table_size(config)
        if "beta_schedule" in config and any(config.get(k) for k in RESPACED):
            table = Discrete(alphas_cumprod(config))  # levels of σ/α, between those of the table where none are given
            levels = _respaced(config, [_level(table, span - 1.0), _level(table, 0.0)], steps)
            return [1.0 / (1.0 + v) for v in levels], 1.0
        if reading.name in FLOW_SCHEDULERS:
            low = 1.0 / max(span, steps)  # a table of one entry is a clock that runs from 0 to 1
            base = [1.0 - (1.0 - low) * i / max(steps - 1, 1) for i in range(steps)]
        elif reading.name == "UniPCMultistepScheduler":
            base = [1.0 - (1.0 - 1.0 / span) * i / steps for i in range(steps)]
        else:
            base = [(1.0 - 1.0 / span) * i / steps for i in range(steps, 0, -1)]
        return from_sigmas(reading, base, mu)
    if isinstance(path, Trig):  # IPNDM: the noise level falls as sin²
        angles = [0.5 * math.pi * (1.0 - i / steps) for i in range(steps)]
        return [1.0 - 2.0 / math.pi * math.asin(math.sin(v) ** 2) for v in angles], 1.0
    if "beta_schedule" not in config:  # no table: σ is spaced between its ends
        ends = [path.sigma(0.0), path.sigma(1.0)]
        levels = _respaced(config, ends, steps, "exponential")
        return _ended(reading, [path.time(-math.log(v)) for v in levels])
    table = path if isinstance(path, Discrete) else Discrete(alphas_cumprod(config))
    entries = _entries(reading, table, steps)
    first, last = (entries[0], entries[-1]) if reading.name in EULERS else (len(table.alphas_cumprod) - 1.0, 0.0)
    levels = _respaced(config, [_level(table, first), _level(table, last)], steps)
    if table is not path:
        levels = levels or [_level(table, k) for k in entries]
    if levels:
        return _ended(reading, [path.time(-math.log(v)) for v in levels])
    return _ended(reading, [path.time_from_native(k) for k in entries])


def from_sigmas(reading: Reading, sigmas: Sequence[float], mu: float | None = None) -> Nodes:
    """The nodes of explicit noise levels.

    Args:
        reading: the convention.
        sigmas: of a flow, noise fractions before the shift, which is applied here and nowhere else; otherwise σ/α.
            Levels beyond the path's ends stand for its ends; a trailing 0 is the clean end.
        mu: of a dynamic shift.
    """
    config, path = reading.config, reading.path
    levels = [float(v) for v in sigmas]
    clean = len(levels) > 1 and levels[-1] == 0.0
    levels = levels[:-1] if clean else levels
    if not levels or any(not math.isfinite(v) or v <= 0.0 for v in levels):
        raise ValueError(
            f"sigmas = {[float(v) for v in sigmas]}; expected noise levels that fall, 0 only as the last (for a "
            "pipeline that hands others over, keep its own scheduler)"
        )
    if reading.straight:
        shift = shift_of(config, mu)
        levels = [shift * v / (1.0 + (shift - 1.0) * v) for v in levels]
        if config.get("shift_terminal") and levels[-1] < 1.0:
            factor = (1.0 - levels[-1]) / (1.0 - float(config["shift_terminal"]))
            levels = [1.0 - (1.0 - v) / factor for v in levels]
        levels = _respaced(config, [levels[0], levels[-1]], len(levels)) or levels
        return [min(max(1.0 - v, 0.0), 1.0) for v in levels], 1.0
    times = [path.time(-math.log(v)) for v in levels]
    return (times, 1.0 if reading.clean else None) if clean else _ended(reading, times)


def from_timesteps(reading: Reading, timesteps: Sequence[float]) -> Nodes:
    """The nodes at which a network is asked at explicit times of its own, taken as they are."""
    times = [float(reading.native(float(k))) for k in timesteps]
    if not times or any(not 0.0 <= t <= reading.path.window[1] for t in times):
        first, last = (reading.flow.clock(t) for t in (0.0, reading.path.window[1]))
        raise ValueError(
            f"timesteps = {[float(k) for k in timesteps]}; expected times of the network between {first:g} and {last:g}"
        )
    return _ended(reading, times)


def _ended(reading: Reading, times: list[float]) -> Nodes:
    """Times, with the one where the configuration lets the steps end."""
    config, path = reading.config, reading.path
    lowest = config.get("final_sigmas_type") == "sigma_min" or not config.get("set_alpha_to_one", True)
    lowest = lowest or reading.name in TO_THE_LOWEST
    if not reading.clean:
        return (times[:-1], times[-1]) if lowest and len(times) > 1 else (times, None)
    return times, path.window[1] if lowest and path.window[1] > times[-1] + 1e-6 else 1.0


def _entries(reading: Reading, table: Discrete, steps: int) -> list[float]:
    """The entries of the table at which steps begin."""
    if (between := reading.config.get("interpolation_type", "linear")) != "linear":
        raise ValueError(f"interpolation_type = {between!r} is not supported; expected 'linear', or another grid=")
    config, usual = reading.config, "leading" if reading.name == "RePaintScheduler" else "linspace"
    kind = config.get("timestep_spacing", usual)
    size = table_size(config)
    extra = int(reading.name in ONE_MORE)
    if not 1 <= steps <= size - extra:
        raise ValueError(f"{steps} steps on a table of {size} entries; expected 1 to {size - extra}, or another grid=")
    clip, top = config.get("lambda_min_clipped"), size
    if extra and clip is not None and math.isfinite(clip):
        top -= sum(0.5 * math.log(a / (1.0 - a)) < clip for a in table.alphas_cumprod if a > 0.0)
    if kind == "linspace":
        count = steps if extra else max(steps - 1, 1)
        found = [Fraction((top - 1) * (count - i), count) for i in range(steps)]
    elif kind == "leading":
        found = [
            Fraction(i * (top // (steps + extra)) + int(config.get("steps_offset", 0))) for i in range(steps + extra)
        ]
        found = found[extra:][::-1]
    elif kind == "trailing":
        found = [Fraction(round(Fraction(top) - Fraction(size * i, steps)) - 1) for i in range(steps)]
    else:
        raise ValueError(f"timestep_spacing = {kind!r}; expected linspace, leading or trailing, or another grid=")
    whole = kind != "linspace" or reading.name not in EULERS
    return [min(max(float(round(k) if whole else k), 0.0), size - 1.0) for k in found]


def _level(path: Discrete, entry: float) -> float:
    """σ/α at an entry; where that is infinite 2¹², the level that diffusers puts there."""
    return min(math.exp(-path.log_snr(path.time_from_native(entry))), 4096.0)


def _respaced(config: Mapping[str, Any], ends: Sequence[float], steps: int, usual: str = "") -> list[float]:
    """Noise levels between two, as a configuration spaces them; empty where it does not say."""
    kind = config.get("sigma_schedule", usual)
    for name, option in (
        ("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas"),
        ("exponential", "use_lu_lambdas"),
    ):  # fmt: skip
        kind = name if config.get(option) else kind
    if not kind:
        return []
    high = float(config["sigma_max"]) if config.get("sigma_max") is not None else ends[0]
    low = float(config["sigma_min"]) if config.get("sigma_min") is not None else ends[1]
    parts = max(steps - 1, 1)
    if kind == "beta":
        inner = [low + beta_quantile(parts - i, i, 0.6, 0.6)[0] * (high - low) for i in range(1, parts)]
    elif kind == "exponential":
        inner = [high ** (1.0 - i / parts) * low ** (i / parts) for i in range(1, parts)]
    else:
        rho = float(config.get("rho", 7.0))
        first, last = high ** (1.0 / rho), low ** (1.0 / rho)
        inner = [(first + (last - first) * i / parts) ** rho for i in range(1, parts)]
    return [high, *inner, low][:steps]
