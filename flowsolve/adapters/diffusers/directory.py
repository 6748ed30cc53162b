"""diffusers checkpoints: pipelines and single models, in a directory or in memory.

Nothing of a checkpoint's own code is run, and nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowsolve.adapters.diffusers.convention import DISTILLED, JUMPS, class_name, completed, convention
from flowsolve.adapters.diffusers.models import MODELS, check_channels, wrap
from flowsolve.adapters.diffusers.options import foreign
from flowsolve.adapters.diffusers.refusals import MARKS, accompanied, contradicted
from flowsolve.adapters.diffusers.weights import built, count
from flowsolve.adapters.files import Source, read_json, safetensors_header
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.lora import REFUSAL as LORA
from flowsolve.adapters.lora import is_lora
from flowsolve.adapters.networks import place, require_unscaled
from flowsolve.flow import Flow
from flowsolve.problems import digits
from flowsolve.transforms import Latent, Range

__all__ = ["DECLARES", "NAMES", "load", "recognise"]

NAMES = ("diffusers",)
DECLARES = ("scheduler", "distilled", "variant")
PARTS = ("unet", "transformer", "prior", "decoder")
SCALE = 0.18215
"""The scaling_factor of an AutoencoderKL whose configuration is older than that entry, as its class has it."""
UNSHIFTED = (
    "a {} is told the noise level before the shift of its pipeline, which depends on the size of the image, so that no "
    "configuration states its clock. Open it as a pipeline and use flowsolve.adapters.diffusers.capture(pipe, prompt, "
    "height=..., width=...), or declare time= for one size"
)
TRANSFORMS = {"digits": digits.TRANSFORM}
"""Data sets of `flowsolve train` whose records may lack their number of levels."""
MOST_LEVELS = 2**16


def load(source: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Flow:
    """A diffusers directory as a `Flow` in evaluation mode; see `flowsolve.adapters.load`."""
    from flowsolve import adapters

    return adapters.load(source, format="diffusers", device=device, dtype=dtype)


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """A diffusers directory, pipeline or model, or None."""
    if source.kind == "directory":
        assert source.file is not None
        return _directory(source.file, said)
    ancestors = [c.__name__ for c in type(source.given).__mro__] if source.kind == "object" else []
    if "DiffusionPipeline" in ancestors:
        return _pipeline(source.given, said)
    if "ModelMixin" in ancestors or (asked and isinstance(source.given, nn.Module)):
        return _model(source.given, said)
    return None


def _directory(root: Path, said: Mapping[str, Any]) -> Finding:
    parts = [p for p in PARTS if (root / p / "config.json").is_file()]
    alone = read_json(root / "config.json") if not parts and (root / "config.json").is_file() else {}
    if alone.get("_class_name") in MODELS:
        beside = root.parent / "scheduler" / "scheduler_config.json"
        if beside.is_file() and not any(k in said for k in ("scheduler", "path")):
            raise ValueError(f"{str(root)!r} is one part of a checkpoint; pass its parent, {str(root.parent)!r}")
        evidence = [f"{root.name}/config.json: {alone['_class_name']}"]
        # Saved by itself, a scheduler's configuration lies beside the network's, in scheduler/, or one folder up.
        places = (root, root / "scheduler", root.parent)
        saved = next((f for p in places if (f := p / "scheduler_config.json").is_file()), None)
        return _finding(
            str(root), root, alone, None if saved is None else read_json(saved), said, evidence, None, [root.name]
        )
    if (root / "scheduler_config.json").is_file() and (root.parent / "unet").is_dir():
        raise ValueError(f"{str(root)!r} is one part of a checkpoint; pass its parent, {str(root.parent)!r}")
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    if not parts:
        held = ", ".join(sorted(p.name for p in root.iterdir())) or "nothing"
        for file in sorted(root.glob("*.safetensors")):
            if is_lora(safetensors_header(file)[1]):
                raise ValueError(f"{file}: {LORA}")
        raise FileNotFoundError(
            f"{root / 'unet' / 'config.json'} is missing; a diffusers checkpoint has unet/config.json or "
            f"transformer/config.json, and scheduler/scheduler_config.json; {str(root)!r} holds {held}"
        )
    if "scheduler" not in said and "path" not in said and not (root / "scheduler/scheduler_config.json").is_file():
        held = ", ".join(sorted(p.name for p in root.iterdir()))
        raise FileNotFoundError(
            f"{root / 'scheduler' / 'scheduler_config.json'} is missing; {str(root)!r} holds {held}. Declare "
            "scheduler= (a scheduler or its configuration), or path=, prediction= and time="
        )
    part = parts[0]
    config = read_json(root / part / "config.json")
    saved = root / "scheduler/scheduler_config.json"
    scheduler = read_json(saved) if saved.is_file() else None
    evidence = [f"{part}/config.json: {config.get('_class_name')}"]
    if index:
        evidence.insert(0, f"model_index.json: {_named(index.get('_class_name'))}")
    library = (index.get(part) or [None])[0] if isinstance(index.get(part), list) else None
    if library not in (None, "diffusers"):
        evidence.append(f"{part}: a class of the module {library}, taken to be that of diffusers by its name")
    vae = read_json(root / "vae/config.json") if (root / "vae/config.json").is_file() else None
    names = [str(c.get("_name_or_path", "")) for c in (index, config, scheduler or {})]
    names += [root.name, *(p.name for p in root.parents if p.name.startswith("models--"))]  # the hub's cache
    more = [k for k, v in index.items() if k != part and re.match(r"(unet|transformer)", k) and any(v)] or parts[1:]
    recorded, more_evidence = _recorded(root)
    finding = _finding(str(root), root / part, config, scheduler, said, [*evidence, *more_evidence], vae, names)
    if recorded is not None and vae is None:
        finding = replace(finding, transform=recorded)
    if index.get("is_distilled") and finding.refusal is None and said.get("distilled") is not False:
        finding = replace(
            finding, refusal=f"its model_index.json says is_distilled: {JUMPS}. If not, declare distilled=False"
        )
    pipeline, named = (
        _named(index.get("_class_name")),
        [k for k, v in index.items() if not isinstance(v, list) or any(v)],
    )
    return _judged(finding, pipeline, more, accompanied(pipeline, named, part))


def _named(kind: Any) -> str:
    """A pipeline's class, which a checkpoint with code of its own names as [module, class]."""
    return str(kind[-1]) if isinstance(kind, list) and kind else str(kind)


