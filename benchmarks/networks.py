r"""Train the networks of natural images that the benchmarks judge by, with the package's own trainer.

    python benchmarks/networks.py patches-ddpm --seconds 200     # on an accelerator, where there is one

| directory | path | prediction | condition |
|---|---|---|---|
| `networks/patches-ddpm` | DDPM's table of 1,000 (linear β) | v | the photograph (0 … 5), or none (6, in 15 %) |
| `networks/patches-edm` | EDM, σ from 80 to 0.002 | EDM's preconditioned output, σ_data = 0.5 | none |

Each is a UNet2DModel of diffusers on patches of 32 × 32 of photographs (`flowsolve.problems.patches`): small and
briefly trained, fit to compare solvers on, not to compare models. Losses are plain regressions of the network's raw
output: of v at uniform times (Salimans & Ho 2022), and of EDM's F at log σ ~ N(−1.2, 1.2²) (Karras et al. 2022). (An ε
network so briefly trained is off by more than the data where there is almost only noise: its samples had the wrong
colours, and twice the data's standard deviation.) Weights are stored in float16. What made a network lies beside it in
training.json. The time that training may take decides the number of steps, measured before it begins and written down:
with `--steps` the run is repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._optional import require
from flowsolve.adapters.diffusers import as_flow, save
from flowsolve.bench.record import environment
from flowsolve.flow import Flow
from flowsolve.problems import patches
from flowsolve.training import Trainer, dsm_loss

NETWORKS = Path(__file__).parent / "networks"
WIDTHS, BATCH, LR, WARMUP, CLIP, EMA = (48, 72, 96), 256, 8e-4, 200, 1.0, 0.9995
TRIED = (30, 90)  # steps before the clock starts, and when it is read
NONE = len(patches.TRAIN)


@dataclass(frozen=True)
class Kind:
    """A convention to train: the scheduler that states it, its options, its pipeline, and whether it has classes."""

    scheduler: str
    options: dict[str, Any]
    pipeline: str
    classes: bool


KINDS = {
    "patches-ddpm": Kind(
        "DDPMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, "DDPMPipeline", True
    ),
    "patches-edm": Kind("EDMEulerScheduler", {"sigma_data": 0.5}, "DiffusionPipeline", False),
}


def unet(kind: Kind) -> nn.Module:
    """The network: three resolutions of two blocks each, attention on the lowest."""
    made: nn.Module = require("diffusers", "train", "training a network").UNet2DModel(
        sample_size=patches.SIZE,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=24,
        attention_head_dim=24,
        num_class_embeds=NONE + 1 if kind.classes else None,
    )
    return made


def times(flow: Flow, kind: Kind, generator: torch.Generator) -> Tensor | None:
    """EDM's times: log σ ~ N(−1.2, 1.2²), within the path's ends; None for uniform ones."""
    if kind.scheduler != "EDMEulerScheduler":
        return None
    log_sigma = -1.2 + 1.2 * torch.randn(BATCH, generator=generator, dtype=torch.float64)
    path = flow.path
    log_snr = (-log_sigma).clamp(float(path.log_snr(0.0)), float(path.log_snr(1.0)))
    return torch.as_tensor(path.time(log_snr)).clamp(0.0, 1.0)


def trainer(name: str, steps: int, device: str, photos: Any, seed: int = 0) -> Trainer:
    """The run, not yet begun."""
    kind, diffusers = KINDS[name], require("diffusers", "train", "training a network")
    torch.manual_seed(seed)
    net = unet(kind).to(device)
    if device == "cuda":
        net = net.to(memory_format=torch.channels_last)
    flow = as_flow(net, getattr(diffusers, kind.scheduler)(**kind.options))

    def loss(generator: torch.Generator) -> Tensor:
        images, labels = patches.draw(photos, BATCH, generator)
        data = patches.dequantize(images, generator).to(device)
        cond = {}
        if kind.classes:
            dropped = torch.rand(BATCH, generator=generator) < 0.15
            cond["class_labels"] = torch.where(dropped, NONE, labels).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return dsm_loss(flow, data, t=times(flow, kind, generator), generator=generator, cond=cond)

    return Trainer(
        flow.net, loss, steps=steps, lr=LR, warmup=min(WARMUP, steps // 4), clip=CLIP, ema_decay=EMA, betas=(0.9, 0.99),
        weight_decay=0.01, seed=seed, log_every=max(1, steps // 20),
    )  # fmt: skip


def held_out(net: nn.Module, name: str, device: str) -> float | None:
    """The loss of the averaged network on patches of the photographs held out; None where they are not installed."""
    try:
        images = patches.lattice(patches.photographs("held_out"), 512).images
    except ImportError:
        return None
    kind, generator = KINDS[name], torch.Generator().manual_seed(0)
    diffusers = require("diffusers", "train", "training a network")
    flow = as_flow(net, getattr(diffusers, kind.scheduler)(**kind.options))
    cond = {"class_labels": torch.full((BATCH,), NONE, device=device)} if kind.classes else {}
    losses = []
    with torch.no_grad():
        for part in images.split(BATCH):
            data = patches.dequantize(part, generator).to(device)
            losses.append(float(dsm_loss(flow, data, t=times(flow, kind, generator), generator=generator, cond=cond)))
    return sum(losses) / len(losses)


def main() -> None:
    """Train one network and write its directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(KINDS))
    parser.add_argument("--seconds", type=float, default=200.0, help="the time that training may take")
    parser.add_argument("--steps", type=int, help="steps, instead of what the time allows")
    parser.add_argument("--out", type=Path, help="directory to write (default: benchmarks/networks/NAME)")
    parser.add_argument("--photographs", type=Path, help="a file of torch.save(photographs()), for machines without")
    given = parser.parse_args()
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    photos = torch.load(given.photographs) if given.photographs else patches.photographs()
    steps = given.steps
    if steps is None:
        tried, (first, last) = trainer(given.name, TRIED[1], device, photos), TRIED
        tried.run(first)
        start = time.perf_counter()
        tried.run(last)
        each = (time.perf_counter() - start) / (last - first)
        steps = max(100, int((given.seconds - (time.perf_counter() - began)) / each))
        print(f"{given.name}: {1e3 * each:.1f} ms a step, {steps} steps", flush=True)
    run = trainer(given.name, steps, device, photos)
    start = time.perf_counter()
    averaged = run.run()
    seconds = time.perf_counter() - start
    net = next(m for m in averaged.modules() if hasattr(m, "save_pretrained"))
    record = {
        "network": given.name, "steps": steps, "batch": BATCH, "lr": LR, "warmup": WARMUP, "clip": CLIP,
        "ema_decay": EMA, "seconds": round(seconds, 1), "parameters": sum(p.numel() for p in net.parameters()),
        "loss": {"training": [round(v, 5) for v in run.losses], "held_out": held_out(net, given.name, device)},
        "environment": environment(),
    }  # fmt: skip
    kind = KINDS[given.name]
    scheduler = getattr(require("diffusers", "train", "training a network"), kind.scheduler)(**kind.options)
    out = given.out or NETWORKS / given.name
    save(net.to("cpu", torch.float16, memory_format=torch.contiguous_format), scheduler, out, kind.pipeline)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}), flush=True)


if __name__ == "__main__":
    main()
