r"""The times of a fitted solver, by Gauss–Newton.

The interior nodes' noise levels λ are moved so that the end states come nearer to the converged ones,

$$ \min_\lambda \sum_i \omega_i\,\|x_i(\lambda) - x_i^*\|^2, $$

with the coefficients fitted anew wherever λ is (variable projection: Golub & Pereyra 1973). The derivatives are
differences, one solve for each node, and what two solves have in common is asked once. Steps are damped
(Levenberg–Marquardt), shortened so that nodes keep their order, and taken only if the error falls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve.paths import Path
from flowsolve.solvers.fitted import Fitted
from flowsolve.tuning.trajectories import Trajectories, relative

__all__ = ["Made", "refine"]

Made = Callable[[Sequence[float]], tuple[Fitted, Tensor]]
"""From times, the solver on them and where it leads."""
DAMPING = (1e-3, 1e-2, 1e-1, 1.0)
SHIFT, NEAREST = 0.04, 0.35


def refine(
    make: Made,
    times: Sequence[float],
    data: Trajectories,
    omega: Tensor,
    judge: Callable[[Tensor], float],
    rounds: int = 6,
    late: Callable[[], bool] = lambda: False,
    tell: Callable[[str], object] = lambda text: None,
) -> tuple[Fitted, float]:
    """The solver on better times, and its error.

    Args:
        make: from times to a solver and its end states.
        times: where to begin.
        data: the trajectories.
        omega: ω, of shape (B,).
        judge: from errors of shape (B,) to the number that must fall.
        rounds: at most so many steps.
        late: whether time is up.
        tell: is told the error after each step.
    """
    path, root = data.flow.path, omega.sqrt()[:, None]

    def tried(at: Sequence[float]) -> tuple[Fitted, Tensor, float]:
        made, end = make(at)
        off = (rows((end - data.end).double()) * root).flatten()
        return made, off, judge(relative(end, data.end))

    best, off, error = tried(times)
    levels = _levels(path, best.times)
    for _ in range(rounds):
        if late() or not levels:
            break
        columns, gaps = [], _gaps(path, best.times)
        for k, gap in enumerate(gaps):
            shift = SHIFT * gap
            moved = [v + shift * (i == k) for i, v in enumerate(levels)]
            columns.append((tried(_times(path, moved, best.times))[1] - off) / shift)
            if late():
                return best, error
        jacobian = torch.stack(columns)
        gram, pull = (jacobian @ jacobian.T).cpu(), (jacobian @ off).cpu()
        better = False
        for damping in DAMPING:
            scaled = gram + torch.diag(damping * gram.diagonal() + torch.finfo(torch.float64).tiny)
            move = torch.linalg.lstsq(scaled, -pull[:, None], driver="gelsd").solution[:, 0].tolist()
            most = max(abs(m) / (NEAREST * gap) for m, gap in zip(move, gaps, strict=True))
            moved = [v + m / max(1.0, most) for v, m in zip(levels, move, strict=True)]
            made, now, found = tried(_times(path, moved, best.times))
            if found < error:
                gain, better = error - found, True
                best, off, error, levels = made, now, found, moved
                tell(f"{error:.3g}")
                break
            if late():
                return best, error
        if not better or gain < 2e-3 * error:
            break
    return best, error


def _levels(path: Path, times: Sequence[float]) -> list[float]:
    """λ of the interior nodes."""
    return [float(path.log_snr(t)) for t in times[1:-1]]


def _gaps(path: Path, times: Sequence[float]) -> list[float]:
    """The smaller distance of each interior node to its neighbours, in λ; an end of the path is two units away."""
    levels = _levels(path, times)
    inner = [b - a for a, b in itertools.pairwise(levels)]
    ends = []
    for near, end in ((levels[0], times[0]), (levels[-1], times[-1])):
        point = path.at(end)
        away = abs(float(point.log_snr) - near) if point.alpha and point.sigma else 2.0
        ends.append(min(2.0, away))
    gaps = [ends[0], *inner, ends[1]]
    return [min(a, b) for a, b in itertools.pairwise(gaps)]


def _times(path: Path, levels: Sequence[float], like: Sequence[float]) -> tuple[float, ...]:
    """Flow times of interior levels, within the times that the network knows; the ends as they are."""
    edge = path.window[1]
    found = [float(path.time(v)) for v in levels]
    if like[-1] > edge:
        found = [min(t, edge) for t in found]
    whole = (like[0], *found, like[-1])
    return whole if all(a < b for a, b in itertools.pairwise(whole)) else tuple(like)
