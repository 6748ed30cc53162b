r"""Checkpoint files, read without running anything that they hold.

A pickle is a program: loading one may call any function on the machine. Three readings are safe, and only these are
used unless the caller says `trust_pickle=True`:

* **safetensors**: 8 bytes of length, a JSON header with names, dtypes, shapes and offsets, then raw numbers. The header
  is checked before anything else is believed: its length against the file's, each tensor's bytes against its shape;
* **torch archives** by `torch.load(weights_only=True)`, which builds tensors and plain containers and nothing else;
* **opcodes** (`flowsolve.adapters.pickles`), which say what a pickle *would* import and execute none of it.

Nothing costs more to read than the file is large (`flowsolve._bounds`). Every error names the file.
"""

from __future__ import annotations

import argparse
import math
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowsolve._bounds import MAX_JSON, MAX_TENSORS, opened_zip, parsed, require_stored
from flowsolve.adapters.pickles import first_line, opcodes, plain

__all__ = ["Source", "UnsafeFile", "first_line", "read_json", "safetensors_header"]

Shapes = dict[str, tuple[int, ...]]

MAX_DIMENSIONS, MAX_SIZE = 64, 2**63
"""Of a tensor: more than torch has, and the sizes that it counts."""

_ITEM_BITS = dict(
    F64=64, F32=32, F16=16, BF16=16, I64=64, I32=32, I16=16, I8=8, U64=64, U32=32, U16=16, U8=8, BOOL=8, C64=64,
    F8_E4M3=8, F8_E5M2=8, F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, F6_E2M3=6, F6_E3M2=6, F4=4,
)  # fmt: skip
STATE_KEYS = ("ema_model", "model_ema", "ema", "model", "net_model", "state_dict", "model_state_dict", "net", "unet")
"""Where training scripts put the weights, the averaged ones first."""


class UnsafeFile(ValueError):
    """Reading the file would run code that is in it."""


