r"""Kernels: the three passes over the state that a Runge–Kutta step consists of, and the noise of a random one.

| kernel | computes | state-sized reads |
|---|---|---|
| `Slopes.advance` | $y' = y + h \sum_j w_{bj} k_j$: a stage, or the new state | 1 + m |
| `Slopes.error_norm` | the norm of $h \sum_j w_{bj} k_j$ in units of atol + rtol·max(\|y\|, \|y'\|) | 2 + m |
| `Slopes.merge` | the new state where a step was accepted, the old one elsewhere | 1 |
| `combination` | $\sum_j w_j v_j$: a step of a multistep method (CUDA only) | m |
| `normals` | $\sum_i w_i \xi_i$, standard normals computed from their addresses (`flowsolve.kernels.philox`) | 0 |

On the host, `aim` and `judge` are the arithmetic of step control (`flowsolve.kernels.control`).

Each has a twin in plain torch (`flowsolve.kernels.twin`), which runs anywhere and which autograd sees through, and
fused versions that pass over memory once: numba on the CPU (`cpu`), Triton on CUDA (`cuda`). The fused ones serve where
no gradient is recorded and the tensors are contiguous and plain. On the CPU, sums of slopes, decisions about steps and
normals have the same bits in all versions (see `twin`), on CUDA normals have, and sums agree to rounding.

**When is a compiler worth waiting for?** Loading the compiled kernels costs about a second (the first time on a
machine, some more), so a short solve must not wait for them. The rule is the ski rental's: the twin serves until it has
cost what loading would (by a fixed estimate of its work, not by a clock, so that a program's numbers are the same
whenever it runs), then the kernels are loaded and kept on disk. On the CPU that decides nothing but speed. `use` says
otherwise, for a block or, in the environment variable FLOWSOLVE_KERNELS, for a process: "auto", "torch" (twins only) or
"fused" (at once).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from flowsolve.kernels import control, twin
from flowsolve.kernels.control import Law, Verdict
from flowsolve.kernels.twin import host, largest, rms

__all__ = [
    "Law",
    "Slopes",
    "Steered",
    "Verdict",
    "aim",
    "combination",
    "host",
    "judge",
    "largest",
    "mode",
    "normals",
    "rms",
    "use",
]

MODES = ("auto", "torch", "fused")
PRICE = 1.0  # seconds that loading costs
CALL, BYTE = 2e-4, 1e-9  # estimated seconds that a step costs more without the kernels, and per byte of the state
NOISE_CALL, NOISE_BYTE = 4e-4, 6e-9  # and normals

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]
Norm = Callable[[Tensor], Tensor]

SERVED = frozenset((torch.float32, torch.float64))
_within_transform = torch._C._functorch.maybe_current_level  # vmap, jvp, …: their tensors have no memory to point at

START = os.environ.get("FLOWSOLVE_KERNELS", "auto")
if START not in MODES:
    raise ValueError(f"the environment variable FLOWSOLVE_KERNELS is {START!r}; expected one of {', '.join(MODES)}")
_mode: ContextVar[str] = ContextVar("kernels", default=START)
MODULES = {"cpu": "cpu", "cuda": "cuda", "noise on cpu": "philox_cpu", "noise on cuda": "philox_cuda"}
_rent = dict.fromkeys(MODULES, 0.0)
_loaded: dict[str, ModuleType | None] = {}


def mode() -> str:
    """The mode in force: "auto", "torch" or "fused"; see `use`."""
    return _mode.get()


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Run a block with "auto", "torch" (twins only) or "fused" (compiled at once) kernels."""
    if mode not in MODES:
        raise ValueError(f"kernels.use({mode!r}); expected one of {', '.join(MODES)}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


class Slopes:
    """The slopes of a step from y, and what is computed from them.

    Args:
        y: the state before the step, shape (B, *S).

    Below, h has one number a sample or a single one, and weights one row a sample or a single one: float64 of shapes
    (B or 1,) and (B or 1, m), for the m slopes at the positions `stages`.
    """

    __slots__ = ("_kernels", "_plan", "_recording", "tensors", "y")

    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.tensors: list[Tensor] = []
        self._recording = torch.is_grad_enabled()
        self._kernels = _fused(y, self._recording)
        self._plan: Any = None if self._kernels is None else self._kernels.plan(y)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, i: int) -> Tensor:
        return self.tensors[i]

    def append(self, k: Tensor) -> None:
        """Add a slope of y's shape."""
        kernels = self._kernels
        if kernels is not None:
            i = len(self.tensors)
            dense = k.dtype is self.y.dtype and type(k) is Tensor and k.is_contiguous()
            if dense and i < kernels.MOST and not (self._recording and k.requires_grad):
                self._plan[kernels.FIRST + i] = k.data_ptr()
            else:
                self._kernels = None
        self.tensors.append(k)

    def advance(self, h: Vector, stages: Indices, weights: Vector) -> Tensor:
        """y + h Σ_j w_j k_j."""
        if self._kernels is not None:
            return self._kernels.advance(self.y, self._plan, h, stages, weights)  # type: ignore[no-any-return]
        return twin.weighted([self.tensors[i] for i in stages], h[:, None] * weights, self.y)

    def error_norm(
        self, h: Vector, stages: Indices, weights: Vector, ahead: Tensor, atol: Any, rtol: Any, norm: Norm
    ) -> Tensor:
        """The norm of each sample's local error h Σ_j w_j k_j in units of its tolerance, (B,).

        Args:
            ahead: the state after the step; where that is not finite, neither is the error.
            atol, rtol: the tolerances, numbers or tensors that broadcast against y.
            norm: (B, *S) → (B,); the fused kernels know `rms` and `largest`.
        """
        plain = norm in (rms, largest) and not (isinstance(atol, Tensor) or isinstance(rtol, Tensor))
        if self._kernels is not None and plain and _plain(ahead, self.y.dtype, self._recording):
            kernel = self._kernels.error_norm
            return kernel(self.y, self._plan, h, stages, weights, ahead, atol, rtol, norm)  # type: ignore[no-any-return]
        slopes = [self.tensors[i] for i in stages]
        return twin.error_norm(slopes, h[:, None] * weights, self.y, ahead, atol, rtol, norm)

    def merge(self, accepted: NDArray[np.bool_], passed: int, new: Tensor, old: Tensor) -> Tensor:
        """The rows of `new` where accepted, those of `old` elsewhere; free where all agree.

        Args:
            accepted: bool of shape (B,).
            passed: how many there are.
            new, old: tensors of y's shape.
        """
        if passed == len(accepted):
            return new
        if not passed:
            return old
        recording, dtype = self._recording, self.y.dtype
        if self._kernels is not None and _plain(new, dtype, recording) and _plain(old, dtype, recording):
            return self._kernels.merge(accepted, new, old)  # type: ignore[no-any-return]
        return twin.merge(accepted, new, old)


