"""Snapshots: a solve between two steps, as a value that can be stored, and continued to the same bits.

All that a solver remembers is in its `State`, so the state, the number of the step and the plan's name are all that is
needed to go on:

    sol = fs.sample(flow, shape=…, solver=…, nfe=50, callback=lambda shot: shot.save("solve.pt"))
    sol = fs.sample(flow, resume=fs.Snapshot.load("solve.pt"), solver=…, nfe=50)

The second call, with the same solver, budget and grid, makes the steps that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from flowsolve._bounds import require_plain
from flowsolve.solvers.base import Past

__all__ = ["Callback", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A solve on a fixed grid after some of its steps.

    Attributes:
        step: steps made.
        steps: steps of the whole solve, without a closing one.
        t: flow time reached.
        nfe: network evaluations that each sample has cost so far.
        x: the state, shape (B, *S), as the path scales it.
        past, origin: what a multistep solver remembers (`flowsolve.solvers.base.State`).
        seed, samples: name the noise of the steps.
        plan: the solver and its grid in words, which a solve that resumes must share.
    """

    step: int
    steps: int
    t: float
    nfe: int
    x: Tensor
    past: tuple[Past, ...]
    origin: Tensor | None
    seed: int
    samples: Tensor
    plan: str

    def save(self, file: str | PathLike[str]) -> None:
        """Write it to a file that holds tensors and numbers only."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        torch.save({**content, "past": [tuple(p) for p in self.past]}, file)

    @classmethod
    def load(cls, file: str | PathLike[str], device: torch.device | str | None = None) -> Snapshot:
        """Read it from a file, which can execute nothing.

        Args:
            file: what `save` wrote.
            device: where to put the tensors; by default where they were.

        Raises:
            ValueError: the file holds something else.
        """
        require_plain(file)
        content = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(content, dict) or set(content) != set(cls.__dataclass_fields__):
            raise ValueError(f"{str(file)!r} is not a snapshot; expected a file that Snapshot.save wrote")
        past: Any = tuple(Past(*p) for p in content.pop("past"))
        return cls(**content, past=past)


Callback = Callable[[Snapshot], object]
"""Is shown the solve after every step. What it returns does not matter; what it raises ends the solve."""
