"""What pipelines decide by the number of the turn of their loop, which a solver that asks as it likes does not keep.

A ControlNet that is left out after half of the steps, guidance of skipped layers between two of them: then the network
is no function of (x, t). Pipelines have such decisions under these names, with a value that leaves them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["BY_TURN", "require_no_turns", "without_turns"]

BY_TURN: Mapping[str, tuple[float, str]] = {
    "control_guidance_start": (0.0, ""),
    "control_guidance_end": (1.0, ""),
    "adapter_conditioning_factor": (1.0, ""),
    "cfg_trunc_ratio": (1.0, ""),
    "cfg_truncation": (1.0, ""),
    "skip_layer_guidance_start": (0.0, "skip_guidance_layers"),
    "skip_layer_guidance_stop": (1.0, "skip_guidance_layers"),
    "gligen_scheduled_sampling_beta": (1.0, "gligen_phrases"),
}
"""An argument of pipelines, its value without effect by turn, and the argument without which it has none at all."""


def require_no_turns(pipe: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a call in which the network depends on the number of the turn."""
    try:
        bound = inspect.signature(pipe.__call__).bind_partial(*args, **kwargs)
    except TypeError:  # the call itself will say what is wrong with it
        return
    bound.apply_defaults()
    for name, (neutral, needs) in BY_TURN.items():
        value = bound.arguments.get(name)
        if value is None or (needs and not bound.arguments.get(needs)):
            continue
        if any(v != neutral for v in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(
                f"{name} = {value!r} makes {type(pipe).__name__} decide by the number of the turn of its loop, so that "
                f"its network is no function of (x, t); capture it with {name}={neutral} (for a part of the interval "
                "capture both kinds, and solve one after the other), or use a Scheduler inside the pipeline"
            )


BEYOND = ("cfg_trunc_ratio", "cfg_truncation")
"""Arguments whose neutral value is neutral until the pipeline's own last turn, and a larger one always."""


def without_turns(pipe: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call with which nothing is decided by a turn beyond the pipeline's own last.

    Lumina 2 leaves guidance out where (i + 1)/N > `cfg_trunc_ratio`, so at the neutral value 1 from turn N on; Z-Image
    has a table of N entries to compare with `cfg_truncation`, which it does not make for values above 1.
    """
    names = inspect.signature(pipe.__call__).parameters
    return {**kwargs, **{name: float("inf") for name in BEYOND if name in names}}
