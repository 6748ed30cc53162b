r"""Rectified flow: reflow, distillation, and how straight a flow is (Liu et al. 2022).

In the straight chart every Gaussian path is $y = (1-s)\,\varepsilon + s\,z$ with $s = \alpha/(\alpha+\sigma)$
(`flowsolve.charts`), so all of this is said of every flow, and of flow time $t = s$ on `CondOT()`.

**Reflow.** Pairs $(X_0, X_1)$ of noise and what the flow makes of it are a coupling whose marginals are right. Flow
matching on it gives a flow with the same marginals whose paths are straighter and whose transport costs are no higher,
for every convex cost.

**Straightness** of the flow's own trajectories $Z_s$,

$$ S = \int_0^1 \mathbb E\,\bigl\|(Z_1 - Z_0) - \dot Z_s\bigr\|^2 ds , $$

is 0 if and only if one Euler step is exact. The **loss floor** of a coupling,

$$ V = \int_0^1 \mathbb E\,\bigl\|X_1 - X_0 - \mathbb E[X_1 - X_0 \mid X_s]\bigr\|^2 ds , $$

is what no network's loss can be below: 0 if and only if no two of its lines cross. The loss of a flow is $V$ plus its
own mean squared error, so it bounds $V$ from above, and equals it for the exact field. Both are per dimension here,
with the standard error over samples; $S$ by Gauss–Legendre nodes in $s$ on trajectories of an adaptive solver.

**Distillation** to $k$ steps is the same regression at $s \in \{0, \tfrac1k, \dots, \tfrac{k-1}k\}$ only: the times at
which $k$ Euler steps ask.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from flowsolve._batch import linear
from flowsolve.charts import CHARTS
from flowsolve.conditioning import rows_of, settled
from flowsolve.flow import Flow
from flowsolve.integrate import sample
from flowsolve.paths import Path, Point
from flowsolve.predictions import Prediction, Row
from flowsolve.solvers import Dopri5
from flowsolve.training.couplings import Fixed
from flowsolve.training.fitting import Trained, train
from flowsolve.training.objective import Objective
from flowsolve.training.pairing import Pairs
from flowsolve.training.times import Density

__all__ = ["STRAIGHT", "Measured", "Steps", "distil", "loss_floor", "reflow", "straightness"]

CHART = CHARTS["straight"]


def _straight(point: Point) -> Row:
    return Row(1.0, -1.0)


STRAIGHT = Prediction("z − ε", _straight)
"""The velocity of the straight chart, the target of rectified flow on any path; on `CondOT()` the velocity."""


@dataclass(frozen=True)
class Measured:
    """A mean over samples, with what it is known to.

    Attributes:
        mean: per dimension.
        stderr: its standard error over the samples.
        relative: mean over E‖X₁ − X₀‖² per dimension.
        each: of each sample, float64 of shape (N,).
    """

    mean: float
    stderr: float
    relative: float
    each: Tensor


@dataclass(frozen=True)
class Steps(Density):
    """The times at which k Euler steps of the straight chart ask: s = i/k for i = 0 … k − 1, each alike.

    Args:
        k: steps.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k = {self.k}; expected at least 1")

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        s = (u * self.k).floor().clamp(0, self.k - 1) / self.k
        first, last = path.window
        return torch.as_tensor(CHART.time(path, s)).clamp(first, last)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        raise ValueError("times of k steps have probabilities, not a density")


def reflow(flow: Flow, made: Pairs, **options: Any) -> Trained:
    """Train a copy of a flow on pairs: one round of rectified flow.

    Args:
        flow: whose network the copy starts from; the flow itself stays as it is.
        made: pairs, as a rule of this flow (`training.pairs`).
        **options: of `train`, but for data, source and cond, which the pairs have.
    """
    return _on_pairs(flow, made, Objective(STRAIGHT, coupling=Fixed()), options)


def distil(flow: Flow, made: Pairs, k: int, **options: Any) -> Trained:
    """Train a copy of a flow for k Euler steps of the straight chart.

    Args:
        flow: as of `reflow`; straight already, as a rule by reflow.
        made: pairs of this flow.
        k: steps.
        **options: of `train`.

    Raises:
        SingularEstimate: the prediction says nothing at pure noise, where the first step asks (noise or score on a
            path with α = 0 there): reflow a velocity.
    """
    flow.require(CHART.time(flow.path, 0.0), "distillation")
    return _on_pairs(flow, made, Objective(STRAIGHT, Steps(k), coupling=Fixed()), options)


def _on_pairs(flow: Flow, made: Pairs, objective: Objective, options: dict[str, Any]) -> Trained:
    student = copy.copy(flow)
    student.net = copy.deepcopy(flow.net)
    if flow.prediction.name in ("velocity", "flow") and flow.path.at(0.5)[2:] == (1.0, -1.0):
        objective = replace(objective, target=None)  # the raw output is ±(z − ε): nothing to solve for
    if isinstance(student.net, nn.Module):
        student.net.requires_grad_(True)
    return train(student, made.data, source=made.source, cond=made.cond, objective=objective, **options)


