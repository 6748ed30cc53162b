"""What the commands that run for long have in common: checkpoints by path or name, and errors of one line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

__all__ = ["command", "one_line", "opened"]


@contextmanager
def one_line(name: str, out: Path) -> Iterator[None]:
    """Turn what may go wrong into one line and exit status 1, an interrupt into 130."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] != "flowsolve":
            raise  # of torch: its trace says where
        typer.echo(f"flowsolve {name}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"flowsolve {name}: interrupted; {out} keeps what is finished, the same command goes on", err=True)
        raise typer.Exit(130) from None


def opened(source: str, device: str | None) -> tuple[Any, str | None]:
    """The flow of a checkpoint or of a bundled one's name, on the device of this process; and its name."""
    import torch

    from flowsolve import adapters
    from flowsolve.runs.ranks import Rank

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = adapters.bundled(source) if source in adapters.BUNDLED and not Path(source).exists() else Path(source)
    return adapters.load(path, device=Rank.here().device(place)), place


def command(name: str, arguments: Sequence[str], options: Mapping[str, Any]) -> str:
    """The command line that does the same again, but for --out."""
    words = ["flowsolve", name, *arguments]
    for option, value in options.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
