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

**End times** given as tensors receive gradients in every mode: from $\partial y(t_1)/\partial t_1 = f(y(t_1), t_1)$,
and because starting at $t_0 + \delta$ is starting at $t_0$ from $y_0 - \delta f(y_0, t_0)$. Each costs one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowsolve._batch import Context, per_sample
from flowsolve._parameters import parameters_of
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
    """

    solver: RungeKutta
    ask: Ask
    context: Context
    start: float
    stops: Sequence[float]
    intervals: Sequence[tuple[float, float, int]] | None = None

    def attach(self, y: Tensor, states: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The states at the stops, (T, B, *S), as a differentiable function of y at the start and the parameters."""
        result: Tensor = _Adjoint.apply(self, states, y, *parameters)  # type: ignore[no-untyped-call]
        return result

    def back(self, states: Tensor, gradients: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """∂L/∂y at the start and ∂L/∂θ, from ∂L/∂(states)."""
        sums = [torch.zeros_like(p) for p in parameters]
        ends = [*self.stops]
        a = torch.zeros_like(gradients[0])
        for i in range(len(ends) - 1, -1, -1):
            a = a + gradients[i]
            target = ends[i - 1] if i else self.start
            if target != ends[i]:
                a = self._between(torch.stack((states[i], a), 1), ends[i], target, parameters, sums)
        return a, sums

    def _between(self, joint: Tensor, s: float, target: float, parameters: Any, sums: list[Tensor]) -> Tensor:
        """Carry (y, a), shape (B, 2, *S), back from s to a target, adding to the parameters' integrals."""
        if isinstance(self.solver, Adaptive) and self.solver.adaptive:

            def norm(e: Tensor) -> Tensor:
                return torch.maximum(self.solver.norm(e[:, 0]), self.solver.norm(e[:, 1]))  # type: ignore[attr-defined]

            def watcher(attempt: Attempt, context: Context) -> None:
                self._add(attempt.stride, np.flatnonzero(attempt.accepted), context, parameters, sums)

            solver = replace(self.solver, norm=norm, first_step=None)
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
                self._add(stride, None, self.context, parameters, sums)
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
                (found,) = torch.autograd.grad(slope, y, query.x[:, 1], allow_unused=True)
                back = back if found is None else found
        return torch.stack((slope.detach(), -back), 1)

    def _add(self, stride: Stride, rows: Any, context: Context, parameters: Any, sums: list[Tensor]) -> None:
        """Add a step's part of ∫ aᵀ ∂f/∂θ ds: the step goes back, h < 0 there where ds > 0 here."""
        if not parameters or (rows is not None and not len(rows)):
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
                share = per_sample(-weight * h if rows is None else torch.from_numpy(-weight * h), joint[:, 1])
                # Retained: what a field computed once from its parameters belongs to the graph of every slope.
                found = torch.autograd.grad(
                    slope, parameters, share * joint[:, 1], allow_unused=True, retain_graph=True
                )
            for total, g in zip(sums, found, strict=True):
                if g is not None:
                    total += g


class _Adjoint(torch.autograd.Function):
    """Identity on the states that were solved for, with the adjoint solve as its backward pass."""

    @staticmethod
    def forward(ctx: Any, problem: Backsolve, states: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(states, *parameters)
        return states.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> Any:
        states, *parameters = ctx.saved_tensors
        with torch.no_grad():
            a, sums = ctx.problem.back(states, gradients, parameters)
        return (None, None, a, *sums)
