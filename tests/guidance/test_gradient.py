"""Guidance by gradients: a classifier that is true gives the true conditional flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.guidance import Classifier, Posterior
from flowsolve.paths import CondOT, Path
from flowsolve.predictions import PREDICTIONS, SingularEstimate
from flowsolve.problems import GaussianMixture
from tests.cases import PATHS
from tests.guidance.labelled import MEANS, SHARE, STD, labelled, states, truth

MIXTURE = GaussianMixture(MEANS, STD, SHARE)
Y = torch.tensor([1, 2, 3, 1, 2])


def classifier(path: Path) -> Any:
    """log p(y | x_t) of the classes, by Bayes' rule."""

    def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = (c[:, None, None] for c in path.at(t.double())[:2])
        variance = alpha**2 * STD**2 + sigma**2
        logits = SHARE.log() - 0.5 * ((x[:, None] - alpha * MEANS) ** 2 / variance).sum(2)
        return logits.log_softmax(1)[torch.arange(len(x)), y - 1]

    return log_prob


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_the_true_classifier_at_scale_one_gives_the_conditional_estimate(name: str, prediction: str) -> None:
    path = PATHS[name]
    base = MIXTURE.flow(path, prediction)
    flow = Classifier(base, classifier(path), interval=(-20.0, 20.0))
    for t in (0.3, 0.55, 0.8):
        x, point = states(path, t), path.at(t)
        expected = truth(x, point.alpha, point.sigma, Y)
        for when in (t, torch.full((5,), t, dtype=torch.float64)):
            found = flow.estimate(x, when, classifier={"y": Y})
            torch.testing.assert_close(found.data, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(point.alpha * found.data + point.sigma * found.noise, x, rtol=1e-8, atol=1e-8)


def test_it_samples_the_class() -> None:
    path = paths.VP()
    flow = Classifier(MIXTURE.flow(path), classifier(path), time="flow")
    target = labelled(path)
    for solver, options in ((solvers.UniPC(order=3), {"nfe": 15}), (solvers.Dopri5(1e-6, 1e-6), {})):
        doubled = {k: 2 * v for k, v in options.items()}
        found = fs.sample(flow, (5, 2), solver=solver, dtype=torch.float64, cond={"classifier": {"y": Y}}, **doubled)
        expected = fs.sample(target, (5, 2), solver=solver, dtype=torch.float64, cond={"y": Y}, **options)
        torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.nfe, 2 * expected.nfe)
    few = fs.sample(flow, (5, 2), solver=solver, dtype=torch.float64, cond={"classifier": {"y": Y}}, batch=2)
    torch.testing.assert_close(few.x, found.x, rtol=1e-9, atol=1e-9)


def test_samples_at_different_times_are_guided_within_the_interval_only() -> None:
    path = CondOT()
    base = MIXTURE.flow(path)
    flow = Classifier(base, classifier(path), 2.0, interval=(-1.0, 1.0))
    t = torch.tensor([0.0, 0.5, 0.2, 0.6, 1.0], dtype=torch.float64)
    x = states(path, t)
    found = flow.velocity(x, t, classifier={"y": Y})
    plain = base.velocity(x, t)
    torch.testing.assert_close(found[[0, 2, 4]], plain[[0, 2, 4]], rtol=1e-12, atol=1e-12)
    for i in (1, 3):
        single = flow.velocity(x[i : i + 1], float(t[i]), classifier={"y": Y[i : i + 1]})
        torch.testing.assert_close(found[i : i + 1], single, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found[i], plain[i])


def test_a_measurement_of_the_data_pulls_by_its_gradient_through_the_network() -> None:
    """For z ~ N(m, s²), ẑ = m + k (x − αm), k = αs²/v, and −|y − ẑ|²/2r² has the gradient k (y − ẑ)/r²."""
    path, t, w, r = CondOT(), 0.6, 0.7, 0.5
    mean = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    base = GaussianMixture(mean, STD).flow(path)
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    flow = Posterior(base, lambda z: -0.5 * ((y - z) ** 2).sum(1) / r**2, w)
    x, alpha, sigma = states(path, t), path.alpha(t), path.sigma(t)
    k = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    data = mean + k * (x - alpha * mean)
    gradient = k * (y - data) / r**2
    found = flow.estimate(x, t)
    torch.testing.assert_close(found.noise, (x - alpha * data) / sigma - w * sigma * gradient)
    torch.testing.assert_close(found.data, data + w * sigma**2 / alpha * gradient)
    assert flow.nfe_per_call == 1
    given = Posterior(base, lambda z, y: -0.5 * ((y - z) ** 2).sum(1) / r**2, w, interval=(-3.0, 9.0))
    cond = {"measurement": {"y": y.expand(5, 2)}}
    torch.testing.assert_close(given.data(x, t, **cond), found.data)
    sol = fs.sample(given, (5, 2), solver=solvers.Dopri5(), cond=cond, dtype=torch.float64)
    assert bool(((sol.x - y).norm(dim=1) < (sol.x * 0 + mean - y).norm(dim=1)).all())


