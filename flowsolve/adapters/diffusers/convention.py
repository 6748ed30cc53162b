r"""What a diffusers scheduler says of *training*: the path, the prediction and the clock of its network.

What it says of sampling (spacing, clipping, order, shift, Karras or beta sigmas) is for a solver and a grid to decide
and is not used. An option of another class says nothing (`flowsolve.adapters.diffusers.options`).

**Tables** (DDPM, DDIM and all that share their table) train on $\bar\alpha_k$, $k = 0 \dots N-1$
(`flowsolve.adapters.diffusers.tables`), and tell the network the index $k$. The path is `Discrete`, the time "native".

**Flow matching** trains on $x = (1-s)\,z + s\,\varepsilon$, tells the network $N s$ ($N$ = `num_train_timesteps`) and
predicts $\varepsilon - z$. With $t = 1 - s$ that is `CondOT`, the clock $N(1-t)$ and the row
$(-\dot\alpha, -\dot\sigma)$. So do the multistep schedulers with `use_flow_sigmas`. `shift`, static or dynamic, only
chooses the noise levels of sampling: a network reads the level itself, and it does not enter. With `invert_sigmas`
(Mochi) level and output are those of flow time itself: the clock $N t$ and the velocity.

**Preconditioned** networks (EDM, Karras et al. 2022) read a scaled state and a $c_{noise}$:

| scheduler | $c_{noise}$ | output |
|---|---|---|
| `EDMEuler`, `EDMDPMSolverMultistep` | $\tfrac14\log\sigma$ | $F$ (`epsilon`) or $-F$ (`v_prediction`) |
| `EulerDiscrete` with `timestep_type` = `continuous` and `v_prediction` | $\tfrac14\log\sigma$ | $-F$, $\sigma_d = 1$ |
| `CosineDPMSolverMultistep` | $\tfrac2\pi\arctan\sigma$ | $F$ or $-F$ |

`sigma_schedule` says how σ runs between its ends: `karras` is the path `EDM` with its `rho`, `exponential` is `VE`.
(`flowsolve.adapters.networks` has the row of $F$.)

**Stable Cascade** (`DDPMWuerstchen`) is the continuous cosine schedule, `Cosine`, with noise at its own time.

**score_sde** ports: `ScoreSdeVe` is `VE` with the score at time σ. **DanceDiffusion** (`IPNDM`) is `Trig` with a v at
time $1 - t$.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowsolve.adapters.diffusers.options import foreign, options_of, parameters
from flowsolve.adapters.diffusers.tables import alphas_cumprod, table_size
from flowsolve.adapters.networks import Preconditioned, Preconditioning, preconditioned
from flowsolve.flow import Flow
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, Trig
from flowsolve.predictions import FLOW, PREDICTIONS, Prediction

__all__ = [
    "DISTILLED",
    "FLOW",
    "TABLE_SCHEDULERS",
    "Convention",
    "as_flow",
    "class_name",
    "completed",
    "convention",
]


FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
)
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
TABLE_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "RePaintScheduler",
    "UnCLIPScheduler",
    *EULERS,
)
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
OTHER_SCHEDULERS = ("ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "IPNDMScheduler", "DDPMWuerstchenScheduler")
SUPPORTED = (*TABLE_SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS, *OTHER_SCHEDULERS)
DISTILLED = (
    "CMStochasticIterativeScheduler",
    "ConsistencyDecoderScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "LCMScheduler",
    "PiflowScheduler",
    "SCMScheduler",
    "TCDScheduler",
)
"""Schedulers of networks that jump to the data instead of estimating it: there is no ODE to solve."""

JUMPS = (
    "its network is trained to jump to the data in one or a few steps (consistency or few-step distillation); its "
    "output is not the mean of the data given the state, so no ODE or SDE solver applies. Sample it with its own "
    "scheduler, or load the model that it was distilled from"
)
PREDICTION_TYPES = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}


@dataclass(frozen=True)
class Line:
    """The clock k = N t, or N (1 − t) where noise is last on it; and its inverse."""

    scale: float
    noise_last: bool = True

    def __call__(self, t: Any) -> Any:
        return self.scale * (1.0 - t if self.noise_last else t)

    def inverse(self, k: Any) -> Any:
        """The flow time at which the clock shows k."""
        return 1.0 - k / self.scale if self.noise_last else k / self.scale


@dataclass(frozen=True)
class Convention:
    """What a scheduler's configuration says of training.

    Attributes:
        path: the path.
        prediction: what the network outputs.
        time: the clock it reads, as `Flow` takes it; None if the configuration does not say.
        clock: the same in words.
        precondition: how it is asked, if it is behind EDM's preconditioning.
        data_range: what pixels were mapped to.
    """

    path: Path
    prediction: Prediction
    time: str | Line | None = "native"
    clock: str = "the index of the table"
    precondition: Preconditioning | None = None
    data_range: tuple[float, float] = (-1.0, 1.0)

    def wrap(self, net: Any) -> Any:
        """The network with its preconditioning, if it has one."""
        return net if self.precondition is None else Preconditioned(net, self.precondition)

    def stated(self) -> Convention:
        """Itself.

        Raises:
            ValueError: the configuration does not say which time the network reads.
        """
        if self.time is None:
            raise ValueError(
                "ScoreSdeVpScheduler does not say which time its network reads; expected a flow built by hand, "
                "Flow(net, VP(), 'noise', time=...), or adapters.load(..., time=...)"
            )
        return self


def completed(scheduler: Any) -> dict[str, Any]:
    """A scheduler, or its configuration, as a configuration with nothing left out, and nothing of other classes.

    Options that the named class does not have are carried along from others and say nothing (`options.foreign`).

    A scheduler that was not loaded from a file does not write its class into its configuration. Then it is the one
    that has just these options, unless such a one is for distilled networks.

    Raises:
        ValueError: a scheduler that is not supported.
    """
    told = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
    name = class_name(scheduler) or _by_options(told)
    if name is None:
        raise ValueError(
            "scheduler None is not supported: its configuration has no _class_name. Pass the scheduler itself, or "
            "the object that its scheduler_config.json holds"
        )
    if name in DISTILLED:
        raise ValueError(f"{name} is not supported: {JUMPS}")
    if name not in SUPPORTED:
        raise ValueError(_unsupported(f"scheduler {name}", SUPPORTED))
    dropped = foreign(told, name)
    config = {**options_of(name), **{k: v for k, v in told.items() if k not in dropped}, "_class_name": name}
    return _dated(config, "prediction_type" in told and "prediction_type" not in told.get("_use_default_values", ()))


def _dated(config: dict[str, Any], stated: bool) -> dict[str, Any]:
    """With `predict_epsilon` (until diffusers 0.10), which today's classes ignore, as the `prediction_type` it means.

    Raises:
        ValueError: a prediction_type is stated, and is another.
    """
    if config.get("predict_epsilon") is not False or "prediction_type" not in config:
        return config
    if stated and config["prediction_type"] != "sample":
        raise ValueError(
            f"predict_epsilon = False (an old word for prediction_type = 'sample') and prediction_type = "
            f"{config['prediction_type']!r} contradict each other; drop the one that is wrong"
        )
    return {**config, "prediction_type": "sample"}


def _by_options(config: Mapping[str, Any]) -> str | None:
    """The class whose options are just those of a configuration; None if there is none, or if one is distilled.

    Supported classes that share their options share their convention.
    """
    keys = {k for k in config if not k.startswith("_")}
    if "_class_name" in config or not keys:
        return None
    found = [n for n in (*SUPPORTED, *DISTILLED) if parameters(n).keys() == keys]
    return found[0] if found and not set(found) & set(DISTILLED) else None


def class_name(scheduler: Any) -> str | None:
    """The class of diffusers' scheduler that an object, or a configuration, has its training convention from.

    A scheduler of another library that was made by `from_config` of the pipeline's own keeps its name: as "_class_name"
    or, as this package's, under "flowsolve".
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    own = None if isinstance(scheduler, Mapping) else type(scheduler).__name__
    if own in SUPPORTED or own in DISTILLED:
        return own
    kept = config.get("flowsolve")
    return (kept.get("scheduler") if isinstance(kept, Mapping) else None) or config.get("_class_name") or own


