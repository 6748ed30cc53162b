r"""Other libraries' samplers beside ours: the same network, nodes, start and noise, in float64.

**Network.** The exact E[ε | x] of a Gaussian mixture, known at every noise level σ̃ = σ/α, so that a peer is answered at
its own σ̃ whatever integer it calls that by.

**Coordinates.** All states compared are x/α, in which a noise level is all there is to a path. A peer runs in its own
scale (VP, or α = 1); its nodes are read from it, and our solver visits the very same on a path of another kind.

**Noise.** Both are given the same ξ for the same interval of noise levels, in the place of what they would draw.

**Precision.** diffusers casts tables, noise levels and states to float32. In a scheduler's module the names
`torch.float32` and `np.float32` are made to mean float64 while it runs; nothing else of it is touched.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve.noise import Noise
from flowsolve.paths import CondOT, Path, Point
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import Solver

Draw = Callable[[Any, Any], Tensor]
"""The noise of a step between two levels."""

DIMS, BATCH = 3, 5
PATH = CondOT()
MEANS = [[-1.0, 0.5, 0.2], [1.0, 1.0, -0.5], [0.3, -1.0, 0.8]]
PROBLEM = GaussianMixture(
    torch.tensor(MEANS, dtype=torch.float64), torch.tensor([0.5, 0.7, 0.6], dtype=torch.float64), [0.5, 0.3, 0.2]
)


def normal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, DIMS, generator=generator, dtype=torch.float64)


def xi(before: Any, after: Any) -> Tensor:
    """The noise of a step between two levels."""
    return normal(zlib.crc32(f"{float(before):.6e} {float(after):.6e}".encode()))


def silence(before: Any, after: Any) -> Tensor:
    """No noise, where a method that draws some is taken for what it does without."""
    return torch.zeros(BATCH, DIMS, dtype=torch.float64)


def carried(before: Any, after: Any) -> Tensor:
    """The noise of a step with η = 1 whose stage, halfway in λ, has noise too: that of the stage, carried on.

    In a step of x/α from a to b the noise is τ = b √(1 − b²/a²), and what was there falls by (b/a)².
    """

    def tau(a: float, b: float) -> float:
        return b * math.sqrt(1.0 - b * b / (a * a))

    a, b = float(before), float(after)
    mid = math.sqrt(a * b)
    return ((b / mid) ** 2 * tau(a, mid) * xi(a, mid) + tau(mid, b) * xi(mid, b)) / tau(a, b)


def start(level: float) -> Tensor:
    """z + σ̃ ε: samples of the marginal at a noise level, as x/α."""
    return PROBLEM.sample(BATCH, seed=3) + level * normal(7)


def eps(y: Tensor, level: float) -> Tensor:
    """E[ε | x] at y = x/α."""
    return PROBLEM.noise(y, Point(1.0, float(level), 0.0, 0.0))


def denoised(y: Tensor, level: Any) -> Tensor:
    """E[z | x] at y = x/α: what k-diffusion calls the model. The level is a float or one a sample, all the same."""
    sigma = float(level.flatten()[0]) if isinstance(level, Tensor) else float(level)
    return PROBLEM.data(y, Point(1.0, sigma, 0.0, 0.0))


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert theirs.dtype == torch.float64
    assert bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(
    solver: Solver,
    levels: Sequence[float],
    *,
    chart: str | None = None,
    path: Path = PATH,
    noise: Draw = xi,
    final: str = "path",
    begin: Tensor | None = None,
) -> Tensor:
    """x/α at the last of the noise levels (with final="denoise", ẑ there), from `start` at the first."""
    times = [path.time(-math.log(s)) if s else 1.0 for s in levels]

    def step(self: Noise, t: float, t_next: float, like: Tensor) -> Tensor:
        before, after = (path.at(u) for u in (t, t_next))
        return noise(before.sigma / before.alpha, after.sigma / after.alpha)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noise, "step", step)
        sol = fs.sample(
            PROBLEM.flow(path, "noise"), start=path.alpha(times[0]) * (start(levels[0]) if begin is None else begin),
            interval=(times[0], times[-1]), solver=solver, grid=times, chart=chart, final=final,
        )  # fmt: skip
    return sol.x if final == "denoise" else sol.x / path.alpha(times[-1])


# --- diffusers --------------------------------------------------------------------------------------------------------


class Double:
    """A module in which float32 means float64."""

    def __init__(self, module: Any, double: Any) -> None:
        self._module, self.float32 = module, double

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def in_double(cls: Any, draw: Callable[[], Tensor]) -> Iterator[None]:
    """What a scheduler's module computes, computed in float64; its random numbers replaced."""
    module = sys.modules[cls.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Double(torch, torch.float64))
        if hasattr(module, "np"):
            patch.setattr(module, "np", Double(np, np.float64))
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *args, **kwargs: draw())
        yield


def listed(s: Any) -> list[float]:
    """The noise levels σ̃ that a scheduler lists, in its order."""
    if hasattr(s, "sigmas"):
        return [float(v) for v in s.sigmas]
    last = float(getattr(s, "final_alpha_cumprod", 1.0))
    return [math.sqrt((1.0 - a) / a) for a in [*s.alphas_cumprod[s.timesteps.long()].tolist(), last]]


def distinct(levels: Sequence[float]) -> list[float]:
    """Each once, where neighbours are the same up to rounding."""
    return [v for i, v in enumerate(levels) if i == 0 or v < levels[i - 1] * (1.0 - 1e-6)]


def diffusers_levels(name: str, steps: int, **config: Any) -> list[float]:
    """The noise levels that a scheduler lists, in its order."""
    cls = getattr(pytest.importorskip("diffusers"), name)
    with in_double(cls, lambda: normal(0)):
        s = cls(**config)
        s.set_timesteps(steps)
        return listed(s)


