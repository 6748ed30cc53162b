"""The weights of a diffusers model directory: found, looked at, built into a network, and written.

The network is built by diffusers itself from its configuration, with weights from safetensors, or from `.bin` files
that hold tensors and nothing else.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from flowsolve._optional import require
from flowsolve.adapters.files import Source, UnsafeFile, read_json, safetensors_header

__all__ = ["built", "count", "save", "shards"]

STEM = "diffusion_pytorch_model"
MAX_LAYERS = 1000
"""Of a block or a network; the deepest have some sixty."""
MARGIN = 10**7
"""Numbers that a network may have beyond twice those of its files, and be told by diffusers what is missing."""


def shards(directory: Path, variant: str | None = None) -> list[Path]:
    """The weight files that diffusers would read, safetensors if there are any; an index may only name its neighbours.

    Args:
        directory: of one model.
        variant: such as "fp16" in diffusion_pytorch_model.fp16.safetensors; by default the plain files, or the only
            variant that there is.

    Raises:
        FileNotFoundError: there are none, or the index names one that is missing.
        ValueError: the index reaches out of the directory.
    """
    for suffix in ("safetensors", "bin"):
        indices = _chosen(directory.glob(f"{STEM}.{suffix}.index*.json"), variant)
        if not indices:
            if found := _chosen(directory.glob(f"{STEM}*.{suffix}"), variant):
                return found[:1]
            continue
        table = read_json(indices[0]).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise ValueError(f"{indices[0]} has no weight_map from tensor names to file names")
        for name in sorted(set(table.values())):
            if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", "..") or ":" in name:
                raise ValueError(
                    f"{indices[0]} names {name!r}, which is not a plain file name beside it: an index may not reach "
                    "out of its directory"
                )
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{indices[0]} names {name!r}, which is missing in {directory}")
        return [directory / name for name in sorted(set(table.values()))]
    held = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
    kind = f"{STEM}*" if variant is None else f"{STEM}.{variant}*"
    raise FileNotFoundError(f"no weights ({kind}.safetensors or .bin) in {directory}, which holds {held}")


def _chosen(files: Iterable[Path], variant: str | None) -> list[Path]:
    """The files of a variant; without one the plain files, or else those of the first variant."""
    found = sorted(files)
    if variant is not None:
        return [f for f in found if _variant(f) == variant]
    return [f for f in found if _variant(f) is None] or found


def _variant(file: Path) -> str | None:
    """The variant in a name such as stem.fp16.safetensors, stem.fp16-00001-of-00002.bin, stem.bin.index.fp16.json."""
    name = re.sub(r"-\d+-of-\d+", "", file.name)
    match = re.fullmatch(rf"{STEM}(?:\.(\w+))?\.(?:safetensors|bin)|{STEM}\.\w+\.index(?:\.(\w+))?\.json", name)
    return None if match is None else match.group(1) or match.group(2)


def count(directory: Path, variant: str | None = None) -> int:
    """The parameters in the weight files, each of which is looked at: headers of safetensors, pickles by their opcodes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a broken file, or (`UnsafeFile`) one that would run code; the message names it.
    """
    total = 0
    for file in shards(directory, variant):
        if file.suffix == ".safetensors":
            total += sum(math.prod(shape) for shape in safetensors_header(file)[1].values())
            continue
        looked = Source.of(file)
        if looked.unsafe or looked.kind != "torch":
            raise UnsafeFile(
                f"{file} is a pickle that imports {', '.join(looked.unsafe[:4]) or 'objects'}: it may execute code "
                "when read, and weights have no need of that; convert it to safetensors"
            )
        total += sum(math.prod(shape) for shape in looked.tensors.values())
    return total


def built(directory: Path, name: str, dtype: torch.dtype | None, variant: str | None) -> nn.Module:
    """The network from its directory, every file looked at first and every weight accounted for."""
    held = count(directory, variant)
    files = shards(directory, variant)
    library = require("diffusers", "diffusers", "loading a diffusers checkpoint")
    _require_held(getattr(library, name), directory / "config.json", held)
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    if (marked := _variant(files[0])) is not None:
        options["variant"] = marked
    try:
        net, told = getattr(library, name).from_pretrained(
            directory,
            use_safetensors=files[0].suffix == ".safetensors",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"the weights of {files[0]} do not belong to the configuration of {directory / 'config.json'}: "
            f"{' '.join(reason)[:300]}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if told.get(what):
            first = ", ".join(str(k) for k in list(told[what])[:3])
            raise ValueError(
                f"the weights of {files[0]} do not belong to the configuration of {directory / 'config.json'}: "
                f"{len(told[what])} {what.replace('_', ' ')} ({first})"
            )
    return net  # type: ignore[no-any-return]


def _require_held(kind: Any, file: Path, held: int) -> None:
    """Raise ValueError for a configuration of a much larger network than the weight files hold, before it is built.

    Its layers are made without their numbers, as diffusers does; where accelerate is missing, it is left to diffusers.
    """
    config = read_json(file)
    layers = {k: v for k, v in config.items() if "layers" in k and _most(v) > MAX_LAYERS}
    if layers:
        told = ", ".join(f"{k} = {reprlib.repr(v)}" for k, v in layers.items())
        raise ValueError(f"{file} says {told}; expected at most {MAX_LAYERS:,} layers")
    if find_spec("accelerate") is None:
        return
    try:
        with require("accelerate", "diffusers", "loading a diffusers checkpoint").init_empty_weights():
            claimed = sum(p.numel() for p in kind.from_config(config).parameters())
    except Exception:  # diffusers will say what is wrong with it
        return
    if claimed > 2 * held + MARGIN:
        raise ValueError(
            f"the weights beside {file} do not belong to that configuration: it describes a {kind.__name__} of "
            f"{claimed:,} numbers, and they hold {held:,}"
        )


def _most(value: Any) -> float:
    """The largest number in a value of a configuration."""
    if isinstance(value, list | tuple):
        return max(map(_most, value), default=0)
    return value if isinstance(value, int | float) else 0


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
