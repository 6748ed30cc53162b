"""Dequantisers: their densities against SciPy's and closed forms, and the bounds they give on known probabilities."""

import math
from dataclasses import dataclass

import pytest
import scipy.stats
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.likelihood import FlowDequantizer, TruncatedNormal, Uniform
from flowsolve.noise import DEQUANTIZE, Noise
from flowsolve.problems import GaussianMixture
from flowsolve.transforms import Logit, Range
from tests.likelihood.truth import bits, blurred, log_mass

LEVELS = 3
IMAGES = torch.randint(0, LEVELS, (64, 1, 2, 2), generator=torch.Generator().manual_seed(3))
MIXTURE = GaussianMixture(
    0.4 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2)), [0.3, 0.5, 0.4], dtype=torch.float64
)
FLOW = MIXTURE.flow(paths.CondOT())
EXACT = {"solver": solvers.RK4(), "nfe": 32, "trace": "exact", "dtype": torch.float64}


def drawn(dequantizer, images, draws=1, seed=0):
    """All u, shape (draws, B, *S), and log q, shape (draws, B)."""
    found = [dequantizer.sample(images, Noise.of(seed, len(images)), j) for j in range(draws)]
    return torch.stack([u for u, _ in found]), torch.stack([q for _, q in found])


@pytest.mark.parametrize("std", [0.02, 1 / 6, 0.5, 20.0])
def test_the_truncated_normal_is_scipys(std):
    u, log_q = drawn(TruncatedNormal(std), IMAGES, 4)
    law = scipy.stats.truncnorm(-0.5 / std, 0.5 / std, loc=0.5, scale=std)
    assert log_q.numpy() == pytest.approx(law.logpdf(u.numpy()).sum((2, 3, 4)), abs=1e-8)
    assert scipy.stats.kstest(u.flatten().numpy(), law.cdf).pvalue > 1e-3


def test_uniform_draws_are_uniform_and_cost_nothing():
    u, log_q = drawn(Uniform(), IMAGES, 4)
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert (log_q == 0).all()


