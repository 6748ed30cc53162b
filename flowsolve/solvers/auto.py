r"""`solver="auto"`: a solver and a grid for a path, a budget and a noise level.

The choice rests on the path and the budget alone, never on the network. Its rows were found by search over forms,
orders, variables and grids on the problems of `benchmarks/nfe_vs_error.py`, whose record says how far from the best
they are. What they have in common:

* The form is a blend, $\hat z - \kappa\hat\varepsilon$ with κ = 0.3 (0.1 at few evaluations): it measures the state by
  κα + σ, the scale of data of that size and of the noise together, which comes nearest to the exact solution.
* Predictor and corrector have 2 nodes at few evaluations, 3 and 4 at more.
* The grid is dense where noise and data are of one size (`flowsolve.grids.warped`).

| path | evaluations | order, κ, variable | grid |
|---|---|---|---|
| α > 0 at the noise | to 7 | 2, 0.1, λ | `Arctan(1, 4)` to λ = 3.8, then the end |
| | 8 to 12 | 2, 0.1, λ | `Arctan(0.5, 5)` |
| | 13 to 29 | 3, 0.3, λ | `Arctan(1, 4)` |
| | from 30 | 4, 0.3, λ | `Arctan(1, 4)` |
| α = 0 at the noise | to 9 | 2, 0.3, λ | `Arctan(1, 1.5)` |
| | 10 to 15 | 3, 0.3, λ | `Arctan(1, 2.5)`, λ from −3 to 5 |
| | from 16 | 3, 0.3, clock | `Arctan(0, 2.5)`, λ from −4.4 to 6.2 |

Without a budget the choice is `Tsit5()` at its default tolerance. With noise (`Auto(eta=1.0)`) the grids are the same
and the solver is the data form's, with 2 nodes and a corrector of 1; weak order 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowsolve.grids import Arctan, Spacing
from flowsolve.paths import Path
from flowsolve.solvers.adaptive import Tsit5
from flowsolve.solvers.base import Solver
from flowsolve.solvers.discrete import check_eta
from flowsolve.solvers.multistep import Multistep

__all__ = ["Auto"]

KAPPA = 0.3
FINITE: tuple[tuple[float, Solver, Spacing], ...] = (
    (7, Multistep(2, 0.1, 2, rule="bh2"), Arctan(center=1.0, width=4.0, until=3.8)),
    (12, Multistep(2, 0.1, 2, rule="bh2"), Arctan(center=0.5, width=5.0)),
    (29, Multistep(3, KAPPA, 3), Arctan(center=1.0, width=4.0)),
    (math.inf, Multistep(4, KAPPA, 4), Arctan(center=1.0, width=4.0)),
)
OPEN: tuple[tuple[float, Solver, Spacing], ...] = (
    (9, Multistep(2, KAPPA, 2), Arctan(center=1.0, width=1.5)),
    (15, Multistep(3, KAPPA, 3), Arctan(center=1.0, width=2.5, since=-3.0, until=5.0)),
    (math.inf, Multistep(3, KAPPA, 3, variable="clock"), Arctan(center=0.0, width=2.5, since=-4.4, until=6.2)),
)


@dataclass(frozen=True)
class Auto:
    """The choice of a solver and a grid; `solver="auto"` is `Auto()`.

    Attributes:
        eta: the noise level: 0 for the ODE, 1 for the reverse-time SDE.

    Examples:
        >>> solver, grid = fs.solvers.Auto().choose(fs.paths.CondOT(), nfe=20)
        >>> solver.order, solver.form, type(grid).__name__
        (3, 0.3, 'Arctan')
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def choose(self, path: Path, nfe: int | None) -> tuple[Solver, Spacing | None]:
        """The solver and grid for a path and a budget of estimates; None, for no budget, is a tolerance's."""
        if nfe is None:
            if self.eta:
                raise ValueError(f"Auto(eta={self.eta:g}) draws noise and needs a budget; give nfe=…")
            return Tsit5(), None
        rows = OPEN if path.at(0.0).alpha == 0.0 else FINITE
        solver, grid = next((solver, grid) for most, solver, grid in rows if nfe <= most)
        return (Multistep(2, "data", 1, eta=self.eta) if self.eta else solver), grid


def resolve(solver: Any, grid: Any, path: Path, nfe: int | None) -> tuple[Any, Any]:
    """A solver and a grid as given, or as chosen where the solver is "auto" or an `Auto`.

    Raises:
        ValueError: a name that is not known.
    """
    if isinstance(solver, str):
        from flowsolve.solvers import names  # which knows this module

        solver = names.solver(solver)
    if not isinstance(solver, Auto):
        return solver, grid
    if nfe is None and isinstance(grid, list | tuple):
        nfe = len(grid) - 1
    chosen, spacing = solver.choose(path, nfe)
    return chosen, spacing if grid is None else grid
