r"""torchsde's `sdeint`, `sdeint_adjoint` and `BrownianInterval`, on flowsolve: existing code changes its import line.

    from flowsolve.compat.torchsde import sdeint             # instead of: from torchsde import sdeint

Nothing of torchsde is installed or run.

| method | here |
|---|---|
| `euler`, `milstein` (`options={"grad_free": …}`), `euler_heun`, `heun`, `midpoint`, `reversible_heun` | the same |
| `srk` | the same with additive noise (SRA1); Rößler's SRI1W1 in place of SRID2 with diagonal and scalar noise |

With the same increments (`bm=`, torchsde's own objects included) the same schemes give the same states to rounding,
but for two deviations, both of `milstein`: with scalar noise its term is (∂g/∂y) g here and (∂g/∂y)ᵀ g there, which
does not converge where ∂g/∂y is not symmetric; and `grad_free` takes a central difference for Stratonovich's equation
here, and there a one-sided one, whose error W², unlike W² − h, does not average out: order ½.

What differs:

* **The motion** that is drawn without `bm=` is flowsolve's (`flowsolve.sde.motion`), its seed drawn from torch's global
  generator. `BrownianInterval` is a path for each row of `size`, a function of `entropy` and the row alone, whatever
  was asked for before, in any batch, without a tree in memory. `dt`, `tol`, `pool_size`, `cache_size` and
  `halfway_tree`, which only say how a tree is kept, are taken and do nothing.
* Times of `ts` between two steps get a shorter step of the method, along the same motion (there: a straight line).
* Steps are ts[0] + k dt (there: dt added up).
* `sdeint_adjoint` differentiates the steps that were made: with `reversible_heun` by undoing them, with memory of O(1),
  with other methods by checkpoints, of O(√steps). Options of the adjoint SDE's own solver draw a warning and are not
  used.
* States that are not finite raise `flowsolve.SolverError` (there: NaN is returned).
* `adaptive=True` gives every sample steps of its own (`flowsolve.sde.adaptive`), f and g times of shape (B, 1), and
  needs a method of strong order 1; dt and dt_min are not used (there: one step for the whole batch).
* Unknown arguments are a TypeError (there: a warning).

What is not here, and says so: `method="log_ode"` and Lévy areas of pairs (`return_A`, "davie", "foster"),
`extra` and `extra_solver_state`, and a motion with given `W` or `H`. Products (`g_prod`) serve as
columns of g. The methods of the installed torchsde run on flows as `flowsolve.solvers.bridges.Torchsde`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._batch import rows
from flowsolve.compat._torchsde import check_kinds, functions, with_ratio
from flowsolve.noise import Noise
from flowsolve.sde import BrownianPath, Milstein, Scheme, solve_sde
from flowsolve.sde.motion import Drive, Motion
from flowsolve.sde.schemes import SCHEMES
from flowsolve.solvers.bridges import spaced

__all__ = [
    "BaseSDE", "BrownianInterval", "SDEIto", "SDEStratonovich", "brownian_interval_like", "sdeint", "sdeint_adjoint",
]  # fmt: skip

METHODS = ("euler", "milstein", "srk", "midpoint", "heun", "euler_heun", "reversible_heun")
AREAS = ("none", "space-time", "davie", "foster")
ITO = ("euler", "srk")  # methods of Itô's equation; milstein is for both
BRIDGE = "the installed torchsde has it (on flows: flowsolve.solvers.bridges.Torchsde)"


class BaseSDE(nn.Module):
    """An SDE's kinds of noise and of calculus, as a module."""

    def __init__(self, noise_type: str, sde_type: str) -> None:
        super().__init__()
        check_kinds(noise_type, sde_type)
        self.noise_type, self.sde_type = noise_type, sde_type


class SDEIto(BaseSDE):
    """An Itô SDE."""

    def __init__(self, noise_type: str) -> None:
        super().__init__(noise_type, "ito")


class SDEStratonovich(BaseSDE):
    """A Stratonovich SDE."""

    def __init__(self, noise_type: str) -> None:
        super().__init__(noise_type, "stratonovich")


