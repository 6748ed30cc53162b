"""`flowsolve.batching.solve`: ODEs of more samples than f is to see at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowsolve._arguments import check_solver
from flowsolve._batch import Context, Whose
from flowsolve._clocks import columns
from flowsolve._guard import Guard
from flowsolve._layout import Layout
from flowsolve.ode import answering, laid_out, trajectory
from flowsolve.pursuit import Arrivals, Finished, pursue
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive
from flowsolve.solvers.base import Foreign, SlopeSolver
from flowsolve.streaming import Chunk, stream

__all__ = ["solutions"]

OWN = ("args", "t0", "t1", "rtol", "atol", "first_step")


class _Job:
    """Samples that go from u = 0 to 1, each in its interval; see `flowsolve.streaming.Job`."""

    gradient = "direct"

    def __init__(self, f: Callable[..., Any], solver: SlopeSolver, nfe: int | None, like: Any) -> None:
        self.solver, self.nfe = solver, nfe
        self.layout = Layout(like, True)
        first = self.layout.pack(like)
        field = Guard(partial(_along, f), "f")
        field.armed = True
        self.ask = answering(field, self.layout, first, None, {})

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The states, and what belongs to them."""
        own = {k: v.value for k, v in chunk.cond["own"].items() if v is not None}
        table = columns(own, len(chunk.x)) if own else None
        return chunk.x, Context({"args": chunk.cond["args"]}, len(chunk.x), table)

    def pursuer(self, arrivals: Arrivals, **options: Any) -> Iterator[Finished]:
        """The adaptive solve."""
        assert isinstance(self.solver, Adaptive)
        return pursue(self.solver, arrivals, 0.0, 1.0, self.ask, budget=self.nfe, **options)

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The solve of a whole batch on a fixed grid."""
        intervals = laid_out(self.solver, 0.0, 1.0, self.nfe)
        return trajectory(y, 0.0, [1.0], self.ask, context, solver=self.solver, intervals=intervals)[1]

    def leave(self, solution: Solution, context: Context) -> Solution:
        """The solution, with the times that its samples reached."""
        begin, span = (v.detach().cpu() for v in context.tree["args"][:2])
        last = begin + span
        return replace(solution, t=torch.where(solution.t == 1.0, last, begin + span * solution.t))


def _along(f: Callable[..., Any], u: Tensor, y: Any, args: tuple[Any, ...]) -> Any:
    """dy/du of samples in intervals of their own (`flowsolve._clocks`)."""
    begin, span, *more = args
    deep = y.ndim if isinstance(y, Tensor) else 2
    shape = (-1, *[1] * (deep - 1))
    t = (begin.reshape(shape) + span.reshape(shape) * u).to(u.dtype)
    return tree_map(lambda v: (span.reshape(-1, *[1] * (v.ndim - 1)) * v).to(v.dtype), f(t, y, *more))


def solutions(
    f: Callable[..., Any],
    source: Iterable[Any],
    t0: float | None,
    t1: float | None,
    *,
    solver: SlopeSolver,
    batch: int,
    args: tuple[Any, ...],
    nfe: int | None,
    progress: bool,
    total: int | None,
) -> Iterator[Solution]:
    """See `flowsolve.batching.solve`."""
    check_solver(solver)
    if not isinstance(solver, SlopeSolver) or isinstance(solver, Foreign):
        raise TypeError(f"{solver!r} is not for a stream of ODEs; use a Runge–Kutta solver such as Dopri5()")
    items = iter(source)
    head = next(items, None)
    if head is None:
        return
    like, given = _parted(head)
    names, job = frozenset(given), _Job(f, solver, nfe, like)
    dtype = job.layout.pack(like).dtype

    def chunks() -> Iterator[Chunk]:
        number, item = 0, head
        while item is not None:
            y0, own = _parted(item)
            if frozenset(own) != names:
                raise ValueError(
                    f"the source gave {sorted(own)} with one item and {sorted(names)} with the first; expected the same"
                )
            layout = Layout(y0, True)
            if (layout.spec, [s[1:] for s in layout.shapes]) != (job.layout.spec, [s[1:] for s in job.layout.shapes]):
                raise ValueError("the source gave states of other shapes than the first; expected the same a sample")
            y = layout.pack(y0).to(dtype)
            yield Chunk(
                y, _belongings(own, args, (t0, t1), solver, y), torch.arange(number, number + len(y), device="cpu")
            )
            number, item = number + len(y), next(items, None)

    for solution in stream(job, chunks(), batch, progress=progress, total=total):
        yield replace(solution, x=job.layout.unpack(solution.x))


def _parted(item: Any) -> tuple[Any, dict[str, Any]]:
    """A state, and what is its samples' own."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping) and set(item[1]) <= set(OWN):
        return item[0], dict(item[1])
    return item, {}


def _belongings(own: dict[str, Any], args: tuple[Any, ...], ends: Any, solver: Any, y: Tensor) -> dict[str, Any]:
    """What belongs to the samples of a chunk, every tensor marked with whose it is."""
    count = len(y)
    times = []
    for name, value in zip(("t0", "t1"), ends, strict=True):
        value = own.get(name, value)
        if value is None:
            raise ValueError(f"{name} is neither given nor with the items of the source; expected a time")
        t = torch.as_tensor(value, dtype=torch.float64, device=y.device)
        if t.ndim and t.shape != (count,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected a number, or one a sample, ({count},)")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{name} = {value!r}; expected finite times")
        times.append(t.expand(count).clone())
    begin, end = times
    mine = [
        v if isinstance(v, Whose) else Whose(v, isinstance(v, Tensor) and v.ndim > 0 and len(v) == count)
        for v in own.get("args", ())
    ]
    shared = [v if isinstance(v, Whose) else Whose(v, False) for v in args]
    table: dict[str, Any] = {}
    tolerances: dict[str, Any] = {k: own[k] for k in ("rtol", "atol", "first_step") if k in own}
    if tolerances:
        if not (isinstance(solver, Adaptive) and solver.adaptive):
            raise TypeError(f"{', '.join(tolerances)} given, but {type(solver).__name__} has none")
        for name in ("rtol", "atol", "first_step"):
            value = tolerances.get(name, getattr(solver, name))
            if value is not None:
                row = torch.as_tensor(value, dtype=torch.float64, device="cpu")
                row = row.expand(count) if not row.ndim else row
                if name == "first_step" and name in tolerances:
                    row = row / (end - begin).abs().clamp_min(torch.finfo(torch.float64).tiny).cpu()
                table[name] = Whose(row, True)
    return {"args": (Whose(begin, True), Whose(end - begin, True), *mine, *shared), "own": table}
