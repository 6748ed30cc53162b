"""Part files: what each process has finished, in a SQLite database that it alone writes.

A batch is one transaction: its items and the note that it is done come together or not at all. A process that is
killed loses the batch under way and no other; a full disk rolls the transaction back. The journal is a rollback journal
(no shared memory, so network file systems will do) and every commit is synchronised to the disk.

A second process that would write the same part is refused by a lock that the operating system drops with the process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from flowsolve.runs.errors import RunError

__all__ = ["Part", "Parts", "Row", "named"]

Row = tuple[Any, ...]
"""The columns of one item, its number first."""

WAIT = 60.0
"""Seconds to wait for a reader or writer of the same file: each holds it for one transaction."""


class Part:
    """The part file that this process writes.

    Args:
        folder: where the parts are.
        number: the rank of this process.
        columns: name → SQLite type of what is kept of an item, beside its number `idx`.

    Raises:
        RunError: another process is writing it, or it cannot be written.
    """

    def __init__(self, folder: Path, number: int, columns: Mapping[str, str]) -> None:
        self.file = folder / f"rank-{number:05d}.sqlite"
        self._insert = f"INSERT INTO items VALUES ({', '.join('?' * (1 + len(columns)))})"
        with named(self.file, folder.parent), ExitStack() as stack:
            lock = sqlite3.connect(folder / f".rank-{number:05d}.lock", isolation_level=None, timeout=0.0)
            stack.callback(lock.close)
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                raise RunError(
                    f"{self.file} is being written by another process: the run in {folder.parent} is already going. "
                    "Wait for it, or choose another directory",
                    folder.parent,
                ) from error
            self.db = stack.enter_context(closing(sqlite3.connect(self.file, isolation_level=None, timeout=WAIT)))
            self.db.execute("PRAGMA journal_mode = TRUNCATE")
            self.db.execute("PRAGMA synchronous = FULL")
            with _transaction(self.db):
                kept = ", ".join(f"{name} {kind}" for name, kind in columns.items())
                self.db.execute(f"CREATE TABLE IF NOT EXISTS items (idx INTEGER PRIMARY KEY, {kept})")
                self.db.execute(
                    "CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, first INTEGER, size INTEGER, "
                    "seconds REAL)"
                )
            self._open = stack.pop_all()

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def commit(self, number: int, rows: Sequence[Row], seconds: float) -> None:
        """Keep a batch, whole: the rows of its items in order, and what it took.

        Raises:
            RunError: it cannot be written, for example because the disk is full.
        """
        with named(self.file, self.file.parents[1]), _transaction(self.db):
            self.db.executemany(self._insert, rows)
            first = rows[0][0] if rows else None
            self.db.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", (number, first, len(rows), seconds))


class Parts:
    """All part files of a run, whatever number of processes wrote them.

    Attributes:
        where: batch → the file that holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.where: dict[int, Path] = {}
        self.seconds = 0.0
        for file in sorted(folder.glob("rank-*.sqlite")):
            with _reading(file) as db:
                found = db.execute("SELECT number, seconds FROM batches").fetchall() if _begun(db) else []
            for number, seconds in found:
                self.where[number] = file
                self.seconds += seconds

    def complete(self, batches: int) -> bool:
        """Whether the batches 0 … batches − 1 are all there."""
        return len(self.where) == batches

    def rows(self, columns: str = "*", wanted: Callable[[int], bool] = lambda _: True) -> Iterator[Row]:
        """The items of the wanted batches, in order of their numbers."""
        with ExitStack() as stack:
            open_: dict[Path, sqlite3.Connection] = {}
            for batch in filter(wanted, sorted(self.where)):
                file = self.where[batch]
                if file not in open_:
                    open_[file] = stack.enter_context(_reading(file))
                first, size = (
                    open_[file].execute("SELECT first, size FROM batches WHERE number = ?", (batch,)).fetchone()
                )
                query = f"SELECT {columns} FROM items WHERE idx >= ? AND idx < ? ORDER BY idx"
                yield from open_[file].execute(query, (first, first + size))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, also where the commit itself fails."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    with named(file, file.parents[1]), closing(sqlite3.connect(file, isolation_level=None, timeout=WAIT)) as db:
        yield db


def _begun(db: sqlite3.Connection) -> bool:
    """Whether the tables are there: a process may be killed before it makes them."""
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = 'batches'").fetchone())


@contextmanager
def named(file: Path, out: Path) -> Iterator[None]:
    """Name a file of the run in `out` in whatever SQLite has to say of it."""
    try:
        yield
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.OperationalError) and ("full" in str(error) or "I/O" in str(error)):
            mend = "Make room and start the run again: it goes on from what is finished, which is kept"
        elif "not a database" in str(error) or "malformed" in str(error):
            mend = "Move that file away and start the run again: what it held is computed anew, the rest is kept"
        else:
            mend = "What is finished is kept; start the run again to go on"
        raise RunError(f"{file}: {error}. {mend}", out) from error
