"""Hugging Face diffusers: its checkpoints read as flows."""

from flowsolve.adapters.diffusers.convention import FLOW, TABLE_SCHEDULERS, alphas_cumprod, as_flow, load, save

__all__ = ["FLOW", "TABLE_SCHEDULERS", "alphas_cumprod", "as_flow", "load", "save"]
