"""The likelihood along a curve against closed forms: accuracy, order, the worth of its correction, its error."""

import math
from itertools import pairwise

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.likelihood.curve import WINDOW, Curve, Rule, nodes
from flowsolve.predictions import PREDICTIONS
from flowsolve.problems import GaussianMixture
from tests.cases import PATHS
from tests.likelihood.mixtures import MIXTURES, Turned, at_data, at_noise, bits

CONDOT = paths.CondOT()
NOT_NOISE = "Discrete-not-clean"  # its table begins far from noise, where "marginal" means nothing
ESTIMATE_SOLVERS = [
    solvers.DDIM(),
    solvers.UniPC(),
    solvers.DEIS(),
    solvers.DPMSolverPP(),
    solvers.IPNDM(),
    solvers.LMS(),
    solvers.DPMSolverPPS(),
    solvers.DPMSolver(order=3),
    solvers.RES(),
    solvers.StochasticHeun(eta=0.0),
    solvers.SASolver(tau=0.0),
    solvers.Multistep(3, warmup="single"),
    solvers.Multistep(3, cooldown=True),
    solvers.Multistep(2, form="straight"),
]


def rms(v):
    return float(v.square().mean().sqrt())


def along(case, path, x, **options):
    options = {"trace": "exact", "prior": at_noise(case, path), **options}
    return fs.log_prob(case.flow(path, options.pop("prediction", "velocity")), x, **options)


