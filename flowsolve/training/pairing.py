"""Pairs of noise and data made by a flow: on disk in shards, shared by processes, resumable.

Sample i is a function of the seed and its number, whatever the shard, the process or the device. A shard is a
safetensors file with `source` (what the solve started from, over the path's prior deviation: unit normal noise), `data`
and the conditions; it is written beside its place and moved there by one rename, so a killed run loses at most the
shard at hand. `pairs.json` says what they are of, and others are not mixed with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowsolve._optional import require
from flowsolve.conditioning import rows_of, settled
from flowsolve.flow import Flow
from flowsolve.integrate import sample

__all__ = ["Pairs", "pairs"]

MANIFEST = "pairs.json"
COND = "cond."


@dataclass(frozen=True)
class Pairs:
    """Noise and the data that it became, row by row.

    Attributes:
        source: shape (N, *S), on the host.
        data: shape (N, *S).
        cond: conditions with a row for each.
        nfe: evaluations that each pair cost, int64 of shape (N,).
    """

    source: Tensor
    data: Tensor
    nfe: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def load(cls, folder: str | Path) -> Pairs:
        """All pairs of a directory.

        Raises:
            FileNotFoundError: there are none, or shards are missing: their numbers are named.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: {folder} holds no pairs")
        said = json.loads(file.read_text(encoding="utf-8"))
        count = -(-int(said["n"]) // int(said["shard"]))
        missing = [i for i in range(count) if not _shard(folder, i).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {count} shards, such as {_shard(folder, missing[0]).name}; the call "
                "that made the others makes them"
            )
        return _joined([load_file(_shard(folder, i)) for i in range(count)])


def pairs(
    flow: Flow,
    shape: Sequence[int],
    *,
    solver: Any = "auto",
    nfe: int | None = None,
    seed: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    shard: int = 256,
    out: str | Path | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    **options: Any,
) -> Pairs:
    """Solve a flow from noise to data, and keep both ends.

    Args:
        flow: the flow.
        shape: (N, *S).
        solver: any solver of `flowsolve.sample`.
        nfe: as of `flowsolve.sample`.
        seed: of the noise.
        cond: the network's keyword arguments, each with a row for each of the N.
        shard: pairs of a shard, which are solved at once.
        out: a directory to keep them in; a second call goes on where the first one stopped.
        rank: which of `world` processes this is; it makes every world-th shard, and returns these alone.
        world: how many there are; `Pairs.load(out)` has all pairs when all have finished.
        progress: show a bar.
        **options: more of `flowsolve.sample`, such as grid, chart or device.

    Raises:
        ValueError: arguments out of range, conditions of another length, or a directory with other pairs.
    """
    n = int(shape[0])
    if n < 1 or shard < 1 or not 0 <= rank < world:
        raise ValueError(
            f"shape[0] = {n}, shard = {shard}, rank = {rank}, world = {world}; expected 1, 1, 0 <= rank < world"
        )
    if world > 1 and out is None:
        raise ValueError("several processes need out=, a directory that they share")
    given = {k: torch.as_tensor(v) for k, v in (cond or {}).items()}
    for name, value in given.items():
        if value.ndim == 0 or len(value) != n:
            raise ValueError(f"cond[{name!r}] has shape {tuple(value.shape)}; expected a row for each of {n} pairs")
    folder = None if out is None else Path(out)
    if folder is not None:
        spelled = {"solver": repr(solver), "nfe": nfe, "seed": seed, **{k: repr(v) for k, v in options.items()}}
        said = {"n": n, "shape": list(shape[1:]), "shard": shard, "flow": fingerprint(flow), **spelled}
        _open(folder, {**said, "cond": {k: digest(v) for k, v in given.items()}}, rank)
    made = []
    numbers = range(rank, -(-n // shard), world)
    bar = require("tqdm", "cli", "a progress bar").tqdm(numbers, unit="shard") if progress else numbers
    for i in bar:
        file = None if folder is None else _shard(folder, i)
        if file is not None and file.is_file():
            made.append(load_file(file))
            continue
        rows = np.arange(i * shard, min((i + 1) * shard, n))
        own = rows_of(settled(given, n), rows)
        solution = sample(
            flow, (len(rows), *shape[1:]), solver=solver, nfe=nfe, seed=seed, samples=rows.tolist(), cond=own,
            t_eval=(0.0, 1.0), **options,
        )  # fmt: skip
        assert solution.trajectory is not None
        first, last = (v.detach().cpu() for v in solution.trajectory)
        kept = {
            "source": (first / flow.path.prior_std).contiguous(),
            "data": last.contiguous(),
            "nfe": solution.nfe.cpu(),
        }
        kept |= {COND + k: v[rows].cpu().contiguous() for k, v in given.items()}
        made.append(kept)
        if file is not None:
            part = file.with_name(file.name + ".part")
            save_file(kept, part)
            os.replace(part, file)
    return _joined(made)


def fingerprint(flow: Flow) -> str:
    """What a flow is: its convention and its weights."""
    said = hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(flow)).encode())
    if isinstance(flow.net, nn.Module):
        for name, value in flow.net.state_dict().items():
            said.update(name.encode())
            said.update(digest(value).encode())
    return said.hexdigest()[:24]


def digest(value: Tensor) -> str:
    """A tensor by its shape, dtype and content."""
    content = value.detach().cpu().contiguous().reshape(-1)
    held = hashlib.sha256(content.view(torch.uint8).numpy().data if content.numel() else b"")
    return f"{tuple(value.shape)} {value.dtype} {held.hexdigest()[:24]}"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:06d}.safetensors"


def _open(folder: Path, said: dict[str, Any], rank: int) -> None:
    """The directory holds these pairs, or nothing."""
    file = folder / MANIFEST
    if file.is_file():
        former = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{k}: {former.get(k)} → {v}" for k, v in said.items() if former.get(k) != v]
        if changed:
            raise ValueError(f"{folder} holds other pairs ({'; '.join(changed)}); choose another out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{MANIFEST}.{rank}.part"
    part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)


def _joined(parts: list[dict[str, Tensor]]) -> Pairs:
    if not parts:
        return Pairs(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64))
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    cond = {k.removeprefix(COND): v for k, v in whole.items() if k.startswith(COND)}
    return Pairs(whole["source"], whole["data"], whole["nfe"], cond)
