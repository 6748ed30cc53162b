"""torch.export programs: their output, the order of their inputs, and why a file needs trust."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import adapters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.net(torch.cat((x, t[:, None]), 1)))


class Turned(Net):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, t)


def program(net: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    x, t = torch.randn(4, 2), torch.rand(4)
    arguments = (t, x) if isinstance(net, Turned) else (x, t)
    return torch.export.export(net, arguments, dynamic_shapes={"x": {0: batch}, "t": {0: batch}})


SAID = {"path": fs.paths.CondOT(), "prediction": "velocity", "time": "flow"}


@pytest.mark.parametrize("kind", [Net, Turned])
def test_programs(tmp_path: Path, kind: type[Net]) -> None:
    exported = program(kind())
    torch.export.save(exported, tmp_path / "net.pt2")
    x = torch.randn(3, 2)
    for flow in (
        adapters.load(exported, **SAID),
        adapters.load(tmp_path / "net.pt2", trust_pickle=True, **SAID),
    ):
        with torch.no_grad():
            torch.testing.assert_close(flow.velocity(x, 0.25), Net()(x, torch.full((3,), 0.25)))
        assert fs.sample(flow, start=x, solver=fs.solvers.Euler(), nfe=3).x.shape == (3, 2)


def test_what_a_program_does_not_say(tmp_path: Path) -> None:
    torch.export.save(program(Net()), tmp_path / "net.pt2")
    with pytest.raises(adapters.Unrecognised, match=r"path= .*prediction= .*time= .*trust_pickle=True"):
        adapters.load(tmp_path / "net.pt2")
    with pytest.raises(adapters.Unrecognised, match=r"declare trust_pickle=True \(torch.export.load runs code"):
        adapters.load(tmp_path / "net.pt2", **SAID)
    with pytest.raises(ValueError, match="dtype of an exported program is fixed"):
        adapters.load(program(Net()), dtype=torch.float16, **SAID)
