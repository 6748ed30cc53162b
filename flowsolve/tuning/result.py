"""What tuning found, and its file: `Tuning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path as File
from typing import Any

from flowsolve._optional import require
from flowsolve.solvers.fitted import Fitted, Tuned, content, entry, load, sealed

__all__ = ["Row", "Tuning"]


@dataclass(frozen=True)
class Row:
    """A budget: how far from the converged samples the solvers end, on noise that nothing was fitted to or chosen on.

    Attributes:
        nfe: network evaluations of a sample.
        auto: the geometric mean of the relative errors of `solver="auto"`.
        generic: that of the best generic solver, chosen on other noise.
        tuned: that of the tuned one.
        ratio: tuned over generic.
        spread: the standard error of log(ratio), from sample to sample.
        median: the medians of generic and tuned.
        name: the generic solver in words.
        kept: "tuned", or "generic" where nothing better was found on validation.
        samples: held-out samples.
    """

    nfe: int
    auto: float
    generic: float
    tuned: float
    ratio: float
    spread: float
    median: tuple[float, float]
    name: str
    kept: str
    samples: int


@dataclass(frozen=True)
class Tuning:
    """Solvers fitted to one checkpoint.

    Attributes:
        solver: for `fs.sample(flow, shape, solver=tuning.solver, nfe=…)`.
        rows: the held-out figures, one row a budget.
        marks: what the checkpoint is known by.
        provenance: how it was made: versions, seeds, numbers of trajectories, seconds.
    """

    solver: Tuned
    rows: tuple[Row, ...]
    marks: Mapping[str, str]
    provenance: Mapping[str, Any]

    def save(self, file: str | PathLike[str]) -> None:
        """Write the JSON file that `fs.solvers.load` reads."""
        import json

        told = sealed({
            "fingerprint": dict(self.marks), "provenance": dict(self.provenance),
            "solvers": [{**entry(fit), "held_out": asdict(row)} for fit, row in zip(self.fits, self.rows, strict=True)],
        })  # fmt: skip
        place = File(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f"{place.name}.part")
        beside.write_text(json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(place)

    @classmethod
    def load(cls, file: str | PathLike[str]) -> Tuning:
        """Read it again, figures and all.

        Raises:
            ValueError: another kind of file, or one that was changed.
        """
        told = content(file)
        rows = [{**e["held_out"], "median": tuple(e["held_out"]["median"])} for e in told["solvers"]]
        return cls(load(file), tuple(Row(**row) for row in rows), told["fingerprint"], told["provenance"])

    @property
    def fits(self) -> tuple[Fitted, ...]:
        """The solvers, one a budget."""
        return self.solver.fits

    def __str__(self) -> str:
        lines = [f"{'NFE':>4} {'auto':>9} {'generic':>9} {'tuned':>9}   tuned/generic     best generic"]
        for row in self.rows:
            low, high = (row.ratio * 2.718281828459045 ** (s * row.spread) for s in (-2.0, 2.0))
            lines.append(
                f"{row.nfe:4d} {row.auto:9.2e} {row.generic:9.2e} {row.tuned:9.2e}   {row.ratio:.2f} ({low:.2f}–"
                f"{high:.2f})  {row.name if row.kept == 'tuned' else 'kept: ' + row.name}"
            )
        return "\n".join(lines)

    def plot(self, file: str | PathLike[str], more: Mapping[str, Sequence[float]] | None = None) -> None:
        """Draw the errors of auto, the best generic and the tuned solver against evaluations (needs matplotlib).

        Args:
            file: the picture.
            more: of others, a number a row, by name.
        """
        figure = require("matplotlib.figure", "runs", "a plot of tuned solvers").Figure(
            figsize=(5.2, 3.6), layout="constrained", dpi=130
        )
        ax, nfe = figure.subplots(), [row.nfe for row in self.rows]
        curves = {k: [getattr(row, k) for row in self.rows] for k in ("auto", "generic", "tuned")}
        curves |= {k: list(v) for k, v in (more or {}).items()}
        for i, (name, values) in enumerate(curves.items()):
            marker = "^sox"[min(i, 3)]
            ax.semilogy(nfe, values, marker=marker, markersize=4, label=name)
        ax.set_xticks(nfe)
        ax.set_xlabel("evaluations")
        ax.set_ylabel("relative error on held-out noise")
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
        figure.savefig(str(file))

    def merged(self, other: Tuning) -> Tuning:
        """With the budgets of another tuning of the same checkpoint, which has precedence.

        Raises:
            ValueError: another checkpoint.
        """
        if dict(self.marks) != dict(other.marks):
            raise ValueError("the two tunings are of different checkpoints; keep them in files of their own")
        both = {row.nfe: (fit, row) for t in (self, other) for fit, row in zip(t.fits, t.rows, strict=True)}
        pairs = [both[n] for n in sorted(both)]
        solver = replace(other.solver, fits=tuple(fit for fit, _ in pairs))
        return replace(other, solver=solver, rows=tuple(row for _, row in pairs))