def diffusers_solve(
    name: str,
    steps: int,
    *,
    noise: Draw = xi,
    levels: Sequence[float] | None = None,
    begin: Tensor | None = None,
    step_options: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[list[float], Tensor]:
    """The noise levels that a scheduler visits, and x/α where it ends.

    Args:
        name: its class.
        steps: for its set_timesteps.
        noise: what it draws.
        levels: noise levels to put in the place of its own.
        begin: x/α at the first.
        step_options: for its step.
        config: of the scheduler.
    """
    cls = getattr(pytest.importorskip("diffusers"), name)
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return noise(visited[drawn - 1], visited[drawn])

    with in_double(cls, draw):
        s = cls(**config)
        s.set_timesteps(steps)
        if levels is not None:
            s.sigmas = torch.tensor(levels, dtype=torch.float64)
        visited = distinct(listed(s))
        if hasattr(s, "noise_sampler"):
            s.noise_sampler = noise
        exploding = float(getattr(s, "init_noise_sigma", 1.0)) > 1.0  # its state is x/α
        x = start(visited[0]) if begin is None else begin
        x = x if exploding else x / math.sqrt(1.0 + visited[0] ** 2)
        for i, t in enumerate(s.timesteps):
            scaled = s.scale_model_input(x, t)
            index = s.step_index if exploding else i
            level = listed(s)[index]
            if not getattr(s, "state_in_first_order", True):  # within a step; each keeps that in its own way
                if hasattr(s, "sigmas_interpol"):
                    level = float(s.sigmas_interpol[index - ("Ancestral" in name)])
                elif hasattr(s, "mid_point_sigma"):
                    level = float(s.mid_point_sigma)
            output = eps(scaled * math.sqrt(1.0 + level**2), level)
            x = s.step(output, t, x, **(step_options or {})).prev_sample
            assert x.dtype == torch.float64
    return visited, x if exploding else x * math.sqrt(1.0 + visited[-1] ** 2)


def edm_solve(name: str, steps: int, **config: Any) -> tuple[list[float], Tensor]:
    """The same for schedulers of EDM's own networks: the output is F, ẑ = c_skip x + c_out F."""
    cls = getattr(pytest.importorskip("diffusers"), name)
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return xi(levels[drawn - 1], levels[drawn])

    with in_double(cls, draw):
        s = cls(sigma_min=0.03, sigma_max=20.0, **config)
        s.set_timesteps(steps)
        levels, width = listed(s), float(s.config.sigma_data)
        x = start(levels[0])
        for level, t in zip(levels, s.timesteps, strict=False):
            s.scale_model_input(x, t)
            norm = level * level + width * width
            output = (denoised(x, level) - width * width / norm * x) * math.sqrt(norm) / (level * width)
            x = s.step(output, t, x).prev_sample
    return levels, x


# --- k-diffusion ------------------------------------------------------------------------------------------------------


def k_diffusion() -> Any:
    """k-diffusion's sampling.py alone: of its package it needs one function, and of its libraries three it has here."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("k-diffusion is not installed (pip install --no-deps k-diffusion)")
    for needed in ("scipy", "torchdiffeq", "torchsde", "tqdm"):
        pytest.importorskip(needed)
    utils = types.ModuleType("_peer_k_diffusion.utils")
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    parent = types.ModuleType("_peer_k_diffusion")
    parent.utils, parent.__path__ = utils, []  # type: ignore[attr-defined]
    where = f"{spec.submodule_search_locations[0]}/sampling.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "_peer_k_diffusion", parent)
        patch.setitem(sys.modules, "_peer_k_diffusion.utils", utils)
        found = importlib.util.spec_from_file_location("_peer_k_diffusion.sampling", where)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    return module


def k_solve(name: str, levels: Sequence[float], *, noise: Draw = xi, **options: Any) -> Tensor:
    """Where sample_… of k-diffusion ends, from `start` at the first level."""
    module, sampler = k_diffusion(), f"sample_{name}"
    drawn = 0

    class Given(Double):
        def randn_like(self, x: Tensor) -> Tensor:
            nonlocal drawn
            drawn += 1
            return noise(levels[drawn - 1], levels[drawn])

    module.torch = Given(torch, torch.float32)
    function = getattr(module, sampler)
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = noise
    listed = torch.tensor(list(levels), dtype=torch.float64)
    return function(denoised, start(levels[0]), listed, disable=True, **options)  # type: ignore[no-any-return]


# --- noise levels -----------------------------------------------------------------------------------------------------


def karras(steps: int, clean: bool = True) -> list[float]:
    """Noise levels of Karras et al. 2022 from 20 to 0.03, the last 0 if clean: steps + 1 in all."""
    count, rho = steps if clean else steps + 1, 7.0
    a, b = 20.0 ** (1 / rho), 0.03 ** (1 / rho)
    return [(a + i / (count - 1) * (b - a)) ** rho for i in range(count)] + [0.0] * clean


def even(steps: int, highest: float = 1.5, lowest: float = -1.5) -> list[float]:
    """Noise levels whose logarithms are evenly spaced."""
    return [math.exp(highest + (lowest - highest) * i / steps) for i in range(steps + 1)]


def eased(steps: int, highest: float = 1.5, lowest: float = -1.5) -> list[float]:
    """The same after steps of h², 4 h², 16 h², … up to h: a start by orders 1 and 2 then costs no order up to 4."""
    h, levels = (highest - lowest) / steps, [highest]
    size = h * h
    while size < h:
        levels.append(levels[-1] - size)
        size *= 4.0
    first = levels[-1]
    rest = [first + (lowest - first) * i / steps for i in range(1, steps + 1)]
    return [math.exp(v) for v in (*levels, *rest)]
