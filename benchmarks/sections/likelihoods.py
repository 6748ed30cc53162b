r"""Ways to a likelihood, ours and the peers', each behind one call that counts the passes of the network.

**The score_sde protocol** (Song et al. 2021, appendix D.2), from its description: state and log-determinant of the
whole batch as one system, solved by RK45 at rtol = atol, the network called once for the drift and once more for its
divergence. Here with scipy's `solve_ivp` and with torchdiffeq's `dopri5`, in flow time, over the window of the path.

**flow_matching**: `ODESolver.compute_likelihood`, on the straight path, which is the only one that it knows.

**k-diffusion**: `log_likelihood` on the denoiser in EDM's scaling, y = x/α from the σ/α of the data end to that of the
noise end (80 where that is infinite). It draws one probe of its own, so its errors have that noise in them.

All are given the trace that we are given (exact, or the same probe), but for k-diffusion.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import solvers
from flowsolve.likelihood.prior import normal_log_prob
from flowsolve.likelihood.trace import estimated, resolve
from flowsolve.noise import Noise
from sections.densities import Density
from sections.samplers import k_diffusion

__all__ = ["Found", "Way", "ours", "peers", "versions"]

Found = tuple[Tensor, float, Tensor | None]
LIBRARIES = ("scipy", "torchdiffeq", "flow-matching", "k-diffusion")


@dataclass(frozen=True)
class Way:
    """A likelihood method at one setting.

    Attributes:
        name: the method.
        setting: its budget or tolerance.
        run: (problem) → log p (B,); passes of the network a sample; its own estimate of its error in nats, if any.
    """

    name: str
    setting: float
    run: Callable[[Density], Found]


def versions() -> dict[str, str | None]:
    """Of the peers; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def ours(budgets: tuple[int, ...], tolerances: tuple[float, ...], kept: bool) -> list[Way]:
    """The curve at each budget, Dopri5 at each tolerance, and RK4 and Heun on uniform flow time.

    Args:
        kept: whether the noise end keeps signal: then also with the marginal there instead of the normal prior.
    """

    def way(name: str, setting: float, **options: Any) -> Way:
        def run(p: Density) -> Found:
            out = fs.log_prob(p.flow, p.x, **p.trace, **options)
            return out.log_prob, float(out.nfe.double().mean()), out.error

        return Way(name, setting, run)

    fixed = [n for n in budgets if n % 4 == 0]
    return [
        *(way("curve", n, nfe=n) for n in budgets),
        *(way("curve, marginal prior", n, nfe=n, prior="marginal") for n in budgets if kept),
        *(way("Dopri5", t, solver=solvers.Dopri5(t, t)) for t in tolerances),
        *(way("RK4, uniform t", n, solver=solvers.RK4(), nfe=n) for n in fixed),
        *(way("Heun, uniform t", n, solver=solvers.Heun(), nfe=n) for n in fixed),
    ]


def peers(p: Density, tolerances: tuple[float, ...]) -> list[Way]:
    """Those that are installed and know the problem's path."""
    kinds: dict[str, Callable[[Density, float], Found]] = {
        "score_sde protocol, scipy": _scipy,
        "score_sde protocol, torchdiffeq": _torchdiffeq,
    }
    straight = isinstance(p.flow.path, fs.paths.CondOT) and p.flow.path.sigma_min == 0.0
    few = p.x.ndim == 2 and p.x.shape[1] <= 64  # its exact divergence takes a backward pass a dimension
    theirs = straight and few and importlib.util.find_spec("flow_matching")
    if theirs:
        kinds["flow_matching, dopri5"] = partial(_flow_matching, "dopri5")
    if k_diffusion() is not None:
        kinds["k-diffusion"] = _k_diffusion
    found = [Way(name, t, partial(_at, run, t)) for name, run in kinds.items() for t in tolerances]
    if theirs:
        euler = partial(_flow_matching, "euler")
        found += [Way("flow_matching, euler", n, partial(_at, euler, 1.0 / n)) for n in (16, 48, 128)]
    return found


def _at(run: Callable[[Density, float], Found], setting: float, p: Density) -> Found:
    return run(p, setting)


