"""What can end a run: every message says which item or file, what is kept, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ItemError", "RunError", "keeping"]


class ItemError(ValueError):
    """One item cannot be used: a corrupt file, an image of another size, a solve that did not reach its end.

    Attributes:
        name: the item's file, or its number.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {reason}")


class RunError(RuntimeError):
    """A run stopped before its end. What was finished is kept, and the same call goes on from there.

    Attributes:
        out: the run's directory.
    """

    def __init__(self, message: str, out: Path) -> None:
        self.out = out
        super().__init__(message)


@contextmanager
def keeping(out: Path) -> Iterator[None]:
    """Say of an OSError, such as that of a full disk, that it costs nothing that is finished."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error}. What is finished is kept in {out}; mend that and start the run again to go on", out
        ) from error
