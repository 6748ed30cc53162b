"""The demonstration's page: what was run, what came out, with the pictures beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from flowsolve.bench.record import environment

if TYPE_CHECKING:
    from flowsolve.bench.demo import Demonstration

__all__ = ["write_report"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-weight: 600; } h2 { margin-top: 2.5rem; font-weight: 600; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f6f6f6; } img { max-width: 100%; } .note { color: #666; font-size: .9rem; }
code { background: #f3f3f3; padding: 0 .25rem; }
"""


def write_report(file: Path, found: Sequence[Demonstration]) -> None:
    """Write the page; the pictures are expected beside it."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>flowsolve demo</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style></head><body><h1>flowsolve: two checkpoints, sampled and read</h1>",
        "<p>Two UNets trained on the 1,497 training images of scikit-learn's 8×8 digits: a noise-predicting DDPM with "
        "a discrete table of 1,000 steps, and a velocity model on the straight (CondOT) path. Both are stored as "
        "diffusers directories and loaded by diffusers.</p>",
        "<h2>Bits per dimension of held-out digits</h2>",
        _table(
            ("checkpoint", "parameters", "bits/dim", "standard error", "images", "mean NFE"),
            [_likelihood(d) for d in found],
        ),
        "<p class='note'>Uniform dequantisation of the 17 grey levels, one Rademacher probe an image, along a curve "
        "(<code>solver='auto'</code>). A uniform guess costs log₂ 17 = 4.087 bits/dim.</p>",
        "<h2>NFE against error</h2><img src='nfe-error.png' alt='RMSE against network evaluations'>",
        "<p class='note'>Root mean square distance to the converged solution of the same ODE from the same noise. "
        "DPM-Solver++ and UniPC step evenly in λ, auto brings its own grid, the others step evenly in time. "
        "Dopri5 is adaptive for each sample; its NFE is the mean over samples. The dotted line is the uncertainty of "
        "the reference.</p>",
    ]
    for d in found:
        parts += [
            f"<h2>{escape(d.name)}</h2><p><code>{escape(repr(d.flow))}</code></p>",
            f"<img src='{escape(d.name)}-samples.png' alt='samples of {escape(d.name)}'>",
            _table(
                ("solver", "NFE", "RMSE", "median per-sample error"),
                [
                    (c.name, f"{n:.0f}", f"{r:.2e}", f"{m:.2e}")
                    for c in d.curves
                    for n, r, m in zip(c.nfe, c.rmse, c.median, strict=True)
                ],
            ),
        ]
    machine = ", ".join(f"{k} {v}" for k, v in environment().items())
    parts.append(f"<p class='note'>{escape(machine)}</p></body></html>")
    file.write_text("\n".join(parts), encoding="utf-8")


def _likelihood(d: Demonstration) -> tuple[str, ...]:
    assert d.nll is not None
    nfe = float(d.nll.nfe.double().mean())
    return (d.name, f"{d.parameters:,}", f"{d.nll.mean:.3f}", f"{d.nll.stderr:.3f}", str(len(d.nll.bpd)), f"{nfe:.1f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
