r"""torchdiffeq's `odeint` and `odeint_adjoint`, on flowsolve's solvers: existing code changes its import line.

    from flowsolve.compat.torchdiffeq import odeint          # instead of: from torchdiffeq import odeint

The state is one system with one step size, as there, and nothing of torchdiffeq is installed or run.

| method | here |
|---|---|
| `dopri5` (the default), `bosh3` | the same pairs |
| `dopri8` | Hairer's dop853, with two error estimates |
| `adaptive_heun`, `fehlberg2` | the same pairs |
| `tsit5` | Tsitouras' pair, which torchdiffeq has not |
| `euler`, `midpoint`, `heun2`, `heun3`, `rk4` (Kutta's 3/8 rule) | the same, on the same grids: equal to rounding |

What is the same: shapes, dtypes, tuples, times in either direction, the norm (the root mean square; of a tuple, the
largest of its members'), default tolerances, grids and what lies between their nodes, callbacks.

What differs:

* Adaptive steps are controlled by flowsolve's PI controller, end on t[−1] rather than beyond it, and between them the
  pair's own interpolant serves. Results agree to the tolerance, not to rounding.
* A solve that fails raises `flowsolve.SolverError` (there: AssertionError, or NaN in the result). A step that fails its
  error test is never accepted, not even at `min_step`.
* Unknown options are a TypeError (there: a warning).
* `max_num_steps` is for the whole solve: so many for each interval of t together.
* Derivatives with respect to t are those of the solution, $\partial y(t_i)/\partial t_i = f(t_i, y_i)$, with either
  function, first and second (`flowsolve.gradients`): two evaluations for each time. torchdiffeq's `odeint`
  differentiates the steps, grid included.
* The adjoint finds the parameters itself, and integrates their gradients beside the steps (`flowsolve.gradients`), so
  that they are no part of any norm: what torchdiffeq calls a seminorm.

What is not here, and says so: `event_fn`, `step_t`, `jump_t`, `perturb`, tolerances for single components, complex
states, and the methods of Adams and scipy; the last are at hand as `flowsolve.solvers.bridges.Torchdiffeq`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import Context, state_dtype
from flowsolve._surroundings import mapped, moving
from flowsolve.drivers import Ask
from flowsolve.gradients import nudged, shift
from flowsolve.kernels import aim, host, rms
from flowsolve.ode import check_resolution, trajectory
from flowsolve.solution import SolverError
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Attempt, Bosh3, Dopri5, Dopri8, Tsit5
from flowsolve.solvers.base import Query
from flowsolve.solvers.bridges import spaced
from flowsolve.solvers.controllers import PI
from flowsolve.solvers.runge_kutta import Euler, Heun, Midpoint, RungeKutta
from flowsolve.solvers.tableaus import Tableau

__all__ = ["odeint", "odeint_adjoint"]

State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class _Heun3(RungeKutta):
    """Heun's method of order 3."""

    tableau = Tableau("heun3", 3, c=(0.0, 1 / 3, 2 / 3), a=((), (1 / 3,), (0.0, 2 / 3)), b=(0.25, 0.0, 0.75))


@dataclass(frozen=True)
class _ThreeEighths(RungeKutta):
    """Kutta's 3/8 rule, order 4."""

    tableau = Tableau(
        "three-eighths",
        4,
        c=(0.0, 1 / 3, 2 / 3, 1.0),
        a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    )


@dataclass(frozen=True)
class _HeunEuler(Adaptive):
    """Heun's method with Euler's as its companion, orders 2 and 1."""

    tableau = Tableau("heun-euler", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), error=((-0.5, 0.5),), error_order=1)


@dataclass(frozen=True)
class _Fehlberg2(Adaptive):
    """Fehlberg's pair of orders 2 and 1."""

    tableau = Tableau(
        "fehlberg2",
        2,
        c=(0.0, 0.5, 1.0),
        a=((), (0.5,), (1 / 256, 255 / 256)),
        b=(1 / 512, 255 / 256, 1 / 512),
        error=((-1 / 512, 0.0, 1 / 512),),
        error_order=1,
    )


