"""Networks of which autograd sees only a part are refused; those that are merely not smooth, or rough in their last
digits, are not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import solvers
from flowsolve.likelihood.visible import Hidden

PATHS = {"CondOT": fs.paths.CondOT(), "VP": fs.paths.VP(), "EDM": fs.paths.EDM()}


class Net(nn.Module):
    def __init__(self, size: int = 4, act: Any = nn.SiLU, gain: float = 1.0, depth: int = 2, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(size if i == 0 else width, width), act()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, size))
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(gain)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g  # half of what is right


def blind(net: nn.Module) -> Any:
    def call(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = net(x, t)
        return net(x, t) + hidden

    return call


def cached(net: nn.Module) -> Any:
    kept = torch.zeros(16, 4)

    def call(x: Tensor, t: Tensor) -> Tensor:
        kept[: len(x)].copy_(net(x, t).detach())
        return net(x, t) + kept[: len(x)].to(x.dtype)

    return call


HIDDEN: dict[str, Any] = {
    "detach": lambda net: lambda x, t: 0.5 * net(x, t) + 0.5 * net(x.detach(), t),
    "a fifth": lambda net: lambda x, t: 0.8 * net(x, t) + 0.2 * net(x.detach(), t),
    "no_grad": blind,
    "a cache": cached,
    "rounding": lambda net: lambda x, t: x + (net(x, t) * 64.0).round() / 64.0,
    "a custom function": lambda net: lambda x, t: Own.apply(net(x, t)),
    "data": lambda net: lambda x, t: x + net(x.data, t),
}
ENTRIES: dict[str, Any] = {
    "curve": lambda flow, x, **o: fs.log_prob(flow, x, nfe=16, **o),
    "exact": lambda flow, x, **o: fs.log_prob(flow, x, solver=solvers.RK4(), nfe=8, trace="exact", **o),
    "adaptive": lambda flow, x, **o: fs.log_prob(flow, x, solver=solvers.Dopri5(1e-2, 1e-2), batch=3, **o),
    "samples": lambda flow, x, **o: fs.sample_log_prob(flow, x.shape, nfe=16, **o),
    "stream": lambda flow, x, **o: list(fs.batching.log_prob(flow, [x], batch=3, nfe=16, **o)),
    "bits": lambda flow, x, **o: fs.bits_per_dim(flow, (x * 40 + 128).clamp(0, 255).long(), nfe=16, **o),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_what_is_hidden_is_noticed(hidden: Any, entry: Any) -> None:
    torch.manual_seed(0)
    flow = fs.Flow(hidden(Net(gain=1.5)), fs.paths.CondOT())
    x = torch.randn(5, 4)
    with pytest.raises(Hidden, match="only a part of the network"):
        entry(flow, x)
    entry(flow, x, verify=False)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Hardtanh], ids=lambda a: a.__name__)
def test_no_false_alarm(act: Any, dtype: torch.dtype, path: Any) -> None:
    """Random networks of many sizes, none of which hides anything."""
    for seed in range(12):
        torch.manual_seed(seed)
        size, gain, depth = (1, 4, 64)[seed % 3], (0.5, 1.0, 3.0, 6.0)[seed % 4], 1 + seed % 5
        net = Net(size, act, gain, depth).to(dtype)
        x = torch.randn(2, size, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        fs.log_prob(fs.Flow(net, path), x, solver=solvers.Euler(), nfe=1)


def test_a_straight_through_rounding_is_not_refused() -> None:
    """Its derivative is that of what it rounds, by intent."""
    torch.manual_seed(0)
    net = Net(gain=1.5)

    def through(x: Tensor, t: Tensor) -> Tensor:
        out = net(x, t)
        return out + ((out * 256.0).round() / 256.0 - out).detach()

    fs.log_prob(fs.Flow(through, fs.paths.CondOT()), torch.randn(5, 4), nfe=16)


def test_it_costs_a_few_passes_of_one_sample() -> None:
    seen: list[int] = []
    net = Net()

    def counting(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return net(x, t)

    out = fs.log_prob(fs.Flow(counting, fs.paths.CondOT()), torch.randn(5, 4), nfe=16, repeats=0)
    assert seen[:5] == [1] * 5
    assert seen[5:] == [5] * 16
    assert out.nfe.tolist() == [16] * 5


def test_a_network_that_takes_whole_batches_only_is_looked_at_as_a_whole() -> None:
    net = Net()

    def whole(x: Tensor, t: Tensor) -> Tensor:
        if len(x) != 5:
            raise RuntimeError("captured for 5")
        return net(x, t)

    def half(x: Tensor, t: Tensor) -> Tensor:
        return whole(x, t) + whole(x.detach(), t)

    fs.log_prob(fs.Flow(whole, fs.paths.CondOT()), torch.randn(5, 4), nfe=16)
    with pytest.raises(Hidden):
        fs.log_prob(fs.Flow(half, fs.paths.CondOT()), torch.randn(5, 4), nfe=16)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["digits-ddpm", "digits-condot"])
def test_trained_networks(name: str, dtype: torch.dtype | None) -> None:
    """As they are they pass, in half precision too; half hidden, in float32, they do not."""
    pytest.importorskip("diffusers")
    flow, x = fs.adapters.load(fs.adapters.bundled(name), dtype=dtype), torch.randn(1, 1, 8, 8)
    common: dict[str, Any] = {"nfe": 8}
    fs.log_prob(flow, x, **common)

    def half(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * flow.net(x, t) + 0.5 * flow.net(x.detach(), t)

    if dtype is not None:
        return  # some cases are too rough to tell
    with pytest.raises(Hidden):
        fs.log_prob(fs.Flow(half, flow.path, flow.prediction, time=flow.clock, dtype=flow.dtype), x, **common)
