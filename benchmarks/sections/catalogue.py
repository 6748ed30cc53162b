"""The list behind the tables of docs/solvers.md: every solver, what it claims, its source, and its name elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from flowsolve.solvers import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    LMS,
    RES,
    RK4,
    SEEDS,
    Ancestral,
    Bosh3,
    Churn,
    Dopri5,
    Dopri8,
    DPMSolver,
    DPMSolver12,
    DPMSolver23,
    DPMSolverPP,
    DPMSolverPPS,
    Euler,
    EulerMaruyama,
    ExactSDE,
    Heun,
    Midpoint,
    Multistep,
    Ralston,
    SASolver,
    SDEDPMSolverPP,
    SingleStep,
    Solver,
    StochasticHeun,
    Tsit5,
    UniPC,
)  # fmt: skip

__all__ = ["AROUND", "ENTRIES", "FIXED", "FROZEN", "MULTI", "OWN", "RANDOM", "SINGLE", "Entry", "shown"]


@dataclass(frozen=True)
class Entry:
    """A solver, what it claims, and where it comes from.

    Attributes:
        solver: the solver.
        kind: the group of the table that it is in.
        order: claimed for the ODE.
        companion: orders of the embedded methods of a pair.
        source: authors and year.
        form: what is frozen, or the chart.
        steps: at which the order is measured.
        grid: on which.
        ramp: order claimed where a multistep method starts as it does by default.
        plain: steps of the plain ODE, for a solver that reaches rounding before its regime.
        weak, strong: orders claimed on the SDE.
        weak_steps: at which the weak one is measured for a Gaussian.
        mixture: the weak order claimed where it is measured on a mixture too.
        control: p of N ∝ tol^(−1/p).
        tolerances: at which that is measured.
        diffusers, k: the same method there; in parentheses where the two have not been compared number for number.
    """

    solver: Solver
    kind: str
    source: str
    form: str
    order: int | None = None
    companion: str = ""
    steps: Sequence[int] = (64, 128, 256)
    grid: str = "log_snr"
    ramp: int | None = None
    plain: Sequence[int] = ()
    weak: int | None = None
    weak_steps: Sequence[int] = (64, 128)
    strong: float | None = None
    mixture: int | None = None
    control: int | None = None
    tolerances: Sequence[float] = ()
    diffusers: str = ""
    k: str = ""

    @property
    def name(self) -> str:
        """The expression that makes the solver."""
        return shown(self.solver)


def shown(solver: Any) -> str:
    """A solver by its settings that are not the default, and by its order or inner solver."""
    parts: list[str] = []
    for i, f in enumerate(fields(solver)):
        value, default = getattr(solver, f.name), f.default
        if f.default_factory is not MISSING:
            default = f.default_factory()
        same = value == default or (f.name == "corrector" and value == solver.order)
        if same and (f.name not in ("order", "inner") or type(solver) in (RES, StochasticHeun)):
            continue
        text = shown(value) if isinstance(value, Solver) else repr(value).replace("'", '"')
        parts.append(text if len(parts) == i else f"{f.name}={text}")
    return f"{type(solver).__name__}({', '.join(parts)})"


FIXED, OWN, MULTI, SINGLE, FROZEN, RANDOM, AROUND = (
    "Runge–Kutta, fixed grid",
    "Adaptive, own steps for each sample",
    "Exponential multistep",
    "Exponential single steps",
    "Frozen estimate",
    "Stochastic: multistep, single steps, Euler–Maruyama",
    "Noise around the steps of another solver",
)
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
MANY = (96, 192, 384)
RUNGE: dict[str, Any] = {"form": "any chart", "grid": "uniform"}

ENTRIES = [
    Entry(
        Euler(), FIXED, "Euler 1768", order=1, steps=(64, 96, 144), **RUNGE,
        diffusers="EulerDiscreteScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler", k="euler",
    ),
    Entry(Midpoint(), FIXED, "Runge 1895", order=2, steps=(24, 48, 72), **RUNGE),
    Entry(
        Heun(), FIXED, "Heun 1900; Karras et al. 2022", order=2, steps=(24, 48, 72), **RUNGE,
        diffusers='HeunDiscreteScheduler (chart="noise"), FlowMatchHeunDiscreteScheduler', k='heun (chart="noise")',
    ),
    Entry(Ralston(), FIXED, "Ralston 1962", order=2, steps=(24, 48, 72), **RUNGE),
    Entry(RK4(), FIXED, "Kutta 1901", order=4, steps=(12, 24, 48), **RUNGE),
    Entry(
        Bosh3(), OWN, "Bogacki & Shampine 1989", order=3, companion="2", steps=(24, 48, 72), **RUNGE, control=3,
        tolerances=(1e-6, 1e-7, 1e-8, 1e-9),
    ),
    Entry(
        Dopri5(), OWN, "Dormand & Prince 1980", order=5, companion="4", steps=(32, 48, 64), **RUNGE, control=5,
        tolerances=(1e-9, 1e-10, 1e-11, 1e-12),
    ),
    Entry(
        Tsit5(), OWN, "Tsitouras 2011", order=5, companion="4", steps=(24, 32, 48), **RUNGE,
        plain=(192, 256, 384), control=5, tolerances=(1e-9, 1e-10, 1e-11, 1e-12),
    ),
    Entry(
        Dopri8(), OWN, "Hairer, Nørsett & Wanner 1993", order=8, companion="5, 3", steps=(4, 6, 8, 12), **RUNGE,
        plain=(16, 24, 32), control=8, tolerances=(1e-11, 1e-12, 1e-13),
    ),
    Entry(
        DPMSolver12(), OWN, "Lu et al. 2022a", "any chart with a positive clock", order=2, companion="1",
        grid="log_snr", control=2, tolerances=(1e-4, 1e-5, 1e-6), k="(dpm_adaptive(order=2))",
    ),
    Entry(
        DPMSolver23(), OWN, "Lu et al. 2022a", "any chart with a positive clock", order=3, companion="2",
        grid="log_snr", control=3, tolerances=(1e-6, 1e-7, 1e-8), k="(dpm_adaptive(order=3))",
    ),
    Entry(
        DPMSolverPP(2), MULTI, "Lu et al. 2022b", "data", order=2, ramp=2,
        diffusers=f"{MULTISTEP}(solver_order=2), EDMDPMSolverMultistepScheduler", k="dpmpp_2m",
    ),
    Entry(
        DPMSolverPP(2, rule="exact"), MULTI, "Lu et al. 2022b", "data", order=2, ramp=2,
        diffusers=f'{MULTISTEP}(solver_order=2, solver_type="heun")',
    ),
    Entry(DPMSolverPP(3), MULTI, "Lu et al. 2022b", "data", order=3, steps=MANY, ramp=2),
    Entry(DPMSolverPP(4), MULTI, "", "data", order=4, steps=MANY, ramp=2),
    Entry(DPMSolverPP(5), MULTI, "", "data", order=4, steps=MANY, ramp=2),
    Entry(UniPC(1), MULTI, "Zhao et al. 2023", "data", order=2, ramp=2,
          diffusers="UniPCMultistepScheduler(solver_order=1)"),
    Entry(
        UniPC(2), MULTI, "Zhao et al. 2023", "data", order=3, steps=MANY, ramp=3,
        diffusers="UniPCMultistepScheduler(solver_order=2, solver_type=rule)",
    ),
    Entry(UniPC(3), MULTI, "Zhao et al. 2023", "data", order=4, steps=MANY, ramp=3,
          diffusers="UniPCMultistepScheduler(solver_order=3)"),
    Entry(UniPC(4), MULTI, "Zhao et al. 2023", "data", order=4, steps=MANY, ramp=3),
    Entry(
        DEIS(2), MULTI, "Zhang & Chen 2023", "noise", order=2, ramp=2,
        diffusers='DEISMultistepScheduler(solver_order=2)',
    ),
    Entry(
        DEIS(3), MULTI, "Zhang & Chen 2023 (log-ρ AB)", "noise", order=3, steps=MANY, ramp=2,
        diffusers="DEISMultistepScheduler(solver_order=3)",
    ),
    Entry(DEIS(3, variable="clock"), MULTI, "Zhang & Chen 2023 (ρAB)", "noise", order=3, steps=MANY, ramp=2),
    Entry(DEIS(3, variable="time"), MULTI, "Zhang & Chen 2023 (tAB)", "noise", order=3, steps=MANY, ramp=2),
    Entry(
        LMS(4), MULTI, "Zhang & Chen 2023; k-diffusion", "noise", order=4, steps=MANY, ramp=2,
        diffusers="LMSDiscreteScheduler", k="lms",
    ),
    Entry(
        IPNDM(4), MULTI, "Liu et al. 2022; Zhang & Chen 2023", "noise", order=4, steps=MANY, ramp=2, grid="sigma",
        diffusers="IPNDMScheduler",
    ),
    Entry(IPNDM(4, equal=False), MULTI, "Zhang & Chen 2023", "noise", order=4, steps=MANY, ramp=2),
    Entry(
        Multistep(2, "noise", rule="bh2"), MULTI, "Lu et al. 2022a, b", "noise", order=2, ramp=2,
        diffusers=f'{MULTISTEP}(algorithm_type="dpmsolver")',
    ),
    Entry(
        Multistep(3, "straight"), MULTI, "[below](#exponential-integrators)", "straight", order=3, steps=MANY, ramp=2,
    ),
    Entry(Multistep(3, 0.5), MULTI, "[below](#exponential-integrators)", "blend", order=3, steps=MANY, ramp=2),
    Entry(
        DPMSolver(2), SINGLE, "Lu et al. 2022a", "noise", order=2,
        diffusers=f'KDPM2DiscreteScheduler, {SINGLESTEP}(algorithm_type="dpmsolver")', k="dpm_2",
    ),
    Entry(DPMSolver(3), SINGLE, "Lu et al. 2022a", "noise", order=3, k="dpm_fast"),
    Entry(DPMSolverPPS(2), SINGLE, "Lu et al. 2022b", "data", order=2,
          diffusers=f"{SINGLESTEP}(solver_order=2)", k="dpmpp_2s_ancestral(eta=0)"),
    Entry(DPMSolverPPS(3), SINGLE, "Lu et al. 2022b", "data", order=3),
    Entry(RES(), SINGLE, "Zhang et al. 2023", "data", order=2,
          diffusers=f'{SINGLESTEP}(solver_order=2, solver_type="heun")'),
    Entry(SingleStep(3, "straight"), SINGLE, "[below](#exponential-integrators)", "straight", order=3),
    Entry(DDIM(), FROZEN, "Song, Meng & Ermon 2021", "any", order=1, steps=(64, 96, 144),
          diffusers="DDIMScheduler", k="euler"),
    Entry(DDIM(0.5), FROZEN, "Song, Meng & Ermon 2021", "any", weak=1, mixture=1,
          diffusers="DDIMScheduler (eta=)", k="euler_ancestral(eta=)"),
    Entry(DDPM(), FROZEN, "Ho et al. 2020", "data", weak=1, mixture=1, strong=1.0,
          diffusers="DDPMScheduler, EulerAncestralDiscreteScheduler", k="euler_ancestral"),
    Entry(
        ExactSDE(), FROZEN, "[Theory, §5](theory.md#5-one-step-with-noise)", "data", weak=1, mixture=1, strong=1.0,
        diffusers=f'{MULTISTEP}(algorithm_type="sde-dpmsolver++", solver_order=1)',
    ),
    Entry(
        SDEDPMSolverPP(2), RANDOM, "Lu et al. 2022b", "data", weak=2, strong=1.0,
        diffusers=f'{MULTISTEP}(algorithm_type="sde-dpmsolver++")', k="dpmpp_2m_sde (its eta is η²)",
    ),
    Entry(SDEDPMSolverPP(3), RANDOM, "Lu et al. 2022b", "data", weak=2, strong=1.0),
    Entry(
        SASolver(), RANDOM, "Xue et al. 2023", "data", weak=2, strong=1.0,
        diffusers="SASolverScheduler(predictor_order=order, corrector_order=corrector+1)",
    ),
    Entry(ERSDE(), RANDOM, "Cui et al. 2023", "data", weak=2),
    Entry(
        SEEDS(2), RANDOM, "Gonzalez et al. 2023", "noise", weak=2, weak_steps=(512, 1024), mixture=2, strong=1.0,
    ),
    Entry(SEEDS(3), RANDOM, "Gonzalez et al. 2023", "noise", weak=2, strong=1.0),
    Entry(
        DPMSolverPPS(2, eta=1.0), RANDOM, "Lu et al. 2022b", "data", weak=2, mixture=2, strong=1.0,
        diffusers="DPMSolverSDEScheduler (given our noise)", k="dpmpp_sde (given our noise)",
    ),
    Entry(StochasticHeun(), RANDOM, "[Theory, §8](theory.md#orders-with-noise)", "data", weak=2, mixture=2, strong=1.0),
    Entry(EulerMaruyama(), RANDOM, "Maruyama 1955", "flow time", weak=1, mixture=1, strong=1.0),
    Entry(Ancestral(Euler()), AROUND, "k-diffusion", "the inner solver's", weak=1, mixture=1, strong=1.0,
          diffusers="EulerAncestralDiscreteScheduler", k="euler_ancestral"),
    Entry(Ancestral(Heun()), AROUND, "k-diffusion", "the inner solver's", weak=2, mixture=2, strong=1.0),
    Entry(
        Ancestral(DPMSolver(2)), AROUND, "k-diffusion", "noise", weak=2, mixture=2, strong=1.0,
        diffusers="KDPM2AncestralDiscreteScheduler", k="dpm_2_ancestral",
    ),
    Entry(Ancestral(DPMSolverPPS(2)), AROUND, "k-diffusion", "data", weak=2, mixture=2, strong=1.0,
          k="dpmpp_2s_ancestral"),
    Entry(Churn(Heun(), churn=1.5), AROUND, "Karras et al. 2022", "the inner solver's", weak=2, mixture=2,
          k="heun(s_churn=)"),
]  # fmt: skip
