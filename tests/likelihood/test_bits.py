"""Bits per dimension: offsets, refusals and a density whose discrete probabilities are known."""

import math

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.problems import GaussianMixture
from flowsolve.transforms import Latent, Logit, Normalize, Range
from tests.likelihood.truth import bits, log_mass

RK4 = {"solver": solvers.RK4(), "nfe": 120}
LEVELS = 16
IMAGES = torch.randint(0, LEVELS, (12, 1, 2, 2), generator=torch.Generator().manual_seed(0))
MIXTURE = GaussianMixture(0.4 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2)), [0.3, 0.5, 0.4])
FLOW = MIXTURE.flow(paths.CondOT())


def discrete_bits(images, levels, mixture=MIXTURE, transform=None):
    """−log₂ P(k)/D by the mixture's own cell probabilities."""
    return bits(log_mass(mixture, images, transform or Range(), levels), images)


def test_the_bound_lies_above_the_probability_and_tightens_with_importance_draws():
    """On 3 levels, where one draw costs 0.3 bits; a missing −log K would put 64 draws 1.5 bits below the truth."""
    images = torch.randint(0, 3, (64, 1, 2, 2), generator=torch.Generator().manual_seed(3))
    options = {"levels": 3, "solver": solvers.RK4(), "nfe": 24, "trace": "exact"}
    one, many = (fs.bits_per_dim(FLOW, images, importance=k, **options).bpd - discrete_bits(images, 3) for k in (1, 64))
    assert one.mean() > 4 * one.std() / 8
    assert abs(many.mean()) < 4 * many.std() / 8 < 0.04


def test_many_levels_make_one_draw_exact():
    """With 4,096 levels a cell is so small that the density is flat on it."""
    fine = torch.randint(0, 4096, (8, 1, 2, 2), generator=torch.Generator().manual_seed(1))
    out = fs.bits_per_dim(FLOW, fine, bits=12, trace="exact", **RK4)
    assert (out.bpd - discrete_bits(fine, 4096)).abs().max() < 2e-3


def test_the_offset_follows_from_the_declared_data_range():
    """The same model on [0, 1]: its density is 2^D times higher, its cells half as wide."""
    half = GaussianMixture(0.5 * MIXTURE.means + 0.5, 0.5 * MIXTURE.std.flatten())
    flow = half.flow(paths.CondOT())
    flow.data_range = (0.0, 1.0)
    options = {"levels": LEVELS, "trace": "exact", **RK4}
    a, b = fs.bits_per_dim(FLOW, IMAGES, **options), fs.bits_per_dim(flow, IMAGES, **options)
    assert (a.bpd - b.bpd).abs().max() < 1e-4


def test_the_standard_error_is_that_of_the_mean_over_images():
    out = fs.bits_per_dim(FLOW, IMAGES, levels=LEVELS, **RK4)
    assert out.mean == pytest.approx(float(out.bpd.mean()))
    assert out.stderr == pytest.approx(float(out.bpd.std() / math.sqrt(len(IMAGES))))
    assert out.nfe.tolist() == [120] * len(IMAGES)
    assert "bits/dim (12 images, 120.0 NFE)" in str(out)


