"""What the commands that run for long have in common: checkpoints by path or name, and errors of one line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flowsolve.cli._terminal import failed

__all__ = ["Declare", "Format", "TrustPickle", "command", "evaluations", "one_line", "opened"]

Format = Annotated[str | None, typer.Option(help="Family of the checkpoint, if it does not say so.")]
Declare = Annotated[list[str] | None, typer.Option(help="KEY=VALUE that it does not say; may be repeated.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Run code that is in the file, with your rights.")]

SWITCHES = ("trust_pickle", "capture")
"""Options that have no --no- form."""


@contextmanager
def one_line(name: str, out: Path) -> Iterator[None]:
    """Turn what may go wrong into one line and exit status 1, an interrupt into 130."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] != "flowsolve":
            raise  # of torch: its trace says where
        failed(f"flowsolve {name}", error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        failed(f"flowsolve {name}", f"interrupted; {out} keeps what is finished, the same command goes on")
        raise typer.Exit(130) from None


def opened(
    source: str, device: str | None, format: str | None, declare: list[str] | None, trust_pickle: bool
) -> tuple[Any, str | None]:
    """The flow of a checkpoint or of a bundled one's name, on the device of this process; and the device's name."""
    import torch

    from flowsolve import adapters
    from flowsolve.cli._declared import declared
    from flowsolve.runs.ranks import Rank

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = adapters.bundled(source) if source in adapters.BUNDLED and not Path(source).exists() else Path(source)
    said = declared(declare or [])
    here = Rank.here().device(place)
    return adapters.load(path, format=format, device=here, trust_pickle=trust_pickle, **said), place


def command(name: str, arguments: Sequence[str], options: Mapping[str, Any]) -> str:
    """The command line that does the same again, but for --out."""
    words = ["flowsolve", name, *arguments]
    for option, value in options.items():
        flag = option.replace("_", "-")
        if option in SWITCHES:
            words += [f"--{flag}"] if value else []
        elif isinstance(value, list):
            words += [word for entry in value for word in (f"--{flag}", str(entry))]
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def evaluations(cost: Mapping[str, Any]) -> str:
    """The NFE of a run in words."""
    if cost["min"] == cost["max"]:
        return str(cost["min"])
    return f"{cost['mean']:.4g} on average, {cost['min']} to {cost['max']}"
