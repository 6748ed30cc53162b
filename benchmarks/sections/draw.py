"""Pictures of the sections that are curves: error against evaluations, and memory against steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw_gradients", "draw_nfe"]

SHOWN = ("A3", "B1", "B5", "D1", "D5", "E2")
FAMILIES = {
    "C0": ("Dopri5", "scipy RK45", "torchdiffeq dopri5", "torchode Dopri5"),
    "C1": ("Tsit5", "torchode Tsit5", "diffrax Tsit5"),
    "C2": ("Dopri8", "scipy DOP853", "torchdiffeq dopri8", "diffrax Dopri8"),
}
MARKERS = {"scipy": "s", "torchdiffeq": "^", "torchode": "v", "diffrax": "D"}
STYLES = {
    "direct": ("C0", "o", "-"),
    "checkpoint": ("C1", "o", "-"),
    "adjoint": ("C2", "o", "-"),
    "torchdiffeq": ("C0", "^", ":"),
    "torchdiffeq adjoint": ("C2", "^", ":"),
}


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_nfe(file: Path, record: Mapping[str, Any]) -> None:
    """Error of the end state against evaluations; a colour a method, a marker a library, ours with full lines."""
    from matplotlib.ticker import NullFormatter

    names = [name for name in SHOWN if name in record["curves"]]
    figure, axes = _axes(-(-len(names) // 3), min(3, len(names)), 4.0, 3.4)
    for ax, name in zip(axes.flat, names, strict=False):
        for colour, family in FAMILIES.items():
            for solver in [solver for solver in family if record["curves"][name].get(solver)]:
                error, calls = zip(*record["curves"][name][solver], strict=True)
                marker = MARKERS.get(solver.split()[0], "o")
                style = {"linestyle": "-", "linewidth": 1.8} if marker == "o" else {"linestyle": ":", "linewidth": 0.8}
                ax.loglog(calls, error, color=colour, marker=marker, markersize=3, label=solver, **style)
        ax.set_title(name)
        ax.grid(True, which="major", alpha=0.3)
        ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes[-1]:
        ax.set_xlabel("evaluations")
    for row in axes:
        row[0].set_ylabel("error at the end")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file)


def draw_gradients(file: Path, record: Mapping[str, Any]) -> None:
    """Peak memory of a gradient against steps, one panel a method, with the fitted exponents."""
    series = record["series"]
    figure, axes = _axes(1, len(series), 4.6, 3.8)
    for ax, (title, by_mode) in zip(axes[0], series.items(), strict=True):
        for mode, found in by_mode.items():
            colour, marker, line = STYLES[mode]
            exponent = "" if found["exponent"] is None else f", steps^{found['exponent']:.2f}"
            steps = [run["steps"] for run in found["runs"]]
            peaks = [run["peak"] for run in found["runs"]]
            ax.loglog(steps, peaks, color=colour, marker=marker, linestyle=line, markersize=4, label=mode + exponent)
        ax.set_title(title)
        ax.set_xlabel("steps")
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("peak memory, MiB")
    figure.savefig(file)
