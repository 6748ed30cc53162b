"""The picture of the judging half: `auto`, our best and the best peer in hindsight, a panel a problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sections.draw_nfe import KINDS, axes_of, ticks

__all__ = ["draw"]


def draw(file: Path, problems: Mapping[str, Any]) -> None:
    """Errors against evaluations."""
    figure, axes = axes_of(len(problems), 2.9, 2.5)
    labelled: dict[str, Any] = {}
    for ax, (name, rows) in zip(axes, problems.items(), strict=False):
        for kind, (label, colour, marker) in KINDS.items():
            known = [(row["budget"], row[kind]["median"]) for row in rows if kind in row]
            if known:
                (line,) = ax.loglog(*zip(*known, strict=True), color=colour, marker=marker, markersize=3, label=label)
                labelled[label] = line
        ax.set_title(name, fontsize=9)
        ticks(ax)
    axes[0].set_ylabel("median relative error")
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file)
