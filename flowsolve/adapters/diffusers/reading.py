r"""What a scheduler's configuration says about training, as seen from inside a pipeline.

`convention.as_flow` joins it to a network. A scheduler has no network: a pipeline calls that itself, with an input
that the scheduler scales and a time that it names, and hands over the output. So a `Reading` is a path, a prediction,
and the two things that a pipeline asks of a scheduler: the clock and the input's scale.

| schedulers | path | prediction | clock | input |
|---|---|---|---|---|
| tables | `Discrete` | `prediction_type` | index $k$ | $x$ |
| flow matching | `CondOT` | $\varepsilon - z$ | $N(1-t)$ | $x$ |
| tables with `use_flow_sigmas` | `CondOT` | `prediction_type` | $N(1-t)$ | $x$ |
| EDM; Euler, if continuous | `EDM` | $F$ | $\tfrac14\ln\sigma$ | $x/\sqrt{\sigma^2+\sigma_d^2}$ |

EDM's $\hat z = c_{skip}\,x + c_{out}\,F$ with $c_{skip} = \sigma_d^2/(\sigma^2+\sigma_d^2)$ and
$c_{out} = \pm\sigma\sigma_d/\sqrt{\sigma^2+\sigma_d^2}$ (− for `v_prediction`) is the row

$$ F \approx \pm\frac{\sigma\,z - \sigma_d^2\,\varepsilon}{\sigma_d\sqrt{\sigma^2+\sigma_d^2}} $$

(Karras et al. 2022, table 1).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowsolve._optional import require
from flowsolve.adapters.diffusers.convention import FLOW, PREDICTION_TYPES, TABLE_SCHEDULERS, alphas_cumprod
from flowsolve.flow import Flow
from flowsolve.paths import EDM, CondOT, Discrete, Path, Point
from flowsolve.predictions import Prediction, Row

__all__ = ["EULERS", "FLOWS", "OURS", "Reading", "complete", "read", "start_std"]

FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
TABLES = (*TABLE_SCHEDULERS, "DPMSolverSDEScheduler")
EULERS = (
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Schedulers whose state is x/α."""
OURS = "flowsolve"
"""The entry of a configuration that holds what is this package's own (`flowsolve.adapters.diffusers.settings`)."""


@dataclass(frozen=True)
class Reading:
    """A training convention.

    Attributes:
        name: the class of the scheduler that it was read from.
        config: its configuration, complete.
        flow: path, prediction and clock, about a network that is called elsewhere.
        native: the flow time of a network's time.
        scale: the factor of the network's input at a point of the path; None for 1.
    """

    name: str
    config: Mapping[str, Any]
    flow: Flow
    native: Callable[[Any], Any]
    scale: Callable[[Point], Any] | None = None

    @property
    def path(self) -> Path:
        """The path."""
        return self.flow.path


def complete(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of the scheduler that a configuration is of, and the configuration with what it leaves out.

    A scheduler that was not loaded from a file does not write its class into its configuration; then the class is the
    one that has just these options (classes that share them all share their convention).

    Raises:
        ValueError: a class that is not known.
    """
    library = require("diffusers", "diffusers", "reading a diffusers scheduler")
    name = (config.get(OURS) or {}).get("scheduler") or config.get("_class_name")
    if name is None:
        keys = {k for k in config if not k.startswith("_")}
        name = next((n for n in (*TABLES, *FLOWS, *EDMS) if keys == _defaults(getattr(library, n, None)).keys()), None)
    found = _defaults(getattr(library, str(name), None)) if str(name).endswith("Scheduler") else {}
    if not found:
        raise ValueError(
            f"the configuration is of {name!r}; expected the class of a diffusers scheduler as its '_class_name'. Pass "
            "the scheduler itself instead, pipe.scheduler"
        )
    return str(name), {**found, **config}


def _defaults(cls: Any) -> dict[str, Any]:
    """The options of a class, as they are by default."""
    return (
        {}
        if cls is None
        else {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    )


def read(config: Mapping[str, Any]) -> Reading:
    """The convention of a scheduler's configuration.

    Args:
        config: of a diffusers scheduler, or of one of ours, with "_class_name".

    Raises:
        ValueError: a scheduler or an option that is not supported.
    """
    name, config = complete(config)
    kind = config.get("prediction_type", "epsilon")
    if name in EDMS:
        return _edm(name, config, float(config["sigma_data"]), kind)
    if name == "EulerDiscreteScheduler" and config.get("timestep_type") == "continuous" and kind == "v_prediction":
        if config.get("sigma_min") is None or config.get("sigma_max") is None:
            raise ValueError(f"{name} with timestep_type = 'continuous' needs sigma_min and sigma_max; expected both")
        return _edm(name, config, 1.0, kind)
    straight = name in FLOWS or config.get("use_flow_sigmas")
    if name not in (*FLOWS, *TABLES):
        raise ValueError(f"{name} is not supported; supported are {', '.join((*TABLES, *FLOWS, *EDMS))}")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} with invert_sigmas = True is not supported; expected False")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{name} with timestep_type = {config['timestep_type']!r} and prediction_type = {kind!r} is not "
            "supported; expected 'discrete', or 'v_prediction' beside it"
        )
    kinds: dict[str, str | Prediction] = {**PREDICTION_TYPES, **({"flow_prediction": FLOW} if straight else {})}
    kind = "flow_prediction" if name in FLOWS else kind
    if kind not in kinds:
        raise ValueError(
            f"{name} with prediction_type = {kind!r} is not supported; supported are {', '.join(kinds)}"
            + ("" if straight else " (and flow_prediction beside use_flow_sigmas = True)")
        )
    if straight:
        n = float(config["num_train_timesteps"])
        flow = Flow(_elsewhere, CondOT(), kinds[kind], time=lambda t: n * (1.0 - t))
        return Reading(name, config, flow, lambda k: 1.0 - k / n)
    path = Discrete(alphas_cumprod(config))
    return Reading(name, config, Flow(_elsewhere, path, kinds[kind], time="native"), path.time_from_native)


def _edm(name: str, config: Mapping[str, Any], width: float, kind: str) -> Reading:
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"{name} with prediction_type = {kind!r} is not supported; expected epsilon or v_prediction")
    sign = 1.0 if kind == "epsilon" else -1.0
    path = EDM(float(config["sigma_min"]), float(config["sigma_max"]), float(config.get("rho", 7.0)))

    def row(point: Point) -> Row:
        norm = (point.sigma**2 + width**2) ** 0.5
        return Row(sign * point.sigma / (width * norm), -sign * width / norm)

    def clock(t: Any) -> Any:
        return -0.25 * path.log_snr(t)

    def native(c: Any) -> Any:
        return path.time(-4.0 * c)

    def scale(point: Point) -> Any:
        return 1.0 / (point.sigma**2 + width**2) ** 0.5

    return Reading(name, config, Flow(_elsewhere, path, Prediction("edm", row), time=clock), native, scale)


def start_std(reading: Reading, t: float) -> float:
    """The standard deviation of the state that a pipeline starts from at flow time t, as the scheduler read has it.

    1 for most. Euler's kin start from σ̃ ε, which is σ ε here, unless their time steps are leading; EDM's from
    √(σ_max² + 1) ε.
    """
    point, leading = reading.path.at(t), reading.config.get("timestep_spacing") == "leading"
    if reading.scale is not None:
        return (
            float(point.sigma) if "timestep_spacing" in reading.config and not leading else math.hypot(point.sigma, 1.0)
        )
    return float(point.sigma) if reading.name in EULERS and not leading else 1.0


def _elsewhere(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("a scheduler has no network; the pipeline calls it")
