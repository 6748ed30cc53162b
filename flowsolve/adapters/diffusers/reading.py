r"""A scheduler's configuration as seen from inside a pipeline: its training convention, without a network.

`convention.as_flow` joins a convention to a network. A scheduler has none: a pipeline calls the network itself, with an
input that the scheduler scales and at a time that it names, and hands over the output. So a `Reading` is the same
convention with the two things that a pipeline asks of a scheduler: the network's own time, both ways, and the scale of
its input. They differ from the flow's where there is preconditioning (`flowsolve.adapters.networks`), which a loaded
network has inside and a pipeline's has not: there the time is $c_{noise}(\sigma)$ and the input $c_{in}\,x$.

A pipeline also holds the sample between two steps. Euler's kin hold $x/\alpha = z + \sigma\varepsilon$ with their σ the
ratio σ/α of the table, and scale the network's input by $1/\sqrt{\sigma^2+1} = \alpha$. Pipelines and loops rely on it
($z = x - \sigma\varepsilon$, the latent upscaler's own preconditioning), so what was read from a configuration of that
kin is shown in its units, whatever the solver. With zero terminal SNR α is $2^{-12}$ in the place of 0, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowsolve.adapters.clocks import Preconditioned
from flowsolve.adapters.diffusers.convention import EULERS, Convention, Line, completed, convention
from flowsolve.fingerprint import Elsewhere
from flowsolve.flow import Flow
from flowsolve.guidance import Clip, Threshold
from flowsolve.paths import CondOT, Discrete, Path, Point

__all__ = ["OURS", "Reading", "read", "start_std"]

OURS = "flowsolve"
"""The entry of a configuration that holds what is this package's own (`flowsolve.adapters.diffusers.settings`)."""
LEAST = 2.0**-12
"""What stands for α = 0 in the units of Euler's kin."""


@dataclass(frozen=True)
class Reading:
    """A training convention, as a pipeline asks for it.

    Attributes:
        config: the configuration of the scheduler that it was read from, complete.
        said: what that says.
        flow: path, prediction and clock, about a network that is called elsewhere.
        limit: what is made of ẑ (ε̂ follows): clipping or dynamic thresholding, where the configuration says so.
    """

    config: Mapping[str, Any]
    said: Convention
    flow: Flow
    limit: Callable[[Tensor], Tensor] | None

    @property
    def name(self) -> str:
        """The class of the scheduler."""
        return str(self.config["_class_name"])

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

    @property
    def stretched(self) -> bool:
        """Whether samples are shown as x/α."""
        return self.name in EULERS and isinstance(self.path, Discrete)

    def native(self, k: Any) -> Any:
        """The flow time of a network's time."""
        clock, asked = self.said.time, self.said.precondition
        if isinstance(clock, Line):
            return clock.inverse(k)
        return self.path.time_from_native(k if asked is None else asked.sigma(k))

    def scale(self, point: Point) -> float:
        """The factor of the network's input at a point of the path, from the sample as it is shown."""
        asked = self.said.precondition
        return 1.0 / self.shown(point) if asked is None else float(asked.scale(point.sigma))

    def shown(self, point: Point) -> Any:
        """The factor of a state at a point of the path, as a pipeline is shown it: 1/α for Euler's kin, otherwise 1."""
        if not self.stretched:
            return 1.0
        alpha = point.alpha
        return 1.0 / (alpha.clamp_min(LEAST) if isinstance(alpha, Tensor) else max(alpha, LEAST))


def read(config: Any) -> Reading:
    """The convention of a scheduler, or of a configuration.

    Args:
        config: of a diffusers scheduler, or of one of ours.

    Raises:
        ValueError: a scheduler or an option that is not supported.
    """
    config = completed(config)
    if config["_class_name"] == "DDPMWuerstchenScheduler":
        raise ValueError(
            "DDPMWuerstchenScheduler is not supported inside a pipeline: Stable Cascade's ends its own steps. Keep its "
            "own scheduler there; adapters.load reads its directory, and fs.sample solves it"
        )
    said = convention(config).stated()
    path, asked, clock = said.path, said.precondition, said.time
    assert clock is not None
    time = clock if asked is None else Preconditioned(asked, path)
    return Reading(config, said, Flow(Elsewhere(), path, said.prediction, time=time), _limit(config))


def _limit(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """`thresholding` to the `dynamic_thresholding_ratio` quantile, at most `sample_max_value`, or `clip_sample`."""
    if config.get("thresholding"):
        most = float(config.get("sample_max_value", 1.0))
        return Threshold(float(config.get("dynamic_thresholding_ratio", 0.995)), most=most)
    if config.get("clip_sample"):
        edge = float(config.get("clip_sample_range", 1.0))
        return Clip(-edge, edge)
    return None


def start_std(reading: Reading, t: float) -> float:
    """The standard deviation of the path's state that a pipeline starts from at time t, as the scheduler read has it.

    1 for most. Euler's kin and ScoreSdeVe start from σ ε, unless their time steps are leading; EDM's from
    √(σ_max² + 1) ε.
    """
    point, leading = reading.path.at(t), reading.config.get("timestep_spacing") == "leading"
    if reading.name in (*EULERS, "ScoreSdeVeScheduler") and not leading:
        return float(point.sigma)
    return 1.0 if reading.said.precondition is None else float(point.sigma**2 + 1.0) ** 0.5
