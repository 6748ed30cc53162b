r"""CUDA graphs: a solve, network and all, recorded once and replayed.

On a fixed grid every coefficient is a number known before the solve, nothing is read back on the way, and all shapes
are fixed: the whole solve is one static sequence of kernels. Recorded as a CUDA graph it is launched at once, without
Python or the driver between its kernels; a small network's time per step falls to that of its kernels. An adaptive
solve is recorded attempt by attempt (`flowsolve.attempts`), a likelihood along a curve evaluation by evaluation: the
network together with its products with the Jacobian.

What may change between replays lies in static buffers that are filled before each: the state, the conditioning tensors,
the samples' numbers and the seed (the noise of a step is computed from them within the graph). Everything else is part
of the recording: solver, grid, chart, shapes, dtypes, and the addresses of the network's parameters, whose *values* may
change in place. Other values of these make another recording; the last few of each flow are kept.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowsolve import kernels
from flowsolve._surroundings import refuse
from flowsolve.drivers import checks, settle
from flowsolve.flow import Flow, clock_of, tabled
from flowsolve.grids import Closing
from flowsolve.kernels import largest
from flowsolve.noise import Noise
from flowsolve.solution import Solution
from flowsolve.solvers.base import Foreign, ForeignSDE, Query, State, Stepper, run

__all__ = [
    "Recording", "Static", "agrees", "captured", "filled", "hopeless", "pays", "prove", "proven", "recorded",
    "refuse_foreign", "require_cuda", "split",
]  # fmt: skip

KEPT = 8  # recordings of a flow
WARM = 3
REPAID = WARM + 1  # solves after which a recording, which runs that many, has paid
NOTED = 64  # solves of a flow that are counted
CLOSE = 1e-2  # of the largest number: the rounding of a low precision, which a solve may amplify
Body = Callable[[list[Tensor]], list[Tensor]]


def require_cuda(x: Tensor) -> None:
    """Raise ValueError unless a solve from x can be captured."""
    if x.device.type != "cuda":
        raise ValueError(f"capture=True records a CUDA graph, and the state is on {x.device}; drop capture=True")
    refuse("capture=True, whose replay has no derivatives,", "drop it")
    if torch.is_grad_enabled():
        raise ValueError("capture=True records no gradients; drop it, or sample without grad")


def refuse_foreign(solver: Any, gradient: str = "direct") -> None:
    """Raise TypeError for a solve that cannot be captured."""
    if isinstance(solver, Foreign | ForeignSDE) or gradient != "direct":
        raise TypeError(
            f"capture=True records a solve of flowsolve's own without gradients, not {solver!r} with "
            f"gradient={gradient!r}; drop it"
        )


class Static(Protocol):
    """What a captured solve needs to know of its plan."""

    flow: Flow
    start: float
    last: float
    closing: Closing | None
    seed: int
    noise: type[Noise]
    estimate: Any

    @property
    def calls(self) -> int:
        """Evaluations of the solve, the final step with it."""
        ...

    @property
    def grid(self) -> Sequence[tuple[float, float, int]]:
        """(t, t_next, evaluations) of each step."""
        ...

    @property
    def asked(self) -> Sequence[float]:
        """The flow times at which it asks, as far as they are known beforehand."""
        ...

    def stepper(self) -> Stepper:
        """The step function."""
        ...

    def key(self) -> Any:
        """Equal for plans that make the same recording on the same flow and inputs."""
        ...


def body(plan: Static, cond: Any) -> Body:
    """The solve as a function of tensors alone: [x, samples, seed, times, *conditioning] to [x at the end, magnitudes].

    Args:
        plan: the solve.
        cond: the network's keyword arguments, whose tensors will be replaced by those of the conditioning.
    """
    step, nodes, natives = plan.stepper(), checks(len(plan.grid)), clock_of(plan.flow, plan.asked)

    def solve(inputs: list[Tensor]) -> list[Tensor]:
        x, samples, seed, column, *tensors = inputs
        context = {"cond": filled(cond, tensors)}
        state, magnitudes = State(x, noise=plan.noise(seed, samples)), []  # type: ignore[arg-type]
        with tabled(natives, column, x):
            for i, interval in enumerate(plan.grid):
                state = run(step(state, *interval), lambda query: plan.estimate(query, context))
                if i in nodes:
                    magnitudes.append(largest(state.x))
        if plan.closing is not None:
            _, data, noise = plan.closing
            closed = plan.estimate(Query(state.x, plan.last), context).combine(data, noise)
            state = state.advance(closed)
            magnitudes.append(largest(closed))
        return [state.x, torch.stack(magnitudes)]

    return solve


class Recording:
    """A function of tensors as a CUDA graph, with its static inputs and outputs.

    Args:
        function: from a list of tensors to a list of tensors.
        inputs: tensors like those it will be given.
    """

    def __init__(self, function: Body, inputs: Sequence[Tensor]) -> None:
        self.inputs = [v.clone() for v in inputs]
        self.function = function  # which holds tensors that the graph reads
        with torch.cuda.device(self.inputs[0].device), kernels.use("fused"):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate and choose algorithms in the first runs
                for _ in range(WARM):
                    function(self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = function(self.inputs)

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Give the static inputs these values."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)

    def replay(self) -> None:
        """Run the function on what the static inputs hold."""
        self.graph.replay()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The function's value for other inputs."""
        self.fill(inputs)
        self.replay()
        return [v.clone() for v in self.outputs]


