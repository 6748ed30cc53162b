"""Images carried to the noise and back, with what was lost on the way (`flowsolve.inversion`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._arguments import device_of
from flowsolve.flow import Flow
from flowsolve.inversion import RoundTrip, round_trip
from flowsolve.runs import pictures
from flowsolve.runs.data import open_data
from flowsolve.runs.engine import environment
from flowsolve.runs.errors import ItemError
from flowsolve.runs.files import naming, write_json
from flowsolve.runs.networks import placed
from flowsolve.runs.ranks import Rank
from flowsolve.runs.settings import fingerprint, spell, versions
from flowsolve.solvers import Auto, Solver
from flowsolve.streaming import join

__all__ = ["invert"]

SHOWN = 8


def invert(
    flow: Flow,
    data: Any,
    out: str | Path,
    *,
    solver: Solver | Auto | str = "auto",
    batch: int = 64,
    limit: int | None = None,
    device: str | torch.device | None = None,
    notes: dict[str, Any] | None = None,
    **options: Any,
) -> RoundTrip:
    """Carry images to the noise and back, and write what was found.

    Args:
        flow: the flow.
        data: images, as for `nll`; an iterator has no order to return to and is refused.
        out: a new directory: of latent.npz (the latents, the states after the way back, the errors), round_trip.png
            (images, and the images after the way back) and metadata.json.
        solver: a solver that draws no noise.
        batch: the most images the network sees at a time.
        limit: the first so many images only.
        device: where to compute, by default where the network is.
        notes: kept in metadata.json.
        **options: nfe, grid and chart, as for `flowsolve.encode`.

    Returns:
        The `RoundTrip` of all images.

    Raises:
        ItemError: an image that cannot be read.
        ValueError: a flow of codes, which images are not.
        FileExistsError: `out` is not empty.
    """
    out, rank = Path(out), Rank.here()
    if rank.world > 1:
        raise ValueError(f"inversion runs in one process; WORLD_SIZE is {rank.world}")
    flow = placed(flow, rank.device(device))
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another directory")
    source = open_data(data, limit=limit)
    if not source.indexed or source.count is None:
        raise TypeError("data is an iterator; expected images that can be read by number")
    items: list[Tensor] = []
    for index in range(source.count):
        item = source.read(index)
        if isinstance(item, ItemError):
            raise item
        if items and item.shape != items[0].shape:
            raise ItemError(
                source.origin(index), f"its shape is {tuple(item.shape)}; expected {tuple(items[0].shape)}, the first's"
            )
        items.append(item)
    x = pictures.states(flow, torch.stack(items), source.levels, shaded=source.shaded).to(device_of(flow.net))
    found: RoundTrip = join([round_trip(flow, part, solver=solver, **options) for part in torch.split(x, batch)])
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    kept = {"latent": found.latent, "x": found.x, "data": x, "error": found.error, "psnr": found.psnr, "nfe": found.nfe}
    pictures.save_arrays(out / "latent.npz", {name: _array(value) for name, value in kept.items()})
    levels = pictures.levels(flow, x.shape[1:])
    if levels is not None:
        rows = torch.cat([flow.transform.pixels(v[:SHOWN]).cpu() for v in (x, found.x)])
        pictures.save_grid(out / "round_trip.png", pictures.shades(rows, levels), columns=min(SHOWN, len(x)))
    record = {
        "task": "invert",
        **(notes or {}),
        "images": len(x),
        "error": {"median": float(found.error.median()), "worst": float(found.error.max())},
        "psnr": {"median": float(found.psnr.median()), "worst": float(found.psnr.min())},
        "latent_std": {"median": float(found.latent_std.median())},
        "nfe": float(found.nfe.double().mean()),
        "settings": {
            "flow": fingerprint(flow),
            "data": source.identity,
            "solver": spell(solver),
            "batch": batch,
            **{name: spell(value) for name, value in options.items()},
        },
        "versions": versions(),
        "environment": environment(device_of(flow.net)),
    }
    write_json(out / "metadata.json", record)
    return found


def _array(value: Tensor) -> tuple[tuple[int, ...], Any, list[bytes]]:
    array = np.ascontiguousarray(value.detach().cpu().numpy())
    return array.shape, array.dtype, [array.tobytes()]
