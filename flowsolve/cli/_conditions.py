"""Conditions on the command line: class labels, arrays of keyword arguments, and guidance by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["conditions", "guided", "hinted", "prompted"]

LABELS = "class_labels"
"""The keyword of diffusers' networks with classes."""

ADVICE = (
    "On the command line --prompt TEXT asks the directory's own pipeline, with its text encoders, --class gives class "
    "labels and --cond FILE.npz any keyword arguments"
)


def conditions(n: int, labels: str | None, file: str | None) -> dict[str, Any]:
    """The network's keyword arguments for n samples.

    Args:
        n: how many samples.
        labels: class labels as in "3" or "0,1,2"; sample i has the (i mod their number)-th.
        file: an .npz; of its arrays those with n rows have one a sample, the others are shared by all. Numbers that
            are whole, and truth values, stay such. A name with dots is of a tree: "added_cond_kwargs.time_ids" an entry
            of a dictionary, "image_rotary_emb.0" and ".1" those of a tuple, or of a list where they are trees
            themselves ("img_shapes.0.0.0"); these are shared.

    Raises:
        ValueError: labels that are no whole numbers, or a file that is no .npz of numbers.
    """
    import numpy as np
    import torch

    from flowsolve.conditioning import per_sample

    found: dict[str, Any] = {}
    if file is not None:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"--cond {file}; expected an .npz of arrays of numbers ({error})") from None
        found.update({name: _marked(value, n) for name, value in _tree(given).items()})
    if labels is not None:
        try:
            numbers = [int(v) for v in labels.split(",")]
        except ValueError:
            raise ValueError(f"--class {labels!r}; expected whole numbers between commas, as in 3 or 0,1,2") from None
        if LABELS in found:
            raise ValueError(f"--class and the array {LABELS!r} of --cond say the same; give one")
        found[LABELS] = per_sample(torch.tensor([numbers[i % len(numbers)] for i in range(n)], device="cpu"))
    return found


def _tree(given: dict[str, Any]) -> dict[str, Any]:
    """Names with dots as trees."""
    found: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        first, dot, rest = name.partition(".")
        if dot:
            below.setdefault(first, {})[rest] = value
        else:
            found[name] = value
    for name, parts in below.items():
        if name in found:
            raise ValueError(f"--cond holds {name!r} and {name}.{next(iter(parts))!r}; give the array or its parts")
        inner = _tree(parts)
        numbered = sorted(inner) == sorted(map(str, range(len(inner))))
        entries = [inner[str(i)] for i in range(len(inner))] if numbered else []
        deep = any(isinstance(entry, dict | list | tuple) for entry in entries)
        found[name] = inner if not numbered else entries if deep else tuple(entries)
    return found


def _marked(value: Any, n: int) -> Any:
    """A condition, marked with whose it is."""
    from flowsolve.conditioning import per_sample, shared

    if isinstance(value, dict):
        return {name: _marked(part, n) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return shared(_plain(value))
    if value.ndim == 0 and not value.is_floating_point():
        return shared(value.item())
    return per_sample(value) if value.ndim and len(value) == n else shared(value)


def _plain(value: Any) -> Any:
    """The entries of a tuple, numbers as such."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value.item() if value.ndim == 0 and not value.is_floating_point() else value


def prompted(
    source: str, texts: list[str], negative: str | None, scale: float | None, shape: Any, n: int, flow: Any
) -> tuple[Any, dict[str, Any], Any]:
    """The flow, guided where a scale is given; the conditions of n samples; the shape of a sample.

    Args:
        source: the pipeline's directory.
        texts: prompts; sample i has the (i mod their number)-th.
        negative: what guidance leads away from; None for the empty text.
        scale: the guidance scale; None for none.
        shape: of a sample, or None.
        n: how many samples.
        flow: the flow.

    Raises:
        ValueError: a source that is no pipeline with a prompt, or a negative prompt without guidance.
    """
    from pathlib import Path

    from flowsolve.adapters.diffusers.prompting import of_prompts, rows
    from flowsolve.guidance import ClassifierFree

    if negative is not None and scale is None:
        raise ValueError("--negative-prompt goes with --guidance, the scale")
    against = [] if scale is None else [negative or ""]
    conds, event = of_prompts(Path(source), [*texts, *against], shape)
    if scale is not None:
        flow = ClassifierFree(flow, scale, unconditional=conds.pop())
    return flow, rows(conds, n), event


def guided(flow: Any, scale: float | None, null: int | None, cond: dict[str, Any]) -> Any:
    """The flow under classifier-free guidance, or as it is.

    Args:
        flow: the flow.
        scale: the guidance scale; None for none.
        null: the label that stands for no class.
        cond: the conditions.

    Raises:
        ValueError: one of scale and null without the other, or without class labels.
    """
    if scale is None and null is None:
        return flow
    if scale is None or null is None or LABELS not in cond:
        raise ValueError(
            "--guidance goes with --class and with --null-class, the label that stands for no class (the number of "
            "classes, in DiT and in networks of `flowsolve train --classes`)"
        )
    import torch

    from flowsolve.guidance import ClassifierFree

    return ClassifierFree(flow, scale, unconditional={LABELS: torch.tensor([null], device="cpu")})


@contextmanager
def hinted(given: bool) -> Iterator[None]:
    """A block in which a network that lacks a condition says how to give it here.

    Args:
        given: whether any was given.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        lacks = any(word in str(error) for word in ("asks for", LABELS, "encoder_hidden_states"))
        if given or not lacks:
            raise
        raise ValueError(f"{error}. {ADVICE}") from error
