r"""A scheduler's configuration as seen from inside a pipeline: its training convention, without a network.

`convention.as_flow` joins a convention to a network. A scheduler has none: a pipeline calls the network itself, with an
input that the scheduler scales and at a time that it names, and hands over the output. So a `Reading` is the same
convention with the two things that a pipeline asks of a scheduler: the network's own time, both ways, and the scale of
its input. They differ from the flow's where there is preconditioning (`flowsolve.adapters.networks`), which a loaded
network has inside and a pipeline's has not: there the time is $c_{noise}(\sigma)$ and the input $c_{in}\,x$.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowsolve.adapters.diffusers.convention import Line, completed, convention
from flowsolve.flow import Flow
from flowsolve.paths import CondOT, Path, Point

__all__ = ["EULERS", "OURS", "Reading", "read", "start_std"]

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
    """A training convention, as a pipeline asks for it.

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

    @property
    def straight(self) -> bool:
        """Whether noise levels are given as noise fractions σ, and shifted."""
        return isinstance(self.path, CondOT)

    @property
    def clean(self) -> bool:
        """Whether the path ends in clean data. Where it does not, ẑ at its end is taken for them."""
        return bool(self.path.at(1.0).sigma < 1e-9)


def read(config: Any) -> Reading:
    """The convention of a scheduler, or of a configuration.

    Args:
        config: of a diffusers scheduler, or of one of ours.

    Raises:
        ValueError: a scheduler or an option that is not supported.
    """
    config = completed(config)
    said = convention(config).stated()
    path, asked = said.path, said.precondition
    clock: Any = path.native_time if isinstance(said.time, str) else said.time
    native: Any = clock.inverse if isinstance(clock, Line) else path.time_from_native
    if asked is None:
        flow = Flow(_elsewhere, path, said.prediction, time=clock)
        return Reading(config["_class_name"], config, flow, native)

    def inner(t: Any) -> Any:
        return asked.time(clock(t))

    return Reading(
        config["_class_name"], config, Flow(_elsewhere, path, said.prediction, time=inner),
        native=lambda k: native(asked.sigma(k)), scale=lambda point: asked.scale(point.sigma),
    )  # fmt: skip


def start_std(reading: Reading, t: float) -> float:
    """The standard deviation of the state that a pipeline starts from at flow time t, as the scheduler read has it.

    1 for most. Euler's kin and ScoreSdeVe start from σ ε, unless their time steps are leading; EDM's from
    √(σ_max² + 1) ε.
    """
    point, leading = reading.path.at(t), reading.config.get("timestep_spacing") == "leading"
    if reading.name in (*EULERS, "ScoreSdeVeScheduler") and not leading:
        return float(point.sigma)
    return 1.0 if reading.scale is None else float(point.sigma**2 + 1.0) ** 0.5


def _elsewhere(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("a scheduler has no network; the pipeline calls it")