def convention(config: Mapping[str, Any]) -> Convention:
    """What a completed scheduler configuration says of training.

    Raises:
        ValueError: a scheduler or an option that is not supported.
    """
    name = config["_class_name"]
    if name in DISTILLED:
        raise ValueError(f"{name} is not supported: {JUMPS}")
    n = float(table_size(config))
    if name in FLOW_SCHEDULERS:
        return _flow(n, FLOW, bool(config.get("invert_sigmas")))
    if name in EDM_SCHEDULERS:
        return _edm(name, config)
    if name == "ScoreSdeVeScheduler":
        path = VE(float(config["sigma_min"]), float(config["sigma_max"]))
        return Convention(path, PREDICTIONS["score"], clock="σ", data_range=(0.0, 1.0))
    if name == "ScoreSdeVpScheduler":
        return Convention(
            VP(float(config["beta_min"]), float(config["beta_max"])),
            PREDICTIONS["noise"],
            time=None,
            clock="not stated",
        )
    if name == "DDPMWuerstchenScheduler":
        if float(config["scaler"]) != 1.0:
            raise ValueError(f"{name} with scaler = {config['scaler']} is not supported; expected 1")
        return Convention(Cosine(float(config["s"])), PREDICTIONS["noise"], clock="the cosine schedule's, 0 to 1")
    if name == "IPNDMScheduler":
        if config.get("trained_betas") is not None:
            raise ValueError(f"{name} with trained_betas is not supported; expected None")
        return Convention(Trig(), PREDICTIONS["v"], time=Line(1.0), clock="1 − t")
    if name not in TABLE_SCHEDULERS:
        raise ValueError(_unsupported(f"scheduler {name}", SUPPORTED))
    kind = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas"):
        predictions = {"flow_prediction": FLOW, "epsilon": PREDICTIONS["noise"], "sample": PREDICTIONS["data"]}
        if kind not in predictions:
            raise ValueError(_unsupported(f"{name} with use_flow_sigmas and prediction_type = {kind!r}", predictions))
        return _flow(n, predictions[kind], False)
    if kind not in PREDICTION_TYPES:
        raise ValueError(_unsupported(f"{name} with prediction_type = {kind!r}", PREDICTION_TYPES))
    table = alphas_cumprod(config)
    if config.get("timestep_type", "discrete") == "continuous" and kind == "v_prediction":
        # σ_min and σ_max where they are given, else those of the table, whose last ᾱ may be 0 (2⁻²⁴ in diffusers)
        ends = [math.sqrt((1.0 - a) / a) for a in (float(table[0]), max(float(table[-1]), 2.0**-24))]
        low, high = (float(config.get(k) or v) for k, v in zip(("sigma_min", "sigma_max"), ends, strict=True))
        return Convention(
            EDM(low, high), preconditioned(1.0, v=True), clock="σ; inside, ¼ log σ", precondition=Preconditioning(1.0)
        )
    return Convention(Discrete(table), PREDICTIONS[PREDICTION_TYPES[kind]])


