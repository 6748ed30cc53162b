r"""torchdiffeq and torchsde as solvers of flowsolve: their numerics, and flowsolve's flows, charts and accounts.

`Torchdiffeq` runs any method of torchdiffeq wherever a Runge–Kutta solver goes: `fs.solve`, `fs.sample`, `fs.encode`,
`fs.log_prob`. On a flow it solves the ODE in a chart, like every other.

| method | order | evaluations | steps |
|---|---|---|---|
| `adaptive_heun`, `fehlberg2` | 2(1) | | adaptive |
| `bosh3`, `dopri5`, `dopri8` | 3(2), 5(4), 8(7) | | adaptive |
| `scipy_solver` | | | adaptive, by scipy on the host: `options={"solver": "LSODA"}`, "Radau", … |
| `euler`, `midpoint`, `heun2`, `heun3`, `rk4` | 1, 2, 2, 3, 4 | 1, 2, 2, 3, 4 a step | fixed |
| `explicit_adams` | 4 to 12 | 1 a step, and 3 more in the first two | fixed |
| `implicit_adams`, `fixed_adams` (its old name) | 4 to 12 | until its iteration has converged | fixed |

torchdiffeq interpolates the long steps of `dopri8` by a polynomial of degree 4 (`t_eval`), rounds the times that
`scipy_solver` asks at to float32, and gives `explicit_adams` order 12, stable for very short steps only, unless
options={"max_order": 4} or the like say otherwise.

**The whole batch is one system.** The error norm is one for all samples, and so are the times, the steps, the cost and
the fate: a sample's result depends on its batch mates, and where one sample fails, none arrives. That is torchdiffeq's
way; flowsolve's own solvers keep samples apart.

`Torchsde` runs torchsde on a flow's SDE family (`flowsolve.solvers.discrete`), whose marginals are those of the ODE for
every η:

$$ dx = \bigl[u + \tfrac12\eta^2 g^2\,\nabla\log p\bigr]\,dt + \eta\,g\,dW
      = \bigl[\dot\alpha\hat z + (\dot\sigma - \eta^2\sigma\lambda')\,\hat\varepsilon\bigr]\,dt
        + \eta\sqrt{2\sigma^2\lambda'}\;dW . $$

The noise does not depend on x, so the Itô and the Stratonovich solution are the same, and a method is told that its SDE
is of the type it wants.

| method | strong order | evaluations a step | |
|---|---|---|---|
| `euler` | 1 | 1 | Euler–Maruyama |
| `milstein`, `euler_heun` | 1 | 1 | the same with noise that does not depend on x; `euler_heun` averages g |
| `heun`, `midpoint`, `log_ode` | 1 | 2 | `log_ode` draws Lévy areas (D² numbers a sample) that cancel here |
| `reversible_heun` | 1 | 1, and 1 before the first | stable for short steps only |
| `srk` | 1.5 | 2 | Rößler's SRA1 |

The orders are those for such noise. A step's evaluations are counted, not taken from this table.

Sources: Chen et al. 2018 and the torchdiffeq package; Li et al. 2020, Kidger et al. 2021 and the torchsde package;
Rößler 2010.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import rows
from flowsolve._optional import require
from flowsolve._parameters import parameters_of
from flowsolve._surroundings import refuse
from flowsolve.charts import Chart
from flowsolve.flow import Flow
from flowsolve.noise import Noise, interval
from flowsolve.paths import Path
from flowsolve.predictions import Estimate
from flowsolve.solvers.adaptive import Status
from flowsolve.solvers.base import Foreign, ForeignSDE, Query
from flowsolve.solvers.eta import check_eta

__all__ = ["Torchdiffeq", "Torchsde", "spaced"]

# torchdiffeq's methods and the options each kind of them knows.
PAIRS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
COSTS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY = "scipy_solver"

PAIR_OPTIONS = (
    "norm", "min_step", "max_step", "first_step", "step_t", "jump_t", "safety", "ifactor", "dfactor", "max_num_steps",
    "dtype",
)  # fmt: skip
GRID_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb")
OPTIONS = {
    **dict.fromkeys(PAIRS, PAIR_OPTIONS),
    **dict.fromkeys(COSTS, GRID_OPTIONS),
    **dict.fromkeys(ADAMS, (*GRID_OPTIONS, "max_order", "max_iters")),
    SCIPY: ("solver", "min_step", "max_step"),
}
STAGES = 14  # the most evaluations of one attempted step


@dataclass(frozen=True)
class Torchdiffeq(Foreign):
    """A method of torchdiffeq, over the whole batch as one system with one error norm and one step size.

    A solve costs each sample as many evaluations as the right-hand side was called, all of them counted. `nfe=` is

    * for euler, midpoint, heun2, heun3, rk4 and explicit_adams: what is spent, exactly, on equal steps (it must be a
      whole number of them);
    * where `options` give a grid, and for all other methods: the most that may be spent. If that does not suffice,
      every sample ends with `Status.BUDGET` where it started.

    The right-hand side is never asked outside the interval: adaptive methods step onto its end rather than beyond. The
    times in `options` are those of the clock of the solve (on a flow, the chart's).

    Between the nodes of a fixed grid torchdiffeq interpolates linearly (`t_eval`), or with options={"interp": "cubic"}
    and one more evaluation a time.

    Attributes:
        method: the method's name in torchdiffeq; see `flowsolve.solvers.bridges`.
        rtol: relative tolerance, for the root mean square over the whole batch.
        atol: absolute tolerance.
        options: torchdiffeq's options of the method. `norm` is given a state of shape (B, *S).
        adjoint: gradients by torchdiffeq's adjoint, whose memory does not grow with the steps, to all leaves in the
            graph of the right-hand side at the start. Otherwise they flow through the steps (scipy_solver records
            none).

    Raises:
        ValueError: an unknown method or bad tolerances; in a solve, a fixed-step method without `nfe` or a grid in its
            options, or an nfe that is not a whole number of steps.
        TypeError: options that the method does not know.
        ImportError: in a solve, if torchdiffeq is not installed.

    Examples:
        >>> rk4 = fs.solvers.bridges.Torchdiffeq("rk4")
        >>> sol = fs.solve(lambda t, y: -y, torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, solver=rk4, nfe=200)
        >>> round(float(sol.x), 8), sol.nfe  # 1/e = 0.36787944…
        (0.36787944, tensor([200]))
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] | None = field(default=None, hash=False)
    adjoint: bool = False

    def __post_init__(self) -> None:
        if self.method not in OPTIONS:
            raise ValueError(f"method = {self.method!r}; expected one of torchdiffeq's: {', '.join(OPTIONS)}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} = {value!r}; expected a finite number >= 0")
        options = dict(self.options or {})  # a copy: what the caller does to his is his business
        if unknown := sorted(set(options) - set(OPTIONS[self.method])):
            raise TypeError(
                f"{self.method} has no option {', '.join(map(repr, unknown))}; expected some of "
                f"{', '.join(OPTIONS[self.method])}"
            )
        if {"step_size", "grid_constructor"} <= set(options):
            raise TypeError("options give both step_size and grid_constructor; give one of them")
        if "step_size" in options and not 0.0 < float(options["step_size"]) < math.inf:
            raise ValueError(f"step_size = {options['step_size']!r}; expected a number > 0")
        object.__setattr__(self, "options", options or None)

    def trajectory(
        self,
        field: Callable[[float, Tensor], Tensor],
        y: Tensor,
        start: float,
        stops: Sequence[float],
        budget: int | None,
        functions: Sequence[Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve dy/dt = field(t, y) from y at the start; see `flowsolve.solvers.base.Foreign`."""
        library = require("torchdiffeq", "bridges", f"Torchdiffeq({self.method!r})")
        if self.adjoint or self.method in PAIRS or self.method == SCIPY:
            refuse(f"{self!r}, whose library has derivatives of autograd only,", "use a solver such as Dopri5()")
        times = [start, *(s for s in stops if s != start)]
        grid = self._grid(times, budget)
        recording = torch.is_grad_enabled()
        if self.method == SCIPY and recording and y.requires_grad and not self.adjoint:
            raise ValueError("scipy_solver runs in numpy and records no gradients; set adjoint=True, or use no_grad")
        counted = _Counted(field, start, times[-1], budget, strict=self.method == SCIPY)
        t = torch.tensor(times, dtype=torch.float64, device=y.device)
        tolerances = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        states: Tensor | None = None
        status = Status.SUCCESS
        try:
            if recording and self.adjoint:
                parameters = tuple(parameters_of(functions, [counted.first(t[0], y)]))
                there, back = self._options(grid, times[-1:], t), self._options(grid, times, t)
                back.pop("norm", None)  # one for states; the adjoint has more parts
                states = library.odeint_adjoint(
                    counted, y, t, **tolerances, options=there, adjoint_options=back,
                    adjoint_params=parameters,
                )  # fmt: skip
                states = _First.apply(states)  # type: ignore[no-untyped-call]
            else:
                states = library.odeint(counted, y, t, **tolerances, options=self._options(grid, times[-1:], t))
        except _Spent:
            status = Status.BUDGET
        except _NotFinite:
            status = Status.NONFINITE
        except AssertionError as error:
            status = counted.cause(error)
        counted.close()
        if states is None or len(states) < len(times):  # scipy returns what it has
            status = counted.cause(None) if status is Status.SUCCESS else status
            lost = torch.full_like(y, torch.nan) if len(stops) > 1 else y.detach()
            states = torch.stack([y.detach(), *[lost] * (len(times) - 1)])
        nfe = torch.full((len(y),), counted.calls, device="cpu")
        return states if stops[0] == start else states[1:], nfe, _statuses(states[-1], status)

    def _grid(self, times: Sequence[float], budget: int | None) -> list[float] | None:
        """The nodes of a fixed grid; None for an adaptive method, or where a grid_constructor makes them."""
        if self.method in PAIRS or self.method == SCIPY or "grid_constructor" in self._given:
            return None
        start, end = times[0], times[-1]
        if (size := self._given.get("step_size")) is not None:
            return spaced(start, end, float(size))
        if self.method in ADAMS[1:]:
            raise ValueError(
                f"a step of {self.method} costs as many evaluations as its iteration takes, so that no grid spends "
                'just so many; give options={"step_size": …}, and nfe=… as the most that may be spent'
            )
        if budget is None:
            raise ValueError(f'{self.method} steps on a fixed grid: give nfe=…, or options={{"step_size": …}}')
        count = self._steps(budget, len(times) - 1 if self._given.get("interp") == "cubic" else 0)
        return [start, *(start + (end - start) * k / count for k in range(1, count)), end]

    @property
    def _given(self) -> Mapping[str, Any]:
        return self.options or {}

    def _steps(self, budget: int, extra: int) -> int:
        """The number of steps that cost a budget, beside some evaluations for the interpolant."""

        def cost(steps: int) -> int:
            if self.method in COSTS:
                return COSTS[self.method] * steps + extra
            fours = steps if self._given.get("max_order", 12) < 4 else min(steps, 2)  # steps of RK4, while it starts
            return 3 * fours + steps + extra

        steps = 1
        while cost(steps + 1) <= budget:
            steps += 1
        if cost(steps) != budget:
            fits = [cost(n) for n in (steps, steps + 1)]
            raise ValueError(
                f"a budget of {budget} evaluations is not a whole number of steps of {self.method}; expected for "
                f"example {fits[0]} or {fits[1]}"
            )
        return steps

    def _options(self, grid: list[float] | None, corners: Sequence[float], t: Tensor) -> dict[str, Any]:
        """torchdiffeq's options of a solve that is to step on the corners."""
        options = {name: value for name, value in self._given.items() if name != "step_size"}
        if self.method in PAIRS:
            given = torch.as_tensor(options.get("step_t", []), dtype=t.dtype, device=t.device).reshape(-1)
            jumps = torch.as_tensor(options.get("jump_t", []), dtype=t.dtype, device=t.device).reshape(-1)
            ends = torch.tensor([c for c in corners if c not in jumps.tolist()], dtype=t.dtype, device=t.device)
            options["step_t"] = torch.cat((given, ends)).unique()
            if len(jumps):
                options["jump_t"] = jumps
            norm = options.get("norm", _rms)
            options["norm"] = lambda e: norm(e.detach())  # sizes of steps are no functions of the parameters
        elif grid is not None:
            options["grid_constructor"] = _Nodes(grid)
        return options


def spaced(start: float, end: float, size: float) -> list[float]:
    """Nodes from start to end, a size apart; the last step is what is left.

    torchdiffeq itself makes one step too many where its quotient of the two is rounded up.
    """
    count = max(1, math.ceil(abs(end - start) / size - 1e-9))
    return [start, *(start + math.copysign(k * size, end - start) for k in range(1, count)), end]


def _rms(e: Tensor) -> Tensor:
    return e.square().mean().sqrt()


class _Spent(Exception):
    """The budget is spent."""


class _NotFinite(Exception):
    """A slope is not finite."""


class _Counted:
    """A right-hand side that counts its calls, keeps within the interval, and notes what was not finite.

    If strict it does not return that: scipy's LSODA would go on for ever.
    """

    def __init__(
        self, field: Callable[[float, Tensor], Tensor], start: float, end: float, budget: int | None, *, strict: bool
    ) -> None:
        self.field, self.least, self.most = field, min(start, end), max(start, end)
        self.budget, self.strict, self.calls, self.open = budget, strict, 0, True
        self.finite: deque[Tensor] = deque(maxlen=STAGES)
        self.known: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self.open:
            known, self.known = self.known, None
            if known is not None and torch.equal(y, known[0]):
                return known[1]
            if self.calls == self.budget:
                raise _Spent
            self.calls += 1
        slope = self.field(min(max(float(t.detach()), self.least), self.most), y)
        if self.open:
            finite = torch.isfinite(slope.detach()).all()
            if self.strict and not finite:
                raise _NotFinite
            self.finite.append(finite)
        return slope

    def first(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope at the start, with its graph; a solver whose first question it is gets the same answer."""
        with torch.enable_grad():
            slope = self(t, y.detach())
        self.known = y.detach(), slope.detach()
        return slope

    def close(self) -> None:
        """From here on only gradients call."""
        self.open = False
        self.finite.clear()

    def cause(self, error: AssertionError | None) -> Status:
        """Why torchdiffeq gave up."""
        message = "underflow" if error is None else str(error)
        if "max_num_steps" in message:
            return Status.MAX_STEPS
        if "underflow" in message or "non-finite" in message:
            finite = "underflow" in message and all(bool(f) for f in self.finite)
            return Status.UNDERFLOW if finite else Status.NONFINITE
        assert error is not None
        raise error


class _First(torch.autograd.Function):
    """Identity on states whose second derivatives would be lost on the way back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True through Torchdiffeq(…, adjoint=True), whose gradients have no derivatives; use "
                "adjoint=False"
            )
        return gradients


class _Nodes:
    """A grid constructor: the nodes between the first and the last time that it is given, in their direction."""

    def __init__(self, nodes: Sequence[float]) -> None:
        self.nodes = nodes

    def __call__(self, func: Any, y0: Any, t: Tensor) -> Tensor:
        first, last = t[[0, -1]].tolist()
        inside = sorted((v for v in self.nodes if min(first, last) < v < max(first, last)), reverse=last < first)
        return torch.tensor([first, *inside, last], dtype=t.dtype, device=t.device)


def _statuses(x: Tensor, status: Status) -> Tensor:
    """One status for each sample; a solve that arrived is no success where x is not finite."""
    whole = torch.full((len(x),), int(status), device="cpu")
    if status is not Status.SUCCESS:
        return whole
    finite = torch.isfinite(rows(x.detach())).all(1).cpu()
    return torch.where(finite, whole, int(Status.NONFINITE))


@dataclass(frozen=True)
class _Method:
    """What torchsde asks of an SDE and its Brownian motion for a method, and what a solve costs."""

    kind: str  # of SDE: "ito" or "stratonovich"
    evaluations: int = 1  # a step
    first: int = 0  # evaluations before the first step
    areas: str = "none"  # which Lévy areas are drawn
    at_end: bool = False  # whether a step asks at its end


METHODS = {
    "euler": _Method("ito"),
    "milstein": _Method("ito"),
    "srk": _Method("ito", 2, areas="space-time"),
    "euler_heun": _Method("stratonovich"),
    "heun": _Method("stratonovich", 2, at_end=True),
    "midpoint": _Method("stratonovich", 2),
    "log_ode": _Method("stratonovich", 2, areas="foster"),
    "reversible_heun": _Method("stratonovich", 1, first=1, at_end=True),
}


@dataclass(frozen=True)
class Torchsde(ForeignSDE):
    """A method of torchsde on a flow's SDE family, in flow time, on equal steps; for `fs.sample`.

    `nfe=` is spent exactly and must be a whole number of steps (and one more with reversible_heun). Where λ' is
    infinite (α = 0 or σ = 0) an explicit step does not exist: with η > 0 sample over an interval inside, from a state
    at its start, as with `EulerMaruyama`.

    The Brownian motion is torchsde's, seeded by the seed, the samples' numbers and the interval: a solve repeats itself
    exactly. But it belongs to the batch and its device, unlike flowsolve's own noise: a sample is another one in
    another batch.

    Attributes:
        method: the method's name in torchsde; see `flowsolve.solvers.bridges`.
        eta: η: 0 is the probability-flow ODE, 1 the reverse-time SDE.

    Raises:
        ValueError: an unknown method or bad η; in a solve, no nfe or one that is not a whole number of steps, an
            interval that runs from data to noise, or one on which g is infinite.
        ImportError: in a solve, if torchsde is not installed.

    Examples:
        >>> mixture, path = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2), fs.paths.CondOT()
        >>> start = path.interpolate(mixture.sample(8, seed=0), torch.randn(8, 1), 0.02)
        >>> srk = fs.solvers.bridges.Torchsde("srk", eta=1.0)
        >>> sol = fs.sample(mixture.flow(path), start=start, interval=(0.02, 0.98), solver=srk, nfe=40)
        >>> sol.x.shape, int(sol.nfe[0])
        (torch.Size([8, 1]), 40)
    """

    method: str = "euler"
    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}; expected one of torchsde's: {', '.join(METHODS)}")
        check_eta(self.eta)

    @property
    def random(self) -> bool:
        """Whether noise is drawn."""
        return self.eta > 0.0

    def check(self, flow: Flow, chart: Chart | None, start: float, end: float) -> None:
        """Time must rise, and where a step asks there must be an estimate and, with noise, a finite λ'."""
        if chart is not None:
            raise TypeError(f"Torchsde solves in flow time and has no chart; drop chart={chart.name!r}")
        if end < start:
            raise ValueError(
                f"{self!r} runs from noise to data, not from t = {start:g} to {end:g}; go back with an ODE solver such "
                "as Dopri5() or Torchdiffeq()"
            )
        for t in (start, end) if METHODS[self.method].at_end else (start,):
            flow.require(t, "the interval")
            point = flow.path.at(t)
            if self.eta and (point.alpha == 0.0 or point.sigma == 0.0):
                raise ValueError(
                    f"{self!r} asks at t = {t:g} of {flow.path!r}, where λ' is infinite and no explicit step exists; "
                    "use ExactSDE, which is exact there, or stay inside: interval="
                    f"({flow.path.time(-5.0):.6g}, {flow.path.time(5.0):.6g}) with start= a state at its first time"
                )

    def diffuse(
        self,
        ask: Callable[[Query], Estimate],
        path: Path,
        x: Tensor,
        start: float,
        end: float,
        budget: int | None,
        noise: Noise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry x from flow time `start` to `end`; see `flowsolve.solvers.base.ForeignSDE`."""
        library = require("torchsde", "bridges", f"Torchsde({self.method!r})")
        method = METHODS[self.method]
        steps, left = divmod((budget or 0) - method.first, method.evaluations)
        if steps < 1 or left:
            fits = [method.first + method.evaluations * max(1, steps + k) for k in (0, 1)]
            what = "nfe is missing" if budget is None else f"a budget of {budget} evaluations is no whole number"
            raise ValueError(f"{what}: {self.method} needs one of steps, for example {fits[0]} or {fits[1]}")
        drift = _Drift(ask, path, x.shape, self.eta)
        sde = SimpleNamespace(f=drift, sde_type=method.kind, noise_type="additive")
        if self.method == "reversible_heun":  # wants g itself: one number a component, each with a noise of its own
            sde.noise_type, sde.g = "diagonal", lambda t, y: torch.full_like(y, drift.diffusion(t))
        else:  # g times an increment, with no matrix of D² zeros
            sde.g_prod = lambda t, y, v: drift.diffusion(t) * v
        y = rows(x)
        motion = library.BrownianInterval(
            start, end, size=tuple(y.shape), dtype=y.dtype, device=y.device, entropy=_entropy(noise, start),
            levy_area_approximation=method.areas, dt=(end - start) / steps,
        )  # fmt: skip
        # torchsde adds steps up and stops at the end. Steps longer by 1e-10 make sure that rounding leaves no rest.
        size = (end - start) / steps * (1.0 + 1e-10)
        # On the way in it draws a sample from torch's global generator and drops it; that is undone.
        with torch.random.fork_rng(devices=[y.device] if y.is_cuda else []):
            states = library.sdeint(
                sde,
                y,
                torch.tensor([start, end], dtype=torch.float64, device="cpu"),
                bm=motion,
                method=self.method,
                dt=size,
            )
        out = states[-1].reshape(x.shape)
        return out, torch.full((len(x),), drift.calls, device="cpu"), _statuses(out, Status.SUCCESS)


class _Drift:
    """The drift of the SDE family, (t, y) → (B, D), that counts its questions and asks none twice in a row."""

    def __init__(self, ask: Callable[[Query], Estimate], path: Path, shape: torch.Size, eta: float) -> None:
        self.ask, self.path, self.shape, self.eta = ask, path, shape, eta
        self.calls = 0
        self.last: tuple[float, Tensor, Tensor] | None = None

    def mixing(self, t: float) -> tuple[Any, float]:
        """The path's point, and σλ' = σα̇/α − σ̇ there."""
        point = self.path.at(t)
        return point, point.sigma * point.alpha_dot / point.alpha - point.sigma_dot if self.eta else 0.0

    def diffusion(self, t: Any) -> float:
        """η g = η √(2σ²λ')."""
        point, rate = self.mixing(float(t))
        return self.eta * math.sqrt(max(0.0, 2.0 * point.sigma * rate))

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        time = float(t)
        if self.last is not None and self.last[0] == time and self.last[1] is y:
            return self.last[2]
        point, rate = self.mixing(time)
        self.calls += 1
        estimate = self.ask(Query(y.reshape(self.shape), time))
        drift = rows(estimate.combine(point.alpha_dot, point.sigma_dot - self.eta**2 * rate))
        self.last = time, y, drift
        return drift


def _entropy(noise: Noise, start: float) -> int:
    """128 bits that belong to a seed, some samples and the time at which a solve starts."""
    words = [noise.seed & (2**64 - 1), interval(start), *noise.samples.tolist()]
    state = np.random.SeedSequence(words).generate_state(4)
    return sum(int(word) << 32 * i for i, word in enumerate(state))