class BrownianInterval:
    """Brownian motion over [t0, t1]: increments, and on request their time integrals, as torchsde gives them.

    Args:
        t0, t1: the interval.
        size: (B, m): row i is sample i, whatever B is.
        dtype, device: of what is drawn; torch's defaults.
        entropy: the seed; None draws one from torch's global generator.
        levy_area_approximation: "none", or "space-time" and what torchsde has beyond it, "davie" and "foster"; areas of
            pairs are not here.
        dt, tol, pool_size, cache_size, halfway_tree: how torchsde keeps its tree; nothing here.
        W, H: not here.

    Examples:
        >>> from flowsolve.compat.torchsde import BrownianInterval
        >>> bm = BrownianInterval(0.0, 1.0, size=(4, 2), entropy=3)
        >>> bool(torch.allclose(bm(0.0, 0.3) + bm(0.3, 1.0), bm(0.0, 1.0), atol=1e-6))
        True
    """

    def __init__(
        self,
        t0: float = 0.0,
        t1: float = 1.0,
        size: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        entropy: int | None = None,
        dt: Any = None,
        tol: float = 0.0,
        pool_size: int = 8,
        cache_size: int | None = 45,
        halfway_tree: bool = False,
        levy_area_approximation: str = "none",
        W: Tensor | None = None,
        H: Tensor | None = None,
    ) -> None:
        if W is not None or H is not None:
            raise NotImplementedError(f"a BrownianInterval with given W or H is not here; {BRIDGE}")
        if levy_area_approximation not in AREAS:
            raise ValueError(
                f"levy_area_approximation = {levy_area_approximation!r}; expected one of {', '.join(AREAS)}"
            )
        if size is None:
            raise ValueError("size is missing; expected that of an increment, (batch, channels)")
        self.levy_area_approximation = levy_area_approximation
        self.entropy = int(torch.randint(2**63 - 1, (), device="cpu")) if entropy is None else int(entropy)
        self._like = torch.empty(tuple(size), dtype=dtype, device=device)
        self._rows = rows(self._like) if self._like.ndim else self._like.reshape(1, 1)
        noise = Noise.of(self.entropy, len(self._rows))
        self.path = BrownianPath(float(t0), float(t1), noise)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        """W(tb) − W(ta), or W(ta) − W(t0); with return_U also the integral of W(r) − W(ta) over the interval."""
        if return_A:
            raise NotImplementedError(f"return_A=True, Lévy areas of pairs, is not here; {BRIDGE}")
        if return_U and self.levy_area_approximation == "none":
            raise ValueError('return_U=True needs levy_area_approximation="space-time"')
        a, b = (self.path.t0, float(ta)) if tb is None else (float(ta), float(tb))
        a, b = (min(max(t, self.path.t0), self.path.t1) for t in (a, b))
        if a > b:
            raise RuntimeError(f"ta = {a:g} is later than tb = {b:g}")
        w, area = self.path.drive(a, b, self._rows, return_U)
        w = w.reshape(self.shape)
        return w if area is None else (w, (b - a) * (0.5 * w + area.reshape(self.shape)))

    @property
    def shape(self) -> torch.Size:
        """That of an increment."""
        return self._like.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of an increment."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where increments are."""
        return self._like.device

    def size(self) -> torch.Size:
        """That of an increment."""
        return self.shape

    def __repr__(self) -> str:
        return (
            f"BrownianInterval(t0={self.path.t0}, t1={self.path.t1}, size={tuple(self.shape)}, entropy={self.entropy})"
        )


def brownian_interval_like(y: Tensor, t0: float = 0.0, t1: float = 1.0, **options: Any) -> BrownianInterval:
    """A `BrownianInterval` of a tensor's size, dtype and device, unless options say otherwise."""
    given = {"size": tuple(y.shape), "dtype": y.dtype, "device": y.device, **options}
    return BrownianInterval(t0, t1, **given)


