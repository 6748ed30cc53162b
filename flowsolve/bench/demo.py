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

ROWS: list[tuple[str, Solver, int | None]] = [
    ("Euler (DDIM), 5 evaluations", solvers.DDIM(), 5),
    ("Euler (DDIM), 10 evaluations", solvers.DDIM(), 10),
    ("Heun, 20 evaluations", solvers.Heun(), 20),
    ("RK4, 40 evaluations", solvers.RK4(), 40),
    ("Dopri5, tolerance 1e-4", solvers.Dopri5(rtol=1e-4, atol=1e-4), None),
    ("DDPM (SDE), 100 evaluations", solvers.DDPM(), 100),
]
FIXED: dict[str, Solver] = {
    "Euler (DDIM)": solvers.Euler(),
    "Midpoint": solvers.Midpoint(),
    "Heun": solvers.Heun(),
    "RK4": solvers.RK4(),
}
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
                "solver": "Dopri5(rtol=1e-4, atol=1e-4)",
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
            demo.curves = nfe_error_curves(flow, target, FIXED, BUDGETS, ADAPTIVE, TOLERANCES, seed=seed)
        say(f"{name}: bits/dim of {len(held_out)} held-out digits")
        with _timed(demo, "likelihood"):
            solver = solvers.Dopri5(rtol=1e-4, atol=1e-4)
            demo.nll = bits_per_dim(flow, held_out, levels=digits.LEVELS, solver=solver, seed=seed)
        found.append(demo)
    draw_curves(out / "nfe-error.png", {d.name: (d.curves, d.uncertainty) for d in found})
    record = {"environment": environment(), "seed": seed, "samples": samples, "results": [d.record() for d in found]}
    (out / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_report(out / "report.html", found)
    return found


def _rows(flow: Flow, seed: int) -> dict[str, Tensor]:
    shape = (SHOWN, *SHAPE)
    rows = {label: sample(flow, shape, solver=solver, nfe=nfe, seed=seed).x for label, solver, nfe in ROWS}
    return {"training digits": digits.dequantize(digits.load("train").images[:SHOWN]), **rows}


@contextmanager
def _timed(demo: Demonstration, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    demo.seconds[what] = time.perf_counter() - start
