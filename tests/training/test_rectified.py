"""Rectified flow: straightness and the loss floor in closed form, pairs on disk, and what reflow does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.paths import EDM, VP, CondOT, Trig
from flowsolve.paths import Path as Curve
from flowsolve.predictions import SingularEstimate
from flowsolve.problems import GaussianMixture, toys
from flowsolve.training import Pairs, distil, pairs, rectified, reflow, train

F64 = torch.float64
MEAN, STD = 1.4, 0.3
NORMAL = GaussianMixture(torch.tensor([[MEAN]], dtype=F64), STD)


def quadrature(f: Any, n: int = 400) -> float:
    x, w = np.polynomial.legendre.leggauss(n)
    return float(0.5 * (w * f(0.5 * (1.0 + x))).sum())


@pytest.mark.parametrize(
    ("path", "prediction"),
    [(CondOT(), "velocity"), (Trig(), "v"), (VP(), "velocity"), (VP(), "noise"), (EDM(), "data")],
    ids=str,
)
def test_straightness_of_normal_data_is_known(path: Curve, prediction: str) -> None:
    """Trajectories are Z_s = s m + r(s) X₀, r² = s²σ_d² + (1 − s)², on every path: S = ∫ (r(1) − r(0) − r')² ds."""
    # a path that ends before σ = 0 or begins after α = 0 covers a part of the clock only
    s0, s1 = (float(rectified.CHART.clock(path, t)) for t in (0.0, 1.0))

    def r(s: Any) -> Any:
        return np.sqrt((s * STD) ** 2 + (1.0 - s) ** 2)

    def slope(s: Any) -> Any:
        return (s * STD**2 - (1.0 - s)) / r(s)

    # X₀ is normal of the deviation with which the solve starts: unit noise times the prior, in the chart
    p0 = path.at(0.0)
    first = path.prior_std / (p0.alpha + p0.sigma)
    drift = p0.alpha / (p0.alpha + p0.sigma) * MEAN  # α(0) > 0: where noise alone starts, off the marginal's mean
    moment = (first / r(s0)) ** 2 + (drift / r(s0)) ** 2
    line = (r(s1) - r(s0)) / (s1 - s0)
    expected = moment * quadrature(lambda u: (line - slope(s0 + (s1 - s0) * u)) ** 2)
    n = 4000
    flow = NORMAL.flow(path, prediction)
    found = rectified.straightness(flow, (n, 1), dtype=F64, batch=n)
    assert abs(found.mean - expected) < 5.0 * found.stderr + 1e-4 * expected
    assert found.stderr == pytest.approx(expected * math.sqrt(2.0 / n), rel=0.3)
    assert found.each.shape == (n,)


def test_straight_is_zero() -> None:
    point = fs.Flow(lambda x, t: torch.ones_like(x) * 2.0, CondOT())
    found = rectified.straightness(point, (10, 3))
    assert found.mean < 1e-10
    assert found.relative < 1e-10


@pytest.mark.parametrize("path", [CondOT(), Trig()], ids=repr)
def test_the_loss_floor_of_independent_pairs_is_known(path: Curve) -> None:
    """V = ∫ Var(z − ε | x_s) ds, in closed form for normal data; the exact flow's loss is that, others' is above."""

    def rest(s: Any) -> Any:
        cross = s * STD**2 - (1.0 - s)
        return STD**2 + 1.0 - cross**2 / ((s * STD) ** 2 + (1.0 - s) ** 2)

    n = 20_000
    data, source = NORMAL.sample(n, seed=1), torch.randn(n, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    found = rectified.loss_floor(NORMAL.flow(path), source, data)
    assert abs(found.mean - quadrature(rest)) < 5.0 * found.stderr
    worse = rectified.loss_floor(GaussianMixture(torch.tensor([[1.0]], dtype=F64), 0.5).flow(path), source, data)
    assert worse.mean > found.mean + 5.0 * found.stderr
    # the lines of its own pairs do not cross: nothing is left by its next rectification, x ↦ m + σ_d x₀
    ends = MEAN + STD * source
    straight = fs.Flow(
        lambda x, t: MEAN + (STD - 1.0) * (x - t[:, None] * MEAN) / (1.0 + t[:, None] * (STD - 1.0)), CondOT()
    )
    assert rectified.loss_floor(straight, source, ends).mean < 1e-20


@pytest.mark.parametrize("solver", ["auto", "heun", fs.solvers.Dopri5(rtol=1e-5, atol=1e-5)])
@pytest.mark.parametrize("path", [CondOT(), EDM()], ids=repr)
def test_pairs_are_the_ends_of_the_solver_s_trajectories(path: Curve, solver: Any) -> None:
    flow = NORMAL.flow(path)
    nfe = None if not isinstance(solver, str) else 12
    made = pairs(flow, (10, 1), solver=solver, nfe=nfe, seed=4, shard=4)
    assert len(made) == 10
    whole = fs.sample(flow, start=made.source * path.prior_std, solver=solver, nfe=nfe)
    torch.testing.assert_close(whole.x, made.data, rtol=1e-5, atol=1e-6)
    assert made.nfe.sum() == whole.nfe.sum()
    assert abs(float(pairs(flow, (4000, 1), nfe=4, shard=4000).source.std()) - 1.0) < 5.0 / math.sqrt(8000)


def test_pairs_on_disk_are_shared_resumed_and_not_mixed(tmp_path: Path) -> None:
    calls = []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        calls.append(len(x))
        return label[:, None] - x

    flow = fs.Flow(net, CondOT())
    labels = torch.arange(11)
    options: dict[str, Any] = {"nfe": 3, "solver": "heun", "shard": 3, "cond": {"label": labels}}
    whole = pairs(flow, (11, 2), **options)
    for rank in (1, 0):
        pairs(flow, (11, 2), out=tmp_path, rank=rank, world=2, **options)
        if rank == 1:
            with pytest.raises(FileNotFoundError, match="lacks 2 of 4 shards, such as pairs-000000"):
                Pairs.load(tmp_path)
    loaded = Pairs.load(tmp_path)
    for name in ("source", "data", "nfe"):
        assert torch.equal(getattr(loaded, name), getattr(whole, name))
    assert torch.equal(loaded.cond["label"], labels)
    (tmp_path / "pairs-000002.safetensors").unlink()
    calls.clear()
    again = pairs(flow, (11, 2), out=tmp_path, **options)
    assert torch.equal(again.data, whole.data)
    assert set(calls) == {3}
    assert len(calls) < 20  # one shard
    for changed in ({"seed": 1}, {"nfe": 4}, {"cond": {"label": labels + 1}}):
        with pytest.raises(ValueError, match="holds other pairs"):
            pairs(flow, (11, 2), out=tmp_path, **{**options, **changed})
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        Pairs.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="need out="):
        pairs(flow, (4, 2), world=2)
    with pytest.raises(ValueError, match="a row for each of 4"):
        pairs(flow, (4, 2), cond={"label": labels})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat((x, t[:, None]), 1))  # type: ignore[no-any-return]


