r"""Does autograd see all of a network? A product with its Jacobian against a difference of its outputs.

A likelihood is read from derivatives. Where a part of the network is hidden from autograd (`detach`, a `no_grad` block,
a cache that is written in place, rounding, a custom function with a backward pass of its own), derivatives of the rest
come out without a word, and the density is that of no flow. One sample tells: with a random direction w and

$$ d_h = \frac{o(x + h w) - o(x - h w)}{2h}, $$

$d_h^\top d_{h'}$ must be $d_h^\top J w$ as autograd has it. Using $d_h$ itself as the other vector leaves nothing to
cancel by chance: the quotient of the two is 1, and ½ where half of the slope is hidden.

What differences are worth is told by two of them, $\rho = \|d_h - d_{h'}\|/\|d_h\|$: the roundings of the network at
small h, its curvature and kinks at large. They are made with h of a hundredth and a thousandth of the state's size;
where these disagree (ρ > 0.1: half precision, steps of a rounded network), with a third and a tenth. A disagreement
beyond 0.02 + 3ρ is an error, and where no pair agrees nothing is said. So networks that are merely not smooth pass.

The check costs five evaluations of one sample, nine where the larger differences are needed; they are not part of NFE.
Of two trained networks with half of each hidden it found all in float32 (40 tries), and half in half precision, where
the others were too rough to tell (36 of 80 found); with a pair of steps between the two it found more there, and
refused sound networks too.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from flowsolve._arguments import state as state_of
from flowsolve._batch import Context
from flowsolve._surroundings import bare
from flowsolve.conditioning import rows_of
from flowsolve.flow import Flow
from flowsolve.likelihood.products import Function, Reverse
from flowsolve.likelihood.trace import Trace
from flowsolve.streaming import Chunk

__all__ = ["Hidden", "verify"]

PAIRS = ((1e-2, 1e-3), (0.3, 0.1))
LOOSE, LEAST = 0.1, 0.02


class Hidden(ValueError):
    """Autograd sees only a part of the network."""

    def __init__(self, ratio: float) -> None:
        super().__init__(
            f"autograd sees only a part of the network: along a random direction its derivative is {ratio:.3g} of what "
            "the outputs themselves change by, so the density would be wrong. Look for detach, no_grad, values kept "
            "from an earlier call, rounding, or a custom function in its forward pass (verify=False skips this check)"
        )


def verify(flow: Flow, trace: Trace, chunk: Chunk, interval: tuple[float, float]) -> None:
    """Look at the first sample of a solve, once; where log-SNR is 0, or as near to that as the interval goes.

    Raises:
        Hidden: autograd sees only a part of the network.
    """
    if not trace.verify or trace.learnt.get("verified") or not chunk.x.numel() or not bare():
        return
    trace.learnt["verified"] = True
    flow.arm(False)  # whether the network is a function, the first call of the solve itself shows
    try:
        _looked(flow, trace, chunk, interval)
    finally:
        flow.arm()


def _looked(flow: Flow, trace: Trace, chunk: Chunk, interval: tuple[float, float]) -> None:
    low, high = sorted(interval)
    t = min(max(flow.path.time(0.0), low), high)
    for x, given in ((chunk.x[:1], rows_of(chunk.cond, [0])), (chunk.x, chunk.cond)):
        state, cond = state_of(x), Context(flow.conditioned(given, len(x)), len(x)).tree
        try:
            _compare(partial(flow.call, t=t, **cond), state, trace)
            return
        except Hidden:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):  # a network for whole batches only, or none at all
            continue


def _compare(function: Function, x: Tensor, trace: Trace) -> None:
    """Raise Hidden if a product with the Jacobian at x is not what outputs around x say."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(x.shape, generator=draw, dtype=torch.float64, device="cpu").to(x)
    x = x.detach()
    size = float(x.double().square().mean().sqrt()) or 1.0
    with torch.no_grad():
        for pair in PAIRS:
            d, other = (_difference(function, x, w, h * size) for h in pair)
            length = float(d.norm())
            rough = float((d - other).norm()) / length if 0.0 < length < math.inf else math.inf
            if rough <= LOOSE:
                break
        else:
            return
    _, product = trace.linearised(function, x, w, False)
    if isinstance(product, Reverse):
        seen = float((product(d.to(x).unsqueeze(0))[0].detach().double() * w.double()).sum())
    else:
        seen = float((product(w.unsqueeze(0))[0].detach().double() * d).sum())
    changed = float((d * other).sum())
    if abs(seen - changed) > (LEAST + 3.0 * rough) * max(abs(seen), abs(changed)):
        raise Hidden(seen / changed)


def _difference(function: Function, x: Tensor, w: Tensor, h: float) -> Tensor:
    """The central difference quotient, float64; of steps as they are rounded."""
    above, below = x + h * w, x - h * w
    return (function(above).double() - function(below).double()) / (2.0 * h)
