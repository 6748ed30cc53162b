"""Solvers as text, for command lines and configurations: a name, and options behind a colon.

    unipc   unipc:order=2   dopri5:rtol=1e-4,atol=1e-4   churn:inner=heun,churn=40

Names are those of the classes, in any case and without punctuation; `+` is `p`, so that dpm-solver++ is `DPMSolverPP`.
What k-diffusion and ComfyUI call by another name (`euler_a`, `dpmpp_2m_sde`, …) is understood where it is the same
step; their defaults are meant, which options may change. A name that ends in .json is a file of tuned solvers
(`flowsolve.tuning`). Grids as text are in `flowsolve.grids.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

from flowsolve import solvers
from flowsolve._spelling import known, parsed, plain
from flowsolve.solvers.auto import Auto
from flowsolve.solvers.base import Solver
from flowsolve.solvers.registry import REGISTERED

__all__ = ["ALIASES", "SOLVERS", "solver"]

SOLVERS: Mapping[str, Any] = REGISTERED
"""Plain name → class: flowsolve's own, and what `flowsolve.solvers.register` was given."""

ALIASES: Mapping[str, Callable[..., Any]] = {
    "eulera": solvers.DDPM,
    "eulerancestral": solvers.DDPM,
    "dpm2": partial(solvers.DPMSolver, order=2),
    "dpm2a": partial(solvers.Ancestral, solvers.DPMSolver(2)),
    "dpm2ancestral": partial(solvers.Ancestral, solvers.DPMSolver(2)),
    "dpmpp2m": partial(solvers.DPMSolverPP, order=2),
    "dpmpp2msde": partial(solvers.SDEDPMSolverPP, order=2),
    "dpmpp2sa": partial(solvers.Ancestral, solvers.DPMSolverPPS(2)),
    "dpmpp2sancestral": partial(solvers.Ancestral, solvers.DPMSolverPPS(2)),
    "plms": partial(solvers.IPNDM, warmup="trapezoid"),
    "dpmppsde": partial(solvers.DPMSolverPPS, order=2, eta=1.0),
    "resmultistep": partial(solvers.Multistep, order=2),
    "unipcbh2": partial(solvers.UniPC, rule="bh2"),
}
"""Plain name elsewhere → what makes the same solver; tested beside k-diffusion's functions."""

NEAREST: Mapping[str, str] = {
    "dpmpp3msde": "its published step halves the second difference; sdedpmsolverpp:order=3 takes all of it",
    "dpmfast": "the nearest is dpmsolver:order=3, which makes single steps of the published method",
    "dpmadaptive": "the nearest are dpmsolver23 and dpmsolver12, with step control of their own",
    "gradientestimation": "the nearest is deis:order=2, which weighs the last two estimates by the steps taken",
    "resmultistepancestral": "the nearest is sdedpmsolverpp:order=2",
}
"""Plain name elsewhere of which there is no equal here → what comes next to it."""


def solver(text: str) -> Solver | Auto:
    """A solver from its name and options.

    Raises:
        ValueError: an unknown name, option or value, or a file that holds no tuned solver.
        OSError: such a file cannot be read.

    Examples:
        >>> from flowsolve.solvers import names
        >>> names.solver("dpm-solver++:order=3").order
        3
    """
    file, suffix, rest = text.rpartition(".json")
    if suffix and (not rest or rest.startswith(":")):
        _, options = parsed(f"file{rest}")
        if strange := options.keys() - {"any_checkpoint"}:
            raise ValueError(f"{file}.json has no option {min(strange)!r}; expected any_checkpoint")
        return solvers.load(file + suffix, **options)
    name, options = parsed(text)
    made = SOLVERS.get(plain(name)) or ALIASES.get(plain(name))
    if made is None:
        if next_to := NEAREST.get(plain(name).removesuffix("gpu")):
            raise ValueError(f"solver = {name!r} has no equal here: {next_to}")
        if plain(name).endswith("cfgpp"):
            raise ValueError(
                f"solver = {name!r} is a guidance, not a step: name the solver alone and use flowsolve.guidance"
            )
        near = get_close_matches(plain(name), [*SOLVERS, *ALIASES], 1, 0.6)
        meant = f". Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(sorted(made.__name__ for made in SOLVERS.values()))
        raise ValueError(
            f"solver = {name!r} is not known; expected one of {listed}, with options as in unipc:order=2{meant}"
        )
    known(made.func if isinstance(made, partial) else made, name, options)
    if isinstance(options.get("inner"), str):
        options["inner"] = solver(options["inner"])
    kind: Any = made
    wanted = [] if isinstance(made, partial) else [f for f in fields(kind) if f.init and f.name not in options]
    if lacks := [f.name for f in wanted if f.default is MISSING and f.default_factory is MISSING]:
        raise ValueError(
            f"solver {text!r} lacks {', '.join(lacks)}; give it as in churn:inner=heun, or, if it is no text, make the "
            "solver in Python"
        )
    try:
        return made(**options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"solver {text!r} has a value of the wrong kind: {error}") from error