ADAPTIVE: dict[str, type[Adaptive]] = {
    "dopri5": Dopri5,
    "dopri8": Dopri8,
    "bosh3": Bosh3,
    "fehlberg2": _Fehlberg2,
    "adaptive_heun": _HeunEuler,
    "tsit5": Tsit5,
}
FIXED: dict[str, type[RungeKutta]] = {
    "euler": Euler,
    "midpoint": Midpoint,
    "heun2": Heun,
    "heun3": _Heun3,
    "rk4": _ThreeEighths,
}
ELSEWHERE = ("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver")
ADAPTIVE_OPTIONS = (
    "norm", "min_step", "max_step", "first_step", "safety", "ifactor", "dfactor", "max_num_steps", "dtype",
)  # fmt: skip
FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "norm")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
BRIDGE = "flowsolve.solvers.bridges.Torchdiffeq"


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Any = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0; gradients flow through the steps.

    Args:
        func: the right-hand side, of a 0-dimensional t and of y. If it has methods callback_step, and with adaptive
            methods callback_accept_step and callback_reject_step, they are called with (t, y, dt > 0) of each step.
        y0: a tensor, or a tuple of tensors, of any shapes.
        t: times, strictly monotone in either direction, shape (T,); the first is that of y0.
        rtol: relative tolerance.
        atol: absolute tolerance.
        method: see `flowsolve.compat.torchdiffeq`; by default "dopri5".
        options: of adaptive methods norm, first_step, min_step, max_step, safety, ifactor, dfactor, max_num_steps,
            dtype; of those on a fixed grid (by default t) step_size or grid_constructor, and interp, "linear" or
            "cubic" (two evaluations a time between the nodes).

    Returns:
        y at the times, (T, *y0.shape), or a tuple of such.

    Raises:
        SolverError: the solve failed.
        ValueError, TypeError: bad times, state, method or options, or what is not here.

    Examples:
        >>> from flowsolve.compat.torchdiffeq import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0]))
        >>> torch.allclose(y[:, 0], torch.tensor([1.0, 0.36787944, 0.13533528], dtype=torch.float64))
        True
    """
    return _solved(func, y0, t, rtol, atol, method, options, event_fn, "direct", [func])


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Any = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """`odeint` with gradients by the adjoint ODE, whose memory does not grow with the steps.

    Args:
        adjoint_rtol, adjoint_atol, adjoint_method: those of the way there, or None: the way back has no other.
        adjoint_options: the options of the way there, or None; norm may be "seminorm", which is what is done.
        adjoint_params: parameters of func. Not needed: func's modules are searched, and the graph of its result. What
            requires a gradient and is found there receives one even if it is not listed here.

    The other arguments, the result and the errors are those of `odeint`.
    """
    _check_back(rtol, atol, method, options, adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    if hooks := [f"{name}_adjoint" for name in CALLBACKS if hasattr(func, f"{name}_adjoint")]:
        raise ValueError(f"func defines {', '.join(hooks)}; there are no callbacks on the way back here: remove them")
    mode = "adjoint" if torch.is_grad_enabled() else "direct"
    return _solved(func, y0, t, rtol, atol, method, options, event_fn, mode, [func, tuple(adjoint_params or ())])


def _solved(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: Mapping[str, Any] | None,
    event_fn: Any,
    mode: str,
    functions: Sequence[Any],
) -> Any:
    if event_fn is not None:
        raise ValueError(
            "event_fn is given, but there are no events here; use torchdiffeq.odeint_event (without events, its "
            f"methods are at hand as {BRIDGE})"
        )
    layout, given = _Layout(y0), dict(options or {})
    times = _times(t, layout.wide)
    name = "dopri5" if method is None else method
    y = layout.pack(y0)
    ask = layout.asking(func)
    nodes = None
    solver: RungeKutta
    if name in ADAPTIVE:
        solver = _adaptive(name, rtol, atol, given, layout, len(times) - 1)
    elif name in FIXED:
        _check_options(name, given, FIXED_OPTIONS)
        nodes, solver = _grid(func, y0, t, times, given), FIXED[name]()
    elif name in ELSEWHERE:
        raise ValueError(
            f"method {name!r} is torchdiffeq's own; run it by flowsolve.solve(…, solver={BRIDGE}({name!r}))"
        )
    else:
        raise ValueError(f"method = {method!r} is not known; expected one of {', '.join([*ADAPTIVE, *FIXED])}")
    hooks = _hooks(func, nodes is None)
    if hooks:
        solver = _watched(solver, hooks, layout, t)
    context, shifts = Context(None, 1), shift(t) if moving(t) else None
    if shifts is not None:
        y = nudged(ask, y, times[0] + shifts[0], -shifts[0], None)
    try:
        if nodes is None:
            states, solution = trajectory(
                y, times[0], times, ask, context, solver=solver, dense=True, mode=mode, functions=functions
            )
        else:
            known = _around(nodes, times)
            intervals = [(a, b, solver.evaluations) for a, b in pairwise(nodes)]
            found, solution = trajectory(
                y, nodes[0], known, ask, context, solver=solver, intervals=intervals, dense=True, mode=mode,
                functions=functions,
            )  # fmt: skip
            states = _between(dict(zip(known, found, strict=True)), known, times, given.get("interp", "linear"), ask)
        solution.raise_on_failure()
    except SolverError as error:
        raise SolverError(replace(error.solution, x=layout.unpack(error.solution.x[0]))) from None
    finally:
        hooks.clear()  # gradients come later, and call nobody
    if shifts is not None:
        states = torch.stack([nudged(ask, x, s, e, None) for x, s, e in zip(states, times, shifts, strict=True)])
    return layout.unpack(states[:, 0])


# --- arguments -------------------------------------------------------------------------------------------------------


def _times(t: Any, dtype: torch.dtype) -> list[float]:
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim != 1 or not len(t):
        got = f"a tensor of {t.dtype} and shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t is {got}; expected a floating-point tensor of times, of shape (T,)")
    if mapped(t):
        raise ValueError("t is mapped by torch.func.vmap, but the solves behind one call share their times")
    times: list[float] = host(t).tolist()
    steps = [b - a for a, b in pairwise(times)]
    rising_or_falling = all(d > 0 for d in steps) or all(d < 0 for d in steps)
    if not rising_or_falling or not all(math.isfinite(v) for v in times):
        raise ValueError(f"t = {times}; expected strictly increasing or decreasing times, all finite")
    if len(times) > 1:
        check_resolution(times[0], times[-1], dtype)
    return times


def _scalar(name: str, value: Any) -> float:
    if isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.numel() != 1):
        raise ValueError(
            f"{name} is a {type(value).__name__}; expected one number: single components have no tolerances here"
        )
    return float(value)


def _check_options(method: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in ("step_t", "jump_t"):
        if name in options:
            raise ValueError(
                f"the option {name} is not supported; solve from one such time to the next, or use {BRIDGE}, which "
                "has it"
            )
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{method} has no option {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")


def _check_back(
    rtol: Any, atol: Any, method: Any, options: Any, back_rtol: Any, back_atol: Any, back_method: Any, back: Any
) -> None:
    """Raise unless the way back is to be solved like the way there."""
    mend = "the way back is solved like the way there: leave it out, or tighten that of the way there"
    for name, there, given in (("rtol", rtol, back_rtol), ("atol", atol, back_atol)):
        if given is not None and _scalar(f"adjoint_{name}", given) != _scalar(name, there):
            raise ValueError(f"adjoint_{name} = {given!r} differs from {name} = {there!r}; {mend}")
    if back_method is not None and back_method != (method or "dopri5"):
        raise ValueError(f"adjoint_method = {back_method!r} differs from method = {method!r}; {mend}")
    if back is not None:
        there, given = dict(options or {}), dict(back)
        norm = there.pop("norm", None)
        if given.pop("norm", "seminorm") not in ("seminorm", norm) or (given and given != there):
            raise ValueError(f"adjoint_options = {back!r} differ from options = {options!r}; {mend}")


def _adaptive(name: str, rtol: Any, atol: Any, options: Mapping[str, Any], layout: _Layout, intervals: int) -> Adaptive:
    """The solver that torchdiffeq's options describe."""
    _check_options(name, options, ADAPTIVE_OPTIONS)
    if options.get("dtype", torch.float64) is not torch.float64:
        raise ValueError(f"dtype = {options['dtype']!r}; times are float64 here: drop it")
    safety, most, least = (float(options.get(k, v)) for k, v in (("safety", 0.9), ("ifactor", 10.0), ("dfactor", 0.2)))
    if not 0.0 < least < 1.0 < most:
        raise ValueError(f"dfactor, ifactor = {least!r}, {most!r}; expected 0 < dfactor < 1 < ifactor")
    first = options.get("first_step")
    return ADAPTIVE[name](
        rtol=_scalar("rtol", rtol),
        atol=_scalar("atol", atol),
        first_step=None if first is None else float(first),
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)),
        max_steps=int(options.get("max_num_steps", 2**31 - 1)) * max(1, intervals),
        controller=PI(safety=safety, min_factor=least, max_factor=most, first_factor=max(most, 100.0)),
        norm=layout.norm(options.get("norm")),
    )


