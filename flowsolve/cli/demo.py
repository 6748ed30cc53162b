"""`flowsolve demo`: the bundled checkpoints sampled, measured and read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from flowsolve._optional import require

typer: Any = require("typer", "cli", "the command line")

AT = (8, 16, 32)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for report.html, the pictures and demo.json.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=2, max=300, help="Held-out images to read bits/dim of.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Samples behind each point of the NFE–error curves.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
) -> None:
    """Sample two bundled checkpoints, draw their NFE–error curves and read their likelihood."""
    table_module = require("rich.table", "cli", "the command line")
    console = require("rich.console", "cli", "the command line").Console()
    from flowsolve.bench.demo import demonstrate

    with console.status("loading") as status:
        found = demonstrate(out, images=images, samples=samples, seed=seed, say=status.update)
    table = table_module.Table(title="Two UNets on 8×8 digits")
    for column in ("checkpoint", "bits/dim held out", "its NFE"):
        table.add_column(column)
    for d in found:
        assert d.nll is not None
        bits = f"{d.nll.mean:.3f} ± {d.nll.stderr:.3f}"
        table.add_row(d.name, bits, f"{float(d.nll.nfe.double().mean()):.0f}")
    console.print(table)
    table = table_module.Table(title=f"RMSE of samples at {', '.join(map(str, AT))} evaluations")
    for column in ("solver", *(d.name for d in found)):
        table.add_column(column)
    for curves in zip(*(d.curves for d in found), strict=True):
        errors = [dict(zip(c.nfe, c.rmse, strict=True)) for c in curves]
        if all(n in e for n in AT for e in errors):  # not those that choose what they cost
            table.add_row(curves[0].name, *("  ".join(f"{e[n]:.4f}" for n in AT) for e in errors))
    console.print(table)
    seconds = sum(sum(d.seconds.values()) for d in found)
    console.print(f"{seconds:.0f} s. Open {out / 'report.html'}", soft_wrap=True)
