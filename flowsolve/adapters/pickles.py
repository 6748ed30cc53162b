"""Pickles, read by their opcodes: what they would import and the words that they hold. Nothing is executed.

What is listed is for people and for detection. That nothing runs hangs on something else: a file is unpickled by
torch's restricted reader (`weights_only=True`), or not at all, unless the caller says `trust_pickle=True`.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

__all__ = ["MAX_OPCODES", "first_line", "opcodes", "plain"]

MAX_OPCODES = 2_000_000
"""Instructions that are listed, some 40 for a tensor; 50 bytes of memory and a microsecond each."""

_PLAIN = ("torch._utils._rebuild_", "torch.Size", "torch.device", "argparse.Namespace")
_PLAIN_EXACT = {"collections.OrderedDict", "torch.serialization._get_layout", "_codecs.encode", "builtins.set"}


def opcodes(data: bytes, file: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    """(what a pickle would import, the short strings it holds), from its opcodes; nothing is executed.

    A name that is put together at run time is listed as "?". A torch file from before 1.6 is a row of pickles; all of
    them are read.

    Raises:
        ValueError: the bytes are no pickle, a truncated one, or a longer program than any that stores tensors.
    """
    names: dict[str, None] = {}
    words: set[str] = set()
    for program in _programs(data, file):
        texts: list[str | None] = []
        memo: dict[int, str | None] = {}
        for op, argument in program:
            code = op.name
            if "UNICODE" in code or code in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
                text = str(argument)
                texts.append(text)
                if len(text) <= 200:
                    words.add(text)
            elif code == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else None
            elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = texts[-1] if texts else None
            elif code in ("GET", "BINGET", "LONG_BINGET"):
                texts.append(memo.get(argument))
            elif code in ("GLOBAL", "INST"):
                names[str(argument).replace(" ", ".")] = None
                texts.append(None)
            elif code == "STACK_GLOBAL":
                module, name = texts[-2:] if len(texts) > 1 else (None, None)
                names[f"{module}.{name}" if module and name else "?"] = None
                texts.append(None)
            elif code.startswith("EXT"):
                names["?"] = None
    return tuple(names), frozenset(words)


def plain(name: str) -> bool:
    """Whether what a pickle imports is a tensor, a dtype or a plain container."""
    home, _, last = name.rpartition(".")
    storage = home in ("torch", "torch.storage", "torch.cuda") and last.endswith("Storage")
    dtype = home == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
    return name in _PLAIN_EXACT or name.startswith(_PLAIN) or storage or dtype


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _programs(data: bytes, file: Path) -> Iterator[Iterator[tuple[Any, Any]]]:
    """The pickles of a file, one after the other, as (opcode, argument) pairs."""
    stream = io.BytesIO(data)
    count, left = 0, MAX_OPCODES
    while stream.tell() < len(data):
        at = stream.tell()
        try:
            program = [(op, argument) for op, argument, _ in islice(pickletools.genops(stream), left + 1)]
        except Exception as error:  # pickletools raises all kinds on bytes that are no pickle
            if count:  # the raw numbers behind the pickles of an old torch file
                return
            raise ValueError(f"{file} is a broken or truncated pickle (at byte {at:,}): {first_line(error)}") from error
        count, left = count + 1, left - len(program)
        if left < 0:
            raise ValueError(
                f"{file} is a pickle of more than {MAX_OPCODES:,} instructions, which are not looked through; save its "
                "tensors alone, best as safetensors"
            )
        yield iter(program)
