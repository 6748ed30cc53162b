"""Data transforms: log-determinants against autograd, offsets written out, integers through states and back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flowsolve as fs
from flowsolve.paths import CondOT
from flowsolve.transforms import Chain, Elementwise, Latent, Logit, Normalize, Range

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SOFTPLUS_LIKE = Elementwise(
    lambda y: (1.0 + y.exp()).log(), lambda x: x.expm1().log(), lambda y: -torch.nn.functional.softplus(-y)
)
FALLING = Elementwise(lambda y: -2.0 * y, lambda x: -0.5 * x, lambda y: torch.full_like(y, math.log(2.0)))
TRANSFORMS = {
    "[0, 1]": Range(0.0, 1.0),
    "[-1, 1]": Range(),
    "centred": Range(centred=True),
    "17 levels": Range(levels=17),
    "normalize": Range(0.0, 1.0).then(Normalize(MEAN, STD)),
    "one mean": Range(0.0, 1.0, centred=True).then(Normalize(0.5, 0.25)),
    "logit": Range(0.0, 1.0).then(Logit(0.05)),
    "logit 1e-6": Range(0.0, 1.0).then(Logit(1e-6)),
    "own": Range(0.0, 1.0).then(SOFTPLUS_LIKE),
    "falling": Range(0.0, 1.0).then(FALLING),
    "long": Range(0.0, 1.0, levels=32).then(Logit(0.1), Normalize(MEAN, STD), SOFTPLUS_LIKE),
}
every = pytest.mark.parametrize("name", TRANSFORMS)


def integers(count, seed=0, shape=(4, 3, 2, 2)):
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


@every
def test_log_det_is_that_of_the_jacobian(name):
    transform = TRANSFORMS[name]
    u = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = integers(transform.count()) + u
    found = transform.log_det(v)
    assert found.shape == (4,)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda w: transform.forward(w.reshape(1, 3, 2, 2)), v[i].flatten()
        )
        sign, expected = torch.linalg.slogdet(jacobian.reshape(12, 12))
        assert sign != 0
        assert float(found[i]) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize(
    ("transform", "levels", "offset"),
    [
        (Range(0, 1), None, 8.0),
        (Range(-1, 1), None, 7.0),
        (Range(-1, 1), 32, 4.0),
        (Range(0, 1), 32, 5.0),
        (Range(-1, 1, levels=17), None, math.log2(17) - 1.0),
        (Range(-1, 1, centred=True), None, math.log2(255) - 1.0),
        (Range(0, 255, centred=True), None, 0.0),
        (Range(0, 1).then(Normalize(MEAN, STD)), None, 8.0 + sum(map(math.log2, STD)) / 3),
        (Range(0, 1).then(Normalize(0.5, 0.5)), None, 7.0),
    ],
)
def test_the_offset_is_minus_the_log_det_in_bits(transform, levels, offset):
    v = integers(transform.count(levels)) + 0.5
    bits = -transform.log_det(v.double(), levels) / (12 * math.log(2.0))
    assert bits.tolist() == pytest.approx([offset] * 4, abs=1e-12)


def test_the_offset_of_a_logit_is_the_mean_over_its_pixels():
    """x = logit(α + (1−2α) k/256): bits of dx/dk = (1−2α)/(256 s(1−s)), RealNVP's correction written out."""
    v = integers(256).double() + 0.3
    s = 0.05 + 0.9 * v / 256
    expected = (0.9 / 256 / (s * (1 - s))).log2().flatten(1).mean(1)
    found = Range(0, 1).then(Logit(0.05)).log_det(v) / (12 * math.log(2.0))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


@every
@given(st.data())
def test_integers_survive_the_way_to_a_state_and_back(name, data):
    transform = TRANSFORMS[name]
    levels = transform.levels or data.draw(st.integers(2, 65536), "levels")
    k = torch.tensor(data.draw(st.lists(st.integers(0, levels - 1), min_size=6, max_size=6), "k")).reshape(2, 3)
    u = data.draw(st.floats(0.001, 0.999), "u")
    back = transform.pixels(transform.forward(k.double() + u, levels), levels)
    assert back.tolist() == k.tolist()
    assert back.dtype == (torch.uint8 if levels <= 256 else torch.int32)


@every
def test_the_middle_of_every_level_survives_float32(name):
    transform = TRANSFORMS[name]
    k = torch.arange(transform.count()).unsqueeze(1).expand(-1, 3)
    x = transform.forward(k.float() + 0.5)
    assert x.dtype == torch.float32
    assert torch.equal(transform.pixels(x), k.to(torch.uint8))


