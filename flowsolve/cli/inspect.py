"""`flowsolve inspect`: what a checkpoint says of itself, as a table; with data, whether it is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flowsolve._optional import require
from flowsolve.cli._terminal import failed, plain, say

if TYPE_CHECKING:
    from torch import Tensor

    from flowsolve.adapters import Finding
    from flowsolve.flow import Flow

typer: Any = require("typer", "cli", "the command line")

__all__ = ["inspect", "rows"]


def inspect(
    source: Annotated[str, typer.Argument(help="A directory or file; or the name of a bundled checkpoint.")],
    format: Annotated[str | None, typer.Option(help="The family it belongs to, if it does not say so.")] = None,
    declare: Annotated[list[str] | None, typer.Option(help="KEY=VALUE that it does not say; may be repeated.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data to check it on: .npy, .npz, .pt, .safetensors, or 'digits'.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of the data are used.")] = 64,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Run code that is in the file, with your rights on this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what a checkpoint is, from what it says of itself; exit status 1 if it would not load."""
    from flowsolve import adapters
    from flowsolve.cli._declared import declared

    report = None
    try:
        place = adapters.bundled(source) if source in adapters.BUNDLED else Path(source)
        finding = adapters.inspect(place, format=format, trust_pickle=trust_pickle, **declared(declare or []))
        if data is not None and finding.ready:
            flow = finding.flow()
            report = _check(flow, _data(data, count, flow))
    except (ImportError, OSError, TypeError, ValueError) as error:
        failed("flowsolve inspect", error)
        raise typer.Exit(1) from None
    if as_json:
        told = finding.summary()
        if report is not None:
            told["check"] = {"ok": report[0], "message": report[1]}
        say(*json.dumps(told, indent=1, ensure_ascii=False).split("\n"), whole=True)
    else:
        _show(finding, report)
    raise typer.Exit(0 if finding.ready and (report is None or report[0]) else 1)


def rows(finding: Finding) -> list[tuple[str, str]]:
    """The finding as (what, value) pairs, in words, for a terminal."""
    from flowsolve.paths import Discrete

    confidence = f"{finding.confidence:.2f}"
    path = None if finding.path is None else repr(finding.path)
    if isinstance(finding.path, Discrete):
        table = finding.path.alphas_cumprod
        path = f"Discrete, {len(table)} steps, ᾱ from {table[0]:.6g} to {table[-1]:.6g}"
    span = finding.data_range
    latent = None if finding.latent_scale is None else f"scale {_numbers(finding.latent_scale)}"
    if latent is not None and finding.latent_shift is not None:
        latent += f", shift {_numbers(finding.latent_shift)}"
    count = finding.parameters
    native = _ends(finding.native)
    if native and finding.clock:
        native += f"   ({finding.clock})"
    told = [
        ("format", finding.format),
        ("confidence", confidence),
        ("evidence", "\n".join(map(plain, finding.evidence))),
        ("path", path),
        ("λ, noise to data", _ends(finding.log_snr, infinite=True) or None),
        ("prediction", None if finding.prediction is None else finding.prediction.name),
        ("native time", native or finding.clock or None),
        ("data range", _ends(span) or ("latents" if latent else None)),
        ("levels", None if finding.levels is None else str(finding.levels)),
        ("latent", latent),
        ("parameters", None if count is None else f"{count:,}"),
    ]
    return [
        (what, "not stated" if value is None else plain(value, lines=what == "evidence", whole=True))
        for what, value in told
        if what not in ("latent", "levels") or value
    ]


def _show(finding: Finding, report: tuple[bool, str] | None) -> None:
    console = require("rich.console", "cli", "the command line").Console()
    box = require("rich.box", "cli", "the command line")
    text = require("rich.text", "cli", "the command line").Text
    table = require("rich.table", "cli", "the command line").Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows(finding):
        table.add_row(what, text(value))
    if report is not None:
        table.add_row("check", text(plain(report[1], lines=True), style="green" if report[0] else "red"))
    if finding.refusal is not None:
        table.add_row("refused", text(plain(finding.refusal, lines=True), style="red"))
    elif not finding.ready:
        table.add_row("to be declared", text("\n".join(map(plain, finding.missing)) or "format=", style="yellow"))
    console.print(text(plain(finding.source)), soft_wrap=True)
    console.print(table)


def _check(flow: Flow, data: Tensor) -> tuple[bool, str]:
    """(passed, what is to be said); a network that wants conditions cannot be asked from here."""
    try:
        report = flow.check(data)
    except (RuntimeError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return False, f"could not be run ({why}); a conditioned network is checked by flow.check(data, **cond)"
    return report.ok, report.message


def _ends(pair: tuple[float, float] | None, infinite: bool = False) -> str:
    if pair is None:
        return ""
    told = ["-∞" if v < -700.0 and infinite else "∞" if v > 700.0 and infinite else f"{v:.4g}" for v in pair]
    return " … ".join(told).replace("-", "−")


def _numbers(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else f"one a channel ({len(value)})"


def _data(name: str, count: int, flow: Flow) -> Tensor:
    """The first data of a file, or of the digits, as floats; integers become states by the flow's transform."""
    import numpy as np
    import torch
    from safetensors import safe_open

    from flowsolve.adapters.files import Source, safetensors_header
    from flowsolve.runs import pictures
    from flowsolve.runs.arrays import chosen, mapped
    from flowsolve.transforms import Latent

    if name == "digits":
        from flowsolve.problems import digits

        images = digits.load("held_out").images[:count]
        if isinstance(flow.transform, Latent):
            raise ValueError(f"--data digits are images, and the network takes codes, {flow.transform!r}; give codes")
        u = torch.rand(images.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return flow.transform.forward(images + u, digits.LEVELS)
    file, key = chosen(name)
    if file.suffix in (".npy", ".npz"):
        found: Any = torch.from_numpy(np.array(mapped(file, key, count)[:count]))
    elif file.suffix in (".pt", ".pth"):
        read = Source.of(file)
        read.require_trust()
        found = read.content
    elif file.suffix == ".safetensors":
        safetensors_header(file)
        with safe_open(str(file), framework="pt") as stored:
            found = stored.get_slice(next(iter(stored.keys()))) if stored.keys() else None
            found = None if found is None or len(found.get_shape()) < 2 else found[:count]
    else:
        raise ValueError(f"--data {name!r}; expected 'digits' or a .npy, .npz, .pt or .safetensors file")
    if not isinstance(found, torch.Tensor) or found.ndim < 2:
        raise ValueError(f"{file} holds no array of shape (N, …)")
    found = found[:count]
    return pictures.states(flow, found) if found.dtype == torch.uint8 else found.float()
