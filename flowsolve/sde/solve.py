r"""`solve_sde`: any SDE $dy = f(t, y)\,dt + g(t, y)\,dW$ on a grid of times, or under tolerances.

Steps are those of the grid, whatever `t_eval` asks for. A state between two nodes is a shorter step of the same scheme
from the node before it, driven by the same Brownian motion: it converges as the states at the nodes do, where a
straight line between those would lack the motion itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowsolve import grids
from flowsolve._arguments import state
from flowsolve._batch import rows
from flowsolve._surroundings import eager, mapped, moving, recorded
from flowsolve.drivers import bar, checks, settle
from flowsolve.noise import Noise, Seed
from flowsolve.ode import check_resolution
from flowsolve.sde.adaptive import Control, pursue
from flowsolve.sde.motion import BrownianPath, Fresh, Motion
from flowsolve.sde.problem import NOISE_TYPES, SDE_TYPES, Problem
from flowsolve.sde.reversible import WayBack
from flowsolve.sde.schemes import SCHEMES, SRK, Carry, EulerMaruyama, ReversibleHeun, Scheme, StochasticHeun
from flowsolve.sde.trees import Packing
from flowsolve.solution import Solution

__all__ = ["march", "solve_sde"]

MODES = ("direct", "checkpoint", "adjoint")


@eager
def solve_sde(
    f: Callable[..., Any],
    g: Callable[..., Any],
    y0: Any,
    t0: float,
    t1: float,
    *,
    steps: int | Sequence[float] | Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100_000,
    solver: Scheme | str | None = None,
    noise_type: str = "diagonal",
    sde_type: str = "ito",
    t_eval: Sequence[float] | Tensor | None = None,
    seed: Seed = 0,
    samples: Sequence[int] | Tensor | None = None,
    noise: str | BrownianPath = "fresh",
    args: Sequence[Any] = (),
    gradient: str = "direct",
    params: Iterable[Tensor] | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    r"""Solve an SDE dy = f(t, y) dt + g(t, y) dW from t0 to a later t1.

    Args:
        f: the drift, (t, y, \*args) → (B, \*S), with t 0-dimensional.
        g: the diffusion, (t, y, \*args) → what its `noise_type` says.
        y0: the initial state, (B, \*S), or a tree (tuple, list, dict) of such tensors: f and g are given and return
            the same tree.
        t0, t1: the interval, t0 < t1. (A reverse-time SDE runs in the time τ = −t.)
        steps: how many equal steps, or all times of the grid from t0 to t1.
        rtol, atol: tolerances, in place of a grid: every sample finds steps of its own (`flowsolve.sde.adaptive`); the
            motion is a path, and t has the shape (B, 1, …, 1). `steps` is then the least number of steps, 16.
        max_steps: attempts (accepted and rejected) that a sample may make with tolerances.
        solver: one of `flowsolve.sde`'s, or its name: "euler", "milstein", "heun", "srk", … By default `SRK` (strong
            order 1.5), for general noise `EulerMaruyama` (½), and for Stratonovich's equation `StochasticHeun` (1; ½).
        noise_type: "diagonal" (g of y's shape, entry i depending on y_i alone), "scalar" (g of y's shape, one Brownian
            motion a sample), "additive" (as diagonal, or (B, \*S, m), independent of y; or a number), "general"
            (B, \*S, m).
        sde_type: "ito" or "stratonovich".
        t_eval: times at which to return the state, strictly rising from t0 to t1; the solve goes on to t1. They do not
            disturb the steps, and between nodes each costs the evaluations of a step.
        seed: an int, or one for each sample.
        samples: the samples' numbers, 0 … B−1 by default: sample 7 is the same in any batch.
        noise: "fresh" (independent increments of each step), "brownian" (one path over [t0, t1] for each sample,
            whatever the steps: for measuring strong errors), or a `flowsolve.sde.BrownianPath`.
        args: further arguments of f and g.
        gradient: "direct"; "checkpoint", the same gradient with memory of O(√steps); with `ReversibleHeun` also
            "adjoint", the same with memory of O(1) (`flowsolve.sde.reversible`).
        params: for "adjoint": tensors that f and g depend on and that no search of them would find.
        progress: show a progress bar (needs tqdm).
        throw: raise if any sample fails.

    Returns:
        A `Solution`, with x of shape (B, \*S), or (T, B, \*S) with t_eval. Its nfe counts evaluations of f. Gradients
        flow if autograd records them.

    Raises:
        SolverError: a sample met a value that is not finite, and throw is True.
        ValueError, TypeError: bad times, steps, solver, or shapes.

    Examples:
        >>> y0 = torch.ones(4, 2, dtype=torch.float64)
        >>> f, g = lambda t, y: 0.5 * y, lambda t, y: 0.3 * y  # geometric Brownian motion
        >>> path = fs.sde.BrownianPath.of(0.0, 1.0, seed=0, samples=4)
        >>> sol = fs.solve_sde(f, g, y0, 0.0, 1.0, steps=64, noise=path)
        >>> truth = torch.exp((0.5 - 0.3**2 / 2) * 1.0 + 0.3 * path(0.0, 1.0, y0))
        >>> torch.allclose(sol.x, truth, rtol=1e-3)
        True
    """
    if noise_type not in NOISE_TYPES:
        raise ValueError(f"noise_type = {noise_type!r}; expected one of {', '.join(NOISE_TYPES)}")
    if sde_type not in SDE_TYPES:
        raise ValueError(f"sde_type = {sde_type!r}; expected one of {', '.join(SDE_TYPES)}")
    if gradient not in MODES:
        raise ValueError(f"gradient = {gradient!r} is not known; expected one of {', '.join(MODES)}")
    if gradient == "checkpoint" and recorded():
        raise NotImplementedError(
            "gradient='checkpoint' is within a reverse-mode transform of torch.func, which takes no checkpoints; use "
            "gradient='direct', or autograd itself"
        )
    scheme = chosen(solver, noise_type, sde_type)
    if gradient == "adjoint" and not isinstance(scheme, ReversibleHeun):
        raise TypeError(
            f"gradient='adjoint' undoes the steps, which {scheme!r} cannot; use ReversibleHeun() or "
            "gradient='checkpoint'"
        )
    start, end = _number(t0, "t0"), _number(t1, "t1")
    if end < start:
        raise ValueError(f"t0 = {start:g}, t1 = {end:g}; expected t0 <= t1: write a reverse-time SDE in the time -t")
    packing = None if isinstance(y0, Tensor) else Packing(y0)
    y = state(y0) if packing is None else packing.pack(y0)
    functions: list[Any] = [f, g]
    if packing is not None:
        f, g = packing.fed(f, "f"), packing.fed(g, "g", noise_type)
    check_resolution(start, end, y.dtype)
    control = _control(rtol, atol, steps, max_steps, scheme, noise_type, f)
    nodes = [start, end] if control else _nodes(steps, start, end)
    looks = None if t_eval is None else _looks(t_eval, start, end)
    motion = _motion("brownian" if control and noise == "fresh" else noise, start, end, seed, samples, len(y))
    if looks is not None and not looks:
        raise ValueError("t_eval is empty; expected times from t0 to t1, or None")
    times = {t: None for a, b in pairwise(nodes) for t in (a + c * (b - a) for c in scheme.nodes(noise_type))}
    times.update(dict.fromkeys(nodes))
    clock = dict(zip(times, torch.tensor(list(times), dtype=y.dtype, device=y.device).unbind(0), strict=True))
    problem = Problem(f, g, y, noise_type, sde_type, args, clock)
    if y.numel() == 0 or start == end:
        zero = torch.zeros(len(y), dtype=torch.int64, device="cpu")
        there = torch.full((len(y),), start, dtype=torch.float64, device="cpu")
        states, solution = [y] * len(looks or ()), Solution(y, zero, zero, zero, zero, there)
    elif control:
        if not isinstance(motion, BrownianPath) or (motion.t0, motion.t1) != (start, end):
            raise ValueError("with tolerances noise= is 'brownian', or a BrownianPath over [t0, t1] and no more")
        states, solution = pursue(problem, scheme, y, motion, control, looks or (), gradient)
    else:
        mode = gradient if torch.is_grad_enabled() else "direct"
        functions += [*problem.args, *(params or ())]
        states, solution = march(problem, scheme, y, nodes, motion, looks or (), mode, functions, progress)
    if looks is not None:
        solution = replace(
            solution, x=torch.stack(states), t_eval=torch.tensor(looks, dtype=torch.float64, device="cpu")
        )
    if packing is not None:
        solution = replace(solution, x=packing.unpack(solution.x, lead=0 if looks is None else 1))
    return solution.raise_on_failure() if throw else solution


def march(
    p: Problem,
    scheme: Scheme,
    y: Tensor,
    nodes: Sequence[float],
    motion: Motion,
    looks: Sequence[float] = (),
    mode: str = "direct",
    functions: Sequence[Any] = (),
    progress: bool = False,
) -> tuple[list[Tensor], Solution]:
    """The states at some times, and the solution at the last node.

    Args:
        p: the SDE.
        scheme: the scheme.
        y: the state at the first node, (B, *S).
        nodes: rising times, two at least.
        motion: what drives it.
        looks: rising times to look at.
        mode: how gradients are recorded, if autograd does; see `solve_sde`.
        functions: where to look for parameters ("adjoint").
        progress: show a progress bar.
    """
    like, area = p.begin(nodes[0], y, scheme.kind), scheme.area(p.noise_type)
    steps, checked = len(nodes) - 1, checks(len(nodes) - 1)
    watch: dict[int, list[float]] = {}
    for look in looks:
        watch.setdefault(max(0, bisect_left(nodes, look) - 1), []).append(look)
    magnitudes: list[Tensor] = []

    def through(first: int, last: int, *carry: Tensor) -> tuple[Tensor, ...]:
        """From what is carried at one node to what is at another, with what was looked at on the way."""
        seen: list[Tensor] = []
        drives = motion.drives(nodes[first : last + 1], like, area)
        for i, drive in zip(range(first, last), drives, strict=True):
            t, t_next = nodes[i], nodes[i + 1]
            ahead = scheme.step(p, carry, t, t_next, drive)
            for look in watch.get(i, ()):
                if look in (t, t_next):
                    seen.append(carry[0] if look == t else ahead[0])
                else:
                    part = motion.part(t, t_next, look, like, area)
                    seen.append(scheme.step(p, carry, t, look, part)[0])
            carry = ahead
            if p.counting:
                if i in checked:
                    magnitudes.append(rows(carry[0].detach()).abs().amax(1))
                tick(1)
        return (*carry, *seen)

    segments = mode == "checkpoint"
    length = max(1, math.isqrt(steps)) if segments else steps
    states: list[Tensor] = []
    recording = torch.no_grad() if mode == "adjoint" else nullcontext()
    with recording, bar(progress, steps, "step") as tick:
        carry: Carry = scheme.begin(p, nodes[0], y)
        width = len(carry)
        for first in range(0, steps, length):
            piece = partial(through, first, min(steps, first + length))
            out = checkpoint(piece, *carry, use_reentrant=False) if segments else piece(*carry)
            carry, seen = out[:width], out[width:]
            states += seen
        p.counting = False  # from here on only gradients may call
    if mode == "adjoint":
        way = WayBack.of(p, nodes, motion, like, watch, carry, functions)
        *states, last = way.attach(y, torch.stack([*states, carry[0]])).unbind(0)
        carry = (last,)
    ends = [nodes[i + 1] for i in sorted(checked)]
    return states, settle(carry[0], torch.stack(magnitudes), ends, nodes[0], p.calls, steps)


def chosen(solver: Scheme | str | None, noise_type: str, sde_type: str) -> Scheme:
    """The scheme that is asked for, or the default one.

    Raises:
        TypeError, ValueError: it is no scheme, or none for this noise.
    """
    if solver is None:
        if sde_type == "stratonovich" and noise_type != "additive":
            return StochasticHeun()
        return EulerMaruyama() if noise_type == "general" else SRK()
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {solver.__name__}; pass an instance, {solver.__name__}()")
    found = SCHEMES.get(solver.lower()) if isinstance(solver, str) else solver
    if found is None:
        raise ValueError(f"solver = {solver!r} is not known; expected one of {', '.join(SCHEMES)}")
    if not isinstance(found, Scheme):
        raise TypeError(f"solver is {found!r}; expected one of flowsolve.sde, such as flowsolve.sde.SRK()")
    if noise_type not in found.noises:
        raise ValueError(
            f"{found!r} has noise_type {', '.join(found.noises)}, not {noise_type!r}; use EulerMaruyama() or, for "
            "Stratonovich's equation, StochasticHeun()"
        )
    return found


def _control(
    rtol: float | None, atol: float | None, steps: Any, max_steps: int, scheme: Scheme, noise_type: str, f: Any
) -> Control | None:
    """What adaptive steps must meet; None for steps on a grid."""
    if rtol is None and atol is None:
        if steps is None:
            raise ValueError("steps is missing: give a number of steps, the times of a grid, or rtol= and atol=")
        return None
    if scheme.order(noise_type) < 1.0 or isinstance(scheme, ReversibleHeun):
        raise ValueError(
            f"adaptive steps need a scheme of strong order 1 that carries the state alone, which {scheme!r} with "
            f"{noise_type} noise is not; give steps="
        )
    if getattr(f, "host_time", False):
        raise TypeError("a FlowSDE is solved at one time for all samples; give steps= in place of rtol and atol")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not 0.0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r}; expected a finite number >= 0")
    if not rtol and not atol:
        raise ValueError("rtol and atol are both 0, which no step can meet; give at least one of them > 0")
    if not (steps is None or (isinstance(steps, int) and 1 <= steps <= 2**20)):
        raise ValueError(f"steps = {steps!r}; with tolerances expected the least number of steps, or None")
    if max_steps < 1:
        raise ValueError(f"max_steps = {max_steps!r}; expected at least 1")
    return Control(rtol or 0.0, atol or 0.0, 4 if steps is None else (steps - 1).bit_length(), max_steps)


def _nodes(steps: Any, start: float, end: float) -> list[float]:
    """The times of the grid."""
    if isinstance(steps, int) and not isinstance(steps, bool):
        if steps < 1:
            raise ValueError(f"steps = {steps}; expected at least 1")
        return grids.fractions(start, end, steps)
    try:
        nodes = [float(t) for t in steps]
    except (TypeError, ValueError):
        raise TypeError(f"steps = {steps!r}; expected a number of steps, or the times of a grid") from None
    if len(nodes) < 2 or any(not a < b for a, b in pairwise(nodes)) or (nodes[0], nodes[-1]) != (start, end):
        raise ValueError(f"steps = {nodes}; expected rising times from t0 = {start:g} to t1 = {end:g}")
    return nodes


def _looks(t_eval: Sequence[float] | Tensor, start: float, end: float) -> list[float]:
    looks = [_number(t, f"t_eval[{i}]") for i, t in enumerate(t_eval)]
    if any(not a < b for a, b in pairwise(looks)) or (looks and not start <= looks[0] <= looks[-1] <= end):
        raise ValueError(f"t_eval = {looks}; expected strictly rising times from t0 = {start:g} to t1 = {end:g}")
    return looks


def _motion(
    noise: str | Motion, start: float, end: float, seed: Seed, samples: Sequence[int] | Tensor | None, count: int
) -> Motion:
    if isinstance(noise, Motion):
        if isinstance(noise, BrownianPath) and not noise.t0 <= start <= end <= noise.t1:
            raise ValueError(
                f"the path given as noise= is one over [{noise.t0:g}, {noise.t1:g}]; the solve is from {start:g} to "
                f"{end:g}"
            )
        return noise
    if noise not in ("fresh", "brownian"):
        raise ValueError(f"noise = {noise!r}; expected 'fresh', 'brownian', or a flowsolve.sde.BrownianPath")
    named = Noise.for_batch(seed, count, samples)
    return Fresh(named) if noise == "fresh" or start == end else BrownianPath(start, end, named)


def _number(t: Any, name: str) -> float:
    if isinstance(t, Tensor) and (mapped(t) or moving(t)):
        raise ValueError(f"{name} is mapped or requires a gradient, which times of an SDE have not; give a number")
    found = float(t)
    if not math.isfinite(found):
        raise ValueError(f"{name} = {found}; expected a finite time")
    return found
