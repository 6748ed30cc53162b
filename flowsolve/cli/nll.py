"""`flowsolve nll`: bits/dim of a data set, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowsolve.cli._running import Declare, Format, TrustPickle, command, evaluations, one_line, opened
from flowsolve.cli._terminal import say


def nll(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, or digits-condot or digits-ddpm.")],
    data: Annotated[
        str, typer.Argument(help="Folder of PNG or JPEG files, .npy, .npz, .npz:KEY, or digits[:train|:held_out].")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run: of its results, report and picture.")],
    solver: Annotated[str, typer.Option(help="Solver and its options, as in dopri5:rtol=1e-4,atol=1e-4.")] = "auto",
    nfe: Annotated[
        int | None, typer.Option(min=1, help="Evaluations an image, 48 with auto; the most with adaptive.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Spacing and its options, or flow times as in 1,0.5,0.")] = None,
    chart: Annotated[str | None, typer.Option(help="Chart, for Runge–Kutta solvers.")] = None,
    trace: Annotated[str, typer.Option(help="Trace estimator: hutchinson, hutch++, xtrace or exact.")] = "hutchinson",
    probes: Annotated[
        int | None, typer.Option(min=1, help="Products with the Jacobian an evaluation; two tell their error.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=0, help="With auto: how many of --nfe are second looks.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="With an adaptive solver: absolute tolerance of log p, in nats.")
    ] = None,
    prior: Annotated[str | None, typer.Option(help="Density at the noise end: normal or marginal.")] = None,
    dequantize: Annotated[str, typer.Option(help="Dequantisation: uniform or truncated_normal.")] = "uniform",
    bits: Annotated[
        int | None, typer.Option(min=1, help="Bit depth; by default as the flow or the data say, else 8.")
    ] = None,
    levels: Annotated[int | None, typer.Option(min=2, help="Number of levels instead.")] = None,
    importance: Annotated[int, typer.Option(min=1, help="Draws of the importance-weighted bound.")] = 1,
    draws: Annotated[int, typer.Option(min=1, help="Bounds that are averaged; two tell their error.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of dequantisation and probes.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch: what a kill can cost.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many images only.")] = None,
    layout: Annotated[str, typer.Option(help="Axes of arrays: auto, nchw or nhwc.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Device; by default CUDA where there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch, in each process.")] = 1,
    capture: Annotated[
        bool, typer.Option("--capture", help="On CUDA: record the solve as a graph, and replay it.")
    ] = False,
    on_error: Annotated[str, typer.Option(help="An image that cannot be used: stop, or skip it.")] = "stop",
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, if there is one.")] = True,
    format: Format = None,
    declare: Declare = None,
    trust_pickle: TrustPickle = False,
    plot: Annotated[bool, typer.Option(help="Draw report.png.")] = True,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write results.parquet too.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Bits/dim of a data set; stopped at any point, the same command goes on. torchrun shares it."""
    unsaid = ("checkpoint", "data", "out", "progress", "resume", "plot", "parquet")
    given = {k: v for k, v in locals().items() if k not in unsaid}
    with one_line("nll", out):
        from flowsolve.grids.names import grid as grid_of
        from flowsolve.runs import nll as run
        from flowsolve.solvers.names import solver as solver_of

        method: Any = solver if solver == "auto" else solver_of(solver)
        options: dict[str, Any] = {
            "trace": trace, "probes": probes, "nfe": nfe, "chart": chart, "repeats": repeats, "tolerance": tolerance,
            "prior": prior, "draws": draws, "grid": None if grid is None else grid_of(grid),
            **({"capture": True} if capture else {}),
        }  # fmt: skip
        flow, place = opened(checkpoint, device, format, declare, trust_pickle)
        report = run(
            flow, data, out, solver=method, batch=batch, limit=limit, layout=layout, bits=bits, levels=levels,
            dequantize=dequantize, importance=importance, seed=seed, device=place, cpu_threads=threads,
            on_error=on_error, resume=resume, progress=progress, plot=plot, parquet=parquet,
            notes={"command": command("nll", (checkpoint, data), given)}, **options,
        )  # fmt: skip
    if report is not None:
        _tell(report, out)


def _tell(report: dict[str, Any], out: Path) -> None:
    """The report in a few lines of at most 80 columns."""
    if not report["images"]:
        say("no image could be used")
    else:
        error = "" if report["stderr"] is None else f" ± {report['stderr']:.4f}"
        best, worst = report["best"][0], report["worst"][0]
        say(f"bits/dim  {report['mean']:.4f}{error}  ({report['images']:,} images)")
        say(f"NFE       {evaluations(report['nfe'])}")
        if report["mean_abs_solver_error"] is not None:
            say(f"solver    {report['mean_abs_solver_error']:.4f} bits/dim, its error by its own estimate")
        say(f"best      {best['bpd']:.4f}  {best['name']}")
        say(f"worst     {worst['bpd']:.4f}  {worst['name']}")
    if missing := report["left_out"]:
        say(f"left out  {len(missing)} (report.json says why), the first {missing[0]['name']}")
    files = [f for f in ("results.sqlite", "results.parquet", "report.json", "report.png") if (out / f).exists()]
    say(f"{out}: {', '.join(files)}")