def test_reflow_straightens_and_one_step_gets_better() -> None:
    """Straightness falls in each round (beyond five standard errors), the one-step error too; distillation helps."""
    torch.manual_seed(0)
    data = toys.eight_gaussians(radius=2.0, std=0.1).sample(4000)
    quick: dict[str, Any] = {"batch": 256, "lr": 4e-3, "warmup": 20, "ema_decay": 0.99}
    flow = train(fs.Flow(Net(), CondOT()), data, steps=700, **quick).flow
    measured, errors = [], []

    def error(flow: fs.Flow, made: Pairs, k: int) -> float:
        found = fs.sample(flow, start=made.source, solver="euler", nfe=k).x
        return float((found - made.data).square().mean().sqrt())

    first = pairs(flow, (4096, 2), solver="heun", nfe=24, shard=4096)
    made = first
    for round_ in range(2):
        measured.append(rectified.straightness(flow, (256, 2), solver=fs.solvers.Dopri5(rtol=1e-3, atol=1e-3)))
        errors.append(error(flow, made, 1))
        if round_ == 0:
            flow = reflow(flow, made, steps=700, **quick).flow
            made = pairs(flow, (4096, 2), solver="heun", nfe=24, shard=4096)
    assert measured[1].mean + 5.0 * measured[1].stderr < 0.5 * measured[0].mean - 5.0 * measured[0].stderr
    assert errors[1] < 0.6 * errors[0]
    student = distil(flow, made, 1, steps=300, **quick).flow
    assert error(student, made, 1) < errors[1]
    # the coupling of its own pairs leaves less to be learned than independent pairs do
    independent = rectified.loss_floor(flow, torch.randn_like(data), data)
    assert rectified.loss_floor(flow, made.source, made.data).mean < 0.3 * independent.mean


def test_steps_are_those_of_euler_and_need_an_estimate_at_noise() -> None:
    for path in (CondOT(), Trig(), VP()):
        t = rectified.Steps(4).draw(4000, path, torch.Generator().manual_seed(0))
        s = torch.as_tensor(rectified.CHART.clock(path, t))
        first = float(rectified.CHART.clock(path, 0.0))
        expected = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=F64).clamp_min(first)
        torch.testing.assert_close(s.unique(), expected, rtol=0, atol=1e-9)
        assert bool(((s - expected[0]).abs() < 1e-9).double().mean() > 0.2)
    made = Pairs(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(SingularEstimate, match="distillation"):
        distil(fs.Flow(Net(), CondOT(), "noise"), made, 2, steps=1)
    with pytest.raises(ValueError, match="k = 0"):
        rectified.Steps(0)
    with pytest.raises(ValueError, match="probabilities"):
        rectified.Steps(2).pdf(torch.tensor(0.5), CondOT())
