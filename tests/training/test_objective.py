"""One objective: conditional gradients are the marginal ones by quadrature, equal weights are equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowsolve._batch import per_sample
from flowsolve.conditioning import shared
from flowsolve.flow import Flow
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP, Trig
from flowsolve.predictions import PREDICTIONS, SingularEstimate
from flowsolve.problems import GaussianMixture
from flowsolve.training import Objective, bridges, cfm_loss, couplings, dsm_loss, named, preconditioning, times, weights

PATHS: list[Path] = [
    CondOT(), CondOT(0.01), VP(), SubVP(), Cosine(), Trig(), VE(), EDM(), Discrete.linear()
]  # fmt: skip
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)
WEIGHTS: dict[str, weights.Weight] = {
    "one": weights.one,
    "sigma_squared": weights.sigma_squared,
    "likelihood": weights.likelihood,
    "snr": weights.snr,
    "truncated_snr": weights.truncated_snr,
    "min_snr": weights.min_snr(2.0),
    "cosmap": weights.cosmap,
    "edm": weights.edm(0.7),
    "over_log_snr": weights.over_log_snr(lambda lam: (-0.5 * lam**2).exp()),
    "learned": weights.LearnedLogVariance(),
}
MIXTURE = GaussianMixture(torch.tensor([[-0.9], [0.8]], dtype=torch.float64), [0.5, 0.7], [0.4, 0.6])
F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Field(nn.Module):
    """A network that is analytic in x, at the path's own scale."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.theta = nn.Parameter(torch.tensor([0.4, -0.7, 0.3], dtype=F64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c = self.theta
        point = self.path.at(t)
        y = x / per_sample((point.alpha**2 + point.sigma**2).sqrt(), x)
        return torch.sin(a * y + b * per_sample(t, x)) + c * y