class _Protocol:
    """dx/dt and d log det/dt of a batch in flow time, by two passes of the network."""

    def __init__(self, p: Density) -> None:
        self.p, self.passes = p, 0
        self.estimator = resolve(p.trace["trace"], p.trace.get("probes"))
        probes = self.estimator.draw(p.x, Noise.for_batch(p.trace.get("seed", 0), len(p.x)))
        self.tree = {"cond": {}, "probes": probes}

    def __call__(self, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
        t = min(max(t, 0.0), self.p.flow.path.window[1])
        point = self.p.flow.path.at(t)
        drift = self.p.flow.velocity(x, t)
        estimate, trace = estimated(self.p.flow, self.estimator, x, t, point, self.tree, False)
        k_x, k_o = estimate.coefficients(point.alpha_dot, point.sigma_dot)
        self.passes += 2
        return drift.detach(), k_x * x[0].numel() + k_o * trace.mean(1)

    def finish(self, latent: Tensor, logdet: Tensor) -> Found:
        return normal_log_prob(latent, self.p.flow.path.prior_std) + logdet, float(self.passes), None


def _scipy(p: Density, tolerance: float) -> Found:
    from scipy.integrate import solve_ivp

    rhs, shape = _Protocol(p), p.x.shape

    def flat(t: float, y: np.ndarray[Any, Any]) -> Any:
        x = torch.from_numpy(y[: -shape[0]]).to(p.x.dtype).reshape(shape)
        return np.concatenate([v.double().numpy().ravel() for v in rhs(t, x)])

    start = np.concatenate((p.x.double().numpy().ravel(), np.zeros(shape[0])))
    end = p.flow.path.window[1]
    found = solve_ivp(flat, (end, _last(p)), start, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1]
    latent, logdet = torch.from_numpy(found[: -shape[0]]).reshape(shape), torch.from_numpy(found[-shape[0] :])
    return rhs.finish(latent, logdet)


def _torchdiffeq(p: Density, tolerance: float) -> Found:
    from torchdiffeq import odeint

    rhs = _Protocol(p)
    times = torch.tensor([p.flow.path.window[1], _last(p)], dtype=torch.float64)
    begin = (p.x, p.x.new_zeros(len(p.x)))
    x, logdet = odeint(lambda t, y: rhs(float(t), y[0]), begin, times, rtol=tolerance, atol=tolerance, method="dopri5")
    return rhs.finish(x[-1], logdet[-1])


def _last(p: Density) -> float:
    """The time where a protocol stops: a noise prediction does not exist at α = 0."""
    return 0.0 if not p.flow.prediction.singular(p.flow.path.at(0.0)) else 1e-5


def _flow_matching(method: str, p: Density, setting: float) -> Found:
    from flow_matching.solver import ODESolver

    calls = 0

    def velocity(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return p.flow.velocity(x, min(max(float(t), 0.0), 1.0))  # its first trial step leaves the interval

    adaptive = method == "dopri5"
    _, log = ODESolver(velocity_model=velocity).compute_likelihood(
        x_1=p.x,
        log_p0=lambda x: normal_log_prob(x, 1.0),
        step_size=None if adaptive else setting,
        method=method,
        atol=setting if adaptive else 1e-5,
        rtol=setting if adaptive else 1e-5,
        exact_divergence=True,
    )
    return log.detach(), float(calls), None


def _k_diffusion(p: Density, tolerance: float) -> Found:
    path, calls = p.flow.path, 0
    data = path.at(path.window[1])
    low = float(data.sigma / data.alpha) or 2e-3
    noise = path.at(0.0)
    high = float(noise.sigma / noise.alpha) if noise.alpha else 80.0

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        t = path.time(-math.log(float(sigma.flatten()[0])))
        return p.flow.data(y * path.alpha(t), t)

    torch.manual_seed(0)
    module: Any = k_diffusion()
    found, _ = module.log_likelihood(denoise, p.x / data.alpha, low, high, atol=tolerance, rtol=tolerance)
    return found - p.x[0].numel() * math.log(data.alpha), float(calls), None