def test_an_image_has_the_same_bits_in_any_batch():
    whole = fs.bits_per_dim(FLOW, IMAGES, levels=LEVELS, seed=5, **RK4)
    part = fs.bits_per_dim(FLOW, IMAGES[[7]], levels=LEVELS, seed=5, samples=[7], **RK4)
    assert float(part.bpd) == pytest.approx(float(whole.bpd[7]), abs=1e-6)
    assert math.isnan(part.stderr)


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (IMAGES / 16, {}, TypeError, "expected integers 0 … 15"),
        (IMAGES + 1, {}, ValueError, "images run from 1 to 16"),
        (IMAGES - 1, {}, ValueError, "images run from -1"),
        (IMAGES / math.nan, {}, TypeError, "images are torch.float32; expected integers 0 … 15. Scaled or dequantised"),
        (IMAGES.to(torch.complex64), {}, TypeError, "torch.complex64"),
        (IMAGES.tolist(), {}, TypeError, "images are list"),
        (IMAGES[:0], {}, ValueError, r"shape \(0, 1, 2, 2\); expected \(B, \*S\) with at least one image"),
        (IMAGES[:, :0], {}, ValueError, "with at least one image"),
        (IMAGES + 200, {"levels": 17}, ValueError, r"run from 2\d\d to 2\d\d; expected 0 … 16 \(set bits= or levels="),
        (IMAGES, {"levels": None, "bits": 17}, ValueError, "bits = 17; expected an integer from 1 to 16"),
        (IMAGES, {"levels": None, "bits": 0}, ValueError, "bits = 0"),
        (IMAGES, {"draws": 0}, ValueError, "draws = 0; expected an integer of at least 1"),
        (IMAGES, {"importance": 0}, ValueError, "at least 1"),
        (IMAGES, {"importance": 8}, ValueError, "set trace='exact'"),
        (IMAGES, {"bits": 4}, TypeError, "give one"),
        (IMAGES, {"levels": 1}, ValueError, "at least 2"),
        (IMAGES > 3, {}, TypeError, "torch.bool"),
    ],
)
def test_data_that_has_no_probability_is_refused(images, options, error, words):
    with pytest.raises(error, match=words):
        fs.bits_per_dim(FLOW, images, **{"levels": LEVELS, **RK4, **options})


FINE = 1 << 16


@pytest.mark.parametrize("shape", [(2,), (16,), (1, 4, 4), (64,)], ids=str)
@pytest.mark.parametrize(
    "path", [paths.CondOT(), paths.EDM(sigma_min=1e-4), paths.Trig()], ids=lambda p: type(p).__name__
)
def test_bits_of_a_finely_discretised_mixture_are_exact(shape, path):
    """16-bit cells, on which a density is flat: to 1e-4 bits per dimension, with an image of each component."""
    means = 0.4 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mixture = GaussianMixture(means, [0.1, 0.2, 0.15], dtype=torch.float64)
    x = means + mixture.std * torch.randn(3, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    images = Range().pixels(x, FINE)
    # x₀ of EDM keeps some signal, which the prior N(0, σ_max²) does not know: 1e-3 bits
    prior = mixture.marginal(path, 0.0).log_prob
    options = {"solver": solvers.Dopri5(1e-5, 1e-5), "trace": "exact", "dtype": torch.float64, "prior": prior}
    out = fs.bits_per_dim(mixture.flow(path), images, levels=FINE, **options)
    assert (out.bpd - discrete_bits(images, FINE, mixture)).abs().max() < 1e-4
    assert out.interval == (1.0, 0.0)


COLOURS = GaussianMixture(
    torch.tensor([[0.1, -0.2, 0.3], [-0.4, 0.2, 0.0]], dtype=torch.float64).reshape(2, 3, 1, 1), [0.5, 0.3]
)


@pytest.mark.parametrize(
    ("transform", "levels"),
    [
        (Range(-1, 1), 256),
        (Range(-1, 1), 32),
        (Range(-1, 1, levels=17), None),
        (Range(-1, 1, centred=True), 256),
        (Range(-1.5, 0.5), 64),
        (Range(0, 1).then(Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))), 256),
        (Range(0, 1).then(Logit(0.05)), 256),
    ],
    ids=["8 bits", "5 bits", "17 levels", "centred", "64 levels", "normalize", "logit"],
)
def test_every_transform_gives_the_probabilities_of_its_cells(transform, levels):
    """One density of states, cut to cells by different transforms; a wrong offset is off by tenths of bits at least."""
    count = transform.count(levels)
    images = torch.randint(0, count, (200, 3, 1, 1), generator=torch.Generator().manual_seed(6))
    flow = COLOURS.flow(paths.CondOT())
    flow.transform = transform
    out = fs.bits_per_dim(flow, images, levels=levels, importance=4, solver=solvers.RK4(), nfe=60, trace="exact")
    gap = out.bpd - discrete_bits(images, count, COLOURS, transform)
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(200) < 0.02


