r"""The adjoint of the reversible Heun scheme: gradients of the steps made, with memory of O(1).

A step maps $(y, \hat y, f, g)$, with f and g evaluated at $\hat y$, to the next four. Given those, it is undone by

$$ \hat y = 2y' - \hat y' - f' h - g' W, \qquad y = y' - \tfrac12 (f + f')h - \tfrac12 (g + g')W, $$

f and g evaluated at the $\hat y$ just found. So the way back finds every state again, to rounding, without having kept
any, draws the same increments from their addresses, and takes each step's own vector–Jacobian product: what results is
the gradient that autograd would find, where a continuous adjoint SDE has an error of the scheme's order. A step back
costs two evaluations of f and g, one of them with its graph. (Kidger, Foster, Li & Lyons 2021.)

Rounding grows on the way back as a perturbation of the state does in reversed time, so a strongly contracting SDE over
a long time loses digits. Prefer `gradient="checkpoint"` where memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve._parameters import parameters_of
from flowsolve._surroundings import bare, moving, within
from flowsolve.sde.motion import Drive, Motion
from flowsolve.sde.problem import Problem
from flowsolve.sde.schemes import Carry, ReversibleHeun

__all__ = ["WayBack"]

SCHEME = ReversibleHeun()


@dataclass(frozen=True)
class WayBack:
    """The way back of a solve that was made without recording gradients.

    Attributes:
        problem: the SDE.
        nodes: the grid.
        motion: what drove it.
        like: an empty tensor of the shape of a drive.
        watch: for some steps by number, the times in them that were looked at.
        carry: what was carried at the end.
        parameters: what f and g depend on beside y.
    """

    problem: Problem
    nodes: Sequence[float]
    motion: Motion
    like: Tensor
    watch: Mapping[int, Sequence[float]]
    carry: Carry
    parameters: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        problem: Problem,
        nodes: Sequence[float],
        motion: Motion,
        like: Tensor,
        watch: Mapping[int, Sequence[float]],
        carry: Carry,
        functions: Iterable[Any],
    ) -> WayBack:
        """The way back, with the parameters that a search of some functions and of f's and g's graphs finds."""
        slopes = []
        with torch.enable_grad():
            for t in (nodes[0], nodes[-1]):
                y = carry[1].detach()
                slopes += [v for v in (problem.f(t, y), problem.g(t, y)) if isinstance(v, Tensor)]
        return cls(problem, nodes, motion, like, watch, carry, parameters_of(functions, slopes))

    def attach(self, y: Tensor, states: Tensor) -> Tensor:
        """The states looked at and the last, (T + 1, B, *S), as a function of y at the start and the parameters."""
        if not bare() and (within() is not None or moving(states) or moving(y)):
            raise NotImplementedError(
                "gradient='adjoint' has reverse-mode derivatives of autograd only; for torch.func and forward-mode "
                "derivatives use gradient='direct'"
            )
        result: Tensor = _Adjoint.apply(self, states, y, *self.parameters)  # type: ignore[no-untyped-call]
        return result

    def back(self, y: Tensor, gradients: Tensor) -> tuple[Tensor, list[Tensor]]:
        """∂L/∂y at the start and ∂L/∂θ, from ∂L/∂(states)."""
        sums = [torch.zeros_like(p) for p in self.parameters]
        carry, left = self.carry, len(gradients) - 2
        a = [gradients[-1], *(torch.zeros_like(v) for v in carry[1:])]
        steps = len(self.nodes) - 1
        block = max(1, math.isqrt(steps))
        for last in range(steps, 0, -block):
            first = max(0, last - block)
            drives = list(self.motion.drives(self.nodes[first : last + 1], self.like, area=False))
            for i in range(last - 1, first - 1, -1):
                carry = self._undone(carry, i, drives[i - first])
                looks = self.watch.get(i, ())
                a = self._through(carry, i, drives[i - first], a, gradients[left - len(looks) + 1 : left + 1], sums)
                left -= len(looks)
        with torch.enable_grad():
            start = y.detach().requires_grad_()
            out = SCHEME.begin(self.problem, self.nodes[0], start)
        return self._add(out, [start], a, sums)[0], sums

    def _undone(self, carry: Carry, i: int, drive: Drive) -> Carry:
        """What was carried before a step."""
        p, t, h, w = self.problem, self.nodes[i], self.nodes[i + 1] - self.nodes[i], drive[0]
        y, hat, f, g = carry
        before = 2.0 * y - hat - f * h - p.product(g, w)
        f_before, g_before = p.f(t, before), p.g(t, before)
        if not isinstance(g_before, Tensor):
            g_before = before.new_full((), g_before)
        return y - (f + f_before) * (0.5 * h) - p.product(0.5 * (g + g_before), w), before, f_before, g_before

    def _through(
        self, carry: Carry, i: int, drive: Drive, a: list[Tensor], looks: Tensor, sums: list[Tensor]
    ) -> list[Tensor]:
        """The adjoint before a step, from that after it and those of what was looked at in it."""
        t, t_next = self.nodes[i], self.nodes[i + 1]
        with torch.enable_grad():
            leaves = tuple(v.detach().requires_grad_() for v in carry)
            out = list(SCHEME.step(self.problem, leaves, t, t_next, drive))
            gradients = list(a)
            for look, gradient in zip(self.watch.get(i, ()), looks, strict=True):
                if look == t_next:
                    gradients[0] = gradients[0] + gradient
                    continue
                if look == t:
                    out.append(leaves[0])
                else:
                    part = self.motion.part(t, t_next, look, self.like, area=False)
                    out.append(SCHEME.step(self.problem, leaves, t, look, part)[0])
                gradients.append(gradient)
        return self._add(out, list(leaves), gradients, sums)

    def _add(
        self, out: Sequence[Tensor], leaves: list[Tensor], gradients: Sequence[Tensor], sums: list[Tensor]
    ) -> list[Tensor]:
        """The product of some outputs' Jacobians with their gradients: that of the leaves, the parameters' added up."""
        pairs = [(v, a) for v, a in zip(out, gradients, strict=True) if v.requires_grad]
        found = torch.autograd.grad(
            [v for v, _ in pairs], [*leaves, *self.parameters], [a for _, a in pairs], allow_unused=True,
            retain_graph=True,  # what a function computed once from its parameters belongs to every graph
        )  # fmt: skip
        for total, gradient in zip(sums, found[len(leaves) :], strict=True):
            if gradient is not None:
                total += gradient
        return [torch.zeros_like(v) if a is None else a for v, a in zip(leaves, found, strict=False)]


class _Adjoint(torch.autograd.Function):
    """Identity on the states that were solved for, with the way back as its backward pass."""

    @staticmethod
    def forward(ctx: Any, way: WayBack, states: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(y, *parameters)
        return states.clone()

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True through gradient='adjoint', which has first derivatives only; use "
                "gradient='checkpoint' or 'direct'"
            )
        a, sums = ctx.way.back(ctx.saved_tensors[0], gradients)
        return (None, None, a, *sums)