# --- fixed grids -----------------------------------------------------------------------------------------------------


def _grid(func: Any, y0: State, t: Tensor, times: list[float], options: Mapping[str, Any]) -> list[float]:
    """The nodes: the times themselves, or steps of a size, or those of a constructor."""
    if options.get("perturb"):
        raise ValueError(f"the option perturb is not supported; drop it, or use {BRIDGE}, which has it")
    if options.get("interp", "linear") not in ("linear", "cubic"):
        raise ValueError(f"interp = {options['interp']!r}; expected 'linear' or 'cubic'")
    size, constructor = options.get("step_size"), options.get("grid_constructor")
    if size is not None and constructor is not None:
        raise ValueError("options give both step_size and grid_constructor; give one of them")
    if size is not None:
        if not 0.0 < float(size) < math.inf:
            raise ValueError(f"step_size = {size!r}; expected a number > 0")
        return spaced(times[0], times[-1], float(size))
    if constructor is None:
        return times
    nodes = _times(constructor(func, y0, t.detach()), torch.float64)
    if (nodes[0], nodes[-1]) != (times[0], times[-1]):
        raise ValueError(
            f"grid_constructor returned nodes from {nodes[0]!r} to {nodes[-1]!r}; expected them to run from t[0] = "
            f"{times[0]!r} to t[-1] = {times[-1]!r}"
        )
    return nodes


