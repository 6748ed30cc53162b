"""Adapters: checkpoints of other packages, read as flows."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch

from flowsolve.adapters import diffusers
from flowsolve.adapters.detection import FORMATS, inspect
from flowsolve.adapters.files import UnsafeFile
from flowsolve.adapters.finding import THRESHOLD, Finding, Unrecognised
from flowsolve.flow import Flow

__all__ = [
    "BUNDLED", "FORMATS", "THRESHOLD", "Finding", "Unrecognised", "UnsafeFile", "bundled", "diffusers", "inspect",
    "load",
]  # fmt: skip

BUNDLED = ("digits-ddpm", "digits-condot")


def load(
    source: Any,
    *,
    format: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    **declared: Any,
) -> Flow:
    """A checkpoint as a `Flow`, with its path, prediction and clock read from what it says of itself.

    Args:
        source: a diffusers directory (a pipeline or one model), a weights file, or a pipeline, module or callable in
            memory.
        format: the family it belongs to, where it does not say so itself; one of `FORMATS`.
        device: where the network is put; by default it stays where it is, or the host.
        dtype: the network's floating dtype; by default its own, or float32.
        trust_pickle: allow code that is in the file to run, with your rights on this machine. Nothing in a file runs
            without it.
        **declared: what the checkpoint does not say, and in place of what it does: `path`, `prediction`, `time`,
            `data_range` and `transform` as for `Flow`; `net`, the network that weights belong to; and by format
            `scheduler`, `distilled`, `variant` (diffusers), `sde`, `beta_min`, `beta_max`, `continuous` (score_sde),
            `schedule`, `steps`, `rescale_timesteps`, `predict_xstart` (guided-diffusion), `path_type` (sit), `matcher`,
            `arguments` (torchcfm, flow_matching), `sigma_min`, `sigma_max`, `rho` (edm, k-diffusion).

    Returns:
        A flow in evaluation mode. What conditions the network goes through `cond=` under the network's own names.

    Raises:
        FileNotFoundError: no such path, or a file is missing in it.
        Unrecognised: a ValueError; the checkpoint does not say enough (the message lists what to declare), or is of a
            kind that has no ODE, such as a consistency model.
        ValueError: a broken, mismatched or unsafe file, or something that is not supported.
        TypeError: something declared that the format does not take.
        ImportError: the package that wrote the checkpoint is not installed.

    Examples:
        >>> flow = fs.adapters.load(lambda x, t: -x, path=fs.paths.CondOT(), prediction="velocity")
        >>> fs.sample(flow, shape=(1, 2), solver=fs.solvers.Euler(), nfe=4).nfe
        tensor([4])
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype = {dtype!r}; expected a torch dtype such as torch.float16")
    return inspect(source, format=format, trust_pickle=trust_pickle, **declared).flow(device, dtype)


def bundled(name: str) -> Path:
    """The directory of a checkpoint that ships with the package: "digits-ddpm" or "digits-condot".

    Both are UNets on scikit-learn's 8×8 digits, trained by `examples/train_digits.sh`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled checkpoint {name!r}; expected one of {', '.join(BUNDLED)}")
    return Path(str(resources.files("flowsolve.problems"))) / "checkpoints" / name
