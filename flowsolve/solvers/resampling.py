r"""Samplers that go back: Restart, and inpainting by resampling.

Both add noise to a state, which takes it to an earlier time and keeps the marginal,

$$ x_t = \frac{\alpha_t}{\alpha_s}\,x_s + \sqrt{\sigma_t^2 - \Bigl(\frac{\alpha_t\sigma_s}{\alpha_s}\Bigr)^2}\;\xi,
   \qquad t < s, $$

and then make the way to s again by the solver they wrap. The noise of each return is addressed by the time from which
it goes back and by its occurrence (`flowsolve.noise.Noise.again`).

**Restart** (Xu et al. 2023): in an interval of noise levels σ/α = low … high, from the node nearest to low back to high
and down again, a number of times. What errors a state has collected by then the noise contracts, and the way down
adds those of a few steps only. Each step of the way down costs what a step of the inner solver does.

**RePaint** (Lugmayr et al. 2022): after every step the known part is replaced by known data with as much noise as
the time has, and the step is made again from there, `repeats` times in all, so that the unknown part comes to agree
with the known one. The law of the result is the conditional one in the limit of many repeats and short steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from flowsolve.charts import Chart
from flowsolve.grids import Grid, Karras, Spacing
from flowsolve.noise import Noise
from flowsolve.paths import Path
from flowsolve.solvers.base import Solver, State, Step, Stepper
from flowsolve.solvers.injection import Around, missing
from flowsolve.solvers.runge_kutta import Heun

__all__ = ["RePaint", "Restart"]


def returned(path: Path, noise: Noise, x: Tensor, s: float, t: float) -> Tensor:
    """x at flow time s with the noise that takes it back to t < s."""
    here, there = path.at(s), path.at(t)
    return (float(there.alpha / here.alpha) * x).add(noise.step(s, t, x), alpha=missing(there, here))


@dataclass(frozen=True)
class _Returning(Around):
    """A solver that makes steps again."""

    def counts(self, steps: int) -> list[int]:
        """Not known from a number of steps alone."""
        raise TypeError(
            f"{type(self).__name__} goes back to earlier times, and a list of so many steps does not; use "
            "flowsolve.sample or flowsolve.adapters.diffusers.capture"
        )


@dataclass(frozen=True)
class Restart(_Returning):
    """Restart sampling: some intervals of noise levels are gone through again, with fresh noise (Xu et al. 2023).

    A budget pays for the returns first: Σ repeats · steps · (evaluations of a step of the inner solver).

    Attributes:
        inner: the solver, of the ODE, that makes its steps one at a time.
        intervals: (low, high, steps, repeats): noise levels σ/α, steps of the way down, spaced as Karras et al. do, and
            how often it is made.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> solver = fs.solvers.Restart(fs.solvers.Heun(), ((0.1, 0.5, 2, 3),))
        >>> fs.sample(flow, shape=(2, 1), solver=solver, nfe=30).nfe
        tensor([30, 30])
    """

    inner: Solver = field(default_factory=Heun)
    intervals: tuple[tuple[float, float, int, int], ...] = ((0.06, 0.3, 3, 1),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high, steps, repeats in self.intervals:
            whole = isinstance(steps, int) and isinstance(repeats, int) and min(steps, repeats) >= 1
            if not (0.0 < low < high < math.inf and whole):
                raise ValueError(
                    f"intervals = {self.intervals!r}; expected (low, high, steps, repeats) with noise levels "
                    "0 < low < high and whole numbers >= 1"
                )

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return bool(self.intervals)

    def plan(self, path: Path, interval: tuple[float, float], spacing: Spacing, budget: int) -> Grid:
        """The inner solver's grid for what the returns leave of the budget."""
        spent = sum(steps * repeats for _, _, steps, repeats in self.intervals) * self.evaluations
        if budget <= spent:
            raise ValueError(
                f"a budget of {budget} estimates, {spent} of them for returns; expected at least {spent + 1}"
            )
        grid = self.inner.plan(path, interval, spacing, budget - spent)
        extra = self._extra(path, grid.times)
        return replace(grid, evaluations=tuple(n + m for n, m in zip(grid.evaluations, extra, strict=True)))

    def fill(self, path: Path, times: Sequence[float]) -> list[int]:
        """The evaluations of each step, with the returns from where it ends."""
        counts, extra = self.inner.fill(path, times), self._extra(path, times)
        return [n + m for n, m in zip(counts, extra, strict=True)]

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a step of the inner solver does."""
        return self.inner.asks_at_end(min(evaluations, self.evaluations))

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; the chart is the inner solver's."""
        inner, m = self.inner.on(path, chart), self.evaluations
        times = [t for t, _, _ in grid] + [t for _, t, _ in grid[-1:]]
        back = self._returns(path, times) if grid else {}
        costs = {s: sum(len(down) - 1 for down in ways) * m for s, ways in back.items()}

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            state = yield from inner(state, t, t_next, evaluations - costs.get(t_next, 0))
            noise = state.noise
            for k, down in enumerate(back.get(t_next, ()), 1):
                assert noise is not None
                state = state.advance(returned(path, noise.again(k), state.x, t_next, down[0]))
                for a, b in pairwise(down):
                    state = yield from inner(state, a, b, m)
            return state

        return step

    def _extra(self, path: Path, times: Sequence[float]) -> list[int]:
        """The evaluations of the returns from the end of each step."""
        back = self._returns(path, times)
        return [sum(len(down) - 1 for down in back.get(s, ())) * self.evaluations for s in times[1:]]

    def _returns(self, path: Path, times: Sequence[float]) -> dict[float, list[list[float]]]:
        """From a node, the flow times of each way down to it, in the order in which they are made."""
        inside = [t for t in times[1:] if path.at(t).alpha and path.at(t).sigma]
        found: dict[float, list[list[float]]] = {}
        for low, high, steps, repeats in self.intervals:
            lowest = math.log(low)
            node = min(inside, key=lambda t: abs(path.at(t).log_snr + lowest), default=None)
            start = max(times[0], path.time(-math.log(high)))
            if node is None or not start < node:
                raise ValueError(
                    f"a return between the noise levels {low:g} and {high:g}, where the grid has no node in flow time "
                    f"after {start:g}; take more steps, or another interval"
                )
            found.setdefault(node, []).extend([Karras().times(path, start, node, steps)] * repeats)
        return found


