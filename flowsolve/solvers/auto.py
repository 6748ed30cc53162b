r"""`solver="auto"`: a solver and a grid for a path, a budget and a noise level.

The choice rests on the path and the budget alone, never on the network, and is made by minimax: of many forms,
orders, variables and grids the one whose error, divided by the smallest on each problem, is smallest where it is
largest. The problems (`benchmarks/sections/fields.py`) have narrow spectra (mixtures, whose path happens within a few
units of λ) and wide ones (power laws and scale mixtures of them, as of natural images, where some coefficient is of the
size of the noise everywhere); the record of `benchmarks/auto.py` says how far from the best the rows are on others.
What they have in common:

* The form is a blend, $\hat z - \kappa\hat\varepsilon$: it measures the state by κα + σ, the scale of data of that
  size and of the noise together, which comes nearest to the exact solution.
* The variable is λ, but where the table says so. Polynomials of 4 nodes in the clock of the form are ahead on exact
  networks, and far behind on the trained network `patches-condot` at 12 to 20 evaluations.
* Predictor and corrector have as many nodes: 2 at few evaluations, 4 at more.
* The grid is dense where noise and data are of one size (`flowsolve.grids.warped`); the fewer the evaluations, the
  sooner it begins and ends, and one step does the rest.

| path | evaluations | order, κ | grid |
|---|---|---|---|
| α > 0 at the noise | to 4 | 2, 0.15 | `Arctan(-0.5, 2.4)` to λ = 2.4 |
| | 5 to 6 | 2, 0.7 | `Arctan(-0.5, 2.8)` to λ = 2.7 |
| | 7 to 8 | 2, 0.5 | `Arctan(-0.75, 4.1)` to λ = 3.6 |
| | 9 to 10 | 2, 1 | `Arctan(-0.5, 3.4)` to λ = 4.1 |
| | 11 to 14 | 4, 0.2 | `Arctan(0.25, 4.2)` to λ = 6.5 |
| | 15 to 22 | 4, 0.3 | `Arctan(0.25, 5.1)` to λ = 5.3 |
| | from 23 | 4, 0.3 | `Arctan(0, 3.5)` |
| α = 0 at the noise | to 4 | 2, 0.15 | `Arctan(-1.5, 2.5)`, λ from −1.25 to 1.8 |
| | 5 | 2, 0.15 | `Arctan(-2, 5.8)`, λ from −2 to 2.4 |
| | 6 to 7 | 2, 0.7 | `Arctan(-1, 10.4)`, λ from −2.25 to 3 |
| | 8 to 9 | 2, 1 | `Arctan(-0.25, 4.1)`, λ from −3 to 3.5 |
| | 10 to 11 | 2, 1 | `Arctan(0, 4.1)`, λ from −3.5 to 3.8 |
| | 12 to 15 | 3, 1, in the clock | `Arctan(0.75, 2.3)`, λ from −3 to 4.4 |
| | 16 to 23 | 4, 0.4 | `Arctan(0.5, 4.1)`, λ from −4.75 to 5.3 |
| | 24 to 35 | 4, 0.4, in the clock | `Arctan(0.5, 2.5)`, λ from −3.75 to 5 |
| | from 36 | 4, 0.4, in the clock | `Arctan(0.75, 2.5)`, λ from −4.25 to 5.6 |

Without a budget the choice is `Tsit5()` at its default tolerance. With noise (`Auto(eta=1.0)`) the solver is the data
form's, with 2 nodes and a corrector of 1, weak order 2, and the grids are narrower (`NOISY`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowsolve.grids import Arctan, At, Spacing
from flowsolve.paths import Path
from flowsolve.solvers.adaptive import Tsit5
from flowsolve.solvers.base import Solver
from flowsolve.solvers.eta import check_eta
from flowsolve.solvers.multistep import Multistep

__all__ = ["Auto"]

FINITE: tuple[tuple[float, Solver, Spacing], ...] = (
    (4, Multistep(2, 0.15, 2), Arctan(center=-0.5, width=2.4, until=2.4)),
    (6, Multistep(2, 0.7, 2), Arctan(center=-0.5, width=2.8, until=2.7)),
    (8, Multistep(2, 0.5, 2), Arctan(center=-0.75, width=4.1, until=3.6)),
    (10, Multistep(2, 1.0, 2), Arctan(center=-0.5, width=3.4, until=4.1)),
    (14, Multistep(4, 0.2, 4), Arctan(center=0.25, width=4.2, until=6.5)),
    (22, Multistep(4, 0.3, 4), Arctan(center=0.25, width=5.1, until=5.3)),
    (math.inf, Multistep(4, 0.3, 4), Arctan(center=0.0, width=3.5)),
)
OPEN: tuple[tuple[float, Solver, Spacing], ...] = (
    (4, Multistep(2, 0.15, 2), Arctan(center=-1.5, width=2.5, since=-1.25, until=1.8)),
    (5, Multistep(2, 0.15, 2), Arctan(center=-2.0, width=5.8, since=-2.0, until=2.4)),
    (7, Multistep(2, 0.7, 2), Arctan(center=-1.0, width=10.4, since=-2.25, until=3.0)),
    (9, Multistep(2, 1.0, 2), Arctan(center=-0.25, width=4.1, since=-3.0, until=3.5)),
    (11, Multistep(2, 1.0, 2), Arctan(center=0.0, width=4.1, since=-3.5, until=3.8)),
    (15, Multistep(3, 1.0, 3, variable="clock"), Arctan(center=0.75, width=2.3, since=-3.0, until=4.4)),
    (23, Multistep(4, 0.4, 4), Arctan(center=0.5, width=4.1, since=-4.75, until=5.3)),
    (35, Multistep(4, 0.4, 4, variable="clock"), Arctan(center=0.5, width=2.5, since=-3.75, until=5.0)),
    (math.inf, Multistep(4, 0.4, 4, variable="clock"), Arctan(center=0.75, width=2.5, since=-4.25, until=5.6)),
)
NOISY: tuple[tuple[tuple[float, Spacing], ...], ...] = (
    (
        (7, Arctan(center=1.0, width=4.0, until=3.8)),
        (12, Arctan(center=0.5, width=5.0)),
        (math.inf, Arctan(center=1.0, width=4.0)),
    ),
    (
        (9, Arctan(center=1.0, width=1.5)),
        (15, Arctan(center=1.0, width=2.5, since=-3.0, until=5.0)),
        (math.inf, Arctan(center=0.0, width=2.5, since=-4.4, until=6.2)),
    ),
)
"""The grids with noise, where α > 0 and where α = 0 at the noise end."""


@dataclass(frozen=True)
class Auto:
    """The choice of a solver and a grid; `solver="auto"` is `Auto()`.

    Attributes:
        eta: the noise level: 0 for the ODE, 1 for the reverse-time SDE.

    Examples:
        >>> solver, grid = fs.solvers.Auto().choose(fs.paths.CondOT(), nfe=20)
        >>> solver.order, solver.form, type(grid).__name__
        (4, 0.4, 'Arctan')
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
        infinite = path.at(0.0).alpha == 0.0
        if self.eta:
            grid = next(grid for most, grid in NOISY[infinite] if nfe <= most)
            return Multistep(2, "data", 1, eta=self.eta), grid
        return next((solver, grid) for most, solver, grid in (OPEN if infinite else FINITE) if nfe <= most)


def resolve(solver: Any, grid: Any, path: Path, nfe: int | None) -> tuple[Any, Any]:
    """A solver and a grid as given, or as chosen where the solver is "auto" or an `Auto`, or has times of its own.

    Raises:
        ValueError: a name that is not known.
    """
    if isinstance(solver, str):
        from flowsolve.solvers import names  # which knows this module

        solver = names.solver(solver)
    if not isinstance(solver, Auto):
        own = solver.own_times if isinstance(solver, Solver) else None
        return solver, At(t=own) if grid is None and own else grid
    if nfe is None and isinstance(grid, list | tuple):
        nfe = len(grid) - 1
    chosen, spacing = solver.choose(path, nfe)
    return chosen, spacing if grid is None else grid
