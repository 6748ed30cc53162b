"""Every snippet of docs/checkpoints.md runs, on tiny checkpoints under the names that it uses."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowsolve import adapters
from tests.adapters import tiny
from tests.adapters.test_edm import EDMPrecond
from tests.adapters.test_single_file import Tree
from tests.adapters.wrappers import load

GUIDE = Path(__file__).parents[2] / "docs/checkpoints.md"
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("torchcfm")
load("external")  # skips here what could not be skipped within the corpus
from tests.adapters.corpus import pipeline, scheduler, score_file  # noqa: E402


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mix(x) * t[:, None, None, None]  # type: ignore[no-any-return]


def prepare() -> dict[str, Any]:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    pipeline("unet", tiny.unet_condition, scheduler("DDIMScheduler"))(Path("stable-diffusion"))
    edm = EDMPrecond()
    edm.model.mix = nn.Conv2d(3, 3, 1)
    Path("edm-cifar10.pkl").write_bytes(pickle.dumps({"ema": edm}))
    torch.save(score_file(), "checkpoint_8.pth")
    torch.save(tiny.ADM(classes=10).state_dict(), "64x64_diffusion.pt")
    torch.save(tiny.DiT(classes=1001).state_dict(), "DiT-XL-2-256x256.pt")
    torch.save(tiny.SiT(classes=1001).state_dict(), "SiT-XL-2-256x256.pt")
    torch.save({"ema_model": Small().state_dict(), "step": 1}, "otcfm_cifar10_weights.pt")
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "t": {0: batch}}
    program = torch.export.export(Small(), (torch.zeros(4, 3, 32, 32), torch.zeros(4)), dynamic_shapes=shapes)
    torch.export.save(program, "net.pt2")
    save_file(tiny.ldm(), "model.safetensors", {"modelspec.prediction_type": "epsilon"})
    return dict(
        torch=torch,
        text=torch.randn(2, 5, 12),
        unet=tiny.unet_condition(),
        scheduler=diffusers.DDIMScheduler(),
        wrapper=load("external").VDenoiser(Small()),
        labels=torch.tensor([1, 2, 3, 4]),
        dit=tiny.DiT(classes=1001),
        sit=tiny.SiT(classes=1001),
        velocity=Small(),
        matcher=ConditionalFlowMatcher(sigma=0.0),
        ldm_unet=Tree(),
        net=Small(),
    )


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("torchcfm")
    names = prepare()
    text = GUIDE.read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    blocks = [(s.splitlines()[0], b) for s in sections for b in re.findall(r"```python\n(.*?)```", s, re.DOTALL)]
    assert len(blocks) >= 12
    for title, block in blocks:
        names["model"] = tiny.NCSNpp() if title == "score_sde" else tiny.ADM(classes=10)
        names.pop("sol", None)
        exec(compile(block, f"docs/checkpoints.md, {title}", "exec"), names)  # noqa: S102
        if "sol" in names:
            assert bool(names["sol"].x.isfinite().all())


def test_the_table_names_every_format() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    table = text[text.index("## Formats") : text.index("## What a checkpoint says")].lower()
    for name in adapters.FORMATS:
        if name not in ("plain", "stable-diffusion"):  # under other words
            assert name.replace("_", "-") in table.replace("_", "-"), name
