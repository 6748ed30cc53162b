"""Networks with labels whose every estimate is known: Gaussian classes, and a mixture of them for label 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.paths import Path
from flowsolve.predictions import Row, resolve

MEANS = torch.tensor([[1.0, -0.5], [-0.8, 0.6], [0.2, 1.3]], dtype=torch.float64)
SHARE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.4


def truth(x: Tensor, alpha: Any, sigma: Any, y: Tensor) -> Tensor:
    """E[z | x_t = x, y] of classes N(m_y, s²), and of their mixture for y = 0, by Bayes' rule; α, σ of shape (B,)."""
    return _moments(x, alpha, sigma, y)[0]


def _moments(x: Tensor, alpha: Any, sigma: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """E[z | x, y] and E[ε | x, y]."""
    alpha, sigma = (torch.as_tensor(c, dtype=x.dtype).expand(len(x))[:, None, None] for c in (alpha, sigma))
    variance = alpha**2 * STD**2 + sigma**2
    off = x[:, None] - alpha * MEANS
    each = MEANS + alpha * STD**2 / variance * off
    share = torch.softmax(SHARE.log() - 0.5 * (off**2 / variance).sum(2), 1)
    pairs = [(share[:, :, None] * v).sum(1) for v in (each, sigma * off / variance)]
    alone = [v[torch.arange(len(x)), (y - 1).clamp_min(0)] for v in (each, sigma * off / variance)]
    data, noise = (torch.where((y == 0)[:, None], a, b) for a, b in zip(pairs, alone, strict=True))
    return data, noise


class Net:
    """net(x, t, y=…): what a prediction asks for, by the formulas above. It notes what it was asked."""

    def __init__(self, path: Path, prediction: Any = "velocity") -> None:
        self.path, self.prediction = path, resolve(prediction)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, who: Tensor | None = None) -> Tensor:
        self.calls.append((t, torch.zeros_like(y) if who is None else who))
        point = self.path.at(t)
        row: Row = self.prediction.row(point)
        data, noise = (v.to(x) for v in _moments(x.double(), point.alpha, point.sigma, y))
        a, b, w = (torch.as_tensor(c, dtype=x.dtype).expand(len(x))[:, None] for c in row)
        return (a * data + b * noise) / w

    @property
    def asked(self) -> int:
        """Rows that it was asked for since the last time."""
        total = sum(len(t) for t, _ in self.calls)
        self.calls = []
        return total

    def each(self, count: int) -> list[int]:
        """Rows that it was asked for by each sample since the last time, who= being their numbers."""
        whose = torch.cat([who for _, who in self.calls])
        self.calls = []
        return torch.bincount(whose, minlength=count).tolist()


def labelled(path: Path, prediction: Any = "velocity") -> fs.Flow:
    """A flow with that network, in float64 and flow time."""
    return fs.Flow(Net(path, prediction), path, prediction)


def states(path: Path, t: Any, count: int = 5, seed: int = 0) -> Tensor:
    """States of the size that they have at a time, float64 of shape (count, 2)."""
    noise = torch.randn(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return path.interpolate(noise[0], noise[1], t)
