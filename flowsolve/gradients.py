r"""Gradients of a solve: three ways to the same derivative.

| `gradient=` | what is differentiated | memory for n steps | cost of the backward pass |
|---|---|---|---|
| `"direct"` | the steps that were made (discretise, then optimise) | O(n) graphs | that of the graph |
| `"checkpoint"` | the same steps, to the same gradient | O(√n) | and the forward pass once more |
| `"adjoint"` | the ODE (optimise, then discretise) | O(1) | a solve of the adjoint ODE |

The **adjoint** of $dy/ds = f(y, s)$ (Pontryagin; Chen et al. 2018) carries $a = \partial L/\partial y(s)$ back along
the solution, which is solved again from its end:

$$ \frac{da}{ds} = -a^\top \frac{\partial f}{\partial y}, \qquad
   \frac{\partial L}{\partial \theta} = \int_{s_0}^{s_1} a^\top \frac{\partial f}{\partial\theta}\,ds . $$

Every sample has its own steps on the way back too, with (y, a) under the control that y had on the way there. The
second formula is a plain integral along a known curve, so it needs no place in the state: each accepted step adds it up
at Gauss–Legendre nodes on its interpolant, ⌈p/2⌉ of them for a method of order p.

Adjoint gradients are as exact as the tolerance, no more: a solution that forgets where it came from cannot be traced
back. Prefer `"checkpoint"` where memory allows.

**End times** given as tensors receive gradients in every mode, by a step of no length (`nudged`): with $e = t_1 -
\bar t_1$, which is 0 and has the derivative of $t_1$, the state at the end is the midpoint rule's

$$ y + e\, f\bigl(\bar t_1 + \tfrac e2,\; y + \tfrac e2 f(\bar t_1, y)\bigr) , $$

whose derivatives in $e$ are those of the solution up to the second, and at all orders in everything else. And starting
at $t_0$ is starting at $\bar t_0$ from where a step of $-e$ from $t_0$ leads. Each costs two evaluations. A third
derivative in one time is refused.

**Twice.** Second derivatives are those of the steps, directly and with checkpoints. The adjoint is differentiable once:
a second derivative through it is refused. So are forward-mode derivatives and `torch.func`, which see through
`"direct"`.

**What the adjoint's control sees.** The error of y and a; not that of the integral for $\partial L/\partial\theta$,
whose place in a norm would be that of all parameters once a sample. Where $\partial f/\partial\theta$ changes faster
in time than y and a (a term of f that is switched off by its parameter, θ = 0), limit `max_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import Context, per_sample
from flowsolve._parameters import leaves, parameters_of
from flowsolve._surroundings import bare, eager, moving, within
from flowsolve.drivers import Ask
from flowsolve.pursuit import collect, pursue, resident
from flowsolve.solvers.adaptive import Adaptive, Attempt
from flowsolve.solvers.base import Query, run
from flowsolve.solvers.runge_kutta import RungeKutta, Stride, look

__all__ = ["MODES", "Backsolve", "parameters_of"]

MODES = ("direct", "checkpoint", "adjoint")


@dataclass(frozen=True)
class Backsolve:
    """The way back of a solve that was made without recording gradients.

    Attributes:
        solver: the solver of the way there.
        ask: dy/ds for a query.
        context: what belongs to the samples.
        start: the time at which the solve began.
        stops: the times whose states were returned, in order, the last of them its end.
        intervals: (s, s_next, evaluations) of a fixed grid; None for an adaptive solve.
        parameters: what dy/ds depends on beside y.
    """

    solver: RungeKutta
    ask: Ask
    context: Context
    start: float
    stops: Sequence[float]
    intervals: Sequence[tuple[float, float, int]] | None = None
    parameters: Sequence[Tensor] = ()

    def attach(self, y: Tensor, states: Tensor) -> Tensor:
        """The states at the stops, (T, B, *S), as a differentiable function of y at the start and the parameters."""
        if not bare() and (within() is not None or moving(states) or moving(y)):
            raise NotImplementedError(
                "gradient='adjoint' has reverse-mode derivatives of autograd only; for torch.func and forward-mode "
                "derivatives use gradient='direct'"
            )
        result: Tensor = _Adjoint.apply(self, states, y, *self.parameters)  # type: ignore[no-untyped-call]
        return result

    @eager
    def back(self, states: Tensor, gradients: Tensor) -> tuple[Tensor, list[Tensor]]:
        """∂L/∂y at the start and ∂L/∂θ, from ∂L/∂(states)."""
        sums = [torch.zeros_like(p) for p in self.parameters]
        ends = [*self.stops]
        a = torch.zeros_like(gradients[0])
        for i in range(len(ends) - 1, -1, -1):
            a = a + gradients[i]
            target = ends[i - 1] if i else self.start
            if target != ends[i]:
                a = self._between(torch.stack((states[i], a), 1), ends[i], target, sums)
        return a, sums

    def _between(self, joint: Tensor, s: float, target: float, sums: list[Tensor]) -> Tensor:
        """Carry (y, a), shape (B, 2, *S), back from s to a target, adding to the parameters' integrals."""
        if isinstance(self.solver, Adaptive) and self.solver.adaptive:

            def norm(e: Tensor) -> Tensor:
                return torch.maximum(self.solver.norm(e[:, 0]), self.solver.norm(e[:, 1]))  # type: ignore[attr-defined]

            def watcher(attempt: Attempt, context: Context) -> None:
                self._add(attempt.stride, np.flatnonzero(attempt.accepted), context, sums)

            own = getattr(self.solver, "joint_norm", None)
            solver = replace(self.solver, norm=own or norm, first_step=None)
            parts = list(
                pursue(solver, resident(joint, self.context), s, target, self._joint, width=len(joint), watcher=watcher)
            )
            _, solution = collect(parts, joint, 0)
            return solution.raise_on_failure().x[:, 1]
        low, high = min(s, target), max(s, target)
        for a, b, evaluations in reversed(self.intervals or ()):
            first, last = (min(max(v, low), high) for v in (b, a))  # a stop may lie within an interval
            if first != last:
                stride = run(self.solver.stride(joint, first, last, evaluations), self._answer(self.context))
                self._add(stride, None, self.context, sums)
                joint = stride.ahead
        return joint[:, 1]

    def _answer(self, context: Context) -> Callable[[Query], Tensor]:
        return lambda query: self._joint(query, context.tree)

    def _joint(self, query: Query, context: Any) -> Tensor:
        """(dy/ds, da/ds)."""
        with torch.enable_grad():
            y = query.x[:, 0].detach().requires_grad_()
            slope = self.ask(query.about(y), context)
            back = torch.zeros_like(y)
            if slope.requires_grad:
                if not self.parameters:  # with parameters, this is looked at where their integral is added up
                    self._check(slope, Query(y, query.t), context)
                (found,) = torch.autograd.grad(slope, y, query.x[:, 1], allow_unused=True)
                back = back if found is None else found
        return torch.stack((slope.detach(), -back), 1)

    def _add(self, stride: Stride, rows: Any, context: Context, sums: list[Tensor]) -> None:
        """Add a step's part of ∫ aᵀ ∂f/∂θ ds: the step goes back, h < 0 there where ds > 0 here."""
        if not self.parameters or (rows is not None and not len(rows)):
            return
        nodes, weights = np.polynomial.legendre.leggauss(-(-stride.tableau.order // 2))
        part = context if rows is None else context.select(rows)
        for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
            theta = node if rows is None else np.full(len(rows), node)
            joint = run(look(stride, rows, theta), self._answer(part))
            h = stride.h if rows is None else stride.h[rows]
            times = (stride.s if rows is None else stride.s[rows]) + float(node) * h
            with torch.enable_grad():
                t = times if rows is None else torch.from_numpy(times)
                slope = self.ask(Query(joint[:, 0], t), part.tree)
                if not slope.requires_grad:
                    continue
                self._check(slope, Query(joint[:, 0], t), part.tree)
                share = per_sample(-weight * h if rows is None else torch.from_numpy(-weight * h), joint[:, 1])
                # Retained: what a field computed once from its parameters belongs to the graph of every slope.
                found = torch.autograd.grad(
                    slope, self.parameters, share * joint[:, 1], allow_unused=True, retain_graph=True
                )
            for total, g in zip(sums, found, strict=True):
                if g is not None:
                    total += g

    def _check(self, slope: Tensor, query: Query, context: Any) -> None:
        """Raise if a slope depends on what is neither the state it was asked about nor among the parameters."""
        inner = {p.grad_fn for p in self.parameters if p.grad_fn is not None}
        known = {id(query.x), *(id(p) for p in self.parameters)}
        strange = {id(v): v for v in leaves([slope], inner) if id(v) not in known}
        if not strange:
            return
        # A tensor that f makes on its way is another one when f is asked again; a parameter is the same.
        again = [v for v in leaves([self.ask(query, context)], inner) if id(v) in strange]
        if again:
            shapes = ", ".join(str(tuple(v.shape)) for v in again)
            raise ValueError(
                f"gradient='adjoint' found no way to {len(again)} tensor(s) that dy/dt depends on, of shape {shapes}, "
                "which would get no gradient: give fs.solve params=[…], let the network hold them as modules or "
                "parameters, or use gradient='checkpoint'"
            )


class _Adjoint(torch.autograd.Function):
    """Identity on the states that were solved for, with the adjoint solve as its backward pass."""

    @staticmethod
    def forward(ctx: Any, problem: Backsolve, states: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(states, y, *parameters)
        return states.clone()

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Any:
        states, y, *parameters = ctx.saved_tensors
        with torch.no_grad():
            a, sums = ctx.problem.back(states, gradients)
        if torch.is_grad_enabled():  # the caller means to differentiate what we return
            a, *sums = _Once.apply(len(sums) + 1, a, *sums, gradients, y, *parameters)  # type: ignore[no-untyped-call]
        return (None, None, a, *sums)


class _Once(torch.autograd.Function):
    """Identity on the first few tensors, with no derivative in any of them."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(v.clone() for v in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "a gradient that gradient='adjoint' made is differentiated once more, and the adjoint has first "
            "derivatives only; use gradient='checkpoint' or 'direct' (of flowsolve.compat.torchdiffeq: odeint)"
        )


# --- end times -------------------------------------------------------------------------------------------------------


def shift(t: Tensor) -> Tensor:
    """0, with the derivatives of t up to the second."""
    e = t - t.detach()
    return _Limited.apply(e, 2) if e.requires_grad or within() is not None else e  # type: ignore[no-untyped-call]


def nudged(ask: Ask, y: Tensor, t: Any, h: Tensor, context: Any) -> Tensor:
    """y after a step of no length from time t; h is 0, with derivatives (see `shift`). Either may be one a sample."""
    far, near = h.to("cpu", torch.float64), per_sample(h, y)
    t = t.to("cpu", torch.float64) if isinstance(t, Tensor) else t
    whole = torch.zeros(len(y), dtype=torch.float64, device="cpu")
    slope = ask(Query(y, whole + t), context)
    slope = ask(Query(y + 0.5 * near * slope, whole + (t + 0.5 * far)), context)
    moved: Tensor = y + near * slope
    return moved


class _Limited(torch.autograd.Function):
    """Identity that can be differentiated so many times and refuses the next: its value is 0 (`shift`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(e: Tensor, left: int) -> Tensor:
        return e.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        e, ctx.left = inputs
        ctx.save_for_backward(e)
        ctx.save_for_forward(e)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _again(ctx, gradient), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return _again(ctx, tangent)


def _again(ctx: Any, change: Tensor) -> Tensor:
    """A derivative, as something whose own derivatives are counted."""
    if not ctx.left:
        raise NotImplementedError(
            "a solve is differentiated three times with respect to one of its times, which gives first and second "
            "derivatives; for more, solve over a fixed interval, y'(u) = (t1 - t0) f(t0 + u (t1 - t0), y) for u from "
            "0 to 1"
        )
    (e,) = ctx.saved_tensors
    counted: Tensor = _Limited.apply(e, ctx.left - 1)  # type: ignore[no-untyped-call]
    return change + 0.0 * counted
