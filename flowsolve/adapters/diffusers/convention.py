r"""Checkpoints of Hugging Face diffusers: a directory with `unet/` and `scheduler/`.

The network is loaded by diffusers itself, from safetensors only. The scheduler is read for what it says about
training: the table or path, the prediction, the clock. What it says about sampling (spacing, clipping, order)
is not used.

**Discrete schedulers** (DDPM, DDIM and all that share their table) train on $\bar\alpha_k$,
$k = 0 \dots N-1$, and tell the network the index $k$. With $\beta_k$ from the configuration and
$\bar\alpha_k = \prod_{j\le k}(1-\beta_j)$:

| `beta_schedule` | $\beta_k$ | source |
|---|---|---|
| `linear` | evenly from `beta_start` to `beta_end` | Ho et al. 2020 |
| `scaled_linear` | the square of evenly spaced roots | Rombach et al. 2022 |
| `squaredcos_cap_v2` | $\min(1 - f_{k+1}/f_k,\ 0.999)$ | Nichol & Dhariwal 2021 |
| `trained_betas` | the list itself | |

with $f_k = \cos^2\bigl(\tfrac\pi2\,\tfrac{k/N+0.008}{1.008}\bigr)$.

`rescale_betas_zero_snr` moves and stretches $\sqrt{\bar\alpha_k}$ so that the last is 0 and the first stays
(Lin et al. 2024). The path is `Discrete`, the time "native". Tables are computed in float64; diffusers' own,
in float32, agree to its rounding.

**Flow matching** (`FlowMatchEulerDiscreteScheduler`) trains on $x = (1-s)\,z + s\,\varepsilon$, tells the
network $N s$ ($N$ = `num_train_timesteps`) and predicts $\varepsilon - z$. With $t = 1 - s$ that is `CondOT`,
the clock $N(1-t)$ and the row $(-\dot\alpha, -\dot\sigma)$. `shift` only chooses the noise levels of sampling
and does not enter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._optional import require
from flowsolve.flow import Flow
from flowsolve.paths import CondOT, Discrete
from flowsolve.predictions import Prediction, Row

__all__ = ["FLOW", "TABLE_SCHEDULERS", "alphas_cumprod", "as_flow", "load", "save"]

FLOW = Prediction("flow", lambda p: Row(-p.alpha_dot, -p.sigma_dot))
"""ε − z on the straight path: the velocity towards the noise, as diffusers' flow models predict it."""

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
TABLE_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
PREDICTION_TYPES = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
PARTS = ("unet", "scheduler")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class UNet(nn.Module):
    """A diffusers network whose forward returns the tensor itself."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.unet(x, t, **cond).sample  # type: ignore[no-any-return]


def load(source: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Flow:
    """A diffusers directory as a `Flow` in evaluation mode; see `flowsolve.adapters.load`."""
    if not isinstance(source, str | Path):
        raise TypeError(
            f"source is a {type(source).__name__}; expected a directory. For a pipeline at hand, use "
            "adapters.diffusers.as_flow(pipeline.unet, pipeline.scheduler)"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype = {dtype!r}; expected a torch dtype such as torch.float16")
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{str(source)!r} is not a directory; expected a diffusers checkpoint on this machine, with unet/ and "
            "scheduler/ inside (download it first, for example with `hf download`; adapters.bundled(name) gives the "
            "directories of the bundled ones)"
        )
    if root.name in PARTS and all((root.parent / part).is_dir() for part in PARTS):
        raise ValueError(f"{str(source)!r} is one part of a checkpoint; pass its parent, {str(root.parent)!r}")
    scheduler = _read(root, "scheduler/scheduler_config.json")
    unet = _read(root, "unet/config.json")
    found = unet.get("_class_name")
    if found != "UNet2DModel":
        raise ValueError(f"{root / 'unet'} holds a {found}; supported is UNet2DModel, which needs no conditioning")
    if unet.get("out_channels") != unet.get("in_channels"):
        raise ValueError(
            f"the UNet maps {unet.get('in_channels')} channels to {unet.get('out_channels')}; supported are "
            "equal numbers (twice as many is a learned variance)"
        )
    if not any((root / "unet").glob("*.safetensors*")):
        pickles = sorted(p.name for p in (root / "unet").iterdir() if p.suffix in PICKLES)
        also = f"; {', '.join(pickles)} may execute code when read: convert it" if pickles else ""
        raise FileNotFoundError(f"no safetensors weights in {root / 'unet'}{also}")
    library = require("diffusers", "diffusers", "loading a diffusers checkpoint")
    options = {} if dtype is None else {"torch_dtype": dtype}
    net = library.UNet2DModel.from_pretrained(root / "unet", use_safetensors=True, local_files_only=True, **options)
    return as_flow(net if device is None else net.to(device), scheduler)


def as_flow(unet: nn.Module, scheduler: Any) -> Flow:
    """A diffusers network with the convention of a scheduler.

    Args:
        unet: a module unet(x, timestep) whose result has `.sample`.
        scheduler: a diffusers scheduler, or its configuration with "_class_name".

    Raises:
        ValueError: a scheduler or an option that is not supported.
    """
    library = require("diffusers", "diffusers", "reading a diffusers scheduler")
    if isinstance(scheduler, Mapping):
        name = scheduler.get("_class_name")
        if name not in (*TABLE_SCHEDULERS, *FLOW_SCHEDULERS):
            raise ValueError(_unsupported(f"scheduler {name}", (*TABLE_SCHEDULERS, *FLOW_SCHEDULERS)))
        scheduler = getattr(library, name).from_config(dict(scheduler))  # completes what an older version left out
    name, config = type(scheduler).__name__, scheduler.config
    net = UNet(unet).eval()
    if name in FLOW_SCHEDULERS:
        if config.get("invert_sigmas"):
            raise ValueError(f"{name} with invert_sigmas = True is not supported; expected False")
        n = float(config["num_train_timesteps"])
        return Flow(net, CondOT(), FLOW, time=lambda t: n * (1.0 - t))
    if name not in TABLE_SCHEDULERS:
        raise ValueError(_unsupported(f"scheduler {name}", (*TABLE_SCHEDULERS, *FLOW_SCHEDULERS)))
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{name} with timestep_type = {config['timestep_type']!r} is not supported; expected 'discrete'"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(_unsupported(f"{name} with prediction_type = {kind!r}", PREDICTION_TYPES))
    return Flow(net, Discrete(alphas_cumprod(config)), PREDICTION_TYPES[kind], time="native")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The table ᾱ_k that a scheduler's configuration describes, float64 of shape (N,).

    Raises:
        ValueError: an unknown beta_schedule.
    """
    n, schedule, trained = (
        int(config["num_train_timesteps"]),
        config["beta_schedule"],
        config.get("trained_betas"),
    )
    first, last = float(config["beta_start"]), float(config["beta_end"])
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(first, last, n, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(math.sqrt(first), math.sqrt(last), n, dtype=torch.float64).square()
    elif schedule == "squaredcos_cap_v2":
        f = ((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * (0.5 * math.pi)).cos().square()
        betas = (1.0 - f[1:] / f[:-1]).clamp_max(0.999)
    else:
        raise ValueError(_unsupported(f"beta_schedule = {schedule!r}", (*BETA_SCHEDULES, "trained_betas")))
    table = (1.0 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        root = table.sqrt()
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return table


def save(unet: Any, scheduler: Any, directory: str | Path, pipeline: str = "DDPMPipeline") -> None:
    """Write a diffusers directory: model_index.json, unet/ (safetensors) and scheduler/.

    Args:
        unet: a diffusers model.
        scheduler: a diffusers scheduler.
        directory: created if it does not exist.
        pipeline: the class name that model_index.json gives.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    unet.save_pretrained(root / "unet", safe_serialization=True)
    scheduler.save_pretrained(root / "scheduler")
    index = {
        "_class_name": pipeline,
        "_diffusers_version": require("diffusers", "diffusers", "writing a checkpoint").__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", type(unet).__name__],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read(root: Path, name: str) -> dict[str, Any]:
    file = root / name
    if not file.is_file():
        held = ", ".join(sorted(p.name for p in root.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{file} is missing; a diffusers checkpoint has unet/config.json and "
            f"scheduler/scheduler_config.json, {str(root)!r} holds {held}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; expected an object")
    return config


def _unsupported(found: str, supported: Any) -> str:
    return f"{found} is not supported; supported are {', '.join(supported)}"
