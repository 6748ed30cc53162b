r"""One run of a plan, pulled along by a pipeline: it is handed the network's outputs, and says where to evaluate next.

A solver's step is a generator of queries (`flowsolve.solvers.base`); a pipeline's loop is what answers them. The sample
that a pipeline holds between two evaluations is the state of the next query.

**A sample that was changed** in between (a mask blended in, a callback) is taken as it comes: the estimate is that of
the changed state, for this is what the network saw. At the beginning of a step the step then sets out from there; what
a multistep method remembers of earlier estimates stays, but its corrector, which would undo the change, is left out
once. A sample that was not changed is not rounded either: the state between steps is kept in float32 at least, whatever
the pipeline computes in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowsolve._batch import state_dtype
from flowsolve.adapters.diffusers.layout import Plan
from flowsolve.noise import Noise
from flowsolve.predictions import Estimate, Row
from flowsolve.solvers.base import Query, State, Step, Stepper

__all__ = ["Run"]


class Run:
    """A solve under way.

    Args:
        plan: what is solved.
        at: the number of the evaluation that comes first, which begins a step.
        sample: the state there, shape (B, *S).
        noise: of the samples; None where the solver draws none.
        stepper: another step function than the plan's, with the same queries.

    Attributes:
        at: the number of the evaluation that comes next; None after the last.
    """

    def __init__(
        self, plan: Plan, at: int, sample: Tensor, noise: Noise | None, stepper: Stepper | None = None
    ) -> None:
        begin = at
        if at not in plan.begins and at + 1 in plan.begins and plan.times[at] == plan.times[at + 1]:
            begin = at + 1  # a step that was to be taken twice, by two entries at one time: the first does nothing
        elif at not in plan.begins:
            step = max(i for i, b in enumerate(plan.begins) if b <= at)
            raise ValueError(
                f"the solve would begin at entry {at} of timesteps, a stage within step {step}; expected the first "
                f"entry of a step, one of {list(plan.begins)} (multiples of order = {plan.solver.evaluations})"
            )
        self.plan, self.stepper = plan, stepper or plan.stepper
        self._query: Query
        self.at: int | None = at
        self._step = plan.begins.index(begin)
        self._waits = begin != at
        self._state = State(self._inside(sample), noise)
        self._given: tuple[Tensor, int | None] | None = None
        self._generator: Step | None = None
        self._enter(self._state.x)

    def advance(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The sample for the next evaluation, or the result; and ẑ from this one.

        Args:
            output: the network's, shape (B, *S).
            sample: what it was evaluated on, in the pipeline's dtype.
        """
        assert self.at is not None
        query, plan = self._query, self.plan
        if self._waits:
            self._waits, self.at = False, self.at + 1
            found = plan.reading.flow.read(query.x, output.to(query.x.dtype, copy=True), plan.points[self.at])
            return self._give(query.x, sample.dtype), found.data.to(sample.dtype)
        if self._changed(sample):
            x = self._inside(sample)
            if self.at in plan.begins:
                self._state = replace(self._state, origin=None)
                self._enter(x)
            query = self._query.about(x)
        found = plan.reading.flow.read(query.x, output.to(query.x.dtype, copy=True), plan.points[self.at])
        if plan.reading.limit is not None:
            found = Estimate(found.x, plan.reading.limit(found.data), found.point, Row(1.0, 0.0))
        data, self.at = found.data, self.at + 1
        if self._generator is None:
            assert plan.closing is not None
            x, self.at = found.combine(plan.closing.data, plan.closing.noise), None
        else:
            try:
                self._query = self._generator.send(found)
            except StopIteration as stop:
                self._state, self._step = stop.value, self._step + 1
                if self.at == len(plan.times):
                    self.at = None
                else:
                    self._enter(None)
            x = self._state.x if self.at is None else self._query.x
        return self._give(x, sample.dtype), data.to(sample.dtype)

    def _enter(self, x: Tensor | None) -> None:
        """Begin the step that comes, from the state; or so that its first query is about x."""
        plan = self.plan
        if self._step == len(plan.intervals):
            self._generator = None
            if x is not None:
                self._state = replace(self._state, x=x)
            self._query = Query(self._state.x, plan.times[-1])
            return
        interval = plan.intervals[self._step]
        if x is not None:
            self._state = replace(self._state, x=x)
        self._generator = self.stepper(self._state, *interval)
        self._query = next(self._generator)
        t, asked = interval[0], float(self._query.t)
        if x is not None and asked != t:  # a solver that goes elsewhere first, by a factor and noise of its own
            ratio = plan.reading.path.alpha(t) / plan.reading.path.alpha(asked)
            self._state = replace(self._state, x=self._state.x + ratio * (x - self._query.x))
            self._generator = self.stepper(self._state, *interval)
            self._query = next(self._generator)

    def _inside(self, sample: Tensor) -> Tensor:
        """A pipeline's sample as a state."""
        x, shown = _kept(sample), self.plan.shown(self.at)
        return x if shown == 1.0 else x.div_(shown)

    def _give(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as the pipeline is shown it and in its dtype, a tensor of its own."""
        if (shown := self.plan.shown(self.at)) != 1.0:
            x = x * shown
        given = x.to(dtype, copy=True)
        self._given = given, None if given.is_inference() else given._version
        self._copy = x
        return given

    def _changed(self, sample: Tensor) -> bool:
        """Whether a sample is not what was given out last."""
        if self._given is None:
            return False
        given, version = self._given
        if sample is given and version is not None:
            return bool(given._version != version)
        kept = self._copy.to(sample.dtype)
        return sample.shape != kept.shape or not torch.equal(sample, kept)


def _kept(sample: Tensor) -> Tensor:
    """A pipeline's sample as a state: a copy, since what the pipeline does to its own later is its affair.

    (For the same reason a run keeps copies of the network's outputs, which may lie in a buffer.)
    """
    return sample.to(state_dtype(sample), copy=True)