def _flow(n: float, prediction: Prediction, inverted: bool) -> Convention:
    if inverted:
        return Convention(CondOT(), PREDICTIONS["velocity"], time=Line(n, noise_last=False), clock=f"{n:g} t")
    return Convention(CondOT(), prediction, time=Line(n), clock=f"{n:g} (1 − t)")


def _edm(name: str, config: Mapping[str, Any]) -> Convention:
    low, high, data = (float(config[k]) for k in ("sigma_min", "sigma_max", "sigma_data"))
    kind, schedule = config["prediction_type"], config["sigma_schedule"]
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(_unsupported(f"{name} with prediction_type = {kind!r}", ("epsilon", "v_prediction")))
    if schedule not in ("karras", "exponential"):
        raise ValueError(_unsupported(f"{name} with sigma_schedule = {schedule!r}", ("karras", "exponential")))
    path = EDM(low, high, float(config["rho"])) if schedule == "karras" else VE(low, high)
    asked = Preconditioning(data, "atan" if name == "CosineDPMSolverMultistepScheduler" else "log")
    row = preconditioned(data, v=kind == "v_prediction")
    return Convention(path, row, clock=f"σ; inside, {asked}", precondition=asked)


def as_flow(unet: Any, scheduler: Any) -> Flow:
    """A diffusers network with the convention of a scheduler.

    Args:
        unet: a diffusers model, or a module unet(x, timestep) whose result has `.sample`.
        scheduler: a diffusers scheduler, or its configuration with "_class_name".

    Raises:
        ValueError: a scheduler or an option that is not supported.
    """
    from flowsolve.adapters.diffusers.models import wrap

    said = convention(completed(scheduler)).stated()
    assert said.time is not None
    net = said.wrap(wrap(unet).eval())
    return Flow(net, said.path, said.prediction, time=said.time, data_range=said.data_range)


def _unsupported(found: str, supported: Any) -> str:
    return f"{found} is not supported; supported are {', '.join(supported)}"
