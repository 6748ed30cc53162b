"""`flowsolve inspect`: the finding as a table of 80 columns, as JSON, and checked on data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowsolve import adapters
from flowsolve.cli import build
from flowsolve.cli._declared import declared
from flowsolve.flow import Flow
from flowsolve.paths import VP, CondOT
from flowsolve.transforms import Latent
from tests.adapters import tiny
from tests.adapters.tiny import ADM

for package in ("typer", "rich", "diffusers", "sklearn"):
    pytest.importorskip(package)


def run(*arguments: str, columns: int = 80) -> Any:
    from typer.testing import CliRunner

    return CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(build(), ["inspect", *arguments])


def table(output: str) -> dict[str, str]:
    """The rows of the table, continued lines joined."""
    found: dict[str, str] = {}
    name = ""
    for line in output.splitlines()[1:]:
        what, value = line[:20].strip(), line[20:].strip()
        if what:
            name = what
            found[name] = value
        elif value and name:
            found[name] += f" {value}"
    return found


@pytest.mark.parametrize("name", adapters.BUNDLED)
def test_bundled_checkpoints_at_80_columns(name: str) -> None:
    result = run(name, "--data", "digits")
    assert result.exit_code == 0, result.output
    assert all(len(line.rstrip()) <= 80 for line in result.output.splitlines()[1:])  # the first is the directory
    found = table(result.output)
    assert (found["format"], found["confidence"], found["parameters"]) == ("diffusers", "1.00", "463,249")
    assert (found["data range"], found["levels"]) == ("−1 … 1", "17")
    assert found["check"].startswith("the declared conventions fit: relative error 0.5")
    if name == "digits-ddpm":
        assert found["path"] == "Discrete, 1000 steps, ᾱ from 0.9999 to 4.03583e-05"
        assert found["λ, noise to data"] == "−5.059 … 4.605"
        assert found["prediction"] == "noise"
        assert found["native time"] == "999 … 0   (the index of the table)"
        assert "DDPMScheduler: num_train_timesteps = 1000, beta_schedule = linear" in found["evidence"]
    else:
        assert found["path"] == "CondOT(sigma_min=0.0)"
        assert found["λ, noise to data"] == "−∞ … ∞"
        assert found["native time"] == "1000 … 0   (1000 (1 − t))"


def test_json() -> None:
    result = run("digits-condot", "--json", "--data", "digits", "--count", "16")
    told = json.loads(result.output)
    assert told["loads"] is True
    assert told["path"] == "CondOT(sigma_min=0.0)"
    assert told["native_time"] == [1000.0, 0.0]
    assert told["check"]["ok"] is True


def test_a_false_declaration_fails_the_check() -> None:
    result = run("digits-ddpm", "--data", "digits", "--declare", "prediction=v")
    assert result.exit_code == 1
    found = table(result.output)
    assert "prediction= declared: v instead of noise" in found["evidence"]
    assert "the declared conventions do not fit" in found["check"]
    assert "prediction 'noise' instead of 'v'" in found["check"]


def test_a_conditioned_network_keeps_its_table(tmp_path: Path) -> None:
    import diffusers

    tiny.unet_condition(in_channels=1, out_channels=1).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    result = run(str(tmp_path), "--data", "digits")
    assert result.exit_code == 1
    found = table(result.output)
    assert found["prediction"] == "noise"
    assert found["check"].startswith("could not be run (")
    assert "encoder_hidden_states" in found["check"]


def test_what_is_missing_and_how_to_declare_it(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(ADM().state_dict(), file)
    result = run(str(file))
    assert result.exit_code == 1
    found = table(result.output)
    assert found["format"] == "guided-diffusion"
    assert found["path"] == "not stated"
    assert "schedule='linear' or 'cosine'" in found["to be declared"]
    found = table(run(str(file), "--declare", "schedule=cosine", "--declare", "steps=4000").output)
    assert found["path"].startswith("Discrete, 4000 steps")
    assert "schedule=" not in found["to be declared"]
    assert "net=" in found["to be declared"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is not a directory or file on this machine"),
        (["digits-ddpm", "--format", "jax"], "format = 'jax'; expected one of"),
        (["digits-ddpm", "--declare", "prediction"], "expected KEY=VALUE"),
        (["digits-ddpm", "--declare", "path=Line()"], "path='Line()' is no path: expected one of EDM, VE"),
        (["digits-ddpm", "--declare", "path=__import__('os')"], "is no path"),
        (["digits-ddpm", "--declare", "path=VP(beta=3)"], "unexpected keyword argument 'beta'"),
        (["digits-ddpm", "--data", "images.zip"], "expected 'digits' or a .npy"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("flowsolve inspect: ")
    assert message in result.output


def test_data_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from flowsolve.cli.inspect import _data

    flow = Flow(lambda x, t: x, CondOT())
    images = torch.arange(48, dtype=torch.uint8).reshape(3, 1, 4, 4)
    np.save(tmp_path / "a.npy", images.numpy())
    np.savez(tmp_path / "b.npz", x=images.numpy())
    torch.save(images, tmp_path / "c.pt")
    save_file({"x": images}, str(tmp_path / "d.safetensors"))
    for name in ("a.npy", "b.npz", "c.pt", "d.safetensors"):
        found = _data(str(tmp_path / name), 2, flow)
        assert torch.equal(found, (images[:2].float() + 0.5) / 128.0 - 1.0)
    floats = torch.randn(3, 2)
    torch.save(floats, tmp_path / "e.pt")
    assert torch.equal(_data(str(tmp_path / "e.pt"), 5, flow), floats)
    torch.save({"x": floats}, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"f.pt holds no array"):
        _data(str(tmp_path / "f.pt"), 5, flow)
    codes = Flow(lambda x, t: x, CondOT(), transform=Latent(0.5))
    for name, words in (
        ("digits", "--data digits are images, .* takes codes"),
        ("a.npy", "models codes of an auto"),
    ):
        with pytest.raises(ValueError, match=words):
            _data(name if name == "digits" else str(tmp_path / name), 2, codes)


def test_declarations() -> None:
    said = declared(["path=VP(0.2, beta_max=16)", "steps=4000", "schedule=cosine", "rescale_timesteps=True"])
    assert said == {"path": VP(0.2, 16), "steps": 4000, "schedule": "cosine", "rescale_timesteps": True}
    assert declared(["path=CondOT"]) == {"path": CondOT()}
    assert declared(["transform=Latent((0.5, 2), shift=1)"]) == {"transform": Latent((0.5, 2.0), 1)}
