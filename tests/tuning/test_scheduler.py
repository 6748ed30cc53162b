"""Tuned solvers in a pipeline's loop, by name and by file, beside `fs.sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters
from flowsolve.fingerprint import marks
from flowsolve.solvers import Fitted, UniPC
from flowsolve.solvers.fitted import entry, sealed

diffusers = pytest.importorskip("diffusers")
from flowsolve.adapters.diffusers import Scheduler  # noqa: E402

N = 5


def tuned(flow: fs.Flow, file: Path) -> Any:
    """A file of one solver with some weights."""
    _, grid = fs.solvers.Auto().choose(flow.path, N)
    assert grid is not None
    rows = tuple(tuple(0.01 * (j - 1) for j in range(k + 1)) for k in range(N))
    fit = Fitted(UniPC(2), tuple(grid.times(flow.path, 0.0, 1.0, N)), rows, rows)
    told = sealed({"fingerprint": marks(flow), "provenance": {}, "solvers": [entry(fit)]})
    file.write_text(json.dumps(told), encoding="utf-8")
    return fs.solvers.load(file)


def loop(scheduler: Any, unet: Any, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("name", adapters.BUNDLED)
def test_a_pipeline_takes_the_steps_of_sample(name: str, tmp_path: Path) -> None:
    root = adapters.bundled(name)
    flow = adapters.load(root)
    solver = tuned(flow, tmp_path / "tuned.json")
    unet: Any = diffusers.UNet2DModel.from_pretrained(root, subfolder="unet").eval()
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = json.loads((root / "scheduler/scheduler_config.json").read_text())
    config["clip_sample"] = False
    with torch.no_grad():
        expected = fs.sample(flow, start=start, solver=solver, nfe=N).x
        for given in (solver, str(tmp_path / "tuned.json")):
            scheduler = Scheduler.from_config(config, solver=given)
            scheduler.set_timesteps(N)
            assert scheduler.nfe == N
            torch.testing.assert_close(loop(scheduler, unet, start), expected, rtol=1e-4, atol=1e-5)
        scheduler.save_config(str(tmp_path / "saved"))
        again = Scheduler.from_pretrained(tmp_path / "saved")
        again.set_timesteps(N)
        torch.testing.assert_close(loop(again, unet, start), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"tuned for {N} estimates"):
        scheduler.set_timesteps(N + 1)


def test_a_pipeline_on_another_path_is_refused(tmp_path: Path) -> None:
    tuned(adapters.load(adapters.bundled("digits-condot")), tmp_path / "tuned.json")
    table = diffusers.DDIMScheduler().config
    scheduler = Scheduler.from_config(table, solver=str(tmp_path / "tuned.json"))
    with pytest.raises(ValueError, match="another path"):
        scheduler.set_timesteps(N)


def test_a_pipeline_that_begins_within_takes_the_generic_steps(tmp_path: Path) -> None:
    """There is no history then: the steps are those of the base on the same times."""
    flow = adapters.load(adapters.bundled("digits-condot"))
    solver = tuned(flow, tmp_path / "tuned.json")
    fit = solver.fits[0]
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    config = json.loads((adapters.bundled("digits-condot") / "scheduler/scheduler_config.json").read_text())
    unet: Any = diffusers.UNet2DModel.from_pretrained(adapters.bundled("digits-condot"), subfolder="unet").eval()
    ends = []
    for given, grid in ((solver, None), (fit.base, list(fit.times))):
        scheduler = Scheduler.from_config(config, solver=given, grid=grid)
        scheduler.set_timesteps(N)
        scheduler.set_begin_index(N - 2)
        y = x
        with torch.no_grad():
            for t in scheduler.timesteps[N - 2 :]:
                y = scheduler.step(unet(scheduler.scale_model_input(y, t), t).sample, t, y).prev_sample
        ends.append(y)
    assert torch.equal(*ends)
