"""The variational bound: closed forms of Gaussians, tightness for exact flows, its standard error, its times."""

import math

import pytest
import scipy.stats
import torch

import flowsolve as fs
from flowsolve import paths
from flowsolve.likelihood.bound_times import BoundTimes
from flowsolve.noise import Noise
from flowsolve.predictions import PREDICTIONS
from flowsolve.problems import GaussianMixture
from flowsolve.transforms import Latent, Logit, Normalize, Range
from tests.cases import PATHS
from tests.likelihood.truth import bits, blurred, log_mass

V = 0.37
LN2 = math.log(2.0)


def gaussian(*shape):
    return GaussianMixture(torch.zeros(1, *shape, dtype=torch.float64), math.sqrt(V))


def mixture(*shape, std=(0.2, 0.3, 0.25), seed=0):
    means = 0.5 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return GaussianMixture(means, list(std), [0.5, 0.3, 0.2], dtype=torch.float64)


def textbook(path, z, start, end=0.0):
    """The bound of N(0, V) with its exact network, with R = SNR:

    diffusion = ∫ [D (VR/(1+VR))² + ‖z‖² R/(1+VR)²] dR/2R = ½ [D log(1+VR) + D/(1+VR) − ‖z‖²/(V(1+VR))].
    """
    square, size = z.flatten(1).square().sum(1), z[0].numel()

    def primitive(t):
        r = V * (path.alpha(t) / path.sigma(t)) ** 2
        return 0.5 * (size * math.log1p(r) + (size - square / V) / (1.0 + r))

    alpha, ratio = path.alpha(end) / path.prior_std, (path.sigma(end) / path.prior_std) ** 2
    prior = 0.5 * (alpha**2 * square + size * (ratio - 1.0 - math.log(ratio)))
    s = path.sigma(start) / path.alpha(start)
    return -prior, -(primitive(start) - primitive(end)), -0.5 * size * math.log(2.0 * math.pi * math.e * s * s)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_one_gaussian_in_closed_form_on_every_path_with_every_prediction(name, prediction):
    path, z = PATHS[name], gaussian(4, 2, 2).sample(6, seed=1)
    out = fs.variational_bound(gaussian(4, 2, 2).flow(path, prediction), z, draws=32, data_std=math.sqrt(V))
    prior, diffusion, decoder = textbook(path, z, out.interval[0])
    assert (out.prior + prior).abs().max() < 1e-9
    assert (out.data + decoder).abs().max() < 1e-9
    sigma = out.draw_stderr * 16 * LN2
    assert ((out.diffusion + diffusion) / sigma).abs().max() < 4
    assert (sigma < 0.12 * out.diffusion).all()
    assert torch.allclose(out.bound, -(out.prior + out.diffusion + out.data))
    assert torch.allclose(out.bpd, bits(out.bound, z))


def test_predictions_say_the_same():
    z = mixture(3).sample(5, seed=0)
    bounds = [fs.variational_bound(mixture(3).flow(paths.VP(), p), z).bound for p in PREDICTIONS]
    for other in bounds[1:]:
        assert torch.allclose(bounds[0], other, atol=1e-7)


