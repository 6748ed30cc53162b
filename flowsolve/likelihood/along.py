"""The likelihood along a curve: a solver of estimates lays it out, `flowsolve.likelihood.curve` reads it."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from flowsolve import grids
from flowsolve._arguments import state
from flowsolve._batch import Context, rows
from flowsolve.drivers import settle
from flowsolve.flow import Flow
from flowsolve.grids import At
from flowsolve.kernels import largest
from flowsolve.likelihood.curve import Curve, Rule, nodes
from flowsolve.likelihood.prior import MARGINAL, NORMAL, Prior, marginal_log_prob, normal_log_prob, stretch
from flowsolve.likelihood.result import LogProb, one_shape
from flowsolve.likelihood.trace import Trace, estimated, of_noise
from flowsolve.noise import Noise
from flowsolve.planning import at_least, unit, varies
from flowsolve.predictions import Estimate
from flowsolve.solution import Solution
from flowsolve.solvers.base import EstimateSolver, Query, State, Step
from flowsolve.streaming import Chunk

__all__ = ["BUDGET", "Along"]

BUDGET = 48
"""Evaluations, where none are asked for."""


def second_looks(budget: int) -> int:
    """How many of a budget's evaluations are second looks: up to 4, and none where nodes are few."""
    return min(4, max(0, budget - 8) // 3)


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
        shared: conditioning of all samples.
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
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        path = flow.path
        self.flow, self.solver, self.trace, self.prior, self.seed = flow, solver, trace, prior, seed
        self.graph, self.shared = graph, dict(shared or {})
        self.start, self.end = interval
        self.samples = self.start < self.end
        self.data_end, self.noise_end = max(interval), min(interval)
        # Ends without a log-SNR: sampling sets out from pure noise, and clean data are looked at where that can be.
        outset = self.samples and path.at(self.noise_end).alpha == 0.0
        clean = path.at(self.data_end)
        self.tip = clean.sigma == 0.0 and not flow.prediction.singular(clean)
        self.bare = (outset, self.tip) if self.samples else (self.tip, False)
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
        self.stops = [*[self.start] * self.bare[0], *inner, *[self.end] * self.bare[1]]
        self.intervals = list(zip(self.stops, self.stops[1:], counts, strict=False))
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
        steps = len(known) - 1 + sum(self.bare)
        least = steps * each + 1
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
        spend = budget - self.repeats - 1
        counts = self.solver.schedule(spend) if spend > 0 else []
        if len(counts) < 2 + sum(self.bare):
            raise ValueError(
                f"a budget of {budget} estimates, {self.repeats} of them second looks, leaves {len(counts)} steps; a "
                "likelihood along a curve needs three nodes, and 16 evaluations or more to be of use"
            )
        spent = counts[self.bare[0] : len(counts) - self.bare[1]]
        fine = nodes(self.flow.path, self.data_end, self.noise_end, sum(spent) + 1)
        if spacing is not None:
            fine = spacing.times(self.flow.path, fine[0], fine[-1], sum(spent))
        fine = fine[::-1] if self.samples else fine
        times = [fine[i] for i in accumulate(spent, initial=0)]
        return times[::-1] if self.samples else times, counts

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The states at the start."""
        x = state(chunk.x)
        self.shape = one_shape(x, self.shape)
        probes = self.trace.draw(x.detach(), Noise(self.seed, chunk.samples))
        cond = self.flow.conditioned({**self.shared, **chunk.cond}, len(x))
        return x, Context({"cond": cond, "probes": probes}, len(x))

    def ode(self) -> Any:
        """There is none."""
        raise TypeError("a likelihood along a curve is no ODE")

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The curve of a whole batch, read: a solution whose x are rows (ends of the curve, log p, error)."""
        tree = context.tree
        if not len(y):
            return self._solution(torch.cat((rows(y), rows(y), y.new_zeros(0, self.trace.count + 1)), 1), [], 0)
        nodes, price = set(self.rule.times), self.flow.cost if varies(self.flow) else _one
        walk, spent, tip = self._walk(y), cast(Any, 0), None
        x, data, trace = [], [], []
        query, begins = next(walk)
        while True:
            t = query.t
            if begins and t in nodes:
                estimate, found = self._ask(query.x, t, tree)
                x.append(rows(query.x))
                data.append(rows(estimate.data))
                trace.append(found)
            else:
                estimate = self.flow.estimate(query.x, t, **tree["cond"])
                tip = (rows(query.x), rows(estimate.noise)) if begins and t == self.data_end else tip
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
        read = self._read(curve, y, tip)
        seen = [largest(v.detach()) for v in curve.x.unbind(0)][order]
        return self._solution(read, seen, spent)

    def _walk(self, y: Tensor) -> Generator[tuple[Query, bool], Estimate, None]:
        """What the solver asks on its way, with whether a step begins there, and at its end."""
        path, first = self.flow.path, self.stops[0]
        y = y if first == self.start else y * float(path.alpha(first) / path.alpha(self.start))  # x/α is held
        step, now = self.solver.on(path, None, self.intervals), State(y)
        for interval in self.intervals:
            now = yield from _told(step(now, *interval))
        yield Query(now.x, self.stops[-1]), True

    def _ask(self, x: Tensor, t: Any, tree: Any) -> tuple[Estimate, Tensor]:
        """The estimate, and T of shape (B, count), by one call."""
        estimate, trace = estimated(self.flow, self.trace, x, t, self.flow.path.at(t), tree, self.graph)
        return estimate, of_noise(estimate, trace)

    def _looked(self, curve: Curve, shape: Any, tree: Any) -> tuple[Curve, list[Tensor]]:
        """The curve after the second looks, for the samples that they bring closer to a solution; and their times."""
        first, again = curve.worst(self.repeats), curve
        times, looked = torch.tensor(self.rule.times, dtype=torch.float64), []
        for k in (first + i for i in range(self.repeats)):
            x, t = again.approach(k), times[torch.from_numpy(k)]
            estimate, trace = self._ask(x.reshape(shape), t, tree)
            again = again.replaced(k, x, rows(estimate.data), trace)
            looked.append(t)
        return again.where(again.strayed() < curve.strayed(), curve), looked

    def _read(self, curve: Curve, y: Tensor, tip: tuple[Tensor, Tensor] | None) -> Tensor:
        """The ends of a curve, its density and the error of that, as the rows of `run`."""
        latent, base = self._at_noise(curve, y)
        first, size = self.rule.points[0], curve.x.shape[2]
        change = curve.change()
        value = base + change - size * math.log(first.alpha)  # of y at the last node, of x at the first
        sample, value = self._at_data(curve, y, value, tip)
        error = torch.full_like(value[:, :1], math.nan)
        if len(self.rule) > 4:
            halves = [curve.thinned(kept).change() for kept in self.rule.halved()]
            error = torch.stack([(change - half).mean(1, keepdim=True).abs() for half in halves]).amax(0)
        return torch.cat((latent, sample, value, error), 1)

    def _at_noise(self, curve: Curve, y: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the noise end, (B, D), and log p of y = x/α at the last node, (B, P)."""
        path, point, size = self.flow.path, self.rule.points[-1], curve.x.shape[2]
        noise, trace, sigma = curve.noise(len(self.rule) - 1), curve.trace[-1], float(point.sigma)
        lift = size * math.log(point.alpha)
        end = self.noise_end
        reached = self.rule.times[-1] == end
        latent = curve.x[-1]
        if not reached:  # α = 0 there: what is left of the way stretches ε̂
            mean = trace.mean(1, keepdim=True)
            latent = float(path.sigma(end)) * (noise * stretch(mean, size).sqrt() + 0.5 * self._lean(curve, mean))
        latent_x = latent.reshape(y.shape)
        if callable(self.prior):
            base = self.prior(latent_x).unsqueeze(1)
            if not reached:
                base = base - size * (0.5 * stretch(trace, size).log() + math.log(sigma / float(path.sigma(end))))
        elif self.prior == MARGINAL or not reached:
            leans = [(noise * self._lean(curve, v)).sum(1) for v in trace.split(1, 1)]
            base = marginal_log_prob(noise, trace, sigma, torch.stack(leans, 1))
        else:
            assert self.prior == NORMAL
            base = normal_log_prob(latent, path.prior_std).unsqueeze(1)
        return (rows(y) if self.samples else latent), base + lift

    def _lean(self, curve: Curve, trace: Tensor) -> Tensor:
        """(C − v) ε̂/s² at the last node, (B, D), for one estimate of T, (B, 1); see `flowsolve.likelihood.prior`."""
        last = len(self.rule) - 1
        before, here = (math.exp(-v) for v in self.rule.log_snr[-2:])
        along = curve.noise(last - 1) / before - curve.noise(last) / here
        v = here**2 * (stretch(trace, curve.x.shape[2]) - 1.0)
        return (curve.data[last - 1] - curve.data[last] - v * along) / (here * (here / before - 1.0))

    def _at_data(
        self, curve: Curve, y: Tensor, value: Tensor, tip: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The state at the data end, (B, D), and its log p, (B, P)."""
        first, there = self.rule.points[0], self.flow.path.at(self.data_end)
        if self.rule.times[0] == self.data_end:
            return curve.x[0], value
        if tip is None:
            noise = curve.noise(0)
            tip = (there.alpha * curve.data[0] if self.samples else rows(y)), torch.zeros_like(noise)
        return tip[0], value + curve.beyond(tip[0] / there.alpha, tip[1]) + tip[0].shape[1] * math.log(
            first.alpha / there.alpha
        )

    def _solution(self, found: Tensor, magnitudes: list[Tensor], spent: Any) -> Solution:
        """The solution whose x are such rows, with the largest numbers at the nodes in the order of the solve."""
        if not magnitudes:
            return settle(found, None, [], self.start, 0, 0)
        times = [*self.rule.times[:: -1 if self.samples else 1], self.end]
        looked = torch.stack([*magnitudes, largest(found[:, :-1].detach())])
        settled = settle(found, looked, times, self.start, 0, len(self.intervals))
        return replace(settled, nfe=settled.nfe + torch.as_tensor(spent))

    def leave(self, solution: Solution, context: Context) -> LogProb:
        """The parts of the rows that `run` gave."""
        size = math.prod(self.shape)
        latent, sample, values, error = solution.x.split((size, size, self.trace.count, 1), 1)
        latent, sample = latent.reshape(-1, *self.shape), sample.reshape(-1, *self.shape)
        solution = replace(solution, x=sample if self.samples else latent, nfe=solution.nfe * unit(self.flow))
        value = torch.where(solution.ok.to(values.device), values.mean(1), math.nan)
        stderr = self.trace.stderr(values.detach())
        return LogProb(value, stderr, error.detach().squeeze(1), solution.nfe, latent, sample, solution)


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