@pytest.mark.parametrize("transform", [Range(), Range(0, 1).then(Logit(0.05))], ids=["range", "logit"])
def test_the_matched_truncated_normal_has_the_width_of_the_paths_noise(transform):
    """r = (σ/α)(t) / T'(k + ½), for each pixel its own where the slope differs."""
    from flowsolve.likelihood.dequantize import resolve

    path, t = paths.VP(), 0.9
    flow = fs.Flow(lambda x, t: x, path, "noise", transform=transform)
    k = torch.arange(256).reshape(2, 128)
    middle = (k.double() + 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(transform.forward(middle).sum(), middle)
    expected = path.sigma(t) / path.alpha(t) / slope
    matched = resolve("truncated_normal", flow, t, transform, 256)
    assert matched.std(k).expand(k.shape).numpy() == pytest.approx(expected.numpy(), rel=1e-12)


@dataclass(frozen=True)
class Posterior:
    """The posterior of u under one Gaussian N(mean, std²) of states: every weight is P(k) itself."""

    mean: float
    std: float
    transform: Range

    def sample(self, images, noise, draw):
        edges = self.transform.forward(torch.stack((images, images + 1)).double(), LEVELS)
        a, b = torch.special.ndtr((edges - self.mean) / self.std)
        v = noise.uniform(DEQUANTIZE, draw, torch.empty(images.shape, dtype=torch.float64))
        x = self.mean + self.std * torch.special.ndtri(a + v * (b - a))
        density = -0.5 * ((x - self.mean) / self.std).square() - math.log(self.std * math.sqrt(2.0 * math.pi))
        width = (self.transform.hi - self.transform.lo) / LEVELS
        u = self.transform.inverse(x, LEVELS) - images
        return u.clamp(0, 1), (density - (b - a).log() + math.log(width)).flatten(1).sum(1)


@pytest.mark.parametrize("importance", [1, 4])
def test_the_models_own_posterior_makes_the_bound_an_equality(importance):
    gaussian = GaussianMixture(torch.full((1, 1, 2, 2), 0.2, dtype=torch.float64), 0.6)
    posterior = Posterior(0.2, 0.6, Range())
    options = {**EXACT, "levels": LEVELS, "dequantize": posterior, "importance": importance, "draws": 2}
    out = fs.bits_per_dim(gaussian.flow(paths.CondOT()), IMAGES, **options)
    assert (out.bpd - bits(log_mass(gaussian, IMAGES, levels=LEVELS), IMAGES)).abs().max() < 1e-4
    assert (out.draw_stderr < 1e-4).all()


@dataclass(frozen=True)
class Leaning:
    """A user's dequantiser, Beta(2, 1) in every pixel: q(u) = 2u."""

    def sample(self, images, noise, draw):
        u = noise.uniform(DEQUANTIZE, draw, torch.empty(images.shape, dtype=torch.float64)).sqrt()
        return u, (2.0 * u).log().flatten(1).sum(1)


T_NOISY = paths.CondOT().time(math.log(3.0))  # σ/α = 1/3, half a cell of 3 levels on [−1, 1]


@pytest.mark.parametrize(
    ("dequantize", "interval"),
    [
        ("truncated_normal", (T_NOISY, 0.0)),
        (TruncatedNormal(0.6), None),
        (Leaning(), None),
    ],
    ids=["truncated normal", "its object", "user's"],
)
def test_every_bound_is_above_the_truth_and_tightens_with_its_draws(dequantize, interval):
    """3 levels of 4 pixels: one draw costs tenths of bits; without −log K, 36 draws would end 1.3 bits too low."""
    model = MIXTURE if interval is None else blurred(MIXTURE, 1.0 / 3.0)
    truth = bits(log_mass(model, IMAGES, levels=LEVELS), IMAGES)
    options = {**EXACT, "levels": LEVELS, "dequantize": dequantize, "interval": interval}
    gaps = [fs.bits_per_dim(FLOW, IMAGES, importance=k, **options).bpd - truth for k in (1, 6, 36)]
    errors = [float(g.std()) / 8 for g in gaps]
    one, some, many = (float(g.mean()) for g in gaps)
    assert one > 3 * errors[0]
    assert -3 * errors[1] < some < 0.7 * one
    assert -3 * errors[2] < many < 0.3 * one


def test_data_never_dequantised_wants_the_truncated_normal():
    """A model of bare integers is a comb, and so narrow a q costs little where uniform draws miss the teeth."""
    levels = 4
    grid = torch.cartesian_prod(*2 * [torch.arange(levels)])
    weights = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    teeth = Range().forward(grid.double() + 0.5, levels)
    flow = GaussianMixture(teeth, 1e-3, weights).flow(paths.CondOT())
    truth = -(weights / weights.sum()).log2() / 2
    options = {"levels": levels, "solver": solvers.Dopri5(1e-6, 1e-6), "trace": "exact", "dtype": torch.float64}
    narrow = fs.bits_per_dim(flow, grid, dequantize="truncated_normal", **options)
    assert flow.path.sigma(narrow.interval[0]) / flow.path.alpha(narrow.interval[0]) == pytest.approx(1 / 12)
    assert (narrow.bpd - truth).abs().max() < 0.02  # what three standard deviations cut off
    wide = fs.bits_per_dim(flow, grid, dequantize="uniform", interval=narrow.interval, **options)
    assert (wide.bpd - truth).mean() > 0.5


def gaussian_net(x, t, image):
    """The exact velocity of w | k ~ N((1 − k)/2, 1.5²) on the straight path: u leans towards states of 0."""
    t = t.reshape(-1, 1, 1, 1)
    mean = 0.5 * (1.0 - image.to(x))
    pull = (x - t * mean) / (2.25 * t**2 + (1.0 - t) ** 2)
    return mean + 2.25 * t * pull - (1.0 - t) * pull


CONDITIONAL = fs.Flow(gaussian_net, paths.CondOT())


def test_a_conditional_flow_becomes_a_logistic_normal_dequantiser():
    learnt = FlowDequantizer(CONDITIONAL, lambda k: {"image": k}, options={"solver": solvers.Dopri5(1e-7, 1e-7)})
    u, log_q = drawn(learnt, IMAGES, 2)
    w = torch.logit(u)
    law = torch.distributions.Normal(0.5 * (1.0 - IMAGES.double()), 1.5)
    expected = (law.log_prob(w) - u.log() - (1.0 - u).log()).flatten(2).sum(2)
    assert (log_q - expected).abs().max() < 1e-4
    assert scipy.stats.kstest(law.cdf(w).flatten().numpy(), "uniform").pvalue > 1e-3


def test_a_flow_that_leans_the_right_way_is_the_better_dequantiser():
    learnt = FlowDequantizer(CONDITIONAL, lambda k: {"image": k}, options={"nfe": 24})
    images = IMAGES.repeat(4, 1, 1, 1)
    truth = bits(log_mass(MIXTURE, images, levels=LEVELS), images)

    def gap(dequantize, importance):
        options = {**EXACT, "nfe": 24, "levels": LEVELS, "dequantize": dequantize, "importance": importance}
        return fs.bits_per_dim(FLOW, images, **options).bpd - truth

    flat, one, many = gap("uniform", 1), gap(learnt, 1), gap(learnt, 12)
    assert 2 * one.std() / 16 < one.mean() < 0.5 * flat.mean()
    assert -3 * many.std() / 16 < many.mean() < 0.5 * one.mean()


@pytest.mark.parametrize("dequantize", ["uniform", "truncated_normal"])
def test_an_image_has_the_same_bits_in_any_batch(dequantize):
    options = {**EXACT, "levels": LEVELS, "dequantize": dequantize, "seed": 5}
    whole = fs.bits_per_dim(FLOW, IMAGES, **options)
    part = fs.bits_per_dim(FLOW, IMAGES[[7, 2]], samples=[7, 2], **options)
    assert part.bpd.tolist() == pytest.approx(whole.bpd[[7, 2]].tolist(), abs=1e-9)


@pytest.mark.filterwarnings("ignore:of 256 levels")
def test_the_truncated_normal_starts_at_the_windows_end_where_that_is_noisy_enough():
    """VE ends at σ = 0.01, more than a third of half a cell of 256 levels on [−1, 1], 1/768."""
    out = fs.bits_per_dim(MIXTURE.flow(paths.VE()), IMAGES, levels=256, dequantize="truncated_normal", **EXACT)
    assert out.interval == (1.0, 0.0)


class Broken:
    def __init__(self, u=None, log_q=None):
        self.u, self.log_q = u, log_q

    def sample(self, images, noise, draw):
        good = torch.full(images.shape, 0.5)
        return (good if self.u is None else self.u), (torch.zeros(len(images)) if self.log_q is None else self.log_q)


ESTIMATED = FlowDequantizer(CONDITIONAL, lambda k: {"image": k}, trace="hutchinson")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dequantize": "variational"}, ValueError, "expected 'uniform', 'truncated_normal', or an object with sample"),
        ({"dequantize": 3}, ValueError, "dequantize = 3 is not known"),
        ({"dequantize": "truncated_normal", "interval": (1.0, 0.0)}, ValueError, "no noise .* to match; .* interval="),
        ({"dequantize": TruncatedNormal(0.0)}, ValueError, "std is 0 of a level; expected a finite number > 0"),
        ({"dequantize": Broken(torch.zeros(3))}, ValueError, r"u of shape \(3,\) .*; expected \(64, 1, 2, 2\)"),
        ({"dequantize": Broken(log_q=torch.zeros(64, 1))}, ValueError, r"log q of \(64, 1\); expected .* \(64,\)"),
        ({"dequantize": Broken(torch.full((64, 1, 2, 2), 1.5))}, ValueError, r"u outside \[0, 1\]"),
        ({"dequantize": Broken(log_q=torch.full((64,), math.nan))}, ValueError, "log q that is not finite"),
        ({"dequantize": ESTIMATED, "importance": 2}, ValueError, "the dequantiser only estimates its own"),
    ],
)
def test_dequantisers_that_make_no_bound_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        fs.bits_per_dim(FLOW, IMAGES, **{**EXACT, "levels": LEVELS, **options})
