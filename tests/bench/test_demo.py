"""The demonstration end to end, small, on the real bundled checkpoints."""

import json
import math
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from flowsolve import adapters, paths, solvers
from flowsolve.bench import nfe_error_curves, reference
from flowsolve.cli import build
from flowsolve.problems import GaussianMixture

MIXTURE = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], 0.4, dtype=torch.float32)


def test_curves_measure_the_distance_to_the_flow_s_endpoint():
    flow = MIXTURE.flow(paths.CondOT())
    target = reference(flow, (16, 2), seed=3)
    assert target.uncertainty < 1e-5
    adaptive = {"dopri5": lambda tolerance: solvers.Dopri5(rtol=tolerance, atol=tolerance)}
    fixed = {"euler": solvers.Euler(), "rk4": solvers.RK4()}
    euler, rk4, dopri5 = nfe_error_curves(flow, target, fixed, (2, 16, 64), adaptive, (1e-2, 1e-4), seed=3)
    assert euler.nfe == [2, 16, 64]
    assert rk4.nfe == [16, 64]  # 2 evaluations are no step of RK4
    assert euler.rmse[1] / euler.rmse[2] == pytest.approx(4.0, rel=0.3)  # order 1
    assert rk4.rmse[1] < euler.rmse[2]
    assert dopri5.nfe[0] < dopri5.nfe[1]
    assert dopri5.rmse[0] > dopri5.rmse[1]
    assert all(m <= 2 * r for c in (euler, rk4, dopri5) for m, r in zip(c.median, c.rmse, strict=True))


def test_the_demonstration_writes_a_page_pictures_and_a_record(tmp_path, monkeypatch):
    quick = partial(reference, nfe=64)
    monkeypatch.setattr("flowsolve.bench.demo.reference", quick)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(build(), ["demo", "--images", "4", "--samples", "2"])
    assert result.exit_code == 0, result.output
    assert "digits-condot" in result.output
    assert all(name in result.output for name in ("auto", "UniPC", "DPM-Solver++", "Euler (DDIM)", "RK4"))
    assert max(map(len, result.output.splitlines())) <= 80
    out = tmp_path / "demo"
    record = json.loads((out / "demo.json").read_text())
    assert record["environment"]["torch"] == torch.__version__
    for name, found in zip(adapters.BUNDLED, record["results"], strict=True):
        assert found["checkpoint"] == name
        assert 1.0 < found["bits_per_dim"]["mean"] < math.log2(17)  # better than a uniform guess
        assert found["bits_per_dim"]["images"] == 4
        by_name = {c["name"]: c for c in found["curves"]}
        assert by_name["Euler (DDIM)"]["rmse"][-1] < 0.1 < by_name["Euler (DDIM)"]["rmse"][0]
        assert all(by_name[c]["nfe"] == [4, 8, 16, 32, 64] for c in ("auto", "UniPC", "DPM-Solver++", "RK4"))
        assert by_name["auto"]["rmse"][2] < 0.5 * by_name["Euler (DDIM)"]["rmse"][2]
        assert (out / f"{name}-samples.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert all(f"{name}-samples.png" in page for name in adapters.BUNDLED)
    assert "nfe-error.png" in page
    assert (out / "nfe-error.png").stat().st_size > 10_000
