"""Rules that are not linear, against the papers' formulas written out, and diffusers' own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.guidance import APG, Autoguidance, ClassifierFree, ZeroStar
from flowsolve.paths import CondOT, Path

SHAPE = (4, 3, 5, 2)
CASES = [
    (paths.VP(), "noise", 0.5), (CondOT(), "velocity", 0.3), (paths.EDM(), "data", 0.7), (paths.Cosine(), "v", 0.6),
    (paths.VE(), "score", 0.6), (CondOT(), "velocity", 0.0),
]  # fmt: skip


def pair(path: Path, prediction: str, t: float) -> tuple[fs.Flow, Tensor, Tensor, Tensor]:
    """A network with one of two fields by its label, a state, and the ẑ of both, (B, *S)."""
    generator = torch.Generator().manual_seed(0)
    phase, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (SHAPE[1:], SHAPE))
    x = 1.2 * (path.sigma(t) + path.alpha(t)) * x

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(per(y) > 0, torch.sin(3.0 * x + phase), torch.cos(2.0 * x - phase))

    flow = fs.Flow(net, path, prediction)
    data = [flow.data(x, t, y=y * torch.ones(4)) for y in (0, 1)]
    return flow, x, *data


def per(v: Tensor) -> Tensor:
    return v[:, None, None, None]


@pytest.mark.parametrize(("path", "prediction", "t"), CASES, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize(("eta", "norm"), [(0.0, math.inf), (0.0, 2.5), (0.6, 1.0), (1.0, math.inf)])
def test_apg_is_the_papers_algorithm_on_the_data_estimates(
    path: Path, prediction: str, t: float, eta: float, norm: float
) -> None:
    """Sadat et al. 2024, algorithm 1: normalise the gap, project it on D(z_t, y), keep η of the parallel part."""
    flow, x, weak, strong = pair(path, prediction, t)
    w = 7.0
    gap = strong - weak
    length = gap.flatten(1).norm(dim=1)
    gap = gap * per(torch.minimum(torch.ones(4, dtype=torch.float64), norm / length))
    unit = strong / per(strong.flatten(1).norm(dim=1))
    parallel = per((gap * unit).flatten(1).sum(1)) * unit
    expected = strong + (w - 1.0) * (gap - parallel + eta * parallel)
    made = ClassifierFree(flow, w, unconditional={"y": 0}, rule=APG(eta=eta, norm_threshold=norm))
    found = made.estimate(x, t, y=torch.ones(4))
    torch.testing.assert_close(found.data, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.alpha(t) * found.data + path.sigma(t) * found.noise, x, rtol=1e-8, atol=1e-8)
    many = torch.full((4,), t, dtype=torch.float64)
    torch.testing.assert_close(made.data(x, many, y=torch.ones(4)), expected, rtol=1e-8, atol=1e-8)
    if eta == 1.0:
        linear = ClassifierFree(flow, w, unconditional={"y": 0})
        torch.testing.assert_close(linear.data(x, t, y=torch.ones(4)), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", [CondOT(), paths.VP(), paths.EDM()], ids=repr)
def test_cfg_zero_star_scales_the_unconditional_velocity(path: Path) -> None:
    """Fan et al. 2025: v = (1 − w) s* v_u + w v_c with s* = ⟨v_c, v_u⟩/‖v_u‖², on the straight path's velocity."""
    flow, x, weak, strong = pair(path, "velocity", 0.4)
    alpha, sigma = path.alpha(0.4), path.sigma(0.4)
    w = 3.5
    v_u, v_c = (z - (x - alpha * z) / sigma for z in (weak, strong))
    s = per((v_c * v_u).flatten(1).sum(1) / v_u.flatten(1).square().sum(1))
    expected = (1.0 - w) * s * v_u + w * v_c
    made = ClassifierFree(flow, w, unconditional={"y": 0}, rule=ZeroStar())
    found = made.estimate(x, 0.4, y=torch.ones(4))
    torch.testing.assert_close(found.data - found.noise, expected)
    torch.testing.assert_close(alpha * found.data + sigma * found.noise, x)
    if isinstance(path, CondOT):  # where that is the network's own velocity
        torch.testing.assert_close(made.velocity(x, 0.4, y=torch.ones(4)), expected)


