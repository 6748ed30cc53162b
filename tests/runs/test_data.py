"""Data sets: every kind gives the same images, and what cannot be used is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flowsolve.runs.data import Stream, open_data
from flowsolve.runs.errors import ItemError, RunError
from tests.runs import work

Image = pytest.importorskip("PIL.Image")
GREY = work.IMAGES.to(torch.uint8)
COLOUR = torch.randint(0, 256, (5, 3, 6, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def read(data: Any, **options: Any) -> torch.Tensor:
    """All images, by number or as they come."""
    found = open_data(data, **options)
    return torch.stack([item for _, _, items in found.batches(2, lambda _: True) for item in items])


def save(folder: Path, images: torch.Tensor, name: str = "{}.png") -> Path:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / name.format(i))
    return folder


def test_every_kind_of_data_gives_the_same_images(tmp_path: Path) -> None:
    last = COLOUR.permute(0, 2, 3, 1).contiguous().numpy()
    np.save(tmp_path / "first.npy", COLOUR.numpy())
    np.save(tmp_path / "last.npy", last)
    np.savez(tmp_path / "plain.npz", labels=np.arange(5), images=last)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=COLOUR.numpy())
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(last))
    kinds: list[Any] = [
        COLOUR, COLOUR.numpy(), last, save(tmp_path / "folder", COLOUR), tmp_path / "first.npy", tmp_path / "last.npy",
        tmp_path / "plain.npz", f"{tmp_path}/plain.npz:images", tmp_path / "packed.npz", tmp_path / "fortran.npz",
        TensorDataset(COLOUR, torch.arange(5)), DataLoader(TensorDataset(COLOUR, torch.arange(5)), 3),
        list(COLOUR), [Image.fromarray(a) for a in last], iter([COLOUR[:1], COLOUR[1:]]), iter([(COLOUR, "labels")]),
    ]  # fmt: skip
    for kind in kinds:
        assert torch.equal(read(kind), COLOUR), kind
    assert torch.equal(read(tmp_path / "folder/3.png"), COLOUR[3:4])
    assert torch.equal(read(COLOUR, limit=2), COLOUR[:2])
    assert torch.equal(read(iter([COLOUR]), limit=3), COLOUR[:3])
    assert torch.equal(read(GREY[:, 0]), GREY)  # (N, H, W)
    square = GREY[:3].expand(3, 3, 2, 2)[..., :1].expand(3, 3, 2, 3).contiguous()
    assert torch.equal(read(square, layout="nchw"), square)
    assert torch.equal(read(square, layout="nhwc"), square.permute(0, 3, 1, 2))


def test_arrays_are_mapped_where_they_lie(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", COLOUR.numpy())
    np.savez(tmp_path / "a.npz", other=np.arange(77), images=COLOUR.numpy())
    for name in ("a.npy", "a.npz"):
        assert isinstance(open_data(tmp_path / name).items, np.memmap)  # type: ignore[attr-defined]


def test_folders_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/10.PNG", "b/1.jpeg", "z.jpg", "a/.hidden.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            Image.fromarray(GREY[0, 0].numpy()).save(tmp_path / name)
    found = open_data(tmp_path)
    assert [found.name(i) for i in range(found.count or 0)] == ["a/10.PNG", "b/1.jpeg", "b/2.png", "z.jpg"]
    assert found.shape() == (1, 2, 2)


def test_digits_by_name() -> None:
    pytest.importorskip("sklearn")
    found = open_data("digits")
    assert (found.count, found.levels, found.shape()) == (1797, 17, (1, 8, 8))
    assert open_data("digits:held_out").count == 300
    with pytest.raises(ValueError, match="split = 'test'; expected 'train', 'held_out' or 'all'"):
        open_data("digits:test")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_truncated_file_is_never_read_as_an_image(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, a file is refused, but for the last bytes of a JPEG, which say that it is over."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind])
    whole, file = buffer.getvalue(), tmp_path / f"a.{kind}"
    file.write_bytes(whole)
    (right,) = read(file)
    for size in range(0, len(whole), 37):
        file.write_bytes(whole[:size])
        item = open_data(file).read(0)
        assert isinstance(item, ItemError), size
        assert str(item).startswith(f"{file}: it cannot be read as an image")
    assert right.shape == (3, 24, 20)


def test_a_damaged_png_is_never_read_as_an_image(tmp_path: Path) -> None:
    """Any byte changed is noticed: a PNG carries checksums."""
    (file,) = (save(tmp_path / "one", COLOUR[:1]) / "0.png",)
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        item = open_data(file).read(0)
        assert isinstance(item, ItemError) or torch.equal(item, COLOUR[0]), place


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:40]), r"03.png: it cannot be read as an image \(.*\): truncated or"),
        (lambda f: f.write_bytes(b"no image at all"), r"03.png: it cannot be read as an image \(.*\): truncated or"),
        (lambda f: Image.new("L", (3, 2)).save(f), r"03.png: its shape is 1×2×3; expected 1×2×2, that of the others"),
        (lambda f: Image.new("RGB", (2, 2)).save(f), r"03.png: its shape is 3×2×2; expected 1×2×2"),
        (lambda f: Image.new("RGBA", (2, 2)).save(f), r"03.png: it is of mode RGBA; expected L \(grey\) or RGB of 8 b"),
        (lambda f: Image.new("L", (2, 2), 200).save(f), r"03.png: its levels run from 200 to 200; expected 0 … 15"),
    ],
    ids=["truncated", "corrupt", "size", "channels", "mode", "levels"],
)
def test_an_image_that_cannot_be_used_stops_the_run_or_is_left_out(tmp_path: Path, spoil: Any, words: str) -> None:
    """Its file is named, the batch before it is kept, and mended the run goes on to what it would have been."""
    folder = save(tmp_path / "images", GREY[:7], "{:02d}.png")
    file, out = folder / "03.png", tmp_path / "out"
    right = file.read_bytes()
    options = {"data": folder, "batch": 2, "solver": work.solvers.Heun(), "nfe": 4}
    whole = work.nll(tmp_path / "whole", **options)
    spoil(file)
    with pytest.raises(RunError, match=words) as error:
        work.nll(out, **options)
    assert f"The 2 results so far are kept in {out}" in str(error.value)
    left = work.nll(tmp_path / "skipping", on_error="skip", **options)
    assert [e["name"] for e in left["left_out"]] == ["03.png"]
    assert left["left_out"][0]["status"] == "unusable"
    assert left["images"] == 6
    file.write_bytes(right)
    assert {k: v for k, v in work.nll(out, **options).items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }


def test_a_solve_that_fails_is_named(tmp_path: Path) -> None:
    """Of 30 images some need more than 26 evaluations."""
    whole = work.nll(tmp_path / "whole")
    most = whole["nfe"]["min"]
    assert most < whole["nfe"]["max"]
    with pytest.raises(RunError, match=rf"image \d+: the solve evaluation budget spent at t = .* after {most} evalu"):
        work.nll(tmp_path / "stop", nfe=most)
    left = work.nll(tmp_path / "skip", nfe=most, on_error="skip")
    assert left["images"] + len(left["left_out"]) == work.COUNT
    assert {e["status"] for e in left["left_out"]} == {"failed"}


class Labelled(Dataset[Any]):
    """Images with labels, as torchvision gives them."""

    def __len__(self) -> int:
        return work.COUNT

    def __getitem__(self, index: int) -> Any:
        return work.IMAGES[index], index % 10


def test_datasets_and_iterators_run_like_tensors(tmp_path: Path) -> None:
    """An iterator's batches are not the run's: 7 and 4."""
    options = {"solver": work.solvers.Heun(), "nfe": 4}
    means = {
        kind: work.nll(tmp_path / kind, data, **options)["mean"]
        for kind, data in {
            "tensor": work.IMAGES,
            "dataset": Labelled(),
            "loader": DataLoader(Labelled(), 7),
            "iterator": iter(work.IMAGES.split(7)),
        }.items()
    }
    assert len(set(means.values())) == 1, means


def test_an_iterator_is_gone_through_again(tmp_path: Path) -> None:
    def failing() -> Any:
        yield work.IMAGES[:10]
        raise KeyboardInterrupt

    options = {"solver": work.solvers.Heun(), "nfe": 4}
    with pytest.raises(KeyboardInterrupt):
        work.nll(tmp_path / "a", failing(), **options)
    asked = []
    stream = Stream([work.IMAGES])
    batches = stream.batches(4, lambda b: asked.append(b) or b > 5)  # type: ignore[func-returns-value]
    assert [number for number, _, _ in batches] == [6, 7]
    assert asked == list(range(8))
    assert stream.count == work.COUNT
    again = work.nll(tmp_path / "a", iter([work.IMAGES]), **options)
    assert again["mean"] == work.nll(tmp_path / "b", work.IMAGES, **options)["mean"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: p / "absent", FileNotFoundError, r"there is no '.*absent'; expected a folder of images, an image"),
        (lambda p: p, ValueError, r"holds no images; expected files .png, .jpg, .jpeg, found cut.npy"),
        (lambda p: p / "cut.npy", ValueError, r"cut.npy cannot be read as an array: .*"),
        (lambda p: p / "cut.npz", ValueError, r"cut.npz cannot be read as an array: .*"),
        (lambda p: p / "two.npz", ValueError, r"it holds the arrays a, b; choose one as .*two.npz:KEY"),
        (lambda p: f"{p}/two.npz:c", ValueError, r"it holds the arrays a, b; choose one"),
        (lambda p: p / "flat.npy", ValueError, r"its shape is \(4,\); expected \(N, \*S\)"),
        (lambda p: p / "object.npy", ValueError, r"object.npy cannot be read as an array: .*Python objects"),
        (lambda p: p / "notes.txt", ValueError, r"notes.txt is not of a known kind"),
        (lambda p: np.zeros((2, 3, 5, 3)), ValueError, r"may be \(N, C, H, W\) or \(N, H, W, C\); set layout="),
        (lambda p: np.zeros((0, 1, 2, 2)), ValueError, "the array is empty"),
        (lambda p: 7, TypeError, "data is a int; expected a path"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, make: Any, error: type[Exception], words: str) -> None:
    np.save(tmp_path / "cut.npy", COLOUR.numpy())
    np.savez(tmp_path / "cut.npz", COLOUR.numpy())
    for name in ("cut.npy", "cut.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    np.save(tmp_path / "flat.npy", np.zeros(4))
    np.save(tmp_path / "object.npy", np.array([{}, {}], object), allow_pickle=True)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(error, match=words):
        open_data(make(tmp_path))
    with pytest.raises(ValueError, match="limit = 0; expected at least 1"):
        open_data(COLOUR, limit=0)
    with pytest.raises(ValueError, match="layout = 'hwc'; expected one of auto, nchw, nhwc"):
        open_data(COLOUR, layout="hwc")


def test_images_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected integers 0 … 15"):
        work.nll(tmp_path, work.IMAGES / 16)
