r"""`solve`: any ODE dy/dt = f(t, y), over any tree of tensors, in either direction.

Times of output (`t_eval`) do not disturb the steps: the state there comes from the method's interpolant
(`flowsolve.solvers.tableaus`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowsolve import grids
from flowsolve._arguments import check_gradient, check_solver
from flowsolve._batch import Context, Whose, send
from flowsolve._clocks import columns, cornered, of_their_own, owned, rows_of_times
from flowsolve._guard import Guard
from flowsolve._layout import Layout
from flowsolve._parameters import modules_of
from flowsolve._surroundings import eager, mapped, moving, recorded
from flowsolve.dense import Dense, Follower, Recorder, followed
from flowsolve.drivers import Ask, Travel, march
from flowsolve.events import Event, Watch
from flowsolve.gradients import Backsolve, nudged, parameters_of, shift
from flowsolve.planning import share, whole
from flowsolve.pursuit import Metered, collect, pursue, resident
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, Status
from flowsolve.solvers.base import Foreign, Query, SlopeSolver, Solver
from flowsolve.solvers.names import solver as named
from flowsolve.solvers.runge_kutta import RungeKutta

__all__ = ["answering", "check_resolution", "laid_out", "solve", "trajectory"]

HALF = (torch.float16, torch.bfloat16)


def solve(
    f: Callable[..., Any],
    y0: Any,
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    solver: Solver | str,
    args: Sequence[Any] = (),
    nfe: int | None = None,
    t_eval: Sequence[float] | Tensor | None = None,
    event: Any = None,
    step_t: Sequence[float] | Tensor | None = None,
    jump_t: Sequence[float] | Tensor | None = None,
    dense: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    first_step: float | Tensor | None = None,
    batched: bool = True,
    progress: bool = False,
    throw: bool = True,
    gradient: str = "direct",
    params: Iterable[Tensor] | None = None,
) -> Solution:
    """Solve any ODE dy/dt = f(t, y) from t0 to t1, in either direction.

    Args:
        f: the right-hand side. Its t is a tensor that broadcasts against y: 0-dimensional on a fixed grid, of shape
            (B, 1, …, 1) in an adaptive solve, where every sample has its own time; (B, 1) where y is a tree.
        y0: initial state: a tensor, or a tree (tuple, list, dict) of them, of shapes (B, *S), or any shapes with
            batched=False. f is given and returns the same tree.
        t0, t1: the interval. Tensors that require gradients receive them, for two evaluations each. Tensors of shape
            (B,) give each sample an interval of its own; the solver's clock then runs from 0 to 1 for all of them (its
            `first_step`, `min_step` and `max_step` are shares of an interval).
        solver: a Runge–Kutta solver, or its name.
        args: further arguments of f, f(t, y, *args). A tensor whose first dimension is B has a row a sample, which
            follows it as others leave an adaptive solve's batch; anything else is shared. `flowsolve.per_sample` and
            `flowsolve.shared` say otherwise.
        nfe: evaluations to spend on equal steps, or the most a sample may spend with an adaptive solver.
        t_eval: times at which to return the state, strictly monotone from t0 towards t1; the last of them ends the
            solve. Between steps the state is interpolated, which costs nothing, except with Dopri8 (3 evaluations in a
            step looked into) and with embedded methods on a fixed grid (1). A tensor of shape (B, T) has a row a sample
            (see `dense` for what that keeps and costs), and each sample ends with its own last.
        event: a function g(t, y, *args) with a number a sample, at whose first zero a sample ends; or a
            `flowsolve.Event`, which says more; or a list of them. What was met is in the solution's `events`, and
            `Status.EVENT` says that a sample ended so. Times and states are differentiable (gradient="direct").
        step_t: times at which the steps of an adaptive solve are to end.
        jump_t: the same for times at which f jumps: f is asked at the numbers beside them, on the side of the step.
        dense: keep the steps: the solution's `dense` is a function of time (`flowsolve.dense.Dense`); with
            Dopri8 for 3 evaluations a step.
        rtol, atol, first_step: in place of those of an adaptive solver; tensors of shape (B,) have one a sample.
        batched: the first axis of y0 numbers independent samples; False makes y0 one system with one step size and
            0-dimensional t.
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails.
        gradient: "direct", "checkpoint" (memory of O(√steps)) or "adjoint"; see `flowsolve.gradients`.
        params: for "adjoint": tensors that f depends on and that no search of f would find. What f is, wraps, holds or
            refers to is searched, and its graph at both ends; what is missed all the same is a ValueError in backward.

    Returns:
        A `Solution`, with x of y0's shape, or (T, *y0.shape) with t_eval, NaN where a sample did not get. Gradients
        flow if autograd records them.

    Raises:
        SolverError: a sample failed and throw is True.
        ValueError, TypeError: bad times, budget, solver, or shape of f's result.

    Examples:
        >>> y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> sol = fs.solve(lambda t, y: -2 * t * y, y0, 0.0, 1.0, solver=fs.solvers.Dopri5(1e-8, 1e-8))
        >>> torch.allclose(sol.x, y0 * torch.tensor(-1.0, dtype=torch.float64).exp(), atol=1e-7)
        True
        >>> swing = lambda t, y: {"x": y["v"], "v": -y["x"]}
        >>> sol = fs.solve(swing, {"x": y0, "v": 0 * y0}, 0, 3.141592653589793, solver=fs.solvers.Tsit5(1e-9, 1e-9))
        >>> torch.allclose(sol.x["x"], -y0, atol=1e-7)
        True
    """
    solver = cast(Solver, named(solver) if isinstance(solver, str) else solver)
    check_solver(solver)
    if not isinstance(solver, SlopeSolver):
        raise TypeError(f"{solver!r} works on flows only; a plain ODE needs a Runge–Kutta solver such as Dopri5()")
    check_gradient(gradient, solver)
    made, own = owned(solver, rtol, atol, first_step)
    solver = cast(SlopeSolver, made)
    settings: dict[str, Any] = {
        "solver": solver, "args": args, "event": event, "dense": dense, "batched": batched, "throw": throw, **own,
        "nfe": nfe, "progress": progress, "gradient": gradient, "params": params,
    }  # fmt: skip
    if any(isinstance(t, Tensor) and t.ndim and not mapped(t) for t in (t0, t1)) or rows_of_times(t_eval):
        if step_t is not None or jump_t is not None:
            raise ValueError("step_t= and jump_t= are of one interval; give t0, t1 and t_eval as numbers")
        return of_their_own(solve, f, y0, t0, t1, t_eval, **settings)
    if step_t is not None or jump_t is not None:
        return cornered(solve, f, y0, t0, t1, t_eval, step_t, jump_t, **settings)
    nfe = whole(nfe)
    start = _number(t0, "t0")
    stops = _stops(start, _number(t1, "t1"), t_eval)
    layout = Layout(y0, batched)
    y = layout.pack(y0)
    field = Guard(partial(_spread, _fed(f, y0)) if args else _fed(f, y0), "f")
    field.armed = True
    tree = {"args": tuple(Whose(v, False) if layout.single and not isinstance(v, Whose) else v for v in args)}
    context = Context(tree if args else None, len(y), columns(own, len(y)) if own else None)
    check_resolution(start, stops[-1], y.dtype)

    clock: dict[Any, Tensor] = {}
    dtype, plain, known = y.dtype, not (layout.tree or layout.single), clock.get
    ask = answering(field, layout, y, len(y), clock)
    answer: Ask = ask
    intervals = laid_out(solver, start, stops[-1], nfe)
    if intervals is not None and isinstance(solver, RungeKutta):  # all times of the grid go to the device at once
        asked = list(dict.fromkeys(solver.times(intervals)))
        clock.update(zip(asked, torch.tensor(asked, dtype=y.dtype, device=y.device).unbind(0), strict=True))
        shape = y.shape

        def answer(query: Query, context: Any) -> Tensor:
            """What `ask` answers, at less cost where all is as usual."""
            if plain and query.nodes is None and (time := known(query.time)) is not None:
                slope: Tensor = field(time, query.x, context)
                if slope.__class__ is Tensor and slope.dtype is dtype and slope.shape == shape:
                    return slope
                return layout.checked(slope, query.x)
            found: Tensor = ask(query, context)
            return found

    extra = 0
    if moving(t0):
        e = shift(t0)
        y, extra = nudged(ask, y, start + e, -e, context.tree), 2
    watch, keeper = None, Recorder() if dense else None
    if event is not None or dense:
        _check_followed(event, solver, gradient)
    if event is not None:
        events = [
            e if isinstance(e, Event) else Event(e) for e in (event if isinstance(event, list | tuple) else [event])
        ]
        values = [partial(layout.number, e.g) for e in events]
        watch = Watch(events, values, len(y), ask)
    followers: list[Follower] = [v for v in (watch, keeper) if v is not None]
    opening = y
    states, solution = trajectory(
        y, start, stops, answer, context, solver=solver, intervals=intervals, budget=nfe, dense=t_eval is not None,
        mode=gradient if torch.is_grad_enabled() else "direct", functions=[f, *_listed(params)], progress=progress,
        followers=followers,
    )  # fmt: skip
    if watch is not None:
        solution = watch.closed(solution)
        if t_eval is None:
            states = solution.x.unsqueeze(0)
        elif intervals is not None:
            states = watch.cut(states, stops)
    ends = [t1] if t_eval is None else list(t_eval)
    if any(moving(end) for end in ends):
        moved = []
        for x, end, stop in zip(states, ends, stops, strict=True):
            if moving(end):
                e = shift(end)
                if watch is not None and t_eval is None:  # what ended before does not move with the end
                    e = e * (solution.status != Status.EVENT).to(e)
                x, extra = nudged(ask, x, stop, e, context.tree), extra + 2
            moved.append(x)
        states = torch.stack(moved)
    solution = replace(solution, nfe=solution.nfe + extra)
    if watch is not None:
        solution = replace(solution, events=watch.occurrences(partial(layout.unpack, many=True), y))
    if keeper is not None:
        solution = replace(solution, dense=_dense(keeper, opening, start, stops[-1], solution, layout))
    if t_eval is None:
        solution = replace(solution, x=layout.unpack(states[-1]))
    else:
        solution = replace(
            solution, x=layout.unpack(states, lead=1), t_eval=torch.tensor(stops, dtype=torch.float64, device="cpu")
        )
    return solution.raise_on_failure() if throw else solution


def answering(field: Guard, layout: Layout, y: Tensor, count: int | None, clock: dict[Any, Tensor]) -> Ask:
    """What answers queries of a solve.

    Args:
        field: f(t, y, args).
        y: the state at the start, for its device and dtype.
        count: the number of samples, where they are there as a whole.
        clock: tensors of times that are known beforehand.
    """
    device, dtype, plain, known = y.device, y.dtype, not (layout.tree or layout.single), clock.get

    def rows(times: Tensor) -> tuple[Tensor, ...]:
        return layout.time(send(times, y, dtype)).unbind(0)

    def ask(query: Query, context: Any) -> Tensor:
        x, nodes = query.x, query.nodes
        if nodes is not None:
            time = nodes.once(rows, rows)[query.row]
        elif (found := known(query.time)) is not None:
            time = found
        else:
            t = query.time
            time = (
                layout.time(send(t, x, dtype))
                if isinstance(t, Tensor)
                else torch.full((), t, dtype=dtype, device=device)
            )
        if plain:
            return layout.checked(called(time, x, context), x)
        return layout.slope(field, time, x, context)

    def called(time: Tensor, x: Tensor, given: Any) -> Any:
        try:
            return field(time, x, given)
        except RuntimeError as error:
            if count is None or len(x) == count or type(error).__module__ != "builtins":
                raise
            raise RuntimeError(
                f"f failed with the {len(x)} of {count} samples that are still under way ({error}); tensors with a "
                "row a sample that it holds or closes over are of all of them: hand them over by args=, as in "
                "solve(lambda t, y, rate: -rate * y, …, args=(rate,))"
            ) from error

    return ask


def laid_out(solver: SlopeSolver, start: float, end: float, nfe: int | None) -> list[tuple[float, float, int]] | None:
    """The intervals (s, s_next, evaluations) of a fixed grid; None for a solver that chooses its steps."""
    if solver.chooses_steps:
        return None
    if nfe is None:
        raise ValueError(f"{type(solver).__name__} steps on a fixed grid: give nfe=…")
    counts = solver.schedule(nfe)
    times = share(grids.fractions(start, end, nfe), counts)
    return list(zip(times, times[1:], counts, strict=False))


def trajectory(
    y: Tensor,
    start: float,
    stops: Sequence[float],
    ask: Ask,
    context: Context,
    *,
    solver: SlopeSolver,
    intervals: Sequence[tuple[float, float, int]] | None = None,
    budget: int | Metered | None = None,
    dense: bool = False,
    mode: str = "direct",
    functions: Sequence[Any] = (),
    followers: Sequence[Follower] = (),
    back: tuple[RungeKutta, Any] | None = None,
    progress: bool = False,
) -> tuple[Tensor, Solution]:
    """The states of an ODE at some stops, and the solution at the last.

    Args:
        y: the state at the start, shape (B, *S).
        start: the time there.
        stops: times, strictly monotone from the start on.
        ask: dy/ds for a query.
        context: what belongs to the samples.
        intervals: (s, s_next, evaluations) of a fixed grid that ends at the last stop; None for an adaptive solve.
        budget: the most evaluations a sample may cost in an adaptive solve.
        dense: whether the states at all stops are wanted, rather than the last.
        mode: how gradients are recorded, if autograd does; see `flowsolve.gradients`.
        functions: where to look for parameters ("adjoint"): callables, modules and tensors.
        followers: what goes along ("direct", or without gradients).
        back: another solver and intervals for the adjoint's way back.

    Returns:
        States of shape (T, B, *S), with T = 1 unless dense; and the solution, whose times are the clock of the solve.
    """
    if mode == "adjoint":
        return _adjoint(y, start, stops, ask, context, solver, intervals, budget, dense, functions, progress, back)
    if mode == "checkpoint" and recorded():
        raise NotImplementedError(
            "gradient='checkpoint' is within a reverse-mode transform of torch.func, which takes no checkpoints; use "
            "gradient='direct', or autograd itself"
        )
    end, count = stops[-1], len(y)
    wanted = stops if dense else [end]
    if count == 0 or start == end:
        zero = torch.zeros(count, dtype=torch.int64, device="cpu")
        there = torch.full((count,), start, dtype=torch.float64, device="cpu")
        return y.expand(len(wanted), *y.shape), Solution(y, zero, zero, zero, zero, there)
    if isinstance(solver, Foreign):
        assert not isinstance(budget, Metered)
        return _foreign(y, start, wanted, ask, context, solver, budget, functions)
    if intervals is not None:
        watch: dict[int, list[float]] = {}
        reached = [abs(b - start) for _, b, _ in intervals] if dense else []
        assert isinstance(solver, RungeKutta)
        for stop in stops if dense else ():
            if stop != start:
                watch.setdefault(bisect_left(reached, abs(stop - start)), []).append(stop)
        travel: Travel = partial(solver.sweep, intervals)
        if followers:
            travel = followed(solver, intervals, followers, context)
        seen, solution = march(
            travel, y, intervals, ask, context.tree, start=start, watch=watch, segments=mode == "checkpoint",
            progress=progress,
        )  # fmt: skip
        if not dense:
            return solution.x.unsqueeze(0), solution
        return torch.stack([y, *seen] if stops[0] == start else seen), solution
    assert isinstance(solver, Adaptive)
    return _pursued(y, start, end, ask, context, solver, budget, stops if dense else (), mode, progress, followers)


@eager
def _foreign(
    y: Tensor,
    start: float,
    wanted: Sequence[float],
    ask: Ask,
    context: Context,
    solver: Foreign,
    budget: int | None,
    functions: Sequence[Any],
) -> tuple[Tensor, Solution]:
    """`trajectory` by another library's loop."""
    extra = 0

    def field(t: float, x: Tensor) -> Tensor:
        nonlocal extra
        query = Query(x, t)
        slope: Tensor = ask(query, context.tree)
        extra += query.cost - 1
        return slope

    states, nfe, status = solver.trajectory(field, y, start, wanted, budget, functions)
    nfe = nfe + extra
    zero, there = torch.zeros_like(nfe), torch.where(status == Status.SUCCESS, wanted[-1], start)
    return states, Solution(states[-1], nfe, status, zero, zero, there)


