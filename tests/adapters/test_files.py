"""Nothing in a file runs, and every broken, oversize, mismatched or malicious file is an error that names it."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import flowsolve as fs
from flowsolve import adapters
from flowsolve.adapters.diffusers.weights import shards
from flowsolve.adapters.files import Source, safetensors_header
from flowsolve.adapters.pickles import opcodes
from tests.adapters import tiny

diffusers = pytest.importorskip("diffusers")

SAID: dict[str, Any] = {"path": fs.paths.CondOT(), "prediction": "velocity"}


class Bomb:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


class Time(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * t[:, None]


def bombed(root: Path, target: Path) -> list[Path]:
    """The bomb in every kind of file that may hold a pickle."""
    weights = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    files = [root / n for n in ("net.pkl", "edm.pkl", "zip.pt", "zip.ckpt", "zip.pth", "old.pt", "old.bin")]
    files[0].write_bytes(pickle.dumps(Bomb(target)))
    files[1].write_bytes(pickle.dumps({"ema": Bomb(target), "class": "EDMPrecond"}, protocol=2))
    for file in files[2:5]:
        torch.save({"state_dict": weights, "callbacks": Bomb(target)}, file)
    for file in files[5:]:
        torch.save({**weights, "extra": Bomb(target)}, file, _use_new_zipfile_serialization=False)
    return files


def test_a_malicious_pickle_never_runs(tmp_path: Path) -> None:
    """Not by inspect, not by load, with any format and any declaration short of trust_pickle."""
    target = tmp_path / "executed"
    for file in bombed(tmp_path, target):
        for said in ({}, {**SAID, "net": nn.Linear(2, 2)}, {"format": "edm"}, {"format": "plain", **SAID}):
            try:
                adapters.inspect(file, **said)
            except ValueError as error:
                assert str(file) in str(error)  # noqa: PT017
            with pytest.raises(ValueError, match="trust_pickle=True") as caught:
                adapters.load(file, **(said or {"net": nn.Linear(2, 2), "format": "plain", **SAID}))
            assert "mkdir" in str(caught.value) or "edm" in str(caught.value)
            assert not target.exists(), file
    bomb = tmp_path / "zip.pt"
    with pytest.raises(TypeError, match="expected the torch module"):
        adapters.load(bomb, trust_pickle=True, net=lambda x, t: x, **SAID)
    assert target.exists()  # the bomb is a real one: trust runs it


def test_a_malicious_pickle_in_a_diffusers_directory(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    root = tmp_path / "model"
    diffusers.DDPMPipeline(unet=tiny.unet(), scheduler=diffusers.DDPMScheduler()).save_pretrained(root)
    (root / "unet/diffusion_pytorch_model.safetensors").unlink()
    weights = {**tiny.unet().state_dict(), "extra": Bomb(target)}
    for old in (True, False):
        torch.save(weights, root / "unet/diffusion_pytorch_model.bin", _use_new_zipfile_serialization=not old)
        for trust in (False, True):  # even trust does not make a pickle out of weights
            with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin is a pickle that imports .*mkdir"):
                adapters.load(root, trust_pickle=trust)
        with pytest.raises(ValueError, match=r"it may execute code when read"):
            adapters.inspect(root)
        assert not target.exists()


def test_opcodes_name_what_would_be_imported(tmp_path: Path) -> None:
    for protocol in range(6):
        names, words = opcodes(pickle.dumps({"ema": Bomb(tmp_path / "x")}, protocol=protocol), tmp_path)
        assert [n.rpartition(".")[2] for n in names if "mkdir" in n] == ["mkdir"]
        assert "ema" in words
    # a name that is put together at run time cannot be listed: it is shown as unknown, which is not plain
    names, _ = opcodes(b"\x80\x04K\x01K\x02\x93.", tmp_path)
    assert names == ("?",)
    file = tmp_path / "memo.pkl"
    file.write_bytes(b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.")
    assert Source.of(file).unsafe == ("os.system",)


def test_plain_torch_files_are_read_as_data(tmp_path: Path) -> None:
    """New and old archives, wrapped or bare, with prefixes of parallel training and compiling."""
    net = nn.Linear(2, 2)
    state = net.state_dict()
    for i, content in enumerate(
        (
            state,
            {"state_dict": state, "epoch": 3},
            {"model": {f"module.{k}": v for k, v in state.items()}},
            {"ema": {f"_orig_mod.{k}": v for k, v in state.items()}, "model": {k: 0 * v for k, v in state.items()}},
        )
    ):
        for old in (True, False):
            file = tmp_path / f"{i}{old}.pt"
            torch.save(content, file, _use_new_zipfile_serialization=not old)
            looked = Source.of(file)
            assert looked.unsafe == ()
            assert {k: tuple(v.shape) for k, v in looked.state().items()} == {"weight": (2, 2), "bias": (2,)}
            assert torch.equal(looked.state()["weight"], state["weight"])


def rewrite(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", r"is truncated: 3 bytes"),
        (
            struct.pack("<Q", 1 << 40) + b"{}",
            r"claims a header of 1,099,511,627,776 bytes; expected at most",
        ),
        (struct.pack("<Q", 5000) + b"{}", r"is truncated: its header should have 5,000 bytes"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, r"tensor 'w' ends at byte"),
        ({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, r"do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 16]}}, r"do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, r"do not fit its shape"),
        ({"w": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, r"describes tensor 'w' wrongly"),
        ({"w": [1, 2]}, r"describes tensor 'w' wrongly"),
        ({"__metadata__": [1]}, r"has metadata that are a list"),
        (b"[1]", r"header that is a list; expected an object"),
        (b"{broken", r"not valid JSON"),
        (b'{"a":' * 20_000, r"not valid JSON"),
    ],
)
def test_safetensors_headers(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "broken.safetensors"
    if isinstance(content, dict) or (isinstance(content, bytes) and content[:1] in b"[{"):
        rewrite(file, content)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken.safetensors .*{message}|broken.safetensors gives .*{message}"):
        safetensors_header(file)
    with pytest.raises(ValueError, match=r"broken.safetensors"):
        adapters.load(file, net=nn.Linear(2, 2), **SAID)


def test_headers_agree_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros((), dtype=torch.bool),
    }
    save_file(tensors, str(tmp_path / "x.safetensors"), {"k": "v"})
    metadata, shapes = safetensors_header(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    assert shapes == {"a": (2, 3), "b": (4,), "c": ()}


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    """The library's own error does not say which file it is about."""
    file = tmp_path / "grown.safetensors"
    save_file({"a": torch.zeros(2, 3)}, str(file))
    file.write_bytes(file.read_bytes() + b"12345")
    for read in (safetensors_header, lambda f: adapters.load(f, net=nn.Linear(2, 2), **SAID)):
        with pytest.raises(ValueError, match=r"grown.safetensors has 5 bytes after its last tensor"):
            read(file)


