r"""Flows whose likelihoods are compared, and what is known of them.

**Mixtures**, those of `generative`, in D = 2, 64 and 3072 on three paths: the straight one (velocity), VP (noise) and
DDPM's table (noise). States are drawn from the exact marginal at the data end of the path's window, whose closed form
is the truth. Traces are exact and in closed form too, which is what makes 3,072 dimensions possible: with
responsibilities $r_k$, $V_k = \alpha^2 s_k^2 + \sigma^2$, $a_k = -(x - \alpha\mu_k)/V_k$ and $\bar a = \sum_k r_k a_k$,

$$ \operatorname{tr}\frac{\partial\hat\varepsilon}{\partial x}
   = \sigma\sum_k r_k\Bigl(\sum_d \frac1{V_{kd}} - a_k\cdot(a_k - \bar a)\Bigr), \qquad
   \alpha\operatorname{tr}\frac{\partial\hat z}{\partial x}
   = D - \sigma\operatorname{tr}\frac{\partial\hat\varepsilon}{\partial x} . $$

**Power laws**: Gaussian fields with the spectrum of natural images, 3 × 16 × 16, and a mixture of two such, in the
basis where they are diagonal.

**Digits**: held-out images on the two checkpoints, dequantised once. The truth is Dopri5 at 1e-5 (networks compute in
float32), with the exact trace, or with the same probe as the method that is measured.

**Patches**: held-out 32 × 32 patches of photographs on the networks of `networks/`, with one probe each, the same for
the truth, which is Dopri5 at 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters, likelihood, paths, solvers
from flowsolve.flow import Flow
from flowsolve.predictions import resolve
from flowsolve.problems import GaussianMixture, PowerLaw, patches
from sections.fields import unconditional
from sections.generative import TABLE, mixture

__all__ = ["PROBLEMS", "Density", "Known", "Told", "digits", "mixtures"]


class Known:
    """The network of a mixture's flow, which leaves the trace of its own Jacobian behind.

    Attributes:
        trace: of the last call, (B,).
    """

    def __init__(self, mixture: GaussianMixture, path: paths.Path, prediction: str) -> None:
        self.mixture, self.path, self.prediction = mixture, path, resolve(prediction)
        self.trace = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The output for x of shape (B, D) and flow times of shape (B,)."""
        point, m = self.path.at(t), self.mixture
        alpha, sigma = (v.reshape(-1, 1, 1).to(x) for v in point[:2])
        variance = alpha**2 * m.std.square() + sigma**2
        pull = (alpha * m.means - x.unsqueeze(1)) / variance
        exponent = (variance * pull.square() + (2.0 * math.pi * variance).log()).sum(2)
        share = (m.weights.log() - 0.5 * exponent).softmax(1).unsqueeze(2)
        mean = (share * pull).sum(1)
        noise = -point.sigma.reshape(-1, 1).to(x) * mean
        data = (share * (m.means - alpha * m.std.square() * pull)).sum(1)
        bend = (share * (1.0 / variance - pull * (pull - mean.unsqueeze(1)))).sum((1, 2))
        of_noise = sigma.flatten() * bend
        # At α = 0 the estimate is the mean of the data, whatever x.
        of_data = torch.where(alpha.flatten() > 0.0, (x.shape[1] - sigma.flatten() * of_noise) / alpha.flatten(), 0.0)
        a, b, w = (torch.as_tensor(v).to(x) for v in self.prediction.row(point))
        self.trace = ((a * of_data + b * of_noise) / w).detach()
        return (a.reshape(-1, 1) * data + b.reshape(-1, 1) * noise) / w.reshape(-1, 1)


FOLDER = File(__file__).parents[1] / "networks"


@dataclass(frozen=True)
class Told(likelihood.Exact):
    """The trace that a `Known` network leaves behind."""

    net: Any = None

    def __call__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None, graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The output, and its trace of shape (B, 1)."""
        with torch.no_grad():
            output = function(x)
        return output, self.net.trace.unsqueeze(1)


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
    return _known(GaussianMixture(made.means, made.variance.sqrt(), made.weights), path, prediction, count)


def _power_law(path: paths.Path, prediction: str, **settings: Any) -> Density:
    field = PowerLaw((3, 16, 16), dtype=torch.float64, **settings)
    std = field.coefficients.std.flatten(1)
    return _known(GaussianMixture(torch.zeros_like(std), std, field.weights), path, prediction, 64)


def _known(exact: GaussianMixture, path: paths.Path, prediction: str, count: int) -> Density:
    point = path.at(path.window[1])
    noise = torch.randn(count, exact.means.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = point.alpha * exact.sample(count, seed=2) + point.sigma * noise
    net = Known(exact, path, prediction)
    trace = {"trace": Told(net=net)}
    return Density(Flow(net, path, prediction), x, exact.log_prob(x, point), trace, {"truth": "closed form"})


def held_out(name: str, count: int) -> Density:
    """Held-out patches on a network of `networks/`."""
    flow = unconditional(name, FOLDER)
    images = patches.lattice(patches.photographs("held_out"), count).images
    x = patches.dequantize(images, torch.Generator().manual_seed(0))
    out = fs.log_prob(flow, x, solver=solvers.Dopri5(1e-4, 1e-4), **PROBES)
    facts = {"truth": "Dopri5 1e-4", "nfe": _mean(out.nfe)}
    return Density(flow, x, out.log_prob, PROBES, facts)


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
    "mixture 3072, straight": partial(_mixture, 3072, paths.CondOT(), "velocity", 32),
    "mixture 3072, VP": partial(_mixture, 3072, paths.VP(), "noise", 32),
    "mixture 3072, table": partial(_mixture, 3072, TABLE, "noise", 32),
}
OTHERS: dict[str, tuple[paths.Path, str]] = {
    "VE": (paths.VE(), "noise"),
    "EDM": (paths.EDM(), "noise"),
    "SubVP": (paths.SubVP(), "noise"),
    "Cosine": (paths.Cosine(), "v"),
    "Trig": (paths.Trig(), "v"),
}
TWO: dict[str, Any] = {"slope": [1.0, 1.6], "contrast": [1.0, 0.2]}
fields: dict[str, Callable[[], Density]] = {
    **{f"mixture 64, {name}": partial(_mixture, 64, *on, 256) for name, on in OTHERS.items()},
    "power law, straight": partial(_power_law, paths.CondOT(), "velocity"),
    "power law, VP": partial(_power_law, paths.VP(), "noise"),
    "power law, table": partial(_power_law, TABLE, "noise"),
    "two power laws, straight": partial(_power_law, paths.CondOT(), "velocity", **TWO),
    "two power laws, EDM": partial(_power_law, paths.EDM(), "noise", **TWO),
}
PROBLEMS: dict[str, Callable[[], Density]] = {
    **mixtures,
    **fields,
    "digits-ddpm": partial(digits, "digits-ddpm", 24, EXACT),
    "digits-condot": partial(digits, "digits-condot", 24, EXACT),
    "patches-condot": partial(held_out, "patches-condot", 4),
    "patches-ddpm": partial(held_out, "patches-ddpm", 4),
}
