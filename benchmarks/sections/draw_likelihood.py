"""A picture of passes of the network against the error of a likelihood, one panel a problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLUMNS = 3
TICKS = (10, 20, 50, 100, 200, 500, 1000)
STYLES = {
    "curve": ("C1", "o", 2.0),
    "curve, marginal prior": ("C8", "o", 1.5),
    "Dopri5": ("C0", "s", 1.5),
    "RK4, uniform t": ("C2", "^", 1.0),
    "Heun, uniform t": ("C3", "v", 1.0),
    "score_sde protocol, scipy": ("0.1", "x", 1.0),
    "score_sde protocol, torchdiffeq": ("0.4", "+", 1.0),
    "flow_matching, dopri5": ("C4", "D", 1.0),
    "flow_matching, euler": ("C5", "d", 1.0),
    "k-diffusion": ("C6", "*", 1.0),
}


def draw(file: Path, problems: Mapping[str, Any]) -> None:
    """The rms error in bits per dimension of every method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    columns = min(COLUMNS, len(problems)) or 1
    rows = -(-len(problems) // columns) or 1
    figure = Figure(figsize=(4.0 * columns, 3.2 * rows + 0.6), layout="constrained", dpi=110)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for ax, (name, found) in zip(axes, problems.items(), strict=False):
        for method, (colour, marker, width) in STYLES.items():
            points = sorted((r["passes"], r["rms"]) for r in found["rows"] if r["method"] == method and "rms" in r)
            if points:
                (line,) = ax.loglog(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=width, label=method
                )
                handles[method] = line
        ax.set_title(name, fontsize=10)
        ax.set_ylim(1e-6, 10.0)
        ax.grid(True, which="major", alpha=0.3)
        ax.set_xlabel("passes of the network")
        low, high = ax.get_xlim()
        kept = [t for t in TICKS if low <= t <= high]
        ax.set_xticks(kept, [str(t) for t in kept])
        ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes[len(problems) :]:
        ax.axis("off")
    axes[0].set_ylabel("rms error, bits/dim")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file)
