"""`flowsolve reflow`: rounds of rectified flow on a diffusers UNet, measured before and after each.

OUT/round-1, round-2, … are diffusers directories, each trained on pairs of the one before it; OUT/distilled, if asked
for, is the last one trained for k steps. OUT/reflow.json and reflow.png have, for each, the straightness and the error
of 1, 2, 4 and 8 Euler steps against the ends of its own trajectories, the distilled one's against those of the flow
that it was distilled from. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flowsolve.cli._running import one_line
from flowsolve.cli._terminal import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowsolve.flow import Flow
    from flowsolve.training import Pairs

__all__ = ["Plan", "carry_out", "draw", "reflow"]

EVERY = 500  # steps between saves of the full state
SHARD = 256  # pairs made at once
MEASURED = 256  # trajectories of the straightness, and pairs of the errors
STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """What decides the result; written to reflow.json."""

    source: str
    pairs: int
    rounds: int
    distil: int
    steps: int
    batch: int
    lr: float
    ema_decay: float
    solver: str
    nfe: int
    seed: int


def carry_out(plan: Plan, out: Path, *, progress: bool = False, device: str | None = None) -> dict[str, Any]:
    """Do what is left of a plan.

    Args:
        plan: what to do.
        out: the directory; empty, absent, or of the same plan.
        progress: show bars.
        device: where to do it; by default CUDA where there is one.

    Returns:
        What is written to reflow.json: the plan, and a row for each flow.

    Raises:
        ValueError: a directory of another plan, or a checkpoint that is no diffusers UNet.
    """
    from flowsolve import adapters
    from flowsolve.solvers.names import solver as solver_of

    root = adapters.bundled(plan.source) if plan.source in adapters.BUNDLED else Path(plan.source)
    record = _begun(plan, out)
    flow, classes = _opened(root, device)
    solver: Any = plan.solver if plan.solver == "auto" else solver_of(plan.solver)
    rows = {row["name"]: row for row in record["flows"]}
    names = [f"round-{r}" for r in range(1, plan.rounds + 1)] + (["distilled"] if plan.distil else [])
    for round_, name in enumerate(("source", *names)):
        teacher = flow
        if round_:
            flow = _student(plan, root, out, name, teacher, progress, device)
        whole = name != "distilled"
        made = _pairs(
            plan, out / "pairs" / name, flow if whole else teacher, classes, solver, round_, progress, full=whole
        )
        if name not in rows:
            rows[name] = {"name": name, **_measure(flow, made, plan)}
            record["flows"] = [rows[n] for n in ("source", *names) if n in rows]
            _write(out / "reflow.json", record)
    return record


def _begun(plan: Plan, out: Path) -> dict[str, Any]:
    """The record of a run that is begun or continued."""
    file = out / "reflow.json"
    if file.is_file():
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{k}: {record['plan'].get(k)} → {v}" for k, v in asdict(plan).items() if record["plan"].get(k) != v]
        if changed:
            raise ValueError(
                f"the run in {out} was begun with other options ({'; '.join(changed)}); choose another --out"
            )
        return record
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    record = {"plan": asdict(plan), "flows": []}
    _write(file, record)
    return record


def _write(file: Path, record: dict[str, Any]) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def _opened(root: Path, device: str | None) -> tuple[Flow, int]:
    """The flow of a directory, and how many classes it is conditioned on."""
    import torch

    from flowsolve import adapters

    flow = adapters.load(root, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    unet = getattr(flow.net, "unet", None)
    if type(unet).__name__ != "UNet2DModel" or not (root / "scheduler").is_dir():
        raise ValueError(f"{root} is no diffusers directory of a UNet2DModel, such as `flowsolve train` writes")
    embeds = cast(Any, unet).config.get("num_class_embeds")
    return flow, int(embeds) - 1 if embeds else 0  # the last one says that there is no class


def _conditions(classes: int, n: int) -> dict[str, Tensor]:
    import torch

    return {"class_labels": torch.arange(n, device="cpu") % classes} if classes else {}


def _pairs(
    plan: Plan, folder: Path, flow: Flow, classes: int, solver: Any, round_: int, progress: bool, full: bool
) -> Pairs:
    """The pairs of a flow, or only those that another is measured on."""
    from flowsolve.training import pairs

    unet = cast(Any, cast("nn.Module", flow.net).unet)
    size = unet.config.sample_size
    event = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    n = plan.pairs if full else min(plan.pairs, MEASURED)
    return pairs(
        flow, (n, *event), solver=solver, nfe=plan.nfe, seed=plan.seed + round_, cond=_conditions(classes, n),
        shard=SHARD, out=folder, progress=progress,
    )  # fmt: skip


def _student(plan: Plan, root: Path, out: Path, name: str, teacher: Flow, progress: bool, device: str | None) -> Flow:
    """A flow trained on the pairs of its teacher: read where it is finished, trained where it is not."""
    import shutil

    from flowsolve._optional import require
    from flowsolve._version import __version__
    from flowsolve.adapters.diffusers import save
    from flowsolve.training import Pairs, distil, reflow

    folder = out / name
    if not (folder / "training.json").is_file():
        number = 0 if name == "round-1" else int(name[6:]) - 1 if name != "distilled" else plan.rounds
        made = Pairs.load(out / "pairs" / (f"round-{number}" if number else "source"))
        options: dict[str, Any] = {
            "steps": plan.steps, "batch": plan.batch, "lr": plan.lr, "warmup": min(100, plan.steps // 10),
            "ema_decay": plan.ema_decay, "seed": plan.seed, "out": folder, "every": EVERY, "resume": True,
            "progress": progress,
        }  # fmt: skip
        trained = (
            distil(teacher, made, plan.distil, **options) if name == "distilled" else reflow(teacher, made, **options)
        )
        config = json.loads((root / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
        kind = getattr(require("diffusers", "train", "writing a diffusers directory"), config["_class_name"])
        unet = cast("nn.Module", cast("nn.Module", trained.flow.net).unet)
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        save(unet, kind.from_config(config), folder, str(index["_class_name"]))
        recipe = {"data": f"pairs of {plan.source}", "levels": getattr(teacher.transform, "levels", None)}
        _write(
            folder / "training.json",
            {
                "recipe": recipe,
                "plan": asdict(plan),
                "training_loss": trained.losses,
                "versions": {"flowsolve": __version__},
            },
        )
        (folder / "training.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / "snapshots", ignore_errors=True)
    return _opened(folder, device)[0]


def _measure(flow: Flow, made: Pairs, plan: Plan) -> dict[str, Any]:
    """Straightness, and the error of a few Euler steps against the ends of the flow's own trajectories."""
    from flowsolve import sample
    from flowsolve.solvers import Dopri5
    from flowsolve.training import rectified

    n = min(MEASURED, len(made))
    cond = {k: v[:n] for k, v in made.cond.items()}
    device = next(cast("nn.Module", flow.net).parameters()).device
    straight = rectified.straightness(
        flow, (n, *made.data.shape[1:]), solver=Dopri5(rtol=1e-3, atol=1e-3), seed=plan.seed + 1000,
        cond={k: v.to(device) for k, v in cond.items()},
    )  # fmt: skip
    errors = {}
    for k in STEPS:
        start = made.source[:n].to(device) * flow.path.prior_std
        found = sample(flow, start=start, solver="euler", nfe=k, cond={c: v.to(device) for c, v in cond.items()}).x
        each = (found.cpu() - made.data[:n]).double().square().flatten(1).mean(1)
        rms = float(each.mean().sqrt())
        errors[str(k)] = {"rms": rms, "stderr": float(each.std()) / len(each) ** 0.5 / (2.0 * rms)}
    return {
        "straightness": straight.mean, "stderr": straight.stderr, "relative": straight.relative, "euler": errors,
        "nfe_of_pairs": float(made.nfe.double().mean()),
    }  # fmt: skip


