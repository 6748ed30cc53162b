"""Samples that are kept as they are drawn, images that start them, and images carried to the noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowsolve as fs
from flowsolve import runs, solvers
from flowsolve.runs import pictures
from tests.cases import PATHS
from tests.runs import work

Image = pytest.importorskip("PIL.Image")


def arrays(out: Path, file: str = "samples.npz") -> dict[str, Any]:
    with np.load(out / file) as held:
        return dict(held)


def shown(file: Path) -> Any:
    with Image.open(file) as image:
        return np.array(image)


@pytest.mark.parametrize("solver", [solvers.UniPC(), solvers.DDPM(), solvers.Dopri5(1e-4, 1e-4), "auto"])
def test_what_is_kept_is_what_sample_gives(tmp_path: Path, solver: Any) -> None:
    """Batches of 4 give the samples of one batch; files and arrays hold the same pixels."""
    nfe = None if isinstance(solver, solvers.Dopri5) else 7
    record = runs.sample(work.flow(), 10, tmp_path, solver=solver, nfe=nfe, seed=2, batch=4, shape=(1, 2, 2), raw=True)
    whole = fs.sample(work.flow(), shape=(10, 1, 2, 2), solver=solver, nfe=nfe, seed=2)
    kept = arrays(tmp_path)
    assert np.abs(kept["x"] - whole.x.numpy()).max() < 1e-5
    assert kept["nfe"].tolist() == whole.nfe.tolist()
    assert kept["index"].tolist() == list(range(10))
    levels = np.clip(np.floor((kept["x"].astype(np.float64) + 1.0) * 128.0), 0, 255)  # 256 cells of width 1/128
    assert (kept["images"] == levels.transpose(0, 2, 3, 1)).all()
    for i in range(10):
        assert (shown(tmp_path / f"images/{i:06d}.png") == kept["images"][i, :, :, 0]).all()
    assert record is not None
    assert record["nfe"]["mean"] == float(whole.nfe.double().mean())
    assert json.loads((tmp_path / "metadata.json").read_text()) == record


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = work.sample(tmp_path / "whole")
    saved, count = pictures.save_png, 0

    def interrupted(file: Path, image: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        saved(file, image)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work.sample(tmp_path / "broken")
    assert work.sample(tmp_path / "broken")["digest"] == whole["digest"]
    assert (tmp_path / "broken/samples.npz").read_bytes() == (tmp_path / "whole/samples.npz").read_bytes()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("strength", [0.9, 0.5, 0.1])
def test_strength_is_the_share_of_noise(name: str, strength: float) -> None:
    path = PATHS[name]
    t = runs.start_time(fs.Flow(lambda x, t: x, path, prediction="data"), strength)
    share = path.sigma(t) / (path.alpha(t) + path.sigma(t))
    if t > 0.0:
        assert share == pytest.approx(strength, abs=1e-6)
    else:  # a path that begins with less noise than that
        assert share <= strength
    if name == "CondOT":
        assert t == pytest.approx(1.0 - strength)


def test_strength_has_its_limits() -> None:
    flow = fs.Flow(lambda x, t: x, fs.paths.Discrete.linear(), prediction="noise")
    assert runs.start_time(flow, 1.0) == 0.0
    with pytest.raises(ValueError, match=r"strength = 0\.001 is less noise than the network knows; expected more than"):
        runs.start_time(flow, 0.001)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected a share of noise in \(0, 1\]"):
            runs.start_time(flow, wrong)


def test_images_start_samples(tmp_path: Path) -> None:
    """Sample i starts from α_t z + σ_t ε_i with image i mod 2; by the formula, with the noise of `fs.sample`."""
    images = torch.tensor([[[[0, 255], [64, 128]]], [[[255, 0], [9, 250]]]], dtype=torch.uint8)
    options = {"solver": solvers.Heun(), "nfe": 8, "seed": 4, "raw": True, "batch": 2}
    runs.sample(work.flow(), 5, tmp_path, init=images, strength=0.4, **options)
    z = ((images.double() + 0.5) / 128.0 - 1.0).float()[[0, 1, 0, 1, 0]]
    noise = fs.sample(work.flow(), shape=(5, 1, 2, 2), solver=solvers.Euler(), nfe=1, seed=4, interval=(0.0, 1e-12)).x
    x = 0.6 * z + 0.4 * noise
    right = fs.sample(work.flow(), start=x, interval=(0.6, 1.0), solver=solvers.Heun(), nfe=8)
    kept = arrays(tmp_path)
    assert np.abs(kept["x"] - right.x.numpy()).max() < 1e-5
    assert kept["nfe"].tolist() == [8] * 5
    with pytest.raises(runs.RunError, match=r"other settings \(strength: 0.4 → 0.5"):
        runs.sample(work.flow(), 5, tmp_path, init=images, strength=0.5, **options)
    with pytest.raises(runs.RunError, match=r"init.digest"):
        runs.sample(work.flow(), 5, tmp_path, init=255 - images, strength=0.4, **options)
    with pytest.raises(ValueError, match="go together; give both or neither"):
        runs.sample(work.flow(), 5, tmp_path / "b", init=images, **options)


def test_little_noise_returns_the_image(tmp_path: Path) -> None:
    """On a flow to a point mass nothing else can come out; on the mixture an image of it is nearly kept."""
    z = work.MIXTURE.sample(1, seed=1).float()
    image = work.flow().transform.pixels(z)
    runs.sample(work.flow(), 8, tmp_path, init=image, strength=0.02, solver=solvers.Heun(), nfe=8, seed=0)
    kept = arrays(tmp_path)["images"].astype(int)
    assert np.abs(kept - image.permute(0, 2, 3, 1).numpy()).max() < 16  # 5 σ of noise of 0.02, in levels of 1/128


def test_samples_that_are_no_images_keep_their_numbers(tmp_path: Path) -> None:
    flow = fs.problems.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], std=0.2).flow(fs.paths.CondOT())
    record = runs.sample(flow, 9, tmp_path, solver=solvers.Heun(), nfe=8, shape=(2,), batch=4)
    assert np.abs(arrays(tmp_path)["x"] - fs.sample(flow, (9, 2), solver=solvers.Heun(), nfe=8).x.numpy()).max() < 1e-5
    assert "images" not in arrays(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"metadata.json", "parts", "run.json", "samples.npz"}
    assert record is not None
    assert record["digest"]


def test_samples_that_fail_are_named_or_left_out(tmp_path: Path) -> None:
    options = {"solver": solvers.Dopri5(1e-4, 1e-4), "shape": (1, 2, 2), "batch": 4}
    whole = runs.sample(work.flow(), 10, tmp_path / "whole", **options)
    assert whole is not None
    most = whole["nfe"]["min"]
    assert most < whole["nfe"]["max"]
    with pytest.raises(runs.RunError, match=r"sample \d: the solve evaluation budget spent at t = .*"):
        runs.sample(work.flow(), 10, tmp_path / "stop", nfe=most, **options)
    left = runs.sample(work.flow(), 10, tmp_path / "skip", nfe=most, on_error="skip", **options)
    assert left is not None
    assert left["samples"] + len(left["left_out"]) == 10
    gone = {e["idx"] for e in left["left_out"]}
    kept = arrays(tmp_path / "skip")
    assert gone.isdisjoint(kept["index"].tolist())
    assert len(kept["images"]) == left["samples"] == len(list((tmp_path / "skip/images").iterdir()))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n": 0}, ValueError, "n = 0; expected an integer >= 1"),
        ({"batch": 0}, ValueError, "batch = 0; expected an integer >= 1"),
        ({"on_error": "ignore"}, ValueError, "on_error = 'ignore'; expected one of stop, skip"),
        ({"shape": None}, ValueError, r"does not say what shape its samples have; give shape= \(--shape\)"),
        ({"sovler": 1}, TypeError, "sovler"),
        ({"flow": 3}, TypeError, "flow is a int; expected a flowsolve.Flow"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"flow": work.flow(), "n": 4, "shape": (1, 2, 2), "nfe": 4, **options}
    with pytest.raises(error, match=words):
        runs.sample(out=tmp_path, **given)


def test_inversion_is_a_round_trip(tmp_path: Path) -> None:
    """Latent and return are those of `fs.round_trip`, in batches; and the latent of the exact flow is the encoded z."""
    images = torch.randint(0, 256, (5, 1, 2, 2), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    found = runs.invert(work.flow(), images, tmp_path / "out", solver=solvers.RK4(), nfe=40, batch=2)
    z = ((images.double() + 0.5) / 128.0 - 1.0).float()
    right = fs.round_trip(work.flow(), z, solver=solvers.RK4(), nfe=40)
    kept = arrays(tmp_path / "out", "latent.npz")
    for name in ("latent", "x", "error", "psnr", "nfe"):
        assert np.abs(kept[name] - getattr(right, name).numpy()).max() < 1e-4, name
    assert found.nfe.tolist() == [80] * 5
    assert shown(tmp_path / "out/round_trip.png").shape == (2 * 66 + 2, 5 * 66 + 2)
    record = json.loads((tmp_path / "out/metadata.json").read_text())
    assert record["psnr"]["worst"] == pytest.approx(float(right.psnr.min()), abs=0.1)
    with pytest.raises(FileExistsError, match="is not empty; choose another directory"):
        runs.invert(work.flow(), images, tmp_path / "out", solver=solvers.RK4(), nfe=40)
    with pytest.raises(TypeError, match="data is an iterator"):
        runs.invert(work.flow(), iter([images]), tmp_path / "b", solver=solvers.RK4(), nfe=40)


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(40, 50, 2), (8, 8, 8), (70, 100, 1), (1, 1, 64)], ids=lambda v: str(v)
)
def test_a_grid_shows_every_image_where_it_belongs(height: int, width: int, factor: int, tmp_path: Path) -> None:
    """Each pixel a square of whole pixels, and the images at least 64 wide or high."""
    shape = (7, 3, height, width)
    images = torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pictures.save_grid(tmp_path / "grid.png", images)
    sheet = shown(tmp_path / "grid.png")
    h, w = height * factor, width * factor
    assert max(h, w) >= 64
    assert sheet.shape == (3 * (h + 2) + 2, 3 * (w + 2) + 2, 3)
    for i in range(7):
        y, x = (i // 3) * (h + 2) + 2, (i % 3) * (w + 2) + 2
        tile = np.asarray(sheet)[y : y + h, x : x + w].reshape(height, factor, width, factor, 3)
        assert (tile == images[i].permute(1, 2, 0).numpy()[:, None, :, None]).all()
    assert (sheet[0] == 255).all()


@pytest.mark.parametrize(
    "solver", [solvers.Bosh3(), solvers.Dopri5(), solvers.Dopri8()], ids=lambda s: type(s).__name__
)
def test_a_run_does_not_depend_on_what_its_process_did_before(tmp_path: Path, solver: Any) -> None:
    """Which kernels serve changes with what a process has done; the samples of a run do not, to the bit."""
    flow = fs.Flow(lambda x, t: -x * x * x + (t * t)[:, None] * x.abs().sqrt(), fs.paths.CondOT())
    found = []
    for mode in ("torch", "fused"):
        with fs.kernels.use(mode):
            runs.sample(flow, 200, tmp_path / mode, shape=(5,), solver=solver, batch=64)
        with np.load(tmp_path / mode / "samples.npz") as held:
            found.append({name: held[name].tobytes() for name in held})
    assert found[0] == found[1]


def test_finished_batches_without_a_manifest_are_nobody_s(tmp_path: Path) -> None:
    flow = fs.Flow(lambda x, t: -x, fs.paths.CondOT())
    out, common = tmp_path / "run", {"shape": (2,), "solver": solvers.Euler(), "nfe": 8, "batch": 2}
    runs.sample(flow, 4, out, seed=0, **common)
    kept = (out / "run.json").read_text()
    (out / "run.json").unlink()
    (out / "samples.npz").unlink()
    (out / "metadata.json").unlink()
    with pytest.raises(runs.RunError, match=r"finished batches and no run\.json"):
        runs.sample(flow, 4, out, seed=1, **common)
    (out / "run.json").write_text("[]")
    with pytest.raises(runs.RunError, match=r"run\.json holds a list"):
        runs.sample(flow, 4, out, seed=0, **common)
    (out / "run.json").write_text(kept)
    runs.sample(flow, 4, out, seed=0, **common)