def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Any,
    bm: Any = None,
    method: str | None = None,
    dt: Any = 1e-3,
    adaptive: bool = False,
    rtol: Any = 1e-5,
    atol: Any = 1e-4,
    dt_min: Any = 1e-5,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Any = None,
) -> Any:
    """States of an SDE at the times ts, (T, B, d), by steps of dt; gradients through the steps.

    Args:
        sde: an object with noise_type, sde_type and f(t, y), g(t, y), or f_and_g(t, y): f of shape (B, d), g of shape
            (B, d) for diagonal noise, (B, d, m) for other noise.
        y0: (B, d), the state at ts[0].
        ts: strictly rising times.
        bm: the Brownian motion: a `BrownianInterval`, torchsde's own, or any function of (ta, tb) with increments.
        method: see the module; the default as in torchsde.
        dt: the length of a step.
        options: {"grad_free": True} for milstein.
        names: other names of the drift, diffusion, prior drift and drift_and_diffusion.
        logqp: return also the integrals of ½ |g⁻¹ (f − h)|² over the intervals of ts, (T − 1, B), h the prior drift.
        adaptive, rtol, atol: find steps under tolerances, for each sample.
        dt_min, extra, extra_solver_state: not here.

    Raises:
        NotImplementedError: what is not here, by name.
        ValueError, TypeError: bad arguments.
        SolverError: a sample met a value that is not finite.
    """
    _lacking(extra=extra, extra_solver_state=extra_solver_state)
    tolerances = (float(rtol), float(atol)) if adaptive else None
    return _solved(sde, y0, ts, bm, method, dt, options, names, logqp, "direct", tolerances)


def sdeint_adjoint(
    sde: Any,
    y0: Tensor,
    ts: Any,
    bm: Any = None,
    method: str | None = None,
    adjoint_method: str | None = None,
    dt: Any = 1e-3,
    adaptive: bool = False,
    adjoint_adaptive: bool = False,
    rtol: Any = 1e-5,
    adjoint_rtol: Any = 1e-5,
    atol: Any = 1e-4,
    adjoint_atol: Any = 1e-4,
    dt_min: Any = 1e-5,
    options: Mapping[str, Any] | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Any = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Any = None,
) -> Any:
    """`sdeint` with gradients of the same steps in less memory: O(1) for reversible_heun, O(√steps) otherwise.

    Args:
        adjoint_params: tensors that the sde depends on and that no search of it finds; all others are found.
        adjoint_method, adjoint_options, adjoint_adaptive: of an adjoint SDE's solver, which is not needed here.

    The rest is as in `sdeint`.
    """
    _lacking(extra=extra, extra_solver_state=extra_solver_state)
    used = adjoint_method not in (None, "adjoint_reversible_heun") or adjoint_options or adjoint_adaptive
    if used or (adjoint_rtol, adjoint_atol) != (1e-5, 1e-4):
        warnings.warn(
            "gradients are those of the steps that were made: adjoint_method, adjoint_options, adjoint_adaptive, "
            "adjoint_rtol and adjoint_atol are not used",
            stacklevel=2,
        )
    mode = "adjoint" if method == "reversible_heun" else "checkpoint"
    tolerances = (float(rtol), float(atol)) if adaptive else None
    params = None if adjoint_params is None else [p for p in adjoint_params if p.requires_grad]
    return _solved(sde, y0, ts, bm, method, dt, options, names, logqp, mode, tolerances, params)


