"""A corpus of generated checkpoints in every format: each is read right, or refused; none is read wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from flowsolve import adapters
from flowsolve.adapters.finding import THRESHOLD
from tests.adapters import tiny
from tests.adapters.wrappers import load

pytest.importorskip("diffusers")
load("external")  # skips here what could not be skipped within the corpus
from tests.adapters.corpus import CORPUS  # noqa: E402


@pytest.mark.parametrize("name", CORPUS)
def test_right_or_refused(tmp_path: Path, name: str) -> None:
    """With what has to be declared the finding is exact; without it nothing loads, and the message asks for it."""
    case = CORPUS[name]
    source = case.make(tmp_path / name)
    if case.refused is not None:
        with pytest.raises(adapters.Unrecognised, match=case.refused) as caught:
            adapters.load(source, **case.said)
        assert caught.value.finding.format == case.format
        return
    finding = adapters.inspect(source, **case.said)
    assert finding.format == case.format
    assert finding.path == case.path
    assert finding.prediction is not None
    assert finding.prediction.name == case.prediction
    assert finding.native == pytest.approx(case.native, rel=1e-6, abs=1e-9)
    assert finding.confidence >= THRESHOLD
    assert finding.ready, finding.missing
    assert finding.evidence
    for left_out in [k for k in case.said if k not in ("rescale_timesteps", "steps")]:
        fewer = {k: v for k, v in case.said.items() if k != left_out}
        asks = f"{left_out}=|takes no|not recognised|looks like plain"
        with pytest.raises((adapters.Unrecognised, TypeError), match=asks):
            adapters.load(source, **fewer)


@pytest.mark.parametrize("name", [n for n, c in CORPUS.items() if c.refused is None])
def test_every_wrong_format_is_contradicted_or_asks_for_more(tmp_path: Path, name: str) -> None:
    """A format that the files are not of never yields a flow by itself."""
    case = CORPUS[name]
    source = case.make(tmp_path / name)
    for wrong in ("diffusers", "edm", "k-diffusion", "score_sde", "guided-diffusion", "sit", "torchcfm", "export"):
        if wrong == case.format or (wrong == "edm" and isinstance(source, nn.Module)):
            continue
        with pytest.raises((ValueError, FileNotFoundError)):
            adapters.load(source, format=wrong)


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 40
    assert len({c.format for c in CORPUS.values()}) >= 12


def test_unknown_formats_and_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format = 'jax'; expected one of diffusers, edm"):
        adapters.load(tmp_path, format="jax")
    assert adapters.inspect(tiny.DiT(), format="DiT").format == "dit"
    with pytest.raises(TypeError, match="no adapter takes shedule; what can be declared is"):
        adapters.load(tmp_path, shedule="linear")
    with pytest.raises(TypeError, match="dtype = 'half'"):
        adapters.load(tmp_path, dtype="half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path is 'VP'; expected a flowsolve"):
        adapters.load(lambda x, t: x, path="VP", prediction="noise", time="native")


def test_what_is_declared_is_evidence() -> None:
    finding = adapters.inspect(adapters.bundled("digits-ddpm"), prediction="v", data_range=(0.0, 1.0))
    assert finding.evidence[-2:] == (
        "prediction= declared: v instead of noise",
        "data_range= declared: (0.0, 1.0) instead of (-1.0, 1.0)",
    )
    flow = finding.flow()
    assert (flow.prediction.name, flow.data_range) == ("v", (0.0, 1.0))


def test_a_summary_is_plain_json() -> None:
    for name in adapters.BUNDLED:
        told = json.loads(json.dumps(adapters.inspect(adapters.bundled(name)).summary()))
        assert told["loads"] is True
        assert told["parameters"] == 463_249
    assert told["log_snr"] == [None, None]
    assert adapters.inspect(lambda x, t: x).summary()["loads"] is False