@eager
def _pursued(
    y: Tensor,
    start: float,
    end: float,
    ask: Ask,
    context: Context,
    solver: Adaptive,
    budget: int | Metered | None,
    stops: Sequence[float],
    mode: str,
    progress: bool,
    followers: Sequence[Follower],
) -> tuple[Tensor, Solution]:
    """`trajectory` by steps that the solver chooses."""
    parts = list(
        pursue(
            solver, resident(y, context), start, end, ask, width=len(y), stops=stops, budget=budget,
            segments=mode == "checkpoint", progress=progress, total=len(y), followers=followers,
        )
    )  # fmt: skip
    looks, solution = collect(parts, y, len(stops))
    return solution.x.unsqueeze(0) if looks is None else looks, solution


@eager
def _adjoint(
    y: Tensor,
    start: float,
    stops: Sequence[float],
    ask: Ask,
    context: Context,
    solver: SlopeSolver,
    intervals: Any,
    budget: int | Metered | None,
    dense: bool,
    functions: Sequence[Any],
    progress: bool,
    back: tuple[RungeKutta, Any] | None,
) -> tuple[Tensor, Solution]:
    """`trajectory` without a graph, and the adjoint solve in its place."""
    with torch.no_grad():
        states, solution = trajectory(
            y.detach(), start, stops, ask, context, solver=solver, intervals=intervals, budget=budget, dense=dense,
            progress=progress,
        )  # fmt: skip
    solution.raise_on_failure()  # a sample that did not arrive has no way back
    if start == stops[-1] or not len(y):
        return states, solution
    if context.requires_grad:
        raise ValueError("the adjoint carries no gradients to per-sample conditioning; use gradient='checkpoint'")
    one = context.select(np.zeros(1, dtype=np.int64))
    with torch.enable_grad():
        ends = [(y[:1].detach(), start), (states[-1][:1].detach(), stops[-1])]
        slopes = [ask(Query(x, torch.full((1,), s, dtype=torch.float64, device="cpu")), one.tree) for x, s in ends]
    assert isinstance(solver, RungeKutta)
    parameters = parameters_of(functions, slopes)
    way = back or (solver, intervals)
    problem = Backsolve(way[0], ask, context, start, list(stops) if dense else [stops[-1]], way[1], parameters)
    states = problem.attach(y, states)
    return states, replace(solution, x=states[-1])


