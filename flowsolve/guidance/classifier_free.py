"""Classifier-free guidance: one network, with its conditioning and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowsolve._batch import MARK, take
from flowsolve.flow import Flow
from flowsolve.guidance.base import Interval, Schedule, require_flow
from flowsolve.guidance.conditioning import RESERVED, join, replaced, select
from flowsolve.guidance.extrapolation import Extrapolation, many
from flowsolve.guidance.rules import Rule

__all__ = ["ClassifierFree"]

UNCONDITIONAL = RESERVED[0]


class ClassifierFree(Extrapolation):
    r"""Classifier-free guidance (Ho & Salimans 2022): u + w (c − u), c with the conditioning, u without.

    Args:
        flow: the flow of a network that is trained with its conditioning dropped at times.
        scale: w, a number or a function of the log-SNR λ. 1 is the conditional flow, 0 the unconditional one. (The
            authors' own scale is w − 1; diffusers' `guidance_scale` is w.)
        unconditional: the network's keyword arguments that say that nothing is given, in place of those of `cond`:
            numbers, or tensors of shape (1, *S) or (*S), shared by all samples. Rows of their own, such as a negative
            prompt for each sample, go into the solve: cond={…, "unconditional": {…}}.
        interval: log-SNRs (low, high) within which the flow is guided, or an `Interval`, such as
            Interval.sigma(0.3, 3.0); outside only the conditional network runs (Kynkäänniemi et al. 2024).
        rule: None for the formula above, `APG(…)`, `ZeroStar(…)`, or a function with their arguments.
        rescale: share φ of the way back to the conditional estimate's spread (Lin et al. 2024); 0 for none.
        rescale_in: where: a prediction's name, or "output" for the network's own.
        batched: both estimates by one call of the network with the guided samples twice (tensors with a row a sample
            are joined, others passed once), or False for two calls, one after the other. NFE counts 2 either way.

    Raises:
        ValueError, TypeError: settings as above; in a solve, conditionings that one call cannot take for both.

    Examples:
        >>> labelled = lambda x, t, y: (torch.tensor([0.0, 1.0, -1.0])[y][:, None] - x) / (1.0 - 0.5 * t[:, None])
        >>> flow = fs.guidance.ClassifierFree(
        ...     fs.Flow(labelled, fs.paths.CondOT()), scale=3.0, unconditional={"y": 0}, interval=(-2.0, 2.0)
        ... )
        >>> sol = fs.sample(flow, (2, 1), solver=fs.solvers.Heun(), nfe=20, cond={"y": torch.tensor([1, 2])})
        >>> sol.nfe  # 2 for an estimate within the interval, 1 outside, and one more would cost 21
        tensor([19, 19])
    """

    def __init__(
        self,
        flow: Flow,
        scale: float | Callable[[float], float],
        *,
        unconditional: Mapping[str, Any] | None = None,
        interval: tuple[float, float] | Interval | None = None,
        rule: Rule | None = None,
        rescale: float = 0.0,
        rescale_in: str = "data",
        batched: bool = True,
    ) -> None:
        require_flow(flow)
        if unconditional is not None and not isinstance(unconditional, Mapping):
            raise TypeError(
                f"unconditional is a {type(unconditional).__name__}; expected a mapping of the network's keyword "
                'arguments, such as {"y": 1000}'
            )
        self.unconditional, self.batched = dict(unconditional or {}), batched
        self._there: dict[torch.device, dict[str, Any]] = {}
        schedule = Schedule.of(scale, interval, off=1.0)
        super().__init__(flow, schedule, flow.prediction, flow.nfe_range, rule, rescale, rescale_in)

    def _extra(self, t: Any) -> Any:
        return self.base.cost(t)

    def _strong(self, x: Tensor, t: Any, clock: Any, cond: dict[str, Any], marks: Any) -> Tensor:
        cond, marks = ({k: v for k, v in tree.items() if k != UNCONDITIONAL} for tree in (cond, marks))
        return super()._strong(x, t, clock, cond, marks)

    def _weak(
        self, x: Tensor, t: Any, index: Any, clock: Any, cond: dict[str, Any], marks: Any
    ) -> tuple[Tensor, Tensor]:
        cond, marks = dict(cond), dict(marks)
        given, its = cond.pop(UNCONDITIONAL, {}), marks.pop(UNCONDITIONAL, {})
        if not given and not self.unconditional:
            raise ValueError(
                "classifier-free guidance needs the arguments that say that nothing is given: "
                'ClassifierFree(flow, scale, unconditional={"y": …}), or cond={…, "unconditional": {…}} in the solve'
            )
        count = len(x)
        shared = {name: value for name, value in self._on(x.device).items() if name not in given}
        null, flags = replaced(cond, marks, shared, None, count)
        null, flags = replaced(null, flags, given, its, count)
        null = select(null, flags, index)
        here, when = (x, t) if index is None else (take(x, index), take(t, index) if many(t) else t)
        if not self.batched:
            strong = self.base.call(x, t, clock=clock, **cond, **{MARK: marks})
            return strong, self.base.call(here, when, clock=clock, **null, **{MARK: flags})
        both, own_rows = join(cond, marks, count, null, flags, len(here))
        times = torch.cat((t, when)) if many(t) else t
        output = self.base.call(torch.cat((x, here)), times, clock=clock, **both, **{MARK: own_rows})
        return output[:count], output[count:]

    def _on(self, device: torch.device) -> dict[str, Any]:
        """The unconditional arguments on a device, to which they are sent once."""
        if device not in self._there:
            self._there[device] = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, self.unconditional)
        return self._there[device]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        return {**super().settings, "unconditional": self.unconditional, "batched": self.batched}

    def __repr__(self) -> str:
        calls = "" if self.batched else ", batched=False"
        return f"ClassifierFree({self.base!r}, {self._settings()}{calls})"
