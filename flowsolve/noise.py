r"""Noise that belongs to a sample: a function of (seed, sample, stream, interval) and of nothing else.

A generator that is read in sequence gives a sample other noise when its batch, its order or its device changes. Here
each number is computed from its address by a counter-based generator, Philox4x32-10 (Salmon et al. 2011): the key is
the seed, the counter is (block, interval, sample, stream), and the four 32-bit words it returns become four normals by
Box and Muller's transform,

$$ \sqrt{-2\ln u_1}\,(\cos 2\pi u_2,\ \sin 2\pi u_2), \qquad u = (w + \tfrac12)\,2^{-32}. $$

Streams keep the uses of one sample apart: its start, its steps, its trace probes, its dequantisation, its Brownian
path (`flowsolve.brownian`), its variational bound, the motion of an SDE (`flowsolve.sde`). The interval of a step is
addressed by the time at which it starts, so a solve in pieces draws what the whole draws. A sampler that goes back and
makes a step again addresses it by the time and its occurrence (`Noise.again`): the k-th occurrence, k > 0, has a key of
its own, two words of Philox with counter (k, 0, 0, FOLD) under the sample's key. Words are exact integers, and
the transform is written in correctly rounded operations only, in the dtype asked for (float32 for half precisions): a
normal has the same bits on every device, by a fused kernel or by plain torch (`flowsolve.kernels.philox`).

A seed names the noise of a whole batch, in which samples are told apart by their numbers. Or each sample has a seed of
its own: then a sample is its seed, with number 0 unless another is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve import kernels
from flowsolve._batch import hosted
from flowsolve.kernels.philox import MASK, gaussian, philox, words

__all__ = ["BOUND", "BROWNIAN", "DEQUANTIZE", "PROBE", "START", "STEP", "Noise", "Seed", "interval", "philox"]

START, STEP, PROBE, DEQUANTIZE, BROWNIAN, BOUND, MOTION, AREA, WITHIN, TREE, FOLD = range(11)
AT_ONCE = 1 << 20  # words that the twin computes of several intervals at a time

Seed = int | Sequence[int] | Tensor
"""One seed for the batch, or one for each sample."""


def interval(t: float) -> int:
    """The address of the interval that starts at flow time t in [0, 1]: one integer below 2⁵⁴ for each float.

    A solve in pieces meets the same intervals as the whole, and so the same noise.
    """
    return round(t * 2.0**53)


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of samples.

    Attributes:
        seed: any integer; its lowest 64 bits are the key.
        samples: the global number of each sample of the batch, int64 of shape (B,): what makes sample 7 the same
            sample in any batch. Where samples have seeds of their own, int64 of shape (B, 3): number, low and high
            word of the key; `seed` is nothing then.
        occurrence: how often the same steps were made before; the noise of each occurrence is another.
    """

    seed: int
    samples: Tensor
    occurrence: int = 0
    _kept: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, seed: Seed, samples: int | Sequence[int] | Tensor) -> Noise:
        """Noise for the samples numbered 0 … n−1, or for those listed.

        With a list of seeds, one a sample, a count n says how many there are, and all have the number 0.
        """
        own = _seeds(seed)
        counted = isinstance(samples, int) and samples >= 0
        numbers = torch.arange(samples, device="cpu") if counted else hosted(samples).cpu()  # type: ignore[arg-type]
        whole = not (numbers.is_floating_point() or numbers.is_complex()) or not numbers.numel()
        if not whole or numbers.ndim != 1 or bool(((numbers < 0) | (numbers > MASK)).any()):
            raise ValueError(f"samples = {samples!r}; expected a count, or a flat list of integers in [0, 2**32)")
        numbers = numbers.to(torch.int64)
        if own is None:
            return cls(int(seed), numbers)  # type: ignore[arg-type]
        if len(own) != len(numbers):
            raise ValueError(f"{len(own)} seeds for {len(numbers)} samples; expected one a sample, or a single int")
        key = [[s & MASK, (s >> 32) & MASK] for s in own]
        pairs = torch.tensor(key, dtype=torch.int64, device="cpu").reshape(-1, 2)
        return cls(0, torch.cat(((numbers.new_zeros(len(own)) if counted else numbers).unsqueeze(1), pairs), 1))

    @classmethod
    def for_batch(cls, seed: Seed, count: int, samples: Sequence[int] | Tensor | None = None) -> Noise:
        """Noise for a batch of `count` samples, numbered as listed or 0 … count−1; see `of`."""
        noise = cls.of(seed, count if samples is None else samples)
        if noise.samples.shape[0] != count:
            raise ValueError(f"samples lists {noise.samples.shape[0]} numbers for a batch of {count}")
        return noise

    def select(self, index: Tensor) -> Noise:
        """The noise of some samples of the batch, by position."""
        return type(self)(self.seed, self.samples[index.to(self.samples.device)], self.occurrence)

    def again(self, occurrence: int) -> Noise:
        """The noise of the same addresses when they occur once more: independent for each number, 0 is the first."""
        return type(self)(self.seed, self.samples, occurrence)

    def words(self, stream: int, interval: int, count: int, device: torch.device) -> Tensor:
        """(B, 4·⌈count/4⌉) random 32-bit words as int64."""
        return self._words(stream, [interval], count, device)[0]

    def uniform(self, stream: int, interval: int, like: Tensor) -> Tensor:
        """Uniform numbers in (0, 1) of the shape (B, *S), dtype and device of `like`."""
        count = math.prod(like.shape[1:])
        w = self.words(stream, interval, count, like.device)[:, :count]
        u = ((w.to(_wide(like)) + 0.5) * 2.0**-32).reshape(like.shape).to(like.dtype)
        info = torch.finfo(like.dtype)
        return u.clamp_(info.tiny, 1.0 - info.eps / 2)  # rounding to the dtype may reach 0 or 1

    def normal(self, stream: int, interval: int, like: Tensor) -> Tensor:
        """Standard normals of the shape (B, *S), dtype and device of `like`."""
        fused = kernels.normals(self._table(like.device), stream, interval, 1.0, like)
        if fused is not None:
            return fused
        count = math.prod(like.shape[1:])
        x = gaussian(self.words(stream, interval, count, like.device), _work(like))
        return x[:, :count].reshape(like.shape).to(like.dtype)

    def several(self, stream: int, intervals: Sequence[int], scales: Sequence[float], like: Tensor) -> list[Tensor]:
        """c_i ξ_i for the normals of several intervals, each of the shape (B, *S), dtype and device of `like`."""
        table, pairs = self._table(like.device), list(zip(intervals, scales, strict=True))
        first = kernels.normals(table, stream, *pairs[0], like) if pairs else None
        if first is not None:
            rest = [kernels.normals(table, stream, i, c, like) for i, c in pairs[1:]]
            return [first, *(v for v in rest if v is not None)]
        count, work = math.prod(like.shape[1:]), _work(like)
        x = gaussian(self._words(stream, intervals, count, like.device), work)
        x = x.mul_(torch.tensor(scales, dtype=work, device="cpu").to(like.device, non_blocking=True).view(-1, 1, 1))
        return list(x[..., :count].reshape(len(pairs), *like.shape).to(like.dtype).unbind(0))

    def own(self, stream: int, intervals: NDArray[np.int64], like: Tensor) -> Tensor:
        """Normals of intervals of each sample's own, (T, B) addresses: (T, B, *S), in `like`'s dtype, on its device."""
        count = math.prod(like.shape[1:])
        number, low, high = self._table(like.device).unsqueeze(1).unbind(-1)
        address = torch.from_numpy(intervals).to(like.device, non_blocking=True).unsqueeze(-1)
        blocks = torch.arange(-(-count // 4), device=like.device)
        counter = (blocks, address & MASK, number, stream | (address >> 32) << 8)
        x = gaussian(torch.stack(philox(counter, (low, high)), dim=-1).flatten(2), _work(like))
        return x[..., :count].reshape(len(intervals), *like.shape).to(like.dtype)

    def combination(
        self, stream: int, intervals: NDArray[np.int64], weights: NDArray[np.float64], like: Tensor
    ) -> Tensor:
        """Σ_i w_i ξ_i of the normals ξ_i of one or more intervals, in the shape (B, *S), dtype and device of `like`."""
        fused = kernels.normals(self._table(like.device), stream, intervals, weights, like)
        if fused is not None:
            return fused
        count, work = math.prod(like.shape[1:]), _work(like)
        each, total = max(1, AT_ONCE // max(1, like.numel())), torch.zeros((), dtype=work, device=like.device)
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            each = 1  # for which no addresses are sent to the device
        for first in range(0, len(intervals), each):
            some = slice(first, first + each)
            x = gaussian(self._words(stream, intervals[some].tolist(), count, like.device), work)
            for normals, weight in zip(x, weights[some].tolist(), strict=True):
                total = normals.mul_(weight).add_(total)
        return total[:, :count].reshape(like.shape).to(like.dtype)

    def step(self, t: float, t_next: float, like: Tensor) -> Tensor:
        """Standard normals for a step from flow time t to t_next, of the shape, dtype and device of `like`."""
        return self.normal(STEP, interval(t), like)

    def rademacher(self, stream: int, interval: int, like: Tensor) -> Tensor:
        """Random signs ±1 of the shape (B, *S), dtype and device of `like`."""
        count = math.prod(like.shape[1:])
        w = self.words(stream, interval, count, like.device)[:, :count]
        return ((w >> 31) * 2 - 1).reshape(like.shape).to(like.dtype)

    def _words(self, stream: int, intervals: Sequence[int], count: int, device: torch.device) -> Tensor:
        """(T, B, 4·⌈count/4⌉) words of several intervals."""
        number, low, high = self._table(device).unsqueeze(1).unbind(-1)
        key: tuple[Any, Any] = low, high
        if self.samples.ndim == 1 and isinstance(self.seed, int) and not self.occurrence:
            key = _key(self.seed)  # integers: fewer operations
        return words(number, key, stream, intervals, -(-count // 4))

    def _table(self, device: torch.device) -> Tensor:
        """Number and key of each sample, (B, 3) on a device; sent there once."""
        table = self._kept.get(device)
        if table is None:
            table = self.samples
            if table.ndim == 1:
                key = [torch.full_like(table, k) if isinstance(k, int) else k.expand_as(table) for k in _key(self.seed)]
                table = torch.stack([table, *key], 1)
            if self.occurrence:
                number, low, high = table.unbind(1)
                zero = torch.zeros_like(number)
                fresh = philox((zero + self.occurrence, zero, zero, zero + FOLD), (low, high))
                table = torch.stack([number, *fresh[:2]], 1)
            table = self._kept[device] = table.to(device, non_blocking=table.is_cpu)
        return table


def _key(seed: Any) -> tuple[Any, Any]:
    """The two words of a key, from an integer or a tensor of them."""
    return seed & MASK, (seed >> 32) & MASK


def _seeds(seed: Any) -> list[int] | None:
    """The seeds of a list of them; None for an integer."""
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        return None
    if isinstance(seed, Tensor | np.ndarray) and seed.ndim == 1:
        seed = seed.tolist()
    whole = int | np.integer
    if not isinstance(seed, list | tuple | range) or any(isinstance(s, bool) or not isinstance(s, whole) for s in seed):
        raise TypeError(f"seed = {seed!r}; expected an int, or a list of them, one a sample")
    return [int(s) for s in seed]


def _work(like: Tensor) -> torch.dtype:
    """The dtype normals are computed in."""
    return torch.promote_types(like.dtype, torch.float32)


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