def test_tensors_that_share_bytes(tmp_path: Path) -> None:
    file = tmp_path / "shared.safetensors"
    header = json.dumps({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"shared.safetensors has tensors that overlap"):
        safetensors_header(file)


@pytest.mark.parametrize("cut", [10, 100, 300])
def test_truncated_torch_files(tmp_path: Path, cut: int) -> None:
    for old in (True, False):
        file = tmp_path / f"cut{old}.pt"
        torch.save(nn.Linear(8, 8).state_dict(), file, _use_new_zipfile_serialization=not old)
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(ValueError, match=rf"cut{old}.pt"):
            adapters.load(file, net=nn.Linear(8, 8), **SAID)


def test_other_files(tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "notes.txt").write_text("hello, world")
    with pytest.raises(ValueError, match=r"notes.txt is neither safetensors, a torch archive nor a pickle"):
        adapters.load(tmp_path / "notes.txt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(ValueError, match=r"a.zip is a zip file, but no torch archive"):
        adapters.load(tmp_path / "a.zip")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.pt is neither"):
        adapters.load(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:x", "a\\b", ""]
)
def test_an_index_may_not_reach_out(tmp_path: Path, name: str) -> None:
    root = tmp_path / "model"
    diffusers.DDPMPipeline(unet=tiny.unet(), scheduler=diffusers.DDPMScheduler()).save_pretrained(root)
    weights = root / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "secret.safetensors")
    index = root / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
    for look in (adapters.inspect, adapters.load):
        with pytest.raises(ValueError, match=r"index.json names .* may not reach out of its directory"):
            look(root)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "absent.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names 'absent.safetensors', which is missing"):
        shards(root / "unet")
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match=r"has no weight_map"):
        shards(root / "unet")


def test_truncated_and_mismatched_weights_in_a_directory(tmp_path: Path) -> None:
    root = tmp_path / "model"
    diffusers.DDPMPipeline(unet=tiny.unet(), scheduler=diffusers.DDPMScheduler()).save_pretrained(root)
    file = root / "unet/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is truncated"):
        adapters.load(root)
    state = tiny.unet().state_dict()
    save_file({k: v for k, v in state.items() if k != "conv_in.weight"}, str(file))
    with pytest.raises(ValueError, match=r"safetensors do not belong to .*config.json.*conv_in.weight"):
        adapters.load(root)
    save_file({**state, "conv_in.bias": torch.zeros(9)}, str(file))
    with pytest.raises(ValueError, match=r"safetensors do not belong to .*conv_in.bias"):
        adapters.load(root)
    save_file({**state, "extra": torch.zeros(2)}, str(file))
    with pytest.raises(ValueError, match=r"safetensors do not belong to .*1 unexpected keys \(extra\)"):
        adapters.load(root)
    (root / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index.json is not valid JSON"):
        adapters.load(root)


@given(st.sampled_from(["new.pt", "old.pt", "net.safetensors"]), st.data())
def test_a_damaged_file_is_a_clear_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: Any
) -> None:
    """Whatever bytes are changed or cut, the answer is a ValueError that names the file, or weights."""
    file = tmp_path_factory.mktemp("damaged") / name
    state = nn.Linear(2, 2).state_dict()
    if name == "net.safetensors":
        save_file(state, str(file))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name == "new.pt")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        adapters.load(file, net=nn.Linear(2, 2), **SAID)
    except ValueError as error:
        assert name in str(error)  # noqa: PT017


def test_a_whole_module_needs_trust(tmp_path: Path) -> None:
    torch.save(Time(), tmp_path / "module.pt")
    with pytest.raises(adapters.Unrecognised, match=r"trust_pickle=True \(it imports .*Time"):
        adapters.load(tmp_path / "module.pt", **SAID)
    flow = adapters.load(tmp_path / "module.pt", trust_pickle=True, **SAID)
    assert torch.equal(flow.velocity(torch.ones(2, 1), 0.5), torch.full((2, 1), 0.5))


def test_weights_that_are_not_numbers_are_named() -> None:
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"weight 'net.bias' of shape \(2,\) holds NaN"):
        fs.adapters.load(net, path=fs.paths.CondOT(), prediction="velocity", format="plain", time="flow")