def test_the_scale_of_the_path_where_the_likelihood_starts_is_taken_out():
    """Read where a table has α = 0.9 left: z = x/α has the noise σ/α."""
    path = paths.Discrete.linear()
    start = path.time(math.log(0.9 / math.sqrt(1 - 0.81)))
    images = torch.randint(0, FINE, (6, 1, 2, 2), generator=torch.Generator().manual_seed(7))
    options = {"solver": solvers.Dopri5(1e-7, 1e-7), "trace": "exact", "dtype": torch.float64, "levels": FINE}
    options["prior"] = MIXTURE.marginal(path, 0.0).log_prob
    out = fs.bits_per_dim(MIXTURE.flow(path), images, interval=(start, 0.0), **options)
    noisy = GaussianMixture(MIXTURE.means, (MIXTURE.std.square() + (1 - 0.81) / 0.81).sqrt().flatten())
    assert (out.bpd - discrete_bits(images, FINE, noisy)).abs().max() < 1e-4
    assert out.interval == (start, 0.0)


def test_standard_errors_are_those_of_other_draws():
    """400 draws of each of three images: dequantisation (8 levels) and probes each have an error of their own."""
    n, images = 400, torch.randint(0, 8, (3, 1, 2, 2), generator=torch.Generator().manual_seed(8))
    options = {"levels": 8, "solver": solvers.RK4(), "nfe": 16, "draws": 8}
    many = images.repeat(n, 1, 1, 1)
    seen = fs.bits_per_dim(FLOW, many, probes=2, **options)
    exact = fs.bits_per_dim(FLOW, many, trace="exact", **options)

    def spread(out):
        return out.bpd.reshape(n, 3).std(0)

    def claimed(error):
        return error.reshape(n, 3).square().mean(0).sqrt()

    slack = 4 / math.sqrt(2 * n)
    assert (spread(seen) / claimed(seen.draw_stderr)).tolist() == pytest.approx([1.0] * 3, abs=slack)
    assert (spread(exact) / claimed(exact.draw_stderr)).tolist() == pytest.approx([1.0] * 3, abs=slack)
    # the probes' own part is what the exact trace takes away, and the rest is the dequantisation's
    rest = (spread(seen).square() - claimed(seen.probe_stderr).square()).sqrt()
    assert (claimed(seen.probe_stderr) > 0.15 * spread(seen)).all()
    assert (rest / spread(exact)).tolist() == pytest.approx([1.0] * 3, abs=3 * slack)
    assert (exact.probe_stderr == 0).all()
    assert torch.equal(exact.dequantization_stderr, exact.draw_stderr)
    assert seen.mean_draw_stderr == pytest.approx(float(seen.draw_stderr.square().sum().sqrt()) / (3 * n))


def test_what_one_draw_or_one_probe_cannot_tell_is_nan():
    one = fs.bits_per_dim(FLOW, IMAGES, levels=LEVELS, **RK4)
    assert one.draw_stderr.isnan().all()
    assert one.probe_stderr.isnan().all()
    assert one.dequantization_stderr.isnan().all()
    assert math.isnan(one.mean_draw_stderr)


def test_draws_of_one_importance_weighted_bound_tell_its_error():
    """The delta method, against the spread of 200 bounds of each image, of 16 draws on 3 levels."""
    n, images = 200, torch.randint(0, 3, (4, 1, 2, 2), generator=torch.Generator().manual_seed(9))
    options = {"levels": 3, "solver": solvers.RK4(), "nfe": 16, "trace": "exact", "importance": 16}
    out = fs.bits_per_dim(FLOW, images.repeat(n, 1, 1, 1), **options)
    spread = out.bpd.reshape(n, 4).std(0)
    assert (out.draw_stderr.reshape(n, 4).mean(0) / spread).tolist() == pytest.approx([1.0] * 4, abs=0.3)


def test_draws_are_bounds_of_their_own_averaged():
    """K importance draws make the logarithm of a mean, K plain ones the mean of logarithms: by Jensen never less."""
    options = {"levels": 3, "solver": solvers.RK4(), "nfe": 16, "trace": "exact", "seed": 11}
    images = IMAGES % 3
    mean_of_logs = fs.bits_per_dim(FLOW, images, draws=4, **options)
    log_of_mean = fs.bits_per_dim(FLOW, images, importance=4, **options)
    assert (mean_of_logs.bpd > log_of_mean.bpd).all()
    assert mean_of_logs.nfe.tolist() == log_of_mean.nfe.tolist() == [64] * len(images)


