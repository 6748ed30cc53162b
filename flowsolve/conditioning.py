r"""Conditioning: whose a tensor is that a network takes as a keyword argument.

A solve regroups its samples: `batch=` cuts them into pieces, an adaptive solver lets finished ones leave, a guided flow
doubles them. A tensor with a row for each sample (labels, embeddings, a prompt each) must follow its samples; one that
all share (a codebook, one prompt for all) must not be cut. So whose each tensor is is decided once, when a solve is
called, and goes with it from then on:

* a tensor whose first dimension is the number of samples in the call has a row a sample; any other is shared;
* `shared(value)` and `per_sample(tensor)` say it where that would guess wrong;
* where samples come as a stream whose length is not that of `cond` (`flowsolve.batching`, `flowsolve.runs`), `cond` is
  shared, and a tensor that is as long as the stream or its batches must be marked.

Dictionaries are looked into, as networks take them. A list or a tuple of numbers, or an array of numpy, is an error:
networks take tensors, and what is no tensor cannot be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import SequenceKey, keystr, tree_flatten_with_path, tree_map, tree_unflatten

from flowsolve._batch import Whose, take

__all__ = ["arguments", "common", "marked", "per_sample", "plain", "rows_of", "settled", "shared"]

OWN = ("x", "t", "clock")
"""Keywords that `Flow.call` has for itself."""


def shared(value: Any) -> Any:
    """Mark a keyword argument of the network as one that all samples share, whatever its shape.

    Args:
        value: a tensor, or anything else that the network takes.

    Examples:
        >>> net = lambda x, t, code: -x + code.sum()
        >>> flow = fs.Flow(net, fs.paths.CondOT())
        >>> fs.sample(flow, (4, 2), nfe=8, batch=3, cond={"code": fs.shared(torch.zeros(4, 3))}).x.shape
        torch.Size([4, 2])
    """
    return Whose(plain(value), False)


def per_sample(value: Tensor) -> Any:
    """Mark a tensor as one with a row for each sample of the call, in order.

    Args:
        value: shape (B, …) for B samples.

    Raises:
        TypeError, ValueError: no tensor, or one without a first dimension.
    """
    value = plain(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"per_sample marks a tensor with a row for each sample; got a {type(value).__name__}")
    if value.ndim == 0:
        raise ValueError("per_sample marks a tensor with a row for each sample; got one without dimensions")
    return Whose(value, True)


def settled(cond: Mapping[str, Any] | None, count: int) -> dict[str, Any]:
    """A call's keyword arguments for its `count` samples, every tensor marked with whose it is.

    Raises:
        TypeError: a list or tuple of numbers, or an array, by its key.
        ValueError: a tensor marked `per_sample` that has not `count` rows.
    """

    def mark(name: str, value: Any) -> Any:
        if isinstance(value, Whose):
            if value.own and len(value.value) != count:
                raise ValueError(
                    f"{name} is marked per_sample and has shape {tuple(value.value.shape)}; expected a row for each of "
                    f"the {count} samples"
                )
            return value
        return Whose(value, value.ndim > 0 and value.shape[0] == count) if isinstance(value, Tensor) else value

    return _each(cond, mark)


def common(cond: Mapping[str, Any] | None, lengths: Collection[int | None]) -> dict[str, Any]:
    """Keyword arguments that all samples of a stream share, every tensor marked; `per_sample` stays as it is.

    Args:
        lengths: of the stream, if known, and its batches: an unmarked tensor of one of these could be anybody's.

    Raises:
        ValueError: such a tensor, by its key.
    """

    def mark(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim and value.shape[0] > 1 and value.shape[0] in lengths:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, and {value.shape[0]} is how many samples there are in all or "
                "in a batch: is it shared by all, or has each sample a row? Mark it by flowsolve.shared(tensor) or "
                "flowsolve.per_sample(tensor)"
            )
        return Whose(value, False)

    return _each(cond, mark)


def rows_of(cond: Any, index: Any) -> Any:
    """The keyword arguments of some samples, by number: of tensors with a row for each sample their rows.

    Raises:
        ValueError: there are more samples than rows.
    """
    index = np.asarray(index, dtype=np.int64)

    def rows(value: Any) -> Any:
        if not (isinstance(value, Whose) and value.own):
            return value
        if len(index) and int(index.max()) >= len(value.value):
            raise ValueError(
                f"a tensor of cond is marked per_sample and has shape {tuple(value.value.shape)}; expected a row for "
                f"each sample, of which number {int(index.max())} has none"
            )
        return Whose(take(value.value, index), True)

    return tree_map(rows, cond)


def plain(cond: Any) -> Any:
    """Keyword arguments as the network takes them, without marks."""
    if isinstance(cond, dict) and not any(isinstance(v, Whose | dict | list | tuple) for v in cond.values()):
        return cond
    return tree_map(lambda v: v.value if isinstance(v, Whose) else v, cond)


def arguments(cond: Any, more: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The keyword arguments of a network that is called once for `count` samples, given as a mapping or one by one.

    Raises:
        TypeError: one that is given twice.
    """
    found: dict[str, Any] = plain(marked(cond, more, count))
    return found


def marked(cond: Any, more: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same, every tensor marked with whose it is."""
    if cond is not None and not isinstance(cond, Mapping):  # the network's own keyword of that name
        cond, more = None, {"cond": cond, **more}
    if twice := set(cond or {}) & set(more):
        raise TypeError(f"{min(twice)!r} is given in cond= and beside it; give it once")
    return settled({**(cond or {}), **more}, count)


def _each(cond: Mapping[str, Any] | None, change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The arguments with each leaf changed, which is given its name.

    Raises:
        TypeError: a list or tuple of numbers, or an array.
    """
    for name in OWN:
        if name in (cond or {}):
            raise ValueError(
                f"cond has {name!r}, under which the network is given something else already; wrap it: lambda x, t, "
                f"mine, **more: net(x, t, {name}=mine, **more)"
            )
    leaves, spec = tree_flatten_with_path(dict(cond or {}))
    made = []
    for path, value in leaves:
        name = f"cond{keystr(path)}"
        listed = any(isinstance(key, SequenceKey) for key in path)
        if isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a numpy array; give torch.as_tensor(array), on the network's device")
        if listed and (
            isinstance(value, int | float | complex | np.generic) or (isinstance(value, Tensor) and not value.ndim)
        ):
            whole = f"cond{keystr(path[: next(i for i, k in enumerate(path) if isinstance(k, SequenceKey))])}"
            raise TypeError(
                f"{whole} is a list or tuple of numbers; expected a tensor, with a row for each sample, or "
                "flowsolve.shared(…) around what the network is to be given as it is"
            )
        made.append(change(name, value))
    found: dict[str, Any] = tree_unflatten(made, spec)
    return found