def _judged(finding: Finding, pipeline: str, more: list[str], also: str | None) -> Finding:
    if finding.refusal is None and also is not None:
        return replace(finding, refusal=also)
    if finding.refusal is None and ("Consistency" in pipeline):
        return replace(finding, refusal=f"{pipeline}: {JUMPS}")
    if finding.refusal is None and more:
        return replace(
            finding,
            refusal=f"it has more than one denoiser (also {', '.join(more)}), each for a part of the noise levels or "
            "a stage of its own; load one of them by its own directory with scheduler= declared",
        )
    return finding


def _pipeline(pipeline: Any, said: Mapping[str, Any]) -> Finding:
    part = next((p for p in PARTS if isinstance(getattr(pipeline, p, None), nn.Module)), None)
    if part is None:
        raise ValueError(f"the pipeline {type(pipeline).__name__} has neither unet nor transformer")
    model, vae = getattr(pipeline, part), getattr(pipeline, "vae", None)
    evidence = [f"a {type(pipeline).__name__} with a {type(model).__name__}"]
    names = [str(pipeline.config.get("_name_or_path", "")), str(model.config.get("_name_or_path", ""))]
    config = None if vae is None else dict(vae.config)
    more = [k for k in pipeline.components if re.match(r"(unet|transformer)_\d", k) and pipeline.components[k]]
    finding = _finding(
        f"a {type(pipeline).__name__}", model, dict(model.config), pipeline.scheduler, said, evidence, config, names
    )
    held = [k for k, v in pipeline.components.items() if v is not None]
    return _judged(finding, type(pipeline).__name__, more, accompanied(type(pipeline).__name__, held, part))


