"""What a solve returns: the states, what they cost, and how each sample ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve.solvers.adaptive import Status

__all__ = ["Solution", "SolverError"]

REASONS = {
    Status.RUNNING: "still running",
    Status.SUCCESS: "reached the end",
    Status.EVENT: "reached an event",
    Status.NONFINITE: "met a value that is not finite",
    Status.UNDERFLOW: "step size fell below min_step or the resolution of time (the field is stiff or has a jump)",
    Status.BUDGET: "evaluation budget spent",
    Status.MAX_STEPS: "max_steps attempts made",
    Status.MAX_REJECTIONS: "max_rejections steps rejected in a row (the field is not smooth there)",
}

STIFF = (
    "If steps stay far below the solution's own time scale at any tolerance, the problem is stiff and wants an "
    "implicit method, for an ODE "
    "solver=flowsolve.solvers.bridges.Torchdiffeq('scipy_solver', options={'solver': 'Radau'}). "
)
MENDS = {
    Status.NONFINITE: "Look at the field there; on a fixed grid, take more steps. ",
    Status.UNDERFLOW: f"Loosen rtol and atol, or look at the field there. {STIFF}",
    Status.BUDGET: f"Raise nfe, or loosen rtol and atol. {STIFF}",
    Status.MAX_STEPS: f"Loosen rtol and atol, or raise max_steps. {STIFF}",
    Status.MAX_REJECTIONS: "Raise max_rejections, or look at the field there. ",
}


@dataclass(frozen=True)
class Solution:
    """The outcome of a solve, with one entry a sample in every field but `x`'s trailing ones.

    Attributes:
        x: states at the end, shape (B, *S); with t_eval, shape (T, B, *S). A sample that failed holds its last
            accepted state (adaptive) or what the arithmetic gave (fixed grid).
        nfe: network evaluations each sample cost, int64 of shape (B,).
        status: a `Status` for each sample, int64 of shape (B,).
        accepted: accepted steps, int64 of shape (B,).
        rejected: rejected steps, int64 of shape (B,).
        t: the time each sample reached (of an event, differentiable), or that of the first value that was not finite;
            float64 of shape (B,).
        t_eval: the times of x's first axis (of the trajectory, for a flow), if asked for.
        trajectory: of a flow: its states at t_eval, shape (T, B, *S), NaN where a sample did not get.
        events: of `flowsolve.solve(event=…)`: the `flowsolve.events.Occurrences` of each event.
        dense: of `flowsolve.solve(dense=True)`: the solution as a function of time (`flowsolve.dense.Dense`).
    """

    x: Tensor
    nfe: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    t: Tensor
    t_eval: Tensor | None = None
    trajectory: Tensor | None = None
    events: tuple[Any, ...] = ()
    dense: Any = None

    @property
    def ok(self) -> Tensor:
        """Which samples reached the end, or an event that ends them, bool of shape (B,)."""
        return (self.status == Status.SUCCESS) | (self.status == Status.EVENT)

    @property
    def messages(self) -> list[str]:
        """One sentence a sample."""
        rows = zip(self.status.tolist(), self.t.tolist(), self.nfe.tolist(), strict=True)
        return [f"{REASONS[Status(s)]} at t = {t:.6g} after {n} evaluations" for s, t, n in rows]

    def raise_on_failure(self) -> Solution:
        """This solution if every sample reached the end; otherwise raise `SolverError`."""
        if not bool(self.ok.all()):
            raise SolverError(self)
        return self


class SolverError(RuntimeError):
    """Some samples did not reach the end. The others did: everything is in `solution`.

    Attributes:
        solution: the whole `Solution`, as `throw=False` would have returned it.
        samples: positions in the batch of the samples that failed.
    """

    def __init__(self, solution: Solution) -> None:
        self.solution = solution
        self.samples: list[int] = torch.nonzero(~solution.ok).flatten().tolist()
        messages = solution.messages
        lines = [f"sample {i}: {messages[i]}" for i in self.samples[:5]]
        if len(self.samples) > 5:
            lines.append(f"and {len(self.samples) - 5} more")
        super().__init__(
            f"{len(self.samples)} of {len(messages)} samples did not reach the end: {'; '.join(lines)}. "
            + MENDS.get(Status(int(solution.status[self.samples[0]])), "")
            + "Pass throw=False to get every sample with its status, or read .solution of this error."
        )

    def __reduce__(self) -> Any:
        return type(self), (self.solution,)  # a pool of processes pickles what its workers raise
