"""torch.export programs: `.pt2` files, and an ExportedProgram in memory.

A program is the network and nothing else: path, prediction and time have to be declared. The order of its arguments is
read from their names. `torch.export.load` unpickles and executes parts of the archive (torch says so in its own
documentation), so that a file needs `trust_pickle=True`; its archive is listed without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import TIMES, Wrapper

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("export",)
DECLARES = ("arguments",)


class Program(Wrapper):
    """An exported program as net(x, t, **cond)."""

    def __init__(self, module: torch.nn.Module, order: str) -> None:
        super().__init__(module)
        self.order = order

    def eval(self) -> Program:  # an exported module has one mode, the one it was exported in, and refuses to change
        return self

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(*((x, t) if self.order == "xt" else (t, x)), **cond)  # type: ignore[no-any-return]


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """A .pt2 archive, or an ExportedProgram."""
    program = source.given if isinstance(source.given, torch.export.ExportedProgram) else None
    if source.kind != "export" and program is None:
        return None
    evidence = ["an ExportedProgram"] if program is not None else ["a torch.export archive"]
    missing = [f"{k}= (a program does not say it)" for k in ("path", "prediction", "time") if k not in said]
    if program is None and said.get("trust_pickle"):
        try:
            program = torch.export.load(str(source.file))
        except Exception as error:  # whatever its deserialiser meets
            raise ValueError(f"{source.file} is no program that this torch can load: {error}") from error
    order = said.get("arguments")
    if order not in (None, "xt", "tx"):
        raise ValueError(f"arguments = {order!r}; expected 'xt' or 'tx'")
    count = None
    if program is None:
        missing.append("trust_pickle=True (torch.export.load runs code that is in the file, with your rights)")
    else:
        names = [str(n) for n in program.graph_signature.user_inputs]
        times = [n.lower() in TIMES for n in names[:2]]
        order = order or {(False, True): "xt", (True, False): "tx"}.get(tuple(times))  # type: ignore[arg-type]
        evidence.append(f"inputs {', '.join(names)}")
        count = sum(p.numel() for p in program.parameters())
        if order is None:
            missing.append("arguments='xt' or 'tx' (the names of its inputs do not tell)")

    def network(device: Any, dtype: Any) -> Any:
        assert program is not None
        if dtype is not None:
            raise ValueError("the dtype of an exported program is fixed; export it in the one that you want")
        module = program.module()
        return Program(module if device is None else module.to(device), str(order))

    return Finding(
        "an ExportedProgram" if source.kind == "object" else str(source.given),
        NAMES[0], 1.0, tuple(evidence), parameters=count, missing=tuple(missing), network=network,
    )  # fmt: skip
