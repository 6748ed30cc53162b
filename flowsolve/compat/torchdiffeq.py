r"""torchdiffeq's `odeint`, `odeint_adjoint`, `odeint_event` and `odeint_dense`, on flowsolve's solvers.

    from flowsolve.compat.torchdiffeq import odeint          # instead of: from torchdiffeq import odeint

The state is one system with one step size, as there; nothing of torchdiffeq is run but for methods that only it has.

| method | here |
|---|---|
| `dopri5` (the default), `bosh3` | the same pairs |
| `dopri8` | Hairer's dop853, with two error estimates |
| `adaptive_heun`, `fehlberg2` | the same pairs |
| `tsit5` | Tsitouras' pair |
| `euler`, `midpoint`, `heun2`, `heun3`, `rk4` (Kutta's 3/8 rule) | the same, on the same grids: equal to rounding |
| what else the installed torchdiffeq lists (Adams, scipy, …) | that torchdiffeq runs it, and a warning says so |

What is the same: shapes, dtypes, complex states, tuples, times in either direction, the norm (the root mean square; of
a tuple, the largest of its members'), default tolerances, tolerances of components and members, grids and what lies
between their nodes, `step_t`, `jump_t`, `perturb`, callbacks on both ways, steps of `min_step`, which are always
accepted, and warnings of what a method does not know.

What differs:

* Adaptive steps are controlled by flowsolve's PI controller, end on t[−1] rather than beyond it; between them the
  pair's own interpolant serves. Results agree to the tolerance, not to rounding. `step_t` and `jump_t` end one solve
  and begin the next, which chooses its first step anew; at a jump the field is asked at the neighbouring numbers only.
* A solve that fails raises `flowsolve.SolverError` (there: AssertionError, or NaN in the result).
* `max_num_steps` is for the whole solve: so many for each interval of t together. Times are float64 whatever
  `options["dtype"]` says.
* The number under the error test of a complex component is its real and its imaginary part, rather than its magnitude.
* Derivatives with respect to t are those of the solution, $\partial y(t_i)/\partial t_i = f(t_i, y_i)$, with either
  function, first and second (`flowsolve.gradients`): two evaluations for each time. torchdiffeq's `odeint`
  differentiates the steps, grid included.
* The time of an event is differentiable in `odeint` too, not in `odeint_event` only (`flowsolve.events`), first and
  second; with `odeint_adjoint` first. The adjoint solves to the event once more, for its way back.
* The adjoint finds the parameters itself, and integrates their gradients beside the steps (`flowsolve.gradients`), so
  that they are no part of any norm: what torchdiffeq calls a seminorm. A norm for the way back is given zeros for them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import Context
from flowsolve._optional import require
from flowsolve._surroundings import mapped, moving
from flowsolve.compat._torchdiffeq import (
    ADAPTIVE,
    ADAPTIVE_OPTIONS,
    FIXED,
    FIXED_OPTIONS,
    Layout,
    State,
    around,
    between,
    callbacks,
    edged,
    grid,
    hermite,
    step_size,
    teller,
    varied,
)  # fmt: skip
from flowsolve.dense import Dense, Recorder
from flowsolve.events import Event, Watch, implicit
from flowsolve.gradients import nudged, shift
from flowsolve.kernels import host
from flowsolve.ode import check_resolution, trajectory
from flowsolve.solution import SolverError
from flowsolve.solvers.adaptive import Adaptive, Status
from flowsolve.solvers.controllers import PI
from flowsolve.solvers.runge_kutta import RungeKutta

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

MOST = 20_000  # steps of a fixed grid until an event
DOUBLINGS = 64  # of the interval in which an event is looked for


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
        rtol: relative tolerance: a number; a tensor or list that broadcasts to y0; or one entry for each of a tuple.
        atol: absolute tolerance, likewise.
        method: see `flowsolve.compat.torchdiffeq`; by default "dopri5".
        options: of adaptive methods norm, first_step, min_step, max_step, safety, ifactor, dfactor, max_num_steps,
            step_t, jump_t, dtype; of those on a fixed grid (by default t) step_size or grid_constructor, perturb, and
            interp, "linear" or "cubic" (two evaluations a time between the nodes).
        event_fn: a function of t and y; the solve goes from t[0] in the direction of t[1] until it is 0, or, if it
            returns several numbers, one of them is. On a fixed grid with step_size.

    Returns:
        y at the times, (T, *y0.shape), or a tuple of such. With event_fn, (time of the event, y at its ends).

    Raises:
        SolverError: the solve failed.
        ValueError, TypeError: bad times, state, method or options, or what is not here.

    Examples:
        >>> from flowsolve.compat.torchdiffeq import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0]))
        >>> torch.allclose(y[:, 0], torch.tensor([1.0, 0.36787944, 0.13533528], dtype=torch.float64))
        True
    """
    if (library := _theirs(method)) is not None:
        return library.odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn)
    return _Problem(func, y0, t, rtol, atol, method, options, [func]).solve("direct", event_fn)


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
        adjoint_rtol, adjoint_atol, adjoint_method: of the way back; None for those of the way there.
        adjoint_options: of the way back; None for those of the way there, but for norm. norm may be "seminorm", which
            is what is done by default, or a function of (t, y, adjoint of y, …), tuples unpacked.
        adjoint_params: parameters of func. Not needed: func's modules are searched, and the graph of its result. What
            requires a gradient and is found there receives one even if it is not listed here.

    The other arguments, the result and the errors are those of `odeint`. The callbacks of the way back are func's
    callback_step_adjoint, callback_accept_step_adjoint and callback_reject_step_adjoint.
    """
    ours = all((method or "dopri5") in (*ADAPTIVE, *FIXED) for method in (method, adjoint_method or method))
    if not ours:
        library = _theirs(method) or _theirs(adjoint_method)
        assert library is not None
        return library.odeint_adjoint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn,
            adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
            adjoint_options=adjoint_options, adjoint_params=adjoint_params,
        )  # fmt: skip
    params = tuple(adjoint_params or ())
    there = _Problem(func, y0, t, rtol, atol, method, options, [func, params])
    if not torch.is_grad_enabled():
        return there.solve("direct", event_fn)
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise ValueError(
            f"adjoint_method = {adjoint_method!r} is another method than {method!r}, for which options are given; give "
            "adjoint_options= too"
        )
    given = (
        {k: v for k, v in (options or {}).items() if k != "norm"} if adjoint_options is None else dict(adjoint_options)
    )
    there.back = (
        rtol if adjoint_rtol is None else adjoint_rtol, atol if adjoint_atol is None else adjoint_atol,
        adjoint_method or method, given, params,
    )  # fmt: skip
    return there.solve("adjoint", event_fn)


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """Solve from t0 until event_fn(t, y) is 0; the time of the event is differentiable (`flowsolve.events`).

    Args:
        t0: the time of y0, with one element.
        reverse_time: whether to go back in time.
        odeint_interface: `odeint` or `odeint_adjoint`.
        kwargs: its other arguments.

    Returns:
        The time of the event, and y at t0 and then, (2, *y0.shape), or a tuple of such.
    """
    first = t0.reshape(-1)
    t = torch.cat([first, first.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def odeint_dense(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """The solution between t0 and t1 as a function of time (there: of one number; here also of times (T,)).

    The arguments are those of `odeint`, with any method of flowsolve's own.
    """
    ends = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64, device="cpu") for v in (t0, t1)]
    t = torch.stack([v.reshape(()) for v in ends])
    if (method or "dopri5") not in (*ADAPTIVE, *FIXED):
        raise ValueError(f"odeint_dense with method = {method!r}; expected one of {', '.join([*ADAPTIVE, *FIXED])}")
    return _Problem(func, y0, t, rtol, atol, method, options, [func]).dense()


class _Problem:
    """A call of `odeint`: its arguments, checked, and the ways to solve it."""

    def __init__(
        self, func: Any, y0: State, t: Tensor, rtol: Any, atol: Any, method: Any, options: Any, functions: Sequence[Any]
    ) -> None:
        self.func, self.y0, self.t, self.functions = func, y0, t, functions
        self.layout = Layout(y0)
        self.times = _times(t, self.layout.wide)
        self.name = "dopri5" if method is None else method
        if self.name not in (*ADAPTIVE, *FIXED):
            raise ValueError(f"method = {method!r} is not known; expected one of {', '.join([*ADAPTIVE, *FIXED])}")
        self.y = self.layout.pack(y0)
        self.options = _known(self.name, options)
        self.ask = self.layout.asking(func)
        hooks = callbacks(func, self.name, self.name in ADAPTIVE)
        self.hooks = hooks
        self.solver = self.made(self.name, rtol, atol, self.options, self.layout.norm(self.options.get("norm")), hooks)
        self.back: Any = None
        self.context = Context(None, 1)
        self.shifts = shift(t) if moving(t) else None

    @property
    def fixed(self) -> bool:
        return self.name in FIXED

    def made(
        self, name: str, rtol: Any, atol: Any, options: Any, norm: Any, hooks: Any, unpack: Any = None
    ) -> RungeKutta:
        """The solver that torchdiffeq's arguments describe."""
        tell = teller(hooks, unpack or (lambda y: self.layout.unpack(y[0])), self.t)
        if name in FIXED:
            perturbed = self.layout.real if options.get("perturb") else None
            return varied(FIXED[name](), tell=tell, perturbed=perturbed) if tell or perturbed else FIXED[name]()
        rows = [self.layout.tolerance(n, v, self.y) for n, v in (("rtol", rtol), ("atol", atol))]
        several = any(isinstance(v, Tensor) for v in rows)
        solver = _adaptive(
            name, 1.0 if several else rows[0], 1.0 if several else rows[1], options, norm, len(self.times) - 1
        )
        if not (tell or several or solver.min_step):
            return solver
        return varied(solver, tell=tell, scales=(rows[1], rows[0]) if several else None)

    # --- ways to solve it

    def solve(self, mode: str, event_fn: Any) -> Any:
        """y at the times; or the time of an event, and y there."""
        y, times = self.y, self.times
        if self.shifts is not None:
            y = nudged(self.ask, y, times[0] + self.shifts[0], -self.shifts[0], None)
        try:
            if event_fn is not None:
                return self._until(y, mode, event_fn)
            states = self._through(y, mode)
        except SolverError as error:
            raise SolverError(replace(error.solution, x=self.layout.unpack(error.solution.x[0]))) from None
        finally:
            self.hooks.clear()  # gradients come later, and call nobody
        if self.shifts is not None:
            moved = zip(states, times, self.shifts, strict=True)
            states = torch.stack([nudged(self.ask, x, s, e, None) for x, s, e in moved])
        return self.layout.unpack(states[:, 0])

    def _through(self, y: Tensor, mode: str) -> Tensor:
        """The states at the times, (T, 1, D)."""
        if not self.fixed:
            return self._between_corners(y, self.times, mode)
        nodes, times = self._nodes(self.options, self.times), self.times
        known, ask = around(nodes, times), self.ask
        if self.options.get("perturb"):
            ask = edged(ask, nodes[0], nodes[-1], self.layout.real)
        intervals = [(a, b, self.solver.evaluations) for a, b in pairwise(nodes)]
        found, solution = trajectory(
            y, nodes[0], known, ask, self.context, solver=self.solver, intervals=intervals, dense=True, mode=mode,
            functions=self.functions, back=self._back(self.times),
        )  # fmt: skip
        solution.raise_on_failure()
        return between(
            dict(zip(known, found, strict=True)), known, times, self.options.get("interp", "linear"), self.ask
        )

    def _between_corners(self, y: Tensor, times: Sequence[float], mode: str, followers: Any = ()) -> Tensor:
        """The states at the times of an adaptive solve, begun anew at each time that steps must meet."""
        corners, jumps = _corners(self.options, times)
        edges, states = [times[0], *corners, times[-1]], [y]
        sign = 1.0 if times[-1] >= times[0] else -1.0
        for a, b in pairwise(edges):
            inside = [s for s in times[1:] if sign * a < sign * s <= sign * b]
            stops = inside if inside and inside[-1] == b else [*inside, b]
            ask = self.ask
            if a in jumps or b in jumps:
                ask = edged(ask, a, b, self.layout.real)
            found, solution = trajectory(
                y, a, stops, ask, self.context, solver=self.solver, dense=True, mode=mode, functions=self.functions,
                followers=followers, back=self._back([a, *stops]),
            )  # fmt: skip
            solution.raise_on_failure()
            if solution.status[0] == Status.EVENT:
                break
            y = found[-1]
            states += found[: len(inside)]
        return torch.stack(states)

    def _back(self, times: Sequence[float]) -> Any:
        """The solver of the adjoint's way back, and its intervals."""
        if self.back is None:
            return None
        rtol, atol, method, options, params = self.back
        name = "dopri5" if method is None else method
        hooks = callbacks(self.func, name, name in ADAPTIVE, "_adjoint")
        norm, options = options.get("norm"), _known(name, {k: v for k, v in options.items() if k != "norm"})

        def unpack(joint: Tensor) -> Any:
            y, a = (self.layout.unpack(joint[0, i]) for i in (0, 1))
            zero = joint.new_zeros(())
            rest = tuple(torch.zeros_like(p) for p in params)
            return (zero, *y, *a, *rest) if self.layout.tupled else (zero, y, a, *rest)

        solver = self.made(name, rtol, atol, options, self.layout.norm(self.options.get("norm")), hooks, unpack)
        if callable(norm) and isinstance(solver, Adaptive):
            solver = varied(solver, joint_norm=lambda e: torch.as_tensor(norm(unpack(e)), device=e.device).reshape(1))
        if name not in FIXED:
            return solver, None
        if (there := options.get("grid_constructor")) is not None:
            ends = torch.tensor([times[-1], times[0]], dtype=self.t.dtype, device=self.t.device)
            nodes = _times(there(self.func, self.y0, ends), torch.float64)[::-1]
        else:
            nodes = self._nodes(options, list(times))
        return solver, [(a, b, solver.evaluations) for a, b in pairwise(nodes)]

    def _nodes(self, options: Any, times: list[float]) -> list[float]:
        return grid(self.func, self.y0, self.t, times, options, _times)

    def dense(self) -> Callable[[Any], Any]:
        """The solution as a function of time."""
        keeper = Recorder()
        if self.fixed:
            nodes = self._nodes(self.options, self.times)
            intervals = [(a, b, self.solver.evaluations) for a, b in pairwise(nodes)]
            _, solution = trajectory(
                self.y, nodes[0], nodes[1:], self.ask, self.context, solver=hermite(self.solver), intervals=intervals,
                followers=[keeper],
            )  # fmt: skip
            solution.raise_on_failure()
        else:
            self._between_corners(self.y, self.times, "direct", [keeper])
        start, end = np.array(self.times[:1]), np.array(self.times[-1:])

        def unpack(x: Tensor, lead: int) -> Any:
            return self.layout.unpack(x.squeeze(lead))

        return Dense(keeper.pieces, self.y, start, end, end, unpack, single=True)

    def _until(self, y: Tensor, mode: str, event_fn: Any) -> Any:
        """The time of an event, and y at the start and then."""
        if len(self.times) != 2:
            raise ValueError(f"t has {len(self.times)} times; with event_fn expected 2, the start and a time beyond it")
        start, ask = self.times[0], self.ask
        with torch.no_grad():
            signs = torch.sign(self._event(event_fn, y, start))

        def value(rows: Tensor, times: Tensor, tree: Any) -> Tensor:
            """The least of the event functions, all positive at the start: the first to reach 0."""
            each = zip(rows, times, strict=True)
            return torch.stack([(self._event(event_fn, x[None], t) * signs).min() for x, t in each])

        watch = Watch([Event(event_fn)], [value], 1, ask)
        if bool((signs == 0.0).any()):
            tau, there = torch.tensor([start], dtype=torch.float64, device="cpu"), y
        else:
            recording = mode == "direct" and torch.is_grad_enabled()
            with torch.set_grad_enabled(recording):
                self._search(y, watch)
            ((_, tau, there),) = watch.found[0]
            if mode == "adjoint":
                stop = float(tau)
                self.times = [start, stop]
                if self.fixed:
                    self.options = {**self.options, "grid_constructor": None, "step_size": step_size(self.options)}
                states = self._through(y, mode)
                tau, there, _ = implicit(value, ask, states[-1], tau, None)
        self.hooks.clear()
        found = self.layout.unpack(torch.cat([self.y, there]))
        time = tau[0].to(self.t.device, self.t.dtype)
        if self.shifts is not None and not time.requires_grad:
            time = time + 0.0 * self.shifts[0]
        return time, found

    def _event(self, event_fn: Any, y: Tensor, time: Any) -> Tensor:
        found = event_fn(self.layout.time(time, y), self.layout.unpack(y[0]))
        if not isinstance(found, Tensor) or not found.numel() or found.is_complex():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"event_fn returned {got}; expected a tensor of real numbers, whose zeros are the events")
        return found

    def _search(self, y: Tensor, watch: Watch) -> None:
        """Solve on until there is an event."""
        start, sign = self.times[0], 1.0 if self.times[1] > self.times[0] else -1.0
        if self.fixed:
            if (size := step_size(self.options)) is None:
                raise ValueError(f"{self.name} with event_fn steps until there is an event: give options step_size")
            made, count, n = 0, 16, self.solver.evaluations
            while made < MOST:
                nodes = [start + sign * size * k for k in range(made, made + count + 1)]
                states, solution = trajectory(
                    y, nodes[0], nodes[1:], self.ask, self.context, solver=hermite(self.solver),
                    intervals=[(a, b, n) for a, b in pairwise(nodes)], followers=[watch],
                )  # fmt: skip
                if watch.final:
                    return
                solution.raise_on_failure()
                y, made, count = states[-1], made + count, 2 * count
            raise RuntimeError(f"event_fn had no zero within {made} steps, up to t = {nodes[-1]:g}")
        a, span = start, abs(self.times[1] - start)
        for _ in range(DOUBLINGS):
            b = a + sign * span
            y = self._between_corners(y, [a, b], "direct", [watch])[-1]
            if watch.final:
                return
            a, span = b, 2.0 * span
        raise RuntimeError(f"event_fn had no zero up to t = {a:g}")


