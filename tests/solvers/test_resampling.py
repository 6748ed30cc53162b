r"""Restart and RePaint: their noise by its address, their budgets, and the laws of their results.

**Restart on a Gaussian.** For data of variance s² let v = α²s² + σ². The ODE keeps the ratio e of a state's variance to
v. A return from the time of variance v_l to that of v_h multiplies the state by a ratio r and adds what is missing of
v_h, so that e − 1 becomes (r² v_l / v_h) (e − 1): what was wrong is contracted by a known factor each time.

Errors of a mean and a variance over n samples: √(v/n), and v √(2/n) for a Gaussian; 4 of them are allowed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flowsolve as fs
from flowsolve.brownian import Brownian
from flowsolve.noise import STEP, Noise
from flowsolve.paths import VP, CondOT, Path
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import DDIM, DDPM, RK4, Heun, RePaint, Restart

N = 10_000
F64 = torch.float64


def draw(n: int = N, dims: int = 1) -> torch.Tensor:
    return Noise.of(11, n).normal(STEP, 5, torch.empty(n, dims, dtype=F64))


def test_each_occurrence_has_its_own_noise() -> None:
    like, noise = torch.empty(4, 2048, dtype=F64), Noise.of(3, 4)
    drawn = [noise.again(k).step(0.25, 0.5, like) for k in range(6)] + [noise.step(0.5, 0.75, like)]
    assert torch.equal(drawn[0], noise.step(0.25, 0.5, like))
    table = torch.corrcoef(torch.stack([v.flatten() for v in drawn]))
    assert float((table - torch.eye(7)).abs().max()) < 5.0 / math.sqrt(like.numel())
    assert float(torch.stack(drawn).var()) == pytest.approx(1.0, abs=5.0 * math.sqrt(2.0 / (7 * like.numel())))


@pytest.mark.parametrize("kind", [Noise, Brownian])
def test_an_occurrence_belongs_to_a_sample(kind: type[Noise]) -> None:
    like = torch.empty(4, 3, dtype=F64)
    whole = kind.of(3, 4).again(2).step(0.25, 0.5, like)
    alone = kind.of(3, [2]).again(2).step(0.25, 0.5, like[:1])
    seeded = kind.of([3], [2]).again(2).step(0.25, 0.5, like[:1])
    picked = kind.of(3, 4).again(2).select(torch.tensor([2])).step(0.25, 0.5, like[:1])
    for same in (whole[2:3], seeded, picked):
        assert torch.equal(same, alone)
    assert not torch.equal(kind.of(4, [2]).again(2).step(0.25, 0.5, like[:1]), alone)


@pytest.mark.parametrize("path", [CondOT(), VP()], ids=["CondOT", "VP"])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("noise", ["fresh", "brownian"])
def test_restart_contracts_what_is_wrong(path: Path, repeats: int, noise: str) -> None:
    std, low, high, wrong = 0.7, 0.3, 1.2, 2.25
    low_t, high_t = path.time(-math.log(low)), path.time(-math.log(high))
    first, last = (0.0 if path.at(0.0).alpha == 0.0 else 1e-3), path.window[1]
    times = [first, *(path.time(-3.0 + 0.2 * i) for i in range(1, 20)), low_t, path.time(3.0), path.time(5.0)]
    times = sorted({t for t in times if first <= t <= last})
    flow = GaussianMixture([[0.0]], std, dtype=F64).flow(path)

    def variance(t: float) -> float:
        return float(path.alpha(t)) ** 2 * std**2 + float(path.sigma(t)) ** 2

    start = math.sqrt(wrong * variance(times[0])) * draw()
    solver = Restart(RK4(), ((low, high, 8, repeats),))
    found = fs.sample(flow, start=start, interval=(times[0], times[-1]), solver=solver, grid=times, noise=noise)
    assert found.nfe[0] == 4 * (len(times) - 1) + 4 * 8 * repeats
    ratio = float(path.alpha(high_t)) / float(path.alpha(low_t))
    expected = 1.0 + (ratio**2 * variance(low_t) / variance(high_t)) ** repeats * (wrong - 1.0)
    assert expected < 0.7 * wrong
    ratio_found = float(found.x.var()) / variance(times[-1])
    assert ratio_found == pytest.approx(expected, rel=4.0 * math.sqrt(2.0 / N))
    assert abs(float(found.x.mean())) < 4.0 * math.sqrt(expected * variance(times[-1]) / N)


def test_restart_keeps_a_mixture() -> None:
    target = GaussianMixture([[-1.0], [1.0]], 0.3, [0.3, 0.7], dtype=F64)
    solver = Restart(RK4(), ((0.2, 1.0, 6, 3), (0.5, 2.0, 6, 2)))
    x = fs.sample(target.flow(CondOT()), start=draw(), solver=solver, nfe=400, grid="uniform").x[:, 0]
    mean, variance = 0.4, 0.3**2 + 1.0 - 0.4**2
    assert float(x.mean()) == pytest.approx(mean, abs=4.0 * math.sqrt(variance / N))
    assert float((x > 0.0).double().mean()) == pytest.approx(0.7, abs=4.0 * math.sqrt(0.21 / N) + 1e-3)  # Φ(−1/0.3)
    fourth = float(((x - mean) ** 4).mean())
    assert float(x.var()) == pytest.approx(variance, abs=4.0 * math.sqrt((fourth - variance**2) / N))


def test_a_restart_is_the_same_in_any_batch_and_from_a_snapshot() -> None:
    flow = GaussianMixture([[-1.0], [1.0]], 0.3, dtype=F64).flow(CondOT())
    options: dict[str, Any] = {"solver": Restart(Heun(), ((0.3, 1.0, 3, 2),)), "nfe": 40}
    whole, shots = fs.sample(flow, (6, 1), **options, dtype=F64), []
    alone = fs.sample(flow, (1, 1), samples=[4], **options, dtype=F64)
    torch.testing.assert_close(alone.x, whole.x[4:5])
    fs.sample(flow, (6, 1), **options, callback=shots.append, dtype=F64)
    for shot in shots[:-1]:
        assert torch.equal(fs.sample(flow, resume=shot, **options).x, whole.x)
    assert whole.nfe.tolist() == [40] * 6


def test_repaint_of_independent_parts_leaves_the_unknown_alone() -> None:
    flow = GaussianMixture([[0.0, 0.5]], torch.tensor([[0.8, 0.4]], dtype=F64), dtype=F64).flow(CondOT())
    solver = RePaint(DDPM(), torch.tensor([0.3, math.nan], dtype=F64), torch.tensor([True, False]), 3)
    x = fs.sample(flow, start=draw(dims=2), solver=solver, nfe=600, grid="log_snr").x
    assert torch.equal(x[:, 0], torch.full((N,), 0.3, dtype=F64))
    assert float(x[:, 1].mean()) == pytest.approx(0.5, abs=4.0 * 0.4 / math.sqrt(N))
    step = 0.02  # relative bias of DDPM's variance with 200 steps, first order in the steps
    assert float(x[:, 1].var()) == pytest.approx(0.16, rel=4.0 * math.sqrt(2.0 / N) + step)


def test_repaint_tends_to_the_conditional_law() -> None:
    n, std, known = 5000, 0.8, 1.0
    flow = GaussianMixture([[-1.0, -1.0], [1.0, 1.0]], std, dtype=F64).flow(CondOT())
    right = 1.0 / (1.0 + math.exp(-2.0 * known / std**2))  # the weight of the right mode, given the known number
    mean = 2.0 * right - 1.0
    error = math.sqrt((std**2 + 1.0 - mean**2) / n)
    told, mask = torch.tensor([known, 0.0], dtype=F64), torch.tensor([True, False])
    off = []
    for repeats in (1, 20):
        solver = RePaint(DDPM(), told, mask, repeats)
        x = fs.sample(flow, start=draw(n, 2), solver=solver, nfe=20 * repeats, grid="log_snr").x[:, 1]
        off.append(abs(float(x.mean()) - mean))
    assert off[1] < 4.0 * error < off[0]


@pytest.mark.parametrize("inner", [DDIM(), Heun(), DDPM()])
def test_repaint_spends_its_budget(inner: Any) -> None:
    flow = GaussianMixture([[0.0, 0.5]], 0.5).flow(CondOT())
    solver = RePaint(inner, torch.zeros(2), torch.tensor([True, False]), 4)
    for nfe in (17, 24, 31):
        assert fs.sample(flow, (3, 2), solver=solver, nfe=nfe).nfe.tolist() == [nfe] * 3


def test_what_is_refused() -> None:
    flow = GaussianMixture([[0.0, 0.5]], 0.5).flow(CondOT())
    for intervals in [((0.3, 0.1, 3, 1),), ((0.0, 0.1, 3, 1),), ((0.1, 0.3, 0, 1),), ((0.1, 0.3, 3, 1.5),)]:
        with pytest.raises(ValueError, match=r"expected \(low, high, steps, repeats\)"):
            Restart(Heun(), intervals)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="12 of them for returns; expected at least 13"):
        fs.sample(flow, (3, 2), solver=Restart(Heun(), ((0.1, 0.3, 3, 2),)), nfe=12)
    with pytest.raises(ValueError, match="no node in flow time after"):
        fs.sample(flow, (3, 2), solver=Restart(Heun(), ((0.1, 0.11, 3, 1),)), nfe=10, grid="uniform")
    with pytest.raises(TypeError, match="multistep"):
        Restart(fs.solvers.UniPC())
    with pytest.raises(TypeError, match="draws noise itself"):
        Restart(DDPM())
    with pytest.raises(ValueError, match="way back"):
        fs.encode(flow, torch.zeros(3, 2), solver=Restart(), nfe=40)
    with pytest.raises(TypeError, match="dtype bool"):
        RePaint(DDPM(), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="repeats = 0"):
        RePaint(DDPM(), torch.zeros(2), torch.zeros(2, dtype=torch.bool), 0)
    solver = RePaint(DDPM(), torch.zeros(5, 2), torch.ones(5, 2, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match=r"known has shape \(5, 2\).*expected the state's, \(3, 2\)"):
        fs.sample(flow, (3, 2), solver=solver, nfe=8)
    with pytest.raises(TypeError, match="goes back to earlier times"):
        solver.counts(4)
