"""The picture of tuned solvers: errors by budget, one panel a network, and below it the number of trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

KINDS = {"peer": ("best peer", "0.25", "s"), "auto": ("auto", "C1", "^"), "ours": ("our best generic", "C0", "o"),
         "tuned": ("tuned", "C3", "D")}  # fmt: skip


def draw(file: Path, networks: Mapping[str, Any]) -> None:
    """One panel a network, and one for the trajectories where they were counted."""
    from matplotlib.figure import Figure

    shown = {name: made for name, made in networks.items() if made.get("rows")}
    counted = {name: made["counts"] for name, made in networks.items() if made.get("counts")}
    panels = len(shown) + bool(counted)
    if not panels:
        return
    figure = Figure(figsize=(3.2 * panels, 3.2), layout="constrained", dpi=120)
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    for ax, (name, made) in zip(axes, shown.items(), strict=False):
        for kind, (label, colour, marker) in KINDS.items():
            known = [(row["budget"], row[kind]["median"]) for row in made["rows"] if kind in row]
            if known:
                ax.semilogy(*zip(*known, strict=True), color=colour, marker=marker, markersize=4, label=label)
        ax.set_title(name, fontsize=10)
        ax.set_xticks([row["budget"] for row in made["rows"]])
        ax.set_xlabel("evaluations")
        ax.grid(True, which="both", alpha=0.25)
    if counted:
        ax = axes[-1]
        for name, rows in counted.items():
            points = [(row["count"], row["median"]) for row in rows]
            ax.loglog(*zip(*points, strict=True), marker="D", markersize=4, label=f"{name}, {rows[0]['budget']}")
        ax.set_title("tuned, by trajectories fitted to", fontsize=10)
        ax.set_xticks([row["count"] for row in rows], [str(row["count"]) for row in rows])
        ax.set_xlabel("trajectories")
        ax.grid(True, which="both", alpha=0.25)
        ax.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("median relative error")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(file)