# --- arguments -------------------------------------------------------------------------------------------------------


def _theirs(method: Any) -> Any:
    """The installed torchdiffeq, if a method is one that only it has."""
    if method is None or method in ADAPTIVE or method in FIXED:
        return None
    try:
        library = require("torchdiffeq", "bridges", f"method {method!r}")
    except ImportError:
        raise ValueError(
            f"method = {method!r} is not known; expected one of {', '.join([*ADAPTIVE, *FIXED])}, or, with torchdiffeq "
            "installed (pip install flowsolve[bridges]), one of its own"
        ) from None
    names = _names()
    if method not in names:
        raise ValueError(
            f"method = {method!r} is not known; expected one of {', '.join([*ADAPTIVE, *FIXED])}, or one of the "
            f"installed torchdiffeq's: {', '.join(n for n in names if n not in ADAPTIVE and n not in FIXED)}"
        )
    version = getattr(library, "__version__", "")
    warnings.warn(f"{method} is torchdiffeq's own: torchdiffeq {version} runs it".replace("  ", " "), stacklevel=3)
    return library


def _names() -> list[str]:
    """The methods of the installed torchdiffeq."""
    from importlib import import_module

    return list(import_module("torchdiffeq._impl.odeint").SOLVERS)


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


def _known(method: str, options: Any) -> dict[str, Any]:
    """The options that a method knows; a warning names the others."""
    given = dict(options or {})
    known = ADAPTIVE_OPTIONS if method in ADAPTIVE else FIXED_OPTIONS
    if unknown := sorted(set(given) - set(known)):
        warnings.warn(
            f"{method} has no option {', '.join(map(repr, unknown))}: ignored; expected some of {', '.join(known)}",
            stacklevel=4,
        )
    return {k: v for k, v in given.items() if k in known}


