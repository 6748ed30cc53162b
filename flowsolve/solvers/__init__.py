"""Solvers: one frozen dataclass a method. See `flowsolve.solvers.base` for what a solver is.

| solver | order | evaluations a step | kind |
|---|---|---|---|
| `Euler` | 1 | 1 | Runge–Kutta, fixed grid |
| `Midpoint`, `Heun`, `Ralston` | 2 | 2 | Runge–Kutta, fixed grid |
| `RK4` | 4 | 4 | Runge–Kutta, fixed grid |
| `Bosh3` | 3(2) | 3 | Runge–Kutta, adaptive for each sample, or on a fixed grid |
| `Dopri5`, `Tsit5` | 5(4) | 6 | the same |
| `Dopri8` | 8(5, 3) | 12 | the same |
| `DPMSolver12`, `DPMSolver23` | 2(1), 3(2) | 2, 3 | exponential pairs, adaptive for each sample |
| `DPMSolverPP`, `DEIS`, `LMS`, `IPNDM` | their `order`, to 4 | 1 | exponential multistep |
| `UniPC` | `order` + 1, to 4 | 1 | exponential multistep with a corrector |
| `DPMSolver`, `DPMSolverPPS`, `RES` | their `order`, 2 | their order | exponential single steps |
| `SDEDPMSolverPP`, `SASolver`, `ERSDE` | weak 2, from order 2 on | 1 | exponential multistep, any η |
| `SEEDS`, `StochasticHeun` | weak 2, from order 2 on | 1 to 3, 2 | exponential single steps, any η |
| `DDIM` | 1 | 1 | frozen estimate, η from ODE to DDPM |
| `DDPM` | weak 1 | 1 | frozen estimate |
| `ExactSDE` | weak 1 | 1 | frozen estimate, any η |
| `EulerMaruyama` | weak 1 | 1 | SDE, any η |
| `Ancestral`, `Churn` | weak, the inner solver's | the inner solver's | noise around the steps of another solver |
| `Fitted` | as tuned | 1 | exponential multistep, fitted to one checkpoint (`flowsolve.tuning`) |
| `Restart`, `RePaint` | weak, the inner solver's | the inner solver's, and of its returns | steps made again |
| `bridges.Torchdiffeq`, `bridges.Torchsde` | | | any method of those libraries (`flowsolve.solvers.bridges`) |

Orders are those of a start that costs none (warmup="single"); with the usual ramp a multistep method has order 2 in the
limit, with a corrector 3. What is measured is in docs/solvers.md. `Multistep` and `SingleStep` have every choice of the
exponential methods open (`flowsolve.solvers.exponential`).

Any other explicit method is a `Tableau` in a subclass of `RungeKutta` or, with an embedded companion, of `Adaptive`.
"""

from flowsolve.kernels import largest, rms
from flowsolve.solvers import bridges
from flowsolve.solvers.adaptive import Adaptive, Bosh3, Dopri5, Dopri8, Status, Tsit5
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import EstimateSolver, Query, Solver, State
from flowsolve.solvers.controllers import PI, PID, Controller, I
from flowsolve.solvers.discrete import DDIM, DDPM, ExactSDE
from flowsolve.solvers.embedded import DPMSolver12, DPMSolver23
from flowsolve.solvers.fitted import Fitted, Tuned, load
from flowsolve.solvers.injection import Ancestral, Churn
from flowsolve.solvers.multistep import DEIS, ERSDE, IPNDM, LMS, DPMSolverPP, Multistep, SASolver, SDEDPMSolverPP, UniPC
from flowsolve.solvers.registry import register
from flowsolve.solvers.resampling import RePaint, Restart
from flowsolve.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, Ralston, RungeKutta
from flowsolve.solvers.singlestep import RES, SEEDS, DPMSolver, DPMSolverPPS, SingleStep, StochasticHeun
from flowsolve.solvers.stochastic import EulerMaruyama
from flowsolve.solvers.tableaus import Tableau

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "IPNDM",
    "LMS",
    "PI",
    "PID",
    "RES",
    "RK4",
    "SEEDS",
    "Adaptive",
    "Ancestral",
    "Auto",
    "Bosh3",
    "Churn",
    "Controller",
    "DPMSolver",
    "DPMSolver12",
    "DPMSolver23",
    "DPMSolverPP",
    "DPMSolverPPS",
    "Dopri5",
    "Dopri8",
    "EstimateSolver",
    "Euler",
    "EulerMaruyama",
    "ExactSDE",
    "Fitted",
    "Heun",
    "I",
    "Midpoint",
    "Multistep",
    "Query",
    "Ralston",
    "RePaint",
    "Restart",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolverPP",
    "SingleStep",
    "Solver",
    "State",
    "Status",
    "StochasticHeun",
    "Tableau",
    "Tsit5",
    "Tuned",
    "UniPC",
    "bridges",
    "largest",
    "load",
    "register",
    "rms",
]

# What is subclassed or read from a file, and no method of its own.
_OPEN = (Solver, EstimateSolver, RungeKutta, Adaptive, Fitted, Tuned)
for _kind in [v for name in __all__ if isinstance(v := globals()[name], type)]:
    if issubclass(_kind, Solver | Auto) and _kind not in _OPEN:
        register(_kind)
del _kind, _OPEN
