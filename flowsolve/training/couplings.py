r"""Couplings: which noise (or source point) of a batch goes with which data.

A coupling $\pi(z, \varepsilon)$ of the data and the source leaves both marginals as they are. The independent one gives
the conditional losses of flow matching; optimal transport of minibatches makes paths straighter and targets less noisy
(Pooladian et al. 2023, Tong et al. 2023). With the cost $C_{ij} = \lVert z_i - \varepsilon_j\rVert^2$:

| coupling | pairs | source |
|---|---|---|
| `Independent()` | as drawn | Lipman et al. 2022 |
| `Fixed()` | as given: reflow, paired data | Liu et al. 2022 |
| `Exact()` | the permutation of least $\sum_i C_{i\varsigma(i)}$ | Tong et al. 2023 |
| `Sinkhorn(ε)` | $j \sim \pi_{ij}/\sum_k\pi_{ik}$, $\pi$ of least $\langle\pi, C\rangle-\epsilon H$ | Cuturi 2013 |
| `Unbalanced(ε, ρ)` | pairs drawn from a plan whose marginals may stray, by $\rho\,\mathrm{KL}$ | Chizat et al. 2018 |
| `ByLabel(coupling)` | the coupling within each class | Cheng & Schwing 2025 |

**Order and labels.** Pair $i$ keeps data $i$ and with it the label; only the source moves. `Unbalanced` alone leaves
out some data and repeats others; then the labels go with their data. `Exact` uses every source point once, `Sinkhorn`
once on average.

**Conditions.** A plan over the whole batch lets the source depend on the label: class A gets the part of the noise that
lies nearest to it. A sampler starts every class from all of the noise, which the network of class A has not seen.
`ByLabel` couples within each class, so that given the label the source is what it was.

The plans are computed by scipy (`Exact`) and POT (`Sinkhorn`, `Unbalanced`) on the host; the costs where the data lie.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsolve._batch import rows, state_dtype
from flowsolve._optional import require

__all__ = ["ByLabel", "Coupling", "Exact", "Fixed", "Independent", "Pairing", "Sinkhorn", "Unbalanced", "cost"]

UNEVEN = 0.1
"""How far a source point may be from being used once on average before a plan is said not to have converged."""


@dataclass(frozen=True)
class Pairing:
    """Which rows make a pair: data[i] with source[i], int64 on the host, shape (B,); None leaves the order.

    Attributes:
        source: rows of the source.
        data: rows of the data; labels follow them.
    """

    source: Tensor | None = None
    data: Tensor | None = None

    def apply(self, source: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """The source and the data, row by row in pairs."""
        return _rows(source, self.source), _rows(data, self.data)


class Coupling:
    """Pairs the rows of a batch. A subclass gives `pair`."""

    given = False
    """Whether the source must be given: noise that is drawn has no pairs."""

    def pair(
        self, source: Tensor, data: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Pairing:
        """The pairs of a batch.

        Args:
            source: noise or source points, shape (B, *S).
            data: shape (B, *S).
            labels: integers of shape (B,), the classes of the data.
            generator: what is drawn is drawn from it.

        Raises:
            ValueError: shapes that differ, or labels are needed and absent.
        """
        if source.shape != data.shape:
            raise ValueError(f"source has shape {tuple(source.shape)}; expected that of data, {tuple(data.shape)}")
        if labels is not None and labels.shape != data.shape[:1]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; expected one a sample, ({len(data)},)")
        return self._pair(source.detach(), data.detach(), labels, generator)

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        raise NotImplementedError


@dataclass(frozen=True)
class Independent(Coupling):
    """The pairs as they were drawn."""

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        return Pairing()


INDEPENDENT = Independent()


@dataclass(frozen=True)
class Fixed(Coupling):
    """The pairs as they are given: data and source come together (reflow, paired data)."""

    given = True

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        return Pairing()


@dataclass(frozen=True)
class Exact(Coupling):
    """Minibatch optimal transport: the permutation of the source with the least mean ‖z − ε‖².

    It is exact and draws nothing. The assignment is scipy's, O(B³) at worst.
    """

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        if not len(data):
            return Pairing()
        solve = require("scipy.optimize", "ot", "an exact coupling").linear_sum_assignment
        _, columns = solve(_costs(source, data))
        return Pairing(torch.from_numpy(np.asarray(columns, dtype=np.int64)))


@dataclass(frozen=True)
class Sinkhorn(Coupling):
    """Entropic optimal transport: the source of data i is drawn from row i of the plan.

    Args:
        regularisation: ε > 0, in units of the batch's mean cost (of ‖z − ε‖² itself with `relative=False`; 2s² there
            is the Schrödinger bridge of a Brownian motion of variance s², Tong et al. 2023).
        relative: which of these.
        iterations: at most so many; POT's log-domain iteration.
    """

    regularisation: float = 0.05
    relative: bool = True
    iterations: int = 1000

    def __post_init__(self) -> None:
        _positive(regularisation=self.regularisation)

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        if not len(data):
            return Pairing()
        costs = _costs(source, data)
        plan = _plan("sinkhorn", costs, _scale(self.regularisation, costs, self.relative), self.iterations)
        used = (plan / plan.sum(1, keepdims=True)).sum(0)  # how often each source point is used, on average
        if np.abs(used - 1.0).max() > UNEVEN:
            warnings.warn(
                f"{self.iterations} iterations of Sinkhorn are too few for regularisation {self.regularisation:g}: "
                f"source points are used {used.min():.2f} to {used.max():.2f} times; raise iterations= or the other",
                RuntimeWarning,
                stacklevel=2,
            )
        return Pairing(_draw(torch.from_numpy(plan), 1, generator)[:, 0])


@dataclass(frozen=True)
class Unbalanced(Coupling):
    """Unbalanced optimal transport: B pairs drawn from a plan that may leave out far-off data and source points.

    Both marginals of what is trained on change, on purpose (outliers), and with them what is learned.

    Args:
        regularisation: ε, as of `Sinkhorn`.
        marginals: ρ, the price of a marginal's divergence, in the same units; ρ → ∞ is `Sinkhorn`.
        relative: as of `Sinkhorn`.
        iterations: as of `Sinkhorn`.
    """

    regularisation: float = 0.05
    marginals: float = 1.0
    relative: bool = True
    iterations: int = 1000

    def __post_init__(self) -> None:
        _positive(regularisation=self.regularisation, marginals=self.marginals)

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        n = len(data)
        if not n:
            return Pairing()
        costs = _costs(source, data)
        epsilon, rho = (_scale(v, costs, self.relative) for v in (self.regularisation, self.marginals))
        plan = torch.from_numpy(_plan("unbalanced", costs, epsilon, self.iterations, rho))
        flat = _draw(plan.reshape(1, -1), n, generator)[0]
        return Pairing(source=flat % n, data=flat // n)


@dataclass(frozen=True)
class ByLabel(Coupling):
    """A coupling within each class of labels, so that the source stays independent of the label.

    Args:
        within: the coupling of the samples of one class.
    """

    within: Coupling = Exact()

    def _pair(self, source: Tensor, data: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Pairing:
        if labels is None:
            raise ValueError(
                "a coupling by label needs labels, integers of shape (B,); give labels=, or another coupling"
            )
        labels = labels.cpu()
        first, second = (torch.arange(len(data)) for _ in range(2))
        for label in labels.unique():
            group = (labels == label).nonzero()[:, 0]
            there = group.to(data.device)
            pairs = self.within.pair(source[group.to(source.device)], data[there], generator=generator)
            first[group] = _rows(group, pairs.source)
            second[group] = _rows(group, pairs.data)
        kept = torch.equal(second, torch.arange(len(data)))
        return Pairing(first, None if kept else second)


def cost(source: Tensor, data: Tensor) -> Tensor:
    """Mean over the pairs of ‖z_i − ε_i‖², summed over dimensions: what optimal transport makes least; a scalar."""
    dtype = state_dtype(data)
    return (rows(data.to(dtype)) - rows(source.to(device=data.device, dtype=dtype))).square().sum(1).mean()


def _costs(source: Tensor, data: Tensor) -> NDArray[np.float64]:
    """‖z_i − ε_j‖² of every pair, shape (B, B): rows for data, columns for the source, float64 on the host."""
    dtype = state_dtype(data)
    z, e = rows(data.to(dtype)), rows(source.to(device=data.device, dtype=dtype))
    if not (bool(z.isfinite().all()) and bool(e.isfinite().all())):
        raise ValueError("a batch with non-finite numbers cannot be coupled; look for them in the data")
    middle = z.mean(0)  # what both are far from costs digits
    z, e = z - middle, e - middle
    squares = z.square().sum(1, keepdim=True) + e.square().sum(1) - 2.0 * (z @ e.T)
    found: NDArray[np.float64] = squares.clamp_min(0.0).cpu().double().numpy()
    return found


def _plan(
    kind: str, costs: NDArray[np.float64], epsilon: float, iterations: int, rho: float = math.inf
) -> NDArray[np.float64]:
    """The entropic plan of uniform marginals, shape (B, B)."""
    ot = require("ot", "ot", f"a {kind} coupling")
    n = len(costs)
    even = np.full(n, 1.0 / n)
    if kind == "sinkhorn":
        plan = ot.sinkhorn(even, even, costs, epsilon, method="sinkhorn_log", numItermax=iterations, warn=False)
    else:
        plan = ot.unbalanced.sinkhorn_stabilized_unbalanced(even, even, costs, epsilon, rho, numItermax=iterations)
    found: NDArray[np.float64] = np.asarray(plan, dtype=np.float64)
    if not np.isfinite(found).all() or not found.sum() > 0.0:
        raise ValueError(
            f"the {kind} plan with regularisation {epsilon:g} did not come out finite; give a larger regularisation"
        )
    return found


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """count columns of each row, drawn with replacement in proportion to weights, shape (rows, count)."""
    place = generator.device if generator is not None else torch.device("cpu")
    u = torch.rand((len(weights), count), generator=generator, device=place, dtype=torch.float64).cpu()
    steps = weights.cumsum(1)  # torch.multinomial takes no more than 2²⁴ columns
    return torch.searchsorted(steps, u * steps[:, -1:], right=True).clamp_max(weights.shape[1] - 1)


def _scale(value: float, costs: NDArray[np.float64], relative: bool) -> float:
    mean = float(costs.mean())
    return value * mean if relative and mean > 0.0 else value


def _rows(x: Tensor, index: Any) -> Tensor:
    return x if index is None else x.index_select(0, index.to(x.device))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value!r}; expected a finite number > 0")
