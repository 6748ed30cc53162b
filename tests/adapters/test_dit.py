"""DiT and SiT: one architecture, two conventions, against the formulas of their papers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch

from flowsolve import adapters
from flowsolve.paths import VP, CondOT, Discrete, Trig
from tests.adapters.tiny import DiT, SiT

X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([3, 7])


def test_dit(tmp_path: Path) -> None:
    """The linear table of 1000 steps, the index as time, ε in the first half."""
    net = DiT()
    torch.save(net.state_dict(), tmp_path / "DiT-XL-2-256x256.pt")
    flow = adapters.load(tmp_path / "DiT-XL-2-256x256.pt", format="dit", net=DiT())
    assert flow.path == Discrete.linear()
    for k in (0.0, 999.0):
        t = flow.path.time_from_native(k)
        with torch.no_grad():
            output = net(X, torch.full((2,), k), Y)
            torch.testing.assert_close(flow.estimate(X, t, y=Y).output, output[:, :4], rtol=0, atol=1e-6)


def test_the_weights_alone_are_ambiguous(tmp_path: Path) -> None:
    torch.save(DiT().state_dict(), tmp_path / "w.pt")
    for source in (tmp_path / "w.pt", DiT(), SiT()):
        with pytest.raises(adapters.Unrecognised, match="format='dit' or 'sit'"):
            adapters.load(source)
    assert adapters.inspect(tmp_path / "w.pt").latent_scale == 0.18215


@pytest.mark.parametrize("kind", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_sit(kind: str, prediction: str) -> None:
    """α, σ of each interpolant at SiT's t, and the velocity and score from each output by the paper's formulas."""
    net = SiT()
    flow = adapters.load(net, format="sit", path_type=kind, prediction=prediction)
    assert flow.path == {"Linear": CondOT(), "GVP": Trig(), "VP": VP()}[kind]
    for t in (0.2, 0.5, 0.9):
        if kind == "Linear":
            a, s, da, ds = t, 1 - t, 1.0, -1.0
        elif kind == "GVP":
            h = math.pi / 2
            a, s, da, ds = math.sin(h * t), math.cos(h * t), h * math.cos(h * t), -h * math.sin(h * t)
        else:
            log = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
            rate = 0.5 * (1 - t) * 19.9 + 0.05
            a, s = math.exp(log), math.sqrt(1 - math.exp(2 * log))
            da, ds = a * rate, -a * a * rate / s
        ours = t if kind != "VP" else flow.path.time_from_native(1.0 - t)
        with torch.no_grad():
            output = net(X, torch.full((2,), t), Y)
            estimate = flow.estimate(X, ours, y=Y)
        assert float(estimate.point.alpha) == pytest.approx(a, rel=1e-9)
        assert float(estimate.point.sigma) == pytest.approx(s, rel=1e-9)
        torch.testing.assert_close(estimate.output, output, rtol=1e-5, atol=1e-6)
        if prediction == "velocity":  # score = σ⁻¹ (α u − α̇ x)/(α̇ σ − α σ̇)
            score = (a / da * output - X) / (s**2 - a / da * ds * s)
        else:
            score = output if prediction == "score" else -output / s
        torch.testing.assert_close(estimate.score, score, rtol=1e-4, atol=1e-5)


def test_training_arguments_tell_them_apart(tmp_path: Path) -> None:
    """args beside the weights is read as plain data, and says SiT; a declared option overrules it."""
    net = SiT()
    args = argparse.Namespace(path_type="GVP", prediction="velocity", loss_weight=None)
    file = tmp_path / "0400000.pt"
    torch.save({"model": net.state_dict(), "ema": net.state_dict(), "opt": {}, "args": args}, file)
    finding = adapters.inspect(file)
    assert (finding.format, finding.path, finding.prediction.name) == ("sit", Trig(), "velocity")  # type: ignore[union-attr]
    assert adapters.load(file, net=SiT()).path == Trig()
    assert adapters.load(file, net=SiT(), path=CondOT()).path == CondOT()


def test_refusals() -> None:
    with pytest.raises(adapters.Unrecognised, match=r"path_type='Linear', 'GVP' or 'VP'.*prediction='velocity'"):
        adapters.load(SiT(), format="sit")
    with pytest.raises(ValueError, match="path_type = 'VE'; expected one of Linear, GVP, VP"):
        adapters.load(SiT(), format="sit", path_type="VE")
