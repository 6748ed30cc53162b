"""Solvers: one frozen dataclass a method. See `flowsolve.solvers.base` for what a solver is.

| solver | order | evaluations a step | kind |
|---|---|---|---|
| `Euler` | 1 | 1 | Runge–Kutta, fixed grid |
| `Midpoint`, `Heun` | 2 | 2 | Runge–Kutta, fixed grid |
| `RK4` | 4 | 4 | Runge–Kutta, fixed grid |
| `Dopri5` | 5 | 6 | Runge–Kutta, adaptive for each sample |
| `DDIM` | 1 | 1 | frozen estimate, η from ODE to DDPM |
| `DDPM` | weak 1 | 1 | frozen estimate |
| `ExactSDE` | weak 1 | 1 | frozen estimate, any η |
| `EulerMaruyama` | weak 1 | 1 | SDE, any η |
"""

from flowsolve.solvers.adaptive import Adaptive, Dopri5, Status
from flowsolve.solvers.base import EstimateSolver, Query, Solver, State
from flowsolve.solvers.controllers import PI
from flowsolve.solvers.discrete import DDIM, DDPM, ExactSDE
from flowsolve.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, RungeKutta
from flowsolve.solvers.stochastic import EulerMaruyama

__all__ = [
    "DDIM",
    "DDPM",
    "PI",
    "RK4",
    "Adaptive",
    "Dopri5",
    "EstimateSolver",
    "Euler",
    "EulerMaruyama",
    "ExactSDE",
    "Heun",
    "Midpoint",
    "Query",
    "RungeKutta",
    "Solver",
    "State",
    "Status",
]
