"""Parts of `flowsolve.compat.torchdiffeq`: its methods, how a state is held, fixed grids, callbacks."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import state_dtype
from flowsolve._surroundings import moving
from flowsolve.drivers import Ask
from flowsolve.kernels import aim, rms
from flowsolve.solvers.adaptive import Adaptive, AdaptiveState, Attempt, Bosh3, Dopri5, Dopri8, Tsit5
from flowsolve.solvers.base import Query
from flowsolve.solvers.bridges import spaced
from flowsolve.solvers.runge_kutta import Euler, Heun, Midpoint, RungeKutta
from flowsolve.solvers.tableaus import Tableau

__all__ = ["ADAPTIVE", "CALLBACKS", "FIXED", "Layout", "around", "between", "callbacks", "edged", "grid", "varied"]

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
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
ADAPTIVE_OPTIONS = (
    "norm", "min_step", "max_step", "first_step", "step_t", "jump_t", "safety", "ifactor", "dfactor", "max_num_steps",
    "dtype",
)  # fmt: skip
FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "norm")


# --- the state -------------------------------------------------------------------------------------------------------


class Layout:
    """How the state that func knows is held as one row, (1, D); complex numbers as pairs of real ones."""

    def __init__(self, y0: Any) -> None:
        self.tupled = isinstance(y0, tuple)
        leaves = y0 if self.tupled else (y0,)
        for leaf in leaves or (None,):
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                got = f"of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                raise TypeError(
                    f"y0 is or holds {got}; expected a floating-point or complex tensor, or a tuple of such"
                )
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves))  # what func is given and we return
        self.complex = self.dtype.is_complex
        self.sizes = [leaf.numel() * (2 if self.complex else 1) for leaf in leaves]
        self.real = torch.empty(0, dtype=self.dtype, device="cpu").abs().dtype  # of times
        self.wide = state_dtype(torch.empty(0, dtype=self.real, device="cpu"))

    def pack(self, values: Any) -> Tensor:
        """A state, or a slope, as one row."""
        leaves = values if self.tupled else (values,)
        if self.complex:
            leaves = [torch.view_as_real(leaf.to(self.dtype)) for leaf in leaves]
        return torch.cat([leaf.reshape(-1).to(self.wide) for leaf in leaves])[None]

    def unpack(self, row: Tensor) -> Any:
        """(…, D) as func knows it, behind the leading dimensions."""
        if not self.tupled and not self.complex:
            return row.to(self.real).reshape((*row.shape[:-1], *self.shapes[0]))
        lead, row = row.shape[:-1], row.to(self.real)
        leaves = [self._shaped(v, lead, shape) for v, shape in zip(row.split(self.sizes, -1), self.shapes, strict=True)]
        return tuple(leaves) if self.tupled else leaves[0]

    def _shaped(self, part: Tensor, lead: Sequence[int], shape: Sequence[int]) -> Tensor:
        if not self.complex:
            return part.reshape((*lead, *shape))
        return torch.view_as_complex(part.reshape((*lead, *shape, 2)).contiguous())

    def asking(self, func: Callable[[Tensor, Any], Any]) -> Ask:
        """What answers queries about a row."""
        shape, plain, wide, real = self.shapes[0], not (self.tupled or self.complex), self.wide, self.real

        def ask(query: Query, context: Any) -> Tensor:
            x, t = query.x, query.t
            if plain:
                time = torch.full((), t, dtype=real, device=x.device) if isinstance(t, float) else self.time(t, x)
                slope = func(time, x[0].to(real, copy=True).reshape(shape))  # func may write into it
                if isinstance(slope, Tensor) and slope.shape == shape and not slope.is_complex():
                    return slope.reshape(1, -1).to(wide, copy=True)
                return self.pack(self.checked(slope))
            return self.pack(self.checked(func(self.time(t, x), self.unpack(x[0].clone()))))

        return ask

    def checked(self, slope: Any) -> Any:
        """What func returned, if it has the shapes of the state."""
        if self.tupled:
            slope = tuple(slope)
        leaves = slope if self.tupled else (slope,)
        found = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
        # As in torchdiffeq, the members of a tuple need the right number of numbers only.
        fits = [math.prod(s) if isinstance(s, tuple) else s for s in found] if self.tupled else found
        expected = [math.prod(s) for s in self.shapes] if self.tupled else [tuple(self.shapes[0])]
        if fits != expected:
            shapes = [tuple(s) for s in self.shapes]
            raise ValueError(f"func(t, y) returned {found}; expected the shapes of y0, {shapes}")
        if not self.complex and any(v.is_complex() for v in leaves):
            raise TypeError(
                "func(t, y) returned complex numbers for a real y; expected real ones, or give a complex y0"
            )
        return slope

    def time(self, time: Any, like: Tensor) -> Tensor:
        """A time as func is given it."""
        if isinstance(time, Tensor) and moving(time):
            return time.reshape(()).to(like.device, self.real)
        return torch.full((), float(time), dtype=self.real, device=like.device)

    def norm(self, given: Any) -> Callable[[Tensor], Tensor]:
        """The norm of a row: the caller's, or the root mean square, of a tuple the largest of its members'."""
        if given is None and not self.tupled:
            return rms

        def norm(row: Tensor) -> Tensor:
            if given is None:
                return torch.stack([rms(part) for part in row.split(self.sizes, 1) if part.shape[1]]).amax(0)
            return torch.as_tensor(given(self.unpack(row[0])), device=row.device).abs().reshape(1)

        return norm

    def tolerance(self, name: str, value: Any, like: Tensor) -> Any:
        """A tolerance: one number, or a row of them, (1, D)."""
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} requires a gradient; expected numbers: tolerances are not differentiated")
        several = isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.numel() != 1)
        if not several:
            return float(value)
        if not self.tupled:
            rows = [_spread(name, value, self.shapes[0], like)]
        else:
            if len(value) != len(self.shapes):
                raise ValueError(
                    f"{name} has {len(value)} entries; expected one for each of the {len(self.shapes)} tensors of y0"
                )
            rows = [_spread(name, v, shape, like) for v, shape in zip(value, self.shapes, strict=True)]
        row = torch.cat([v.reshape(-1) for v in rows])
        if not bool((torch.isfinite(row) & (row >= 0)).all()):
            raise ValueError(f"{name} = {value!r}; expected finite numbers >= 0")
        return (row.repeat_interleave(2) if self.complex else row)[None]


def _spread(name: str, value: Any, shape: Any, like: Tensor) -> Tensor:
    given = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    try:
        return given.reshape(()).expand(shape) if given.numel() == 1 else given.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected what broadcasts to {tuple(shape)}") from None


# --- fixed grids -----------------------------------------------------------------------------------------------------


def grid(func: Any, y0: State, t: Tensor, times: list[float], options: Mapping[str, Any], check: Any) -> list[float]:
    """The nodes: the times themselves, or steps of a size, or those of a constructor."""
    if options.get("interp", "linear") not in ("linear", "cubic"):
        raise ValueError(f"interp = {options['interp']!r}; expected 'linear' or 'cubic'")
    size, constructor = step_size(options), options.get("grid_constructor")
    if size is not None and constructor is not None:
        raise ValueError("options give both step_size and grid_constructor; give one of them")
    if size is not None:
        return spaced(times[0], times[-1], size)
    if constructor is None:
        return times
    nodes: list[float] = check(constructor(func, y0, t.detach()), torch.float64)
    if (nodes[0], nodes[-1]) != (times[0], times[-1]):
        raise ValueError(
            f"grid_constructor returned nodes from {nodes[0]!r} to {nodes[-1]!r}; expected them to run from t[0] = "
            f"{times[0]!r} to t[-1] = {times[-1]!r}"
        )
    return nodes


def step_size(options: Mapping[str, Any]) -> float | None:
    """The size of steps, if one is given."""
    size = options.get("step_size")
    if size is not None and not 0.0 < float(size) < math.inf:
        raise ValueError(f"step_size = {size!r}; expected a number > 0")
    return None if size is None else float(size)


def around(nodes: list[float], times: list[float]) -> list[float]:
    """The nodes that the states at some times are made of, in order: themselves, or their neighbours."""
    sign = 1.0 if nodes[-1] >= nodes[0] else -1.0
    line, wanted = [sign * v for v in nodes], set()
    for time in times:
        i = bisect_left(line, sign * time)
        wanted |= {i} if nodes[i] == time else {i - 1, i}
    return [nodes[i] for i in sorted(wanted)]


def between(found: Mapping[float, Tensor], known: list[float], times: list[float], interp: str, ask: Ask) -> Tensor:
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


# --- solvers that do more --------------------------------------------------------------------------------------------


def edged(ask: Ask, low: float, high: float, dtype: torch.dtype) -> Ask:
    """Ask strictly between two times: at them, the next number of a dtype inwards is asked about."""
    ends = {a: neighbour(a, b, dtype) for a, b in ((low, high), (high, low))}

    def inside(query: Query, context: Any) -> Any:
        found = ends.get(float(query.t))
        return ask(query if found is None else Query(query.x, found), context)

    return inside


def neighbour(a: float, b: float, dtype: torch.dtype) -> float:
    """The number of a dtype next to a, towards b."""
    here, there = (torch.tensor(v, dtype=dtype, device="cpu") for v in (a, b))
    return float(torch.nextafter(here, there))


def callbacks(func: Any, method: str, adaptive: bool, suffix: str = "") -> dict[str, Callable[..., Any]]:
    """The callbacks that func defines; a warning names those that the method never calls."""
    hooks = {name: getattr(func, name + suffix) for name in CALLBACKS if hasattr(func, name + suffix)}
    if not adaptive and (never := [name for name in hooks if name != "callback_step"]):
        warnings.warn(
            f"{method} steps on a fixed grid, has no error test, and never calls {', '.join(never)}{suffix}",
            stacklevel=4,
        )
        hooks = {name: hook for name, hook in hooks.items() if name not in never}
    return hooks


class _Varied:
    """What torchdiffeq's methods do beside ours; a mixin of a solver's class made for one solve (`varied`)."""

    tell: Any = None  # is told of steps: (name, s, y, h)
    scales: Any = None  # (atol, rtol), rows of them
    joint_norm: Any = None  # of (y, a) on the adjoint's way back
    perturbed: Any = None  # the dtype in whose next number the field is asked at the ends of steps

    def tolerances(self, y: Tensor, own: Any = None) -> tuple[Any, Any]:
        """(atol, rtol)."""
        return self.scales or super().tolerances(y, own)  # type: ignore[misc, no-any-return]

    def _error(self, ahead: Tensor, h: Any, slopes: Any, own: Any = None) -> Any:
        """A step that is no longer than min_step is accepted, unless it is not finite."""
        error = super()._error(ahead, h, slopes)  # type: ignore[misc]
        if least := self.min_step:  # type: ignore[attr-defined]
            error = np.where(np.isfinite(error) & (np.abs(h) <= least), np.minimum(error, 1.0), error)
        return error

    def attempt(self, state: AdaptiveState, s_end: float, errors: Any = None) -> Generator[Query, Tensor, Attempt]:
        """One attempted step."""
        if self.tell is None:
            return (yield from super().attempt(state, s_end, errors))  # type: ignore[misc, no-any-return]
        (h,), _, _ = aim(state.real, s_end, self.pair.later)  # type: ignore[attr-defined]
        (s,), y = state.s, state.y
        self.tell("callback_step", s, y, h)
        attempt: Attempt = yield from super().attempt(state, s_end, errors)  # type: ignore[misc]
        self.tell("callback_accept_step" if attempt.accepted[0] else "callback_reject_step", s, y, h)
        return attempt

    def sweep(
        self, intervals: Any, y: Tensor, first: int, last: int, visited: Any, visit: Any
    ) -> Generator[Query, Tensor, Tensor]:
        """The steps of a fixed grid."""
        if self.tell is None and self.perturbed is None:
            return (yield from super().sweep(intervals, y, first, last, visited, visit))  # type: ignore[misc, no-any-return]
        for i in range(first, last):
            s, s_next, _ = intervals[i]
            if self.tell is not None:
                self.tell("callback_step", s, y, s_next - s)
            step = super().sweep(intervals, y, i, i + 1, visited, visit)  # type: ignore[misc]
            y = yield from (step if self.perturbed is None else _inwards(step, s, s_next, self.perturbed))
        return y


def _inwards(step: Any, s: float, s_next: float, dtype: torch.dtype) -> Generator[Query, Tensor, Tensor]:
    """A step's queries, those at its ends moved inwards by the last bit."""
    ends = {a: neighbour(a, b, dtype) for a, b in ((s, s_next), (s_next, s))}
    try:
        query = next(step)
        while True:
            found = ends.get(float(query.t))
            query = step.send((yield query if found is None else Query(query.x, found)))
    except StopIteration as stop:
        found_state: Tensor = stop.value
        return found_state


def varied(solver: RungeKutta, **more: Any) -> RungeKutta:
    """The solver with attributes of `_Varied`."""
    kind = type(solver)
    base = (kind,) if issubclass(kind, _Varied) else (_Varied, kind)
    given = {k: staticmethod(v) if callable(v) else v for k, v in more.items() if v is not None}
    made: Any = type(kind.__name__, base, given)
    return made(**{f.name: getattr(solver, f.name) for f in fields(solver)})  # type: ignore[no-any-return]


def hermite(solver: RungeKutta) -> RungeKutta:
    """The solver, whose steps are looked into by the cubic that has the slopes at both ends."""
    return varied(solver, tableau=type(solver).tableau.completed)


def teller(hooks: dict[str, Callable[..., Any]], unpack: Callable[[Tensor], Any], t: Tensor) -> Any:
    """What calls the callbacks; None where there are none."""
    if not hooks:
        return None

    def tell(name: str, s: float, y: Tensor, h: float) -> None:
        if name in hooks:
            time, size = (torch.full((), float(v), dtype=t.dtype, device=y.device) for v in (s, abs(h)))
            hooks[name](time, unpack(y), size)

    return tell
