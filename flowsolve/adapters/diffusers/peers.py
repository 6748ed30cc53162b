r"""Which of diffusers' classes a solver is, and how that class would read a configuration that another has written.

diffusers' classes lay out N steps in two ways. DDIM, Euler's kin, LMS and PNDM list N entries down to the lowest, and
their last step, from there to the clean data, is a short one. The exponential multistep methods (DPM-Solver++, UniPC,
DEIS, SA-Solver) list the first N of N + 1, and the last step is as long as the others. Either needs its own: from 0.43
to a node next to the end λ runs further than in all steps before, and a polynomial through the estimates until then is
followed that far; a solver with stages takes the last step by one evaluation, which is fine if it is short.

So a solver on a configuration of another class is laid out as `X.from_config` of its own class X does it: what the
configuration states is kept, what it leaves to the defaults of its class are X's defaults, and what X does not know is
dropped, unless the caller of `Scheduler` asked for it. (What the class that wrote it does not know, and diffusers would
carry along from a class before that, was never stated: `options`.) The exception is a lowest level as the end
(`set_alpha_to_one=False`), which Euler's kin keep: to end there costs them nothing.

**Orders** are X's as well where a solver is given by name: without an order it is of `solver_order`, 2 by default, and
`lower_order_final` (True by default; from 15 steps only UniPC and SA-Solver heed it) lets it fall in the last steps
(`cooldown`). A solver that is given as an object is what it says.

Flow matching has both layouts too: FlowMatchEuler's noise fractions end at 1/T, UniPC's at about 1/N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flowsolve._spelling import parsed
from flowsolve.adapters.diffusers.convention import EULERS, FLOW_SCHEDULERS, TABLE_SCHEDULERS
from flowsolve.adapters.diffusers.options import options_of
from flowsolve.adapters.diffusers.reading import OURS, Reading
from flowsolve.paths import Discrete
from flowsolve.solvers import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    LMS,
    Euler,
    EulerMaruyama,
    ExactSDE,
    Heun,
    Multistep,
    SASolver,
    UniPC,
)

__all__ = ["PEERS", "as_configured", "as_peer", "exponential", "in_sigma", "lowered", "unstated"]

PEERS: tuple[tuple[type[Any], str], ...] = (
    (DDIM, "DDIMScheduler"),
    (DDPM, "DDPMScheduler"),
    (ExactSDE, "DDPMScheduler"),
    (EulerMaruyama, "DDPMScheduler"),
    (Euler, "EulerDiscreteScheduler"),
    (Heun, "HeunDiscreteScheduler"),
    (LMS, "LMSDiscreteScheduler"),
    (IPNDM, "PNDMScheduler"),
    (DEIS, "DEISMultistepScheduler"),
    (SASolver, "SASolverScheduler"),
    (UniPC, "UniPCMultistepScheduler"),
    (Multistep, "DPMSolverMultistepScheduler"),
)
"""Solvers and the class of diffusers that has them; the first that fits."""
STAGES, LEVELS = "HeunDiscreteScheduler", "DPMSolverSinglestepScheduler"
"""Whose nodes the others have: Heun's, and where noise levels are respaced those between the ends of the table."""

DDIMS = tuple(n for n in TABLE_SCHEDULERS if n.startswith(("DDIM", "DDPM", "CogVideoX", "RePaint", "UnCLIP")))
"""Kin of DDIM and DDPM. A solver stays with the layout of a configuration of its own kin."""
TO_THE_LOWEST = ("DEISMultistepScheduler", "SASolverScheduler")
"""Classes whose steps end at the lowest level of the table."""
LEFT = ("final_sigmas_type", "set_alpha_to_one", "steps_offset", "timestep_spacing")
"""What classes have different defaults of."""
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
FEW = 15
"""Fewer steps than this are few, to `lower_order_final`."""


def as_peer(reading: Reading, solver: Any, by_name: bool = False) -> Reading:
    """A reading as the class of diffusers that has the solver would make it, for the nodes alone."""
    config = reading.config
    if reading.straight:
        if exponential(solver) and reading.name in FLOW_SCHEDULERS:
            return replace(reading, config={**config, "_class_name": "UniPCMultistepScheduler"})
        if solver.evaluations > 1 and reading.name not in FLOW_SCHEDULERS:
            return replace(reading, config={**config, "_class_name": FLOW_SCHEDULERS[0]})
        return reading
    usual = LEVELS if any(config.get(k) for k in RESPACED) else STAGES
    name = next((name for kind, name in PEERS if isinstance(solver, kind)), usual)
    full = name in TO_THE_LOWEST and not (by_name or solver.cooldown)
    if full and reading.name not in TO_THE_LOWEST:  # a step of full order to the lowest is followed too far
        name = "DPMSolverMultistepScheduler"
    kin = any(name in kind and reading.name in kind for kind in (DDIMS, EULERS)) or name == reading.name
    if kin or reading.name not in TABLE_SCHEDULERS or not (isinstance(reading.path, Discrete) or exponential(solver)):
        return reading
    ours = config.get(OURS) or {}
    left, asked = ours.get("unstated", ()), ours.get("asked", ())  # by defaults alone; by the caller's own word
    known = {k: v for k, v in options_of(name).items() if k in (*LEFT, *RESPACED)}
    strict = exponential(solver) or isinstance(solver, DDIM | DDPM | LMS)
    kept = {
        k: v for k, v in config.items()
        if k not in (*LEFT, *RESPACED) or (k not in left and (k in known or k in asked or not strict))
    }  # fmt: skip
    return replace(reading, config={**known, **kept, "_class_name": name})


def as_configured(solver: Any, text: Any, config: Mapping[str, Any]) -> Any:
    """A solver that was given as text, with the order that the configuration says unless the text says one."""
    if not exponential(solver) or not isinstance(text, str) or isinstance(solver, ERSDE):
        return solver
    said, order = parsed(text)[1], int(config.get("solver_order") or 2)
    if "order" in said:
        return solver
    corrects = isinstance(solver, UniPC) and "corrector" not in said
    return replace(solver, order=order, corrector=order if corrects else solver.corrector)


def lowered(solver: Any, config: Mapping[str, Any], steps: int) -> Any:
    """A named solver for so many steps on a configuration's nodes: with falling orders at the end, where it says so."""
    always = isinstance(solver, UniPC | SASolver)
    if not exponential(solver) or not config.get("lower_order_final", True) or not (always or steps < FEW):
        return solver
    return replace(solver, cooldown=True)


def in_sigma(solver: Any, laid: Reading) -> bool:
    """Whether a named solver is Heun on respaced levels: those are spaced for its steps in σ, the noise chart."""
    return type(solver) is Heun and any(laid.config.get(k) for k in RESPACED)


def exponential(solver: Any) -> bool:
    """Whether a solver is a multistep one of the exponential kind."""
    return isinstance(solver, Multistep) and not isinstance(solver, IPNDM | LMS)


def unstated(config: Any, name: str) -> list[str]:
    """The options that a scheduler of a class, or its configuration, has from the defaults of the class alone."""
    told = config if isinstance(config, Mapping) else config.config
    usual = options_of(name)
    before = (told.get(OURS) or {}).get("unstated")
    if before is None:  # diffusers notes what it has filled in
        before = [k for k in (*LEFT, *RESPACED) if k not in told or k in told.get("_use_default_values", ())]
    return [k for k in before if k not in told or told[k] == usual.get(k)]  # a pipeline may have changed it since
