"""Directories as they are published: what a `model_index.json` names, and what loading makes of it.

`indexes.json` holds facts of public files: the pipeline's class, the classes of its network and scheduler, with what
decides (channels, the prediction, a mark), and where they were found. `reading` is what they mean: the prediction of
the flow, or the words of the refusal. Weights are one number; inspection reads no more.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowsolve import adapters

PUBLISHED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "indexes.json").read_text(encoding="utf-8"))


def names(entry: dict[str, Any]) -> str:
    return str(entry["model"])


def written(entry: dict[str, Any], root: Path) -> Path:
    """The directory."""
    index = entry["index"]
    (root / "model_index.json").write_text(json.dumps(index))
    for part, value in index.items():
        if not isinstance(value, list) or part == "_class_name" or value[1] == "OnnxRuntimeModel":
            continue
        (root / part).mkdir()
        config = {"_class_name": value[1]}
        if part == "scheduler":
            (root / part / "scheduler_config.json").write_text(json.dumps({**config, **entry.get("scheduler", {})}))
        else:
            own = entry.get("network", {}) if part in ("unet", "transformer", "prior", "decoder") else {}
            (root / part / "config.json").write_text(json.dumps({**config, **own}))
            save_file({"weight": torch.zeros(1)}, root / part / "diffusion_pytorch_model.safetensors")
    return root


def test_there_are_forty_and_more() -> None:
    assert len({names(p) for p in PUBLISHED}) >= 40
    assert all(p["source"] for p in PUBLISHED)


@pytest.mark.parametrize("entry", PUBLISHED, ids=names)
def test_the_reading(entry: dict[str, Any], tmp_path: Path) -> None:
    root, meant = written(entry, tmp_path), entry["reading"]
    if "refused" in meant:
        try:
            said = str(adapters.inspect(root).refusal)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
        assert re.search(meant["refused"], said), said
        return
    finding = adapters.inspect(root)
    assert finding.ready, (finding.refusal, finding.missing)
    assert finding.prediction is not None
    assert finding.prediction.name.startswith(meant["prediction"]), finding.prediction.name
    assert any(str(entry["index"]["_class_name"]).strip("[]'").split("'")[-1] in e for e in finding.evidence)
