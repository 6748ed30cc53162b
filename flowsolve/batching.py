r"""Data sets that are larger than memory: `sample`, `encode`, `log_prob` and `solve` over iterators.

Each function takes its samples from an iterator of tensors (n, *S), of any sizes n, or of pairs of such a tensor and
the network's keyword arguments for it, and yields a result for each of them, in order. At most `batch` samples are
under way at a time; with an adaptive solver a sample that finishes makes room for the next, across the borders of the
iterator's tensors (`flowsolve.streaming`). A result is the same, to rounding, as without batching.

A failed sample says so in the status of its result; nothing is raised on the way, so that a long run is not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from flowsolve._arguments import check_flow, check_interval, device_of, shape_of, state
from flowsolve._solving import solutions
from flowsolve._surroundings import refuse
from flowsolve.brownian import named
from flowsolve.charts import Chart
from flowsolve.conditioning import common, rows_of
from flowsolve.flow import Flow
from flowsolve.grids import Final
from flowsolve.likelihood.log_prob import LogProb, falling, reading
from flowsolve.likelihood.prior import Prior
from flowsolve.likelihood.trace import Trace
from flowsolve.noise import START, Seed
from flowsolve.passage import Passage
from flowsolve.planning import at_least, whole
from flowsolve.solution import Solution
from flowsolve.solvers import auto
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Solver
from flowsolve.solvers.names import solver as ode_solver
from flowsolve.streaming import Chunk, numbered, stream

__all__ = ["encode", "log_prob", "sample", "solve"]


def sample(
    flow: Flow,
    shape: Sequence[int],
    *,
    solver: Solver | Auto | str = "auto",
    batch: int,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval_end: float = 1.0,
    final: str | Final = "path",
    seed: Seed = 0,
    noise: str = "fresh",
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    capture: bool | str = False,
) -> Iterator[Solution]:
    """Sample a flow from noise, in pieces of `batch` samples.

    Args:
        shape: (N, *S), the number of samples in all and the shape of each.
        batch: the most samples the network sees at a time, and the size of the pieces yielded.
        interval_end: the flow time to stop at.

    The other arguments are those of `flowsolve.sample`, except that cond is shared by all samples, but for tensors
    marked `flowsolve.per_sample`, with N rows; one as long as N or batch must be marked as one or the other.

    Yields:
        `Solution`s of `batch` samples each (the last may be smaller), the same as `flowsolve.sample` gives.
    """
    check_flow(flow, cond)
    total, *event = shape_of(shape)
    check_interval((0.0, interval_end))
    whole = named(noise).for_batch(seed, total)
    method, grid = auto.resolve(solver, grid, flow.path, at_least(nfe, flow))
    passage = Passage(
        flow, (0.0, interval_end), solver=method, nfe=nfe, grid=grid, chart=chart, final=final, seed=whole.seed,
        noise=type(whole), capture=capture,
    )  # fmt: skip
    place, given = device or device_of(flow.net), common(cond, (total, batch))

    def chunks() -> Iterator[Chunk]:
        for first in range(0, total, batch):
            part = whole.select(torch.arange(first, min(total, first + batch), device="cpu"))
            blank = state(torch.empty((len(part.samples), *event), device=place, dtype=dtype))
            start = part.normal(START, 0, blank) * flow.path.prior_std
            yield Chunk(start, rows_of(given, part.samples), part.samples)

    return _quiet(stream(passage, chunks(), batch, progress=progress, total=total))


def encode(
    flow: Flow,
    source: Iterable[Any],
    *,
    solver: Solver | Auto | str = "auto",
    batch: int,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Iterator[Solution]:
    """Carry data back to noise.

    Args:
        source: tensors (n, *S), or pairs (tensor, keyword arguments).
        batch: the most samples the network sees at a time.
        cond: keyword arguments shared by all samples, or marked `flowsolve.per_sample`.
        total: the number of samples to come, for the progress bar.

    The other arguments are those of `flowsolve.encode`.

    Yields:
        A `Solution` for each tensor.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.CondOT())
        >>> data = (torch.full((n, 1), 0.9) for n in (3, 1, 2))
        >>> [len(part.x) for part in fs.batching.encode(flow, data, solver=fs.solvers.Tsit5(), batch=4)]
        [3, 1, 2]
    """
    check_flow(flow, cond)
    interval = interval or (flow.path.window[1], 0.0)
    check_interval(interval)
    method, grid = auto.resolve(solver, grid, flow.path, at_least(nfe, flow))
    passage = Passage(flow, interval, solver=method, nfe=nfe, grid=grid, chart=chart)
    given = common(cond, (total, batch))
    return _quiet(stream(passage, numbered(source, given), batch, progress=progress, total=total))


def log_prob(
    flow: Flow,
    source: Iterable[Any],
    *,
    solver: Solver | str = "auto",
    batch: int,
    trace: str | Trace = "hutchinson",
    probes: int | None = None,
    seed: int = 0,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | Chart | None = None,
    interval: tuple[float, float] | None = None,
    prior: Prior = None,
    repeats: int | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
    total: int | None = None,
    capture: bool = False,
) -> Iterator[LogProb]:
    """The log-density that a flow gives to samples, in nats.

    Args:
        source: tensors (n, *S), or pairs (tensor, keyword arguments).
        batch: the most samples the network sees at a time.
        cond: keyword arguments shared by all samples, or marked `flowsolve.per_sample`.
        total: the number of samples to come, for the progress bar.

    The other arguments are those of `flowsolve.log_prob`. Sample k of the stream has the probes of sample k there.

    Yields:
        A `LogProb` for each tensor.
    """
    check_flow(flow, cond)
    job = reading(
        flow, falling(flow, interval), solver=solver, trace=trace, probes=probes, seed=seed, nfe=nfe,
        grid=grid, chart=chart, prior=prior, repeats=repeats, tolerance=tolerance, verify=verify, capture=capture,
    )  # fmt: skip
    given = common(cond, (total, batch))
    return _quiet(stream(job, numbered(source, given), batch, progress=progress, total=total))


def solve(
    f: Callable[..., Any],
    source: Iterable[Any],
    t0: float | None = None,
    t1: float | None = None,
    *,
    solver: Solver | str,
    batch: int,
    args: Sequence[Any] = (),
    nfe: int | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Iterator[Solution]:
    """Solve dy/dt = f(t, y, *args) for samples that come from an iterator.

    Args:
        f: the right-hand side, as for `flowsolve.solve`.
        source: states (n, *S), or trees of such, of any n; or pairs of one and a mapping of what is its samples' own:
            args (before those shared), t0, t1, rtol, atol and first_step, numbers or tensors of shape (n,).
        t0, t1: the interval, where the source does not bring it.
        solver: a Runge–Kutta solver, or its name.
        batch: the most samples f sees at a time.
        args: further arguments of f that all samples share.
        nfe: evaluations to spend on equal steps, or the most a sample may spend with an adaptive solver.
        total: the number of samples to come, for the progress bar.

    Yields:
        A `Solution` for each item, the same as `flowsolve.solve` gives.

    Examples:
        >>> items = ((torch.ones(n, 1, dtype=torch.float64), {"args": (torch.arange(1.0, n + 1),)}) for n in (3, 2))
        >>> decay = lambda t, y, rate: -rate[:, None] * y
        >>> found = list(fs.batching.solve(decay, items, 0.0, 1.0, solver=fs.solvers.Tsit5(1e-8, 1e-8), batch=2))
        >>> [round(float(v), 6) for v in found[0].x]
        [0.367879, 0.135335, 0.049787]
    """
    method: Any = ode_solver(solver) if isinstance(solver, str) else solver
    return _quiet(
        solutions(
            f, source, t0, t1, solver=method, batch=batch, args=tuple(args), nfe=whole(nfe), progress=progress,
            total=total,
        )
    )  # fmt: skip


def _quiet(results: Iterator[Any]) -> Iterator[Any]:
    """The results, computed without recording gradients."""
    refuse("flowsolve.batching, whose results have no derivatives,", "use the function of that name, with batch=")
    while True:
        with torch.no_grad():
            try:
                result = next(results)
            except StopIteration:
                return
        yield result