def _around(nodes: list[float], times: list[float]) -> list[float]:
    """The nodes that the states at some times are made of, in order: themselves, or their neighbours."""
    sign = 1.0 if nodes[-1] >= nodes[0] else -1.0
    line, wanted = [sign * v for v in nodes], set()
    for time in times:
        i = bisect_left(line, sign * time)
        wanted |= {i} if nodes[i] == time else {i - 1, i}
    return [nodes[i] for i in sorted(wanted)]


def _between(found: Mapping[float, Tensor], known: list[float], times: list[float], interp: str, ask: Ask) -> Tensor:
    """The states at some times, from those at the nodes around them."""
    sign = 1.0 if known[-1] >= known[0] else -1.0
    line, states = [sign * v for v in known], []
    for time in times:
        if time in found:
            states.append(found[time])
            continue
        i = bisect_left(line, sign * time)
        a, b = known[i - 1], known[i]
        theta, ya, yb = (time - a) / (b - a), found[a], found[b]
        y = ya + theta * (yb - ya)
        if interp == "cubic":  # Hermite's: a bend beside the straight line
            fa, fb = (ask(Query(v, s), None) for v, s in ((ya, a), (yb, b)))
            bend = (1.0 - 2.0 * theta) * (yb - ya) + (b - a) * ((theta - 1.0) * fa + theta * fb)
            y = y + theta * (theta - 1.0) * bend
        states.append(y)
    return torch.stack(states)


# --- the state -------------------------------------------------------------------------------------------------------


