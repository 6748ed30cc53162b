"""A run for other processes: `python work.py OUT`, or under torchrun. What it does is in the environment.

WORK_CALL   seconds that a network call sleeps, so that a kill finds the run at work
WORK_MANY   draw 600 samples too
WORK_FAULT  POINT:COMMIT: kill this process at its n-th commit, "inside" or "after" the transaction
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flowsolve as fs
from flowsolve import runs, solvers
from flowsolve.runs import parts

LEVELS = 16
COUNT = 30
MIXTURE = fs.problems.GaussianMixture(
    0.4 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2)), [0.3, 0.5, 0.4]
)
IMAGES = torch.randint(0, LEVELS, (COUNT, 1, 2, 2), generator=torch.Generator().manual_seed(0))


class Net(torch.nn.Module):
    """The exact velocity of a mixture, with a parameter."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.inner, self.pause = MIXTURE.flow(fs.paths.CondOT()), pause

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause)
        return self.scale * self.inner.net(x, t)


def flow(pause: float = 0.0) -> fs.Flow:
    inner = MIXTURE.flow(fs.paths.CondOT())
    return fs.Flow(Net(pause), inner.path, inner.prediction, dtype=torch.float32)


def nll(out: Path, data: Any = IMAGES, pause: float = 0.0, **options: Any) -> Any:
    """Adaptive: images of a batch, and processes, take different numbers of steps."""
    settings = {"solver": solvers.Dopri5(1e-4, 1e-4), "levels": LEVELS, "batch": 4, "seed": 3, "plot": False, **options}
    return runs.nll(flow(pause), data, out, **settings)


def sample(out: Path, **options: Any) -> Any:
    settings = {"solver": solvers.DDPM(), "nfe": 6, "batch": 4, "seed": 5, "shape": (1, 2, 2), "raw": True, **options}
    return runs.sample(flow(), 14, out, **settings)


def many(out: Path) -> Any:
    """Adaptive, and long enough that kernels are compiled on the way where they may be."""
    options: dict[str, Any] = {"solver": solvers.Dopri5(1e-5, 1e-5), "batch": 10, "seed": 7, "shape": (1, 2, 2)}
    return runs.sample(flow(), 600, out, **options, raw=True, png=False)


def fault(point: str, at: int) -> None:
    """Kill this process at its n-th commit."""
    commit, done = parts.Part.commit, 0

    def dying(self: parts.Part, number: int, rows: Any, seconds: float) -> None:
        nonlocal done
        done += 1
        if done == at and point == "inside":
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany(self._insert, rows)
        else:
            commit(self, number, rows, seconds)
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.Part.commit = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORK_FAULT" in os.environ:
        point, _, at = os.environ["WORK_FAULT"].partition(":")
        fault(point, int(at))
    root = Path(sys.argv[1])
    nll(root / "nll", pause=float(os.environ.get("WORK_CALL", "0")))
    if "WORK_CALL" not in os.environ:
        sample(root / "sample")
    if "WORK_MANY" in os.environ:
        many(root / "many")