@torch.no_grad()
def straightness(
    flow: Flow,
    shape: tuple[int, ...],
    *,
    solver: Any = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    points: int = 16,
    batch: int = 256,
    **options: Any,
) -> Measured:
    """S: how far the trajectories of a flow are from straight lines, per dimension; 0 where one Euler step is exact.

    Args:
        flow: the flow.
        shape: (N, *S): N trajectories from fresh noise.
        solver: an adaptive solver; by default `Dopri5(rtol=1e-5, atol=1e-5)`.
        seed: of the noise.
        cond: the network's keyword arguments, as in `flowsolve.sample`.
        points: Gauss–Legendre nodes in s.
        batch: samples at a time.
        **options: more of `flowsolve.sample`.
    """
    solver = Dopri5(rtol=1e-5, atol=1e-5) if solver is None else solver
    path, n = flow.path, shape[0]
    ends = [float(CHART.clock(path, t)) for t in (0.0, 1.0)]
    length = ends[1] - ends[0]
    nodes, weights = np.polynomial.legendre.leggauss(points)
    clocks = ends[0] + length * 0.5 * (1.0 + nodes)
    times = [float(CHART.time(path, float(s))) for s in clocks]
    given = settled(cond, n)
    each, size = [], []
    for start in range(0, n, batch):
        rows = np.arange(start, min(start + batch, n))
        own = rows_of(given, rows)
        found = sample(
            flow, (len(rows), *shape[1:]), solver=solver, seed=seed, samples=rows.tolist(), cond=own,
            t_eval=(0.0, *times, 1.0), **options,
        )  # fmt: skip
        assert found.trajectory is not None
        y = [
            x.double() / (p.alpha + p.sigma)
            for x, p in zip(found.trajectory, map(path.at, (0.0, *times, 1.0)), strict=True)
        ]
        line = (y[-1] - y[0]) / length
        total = torch.zeros(len(rows), dtype=torch.float64, device=line.device)
        for x, t, w in zip(found.trajectory[1:-1], times, weights, strict=True):
            slope = flow.estimate(x, t, **cast(dict[str, Any], own)).combine(1.0, -1.0).double()
            total += 0.5 * float(w) * (line - slope).square().flatten(1).mean(1)
        each.append(total.cpu())
        size.append(line.square().flatten(1).mean(1).cpu())
    return _measured(torch.cat(each), torch.cat(size))


@torch.no_grad()
def loss_floor(
    flow: Flow,
    source: Tensor,
    data: Tensor,
    *,
    cond: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    draws: int = 8,
    batch: int = 256,
) -> Measured:
    """An upper bound of V, the loss that a coupling leaves to every network, per dimension; V for its exact field.

    Args:
        flow: trained on this coupling.
        source: X₀, shape (N, *S): pairs that it was not trained on.
        data: X₁, likewise.
        cond: the network's keyword arguments, each with N rows.
        seed: of the times.
        draws: times a pair, even over s.
        batch: pairs at a time.

    Returns:
        The mean and its standard error over pairs, each of which averages its own draws.
    """
    if source.shape != data.shape:
        raise ValueError(f"source has shape {tuple(source.shape)}; expected that of data, {tuple(data.shape)}")
    path, n = flow.path, len(data)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(n, generator=generator, dtype=torch.float64)
    ends = [float(CHART.clock(path, t)) for t in path.window]
    given = settled(cond, n)
    device = (
        data.device
        if not isinstance(flow.net, nn.Module)
        else next((p.device for p in flow.net.parameters()), data.device)
    )
    each = torch.zeros(n, dtype=torch.float64)
    for k in range(draws):
        share = ((k + shift) / draws).clamp(1e-12, 1.0 - 1e-12)
        t = torch.as_tensor(CHART.time(path, ends[0] + (ends[1] - ends[0]) * share))
        for start in range(0, n, batch):
            rows = np.arange(start, min(start + batch, n))
            x0, x1, when = source[rows].to(device), data[rows].to(device), t[rows]
            point = path.at(when)
            x = linear(point.alpha, x1, point.sigma, x0)
            own = cast(dict[str, Any], rows_of(given, rows))
            slope = flow.estimate(x, when, **own).combine(1.0, -1.0)
            each[rows] += (x1 - x0 - slope).double().square().flatten(1).mean(1).cpu() / draws
    return _measured(each, (data - source).double().square().flatten(1).mean(1).cpu())


def _measured(each: Tensor, size: Tensor) -> Measured:
    spread = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    mean = float(each.mean())
    return Measured(mean, spread, mean / float(size.mean()), each)