def nodes(n: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss–Hermite nodes of the mixture times the noise: (z, ε, weights), exact for smooth functions."""
    x, w = (torch.as_tensor(v, dtype=F64) for v in np.polynomial.hermite_e.hermegauss(n))
    w = w / w.sum()
    z = MIXTURE.means + MIXTURE.std.reshape(-1, 1) * x  # (K, n)
    z_weight = MIXTURE.weights[:, None] * w
    data, noise = (v.reshape(-1, 1) for v in torch.meshgrid(z.flatten(), x, indexing="ij"))
    return data, noise, torch.outer(z_weight.flatten(), w).flatten()


@path_cases
@pytest.mark.parametrize("target", PREDICTIONS)
def test_conditional_gradients_are_the_marginal_ones(path: Path, target: str) -> None:
    """FM = CFM and SM = DSM, for every target and weight: expectations by quadrature, not by draws."""
    data, noise, share = nodes()
    first, last = path.window
    for prediction, place in itertools.product(("velocity", "noise", "data"), (0.35, 0.6)):
        flow = Flow(Field(path), path, prediction)
        theta = flow.net.theta  # type: ignore[union-attr]
        t = torch.full((len(data),), first + (last - first) * place, dtype=F64)
        x, point = path.interpolate(data, noise, t), path.at(t)
        truth = getattr(MIXTURE.flow(path).estimate(x, t), target)
        for weight in WEIGHTS.values():
            objective = Objective(target, weight=weight)
            each = objective(flow, data, t=t, noise=noise, reduction="none")
            factor = torch.as_tensor(weight(point)).detach().to(F64)
            error = (getattr(flow.estimate(x, t), target) - truth).square().mean(1)
            (conditional,) = torch.autograd.grad((share * each).sum(), theta)
            (marginal,) = torch.autograd.grad((share * factor * error).sum(), theta)
            size = marginal.abs().max() + 1e-3 * factor.max()
            assert float((conditional - marginal).abs().max() / size) < 1e-6


def equal_pairs(path: Path) -> dict[str, tuple[Objective, Objective]]:
    """The table of docs/training.md: objectives that are the same loss, draw for draw."""
    variance = weights.Own(lambda p: (p.alpha**2 + p.sigma**2) ** 2 / p.sigma**2)
    slope = weights.Own(lambda p: (p.alpha * p.log_snr_dot) ** 2)
    raw = preconditioning.prediction(0.5)
    return {
        "score σ² = noise": (named.score_matching(), named.ddpm()),
        "data SNR = noise": (named.data(weights.snr), named.ddpm()),
        "score raw = noise / σ²": (
            named.score_matching(weights.one),
            Objective("noise", weight=weights.Own(lambda p: p.sigma**-2)),
        ),
        "v = data (α² + σ²)²/σ²": (named.v(), named.data(variance)),
        "velocity = data (αλ')²": (named.flow_matching(), named.data(slope)),
        "velocity = noise, by its row": (
            named.flow_matching(),
            Objective("noise", weight=weights.equivalent("velocity", on="noise")),
        ),
        "EDM on the data = 1 on the raw F": (
            Objective("data", weight=weights.edm(0.5)),
            Objective(raw),
        ),
        "min-SNR on the noise = on v": (named.min_snr(), Objective("v", weight=weights.min_snr(on="v"))),
        "ScoreFlow = noise 2λ'": (
            Objective("score", weight=weights.likelihood),
            named.over_log_snr(lambda lam: 2.0 + 0.0 * lam),
        ),
    }


@path_cases
def test_equal_weight_objectives_have_equal_gradients(path: Path) -> None:
    data = MIXTURE.sample(64)
    t = torch.linspace(0.05, 0.9, 64, dtype=F64)
    for prediction in ("velocity", "noise", "v"):
        flow = Flow(Field(path), path, prediction)
        theta = flow.net.theta  # type: ignore[union-attr]
        for name, pair in equal_pairs(path).items():
            losses = [o(flow, data, t=t, generator=rng(3), reduction="none") for o in pair]
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            one, other = (torch.autograd.grad(v.mean(), theta)[0] for v in losses)
            assert float((one - other).norm() / one.norm()) < 1e-6, name


@pytest.mark.parametrize("path", [VP(), Cosine(), Trig(), Discrete.linear()], ids=repr)
def test_v_is_snr_plus_one_where_the_variance_is_kept(path: Path) -> None:
    point = path.at(torch.linspace(0.05, 0.9, 9, dtype=F64))
    factor = weights.equivalent("v", on="data")(point)
    torch.testing.assert_close(factor, (2.0 * point.log_snr).exp() + 1.0, rtol=1e-9, atol=0)


def test_the_losses_are_instances_of_the_objective() -> None:
    for path, prediction in itertools.product((CondOT(), VP()), ("velocity", "noise")):
        flow, data = Flow(Field(path), path, prediction), MIXTURE.sample(16)
        for loss, objective in (
            (cfm_loss, named.flow_matching()),
            (dsm_loss, Objective()),
        ):
            assert torch.equal(loss(flow, data, generator=rng(1)), objective(flow, data, generator=rng(1)))
        for t in ([0.2] * 16, np.full(16, 0.2), np.float64(0.2)):
            as_listed = cfm_loss(flow, data, t=t, generator=rng(1))  # type: ignore[arg-type]
            assert torch.equal(as_listed, cfm_loss(flow, data, t=0.2, generator=rng(1)))
        by_name = dsm_loss(flow, data, target="noise", weight=weights.min_snr(), generator=rng(2))
        assert torch.equal(by_name, named.min_snr()(flow, data, generator=rng(2)))


class Off(nn.Module):
    """For data that are all 0: the noise x/σ plus δ(λ), so that the error of the noise is δ whatever was drawn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        point = self.path.at(t)
        return x / per_sample(point.sigma, x) + per_sample(bump(point.log_snr), x)


def bump(lam: Tensor) -> Tensor:
    return torch.exp(-0.5 * (lam - 0.3).square())


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "flow matching": named.flow_matching,
    "score matching": named.score_matching,
    "raw score matching": lambda: named.score_matching(weights.one),
    "ScoreFlow": lambda: named.score_flow(-4.0, 4.0),
    "DDPM": named.ddpm,
    "min-SNR": named.min_snr,
    "data": lambda: named.data(weights.truncated_snr),
    "v": named.v,
    "EDM": named.edm,
    "SD3 lognorm": lambda: named.sd3("lognorm", 0.3, 0.8),
    "SD3 mode": lambda: named.sd3("mode", 1.29),
    "SD3 cosmap": lambda: named.sd3("cosmap"),
    "over λ": lambda: named.over_log_snr(lambda lam: 1.0 / torch.cosh(lam)),
    "EDM, importance": lambda: Objective("data", times.log_normal(), weights.edm(), importance=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("path", [CondOT(), VP(), Cosine(), EDM()], ids=repr)
def test_the_effective_weight_is_the_objective(path: Path, name: str) -> None:
    """E over times of the loss of a known error δ(λ) is ∫ W δ² dλ: the midpoint rule in u against one in λ."""
    objective = OBJECTIVES[name]()
    u = (torch.arange(8000, dtype=F64) + 0.5) / 8000
    flow = Flow(Off(path), path, "noise")
    zero = torch.zeros(len(u), 1, dtype=F64)
    t = objective.time.quantile(u, path)
    found = float(objective(flow, zero, t=t, generator=rng()).detach())
    edges = [path.log_snr(t) for t in path.window]
    lam = torch.linspace(max(edges[0], -6.0), min(edges[1], 7.0), 4001, dtype=F64)
    lam = 0.5 * (lam[1:] + lam[:-1])
    step = float(lam[1] - lam[0])
    expected = float((objective.effective_weight(flow, lam) * bump(lam).square()).sum() * step)
    if name == "ScoreFlow":  # drawn between −4 and 4 only
        inside = lam.abs() < 4.0
        expected = float((objective.effective_weight(flow, lam) * bump(lam).square() * inside).sum() * step)
    assert found == pytest.approx(expected, rel=2e-3)


def test_equal_effective_weights() -> None:
    """The rows of the docs' second table: equal in expectation, not draw by draw."""
    lam = torch.linspace(-4.0, 4.0, 33, dtype=F64)
    straight, vp = Flow(Field(CondOT()), CondOT()), Flow(Field(VP()), VP(), "noise")
    pairs = [
        (straight, named.sd3("cosmap"), Objective("velocity", weight=weights.cosmap)),
        (vp, named.score_flow(), Objective("score", weight=weights.likelihood)),
        (vp, named.score_flow(), named.over_log_snr(lambda v: 2.0 + 0.0 * v)),
        (straight, Objective("velocity", times.even(times.cosmap)), named.sd3("cosmap")),
        (straight, Objective("velocity", times.logit_normal(), importance=True), named.flow_matching()),
    ]
    for flow, one, other in pairs:
        torch.testing.assert_close(
            one.effective_weight(flow, lam), other.effective_weight(flow, lam), rtol=1e-9, atol=0
        )
    # the same on every path: ∫ w(λ) … dλ
    over = named.over_log_snr(lambda v: torch.exp(-v.square()))
    for flow in (straight, vp):
        torch.testing.assert_close(over.effective_weight(flow, lam), torch.exp(-lam.square()), rtol=1e-9, atol=0)
    # flow matching on the straight path, uniform times: α²λ'²·(σ/α)²/λ' = σ²λ' = (1 − t)/t = e^(−λ)
    torch.testing.assert_close(
        named.flow_matching().effective_weight(straight, lam), torch.exp(-lam), rtol=1e-9, atol=0
    )
    assert float(named.ddpm().effective_weight(vp, torch.tensor(-50.0))) == 0.0
    for objective in (named.ddpm(), named.edm2(), Objective("noise", weight=weights.Own(lambda p: 2.0))):
        assert objective.effective_weight(vp, torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("target", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", [CondOT(), VP(), Trig()], ids=repr)
def test_least_squares_on_a_rich_basis_reaches_the_exact_field(path: Path, target: str) -> None:
    """The objective's own minimiser, by its gradient and its Hessian, is E[target | x]."""
    data, noise, share = nodes(40)
    t = torch.full((len(data),), 0.45, dtype=F64)
    x = path.interpolate(data, noise, t)
    centres = torch.linspace(-3.5, 3.5, 21, dtype=F64)
    theta = torch.zeros(23, dtype=F64, requires_grad=True)

    def basis(x: Tensor) -> Tensor:
        return torch.cat((torch.exp(-0.5 * ((x - centres) / 0.6).square()), torch.ones_like(x), x), 1)

    flow = Flow(lambda x, t: (basis(x) @ theta)[:, None], path, target)
    loss = Objective(target)(flow, data, t=t, noise=noise, reduction="none")
    (slope,) = torch.autograd.grad((share * loss).sum(), theta)
    features = basis(x)
    curvature = 2.0 * features.T @ (share[:, None] * features)
    best = torch.linalg.lstsq(curvature, -slope[:, None], rcond=1e-13, driver="gelsd").solution[:, 0]
    where = torch.linspace(-1.5, 1.5, 61, dtype=F64)[:, None]
    exact = getattr(MIXTURE.flow(path).estimate(where, 0.45), target)[:, 0]
    assert float((basis(where) @ best - exact).abs().max()) < 2e-3 * float(exact.abs().max())


NAMED: dict[str, Callable[[], Objective]] = {
    **OBJECTIVES,
    "EDM2": named.edm2,
    "OT": named.ot_flow_matching,
    "rectified flow": named.rectified_flow,
    "SD3 uniform": lambda: named.sd3("uniform"),
}


@pytest.mark.parametrize("name", NAMED)
@path_cases
def test_every_name_serves_every_path_and_prediction(path: Path, name: str) -> None:
    if name == "OT":
        pytest.importorskip("scipy")
    data = MIXTURE.sample(64)
    source = torch.randn(64, 1, generator=rng(9), dtype=F64) if name == "rectified flow" else None
    for prediction in PREDICTIONS:
        flow = Flow(Field(path), path, prediction)
        loss = NAMED[name]()(flow, data, noise=source, generator=rng())
        (slope,) = torch.autograd.grad(loss, flow.net.theta)  # type: ignore[union-attr]
        assert bool(slope.isfinite().all())


def test_densities_and_weights_cannot_be_confused() -> None:
    with pytest.raises(TypeError, match=r"weight is .*; it is a time; expected a weight"):
        Objective(weight=times.cosmap)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"time is .*; it is a weight; expected a density"):
        Objective(time=weights.cosmap)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="coupling is"):
        Objective(coupling=times.uniform)  # type: ignore[arg-type]
    for value in (lambda n, g: torch.rand(n), lambda p: p.sigma):
        with pytest.raises(TypeError, match=r"times\.Drawn\(f\)"):
            Objective(time=value)
        with pytest.raises(TypeError, match=r"weights\.Own\(f\)"):
            Objective(weight=value)
    flow, data = Flow(Field(CondOT()), CondOT()), MIXTURE.sample(8)
    with pytest.raises(TypeError, match="it is a weight"):
        cfm_loss(flow, data, t=weights.cosmap)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="it is a time"):
        dsm_loss(flow, data, weight=times.cosmap)  # type: ignore[arg-type]


def test_edm_preconditioning_has_unit_variance_and_the_exact_minimiser() -> None:
    """Inputs and targets of F have variance 1 for data of σ_d, and the optimal F makes the flow exact."""
    normal = GaussianMixture(torch.zeros(1, 2, dtype=F64), 0.5)
    for path in (EDM(), VP(), CondOT()):
        seen = {}

        def net(x: Tensor, level: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            seen.update(x=x, level=level)
            return torch.zeros_like(x)

        flow = preconditioning.preconditioned(net, path, sigma_data=0.5)
        draw = Objective().draw(flow, normal.sample(40_000, seed=5), generator=rng())
        loss = Objective().compare(flow, draw)
        for v in (seen["x"], draw.target):
            assert abs(float(v.square().mean()) - 1.0) < 5.0 * math.sqrt(2.0 / v.numel())
        level = (draw.point.sigma / draw.point.alpha).log() / 4.0
        torch.testing.assert_close(seen["level"], level, rtol=1e-12, atol=1e-12)
        # for normal data F = 0 is exact: nothing of the target is left to be told from x
        exact = normal.flow(path).estimate(draw.x, draw.t).data
        torch.testing.assert_close(flow.estimate(draw.x, draw.t).data, exact, rtol=1e-7, atol=1e-9)
        assert loss == pytest.approx(1.0, abs=0.02)


def test_antithetic_draws() -> None:
    flow, data = Flow(Field(CondOT()), CondOT()), MIXTURE.sample(6)
    draw = Objective("velocity", antithetic=True).draw(flow, data, generator=rng())
    assert draw.x.shape == (12, 1)
    torch.testing.assert_close(draw.noise[:6], -draw.noise[6:])
    assert torch.equal(draw.t[:6], draw.t[6:])
    each = Objective("velocity", antithetic=True)(flow, data, generator=rng(), reduction="none")
    assert each.shape == (6,)
    for bad in ({"noise": data}, {}):
        coupling = couplings.Independent() if bad else couplings.Exact()
        with pytest.raises(ValueError, match="antithetic"):
            Objective("velocity", coupling=coupling, antithetic=True)(flow, data, **bad)


def test_conditions_follow_their_data() -> None:
    seen: dict[str, Tensor] = {}

    def net(x: Tensor, t: Tensor, label: Tensor, table: Tensor) -> Tensor:
        seen.update(label=label, table=table)
        return x

    data = torch.arange(5.0)[:, None]
    flow = Flow(net, CondOT())
    table = torch.zeros(5)
    objective = Objective("velocity", antithetic=True)
    objective(flow, data, label=torch.arange(5), table=shared(table), generator=rng())
    assert seen["label"].tolist() == [*range(5), *range(5)]
    assert seen["table"].shape == (5,)


def test_errors() -> None:
    flow, data = Flow(Field(CondOT()), CondOT()), MIXTURE.sample(4)
    with pytest.raises(ValueError, match="takes pairs as they are given"):
        named.rectified_flow()(flow, data)
    with pytest.raises(ValueError, match="bridge needs target 'velocity'"):
        Objective("noise", bridge=bridges.Sine())(flow, data)
    with pytest.raises(SingularEstimate, match="does not exist"):
        Objective("score")(flow, data, t=1.0)
    with pytest.raises(ValueError, match="scale"):
        bridges.Brownian(0.0)
    with pytest.raises(ValueError, match="density = 'cosine'"):
        named.sd3("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a bridge"):
        type(named.interpolant())(Objective("velocity"))
