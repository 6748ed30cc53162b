r"""`gradients`: the memory that a gradient holds, against the number of steps.

The field is a small network, 64 → 64 → 64 with a tanh, on a state of shape (512, 64) in float64 (0.25 MiB): an
evaluation leaves about 0.5 MiB for the way back. The gradient is that of $\tfrac12\overline{|y(1)|^2}$ with respect to
the start and to all weights. Every run is a process of its own (`python -m sections.gradients`), which first takes the
same gradient over two steps, then resets the kernel's mark of the most memory it has held (/proc/self/clear_refs; so
Linux only). `peak` is that mark afterwards less what was resident before, in MiB. What autograd itself counts (saved
tensors) would leave out what checkpointing makes again. One thread.

That mark is of what the allocator has taken from the system, and glibc's heap keeps holes: aligned blocks of one size
do not fit into the places they left. So the runs are made with MALLOC_MMAP_THRESHOLD_ set, under which every block of
64 KiB goes back to the system when it is freed, and `peak` is what is held. `heap` is the peak without that setting, at
one number of steps, and `seconds` the time of the same run.

`exponent` is the slope of log peak over log steps from 50 steps on. `difference` is that of the gradient from the
"direct" one of the same library and steps, relative, in the Euclidean norm.

* RK4 of 16, 64, 256, 1024 steps (torchdiffeq's "rk4" is the 3/8 rule);
* Dopri5 at falling tolerances; a step is an attempt (evaluations of the way there / 6).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import kernels
from sections.measure import target
from sections.peers import Counted, available

__all__ = ["MODES", "measure", "table"]

STEPS = (16, 64, 256, 1024)
TOLERANCES = (1e-3, 1e-6, 1e-9, 1e-12)
SHAPE = (512, 64)
MODES = ("direct", "checkpoint", "adjoint", "torchdiffeq", "torchdiffeq adjoint")
SPEED = 12.0  # how fast the field moves: with 1, two steps would do
LIMITS = {"checkpoint": 0.65, "adjoint": 0.2}
HEAP = -2  # which of the sizes is run on the plain heap as well


class Field(nn.Module):
    """dy/dt = SPEED · W₂ tanh(W₁ y + b₁) + b₂, and a turn that keeps it from settling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = SHAPE[1]
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, t: Any, y: Tensor) -> Tensor:
        """The slope; t is not used."""
        return SPEED * self.outer(torch.tanh(self.inner(y)))


def _end(mode: str, size: float, f: Any, y: Tensor) -> Tensor:
    """y(1) by RK4 of `size` steps, or by Dopri5 at that tolerance if it is below 1."""
    if mode.startswith("torchdiffeq"):
        peer = available("torchdiffeq")
        assert peer is not None
        solve = peer.odeint_adjoint if mode.endswith("adjoint") else peer.odeint
        times = torch.tensor([0.0, 1.0], dtype=y.dtype)
        if size < 1:
            return solve(f, y, times, method="dopri5", rtol=size, atol=size)[-1]
        return solve(f, y, times, method="rk4", options={"step_size": 1.0 / size})[-1]
    if size < 1:
        return fs.solve(f, y, 0.0, 1.0, solver=fs.solvers.Dopri5(rtol=size, atol=size), gradient=mode).x
    return fs.solve(f, y, 0.0, 1.0, solver=fs.solvers.RK4(), nfe=4 * int(size), gradient=mode).x


