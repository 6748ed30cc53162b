"""Which family a checkpoint belongs to, from what it says itself.

Each family has one adapter, a module with

* `NAMES`, what `format=` may call it;
* `DECLARES`, what the caller may declare to it beside path, prediction, time, data_range and transform;
* `recognise(source, said, asked)`, its `Finding` or None. It reads and runs nothing but what `flowsolve.adapters.files`
  allows.

All are asked and the most confident answers; below `THRESHOLD`, or where two are equally sure, nothing is guessed: the
finding lists what to declare. A declared format is taken at its word, unless the files contradict it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from flowsolve.adapters import (
    dit,
    edm,
    exported,
    guided_diffusion,
    k_diffusion,
    plain,
    score_sde,
    single_file,
    velocity,
)
from flowsolve.adapters.diffusers import directory
from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import THRESHOLD, Finding

__all__ = ["ADAPTERS", "FORMATS", "inspect"]

ADAPTERS: tuple[ModuleType, ...] = (
    directory,
    edm,
    k_diffusion,
    score_sde,
    guided_diffusion,
    dit,
    velocity,
    exported,
    single_file,
    plain,
)
FORMATS = tuple(name for adapter in ADAPTERS for name in adapter.NAMES)
GENERAL = ("path", "prediction", "time", "data_range", "transform")


def inspect(source: Any, *, format: str | None = None, trust_pickle: bool = False, **declared: Any) -> Finding:
    """What a checkpoint says of itself, and what it leaves out.

    Args:
        source: a directory or file on this machine, or a pipeline, module or callable in memory.
        format: the family it belongs to, where it does not say so itself; one of `FORMATS`.
        trust_pickle: allow code that is in the file to run, with your rights.
        **declared: what the checkpoint does not say; see `flowsolve.adapters.load`.

    Returns:
        A `Finding`, which need not be complete: `finding.ready` says whether it can be loaded, `finding.missing` what
        to declare.

    Raises:
        FileNotFoundError: no such path, or a file is missing in it.
        ValueError: a broken or mismatched file, an unknown format, or something that is not supported.
        TypeError: something declared that this format does not take.
    """
    if format is not None:
        plainly = {name.replace("_", "-"): name for name in FORMATS}
        if format.lower().replace("_", "-") not in plainly:
            raise ValueError(f"format = {format!r}; expected one of {', '.join(FORMATS)}")
        format = plainly[format.lower().replace("_", "-")]
    known = {name for adapter in ADAPTERS for name in (*GENERAL, *adapter.DECLARES)}
    if unknown := [k for k in declared if k not in known]:
        raise TypeError(f"no adapter takes {', '.join(unknown)}; what can be declared is {', '.join(sorted(known))}")
    declared = {k: v for k, v in declared.items() if v is not None}
    looked = Source.of(source, trust_pickle=trust_pickle)
    said = {**declared, "trust_pickle": trust_pickle, "format": format}
    found = [
        (a, f) for a in ADAPTERS if format is None or format in a.NAMES for f in [_ask(a, looked, said, format)] if f
    ]
    if not found:
        if format is not None and not trust_pickle:
            looked.require_trust()
        return _nothing(looked, format)
    adapter, finding = _best(found)
    _check(adapter, finding, declared)
    finding = finding.declare(declared)
    closed = looked.unsafe and looked.content is None and not trust_pickle
    if closed and not any(m.startswith("trust_pickle=") for m in finding.missing):
        finding = replace(finding, missing=(*finding.missing, _trust(looked)))
    return finding


def _ask(adapter: ModuleType, source: Source, said: Mapping[str, Any], format: str | None) -> Finding | None:
    finding: Finding | None = adapter.recognise(source, said, format is not None)
    if finding is None or format is None:
        return finding
    return replace(finding, confidence=1.0, evidence=(*finding.evidence, f"format= declared: {format}"))


def _best(found: list[tuple[ModuleType, Finding]]) -> tuple[ModuleType, Finding]:
    specific = [f for f in found if f[0] is not plain] or found
    specific = sorted(specific, key=lambda f: f[1].confidence, reverse=True)
    adapter, finding = specific[0]
    if finding.confidence < THRESHOLD:
        for other, fallback in found:
            if other is plain and fallback.ready:
                return other, fallback
    if len(specific) > 1 and specific[1][1].confidence == finding.confidence:
        names = [f.format for _, f in specific if f.confidence == finding.confidence]
        lacking = f"format={' or '.join(map(repr, names))} (it could be either)"
        return adapter, replace(finding, confidence=min(finding.confidence, 0.5), missing=(lacking, *finding.missing))
    return adapter, finding


def _check(adapter: ModuleType, finding: Finding, declared: Mapping[str, Any]) -> None:
    takes = (*GENERAL, *adapter.DECLARES)
    if strange := [k for k in declared if k not in takes]:
        raise TypeError(f"{finding.format} takes no {', '.join(strange)}; it takes {', '.join(takes)}")


def _trust(source: Source) -> str:
    named = ", ".join(source.unsafe[:3])
    return f"trust_pickle=True (it imports {named}: reading it runs code that is in the file, with your rights)"


def _nothing(source: Source, format: str | None) -> Finding:
    """A finding that recognises nothing, with what was seen."""
    seen = []
    if source.kind == "object":
        seen.append(f"an object of class {type(source.given).__module__}.{type(source.given).__name__}")
    else:
        kinds = {"torch": "a torch archive", "export": "a torch.export archive", "safetensors": "a safetensors file"}
        seen.append(kinds.get(source.kind, f"a {source.kind}"))
    if source.unsafe:
        seen.append(f"a pickle that imports {', '.join(source.unsafe[:3])}")
    if source.tensors:
        seen.append(f"{len(source.tensors)} tensors: {', '.join(list(source.tensors)[:3])}, …")
    if format is not None:
        raise ValueError(f"this is no {format} checkpoint: {'; '.join(seen)}")
    missing = ["format= (one of " + ", ".join(FORMATS) + ")", "or path=, prediction= and time="]
    if source.unsafe:
        missing.append(_trust(source))
    elif source.kind in ("torch", "safetensors"):
        missing.append("net= (the network that the weights belong to)")
    return Finding(source.title, evidence=tuple(seen), missing=tuple(missing))
