"""Patches of photographs: what is drawn lies in them, the split keeps photographs apart, levels come back."""

from __future__ import annotations

import pytest
import torch

from flowsolve.problems import patches


def gradient(height: int, width: int, base: int) -> torch.Tensor:
    """A photograph whose pixels say where they are."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((rows, columns, torch.full_like(rows, base))).to(torch.uint8)


PHOTOS = [[gradient(100 // k, 120 // k, 10 * i + k) for k in patches.SHRUNK] for i in range(3)]


def test_what_is_drawn_lies_in_the_photographs() -> None:
    draws = [patches.draw(PHOTOS, 300, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].images, draws[1].images)
    assert not torch.equal(draws[0].images, draws[2].images)
    images, labels = draws[0]
    assert images.shape == (300, 3, 32, 32)
    assert images.dtype == torch.uint8
    kinds, flipped = set(), 0
    for image, label in zip(images, labels.tolist(), strict=True):
        base = int(image[2, 0, 0])
        k = base - 10 * label
        assert k in patches.SHRUNK
        row, columns = int(image[0, 0, 0]), image[1, 0].int()
        flipped += int(columns[0] > columns[1])
        column = int(columns.min())
        cut = PHOTOS[label][k - 1][:, row : row + 32, column : column + 32]
        assert torch.equal(image, cut) or torch.equal(image, cut.flip(-1))
        kinds.add((label, k))
    assert len(kinds) == 9
    assert abs(flipped - 150) < 5 * 75**0.5  # binomial


def test_the_lattice_takes_all_alike() -> None:
    images, labels = patches.lattice(PHOTOS, 27)
    assert labels.bincount().tolist() == [9, 9, 9]
    assert len({bytes(v.numpy().tobytes()) for v in images}) == 27
    assert torch.equal(images, patches.lattice(PHOTOS, 27).images)


def test_levels_come_back() -> None:
    images = patches.draw(PHOTOS, 8, torch.Generator().manual_seed(0)).images
    x = patches.dequantize(images, torch.Generator().manual_seed(1))
    assert -1.0 <= float(x.min()) <= float(x.max()) < 1.0
    assert torch.equal(((x + 1.0) * 128.0).floor().to(torch.uint8), images)
    with pytest.raises(TypeError, match="expected the levels 0 … 255 as uint8"):
        patches.dequantize(x)


def test_the_photographs_that_ship_with_packages() -> None:
    with pytest.raises(ValueError, match="expected 'train' or 'held_out'"):
        patches.photographs("test")  # type: ignore[arg-type]
    pytest.importorskip("skimage")
    train, held = patches.photographs("train"), patches.photographs("held_out")
    assert (len(train), len(held)) == (len(patches.TRAIN), len(patches.HELD_OUT))
    for photo in (*train, *held):
        assert [v.dtype for v in photo] == [torch.uint8] * 3
        _, height, width = photo[0].shape
        assert [tuple(v.shape) for v in photo] == [(3, height // k, width // k) for k in patches.SHRUNK]
        mean = photo[0][:, :2, :2].double().mean((1, 2))
        assert (photo[1][:, 0, 0].double() - mean).abs().max() <= 0.5
    assert not {v[0].shape for v in train} & {held[0][0].shape}
