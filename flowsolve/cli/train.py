"""`flowsolve train`: train a diffusers UNet on images and write a real diffusers directory.

The images are a folder, an array file or the bundled digits; a table says what is learned from them: `MODELS` (the
scheduler whose convention the network has, and the objective). The flow that is trained is built from the scheduler by
the adapter that will read it back, so that training and loading cannot disagree. Times are drawn from the whole window
of the path, so a network with a discrete table is trained between its entries too (fractional indices).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flowsolve.cli._terminal import failed, say

if TYPE_CHECKING:
    from torch import nn

    from flowsolve.cli._pictures import Split
    from flowsolve.flow import Flow
    from flowsolve.training import Objective

__all__ = ["MODELS", "Model", "Recipe", "fit", "train"]


@dataclass(frozen=True)
class Model:
    """A convention: its scheduler, the pipeline that reads it, and the target that is regressed (None: its own)."""

    scheduler: Callable[[], Any]
    pipeline: str
    target: str | None


def _scheduler(name: str) -> Any:
    from flowsolve._optional import require

    return getattr(require("diffusers", "train", "training a diffusers network"), name)()


MODELS = {
    "ddpm": Model(lambda: _scheduler("DDPMScheduler"), "DDPMPipeline", None),
    "condot": Model(lambda: _scheduler("FlowMatchEulerDiscreteScheduler"), "DiffusionPipeline", "velocity"),
}
TIMES = ("uniform", "stratified", "logit-normal", "cosmap")
COUPLINGS = ("independent", "exact")
CHECKPOINT_EVERY = 1000  # steps between saves of the full state


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; written to training.json."""

    data: str
    model: str
    steps: int
    batch: int
    lr: float
    warmup: int
    ema_decay: float
    width: int
    layers: int
    dropout: float
    seed: int
    levels: int | None = None
    times: str = "uniform"
    coupling: str = "independent"
    classes: bool = False
    class_dropout: float = 0.1
    accumulate: int = 1
    clip: float = 1.0


