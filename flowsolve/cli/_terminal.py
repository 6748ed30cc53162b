r"""What is printed: text of files, configurations and errors is data, and must not command the terminal.

Names of tensors, files and settings may hold escape sequences (colours, titles, answers typed into the shell), marks
that turn the direction of writing, and line breaks that forge a line of their own. Whatever a command prints goes
through here: each such character is written as JSON writes it, `\u001b`, so that the JSON of `--json` stays what it is.
Single bytes of file names that are not UTF-8 are written so too, and no longer fail to be printed.
"""

from __future__ import annotations

import json
import sys
import traceback
import unicodedata
import warnings
from typing import Any

import typer

__all__ = ["failed", "guard", "plain", "say"]

COMMANDS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of characters that are not seen but obeyed: control, format, surrogates, separators, unknown."""

LONGEST = 4000
"""Characters of a text: the longest that the package itself writes have some hundreds."""


def plain(text: object, *, lines: bool = False, whole: bool = False) -> str:
    """Text with all that a terminal would obey spelt out.

    Args:
        text: what to print.
        lines: keep line breaks.
        whole: however long it is; otherwise the end of a text that would flood the screen is left out.
    """
    said = str(text)
    more = 0 if whole else max(0, len(said) - LONGEST)
    shown = "".join(
        c if (lines and c == "\n") or unicodedata.category(c) not in COMMANDS else json.dumps(c)[1:-1]
        for c in (said[:LONGEST] if more else said)
    )
    return f"{shown}… ({more:,} more characters)" if more else shown


def say(*lines: object, whole: bool = False) -> None:
    """Print lines, each of which stays one."""
    for line in lines:
        typer.echo(plain(line, whole=whole))


def failed(name: str, error: object) -> None:
    """Print an error; further lines of it stand in from the margin, so that none passes for one of ours."""
    typer.echo(f"{name}: {plain(error, lines=True).strip().replace(chr(10), f'{chr(10)}  ')}", err=True)


def guard() -> None:
    """Let warnings and the trace of an error that nobody expected be printed by the same rule, in this process."""
    told = warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        return plain(told(message, category, filename, lineno, line), lines=True, whole=True)

    def traced(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        sys.stderr.write(plain("".join(traceback.format_exception(kind, error, trace)), lines=True, whole=True))

    warnings.formatwarning = formatted
    sys.excepthook = traced
