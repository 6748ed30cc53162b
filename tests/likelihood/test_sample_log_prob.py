"""Samples with their densities in one pass: the density is that of the sample, the sample that of fs.sample."""

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.likelihood import Exact
from flowsolve.likelihood.along import Along
from tests.cases import PATHS
from tests.guidance.labelled import labelled
from tests.likelihood.mixtures import MIXTURES, at_noise, bits

CONDOT = paths.CondOT()
DOUBLE = {"dtype": torch.float64}
TIGHT = solvers.Dopri5(1e-9, 1e-9)
PLANE = MIXTURES["D=2"]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_an_adaptive_sample_has_the_density_that_log_prob_gives_it(path):
    """Between log-SNRs of −5 and 6, by the two directions: 1e-5 nats; and the closed form, with the exact prior."""
    end, begin = (path.time(v) for v in (min(6.0, path.log_snr(path.window[1])), max(-5.0, path.log_snr(0.0))))
    prior, point = at_noise(PLANE, path, begin), path.at(end)
    start = PLANE.marginal(path, begin).sample(3, seed=4)
    options = {"solver": TIGHT, "trace": "exact", "prior": prior}
    made = fs.sample_log_prob(PLANE.flow(path), start=start, interval=(begin, end), **options)
    again = fs.log_prob(PLANE.flow(path), made.x, interval=(end, begin), **options)
    assert (made.log_prob - again.log_prob).abs().max() < 1e-5
    assert (made.log_prob - PLANE.log_prob(made.x, point)).abs().max() < 1e-5
    assert torch.equal(made.latent, start)
    assert (again.latent - start).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_sample_along_a_curve(path):
    """The closed form to 1e-4 bpd from 128 evaluations; and log_prob of the sample within both errors."""
    for case in (PLANE, MIXTURES["images"]):
        options = {"trace": "exact", "prior": at_noise(case, path)}
        start = (
            path.prior_std * torch.randn(4, *case.means.shape[1:], generator=torch.Generator().manual_seed(0)).double()
        )
        if path.at(0.0).alpha:
            start = case.marginal(path, 0.0).sample(4, seed=4)
        for nfe, bound in ((128, 1e-4), (32, None))[: 2 if case is PLANE else 1]:
            made = fs.sample_log_prob(case.flow(path), start=start, nfe=nfe, **options)
            error = made.log_prob - case.log_prob(made.x, path.at(path.window[1]))
            assert made.nfe.tolist() == [nfe] * 4
            if bound:
                assert bits(error, start).abs().max() < bound
            again = fs.log_prob(case.flow(path), made.x, nfe=nfe, **options)
            gap = (made.log_prob - again.log_prob).abs()
            assert (gap <= made.error + again.error + 2e-4).all()
        assert torch.equal(made.latent, start)


