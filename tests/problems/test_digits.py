"""The digits: sizes, a fixed split, exact dequantisation."""

from __future__ import annotations

import sys

import pytest
import torch

from flowsolve.problems import digits

pytest.importorskip("sklearn")


def test_split_is_a_partition() -> None:
    train, held_out, everything = (digits.load(s) for s in ("train", "held_out", "all"))  # type: ignore[arg-type]
    assert train.images.shape == (1497, 1, 8, 8)
    assert held_out.images.shape == (300, 1, 8, 8)
    assert everything.images.dtype == torch.uint8
    assert everything.labels.dtype == torch.int64
    assert int(everything.images.max()) == digits.LEVELS - 1
    assert int(everything.images.min()) == 0
    together = torch.cat((train.images, held_out.images)).flatten(1).tolist()
    assert sorted(together) == sorted(everything.images.flatten(1).tolist())
    assert torch.bincount(held_out.labels, minlength=10).min() > 15


def test_split_is_the_documented_one() -> None:
    """Pinned: published numbers hang on which images are held out."""
    held_out, everything = digits.load("held_out"), digits.load("all")
    where = [i for i in range(40) if any(torch.equal(everything.images[i], h) for h in held_out.images)]
    assert where == [9, 39]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_and_back(dtype: torch.dtype) -> None:
    images = digits.load("held_out").images
    x = digits.dequantize(images, torch.Generator().manual_seed(0), dtype)
    assert x.dtype == dtype
    assert float(x.min()) >= -1.0
    assert float(x.max()) < 1.0
    assert torch.equal(digits.quantize(x), images)
    again = digits.dequantize(images, torch.Generator().manual_seed(0), dtype)
    assert torch.equal(x, again)
    u = (x + 1.0) * 17.0 / 2.0 - images
    assert abs(float(u.mean()) - 0.5) < 5.0 / (12.0 * u.numel()) ** 0.5
    assert torch.equal(digits.quantize(torch.tensor([-2.0, 2.0])), torch.tensor([0, 16], dtype=torch.uint8))


def test_boundary_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="split"):
        digits.load("test")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer levels"):
        digits.dequantize(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="levels run from 0 to 17"):
        digits.dequantize(torch.tensor([0, 17]))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install .*\[train\]'"):
        digits.load()
