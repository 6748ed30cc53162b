"""What names the noise of a run in a pipeline (`flowsolve.noise`): generators, a seed, or the latents themselves."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["seeds"]


def seeds(sample: Tensor, generator: Any, seed: int | None) -> Any:
    """One seed, or one for each sample.

    Args:
        sample: the latents that a run begins with, shape (B, *S).
        generator: the torch.Generator that the pipeline hands to the step, or a list with one for each sample; a draw
            moves it on. None if it hands none.
        seed: the scheduler's own, where there is no generator; None for seeds made of the latents' bytes.

    Raises:
        ValueError: a list of generators of another length.
    """
    if isinstance(generator, list | tuple):
        if len(generator) == 1:
            return _drawn(generator[0])
        if len(generator) != len(sample):
            raise ValueError(f"{len(generator)} generators for {len(sample)} samples; expected one, or one a sample")
        return [_drawn(g) for g in generator]
    if generator is not None:
        return _drawn(generator)
    if seed is not None:
        return seed
    rows = sample.detach().float().cpu().contiguous()
    return [int.from_bytes(hashlib.blake2b(r.numpy().tobytes(), digest_size=8).digest(), "little") for r in rows]


def _drawn(generator: torch.Generator) -> int:
    """A seed from a generator, which moves on by it."""
    return int(torch.randint(0, 2**62, (1,), generator=generator, device=generator.device))
