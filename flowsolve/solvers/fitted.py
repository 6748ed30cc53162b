r"""Solvers fitted to one checkpoint: a multistep method on its own times, with corrections of every step.

A step of a multistep solver with a corrector is linear in the state and in all estimates so far. A fitted step is the
step of a generic solver, and beside it a combination of the estimates with weights of its own,

$$ x_{n+1} = G_n(x_n;\ \hat z_n, \hat\varepsilon_n, \dots)
   + \sum_{j \ge 0} \bigl(a_{nj}\,\hat z_{n-j} + b_{nj}\,\hat\varepsilon_{n-j}\bigr), $$

so that the weights say how far the fitted solver is from the generic one, and with a = b = 0 is that one to the bit.
Since $x_j = \alpha_j\hat z_j + \sigma_j\hat\varepsilon_j$ at the states where the network was asked, every linear
multistep method on these times is of this form ("non-stationary solvers": Shaul et al. 2024). `flowsolve.tuning` says
where times and weights come from.

A solve that sets out within the times (a pipeline that begins with an image) has no history; until it has as many
estimates as a row of weights wants, its steps are the generic solver's.

**Whose it is.** A `Fitted` solver carries the marks of the checkpoint that it was fitted to (`flowsolve.fingerprint`),
and refuses every other. A scheduler sees no network: there the path alone is compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path as File
from typing import Any

from torch import Tensor

from flowsolve.charts import Chart
from flowsolve.fingerprint import marks
from flowsolve.flow import Flow
from flowsolve.grids import At, Spacing
from flowsolve.paths import Path
from flowsolve.predictions import Estimate
from flowsolve.solvers import multistep
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import EstimateSolver, Past, State, Step, Stepper
from flowsolve.solvers.exponential import refuse_chart
from flowsolve.solvers.multistep import Multistep

__all__ = ["Fitted", "Tuned", "content", "entry", "load", "sealed"]

FORMAT, VERSION = "flowsolve tuned solver", 1
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Fitted(EstimateSolver):
    """A multistep solver on times of its own, with corrections of every step.

    Attributes:
        base: the generic solver, without noise and with warmup="ramp".
        times: the flow times of its N + 1 nodes, from noise to data.
        data: for each step the weights a of ẑ, those of the latest estimate first; rows may be shorter than the history
            or absent.
        noise: the weights b of ε̂, as many.
        marks: of the checkpoint, as (what, digest); none for any checkpoint.

    Raises:
        ValueError: times that do not rise within [0, 1], or weights that are not finite or not for these times.
        TypeError: another kind of base.
    """

    base: Multistep
    times: tuple[float, ...]
    data: Rows = ()
    noise: Rows = ()
    marks: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.base, Multistep) or self.base.random or self.base.warmup != "ramp":
            raise TypeError(f"base = {self.base!r}; expected a Multistep solver without noise, with warmup='ramp'")
        times = self.times
        if len(times) < 2 or not all(a < b for a, b in pairwise(times)) or not 0.0 <= times[0] <= times[-1] <= 1.0:
            raise ValueError(f"times = {list(times)}; expected at least 2 rising flow times in [0, 1]")
        sizes = [len(row) for row in self.data], [len(row) for row in self.noise]
        if sizes[0] != sizes[1] or len(self.data) not in (0, self.steps):
            raise ValueError(f"weights for {len(self.data)} and {len(self.noise)} steps; expected {self.steps} or none")
        if any(size > n + 1 for n, size in enumerate(sizes[0])):
            raise ValueError(f"a row of weights is longer than the history of its step: {sizes[0]}")
        if not all(math.isfinite(v) for row in (*self.data, *self.noise) for v in row):
            raise ValueError("a weight is not finite; expected finite numbers")

    def __repr__(self) -> str:
        return f"Fitted({type(self.base).__name__} in {self.steps} steps, {self._name})"

    @property
    def steps(self) -> int:
        """N, the steps, each of one evaluation."""
        return len(self.times) - 1

    @property
    def own_times(self) -> tuple[float, ...]:
        """The times of the nodes."""
        return self.times

    @cached_property
    def _name(self) -> str:
        content = repr([getattr(self, f.name) for f in fields(self)])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def require(self, flow: Flow, chart: Chart | None, t: float, *, asks: bool) -> None:
        """Raise ValueError unless the flow is the checkpoint's, and may be asked at flow time t."""
        super().require(flow, chart, t, asks=asks)
        if not self.marks:
            return
        found, mine = marks(flow), dict(self.marks)
        if other := [what for what, digest in found.items() if mine.get(what) != digest]:
            raise ValueError(
                f"{self!r} was fitted to a checkpoint with another {other[0]} ({mine.get(other[0])}) than {flow!r} has "
                f"({found[other[0]]}). Tune it anew (fs.tune, or `flowsolve tune`), or, if this one will do, "
                "fs.solvers.load(file, any_checkpoint=True)"
            )

    def on(self, path: Path, chart: Chart | None, grid: Sequence[tuple[float, float, int]] = ()) -> Stepper:
        """The step function of this solver on a path; it takes no chart, and no other times.

        Raises:
            ValueError: other times.
        """
        refuse_chart(self, chart)
        intervals = [(a, b, 1) for a, b in pairwise(self.times)]
        at = {t: n for n, (t, _, _) in enumerate(intervals)}
        if any(interval != intervals[at.get(interval[0], 0)] for interval in map(tuple, grid)):
            raise ValueError(
                f"{self!r} is fitted to the times {[round(t, 4) for t in self.times]}, on the way to the data; drop "
                "grid=, interval= and final="
            )
        inner, depth = self.base.on(path, None, intervals), max([len(row) for row in self.data], default=1) - 1

        def step(state: State, t: float, t_next: float, evaluations: int) -> Step:
            n, (seen, rest) = at[t], _parted(state.past)
            generator = inner(replace(state, past=rest), t, t_next, 1)
            estimate = yield next(generator)
            try:
                generator.send(estimate)
            except StopIteration as stop:
                after: State = stop.value
            x = self.corrected(n, after.x, estimate, seen)
            if depth:
                seen = (Past(t, estimate.data), Past(t, estimate.noise), *seen)[: 2 * depth]
            return replace(after, x=x, past=(*seen, *after.past))

        return step

    def corrected(self, n: int, x: Tensor, estimate: Estimate, seen: Sequence[Past]) -> Tensor:
        """Where the generic step n leads, with the combination of the estimates."""
        row = list(zip(self.data[n], self.noise[n], strict=True)) if self.data else []
        if 2 * (len(row) - 1) > len(seen):
            return x
        for j, weights in enumerate(row):
            if j == 0 and any(weights):
                x = x + estimate.combine(*weights)
            for i, w in enumerate(weights if j else ()):
                x = x.add(seen[2 * (j - 1) + i].value, alpha=w) if w else x
        return x


