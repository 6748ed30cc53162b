"""Time densities: pdf and quantile agree, integrate to 1, and are the laws that their sources state."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP, Trig
from flowsolve.training import times, weights

F64 = torch.float64
PATHS: list[Path] = [CondOT(), CondOT(0.01), VP(), SubVP(), Cosine(), Trig(), VE(), EDM(), Discrete.linear()]
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned() -> times.Learned:
    density = times.Learned(bins=16)
    t = times.uniform(4000, rng(1))
    density.update(t, 1.0 + 5.0 * t.square(), CondOT())
    return density


DENSITIES: dict[str, times.Density] = {
    "uniform": times.uniform,
    "stratified": times.stratified,
    "logit_normal": times.logit_normal(0.4, 0.8),
    "mode": times.mode(1.29),
    "mode, heavy ends": times.mode(-0.9),
    "cosmap": times.cosmap,
    "log_normal": times.log_normal(-0.4, 1.0),
    "even log_normal": times.even(times.log_normal()),
    "log_snr_uniform": times.log_snr_uniform(-4.0, 4.0),
    "learned": learned(),
}


@path_cases
@pytest.mark.parametrize("name", DENSITIES)
def test_the_pdf_is_the_slope_of_the_quantiles_and_integrates_to_one(path: Path, name: str) -> None:
    """∫ p dt over each part [Q(u_i), Q(u_i+1)] is u_i+1 − u_i, hence 1 in all: Gauss–Legendre on every part."""
    density = DENSITIES[name]
    parts = 16 * 24  # whole bins of the learned density, whole entries are not: see the tolerance
    u = torch.linspace(1e-3, 1.0 - 1e-3, parts + 1, dtype=F64)
    edges = density.quantile(u, path)
    assert bool((edges.diff() > 0).all())
    x, w = (torch.as_tensor(v, dtype=F64) for v in np.polynomial.legendre.leggauss(8))
    middle, half = 0.5 * (edges[1:] + edges[:-1]), 0.5 * edges.diff()
    t = middle[:, None] + half[:, None] * x
    mass = half * (density.pdf(t.flatten(), path).reshape(t.shape) * w).sum(1)
    # λ' of a table jumps at its entries, and the learned density at the edges of its bins: parts that hold one are off
    smooth = not isinstance(path, Discrete) and name != "learned"
    if smooth:
        torch.testing.assert_close(mass, u.diff(), rtol=1e-6, atol=0)
    assert float(mass.sum()) + 2e-3 == pytest.approx(1.0, abs=1e-7 if smooth else 2e-3)
    first, last = path.window
    drawn = density.draw(500, path, rng())
    assert drawn.dtype == F64
    assert first < float(drawn.min()) < float(drawn.max()) < last


def test_the_laws_of_sd3_as_they_write_them() -> None:
    """Esser et al. 2024, §3.1, with their time t = 1 − (time of here)."""
    u = torch.linspace(0.01, 0.99, 99, dtype=F64)
    path = CondOT()
    for s in (-1.0, -0.5, 0.81, 1.29, 1.75):
        theirs = 1.0 - u - s * (torch.cos(0.5 * math.pi * u).square() - 1.0 + u)
        torch.testing.assert_close(1.0 - times.mode(s).quantile(u, path), theirs, rtol=0, atol=1e-12)
    t = 1.0 - u
    m, s = 0.7, 1.3
    theirs = torch.exp(-(torch.logit(t) - m).square() / (2.0 * s * s)) / (s * math.sqrt(2.0 * math.pi) * t * (1.0 - t))
    torch.testing.assert_close(times.logit_normal(-m, s).pdf(u, path), theirs, rtol=1e-9, atol=0)
    theirs = 2.0 / (math.pi - 2.0 * math.pi * t + 2.0 * math.pi * t * t)
    torch.testing.assert_close(times.cosmap.pdf(u, path), theirs, rtol=1e-12, atol=0)
    # cosmap: the log-SNR on the straight path is that of cos and sin at u
    lam = path.log_snr(times.cosmap.quantile(u, path))
    torch.testing.assert_close(lam, torch.tan(0.5 * math.pi * u).log(), rtol=0, atol=1e-9)


def test_edm_s_levels_are_log_normal() -> None:
    path = EDM()
    level = path.sigma(times.log_normal(-1.2, 1.2).draw(50_000, path, rng(2))).log()
    assert abs(float(level.mean()) + 1.2) < 5.0 * 1.2 / math.sqrt(len(level))
    assert abs(float(level.std()) - 1.2) < 5.0 * 1.2 / math.sqrt(2 * len(level)) + 1e-3  # cut at 4.2 σ
    with pytest.raises(ValueError, match="lies outside"):
        times.log_normal(40.0, 1.0).draw(3, path)


def test_log_snr_uniform_is_the_importance_density_of_the_likelihood() -> None:
    path = VP()
    t = torch.linspace(0.05, 0.95, 19, dtype=F64)
    point = path.at(t)
    ratio = times.log_snr_uniform().pdf(t, path) / (weights.likelihood(point) / point.sigma.square())
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"log_snr_uniform\(low=-7.0"):
        times.log_snr_uniform().draw(3, CondOT())
    assert float(CondOT().log_snr(times.log_snr_uniform(-2.0, 3.0).draw(99, CondOT(), rng())).max()) < 3.0


def test_entries_are_those_of_the_table() -> None:
    path = Discrete.linear(20)
    t = times.entries.draw(4000, path, rng())
    index = path.native_time(t)
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    count = torch.bincount(index.round().long(), minlength=20)
    assert count.shape == (20,)
    assert float((count - 200).abs().max()) < 5.0 * math.sqrt(200 * 0.95)
    even = path.native_time(times.even(times.entries).draw(40, path, rng())).round().long()
    assert torch.bincount(even, minlength=20).tolist() == [2] * 20
    with pytest.raises(ValueError, match="Discrete"):
        times.entries.draw(3, CondOT())
    with pytest.raises(ValueError, match="probabilities"):
        times.entries.pdf(t, path)


@path_cases
def test_even_draws_have_one_time_in_each_part_of_equal_probability(path: Path) -> None:
    density = times.log_normal()
    n = 64
    edges = density.quantile(torch.linspace(1e-9, 1.0 - 1e-9, n + 1, dtype=F64), path)
    t = times.even(density).draw(n, path, rng(4)).sort().values
    # a common shift: between t_i and t_i+1 lies exactly one edge
    inside = torch.searchsorted(edges[1:-1].contiguous(), t)
    assert inside.diff().max() <= 1
    assert inside.unique().numel() >= n - 1


def test_learned_times_lower_the_variance_and_keep_the_mean() -> None:
    path, density = CondOT(), times.Learned(bins=32)

    def loss(t: Tensor) -> Tensor:
        return 1.0 / (t + 0.02)

    truth = math.log(1.02 / 0.02)
    for step in range(40):
        t = density.draw(256, path, rng(step))
        density.update(t, loss(t), path)
    t = density.draw(40_000, path, rng(99))
    found = loss(t) / density.pdf(t, path)
    assert abs(float(found.mean()) - truth) < 5.0 * float(found.std()) / math.sqrt(len(t))
    assert float(found.std()) < 0.3 * float(loss(times.uniform(40_000, rng(98))).std())
    other = times.Learned(bins=32)
    other.load_state_dict(density.state_dict())
    assert torch.equal(other.draw(8, path, rng(1)), density.draw(8, path, rng(1)))
    assert float(density.pdf(torch.tensor([0.999], dtype=F64), path)) >= 0.1
    with pytest.raises(ValueError, match="floor"):
        times.Learned(floor=0.0)


def test_own_densities() -> None:
    own = times.Drawn(lambda n, g: torch.rand(n, generator=g).sqrt(), lambda u: 2.0 * u)
    t = own.draw(2000, Discrete.linear(), rng())
    assert abs(float(t.mean()) / Discrete.linear().window[1] - 2.0 / 3.0) < 5.0 * 0.24 / math.sqrt(2000)
    assert float(own.pdf(torch.tensor([0.5], dtype=F64), CondOT())) == 1.0
    for call in (own.quantile, times.Drawn(own.function).pdf):
        with pytest.raises(ValueError, match="function that draws"):
            call(t, CondOT())


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_pickled_and_compared(name: str) -> None:
    density = DENSITIES[name]
    again = pickle.loads(pickle.dumps(density))  # noqa: S301
    assert torch.equal(again.draw(9, VP(), rng(1)), density.draw(9, VP(), rng(1)))
    assert name == "learned" or again == density


def test_bounds_of_the_arguments() -> None:
    for bad in (-1.1, 1.76, math.nan):
        with pytest.raises(ValueError, match="scale"):
            times.mode(bad)
    with pytest.raises(ValueError, match="std"):
        times.log_normal(0.0, -1.0)
