r"""The weights of a fitted solver, step by step in closed form.

At step n the solver stands at its own states, has asked the network there, and knows where the generic step would lead,
$G_n$, and where it should, the converged state $x^*_{n+1}$. The weights of the estimates so far, $f_k$ for ẑ and ε̂ at
each node, are those of

$$ \min_w\ \sum_i \omega_i\,\Bigl\|x^*_{n+1,i} - G_{n,i} - \sum_k w_k f_{k,i}\Bigr\|^2 + \varrho\sum_k w_k^2\,S_k,
   \qquad S_k = \sum_i \omega_i\,\|f_{k,i}\|^2, $$

a least-squares problem with one unknown for each estimate, solved by its normal equations in float64. Then the step is
taken with them, so that the next is fitted to the states that the solver will really meet; no gradient of the network
is asked for. The ridge ϱ draws towards w = 0, the generic solver.

**Robust.** $\omega_i = 1/(\|x_i^*\|^2\,\max(e_i, \tilde e)^2)$, with $e_i$ the relative error of sample i by the solver
before and $\tilde e$ their median: a sample that ends in another mode has the weight of the others, not the square of
its distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve.predictions import Estimate
from flowsolve.solvers.base import Query, State
from flowsolve.solvers.fitted import Fitted
from flowsolve.solvers.multistep import Multistep
from flowsolve.tuning.trajectories import Trajectories, march

__all__ = ["RIDGES", "fit", "weights_of"]

RIDGES = (1e-5, 1e-3)


def weights_of(data: Trajectories, errors: Tensor | None) -> Tensor:
    """ω, float64 of shape (B,)."""
    size = rows(data.end.double()).square().sum(1)
    if errors is None:
        return 1.0 / size
    known = errors.clamp(max=1e6)
    return 1.0 / (size * known.maximum(known.median()).clamp_min(1e-12).square())


def fit(
    base: Multistep,
    times: Sequence[float],
    data: Trajectories,
    ridge: float,
    omega: Tensor,
    lags: int | None = None,
    memory: dict[tuple[float, ...], Any] | None = None,
) -> tuple[Fitted, Tensor]:
    """The fitted solver on given times, and where it leads from the trajectories' noise.

    Args:
        base: the generic solver.
        times: the nodes.
        data: the trajectories to follow.
        ridge: ϱ.
        omega: ω, of shape (B,).
        lags: the most estimates before the latest that have weights; None for all.
        memory: of estimates, for fits that differ in their times alone (`trajectories.march`).
    """
    history: list[Tensor] = []
    found: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
    root = omega.sqrt()[:, None]

    def correct(n: int, query: Query, estimate: Estimate, state: State) -> State:
        history[:0] = [estimate.data, estimate.noise]
        if lags is not None:
            del history[2 * (lags + 1) :]
        aim = (data.at(times[n + 1]) - state.x).double()
        table = torch.stack([(rows(f).double() * root).flatten() for f in history])
        gram = table @ table.T
        gram += torch.diag(ridge * gram.diagonal() + torch.finfo(torch.float64).tiny)
        w = torch.linalg.lstsq(
            gram.cpu(), (table @ (rows(aim) * root).flatten()).cpu()[:, None], driver="gelsd"
        ).solution
        listed = [float(v) for v in w[:, 0]]
        found[0].append(tuple(listed[::2]))
        found[1].append(tuple(listed[1::2]))
        x = state.x
        for v, f in zip(listed, history, strict=True):
            x = x.add(f, alpha=v)
        return replace(state, x=x)

    end = march(base, data.flow, times, data.start, data.context, correct, memory)
    return Fitted(base, tuple(times), tuple(found[0]), tuple(found[1])), end