def _fed(f: Callable[[Tensor, Any], Any], y0: Any) -> Callable[[Tensor, Any], Any]:
    """f, given its network's own half precision, if it has one; the state is float32 between the calls."""
    if not isinstance(y0, Tensor):
        return f
    found = next((p.dtype for m in modules_of(f) for p in m.parameters() if p.dtype.is_floating_point), None)
    return f if found not in HALF else lambda t, y, *more: f(t.to(found), y.to(found), *more)


def _check_followed(event: Any, solver: SlopeSolver, gradient: str) -> None:
    """Raise unless a solve can be followed."""
    what = "event=" if event is not None else "dense=True"
    if isinstance(solver, Foreign):
        raise TypeError(f"{solver!r} runs a loop of its own, which has no {what}; use a solver such as Dopri5()")
    if gradient != "direct" and torch.is_grad_enabled():
        raise ValueError(
            f"gradient={gradient!r} with {what}, which keeps its graph; use gradient='direct', or find the times of "
            "events under torch.no_grad() and solve to them (t1 may have the shape (B,))"
        )


def _dense(keeper: Recorder, y: Tensor, start: float, end: float, solution: Solution, layout: Layout) -> Dense:
    """The solution as a function of time."""
    begin, limit = np.full(len(y), start), np.full(len(y), end)
    reached = solution.t.detach().numpy()
    return Dense(keeper.pieces, y, begin, reached, limit, layout.unpack, single=layout.single)