def _corners(options: Mapping[str, Any], times: Sequence[float]) -> tuple[list[float], set[float]]:
    """The times that steps must meet within an interval, in order, and those at which the field jumps."""
    low, high = min(times[0], times[-1]), max(times[0], times[-1])
    found: dict[str, list[float]] = {}
    for name in ("step_t", "jump_t"):
        given = options.get(name)
        found[name] = [] if given is None else host(torch.as_tensor(given, device="cpu").reshape(-1).double()).tolist()
        if not all(map(math.isfinite, found[name])):
            raise ValueError(f"{name} = {given!r}; expected finite times")
    both = [*found["step_t"], *found["jump_t"]]
    if len(set(both)) < len(both):
        raise ValueError("step_t and jump_t hold a time twice; expected each once")
    inside = sorted((v for v in both if low < v < high), reverse=times[-1] < times[0])
    return inside, set(found["jump_t"])


def _adaptive(name: str, rtol: float, atol: float, options: Mapping[str, Any], norm: Any, intervals: int) -> Adaptive:
    """The solver that torchdiffeq's options describe."""
    dtype = options.get("dtype", torch.float64)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype = {dtype!r}; expected a floating-point dtype (times are float64 all the same)")
    safety, most, least = (float(options.get(k, v)) for k, v in (("safety", 0.9), ("ifactor", 10.0), ("dfactor", 0.2)))
    if not 0.0 < least < 1.0 < most:
        raise ValueError(f"dfactor, ifactor = {least!r}, {most!r}; expected 0 < dfactor < 1 < ifactor")
    first = options.get("first_step")
    return ADAPTIVE[name](
        rtol=rtol,
        atol=atol,
        first_step=None if first is None else float(first),
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)),
        max_steps=int(options.get("max_num_steps", 2**31 - 1)) * max(1, intervals),
        controller=PI(safety=safety, min_factor=least, max_factor=most, first_factor=max(most, 100.0)),
        norm=norm,
    )