def _model(model: nn.Module, said: Mapping[str, Any]) -> Finding:
    name = type(model).__name__
    config = getattr(model, "config", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    return _finding(f"a {name}", model, config, None, said, [f"a {name} in memory"], None)


def _finding(
    what: str,
    model: Path | nn.Module,
    config: Mapping[str, Any],
    scheduler: Any,
    said: Mapping[str, Any],
    evidence: list[str],
    vae: Mapping[str, Any] | None,
    names: list[str] | None = None,
) -> Finding:
    """The finding of a network (a directory or a module) with its configuration and a scheduler."""
    name = type(model).__name__ if isinstance(model, nn.Module) else config.get("_class_name")
    in_memory = isinstance(model, nn.Module)
    scheduler = said.get("scheduler", scheduler)
    if isinstance(scheduler, str | Path):
        file = Path(scheduler)
        scheduler = read_json(file / "scheduler_config.json" if file.is_dir() else file)
    refusal, missing, read = None, [], None
    if name not in MODELS and (not in_memory or "ModelMixin" in [c.__name__ for c in type(model).__mro__]):
        raise ValueError(
            f"{what} holds a {name}; supported are {', '.join(MODELS)}. With its pipeline another becomes a flow by "
            "adapters.diffusers.capture(pipe, prompt), and any by fs.Flow(net, path, prediction, time=...) around a "
            "function net(x, t, **cond)"
        )
    if wrong := check_channels(str(name), config):
        raise ValueError(f"{model}: {wrong}" if not in_memory else wrong)
    told = scheduler if scheduler is None or isinstance(scheduler, Mapping) else scheduler.config
    scheduled = None if scheduler is None else class_name(scheduler)
    marks = sorted({m.group(1).lower() for n in names or () for m in MARKS.finditer(n)})
    if scheduled in DISTILLED:
        refusal = f"its scheduler is {scheduled}: {JUMPS}"
    elif config.get("time_cond_proj_dim") is not None:
        refusal = f"its network is conditioned on a guidance scale (time_cond_proj_dim, latent consistency): {JUMPS}"
    elif marks and said.get("distilled") is not False:
        refusal = f"its name says {', '.join(marks)}: {JUMPS}. If the name misleads, declare distilled=False"
    elif name == "FluxTransformer2DModel" and not config.get("guidance_embeds") and said.get("distilled") is not False:
        refusal = f"FLUX without guidance_embeds is the schnell model: {JUMPS}. If not, declare distilled=False"
    elif name in MODELS and MODELS[str(name)].unshifted and "time" not in said:
        refusal = UNSHIFTED.format(name)
    elif wrong := contradicted(str(name), config, told):
        refusal = wrong
    elif scheduler is not None:
        read = convention(completed(scheduler))
        evidence.append(f"{scheduled}: {_options(scheduler)}")
    elif "path" not in said:
        missing = ["scheduler= (a diffusers scheduler, its configuration or its file), or path=, prediction= and time="]
    else:
        missing = [f"{k}= (what the network was trained with)" for k in ("prediction", "time") if k not in said]
    if read is not None and read.time is None:
        missing.append("time= (its scheduler does not say which time the network reads)")
    if vae is not None:
        evidence.append(f"vae/config.json: scaling_factor = {vae.get('scaling_factor', 'not stated')}")
    if config.get("out_channels") == 2 * (config.get("in_channels") or 0):
        evidence.append(f"out_channels = {config['out_channels']}, twice in_channels: a learned variance, not used")
    parameters = (
        sum(p.numel() for p in model.parameters())
        if isinstance(model, nn.Module)
        else count(model, said.get("variant"))
    )
    transform: Latent | Range | None = None
    if vae is not None:
        transform = _latent(vae)
    elif read is not None and name in ("UNet2DModel", "UNet2DConditionModel"):
        transform = Range(*read.data_range)

    overruled = "prediction" in said or "time" in said
    if read is not None and read.precondition is not None and not overruled:
        require_unscaled(said.get("path"))

    def network(device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
        net = model if isinstance(model, nn.Module) else built(model, str(name), dtype, said.get("variant"))
        net = wrap(place(net, device, dtype if in_memory else None)).eval()
        return net if read is None or overruled else read.wrap(net)

    finding = Finding(
        what,
        "diffusers",
        1.0,
        tuple(evidence),
        transform=transform,
        parameters=parameters,
        missing=tuple(missing),
        refusal=refusal,
        network=network,
    )
    if read is None:
        return finding
    return replace(finding, path=read.path, prediction=read.prediction, time=read.time, clock=read.clock)


def _options(scheduler: Any) -> str:
    """The options of a scheduler that say something of training."""
    config = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
    config = {k: v for k, v in config.items() if k not in foreign(config, str(class_name(scheduler)))}
    keys = ("num_train_timesteps", "beta_schedule", "prediction_type", "rescale_betas_zero_snr", "use_flow_sigmas")
    edm = ("sigma_min", "sigma_max", "sigma_data", "timestep_type", "invert_sigmas")
    told = [f"{k} = {config[k]}" for k in (*keys, *edm) if config.get(k) not in (None, False)]
    if config.get("trained_betas") is not None:
        told.append("trained_betas")
    if config.get("predict_epsilon") is False:
        told.append("predict_epsilon = False, that is, data")
    return ", ".join(told) or "its defaults"


def _latent(vae: Mapping[str, Any]) -> Latent | None:
    """The network's latents are (encoded − shift) · scale, a number or one a channel."""
    default = SCALE if vae.get("_class_name") == "AutoencoderKL" else None
    scale, shift = vae.get("scaling_factor", default), vae.get("shift_factor")
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if mean is not None and std is not None:
        return Latent(tuple((1.0 if scale is None else scale) / s for s in std), tuple(mean))
    return None if scale is None else Latent(scale, shift or 0.0)


def _recorded(root: Path) -> tuple[Range | None, list[str]]:
    """What the data of a checkpoint of `flowsolve train` are, by its record, and the evidence."""
    file = root / "training.json"
    try:
        record = read_json(file) if file.is_file() else {}
    except ValueError:  # of another program
        return None, []
    recipe, versions = record.get("recipe"), record.get("versions")
    ours = isinstance(recipe, Mapping) and isinstance(versions, Mapping) and "flowsolve" in versions
    name = recipe.get("data") if ours and isinstance(recipe, Mapping) else None
    if not isinstance(name, str):
        return None, []
    levels = recipe.get("levels") if isinstance(recipe, Mapping) else None
    if isinstance(levels, int) and 2 <= levels <= MOST_LEVELS:
        transform = Range(-1.0, 1.0, levels=levels)
    elif name in TRANSFORMS:
        transform = TRANSFORMS[name]
    else:
        return None, []
    known = f" on {name}" if name in TRANSFORMS else ""  # any other is a path of who trained it
    return transform, [f"training.json: flowsolve train{known}, {transform.levels} levels"]
