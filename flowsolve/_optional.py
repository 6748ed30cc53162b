"""Optional packages: imported where they are used, and named together with the extra that brings them."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["EXTRAS", "install", "require"]

EXTRAS = {
    "cli": "the command line and progress bars",
    "diffusers": "checkpoints and pipelines of diffusers",
    "runs": "data sets, images and reports of long runs (with cli)",
    "train": "the bundled digits and `flowsolve train` (with cli, diffusers)",
    "bridges": "torchdiffeq and torchsde as solvers",
    "ot": "couplings of minibatch optimal transport",
    "bench": "`flowsolve demo` and the benchmarks (with train, bridges)",
}
"""The extras of the package, but for those of its own development, and what each is for."""


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional module, or say how to install it.

    Args:
        module: its dotted name, such as "sklearn.datasets".
        extra: the extra of flowsolve that depends on it.
        purpose: what needs it, as the subject of a sentence.

    Raises:
        ImportError: the package is not installed. A module missing *inside* an installed package is reported
            as it is.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: {install(extra)} (the extras are {', '.join(EXTRAS)})",
            name=package,
        ) from error


def install(extra: str) -> str:
    """The command that installs an extra where this package is.

    From a copy of the repository, installed or only on the path, pip is given the copy. Otherwise this package is
    installed, and pip takes the extra from what is there: it asks no index for the package itself.
    """
    tree = Path(__file__).resolve().parents[1]
    try:
        ours = 'name = "flowsolve"' in (tree / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        ours = False
    return f"pip install -e {shlex.quote(f'{tree}[{extra}]')}" if ours else f"pip install 'flowsolve[{extra}]'"
