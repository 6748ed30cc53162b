r"""The search over generic solvers: named ones and blends × named grids and bells, by successive halving.

All pairs are tried on a few samples, the better ones on more (Jamieson & Talwalkar 2016). Those that are left are
varied at random, the centre and width of a bell, its ends and the κ of a blend, as long as that helps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowsolve.fingerprint import spell
from flowsolve.grids import Arctan, Spacing
from flowsolve.paths import Path
from flowsolve.planning import plan
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.multistep import DEIS, IPNDM, DPMSolverPP, Multistep, UniPC
from flowsolve.tuning.trajectories import Trajectories, march, relative

__all__ = ["GENERIC", "Generic", "best", "candidates", "typical"]

GENERIC: tuple[Multistep, ...] = (
    DPMSolverPP(2), DPMSolverPP(3), DEIS(2), DEIS(3), UniPC(2), UniPC(3), UniPC(3, form="noise"), IPNDM(3, "straight"),
    Multistep(2, 0.15, 2), Multistep(2, 0.5, 2), Multistep(2, 1.0, 2), Multistep(2, 0.2, 2, rule="bh2"),
    Multistep(3, 0.3, 3), Multistep(3, 1.0, 3, variable="clock"), Multistep(4, 0.3, 4),
)  # fmt: skip
"""The solvers of the search."""
NAMED = ("karras", "log_snr", "uniform")
BELLS = ((1.0, 1.5, 3.8), (0.0, 2.5, 3.0), (-0.5, 2.8, 2.7), (1.0, 4.0, 3.8), (2.0, 6.0, 5.0), (-0.75, 4.1, 3.6))
SINCE = (-2.0, -3.0)
ROUNDS = ((2, 24), (8, 6), (24, 1))
"""Samples that are tried on, and pairs that are left, in each round."""
VARIED = 24


@dataclass(frozen=True)
class Generic:
    """A solver on a grid.

    Attributes:
        solver: the solver.
        grid: a spacing, or its name.
    """

    solver: Multistep
    grid: Any

    def times(self, flow: Any, nfe: int) -> tuple[float, ...] | None:
        """The nodes of N steps on a flow; None where there are no such."""
        try:
            return plan(self.solver, flow, (0.0, 1.0), self.grid, nfe).times
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{spell(self.solver)} on {self.grid if isinstance(self.grid, str) else spell(self.grid)}"


def typical(errors: Any) -> float:
    """The geometric mean of errors."""
    return math.exp(float(errors.clamp_min(1e-300).log().mean()))


def candidates(path: Path, nfe: int) -> list[Generic]:
    """All pairs that are tried: `Auto`'s first, the others shuffled, since time may be up before all are."""
    open_ = path.at(0.0).alpha == 0.0
    bells: list[Spacing | str] = [
        Arctan(since, until, center, width) for center, width, until in BELLS for since in (SINCE if open_ else (None,))
    ]
    pairs = [Generic(s, g) for g in (*NAMED, *bells) for s in GENERIC]
    random.Random(0).shuffle(pairs)
    chosen: Any = Auto().choose(path, nfe)
    return [Generic(*chosen), *pairs]


def best(
    data: Trajectories,
    nfe: int,
    tell: Callable[[str], object] = lambda text: None,
    late: Callable[[], bool] = lambda: False,
    seed: int = 0,
    kept: int = 4,
) -> list[tuple[float, Generic]]:
    """The best pairs on some trajectories, the best first, with their errors.

    Args:
        data: the trajectories.
        nfe: N, estimates.
        tell: is told the best so far.
        late: whether time is up, so that what is known must do.
        seed: of what is varied.
        kept: how many.
    """
    flow = data.flow

    def error(pair: Generic, times: Sequence[float], some: Trajectories) -> float:
        return typical(relative(march(pair.solver, flow, times, some.start, some.context), some.end))

    def tried(pairs: Sequence[Generic], samples: int) -> list[tuple[float, Generic]]:
        some, found = data.take(0, samples), []
        for pair in pairs:
            times = pair.times(flow, nfe)
            if times is not None:
                found.append((error(pair, times, some), pair))
            if late() and found:
                break
        return sorted(found, key=lambda entry: entry[0])

    pairs = candidates(flow.path, nfe)
    ranked: list[tuple[float, Generic]] = []
    for samples, left in ROUNDS:
        ranked = tried(pairs, samples)
        pairs = [pair for _, pair in ranked[: max(left, kept)]]
        tell(f"{ranked[0][0]:.3g} by {ranked[0][1]}")
        if late():
            break
    samples, source = min(ROUNDS[-1][0], len(data)), random.Random(seed)
    for pair in (p for p in _varied([p for _, p in ranked[:2]], source) if not late()):
        found = tried([pair], min(samples, ROUNDS[1][0]))
        if found and found[0][0] < 1.05 * ranked[0][0]:
            ranked = sorted([*ranked, *tried([pair], samples)], key=lambda entry: entry[0])
    tell(f"{ranked[0][0]:.3g} by {ranked[0][1]}")
    return ranked[:kept]


def _varied(pairs: Sequence[Generic], source: random.Random) -> Iterator[Generic]:
    """Pairs near some, at random."""
    for i in range(VARIED):
        pair = pairs[i % len(pairs)]
        grid, solver = pair.grid, pair.solver
        if isinstance(grid, Arctan):
            ends = {
                k: None if v is None else round(v + source.gauss(0.0, 0.5), 2)
                for k, v in (("since", grid.since), ("until", grid.until))
            }
            center, width = grid.center + source.gauss(0.0, 0.5), grid.width * 2.0 ** source.gauss(0.0, 0.5)
            grid = replace(grid, center=round(center, 2), width=round(width, 2), **ends)
        if isinstance(solver.form, float):
            solver = replace(solver, form=round(solver.form * 2.0 ** source.gauss(0.0, 0.5), 3))
        yield Generic(solver, grid)
