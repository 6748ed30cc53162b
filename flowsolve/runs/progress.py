"""The progress bar of a run: this process's share, with the running means of what is computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from flowsolve._optional import require

__all__ = ["Progress"]


class Progress:
    """Counts what is finished, averages it, and shows both if asked.

    Args:
        name: what is done.
        total: items of this process in all; None if not known.
        unit: of the numbers to average; empty if there are none.
        show: draw a bar (needs tqdm).
    """

    def __init__(self, name: str, total: int | None, *, unit: str = "", show: bool) -> None:
        self.name, self.total, self.unit, self.show = name, total, unit, show
        self.finished = self._count = 0
        self._sum = self._squares = self._nfe = self._errors = 0.0
        self._told = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.show:
            quick = sys.stderr.isatty()  # a log is no terminal: a short line now and then
            total = "" if self.total is None else "/{total_fmt}"
            share = "" if self.total is None else " {percentage:3.0f}%" + ("|{bar}|" if quick else "")
            self._bar = require("tqdm", "cli", "a progress bar").tqdm(
                desc=self.name, total=self.total, mininterval=0.1 if quick else 10.0, dynamic_ncols=True,
                bar_format="{desc}" + share + " {n_fmt}" + total + " [{elapsed}<{remaining}{postfix}]",
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def resumed(self, found: Iterable[Sequence[Any]]) -> None:
        """Count what was finished before: the number to average, the evaluations and the solver's error of each."""
        self._add(found)
        if self._bar is not None:
            self._bar.initial = self._bar.n = self.finished
            self._tell()

    def advance(self, found: Iterable[Sequence[Any]]) -> None:
        """Count a batch that was just finished."""
        before = self.finished
        self._add(found)
        if self._bar is not None:
            self._tell()
            self._bar.update(self.finished - before)

    def _add(self, found: Iterable[Sequence[Any]]) -> None:
        for value, nfe, error in found:
            self.finished += 1
            if nfe is None or (self.unit and value is None):
                continue  # an item that failed
            self._count += 1
            self._nfe += nfe
            self._sum += value or 0.0
            self._squares += (value or 0.0) ** 2
            if error is not None:
                self._errors += abs(error)
                self._told += 1

    def _tell(self) -> None:
        if n := self._count:
            text = ""
            if self.unit:
                mean = self._sum / n
                spread = math.sqrt(max(self._squares / n - mean * mean, 0.0) / (n - 1)) if n > 1 else math.nan
                text = f"{mean:.4f} ± {spread:.4f} {self.unit}, "
            text += f"NFE {self._nfe / n:.4g}"
            if self._told:
                text += f", solver {self._errors / self._told:.4f}"
            self._bar.set_postfix_str(text, refresh=False)
