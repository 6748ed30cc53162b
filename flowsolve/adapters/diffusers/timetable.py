"""A plan as pipelines see it: time steps and noise levels as tensors, and which entry of them a time step is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsolve.adapters.diffusers.layout import Plan
from flowsolve.adapters.diffusers.reading import LEAST, Reading
from flowsolve.adapters.diffusers.unshifted import Unshifted

__all__ = ["Timetable", "level", "number", "one_time"]


@dataclass(frozen=True)
class Timetable:
    """A plan on a device.

    Attributes:
        plan: the plan.
        timesteps: the network's time at each evaluation, float32.
        sigmas: the noise level at each evaluation and at the end, float32 on the host.
        host: the time steps as floats.
        unshifted: the network's clock where the call says another than the reading.
    """

    plan: Plan
    timesteps: Tensor
    sigmas: Tensor
    host: tuple[float, ...]
    unshifted: Unshifted | None = None

    @classmethod
    def of(cls, plan: Plan, unshifted: Unshifted | None, device: torch.device | str | None) -> Timetable:
        """The timetable of a plan."""
        clock = unshifted or plan.reading.flow.clock
        host = tuple(float(clock(t)) for t in plan.times)
        clean = plan.closing is not None and plan.closing.noise == 0.0
        levels = [level(plan.reading, t) for t in plan.times]
        levels.append(0.0 if clean else level(plan.reading, plan.end if plan.closing is None else plan.closing.t))
        times = torch.tensor(host, dtype=torch.float32, device=device or "cpu")
        return cls(plan, times, torch.tensor(levels, dtype=torch.float32, device="cpu"), host, unshifted)

    def clock(self, t: Any) -> Any:
        """The network's time at a flow time."""
        return (self.unshifted or self.plan.reading.flow.clock)(t)

    def native(self, k: Any) -> Any:
        """The flow time of a network's time."""
        return self.plan.reading.native(k) if self.unshifted is None else self.unshifted.inverse(k)

    def place(self, timestep: Any) -> int | None:
        """The entry that a time step is, where it is a view of `timesteps`: read without waiting for a device."""
        known = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.numel() != 1 or timestep.dtype != known.dtype:
            return None
        same = timestep.untyped_storage().data_ptr() == known.untyped_storage().data_ptr()
        return int(timestep.storage_offset()) if same else None

    def index(self, timestep: Any, expected: int | None) -> int:
        """The entry of `timesteps` that a time step is: by its place, or the nearest; of equals the one that is next.

        Args:
            timestep: a time of the network.
            expected: the entry that is next; None where nothing is.

        Raises:
            ValueError: a number that is none of them, by more than half precisions and whole numbers lose.
        """
        place = self.place(timestep)
        if place is not None:
            return place
        host, k = self.host, number(timestep)
        order: list[int] = [] if expected is None else [expected]
        order += [*self.plan.begins, *range(len(host))]
        least = min(abs(v - k) for v in host)
        found = next(i for i in order if abs(host[i] - k) <= least * (1.0 + 1e-6) + 1e-9)
        if found != expected and least > 2**-8 * abs(k) + 1e-3 * abs(host[0]):
            raise ValueError(f"timestep = {k:g} is none of timesteps, {[round(v, 3) for v in host]}; pass those")
        return found


def level(reading: Reading, t: float) -> float:
    """The noise level at a flow time: σ for a flow, σ/α otherwise."""
    point = reading.path.at(t)
    if reading.straight:
        return float(point.sigma)
    if not point.alpha:
        return float(point.sigma / LEAST if reading.stretched else "inf")
    return float(point.sigma / point.alpha)


def number(timestep: Any) -> float:
    """A time step as a float: a number, or a tensor whose entries are all the same."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = timestep.detach().cpu().double().reshape(-1)
    if not len(values) or bool((values != values[0]).any()):
        raise ValueError(
            f"timestep = {timestep}; expected one time for all samples. For a time of its own for each, own the loop: "
            "flowsolve.adapters.diffusers.capture"
        )
    return float(values[0])


def one_time(output: Tensor, times: Tensor | None) -> Tensor:
    """An output as other pipelines give it, from one with times of the sample's parts, which are to be one."""
    if times is None:
        return output
    if bool((times != times.flatten()[0]).any()):
        raise ValueError(
            "per_token_timesteps differ: the pipeline holds parts of the sample at times of their own (frames that are "
            "given), and a solver steps a sample at one time; keep its own scheduler for such a call"
        )
    return -output
