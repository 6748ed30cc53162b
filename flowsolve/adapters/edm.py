r"""EDM checkpoints (Karras et al. 2022): pickled networks, and the same objects in memory.

The saved object is the denoiser itself, $D(x; \sigma) \approx z$ at $x = z + \sigma\varepsilon$, whatever
preconditioning is inside (their Table 1: VP, VE, iDDPM, EDM). So the path is `EDM`, the prediction "data", the
network's time $\sigma$, and `class_labels` a condition. The noise levels it may be asked for are its own `sigma_min`
and `sigma_max` within the paper's 0.002 … 80; a VP or VE network keeps its own. A network that knows a table of levels
only (iDDPM) rounds σ to it by itself.

The files are pickles that carry their own source code: they are read with `trust_pickle=True` only. Before that,
their opcodes say which class they hold.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import place
from flowsolve.paths import EDM
from flowsolve.predictions import PREDICTIONS
from flowsolve.transforms import Range

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("edm",)
DECLARES = ("sigma_min", "sigma_max", "rho")
CLASSES = ("VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond", "Precond")
LOWEST, HIGHEST = 0.002, 80.0


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """A denoiser D(x, σ) with EDM's attributes, or a pickle of one."""
    if source.kind == "pickle":
        held = [c for c in CLASSES if c in source.words]
        persistent = any("persistence" in n for n in source.names)
        if not (asked or (held and (persistent or any(n.rpartition(".")[2] in CLASSES for n in source.names)))):
            return None
        what = f"the pickle's opcodes name {held[0]}" if held else "a pickle"
        if not said.get("trust_pickle"):
            return Finding(
                str(source.given), "edm", 0.95 if held else 0.5, (what,), prediction=PREDICTIONS["data"],
                time="native", clock="σ",
                missing=("trust_pickle=True (reading it runs code that is in the file, with your rights)",),
            )  # fmt: skip
        return _object(_unpickled(source), str(source.given), said, [what])
    if source.kind != "object" or not isinstance(source.given, nn.Module):
        return None
    if asked or (type(source.given).__name__ in CLASSES and hasattr(source.given, "round_sigma")):
        return _object(source.given, f"a {type(source.given).__name__}", said, [])
    return None


def _unpickled(source: Source) -> Any:
    assert source.file is not None
    try:
        with source.file.open("rb") as stream:
            content = pickle.load(stream)  # noqa: S301 the caller said trust_pickle=True
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source.file} needs the module {error.name!r} of the repository that wrote it; put that on sys.path"
        ) from error
    if isinstance(content, Mapping):
        if "ema" not in content:
            raise ValueError(f"{source.file} holds {', '.join(map(str, content))}; expected an entry 'ema'")
        content = content["ema"]
    if not isinstance(content, nn.Module):
        raise ValueError(f"{source.file} holds a {type(content).__name__}; expected a network")
    return content


def _object(net: nn.Module, what: str, said: Mapping[str, Any], evidence: list[str]) -> Finding:
    name = type(net).__name__
    low, high = (getattr(net, k, None) for k in ("sigma_min", "sigma_max"))
    evidence.append(
        f"class {name}, sigma_min = {low}, sigma_max = {high}, sigma_data = {getattr(net, 'sigma_data', None)}"
    )
    own = re.match(r"(VP|VE|iDDPM)", name) is not None
    low = said.get("sigma_min") or (float(low) if own and low else max(LOWEST, float(low or 0.0)))
    top = math.inf if high is None else float(high)
    high = said.get("sigma_max") or (top if own and math.isfinite(top) else min(HIGHEST, top))
    labels = getattr(net, "label_dim", 0)
    if labels:
        evidence.append(f"label_dim = {labels}: conditioned on class_labels")
    return Finding(
        what,
        "edm",
        1.0 if hasattr(net, "round_sigma") else 0.9,
        tuple(evidence),
        EDM(float(low), float(high), float(said.get("rho", 7.0))),
        PREDICTIONS["data"],
        "native",
        "σ",
        transform=Range(-1.0, 1.0),
        parameters=sum(p.numel() for p in net.parameters()),
        network=lambda device, dtype: place(net, device, dtype),
    )