def _solved(
    sde: Any,
    y0: Tensor,
    ts: Any,
    bm: Any,
    method: str | None,
    dt: Any,
    options: Mapping[str, Any] | None,
    names: Mapping[str, str] | None,
    logqp: bool,
    mode: str,
    tolerances: tuple[float, float] | None,
    params: Any = None,
) -> Any:
    drift, diffusion, prior = functions(sde, names or {}, bm)
    noise_type, sde_type = sde.noise_type, sde.sde_type
    if not isinstance(y0, Tensor) or y0.ndim != 2:
        raise ValueError(f"y0 is {_said(y0)}; expected a tensor of shape (batch, channels)")
    times = [float(t) for t in ts]
    size = float(dt)
    if len(times) < 2 or not all(a < b for a, b in pairwise(times)):
        raise ValueError(f"ts = {times}; expected strictly rising times, two at least")
    if not 0.0 < size < math.inf:
        raise ValueError(f"dt = {dt!r}; expected a positive step size")
    if method is None:
        method = "midpoint" if sde_type == "stratonovich" else "euler" if noise_type == "general" else "srk"
    scheme = _scheme(method, sde_type, options)
    motion: Any = "fresh" if bm is None else _Given(bm, spare=logqp and noise_type == "diagonal")
    if method == "srk" and getattr(bm, "levy_area_approximation", None) == "none":
        raise ValueError('srk needs a motion with levy_area_approximation="space-time"')
    if logqp:
        drift, diffusion = with_ratio(drift, diffusion, prior, noise_type)
        y0 = torch.cat((y0, y0.new_zeros(len(y0), 1)), 1)
    if noise_type == "scalar":
        whole = diffusion
        diffusion = lambda t, y: whole(t, y).squeeze(-1)  # noqa: E731
    if tolerances is None:
        steps: dict[str, Any] = {"steps": spaced(times[0], times[-1], size)}
    else:
        steps = {"rtol": tolerances[0], "atol": tolerances[1]}
        motion = _followed(bm, times)
    sol = solve_sde(
        drift, diffusion, y0, times[0], times[-1], solver=scheme, **steps,
        noise_type=noise_type, sde_type=sde_type, t_eval=times, noise=motion,
        seed=int(torch.randint(2**63 - 1, (), device="cpu")),
        gradient=mode, params=params,
    )  # fmt: skip
    if not logqp:
        return sol.x
    states, ratio = sol.x.split((y0.shape[1] - 1, 1), 2)
    return states, ratio.squeeze(2).diff(dim=0)


def _followed(bm: Any, times: Sequence[float]) -> str | BrownianPath:
    """The path that adaptive steps follow."""
    if bm is None:
        return "brownian"
    if not isinstance(bm, BrownianInterval) or (bm.path.t0, bm.path.t1) != (times[0], times[-1]):
        raise NotImplementedError(
            "adaptive=True follows a BrownianInterval of flowsolve.compat.torchsde over [ts[0], ts[-1]], or bm=None"
        )
    return bm.path


def _scheme(method: str, sde_type: str, options: Mapping[str, Any] | None) -> Scheme:
    if method in ("log_ode", "adjoint_reversible_heun"):
        raise NotImplementedError(f"method = {method!r} is not here; {BRIDGE}")
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}")
    if method != "milstein" and (method in ITO) != (sde_type == "ito"):
        raise ValueError(
            f"method = {method!r} is for the other calculus than sde_type = {sde_type!r}; use another, or "
            "flowsolve.solve_sde, which corrects the drift"
        )
    known = ("grad_free",) if method == "milstein" else ()
    if unknown := [name for name in options or {} if name not in known]:
        expected = f"expected {known[0]!r} only" if known else "it has none"
        raise TypeError(f"options holds {unknown[0]!r}, which {method} does not know; {expected}")
    return Milstein(derivatives=False) if (options or {}).get("grad_free") else SCHEMES[method]


@dataclass(frozen=True)
class _Given(Motion):
    """A motion that a function of (ta, tb) gives, with return_U where its integral is wanted.

    Attributes:
        bm: the function.
        spare: whether the last channel moves nothing, and may be missing.
    """

    bm: Any
    spare: bool = False

    def part(self, a: float, b: float, t: float, like: Tensor, area: bool) -> Drive:
        """See `flowsolve.sde.motion.Motion`."""
        found = self.bm(a, t, return_U=True) if area else self.bm(a, t)
        w, integral = found if area else (found, None)
        if self.spare and w.ndim == 2 and w.shape[1] == like.shape[1] - 1:
            w, integral = (None if v is None else nn.functional.pad(v, (0, 1)) for v in (w, integral))
        if w.shape != like.shape:
            raise ValueError(f"bm gave increments of shape {tuple(w.shape)}; expected {tuple(like.shape)}")
        w = w.to(like)
        return w, None if integral is None else integral.to(like) / (t - a) - 0.5 * w

    def drives(self, nodes: Sequence[float], like: Tensor, area: bool) -> Iterator[Drive]:
        """See `flowsolve.sde.motion.Motion`."""
        for a, b in pairwise(nodes):
            yield self.part(a, b, b, like, area)


def _lacking(**options: Any) -> None:
    """Raise NotImplementedError for what is asked for and not here."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}= is not here; drop it, or {BRIDGE}")


def _said(v: Any) -> str:
    return f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