class Steered(Slopes):
    """The slopes of a step whose sizes are on the device, instead of the h that others are given.

    Args:
        y: the state before the step.
        h: the sizes, float64 of shape (B,).
    """

    __slots__ = ("_own", "_sizes")

    def __init__(self, y: Tensor, h: Tensor) -> None:
        super().__init__(y)
        self._sizes, self._own = h, np.zeros(len(h))  # the latter stands for the former
        if self._kernels is not None:
            if not hasattr(self._kernels, "STEPS"):
                self._kernels = None
            else:
                self._plan[self._kernels.SENT], self._plan[self._kernels.STEPS] = self._own, h

    def advance(self, h: Any, stages: Indices, weights: Vector) -> Tensor:
        """y + h Σ_j w_j k_j."""
        if self._kernels is not None:
            return self._kernels.advance(self.y, self._plan, self._own, stages, weights)  # type: ignore[no-any-return]
        return twin.weighted([self.tensors[i] for i in stages], self._table(weights), self.y)

    def error_norm(
        self, h: Any, stages: Indices, weights: Vector, ahead: Tensor, atol: float, rtol: float, norm: Norm
    ) -> Tensor:
        """The norm of each sample's local error; see `Slopes.error_norm`."""
        if self._kernels is not None and norm in (rms, largest) and _plain(ahead, self.y.dtype, self._recording):
            return super().error_norm(self._own, stages, weights, ahead, atol, rtol, norm)
        slopes = [self.tensors[i] for i in stages]
        return twin.error_norm(slopes, self._table(weights), self.y, ahead, atol, rtol, norm)

    def _table(self, weights: Vector) -> Tensor:
        return torch.stack([self._sizes * w for w in weights[0].tolist()], 1)


