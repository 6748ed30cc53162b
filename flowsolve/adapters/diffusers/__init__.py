"""Hugging Face diffusers: its checkpoints read as flows, and our solvers as its schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowsolve.adapters.diffusers.convention import (
    FLOW,
    TABLE_SCHEDULERS,
    Convention,
    as_flow,
    completed,
    convention,
)
from flowsolve.adapters.diffusers.directory import load
from flowsolve.adapters.diffusers.tables import alphas_cumprod
from flowsolve.adapters.diffusers.weights import save

if TYPE_CHECKING:
    from flowsolve.adapters.diffusers.pipeline import Captured, capture
    from flowsolve.adapters.diffusers.scheduler import Scheduler

__all__ = [
    "FLOW", "TABLE_SCHEDULERS", "Captured", "Convention", "Scheduler", "alphas_cumprod", "as_flow", "capture",
    "completed", "convention", "load", "save",
]  # fmt: skip

LAZY = {"Scheduler": "scheduler", "Captured": "pipeline", "capture": "pipeline"}
"""Names from modules that import diffusers itself."""


def __getattr__(name: str) -> Any:
    if name in LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
