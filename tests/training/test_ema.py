"""Averaged weights against the closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowsolve.training import EMA


@given(decay=st.floats(0.0, 0.999), n=st.integers(1, 30))
def test_closed_form(decay: float, n: int) -> None:
    module = nn.Linear(1, 1, bias=False).double()
    values = torch.randn(n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    module.weight.data.fill_(values[0])
    ema = EMA(module, decay, warmup=False)
    for value in values[1:]:
        module.weight.data.fill_(value)
        ema.update()
    powers = decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    expected = decay**n * values[0] + (1.0 - decay) * (powers * values[1:]).sum()
    torch.testing.assert_close(ema.module.weight.squeeze(), expected, rtol=1e-12, atol=1e-12)


def test_warmup_forgets_the_first_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    ema = EMA(module, 0.999)
    module.weight.data.fill_(1.0)
    left = 1.0
    for n in range(1, 200):
        ema.update()
        left *= min(0.999, (1 + n) / (10 + n))
        torch.testing.assert_close(float(ema.module.weight), 1.0 - left, rtol=1e-4, atol=1e-5)
    assert left < 1e-6


def test_low_precision_weights_are_averaged_in_float32() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    module.weight.data.fill_(1.0)
    ema = EMA(module, 0.999, warmup=False)
    module.weight.data.fill_(2.0)
    for _ in range(100):
        ema.update()
    assert ema.module.weight.dtype == torch.float32
    assert float(ema.module.weight) == pytest.approx(2.0 - 0.999**100, rel=1e-5)


def test_buffers_are_copied_and_the_copy_is_apart() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(module)
    module(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    ema.update()
    assert int(ema.module[1].num_batches_tracked) == 1
    torch.testing.assert_close(ema.module[1].running_mean, module[1].running_mean)
    assert not ema.module.training
    assert module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_state_round_trip() -> None:
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    module.weight.data.add_(1.0)
    ema.update()
    other = EMA(module, 0.9)
    other.load_state_dict(ema.state_dict())
    module.weight.data.add_(1.0)
    ema.update()
    other.update()
    assert other.updates == ema.updates == 2
    assert torch.equal(other.module.weight, ema.module.weight)


def test_decay_is_checked() -> None:
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), 1.0)
