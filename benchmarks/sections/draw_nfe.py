"""Pictures of evaluations against error: the curves of each problem, and ours over the best peer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["axes_of", "draw_errors", "draw_ratios", "ticks"]

COLUMNS = 4
TICKS = (5, 10, 20, 50, 100)
KINDS = {"peer": ("best peer", "0.25", "s"), "ours": ("ours, best", "C0", "o"), "auto": ("ours, auto", "C1", "^")}


def axes_of(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of so many panels, with the axes of each."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained", dpi=120)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.axis("off")
    return figure, axes


def ticks(ax: Any) -> None:
    """Budgets along the axis, and a grid."""
    from matplotlib.ticker import NullFormatter

    low, high = ax.get_xlim()
    kept = [t for t in TICKS if low <= t <= high]
    ax.set_xticks(kept, [str(t) for t in kept])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major", alpha=0.3)
    ax.set_xlabel("evaluations")


def draw_errors(file: Path, problems: Mapping[str, Any]) -> None:
    """Median error of every peer pair (grey) and of the best of each kind, one panel a problem."""
    figure, axes = axes_of(len(problems), 3.4, 3.0)
    for ax, (name, found) in zip(axes, problems.items(), strict=False):
        pairs: dict[str, list[tuple[int, float]]] = {}
        for run in found["runs"]["peer"]:
            if "median" in run:
                pairs.setdefault(run["solver"], []).append((run["nfe"], run["median"]))
        for points in pairs.values():
            ax.loglog(*zip(*points, strict=True), color="0.8", linewidth=0.6, zorder=1)
        for kind, (label, colour, marker) in KINDS.items():
            known = [(row["budget"], row[kind]["median"]) for row in found["rows"] if row[kind]]
            if known:
                ax.loglog(*zip(*known, strict=True), color=colour, marker=marker, markersize=3.5, label=label)
        ax.set_ylim(top=2.0)
        ax.set_title(name, fontsize=10)
        ticks(ax)
    axes[0].set_ylabel("median relative error")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(file)


def draw_ratios(file: Path, problems: Mapping[str, Any], judged: Sequence[int], near: float) -> None:
    """Our error over the best peer's: the best of ours, and `auto`; below 1 is ahead."""
    from matplotlib.ticker import NullFormatter

    figure, axes = axes_of(2, 5.6, 4.0)
    for ax, kind, title, limit in zip(axes, ("ours", "auto"), ("our best", "auto"), (1.0, near), strict=True):
        for name, found in problems.items():
            key = f"{kind} / peer"
            known = [(row["budget"], row[key]) for row in found["rows"] if row[key] is not None]
            if known:
                style = {"linestyle": "-" if "mixture" in name else "--", "markersize": 3.5, "marker": "o"}
                ax.loglog(*zip(*known, strict=True), label=name, **style)
        ax.axhline(limit, color="0.3", linewidth=1, linestyle=":")
        ax.axvspan(*judged, color="0.95", zorder=0)
        ax.set_title(f"{title} / best peer (dotted: the target, {limit:g})", fontsize=10)
        levels = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
        ax.set_yticks(levels, [f"{v:g}" for v in levels])
        ax.yaxis.set_minor_formatter(NullFormatter())
        ticks(ax)
    axes[0].set_ylabel("ratio of median errors")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file)
