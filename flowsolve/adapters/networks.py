r"""Networks as `Flow` calls them, net(x, t, **cond) → a tensor of x's shape, and the rows that go with them.

**Preconditioning** (Karras et al. 2022). With $\tilde\sigma = \sigma/\alpha$ the noise relative to the data, the raw
network $F$ is asked with a scaled state and its output shifted,

$$ \hat z = c_{skip}\,\tilde x + c_{out}\,F(c_{in}\,\tilde x,\ c_{noise}),\qquad
   c_{in} = \tfrac1{\sqrt{\tilde\sigma^2+\sigma_d^2}},\quad c_{skip} = \sigma_d^2 c_{in}^2,\quad
   c_{out} = \pm\,\tilde\sigma\sigma_d c_{in}, $$

with $+$ in EDM and $-$ where $F$ is the $v$ of Salimans & Ho 2022. Solved for the output on $\tilde x = z +
\tilde\sigma\varepsilon$, the target of $F$ is one row:

$$ F = \pm\,c_{in}\,\Bigl(\tfrac{\tilde\sigma}{\sigma_d}\,z - \sigma_d\,\varepsilon\Bigr), $$

so that no solver, and no wrapper, has to know of $c_{skip}$ and $c_{out}$.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._batch import per_sample
from flowsolve.adapters.files import Source
from flowsolve.paths import Path
from flowsolve.predictions import Prediction, Row

__all__ = [
    "FirstHalf",
    "Preconditioned",
    "Preconditioning",
    "Reordered",
    "argument_order",
    "count",
    "fill",
    "filled",
    "first_half",
    "place",
    "preconditioned",
    "require_unscaled",
]

TIMES = {"t", "ts", "time", "times", "timestep", "timesteps", "tau", "sigma", "sigmas", "noise_labels", "time_cond"}


@lru_cache
def preconditioned(sigma_data: float, v: bool = False) -> Prediction:
    """The row of a raw network F behind EDM's preconditioning, or of its negative, a v."""
    sign = -1.0 if v else 1.0

    def row(p: Any) -> Row:
        norm = _norm(p.sigma, sigma_data * p.alpha)  # α √(σ̃² + σ_d²)
        return Row(sign * p.sigma / (sigma_data * norm), -sign * sigma_data * p.alpha / norm)

    return Prediction(f"{'v' if v else 'F'} behind preconditioning, sigma_data = {sigma_data:g}", row)


def _norm(a: Any, b: Any) -> Any:
    return torch.hypot(a, b) if isinstance(a, Tensor) else math.hypot(a, b)


class Wrapper(nn.Module):
    """A callable held as a submodule if it is a module, so that its parameters are found."""

    def __init__(self, net: Callable[..., Any]) -> None:
        super().__init__()
        self.net = net


def first_half(output: Tensor, x: Tensor) -> Tensor:
    """An output without a learned variance: the first half of its channels where it has twice those of x."""
    twice = isinstance(output, Tensor) and output.ndim == x.ndim > 1 and output.shape[1] == 2 * x.shape[1]
    return output[:, : x.shape[1]] if twice else output


class FirstHalf(Wrapper):
    """A network whose learned variance, if it has one, is not used."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return first_half(self.net(x, t, **cond), x)


class Reordered(Wrapper):
    """A network that takes time first: net(t, x)."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(t, x, **cond)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Preconditioning:
    """How a network behind EDM's preconditioning is asked on z + σε; numbers in, numbers out, and tensors likewise.

    Attributes:
        sigma_data: σ_d.
        noise: c_noise: "log" for ¼ log σ, "atan" for (2/π) arctan σ.
    """

    sigma_data: float
    noise: str = "log"

    def scale(self, sigma: Any) -> Any:
        """c_in = 1/√(σ² + σ_d²)."""
        return (sigma**2 + self.sigma_data**2) ** -0.5

    def time(self, sigma: Any) -> Any:
        """c_noise, the network's time at σ."""
        of: Any = torch if isinstance(sigma, Tensor) else math
        return 0.25 * of.log(sigma) if self.noise == "log" else (2.0 / math.pi) * of.atan(sigma)

    def sigma(self, time: Any) -> Any:
        """The σ at which the network's time is that."""
        of: Any = torch if isinstance(time, Tensor) else math
        return of.exp(4.0 * time) if self.noise == "log" else of.tan(0.5 * math.pi * time)

    def __str__(self) -> str:
        return "¼ log σ" if self.noise == "log" else "(2/π) arctan σ"


class Preconditioned(Wrapper):
    """F(c_in x, c_noise(σ)) with the flow's clock reading σ on a path with α = 1."""

    def __init__(self, net: Callable[..., Any], asked: Preconditioning) -> None:
        super().__init__(net)
        self.asked = asked

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        return self.net(per_sample(self.asked.scale(sigma), x) * x, self.asked.time(sigma), **cond)  # type: ignore[no-any-return]


def require_unscaled(path: Path | None) -> None:
    """Raise unless a declared path suits a network behind preconditioning, which is asked on z + σε.

    Raises:
        ValueError: α is not 1.
    """
    if path is not None and not path.alpha(0.5) == path.alpha(0.9) == 1.0:
        raise ValueError(
            f"path = {path!r} scales the data, but the network is behind EDM's preconditioning and is asked on z + σε; "
            "expected EDM(...) or VE(...), or prediction= and time= declared too"
        )


def argument_order(net: Callable[..., Any]) -> str | None:
    """'xt' or 'tx' if the names of the first two arguments tell, else None."""
    call = net.forward if isinstance(net, nn.Module) else net
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return None
    first = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    times = [name.lower() in TIMES for name in first]
    return {(False, True): "xt", (True, False): "tx"}.get(tuple(times))  # type: ignore[arg-type]


def place(net: Callable[..., Any], device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """The network in evaluation mode, on a device and in a dtype where these are given."""
    if not isinstance(net, nn.Module):
        return net
    where: dict[str, Any] = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    if where:
        net.to(**where)  # diffusers' own `to` warns of a dtype that is only named
    return net.eval()


def fill(net: nn.Module, state: dict[str, Tensor], file: Any) -> nn.Module:
    """Load weights into a network, every one of them.

    Raises:
        TypeError: net is no module.
        ValueError: names or shapes differ; the message names the file and the first of them.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net is a {type(net).__name__}; expected the torch module that the weights of {file} belong to"
        )
    own = net.state_dict()
    absent, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if absent or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in (("that net has are not in the file", absent), ("that net has not", extra))
            if names
        ]
        raise ValueError(
            f"the weights of {file} do not belong to this {type(net).__name__}: tensors {', '.join(parts)}"
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{file} holds {name!r} of shape {tuple(tensor.shape)}; this {type(net).__name__} has "
                f"{tuple(own[name].shape)}"
            )
    net.load_state_dict(state)
    return net


def filled(net: Any, source: Source) -> Any:
    """A network in memory, or one that was declared with the weights of its file in it.

    Raises:
        UnsafeFile: reading the file would run code.
        ValueError: weights that do not belong to it.
    """
    if source.kind == "object":
        return net
    source.require_trust()
    return fill(net, source.state(), source.file)


def count(net: Any, source: Source) -> int | None:
    """The numbers in a network's parameters, or in its file's tensors; None where none are seen."""
    if isinstance(net, nn.Module):
        return sum(p.numel() for p in net.parameters())
    return sum(math.prod(shape) for shape in source.tensors.values()) or None
