"""What was found out about a checkpoint: its conventions, how sure that is, and what is still to be said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flowsolve.flow import Flow
from flowsolve.paths import Path
from flowsolve.predictions import Prediction, resolve
from flowsolve.transforms import Latent, Range, Transform

__all__ = ["THRESHOLD", "Finding", "Unrecognised"]

THRESHOLD = 0.8
"""The confidence below which a checkpoint is not loaded unless its format is declared."""

Network = Callable[[torch.device | str | None, torch.dtype | None], Callable[..., Any]]


class Unrecognised(ValueError):
    """The checkpoint does not say enough of itself, or is of a kind that no ODE solver can sample.

    Attributes:
        finding: what was found out.
    """

    def __init__(self, message: str, finding: Finding) -> None:
        super().__init__(message)
        self.finding = finding


@dataclass(frozen=True)
class Finding:
    """What a checkpoint says of itself.

    Attributes:
        source: what was looked at, in words.
        format: the family of checkpoints it belongs to, or "unknown".
        confidence: 0 … 1; 1 where the files say it in so many words.
        evidence: what it was concluded from, one line each.
        path: the path it was trained on.
        prediction: what its network outputs.
        time: the clock its network reads, as `Flow` takes it.
        clock: the same in words.
        transform: how the data become its states: the range that pixels were mapped to, with their levels where these
            are known, or the scale and shift of latents; None where nothing says so.
        parameters: how many numbers the network has.
        missing: what has to be declared before it can be loaded, one line each.
        refusal: why it cannot be sampled at all.
        network: (device, dtype) → the network, called once by `flow`.
    """

    source: str
    format: str = "unknown"
    confidence: float = 0.0
    evidence: tuple[str, ...] = ()
    path: Path | None = None
    prediction: Prediction | None = None
    time: str | Callable[[Any], Any] | None = None
    clock: str = ""
    transform: Transform | Latent | None = None
    parameters: int | None = None
    missing: tuple[str, ...] = ()
    refusal: str | None = None
    network: Network | None = field(default=None, repr=False, compare=False)

    @property
    def ready(self) -> bool:
        """Whether `flow` would give a flow."""
        return self.confidence >= THRESHOLD and not self.missing and self.refusal is None

    @property
    def data_range(self) -> tuple[float, float] | None:
        """What the full range of pixels was mapped to; None for latents or where nothing says so."""
        return self.transform.ends() if isinstance(self.transform, Transform) else None

    @property
    def levels(self) -> int | None:
        """How many levels the pixels have, where that is known."""
        return self.transform.levels if isinstance(self.transform, Transform) else None

    @property
    def latent_scale(self) -> float | Sequence[float] | None:
        """The network's latents are (encoded − latent_shift) · latent_scale; one number, or one a channel."""
        return self.transform.scale if isinstance(self.transform, Latent) else None

    @property
    def latent_shift(self) -> float | Sequence[float] | None:
        """See latent_scale; None for none."""
        return self.transform.shift or None if isinstance(self.transform, Latent) else None

    @property
    def log_snr(self) -> tuple[float, float] | None:
        """λ at the noise end and at the last time that the network was trained on."""
        if self.path is None:
            return None
        return self.path.log_snr(self.path.window[0]), self.path.log_snr(self.path.window[1])

    @property
    def native(self) -> tuple[float, float] | None:
        """The network's time at the same two ends."""
        if self.path is None or self.time is None:
            return None
        clock = (
            {"flow": lambda t: t, "native": self.path.native_time}.get(self.time)
            if isinstance(self.time, str)
            else self.time
        )
        if clock is None:
            return None
        return float(clock(self.path.window[0])), float(clock(self.path.window[1]))

    def declare(self, said: Mapping[str, Any]) -> Finding:
        """This finding with what the caller says in place of what was found.

        Raises:
            TypeError: path is not a Path, or transform no transform.
            ValueError: an unknown prediction, or a data_range that is none.
        """
        if said.get("data_range") is not None and said.get("transform") is not None:
            raise TypeError("data_range= and transform= say the same; declare one")
        changes: dict[str, Any] = {}
        evidence, missing = list(self.evidence), list(self.missing)
        for name in ("path", "prediction", "time", "data_range", "transform"):
            value = said.get(name)
            if value is None:
                continue
            found = getattr(self, name)
            if name == "prediction":
                value = resolve(value)
            if name == "path" and not isinstance(value, Path):
                raise TypeError(f"path is {value!r}; expected a flowsolve.paths object such as CondOT() or VP()")
            if name == "time":
                changes["clock"] = f"{value} time" if isinstance(value, str) else "a declared function of flow time"
            instead = f" instead of {_named(found)}" if found is not None and found != value else ""
            if name == "transform" and not isinstance(value, Transform | Latent):
                raise TypeError(f"transform is {value!r}; expected a flowsolve.transforms object such as Range(-1, 1)")
            if name == "data_range":
                changes["transform"] = Range(*_pair(value), levels=self.levels)
            else:
                changes[name] = value
            evidence.append(f"{name}= declared: {_named(value)}{instead}")
            missing = [m for m in missing if not m.startswith(f"{name}=")]
        told = replace(self, evidence=tuple(evidence), missing=tuple(missing), **changes)
        # what nothing says is asked for, whether or not the adapter thought of it
        for name, what in (("path", "a path"), ("prediction", "what it outputs"), ("time", "the clock it reads")):
            if getattr(told, name) is None and told.refusal is None and not told.missing:
                told = replace(told, missing=(f"{name}= ({what})",))
        return told

    def flow(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Flow:
        """The checkpoint as a `Flow`.

        Raises:
            Unrecognised: it cannot be loaded as it stands; the message says what to declare.
        """
        if self.refusal is not None:
            raise Unrecognised(f"{self.source} ({self.format}) is refused: {self.refusal}", self)
        if not self.ready or self.network is None:
            raise Unrecognised(self._lacks(), self)
        assert self.path is not None
        assert self.prediction is not None
        assert self.time is not None
        net = self.network(device, dtype)
        own = None if isinstance(net, nn.Module) else dtype
        _sound(net)
        return Flow(net, self.path, self.prediction, time=self.time, dtype=own, transform=self.transform)

    def _lacks(self) -> str:
        seen = "; ".join(self.evidence) or "nothing that tells its format"
        if self.format == "unknown":
            head = f"{self.source} is not recognised"
        else:
            head = f"{self.source} looks like {self.format} (confidence {self.confidence:.2f})"
        wanted = list(self.missing)
        if self.confidence < THRESHOLD and not any(m.startswith("format=") for m in wanted):
            wanted.insert(0, f"format={self.format!r}, if that is what it is")
        return f"{head}. Seen: {seen}. To load it, declare {', and '.join(wanted)}"

    def summary(self) -> dict[str, Any]:
        """The finding as plain values, for JSON: infinities of λ (±708.4) become None."""

        def ends(pair: tuple[float, float] | None) -> list[float | None] | None:
            return None if pair is None else [None if abs(v) > 700.0 else v for v in pair]

        return {
            "source": self.source,
            "format": self.format,
            "confidence": self.confidence,
            "evidence": list(self.evidence),
            "path": None if self.path is None else repr(self.path),
            "log_snr": ends(self.log_snr),
            "prediction": None if self.prediction is None else self.prediction.name,
            "clock": self.clock or None,
            "native_time": None if self.native is None else [v if math.isfinite(v) else None for v in self.native],
            "data_range": _plain(self.data_range),
            "levels": self.levels,
            "latent_scale": _plain(self.latent_scale),
            "latent_shift": _plain(self.latent_shift),
            "parameters": self.parameters,
            "missing": list(self.missing),
            "refusal": self.refusal,
            "loads": self.ready,
        }


def _pair(ends: Any) -> tuple[float, float]:
    try:
        low, high = ends
        return float(low), float(high)
    except (TypeError, ValueError):
        raise ValueError(f"data_range = {ends!r}; expected two numbers (low, high)") from None


def _named(value: Any) -> str:
    return value.name if isinstance(value, Prediction) else str(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sound(net: Any) -> None:
    """Raise ValueError for weights that are not numbers: a training that diverged, or a file that is damaged."""
    if isinstance(net, nn.Module):
        for name, weight in net.named_parameters():
            if weight.is_floating_point() and not weight.is_meta and bool(weight.detach().isnan().any()):
                raise ValueError(
                    f"the weight {name!r} of shape {tuple(weight.shape)} holds NaN, so every sample would; the "
                    "checkpoint is damaged, or its training had diverged"
                )