def _spread(f: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Any:
    """f(t, y, *args)."""
    return f(t, y, *args)


def _listed(params: Iterable[Tensor] | None) -> list[Tensor]:
    found = list(params or ())
    if wrong := [type(v).__name__ for v in found if not isinstance(v, Tensor)]:
        raise TypeError(f"params holds a {wrong[0]}; expected tensors, such as net.parameters()")
    return found


def _number(t: float | Tensor, name: str) -> float:
    if isinstance(t, Tensor) and mapped(t):
        raise ValueError(
            f"{name} is mapped by torch.func.vmap, but the solves behind one call share their times; bring them to one "
            "interval: y'(u) = (t1 - t0) f(t0 + u (t1 - t0), y) for u from 0 to 1"
        )
    found = float(t.detach() if isinstance(t, Tensor) else t)
    if not math.isfinite(found):
        raise ValueError(f"{name} = {found}; expected a finite time")
    return found


def _stops(t0: float, t1: float, t_eval: Sequence[float] | Tensor | None) -> list[float]:
    if t_eval is None:
        return [t1]
    stops = [_number(t, f"t_eval[{i}]") for i, t in enumerate(t_eval)]
    sign = 1.0 if t1 >= t0 else -1.0
    line = [sign * t for t in (t0, *stops, t1)]
    if not stops or any(b < a for a, b in pairwise(line)) or len(set(stops)) < len(stops):
        raise ValueError(f"t_eval = {stops}; expected strictly monotone times from t0 = {t0:g} towards t1 = {t1:g}")
    return stops


def check_resolution(t0: float, t1: float, dtype: torch.dtype) -> None:
    """f reads time in the state's dtype, which must tell the times of the interval apart."""
    grain = torch.finfo(dtype).eps * max(abs(t0), abs(t1))
    if t0 != t1 and grain > 1e-3 * abs(t1 - t0):
        raise ValueError(
            f"between t0 = {t0!r} and t1 = {t1!r} the {str(dtype).removeprefix('torch.')} numbers that f reads as t "
            f"are {grain:.2g} apart; give y0 in float64, or measure time from t0"
        )