def test_zero_init_holds_the_state_still_below_a_noise_level() -> None:
    flow, x, *_ = pair(CondOT(), "velocity", 0.2)
    made = ClassifierFree(flow, 3.0, unconditional={"y": 0}, rule=ZeroStar(zero_until=-1.0))
    y, low, high = torch.ones(4), CondOT().time(-1.1), CondOT().time(-0.9)
    assert not made.velocity(x, low, y=y).any()
    assert made.velocity(x, high, y=y).abs().min() > 0
    t = torch.tensor([low, high, low, high], dtype=torch.float64)
    mixed = made.velocity(x, t, y=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert not mixed[::2].any()
    torch.testing.assert_close(mixed[1], made.velocity(x, high, y=y)[1])
    estimate = made.estimate(x, low, y=y)
    torch.testing.assert_close(low * estimate.data + (1.0 - low) * estimate.noise, x)
    sol = fs.sample(made, start=x, interval=(0.1, low), solver=solvers.DDIM(), nfe=4, cond={"y": y})
    torch.testing.assert_close(sol.x, x, rtol=1e-12, atol=1e-12)
    assert sol.nfe.tolist() == [0] * 4


@pytest.mark.parametrize("space", ["data", "noise", "v", "velocity", "score"])
@pytest.mark.parametrize(("path", "prediction", "t"), CASES[:4], ids=lambda v: repr(v)[:12])
def test_rescale_brings_the_spread_back_in_the_space_that_is_named(
    path: Path, prediction: str, t: float, space: str
) -> None:
    """Lin et al. 2024, eq. 13–16, with q any of the predictions; the rest follows from x."""
    flow, x, weak, strong = pair(path, prediction, t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    w, phi = 7.5, 0.7

    def q(z: Tensor) -> Tensor:
        e = (x - alpha * z) / sigma
        return {
            "data": z, "noise": e, "v": alpha * e - sigma * z, "score": -e / sigma,
            "velocity": path.alpha_dot(t) * z + path.sigma_dot(t) * e,
        }[space]  # fmt: skip

    plain = q(weak + w * (strong - weak))
    rescaled = plain * per(q(strong).flatten(1).std(1) / plain.flatten(1).std(1))
    expected = phi * rescaled + (1.0 - phi) * plain
    made = ClassifierFree(flow, w, unconditional={"y": 0}, rescale=phi, rescale_in=space)
    for when in (t, torch.full((4,), t, dtype=torch.float64)):
        found = made.estimate(x, when, y=torch.ones(4))
        torch.testing.assert_close(q(found.data), expected, rtol=1e-7, atol=1e-7)
        assert torch.allclose(alpha * found.data + sigma * found.noise, x)


@pytest.mark.parametrize("prediction", ["noise", "v", "velocity", "data"])
def test_rescale_of_the_output_is_diffusers_rescale_noise_cfg(prediction: str) -> None:
    utils = pytest.importorskip("diffusers.guiders.guider_utils")
    flow, x, *_ = pair(paths.VP(), prediction, 0.5)
    y = torch.ones(4)
    weak, strong = (flow.call(x, 0.5, y=v) for v in (0 * y, y))
    expected = utils.rescale_noise_cfg(weak + 5.0 * (strong - weak), strong, guidance_rescale=0.7)
    made = ClassifierFree(flow, 5.0, unconditional={"y": 0}, rescale=0.7, rescale_in="output")
    row = flow.prediction.row(paths.VP().at(0.5))
    torch.testing.assert_close(made.estimate(x, 0.5, y=y).combine(row.data, row.noise) / row.scale, expected)


def test_apg_and_zero_star_are_diffusers_own_where_theirs_act_on_the_same() -> None:
    """theirs act on the network's output: a data prediction for APG, the straight velocity for CFG-Zero★."""
    apg = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    zero = pytest.importorskip("diffusers.guiders.classifier_free_zero_star_guidance")
    y = torch.ones(4)
    flow, x, weak, strong = pair(paths.EDM(), "data", 0.7)
    expected = apg.normalized_guidance(
        strong, weak, 6.0, eta=0.3, norm_threshold=2.0, use_original_formulation=True, norm_dim=(1, 2, 3)
    )
    made = ClassifierFree(flow, 7.0, unconditional={"y": 0}, rule=APG(eta=0.3, norm_threshold=2.0))
    torch.testing.assert_close(made.data(x, 0.7, y=y), expected)
    flow, x, *_ = pair(CondOT(), "velocity", 0.7)
    weak, strong = (flow.velocity(x, 0.7, y=v) for v in (0 * y, y))
    s = per(zero.cfg_zero_star_scale(strong.flatten(1), weak.flatten(1))[:, 0])
    made = ClassifierFree(flow, 4.0, unconditional={"y": 0}, rule=ZeroStar())
    torch.testing.assert_close(made.velocity(x, 0.7, y=y), weak * s + 4.0 * (strong - weak * s), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"rule": APG(norm_threshold=1.0)}, {"rule": ZeroStar()}, {"rescale": 0.7}, {"rescale": 1.0, "rule": APG()}],
)
def test_rules_leave_scale_one_alone_and_are_per_sample_at_the_clean_end_too(options: dict[str, Any]) -> None:
    flow, x, *_ = pair(CondOT(), "velocity", 0.5)
    y = torch.ones(4)
    one = ClassifierFree(flow, 1.0, unconditional={"y": 0}, **options)
    torch.testing.assert_close(one.velocity(x, 0.5, y=y), flow.velocity(x, 0.5, y=y))
    made = ClassifierFree(flow, 4.0, unconditional={"y": 0}, **options)
    near = made.velocity(x, 1.0 - 1e-9, y=y)
    at_end = made.velocity(x, 1.0, y=y)
    assert torch.isfinite(at_end).all()
    if "rescale" not in options:
        torch.testing.assert_close(at_end, near, rtol=1e-6, atol=1e-6)
    t = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    mixed = made.velocity(x, t, y=y)
    for i, when in enumerate(t.tolist()):
        torch.testing.assert_close(mixed[i], made.velocity(x[i : i + 1], when, y=y[:1])[0])