@dataclass
class Source:
    """What was given, and what can be known of it without running anything.

    Attributes:
        given: the path or object itself.
        kind: "directory", "safetensors", "torch", "pickle", "export" or "object".
        file: the path, if it is one.
        tensors: names and shapes of the weights, where they can be listed.
        metadata: the text that a safetensors header carries.
        top: the keys of the outermost mapping of a torch archive.
        names: what a pickle would import ("module.name").
        words: the short strings that a pickle holds.
        content: what a torch archive holds.
    """

    given: Any
    kind: str
    file: Path | None = None
    tensors: Shapes = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    top: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    content: Any = None

    @classmethod
    def of(cls, given: Any, *, trust_pickle: bool = False) -> Source:
        """Look at a path or an object.

        Raises:
            FileNotFoundError: no such path.
            ValueError: a broken file, or one of a kind that is not known.
        """
        if not isinstance(given, str | Path):
            return cls(given, "object")
        path = Path(given)
        if path.is_dir():
            return cls(given, "directory", path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(given)!r} is not a directory or file on this machine; expected a checkpoint (download it first, "
                "for example with `hf download`; adapters.bundled(name) gives the directories of the bundled ones)"
            )
        with path.open("rb") as stream:
            head = stream.read(10)
        if path.suffix == ".safetensors":
            metadata, tensors = safetensors_header(path)
            return cls(given, "safetensors", path, tensors, metadata)
        if head[:4] == b"PK\x03\x04":
            return cls._archive(given, path, trust_pickle)
        if head[:1] == b"\x80":
            return cls._pickle(given, path, trust_pickle)
        raise ValueError(
            f"{path} is neither safetensors, a torch archive nor a pickle (it begins with {head[:8]!r}); expected a "
            "checkpoint file or a diffusers directory"
        )

    @classmethod
    def _archive(cls, given: Any, path: Path, trust_pickle: bool) -> Source:
        try:
            with opened_zip(path) as archive:
                require_stored(archive, path)
                members = archive.namelist()
                if any(m.endswith(("/archive_format", "serialized_exported_program.json")) for m in members):
                    return cls(given, "export", path, top=tuple(members))
                inside = [m for m in members if m == "data.pkl" or m.endswith("/data.pkl")]
                if not inside:
                    raise ValueError(f"{path} is a zip file, but no torch archive (it has no data.pkl)")
                names, words = opcodes(archive.read(inside[0]), path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is a broken or truncated torch archive: {error}") from error
        return cls(given, "torch", path, names=names, words=words)._opened(trust_pickle)

    @classmethod
    def _pickle(cls, given: Any, path: Path, trust_pickle: bool) -> Source:
        content = path.read_bytes()
        names, words = opcodes(content, path)
        # torch files from before 1.6 are a row of pickles, the first of which is a magic number
        old = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in content[:32]
        source = cls(given, "torch" if old else "pickle", path, names=names, words=words)
        return source._opened(trust_pickle) if old else source

    @property
    def unsafe(self) -> tuple[str, ...]:
        """What a pickle would import beside tensors and plain containers."""
        return tuple(n for n in self.names if not plain(n))

    def _opened(self, trust_pickle: bool) -> Source:
        """A torch archive with its contents, if it holds plain data or is trusted."""
        if self.unsafe and not trust_pickle:
            return self
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                assert self.file is not None
                plainly = not (trust_pickle and self.unsafe)
                mapped = zipfile.is_zipfile(self.file)  # its tensors stay on disk until they are used
                self.content = torch.load(self.file, map_location="cpu", weights_only=plainly, mmap=mapped)
        except Exception as error:  # torch's reader raises all kinds on a broken file
            raise ValueError(f"{self.file} is broken or truncated and cannot be read: {first_line(error)}") from error
        if isinstance(self.content, torch.nn.Module):  # a whole module, which was trusted
            return Source(self.content, "object")
        if isinstance(self.content, Mapping):
            self.top = tuple(str(k) for k in self.content)
            state = self.state()
            self.tensors = {k: tuple(v.shape) for k, v in state.items()}
            self._require_held(state)
        elif isinstance(self.content, Tensor):
            self._require_held({"": self.content})
        return self

    def _require_held(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError for a tensor with more numbers than the file: a view of a few, repeated."""
        assert self.file is not None
        size = self.file.stat().st_size
        for name, tensor in state.items():
            if (claimed := tensor.numel() * tensor.element_size()) > size:
                raise ValueError(
                    f"{self.file}: its tensor {name!r} of shape {tuple(tensor.shape)} has {claimed:,} bytes, and the "
                    f"file {size:,}: it repeats what is stored; save a copy, tensor.contiguous()"
                )

    @property
    def title(self) -> str:
        """What was given, in words."""
        return f"a {type(self.given).__name__}" if self.kind == "object" else str(self.given)

    def require_trust(self) -> None:
        """Raise unless reading the file runs nothing, naming what would be imported."""
        if self.content is None and (self.unsafe or self.kind == "pickle"):
            named = ", ".join(self.unsafe[:4]) or "objects"
            raise UnsafeFile(
                f"{self.file} is a pickle that imports {named}: reading it runs code that came with the file, with "
                "your rights on this machine. If you trust where it comes from, pass trust_pickle=True; otherwise "
                "ask for safetensors"
            )

    def number(self, name: str, default: float) -> float:
        """The first number of a tensor, by its full name, without reading the others."""
        if name not in self.tensors:
            return default
        if self.kind == "safetensors":
            from safetensors import safe_open

            with safe_open(str(self.file), framework="pt") as stored:
                return float(stored.get_tensor(name).flatten()[0])
        found = self.state()[name]
        return float(found[(0,) * found.ndim])

    def state(self) -> dict[str, Tensor]:
        """The weights by name, without the prefixes that parallel training and compiling add."""
        if self.kind == "safetensors":
            from safetensors.torch import load_file

            return _stripped(load_file(str(self.file)))
        return _stripped(_weights(self.content))


def safetensors_header(file: Path) -> tuple[dict[str, str], Shapes]:
    """(metadata, {name: shape}) of a safetensors file, every claim of the header checked against the file.

    Raises:
        ValueError: an oversize, truncated or inconsistent file; the message names it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file} is truncated: {size} bytes, and a safetensors file begins with 8 of length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_JSON:
            raise ValueError(f"{file} claims a header of {length:,} bytes; expected at most {MAX_JSON:,}")
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: its header should have {length:,} bytes, the file has {size:,}")
        header = parsed(stream.read(length), f"the safetensors header of {file}")
    if not isinstance(header, dict):
        raise ValueError(f"{file} has a safetensors header that is a {type(header).__name__}; expected an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{file} has metadata that are a {type(metadata).__name__}; expected an object")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{file} describes {len(header):,} tensors; expected at most {MAX_TENSORS:,}")
    shapes: Shapes = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            bits, shape = _ITEM_BITS[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            if len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= MAX_SIZE:
                raise ValueError(shape)  # their product alone could take hours
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} describes tensor {name!r} wrongly: {reprlib.repr(entry)}") from error
        if min(shape, default=0) < 0 or not 0 <= begin <= end or (end - begin) * 8 != math.prod(shape) * bits:
            raise ValueError(
                f"{file} gives tensor {name!r} of shape {shape} the bytes {begin} … {end}, which do not fit its shape"
            )
        if 8 + length + end > size:
            raise ValueError(
                f"{file} is truncated: tensor {name!r} ends at byte {8 + length + end:,}, the file has {size:,}"
            )
        shapes[name] = shape
        spans.append((begin, end))
    last = 0
    for begin, end in sorted(spans):
        if begin != last:
            raise ValueError(
                f"{file} has tensors that overlap, or leave bytes out, at byte {min(begin, last):,} of them"
            )
        last = end
    if (left := size - 8 - length - last) > 0:
        raise ValueError(
            f"{file} has {left:,} bytes after its last tensor, so that it is not as it was written (a broken download, "
            "or something appended); download or save it again"
        )
    return {str(k): str(v) for k, v in metadata.items()}, shapes


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not JSON, or not an object; the message names the file.
    """
    if (size := file.stat().st_size) > MAX_JSON:
        raise ValueError(f"{file} has {size:,} bytes; expected JSON of at most {MAX_JSON:,}")
    content = parsed(file.read_bytes(), str(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected an object")
    return content


def _weights(content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors inside what a training script saved; empty if there is none."""
    if not isinstance(content, Mapping):
        return {}
    own = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if own and len(own) * 2 >= len(content):
        return own
    for key in STATE_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            return {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
    return {}


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if state and all(k.startswith(prefix) for k in state if k != "n_averaged"):
            state = {k[len(prefix) :]: v for k, v in state.items() if k != "n_averaged"}
    return state
