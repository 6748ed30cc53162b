"""log_prob against closed forms, and its Hutchinson estimate against its own error bar."""

import math

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.problems import GaussianMixture

TIGHT = solvers.Dopri5(rtol=1e-8, atol=1e-8)

PLANE = GaussianMixture([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]], [0.4, 0.3, 0.6], [0.5, 0.3, 0.2], dtype=torch.float64)
IMAGES = GaussianMixture(
    torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), [0.3, 0.4, 0.5, 0.6]
)
PATHS = {
    "CondOT": paths.CondOT(),
    "CondOT with a floor": paths.CondOT(sigma_min=1e-3),
    "VP": paths.VP(),
    "SubVP": paths.SubVP(),
    "VE": paths.VE(),
    "Cosine": paths.Cosine(),
    "Trig": paths.Trig(),
    "EDM": paths.EDM(),
    "Discrete": paths.Discrete.linear(),
}


def exact(mixture, path, x, **options):
    """log_prob of x at the path's data end, with the exact marginal of the noise end as the prior."""
    point = path.at(0.0)
    flow = mixture.flow(path, options.pop("prediction", "velocity"))
    return fs.log_prob(flow, x, trace="exact", prior=lambda y: mixture.log_prob(y, point), **options)


@pytest.mark.parametrize("mixture", [PLANE, IMAGES], ids=["2-D", "images"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_exact_trace_equals_the_closed_form(mixture, path):
    end = path.at(path.window[1])
    x = end.alpha * mixture.sample(6, seed=2)
    out = exact(mixture, path, x, solver=TIGHT)
    size = x[0].numel()
    assert (out.log_prob - mixture.log_prob(x, end)).abs().max() < 1e-5 * size
    assert torch.equal(out.stderr, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data", "v"])
@pytest.mark.parametrize("chart", ["straight", "trig", "data", "noise", "native"])
def test_every_prediction_and_chart_gives_one_density(prediction, chart):
    path = paths.VP()  # finite λ at both ends: every chart exists
    x = PLANE.sample(5, seed=3)
    out = exact(PLANE, path, x, solver=TIGHT, prediction=prediction, chart=chart)
    assert (out.log_prob - PLANE.log_prob(x, path.at(1.0))).abs().max() < 2e-5


def test_the_prior_of_a_path_that_ends_in_noise_needs_no_help():
    x = PLANE.sample(5, seed=3)
    out = fs.log_prob(PLANE.flow(paths.CondOT()), x, solver=TIGHT, trace="exact")
    assert (out.log_prob - PLANE.log_prob(x)).abs().max() < 1e-6


def test_float32_reaches_its_own_accuracy():
    x = PLANE.sample(5, seed=3)
    flow = PLANE.flow(paths.CondOT())
    out = fs.log_prob(flow, x.float(), solver=solvers.Dopri5(rtol=1e-5, atol=1e-5), trace="exact")
    assert out.log_prob.dtype == torch.float32
    assert (out.log_prob.double() - PLANE.log_prob(x)).abs().max() < 2e-4


@pytest.mark.parametrize("solver", [solvers.RK4(), solvers.Heun(), solvers.Midpoint(), solvers.Dopri5(adaptive=False)])
def test_fixed_steps_converge_to_it_at_their_order(solver):
    """Within ±0.2 of the order from 64 to 128 steps; Dopri5, still faster than its order there, at least at it."""
    x = PLANE.sample(5, seed=3)
    flow = PLANE.flow(paths.CondOT())
    truth = PLANE.log_prob(x)
    errors = []
    for n in (64, 128):
        out = fs.log_prob(flow, x, solver=solver, nfe=n * solver.evaluations, trace="exact")
        assert out.nfe.tolist() == [n * solver.evaluations] * 5
        errors.append((out.log_prob - truth).square().mean().sqrt())
    order = math.log2(errors[0] / errors[1])
    assert order > solver.tableau.order - 0.2
    assert order < solver.tableau.order + 0.2 or solver.tableau.order == 5


def test_hutchinson_is_unbiased_within_its_reported_error():
    """Over 400 samples the mean error is 0 within 4 standard errors, and 2 reported errors cover about 95 %."""
    count = 400
    x = IMAGES.sample(count, seed=5)
    flow = IMAGES.flow(paths.CondOT())
    out = fs.log_prob(flow, x, solver=solvers.RK4(), nfe=60, probes=64, seed=9)
    truth = fs.log_prob(flow, x, solver=solvers.RK4(), nfe=60, trace="exact")
    error = out.log_prob - truth.log_prob
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(count)
    covered = (error.abs() < 2 * out.stderr).double().mean()
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / count)
    assert error.abs().max() > 1e-3  # the probes do estimate something


def test_one_probe_reports_that_it_cannot_tell_its_error():
    out = fs.log_prob(PLANE.flow(paths.CondOT()), PLANE.sample(3), solver=solvers.RK4(), nfe=40)
    assert bool(out.stderr.isnan().all())
    assert bool(out.log_prob.isfinite().all())


def test_probes_are_exact_for_a_linear_isotropic_flow():
    """One Gaussian has the Jacobian of a multiple of the identity, whose trace any sign vector gives exactly."""
    gaussian = GaussianMixture(torch.ones(1, 5, dtype=torch.float64), 0.7)
    x = gaussian.sample(4, seed=0)
    out = fs.log_prob(gaussian.flow(paths.CondOT()), x, solver=TIGHT, probes=1)
    assert (out.log_prob - gaussian.log_prob(x)).abs().max() < 1e-6


def test_a_sample_has_the_same_likelihood_in_any_batch():
    x = IMAGES.sample(6, seed=5)
    flow = IMAGES.flow(paths.CondOT())
    options = {"solver": solvers.Dopri5(), "probes": 2, "seed": 4}
    whole = fs.log_prob(flow, x, **options)
    part = fs.log_prob(flow, x[[4, 1]], samples=[4, 1], **options)
    assert (whole.log_prob[[4, 1]] - part.log_prob).abs().max() < 1e-9
    assert whole.nfe[[4, 1]].tolist() == part.nfe.tolist()


def test_one_network_call_an_evaluation():
    calls = []
    inner = PLANE.flow(paths.CondOT())

    def net(x, t):
        calls.append(len(x))
        return inner.net(x, t)

    flow = fs.Flow(net, paths.CondOT())
    for options in ({"trace": "exact"}, {"probes": 3}):
        calls.clear()
        out = fs.log_prob(flow, PLANE.sample(4), solver=solvers.RK4(), nfe=20, **options)
        assert len(calls) == 20
        assert out.nfe.tolist() == [20] * 4
        calls.clear()
        out = fs.log_prob(flow, PLANE.sample(4), solver=solvers.Dopri5(), **options)
        assert sum(calls) == int(out.nfe.sum())


def test_gradients_flow_to_x_and_to_parameters():
    """∇ log p is the score of the data; the derivative with respect to a parameter is a finite difference."""
    x = PLANE.sample(3, seed=3).requires_grad_()
    out = fs.log_prob(PLANE.flow(paths.CondOT()), x, solver=solvers.RK4(), nfe=400, trace="exact")
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), x)
    point = paths.CondOT().at(1.0)
    assert (gradient - PLANE.score(x.detach(), point)).abs().max() < 1e-4

    def value(scale, grad):
        inner = PLANE.flow(paths.CondOT())
        flow = fs.Flow(lambda x, t: scale * inner.net(x, t), paths.CondOT())
        return fs.log_prob(flow, x.detach(), solver=solvers.RK4(), nfe=80, trace="exact", grad=grad).log_prob.sum()

    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(scale, True), scale)
    difference = (value(scale.detach() + 1e-5, False) - value(scale.detach() - 1e-5, False)) / 2e-5
    assert abs(slope - difference) < 1e-5 * abs(difference)