# ---- closed forms


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES)
def test_the_closed_form_to_a_tenth_of_a_millibit(case, path):
    """|error| <= 1e-4 bpd for every sample from 128 evaluations, by "marginal" and in 2 dimensions the exact prior."""
    x, truth = at_data(case, path, 4)
    priors = ["marginal"] if path != PATHS[NOT_NOISE] else []
    for prior in priors if priors and x[0].numel() > 2 else [*priors, at_noise(case, path)]:
        out = along(case, path, x, nfe=128, prior=prior)
        assert bits(out.log_prob - truth, x).abs().max() < 1e-4
        assert out.nfe.tolist() == [128] * 4
        assert torch.equal(out.stderr, torch.zeros(4, dtype=torch.float64))
        assert out.latent.shape == x.shape
        assert torch.equal(out.x, x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_prediction_gives_one_density(path, prediction):
    """Those included whose estimate does not exist at an end of the path; a curve asks only where it does."""
    case = MIXTURES["D=2"]
    x, truth = at_data(case, path, 4)
    out = along(case, path, x, nfe=64, prediction=prediction)
    assert bits(out.log_prob - truth, x).abs().max() < 1e-4
    assert out.nfe.tolist() == [64] * 4


def test_the_default_budget():
    """48 evaluations on CondOT: nine samples in ten are right to 5e-4 bpd, the mean to that, and the rms is below 2e-3.

    The few samples that settle late between their modes rule the rms: 8e-4 in 16 dimensions, less elsewhere.
    """
    for case in MIXTURES.values():
        x, truth = at_data(case, CONDOT, 48)
        out = fs.log_prob(case.flow(CONDOT), x, trace="exact")
        assert out.nfe.tolist() == [48] * 48
        error = bits(out.log_prob - truth, x)
        assert abs(error.mean()) < 5e-4
        assert error.abs().quantile(0.9) < 5e-4
        assert rms(error) < 2e-3


def test_a_full_covariance():
    """Where the data vary far more in some directions than in others, the noise end included."""
    case = Turned(torch.linspace(0.2, 2.5, 16, dtype=torch.float64))
    x = case.sample(16)
    out = fs.log_prob(case.flow(CONDOT), x, trace="exact", nfe=128)
    assert bits(out.log_prob - case.log_prob(x), x).abs().max() < 2e-5


def test_part_of_the_way():
    case, (start, end) = MIXTURES["D=16"], (0.9, 0.3)
    x, truth = at_data(case, CONDOT, 4, start)
    out = along(case, CONDOT, x, interval=(start, end), nfe=64, prior=at_noise(case, CONDOT, end))
    assert (out.log_prob - truth).abs().max() < 1e-4
    tight = solvers.Dopri5(1e-9, 1e-9)
    latent = fs.encode(case.flow(CONDOT), x, solver=tight, interval=(start, end)).x
    assert (out.latent - latent).abs().max() < 1e-3


def test_the_latent_is_the_encoding():
    """To the solver's accuracy, where the path ends in pure noise and where it does not."""
    for path in (CONDOT, paths.VP()):
        case = MIXTURES["D=2"]
        x, _ = at_data(case, path, 4)
        truth = fs.encode(case.flow(path), x, solver=solvers.Dopri5(1e-9, 1e-9)).x
        assert (along(case, path, x, nfe=128).latent - truth).abs().max() < 2e-3


def test_float32():
    case = MIXTURES["D=16"]
    x, truth = at_data(case, CONDOT, 8)
    out = fs.log_prob(case.flow(CONDOT), x.float(), trace="exact", nfe=128)
    assert out.log_prob.dtype == torch.float32
    assert bits(out.log_prob.double() - truth, x).abs().max() < 1e-4


# ---- convergence


GAUSSIAN = GaussianMixture(torch.tensor([[0.5, -0.3, 1.0]]), torch.tensor([[0.3, 0.6, 1.1]]), dtype=torch.float64)
MILD = GaussianMixture([[0.5, -0.3, 0.4], [-0.4, 0.3, 0.0]], [0.7, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("path", [paths.VP(), paths.EDM()], ids=["VP", "EDM"])
@pytest.mark.parametrize("case", [GAUSSIAN, MILD], ids=["gaussian", "mild mixture"])
@pytest.mark.parametrize("solver", [solvers.Multistep(3), solvers.UniPC()], ids=["multistep", "unipc"])
def test_fourth_order_in_the_number_of_nodes(solver, case, path):
    """The two integrals are of order 4: the last halving of the steps shows 4 ± 0.2, the way there no less in all."""
    x, truth = at_data(case, path, 16)
    errors = [
        rms(along(case, path, x, nfe=n + 1, repeats=0, solver=solver).log_prob - truth) for n in (16, 32, 64, 128, 256)
    ]
    assert math.log2(errors[3] / errors[4]) == pytest.approx(4.0, abs=0.2)
    assert math.log2(errors[0] / errors[4]) > 4 * (4.0 - 0.2)


def test_the_quadrature_is_that_of_cubics():
    """Σ w λ^p is the integral for p <= 3, on nodes as uneven as they come."""
    path = paths.VP()
    rule = Rule(path, [path.time(v) for v in (6.0, 5.2, 3.0, 2.9, 0.0, -2.5, -4.0)])
    for p in range(4):
        exact = (6.0 ** (p + 1) - (-4.0) ** (p + 1)) / (p + 1)
        assert float(rule.weights @ rule.log_snr**p) == pytest.approx(exact, rel=1e-10)
    assert float(rule.weights @ rule.log_snr**4) != pytest.approx((6.0**5 + 4.0**5) / 5, rel=1e-4)


def test_nodes_cover_the_window_where_the_path_has_no_end():
    times = nodes(CONDOT, 1.0, 0.0, 48)
    found = [float(CONDOT.at(t).log_snr) for t in times]
    assert (found[0], found[-1]) == pytest.approx(WINDOW[::-1])
    assert all(a > b for a, b in pairwise(found))
    many = [float(CONDOT.at(t).log_snr) for t in nodes(CONDOT, 1.0, 0.0, 480)]  # a tenth of the stretches beyond
    assert (many[0], many[-1]) == pytest.approx((WINDOW[1] + math.log(10.0), WINDOW[0] - math.log(10.0)))
    inner = nodes(CONDOT, 0.8, 0.2, 9)
    assert (inner[0], inner[-1], len(inner)) == (0.8, 0.2, 9)
    with pytest.raises(ValueError, match=r"the log-SNR runs from .* expected it to fall"):
        nodes(CONDOT, 0.2, 0.8, 9)


# ---- the second integral


def test_a_poor_solver_is_corrected():
    """DDIM's density without the second integral is off by 0.1 nats and more; with it, by a tenth of that at most."""
    path, case = paths.VP(), MIXTURES["D=16"]
    x, truth = at_data(case, path, 16)
    flow, count = case.flow(path), 49
    rule = Rule(path, nodes(path, 1.0, 0.0, count))
    solved = fs.encode(flow, x, solver=solvers.DDIM(), interval=(1.0, 0.0), grid=list(rule.times), nfe=count - 1)
    states, parts = x, []
    for t, after in zip(rule.times, [*rule.times[1:], None], strict=True):
        here = states.clone().requires_grad_()
        estimate = flow.estimate(here, t)
        point, noise = path.at(t), estimate.noise
        trace = sum(torch.autograd.grad(noise[:, i].sum(), here, retain_graph=True)[0][:, i] for i in range(16))
        parts.append((states, estimate.data.detach(), (float(point.sigma) * trace)[:, None]))
        if after is not None:  # DDIM: x' = α' ẑ + σ' ε̂
            there = path.at(after)
            states = (there.alpha * estimate.data + there.sigma * noise).detach()
    assert (states - solved.x).abs().max() < 1e-9
    curve = Curve(rule, *(torch.stack(v) for v in zip(*parts, strict=True)))
    base = at_noise(case, path)(states) + 16 * math.log(rule.points[-1].alpha / rule.points[0].alpha)
    quadrature = torch.tensordot(torch.from_numpy(rule.weights), curve.trace, dims=1)[:, 0]
    plain = base + quadrature - truth
    corrected = base + curve.change()[:, 0] - truth
    assert rms(plain) > 0.1
    assert rms(corrected) < 0.1 * rms(plain)
    out = along(case, path, x, solver=solvers.DDIM(), nfe=count, repeats=0)
    assert (out.log_prob - truth - corrected).abs().max() < 1e-9


@pytest.mark.parametrize("solver", ESTIMATE_SOLVERS, ids=repr)
def test_any_solver_of_estimates_that_draws_no_noise(solver):
    """Exactly nfe evaluations, whatever its steps cost, and the density to 0.02 bpd."""
    case, calls = MIXTURES["D=16"], []
    inner = case.flow(CONDOT)

    def net(x, t):
        calls.append(len(x))
        return inner.net(x, t)

    x, truth = at_data(case, CONDOT, 16)
    for nfe in (48, 49, 50):
        calls.clear()
        out = fs.log_prob(fs.Flow(net, CONDOT), x, solver=solver, trace="exact", nfe=nfe, verify=False)
        assert out.nfe.tolist() == [nfe] * 16
        assert calls == [16] * nfe
        assert bits(out.log_prob - truth, x).abs().max() < 0.02


@pytest.mark.parametrize(
    "solver", [solvers.DDPM(), solvers.DDIM(eta=0.5), solvers.ERSDE(), solvers.SDEDPMSolverPP(),
               solvers.EulerMaruyama(), solvers.SEEDS(), solvers.Ancestral(solvers.DDIM())],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_solvers_that_draw_noise_are_refused(solver):
    with pytest.raises(TypeError, match=r"a likelihood is of the ODE: give a Runge–Kutta solver, or one of estimates"):
        fs.log_prob(GAUSSIAN.flow(CONDOT), GAUSSIAN.sample(2), solver=solver)


# ---- second looks and the error


def test_second_looks_help_where_modes_are_far_apart():
    """At the same 16, 24 and 32 evaluations: less than 0.7 of the rms without them."""
    for case in (MIXTURES["D=16"], MIXTURES["images"]):
        x, truth = at_data(case, CONDOT, 64)
        for nfe in (16, 24, 32):
            plain, looked = (
                rms(fs.log_prob(case.flow(CONDOT), x, trace="exact", nfe=nfe, repeats=r).log_prob - truth)
                for r in (0, None)
            )
            assert looked < 0.7 * plain


def test_repeats_are_part_of_the_budget():
    case = MIXTURES["D=2"]
    x, truth = at_data(case, CONDOT, 4)
    for repeats in (0, 1, 7):
        out = fs.log_prob(case.flow(CONDOT), x, trace="exact", nfe=64, repeats=repeats)
        assert out.nfe.tolist() == [64] * 4
        assert bits(out.log_prob - truth, x).abs().max() < 1e-3


@pytest.mark.parametrize("nfe", [16, 24, 32, 48])
@pytest.mark.parametrize("case", [MIXTURES["D=2"], MIXTURES["D=16"], MIXTURES["images"], GAUSSIAN], ids=str)
def test_the_error_covers(case, nfe):
    """The true error is within the estimate for 85 samples in 100 (measured: 0.875 to 1, the median 0.97).

    What is beyond the ends of the window is not in it: 1e-4 nats, which only two dimensions at 48 evaluations show.
    """
    x, truth = at_data(case, CONDOT, 64)
    out = fs.log_prob(case.flow(CONDOT), x, trace="exact", nfe=nfe)
    assert ((out.log_prob - truth).abs() <= out.error + 1e-4).double().mean() >= 0.85
    assert out.error.median() < 60.0 / (nfe / 16) ** 4  # and says something


def test_the_error_is_unknown_where_there_are_no_nodes_to_drop():
    x, _ = at_data(GAUSSIAN, CONDOT, 2)
    assert fs.log_prob(GAUSSIAN.flow(CONDOT), x, nfe=6, repeats=0).error.isnan().all()
    assert fs.log_prob(GAUSSIAN.flow(CONDOT), x, nfe=7, repeats=0).error.isfinite().all()


# ---- grids


def test_grids_of_one_s_own():
    """A spacing by name or object, explicit flow times, and values of a coordinate."""
    case, path = MIXTURES["D=2"], paths.VP()
    x, truth = at_data(case, path, 4)
    levels = torch.linspace(float(path.at(1.0).log_snr), float(path.at(0.0).log_snr), 60).tolist()
    times = [1.0, *(path.time(v) for v in levels[1:-1]), 0.0]
    for grid, options in (
        ("log_snr", {"nfe": 60}),
        (times, {}),
        (times, {"nfe": 63, "repeats": 3}),
        (times, {"nfe": 64}),
    ):
        out = along(case, path, x, grid=grid, **options)
        assert bits(out.log_prob - truth, x).abs().max() < 1e-3
        assert out.nfe.tolist() == [options.get("nfe", 60)] * 4
    inside = fs.grids.At(log_snr=[-4.3, *torch.linspace(-4.0, 6.0, 60).tolist()])
    x, truth = at_data(case, CONDOT, 4)
    out = along(case, CONDOT, x, grid=inside)  # infinite ends are left to the window's rule
    assert bits(out.log_prob - truth, x).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("grid", "options", "words"),
    [
        ([0.6, 0.4, 0.3, 0.2, 0.1], {}, "expected times within it, among them t = 1 and t = 0"),
        ([1.0, 0.7, 0.4, 0.3, 0.2], {}, "among them t = 0"),
        ([1.0, 0.8, 0.4, 0.4, 0.0], {}, "two or more whose log-SNR falls"),
        ([], {}, "among them t = 1 and t = 0"),
        ([1.0, 0.7, 0.4, 0.0], {"nfe": 3}, "Drop nfe= or grid="),
        ([1.0, 0.7, 0.4, 0.0], {"nfe": 9, "repeats": 1}, "Drop nfe= or grid="),
        ([0.9, 0.7, 0.4, 0.1], {"interval": (0.8, 0.1)}, "among them t = 0.8"),
        ([0.9, 0.8, 0.4, 0.1], {"interval": (0.8, 0.1)}, "expected times within it, among them its ends"),
        (None, {"nfe": 2}, r"a budget of 2 estimates, 0 of them second looks, leaves 1 steps; .* 16 evaluations"),
        (None, {"nfe": 20, "repeats": 12}, "repeats = 12 for 8 nodes; expected fewer second looks"),
        (None, {"nfe": 20, "repeats": -1}, "repeats = -1; expected an integer >= 0"),
        (None, {"nfe": 20, "repeats": 1.0}, "repeats = 1.0; expected an integer >= 0"),
        (None, {"nfe": 0}, "nfe = 0; expected an integer >= 1"),
    ],
)  # fmt: skip
def test_bad_grids_and_budgets(grid, options, words):
    options = {"prior": "marginal", "solver": solvers.DDIM(), **options}
    with pytest.raises(ValueError, match=words):
        fs.log_prob(GAUSSIAN.flow(paths.VP()), GAUSSIAN.sample(2), grid=grid, **options)