Record = Callable[[Body, list[Tensor]], Any]

_recordings: WeakKeyDictionary[Flow, OrderedDict[Any, Any]] = WeakKeyDictionary()
_counts: WeakKeyDictionary[Flow, OrderedDict[Any, int | None]] = WeakKeyDictionary()


@contextmanager
def recorded(flow: Flow, key: Any, function: Body, inputs: Sequence[Tensor], record: Record) -> Iterator[Any]:
    """A recording of a function for the length of a block; made if there is none, or the one there is is in use.

    Args:
        flow: whose recordings are kept.
        key: what decides the recording, beside the shapes and dtypes of the inputs.
        function: what is recorded.
        inputs: what it is first given.
        record: makes a recording.

    Raises:
        RuntimeError: the network cannot be captured; it reads from the device, or draws from a CPU generator.
    """
    key = key, tuple((tuple(v.shape), v.dtype) for v in inputs), inputs[0].device
    kept = _recordings.setdefault(flow, OrderedDict())
    made = kept.pop(key, None)
    if made is None:
        try:
            made = record(function, list(inputs))
        except RuntimeError as error:
            raise RuntimeError(
                f"the solve cannot be captured as a CUDA graph: {error}. A network that reads values back from the "
                "device (.item(), the shape of a mask) cannot be; drop capture=True"
            ) from error
    try:
        yield made
    finally:
        kept[key] = made
        while len(kept) > KEPT:
            kept.popitem(last=False)


def captured(plan: Static, x: Tensor, cond: Any, samples: Tensor, record: Record = Recording) -> Solution:
    """The solve of a plan from x, by replaying its recording; made first if there is none.

    Args:
        plan: the solve.
        x: the state at its start, shape (B, *S).
        cond: the network's keyword arguments.
        samples: the global numbers of the samples.
        record: makes a recording.

    Raises:
        RuntimeError: the network cannot be captured; it reads from the device, or draws from a CPU generator.
    """
    cond = dict(cond)
    seed = torch.tensor((plan.seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)  # its lowest 64 bits
    tensors, constants = split(cond)
    column = torch.tensor(clock_of(plan.flow, plan.asked), dtype=torch.float64)
    inputs = [v.to(x.device) for v in (x.contiguous(), samples, seed, column, *tensors)]
    with recorded(plan.flow, (plan.key(), constants), body(plan, cond), inputs, record) as replay:
        final, magnitudes = replay(inputs)
    checked = [plan.grid[i][1] for i in sorted(checks(len(plan.grid)))]
    checked += [] if plan.closing is None else [plan.closing.t]
    return settle(final, magnitudes, checked, plan.start, plan.calls, len(plan.grid))


def pays(flow: Flow, key: Any, x: Tensor) -> bool:
    """Whether it is time to record a solve that may be repeated: once it was made as often as recording runs it.

    (The ski rental's rule: whatever comes, no more than twice the time of the better choice is spent.)
    """
    count = _made(flow, key, x)
    if count is None:
        return False
    if count < REPAID:
        _made(flow, key, x, count + 1)
    return count >= REPAID


def prove(flow: Flow, key: Any, x: Tensor) -> None:
    """Note that the recording of a solve agrees with the eager one."""
    _made(flow, key, x, REPAID + 1)


def proven(flow: Flow, key: Any, x: Tensor) -> bool:
    """Whether a recording of the solve was compared with the eager one before."""
    return (_made(flow, key, x) or 0) > REPAID


def hopeless(flow: Flow, key: Any, x: Tensor, why: str) -> None:
    """Note, and warn, that a solve is better not recorded."""
    _made(flow, key, x, None)
    warnings.warn(f"capture='auto': the solve is not recorded from here on: {why}", stacklevel=2)


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether two results of a solve are the same but for rounding, which the steps and the network may amplify."""
    size = expected.abs().amax().clamp_min(torch.finfo(expected.dtype).tiny)
    both = torch.isfinite(expected) & torch.isfinite(found)
    off = torch.where(both, (found - expected).abs(), 0.0).amax()
    return bool(off <= CLOSE * size) and bool((torch.isfinite(expected) == torch.isfinite(found)).all())


def _made(flow: Flow, key: Any, x: Tensor, count: int | None = 0) -> int | None:
    """How often a solve was made; with another count than 0, that is noted. None if it cannot be recorded."""
    known = _counts.setdefault(flow, OrderedDict())
    place = key, tuple(x.shape), x.dtype, x.device
    if count == 0:
        return known.get(place, 0)
    known[place] = count
    known.move_to_end(place)
    while len(known) > NOTED:
        known.popitem(last=False)
    return count


def split(tree: Any) -> tuple[list[Tensor], str]:
    """The tensors of a tree, and what else decides a recording: its form and its constants."""
    leaves, spec = tree_flatten(tree)
    return [v for v in leaves if isinstance(v, Tensor)], repr((spec, [v for v in leaves if not isinstance(v, Tensor)]))


def filled(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """A tree with other tensors in the places of its own."""
    leaves, spec = tree_flatten(tree)
    given = iter(tensors)
    return tree_unflatten([next(given) if isinstance(v, Tensor) else v for v in leaves], spec)