@pytest.mark.parametrize(
    ("images", "levels", "words"),
    [
        (
            torch.randint(0, 17, (32, 1, 8, 8), generator=torch.Generator().manual_seed(0)),
            256,
            "the levels 0 … 16 only",
        ),
        (
            8 * torch.randint(0, 32, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)),
            256,
            "multiples of 8 only",
        ),
        (torch.zeros(2, 4, dtype=torch.uint8), 16, "the levels 0 … 0 only"),
    ],
)
def test_images_of_another_bit_depth_are_pointed_out(images, levels, words):
    flow = GaussianMixture(torch.zeros(1, *images.shape[1:]), 0.5).flow(paths.CondOT())
    with pytest.warns(UserWarning, match=f"of {levels} levels the images use {words}.*Give bits= or levels="):
        fs.bits_per_dim(flow, images, levels=levels, solver=solvers.RK4(), nfe=4)


def test_levels_that_the_transform_fixes_are_not_said_twice():
    flow = MIXTURE.flow(paths.CondOT())
    flow.transform = Range(levels=16)
    assert torch.equal(fs.bits_per_dim(flow, IMAGES, **RK4).bpd, fs.bits_per_dim(FLOW, IMAGES, bits=4, **RK4).bpd)
    with pytest.raises(ValueError, match=r"levels = 256, but the flow's transform .* fixes 16"):
        fs.bits_per_dim(flow, IMAGES, bits=8, **RK4)


def test_codes_of_an_autoencoder_have_no_bits_per_dimension():
    flow = MIXTURE.flow(paths.CondOT())
    flow.transform = Latent(0.18215)
    with pytest.raises(
        ValueError, match=r"models codes of an autoencoder .* no bits per dimension\. The decoder is not inv"
    ):
        fs.bits_per_dim(flow, IMAGES, levels=LEVELS, **RK4)


def test_images_at_the_ends_of_a_bare_logit_are_refused():
    flow = MIXTURE.flow(paths.CondOT())
    flow.transform = Range(0, 1).then(Logit(0.0))

    class Edge:
        def sample(self, images, noise, draw):
            return torch.zeros(images.shape), torch.zeros(len(images))

    with pytest.raises(ValueError, match="to states that are not finite; keep it away from its ends"):
        fs.bits_per_dim(flow, IMAGES * 0 + 15 * (IMAGES > 7), levels=LEVELS, dequantize=Edge(), **RK4)


def test_the_solvers_own_error_is_passed_on_in_bits(monkeypatch):
    """`log_prob` says it in nats, one entry a sample; averaged over the draws, it is no part of the standard errors."""
    from flowsolve.likelihood import bits as module

    errors = iter((torch.tensor([0.4]), torch.tensor([0.2])))

    class Out:
        log_prob, stderr, nfe = torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.int64)

        def __init__(self):
            self.error = next(errors)

    monkeypatch.setattr(module, "log_prob", lambda *_, **__: Out())
    out = fs.bits_per_dim(FLOW, IMAGES[:1], levels=LEVELS, draws=2)
    assert float(out.solver_error) == pytest.approx(0.3 / (4 * math.log(2.0)))


def test_bits_are_the_same_on_every_device(device):
    there = GaussianMixture(MIXTURE.means.to(device), MIXTURE.std.flatten().to(device))
    options = {"levels": LEVELS, "solver": solvers.RK4(), "nfe": 16, "dtype": torch.float64}
    for dequantize in ("uniform", "truncated_normal"):
        a = fs.bits_per_dim(FLOW, IMAGES, dequantize=dequantize, **options)
        b = fs.bits_per_dim(there.flow(paths.CondOT()), IMAGES.to(device), dequantize=dequantize, **options)
        assert torch.allclose(a.bpd, b.bpd, atol=1e-6)


def test_without_a_solver_it_is_that_of_log_prob():
    """The default's own error estimate comes with it; and an `Exact` trace is as good as its name."""
    images = torch.randint(0, FINE, (3, 1, 2, 2), generator=torch.Generator().manual_seed(12))
    options = {"levels": FINE, "nfe": 64, "dtype": torch.float64, "importance": 2}
    out = fs.bits_per_dim(FLOW, images, trace=fs.likelihood.Exact(), **options)
    assert (out.bpd - discrete_bits(images, FINE)).abs().max() < 1e-3
    assert out.solver_error.isfinite().all()
    assert out.nfe.tolist() == [128] * 3
    assert torch.equal(out.bpd, fs.bits_per_dim(FLOW, images, trace="exact", **options).bpd)
