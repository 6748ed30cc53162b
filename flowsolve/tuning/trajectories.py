r"""Converged trajectories: what a tuned solver is to follow.

The flow is solved by `Auto` with many evaluations; at each node the state and the slope $\hat z - \hat\varepsilon$
are kept. In the straight chart, $y = x/(\alpha+\sigma)$ against $s = \alpha/(\alpha+\sigma)$, that is dy/ds, so that
between nodes the cubic Hermite polynomial in s gives the state. Samples are those of `fs.sample` with the same seed and
numbers.

They are made some samples at a time and, where a folder is given, kept there: what is there is not made again, if it is
of the same checkpoint, conditions and settings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowsolve._batch import Context, rows
from flowsolve.conditioning import settled
from flowsolve.estimating import Estimator
from flowsolve.fingerprint import marks
from flowsolve.flow import Flow
from flowsolve.identity import digest
from flowsolve.noise import START, Noise
from flowsolve.planning import plan
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Query, Solver, State, run

__all__ = ["Trajectories", "converged", "march", "relative"]

CHUNK, REMEMBERED = 8, 128
Visit = Callable[[int, Query, Any, State], State]


@dataclass(frozen=True)
class Trajectories:
    """Converged trajectories of some samples.

    Attributes:
        flow: the flow.
        times: flow times of the R + 1 nodes.
        states: x there, shape (R + 1, B, *S).
        slopes: ẑ − ε̂ at all but the last, shape (R, B, *S).
        context: the samples' conditions.
    """

    flow: Flow
    times: tuple[float, ...]
    states: Tensor
    slopes: Tensor
    context: Context

    def __len__(self) -> int:
        return self.states.shape[1]

    @property
    def start(self) -> Tensor:
        """The noise, shape (B, *S)."""
        return self.states[0]

    @property
    def end(self) -> Tensor:
        """The data, shape (B, *S)."""
        return self.states[-1]

    def take(self, first: int, last: int) -> Trajectories:
        """Those of some of the samples."""
        kept = self.context.select(np.arange(first, min(last, len(self))))
        states, slopes = self.states[:, first:last], self.slopes[:, first:last]
        return Trajectories(self.flow, self.times, states, slopes, kept)

    def at(self, t: float) -> Tensor:
        """The states at a flow time, shape (B, *S)."""
        i = int(np.searchsorted(self.times, t, side="left"))
        if i < len(self.times) and self.times[i] == t:
            return self.states[i]
        if not 0 < i < len(self.times):
            raise ValueError(f"t = {t}; expected a time between {self.times[0]} and {self.times[-1]}")
        (s_a, c_a), (s_b, c_b), (s, c) = (self._clock(v) for v in (self.times[i - 1], self.times[i], t))
        h, u = s_b - s_a, (s - s_a) / (s_b - s_a)
        a, b, slope = self.states[i - 1] / c_a, self.states[i] / c_b, self.slopes[i - 1]
        if i == len(self.slopes):  # at the end nothing is asked: the parabola
            found = a + (b - a) * u**2 + slope * (h * u * (1.0 - u))
        else:
            left, right = h * u * (1.0 - u) ** 2, -h * u**2 * (1.0 - u)
            found = a + (b - a) * (u**2 * (3.0 - 2.0 * u)) + slope * left + self.slopes[i] * right
        return c * found

    def _clock(self, t: float) -> tuple[float, float]:
        """s and c."""
        point = self.flow.path.at(t)
        c = float(point.alpha + point.sigma)
        return float(point.alpha) / c, c


def march(
    solver: Solver,
    flow: Flow,
    times: Sequence[float],
    x: Tensor,
    context: Context,
    visit: Visit | None = None,
    memory: dict[tuple[float, ...], Any] | None = None,
) -> Tensor:
    """The end of a solve in steps of one estimate, without the checks of `fs.sample`.

    Args:
        solver: a multistep solver.
        flow: the flow.
        times: the nodes.
        x: the state at the first, shape (B, *S).
        context: its conditions.
        visit: is shown the number of each step, its query, the estimate, and the state after it, and gives the state to
            go on from.
        memory: of estimates, by the times until then: of solves that differ in their times alone, what one asked where
            the other did is not asked again. The latest are kept.
    """
    ask, state = Estimator(flow), State(x)
    intervals = [(a, b, 1) for a, b in itertools.pairwise(times)]
    step = solver.on(flow.path, None, intervals)
    for n, interval in enumerate(intervals):
        asked: list[tuple[Query, Any]] = []

        def answer(query: Query, asked: list[tuple[Query, Any]] = asked, path: Any = tuple(times[: n + 1])) -> Any:
            known = None if memory is None else memory.get(path)
            asked.append((query, ask(query, context.tree) if known is None else known))
            if memory is not None and known is None:
                memory[path] = asked[-1][1]
                if len(memory) > REMEMBERED:
                    del memory[next(iter(memory))]
            return asked[-1][1]

        state = run(step(state, *interval), answer)
        if visit is not None:
            state = visit(n, *asked[0], state)
    return state.x


def relative(x: Tensor, exact: Tensor) -> Tensor:
    """e = ‖x − x*‖/‖x*‖, float64 of shape (B,); infinite where it is no number."""
    off, size = (rows(v.double()).norm(dim=1) for v in (x - exact, exact))
    return torch.nan_to_num(off / size, nan=torch.inf, posinf=torch.inf)


@torch.no_grad()
def converged(
    flow: Flow,
    shape: Sequence[int],
    *,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    first: int = 0,
    evaluations: int = 96,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    tell: Callable[[int, int], object] | None = None,
    until: Callable[[], bool] | None = None,
) -> Trajectories:
    """Converged trajectories of the samples first … first + B − 1.

    Args:
        flow: the flow.
        shape: (B, *S).
        cond: conditions, one row a sample or shared by all.
        seed: of the noise.
        first: the number of the first sample.
        evaluations: of each, R at most.
        cache: a folder that keeps them.
        device: where to solve; by default on the host.
        tell: is shown how many are made, and of how many.
        until: whether to stop early, with those that are made (a chunk at least).
    """
    count, event = int(shape[0]), tuple(int(n) for n in shape[1:])
    solver, spacing = Auto().choose(flow.path, evaluations // flow.nfe_range[1])
    nodes = plan(solver, flow, (0.0, 1.0), spacing, evaluations // flow.nfe_range[1]).times
    conditions = flow.conditioned(settled(cond, count), count)
    made: list[tuple[Tensor, Tensor]] = []
    blank = torch.empty(count, *event, device=device or "cpu")
    numbers = torch.arange(first, first + count, device="cpu")
    start = Noise.for_batch(seed, count, numbers).normal(START, 0, blank) * flow.path.prior_std
    whole = Context({"cond": conditions, "samples": numbers}, count)
    for begin in range(0, count, CHUNK):
        if begin and until is not None and until():
            break
        context = whole.select(np.arange(begin, min(begin + CHUNK, count)))
        x = start[begin : begin + CHUNK]
        file = None
        if cache is not None:
            told = [sorted(marks(flow).items()), digest(x), _said(context.tree["cond"]), repr(solver), nodes]
            name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]
            file = File(cache) / f"{name}.safetensors"
        made.append(_kept(file) or _solved(flow, solver, nodes, x, context, file))
        if tell is not None:
            tell(sum(len(states[0]) for states, _ in made), count)
    states, slopes = (torch.cat([part[k].to(start.device) for part in made], 1) for k in (0, 1))
    whole = whole.select(np.arange(states.shape[1]))
    return Trajectories(flow, tuple(nodes), states, slopes, whole)


def _solved(
    flow: Flow, solver: Solver, nodes: Sequence[float], x: Tensor, context: Context, file: File | None
) -> tuple[Tensor, Tensor]:
    states, slopes = [x], []

    def keep(n: int, query: Query, estimate: Any, state: State) -> State:
        slopes.append(estimate.combine(1.0, -1.0))
        states.append(state.x)
        return state

    march(solver, flow, nodes, x, context, keep)
    made = torch.stack(states), torch.stack(slopes)
    if not made[0].isfinite().all():
        raise ValueError(f"the converged solve by {solver!r} is not finite; check the flow (flow.check(data))")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        save_file({"states": made[0].contiguous(), "slopes": made[1].contiguous()}, beside)
        os.replace(beside, file)
    return made


def _kept(file: File | None) -> tuple[Tensor, Tensor] | None:
    if file is None or not file.exists():
        return None
    found = load_file(file)
    return found["states"], found["slopes"]


def _said(tree: Any) -> Any:
    """Conditions as plain values."""
    if isinstance(tree, Tensor):
        return digest(tree)
    if isinstance(tree, Mapping):
        return {str(k): _said(v) for k, v in sorted(tree.items())}
    if isinstance(tree, list | tuple):
        return [_said(v) for v in tree]
    return _said(vars(tree)) if hasattr(tree, "__dict__") else repr(tree)