class _Layout:
    """How the state that func knows is held as one row, (1, D)."""

    def __init__(self, y0: Any) -> None:
        self.tupled = isinstance(y0, tuple)
        leaves = y0 if self.tupled else (y0,)
        for leaf in leaves or (None,):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = f"of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                raise TypeError(f"y0 is or holds {got}; expected a real floating-point tensor, or a tuple of such")
        self.shapes = [leaf.shape for leaf in leaves]
        self.sizes = [leaf.numel() for leaf in leaves]
        self.dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves))  # what func is given and we return
        self.wide = state_dtype(torch.empty(0, dtype=self.dtype, device="cpu"))

    def pack(self, values: Any) -> Tensor:
        """A state, or a slope, as one row."""
        leaves = values if self.tupled else (values,)
        return torch.cat([leaf.reshape(-1).to(self.wide) for leaf in leaves])[None]

    def unpack(self, row: Tensor) -> Any:
        """(…, D) as func knows it, behind the leading dimensions."""
        lead, row = row.shape[:-1], row.to(self.dtype)
        if not self.tupled:
            return row.reshape((*lead, *self.shapes[0]))
        return tuple(
            part.reshape((*lead, *shape)) for part, shape in zip(row.split(self.sizes, -1), self.shapes, strict=True)
        )

    def asking(self, func: Callable[[Tensor, Any], Any]) -> Ask:
        """What answers queries about a row."""

        def ask(query: Query, context: Any) -> Tensor:
            time = query.t
            if isinstance(time, Tensor) and moving(time):
                t = time.reshape(()).to(query.x.device, self.dtype)
            else:
                t = torch.full((), float(time), dtype=self.dtype, device=query.x.device)
            slope = func(t, self.unpack(query.x[0].clone()))  # func may write into it; `pack` copies what it returns
            if self.tupled:
                slope = tuple(slope)
            leaves = slope if self.tupled else (slope,)
            found = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
            # As in torchdiffeq, the members of a tuple need the right number of numbers only.
            fits = [math.prod(s) if isinstance(s, tuple) else s for s in found] if self.tupled else found
            if fits != (self.sizes if self.tupled else [tuple(self.shapes[0])]):
                expected = [tuple(s) for s in self.shapes]
                raise ValueError(f"func(t, y) returned {found}; expected the shapes of y0, {expected}")
            return self.pack(slope)

        return ask

    def norm(self, given: Any) -> Callable[[Tensor], Tensor]:
        """The norm of a row: the caller's, or the root mean square, of a tuple the largest of its members'."""
        if given is None and not self.tupled:
            return rms

        def norm(row: Tensor) -> Tensor:
            if given is None:
                return torch.stack([rms(part) for part in row.split(self.sizes, 1) if part.shape[1]]).amax(0)
            return torch.as_tensor(given(self.unpack(row[0])), device=row.device).abs().reshape(1)

        return norm


# --- callbacks -------------------------------------------------------------------------------------------------------


def _hooks(func: Any, adaptive: bool) -> dict[str, Callable[..., Any]]:
    """The callbacks that func defines."""
    hooks = {name: getattr(func, name) for name in CALLBACKS if hasattr(func, name)}
    if not adaptive and (never := [name for name in hooks if name != "callback_step"]):
        raise ValueError(
            f"func defines {', '.join(never)}, but a method on a fixed grid has no error test and never calls them; "
            "use callback_step"
        )
    return hooks


class _Watched:
    """Calls the callbacks around the steps of a solver; a mixin."""

    def watch(self, hooks: dict[str, Callable[..., Any]], layout: _Layout, t: Tensor) -> None:
        """Begin to call."""

        def tell(name: str, s: float, y: Tensor, h: float) -> None:
            if name in hooks:
                time, size = (torch.full((), v, dtype=t.dtype, device=y.device) for v in (s, abs(h)))
                hooks[name](time, layout.unpack(y[0]), size)

        object.__setattr__(self, "tell", tell)

    def attempt(self, state: AdaptiveState, s_end: float, errors: Any = None) -> Generator[Query, Tensor, Attempt]:
        """One attempted step."""
        tell: Callable[..., None] = getattr(self, "tell", _silent)
        (h,), _, _ = aim(state.real, s_end, self.pair.later)  # type: ignore[attr-defined]
        (s,), y = state.s, state.y
        tell("callback_step", s, y, h)
        attempt: Attempt = yield from super().attempt(state, s_end, errors)  # type: ignore[misc]
        tell("callback_accept_step" if attempt.accepted[0] else "callback_reject_step", s, y, h)
        return attempt

    def sweep(
        self, intervals: Any, y: Tensor, first: int, last: int, visited: Any, visit: Any
    ) -> Generator[Query, Tensor, Tensor]:
        """The steps of a fixed grid."""
        tell: Callable[..., None] = getattr(self, "tell", _silent)
        for i in range(first, last):
            s, s_next, _ = intervals[i]
            tell("callback_step", s, y, s_next - s)
            y = yield from super().sweep(intervals, y, i, i + 1, visited, visit)  # type: ignore[misc]
        return y


def _silent(name: str, s: float, y: Tensor, h: float) -> None:
    pass


def _watched(solver: RungeKutta, hooks: dict[str, Callable[..., Any]], layout: _Layout, t: Tensor) -> RungeKutta:
    """The solver with callbacks."""
    kind = type(solver)
    watched: Any = type(kind.__name__, (_Watched, kind), {})(
        **{f.name: getattr(solver, f.name) for f in fields(solver)}
    )
    watched.watch(hooks, layout, t)
    return watched  # type: ignore[no-any-return]
