"""Hugging Face diffusers: its checkpoints read as flows."""

from flowsolve.adapters.diffusers.convention import (
    FLOW,
    TABLE_SCHEDULERS,
    Convention,
    alphas_cumprod,
    as_flow,
    completed,
    convention,
)
from flowsolve.adapters.diffusers.directory import load
from flowsolve.adapters.diffusers.weights import save

__all__ = [
    "FLOW",
    "TABLE_SCHEDULERS",
    "Convention",
    "alphas_cumprod",
    "as_flow",
    "completed",
    "convention",
    "load",
    "save",
]
