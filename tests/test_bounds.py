"""Small files that claim to be large: refused before they are read, by every entry point, at no cost."""

from __future__ import annotations

import copy
import io
import json
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flowsolve as fs
from flowsolve import _bounds, adapters
from flowsolve.adapters import pickles
from flowsolve.adapters.files import Source, read_json, safetensors_header
from flowsolve.runs import arrays
from flowsolve.runs.data import open_data
from flowsolve.training import Trainer

MIB = 2**20
BOMB = 16 * MIB
SAID: dict[str, Any] = {"path": fs.paths.CondOT(), "prediction": "velocity", "net": nn.Linear(2, 2)}
STEPS = (10**8, 1e12, float("inf"), float("nan"), 0, -5, 10.5, True, None, "many", [1000])


@contextmanager
def cheap(limit: int = 4 * MIB) -> Iterator[None]:
    """What happens within costs no more memory than that (of Python and numpy)."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes"


def packed(file: Path, inner: str = "", content: bytes = b"") -> Path:
    """A torch file with its members compressed, and one of them with other content."""
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(BOMB // 4 if not inner else 4)}, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (content if inner and name.endswith(inner) else b""))
    assert file.stat().st_size < BOMB // 400
    return file


def overlapping(file: Path) -> Path:
    """A torch file whose directory lists the same bytes a hundred times."""
    torch.save({"weight": torch.zeros(MIB // 4)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        member = next(m for m in archive.infolist() if m.file_size >= MIB)
        for i in range(100):
            again = copy.copy(member)
            again.filename = f"{member.filename}{i}"
            archive.filelist.append(again)
        archive.writestr("last", b"")
    return file


@pytest.mark.parametrize("make", [packed, lambda f: packed(f, "data.pkl", bytes(BOMB)), overlapping])
def test_archives_that_grow(make: Callable[[Path], Path], tmp_path: Path) -> None:
    file = make(tmp_path / "model.pt")
    trainer = Trainer(nn.Linear(2, 2), lambda generator: torch.zeros(()), steps=1)
    with cheap():
        for reader in (
            adapters.inspect,
            lambda f: adapters.inspect(f, trust_pickle=True),
            lambda f: adapters.load(f, **SAID),
            lambda f: adapters.load(f, format="edm"),
            fs.Snapshot.load,
            trainer.load,
        ):
            with pytest.raises(ValueError, match=r"model.pt: its member.* (is packed|claim)"):
                reader(file)


def test_a_packed_archive_in_a_directory_of_diffusers(tmp_path: Path) -> None:
    config = {"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1}
    for part, content in (("unet/config", config), ("scheduler/scheduler_config", {"_class_name": "DDPMScheduler"})):
        (tmp_path / part).parent.mkdir()
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    packed(tmp_path / "unet/diffusion_pytorch_model.bin")
    pytest.importorskip("diffusers")
    with cheap(), pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin: its member .* is packed"):
        adapters.inspect(tmp_path)


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    state = {"weight": torch.randn(2, 2), "bias": torch.zeros(2).half(), "tied": torch.zeros(3).expand(2, 3)[:1]}
    for old in (True, False):
        torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
        assert torch.equal(Source.of(tmp_path / "model.pt").state()["weight"], state["weight"])


def test_lists_longer_than_any_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"w{i}": torch.zeros(1) for i in range(300)}
    torch.save(many, tmp_path / "many.pt")
    save_file(many, tmp_path / "many.safetensors")
    np.savez(tmp_path / "many.npz", **{k: v.numpy() for k, v in many.items()})
    for name in ("many.pt", "many.safetensors"):
        assert len(Source.of(tmp_path / name).tensors) == 300
    with monkeypatch.context() as patch:
        patch.setattr(pickles, "MAX_OPCODES", 1000)
        with pytest.raises(ValueError, match=r"many.pt is a pickle of more than 1,000 instructions"):
            adapters.inspect(tmp_path / "many.pt")
    for most in (250, 10):  # counted, and refused by the size of the directory before it is
        monkeypatch.setattr(_bounds, "MAX_TENSORS", most)
        with pytest.raises(ValueError, match=rf"many.pt(: its directory has| lists) .* at most {most}"):
            adapters.inspect(tmp_path / "many.pt")
        with pytest.raises(ValueError, match=rf"many.npz(: its directory has| lists) .* at most {most}"):
            open_data(tmp_path / "many.npz:w3")
    monkeypatch.setattr("flowsolve.adapters.files.MAX_TENSORS", 250)
    with pytest.raises(ValueError, match=r"many.safetensors describes 300 tensors; expected at most 250"):
        adapters.inspect(tmp_path / "many.safetensors")


@pytest.mark.parametrize("text", [b"[" + b"{}," * 2_000_000 + b"{}]", b"[" * 2_500_000, b'{"a":' * 2_500_000])
def test_json_of_more_values_than_any_file_s(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "model_index.json").write_bytes(text)
    for reader, file in (
        (safetensors_header, tmp_path / "model.safetensors"),
        (adapters.inspect, tmp_path / "model.safetensors"),
        (read_json, tmp_path / "model_index.json"),
        (adapters.inspect, tmp_path),
    ):
        with (
            cheap(2 * len(text) + MIB),
            pytest.raises(ValueError, match=rf"{file}.* has some [24],\d+,\d+ values; expected at"),
        ):
            reader(file)


def test_long_json_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(200_000_000)
    with cheap(), pytest.raises(ValueError, match=r"config.json has 200,000,000 bytes; expected JSON of at most"):
        read_json(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**4000] * 20, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]},
    ],
)
def test_shapes_that_no_tensor_has(entry: Any, tmp_path: Path) -> None:
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match=r"model.safetensors describes tensor 'w' wrongly: .{1,500}$"):
        adapters.inspect(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [torch.zeros(1).expand(10**6, 10**6), {"a": torch.zeros(1).expand(10**6, 10**6)}])
def test_a_view_that_repeats_a_few_numbers(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"its tensor .* has 4,000,000,000,000 bytes, and the file"):
        Source.of(tmp_path / "data.pt")


@pytest.mark.parametrize("steps", STEPS, ids=repr)
def test_tables_of_more_steps_than_any(steps: Any, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from flowsolve.adapters.diffusers import Scheduler, alphas_cumprod, as_flow

    message = r"num_train_timesteps = .{1,40}; expected a whole number from 1 to 1,000,000"
    for part, content in (("unet/config", {"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1}),):
        (tmp_path / part).parent.mkdir()
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    save_file({"w": torch.zeros(1)}, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    (tmp_path / "scheduler").mkdir()
    for name in ("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler"):
        config = {"_class_name": name, "num_train_timesteps": steps}
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        for reader in (
            lambda: adapters.inspect(tmp_path),
            lambda: adapters.load(tmp_path / "unet", scheduler=config),  # noqa: B023
            lambda: as_flow(nn.Linear(2, 2), config),  # noqa: B023
            lambda: Scheduler.from_config(config),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=message):
                reader()
    with pytest.raises(ValueError, match=message):
        alphas_cumprod({"num_train_timesteps": steps, "beta_schedule": "linear"})
    if steps is not None:
        with pytest.raises(ValueError, match=message.replace("num_train_timesteps", "steps")):
            adapters.inspect(nn.Linear(2, 2), format="guided-diffusion", schedule="linear", steps=steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 10**9}, r"layers_per_block = 1000000000; expected at most 1,000 layers"),
        ({"layers_per_block": [2, [10**9]]}, r"layers_per_block = .*; expected at most 1,000 layers"),
        # 22 billion numbers, each layer of which could be had
        (
            {"block_out_channels": [16_000, 16_000]},
            r"describes a UNet2DModel of [\d,]{14} numbers, and they hold 463,249",
        ),
    ],
)
def test_a_configuration_of_a_larger_network_than_its_weights(changes: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    root = tmp_path / "model"
    shutil.copytree(adapters.bundled("digits-ddpm"), root)
    file = root / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        adapters.load(root)


@pytest.mark.parametrize("betas", [[], "linear", 0.1, [[0.1, 0.2]], ["a"], {"a": 1}], ids=repr)
def test_trained_betas_that_are_no_list(betas: Any) -> None:
    from flowsolve.adapters.diffusers import alphas_cumprod

    with pytest.raises(ValueError, match=r"trained_betas = .*; expected a list of 1 to 1,000,000 numbers"):
        alphas_cumprod({"beta_schedule": "linear", "trained_betas": betas})


def compressed(file: Path, array: Any) -> Path:
    np.savez_compressed(file, images=array)
    return file


def test_a_packed_array_is_unpacked_as_far_as_asked(tmp_path: Path) -> None:
    images = np.zeros((BOMB // 64, 1, 8, 8), np.uint8)
    images[:8] = np.random.default_rng(0).integers(0, 255, (8, 1, 8, 8))
    file = compressed(tmp_path / "bomb.npz", images)
    with cheap():
        found = open_data(file, limit=4)
        assert found.count == 4
        assert all(np.array_equal(found.read(i), images[i]) for i in range(4))
    found = open_data(file)
    assert found.count == len(images)
    assert np.array_equal(found.read(7), images[7])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("limit", [None, 3, 99])
def test_packed_arrays_are_what_was_saved(order: Any, limit: int | None, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 60_000, (5, 3, 6, 4)).astype(np.uint16)
    found = arrays.mapped(compressed(tmp_path / "a.npz", np.asarray(images, order=order)), limit=limit)
    assert found.dtype == images.dtype
    assert np.array_equal(found[:limit], images[:limit])


def test_a_packed_array_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "UNPACKED", MIB)
    file = compressed(tmp_path / "bomb.npz", np.zeros((BOMB // 64, 1, 8, 8), np.uint8))
    told = r"bomb.npz cannot be read as an array: it would unpack .* to 16,777,216; expected at most 1,048,576, or 100"
    with cheap(), pytest.raises(ValueError, match=told):
        open_data(file)
    random = np.random.default_rng(0).integers(0, 255, (2 * MIB // 64, 1, 8, 8)).astype(np.uint8)
    assert open_data(compressed(tmp_path / "honest.npz", random)).count == len(random)  # large, and all there


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_arrays_that_claim_what_is_not_there(method: int, tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", stream.getvalue() + bytes(64))
    told = (
        "it is packed as numpy does not" if method == zipfile.ZIP_LZMA else r"has 64,000,000,000,000 bytes, and there"
    )
    for limit in (None, 4):
        with cheap(), pytest.raises(ValueError, match=told):
            open_data(tmp_path / "a.npz", limit=limit)


@pytest.mark.parametrize("side", [10_000, 40_000])  # of which Pillow warns, and which it refuses
def test_a_picture_of_more_pixels_than_any(side: int, tmp_path: Path) -> None:
    pytest.importorskip("PIL")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side + 1)) if side > 10_000 else zlib.compress(bytes(side * (side + 1)))
    file = tmp_path / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    with cheap():
        found = open_data(tmp_path).read(0)
    assert "bomb.png: it claims more pixels than 89,478,485" in str(found)


def test_inspect_reads_no_more_data_than_it_is_asked(tmp_path: Path) -> None:
    for package in ("typer", "rich", "diffusers"):
        pytest.importorskip(package)
    from typer.testing import CliRunner

    from flowsolve.cli import build

    images = np.zeros((BOMB // 64, 1, 8, 8), np.uint8)
    images[:8] = np.random.default_rng(0).integers(0, 16, (8, 1, 8, 8))
    file = compressed(tmp_path / "bomb.npz", images)
    flow = adapters.load(adapters.bundled("digits-condot"))
    from flowsolve.cli import inspect

    with cheap():
        assert inspect._data(str(file), 4, flow).shape == (4, 1, 8, 8)
    result = CliRunner().invoke(build(), ["inspect", "digits-condot", "--data", str(packed(tmp_path / "data.pt"))])
    assert result.exit_code == 1
    assert "data.pt: its member" in result.output