def fit(
    recipe: Recipe, out: Path, *, resume: bool = False, progress: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Train a recipe and write the directory.

    Args:
        recipe: what to train.
        out: the directory; must be empty or absent unless resume. While training it holds training.pt, the
            full state.
        resume: continue from training.pt, to the weights of an uninterrupted run.
        progress: show a bar.
        device: where to train; by default CUDA where there is one.

    Returns:
        What is written to training.json: the recipe, versions, parameters and losses.

    Raises:
        ValueError: an unknown data set or model, images that do not do, or a resumed run of another recipe.
        FileExistsError: out is not empty and resume was not asked for.
        FileNotFoundError: resume was asked for, but there is no unfinished run.
    """
    import torch

    from flowsolve import training
    from flowsolve._optional import require
    from flowsolve._version import __version__
    from flowsolve.adapters.diffusers import as_flow, save
    from flowsolve.cli._pictures import pictures
    from flowsolve.transforms import Range

    diffusers = require("diffusers", "train", "training a diffusers network")
    for kind, name, table in (
        ("model", recipe.model, MODELS), ("times", recipe.times, TIMES), ("coupling", recipe.coupling, COUPLINGS),
    ):  # fmt: skip
        if name not in table:
            raise ValueError(f"{kind} = {name!r} is not known; expected one of {', '.join(table)}")
    data, model = pictures(recipe.data, levels=recipe.levels, classes=recipe.classes), MODELS[recipe.model]
    count = len(data.classes)
    begun = out / "recipe.json"
    _open(out, begun, recipe, resume)
    scheduler = model.scheduler()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        flow = as_flow(_unet(diffusers, recipe, data.train.images.shape, count), scheduler)
    flow.transform = Range(-1.0, 1.0, levels=data.levels)
    cast("nn.Module", flow.net).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    trained = training.train(
        flow,
        data.train.images,
        objective=_objective(recipe, model),
        cond=_given(data.train),
        dropout=recipe.class_dropout if recipe.classes else 0.0,
        null={"class_labels": count} if recipe.classes else None,
        labels="class_labels" if recipe.classes else None,
        steps=recipe.steps,
        batch=recipe.batch,
        lr=recipe.lr,
        warmup=recipe.warmup,
        clip=recipe.clip or None,
        accumulate=recipe.accumulate,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
        out=out,
        every=CHECKPOINT_EVERY,
        resume=True,
        progress=progress,
    )
    unet = cast("nn.Module", cast("nn.Module", trained.flow.net).unet)
    record = {
        "recipe": {**asdict(recipe), "levels": data.levels},
        "images": {"train": len(data.train.images), "held_out": len(data.held_out.images)},
        "classes": list(data.classes),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "loss": {
            name: _evaluate(trained.flow, split, model)
            for name, split in (("train", data.train), ("held_out", data.held_out))
            if len(split.images)
        },
        "training_loss": {"every": trained.trainer.log_every, "mean": [round(v, 5) for v in trained.losses]},
        "versions": {
            "flowsolve": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    save(unet.cpu(), scheduler, out, model.pipeline)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "training.pt").unlink()  # finished: what is left is the checkpoint and its record
    begun.unlink()
    return record


def _objective(recipe: Recipe, model: Model) -> Objective:
    """The objective of a recipe; with classes the coupling is one within each."""
    from flowsolve.training import Objective, couplings, times

    density = {"uniform": times.uniform, "stratified": times.stratified, "cosmap": times.cosmap}
    coupling: couplings.Coupling = couplings.Independent()
    if recipe.coupling == "exact":
        coupling = couplings.ByLabel() if recipe.classes else couplings.Exact()
    return Objective(model.target, density.get(recipe.times, times.logit_normal()), coupling=coupling)


def _given(split: Split) -> dict[str, Any]:
    """The network's conditions for the images of a split."""
    return {} if split.labels is None else {"class_labels": split.labels}


def _open(out: Path, begun: Path, recipe: Recipe, resume: bool) -> None:
    """Make sure that the directory is new, or holds an unfinished run of the same recipe."""
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty; choose another --out, or --resume an unfinished run")
        out.mkdir(parents=True, exist_ok=True)
        begun.write_text(json.dumps(asdict(recipe)), encoding="utf-8")
        return
    if not begun.is_file():
        raise FileNotFoundError(f"{begun} does not exist: there is no unfinished run in {out} to resume")
    former = json.loads(begun.read_text(encoding="utf-8"))
    changed = [f"{k}: {former.get(k)} → {v}" for k, v in asdict(recipe).items() if former.get(k) != v]
    if changed:
        raise ValueError(f"the run in {out} was begun with other options ({'; '.join(changed)})")


def _unet(diffusers: Any, recipe: Recipe, shape: tuple[int, ...], classes: int) -> Any:
    """Two to four resolutions, down to 8 pixels or so, attention on the lowest; widths 1, 1.5, 2 and 2 `width`."""
    _, channels, height, width = shape
    depth = 2
    while depth < 4 and min(height, width) >> (depth - 1) > 8 and not (height | width) % (1 << depth):
        depth += 1
    if (height | width) % (1 << (depth - 1)):
        raise ValueError(f"the images have {height}×{width} pixels; expected even numbers: crop or resize them")
    widths = (recipe.width, 3 * recipe.width // 2, 2 * recipe.width, 2 * recipe.width)[:depth]
    return diffusers.UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=recipe.layers,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        norm_num_groups=8,
        attention_head_dim=16,
        dropout=recipe.dropout,
        num_class_embeds=classes + 1 if classes else None,  # the last one says that there is none
    )


def _evaluate(flow: Flow, split: Split, model: Model) -> float:
    """The loss of the averaged network over a split, with stratified times and a fixed seed."""
    import torch

    from flowsolve.training import Objective, times
    from flowsolve.transforms import Transform

    objective = Objective(model.target, times.stratified)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(max(len(split.images), 3000), device="cpu") % len(split.images)
    device = next(cast("nn.Module", flow.net).parameters()).device
    losses = []
    with torch.no_grad():
        for part in torch.split(rows, 500):
            images = split.images[part]
            u = torch.rand(images.shape, generator=generator, device="cpu")
            states = cast(Transform, flow.transform).forward(images + u).to(device)
            cond = {k: v[part].to(device) for k, v in _given(split).items()}
            losses.append(objective(flow, states, generator=generator, reduction="none", cond=cond).cpu())
    return round(float(torch.cat(losses).mean()), 5)


def train(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    data: Annotated[
        str, typer.Option(help="Folder of PNG or JPEG files, .npy, .npz, .npz:KEY (integers), or digits.")
    ] = "digits",
    model: Annotated[str, typer.Option(help=f"Convention: {', '.join(MODELS)}.")] = "condot",
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW; it decays to 0 along a cosine.")] = 1e-3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 200,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is written.")] = 0.999,
    width: Annotated[int, typer.Option(min=16, help="Channels of the first resolution, a multiple of 16.")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="Residual blocks a resolution.")] = 1,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Dropout in the residual blocks.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of every step.")] = 0,
    levels: Annotated[int | None, typer.Option(min=2, help="Number of integer levels; by default 256.")] = None,
    times: Annotated[str, typer.Option(help=f"Density of times: {', '.join(TIMES)}.")] = "uniform",
    coupling: Annotated[str, typer.Option(help=f"Of noise and images: {', '.join(COUPLINGS)}.")] = "independent",
    classes: Annotated[
        bool, typer.Option("--classes", help="Condition on classes: a folder each, or the array labels of a .npz.")
    ] = False,
    class_dropout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of images that lose their class, for guidance.")
    ] = 0.1,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    clip: Annotated[float, typer.Option(min=0.0, help="Largest norm of the gradient; 0 leaves it alone.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="Device; by default CUDA where there is one.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in --out.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a UNet on images and write it as a diffusers directory."""
    if width % 16:
        raise typer.BadParameter(f"{width} is not a multiple of 16", param_hint="--width")
    recipe = Recipe(
        data, model, steps, batch, lr, warmup, ema_decay, width, layers, dropout, seed, levels, times, coupling,
        classes, class_dropout, accumulate, clip,
    )  # fmt: skip
    try:
        record = fit(recipe, out, resume=resume, progress=progress, device=device)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        failed("flowsolve train", error)
        raise typer.Exit(1) from None
    say(f"{out}: {record['parameters']:,} parameters, {steps} steps, loss {json.dumps(record['loss'])}")
