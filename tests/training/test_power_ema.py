"""Power-function averages against their closed form, and averages of other widths made after the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flowsolve.training import PowerEMA, posthoc
from flowsolve.training.power_ema import combination, exponent, width


def profile(std: float, n: int, length: int) -> Tensor:
    """The discrete weights of the average of width std after n updates, shape (length,)."""
    k = torch.arange(1, length + 1, dtype=torch.float64)
    g = exponent(std) + 1.0
    return ((k / n) ** g - ((k - 1) / n) ** g) * (k <= n)


@given(std=st.floats(0.02, 0.28), n=st.integers(1, 40))
def test_closed_form(std: float, n: int) -> None:
    module = nn.Linear(1, 1, bias=False).double()
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    ema = PowerEMA(module, std)
    for value in values:
        module.weight.data.fill_(value)
        ema.update()
    expected = (profile(std, n, n) * values).sum()
    torch.testing.assert_close(ema.module.weight.squeeze(), expected, rtol=1e-11, atol=1e-11)


@given(std=st.floats(0.001, 0.288))
def test_widths_and_exponents_are_inverse(std: float) -> None:
    assert width(exponent(std)) == pytest.approx(std, rel=1e-9)


def test_the_values_of_the_paper() -> None:
    """Karras et al. 2024, §3.1: σ_rel = 0.05 and 0.10 are γ = 16.97 and 6.94; and σ_rel is the standard deviation."""
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    n = 20_000
    weights = profile(0.1, n, n)
    k = torch.arange(1, n + 1, dtype=torch.float64) / n
    mean = (weights * k).sum()
    assert float((weights * (k - mean).square()).sum().sqrt()) == pytest.approx(0.1, rel=1e-3)
    for bad in (0.0, 0.3, -1.0):
        with pytest.raises(ValueError, match="relative width"):
            exponent(bad)


@pytest.mark.parametrize("std", [0.03, 0.07, 0.1, 0.15, 0.2])
def test_other_widths_from_snapshots(tmp_path: Path, std: float) -> None:
    """Snapshots of two widths give the average that was not kept, up to what their profiles cannot span."""
    n, every = 2000, 50
    module = nn.Sequential(nn.Linear(8, 1, bias=False), nn.BatchNorm1d(1, affine=False)).double()
    kept = [PowerEMA(module, s) for s in (0.05, 0.1)]
    direct = PowerEMA(module, std)
    generator = torch.Generator().manual_seed(0)
    path = []
    for step in range(1, n + 1):
        module[0].weight.data += torch.randn(1, 8, generator=generator, dtype=torch.float64) / n**0.5
        path.append(module[0].weight.detach().clone())
        for ema in (*kept, direct):
            ema.update()
        if step % every == 0:
            for ema in kept:
                ema.save(tmp_path)
    found = posthoc(tmp_path, std)
    snapshots = [(e.std, k) for k in range(every, n + 1, every) for e in kept]
    x = combination(snapshots, std, n)
    made = sum(float(c) * profile(s, k, n) for c, (s, k) in zip(x, snapshots, strict=True))
    lost = float((made - profile(std, n, n)).abs().sum())
    assert lost < 0.02
    largest = float(torch.stack(path).abs().max())
    error = float((found["0.weight"] - direct.module[0].weight).abs().max())
    assert error <= lost * largest + 1e-9
    assert found["1.num_batches_tracked"].dtype == torch.int64
    module.load_state_dict(found)


def test_a_kept_width_is_itself_and_earlier_times_can_be_had(tmp_path: Path) -> None:
    x = combination([(0.05, 100), (0.1, 100), (0.05, 200), (0.1, 200)], 0.1, 200)
    np.testing.assert_allclose(x, [0.0, 0.0, 0.0, 1.0], atol=1e-6)
    module = nn.Linear(2, 1)
    ema = PowerEMA(module, 0.1)
    for _ in range(3):
        module.weight.data += 1.0
        ema.update()
        ema.save(tmp_path)
    middle = PowerEMA(module, 0.1)
    middle.load_state_dict(torch.load(tmp_path / "ema-0.1000-000000002.pt", weights_only=True))
    torch.testing.assert_close(posthoc(tmp_path, 0.1, updates=2)["weight"], middle.module.weight, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="first snapshot"):
        posthoc(tmp_path, 0.1, updates=0)
    with pytest.raises(FileNotFoundError, match="no snapshots"):
        posthoc(tmp_path / "nowhere", 0.1)
    with pytest.raises(ValueError, match=r"of width 0\.1"):
        PowerEMA(module, 0.05).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="at most the 150"):
        combination([(0.1, 200)], 0.1, 150)
