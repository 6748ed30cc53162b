r"""SDEs of one's own: $dy = f(t, y)\,dt + g(t, y)\,dW$, Itô's or Stratonovich's, by schemes of strong order up to 1.5.

| module | |
|---|---|
| `flowsolve.sde.solve` | `solve_sde` |
| `flowsolve.sde.schemes` | the schemes, their orders and costs |
| `flowsolve.sde.adaptive` | steps of each sample's own, under tolerances |
| `flowsolve.sde.problem` | kinds of noise, and the drift of the other calculus |
| `flowsolve.sde.motion`, `tree` | Brownian motion and its space-time Lévy area, addressed by seed, sample and place |
| `flowsolve.sde.reversible` | the adjoint of the reversible Heun scheme |
| `flowsolve.sde.family` | a flow's SDEs, for any diffusion |
"""

from flowsolve.sde.family import FlowSDE
from flowsolve.sde.motion import BrownianPath
from flowsolve.sde.schemes import (
    SRK,
    EulerHeun,
    EulerMaruyama,
    Midpoint,
    Milstein,
    ReversibleHeun,
    Scheme,
    StochasticHeun,
)
from flowsolve.sde.solve import solve_sde

__all__ = [
    "SRK",
    "BrownianPath",
    "EulerHeun",
    "EulerMaruyama",
    "FlowSDE",
    "Midpoint",
    "Milstein",
    "ReversibleHeun",
    "Scheme",
    "StochasticHeun",
    "solve_sde",
]
