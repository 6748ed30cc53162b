"""log_prob against closed forms, and its Hutchinson estimate against its own error bar."""

import math
from typing import Any

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.likelihood import Hutchinson, HutchPP
from flowsolve.predictions import PREDICTIONS
from flowsolve.problems import GaussianMixture
from tests.cases import PATHS
from tests.guidance.labelled import labelled
from tests.likelihood.mixtures import MIXTURES, Turned, at_data, at_noise, bits

TIGHT = solvers.Dopri5(rtol=1e-8, atol=1e-8)

PLANE = GaussianMixture([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]], [0.4, 0.3, 0.6], [0.5, 0.3, 0.2], dtype=torch.float64)
IMAGES = GaussianMixture(
    torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), [0.3, 0.4, 0.5, 0.6]
)


def exact(case, path, x, **options):
    """log_prob of x at the path's data end, with the exact marginal of the noise end as the prior."""
    return fs.log_prob(case.flow(path), x, trace="exact", prior=at_noise(case, path), **options)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES)
def test_exact_trace_equals_the_closed_form(case, path):
    """1e-5 bpd and less, in 2, 16 and 64 dimensions and for images."""
    x, truth = at_data(case, path, 3)
    out = exact(case, path, x, solver=solvers.Dopri5(rtol=1e-7, atol=1e-7))
    assert bits(out.log_prob - truth, x).abs().max() < 1e-5
    assert torch.equal(out.stderr, torch.zeros(3, dtype=torch.float64))
    assert out.error.isnan().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_prediction_gives_one_density(path, prediction):
    """Between log-SNRs of −5 and 6, where every estimate exists."""
    start, end = (path.time(v) for v in (min(6.0, path.log_snr(path.window[1])), max(-5.0, path.log_snr(0.0))))
    x, truth = at_data(PLANE, path, 2, start)
    prior, flow = at_noise(PLANE, path, end), PLANE.flow(path, prediction)
    options = {"solver": solvers.Dopri5(1e-6, 1e-6), "interval": (start, end), "prior": prior}
    assert bits(fs.log_prob(flow, x, trace="exact", **options).log_prob - truth, x).abs().max() < 1e-4


def charted():
    """Every chart on every path. Native on a table, whose field has a kink at each entry, takes thousands of steps."""
    for name, path in PATHS.items():
        for chart in ("straight", "trig", "data", "noise", "native"):
            kinks = chart == "native" and name.startswith("Discrete")
            marks = [pytest.mark.slow] if kinks else []
            yield pytest.param(chart, path, 1e-8 if kinks else 1e-6, id=f"{name}-{chart}", marks=marks)


@pytest.mark.parametrize(("chart", "path", "tolerance"), charted())
def test_every_chart_gives_one_density(chart, path, tolerance):
    """Between log-SNRs of −4 and 4: every chart exists."""
    start, end = (path.time(v) for v in (min(4.0, path.log_snr(path.window[1])), max(-4.0, path.log_snr(0.0))))
    x, truth = at_data(PLANE, path, 2, start)
    options = {
        "solver": solvers.Dopri5(tolerance, tolerance),
        "interval": (start, end),
        "prior": at_noise(PLANE, path, end),
    }
    out = fs.log_prob(PLANE.flow(path), x, trace="exact", chart=chart, **options)
    assert bits(out.log_prob - truth, x).abs().max() < 1e-4


@pytest.mark.parametrize("solver", [solvers.DPMSolver12(1e-4, 1e-4), solvers.DPMSolver23(1e-6, 1e-6), solvers.Dopri8()])
def test_other_adaptive_solvers(solver):
    path = paths.VP()
    x, truth = at_data(PLANE, path, 3)
    options = {"chart": "data"} if isinstance(solver, solvers.DPMSolver12 | solvers.DPMSolver23) else {}
    assert (exact(PLANE, path, x, solver=solver, **options).log_prob - truth).abs().max() < 5e-3


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


