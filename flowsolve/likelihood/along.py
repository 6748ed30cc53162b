"""The likelihood along a curve: a solver of estimates lays it out, `flowsolve.likelihood.curve` reads it."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

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
from flowsolve.planning import estimates
from flowsolve.predictions import Estimate
from flowsolve.solution import Solution
from flowsolve.solvers.base import EstimateSolver, Query, State
from flowsolve.streaming import Chunk

__all__ = ["BUDGET", "Along"]

BUDGET = 48
"""Evaluations, where none are asked for."""
SHARE = 8
"""One evaluation in so many is a second look."""


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
        repeats: how many of the evaluations are second looks; by default an eighth.
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
        self.bare = self.samples and path.at(self.start).alpha == 0.0
        self.shape: tuple[int, ...] = ()  # of a sample, learnt from the first
        budget = estimates(nfe, flow)
        laid = None if grid is None else grids.resolve(grid)
        laid = laid.on(path) if isinstance(laid, At) else laid
        if budget is None and not isinstance(laid, list):
            budget = BUDGET
        times, counts = (
            self._given(laid, budget, repeats) if isinstance(laid, list) else self._laid(laid, budget, repeats)
        )
        self.rule = Rule(path, times)
        self.stops = [*[self.start] * self.bare, *(times[::-1] if self.samples else times)]
        self.intervals = list(zip(self.stops, self.stops[1:], counts, strict=False))
        self.cost = sum(counts) + 1 + self.repeats
        for t in self.stops:
            flow.require(t, "the likelihood's grid")
            solver.require(flow, None, t, asks=True)

    def _given(self, times: list[float], budget: int | None, repeats: int | None) -> tuple[list[float], list[int]]:
        """Explicit times, from data to noise, and the evaluations of each step."""
        path = self.flow.path
        known = sorted((t for t in times if path.at(t).alpha > 0.0 and path.at(t).sigma > 0.0), reverse=True)
        each = self.solver.evaluations
        least = (len(known) - 1 + self.bare) * each + 1
        self.repeats = _whole(repeats, (0 if budget is None else budget - least) if repeats is None else repeats)
        if self.repeats < 0 or budget not in (None, least + self.repeats):
            raise ValueError(
                f"nfe buys {budget} estimates; the {len(known)} times given where the log-SNR is finite take {least}, and "
                f"{max(self.repeats, 0)} are second looks. Drop nfe= or grid="
            )
        return known, [each] * (len(known) - 1 + self.bare)

    def _laid(self, spacing: Any, budget: int | None, repeats: int | None) -> tuple[list[float], list[int]]:
        """Times from data to noise for a budget, and the evaluations of each step in the order of the solve."""
        assert budget is not None
        self.repeats = _whole(repeats, budget // SHARE if repeats is None else repeats)
        spend = budget - self.repeats - 1
        counts = self.solver.schedule(spend) if spend > 0 else []
        if spend < 2 or len(counts) < 2 + self.bare:
            raise ValueError(
                f"a budget of {budget} estimates, {self.repeats} of them second looks, leaves {max(len(counts), 0)} steps; a "
                "likelihood along a curve needs three nodes, and 16 evaluations or more to be of use"
            )
        path, (data, noise) = self.flow.path, (max(self.start, self.end), min(self.start, self.end))
        spent = counts[1:] if self.bare else counts
        fine = nodes(path, data, noise, sum(spent) + 1)
        if spacing is not None:
            fine = spacing.times(path, fine[0], fine[-1], sum(spent))
        fine = fine[::-1] if self.samples else fine
        times = [fine[i] for i in accumulate(spent, initial=0)]
        return times[::-1] if self.samples else times, counts

    def enter(self, chunk: Chunk) -> tuple[Tensor, Context]:
        """The states at the start."""
        x = state(chunk.x)
        self.shape = one_shape(x, self.shape)
        probes = self.trace.draw(x.detach(), Noise(self.seed, chunk.samples))
        return x, Context({"cond": {**self.shared, **chunk.cond}, "probes": probes}, len(x))

    def ode(self) -> Any:
        """There is none."""
        raise TypeError("a likelihood along a curve is no ODE")

    def run(self, y: Tensor, context: Context, progress: bool) -> Solution:
        """The curve of a whole batch, read: a solution whose x are rows (ends of the curve, log p, error)."""
        tree = context.tree
        if not len(y):
            return self._solution(torch.cat((rows(y), rows(y), y.new_zeros(0, self.trace.count + 1)), 1), [])
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        walk, due = self._walk(y), iter(self.stops)
        query, t = next(walk), next(due)
        try:
            while True:
                node = query.t == t
                if not node or (self.bare and t == self.start):
                    estimate = self.flow.estimate(query.x, query.t, **tree["cond"])
                else:
                    estimate, trace = self._ask(query.x, t, tree)
                    seen.append((rows(query.x), rows(estimate.data), trace))
                t = next(due, math.nan) if node else t
                query = walk.send(estimate)
        except StopIteration:
            pass
        x, data, trace = (torch.stack(v) for v in zip(*(seen[::-1] if self.samples else seen), strict=True))
        curve = self._looked(Curve(self.rule, x, data, trace), y.shape, tree)
        return self._read(curve, y)

    def _walk(self, y: Tensor) -> Generator[Query, Estimate, None]:
        """What the solver asks on its way, and at its end."""
        path, first = self.flow.path, self.stops[0]
        y = y if first == self.start else y * float(path.alpha(first) / path.alpha(self.start))  # x/α is held
        step, now = self.solver.on(path, None, self.intervals), State(y)
        for interval in self.intervals:
            now = yield from step(now, *interval)
        yield Query(now.x, self.stops[-1])

    def _ask(self, x: Tensor, t: Any, tree: Any) -> tuple[Estimate, Tensor]:
        """The estimate, and T of shape (B, count), by one call."""
        estimate, trace = estimated(self.flow, self.trace, x, t, self.flow.path.at(t), tree, self.graph)
        return estimate, of_noise(estimate, trace)

    def _looked(self, curve: Curve, shape: Any, tree: Any) -> Curve:
        """The curve after the second looks."""
        count = min(self.repeats, len(self.rule) - 1)
        first = curve.worst(count) if count else None
        times = torch.tensor(self.rule.times, dtype=torch.float64)
        for i in range(count):
            assert first is not None
            k = first + i
            x = curve.approach(k)
            estimate, trace = self._ask(x.reshape(shape), times[torch.from_numpy(k)], tree)
            curve = curve.replaced(k, x, rows(estimate.data), trace)
        return curve

    def _read(self, curve: Curve, y: Tensor) -> Solution:
        """The density, its error and the ends of a curve."""
        latent, base = self._at_noise(curve, y)
        first, size = self.rule.points[0], curve.x.shape[2]
        change = curve.change()
        value = base + change - size * math.log(first.alpha)  # of y at the last node, of x at the first
        sample, value = self._at_data(curve, y, value)
        error = torch.full_like(value[:, :1], math.nan)
        if len(self.rule) > 4:
            error = (change - curve.halved().change()).mean(1, keepdim=True).abs()
        found = torch.cat((latent, sample, value, error), 1)
        seen = [largest(x.detach()) for x in curve.x]
        return self._solution(found, seen[::-1] if self.samples else seen)

    def _at_noise(self, curve: Curve, y: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the noise end, (B, D), and log p of y = x/α at the last node, (B, P)."""
        path, point, size = self.flow.path, self.rule.points[-1], curve.x.shape[2]
        noise, trace, sigma = curve.noise(len(self.rule) - 1), curve.trace[-1], float(point.sigma)
        lift = size * math.log(point.alpha)
        end = min(self.start, self.end)
        reached = self.rule.times[-1] == end
        latent = curve.x[-1]
        if not reached:  # α = 0 there: what is left of the way stretches ε̂
            wide = stretch(trace.mean(1, keepdim=True), size)
            latent = float(path.sigma(end)) * noise * wide.sqrt()
        latent_x = latent.reshape(y.shape)
        if callable(self.prior):
            base = self.prior(latent_x).unsqueeze(1)
            if not reached:
                base = base - size * (0.5 * stretch(trace, size).log() + math.log(sigma / float(path.sigma(end))))
        elif self.prior == MARGINAL or not reached:
            base = marginal_log_prob(noise, trace, sigma)
        else:
            assert self.prior == NORMAL
            base = normal_log_prob(latent, path.prior_std).unsqueeze(1)
        return (rows(y) if self.samples else latent), base + lift

    def _at_data(self, curve: Curve, y: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the data end, (B, D), and its log p, (B, P)."""
        end, first = max(self.start, self.end), self.rule.points[0]
        there = self.flow.path.at(end)
        if self.rule.times[0] == end:
            return curve.x[0], value
        # σ = 0 there: T and ‖ε̂‖² are proportional to σ² from here on
        square = curve.noise(0).square().sum(1, keepdim=True)
        grown = curve.x.shape[2] * math.log(first.alpha / there.alpha)
        if self.samples:  # the last step ends in ẑ, as in sampling
            return there.alpha * curve.data[0], value + 0.5 * (curve.trace[0] + square) + grown
        return rows(y), value + 0.5 * (curve.trace[0] - square) + grown

    def _solution(self, found: Tensor, magnitudes: list[Tensor]) -> Solution:
        """The solution whose x are such rows, with the largest numbers at the nodes in the order of the solve."""
        if not magnitudes:
            return settle(found, None, [], self.start, 0, 0)
        times = [*self.rule.times[:: -1 if self.samples else 1], self.end]
        looked = torch.stack([*magnitudes, largest(found[:, :-1].detach())])
        return settle(found, looked, times, self.start, self.cost, len(self.intervals))

    def leave(self, solution: Solution, context: Context) -> LogProb:
        """The parts of the rows that `run` gave."""
        size = math.prod(self.shape)
        latent, sample, values, error = solution.x.split((size, size, self.trace.count, 1), 1)
        latent, sample = latent.reshape(-1, *self.shape), sample.reshape(-1, *self.shape)
        solution = replace(solution, x=sample if self.samples else latent, nfe=solution.nfe * self.flow.nfe_per_call)
        value = torch.where(solution.ok.to(values.device), values.mean(1), math.nan)
        stderr = self.trace.stderr(values.detach())
        return LogProb(value, stderr, error.detach().squeeze(1), solution.nfe, latent, sample, solution)


def _whole(given: int | None, repeats: int) -> int:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise ValueError(f"repeats = {given!r}; expected an integer >= 0")
    return repeats
