r"""SDEs of one's own, $dy = f(t, y)\,dt + g(t, y)\,dW$; see `flowsolve.sde.solve`, `schemes`, `problem`, `motion`."""

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
    "Midpoint",
    "Milstein",
    "ReversibleHeun",
    "Scheme",
    "StochasticHeun",
    "solve_sde",
]
