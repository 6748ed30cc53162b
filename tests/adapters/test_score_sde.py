"""score_sde networks against the formulas of Song et al. 2021, appendix C, written out here."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowsolve import adapters
from flowsolve.paths import VE, VP, SubVP
from tests.adapters.tiny import NCSNpp

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def textbook(sde: str, net: Any, tau: float) -> tuple[float, float, torch.Tensor]:
    """(mean, std, score) of the SDE and its network at diffusion time τ, from the paper."""
    if sde == "ve":
        std = 0.01 * (50.0 / 0.01) ** tau
        return 1.0, std, net(X, torch.full((2,), std))
    log_mean = -0.25 * tau**2 * (20.0 - 0.1) - 0.5 * tau * 0.1
    std = math.sqrt(1.0 - math.exp(2.0 * log_mean)) if sde == "vp" else 1.0 - math.exp(2.0 * log_mean)
    return math.exp(log_mean), std, -net(X, torch.full((2,), 999.0 * tau)) / std


@pytest.mark.parametrize(("sde", "path"), [("vp", VP()), ("subvp", SubVP()), ("ve", VE())])
def test_scores(sde: str, path: Any) -> None:
    net = NCSNpp(divide=sde == "ve")
    flow = adapters.load(net, sde=sde)
    assert flow.path == path
    assert flow.data_range == ((0.0, 1.0) if sde == "ve" else (-1.0, 1.0))
    for tau in (1.0, 0.6, 0.2, 0.01):
        with torch.no_grad():
            mean, std, score = textbook(sde, net, tau)
            t = 1.0 - tau if sde == "ve" else flow.path.time_from_native(tau)
            estimate = flow.estimate(X, t)
        assert float(estimate.point.alpha) == pytest.approx(mean, rel=1e-9)
        assert float(estimate.point.sigma) == pytest.approx(std, rel=1e-9)
        torch.testing.assert_close(estimate.score, score, rtol=1e-5, atol=1e-6)


def test_an_sde_object_or_the_configuration_says_all() -> None:
    class VESDE:
        sigma_min, sigma_max, N = 0.02, 378.0, 2000

    class subVPSDE:
        beta_0, beta_1, N = 0.2, 15.0, 1000

    assert adapters.load(NCSNpp(), sde=VESDE()).path == VE(0.02, 378.0)
    assert adapters.load(NCSNpp(), sde=subVPSDE()).path == SubVP(0.2, 15.0)
    flow = adapters.load(NCSNpp(), path=VP(0.3, 12.0))
    assert float(flow.clock(flow.path.time_from_native(0.5))) == pytest.approx(499.5)
    assert flow.prediction.name == "noise"
    config = SimpleNamespace(
        training=SimpleNamespace(sde="vesde"),
        model=SimpleNamespace(sigma_min=0.01, sigma_max=90.0),
        data=SimpleNamespace(centered=True),
    )
    flow = adapters.load(NCSNpp(config))
    assert flow.path == VE(0.01, 90.0)
    assert flow.data_range == (-1.0, 1.0)


def test_a_pth_file_fills_the_network_with_averages(tmp_path: Path) -> None:
    net, averaged = NCSNpp(), NCSNpp()
    with torch.no_grad():
        for p in averaged.parameters():
            p.mul_(0.5)
    state = {
        "optimizer": {"state": {}, "param_groups": []},
        "model": {f"module.{k}": v for k, v in net.state_dict().items()},
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": list(averaged.parameters())},
        "step": 7,
    }
    file = tmp_path / "checkpoint_8.pth"
    torch.save(state, file)
    finding = adapters.inspect(file)
    assert finding.format == "score_sde"
    assert "keys optimizer, model, ema, step" in finding.evidence
    with pytest.raises(adapters.Unrecognised, match=r"sde='vp', 'subvp' or 've' .*net= "):
        adapters.load(file)
    flow = adapters.load(file, sde="vp", net=NCSNpp())
    with torch.no_grad():
        torch.testing.assert_close(flow.net(X, torch.ones(2)), averaged(X, torch.ones(2)))
    with pytest.raises(ValueError, match=r"checkpoint_8.pth do not belong to this Linear"):
        adapters.load(file, sde="vp", net=torch.nn.Linear(2, 2))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="sde = 'edm'; expected 'vp', 'subvp' or 've'"):
        adapters.load(NCSNpp(), sde="edm")
    with pytest.raises(adapters.Unrecognised, match=r"whole steps.*declare path=fs.paths.Discrete"):
        adapters.load(NCSNpp(), sde="vp", continuous=False)
    with pytest.raises(TypeError, match="sde is a dict"):
        adapters.load(NCSNpp(), sde={})
