"""Conditions on the command line: labels, arrays and guidance give what the same call in Python gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flowsolve as fs
from flowsolve.adapters.diffusers import save
from flowsolve.cli import build

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("PIL")

LABELS = torch.tensor([0, 1, 0, 1, 0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=4,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("classes") / "net"
    save(unet, diffusers.DDPMScheduler(), out, "DDPMPipeline")
    return out


def run(*words: Any) -> Any:
    return CliRunner().invoke(build(), [str(w) for w in words])


def drawn(checkpoint: Path, out: Path, *words: Any) -> np.ndarray[Any, Any]:
    done = run("sample", checkpoint, "--out", out, "-n", 5, "--nfe", 4, "--batch", 2, "--raw", "--no-progress", *words)
    assert done.exit_code == 0, done.output
    with np.load(out / "samples.npz") as file:
        return file["x"]


def test_labels_and_guidance(checkpoint: Path, tmp_path: Path) -> None:
    flow = fs.adapters.load(checkpoint)
    expected = fs.sample(flow, (5, 1, 8, 8), nfe=4, cond={"class_labels": LABELS}).x
    found = drawn(checkpoint, tmp_path / "labels", "--class", "0,1")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    np.savez(tmp_path / "cond.npz", class_labels=LABELS.numpy())
    assert np.array_equal(drawn(checkpoint, tmp_path / "arrays", "--cond", tmp_path / "cond.npz"), found)
    guided = fs.guidance.ClassifierFree(flow, 3.0, unconditional={"class_labels": torch.tensor([3])})
    expected = fs.sample(guided, (5, 1, 8, 8), nfe=4, cond={"class_labels": LABELS}).x
    found = drawn(checkpoint, tmp_path / "guided", "--class", "0,1", "--guidance", 3, "--null-class", 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_other_labels_do_not_go_on_with_a_run(checkpoint: Path, tmp_path: Path) -> None:
    drawn(checkpoint, tmp_path, "--class", "0,1")
    done = run("sample", checkpoint, "--out", tmp_path, "-n", 5, "--nfe", 4, "--batch", 2, "--raw", "--class", "2")
    assert done.exit_code == 1
    assert "cond" in done.output


def test_what_is_missing_or_wrong_is_said(checkpoint: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "cond.npz", class_labels=LABELS.numpy())
    np.save(tmp_path / "odd.npy", LABELS.numpy())
    for words, match in (
        ((), "--class gives class labels and --cond FILE.npz"),
        (("--class", "a"), "expected whole numbers between commas"),
        (("--guidance", 2), "--guidance goes with --class and with --null-class"),
        (("--class", "1", "--guidance", 2), "--null-class, the label that stands for no class"),
        (("--class", "1", "--cond", tmp_path / "cond.npz"), "say the same; give one"),
        (("--cond", tmp_path / "odd.npy"), "expected an .npz of arrays"),
        (("--cond", tmp_path / "none.npz"), "none.npz"),
    ):
        done = run("sample", checkpoint, "--out", tmp_path / "run", "-n", 5, "--nfe", 4, "--no-progress", *words)
        assert done.exit_code == 1
        assert match in done.output.replace("\n", " "), done.output


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of Stable Diffusion, small, with a tokenizer of letters and a text encoder."""
    from tests.adapters.pipelines import prompted

    root = tmp_path_factory.mktemp("painter")
    prompted(root / "letters").save_pretrained(root / "pipe")
    return root / "pipe"


def test_prompts_are_those_of_the_pipeline(painter: Path, tmp_path: Path) -> None:
    """Two in turn, guided: what the pipeline's own encode_prompt and guidance in Python give."""
    result = run(
        "sample", painter, "--out", tmp_path / "out", "--n", 3, "--prompt", "a cat", "--prompt", "dog", "--guidance", 3,
        "--negative-prompt", "bad", "--solver", "ddim", "--nfe", 8, "--raw", "--no-progress", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(painter)
    texts, nothing = pipe.encode_prompt(["a cat", "dog", "a cat"], "cpu", 1, True, ["bad"] * 3)
    flow = fs.guidance.ClassifierFree(
        fs.adapters.load(painter), 3.0, unconditional={"encoder_hidden_states": nothing[:1]}
    )
    sol = fs.sample(flow, shape=(3, 4, 8, 8), solver="ddim", nfe=8, seed=0, cond={"encoder_hidden_states": texts})
    found = torch.from_numpy(np.load(tmp_path / "out/samples.npz")["x"])
    torch.testing.assert_close(found, sol.x, rtol=1e-4, atol=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_the_size_of_a_prompt_s_picture(painter: Path, tmp_path: Path) -> None:
    result = run("sample", painter, "--out", tmp_path / "out", "--n", 1, "--prompt", "a cat", "--shape", "4,12,8",
                 "--nfe", 4, "--raw", "--no-progress", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "out/samples.npz")["x"].shape == (1, 4, 12, 8)


@pytest.mark.parametrize(("words", "says"), [
    (("--prompt", "a", "--class", "1"), "--prompt goes without --class"),
    (("--prompt", "a", "--negative-prompt", "b"), "--negative-prompt goes with --guidance"),
    (("--negative-prompt", "b", "--guidance", "2"), "--negative-prompt goes with --prompt and --guidance"),
    (("--prompt", "a", "--shape", "3,8,8"), r"has shape (4, 8, 8); found --shape (3, 8, 8)"),
])  # fmt: skip
def test_prompts_that_are_refused(painter: Path, tmp_path: Path, words: Any, says: str) -> None:
    result = run("sample", painter, "--out", tmp_path / "out", "--n", 1, "--nfe", 2, *words)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())


def test_a_directory_without_prompts(checkpoint: Path, tmp_path: Path) -> None:
    result = run("sample", checkpoint, "--out", tmp_path / "out", "--n", 1, "--nfe", 2, "--prompt", "a cat")
    assert result.exit_code == 1
    assert "takes no prompt for a network that is known" in " ".join(result.output.split())
