"""`flowsolve sample`: images from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowsolve.cli._conditions import conditions, guided, hinted, prompted
from flowsolve.cli._running import Declare, Format, TrustPickle, command, evaluations, one_line, opened
from flowsolve.cli._terminal import say


def sample(
    source: Annotated[str, typer.Argument(help="Checkpoint, or digits-condot or digits-ddpm.")],
    out: Annotated[Path, typer.Option(help="Directory of the run: of its images, grid, arrays and metadata.")],
    solver: Annotated[str, typer.Option(help="Solver and its options, as in unipc:order=3.")] = "auto",
    nfe: Annotated[int | None, typer.Option(min=1, help="Evaluations a sample; the most with adaptive.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
    grid: Annotated[str | None, typer.Option(help="Spacing and its options, or flow times as in 0,0.5,1.")] = None,
    chart: Annotated[str | None, typer.Option(help="Chart, for Runge–Kutta solvers.")] = None,
    final: Annotated[str, typer.Option(help="Last step: path, sigma_min, denoise or tweedie.")] = "path",
    shape: Annotated[
        str | None, typer.Option(help="Shape of a sample, as in 3,32,32; by default the network's.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--class", help="Class label of the samples, or several in turn, as in 0,1,2.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What the directory's pipeline is to draw; several in turn if repeated.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from; by default the empty text.")
    ] = None,
    cond: Annotated[
        str | None, typer.Option(help="The network's keyword arguments: .npz; arrays with N rows have one a sample.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale, with --prompt, or --class and --null-class.")
    ] = None,
    null_class: Annotated[int | None, typer.Option(help="The label that stands for no class.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch: what a kill can cost.")] = 64,
    init: Annotated[
        str | None, typer.Option(help="Image (or folder, .npy, .npz) to start from; needs --strength.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --init: share of noise to start with, σ/(α+σ) in (0, 1].")
    ] = None,
    invert: Annotated[
        str | None, typer.Option(help="Carry this image (or folder, …) to the noise and back instead.")
    ] = None,
    raw: Annotated[bool, typer.Option(help="Keep the numbers beside the pixels.")] = False,
    png: Annotated[bool, typer.Option(help="Write a PNG file for each image.")] = True,
    format: Format = None,
    declare: Declare = None,
    trust_pickle: TrustPickle = False,
    device: Annotated[str | None, typer.Option(help="Device; by default CUDA where there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch, in each process.")] = 1,
    capture: Annotated[
        bool, typer.Option("--capture", help="On CUDA: record the solve as a graph, and replay it.")
    ] = False,
    on_error: Annotated[str, typer.Option(help="A sample that fails: stop, or skip it.")] = "stop",
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, if there is one.")] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Draw samples; stopped at any point, the same command goes on. torchrun shares it."""
    given = {k: v for k, v in locals().items() if k not in ("source", "out", "progress", "resume")}
    given["class"] = given.pop("classes")
    with one_line("sample", out), hinted(any(v is not None for v in (classes, cond, prompt))):
        from flowsolve.grids.names import grid as grid_of
        from flowsolve.runs import invert as carry
        from flowsolve.runs import sample as draw
        from flowsolve.solvers.names import solver as solver_of

        method = solver_of(solver)
        options: dict[str, Any] = {"nfe": nfe, "chart": chart, "grid": None if grid is None else grid_of(grid)}
        event = None if shape is None else _numbers(shape)
        flow, place = opened(source, device, format, declare, trust_pickle)
        conditioned = conditions(n, classes, cond)
        if prompt:
            if conditioned or null_class is not None:
                raise ValueError("--prompt goes without --class, --null-class and --cond; give one kind")
            flow, conditioned, event = prompted(source, prompt, negative_prompt, guidance, event, n, flow)
        elif negative_prompt is not None:
            raise ValueError("--negative-prompt goes with --prompt and --guidance")
        else:
            flow = guided(flow, guidance, null_class, conditioned)
        if conditioned:
            options["cond"] = conditioned
        notes = {"command": command("sample", (source,), given)}
        if invert is not None:
            if init is not None:
                raise ValueError("--invert and --init do two different things; give one")
            found = carry(flow, invert, out, solver=method, batch=batch, device=place, notes=notes, **options)
            say(*str(found).splitlines(), f"{out}: latent.npz, round_trip.png, metadata.json")
            return
        record = draw(
            flow, n, out, solver=method, seed=seed, shape=event, batch=batch, init=init, strength=strength, raw=raw,
            png=png, device=place, cpu_threads=threads, on_error=on_error, resume=resume, progress=progress,
            notes=notes, final=final, **({"capture": True} if capture else {}), **options,
        )  # fmt: skip
    if record is None:
        return
    if record["nfe"]:
        say(f"{record['samples']:,} samples, NFE {evaluations(record['nfe'])}")
    if missing := record["left_out"]:
        say(f"left out  {len(missing)} (metadata.json says why), the first sample {missing[0]['idx']}")
    if record["codes"] is not None:
        say(f"no pictures: the flow models codes, {record['codes']}; samples.npz holds them as x")
    files = [name for name in ("grid.png", "images/", "samples.npz", "metadata.json") if (out / name).exists()]
    say(f"{out}: {', '.join(files)}")


def _numbers(shape: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in shape.split(","))
    except ValueError:
        raise ValueError(f"--shape {shape!r}; expected whole numbers between commas, as in 3,32,32") from None
