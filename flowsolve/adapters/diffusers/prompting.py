"""The conditions that a pipeline makes of a prompt: what it hands to its network beside the state and the time.

Every pipeline has its own text encoders, templates, masks, size embeddings and rotary tables. So the pipeline of the
directory is called with the prompt, without guidance by a second pass, up to the first evaluation of its network; the
arguments of that evaluation, less state and time, are the conditions. No evaluation is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._optional import require
from flowsolve.adapters.diffusers.models import MODELS, Model
from flowsolve.conditioning import per_sample, shared

__all__ = ["of_prompts", "rows"]

PARTS = ("transformer", "unet", "prior", "decoder")
WITHOUT = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "ZImagePipeline": 0.0}
"""Values that leave out guidance by a second pass, by argument, or by pipeline for its guidance_scale."""


class _Reached(BaseException):
    """Ends the call at the network's first evaluation."""


def of_prompts(
    root: Path, prompts: Sequence[str], shape: Sequence[int] | None = None
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The conditions of prompts in a pipeline's directory, and the shape of a sample.

    Args:
        root: the directory, with model_index.json and all its components; nothing is downloaded.
        prompts: what to draw.
        shape: of a sample, (C, H, W); None for the pipeline's default.

    Returns:
        For each prompt the network's keyword arguments for one sample, trees of tensors (1, …) and what is no tensor;
        and the shape of a sample.

    Raises:
        ValueError: a directory that is no pipeline with one known network, or whose text encoders are missing, a
            pipeline that takes no prompt, or another shape than it can make.
    """
    if not (root / "model_index.json").is_file():
        raise ValueError(f"{root} has no model_index.json; prompts need the directory of a whole pipeline")
    diffusers: Any = require("diffusers", "diffusers", "prompts")
    pipe = diffusers.DiffusionPipeline.from_pretrained(root, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    part = next((p for p in PARTS if isinstance(getattr(pipe, p, None), nn.Module)), None)
    net: Any = None if part is None else getattr(pipe, part)
    known = MODELS.get(type(net).__name__)
    names = inspect.signature(pipe.__call__).parameters
    if known is None or "prompt" not in names:
        raise ValueError(f"{type(pipe).__name__} takes no prompt for a network that is known; give --cond, or --class")
    if "text_encoder" in pipe.components and pipe.components["text_encoder"] is None:
        raise ValueError(f"{root} was saved without its text_encoder, which prompts need; give --cond")
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    embedded = bool(net.config.get("guidance_embeds"))
    for name in ("guidance_scale", "true_cfg_scale"):
        if name in names and not (name == "guidance_scale" and embedded):
            options[name] = WITHOUT.get(type(pipe).__name__, WITHOUT[name])
    if shape is not None and "height" in names:
        factor = int(getattr(pipe, "vae_scale_factor", 1))
        options.update(height=int(shape[-2]) * factor, width=int(shape[-1]) * factor)
    found = [_one(pipe, net, known, text, options) for text in prompts]
    made = found[0][1]
    if shape is not None and tuple(shape) != made:
        raise ValueError(f"a sample of {type(pipe).__name__} at that size has shape {made}; found --shape {shape}")
    return [cond for cond, _ in found], made


def _one(pipe: Any, net: Any, model: Model, text: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(net.forward)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(dict(signature.bind(*args, **kwargs).arguments))
        raise _Reached

    hook = net.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe(prompt=text, **options)
    except _Reached:
        pass
    finally:
        hook.remove()
    cond = seen[0]
    state = cond.pop(model.x)
    state = torch.stack(list(state)).squeeze(2) if model.listed else state
    for name in (model.time, "return_dict"):
        cond.pop(name, None)
    for name in model.listed:
        cond[name] = torch.stack(list(cond[name]))
    for name in model.layered:
        cond[name] = cond[name].transpose(0, 1)
    if len(state) != 1:
        raise ValueError(f"{type(pipe).__name__} asks its network about {len(state)} states for one prompt")
    return _told(cond), tuple(state.shape[1:])


def _told(cond: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing."""
    tree = {k: _told(v) if isinstance(v, dict) else v for k, v in cond.items()}
    return {k: v for k, v in tree.items() if v is not None and not (isinstance(v, dict) and not v)}


def rows(conds: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """The conditions of n samples, whose i-th has the (i mod k)-th of k prompts, each marked with whose it is.

    Raises:
        ValueError: prompts whose conditions differ in shape.
    """
    found: dict[str, Any] = {}
    for name, value in conds[0].items():
        each = [c.get(name) for c in conds]
        if isinstance(value, dict):
            found[name] = rows([v or {} for v in each], n)
        elif isinstance(value, Tensor) and value.ndim and len(value) == 1:
            if any(not isinstance(v, Tensor) or v.shape != value.shape for v in each):
                raise ValueError(f"the prompts' {name} differ in shape; draw them one by one")
            together = torch.cat([v for v in each if v is not None])
            index = torch.arange(n, device=together.device) % len(conds)
            found[name] = per_sample(together.index_select(0, index))
        else:
            found[name] = shared(value)
    return found
