"""What a file may claim: small files that would grow in memory are refused before they are read.

Reading a file may cost what it holds and no more. Three kinds of files can claim more than they are:

* **zip archives** (torch's checkpoints, .npz): a member of zeros grows a thousandfold when it is inflated, and members
  may overlap. torch stores its members as they are, so there everything packed is refused, and so are members that
  together claim more bytes than the file has. .npz files may be packed: what an array claims is read from its header
  and compared (`flowsolve.runs.arrays`);
* **JSON** (configurations, headers of safetensors): three bytes make an object of seventy. The values are counted
  before they are made;
* **lists of what is in a file**: an entry of a zip's directory or of a header costs kilobytes and microseconds.

The numbers are some ten times what the largest real files have.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["MAX_TENSORS", "MAX_VALUES", "opened_zip", "parsed", "require_plain", "require_stored"]

MAX_TENSORS = 100_000
"""Tensors of a checkpoint, members of an archive."""

MAX_VALUES = 2_000_000
"""Values of a JSON file: 100,000 tensors have 1.1 million."""

MAX_JSON = 100_000_000
"""Bytes of one; the limit of safetensors' own headers."""

ENTRY = 150
"""Bytes of an entry in a zip's directory: 46, its name, and sizes of more than 4 GiB."""


def parsed(raw: bytes, what: str) -> Any:
    """What a JSON text in UTF-8 says.

    Raises:
        ValueError: it is no JSON, is too deep, or has more values than any real file; the message begins with `what`.
    """
    if len(raw) > MAX_JSON:
        raise ValueError(f"{what} has {len(raw):,} bytes; expected at most {MAX_JSON:,}")
    if (values := sum(raw.count(mark) for mark in (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"{what} has some {values:,} values; expected at most {MAX_VALUES:,}")
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error


class _Reader(io.BufferedReader):
    """A file that gives no more than `most` bytes at once, where that is set."""

    most: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None and size is not None and size > self.most:
            raise ValueError(f"its directory has {size:,} bytes; expected one of at most {MAX_TENSORS:,} members")
        return super().read(size)


@contextmanager
def opened_zip(file: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive to read, unless its directory lists more members than any real file.

    Raises:
        ValueError: it does.
        zipfile.BadZipFile: it is none.
    """
    with _Reader(io.FileIO(file)) as stream:
        stream.most = MAX_TENSORS * ENTRY
        try:
            archive = zipfile.ZipFile(stream)  # reads the directory, which says itself how long it is, at once
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{file}: {error}") from None
        stream.most = None
        with archive:
            if (count := len(archive.infolist())) > MAX_TENSORS:
                raise ValueError(f"{file} lists {count:,} members; expected at most {MAX_TENSORS:,}")
            yield archive


def require_stored(archive: zipfile.ZipFile, file: Path) -> None:
    """Raise ValueError unless all members are stored as they are and, together, are no more than the file holds."""
    members, size = archive.infolist(), file.stat().st_size
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size
        if packed or member.flag_bits & 1:
            raise ValueError(
                f"{file}: its member {member.filename!r} is packed, {member.file_size:,} bytes in "
                f"{member.compress_size:,}; expected tensors stored as they are, as torch.save does"
            )
    if (total := sum(m.file_size for m in members)) > size:
        raise ValueError(f"{file}: its members claim {total:,} bytes, and the file has {size:,}: they overlap")


def require_plain(file: str | PathLike[str]) -> None:
    """Raise ValueError for a torch archive that is packed (`require_stored`); files of other kinds pass."""
    if zipfile.is_zipfile(file):
        with opened_zip(Path(file)) as archive:
            require_stored(archive, Path(file))
