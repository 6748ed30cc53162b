r"""Samples by the thousand, and what becomes of images: noised in part and denoised again.

Sample i is a function of the settings and its number. What is kept is its pixels, the levels of the flow's transform
(256 where it fixes none; `flowsolve.runs.pictures`); with `raw=True`, and of samples that are no images or codes of an
autoencoder, the numbers themselves.

**Strength.** A run from images starts at the flow time t at which the share of noise in the state is the strength s,

$$ \frac{\sigma_t}{\alpha_t + \sigma_t} = s \quad\Longleftrightarrow\quad \lambda_t = \log\frac{1-s}{s}, $$

from $x_t = \alpha_t z + \sigma_t\varepsilon$. This is the straight chart's clock, $1 - s$: on a rectified flow s is the
time itself, s = ½ is signal and noise of equal size on every path, and neither the number of steps nor the grid changes
what it means. All evaluations are spent on what is left of the way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._arguments import device_of, shape_of
from flowsolve.conditioning import common, rows_of
from flowsolve.flow import Flow
from flowsolve.integrate import sample as solve
from flowsolve.noise import START, Noise
from flowsolve.runs import pictures
from flowsolve.runs.data import Data, open_data
from flowsolve.runs.engine import Task, check_batch, environment, execute, threads
from flowsolve.runs.errors import ItemError, keeping
from flowsolve.runs.files import naming, write_json
from flowsolve.runs.images import pillow
from flowsolve.runs.networks import event_shape, placed
from flowsolve.runs.parts import Parts, Row
from flowsolve.runs.progress import Progress
from flowsolve.runs.ranks import Rank
from flowsolve.runs.settings import digest, fingerprint, spell, versions
from flowsolve.solvers import Auto, Solver
from flowsolve.transforms import Latent

__all__ = ["sample", "start_time"]

SHOWN = 64
"""Samples in the grid."""


def sample(
    flow: Flow,
    n: int,
    out: str | Path,
    *,
    solver: Solver | Auto | str = "auto",
    nfe: int | None = None,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch: int = 64,
    init: Any = None,
    strength: float | None = None,
    raw: bool = False,
    png: bool = True,
    device: str | torch.device | None = None,
    cpu_threads: int = 1,
    on_error: str = "stop",
    resume: bool = True,
    progress: bool = False,
    notes: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Draw n samples of a flow and keep them as they are drawn.

    Args:
        flow: the flow.
        n: how many.
        out: the run's directory: of images/, grid.png, samples.npz and metadata.json; of a flow of codes no pictures.
        solver: see `flowsolve.sample`.
        nfe: see `flowsolve.sample`.
        seed: key of all noise.
        shape: of one sample, by default what the network's configuration says.
        batch: samples of a batch.
        init: images to start from, as for `nll`; sample i starts from image i mod their number.
        strength: with init: the share of noise to start with, in (0, 1].
        raw: keep the numbers beside the pixels.
        png: write a PNG file for each image.
        device: where to compute, by default where the network is; "cuda" is that of LOCAL_RANK.
        cpu_threads: threads of torch in a process. Their number decides how sums are rounded, so it is a setting like
            any other; processes (torchrun) use more cores without changing a bit.
        on_error: what becomes of a sample that does not reach the end: "stop" the run, or "skip" it and note why.
        resume: go on with the run that is in `out`, if there is one.
        progress: show a progress bar (rank 0).
        notes: kept in the manifest and in metadata.json.
        **options: grid, chart, final, noise and cond, as for `flowsolve.batching.sample`.

    Returns:
        What metadata.json holds; None where other processes have not finished yet, of which the last writes it.

    Raises:
        RunError: a sample failed and on_error is "stop", a file cannot be written, or `out` holds a run with other
            settings. What was finished is kept, and the same call goes on from there.
        FileExistsError: `out` is in use.
        ValueError: bad options.
    """
    check_batch(batch, on_error)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n = {n!r}; expected an integer >= 1")
    rank, out = Rank.here(), Path(out)
    flow = placed(flow, rank.device(device))
    if (init is None) != (strength is None):
        raise ValueError("init= (images) and strength= (the noise to put on them) go together; give both or neither")
    source = None if init is None else open_data(init)
    event = _event(flow, shape, source)
    task = _Drawing(flow, n, event, batch, on_error)
    task.options = dict(solver=solver, nfe=nfe, seed=seed, **options)
    task.cond = common(options.get("cond"), (n, batch))
    task.levels = pictures.levels(flow, event)
    task.raw = raw or task.levels is None
    task.folder = out / "images" if png and task.levels is not None else None
    if task.levels is not None:
        pillow()  # before the work, not after it
    beginning: dict[str, Any] = {}
    if source is not None and strength is not None:
        t = start_time(flow, strength)
        task.images, task.start = _loaded(flow, source, event), t
        beginning = {"init": {**source.identity, "digest": digest(task.images)}, "strength": strength, "start": t}
    task.settings = {
        "flow": fingerprint(flow),
        "n": n,
        "shape": list(event),
        "batch": batch,
        **{name: spell(value) for name, value in task.options.items()},
        **beginning,
        "raw": task.raw,
        "png": task.folder is not None,
        "device": device_of(flow.net).type,
        "threads": cpu_threads,
    }
    share = sum(min(batch, n - b * batch) for b in filter(rank.mine, range(task.batches)))
    name = "sample" if rank.world == 1 else f"sample, rank {rank.number} of {rank.world}"
    bar = Progress(name, share, show=progress and rank.number == 0)
    with threads(cpu_threads):
        parts = execute(task, out, rank=rank, resume=resume, bar=bar, notes=notes or {})
    if parts is None:
        return None
    with keeping(out):
        return _finish(parts, out, task, notes or {})


