"""Processes that share a run, told apart by the variables that torchrun sets: RANK, WORLD_SIZE and LOCAL_RANK.

Batch b belongs to rank b mod world. That is all the processes have to agree on: they never wait for each other, so
adaptive solvers may take as many steps as each needs, processes may start hours apart or on machines that share nothing
but the run's directory, and no backend (gloo, nccl) is started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

__all__ = ["Rank"]


@dataclass(frozen=True)
class Rank:
    """One of `world` processes.

    Attributes:
        number: 0 … world − 1.
        world: how many there are.
        local: the number on this machine, which chooses the CUDA device.
    """

    number: int = 0
    world: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.world:
            raise ValueError(
                f"RANK = {self.number} and WORLD_SIZE = {self.world}; expected 0 <= RANK < WORLD_SIZE, as torchrun "
                "sets them"
            )

    @classmethod
    def here(cls) -> Rank:
        """This process, from its environment; alone if that says nothing."""
        values = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            text = os.environ.get(name, "")
            if text and not text.isdigit():
                raise ValueError(f"{name} = {text!r} in the environment; expected an integer, as torchrun sets it")
            values[name] = int(text) if text else None
        number, world, local = values.values()
        if (number is None) != (world is None):
            raise ValueError("only one of RANK and WORLD_SIZE is set in the environment; set both or neither")
        if number is None or world is None:
            return cls()
        return cls(number, world, number if local is None else local)

    def mine(self, batch: int) -> bool:
        """Whether a batch belongs to this process."""
        return batch % self.world == self.number

    def device(self, asked: str | torch.device | None) -> torch.device | None:
        """The device asked for; "cuda" becomes that of LOCAL_RANK."""
        if asked is None:
            return None
        device = torch.device(asked)
        if str(device) != "cuda":
            return device
        count = torch.cuda.device_count()
        if self.local >= count:
            raise ValueError(
                f"LOCAL_RANK = {self.local}, but this machine has {count} CUDA devices; start at most {count} "
                "processes a machine, or use device='cpu'"
            )
        return torch.device("cuda", self.local)
