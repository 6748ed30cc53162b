"""Pictures: NFE–error curves and grids of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from flowsolve._optional import require
from flowsolve.bench.curves import Curve

__all__ = ["draw_curves", "draw_grid"]

MARKERS = "os^DvP*X<>hp"


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    figures = require("matplotlib.figure", extra="bench", purpose="drawing")
    figure = figures.Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_curves(file: Path, panels: Mapping[str, tuple[Sequence[Curve], float]]) -> None:
    """RMSE against NFE, log–log, one panel a problem; a dotted line marks what the reference can resolve."""
    figure, axes = _figure(5.2 * len(panels), 4.6, 1, len(panels))
    for ax, (title, (curves, uncertainty)) in zip(axes[0], panels.items(), strict=True):
        for curve, marker in zip(curves, cycle(MARKERS), strict=False):
            dashes = "--" if "adaptive" in curve.name else "-"
            ax.loglog(curve.nfe, curve.rmse, marker=marker, markersize=5, linestyle=dashes, label=curve.name)
        ax.axhline(uncertainty, color="0.6", linestyle=":", linewidth=1)
        ax.set_title(title)
        ax.set_xlabel("network evaluations a sample (NFE)")
        ax.grid(True, which="major", alpha=0.3)
        ticks = [4, 8, 16, 32, 64, 128]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
    axes[0][0].set_ylabel("RMSE to the converged solution")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    figure.savefig(file)


def draw_grid(file: Path, rows: Mapping[str, Tensor]) -> None:
    """Grey images of shape (N, 1, H, W) in [−1, 1], one labelled row an entry."""
    count = max(len(images) for images in rows.values())
    figure, axes = _figure(0.62 * count, 0.82 * len(rows), len(rows), 1)
    for (ax,), (label, images) in zip(axes, rows.items(), strict=True):
        strip = images[:, 0].clamp(-1, 1).cpu()
        padded = strip.new_ones(strip.shape[0], strip.shape[1], strip.shape[2] + 1)
        padded[:, :, :-1] = -strip  # dark ink on white paper
        ax.imshow(padded.permute(1, 0, 2).flatten(1).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(label, fontsize=9, loc="left", pad=2)
        ax.axis("off")
    figure.savefig(file)
