r"""A small trainer that can be stopped anywhere and continued to the same bit.

AdamW with gradient clipping, a linear warm-up followed by a cosine decay,

$$ \mathrm{lr}(n) = \mathrm{lr}\cdot\min\Bigl(1, \frac{n+1}{W}\Bigr)\cdot
   \Bigl[f + (1-f)\,\tfrac12\bigl(1 + \cos\tfrac{\pi n}{N}\bigr)\Bigr], \qquad n = 0 \dots N-1, $$

and an exponential moving average of the weights.

A step may be made of several batches (`accumulate`), whose gradients are averaged.

All randomness of step $n$ (the batch, times, noise, dropout) is a function of (seed, n): the loss receives a
generator seeded for the step, and torch's global generators are seeded alike around it and put back
afterwards. The state is therefore weights, moments and counters, no generator, and a run that was interrupted
gives the weights of one that was not. The state is written beside the former one, flushed to the disk and put in its
place by one rename: whenever the process is killed, a whole state is left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowsolve._bounds import require_plain
from flowsolve._optional import require
from flowsolve.training.ema import EMA
from flowsolve.training.power_ema import PowerEMA

__all__ = ["Trainer"]

LATER = {"accumulate": 1, "ema_widths": ()}
"""Settings that states of earlier versions lack."""


class Trainer:
    """Minimise a loss over the parameters of a module.

    Args:
        module: the network; trained in place, on its device.
        loss: loss(generator) draws a batch with the host generator it is given and returns a scalar; called
            `accumulate` times a step.
        steps: N, the length of the whole run, which the learning rate decays over.
        lr: peak learning rate.
        warmup: W, steps of linear warm-up.
        final_lr: f, the share of lr left at the end.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: largest norm of the gradient; None leaves it alone.
        ema_decay: decay of the averaged weights.
        seed: seed of the run.
        log_every: steps whose mean loss makes one entry of `losses`.
        accumulate: batches a step, whose mean gradient is taken.
        ema_widths: relative widths of further averages, each a `PowerEMA`.
        extra: what the loss itself learns beside the module, with a state_dict: learned weights, whose parameters are
            trained too (without weight decay or clipping), or densities.
        declared: plain values that a resumed run must agree on, such as what it is trained on.

    Attributes:
        step: steps done.
        ema: the averaged weights, an `EMA`; `ema.module` is the trained network.
        powers: the averages of `ema_widths`.
        losses: mean loss of each completed stretch of `log_every` steps.

    Raises:
        ValueError: steps, log_every, accumulate or lr not positive, warmup negative.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[torch.Generator], Tensor],
        *,
        steps: int,
        lr: float = 1e-3,
        warmup: int = 0,
        final_lr: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = 1.0,
        ema_decay: float = 0.999,
        seed: int = 0,
        log_every: int = 100,
        accumulate: int = 1,
        ema_widths: Sequence[float] = (),
        extra: Sequence[Any] = (),
        declared: Mapping[str, Any] | None = None,
    ) -> None:
        if steps < 1 or log_every < 1 or warmup < 0 or accumulate < 1 or not lr > 0:
            raise ValueError(
                f"steps = {steps}, log_every = {log_every}, warmup = {warmup}, accumulate = {accumulate}, lr = {lr}; "
                "expected steps, log_every and accumulate >= 1, warmup >= 0 and lr > 0"
            )
        self.settings = {
            "steps": steps, "lr": lr, "warmup": warmup, "final_lr": final_lr, "weight_decay": weight_decay,
            "betas": tuple(betas), "clip": clip, "ema_decay": ema_decay, "seed": seed, "log_every": log_every,
            "accumulate": accumulate, "ema_widths": tuple(float(w) for w in ema_widths), **(declared or {}),
        }  # fmt: skip
        self.module = module
        self.loss = loss
        self.steps = steps
        self.lr = lr
        self.warmup = warmup
        self.final_lr = final_lr
        self.clip = clip
        self.seed = seed
        self.log_every = log_every
        self.accumulate = accumulate
        self.ema = EMA(module, ema_decay)
        self.powers = [PowerEMA(module, std) for std in ema_widths]
        self.extra = list(extra)
        learned = [p for e in self.extra if isinstance(e, nn.Module) for p in e.parameters()]
        groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "weight_decay": weight_decay}]
        if learned:
            groups.append({"params": learned, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)
        self.step = 0
        self.losses: list[float] = []
        self._sum = torch.zeros((), dtype=torch.float32)  # of the losses since the last entry; read once an entry

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.lr * ramp * (self.final_lr + (1.0 - self.final_lr) * cosine)

    def run(
        self,
        until: int | None = None,
        *,
        checkpoint: str | Path | None = None,
        every: int = 1000,
        progress: bool = False,
        watch: Callable[[Trainer], None] | None = None,
    ) -> nn.Module:
        """Train up to a step, or to the end.

        Args:
            until: the step to stop before; by default N.
            checkpoint: file that the full state is saved to every `every` steps and at the end.
            every: steps between checkpoints.
            progress: show a bar (needs tqdm).
            watch: called with this trainer after every checkpoint's step, before the state is saved.

        Returns:
            The averaged network, `ema.module`.

        Raises:
            FloatingPointError: the loss is not finite. The last checkpoint is left as it was.
        """
        last = self.steps if until is None else min(until, self.steps)
        self.module.train()
        bar = self._bar(last) if progress else None
        try:
            while self.step < last:
                self._advance()
                if bar is not None:
                    bar.update()
                if self.step % self.log_every == 0:
                    self._log()
                    if bar is not None:
                        bar.set_postfix(loss=f"{self.losses[-1]:.5f}")
                if self.step % every == 0 or self.step == last:
                    self._require_finite(float(self._sum))
                    if watch is not None:
                        watch(self)
                    if checkpoint is not None:
                        self.save(checkpoint)
        finally:
            if bar is not None:
                bar.close()
        return self.ema.module

    def _advance(self) -> None:
        """One step of gradient descent."""
        with self._randomness() as generator:
            self.optimizer.zero_grad(set_to_none=True)
            total: Any = 0.0
            for _ in range(self.accumulate):
                loss = self.loss(generator)
                (loss / self.accumulate if self.accumulate > 1 else loss).backward()
                total = total + loss.detach().float()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.ema.update()
        for power in self.powers:
            power.update()
        self._sum = self._sum.to(total.device) + (total / self.accumulate if self.accumulate > 1 else total)
        self.step += 1

    @contextmanager
    def _randomness(self) -> Iterator[torch.Generator]:
        """The step's generator, with the global generators seeded alike and restored afterwards."""
        seed = int(np.random.SeedSequence((self.seed, self.step)).generate_state(1, np.uint64)[0]) >> 1
        device = next(self.module.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed ^ 1)

    def _log(self) -> None:
        total = float(self._sum)
        self._require_finite(total)
        self.losses.append(total / self.log_every)
        self._sum = torch.zeros_like(self._sum)

    def _require_finite(self, total: float) -> None:
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss became {total} in the last {self.log_every} steps before step {self.step}; lower "
                f"lr (now {self.lr:g}), lengthen the warm-up or look for non-finite data"
            )

    def _bar(self, last: int) -> Any:
        return require("tqdm", "cli", "a progress bar").tqdm(total=last, initial=self.step, unit="step")

    def state_dict(self) -> dict[str, Any]:
        """The full state: tensors, numbers and strings only."""
        return {
            "step": self.step,
            "settings": self.settings,
            "losses": list(self.losses),
            "sum": self._sum,
            "module": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "powers": [p.state_dict() for p in self.powers],
            "extra": [e.state_dict() for e in self.extra],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same run.

        Raises:
            ValueError: the state is of a run with other settings.
        """
        for name, value in self.settings.items():
            former = state["settings"].get(name, LATER.get(name))
            if former != value:
                raise ValueError(f"the state has {name} = {former}, this run has {value}")
        self.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for kept, part in zip(
            (*self.powers, *self.extra), (*state.get("powers", ()), *state.get("extra", ())), strict=True
        ):
            kept.load_state_dict(part)
        self.losses = [float(v) for v in state["losses"]]
        self._sum = state["sum"]
        self.step = int(state["step"])

    def save(self, file: str | Path) -> None:
        """Write the state; a crash in the middle leaves the former file."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        with part.open("wb") as stream:
            torch.save(self.state_dict(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)

    def load(self, file: str | Path) -> None:
        """Continue from a file written by `save`; nothing in it is executed."""
        require_plain(file)
        self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