def test_rules_serve_autoguidance_and_your_own_serves_too() -> None:
    flow, x, weak, strong = pair(CondOT(), "velocity", 0.4)
    pale = fs.Flow(lambda x, t: flow.net(x, t, torch.zeros(len(x))), CondOT())
    better = fs.Flow(lambda x, t: flow.net(x, t, torch.ones(len(x))), CondOT())
    y = torch.ones(4)
    for rule in (APG(norm_threshold=1.0), ZeroStar()):
        one = Autoguidance(better, pale, 3.0, rule=rule).data(x, 0.4)
        torch.testing.assert_close(one, ClassifierFree(flow, 3.0, unconditional={"y": 0}, rule=rule).data(x, 0.4, y=y))
    half = Autoguidance(better, pale, 3.0, rule=lambda c, u, x, point, w: 0.5 * (c + u))
    torch.testing.assert_close(half.data(x, 0.4), 0.5 * (weak + strong))


def test_what_rules_refuse() -> None:
    with pytest.raises(ValueError, match=r"momentum = -0.5; expected 0: it averages over the sampler's last"):
        APG(momentum=-0.5)
    with pytest.raises(ValueError, match="norm_threshold = 0"):
        APG(norm_threshold=0)
    with pytest.raises(ValueError, match="zero_until"):
        ZeroStar(math.inf)
    flow = ClassifierFree(fs.Flow(lambda x, t, y: -x, CondOT()), 2.0, unconditional={"y": 0}, rescale=0.5)
    with pytest.raises(ValueError, match=r"spread within a sample, and one has shape \(1,\)"):
        flow.velocity(torch.ones(2, 1), 0.5, y=torch.ones(2))
