"""The command line `flowsolve`: every module of this package is one command, the function that bears its
name.

Command modules import torch and the solvers inside their functions, so that `flowsolve --help` stays quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from flowsolve._optional import require
from flowsolve._version import __version__

__all__ = ["build", "main"]


def build() -> Any:
    """The typer application with every command.

    Raises:
        ImportError: typer is not installed.
    """
    typer = require("typer", "cli", "the command line")
    app = typer.Typer(name="flowsolve", no_args_is_help=True, pretty_exceptions_enable=False)

    def show(asked: bool) -> None:
        if asked:
            typer.echo(__version__)
            raise typer.Exit

    @app.callback()  # type: ignore[untyped-decorator]
    def flowsolve(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=show, help="Print the version."),
    ) -> None:
        """Numerical ODE and SDE solvers for generative flows."""

    for info in iter_modules(__path__):
        if not info.name.startswith("_"):
            app.command(info.name)(getattr(import_module(f"{__name__}.{info.name}"), info.name))
    return app


def main() -> None:
    """Entry point: run the command line; a missing package or file is one line and exit status 1.

    The version and the first help are told without typer too.
    """
    try:
        app = build()
    except ImportError as error:  # typer's: nothing of `cli` can be imported without it
        if sys.argv[1:] == ["--version"]:
            print(__version__)
            raise SystemExit(0) from None
        if sys.argv[1:] in ([], ["--help"]):
            commands = ", ".join(info.name for info in iter_modules(__path__) if not info.name.startswith("_"))
            print(f"flowsolve {__version__}: numerical ODE and SDE solvers for generative flows\ncommands: {commands}")
        print(f"flowsolve: {error}", file=sys.stderr)
        raise SystemExit(0 if sys.argv[1:] == ["--help"] else 1) from None
    from flowsolve.cli._terminal import failed, guard

    guard()
    try:
        app(prog_name="flowsolve")  # also as `python -m flowsolve`
    except (ImportError, OSError) as error:
        failed("flowsolve", error)
        raise SystemExit(1) from None