def test_no_graph_is_recorded_unless_it_is_wanted():
    out = fs.log_prob(PLANE.flow(paths.CondOT()), PLANE.sample(3), solver=solvers.RK4(), nfe=8)
    assert not out.log_prob.requires_grad


def test_the_latent_is_the_encoding():
    x = PLANE.sample(4, seed=3)
    flow = PLANE.flow(paths.CondOT())
    out = fs.log_prob(flow, x, solver=TIGHT, trace="exact")
    assert (out.latent - fs.encode(flow, x, solver=TIGHT).x).abs().max() < 1e-6


def test_a_failed_sample_is_nan_and_the_others_stand():
    inner = PLANE.flow(paths.CondOT())

    def net(x, t):
        return torch.where(x[:, :1] > 50, torch.nan, 1.0) * inner.net(x, t)

    x = PLANE.sample(3, seed=3)
    clean = fs.log_prob(inner, x, solver=solvers.Dopri5(), trace="exact")
    x[1] = 100.0
    out = fs.log_prob(fs.Flow(net, paths.CondOT()), x, solver=solvers.Dopri5(), trace="exact", throw=False)
    assert out.log_prob.isnan().tolist() == [False, True, False]
    assert (out.log_prob - clean.log_prob)[[0, 2]].abs().max() < 1e-9
    with pytest.raises(fs.SolverError, match=r"1 of 3 samples .* sample 1: met a value that is not finite at t = 1 "):
        fs.log_prob(fs.Flow(net, paths.CondOT()), x, solver=solvers.Dopri5(), trace="exact")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"solver": solvers.DDIM(), "nfe": 5}, TypeError, "needs a Runge–Kutta solver"),
        ({"trace": "slq"}, ValueError, "expected 'hutchinson' or 'exact'"),
        ({"probes": 0}, ValueError, "probes = 0"),
        ({"interval": (0.0, 1.0)}, ValueError, "fall from data to noise"),
        ({"interval": (1.0, 0.2)}, ValueError, "give prior="),
        ({"chart": "data"}, ValueError, "chart='straight'"),
        ({"samples": [1]}, ValueError, "samples"),
        ({"grid": "log_snr"}, TypeError, "chooses its own steps"),
        ({"solver": solvers.Dopri5}, TypeError, "pass an instance"),
    ],
)
def test_bad_arguments_say_what_is_wrong(options, error, words):
    with pytest.raises(error, match=words):
        fs.log_prob(PLANE.flow(paths.CondOT()), PLANE.sample(3), **{"solver": solvers.Dopri5(), **options})


def test_a_network_that_autograd_cannot_see_is_refused():
    inner = PLANE.flow(paths.CondOT())
    flow = fs.Flow(lambda x, t: inner.net(x, t).detach(), paths.CondOT())
    with pytest.raises(ValueError, match="does not depend on x for autograd"):
        fs.log_prob(flow, PLANE.sample(3), solver=solvers.Dopri5())
