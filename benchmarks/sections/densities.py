r"""Flows whose likelihoods are compared, and what is known of them.

**Mixtures**, those of `generative`, in D = 2 and 64 on three paths: the straight one (velocity), VP (noise) and DDPM's
table (noise). States are drawn from the exact marginal at the data end of the path's window, whose closed form is the
truth; traces are exact. In D = 3072, on the straight path, an exact trace would take 3,072 products, so that all are
given the same probe, and the truth is Dopri5 at tolerance 1e-8 with that probe.

**Digits**: held-out images on the two checkpoints, dequantised once. The truth is Dopri5 at 1e-5 (networks compute in
float32), with the exact trace, or with the same probe as the method that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters, paths, solvers
from flowsolve.flow import Flow
from flowsolve.problems import GaussianMixture
from sections.generative import TABLE, mixture

__all__ = ["PROBLEMS", "Density", "digits", "mixtures"]

PROBES: dict[str, Any] = {"trace": "hutchinson", "probes": 1, "seed": 0}
EXACT: dict[str, Any] = {"trace": "exact"}


@dataclass(frozen=True)
class Density:
    """A flow, states, and their log-densities.

    Attributes:
        flow: the flow.
        x: states at the data end of the window, (B, *S).
        truth: nats, (B,).
        trace: what `fs.log_prob` is told of the trace.
        facts: what is recorded of the truth.
    """

    flow: Flow
    x: Tensor
    truth: Tensor
    trace: dict[str, Any]
    facts: dict[str, Any]

    def bits(self, value: Tensor) -> Tensor:
        """The error of log-densities, in bits per dimension, (B,)."""
        return (value.double() - self.truth.double()) / (self.x[0].numel() * math.log(2.0))


def _mixture(dimension: int, path: paths.Path, prediction: str, count: int) -> Density:
    made = mixture(dimension)
    exact = GaussianMixture(made.means, made.variance.sqrt(), made.weights)
    point = path.at(path.window[1])
    noise = torch.randn(count, dimension, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = point.alpha * exact.sample(count, seed=2) + point.sigma * noise
    flow = exact.flow(path, prediction)
    if dimension <= 64:
        return Density(flow, x, exact.log_prob(x, point), EXACT, {"truth": "closed form"})
    out = fs.log_prob(flow, x, solver=solvers.Dopri5(1e-8, 1e-8), **PROBES)
    return Density(flow, x, out.log_prob, PROBES, {"truth": "Dopri5 1e-8, the same probe", "nfe": _mean(out.nfe)})


def digits(name: str, count: int, trace: dict[str, Any], truth: Tensor | None = None) -> Density:
    """Held-out digits on a checkpoint."""
    flow = adapters.load(adapters.bundled(name))
    images = fs.problems.digits.load("held_out").images[:count]
    x = fs.problems.digits.dequantize(images, torch.Generator().manual_seed(0))
    facts: dict[str, Any] = {"truth": "Dopri5 1e-5"}
    if truth is None:
        out = fs.log_prob(flow, x, solver=solvers.Dopri5(1e-5, 1e-5), **trace)
        truth, facts = out.log_prob, {**facts, "nfe": _mean(out.nfe)}
    return Density(flow, x, truth, trace, facts)


def _mean(nfe: Tensor) -> float:
    return float(nfe.double().mean())


mixtures: dict[str, Callable[[], Density]] = {
    "mixture 2, straight": partial(_mixture, 2, paths.CondOT(), "velocity", 256),
    "mixture 2, VP": partial(_mixture, 2, paths.VP(), "noise", 256),
    "mixture 2, table": partial(_mixture, 2, TABLE, "noise", 256),
    "mixture 64, straight": partial(_mixture, 64, paths.CondOT(), "velocity", 256),
    "mixture 64, VP": partial(_mixture, 64, paths.VP(), "noise", 256),
    "mixture 64, table": partial(_mixture, 64, TABLE, "noise", 256),
    "mixture 3072, straight": partial(_mixture, 3072, paths.CondOT(), "velocity", 16),
}
PROBLEMS: dict[str, Callable[[], Density]] = {
    **mixtures,
    "digits-ddpm": partial(digits, "digits-ddpm", 24, EXACT),
    "digits-condot": partial(digits, "digits-condot", 24, EXACT),
}