METHODS = {"along a curve": {"nfe": 24}, "joint": {"solver": solvers.RK4(), "nfe": 60}}
both = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@both
@pytest.mark.parametrize("trace", [Hutchinson(16), HutchPP(36)], ids=["hutchinson", "hutch++"])
def test_the_standardised_error_is_student_s(trace, method):
    """(log p − exact)/stderr of 512 samples of a Gaussian of full covariance, whose probes' spread is near normal.

    Student's t of K − 1 degrees of freedom: by its mean and variance within 4 of their standard errors, and by
    Kolmogorov and Smirnov's distance.
    """
    stats = pytest.importorskip("scipy.stats")
    case, count = Turned(torch.logspace(-0.6, 0.2, 32, dtype=torch.float64)), 512
    x = case.sample(64)
    truth = fs.log_prob(case.flow(paths.CondOT()), x, trace="exact", **method).log_prob.repeat(count // 64)
    out = fs.log_prob(case.flow(paths.CondOT()), x.repeat(count // 64, 1), trace=trace, seed=3, **method)
    z = (out.log_prob - truth) / out.stderr
    law = stats.t(trace.count - 1)
    mean, variance, kurtosis = 0.0, law.var(), float(law.stats("k"))
    assert abs(z.mean() - mean) < 4 * math.sqrt(variance / count)
    assert abs(z.var() / variance - 1.0) < 4 * math.sqrt((2.0 + kurtosis) / count)
    assert stats.kstest(z.numpy(), law.cdf).pvalue > 1e-3
    assert out.error.isnan().all() == ("solver" in method)


@both
@pytest.mark.parametrize(("trace", "probes"), [("hutchinson", 8), ("hutch++", 12), ("xtrace", 8)])
def test_probes_are_unbiased_where_the_field_is_not_linear(trace, probes, method):
    """Within 4 standard errors of the mean over 512 samples; of XTrace too, whose own error bar is a little low."""
    x = IMAGES.sample(64, seed=5).repeat(8, 1, 1, 1)
    flow = IMAGES.flow(paths.CondOT())
    truth = fs.log_prob(flow, x[:64], trace="exact", **method).log_prob.repeat(8)
    error = fs.log_prob(flow, x, trace=trace, probes=probes, **method).log_prob - truth
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(error))
    assert error.std() > 1e-3


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


ANY = {
    "along a curve": {"nfe": 21},
    "adaptive": {"solver": solvers.Dopri5()},
    "fixed": {"solver": solvers.RK4(), "nfe": 20},
}
any_method = pytest.mark.parametrize("method", ANY.values(), ids=ANY)


@any_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_has_the_same_likelihood_in_any_batch(method, dtype):
    """Alone, in parts, and streamed, with conditioning of its own: to rounding, and the same nfe."""
    flow, x = labelled(paths.CondOT()), torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    options = {"probes": 2, "seed": 4, **method}
    whole = fs.log_prob(flow, x, cond={"y": y}, **options)
    part = fs.log_prob(flow, x[[4, 1]], samples=[4, 1], cond={"y": y[[4, 1]]}, **options)
    batched = fs.log_prob(flow, x, cond={"y": y}, batch=3, **options)
    source = zip(x.split(4), ({"y": v} for v in y.split(4)), strict=True)
    streamed = list(fs.batching.log_prob(flow, source, batch=3, **options))
    close = {"rtol": 1e-9 if dtype == torch.float64 else 2e-3, "atol": 1e-9 if dtype == torch.float64 else 2e-3}
    for name in ("log_prob", "stderr", "error", "latent", "x", "nfe"):
        values = getattr(whole, name)
        assert torch.allclose(getattr(part, name), values[[4, 1]], equal_nan=True, **close)
        assert torch.allclose(getattr(batched, name), values, equal_nan=True, **close)
        joined = torch.cat([getattr(s, name) for s in streamed])
        assert torch.allclose(joined, values, equal_nan=True, **close)
    assert whole.log_prob.dtype == dtype
    assert len(fs.log_prob(flow, x[:0], cond={"y": y[:0]}, **options).log_prob) == 0


def test_guided_flows_count_and_warn():
    """ClassifierFree in an interval: the network's rows of each sample are its nfe; the density is not the model's."""
    for method in ({"nfe": 36}, {"solver": solvers.Dopri5(1e-3, 1e-3)}, {"solver": solvers.RK4(), "nfe": 24}):
        inner = labelled(paths.VP())
        flow = fs.guidance.ClassifierFree(inner, 2.0, unconditional={"y": 0}, interval=(-1.0, 2.0))
        who = torch.arange(5)
        with pytest.warns(UserWarning, match="guid"):
            out = fs.log_prob(flow, torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double(),
                              cond={"y": torch.tensor([1, 2, 3, 1, 2]), "who": who},
                              verify=False, **method)  # fmt: skip
        assert out.nfe.tolist() == inner.net.each(5)
        assert int(out.nfe.max()) <= method.get("nfe", 10_000)


def test_a_tolerance_of_log_p_s_own():
    """The state's loose, log p's tight: more evaluations and less error than with the loose one alone."""
    x = PLANE.sample(16, seed=3)
    truth, flow = PLANE.log_prob(x), PLANE.flow(paths.CondOT())
    solver = solvers.Dopri5(rtol=0.0, atol=1e-3)
    loose, tight = (fs.log_prob(flow, x, solver=solver, trace="exact", tolerance=t) for t in (None, 1e-6))
    assert (tight.nfe > loose.nfe).all()
    assert (tight.log_prob - truth).abs().max() < 0.1 * (loose.log_prob - truth).abs().max()
    assert torch.equal(fs.log_prob(flow, x, solver=solver, trace="exact", tolerance=1e-3).log_prob, loose.log_prob)


def test_one_network_call_an_evaluation():
    calls = []
    inner = PLANE.flow(paths.CondOT())

    def net(x, t):
        calls.append(len(x))
        return inner.net(x, t)

    flow = fs.Flow(net, paths.CondOT())
    for kind in ({"trace": "exact"}, {"probes": 3}):
        options = {**kind, "verify": False}
        calls.clear()
        out = fs.log_prob(flow, PLANE.sample(4), solver=solvers.RK4(), nfe=20, **options)
        assert len(calls) == 20
        assert out.nfe.tolist() == [20] * 4
        calls.clear()
        out = fs.log_prob(flow, PLANE.sample(4), nfe=25, **options)
        assert len(calls) == 25
        assert out.nfe.tolist() == [25] * 4
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


def test_gradients_flow_along_a_curve():
    """∇ log p is the score, second looks included; gradcheck by x and the weights of a small network."""
    x = PLANE.sample(3, seed=3).requires_grad_()
    for repeats in (0, None):
        out = fs.log_prob(PLANE.flow(paths.CondOT()), x, nfe=128, repeats=repeats, trace="exact")
        (gradient,) = torch.autograd.grad(out.log_prob.sum(), x)
        assert (gradient - PLANE.score(x.detach(), paths.CondOT().at(1.0))).abs().max() < 1e-3
    torch.manual_seed(0)
    w, b = (0.3 * torch.randn(*s, dtype=torch.float64) for s in ((3, 2), (2, 3)))

    def value(x, w, b):
        flow = fs.Flow(lambda x, t: torch.tanh(x @ w.T + t[:, None]) @ b.T - x, paths.CondOT())
        grad = x.requires_grad or w.requires_grad
        return fs.log_prob(flow, x, nfe=12, repeats=1, trace="hutchinson", probes=2, grad=grad).log_prob

    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(value, [v.clone().requires_grad_() for v in (x, w, b)], atol=1e-4)
    assert torch.autograd.gradcheck(
        lambda w, b: value(x, w, b), [v.clone().requires_grad_() for v in (w, b)], atol=1e-4
    )


@any_method
def test_no_graph_is_recorded_unless_it_is_wanted(method):
    x = PLANE.sample(3)
    before = x.clone()
    flow = PLANE.flow(paths.CondOT())
    for options in ({}, {"trace": "exact"}, {"trace": Hutchinson(1, mode="forward")}):
        out = fs.log_prob(flow, x, **method, **options)
        assert not any(v.requires_grad for v in (out.log_prob, out.latent, out.x))
        assert torch.equal(x, before)
        assert not x.requires_grad
    tracked = x.clone().requires_grad_()
    assert not fs.log_prob(flow, tracked, grad=False, **method).log_prob.requires_grad
    assert fs.log_prob(flow, tracked, **method).log_prob.requires_grad
    with torch.no_grad():
        assert not fs.log_prob(flow, tracked, **method).log_prob.requires_grad
    assert tracked.grad is None
    assert torch.equal(tracked.detach(), before)


def test_the_latent_is_the_encoding():
    x = PLANE.sample(4, seed=3)
    flow = PLANE.flow(paths.CondOT())
    out = fs.log_prob(flow, x, solver=TIGHT, trace="exact")
    assert (out.latent - fs.encode(flow, x, solver=TIGHT).x).abs().max() < 1e-6


@any_method
@pytest.mark.parametrize("until", [0.0, 0.6])
def test_a_failed_sample_is_nan_and_the_others_stand(method, until):
    """Whether the network fails it at once or on the way; the error says where."""
    inner = PLANE.flow(paths.CondOT())

    def net(x, t, who):
        bad = (who == 1) & (t <= 1.0 - until)
        return torch.where(bad, torch.nan, 1.0)[:, None] * inner.net(x, t)

    flow, x, cond = fs.Flow(net, paths.CondOT()), PLANE.sample(3, seed=3), {"who": torch.arange(3)}
    clean = fs.log_prob(inner, x, trace="exact", **method)
    out = fs.log_prob(flow, x, trace="exact", cond=cond, throw=False, **method)
    assert out.log_prob.isnan().tolist() == [False, True, False]
    assert out.solution.status.tolist() == [solvers.Status.SUCCESS, solvers.Status.NONFINITE, solvers.Status.SUCCESS]
    assert (out.log_prob - clean.log_prob)[[0, 2]].abs().max() < 1e-9
    assert 0.0 <= float(out.solution.t[1]) <= 1.0 - until + 0.15  # a step or two around
    with pytest.raises(fs.SolverError, match=r"1 of 3 samples .* sample 1: met a value that is not finite at t = "):
        fs.log_prob(flow, x, trace="exact", cond=cond, **method)


@pytest.mark.parametrize("where", [0.9, 0.5, 0.05])
def test_a_failure_anywhere_along_a_curve_is_noticed(where):
    """That of a single evaluation, that of a trace alone, and that of a second look."""
    inner = PLANE.flow(paths.CondOT())
    x = PLANE.sample(3, seed=3)
    for hole in ("value", "trace"):

        def net(x, t, hole=hole):
            out, near = inner.net(x, t), (t[:, None] < where) & (torch.arange(3)[:, None] == 1)
            broken = torch.where(near, torch.nan, 0.0)
            return out + (broken if hole == "value" else broken * (x - x.detach()))

        out = fs.log_prob(fs.Flow(net, paths.CondOT()), x, trace="exact", nfe=24, throw=False)
        assert out.log_prob.isnan().tolist() == [False, True, False]
        assert out.solution.ok.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"solver": solvers.DDPM(), "nfe": 5}, TypeError, "a likelihood is of the ODE: give a Runge–Kutta solver"),
        ({"solver": 5}, TypeError, "solver is 5; expected a solver such as"),
        ({"solver": solvers.Dopri5}, TypeError, "pass an instance"),
        ({"solver": solvers.Euler(), "nfe": 5, "repeats": 2}, TypeError, "repeats=2 is for a likelihood along a curve"),
        ({"solver": solvers.RK4()}, ValueError, "give nfe=… or explicit times"),
        ({"solver": solvers.RK4(), "nfe": 8, "tolerance": 1e-3}, TypeError, "tolerance=0.001 goes with an adaptive"),
        ({"tolerance": -1.0}, ValueError, "tolerance = -1.0; expected nats > 0"),
        ({"solver": solvers.Dopri5(1e-3, 0.0), "tolerance": 1e-3}, TypeError, "with atol > 0"),
        ({"solver": "auto", "tolerance": 1e-3}, TypeError, "tolerance=0.001 goes with an adaptive Runge–Kutta solver"),
        ({"solver": "auto", "chart": "data"}, TypeError, "has no chart"),
        ({"solver": "auto", "gradient": "checkpoint"}, TypeError, "a curve has gradient='direct' only"),
        ({"gradient": "adjoint"}, ValueError, "use gradient='checkpoint'"),
        ({"gradient": "backprop"}, ValueError, "gradient = 'backprop' is not known"),
        ({"trace": "slq"}, ValueError, r"expected one of 'exact', 'hutchinson', 'hutch\+\+', 'xtrace'"),
        ({"probes": 0}, ValueError, "probes = 0"),
        ({"interval": (0.0, 1.0)}, ValueError, "fall from data to noise"),
        ({"interval": (1.2, 0.0)}, ValueError, "within the network's window"),
        ({"interval": (1.0, 0.2)}, ValueError, "ends at t = 0.2, .* give prior="),
        ({"interval": (1.0, 0.2), "prior": "normal"}, ValueError, "give prior="),
        ({"prior": "uniform"}, ValueError, "prior = 'uniform'; expected 'normal', 'marginal' or a function"),
        ({"chart": "data"}, ValueError, "chart='straight'"),
        ({"samples": [1]}, ValueError, "samples"),
        ({"grid": "log_snr"}, TypeError, "chooses its own steps"),
        ({"nfe": 1, "prior": "marginal"}, ValueError, "nfe = 1; expected at least 2: one of them for the final step"),
        ({"batch": 0}, ValueError, "batch = 0; expected an integer >= 1"),
        ({"cond": 3}, TypeError, "cond is a int; expected a mapping"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_is_wrong(options, error, words):
    with pytest.raises(error, match=words):
        fs.log_prob(PLANE.flow(paths.CondOT()), PLANE.sample(3), **{"solver": solvers.Dopri5(), **options})


def test_states_and_modes_that_are_none():
    flow = PLANE.flow(paths.CondOT())
    with pytest.raises(TypeError, match=r"the state is of dtype torch\.int64; expected a floating-point tensor"):
        fs.log_prob(flow, torch.zeros(2, 2, dtype=torch.int64))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode forbids; use no_grad"):
        fs.log_prob(flow, PLANE.sample(2))
    with pytest.raises(TypeError, match=r"expected a flowsolve\.Flow"):
        fs.log_prob(flow.net, PLANE.sample(2))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fs.log_prob(flow, PLANE.sample(2), order=3)


def test_a_network_that_autograd_cannot_see_is_refused():
    inner = PLANE.flow(paths.CondOT())
    flow = fs.Flow(lambda x, t: inner.net(x, t).detach(), paths.CondOT())
    for options in ({}, {"solver": solvers.Dopri5()}):
        with pytest.raises(ValueError, match="does not depend on x for autograd"):
            fs.log_prob(flow, PLANE.sample(3), **options)


@pytest.mark.parametrize("solver", ["auto", solvers.Dopri5(1e-6, 1e-6), solvers.RK4()], ids=["auto", "dopri5", "rk4"])
def test_data_without_a_shape_and_batches_without_samples(solver: Any) -> None:
    """Numbers as samples, (B,), are what (B, 1) is; no samples have no densities, by batches or not."""
    options = {} if isinstance(solver, solvers.Dopri5) else {"nfe": 24}
    line = fs.Flow(lambda x, t: -x, paths.CondOT())
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for trace in ("exact", "hutchinson"):
        flat = fs.log_prob(line, x, solver=solver, trace=trace, **options)
        column = fs.log_prob(line, x[:, None], solver=solver, trace=trace, **options)
        torch.testing.assert_close(flat.log_prob, column.log_prob, rtol=1e-12, atol=1e-12)
        assert flat.latent.shape == flat.x.shape == (5,)
    assert fs.sample_log_prob(line, (4,), solver=solver, **options).x.shape == (4,)
    levels = torch.tensor([3, 200, 255])
    one = fs.bits_per_dim(line, levels, solver=solver, **options).bpd
    torch.testing.assert_close(one, fs.bits_per_dim(line, levels[:, None], solver=solver, **options).bpd)
    for batch in (None, 2):
        none = fs.log_prob(line, torch.zeros(0, 3), solver=solver, batch=batch, **options)
        assert none.log_prob.shape == none.error.shape == none.stderr.shape == (0,)
        assert none.latent.shape == none.x.shape == (0, 3)
        assert fs.sample_log_prob(line, (0, 3), solver=solver, batch=batch, **options).x.shape == (0, 3)
    with pytest.raises(ValueError, match="no numbers, and no density"):
        fs.log_prob(line, torch.zeros(3, 0), solver=solver, **options)
    with torch.inference_mode():
        inner, cond = torch.ones(3, 2), {"shift": torch.ones(3, 1)}
        with pytest.raises(RuntimeError, match="inference_mode forbids"):
            fs.log_prob(line, inner, solver=solver, **options)
    shifted = fs.Flow(lambda x, t, shift: -x * shift, paths.CondOT())
    found = fs.log_prob(shifted, inner, solver=solver, cond=cond, **options).log_prob
    right = fs.log_prob(line, torch.ones(3, 2), solver=solver, **options).log_prob
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("size", [1, 2])
def test_more_products_than_numbers(size: int) -> None:
    line, x = fs.Flow(lambda x, t: -x, paths.CondOT()), torch.ones(3, size)
    with pytest.raises(ValueError, match=f"6 products on {size} numbers; use trace='exact'"):
        fs.log_prob(line, x, trace="xtrace", probes=6, nfe=24)
    right = fs.log_prob(line, x, trace="exact", nfe=24).log_prob
    torch.testing.assert_close(fs.log_prob(line, x, trace="hutch++", probes=6, nfe=24).log_prob, right)
