r"""`train`: a flow, data, an objective, and what practice asks for.

* **Data**: a tensor of states, integer images (dequantised afresh at each step by the flow's transform), or a function
  that draws. **Source**: normal noise, a tensor or a function likewise; a tensor of the data's length is paired with
  it row by row where the coupling is `Fixed`, drawn apart from it otherwise.
* **Conditions**: tensors with a row for each data point. For guidance each sample loses all of its conditions with
  probability `dropout` (Ho & Salimans 2022).
* **State**: everything that decides the weights is checked when a run is resumed, the data by a digest.

The run is that of `training.trainer`: each step a function of (seed, step), so that a killed run goes on to the bit.
"""

from __future__ import annotations

import copy
import csv
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve.flow import Flow
from flowsolve.training import times
from flowsolve.training.objective import Objective
from flowsolve.training.pairing import digest
from flowsolve.training.trainer import Trainer
from flowsolve.transforms import Transform

__all__ = ["Trained", "train"]

Draws = Callable[[int, torch.Generator], Tensor]
STATE = "training.pt"
"""The full state in the directory of a run; `losses.csv` and `snapshots/` lie beside it."""


@dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Attributes:
        flow: the flow with the averaged network, in evaluation mode: to be sampled from.
        losses: mean loss of each stretch of `log_every` steps.
        trainer: the trainer, with the network as it was trained, other averages and the state.
    """

    flow: Flow
    losses: list[float]
    trainer: Trainer


def train(
    flow: Flow,
    data: Tensor | Draws,
    *,
    objective: Objective | None = None,
    source: Tensor | Draws | None = None,
    cond: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    labels: str | None = None,
    steps: int = 10_000,
    batch: int = 256,
    lr: float = 1e-3,
    warmup: int = 100,
    final_lr: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    ema_decay: float = 0.999,
    ema_widths: Sequence[float] = (),
    seed: int = 0,
    out: str | Path | None = None,
    every: int = 1000,
    resume: bool = False,
    log_every: int = 100,
    progress: bool = False,
) -> Trained:
    """Train a flow's network.

    Args:
        flow: its net is a module, trained in place, on its device.
        data: states, floating, shape (N, *S); or integer images, dequantised by `flow.transform`; or a function
            draw(n, generator) → (n, *S).
        objective: by default `Objective("velocity")`, flow matching.
        source: what noise is replaced by: shape (M, *S) or a function; by default standard normal noise.
        cond: keyword arguments of the network, each with a row for each of the N data points.
        dropout: the probability with which a sample's conditions are replaced by those of `null`.
        null: for each condition what it is replaced by: a number or a tensor like one row.
        labels: which condition the coupling takes for classes.
        steps: N, the length of the whole run, which the learning rate decays over.
        batch: samples of a batch.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        final_lr: the share of lr left at the end of the cosine.
        weight_decay: AdamW's.
        clip: largest norm of the gradient; None leaves it alone.
        accumulate: batches a step.
        ema_decay: decay of the averaged weights, which are those that are returned.
        ema_widths: relative widths of power-function averages; their snapshots go to out/snapshots every `every` steps,
            for `power_ema.posthoc` (two, such as 0.05 and 0.1, make any width).
        seed: of every step.
        out: a directory for the state, losses.csv and snapshots.
        every: steps between checkpoints.
        resume: continue the run in out, or begin it if it has no state yet.
        log_every: steps that make one entry of losses.
        progress: show a bar.

    Raises:
        TypeError: the network is no module, or integer data without a transform of levels.
        ValueError: lengths that differ, arguments out of range, or a state of another run.
        FileExistsError: out is not empty, and resume was not asked for.

    Examples:
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 2)
        ...     def forward(self, x, t):
        ...         return self.layer(torch.cat((x, t[:, None]), 1))
        >>> flow = fs.Flow(Net(), fs.paths.CondOT())
        >>> trained = fs.training.train(flow, torch.randn(100, 2), steps=20, batch=16)
        >>> fs.sample(trained.flow, (4, 2), nfe=8).x.shape
        torch.Size([4, 2])
    """
    if not isinstance(flow.net, nn.Module):
        raise TypeError(f"the flow's network is a {type(flow.net).__name__}; expected a torch.nn.Module to train")
    if batch < 1 or every < 1:
        raise ValueError(f"batch = {batch}, every = {every}; expected at least 1")
    objective = Objective("velocity") if objective is None else objective
    feed = _Feed(flow, data, source, dict(cond or {}), dropout, dict(null or {}), labels, objective)
    device = next((p.device for p in flow.net.parameters()), torch.device("cpu"))

    def loss(generator: torch.Generator) -> Tensor:
        z, noise, given, classes = feed(batch, generator, device)
        return objective(flow, z, noise=noise, labels=classes, generator=generator, cond=given)

    trainer = Trainer(
        flow.net, loss, steps=steps, lr=lr, warmup=warmup, final_lr=final_lr, weight_decay=weight_decay, clip=clip,
        accumulate=accumulate, ema_decay=ema_decay, ema_widths=ema_widths, seed=seed, log_every=log_every,
        extra=_learned(objective, device),
        declared={"batch": batch, "flow": _plain(flow), "objective": _plain(objective), **feed.identity},
    )  # fmt: skip
    state = _opened(out, resume)
    if state is not None and state.is_file():
        trainer.load(state)

    def watch(trainer: Trainer) -> None:
        if state is None:
            return
        for power in trainer.powers:
            power.save(state.parent / "snapshots")
        _write_losses(trainer, state.parent / "losses.csv")

    trainer.run(checkpoint=state, every=every, progress=progress, watch=watch)
    trained = copy.copy(flow)
    trained.net = trainer.ema.module
    return Trained(trained, trainer.losses, trainer)


class _Feed:
    """Batches of data, source, conditions and classes, each a function of the generator it is given."""

    def __init__(
        self,
        flow: Flow,
        data: Tensor | Draws,
        source: Tensor | Draws | None,
        cond: dict[str, Tensor],
        dropout: float,
        null: dict[str, Any],
        labels: str | None,
        objective: Objective,
    ) -> None:
        self.flow, self.data, self.source, self.cond = flow, data, source, cond
        self.dropout, self.null, self.labels = dropout, null, labels
        self.paired = objective.coupling.given
        count = len(data) if isinstance(data, Tensor) else None
        if count == 0:
            raise ValueError("data is empty; expected at least one row")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout = {dropout!r}; expected 0 <= dropout < 1")
        if cond and count is None:
            raise ValueError("data is a function, whose draws have no rows in cond; give data and cond as tensors")
        for name, value in cond.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"cond[{name!r}] is {shape}; expected a tensor with a row for each of {count} data")
        if dropout and set(null) != set(cond):
            raise ValueError(
                f"null has {', '.join(null) or 'nothing'}; with dropout it says what each of cond is replaced by: "
                f"{', '.join(cond) or 'none'}"
            )
        if labels is not None and labels not in cond:
            raise ValueError(f"labels = {labels!r} is not in cond; expected one of {', '.join(cond) or 'none'}")
        if self.paired and not (isinstance(source, Tensor) and isinstance(data, Tensor) and len(source) == len(data)):
            raise ValueError(f"{objective.coupling!r} takes pairs; give data and source as tensors of one length")
        if isinstance(data, Tensor) and not data.dtype.is_floating_point and not isinstance(flow.transform, Transform):
            raise TypeError(f"data are {data.dtype}, but the flow's transform {flow.transform!r} takes no levels")

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        return {
            "data": _digest(self.data),
            "source": _digest(self.source),
            "cond": {name: _digest(v) for name, v in sorted(self.cond.items())},
            "dropout": self.dropout,
            "null": {k: v.tolist() if isinstance(v, Tensor) else v for k, v in sorted(self.null.items())},
            "labels": self.labels,
        }

    def __call__(
        self, n: int, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor | None]:
        """n data points, their source (None for noise), their conditions and their classes, on a device."""
        rows = None
        if isinstance(self.data, Tensor):
            rows = torch.randint(len(self.data), (n,), generator=generator)
            z = self.data[rows.to(self.data.device)].to(device)
        else:
            z = self.data(n, generator).to(device)
        if not z.dtype.is_floating_point:
            u = torch.rand(z.shape, generator=generator).to(device)
            z = self.flow.transform.forward(z + u)
        noise = None
        if isinstance(self.source, Tensor):
            own = rows if self.paired else torch.randint(len(self.source), (n,), generator=generator)
            assert own is not None
            noise = self.source[own.to(self.source.device)].to(device)
        elif self.source is not None:
            noise = self.source(n, generator).to(device)
        given = {k: v[rows.to(v.device)].to(device) for k, v in self.cond.items() if rows is not None}
        classes = given[self.labels] if self.labels is not None else None
        if self.dropout:
            lost = (torch.rand(n, generator=generator) < self.dropout).to(device)
            for name, value in given.items():
                empty = torch.as_tensor(self.null[name]).to(value)
                given[name] = torch.where(lost.reshape(-1, *[1] * (value.ndim - 1)), empty, value)
        return z, noise, given, classes


def _learned(objective: Objective, device: torch.device) -> list[Any]:
    """What an objective itself learns."""
    learned: list[Any] = []
    if isinstance(objective.weight, nn.Module):
        learned.append(objective.weight.to(device))
    if isinstance(objective.time, times.Learned):
        learned.append(objective.time)
    return learned


def _opened(out: str | Path | None, resume: bool) -> Path | None:
    """The file of the state; the directory is new, or may be continued."""
    if out is None:
        if resume:
            raise ValueError("resume needs out=, the directory of the run")
        return None
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise FileExistsError(f"{folder} is not empty; choose another out, or resume=True for the run that is in it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / STATE


def _write_losses(trainer: Trainer, file: Path) -> None:
    """losses.csv: step, mean loss of the stretch that ends there, learning rate."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("step", "loss", "lr"))
    for i, value in enumerate(trainer.losses, 1):
        step = i * trainer.log_every
        table.writerow((step, repr(value), repr(trainer.learning_rate(step - 1))))
    part = file.with_name(file.name + ".part")
    part.write_text(text.getvalue(), encoding="utf-8")
    os.replace(part, file)


def _plain(value: Any) -> str:
    """What an object says of itself, without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _digest(value: Any) -> str | None:
    """A tensor by its content, a function by its name."""
    return None if value is None else digest(value) if isinstance(value, Tensor) else _plain(value)
