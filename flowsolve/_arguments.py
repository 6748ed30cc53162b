"""Arguments at the boundary: what was given, what was expected, and the mend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._batch import state_dtype
from flowsolve._parameters import modules_of
from flowsolve.flow import Flow
from flowsolve.gradients import MODES
from flowsolve.solvers.base import Foreign, ForeignSDE, Solver
from flowsolve.solvers.runge_kutta import RungeKutta

__all__ = [
    "check_flow",
    "check_gradient",
    "check_grid",
    "check_interval",
    "check_solver",
    "device_of",
    "shape_of",
    "size_of",
    "state",
]


def check_flow(flow: Any, cond: Any) -> None:
    """Raise unless flow is a Flow whose network is a function of its arguments, and cond a mapping.

    Layers that are known to differ in training mode are looked for here, wherever they stand; whether others draw at
    random, the first call shows (`Flow.arm`).
    """
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow is a {type(flow).__name__}; expected a flowsolve.Flow, such as Flow(net, path, prediction)"
        )
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"cond is a {type(cond).__name__}; expected a mapping of the network's keyword arguments")
    for module in (m for net in flow.nets for m in modules_of(net, 3)):
        if not any(m.training for m in module.modules()):
            continue
        for name, layer in module.named_modules():
            if layer.training and _modal(layer):
                raise ValueError(
                    f"the network is in training mode, where its layer {name or 'net'!r} ({type(layer).__name__}) is "
                    "random or mixes samples; call net.eval() first"
                )
    flow.arm()


def _modal(layer: nn.Module) -> bool:
    """Whether a layer does something else in training mode: draws at random, or mixes the samples of a batch."""
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return bool(layer.p != 0.0)
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return bool(layer.track_running_stats)
    if isinstance(layer, nn.MultiheadAttention):
        return bool(layer.dropout != 0.0)
    if isinstance(layer, nn.RNNBase):
        return bool(layer.dropout != 0.0 and layer.num_layers > 1)
    return isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.RReLU)


def check_solver(solver: Any) -> None:
    """Raise TypeError unless solver is a solver."""
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {solver.__name__}; pass an instance, {solver.__name__}()")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is {solver!r}; expected a solver such as flowsolve.solvers.Dopri5()")


def check_interval(interval: tuple[float, float]) -> None:
    """Raise ValueError unless interval is two different flow times."""
    if len(interval) != 2 or not all(0.0 <= t <= 1.0 for t in interval) or interval[0] == interval[1]:
        raise ValueError(f"interval = {interval!r}; expected two different flow times in [0, 1], noise 0 and data 1")


def check_grid(grid: Any, solver: Solver) -> None:
    """Raise TypeError if a grid is given to a solver that chooses its own steps."""
    if grid is not None:
        raise TypeError(f"{type(solver).__name__} chooses its own steps; drop grid={grid!r}, or set adaptive=False")


def check_gradient(gradient: str, solver: Solver) -> None:
    """Raise unless gradient names a way to differentiate a solve, and the solver has it."""
    if gradient not in MODES:
        raise ValueError(f"gradient = {gradient!r} is not known; expected one of {', '.join(MODES)}")
    if gradient != "direct" and isinstance(solver, Foreign | ForeignSDE):
        raise TypeError(f"{solver!r} runs a loop of its own; drop gradient={gradient!r} (its own options may have one)")
    if gradient == "adjoint" and not isinstance(solver, RungeKutta):
        raise TypeError(
            f"{type(solver).__name__} has no adjoint ODE; use a Runge–Kutta solver (Euler in the straight chart is "
            "DDIM), or gradient='checkpoint'"
        )


def shape_of(shape: Any) -> tuple[int, ...]:
    """A shape (B, *S) of whole numbers."""
    try:
        sizes = tuple(int(n) for n in shape)
        if len(sizes) and all(n == m and n >= 0 for n, m in zip(sizes, shape, strict=True)):
            return sizes
    except (TypeError, ValueError):
        pass
    raise ValueError(f"shape = {shape!r}; expected (B, *S), the number of samples and the shape of each")


def state(x: Any) -> Tensor:
    """A state as it is integrated: floating-point, batched, float32 at least."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"the state is of {got}; expected a floating-point tensor")
    if x.ndim == 0:
        raise ValueError("the state is 0-dimensional; expected a batch of shape (B, *S)")
    return x.to(state_dtype(x))


def size_of(x: Tensor) -> int:
    """D, the numbers of one sample."""
    return math.prod(x.shape[1:])


def device_of(net: Any) -> torch.device:
    """Where a network lives; the host if it has no parameters."""
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
