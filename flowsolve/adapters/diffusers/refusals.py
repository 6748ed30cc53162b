"""What makes a network something else than the flow of its scheduler, beside what its own channels say.

Two kinds would load without an error and be wrong. A **super-resolution stage** takes the noisy image beside a small
one, 3 + 3 channels, and returns a mean and a learned variance, 3 + 3 again: equal numbers, and no flow of 6 channels.
Its scheduler says so (`variance_type`). And **pipelines of more than one network**, or with guidance inside the network
(ControlNet, adapters, GLIGEN, perturbed attention), of which the denoiser is a part: alone it makes other images.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowsolve.adapters.diffusers.reading import Reading

__all__ = ["MARKS", "accompanied", "advised", "contradicted", "warn_if_distilled"]

MARKS = re.compile(
    r"(?:^|[-_/. ])(turbo|lcm|tcd|lightning|schnell|hyper-?sd\w*|dmd2?|consistency)(?=$|[-_/. \d])", re.IGNORECASE
)
"""Of distilled networks, in the names of checkpoints."""

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


def advised(error: Exception, reading: Reading) -> str:
    """The message of an estimate that does not exist on a scheduler's grid, with what can be done in a pipeline."""
    what, make = str(error).partition(";")[0], "Scheduler.from_config(pipe.scheduler, solver=..., "
    if not reading.config.get("rescale_betas_zero_snr"):
        return f"{what}. Lay the steps out within: {make}grid=[...]), flow times one more than steps"
    return (
        f"{what}. The configuration says both rescale_betas_zero_snr and prediction_type = "
        f"{reading.config.get('prediction_type')!r}. If the network predicts v, say so: {make}"
        f"prediction_type='v_prediction'); if it was trained on the table as it is without, {make}"
        f"rescale_betas_zero_snr=False); otherwise begin below pure noise: {make}timestep_spacing='leading'), without "
        "grid= and with another solver than 'auto'"
    )


def warn_if_distilled(pipe: Any) -> None:
    """Say of a pipeline whose network jumps to the data that a solver of many steps makes it no better."""
    net = next((n for k in ("unet", "transformer") if (n := getattr(pipe, k, None)) is not None), None)
    config: Mapping[str, Any] = getattr(net, "config", None) or {}
    names = [str(c.get("_name_or_path", "")) for c in (getattr(pipe, "config", None) or {}, config)]
    marks = sorted({m.group(1).lower() for n in names for m in MARKS.finditer(n)})
    if marks:
        why = f"the name of this checkpoint says {', '.join(marks)}"
    elif "LatentConsistency" in type(pipe).__name__:
        why = f"a {type(pipe).__name__} is of latent consistency"
    elif type(net).__name__ == "FluxTransformer2DModel" and not config.get("guidance_embeds"):
        why = "FLUX without guidance_embeds is the schnell model"
    else:
        return
    warnings.warn(
        f"{why}: such networks are trained to jump to the data in one or a few steps, not to estimate its mean, so "
        "that more steps or a solver of higher order make the images no better, and often worse; keep its own "
        "scheduler and its own number of steps",
        UserWarning,
        stacklevel=4,
    )