def combination(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor | None:
    """Σ_j w_j v_j in one pass, for tensors of one shape; None where plain operations are to serve.

    The CPU's fused kernels have none: there a step of few terms is short beside what it costs to read the state.
    """
    first, recording = tensors[0], torch.is_grad_enabled()
    if len(tensors) < 2 or (first.is_cpu and not hasattr(_loaded.get("cpu"), "combination")):
        return None
    kernels = _fused(first, recording)
    if kernels is None or len(tensors) > kernels.MOST:
        return None
    if not all(_plain(v, first.dtype, recording) and v.shape == first.shape for v in tensors):
        return None
    return kernels.combination(weights, tensors)  # type: ignore[no-any-return]


def normals(
    table: Tensor, stream: int, intervals: Indices | int, weights: Vector | float, like: Tensor
) -> Tensor | None:
    """Σ_i w_i ξ_i by a fused kernel, of the shape, dtype and device of `like`; None if the twin is to serve.

    Args:
        table: for each sample its number and the two words of its key, int64 of shape (B, 3), on the device.
        stream: the stream.
        intervals: addresses of the intervals of which ξ_i are the normals, int64 of shape (T,); or one of them.
        weights: one each, float64 of shape (T,); or the one of the one.
        like: shape (B, *S).
    """
    mode, dtype = _mode.get(), like.dtype
    if mode == "torch" or dtype not in SERVED or type(like) is not Tensor or table.shape[0] != like.shape[0]:
        return None
    kind = "noise on cpu" if like.is_cpu else f"noise on {like.device.type}"
    if not (numbers := like.numel()):
        return None
    terms = 1 if isinstance(intervals, int) else len(intervals)
    cost = terms * (NOISE_CALL + NOISE_BYTE * numbers * dtype.itemsize) if kind not in _loaded else 0.0
    kernels = _served(kind, mode, cost)
    if kernels is None:
        return None
    return kernels.normals(table, stream, intervals, weights, like)  # type: ignore[no-any-return]


def aim(real: Vector, s_end: float, c: Vector) -> tuple[Vector, Vector, Vector]:
    """Sizes, ends and nodes of the next attempt; see `flowsolve.kernels.control.aim`."""
    compiled = _host()
    if compiled is None:
        return control.aim(real, s_end, c)
    return compiled.aim(np.ascontiguousarray(real), s_end, c)  # type: ignore[no-any-return]


def judge(
    error: Vector, real: Vector, counts: Indices, h: Vector, s_next: Vector, s_end: float, law: Vector
) -> Verdict:
    """What becomes of an attempt; see `flowsolve.kernels.control.judge`."""
    compiled = _host()
    if compiled is None:
        return control.judge(error, real, counts, h, s_next, s_end, law)
    # Columns that were picked by number are in another order in memory, for which all would be compiled once more.
    real, counts = np.ascontiguousarray(real), np.ascontiguousarray(counts)
    return Verdict(*compiled.judge(error, real, counts, h, s_next, s_end, law))


def _host() -> ModuleType | None:
    """The module compiled for the host, if it is there already."""
    return None if _mode.get() == "torch" else _loaded.get("cpu")


def _plain(v: Tensor, dtype: torch.dtype, recording: bool) -> bool:
    """Whether a tensor is a dense block of numbers of that dtype that no gradient is recorded for."""
    return v.dtype is dtype and type(v) is Tensor and v.is_contiguous() and not (recording and v.requires_grad)


def _fused(y: Tensor, recording: bool) -> ModuleType | None:
    """The module of fused kernels that is to serve a state, if any."""
    mode, dtype = _mode.get(), y.dtype
    if mode == "torch" or dtype not in SERVED or not _plain(y, dtype, recording) or not y.numel():
        return None
    return _served("cpu" if y.is_cpu else y.device.type, mode, CALL + BYTE * y.numel() * y.element_size())


def _served(kind: str, mode: str, cost: float) -> ModuleType | None:
    """The module of a kind, if it is there or worth loading, now that something comes that it would save `cost`."""
    if kind not in MODULES or torch.compiler.is_compiling() or _within_transform() is not None:
        return None
    if forward_ad._current_level >= 0:  # a tangent travels beside each tensor, out of a kernel's sight
        return None
    if kind not in _loaded:
        if kind.endswith("cuda") and torch.cuda.is_current_stream_capturing():
            return None  # a graph is no place to compile in
        _rent[kind] = _rent.get(kind, 0.0) + cost
        if mode == "auto" and _rent[kind] < PRICE:
            return None
        _loaded[kind] = _load(kind)
    return _loaded[kind]


def _load(kind: str) -> ModuleType | None:
    """The module of fused kernels of a kind; None, and a warning in the log, if it cannot be had."""
    try:
        module = import_module(f"{__name__}.{MODULES[kind]}")
        module.probe()
    except Exception as error:  # whatever a compiler may raise: the twins serve as well
        logging.getLogger(__name__).warning("no fused kernels on %s, plain torch serves: %s", kind, error)
        return None
    return module
