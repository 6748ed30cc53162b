r"""Tuning: solvers fitted to one checkpoint, at budgets where generic ones leave most to be gained.

`fs.tune(flow, shape, nfe=(4, 6, 8, 10))` goes four steps, each of which starts from the best before it:

1. **Trajectories** (`trajectories`): converged solves from known noise, kept in a file and gone on with.
2. **Search** (`search`): named and blended multistep solvers × grids, by successive halving on a few of them.
3. **Coefficients** (`fitting`): weights of the estimates so far (`flowsolve.solvers.fitted`), step by step in closed
   form, from the solver's own states to the converged ones, drawn towards the generic solver.
4. **Times** (`refining`): Gauss–Newton on the noise levels of the nodes, the coefficients fitted anew at each.

What is measured is the relative error of the end state, $e_i = \|x_i - x_i^*\| / \|x_i^*\|$, and judged by its
geometric mean over samples, which the few that end in another mode do not rule. Three sets of noise are kept apart: one
to fit on, one to choose on (*validation*: whatever is not better there than the best generic solver is not taken), and
one *held out*, on which alone the figures of the result are measured.
"""

from flowsolve.tuning.procedure import tune
from flowsolve.tuning.result import Row, Tuning
from flowsolve.tuning.search import GENERIC, Generic
from flowsolve.tuning.trajectories import Trajectories, converged

__all__ = ["GENERIC", "Generic", "Row", "Trajectories", "Tuning", "converged", "tune"]
