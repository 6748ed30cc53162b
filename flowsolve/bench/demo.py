"""The demonstration: the bundled checkpoints sampled, measured and read, with pictures, a page and a record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowsolve import adapters, solvers
from flowsolve.bench.curves import Curve, nfe_error_curves, reference
from flowsolve.bench.plots import draw_curves, draw_grid
from flowsolve.bench.record import environment
from flowsolve.bench.report import write_report
from flowsolve.flow import Flow
from flowsolve.integrate import sample
from flowsolve.likelihood import BitsPerDim, bits_per_dim
from flowsolve.problems import digits
from flowsolve.solvers import Solver

__all__ = ["Demonstration", "demonstrate"]

SHAPE = (1, 8, 8)
SHOWN = 12
"""Samples in a row of the picture."""

LAMBDA = "log_snr"
"""The grid that the papers of the multistep solvers give them."""

ROWS: list[tuple[str, Any, int | None, str | None]] = [
    ("Euler (DDIM), 5 evaluations", solvers.DDIM(), 5, None),
    ("Euler (DDIM), 10 evaluations", solvers.DDIM(), 10, None),
    ("DPM-Solver++, 10 evaluations", solvers.DPMSolverPP(2), 10, LAMBDA),
    ("UniPC, 10 evaluations", solvers.UniPC(), 10, LAMBDA),
    ("auto, 10 evaluations", "auto", 10, None),
    ("Heun, 20 evaluations", solvers.Heun(), 20, None),
    ("RK4, 40 evaluations", solvers.RK4(), 40, None),
    ("Dopri5, tolerance 1e-4", solvers.Dopri5(rtol=1e-4, atol=1e-4), None, None),
    ("DDPM (SDE), 100 evaluations", solvers.DDPM(), 100, None),
]
FIXED: dict[str | None, dict[str, Any]] = {
    "uniform": {
        "Euler (DDIM)": solvers.Euler(),
        "Midpoint": solvers.Midpoint(),
        "Heun": solvers.Heun(),
        "RK4": solvers.RK4(),
    },
    LAMBDA: {"DPM-Solver++": solvers.DPMSolverPP(2), "UniPC": solvers.UniPC()},
    None: {"auto": solvers.Auto()},
}
"""Grid → solvers by name; auto brings its own grid."""
ADAPTIVE: dict[str, Callable[[float], Solver]] = {
    "Dopri5, adaptive": lambda tolerance: solvers.Dopri5(rtol=tolerance, atol=tolerance)
}
BUDGETS = (4, 8, 16, 32, 64)
TOLERANCES = (1e-2, 1e-3, 1e-4)


@dataclass
class Demonstration:
    """What was found for one checkpoint."""

    name: str
    flow: Flow
    parameters: int
    curves: list[Curve] = field(default_factory=list)
    uncertainty: float = 0.0
    nll: BitsPerDim | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The findings as plain values."""
        assert self.nll is not None
        return {
            "checkpoint": self.name,
            "flow": repr(self.flow),
            "parameters": self.parameters,
            "curves": [c.record() for c in self.curves],
            "reference_uncertainty": self.uncertainty,
            "bits_per_dim": {
                "mean": self.nll.mean,
                "stderr": self.nll.stderr,
                "images": len(self.nll.bpd),
                "mean_nfe": float(self.nll.nfe.double().mean()),
                "solver": "auto",
                "trace": "hutchinson",
                "dequantize": "uniform",
            },
            "seconds": self.seconds,
        }


def demonstrate(
    out: Path, *, images: int = 100, samples: int = 32, seed: int = 0, say: Callable[[str], Any] = print
) -> list[Demonstration]:
    """Sample both bundled checkpoints, draw their NFE–error curves and read bits/dim of held-out digits.

    Args:
        out: directory for report.html, PNG pictures and demo.json; created if missing.
        images: held-out images to read (at most 300).
        samples: samples behind each point of the curves.
        seed: seed of all noise.
        say: told, in a line, what is being done.

    Returns:
        One `Demonstration` a checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    held_out = digits.load("held_out").images[:images]
    found = []
    for name in adapters.BUNDLED:
        flow = adapters.load(adapters.bundled(name))
        assert isinstance(flow.net, nn.Module)
        demo = Demonstration(name, flow, sum(p.numel() for p in flow.net.parameters()))
        say(f"{name}: sampling")
        with _timed(demo, "sampling"):
            draw_grid(out / f"{name}-samples.png", _rows(flow, seed))
        say(f"{name}: NFE against error")
        with _timed(demo, "curves"):
            target = reference(flow, (samples, *SHAPE), seed=seed)
            demo.uncertainty = target.uncertainty
            for grid, fixed in FIXED.items():
                demo.curves += nfe_error_curves(flow, target, fixed, BUDGETS, {}, (), seed=seed, grid=grid)
            demo.curves += nfe_error_curves(flow, target, {}, (), ADAPTIVE, TOLERANCES, seed=seed)
        say(f"{name}: bits/dim of {len(held_out)} held-out digits")
        with _timed(demo, "likelihood"):
            demo.nll = bits_per_dim(flow, held_out, levels=digits.LEVELS, seed=seed)
        found.append(demo)
    draw_curves(out / "nfe-error.png", {d.name: (d.curves, d.uncertainty) for d in found})
    record = {"environment": environment(), "seed": seed, "samples": samples, "results": [d.record() for d in found]}
    (out / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_report(out / "report.html", found)
    return found


def _rows(flow: Flow, seed: int) -> dict[str, Tensor]:
    shape = (SHOWN, *SHAPE)
    rows = {
        label: sample(flow, shape, solver=solver, nfe=nfe, grid=grid, seed=seed).x for label, solver, nfe, grid in ROWS
    }
    return {"training digits": digits.dequantize(digits.load("train").images[:SHOWN]), **rows}


@contextmanager
def _timed(demo: Demonstration, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    demo.seconds[what] = time.perf_counter() - start