def _parted(past: tuple[Past, ...]) -> tuple[tuple[Past, ...], tuple[Past, ...]]:
    """What a fitted solver remembers, two values at each time, and behind it what its base does, one at each."""
    end = 0
    while end + 1 < len(past) and past[end].t == past[end + 1].t:
        end += 2
    return past[:end], past[end:]


@dataclass(frozen=True)
class Tuned(Auto):
    """What was fitted to one checkpoint, a solver for each of some budgets; chooses as `Auto` does.

    Attributes:
        fits: the solvers.

    Raises:
        ValueError: none, or two for one budget.
    """

    eta: float = 0.0
    fits: tuple[Fitted, ...] = ()

    def __post_init__(self) -> None:
        if self.eta:
            raise ValueError(f"eta = {self.eta!r}; tuned solvers are of the ODE, eta = 0")
        budgets = [fit.steps for fit in self.fits]
        if not budgets or len({*budgets}) < len(budgets):
            raise ValueError(f"fits of budgets {budgets}; expected one for each of at least one budget")

    def choose(self, path: Path, nfe: int | None) -> tuple[Fitted, Spacing | None]:
        """The solver of a budget, and its times; without a budget the only one that there is."""
        known = {fit.steps: fit for fit in self.fits}
        if nfe is None and len(known) == 1:
            nfe = next(iter(known))
        if nfe not in known:
            listed = ", ".join(map(str, sorted(known)))
            raise ValueError(
                f"nfe = {nfe} with a solver that was tuned for {listed} estimates; give one of these, or tune it for "
                f"{nfe} too"
            )
        times: Any = At(t=known[nfe].times)
        return known[nfe], times


def load(file: str | PathLike[str], *, any_checkpoint: bool = False) -> Tuned:
    """The solvers of a file that `fs.tune` or `flowsolve tune` made: `fs.sample(flow, shape, solver=…, nfe=…)`.

    Args:
        file: the JSON file.
        any_checkpoint: use them with any checkpoint on a path that has their times; otherwise one that they were not
            fitted to is refused when they are used.

    Raises:
        ValueError: another kind of file, or one that was changed after it was written.
        OSError: the file cannot be read.
    """
    told = content(file)
    own = () if any_checkpoint else tuple(sorted(told["fingerprint"].items()))
    try:
        return Tuned(fits=tuple(_fitted(entry, own) for entry in told["solvers"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} holds no solver that this version knows: {error}") from error


def content(file: str | PathLike[str]) -> dict[str, Any]:
    """All that a file of tuned solvers says, if it is one and unchanged.

    Raises:
        ValueError: another kind of file, or one that was changed.
    """
    try:
        told = json.loads(File(file).read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's or UTF-8's
        raise ValueError(f"{str(file)!r} is no JSON ({error}); expected a file that fs.tune(…).save wrote") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(f"{str(file)!r} holds no tuned solver; expected a file that fs.tune(…).save wrote")
    if told.get("version") != VERSION:
        raise ValueError(f"{str(file)!r} is of version {told.get('version')!r}; this one reads {VERSION}")
    if sealed(told) != told:
        raise ValueError(f"{str(file)!r} was changed after it was written: its seal does not fit; tune it anew")
    return told


def sealed(told: dict[str, Any]) -> dict[str, Any]:
    """What a file says, with the digest of it by which a change is seen (this protects from accidents, not malice)."""
    said = {"format": FORMAT, "version": VERSION, **{k: v for k, v in told.items() if k != "seal"}}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return {**said, "seal": hashlib.sha256(text.encode()).hexdigest()}


def entry(fit: Fitted) -> dict[str, Any]:
    """A solver as JSON can hold it, to the bit."""
    base = {"class": type(fit.base).__name__, **{f.name: getattr(fit.base, f.name) for f in fields(fit.base)}}
    return {
        "nfe": fit.steps, "base": base, "times": list(fit.times), "data": [list(row) for row in fit.data],
        "noise": [list(row) for row in fit.noise],
    }  # fmt: skip


def _fitted(told: dict[str, Any], own: tuple[tuple[str, str], ...]) -> Fitted:
    base = {k: v for k, v in told["base"].items() if k != "class"}
    kind = getattr(multistep, told["base"]["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, Multistep)):
        raise ValueError(f"{told['base']['class']!r} is no multistep solver of flowsolve")
    rows = {k: tuple(tuple(float(v) for v in row) for row in told[k]) for k in ("data", "noise")}
    return Fitted(kind(**base), tuple(float(t) for t in told["times"]), marks=own, **rows)
