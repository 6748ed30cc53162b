"""Transforms of ẑ against torch.quantile and clamp by hand, and the relation that no solver may see broken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.guidance import ClassifierFree, Clip, Threshold, Transformed
from flowsolve.paths import CondOT, Path
from flowsolve.predictions import PREDICTIONS
from flowsolve.problems import GaussianMixture
from tests.cases import PATHS
from tests.guidance.labelled import MEANS, labelled, states, truth


@given(st.integers(0, 999), st.floats(0.01, 1.0), st.integers(1, 40))
def test_thresholding_is_the_papers_with_the_quantile_of_each_sample(seed: int, quantile: float, size: int) -> None:
    data = 2.0 * torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = torch.quantile(data.flatten(1).abs(), quantile, dim=1).clamp_min(1.0)[:, None, None]
    expected = torch.maximum(torch.minimum(data, s), -s) / s
    torch.testing.assert_close(Threshold(quantile)(data), expected, rtol=1e-12, atol=1e-12)
    moved = Threshold(quantile, low=0.0, high=4.0)(2.0 + 2.0 * data)
    torch.testing.assert_close(moved, 2.0 + 2.0 * expected, rtol=1e-12, atol=1e-12)
    limit = s.clamp_max(1.5)
    torch.testing.assert_close(
        Threshold(quantile, most=1.5)(data), torch.maximum(torch.minimum(data, limit), -limit) / limit
    )


def test_thresholding_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    data = 2.0 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Threshold(0.9, most=2.0)(data), scheduler._threshold_sample(data))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_the_transformed_estimate_is_consistent_for_every_path_and_prediction(name: str, prediction: str) -> None:
    path = PATHS[name]
    base = labelled(path, prediction)
    y = torch.tensor([1, 2, 3, 0, 0])
    for function in (Clip(-0.5, 0.7), Threshold(0.8, low=-0.5, high=0.5), torch.tanh):
        flow = Transformed(base, function)
        for t in (0.3, 0.55, 0.85):
            x, point = states(path, t), path.at(t)
            expected = function(truth(x, point.alpha, point.sigma, y))
            for when in (t, torch.full((5,), t, dtype=torch.float64)):
                found = flow.estimate(x, when, y=y)
                torch.testing.assert_close(found.data, expected, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(
                    found.noise, (x - point.alpha * expected) / point.sigma, rtol=1e-5, atol=1e-6
                )
                total = point.alpha * found.data + point.sigma * found.noise
                torch.testing.assert_close(total, x, rtol=1e-8, atol=1e-8)


def test_what_is_in_the_range_is_not_touched() -> None:
    """Not even by rounding: float32 near the data end, where ε̂ of a changed ẑ divides by σ."""
    base = labelled(paths.EDM())
    x = torch.full((5, 2), 0.25)
    flow = Transformed(base, Clip(-50.0, 50.0))
    y = torch.zeros(5, dtype=torch.int64)
    t = 0.999
    plain = base.estimate(x, t, y=y)
    found = flow.estimate(x, t, y=y)
    torch.testing.assert_close(found.noise, plain.noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.data, plain.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [CondOT(), paths.Trig()], ids=repr)
def test_at_the_clean_end_the_estimate_is_the_networks(path: Path) -> None:
    base = GaussianMixture(MEANS, 0.3).flow(path)
    flow = Transformed(base, Clip(-0.1, 0.1))
    x = states(path, 1.0)
    if path.sigma(1.0) == 0.0:
        torch.testing.assert_close(flow.velocity(x, 1.0), base.velocity(x, 1.0))
        t = torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0], dtype=torch.float64)
        found = flow.velocity(x, t)
        torch.testing.assert_close(found[::2], base.velocity(x, t)[::2])
        torch.testing.assert_close(found[1], flow.velocity(x, 0.5)[1])
    assert torch.isfinite(flow.velocity(x, 1.0)).all()
    assert torch.isfinite(flow.velocity(x, 0.0)).all()


SOLVERS: list[tuple[Any, dict[str, Any]]] = [
    (solvers.DDIM(), {"nfe": 10}), (solvers.DDPM(), {"nfe": 10}), (solvers.ExactSDE(), {"nfe": 10}),
    (solvers.UniPC(order=2), {"nfe": 10, "grid": "log_snr"}), (solvers.Heun(), {"nfe": 10}),
    (solvers.Dopri5(1e-4, 1e-4), {}), ("auto", {"nfe": 10}),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=lambda v: repr(v)[:16])
def test_every_solver_takes_it_after_guidance(solver: Any, options: dict[str, Any]) -> None:
    """Clipping comes once, after the extrapolation; a last step that ends in ẑ ends in the range."""
    path = CondOT()
    wild = ClassifierFree(labelled(path), 9.0, unconditional={"y": 0})
    flow = Transformed(wild, Clip(-1.0, 1.0))
    doubled = {k: 2 * v if k == "nfe" else v for k, v in options.items()}
    y = torch.tensor([1, 2, 3, 1, 2])
    sol = fs.sample(flow, (5, 2), solver=solver, cond={"y": y}, **doubled)
    assert bool(sol.ok.all())
    assert float(sol.x.abs().max()) <= (1.0 + 1e-5 if isinstance(solver, solvers.DDIM) else 1.5)
    assert float(fs.sample(wild, (5, 2), solver=solver, cond={"y": y}, **doubled).x.abs().max()) > 1.5
    if "nfe" in options:
        assert sol.nfe.tolist() == [20] * 5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda f: Transformed(f, Clip), TypeError, "function is .*Clip"),
        (lambda f: Transformed(f.net, torch.tanh), TypeError, "expected a flowsolve.Flow"),
        (lambda f: Transformed(f, lambda z: z[:, :1]).data(torch.ones(2, 2), 0.5), ValueError, r"returned \(2, 1\)"),
        (lambda f: Clip(1.0, -1.0), ValueError, "low < high"),
        (lambda f: Threshold(0.0), ValueError, "quantile = 0.0"),
        (lambda f: Threshold(0.9, 1.0, 0.0), ValueError, "low < high"),
        (lambda f: Threshold(most=0.5), ValueError, "most = 0.5"),
    ],
)
def test_bad_settings_say_what_is_wrong(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(GaussianMixture(MEANS, 0.3).flow(CondOT()))
    assert math.isinf(Threshold().most)