@every
def test_inverse_undoes_forward_between_the_integers(name):
    transform = TRANSFORMS[name]
    v = transform.count() * torch.rand(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (transform.inverse(transform.forward(v)) - v).abs().max() < 1e-9 * transform.count()


def test_centred_levels_lie_on_the_ends_as_images_scaled_by_255_do():
    k = torch.arange(256.0, dtype=torch.float64).unsqueeze(1)
    x = Range(-1, 1, centred=True).forward(k + 0.5)
    assert (x - (2.0 * k / 255.0 - 1.0)).abs().max() < 1e-14


def test_states_beyond_the_levels_become_the_first_or_the_last():
    x = torch.tensor([[-3.0, -1.0, 0.999, 1.0, 7.0]])
    assert Range().pixels(x).tolist() == [[0, 0, 255, 255, 255]]
    assert Range(levels=17).pixels(x).tolist() == [[0, 0, 16, 16, 16]]


def test_pixels_are_those_of_the_digits():
    """The transform of `problems.digits`, x = 2 (k + u)/17 − 1."""
    from flowsolve.problems import digits

    k = integers(17, shape=(5, 1, 8, 8))
    x = digits.dequantize(k, torch.Generator().manual_seed(0), torch.float64)
    assert torch.equal(Range(-1, 1, levels=17).pixels(x), k.to(torch.uint8))


def test_a_state_that_is_not_finite_has_no_image():
    x = torch.zeros(3, 2)
    x[1, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"samples 1 are not finite and have no image; leave them out: x\[solution.ok\]"
    ):
        Range().pixels(x)


def test_codes_are_scaled_and_have_no_pixels():
    code = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = Latent(0.18215, shift=0.1)
    assert torch.equal(latent.forward(code), (code - 0.1) * 0.18215)
    assert (latent.inverse(latent.forward(code)) - code).abs().max() < 1e-14
    with pytest.raises(ValueError, match=r"codes of an autoencoder .*; decode them: decoder\("):
        latent.pixels(code)


def flow(**options):
    return fs.Flow(lambda x, t: x, CondOT(), **options)


def test_a_flow_declares_its_transform_once():
    assert flow().transform == Range(-1.0, 1.0)
    assert flow(data_range=(0.0, 1.0)).transform == Range(0.0, 1.0)
    chain = Range(0, 1).then(Normalize(MEAN, STD))
    declared = flow(transform=chain)
    assert declared.transform is chain
    low = min(-m / s for m, s in zip(MEAN, STD, strict=True))
    high = max((1 - m) / s for m, s in zip(MEAN, STD, strict=True))
    assert declared.data_range == pytest.approx((low, high))
    declared.data_range = (0.0, 2.0)
    assert declared.transform == Range(0.0, 2.0)
    assert flow(transform=Range(0, 1).then(FALLING)).data_range == (-2.0, 0.0)
    assert flow(transform=Range(-1, 1, centred=True)).data_range == pytest.approx((-256 / 255, 256 / 255))
    assert flow(transform=Latent(0.2)).data_range == (-math.inf, math.inf)


def test_a_round_trip_of_codes_has_no_decibels():
    codes = fs.problems.GaussianMixture([[0.0, 0.0]], std=1.0).flow(CondOT())
    codes.transform = Latent(0.5)
    report = fs.round_trip(codes, torch.ones(2, 2), solver=fs.solvers.RK4(), nfe=40)
    assert report.psnr.isnan().all()
    assert (report.error < 1e-3).all()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Range(1, -1), ValueError, r"the range \(1, -1\); expected finite numbers with low < high"),
        (lambda: Range(0, math.inf), ValueError, "expected finite numbers"),
        (lambda: Range(levels=1), ValueError, "levels = 1; expected an integer of at least 2"),
        (lambda: Range().count(2.5), ValueError, "levels = 2.5"),
        (lambda: Range(levels=17).count(256), ValueError, "levels = 256, but the flow's transform .* fixes 17"),
        (lambda: Normalize(0.0, (0.1, 0.0, 1.0)), ValueError, "std = .* expected finite numbers > 0"),
        (lambda: Normalize(MEAN, STD).forward(torch.ones(2, 1, 4, 4)), ValueError, r"3 channels .* \(2, 1, 4, 4\)"),
        (lambda: Logit(0.5), ValueError, "alpha = 0.5; expected 0 <= alpha < 0.5"),
        (lambda: Latent(0.0), ValueError, "scale not 0"),
        (lambda: Range().then(torch.exp), TypeError, "is no map; expected forward, inverse and log_slope"),
        (lambda: Chain(Logit(0.1)), TypeError, "a chain starts with a transform of levels such as Range"),
        (lambda: flow(transform=Logit(0.1)), TypeError, "expected a flowsolve.transforms object such as Range"),
        (lambda: flow(transform=Range(), data_range=(0, 1)), TypeError, "say the same; give one"),
    ],
)
def test_transforms_that_make_no_sense_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
