r"""The SDE families of flows, as SDEs for `solve_sde`: any diffusion keeps the marginals.

With a flow's velocity u and score s, in flow time from noise to data,

$$ dx = \bigl[u + D(t)\,s\bigr]\,dt + \sqrt{2 D(t)}\;dW
      = \bigl[\dot\alpha\,\hat z + (\dot\sigma - D/\sigma)\,\hat\varepsilon\bigr]\,dt + \sqrt{2 D(t)}\;dW $$

has the flow's marginals for every D ≥ 0 (Fokker and Planck's equation: D s p = D ∇p, so the two terms cancel). Named:

| `diffusion` | D(t) | |
|---|---|---|
| η, a number or a function of t | $\eta^2\sigma^2\lambda'$ | `flowsolve.solvers.discrete`: 0 is the ODE |
| `"sbdm"` | c σ²λ' | the same with η² = c |
| `"constant"` | c | |
| `"sigma"` | c σ | Ma et al. 2024 |
| `"linear"` | c (1 − t) | |
| `"decreasing"` | ¼ (c cos πt + 1)² | |
| `"increasing-decreasing"` | c sin² πt | |

c is `scale`; the forms are SiT's (Ma et al. 2024), whose own spelling of their names is understood.

**Temperature** scales the variance of the noise, $\sqrt{2 D T}\,dW$, and leaves the drift: T < 1 gives up the marginals
for samples nearer to modes, the more so the larger D is (as it grows, those of $p_t^{1/T}$: Langevin dynamics).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.paths import Point

__all__ = ["FORMS", "FlowSDE"]

FORMS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, c: c,
    "linear": lambda t, c: c * (1.0 - t),
    "decreasing": lambda t, c: 0.25 * (c * math.cos(math.pi * t) + 1.0) ** 2,
    "increasing-decreasing": lambda t, c: c * math.sin(math.pi * t) ** 2,
}
"""D(t) by name, where it depends on time alone."""

NAMES = ("sbdm", "sigma", *FORMS)


@dataclass(frozen=True)
class FlowSDE:
    """A flow's SDE: drift `f` and diffusion `g` for `solve_sde`, with noise_type="additive".

    Solve it from a state at t0 to a later flow time. Where α = 0 the form η, and where σ = 0 the forms that do not
    vanish there, have no finite drift: begin or end inside, or with a scheme that does not ask at the end
    (`EulerMaruyama`).

    Attributes:
        flow: the flow.
        diffusion: η, a number or a function of flow time; or the name of a form, see the module.
        scale: c, of a named form.
        temperature: T; 1 keeps the marginals.
        cond: keyword arguments of the network.

    Raises:
        ValueError: an unknown form, or a number that is negative or not finite.

    Examples:
        >>> mixture, path = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2), fs.paths.CondOT()
        >>> start = mixture.marginal(path, 0.1).sample(8, seed=0)
        >>> sde = fs.sde.FlowSDE(mixture.flow(path), "sigma", scale=0.5)
        >>> sol = fs.solve_sde(sde.f, sde.g, start, 0.1, 0.98, steps=40, noise_type="additive")
        >>> sol.x.shape, int(sol.nfe[0])
        (torch.Size([8, 1]), 80)
    """

    flow: Flow
    diffusion: float | str | Callable[[float], float] = 1.0
    scale: float = 1.0
    temperature: float = 1.0
    cond: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.diffusion, str):  # SiT writes "SBDM" and "inccreasing-decreasing"
            object.__setattr__(self, "diffusion", self.diffusion.lower().replace("cc", "c"))
        if isinstance(self.diffusion, str) and self.diffusion not in NAMES:
            raise ValueError(f"diffusion = {self.diffusion!r}; expected eta, or one of {', '.join(NAMES)}")
        if not isinstance(self.diffusion, str) and not callable(self.diffusion):
            _check("diffusion (eta)", self.diffusion)
        _check("scale", self.scale)
        _check("temperature", self.temperature)

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        """The drift u + D s at flow time t, (B, *S)."""
        time = float(t)
        estimate = self.flow.estimate(x, time, **self.cond)
        point = estimate.point
        return estimate.combine(point.alpha_dot, point.sigma_dot - self._rates(time, point)[1])

    def g(self, t: Tensor, x: Tensor) -> float:
        """√(2 D T) at flow time t."""
        time = float(t)
        return math.sqrt(2.0 * self.temperature * self._rates(time, self.flow.path.at(time))[0])

    f.host_time = g.host_time = True  # type: ignore[attr-defined]  # times are read on the host

    def _rates(self, t: float, point: Point) -> tuple[float, float]:
        """D and D/σ."""
        alpha, sigma, alpha_dot, sigma_dot = (float(v) for v in point)
        form, c = self.diffusion, self.scale
        if not isinstance(form, str):
            eta = float(form(t)) if callable(form) else float(form)
            c = eta * eta
        if not isinstance(form, str) or form == "sbdm":
            if c == 0.0:
                return 0.0, 0.0
            if alpha == 0.0:
                raise ValueError(
                    f"D = η²σ²λ' is infinite at t = {t:g} of {self.flow.path!r}, where α = 0; begin inside, for "
                    f"example at t = {self.flow.path.time(-5.0):.6g}, or use another form such as diffusion='sigma'"
                )
            ratio = max(0.0, c * (sigma * alpha_dot / alpha - sigma_dot))
            return sigma * ratio, ratio
        if form == "sigma":
            return c * sigma, c
        found = FORMS[form](t, c)
        if found and sigma == 0.0:
            raise ValueError(
                f"the drift D s of diffusion={form!r} is infinite at t = {t:g} of {self.flow.path!r}, where σ = 0; end "
                f"before, for example at t = {self.flow.path.time(5.0):.6g}, or use a scheme that does not ask at the "
                "end, such as EulerMaruyama()"
            )
        return found, found / sigma if found else 0.0


def _check(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r}; expected a finite number >= 0")