class CountedField(nn.Module):
    """A module whose calls are counted, as `torchdiffeq.odeint_adjoint` wants its field to be a module."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field
        self.counted = Counted(field)

    def forward(self, t: Any, y: Tensor) -> Tensor:
        """The slope."""
        return self.counted(t, y)


def _gradient(mode: str, size: float) -> tuple[Tensor, int]:
    """The gradient as one vector, and the calls of the way there."""
    field = CountedField(Field().double())
    y = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    end = _end(mode, size, field, y)
    calls = field.counted.calls
    loss = 0.5 * end.square().sum(1).mean()
    parts = torch.autograd.grad(loss, [y, *field.parameters()])
    return torch.cat([part.flatten() for part in parts]), calls


def _memory(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def probe(mode: str, size: float, file: str) -> dict[str, Any]:
    """What one gradient takes, in this process; the gradient itself is left in a file."""
    with torch.no_grad(), kernels.use("fused"):  # what is loaded once is no part of a gradient's memory
        _end("direct", 2, Field().double(), torch.zeros(SHAPE, dtype=torch.float64))
        _end("direct", 0.5, Field().double(), torch.zeros(SHAPE, dtype=torch.float64))
    _gradient(mode, 2 if size >= 1 else 0.5)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _memory("VmRSS"), time.perf_counter()
    gradient, calls = _gradient(mode, size)
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM") - before
    np.save(file, gradient.numpy())
    return {"mode": mode, "size": size, "calls": calls, "peak": peak, "seconds": seconds}


def _run(mode: str, size: float, folder: Path, *, heap: bool = False) -> dict[str, Any]:
    file = folder / f"{mode}-{size}.npy"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment["FLOWSOLVE_KERNELS"] = "torch"  # numba itself would be 60 MiB more where a solve is long enough for it
    if not heap:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "sections.gradients", mode, str(size), str(file)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["gradient"] = np.load(file)
    file.unlink()
    return found


def _exponent(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The slope of log peak over log steps, from 50 steps on."""
    late = [(run["steps"], max(run["peak"], 1.0)) for run in runs if run["steps"] >= 50]
    if len(late) < 2:
        return None
    steps, peaks = zip(*late, strict=True)
    return float(np.polyfit(np.log(steps), np.log(peaks), 1)[0])


def _series(sizes: Sequence[float], evaluations: int, modes: Sequence[str]) -> dict[str, Any]:
    """All modes at all sizes; evaluations of a step."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            direct: dict[str, Any] = {}
            for mode in modes:
                run = _run(mode, size, Path(folder))
                gradient = run.pop("gradient")
                own = direct.setdefault("torchdiffeq" if mode.startswith("torchdiffeq") else "flowsolve", gradient)
                run["difference"] = float(np.linalg.norm(gradient - own) / np.linalg.norm(own))
                run["steps"] = round(run["calls"] / evaluations)
                runs[mode].append(run)
        heap = {mode: _run(mode, sizes[HEAP], Path(folder), heap=True) for mode in modes}
    return {
        mode: {
            "runs": found,
            "exponent": _exponent(found),
            "heap": {"steps": found[HEAP]["steps"], "peak": heap[mode]["peak"], "seconds": heap[mode]["seconds"]},
        }
        for mode, found in runs.items()
    }


def measure(quick: bool) -> dict[str, Any]:
    """Peak memory, time and difference of every mode."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {"skipped": "needs Linux's /proc/self/clear_refs", "targets": []}
    modes = MODES if available("torchdiffeq") else MODES[:3]
    series = {"RK4": _series((60, 120) if quick else STEPS, 4, MODES[:3] if quick else modes)}
    if not quick:
        series["Dopri5"] = _series(TOLERANCES, 6, modes)
    targets = [
        target(f"exponent of memory over steps, {mode}, {name}", found[mode]["exponent"], limit)
        for name, found in series.items()
        for mode, limit in LIMITS.items()
    ]
    return {"shape": SHAPE, "series": series, "targets": targets}


def table(record: Mapping[str, Any]) -> list[str]:
    """Peaks in MiB, the exponents, and what the plain heap and the clock say of the last size but one, as lines."""
    if "skipped" in record:
        return [f"skipped: {record['skipped']}"]
    lines = []
    for name, by_mode in record["series"].items():
        steps = [run["steps"] for run in by_mode["direct"]["runs"]]
        at = by_mode["direct"]["heap"]["steps"]
        lines.append(f"{name + ', MiB at steps':<21}" + "".join(f"{n:>8}" for n in steps) + f"{'exponent':>10}")
        lines[-1] += f"{f'heap@{at}':>10}{'seconds':>8}"
        for mode, found in by_mode.items():
            peaks = "".join(f"{run['peak']:8.1f}" for run in found["runs"])
            slope = "–" if found["exponent"] is None else f"{found['exponent']:.2f}"
            lines.append(f"{mode:<21}{peaks}{slope:>10}{found['heap']['peak']:10.1f}{found['heap']['seconds']:8.2f}")
        lines.append("gradient's relative difference from the direct one, same steps:")
        lines += [
            f"{mode:<21}" + "".join(f"{run['difference']:8.0e}" for run in found["runs"])
            for mode, found in by_mode.items()
            if mode not in ("direct", "torchdiffeq")
        ]
    return lines


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], float(sys.argv[2]), sys.argv[3])))