@pytest.mark.parametrize("path", [paths.VP(), paths.EDM(), PATHS["Discrete"]], ids=repr)
@pytest.mark.parametrize(
    "solver", [solvers.Multistep(3), solvers.UniPC(), solvers.DDIM(), solvers.RES(), solvers.DEIS()],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_the_sample_is_that_of_the_solver_on_the_same_grid(path, solver):
    """To the bit, for the same seed and samples; second looks leave it alone."""
    flow = PLANE.flow(path)
    options = {"trace": Exact(), "nfe": 25, "repeats": 2, "prior": "marginal"}
    made = fs.sample_log_prob(flow, (3, 2), solver=solver, seed=7, **options, **DOUBLE)
    stops = Along(flow, (0.0, path.window[1]), solver=solver, **options).stops
    plain = fs.sample(flow, (3, 2), solver=solver, seed=7, grid=stops, interval=(stops[0], stops[-1]), **DOUBLE)
    assert torch.equal(made.x, plain.x)
    assert torch.equal(made.solution.x, made.x)
    assert made.nfe.tolist() == [25] * 3


@pytest.mark.parametrize("path", [CONDOT, paths.Trig(), PATHS["CondOT-sigma_min"]], ids=repr)
def test_out_of_pure_noise_the_sample_is_that_of_the_flow(path):
    """The stretch from α = 0 is no step of the solver: the sample of the ODE to 1e-3 from 64 evaluations, then 1e-4."""
    flow = PLANE.flow(path)
    plain = fs.sample(flow, (16, 2), solver=TIGHT, seed=7, **DOUBLE).x
    for nfe, bound in ((64, 1e-3), (128, 1e-4)):
        made = fs.sample_log_prob(flow, (16, 2), nfe=nfe, repeats=0, trace="exact", seed=7, **DOUBLE)
        assert (made.x - plain).abs().max() < bound
        assert torch.equal(made.solution.x, made.x)


@pytest.mark.parametrize(
    "method", [{"nfe": 24}, {"solver": solvers.Dopri5()}, {"solver": solvers.RK4(), "nfe": 24}],
    ids=["along a curve", "adaptive", "fixed"],
)  # fmt: skip
def test_seeds_samples_and_batches(method):
    """Sample 3 is sample 3 in any batch; its noise that of fs.sample; its conditioning its own."""
    flow, y = labelled(CONDOT), torch.tensor([0, 1, 2, 3, 0])
    options = {"seed": 5, "probes": 2, **method, **DOUBLE}
    whole = fs.sample_log_prob(flow, (5, 2), cond={"y": y}, **options)
    part = fs.sample_log_prob(flow, (2, 2), samples=[3, 1], cond={"y": y[[3, 1]]}, **options)
    batched = fs.sample_log_prob(flow, (5, 2), cond={"y": y}, batch=2, **options)
    for name in ("log_prob", "stderr", "error", "x", "latent", "nfe"):
        values = getattr(whole, name)
        assert torch.allclose(getattr(part, name), values[[3, 1]], rtol=1e-9, atol=1e-9, equal_nan=True)
        assert torch.allclose(getattr(batched, name), values, rtol=1e-9, atol=1e-9, equal_nan=True)
    start = fs.sample(
        flow, (5, 2), seed=5, solver=solvers.Euler(), nfe=1, interval=(0.0, 1e-12), cond={"y": y}, **DOUBLE
    ).x
    assert (whole.latent - start).abs().max() < 1e-9
    other = fs.sample_log_prob(flow, (5, 2), cond={"y": y}, **{**options, "seed": 6})
    assert (other.x - whole.x).abs().min() > 1e-6


def test_an_adaptive_sample_is_that_of_sample():
    """Within their tolerance: the density has a say in the steps."""
    made = fs.sample_log_prob(PLANE.flow(CONDOT), (4, 2), solver=TIGHT, seed=3, trace="exact", **DOUBLE)
    plain = fs.sample(PLANE.flow(CONDOT), (4, 2), solver=TIGHT, seed=3, **DOUBLE)
    assert (made.x - plain.x).abs().max() < 1e-7


def test_derivatives():
    """d(sample)/d(noise) and of its density, along a curve, against finite differences."""
    flow = PLANE.flow(CONDOT)
    start = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(start):
        out = fs.sample_log_prob(flow, start=start, nfe=14, repeats=0, trace="exact")
        return out.log_prob, out.x

    assert torch.autograd.gradcheck(value, start.requires_grad_(), atol=1e-4)


def test_a_failed_sample_is_nan_and_the_others_stand():
    inner, cond = PLANE.flow(CONDOT), {"who": torch.arange(3)}

    def net(x, t, who):
        return torch.where((who == 1) & (t > 0.5), torch.nan, 1.0)[:, None] * inner.net(x, t)

    for method in ({"nfe": 24}, {"solver": solvers.Dopri5()}):
        out = fs.sample_log_prob(fs.Flow(net, CONDOT), (3, 2), cond=cond, throw=False, **method, **DOUBLE)
        assert out.log_prob.isnan().tolist() == [False, True, False]
        assert 0.4 < out.solution.t[1] < 0.75  # the last good node, or the next
        with pytest.raises(fs.SolverError, match=r"1 of 3 samples .* sample 1: met a value that is not finite at t = "):
            fs.sample_log_prob(fs.Flow(net, CONDOT), (3, 2), cond=cond, **method, **DOUBLE)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, "give one of shape=.* and start="),
        ({"shape": (2, 2), "start": torch.zeros(2, 2)}, ValueError, "give one of shape=.* and start="),
        ({"shape": (2, 2), "interval": (1.0, 0.0)}, ValueError, "rise from noise to data"),
        ({"shape": (2, 2), "interval": (0.3, 1.0)}, ValueError, "t = 0.3, .* give prior="),
        ({"shape": (2, 2), "samples": [1]}, ValueError, "samples lists 1 numbers for a batch of 2"),
        ({"shape": (2.5, 2)}, ValueError, "shape = "),
        ({"shape": (2, 2), "solver": solvers.DDPM()}, TypeError, "a likelihood is of the ODE"),
        ({"shape": (2, 2), "grid": [0.0, 0.5, 1.2]}, ValueError, "expected times within it"),
        ({"shape": (2, 2), "nfe": 4}, ValueError, "a budget of 4 estimates"),
        ({"start": torch.zeros(2, dtype=torch.int64)}, TypeError, "expected a floating-point tensor"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_is_wrong(options, error, words):
    with pytest.raises(error, match=words):
        fs.sample_log_prob(PLANE.flow(CONDOT), **options)
