"""The likelihood along a curve: a solver of estimates lays it out, `flowsolve.likelihood.curve` reads it."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from flowsolve import grids
from flowsolve._arguments import state
from flowsolve._batch import Context, hosted, rows
from flowsolve.capture import require_cuda
from flowsolve.drivers import settle
from flowsolve.flow import Flow
from flowsolve.grids import At
from flowsolve.kernels import largest
from flowsolve.likelihood.curve import Curve, Rule, nodes
from flowsolve.likelihood.ends import Stretch, Tip
from flowsolve.likelihood.joint import recorder
from flowsolve.likelihood.prior import MARGINAL, Prior, marginal_log_prob, normal_log_prob
from flowsolve.likelihood.prior import stretch as wide
from flowsolve.likelihood.result import LogProb, one_shape
from flowsolve.likelihood.trace import Trace, estimated, of_noise
from flowsolve.likelihood.visible import verify
from flowsolve.noise import Noise
from flowsolve.planning import at_least, unit, varies
from flowsolve.predictions import Estimate
from flowsolve.solution import Solution
from flowsolve.solvers.base import EstimateSolver, Query, State, Step
from flowsolve.solvers.multistep import Multistep
from flowsolve.streaming import Chunk

__all__ = ["BUDGET", "Along", "automatic"]

BUDGET = 48
"""Evaluations, where none are asked for."""
CORRECTED = 64
"""Evaluations from which steps are corrected."""


def automatic(nfe: int | None) -> Multistep:
    """The solver of a budget: data-form multistep of order 3, with a corrector in its warm-up or beyond it.

    The first steps set out from the data, where the field of images bends most, and what they miss all later states
    inherit. A corrector throughout takes the order from 3 to 4, whatever the field; on long steps it follows the
    extrapolation away from states that settle between modes, which the second integral of the curve mends at order 3.
    """
    return Multistep(3, corrector=3) if nfe is not None and nfe >= CORRECTED else Multistep(3, warmup="corrected")


def second_looks(budget: int) -> int:
    """How many of a budget's evaluations are second looks: up to 3, and none where nodes are few."""
    return min(3, max(0, budget - 8) // 3)


class Along:
    """The log-density of states, or of the samples it makes, from a fixed number of evaluations; a streaming `Job`.

    Args:
        flow: the flow.
        interval: flow times from and to. From data to noise: the density of given states. From noise to data: states
            at the noise become samples.
        solver: of estimates, drawing no noise.
        trace: the estimator.
        prior: what `flowsolve.likelihood.prior.resolve` gave.
        seed: key of the probes.
        nfe: network evaluations a sample.
        grid: the nodes, as a spacing of `flowsolve.grids` or explicit times; by default `curve.nodes`.
        repeats: how many of the evaluations are second looks; by default those of `second_looks`.
        graph: keep derivatives.
        capture: record an evaluation on CUDA.
    """

    gradient = "direct"

    def __init__(
        self,
        flow: Flow,
        interval: tuple[float, float],
        *,
        solver: EstimateSolver,
        trace: Trace,
        prior: Prior,
        seed: int = 0,
        nfe: int | None = None,
        grid: Any = None,
        repeats: int | None = None,
        graph: bool = False,
        capture: bool = False,
    ) -> None:
        path = flow.path
        self.record = recorder(flow, graph, solver) if capture else None
        self.flow, self.solver, self.trace, self.prior, self.seed = flow, solver, trace, prior, seed
        self.graph = graph
        self.start, self.end = interval
        self.samples = self.start < self.end
        self.data_end, self.noise_end = max(interval), min(interval)
        # Ends without a log-SNR lie beyond the nodes; each takes one evaluation where the prediction tells something.
        beyond = {t: path.at(t).alpha == 0.0 or path.at(t).sigma == 0.0 for t in interval}
        if not self.samples and prior == MARGINAL:
            beyond[self.noise_end] = False  # it is what stands for the way to pure noise
        ends = [t for t in interval if beyond[t]]
        self.bare = sum(not flow.prediction.singular(path.at(t)) for t in ends)
        self.shape: tuple[int, ...] = ()  # of a sample, learnt from the first
        budget = at_least(nfe, flow)
        laid = None if grid is None else grids.resolve(grid)
        laid = laid.on(path) if isinstance(laid, At) else laid
        if budget is None and not isinstance(laid, list):
            budget = BUDGET
        times, counts = (
            self._given(laid, budget, repeats) if isinstance(laid, list) else self._laid(laid, budget, repeats)
        )
        self.rule = Rule(path, times)
        inner = times[::-1] if self.samples else times
        self.stops = list(inner)
        self.intervals = list(zip(inner, inner[1:], counts, strict=False))
        towards = {self.data_end: times[:2], self.noise_end: times[:-3:-1]}
        self.opening, self.closing = (Stretch(flow, t, towards[t]) if beyond[t] else None for t in interval)
        if self.opening is not None and not self.opening.clean:
            flow.require(self.start, "the likelihood's grid")
        if self.repeats >= len(times):
            raise ValueError(f"repeats = {self.repeats} for {len(times)} nodes; expected fewer second looks than nodes")
        for t in self.stops:
            flow.require(t, "the likelihood's grid")
            solver.require(flow, None, t, asks=True)

    def _given(self, times: list[float], budget: int | None, repeats: int | None) -> tuple[list[float], list[int]]:
        """Explicit times, from data to noise, and the evaluations of each step."""
        path = self.flow.path
        ends = [t for t in (self.data_end, self.noise_end) if path.at(t).alpha > 0.0 and path.at(t).sigma > 0.0]
        missing = [t for t in ends if t not in times]
        if missing or not all(self.noise_end <= t <= self.data_end for t in times):
            raise ValueError(
                f"grid = {times!r} on the interval {(self.start, self.end)!r}; expected times within it, among them "
                f"{' and '.join(f't = {t:g}' for t in missing) or 'its ends'}"
            )
        known = sorted((t for t in times if path.at(t).alpha > 0.0 and path.at(t).sigma > 0.0), reverse=True)
        each = self.solver.evaluations
        steps = len(known) - 1
        least = steps * each + 1 + self.bare
        self.repeats = _whole(repeats, (0 if budget is None else budget - least) if repeats is None else repeats)
        if self.repeats < 0 or budget not in (None, least + self.repeats):
            raise ValueError(
                f"nfe buys {budget} estimates; the {len(known)} times given where the log-SNR is finite take {least}, "
                f"and {max(self.repeats, 0)} are second looks. Drop nfe= or grid="
            )
        return known, [each] * steps

    def _laid(self, spacing: Any, budget: int | None, repeats: int | None) -> tuple[list[float], list[int]]:
        """Times from data to noise for a budget, and the evaluations of each step in the order of the solve."""
        assert budget is not None
        self.repeats = _whole(repeats, second_looks(budget) if repeats is None else repeats)
        spend = budget - self.repeats - 1 - self.bare
        counts = self.solver.schedule(spend) if spend > 0 else []
        if len(counts) < 2:
            raise ValueError(
                f"a budget of {budget} estimates, {self.repeats} of them second looks, leaves {len(counts)} steps; a "
                "likelihood along a curve needs three nodes, and 16 evaluations or more to be of use"
            )
        fine = nodes(self.flow.path, self.data_end, self.noise_end, sum(counts) + 1)
        if spacing is not None:
            fine = spacing.times(self.flow.path, fine[0], fine[-1], sum(counts))
        fine = fine[::-1] if self.samples else fine
        times = [fine[i] for i in accumulate(counts, initial=0)]
        return times[::-1] if self.samples else times, counts

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The states at the start."""
        x = state(chunk.x)
        self.shape = one_shape(x, self.shape)
        verify(self.flow, self.trace, chunk, (self.start, self.end))
        probes = self.trace.draw(x.detach(), Noise(self.seed, chunk.samples))
        cond = self.flow.conditioned(chunk.cond, len(x))
        return x, Context({"cond": cond, "probes": probes}, len(x))

    def pursuer(self, arrivals: Any, **options: Any) -> Any:
        """There is none."""
        raise TypeError("a likelihood along a curve is no ODE")

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The curve of a whole batch, read: a solution whose x are rows (ends of the curve, log p, error)."""
        if self.record is not None:
            require_cuda(y)
        tree = context.tree
        if not len(y):
            return self._solution(torch.cat((rows(y), rows(y), y.new_zeros(0, self.trace.count + 1)), 1), [], 0)
        nodes, price = set(self.rule.times), self.flow.cost if varies(self.flow) else _one
        spent, opening = cast(Any, 0), None
        first: tuple[Estimate, Tensor] | None = None
        if self.opening is not None:
            opening, first = self._opened(self.opening, y, tree)
            spent = price(self.start) if self.opening.seen else 0
        walk = self._walk(y if first is None else first[0].x.reshape(y.shape))
        x, data, trace = [], [], []
        query, begins = next(walk)
        while True:
            t = query.t
            if begins and t in nodes:
                estimate, found = self._ask(query.x, t, tree) if first is None else first
                first = None
                x.append(rows(query.x))
                data.append(rows(estimate.data))
                trace.append(found)
            else:
                estimate = self.flow.estimate(query.x, t, **tree["cond"])
            spent = spent + price(t)
            try:
                query, begins = walk.send(estimate)
            except StopIteration:
                break
        order = slice(None, None, -1 if self.samples else 1)
        curve = Curve(self.rule, *(torch.stack(v[order]) for v in (x, data, trace)))
        if self.repeats:
            curve, extra = self._looked(curve, y.shape, tree)
            spent = spent + sum(price(t) for t in extra)
        closing = None
        if self.closing is not None and self.closing.seen:
            there = self.closing.left(curve, None) * self.closing.scale
            closing = self._tip(self.closing, there.reshape(y.shape), tree)
            spent = spent + price(self.end)
        read = self._read(curve, y, opening, closing)
        seen = [largest(v.detach()) for v in curve.x.unbind(0)][order]
        return self._solution(read, seen, spent)

    def _opened(self, stretch: Stretch, y: Tensor, tree: Any) -> tuple[Tip | None, tuple[Estimate, Tensor]]:
        """What the end tells where the solve sets out, and the first node: its estimate and T."""
        tip = self._tip(stretch, y, tree) if stretch.seen else None
        t, set_out = self.stops[0], rows(y) / stretch.scale
        ahead = set_out if tip is None else set_out + stretch.width * tip[0]
        estimate, found = self._ask((ahead * stretch.near).reshape(y.shape), t, tree)
        reached = stretch.entered(set_out, None if tip is None else tip[0], stretch.slope(estimate))
        x = (reached * stretch.near).reshape(y.shape)
        return tip, (self.flow.read(x, estimate.output, estimate.point), found)

    def _tip(self, stretch: Stretch, x: Tensor, tree: Any) -> Tip:
        """What the end of a stretch tells at a state there."""
        point = self.flow.path.at(stretch.t)
        estimate, trace = estimated(self.flow, self.trace, x, stretch.t, point, tree, self.graph, self.record)
        return stretch.slope(estimate), stretch.divergence(estimate, trace, math.prod(x.shape[1:]))

    def _walk(self, y: Tensor) -> Generator[tuple[Query, bool], Estimate, None]:
        """What the solver asks on its way from the first node, with whether a step begins there, and at its end."""
        step, now = self.solver.on(self.flow.path, None, self.intervals), State(y)
        for interval in self.intervals:
            now = yield from _told(step(now, *interval))
        yield Query(now.x, self.stops[-1]), True

    def _ask(self, x: Tensor, t: Any, tree: Any) -> tuple[Estimate, Tensor]:
        """The estimate, and T of shape (B, count), by one call."""
        point = self.flow.path.at(t)
        estimate, trace = estimated(self.flow, self.trace, x, t, point, tree, self.graph, self.record)
        return estimate, of_noise(estimate, trace)

    def _looked(self, curve: Curve, shape: Any, tree: Any) -> tuple[Curve, list[Tensor]]:
        """The curve after the second looks, for the samples that they bring closer to a solution; and their times."""
        first, again = curve.worst(self.repeats), curve
        times, looked = torch.tensor(self.rule.times, dtype=torch.float64, device="cpu"), []
        for k in (first + i for i in range(self.repeats)):
            x, t = again.approach(k), times[torch.from_numpy(k)]
            estimate, trace = self._ask(x.reshape(shape), t, tree)
            again = again.replaced(k, x, rows(estimate.data), trace)
            looked.append(t)
        return again.where(again.strayed() < curve.strayed(), curve), looked

    def _read(self, curve: Curve, y: Tensor, opening: Tip | None, closing: Tip | None) -> Tensor:
        """The ends of a curve, its density and the error of that, as the rows of `run`."""
        at_noise = (self.opening, opening) if self.samples else (self.closing, closing)
        at_data = (self.closing, closing) if self.samples else (self.opening, opening)
        tip = at_data[1]
        curve = curve if tip is None else replace(curve, residue=tip[0])
        latent, base, loose = self._at_noise(curve, y, *at_noise)
        first, size = self.rule.points[0], curve.x.shape[2]
        change = curve.change()
        value = base + change - size * math.log(first.alpha)  # of y at the last node, of x at the first
        sample, value, slack = self._at_data(curve, y, value, *at_data)
        error = curve.error
        return torch.cat((latent, sample, value, error + loose + slack), 1)

    def _at_noise(
        self, curve: Curve, y: Tensor, stretch: Stretch | None, tip: Tip | None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The state at the noise end, (B, D), log p of y = x/α at the last node, (B, P), and the error on the way."""
        point, size = self.rule.points[-1], curve.x.shape[2]
        outer, gained, loose = None if tip is None else tip[0], cast(Any, 0.0), cast(Any, 0.0)
        latent, lift = curve.x[-1], size * math.log(point.alpha)
        if stretch is not None:
            latent = stretch.scale * stretch.left(curve, outer)
            gained, loose = stretch.gained(curve, None if tip is None else tip[1])
            lift = size * math.log(stretch.scale * stretch.width)
        if callable(self.prior):
            base = self.prior(latent.reshape(y.shape)).unsqueeze(1)
        elif self.prior == MARGINAL and stretch is None:
            noise, trace = curve.noise(len(self.rule) - 1), curve.trace[-1]
            leans = [(noise * self._lean(curve, v)).sum(1) for v in trace.split(1, 1)]
            base = marginal_log_prob(noise, trace, float(point.sigma), torch.stack(leans, 1))
        else:
            base = normal_log_prob(latent, self.flow.path.prior_std).unsqueeze(1)
        # A second look may have moved the curve off the sample's noise, on which its density is read.
        return rows(y) if self.samples else latent, base + lift - gained, loose

    def _lean(self, curve: Curve, trace: Tensor) -> Tensor:
        """(C − v) ε̂/s² at the last node, (B, D), for one estimate of T, (B, 1); see `flowsolve.likelihood.prior`."""
        last = len(self.rule) - 1
        before, here = (math.exp(-v) for v in self.rule.log_snr[-2:])
        along = curve.noise(last - 1) / before - curve.noise(last) / here
        v = here**2 * (wide(trace, curve.x.shape[2]) - 1.0)
        return (curve.data[last - 1] - curve.data[last] - v * along) / (here * (here / before - 1.0))

    def _at_data(
        self, curve: Curve, y: Tensor, value: Tensor, stretch: Stretch | None, tip: Tip | None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The state at the data end, (B, D), its log p, (B, P), and the error on the way there."""
        if stretch is None:
            return curve.x[0], value, 0.0
        outer, trace = (None, None) if tip is None else tip
        sample = stretch.scale * stretch.left(curve, outer) if self.samples else rows(y)
        gained, loose = stretch.gained(curve, trace)
        lift = sample.shape[1] * math.log(stretch.near / stretch.scale)
        return sample, value + gained + lift, loose

    def _solution(self, found: Tensor, magnitudes: list[Tensor], spent: Any) -> Solution:
        """The solution whose x are such rows, with the largest numbers at the nodes in the order of the solve."""
        if not magnitudes:
            return settle(found, None, [], self.start, 0, 0)
        times = [*self.rule.times[:: -1 if self.samples else 1], self.end]
        looked = torch.stack([*magnitudes, largest(found[:, :-1].detach())])
        settled = settle(found, looked, times, self.start, 0, len(self.intervals))
        return replace(settled, nfe=settled.nfe + hosted(spent))

    def leave(self, solution: Solution, context: Context) -> LogProb:
        """The parts of the rows that `run` gave."""
        size = math.prod(self.shape)
        if not len(solution.x):  # nothing was run, and what there is has no rows
            solution = replace(solution, x=solution.x.new_zeros(0, 2 * size + self.trace.count + 1))
        latent, sample, values, error = solution.x.split((size, size, self.trace.count, 1), 1)
        latent, sample = latent.reshape(-1, *self.shape), sample.reshape(-1, *self.shape)
        solution = replace(solution, x=sample if self.samples else latent, nfe=solution.nfe * unit(self.flow))
        value = torch.where(solution.ok.to(values.device), values.mean(1), math.nan)
        stderr = self.trace.stderr(values.detach())
        return LogProb(
            value, stderr, error.detach().squeeze(1), solution.nfe, latent, sample, solution, self.trace.count
        )


def _told(step: Step) -> Generator[tuple[Query, bool], Estimate, State]:
    """The queries of a step, with which of them is the first."""
    try:
        query, begins = next(step), True
        while True:
            estimate = yield query, begins
            query, begins = step.send(estimate), False
    except StopIteration as stop:
        state: State = stop.value
        return state


def _one(t: Any) -> int:
    """The cost of an estimate where all cost the same."""
    return 1


def _whole(given: int | None, repeats: int) -> int:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise ValueError(f"repeats = {given!r}; expected an integer >= 0")
    return repeats