@pytest.mark.parametrize("shape", [(2,), (16,), (64,), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("path", [paths.CondOT(), paths.Cosine(), paths.VP()], ids=lambda p: type(p).__name__)
def test_the_exact_flow_is_bounded_tightly(shape, path):
    """Its bound is E log p̂(z + sε), with p̂ = p * N(0, s²): log p itself as s → 0."""
    problem = mixture(*shape)
    z, size = problem.sample(400, seed=2), math.prod(shape)
    out = fs.variational_bound(problem.flow(path), z, draws=32, data_std=0.3)
    gap = problem.log_prob(z) - out.bound
    sigma = out.mean_draw_stderr * size * LN2
    assert abs(float(gap.mean())) < 4 * sigma
    assert sigma < 0.02 * size + 0.25


def test_with_noise_left_it_is_the_expected_log_density_of_the_noised_point():
    """At s = 0.7 and more the bound is E log p̂(z + sε) and far below log p."""
    problem, path = mixture(2), paths.CondOT()
    z = problem.sample(40, seed=3)
    start = path.time(-math.log(0.7))
    out = fs.variational_bound(problem.flow(path), z, draws=400, interval=(start, 0.0), data_std=0.5)
    eps = torch.randn(1000, 40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noised = blurred(problem, 0.7).log_prob((z + 0.7 * eps).flatten(0, 1)).reshape(1000, 40)
    error = (noised.var(0) / 1000 + (out.draw_stderr * 2 * LN2).square()).sqrt()
    assert ((noised.mean(0) - out.bound) / error).abs().max() < 4
    assert error.max() < 0.1
    assert (problem.log_prob(z) - out.bound).mean() > 0.5


@pytest.mark.parametrize("log_snr", [0.5, 2.0])
def test_it_never_exceeds_the_density_of_the_model_with_its_decoder(log_snr):
    """log p_dec(z), p_dec = p * N(0, 2s²), is above the bound at every point, however much noise is left."""
    problem, path = mixture(2), paths.Trig()
    z = torch.cat(
        (problem.sample(30, seed=4), 3.0 * torch.randn(30, 2, generator=torch.Generator().manual_seed(1)).double())
    )
    out = fs.variational_bound(problem.flow(path), z, draws=400, interval=(path.time(log_snr), 0.0), data_std=0.5)
    slack = blurred(problem, math.sqrt(2.0) * math.exp(-log_snr)).log_prob(z) - out.bound
    assert (slack > -4 * out.draw_stderr * 2 * LN2).all()
    assert slack.mean() > 0


def test_a_wrong_network_is_bounded_below_the_right_one():
    """The bound of another Gaussian's network: exact formulas for z ~ N(0, V) read with N(0, W)."""
    path, w = paths.CondOT(), 2.0 * V
    z = gaussian(8).sample(2000, seed=5)
    other = GaussianMixture(torch.zeros(1, 8, dtype=torch.float64), math.sqrt(w))
    right = fs.variational_bound(gaussian(8).flow(path), z, draws=8, data_std=0.6)
    wrong = fs.variational_bound(other.flow(path), z, draws=8, data_std=0.6)
    # of the mean over data it is the entropy plus KL(N(0, V) ‖ N(0, W)), the model being an exact flow of its own
    expected = 0.5 * 8 * (V / w - 1.0 - math.log(V / w))
    found = float((right.bound - wrong.bound).mean())
    assert found == pytest.approx(expected, abs=4 * float((right.bound - wrong.bound).std()) / math.sqrt(2000))


@pytest.mark.parametrize(("even", "freedom"), [(True, 16), (False, 31)], ids=["even", "independent"])
def test_draws_have_the_error_they_claim(even, freedom):
    """z-scores of 600 bounds of one point in D = 64: mean 0, and the deviation of Student's t, each within 4 errors."""
    n, path = 600, paths.CondOT()
    z = gaussian(64).sample(1, seed=6).expand(n // 4, 64)
    runs = [
        fs.variational_bound(gaussian(64).flow(path), z, draws=32, seed=s, data_std=1.0, low_discrepancy=even)
        for s in range(4)
    ]
    exact = bits(sum(textbook(path, z, runs[0].interval[0])), z)
    scores = torch.cat([(r.bpd - exact) / r.draw_stderr for r in runs])
    assert abs(float(scores.mean())) < 4 / math.sqrt(n)
    kurtosis = 3.0 + 6.0 / (freedom - 4)
    assert float(scores.std()) == pytest.approx(
        math.sqrt(freedom / (freedom - 2)), abs=4 * math.sqrt((kurtosis - 1) / (4 * n))
    )


def test_even_times_have_less_variance_than_independent_ones():
    """D = 64 with times that follow another spread of data: most of the variance is that of the times."""
    problem, path, seeds = gaussian(64), paths.CondOT(), range(40)
    z = problem.sample(16, seed=7)

    def spread(even):
        runs = [
            fs.variational_bound(problem.flow(path), z, draws=8, seed=s, data_std=30.0, low_discrepancy=even)
            for s in seeds
        ]
        each, error = torch.stack([r.bpd for r in runs]), torch.tensor([r.mean_draw_stderr for r in runs])
        return float(each.var(0).mean()), float(each.mean(1).var()), float(error.square().mean())

    of_one, of_mean, claimed = spread(True)
    of_one_loose, of_mean_loose, _ = spread(False)
    assert of_one < 0.5 * of_one_loose
    assert of_mean < claimed  # of samples that had nothing in common
    assert of_mean < 0.25 * of_mean_loose  # times are even over the batch too


def test_importance_times_have_less_variance_than_times_uniform_in_log_snr():
    path = paths.VP()
    z = gaussian(64).sample(16, seed=8)
    options = {"draws": 16, "low_discrepancy": False}
    flat = fs.variational_bound(gaussian(64).flow(path), z, times="uniform", **options)
    drawn = fs.variational_bound(gaussian(64).flow(path), z, times="importance", data_std=math.sqrt(V), **options)
    assert drawn.draw_stderr.square().mean() < 0.5 * flat.draw_stderr.square().mean()
    exact = sum(textbook(path, z, 1.0))
    assert ((flat.bound - exact).mean() / (flat.mean_draw_stderr * 64 * LN2)).abs() < 4


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("v", [None, 0.25])
def test_times_have_the_density_they_are_weighed_by(v, even):
    """The distribution function log(1 + v e^2λ), or λ, of the times is uniform, and 1/π is its slope's inverse."""
    path, interval, draws = paths.VP(), (0.98, 0.0), 4
    clock = BoundTimes(path, interval, v, draws, even, Noise.of(3, 500))
    hi, lo = (path.log_snr(t) for t in interval)

    def distribution(lam):
        if v is None:
            return (lam - lo) / (hi - lo)
        rise = torch.log1p(v * (2.0 * lam).exp()) - math.log1p(v * math.exp(2.0 * lo))
        return rise / (math.log1p(v * math.exp(2.0 * hi)) - math.log1p(v * math.exp(2.0 * lo)))

    lam = torch.stack([path.log_snr(clock.times(j)) for j in range(draws)])
    assert scipy.stats.kstest(distribution(lam).flatten().numpy(), "uniform").pvalue > 1e-3
    lam = lam.requires_grad_()
    (density,) = torch.autograd.grad(distribution(lam).sum(), lam)
    rates = torch.stack([clock.rate(j) for j in range(draws)])
    assert (density * rates).detach().numpy() == pytest.approx(1.0, rel=1e-6)


def test_times_are_even_in_a_sample_and_over_a_batch():
    clock = BoundTimes(paths.CondOT(), (0.99, 0.0), 0.25, 8, True, Noise.of(0, 89))
    places = torch.stack([clock.place(j) for j in range(8)])
    assert ((4 * places).floor() == torch.arange(8).unsqueeze(1) // 2).all()  # two in every quarter
    gaps = places[0].sort().values.diff()
    assert gaps.max() < 2.7 / 89 / 4  # three-gap theorem: at most φ² times the mean gap


def test_a_sample_has_the_same_bound_in_any_batch():
    z = mixture(3).sample(9, seed=9)
    whole = fs.variational_bound(mixture(3).flow(paths.CondOT()), z, seed=4)
    part = fs.variational_bound(mixture(3).flow(paths.CondOT()), z[[7, 2]], seed=4, samples=[7, 2])
    assert part.bound.tolist() == pytest.approx(whole.bound[[7, 2]].tolist(), abs=1e-9)
    assert part.draw_stderr.tolist() == pytest.approx(whole.draw_stderr[[7, 2]].tolist(), abs=1e-9)


LEVELS = 4
GRID = torch.cartesian_prod(*2 * [torch.arange(LEVELS)])


@pytest.mark.parametrize(
    "transform",
    [Range(), Range(0, 1).then(Logit(0.1)), Range(0, 1).then(Normalize(0.5, 0.2))],
    ids=["range", "logit", "std"],
)
def test_the_decoder_of_levels_bounds_bare_integers_tightly(transform):
    """A comb: data on the middles of the cells with given probabilities, and the exact network of it."""
    weights = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    teeth = transform.forward(GRID.double() + 0.5, LEVELS)
    flow = GaussianMixture(teeth, 1e-4, weights).flow(paths.CondOT())
    flow.transform = transform
    truth = -(weights / weights.sum()).log2() / 2
    copies = 40
    options = {"levels": LEVELS, "draws": 64, "dtype": torch.float64, "data_std": 0.5}
    out = fs.variational_bound(flow, GRID.repeat(copies, 1), **options)
    error = out.draw_stderr.reshape(copies, 16).square().sum(0).sqrt() / copies
    assert ((out.bpd.reshape(copies, 16).mean(0) - truth) / error).abs().max() < 4
    assert error.max() < 0.1
    assert out.data.mean() < 0.02  # three standard deviations apart, levels are hardly taken for each other


def test_levels_that_the_noise_confuses_cost_their_confusion():
    """Much noise at the data's end: −E log P(k | x₁) by a sum over all levels and many draws, written out."""
    path, k = paths.CondOT(), torch.tensor([[0, 3], [1, 2]])
    flow = gaussian(2).flow(path)
    start = path.time(0.0)
    out = fs.variational_bound(flow, k, levels=LEVELS, draws=400, interval=(start, 0.0), dtype=torch.float64)
    middles = Range().forward(torch.arange(LEVELS).double() + 0.5, LEVELS)
    eps = torch.randn(4000, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = middles[k] + eps  # s = 1
    logits = -0.5 * (seen.unsqueeze(-1) - middles).square()
    cost = -torch.log_softmax(logits, -1).gather(-1, k.expand(4000, 2, 2).unsqueeze(-1)).squeeze(-1).sum(2)
    assert (out.data - cost.mean(0)).abs().max() < 4 * float(cost.std(0).max()) * math.sqrt(1 / 400 + 1 / 4000)


@pytest.mark.parametrize("dequantize", ["uniform", "truncated_normal"])
def test_dequantised_integers_are_bounded_below_their_probability(dequantize):
    """P(k) is what the model with its decoder gives the cell: the mixture with 2s² added, in closed form."""
    problem, path = mixture(2), paths.CondOT()
    flow, truth = problem.flow(path), None
    out = fs.variational_bound(flow, GRID, levels=LEVELS, dequantize=dequantize, draws=400, dtype=torch.float64)
    s = path.sigma(out.interval[0]) / path.alpha(out.interval[0])
    truth = bits(log_mass(blurred(problem, math.sqrt(2.0) * s), GRID, levels=LEVELS), GRID)
    assert ((out.bpd - truth) > -4 * out.draw_stderr).all()
    assert (out.bpd - truth).mean() > 0


def test_uniform_dequantisation_on_fine_levels_is_exact():
    problem = mixture(1, 2, 2)
    k = Range().pixels(problem.sample(1000, seed=10).clamp(-0.99, 0.99), 4096)
    flow = problem.flow(paths.CondOT())
    out = fs.variational_bound(flow, k, bits=12, dequantize="uniform", draws=32, dtype=torch.float64)
    gap = out.mean - float(bits(log_mass(problem, k, levels=4096), k).mean())
    assert abs(gap) < 4 * out.mean_draw_stderr < 0.2


def test_a_bound_is_the_same_on_every_device(device):
    here, there = mixture(1, 2, 2), mixture(1, 2, 2)
    there.means, there.std, there.weights = (v.to(device) for v in (there.means, there.std, there.weights))
    k = torch.randint(0, 16, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    for dequantize in ("levels", "uniform", "truncated_normal"):
        options = {"bits": 4, "dequantize": dequantize, "draws": 4, "dtype": torch.float64}
        a = fs.variational_bound(here.flow(paths.CondOT()), k, **options)
        b = fs.variational_bound(there.flow(paths.CondOT()), k.to(device), **options)
        assert torch.allclose(a.bpd, b.bpd, atol=1e-9)


def test_figures_and_their_names():
    z = gaussian(3).sample(7, seed=0)
    flow = gaussian(3).flow(paths.CondOT())
    flow.nfe_range = (2, 2)
    out = fs.variational_bound(flow, z, draws=4)
    assert out.nfe.tolist() == [8] * 7
    assert out.mean == pytest.approx(float(out.bpd.mean()))
    assert out.stderr == pytest.approx(float(out.bpd.std()) / math.sqrt(7))
    assert out.mean_draw_stderr == pytest.approx(float(out.draw_stderr.square().sum().sqrt()) / 7)
    assert str(out).endswith("bits/dim, variational (7 samples)")
    single = fs.variational_bound(flow, z[:1], draws=1)
    assert single.draw_stderr.isnan().all()
    assert math.isnan(single.stderr)


def test_the_network_gets_its_conditioning_and_no_graph_is_kept():
    seen = []

    def net(x, t, label):
        seen.append((label, x.requires_grad, torch.is_grad_enabled()))
        return x

    flow = fs.Flow(net, paths.CondOT())
    out = fs.variational_bound(flow, torch.ones(2, 3), draws=2, cond={"label": 5})
    assert seen == [(5, False, False)] * 2
    assert not out.bound.requires_grad


def test_a_prior_of_ones_own_serves_an_interval_that_ends_early():
    """Started at t = 0.3 from the exact marginal of a Gaussian, the bound is what it is from t = 0."""
    path, z = paths.CondOT(), gaussian(4).sample(50, seed=11)
    std = math.sqrt(V * 0.3**2 + 0.7**2)
    whole = fs.variational_bound(gaussian(4).flow(path), z, draws=64)
    part = fs.variational_bound(gaussian(4).flow(path), z, draws=64, interval=(whole.interval[0], 0.3), prior_std=std)
    error = math.hypot(whole.mean_draw_stderr, part.mean_draw_stderr)
    assert whole.mean == pytest.approx(part.mean, abs=4 * error)


FLOW = gaussian(2).flow(paths.CondOT())
CODES = gaussian(2).flow(paths.CondOT())
CODES.transform = Latent(0.2)


@pytest.mark.parametrize(
    ("flow", "x", "options", "error", "words"),
    [
        (FLOW, torch.ones(2, 2), {"draws": 3}, ValueError, "draws = 3; expected 1 or an even number"),
        (FLOW, torch.ones(2, 2), {"times": "vdm"}, ValueError, "times = 'vdm' is not known"),
        (FLOW, torch.ones(2, 2), {"times": "uniform"}, ValueError, "−∞ at t = 0 of .*; use times='importance'"),
        (FLOW, torch.ones(2, 2), {"bits": 8}, TypeError, "are for integer images; these are floating"),
        (FLOW, torch.ones(2, 2), {"dequantize": "uniform"}, TypeError, "are for integer images; these are floating"),
        (FLOW, torch.ones(0, 2), {}, ValueError, r"shape \(0, 2\); expected .* at least one sample"),
        (FLOW, torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), {}, ValueError, r"x is not finite in samples \[1\]"),
        (FLOW, torch.ones(2, 2), {"interval": (1.0, 0.0)}, ValueError, "no noise, and the bound's integral has no end"),
        (FLOW, torch.ones(2, 2), {"interval": (0.2, 0.8)}, ValueError, "fall from data to noise"),
        (FLOW, torch.ones(2, 2), {"interval": (0.9, 0.1)}, ValueError, "the state is not the prior's; give prior_std="),
        (FLOW, torch.ones(2, 2), {"data_std": 0.0}, ValueError, "data_std = 0.0; expected a finite number > 0"),
        (FLOW, torch.full((2, 2), 9), {"levels": 4}, ValueError, "images run from 9 to 9; expected 0 … 3"),
        (FLOW, torch.full((2, 2), 1), {"levels": 4, "dequantize": "no"}, ValueError, "dequantize = 'no' is not known"),
        (CODES, torch.full((2, 2), 1), {"levels": 4}, ValueError, "codes of an autoencoder"),
        (FLOW, [1.0], {}, TypeError, "x is a list; expected a tensor"),
        (FLOW, torch.ones(2, 2, dtype=torch.bool), {}, TypeError, "torch.bool"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(flow, x, options, error, words):
    with pytest.raises(error, match=words):
        fs.variational_bound(flow, x, **options)
