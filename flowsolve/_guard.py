r"""Functions that others wrote, and what they may not do to a solver.

A solver gives a network a state that it needs again, and keeps what the network returned until the end of a step, or
for several steps. Two habits of networks break that without a word:

* writing into what they are given (`x.mul_(2)`, an activation with `inplace=True`, also on a view of x, on the time or
  on the conditioning), which moves the state, and the caller's `start=` with it;
* returning one buffer each time (`out=`, a CUDA graph, an exported program, an array of another library), so that the
  second slope of a Runge–Kutta step is the first one too.

Both are noticed and provided for. The first calls with samples of a shape (`LEARNING`) are made with copies, and their
outputs copied before they are handed on; what is learnt of a function serves later solves too:

* torch counts the writes to a tensor, its views included (`Tensor._version`; inference tensors have no counter, and are
  compared by value). If the copies were written to, the network is given copies from then on.
* An output in the memory of an earlier one that still exists lies in a buffer. If one does, outputs are copied from
  then on.

Where neither is found, later calls are given the tensors themselves, and cost a read of the counters and of an address.
A network that turns to such a habit later is an error that names it: what it spoilt cannot be had back.

A third habit is to draw at random (dropout and drop-path left in training mode, in whatever layer): the field of an ODE
must be a function. At the first call of a solve it is looked whether torch's generators have moved. If so, the network
is asked three times more, twice from one seed and once from another: only if another seed changes more than the same
one does, is it random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from flowsolve._parameters import modules_of

__all__ = ["Guard", "Outputs"]

LEARNING = 4
"""Calls with samples of a shape that are made with copies: one buffer, or up to three in turn, are noticed."""


class Outputs:
    """The outputs of a function as a solver can keep them: copied where the function writes them into a buffer.

    Args:
        what: the function's name in errors.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._buffered = False
        self._seen: dict[Any, list[tuple[int, StorageWeakRef]]] = {}  # by the shape of a sample
        self._held: Tensor | None = None
        self._trusted: torch.Size | None = None
        self._last: tuple[int, Any, int] = (0, None, 0)

    def __reduce__(self) -> Any:
        return type(self), (self.what,)  # what was learnt is learnt again

    def own(self, output: Tensor, *given: Any) -> Tensor:
        """The output, or a copy of it if a later call may overwrite it.

        Args:
            output: what the function returned.
            given: what it was given; an output that is a view of that lies in no buffer.

        Raises:
            RuntimeError: it has overwritten an earlier output that was handed on, which no earlier call let expect.
        """
        if self._buffered:
            return output.clone()
        try:
            place = output.data_ptr()
            if output.shape != self._trusted and self._new(output):
                return self._learnt(output, given)
        except (RuntimeError, NotImplementedError):  # a tensor of torch.func or torch.compile, which has no memory
            return output
        self._trusted = output.shape
        last, alive, version = self._last
        if place == last and place and alive() is not None and not _among(output, given):
            self._buffered = True
            if _version(output) == version and alive().untyped_storage()._cdata == output.untyped_storage()._cdata:
                return output.clone()  # the same tensor again, not written to since
            raise RuntimeError(
                f"{self.what} wrote its output into the memory of an earlier one that the solver had kept; have it "
                "return a new tensor, for example lambda *args, **cond: net(*args, **cond).clone()"
            )
        self._last = place, ref(output), _version(output)
        return output

    def _new(self, output: Tensor) -> bool:
        """Whether it is one of the first outputs for samples of its shape."""
        return len(self._seen.get((output.shape[1:], output.dtype), ())) < LEARNING

    def _learnt(self, output: Tensor, given: Any) -> Tensor:
        """A copy of one of the first outputs of its shape, which is compared with the others."""
        storage = output.untyped_storage()
        place, seen = storage.data_ptr(), self._seen.setdefault((output.shape[1:], output.dtype), [])
        if place and not _among(output, given):
            self._buffered = any(place == p and not s.expired() for p, s in seen)
        seen.append((place, StorageWeakRef(storage)))
        # What another library lends is freed with the tensor, and would look new the next time: hold it that long.
        self._held = None if self._buffered or len(seen) == LEARNING else output.detach()
        return output.clone()


class _Habits:
    """What is known of a function.

    Attributes:
        writes: whether it writes into what it is given.
        calls: how often it was called with samples of a shape.
        outputs: what is known of its outputs.
    """

    def __init__(self, what: str) -> None:
        self.writes, self.calls, self.outputs = False, dict[Any, int](), Outputs(what)


_known: WeakKeyDictionary[Any, _Habits] = WeakKeyDictionary()


def _habits_of(f: Any, what: str) -> _Habits:
    """What is known of a function from earlier solves; nothing of one that has no weak reference, or no hash."""
    try:
        return _known.setdefault(f, _Habits(what))
    except TypeError:
        return _Habits(what)


