"""Pixels by the flow's transform: levels, shades of picture files, states; codes, which have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowsolve as fs
from flowsolve import runs, solvers
from flowsolve.runs import pictures
from flowsolve.transforms import Latent, Normalize, Range
from tests.runs import work

Image = pytest.importorskip("PIL.Image")


def declared(transform: Any) -> fs.Flow:
    flow = work.flow()
    flow.transform = transform
    return flow


def levels_of(out: Path) -> Any:
    with np.load(out / "samples.npz") as held:
        return held["images"][..., 0], held["x"][:, 0]


@pytest.mark.parametrize("count", [2, 3, 16, 17, 100, 255, 256])
def test_shades_keep_every_level(count: int) -> None:
    """The first level is black, the last white, and what is written is read as the middle of the same cell."""
    k = torch.arange(count).reshape(1, 1, 1, count)
    shades = pictures.shades(k, count)
    assert shades.dtype == torch.uint8
    assert (int(shades.min()), int(shades.max())) == (0, 255)
    x = pictures.states(declared(Range(0.0, 1.0, levels=count)), shades, shaded=True)
    torch.testing.assert_close(x, ((k + 0.5) / count).float())


def test_states_are_the_middles_of_cells() -> None:
    k = torch.tensor([[[[0, 16], [8, 3]]]])
    torch.testing.assert_close(pictures.states(work.flow(), k, 17), (2.0 * (k + 0.5) / 17 - 1.0).float())
    torch.testing.assert_close(pictures.states(work.flow(), k), (2.0 * (k + 0.5) / 256 - 1.0).float())
    centred = pictures.states(declared(Range(centred=True)), k)
    torch.testing.assert_close(centred, (2.0 * k / 255 - 1.0).float())
    normal = pictures.states(declared(Range(0, 1).then(Normalize([0.4], [0.2]))), k)
    torch.testing.assert_close(normal, (((k + 0.5) / 256 - 0.4) / 0.2).float())


@pytest.mark.parametrize(
    ("transform", "images", "error", "words"),
    [
        (Range(levels=17), torch.tensor([[[[0, 255]]]]), ValueError, r"run from 0 to 255; expected the levels 0 … 16"),
        (Range(), torch.tensor([[[[-1, 3]]]]), ValueError, "run from -1 to 3; expected the levels 0 … 255"),
        (Range(levels=17), torch.tensor([[[[0.5]]]]), TypeError, "float32; expected integers 0 … 16"),
        (Latent(0.18215), torch.tensor([[[[3]]]]), ValueError, "models codes of an autoencoder .* encode them"),
    ],
)
def test_what_is_no_image_of_the_flow(transform: Any, images: torch.Tensor, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pictures.states(declared(transform), images)


@pytest.mark.parametrize(
    ("transform", "level"),
    [
        (Range(levels=17), lambda x: (x + 1.0) * 8.5),
        (Range(-2.0, 2.0, levels=5), lambda x: (x + 2.0) * 1.25),
        (Range(centred=True), lambda x: (x + 1.0) * 127.5 + 0.5),
        (Range(levels=1000), lambda x: (x + 1.0) * 500.0),
    ],
)
def test_samples_are_levels_and_files_are_shades(tmp_path: Path, transform: Range, level: Any) -> None:
    flow, count = declared(transform), transform.count()
    record = runs.sample(flow, 6, tmp_path, solver=solvers.Heun(), nfe=8, shape=(1, 2, 2), raw=True)
    kept, x = levels_of(tmp_path)
    right = np.clip(np.floor(level(x.astype(np.float64))), 0, count - 1)
    assert (kept == right).all()
    assert kept.dtype == (np.uint8 if count <= 256 else np.int32)
    with Image.open(tmp_path / "images/000002.png") as image:
        assert (np.array(image) == np.round(right[2] * (255 / (count - 1)))).all()
    assert record is not None
    assert record["levels"] == count


def test_a_sample_s_picture_starts_the_next(tmp_path: Path) -> None:
    """Through the shades of its file: at no noise to speak of the levels come back."""
    flow = declared(Range(levels=5))
    runs.sample(flow, 3, tmp_path / "a", solver=solvers.Heun(), nfe=16, shape=(1, 2, 2), raw=True, seed=1)
    options: dict[str, Any] = {"init": tmp_path / "a/images", "strength": 0.001, "solver": solvers.Heun(), "nfe": 4}
    runs.sample(flow, 3, tmp_path / "b", raw=True, **options)
    assert (levels_of(tmp_path / "b")[0] == levels_of(tmp_path / "a")[0]).all()


def test_codes_are_kept_as_numbers(tmp_path: Path) -> None:
    """Three channels of codes look like RGB and are none."""
    flow = fs.problems.GaussianMixture(torch.zeros(1, 3, 2, 2), std=0.5).flow(fs.paths.CondOT())
    flow.transform = Latent(0.5, 0.25)
    common: dict[str, Any] = {"solver": solvers.Heun(), "nfe": 4}
    record = runs.sample(flow, 3, tmp_path / "a", shape=(3, 2, 2), **common)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"metadata.json", "parts", "run.json", "samples.npz"}
    assert record is not None
    assert record["codes"] == "Latent(scale=0.5, shift=0.25)"
    with np.load(tmp_path / "a/samples.npz") as held:
        assert set(held) == {"index", "nfe", "x"}
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="models codes of an autoencoder"):
        runs.sample(flow, 3, tmp_path / "b", init=images, strength=0.5, **common)
    with pytest.raises(ValueError, match="models codes of an autoencoder"):
        runs.invert(flow, images, tmp_path / "c", **common)
    with pytest.raises(ValueError, match="its images have no bits per dimension"):
        runs.nll(flow, images, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_bits_of_the_pictures_that_were_written(tmp_path: Path) -> None:
    """Seventeen levels are spread over 256 shades in a file, and found again; other shades are refused."""
    means = torch.tensor([[[[-0.5, 0.5], [0.2, -0.2]]]])
    flow = fs.problems.GaussianMixture(means, std=0.3).flow(fs.paths.CondOT())
    flow.transform = Range(levels=17)
    common: dict[str, Any] = {"solver": solvers.Heun(), "nfe": 8}
    runs.sample(flow, 4, tmp_path / "a", shape=(1, 2, 2), png=True, **common)
    with np.load(tmp_path / "a/samples.npz") as held:
        levels = torch.from_numpy(held["pixels"] if "pixels" in held else held["images"])
    report = runs.nll(flow, tmp_path / "a/images", tmp_path / "b", **common)
    truth = fs.bits_per_dim(flow, levels.permute(0, 3, 1, 2) if levels.shape[-1] == 1 else levels, **common)
    assert report is not None
    assert report["mean"] == pytest.approx(truth.mean, abs=1e-6)
    Image.fromarray(np.full((2, 2), 5, dtype=np.uint8)).save(tmp_path / "a/images/000000.png")
    with pytest.raises(runs.RunError, match=r"its levels run from 48 to 175; expected 0 … 16"):
        runs.nll(flow, tmp_path / "a/images", tmp_path / "c", **common)
