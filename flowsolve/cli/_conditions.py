"""Conditions on the command line: class labels, arrays of keyword arguments, and guidance by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["conditions", "guided", "hinted"]

LABELS = "class_labels"
"""The keyword of diffusers' networks with classes."""

ADVICE = (
    "On the command line --class gives class labels and --cond FILE.npz any keyword arguments; prompts need the "
    "pipeline's text encoders: flowsolve.adapters.diffusers.capture(pipe, prompt) in Python"
)


def conditions(n: int, labels: str | None, file: str | None) -> dict[str, Any]:
    """The network's keyword arguments for n samples.

    Args:
        n: how many samples.
        labels: class labels as in "3" or "0,1,2"; sample i has the (i mod their number)-th.
        file: an .npz; of its arrays those with n rows have one a sample, the others are shared by all.

    Raises:
        ValueError: labels that are no whole numbers, or a file that is no .npz of numbers.
    """
    import numpy as np
    import torch

    from flowsolve.conditioning import per_sample, shared

    found: dict[str, Any] = {}
    if file is not None:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"--cond {file}; expected an .npz of arrays of numbers ({error})") from None
        for name, value in given.items():
            found[name] = per_sample(value) if value.ndim and len(value) == n else shared(value)
    if labels is not None:
        try:
            numbers = [int(v) for v in labels.split(",")]
        except ValueError:
            raise ValueError(f"--class {labels!r}; expected whole numbers between commas, as in 3 or 0,1,2") from None
        if LABELS in found:
            raise ValueError(f"--class and the array {LABELS!r} of --cond say the same; give one")
        found[LABELS] = per_sample(torch.tensor([numbers[i % len(numbers)] for i in range(n)], device="cpu"))
    return found


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