def test_a_path_that_starts_in_pure_noise_cannot_be_guided_there() -> None:
    flow = Classifier(MIXTURE.flow(CondOT()), classifier(CondOT()))
    match = r"(?s)the grid asks for guidance by a gradient at t = 0.*α = 0.*interval, such as \(-7, inf\)"
    with pytest.raises(SingularEstimate, match=match):
        fs.sample(flow, (5, 2), solver=solvers.DDIM(), nfe=8, cond={"classifier": {"y": Y}})
    later = Classifier(MIXTURE.flow(CondOT()), classifier(CondOT()), interval=(-7.0, float("inf")))
    assert bool(fs.sample(later, (5, 2), solver=solvers.DDIM(), nfe=8, cond={"classifier": {"y": Y}}).ok.all())


class Net(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        torch.manual_seed(out)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, out)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat((x, t[:, None].to(x)), 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "gradient"),
    [(k, g) for k in ("classifier", "posterior", "free") for g in ("direct", "checkpoint")]
    + [("classifier", "adjoint")],
)  # (a field that jumps where its interval begins has no smooth adjoint)
def test_gradients_flow_through_guided_solves(kind: str, gradient: str) -> None:
    """Against central differences, to the start and to a parameter of the network and of the classifier."""
    net, judge = Net(2), Net(1)
    base = fs.Flow(net, paths.VP(), "velocity")
    if kind == "classifier":
        flow: fs.Flow = Classifier(base, lambda x, t: nn.functional.logsigmoid(judge(x, t)[:, 0]), 2.0)
    elif kind == "posterior":
        flow = Posterior(base, lambda z: nn.functional.logsigmoid(judge(z, z[:, 0])[:, 0]), 0.5, interval=(-2.0, 9.0))
    else:
        flow = fs.guidance.ClassifierFree(
            fs.Flow(lambda x, t, y: net(x, t) + y[:, None] * judge(x, t), paths.VP()), 3.0, unconditional={"y": 0.0},
            interval=(-1.0, 9.0), rule=fs.guidance.APG(norm_threshold=0.5), rescale=0.5,
        )  # fmt: skip
    cond = {"y": torch.ones(2, dtype=torch.float64)} if kind == "free" else {}
    x = torch.tensor([[0.3, -0.8], [1.0, 0.4]], dtype=torch.float64, requires_grad=True)
    adaptive = gradient == "adjoint"
    solver = solvers.Dopri5(1e-7, 1e-7) if adaptive else solvers.Heun()
    options: dict[str, Any] = {} if adaptive else {"nfe": 16}
    tested = (judge if kind != "posterior" else net).body[0].weight

    def loss(start: Tensor, mode: str = "direct") -> Tensor:
        sol = fs.sample(
            flow, start=start, solver=solver, cond=cond, gradient=mode, interval=(0.3, 0.9), grad=True, **options
        )
        return (sol.x * torch.tensor([1.0, -2.0])).sum()

    found = torch.autograd.grad(loss(x, gradient), (x, tested))
    step = 1e-5
    with torch.no_grad():
        for tensor, gradients in ((x, found[0]), (tested, found[1])):
            for place in ((0, 0), (1, 1)):
                kept = float(tensor[place])
                values = []
                for sign in (1, -1):
                    tensor[place] = kept + sign * step
                    values.append(float(loss(x)))
                tensor[place] = kept
                assert (values[0] - values[1]) / (2 * step) == pytest.approx(
                    float(gradients[place]), rel=2e-4, abs=1e-6
                )


def test_sampling_without_gradients_leaves_none_behind() -> None:
    flow = Classifier(MIXTURE.flow(paths.VP()), classifier(paths.VP()))
    with torch.no_grad():
        sol = fs.sample(flow, (5, 2), solver=solvers.DDIM(), nfe=8, cond={"classifier": {"y": Y}})
        assert not flow.velocity(sol.x, 0.5, classifier={"y": Y}).requires_grad
    assert not sol.x.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="Classifier differentiates, which inference_mode"):
        flow.velocity(torch.ones(5, 2), 0.5, classifier={"y": Y})


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda f: Classifier(f, None), TypeError, "log_prob is a NoneType"),
        (lambda f: Classifier(f, torch.sin, evaluations=-1), ValueError, "evaluations = -1"),
        (lambda f: Classifier(f, torch.sin, time="clock"), ValueError, "time = 'clock'"),
        (lambda f: Classifier(f.net, torch.sin), TypeError, "flow is a Exact"),
        (lambda f: Classifier(f, lambda x, t: x).velocity(X, 0.5), ValueError, r"log_prob returned \(3, 2\).*\(3,\)"),
        (lambda f: Classifier(f, lambda x, t: x.detach()[:, 0]).velocity(X, 0.5), ValueError, "no gradient to follow"),
        (lambda f: Posterior(f, lambda z: 0.0).velocity(X, 0.5), ValueError, "log_prob returned float"),
    ],
)
def test_bad_settings_say_what_is_wrong(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(MIXTURE.flow(paths.VP()))


X = torch.ones(3, 2, dtype=torch.float64)
