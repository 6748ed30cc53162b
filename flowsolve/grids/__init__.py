r"""Grids: the times at which a solver steps, what each step costs, and how the last one ends.

A `Grid` is a strictly monotone sequence of flow times in [0, 1] with the number of network evaluations that each of
its intervals will cost, so the NFE of a solve is known before it starts. A *spacing* places N steps on an interval
[a, b] of flow time, node $i$ at (with $u = i/N$, $\lambda = \log(\alpha/\sigma)$, $\tilde\sigma = \sigma/\alpha$):

| spacing | name | node $i$ | source |
|---|---|---|---|
| `Uniform()` | `uniform` | $t = a + (b-a)\,u$ | |
| `Quadratic()` | `quadratic` | $t = b - (b-a)(1-u)^2$ | Song et al. 2021 (DDIM): $\tau_i = \lfloor c\,i^2\rfloor$ |
| `Beta(a, b)` | `beta` | $1 - t = F^{-1}_{a,b}(1-u)$, stretched to [a, b] | Lee et al. 2024 |
| `LogSNR()` | `log_snr` | $\lambda = \lambda_a + (\lambda_b-\lambda_a)\,u$ | Lu et al. 2022; "exponential" |
| `Polyexponential(rho)` | `polyexponential` | $\lambda = \lambda_b - (\lambda_b-\lambda_a)(1-u)^\rho$ | k-diffusion |
| `Karras(rho)` | `karras` | $\tilde\sigma^{1/\rho}$ linear in $u$ | Karras et al. 2022 |
| `Logistic(kappa)` | `logistic` | $\alpha/(\kappa\alpha+\sigma)$ linear in $u$ | `flowsolve.grids.warped` |
| `Arctan(center, width)` | `arctan` | $\arctan((\lambda-c)/w)$ linear in $u$ | `flowsolve.grids.warped` |
| `Timesteps(kind)` | `leading`, `trailing`, `linspace` | entries of a discrete table | Lin et al. 2024, Table 2 |
| `Shifted(spacing, s)` | | the nodes of another, with $\lambda' = \lambda - \log s$ | Esser et al. 2024 |

Explicit nodes are a sequence of flow times, or `At(log_snr=…)`, `At(sigma=…)`, `At(timesteps=…)`, `At(t=…)`.

Nodes are computed as exact fractions of the interval, never by accumulation, and its ends are kept to the bit. Where
$\lambda$ is infinite at an end of the interval, the spacings in $\lambda$ place their nodes in a finite window (by
default EDM's, $\tilde\sigma$ from 80 to 0.002) and the outermost steps go from its edge to the exact end: steps like
any other, counted like any other. On the way from data to noise a spacing has the same nodes in the other order.

What happens at the data end is a named policy, `Final`.
"""

from flowsolve.grids.base import Grid, Spacing, fractions, share
from flowsolve.grids.explicit import At
from flowsolve.grids.final import Closing, Final
from flowsolve.grids.names import SPACINGS, resolve
from flowsolve.grids.shift import Shifted, dynamic_shift
from flowsolve.grids.spacings import WINDOW, Beta, Karras, LogSNR, Polyexponential, Quadratic, Uniform
from flowsolve.grids.tables import Timesteps
from flowsolve.grids.warped import Arctan, Logistic

__all__ = [
    "SPACINGS",
    "WINDOW",
    "Arctan",
    "At",
    "Beta",
    "Closing",
    "Final",
    "Grid",
    "Karras",
    "LogSNR",
    "Logistic",
    "Polyexponential",
    "Quadratic",
    "Shifted",
    "Spacing",
    "Timesteps",
    "Uniform",
    "dynamic_shift",
    "fractions",
    "resolve",
    "share",
]
