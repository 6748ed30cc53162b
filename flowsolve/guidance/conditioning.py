"""Conditioning: a network's keyword arguments for some of a batch's samples, and for two batches as one.

A tensor whose first dimension is the batch's has a row a sample. Which those are is settled when a batch is made
(`Flow.conditioned`), because samples leave it later: a tensor of 3 rows is not one of 3 samples that happen to be left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowsolve._batch import Whose, take

__all__ = ["RESERVED", "join", "own", "replaced", "select"]

RESERVED = ("unconditional", "classifier", "measurement")
"""Keywords of `cond` that are for guided flows and reach no network."""


def own(cond: Any, count: int) -> Any:
    """For each leaf of a tree whether it is a tensor with one row for each of so many samples, or marked as one."""
    leaves, spec = _apart(cond)
    return _together(
        [
            v.own if isinstance(v, Whose) else isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == count
            for v in leaves
        ],
        spec,
    )


def _apart(value: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, and how it is put together; None for a leaf, which is most of what there is."""
    return tree_flatten(value) if isinstance(value, dict | list | tuple) else ([value], None)


def _together(leaves: list[Any], spec: Any) -> Any:
    return leaves[0] if spec is None else tree_unflatten(leaves, spec)


def select(cond: Any, marks: Any, index: Any) -> Any:
    """The conditioning of some samples, by position; None for all of them."""
    if index is None:
        return cond
    leaves, spec = _apart(cond)
    flags, _ = _apart(marks)
    return _together([take(v, index) if mine else v for v, mine in zip(leaves, flags, strict=True)], spec)


def replaced(
    cond: Mapping[str, Any], marks: Mapping[str, Any], other: Mapping[str, Any], other_marks: Any, count: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A conditioning in which others take the place of some arguments, with a row a sample wherever it had one.

    Args:
        cond: the conditioning.
        marks: which of its leaves have a row a sample.
        other: the arguments that differ.
        other_marks: which of their leaves have one; None where none have.
        count: the number of samples.

    Returns:
        The conditioning and its marks.
    """
    made, flags = dict(cond), dict(marks)
    for name, value in other.items():
        mine = own(value, -1) if other_marks is None else other_marks[name]
        if name in cond:
            leaves, spec = _apart(value)
            before, old = _apart(cond[name])
            if spec == old:
                given, had = _apart(mine)[0], _apart(marks[name])[0]
                pairs = [_rows(name, *v, count) for v in zip(before, leaves, had, given, strict=True)]
                value = _together([v for v, _ in pairs], spec)
                mine = _together([m for _, m in pairs], spec)
        made[name], flags[name] = value, mine
    return made, flags


def _rows(name: str, before: Any, value: Any, had: bool, has: bool, count: int) -> tuple[Any, bool]:
    """A value with a row for each of `count` samples if what it replaces had them."""
    if has or not had or value is None:
        return value, has
    if isinstance(value, int | float):
        return before.new_full((count, *before.shape[1:]), value), True
    if isinstance(value, Tensor):
        value = value.to(before.device, before.dtype)
        if value.ndim == before.ndim - 1:
            return value.expand(count, *value.shape), True
        if value.ndim == before.ndim and value.shape[0] == 1:
            return value.expand(count, *value.shape[1:]), True
        raise ValueError(
            f"unconditional {name!r} has shape {tuple(value.shape)} where cond has one row a sample, "
            f"{tuple(before.shape)}; expected {tuple(before.shape[1:])} or {(1, *before.shape[1:])}, shared by all "
            'samples. Rows of their own go into cond={"unconditional": {…}} of the solve'
        )
    return value, False


def join(
    first: Mapping[str, Any], marks: Mapping[str, Any], count: int,
    second: Mapping[str, Any], other_marks: Mapping[str, Any], more: int,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The conditioning of `count` samples and then `more` as that of one batch, and its marks.

    Raises:
        ValueError: arguments that one call cannot take for both.
    """
    made, flags = {}, {}
    for name in {**first, **second}:
        if name not in first or name not in second:
            where, lacks = ("cond", first) if name not in first else ("unconditional", second)
            raise ValueError(f"{where} has no {name!r} (it has {', '.join(lacks) or 'nothing'}); {MEND}")
        a, spec = _apart(first[name])
        b, other = _apart(second[name])
        if spec != other:
            raise ValueError(f"{name!r} has another structure in unconditional than in cond; {MEND}")
        mine, its = _apart(marks[name])[0], _apart(other_marks[name])[0]
        pairs = [_joined(name, *v, count, more) for v in zip(a, b, mine, its, strict=True)]
        made[name] = _together([v for v, _ in pairs], spec)
        flags[name] = _together([m for _, m in pairs], spec)
    return made, flags


MEND = "to call the network once for each instead, give batched=False"


def _joined(name: str, a: Any, b: Any, mine: bool, its: bool, count: int, more: int) -> tuple[Any, bool]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b and not mine:
            return a, False
        a, b = (v if rows else _spread(v, n) for v, rows, n in ((a, mine, count), (b, its, more)))
        if a.ndim and a.shape[1:] == b.shape[1:] and (len(a), len(b)) == (count, more):
            return torch.cat((a, b)), True
        raise ValueError(
            f"{name!r} has shape {tuple(a.shape)} in cond and {tuple(b.shape)} in unconditional for {count} and {more} "
            f"samples, which cannot be one batch; {MEND}"
        )
    if a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b):
        return a, False
    raise ValueError(
        f"{name!r} is {_said(a)} in cond and {_said(b)} in unconditional, which one call cannot take for both; give "
        f"tensors with a row a sample, or {MEND}"
    )


def _spread(v: Tensor, count: int) -> Tensor:
    """A tensor for all samples, of shape (1, …), with a row for each of them."""
    return v.expand(count, *v.shape[1:]) if v.ndim and v.shape[0] == 1 else v


def _said(v: Any) -> str:
    return f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)