def start_time(flow: Flow, strength: float) -> float:
    """The flow time at which the share of noise, σ/(α + σ), is the strength.

    Raises:
        ValueError: a strength that is not in (0, 1], or less noise than the network knows.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength = {strength!r}; expected a share of noise in (0, 1]")
    t = flow.path.time(-math.inf if strength == 1.0 else math.log((1.0 - strength) / strength))
    edge = flow.path.window[1]
    if t >= edge:
        least = flow.path.at(edge)
        raise ValueError(
            f"strength = {strength:g} is less noise than the network knows; expected more than "
            f"{least.sigma / (least.alpha + least.sigma):.4g}"
        )
    return t


class _Drawing(Task):
    """The task."""

    name = "sample"
    columns: Mapping[str, str] = dict(nfe="INTEGER", status="TEXT", error="TEXT", pixels="BLOB", x="BLOB")
    options: dict[str, Any]
    cond: dict[str, Any]
    raw: bool
    levels: int | None
    folder: Path | None
    images: Tensor | None = None
    start: float

    def __init__(self, flow: Flow, n: int, event: tuple[int, ...], batch: int, on_error: str) -> None:
        self.flow, self.n, self.event, self.batch, self.on_error = flow, n, event, batch, on_error

    @property
    def batches(self) -> int:
        """How many there are."""
        return -(-self.n // self.batch)

    def work(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """The rows of each wanted batch, after its files."""
        for number in filter(wanted, range(self.batches)):
            first = number * self.batch
            yield number, self._rows(range(first, min(self.n, first + self.batch)))

    def _rows(self, numbers: range) -> list[Row]:
        call = dict(samples=list(numbers), throw=False, **self.options)
        call["cond"] = rows_of(self.cond, numbers)
        if self.images is None:
            solution = solve(self.flow, (len(numbers), *self.event), **call)
        else:
            z = self.images[[i % len(self.images) for i in numbers]].to(device_of(self.flow.net))
            drawn = Noise.for_batch(self.options["seed"], len(z), call["samples"]).normal(START, 0, z)
            x = self.flow.path.interpolate(z, drawn, self.start)
            solution = solve(self.flow, start=x, interval=(self.start, 1.0), **call)
        ok, messages, nfe = solution.ok.tolist(), solution.messages, solution.nfe.tolist()
        rows: list[Row] = []
        for i, index in enumerate(numbers):
            if not ok[i]:
                if self.on_error == "stop":
                    raise ItemError(f"sample {index}", f"the solve {messages[i]}")
                rows.append((index, nfe[i], "failed", messages[i], None, None))
                continue
            kept = None
            if self.levels is not None:
                (pixels,) = self.flow.transform.pixels(solution.x[i : i + 1]).cpu()
                kept = pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
                if self.folder is not None:
                    with naming(self.folder):
                        self.folder.mkdir(parents=True, exist_ok=True)
                    pictures.save_png(self.folder / f"{index:06d}.png", pictures.shades(pixels, self.levels))
            values = solution.x[i].float().cpu().contiguous().numpy().tobytes() if self.raw else None
            rows.append((index, nfe[i], "success", None, kept, values))
        return rows


def _event(flow: Flow, shape: Sequence[int] | None, source: Data | None) -> tuple[int, ...]:
    """The shape of one sample."""
    event = event_shape(flow) if shape is None else shape_of(shape)
    if event is None and source is not None:
        event = source.shape()
    if event is None:
        raise ValueError("the network does not say what shape its samples have; give shape= (--shape), such as 3,32,32")
    return event


def _loaded(flow: Flow, source: Data, event: tuple[int, ...]) -> Tensor:
    """Images to start from, as data of shape (k, *S)."""
    if not source.indexed or source.count is None:
        raise TypeError("init= is an iterator; expected images that can be read by number")
    found = []
    for index in range(source.count):
        item = source.read(index)
        if isinstance(item, ItemError):
            raise item
        if tuple(item.shape) != event:
            raise ItemError(source.origin(index), f"its shape is {tuple(item.shape)}; expected {event}")
        found.append(item)
    return pictures.states(flow, torch.stack(found), source.levels, shaded=source.shaded)


def _finish(parts: Parts, out: Path, task: _Drawing, notes: dict[str, Any]) -> dict[str, Any]:
    """Write grid.png, samples.npz and metadata.json."""
    table = list(parts.rows("idx, nfe, status, error"))
    good = [row for row in table if row[2] == "success"]
    index, nfe = (np.array([row[i] for row in good], np.int64) for i in (0, 1))
    arrays: dict[str, Any] = {
        "index": (index.shape, np.int64, [index.tobytes()]),
        "nfe": (nfe.shape, np.int64, [nfe.tobytes()]),
    }
    content = hashlib.sha256()

    def column(name: str) -> Iterator[bytes]:
        for status, value in parts.rows(f"status, {name}"):
            if status == "success":
                content.update(value)
                yield value

    if task.levels is not None:
        c, h, w = task.event
        dtype: Any = np.uint8 if task.levels <= 256 else np.int32
        arrays["images"] = ((len(good), h, w, c), dtype, column("pixels"))
        shown: list[Tensor] = []
        for status, value in parts.rows("status, pixels"):
            if len(shown) == SHOWN:
                break
            if status == "success":
                shown.append(torch.from_numpy(np.frombuffer(value, dtype).reshape(h, w, c).copy()).permute(2, 0, 1))
        if shown:
            pictures.save_grid(out / "grid.png", pictures.shades(torch.stack(shown), task.levels))
    if task.raw:
        arrays["x"] = ((len(good), *task.event), np.float32, column("x"))
    pictures.save_arrays(out / "samples.npz", arrays)
    record = {
        "task": "sample",
        **notes,
        "samples": len(good),
        "levels": task.levels,
        "codes": repr(task.flow.transform) if isinstance(task.flow.transform, Latent) else None,
        "digest": content.hexdigest(),
        "nfe": {"mean": float(nfe.mean()), "min": int(nfe.min()), "max": int(nfe.max())} if len(good) else None,
        "left_out": [{"idx": row[0], "error": row[3]} for row in table if row[2] != "success"],
        "settings": task.settings,
        "versions": versions(),
        "environment": environment(device_of(task.flow.net)),
        "seconds": round(parts.seconds, 3),
    }
    write_json(out / "metadata.json", record)
    return json.loads((out / "metadata.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
