r"""Noise that belongs to a sample: a function of (seed, sample, stream, interval) and of nothing else.

A generator that is read in sequence gives a sample other noise when its batch, its order or its device changes. Here
each number is computed from its address by a counter-based generator, Philox4x32-10 (Salmon et al. 2011): the key is
the seed, the counter is (block, interval, sample, stream), and the four 32-bit words it returns become four normals by
Box and Muller's transform,

$$ \sqrt{-2\ln u_1}\,(\cos 2\pi u_2,\ \sin 2\pi u_2), \qquad u = (w + \tfrac12)\,2^{-32}. $$

Streams keep the uses of one sample apart: its start, its steps, its trace probes, its dequantisation. The interval of
a step is addressed by the time at which it starts, so a solve in pieces draws what the whole draws. All arithmetic
on words is integer and exact, so every device sees the same bits; the transform is computed in float64 (float32 where
a device has no more) and then cast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DEQUANTIZE", "PROBE", "START", "STEP", "Noise", "interval", "philox"]

START, STEP, PROBE, DEQUANTIZE = range(4)

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def interval(t: float) -> int:
    """The address of the interval that starts at flow time t in [0, 1]: one integer below 2⁵⁴ for each float.

    A solve in pieces meets the same intervals as the whole, and so the same noise.
    """
    return round(t * 2.0**53)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four words from a counter of four words, as int64 tensors with values in [0, 2³²).

    Args:
        counter: four int64 tensors of broadcastable shapes.
        key: two words.

    Returns:
        Four int64 tensors of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps the bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32).bitwise_and_(MASK).bitwise_xor_(c1).bitwise_xor_(k0),
            p1.bitwise_and_(MASK),
            (p0 >> 32).bitwise_and_(MASK).bitwise_xor_(c3).bitwise_xor_(k1),
            p0.bitwise_and_(MASK),
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of samples.

    Attributes:
        seed: any integer; its lowest 64 bits are the key.
        samples: the global number of each sample of the batch, int64 of shape (B,): what makes sample 7 the same
            sample in any batch.
    """

    seed: int
    samples: Tensor

    @classmethod
    def of(cls, seed: int, samples: int | Sequence[int] | Tensor) -> Noise:
        """Noise for the samples numbered 0 … n−1, or for those listed."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed = {seed!r}; expected an int")
        numbers = torch.as_tensor(range(samples) if isinstance(samples, int) and samples >= 0 else samples).cpu()
        whole = not (numbers.is_floating_point() or numbers.is_complex()) or not numbers.numel()
        if not whole or numbers.ndim != 1 or bool(((numbers < 0) | (numbers > MASK)).any()):
            raise ValueError(f"samples = {samples!r}; expected a count, or a flat list of integers in [0, 2**32)")
        return cls(seed, numbers.to(torch.int64))

    @classmethod
    def for_batch(cls, seed: int, count: int, samples: Sequence[int] | Tensor | None = None) -> Noise:
        """Noise for a batch of `count` samples, numbered as listed or 0 … count−1."""
        noise = cls.of(seed, count if samples is None else samples)
        if noise.samples.shape[0] != count:
            raise ValueError(f"samples lists {noise.samples.shape[0]} numbers for a batch of {count}")
        return noise

    def select(self, index: Tensor) -> Noise:
        """The noise of some samples of the batch, by position."""
        return Noise(self.seed, self.samples[index.to(self.samples.device)])

    def words(self, stream: int, interval: int, count: int, device: torch.device) -> Tensor:
        """(B, 4·⌈count/4⌉) random 32-bit words as int64."""
        blocks = -(-count // 4)
        samples = self.samples.to(device, non_blocking=self.samples.is_cpu).unsqueeze(1)
        counter = (
            torch.arange(blocks, device=device).unsqueeze(0),
            torch.full_like(samples, interval & MASK),
            samples,
            torch.full_like(samples, stream | (interval >> 32) << 8),
        )
        return torch.stack(philox(counter, (self.seed & MASK, (self.seed >> 32) & MASK)), dim=-1).flatten(1)

    def uniform(self, stream: int, interval: int, like: Tensor) -> Tensor:
        """Uniform numbers in (0, 1) of the shape (B, *S), dtype and device of `like`."""
        count = math.prod(like.shape[1:])
        w = self.words(stream, interval, count, like.device)[:, :count]
        u = ((w.to(_wide(like)) + 0.5) * 2.0**-32).reshape(like.shape).to(like.dtype)
        info = torch.finfo(like.dtype)
        return u.clamp_(info.tiny, 1.0 - info.eps / 2)  # rounding to the dtype may reach 0 or 1

    def normal(self, stream: int, interval: int, like: Tensor) -> Tensor:
        """Standard normals of the shape (B, *S), dtype and device of `like`."""
        count = math.prod(like.shape[1:])
        w = self.words(stream, interval, count, like.device)
        u = ((w.to(_wide(like)) + 0.5) * 2.0**-32).unflatten(1, (-1, 2))
        radius, angle = u[..., 0].clamp_max(1.0).log().mul(-2.0).sqrt(), u[..., 1] * (2.0 * math.pi)
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return pairs.flatten(1)[:, :count].reshape(like.shape).to(like.dtype)

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        """Standard normals for a step from flow time t to t_next, of the shape, dtype and device of `like`."""
        return self.normal(STEP, interval(t), like)

    def rademacher(self, stream: int, interval: int, like: Tensor) -> Tensor:
        """Random signs ±1 of the shape (B, *S), dtype and device of `like`."""
        count = math.prod(like.shape[1:])
        w = self.words(stream, interval, count, like.device)[:, :count]
        return ((w >> 31) * 2 - 1).reshape(like.shape).to(like.dtype)


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
