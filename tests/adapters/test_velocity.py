"""torchcfm, run side by side; the order of arguments; plain callables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import adapters
from flowsolve.adapters.velocity import Smoothed
from flowsolve.paths import CondOT, Trig


class Forward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat((x, t[:, None]), 1))  # type: ignore[no-any-return]


class Backward(Forward):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, t)


class Silent(Forward):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b)


X = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("net", [Forward(), Backward()], ids=["xt", "tx"])
def test_the_order_of_arguments(net: nn.Module) -> None:
    flow = adapters.load(net, format="flow_matching", path=CondOT())
    with torch.no_grad():
        torch.testing.assert_close(flow.velocity(X, 0.3), Forward()(X, torch.full((3,), 0.3)))
    plain = adapters.load(net, path=CondOT(), prediction="velocity")
    with torch.no_grad():
        torch.testing.assert_close(plain.velocity(X, 0.3), Forward()(X, torch.full((3,), 0.3)))


def test_an_order_that_nothing_tells() -> None:
    with pytest.raises(adapters.Unrecognised, match="arguments='xt' or 'tx'"):
        adapters.load(Silent(), format="flow_matching", path=CondOT())
    flow = adapters.load(Silent(), format="flow_matching", path=CondOT(), arguments="xt")
    with torch.no_grad():
        torch.testing.assert_close(flow.velocity(X, 0.3), Forward()(X, torch.full((3,), 0.3)))
    with pytest.raises(ValueError, match="arguments = 'yx'; expected 'xt' or 'tx'"):
        adapters.load(Silent(), format="flow_matching", path=CondOT(), arguments="yx")


def test_torchcfm_networks() -> None:
    """Its MLP takes one tensor with time as the last feature; its wrapper's clock is flow time."""
    models = pytest.importorskip("torchcfm.models.models")
    torch.manual_seed(0)
    net = models.MLP(dim=2, time_varying=True)
    with pytest.raises(adapters.Unrecognised, match=r"torchcfm.*path= .*or matcher="):
        adapters.load(net)
    flow = adapters.load(net, path=CondOT())
    with torch.no_grad():
        expected = net(torch.cat((X, torch.full((3, 1), 0.4)), 1))
        torch.testing.assert_close(flow.velocity(X, 0.4), expected)


@pytest.mark.parametrize(
    ("name", "sigma", "path"),
    [
        ("ConditionalFlowMatcher", 0.0, CondOT()),
        ("ConditionalFlowMatcher", 0.2, Smoothed(0.2)),
        ("ExactOptimalTransportConditionalFlowMatcher", 0.0, CondOT()),
        ("TargetConditionalFlowMatcher", 0.1, CondOT(0.1)),
        ("VariancePreservingConditionalFlowMatcher", 0.0, Trig()),
    ],
)
def test_matchers(name: str, sigma: float, path: Any) -> None:
    """Mean, spread and target of the real matcher's pairs are those of the path, by their moments."""
    module = pytest.importorskip("torchcfm.conditional_flow_matching")
    matcher = getattr(module, name)(sigma=sigma)
    flow = adapters.load(Forward(), matcher=matcher)
    assert flow.path == path
    torch.manual_seed(0)
    n = 200_000
    t = torch.full((n,), 0.6)
    z, noise = torch.full((n, 1), 3.0), torch.randn(n, 1)
    if name.startswith("Exact"):
        return  # its pairs depend on the batch; the path is that of its parent
    _, x, u = matcher.sample_location_and_conditional_flow(noise, z, t)
    point = path.at(0.6)
    assert float(x.mean()) == pytest.approx(3.0 * point.alpha, abs=5 * point.sigma / math.sqrt(n))
    assert float(x.std()) == pytest.approx(point.sigma, rel=0.01)
    # with one z, ε̂ = (x − αz)/σ, and the regression of u on x is α̇ z + σ̇ ε̂
    target = 3.0 * point.alpha_dot + point.sigma_dot * (x - 3.0 * point.alpha) / point.sigma
    assert float((u - target).mean()) == pytest.approx(0.0, abs=0.02)
    assert float(((u - target) * (x - x.mean())).mean()) == pytest.approx(0.0, abs=0.02)


def test_the_smoothed_path() -> None:
    path = Smoothed(0.3)
    t = torch.linspace(0, 1, 33, dtype=torch.float64, requires_grad=True)
    sigma = path.sigma(t)
    (slope,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(path.sigma_dot(t), slope)
    torch.testing.assert_close(path.time(path.log_snr(t.detach())), t.detach(), rtol=1e-9, atol=1e-9)
    assert path.time(path.log_snr(0.37)) == pytest.approx(0.37, abs=1e-12)
    assert path.prior_std == pytest.approx(math.sqrt(1.09))
    with pytest.raises(ValueError, match="expected 0 < smoothing < 1"):
        Smoothed(0.0)


def test_matchers_that_no_path_describes() -> None:
    module = pytest.importorskip("torchcfm.conditional_flow_matching")
    for matcher in (
        module.SchrodingerBridgeConditionalFlowMatcher(sigma=1.0),
        module.VariancePreservingConditionalFlowMatcher(sigma=0.1),
    ):
        with pytest.raises(ValueError, match="trains on no path of the form"):
            adapters.load(Forward(), matcher=matcher)


def test_training_checkpoints(tmp_path: Path) -> None:
    """torchcfm's training scripts save {net_model, ema_model, sched, optim, step}: the averaged weights are taken."""
    net, averaged = Backward(), Backward()
    with torch.no_grad():
        averaged.net.weight.mul_(2.0)
    file = tmp_path / "otcfm_weights_step_400000.pt"
    torch.save({"net_model": net.state_dict(), "ema_model": averaged.state_dict(), "step": 3}, file)
    assert adapters.inspect(file).format == "torchcfm"
    flow = adapters.load(file, net=Backward(), path=CondOT())
    with torch.no_grad():
        torch.testing.assert_close(flow.velocity(X, 0.5), averaged(torch.full((3,), 0.5), X))


def test_plain_callables_say_nothing() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return -x

    with pytest.raises(adapters.Unrecognised, match=r"not recognised.*or path=, prediction= and time="):
        adapters.load(net)
    with pytest.raises(adapters.Unrecognised, match=r"declare prediction= "):
        adapters.load(net, path=CondOT())
    with pytest.raises(adapters.Unrecognised, match=r"declare time='flow', 'native' or a function"):
        adapters.load(net, path=fs.paths.VP(), prediction="noise")
    flow = adapters.load(net, path=fs.paths.VP(), prediction="noise", time="native", data_range=(0.0, 1.0))
    assert flow.data_range == (0.0, 1.0)
    assert adapters.load(net, path=CondOT(), prediction="velocity", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(flow.noise(X, 0.5), -X)
