"""What makes a network something else than the flow of its scheduler, beside what its own channels say.

Two kinds would load without an error and be wrong. A **super-resolution stage** takes the noisy image beside a small
one, 3 + 3 channels, and returns a mean and a learned variance, 3 + 3 again: equal numbers, and no flow of 6 channels.
Its scheduler says so (`variance_type`). And **pipelines of more than one network**, or with guidance inside the network
(ControlNet, adapters, GLIGEN, perturbed attention), of which the denoiser is a part: alone it makes other images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["accompanied", "contradicted"]

COMPANIONS = {
    "controlnet": "a ControlNet",
    "adapter": "a T2I adapter",
    "motion_adapter": "a motion adapter",
    "image_normalizer": "a normaliser of image embeddings",
}
"""Parts of a pipeline that act inside the loop, by the beginning of their names."""
INSIDE = {
    "ControlNet": "a ControlNet",
    "Adapter": "a T2I adapter",
    "AnimateDiff": "a motion adapter",
    "PAG": "guidance by perturbed attention inside the network",
    "SAG": "guidance by its own attention maps",
    "GLIGEN": "layers that are told boxes",
    "AttendAndExcite": "latents that are optimised in its loop",
    "Panorama": "a network that sees windows of the latents",
    "SuperResolution": "a smaller image beside the latents",
}
"""Pipelines by a part of their class's name."""


def contradicted(name: str, config: Mapping[str, Any], scheduler: Mapping[str, Any] | None) -> str | None:
    """Why a network cannot be what its scheduler says, or None.

    Args:
        name: the network's class.
        config: the network's configuration.
        scheduler: the scheduler's, as it is in the file.
    """
    kind = None if scheduler is None else scheduler.get("variance_type")
    inner, outer = config.get("in_channels"), config.get("out_channels")
    if kind not in ("learned", "learned_range") or inner is None or (outer or inner) != inner:
        return None
    return (
        f"its scheduler says variance_type = {kind!r}, a mean and a variance in the output, and the {name} maps "
        f"{inner} channels to {inner}: half of its input is another image (a super-resolution stage such as DeepFloyd "
        "IF's), so it is no flow of what it takes. Make a flow of the half that is denoised, around a function "
        "net(x, t, image=...) that concatenates the image and returns the mean; or, if its output holds no variance, "
        "declare scheduler= with variance_type='fixed_small'"
    )


def accompanied(pipeline: str, parts: Iterable[str], folder: str) -> str | None:
    """Why a pipeline is more than its denoiser, or None.

    Args:
        pipeline: the name of its class.
        parts: the names of its components.
        folder: where its denoiser is saved.
    """
    found = next((v for k, v in COMPANIONS.items() for p in parts if re.fullmatch(rf"{k}(_\w+)?", p)), None)
    found = found or next((v for k, v in INSIDE.items() if k in pipeline), None)
    if found is None:
        return None
    return (
        f"a {pipeline} has {found}, and its denoiser alone makes other images. Open it as a pipeline and use "
        "flowsolve.adapters.diffusers.capture(pipe, ...), which has all of it, or a Scheduler inside it; for the "
        f"denoiser alone load its folder, {folder}/, with scheduler= declared"
    )
