"""Bits per dimension: offsets, refusals and a density whose discrete probabilities are known."""

import math

import pytest
import torch

import flowsolve as fs
from flowsolve import paths, solvers
from flowsolve.problems import GaussianMixture

RK4 = {"solver": solvers.RK4(), "nfe": 120}
LEVELS = 16
IMAGES = torch.randint(0, LEVELS, (12, 1, 2, 2), generator=torch.Generator().manual_seed(0))
MIXTURE = GaussianMixture(0.4 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2)), [0.3, 0.5, 0.4])
FLOW = MIXTURE.flow(paths.CondOT())


def discrete_bits(images, levels):
    """−log₂ P(k)/D by the mixture's own cell probabilities, a product of differences of normal distributions."""
    edges = -1.0 + 2.0 / levels * torch.stack((images, images + 1)).double()
    parts = []
    for mean, std in zip(MIXTURE.means.double(), MIXTURE.std.double(), strict=True):
        cdf = 0.5 * (1.0 + torch.erf((edges - mean) / (std * math.sqrt(2.0))))
        parts.append((cdf[1] - cdf[0]).log().flatten(1).sum(1))
    log = torch.logsumexp(torch.stack(parts) + MIXTURE.weights.double().log().unsqueeze(1), 0)
    return -log / (images[0].numel() * math.log(2.0))


def test_the_bound_lies_above_the_probability_and_tightens_with_importance_draws():
    """On 3 levels, where one draw costs 0.3 bits; a missing −log K would put 64 draws 1.5 bits below the truth."""
    images = torch.randint(0, 3, (64, 1, 2, 2), generator=torch.Generator().manual_seed(3))
    options = {"levels": 3, "solver": solvers.RK4(), "nfe": 40, "trace": "exact"}
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
        (IMAGES, {"dequantize": "variational"}, ValueError, "expected 'uniform'"),
        (IMAGES, {"importance": 0}, ValueError, "at least 1 draw"),
        (IMAGES, {"importance": 8}, ValueError, "set trace='exact'"),
        (IMAGES, {"bits": 4}, TypeError, "give one"),
        (IMAGES, {"levels": 1}, ValueError, "at least 2"),
        (IMAGES > 3, {}, TypeError, "torch.bool"),
    ],
)
def test_data_that_has_no_probability_is_refused(images, options, error, words):
    with pytest.raises(error, match=words):
        fs.bits_per_dim(FLOW, images, **{"levels": LEVELS, **RK4, **options})
