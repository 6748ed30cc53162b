"""The end of a likelihood run: one table, its mean, and a picture of the best and the worst."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from flowsolve._optional import require
from flowsolve.runs.data import Data
from flowsolve.runs.files import replacing, write_json
from flowsolve.runs.parts import Parts, named
from flowsolve.runs.settings import versions

__all__ = ["merge", "needed", "report", "summary"]

EXTREMES = 10
"""Images that are named and shown at either end."""


def report(
    parts: Parts,
    out: Path,
    settings: Mapping[str, Any],
    source: Data,
    machine: Mapping[str, Any],
    *,
    columns: Mapping[str, str],
    plot: bool,
    parquet: bool,
) -> dict[str, Any]:
    """Write results.sqlite, report.json and report.png (and results.parquet) of a finished run.

    Returns:
        What report.json holds.
    """
    merge(parts, out / "results.sqlite", columns)
    if parquet:
        _parquet(parts, out / "results.parquet", columns)
    found = {"task": "nll", **summary(parts), "settings": settings, "versions": versions(), "environment": machine}
    found["seconds"] = round(parts.seconds, 3)
    if plot:
        _draw(out / "report.png", parts, found, source)
    write_json(out / "report.json", found)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def needed(plot: bool, parquet: bool) -> None:
    """Raise ImportError unless the packages that the report will need are there."""
    if plot:
        require("matplotlib.figure", "runs", "the picture of a report")
    if parquet:
        require("pyarrow.parquet", "runs", "a Parquet table")


def merge(parts: Parts, file: Path, columns: Mapping[str, str]) -> None:
    """All items as one table `items`, in order of their numbers."""

    def write(beside: Path) -> None:
        with named(file, file.parent), closing(sqlite3.connect(beside)) as db:
            kept = ", ".join(f"{name} {kind}" for name, kind in columns.items())
            db.execute(f"CREATE TABLE items (idx INTEGER PRIMARY KEY, {kept})")
            db.executemany(f"INSERT INTO items VALUES (?{', ?' * len(columns)})", parts.rows())
            db.commit()

    replacing(file, write)


def summary(parts: Parts) -> dict[str, Any]:
    """Mean and spread of the bits/dim, evaluations, the extremes, and what failed."""
    rows = list(parts.rows("idx, name, bpd, nfe, status, error, probe_stderr, draw_stderr, solver_error"))
    good = [row for row in rows if row[2] is not None]
    values = [row[2] for row in good]
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan
    cost = [row[3] for row in good]
    solver = [row[8] for row in good if row[8] is not None]
    ranked = sorted(good, key=lambda row: (row[2], row[0]))
    return {
        "mean": mean,
        "stderr": spread,
        "mean_probe_stderr": _together([row[6] for row in good]),
        "mean_draw_stderr": _together([row[7] for row in good]),
        "mean_abs_solver_error": math.fsum(map(abs, solver)) / len(solver) if solver else None,
        "median": median(values) if n else math.nan,
        "images": n,
        "nfe": {
            "mean": sum(cost) / n if n else math.nan,
            "min": min(cost, default=None),
            "max": max(cost, default=None),
            "total": sum(cost),
        },
        "best": [_entry(row) for row in ranked[:EXTREMES]],
        "worst": [_entry(row) for row in ranked[::-1][:EXTREMES]],
        "left_out": [
            {"idx": row[0], "name": row[1], "status": row[4], "error": row[5]} for row in rows if row[2] is None
        ],
    }


def _together(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean from those of its terms, if all are known."""
    known = [e for e in errors if e is not None]
    return math.sqrt(math.fsum(e * e for e in known)) / len(known) if known and len(known) == len(errors) else None


def _entry(row: Sequence[Any]) -> dict[str, Any]:
    return {"idx": row[0], "name": row[1], "bpd": row[2]}


def _parquet(parts: Parts, file: Path, columns: Mapping[str, str]) -> None:
    arrow = require("pyarrow", "runs", "a Parquet table")
    tables = require("pyarrow.parquet", "runs", "a Parquet table")
    kinds = {"TEXT": arrow.string(), "REAL": arrow.float64(), "INTEGER": arrow.int64()}
    schema = arrow.schema([("idx", arrow.int64()), *((name, kinds[kind]) for name, kind in columns.items())])
    rows = list(parts.rows())
    arrays = [[row[i] for row in rows] for i in range(len(schema.names))]
    replacing(file, lambda beside: tables.write_table(arrow.table(arrays, schema=schema), beside))


def _draw(file: Path, parts: Parts, found: Mapping[str, Any], source: Data) -> None:
    """The distribution of the bits/dim; beside it, where the data can be read again, the best and worst images."""
    figures = require("matplotlib.figure", "runs", "the picture of a report")
    values = [row[0] for row in parts.rows("bpd") if row[0] is not None]
    figure = figures.Figure(figsize=(9, 5.4) if source.indexed else (9, 3), layout="constrained", dpi=110)
    panels = figure.subfigures(2, 1, height_ratios=[3, 2.4]) if source.indexed else [figure]
    ax = panels[0].subplots()
    ax.hist(values, bins=max(8, min(80, round(math.sqrt(len(values)) * 2))), color="0.35")
    ax.set_xlabel("bits/dim")
    ax.set_ylabel("images")
    ax.spines[["top", "right"]].set_visible(False)
    error = found["mean_abs_solver_error"]
    own = "" if error is None else f", solver {error:.4f}"
    if values:
        ax.axvline(found["mean"], color="tab:red", linewidth=1.5)
        ax.set_title(
            f"{found['mean']:.4f} ± {found['stderr']:.4f} bits/dim, {found['images']:,} images, "
            f"NFE {found['nfe']['mean']:.4g}{own}",
            fontsize=11,
        )
    if source.indexed and values:
        axes = panels[1].subplots(2, EXTREMES, squeeze=False)
        for row, kind in zip(axes, ("best", "worst"), strict=True):
            for ax in row:
                ax.axis("off")
            for ax, entry in zip(row, found[kind], strict=False):
                image = source.read(entry["idx"])
                if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3):
                    shown = image.permute(1, 2, 0).double() / (found["settings"]["levels"] - 1)
                    ax.imshow(shown.squeeze(-1).numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
                ax.set_title(f"{entry['bpd']:.2f}", fontsize=8, pad=2)
            row[0].text(-0.15, 0.5, kind, transform=row[0].transAxes, ha="right", va="center", fontsize=10)
    replacing(file, lambda beside: figure.savefig(beside))
