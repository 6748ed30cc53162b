"""`flowsolve tune`: solvers fitted to one checkpoint, for few evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowsolve.cli._conditions import conditions, guided, hinted
from flowsolve.cli._running import Declare, Format, TrustPickle, command, one_line, opened
from flowsolve.cli._terminal import say

SHOWN, HELD_OUT = 8, 2**31 - 1
"""Samples of the sheet, and their seed."""


def tune(
    source: Annotated[str, typer.Argument(help="Checkpoint, or digits-condot or digits-ddpm.")],
    out: Annotated[
        Path | None, typer.Option(help="The JSON file to write, or to add to; by default CHECKPOINT.tuned.json here.")
    ] = None,
    nfe: Annotated[
        list[int] | None, typer.Option(min=2, help="Evaluations a sample, 4 6 8 10 by default; may be repeated.")
    ] = None,
    more: Annotated[list[int] | None, typer.Argument(help="More of them: --nfe 4 6 8 10.", hidden=True)] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="What it may take, about.")] = 5.0,
    n: Annotated[int, typer.Option("--n", "-n", min=4, help="Trajectories to fit on, and as many to judge by.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    stages: Annotated[str, typer.Option(help="What is fitted: grid, coefficients or both.")] = "both",
    shape: Annotated[str | None, typer.Option(help="Shape of a sample; by default the network's.")] = None,
    classes: Annotated[str | None, typer.Option("--class", help="Class label, or several, as in 0,1,2.")] = None,
    cond: Annotated[str | None, typer.Option(help="The network's keyword arguments: .npz.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, with --class and --null-class.")] = None,
    null_class: Annotated[int | None, typer.Option(help="The label that stands for no class.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of converged trajectories; by default beside --out.")
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw the errors beside --out.")] = True,
    format: Format = None,
    declare: Declare = None,
    trust_pickle: TrustPickle = False,
    device: Annotated[str | None, typer.Option(help="Device; by default CUDA where there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    progress: Annotated[bool, typer.Option(help="Say what is going on.")] = True,
) -> None:
    """Fit solvers to one checkpoint; stopped at any point, the trajectories that were made are kept."""
    given = {k: v for k, v in locals().items() if k not in ("source", "out", "progress", "more", "nfe")}
    given["class"] = given.pop("classes")
    out = out or Path(f"{Path(source).resolve().name}.tuned.json")
    folder = cache or out.with_name(f"{out.stem}-trajectories")
    with one_line("tune", folder), hinted(classes is not None or cond is not None):
        import torch

        from flowsolve import tuning
        from flowsolve.fingerprint import marks
        from flowsolve.runs.networks import event_shape

        torch.set_num_threads(threads)
        flow, place = opened(source, device, format, declare, trust_pickle)
        event = tuple(int(v) for v in shape.split(",")) if shape else event_shape(flow)
        if event is None:
            raise ValueError("the network does not say what shape its samples have; give --shape, as in 3,32,32")
        conditioned = conditions(n, classes, cond)
        flow = guided(flow, guidance, null_class, conditioned)
        budgets = [*(nfe or ()), *(more or ())] or [4, 6, 8, 10]
        before = tuning.Tuning.load(out) if out.exists() else None
        if before is not None and dict(before.marks) != marks(flow):
            raise ValueError(f"{out} is of a different checkpoint; choose another --out")
        found = tuning.tune(
            flow, (n, *event), nfe=budgets, minutes=minutes, cond=conditioned or None, seed=seed, stages=stages,
            cache=folder, device=place, progress=say if progress else False,
        )  # fmt: skip
        told = {**found.provenance, "command": command("tune", (source, *map(str, more or ())), {"nfe": nfe, **given})}
        found = tuning.Tuning(found.solver, found.rows, found.marks, told)
        if before is not None:
            found = before.merged(found)
        found.save(out)
        picture = out.with_suffix(".png")
        files = [out]
        if plot:
            found.plot(picture)
            files += [
                picture,
                *_side_by_side(flow, event, found, conditioned, out.with_name(f"{out.stem}-samples.png")),
            ]
    _tell(found, out, files)


def _side_by_side(flow: Any, event: tuple[int, ...], found: Any, cond: dict[str, Any], file: Path) -> list[Path]:
    """A sheet of samples at the least budget: converged, `auto`, tuned; nothing for a flow of no pictures."""
    import torch

    from flowsolve.conditioning import rows_of, settled
    from flowsolve.integrate import sample
    from flowsolve.runs import pictures

    count = pictures.levels(flow, event)
    if count is None:
        return []
    n = found.rows[0].nfe
    some = rows_of(settled(cond, len(next(iter(cond.values())).value)), range(SHOWN)) if cond else None
    sheet = []
    for options in ({"nfe": found.provenance["evaluations"]}, {"nfe": n}, {"nfe": n, "solver": found.solver}):
        x = sample(flow, (SHOWN, *event), seed=HELD_OUT, cond=some, **options).x
        sheet.append(pictures.shades(flow.transform.pixels(x.cpu()), count))
    pictures.save_grid(file, torch.cat(sheet), columns=SHOWN)
    return [file]


def _tell(found: Any, out: Path, files: list[Path]) -> None:
    """The table, and what to do next."""
    say("", *str(found).splitlines())
    said = found.provenance
    say(
        f"errors on {said['judged']} samples of noise held out, geometric means of ‖x − x*‖/‖x*‖; in brackets two "
        "standard errors",
        "files: " + ", ".join(map(str, files)) + ("" if len(files) < 3 else " (rows: converged, auto, tuned)"),
        "",
        "In Python:",
        f"    solver = fs.solvers.load({str(out)!r})",
        f"    fs.sample(flow, shape, solver=solver, nfe={found.rows[-1].nfe})",
        "In a pipeline of diffusers:",
        "    from flowsolve.adapters.diffusers import Scheduler",
        f"    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, solver={str(out)!r})",
        f"    pipe(num_inference_steps={found.rows[-1].nfe})",
    )
