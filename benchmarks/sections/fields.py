r"""The problems that `auto` is chosen on, and those that it is judged on.

**Data** (`CHOSEN_ON`, `JUDGED_ON`):

| chosen on | judged on |
|---|---|
| power law 1, of size 0.45 | power law 0.85, of size 0.5 |
| power law 0.7, of size 0.45 | power law 1.2, of size 0.35 |
| power law 1.4, of size 0.6 | |
| latents: 4 × 16 × 16, power law 0.5, of size 1 | latents: power law 0.8, of size 1 |
| scale mixture: slopes 0.8, 1, 1.3, contrasts 0.4, 1, 1.8 | scale mixture: slopes 0.6, 1.1, 1.6, contrasts 0.3, 1, 2 |
| mixtures of 12 in D = 2, 64 and 512 | the mixture in D = 3072; `digits-ddpm`, `digits-condot`, `patches-condot` |

**Paths** (`CHOSEN_PATHS`, `JUDGED_PATHS`): chosen on DDPM's table, VP, CondOT, EDM and the cosine path; judged on
Stable Diffusion's table, sub-VP, CondOT, VE and the cosine path, and the networks on their own.

All of it was fixed before the search. What was changed when a first judging had been seen: the mixture in D = 512 was
added (rows for 12 evaluations were weak on mixtures in many dimensions); rows for the table were also held against a
shorter one, `Discrete.linear(1000, 8e-4, 0.012)` (a row that extrapolates from the edge was weak on Stable
Diffusion's); and polynomials in the clock of the form were left out where they were far worse on `patches-condot` than
those in λ: of 4 nodes below 24 evaluations, of 3 below 12. To that extent the judging half is not unseen.
`patches-ddpm` and `patches-edm` (`benchmarks/networks.py`) were trained beside the search and judged on once, after it.

Fields are solved in the basis where they are independent (solvers commute with an orthogonal change of basis). Of a
Gaussian field all coefficients of one standard deviation s are multiplied by one gain G(s), so that a single row, with
the distinct s of all fields, gives the expected error of each,

$$ e^2 = \sum_i (G(s_i) - G^*(s_i))^2 \Big/ \sum_i G^*(s_i)^2 , $$

where for D of thousands every sample is. Elsewhere e is the median over samples of the relative error, as in
`nfe_vs_error.py`, and the truth its converged end point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters
from flowsolve.kernels import rms
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP
from flowsolve.problems import GaussianMixture, PowerLaw, patches
from sections import generative

__all__ = ["CHOSEN_ON", "CHOSEN_PATHS", "JUDGED_ON", "JUDGED_PATHS", "NETWORKS", "Case", "cases", "network"]

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
LATENT: dict[str, Any] = {"shape": (4, 16, 16), "scale": 1.0, "colours": [1.0] * 4, **DOUBLE}

CHOSEN_ON: dict[str, Callable[[], Any]] = {
    "law 1": partial(PowerLaw, slope=1.0, noise=0.004, **DOUBLE),
    "law 0.7": partial(PowerLaw, slope=0.7, noise=0.004, **DOUBLE),
    "law 1.4": partial(PowerLaw, slope=1.4, noise=0.002, scale=0.6, **DOUBLE),
    "latents 0.5": partial(PowerLaw, slope=0.5, noise=0.05, **LATENT),
    "scales": partial(PowerLaw, (3, 16, 16), slope=[0.8, 1.0, 1.3], contrast=[0.4, 1.0, 1.8], noise=0.004, **DOUBLE),
    "mixture 2": partial(generative.mixture, 2),
    "mixture 64": partial(generative.mixture, 64),
    "mixture 512": partial(generative.mixture, 512),
}
JUDGED_ON: dict[str, Callable[[], Any]] = {
    "law 0.85": partial(PowerLaw, slope=0.85, noise=0.002, scale=0.5, **DOUBLE),
    "law 1.2": partial(PowerLaw, slope=1.2, noise=0.006, scale=0.35, **DOUBLE),
    "latents 0.8": partial(PowerLaw, slope=0.8, noise=0.02, **LATENT),
    "scales, wider": partial(
        PowerLaw, (3, 16, 16), slope=[0.6, 1.1, 1.6], contrast=[0.3, 1.0, 2.0], noise=0.004, **DOUBLE
    ),
    "mixture 3072": partial(generative.mixture, 3072),
}
CHOSEN_PATHS: dict[str, Path] = {
    "table": Discrete.linear(1000),
    "VP": VP(),
    "CondOT": CondOT(),
    "EDM": EDM(),
    "cosine": Cosine(),
}
JUDGED_PATHS: dict[str, Path] = {
    "table": Discrete.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()),
    "sub-VP": SubVP(),
    "CondOT": CondOT(),
    "VE": VE(),
    "cosine": Cosine(),
}
NETWORKS = ("digits-ddpm", "digits-condot", "patches-condot", "patches-ddpm", "patches-edm")


@dataclass(frozen=True)
class Case:
    """One solve that judges one problem or several.

    Attributes:
        flow: the flow.
        start: shape (B, *S).
        judge: the end state → its error on each problem by name.
        exact: the end state of the converged ODE.
    """

    flow: fs.Flow
    start: Tensor
    judge: Callable[[Tensor], dict[str, float]]
    exact: Tensor


def cases(on: dict[str, Callable[[], Any]], path: Path, batch: int = 32) -> list[Case]:
    """The solves that judge all problems on a path: one for all Gaussian fields, one for each of the others."""
    made = {name: make() for name, make in on.items()}
    fields = {name: p for name, p in made.items() if isinstance(p, PowerLaw) and len(p.weights) == 1}
    found = [_fields(fields, path)] if fields else []
    return [*found, *(_sampled(name, p, path, batch) for name, p in made.items() if name not in fields)]


def _fields(fields: dict[str, PowerLaw], path: Path) -> Case:
    distinct = {name: p.std.flatten().unique(return_counts=True) for name, p in fields.items()}
    std = torch.cat([s for s, _ in distinct.values()])[None]
    flow = GaussianMixture(torch.zeros_like(std), std).flow(path, _finite(path))
    start, edge = torch.full_like(std, path.prior_std), path.at(path.window[1])
    first = path.at(0.0)
    gain = ((edge.alpha**2 * std.square() + edge.sigma**2) / (first.alpha**2 * std.square() + first.sigma**2)).sqrt()
    exact = start * gain
    if path.window[1] < 1.0:  # the table's clean end, with its last estimate
        exact = exact * edge.alpha * std.square() / (edge.alpha**2 * std.square() + edge.sigma**2)

    def judge(x: Tensor) -> dict[str, float]:
        errors, at = {}, 0
        for name, (s, counts) in distinct.items():
            part = slice(at, at + len(s))
            off = ((x[0, part] - exact[0, part]).square() * counts).sum() / (exact[0, part].square() * counts).sum()
            errors[name], at = float(off.sqrt()), at + len(s)
        return errors

    return Case(flow, start, judge, exact)


def _finite(path: Path) -> str:
    """A prediction from which the estimate is exact at both ends."""
    return "velocity" if path.at(0.0).alpha == 0.0 else "noise"


def _sampled(name: str, problem: Any, path: Path, batch: int) -> Case:
    if isinstance(problem, PowerLaw):
        problem = problem.coefficients
    generator = torch.Generator().manual_seed(generative.SEED)
    shape = problem.means.shape[1:]
    count = max(4, min(4 * batch, batch * 256 // shape.numel())) if shape.numel() < 1000 else 8
    start = path.prior_std * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return _converged(name, problem.flow(path, _finite(path)), start, 1024)


def _converged(name: str, flow: fs.Flow, start: Tensor, evaluations: int) -> Case:
    problem = generative.Problem(flow, start, evaluations, lambda n, seed: start)
    exact, _ = generative.truth(problem)
    wide = exact.double()

    def judge(x: Tensor) -> dict[str, float]:
        return {name: float((rms(x.double() - wide) / rms(wide)).median())}

    return Case(flow, start, judge, exact)


def unconditional(name: str, folder: File) -> fs.Flow:
    """A trained network: bundled, or a folder of that name; one with classes is asked without any."""
    flow = adapters.load(adapters.bundled(name) if name.startswith("digits") else folder / name)
    if name == "patches-ddpm":
        net: Any = flow.net
        null = len(patches.TRAIN)

        def unconditional(x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = net(x, t, class_labels=torch.full((len(x),), null))
            return out

        flow = fs.Flow(unconditional, flow.path, flow.prediction, time=flow.clock)
    return flow


def network(name: str, folder: File, batch: int = 8, evaluations: int = 512) -> Case:
    """The case of a trained network: bundled, or a folder of that name; one with classes is asked without any."""
    flow = unconditional(name, folder)
    shape = (1, 8, 8) if name.startswith("digits") else (3, 32, 32)
    start = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(generative.SEED))
    return _converged(name, flow, start, evaluations)