@dataclass(frozen=True, eq=False)
class RePaint(_Returning):
    """Inpainting: the known part of the data is given, and every step is made `repeats` times (Lugmayr et al. 2022).

    Attributes:
        inner: the solver, which makes its steps one at a time, with noise or without; the paper's is `DDPM()`.
        known: the data, of the shape (B, *S) or one that broadcasts to it; what is not known may be anything.
        mask: True where it is known, likewise.
        repeats: how often each step is made.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0, -1.0], [1.0, 1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> known, mask = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])
        >>> solver = fs.solvers.RePaint(fs.solvers.DDPM(), known, mask, repeats=4)
        >>> fs.sample(flow, shape=(5, 2), solver=solver, nfe=80).x[:, 0]
        tensor([1., 1., 1., 1., 1.])
    """

    inner: Solver
    known: Tensor
    mask: Tensor
    repeats: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.known, Tensor) or not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool:
            raise TypeError("known= and mask= of RePaint; expected tensors, the mask of dtype bool, True where known")
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise ValueError(f"repeats = {self.repeats!r}; expected a whole number >= 1")
        super().__post_init__()

    def refused(self) -> str:
        """Noise of the inner solver's own is welcome."""
        return "" if self.inner.random and not self.inner.remembers else super().refused()

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Network evaluations of a full step: those of the inner solver, each time."""
        return self.repeats * self.inner.evaluations

    @property
    def random(self) -> bool:
        """Always."""
        return True

    def schedule(self, nfe: int) -> list[int]:
        """Full steps, after one with fewer repeats and one that the inner solver makes of what is left."""
        full, rest = divmod(nfe, self.evaluations)
        left = rest % self.inner.evaluations
        fewer = [rest - left] if rest > left else []
        return [*(self.inner.schedule(left) if left else []), *fewer, *[self.evaluations] * full]

    def asks_at_end(self, evaluations: int) -> bool:
        """Whether a step of the inner solver does."""
        return self.inner.asks_at_end(min(evaluations, self.inner.evaluations))

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; the chart is the inner solver's."""
        inner, m = self.inner.on(path, chart), self.inner.evaluations

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            noise, there, passes = state.noise, path.at(t_next), max(1, evaluations // m)
            assert noise is not None
            mask, known = (v.to(state.x.device) for v in (self.mask, self.known.to(state.x.dtype)))
            if state.x.numel() > 1 and not (_fits(known, state.x) and _fits(mask, state.x)):
                raise ValueError(
                    f"known has shape {tuple(known.shape)} and mask {tuple(mask.shape)}; expected the state's, "
                    f"{tuple(state.x.shape)}, or what broadcasts to it"
                )
            for k in range(passes):
                own, seen, back = (noise.again(3 * k + i) for i in range(3))
                x = (yield from inner(replace(state, noise=own), t, t_next, min(evaluations, m))).x
                told = float(there.alpha) * known
                if there.sigma:
                    told = told + float(there.sigma) * seen.step(t, t_next, x)
                x = torch.where(mask, told, x)
                state = state.advance(x if k + 1 == passes else returned(path, back, x, t_next, t))
            return state

        return step


def _fits(v: Tensor, x: Tensor) -> bool:
    """Whether v broadcasts to the shape of x."""
    sizes = zip(reversed(v.shape), reversed(x.shape), strict=False)
    return v.ndim <= x.ndim and all(n in (1, m) for n, m in sizes)