class Guard:
    """A function f(a, b, **cond) of tensors that cannot change what it is given, nor take back what it returned.

    Args:
        f: the function.
        what: its name in errors.

    Attributes:
        armed: whether the next call is the first of a solve, where f must not draw at random.
    """

    def __init__(self, f: Callable[..., Any], what: str) -> None:
        self.f, self.what = f, what
        self.armed = False
        self._habits = _habits_of(f, what)
        self._outputs = self._habits.outputs
        self._trusted: torch.Size | None = None  # the shape of calls that are made without copies

    def __reduce__(self) -> Any:
        return type(self), (self.f, self.what)

    def __call__(self, a: Tensor, b: Tensor, cond: dict[str, Any] | None = None) -> Any:
        """What f(a, b, **cond) returns.

        Raises:
            RuntimeError: f wrote into its arguments, or into an earlier output, and had not in its first calls.
        """
        if is_compiling():
            return self.f(a, b, **(cond or {}))
        if a.shape != self._trusted or self.armed or a.is_inference():
            return self._watched(a, b, cond or {})
        before = a._version + b._version
        if cond:
            before += _writes(cond)
            output = self.f(a, b, **cond)
            after = a._version + b._version + _writes(cond)
        else:
            output = self.f(a, b)
            after = a._version + b._version
        if after != before:
            self._habits.writes, self._trusted = True, None
            raise RuntimeError(
                f"{self.what} wrote into the tensors it was given, which the solver needs again; have it work on a "
                "copy, for example lambda x, *args, **cond: net(x.clone(), *args, **cond)"
            )
        return self._outputs.own(output, a, b, cond) if isinstance(output, Tensor) else output

    def _watched(self, a: Tensor, b: Tensor, cond: dict[str, Any]) -> Any:
        """What f returns, made with copies while it is not known that it needs none."""
        sample = a.shape[1:]
        habits = self._habits
        calls = habits.calls.get(sample, 0)
        habits.calls[sample] = calls + 1
        if self.armed or calls < LEARNING or habits.writes:
            output = self.function(lambda: self._copying(a, b, cond), a.device)
        else:
            output = self.f(a, b, **cond)
        if calls >= LEARNING and not habits.writes:
            self._trusted = a.shape
        return self._outputs.own(output, a, b, cond) if isinstance(output, Tensor) else output

    def function(self, call: Callable[[], Any], device: torch.device) -> Any:
        """What a call of f returns; the first of a solve must find that f is a function.

        Raises:
            ValueError: it draws at random, and has layers in training mode; a warning where it has none.
        """
        if not self.armed:
            return call()
        self.armed = False
        before = _drawn(device)
        output = call()
        if before != _drawn(device) and _random(call, device):
            modal = [
                f"{name or 'net'!r} ({type(m).__name__})"
                for root in modules_of(self.f, 3)
                for name, m in root.named_modules()
                if m.training
            ]
            why = f"{self.what} draws at random: at the same point it returns other values the next time"
            if modal:
                raise ValueError(f"{why}. It is in training mode ({', '.join(modal[-3:])}); call net.eval() first")
            warnings.warn(f"{why}, so that no solver converges and no density is right", stacklevel=2)
        return output

    def _copying(self, a: Tensor, b: Tensor, cond: Mapping[str, Any]) -> Any:
        """What f returns for copies, and whether it wrote into them."""
        mine, time, given = a.clone(), b.clone(), dict(cond)
        if given:
            given = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, given)
        before = _version(mine) + _version(time) + _writes(given)
        output = self.f(mine, time, **given)
        habits = self._habits
        if not habits.writes:
            habits.writes = _version(mine) + _version(time) + _writes(given) != before
            if torch.is_inference_mode_enabled() or a.is_inference():  # whose tensors count no writes
                pairs = zip(_tensors((mine, time, given)), _tensors((a, b, dict(cond))), strict=True)
                habits.writes = habits.writes or any(v.is_inference() and not torch.equal(v, w) for v, w in pairs)
        return output


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of what a network is given."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _version(v: Tensor) -> int:
    """How often a tensor was written to; 0 for an inference tensor, which does not count."""
    return 0 if v.is_inference() else v._version


def _writes(tree: Any) -> int:
    """How often these tensors were written to, in all: a number that only grows."""
    return sum(_version(v) for v in _tensors(tree))


def _among(output: Tensor, given: Any) -> bool:
    """Whether an output is one of some tensors, or a view of one."""
    place = output.untyped_storage().data_ptr()
    return any(v.untyped_storage().data_ptr() == place for v in _tensors(given))


def _drawn(device: torch.device) -> Any:
    """What changes when torch's generators of the host and of a device are drawn from."""
    try:
        host = bytes(torch.default_generator.get_state().numpy())
    except RuntimeError:  # within a transform of torch.func, where no tensor has memory
        return None
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return host
    return host, torch.cuda.default_generators[device.index or 0].get_offset()


@torch.no_grad()
def _random(call: Callable[[], Any], device: torch.device) -> bool:
    """Whether what a call returns depends on a seed, beyond what it differs by from one seed."""
    results = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append([v.detach().double() for v in tree_leaves(call()) if isinstance(v, Tensor)])
    same, other = (
        max((float((v - w).abs().max()) for v, w in zip(results[0], r, strict=True) if v.numel()), default=0.0)
        for r in results[1:]
    )
    return other > 4.0 * same