def draw(record: dict[str, Any], file: Path) -> None:
    """The error of k Euler steps, a line for each flow."""
    from flowsolve._optional import require

    figure = require("matplotlib.figure", "runs", "a picture").Figure(figsize=(5.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in record["flows"]:
        values = [row["euler"][str(k)] for k in STEPS]
        label = f"{row['name']}, straightness {row['straightness']:.3g}"
        axes.errorbar(STEPS, [v["rms"] for v in values], [v["stderr"] for v in values], marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="Euler steps",
        ylabel="rms error per dimension",
    )
    axes.set_xticks(STEPS, [str(k) for k in STEPS])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def reflow(
    source: Annotated[str, typer.Argument(help="Diffusers directory of a UNet2DModel, digits-condot or digits-ddpm.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    pairs: Annotated[int, typer.Option(min=1, help="Pairs a round.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds.")] = 1,
    distil: Annotated[int, typer.Option(min=0, help="Train the last one for so many Euler steps; 0 does not.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent a round.")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of a batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-4,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is written.")] = 0.999,
    solver: Annotated[str, typer.Option(help="What makes the pairs, as in dopri5:rtol=1e-4,atol=1e-4.")] = "auto",
    nfe: Annotated[int, typer.Option(min=1, help="Evaluations a pair.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and of every step.")] = 0,
    device: Annotated[str | None, typer.Option(help="Device; by default CUDA where there is one.")] = None,
    plot: Annotated[bool, typer.Option(help="Draw reflow.png.")] = True,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Straighten a flow on pairs that it makes itself; stopped at any point, the same command goes on."""
    plan = Plan(source, pairs, rounds, distil, steps, batch, lr, ema_decay, solver, nfe, seed)
    with one_line("reflow", out):
        record = carry_out(plan, out, progress=progress, device=device)
        if plot:
            draw(record, out / "reflow.png")
    say(f"{'flow':<12} {'straightness':>18}   rms error of {', '.join(map(str, STEPS))} Euler steps")
    for row in record["flows"]:
        errors = "  ".join(f"{row['euler'][str(k)]['rms']:.4f}" for k in STEPS)
        say(f"{row['name']:<12} {row['straightness']:>9.5f} ± {row['stderr']:<7.5f} {errors}")
