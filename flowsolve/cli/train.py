"""`flowsolve train`: train a small diffusers UNet on a small data set and write a real diffusers directory.

Two tables say what can be trained: `DATA` (images and how they are dequantised) and `MODELS` (the scheduler
whose convention the network learns, and the loss). The flow that is trained is built from the scheduler by
the adapter that will read it back, so that training and loading cannot disagree. Times are uniform on the path's
window, so a network with a discrete table is trained between its entries too (fractional indices).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from flowsolve.cli._terminal import failed, say

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from flowsolve.flow import Flow

__all__ = ["DATA", "MODELS", "Data", "Model", "Recipe", "fit", "train"]


@dataclass(frozen=True)
class Data:
    """A data set: split → integer images (N, C, H, W), and (images, generator) → floats in [−1, 1]."""

    images: Callable[[Literal["train", "held_out"]], Tensor]
    dequantize: Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True)
class Model:
    """A convention: its scheduler, the pipeline that reads it, and (flow, data, **options) → loss."""

    scheduler: Callable[[], Any]
    pipeline: str
    loss: Callable[..., Tensor]


def _digits(split: Literal["train", "held_out"]) -> Tensor:
    from flowsolve.problems import digits

    return digits.load(split).images


def _dequantize_digits(images: Tensor, generator: Generator) -> Tensor:
    from flowsolve.problems import digits

    return digits.dequantize(images, generator)


def _scheduler(name: str) -> Any:
    from flowsolve._optional import require

    return getattr(require("diffusers", "train", "training a diffusers network"), name)()


def _dsm(flow: Flow, data: Tensor, **options: Any) -> Tensor:
    from flowsolve.training import dsm_loss

    return dsm_loss(flow, data, **options)


def _cfm(flow: Flow, data: Tensor, **options: Any) -> Tensor:
    from flowsolve.training import cfm_loss

    return cfm_loss(flow, data, **options)


DATA = {"digits": Data(_digits, _dequantize_digits)}
MODELS = {
    "ddpm": Model(lambda: _scheduler("DDPMScheduler"), "DDPMPipeline", _dsm),
    "condot": Model(lambda: _scheduler("FlowMatchEulerDiscreteScheduler"), "DiffusionPipeline", _cfm),
}
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


def fit(recipe: Recipe, out: Path, *, resume: bool = False, progress: bool = False) -> dict[str, Any]:
    """Train a recipe and write the directory.

    Args:
        recipe: what to train.
        out: the directory; must be empty or absent unless resume. While training it holds training.pt, the
            full state.
        resume: continue from training.pt, to the weights of an uninterrupted run.
        progress: show a bar.

    Returns:
        What is written to training.json: the recipe, versions, parameters and losses.

    Raises:
        ValueError: an unknown data set or model, or a resumed run of another recipe.
        FileExistsError: out is not empty and resume was not asked for.
        FileNotFoundError: resume was asked for, but there is no unfinished run.
    """
    import torch

    from flowsolve._optional import require
    from flowsolve._version import __version__
    from flowsolve.adapters.diffusers import as_flow, save
    from flowsolve.training import Trainer

    diffusers = require("diffusers", "train", "training a diffusers network")
    for kind, name, table in (("data", recipe.data, DATA), ("model", recipe.model, MODELS)):
        if name not in table:
            raise ValueError(f"{kind} = {name!r} is not known; expected one of {', '.join(table)}")
    data, model = DATA[recipe.data], MODELS[recipe.model]
    images = data.images("train")
    scheduler = model.scheduler()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        flow = as_flow(_unet(diffusers, recipe, images.shape), scheduler)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        return model.loss(flow, data.dequantize(images[rows], generator), generator=generator)

    trainer = Trainer(
        cast("nn.Module", flow.net),
        loss,
        steps=recipe.steps,
        lr=recipe.lr,
        warmup=recipe.warmup,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
    )
    state, begun = out / "training.pt", out / "recipe.json"
    _open(out, begun, recipe, resume)
    if state.is_file():
        trainer.load(state)
    trained = trainer.run(checkpoint=state, every=CHECKPOINT_EVERY, progress=progress)
    unet = cast("nn.Module", trained.unet)

    averaged = as_flow(unet, scheduler)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "loss": {split: _evaluate(averaged, data, model, split) for split in ("train", "held_out")},
        "training_loss": {"every": trainer.log_every, "mean": [round(v, 5) for v in trainer.losses]},
        "versions": {
            "flowsolve": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    save(unet, scheduler, out, model.pipeline)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    state.unlink()  # finished: what is left is the checkpoint and its record
    begun.unlink()
    return record


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


def _unet(diffusers: Any, recipe: Recipe, shape: tuple[int, ...]) -> Any:
    """Two resolutions, attention on the lower one; widths `width` and 1.5 `width`."""
    _, channels, size, _ = shape
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(recipe.width, 3 * recipe.width // 2),
        layers_per_block=recipe.layers,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        dropout=recipe.dropout,
    )


def _evaluate(flow: Flow, data: Data, model: Model, split: Literal["train", "held_out"]) -> float:
    """The loss of the averaged network over a split, with stratified times and a fixed seed."""
    import torch

    from flowsolve.training import times

    generator = torch.Generator().manual_seed(0)
    images = data.images(split)
    images = images.repeat(-(-3000 // len(images)), 1, 1, 1)
    with torch.no_grad():
        losses = [
            model.loss(
                flow,
                data.dequantize(part, generator),
                t=times.stratified,
                generator=generator,
                reduction="none",
            )
            for part in torch.split(images, 500)
        ]
    return round(float(torch.cat(losses).mean()), 5)


def train(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(DATA)}.")] = "digits",
    model: Annotated[str, typer.Option(help=f"Convention: {', '.join(MODELS)}.")] = "condot",
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW; it decays to 0 along a cosine.")] = 1e-3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 200,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is written.")] = 0.999,
    width: Annotated[int, typer.Option(min=16, help="Channels of the first resolution, a multiple of 16.")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="Residual blocks a resolution.")] = 1,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Dropout in the residual blocks.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of every step.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in --out.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a small UNet and write it as a diffusers directory."""
    if width % 16:
        raise typer.BadParameter(f"{width} is not a multiple of 16", param_hint="--width")
    recipe = Recipe(data, model, steps, batch, lr, warmup, ema_decay, width, layers, dropout, seed)
    try:
        record = fit(recipe, out, resume=resume, progress=progress)
    except (ValueError, OSError, ImportError) as error:
        failed("flowsolve train", error)
        raise typer.Exit(1) from None
    say(f"{out}: {record['parameters']:,} parameters, {steps} steps, loss {json.dumps(record['loss'])}")
