r"""`solve`: any ODE dy/dt = f(t, y), over any tree of tensors, in either direction.

Times of output (`t_eval`) do not disturb the steps: the state there comes from the method's interpolant
(`flowsolve.solvers.tableaus`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from flowsolve import grids
from flowsolve._arguments import check_gradient, check_solver, state
from flowsolve._batch import Context, Whose, hosted, send, state_dtype
from flowsolve._guard import Guard
from flowsolve._parameters import modules_of
from flowsolve._surroundings import eager, mapped, moving, recorded
from flowsolve.drivers import Ask, march
from flowsolve.gradients import Backsolve, nudged, parameters_of, shift
from flowsolve.planning import share, whole
from flowsolve.pursuit import Metered, collect, pursue, resident
from flowsolve.solution import Solution
from flowsolve.solvers.adaptive import Adaptive, Status
from flowsolve.solvers.base import Foreign, Query, SlopeSolver, Solver
from flowsolve.solvers.names import solver as named
from flowsolve.solvers.runge_kutta import RungeKutta

__all__ = ["check_resolution", "solve", "trajectory"]

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
            step looked into) and with embedded methods on a fixed grid (1).
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
    if any(isinstance(t, Tensor) and t.ndim == 1 and not mapped(t) for t in (t0, t1)):
        settings: dict[str, Any] = {"nfe": nfe, "progress": progress, "gradient": gradient, "params": params}
        return _of_their_own(f, y0, t0, t1, args, t_eval, batched, throw, solver=solver, **settings)
    nfe = whole(nfe)
    start = _number(t0, "t0")
    stops = _stops(start, _number(t1, "t1"), t_eval)
    layout = _Layout(y0, batched)
    y = layout.pack(y0)
    field = Guard(partial(_spread, _fed(f, y0)) if args else _fed(f, y0), "f")
    field.armed = True
    tree = {"args": tuple(Whose(v, False) if layout.single and not isinstance(v, Whose) else v for v in args)}
    context = Context(tree if args else None, len(y))
    check_resolution(start, stops[-1], y.dtype)

    clock: dict[Any, Tensor] = {}
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
            if len(x) == len(y) or type(error).__module__ != "builtins":
                raise
            raise RuntimeError(
                f"f failed with the {len(x)} of {len(y)} samples that are still under way ({error}); tensors with a "
                "row a sample that it holds or closes over are of all of them: hand them over by args=, as in "
                "solve(lambda t, y, rate: -rate * y, …, args=(rate,))"
            ) from error

    answer: Ask = ask
    intervals = None
    if not solver.chooses_steps:
        if nfe is None:
            raise ValueError(f"{type(solver).__name__} steps on a fixed grid: give nfe=…")
        counts = solver.schedule(nfe)
        times = share(grids.fractions(start, stops[-1], nfe), counts)
        intervals = list(zip(times, times[1:], counts, strict=False))
        if isinstance(solver, RungeKutta):  # all times of the grid go to the device at once
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
                return ask(query, context)

    extra = 0
    if moving(t0):
        e = shift(t0)
        y, extra = nudged(ask, y, start + e, -e, context.tree), 2
    states, solution = trajectory(
        y, start, stops, answer, context, solver=solver, intervals=intervals, budget=nfe, dense=t_eval is not None,
        mode=gradient if torch.is_grad_enabled() else "direct", functions=[f, *_listed(params)], progress=progress,
    )  # fmt: skip
    ends = [t1] if t_eval is None else list(t_eval)
    if any(moving(end) for end in ends):
        moved = []
        for x, end, stop in zip(states, ends, stops, strict=True):
            if moving(end):
                x, extra = nudged(ask, x, stop, shift(end), context.tree), extra + 2
            moved.append(x)
        states = torch.stack(moved)
    solution = replace(solution, nfe=solution.nfe + extra)
    if t_eval is None:
        solution = replace(solution, x=layout.unpack(states[-1]))
    else:
        solution = replace(
            solution, x=layout.unpack(states, lead=1), t_eval=torch.tensor(stops, dtype=torch.float64, device="cpu")
        )
    return solution.raise_on_failure() if throw else solution


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

    Returns:
        States of shape (T, B, *S), with T = 1 unless dense; and the solution, whose times are the clock of the solve.
    """
    if mode == "adjoint":
        return _adjoint(y, start, stops, ask, context, solver, intervals, budget, dense, functions, progress)
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
        travel = partial(solver.sweep, intervals)
        seen, solution = march(
            travel, y, intervals, ask, context.tree, start=start, watch=watch, segments=mode == "checkpoint",
            progress=progress,
        )  # fmt: skip
        if not dense:
            return solution.x.unsqueeze(0), solution
        return torch.stack([y, *seen] if stops[0] == start else seen), solution
    assert isinstance(solver, Adaptive)
    return _pursued(y, start, end, ask, context, solver, budget, stops if dense else (), mode, progress)


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
) -> tuple[Tensor, Solution]:
    """`trajectory` by steps that the solver chooses."""
    parts = list(
        pursue(
            solver, resident(y, context), start, end, ask, width=len(y), stops=stops, budget=budget,
            segments=mode == "checkpoint", progress=progress, total=len(y),
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
    problem = Backsolve(solver, ask, context, start, list(stops) if dense else [stops[-1]], intervals, parameters)
    states = problem.attach(y, states)
    return states, replace(solution, x=states[-1])


class _Layout:
    """How the state that f knows is held as one tensor of shape (B, *S)."""

    def __init__(self, y0: Any, batched: bool) -> None:
        leaves, self.spec = tree_flatten(y0)
        self.tree = not isinstance(y0, Tensor)
        if not leaves:
            raise TypeError(f"y0 = {y0!r} holds no tensor; expected a tensor, or a tree of them with one at least")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"the state y0 holds a {got}; expected floating-point tensors")
        self.single = not batched or any(leaf.ndim == 0 for leaf in leaves)
        if not self.single and len({len(leaf) for leaf in leaves}) > 1:
            sizes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(
                f"the tensors of y0 have shapes {sizes}; expected the same first dimension, the batch, or batched=False"
            )
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.sizes = [(shape if self.single else shape[1:]).numel() for shape in self.shapes]
        self.dtype = reduce(torch.promote_types, (state_dtype(leaf) for leaf in leaves))

    def pack(self, y0: Any) -> Tensor:
        """The state as it is integrated."""
        leaves, _ = tree_flatten(y0)
        if not self.tree:
            return state(leaves[0].unsqueeze(0) if self.single else leaves[0])
        return torch.cat([self._row(leaf.to(self.dtype)) for leaf in leaves], 1)

    def unpack(self, x: Tensor, lead: int = 0, like: bool = False) -> Any:
        """The state as f knows it, behind `lead` more dimensions; with the leaves' own dtypes if `like`."""
        if not self.tree:
            return x.squeeze(lead) if self.single else x
        front, count = x.shape[:lead], x.shape[lead]
        leaves = []
        for part, shape, dtype in zip(x.split(self.sizes, -1), self.shapes, self.dtypes, strict=True):
            leaf = part.reshape((*front, *shape) if self.single else (*front, count, *shape[1:]))
            leaves.append(leaf.to(dtype if like else torch.promote_types(dtype, torch.float32)))
        return tree_unflatten(leaves, self.spec)

    def time(self, t: Tensor) -> Tensor:
        """Times of shape (…, B) as f is given them."""
        if self.single:
            return t[..., 0]
        return t.reshape(*t.shape, *[1] * (1 if self.tree else len(self.shapes[0]) - 1))

    def slope(self, f: Guard, t: Tensor, x: Tensor, args: Any) -> Tensor:
        """f(t, y) as one tensor."""
        if not self.tree:
            given = x[0] if self.single else x
            return self.checked(f(t, given, args), given)
        given = self.unpack(x, like=True)
        # f is given copies, which it may write into, and what it returns is copied below.
        more = args or {}
        answer = f.function(lambda: f.f(t.clone(), self.unpack(x.clone(), like=True), **more), x.device)
        leaves, spec = tree_flatten(answer)
        if spec != self.spec:
            leaves, spec = tree_flatten(_ordered(answer, given))
        expected = [v.shape for v in tree_flatten(given)[0]]
        if spec != self.spec or [getattr(v, "shape", None) for v in leaves] != expected:
            raise ValueError(
                f"f(t, y) returned {_outline(leaves, spec)}; expected the structure of y0, {_outline(given)}"
            )
        for leaf in leaves:
            _real(leaf, x)
        return torch.cat([self._row(v.to(x.dtype)) for v in leaves], 1)

    def checked(self, slope: Any, given: Tensor) -> Tensor:
        """What f returned for a tensor, if it is of the same shape, in the dtype of the state."""
        if not isinstance(slope, Tensor) or slope.shape != given.shape:
            got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
            raise ValueError(f"f(t, y) returned {got} for y of shape {tuple(given.shape)}; expected the same shape")
        _real(slope, given)
        found: Tensor = slope.unsqueeze(0) if self.single else slope
        return found if found.dtype is given.dtype else found.to(given.dtype)

    def _row(self, leaf: Tensor) -> Tensor:
        return leaf.reshape(1, -1) if self.single else leaf.reshape(len(leaf), -1)


def _fed(f: Callable[[Tensor, Any], Any], y0: Any) -> Callable[[Tensor, Any], Any]:
    """f, given its network's own half precision, if it has one; the state is float32 between the calls."""
    if not isinstance(y0, Tensor):
        return f
    found = next((p.dtype for m in modules_of(f) for p in m.parameters() if p.dtype.is_floating_point), None)
    return f if found not in HALF else lambda t, y, *more: f(t.to(found), y.to(found), *more)


def _spread(f: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Any:
    """f(t, y, *args)."""
    return f(t, y, *args)


def _of_their_own(
    f: Callable[..., Any],
    y0: Any,
    t0: float | Tensor,
    t1: float | Tensor,
    args: Sequence[Any],
    t_eval: Any,
    batched: bool,
    throw: bool,
    **settings: Any,
) -> Solution:
    """`solve` where each sample has an interval of its own: in u from 0 to 1, with t = t0 + (t1 − t0) u."""
    if t_eval is not None or not batched:
        raise ValueError("times of shape (B,) go with neither t_eval= nor batched=False; give the samples one interval")
    leaves = tree_flatten(y0)[0]
    count, device = len(leaves[0]), leaves[0].device
    times = [hosted(t, dtype=torch.float64).to(device) for t in (t0, t1)]
    if wrong := [tuple(t.shape) for t in times if t.ndim and len(t) != count]:
        raise ValueError(f"t0 or t1 has shape {wrong[0]}; expected a number, or one a sample, ({count},)")
    begin, end = (t.expand(count) for t in times)

    def g(u: Tensor, y: Any, begin: Tensor, span: Tensor, *more: Any) -> Any:
        wide = [v.ndim for v in tree_flatten(y)[0]]
        depth = wide[0] if isinstance(y, Tensor) else 2
        shape = (-1, *[1] * (depth - 1))
        t = (begin.reshape(shape) + span.reshape(shape) * u).to(u.dtype)
        return tree_map(lambda v: (span.reshape(-1, *[1] * (v.ndim - 1)) * v).to(v.dtype), f(t, y, *more))

    own = (Whose(begin, True), Whose(end - begin, True), *args)
    solution = solve(g, y0, 0.0, 1.0, args=own, throw=False, **settings)
    first, last = (t.detach().cpu() for t in (begin, end))
    reached = torch.where(solution.t == 1.0, last, first + (last - first) * solution.t)
    solution = replace(solution, t=reached)
    return solution.raise_on_failure() if throw else solution


def _ordered(tree: Any, like: Any) -> Any:
    """A tree with the keys of its dicts in another's order, where they are the same keys."""
    if isinstance(tree, dict) and isinstance(like, dict) and tree.keys() == like.keys():
        return {k: _ordered(tree[k], v) for k, v in like.items()}
    if type(tree) is type(like) and type(like) in (list, tuple) and len(tree) == len(like):
        return type(like)(_ordered(a, b) for a, b in zip(tree, like, strict=True))
    return tree


def _outline(tree: Any, spec: Any = None) -> str:
    """A tree with shapes in place of its tensors."""
    leaves, form = (tree, spec) if spec is not None else tree_flatten(tree)
    told = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
    return str(tree_unflatten(told, form))


def _real(slope: Tensor, y: Tensor) -> None:
    """Raise TypeError for a complex slope of a real state."""
    if slope.is_complex() and not y.is_complex():
        raise TypeError(
            f"f(t, y) returned {slope.dtype} for y of {y.dtype}; expected real numbers, since the imaginary "
            "part would be lost"
        )


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
