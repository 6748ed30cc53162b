"""Paths against the closed forms of the papers, written out again here in 40-digit arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, Point, SubVP, Trig
from tests import cases

mp.mp.dps = 40
EPS = 2.0**-52
SATURATED = 708.4


def zero_terminal_snr(steps: int = 1000) -> list[float]:
    """Lin et al. 2023, algorithm 1: shift and scale √ᾱ of DDPM's table until its last entry is 0."""
    root = np.sqrt(np.cumprod(1.0 - np.linspace(1e-4, 0.02, steps)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return [float(a) for a in root**2]


PATHS: dict[str, Path] = {
    **cases.PATHS,
    "EDM-rho-3": EDM(sigma_min=0.01, sigma_max=20.0, rho=3.0),
    "Discrete-zero-terminal": Discrete(zero_terminal_snr()),  # long tables here, where every entry is looked at
    "Discrete-not-clean": Discrete.linear(clean=False),
}
TABLES = {name: path for name, path in PATHS.items() if isinstance(path, Discrete)}
# Where these vanish λ is infinite, and saturates.
NO_DATA_AT_0 = {"CondOT", "CondOT-sigma_min", "Cosine", "Trig", "Discrete-zero-terminal"}
NO_NOISE_AT_1 = {"CondOT", "Trig", "Discrete", "Discrete-zero-terminal"}

every_path = pytest.mark.parametrize("name", PATHS)
every_table = pytest.mark.parametrize("name", TABLES)
times = st.floats(0.0, 1.0)
INSIDE = [1e-9, 1e-4, 0.05, 0.2503, 0.5, 0.7307, 0.9, 0.99951, 1.0 - 1e-9]
NEXT_TO_THE_ENDS = [0.0, 5e-324, 1e-300, 1e-17, 1e-12, 1.0 - 1e-12, math.nextafter(1.0, 0.0), 1.0]


def truth(path: Path) -> Callable[[Any], tuple[Any, Any]]:
    """t ↦ (α, σ) in high precision, from the papers' formulas in the papers' own time."""

    def tau(t: Any, tau_min: float) -> Any:
        return 1 - t * (1 - mp.mpf(tau_min))

    if isinstance(path, CondOT):  # Lipman et al. 2022, eq. 20
        return lambda t: (t, 1 - (1 - mp.mpf(path.sigma_min)) * t)
    if isinstance(path, VP):  # Song et al. 2021, appendix B: the perturbation kernels, by quadrature of β

        def diffusion(t: Any) -> tuple[Any, Any]:
            b0, b1 = mp.mpf(path.beta_min), mp.mpf(path.beta_max)
            integral = mp.quad(lambda u: b0 + u * (b1 - b0), [0, tau(t, path.tau_min)])
            variance = 1 - mp.exp(-integral)
            return mp.exp(-integral / 2), variance if isinstance(path, SubVP) else mp.sqrt(variance)

        return diffusion
    if isinstance(path, VE):  # Song et al. 2021: σ_min (σ_max/σ_min)^τ
        low, high = mp.mpf(path.sigma_min), mp.mpf(path.sigma_max)
        return lambda t: (mp.mpf(1), low * (high / low) ** (1 - t))
    if isinstance(path, Cosine):  # Nichol & Dhariwal 2021, eq. 17

        def f(u: Any) -> Any:
            return mp.cos((u + mp.mpf(path.s)) / (1 + mp.mpf(path.s)) * mp.pi / 2) ** 2

        def cosine(t: Any) -> tuple[Any, Any]:
            bar = f(tau(t, path.tau_min)) / f(mp.mpf(0))
            sign = 1 if t >= 0 else -1  # α is odd about t = 0, which its square forgets
            return sign * mp.sqrt(bar), mp.sqrt(1 - bar)

        return cosine
    if isinstance(path, Trig):
        return lambda t: (mp.sin(mp.pi * t / 2), mp.cos(mp.pi * t / 2))
    if isinstance(path, EDM):  # Karras et al. 2022, eq. 5
        inverse = 1 / mp.mpf(path.rho)
        low, high = mp.mpf(path.sigma_min), mp.mpf(path.sigma_max)
        return lambda t: (mp.mpf(1), (high**inverse + t * (low**inverse - high**inverse)) ** mp.mpf(path.rho))
    assert isinstance(path, Discrete)
    table = [mp.mpf(a) for a in path.alphas_cumprod]
    table = [mp.mpf(1), *table] if path.clean else table
    share = [mp.sqrt(a) / (mp.sqrt(a) + mp.sqrt(1 - a)) for a in table]

    def discrete(t: Any) -> tuple[Any, Any]:
        place = (1 - t) * (len(table) - 1)
        i = min(max(int(mp.floor(place)), 0), len(table) - 2)
        a = share[i] + (place - i) * (share[i + 1] - share[i])
        norm = mp.sqrt(a**2 + (1 - a) ** 2)
        return a / norm, (1 - a) / norm

    return discrete


@every_path
@pytest.mark.parametrize("t", [0.0, *INSIDE, 1.0])
def test_alpha_and_sigma_are_the_papers_closed_forms(name: str, t: float) -> None:
    # Each formula is a handful of roundings of well-conditioned functions, so the error is relative. A table's place
    # (1 − t)N is rounded absolutely, and so are its α and σ.
    path = PATHS[name]
    alpha, sigma = truth(path)(mp.mpf(t))
    relative, absolute = (0.0, 4e-15) if isinstance(path, Discrete) else (5e-14, 1e-30)
    assert abs(path.alpha(t) - alpha) <= relative * abs(alpha) + absolute
    assert abs(path.sigma(t) - sigma) <= relative * abs(sigma) + absolute


@every_path
@pytest.mark.parametrize("t", INSIDE)
def test_derivatives_are_those_of_the_closed_forms(name: str, t: float) -> None:
    # A table's slope is N times a difference of neighbours, which has lost four or five digits: 1e-10.
    path = PATHS[name]
    curve, at = truth(path), mp.mpf(t)
    if isinstance(path, Discrete):  # its slope jumps at the knots: differentiate inside the interval
        h = mp.mpf(10) ** -15
        n = len(path.alphas_cumprod) - (0 if path.clean else 1)
        at = mp.mpf((math.floor(t * n) + 0.4) / n)
        t = float(at)
        slopes = [(curve(at + h)[i] - curve(at - h)[i]) / (2 * h) for i in (0, 1)]
    else:
        slopes = [mp.diff(lambda u, i=i: curve(u)[i], at) for i in (0, 1)]
    tolerance = 1e-10 if isinstance(path, Discrete) else 1e-12
    assert abs(path.alpha_dot(t) - slopes[0]) <= tolerance * abs(slopes[0])
    assert abs(path.sigma_dot(t) - slopes[1]) <= tolerance * abs(slopes[1])
    alpha, sigma = curve(at)
    rate = slopes[0] / alpha - slopes[1] / sigma
    assert abs(path.at(t).log_snr_dot - rate) <= 1e-9 * rate


@every_path
def test_derivatives_at_the_ends_are_one_sided_limits(name: str) -> None:
    path = PATHS[name]
    curve, h = truth(path), mp.mpf(10) ** -20
    for t, side in ((0.0, h), (1.0, -h)):
        slopes = [(curve(mp.mpf(t) + side)[i] - curve(mp.mpf(t))[i]) / side for i in (0, 1)]
        assert path.alpha_dot(t) == pytest.approx(float(slopes[0]), rel=1e-10, abs=1e-12)
        assert path.sigma_dot(t) == pytest.approx(float(slopes[1]), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("path", [VP(beta_min=0.5, beta_max=3.0, tau_min=1e-3), SubVP(tau_min=1e-3)])
def test_other_parameters_are_honoured(path: VP) -> None:
    alpha, sigma = truth(path)(mp.mpf("0.3"))
    assert path.alpha(0.3) == pytest.approx(float(alpha), rel=1e-14)
    assert path.sigma(0.3) == pytest.approx(float(sigma), rel=1e-14)


@every_path
@pytest.mark.parametrize("t", NEXT_TO_THE_ENDS)
def test_everything_is_finite_at_the_ends_and_next_to_them(name: str, t: float) -> None:
    path = PATHS[name]
    for point in (path.at(t), path.at(torch.tensor([t], dtype=torch.float64))):
        assert all(math.isfinite(float(v)) for v in point)
        assert math.isfinite(float(point.log_snr))
        assert 0.0 <= float(point.alpha) <= 1.0 + EPS
        assert float(point.sigma) >= 0.0


@every_path
def test_ends_have_the_stated_noise(name: str) -> None:
    path = PATHS[name]
    assert (path.alpha(0.0) == 0.0) == (name in NO_DATA_AT_0)
    assert (path.sigma(1.0) == 0.0) == (name in NO_NOISE_AT_1)
    assert path.log_snr(0.0) == pytest.approx(-SATURATED, abs=0.01) or name not in NO_DATA_AT_0
    assert path.log_snr(1.0) == pytest.approx(SATURATED, abs=0.01) or name not in NO_NOISE_AT_1
    marginal = math.sqrt(path.sigma(0.0) ** 2 + path.alpha(0.0) ** 2)  # of data with unit variance
    assert path.prior_std == pytest.approx(marginal, rel=0.01)


def test_log_snr_saturates_at_the_range_of_float64() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert Point(0.0, 1.0, 1.0, -1.0).log_snr == pytest.approx(-SATURATED, abs=0.01)
    assert Point(1.0, 0.0, 1.0, -1.0).log_snr == pytest.approx(SATURATED, abs=0.01)
    assert float(Point(zero, one, one, one).log_snr) == pytest.approx(-SATURATED, abs=0.01)
    assert float(Point(one, zero, one, one).log_snr) == pytest.approx(SATURATED, abs=0.01)
    assert CondOT().log_snr(5e-324) == CondOT().log_snr(0.0)


@every_path
def test_log_snr_strictly_increases_on_a_fine_grid(name: str) -> None:
    t = torch.linspace(0.0, 1.0, 20011, dtype=torch.float64)
    assert bool((PATHS[name].log_snr(t).diff() > 0).all())


@every_path
@given(a=times, b=times)
def test_log_snr_strictly_increases(name: str, a: float, b: float) -> None:
    lo, hi = sorted((a, b))
    if hi - lo >= 1e-9:  # λ' is above 1 on every path, λ is rounded to 1e-15 (1e-13 where it saturates)
        assert PATHS[name].log_snr(lo) < PATHS[name].log_snr(hi)


@every_path
@given(t=times)
def test_time_inverts_log_snr(name: str, t: float) -> None:
    """To the precision that λ carries: it is rounded to ε(1 + |log α| + |log σ|), which moves t by that over λ'.

    The factor 16 stands for the handful of operations on the way. Cosine returns by asin(α cos θ₀), whose slope at the
    data is 1/sin θ₀ = 80.
    """
    path = PATHS[name]
    point = path.at(t)
    lam, slack = point.log_snr, (100 if name == "Cosine" else 16) * EPS
    if point.alpha > 0.0 and point.sigma > 0.0:
        rounding = 1.0 + abs(math.log(point.alpha)) + abs(math.log(point.sigma))
        rate = point.alpha_dot / point.alpha - point.sigma_dot / point.sigma
        slack += 16 * EPS * rounding / rate if math.isfinite(rate) else 0.0
    assert abs(path.time(lam) - t) <= slack
    assert abs(float(path.time(torch.tensor(lam, dtype=torch.float64))) - t) <= slack


@every_path
@pytest.mark.parametrize("beyond", [0.0, 1.0, 1e3, math.inf])
def test_time_beyond_the_ends_is_exactly_the_end(name: str, beyond: float) -> None:
    path = PATHS[name]
    lo, hi = path.log_snr(0.0), path.log_snr(1.0)
    assert path.time(lo - beyond) == 0.0
    assert path.time(hi + beyond) == 1.0
    both = path.time(torch.tensor([lo - beyond, hi + beyond], dtype=torch.float64))
    assert both.tolist() == [0.0, 1.0]


@every_path
def test_time_stays_inside_and_finite_for_any_log_snr(name: str) -> None:
    lam = torch.linspace(-720.0, 720.0, 2881, dtype=torch.float64)
    t = PATHS[name].time(lam)
    assert bool(((t >= 0) & (t <= 1)).all())
    assert bool((t.diff() >= 0).all())
    one_by_one = torch.tensor([PATHS[name].time(v) for v in lam.tolist()], dtype=torch.float64)
    assert float((t - one_by_one).abs().max()) <= 1e-13


@every_path
@given(t=times)
def test_native_time_and_its_inverse_return_within_the_window(name: str, t: float) -> None:
    """σ is the native time of VE and EDM; the inverse goes through log σ, rounded to 1e-15 and divided by λ' >= 4.

    A table's index is an integer when it is within 1e-9 of one, which is 1e-12 in t.
    """
    path = PATHS[name]
    lo, hi = path.window
    t, slack = lo + (hi - lo) * t, 1.01e-12 if isinstance(path, Discrete) else 2e-14
    assert path.time_from_native(path.native_time(t)) == pytest.approx(t, abs=slack)
    as_tensor = torch.tensor([t], dtype=torch.float64)
    assert float(path.time_from_native(path.native_time(as_tensor))) == pytest.approx(t, abs=slack)


def test_native_times_are_the_networks_own_clocks() -> None:
    assert CondOT().native_time(0.3) == 0.3
    assert VP().native_time(0.0) == 1.0
    assert VP().native_time(1.0) == pytest.approx(1e-5, rel=1e-12)
    assert Trig().native_time(0.0) == pytest.approx(math.pi / 2, rel=1e-15)
    assert Trig().native_time(1.0) == 0.0
    for path in (VE(), EDM()):
        assert path.native_time(0.0) == pytest.approx(path.sigma_max, rel=1e-14)
        assert path.native_time(1.0) == pytest.approx(path.sigma_min, rel=1e-14)
        assert path.time_from_native(2.0 * path.sigma_max) == 0.0
        assert path.time_from_native(0.0) == 1.0
    assert Discrete.linear().native_time(0.0) == 999.0
    assert Discrete.linear().native_time(1.0) == 0.0


@every_path
@given(t=times)
def test_floats_and_tensors_agree(name: str, t: float) -> None:
    path = PATHS[name]
    point, rows = path.at(t), path.at(torch.tensor([[t]], dtype=torch.float64))
    for v, row in zip((*point, point.log_snr), (*rows, rows.log_snr), strict=True):
        assert row.shape == (1, 1)
        assert row.dtype == torch.float64
        assert float(row) == pytest.approx(v, rel=1e-14, abs=1e-14)
    native = path.native_time(torch.tensor(t, dtype=torch.float64))
    assert float(native) == pytest.approx(path.native_time(t), rel=1e-14, abs=1e-14)


@every_path
@pytest.mark.parametrize("method", ["alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr", "time", "native_time"])
def test_tensors_of_any_dtype_come_back_in_float64(name: str, method: str) -> None:
    assert getattr(PATHS[name], method)(torch.tensor([0.25, 0.5])).dtype == torch.float64


@every_path
def test_float32_native_times_come_back_in_float64(name: str) -> None:
    assert PATHS[name].time_from_native(torch.tensor([0.25, 0.5])).dtype == torch.float64


@every_path
def test_interpolate_is_the_definition(name: str) -> None:
    path = PATHS[name]
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    x = path.interpolate(z, eps, t)
    for i, u in enumerate(t.tolist()):
        torch.testing.assert_close(x[i], path.alpha(u) * z[i] + path.sigma(u) * eps[i], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(path.interpolate(z, eps, u)[i], x[i], rtol=1e-13, atol=1e-13)
    assert path.interpolate(z.float(), eps.float(), t).dtype == torch.float32


# --- the discrete table ---------------------------------------------------------------------------------------------


def test_ddpm_table_is_the_cumulative_product_of_its_betas() -> None:
    """A running product of 1000 factors: 1000 roundings of half an ulp."""
    betas = np.linspace(1e-4, 0.02, 1000)
    exact, product = [], mp.mpf(1)
    for beta in betas:
        product *= 1 - mp.mpf(float(beta))
        exact.append(float(product))
    np.testing.assert_allclose(Discrete.linear().alphas_cumprod, exact, rtol=2e-13)
    np.testing.assert_allclose(Discrete.from_betas(betas).alphas_cumprod, exact, rtol=2e-13)
    assert Discrete.from_betas(torch.from_numpy(betas)) == Discrete.from_betas(betas.tolist())


@every_table
def test_discrete_is_exact_at_every_entry(name: str) -> None:
    path = TABLES[name]
    k = torch.arange(len(path.alphas_cumprod), dtype=torch.float64)
    point = path.at(path.time_from_native(k))
    bar = torch.tensor(path.alphas_cumprod, dtype=torch.float64)
    assert float((point.alpha - bar.sqrt()).abs().max()) <= 2e-15
    assert float((point.sigma - (1.0 - bar).sqrt()).abs().max()) <= 2e-15
    for i, a in enumerate(path.alphas_cumprod):
        t = path.time_from_native(float(i))
        assert abs(path.alpha(t) - math.sqrt(a)) <= 2e-15
        assert abs(path.sigma(t) - math.sqrt(1.0 - a)) <= 2e-15


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("count", [2, 7, 50, 999, 1000, 4000])
def test_native_time_is_the_exact_integer_at_every_entry(count: int, clean: bool) -> None:
    path = Discrete.linear(count, clean=clean)
    k = torch.arange(count, dtype=torch.float64)
    assert [path.native_time(path.time_from_native(i)) for i in range(count)] == list(range(count))
    assert torch.equal(path.native_time(path.time_from_native(k)), k)


def test_native_time_is_the_exact_integer_on_the_uniform_grid() -> None:
    path = Discrete.linear()
    assert [path.native_time(i / 1000) for i in range(1000)] == [999.0 - i for i in range(1000)]


def test_integer_timesteps_of_a_scheduler_find_their_entries() -> None:
    path = Discrete.linear()
    k = torch.arange(1000)
    assert torch.equal(path.native_time(path.time_from_native(k)), k.double())


def test_clean_table_ends_one_step_beyond_its_first_entry() -> None:
    path = Discrete.linear()
    assert path.window == (0.0, 0.999)
    assert path.native_time(path.window[1]) == 0.0
    assert path.native_time(0.9995) == 0.0
    assert (path.alpha(1.0), path.sigma(1.0)) == (1.0, 0.0)
    bare = Discrete.linear(clean=False)
    assert bare.window == (0.0, 1.0)
    assert bare.alpha(1.0) == pytest.approx(math.sqrt(1.0 - 1e-4), abs=1e-15)
    assert CondOT().window == (0.0, 1.0)


@every_table
def test_native_time_between_entries_is_not_truncated(name: str) -> None:
    path = TABLES[name]
    for k in (0.25, 3.5, 499.125, 998.75):
        assert path.native_time(path.time_from_native(k)) == pytest.approx(k, abs=1e-9)


@every_table
@pytest.mark.parametrize("k", [1, 2, 500, 998])
def test_discrete_is_continuous_at_its_knots(name: str, k: int) -> None:
    """One-sided values differ by the slope times the gap of 2e-11, and nothing more; so does the clock."""
    path = TABLES[name]
    t, gap = path.time_from_native(float(k)), 1e-11
    left, right = path.at(t - gap), path.at(t + gap)
    for i in (0, 1):
        assert abs(right[i] - left[i]) <= 4 * gap * max(abs(left[2 + i]), abs(right[2 + i])) + 4e-15
    assert 0.0 <= path.native_time(t - gap) - path.native_time(t + gap) <= 4 * gap * 1000


def test_discrete_paths_are_values() -> None:
    path = Discrete.linear(10)
    assert path == Discrete(torch.tensor(path.alphas_cumprod, dtype=torch.float64))
    assert hash(path) == hash(Discrete.linear(10))
    assert path != Discrete.linear(10, clean=False)
    assert copy.deepcopy(path).alpha(0.35) == path.alpha(0.35)
    assert (
        repr(path) == f"Discrete(10 entries, {path.alphas_cumprod[0]:.6g} … {path.alphas_cumprod[-1]:.6g}, clean=True)"
    )


# --- errors ---------------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("t", [-0.1, 1.2, math.nan, math.inf, 999])
def test_time_outside_the_path_is_an_error_that_names_the_mend(name: str, t: float) -> None:
    message = r"t = .*noise at t = 0 to data at t = 1.*path\.time_from_native"
    for method in ("at", "alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr"):
        with pytest.raises(ValueError, match=message):
            getattr(PATHS[name], method)(t)
        with pytest.raises(ValueError, match=message):
            getattr(PATHS[name], method)(torch.tensor([0.5, t]))


def test_the_offending_time_is_shown() -> None:
    with pytest.raises(ValueError, match=r"t = 1\.5 is outside"):
        VP().at(torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CondOT(sigma_min=-0.1), r"sigma_min = -0\.1; expected 0 <= sigma_min < 1"),
        (lambda: CondOT(sigma_min=1.0), "sigma_min = 1.0"),
        (lambda: CondOT(sigma_min=math.nan), "sigma_min = nan"),
        (lambda: VP(beta_min=0.0), "beta_min = 0.0; expected a finite number > 0"),
        (lambda: VP(beta_max=math.inf), "beta_max = inf"),
        (lambda: SubVP(beta_min=-1.0), "beta_min = -1.0"),
        (lambda: VP(tau_min=0.0), "tau_min = 0.0; expected 0 < tau_min < 1 .*no finite slope"),
        (lambda: Cosine(tau_min=1.0), "tau_min = 1.0"),
        (lambda: Cosine(s=0.0), "s = 0.0"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "sigma_min = 2.0 must be below sigma_max = 1.0"),
        (lambda: VE(sigma_min=0.0), "sigma_min = 0.0"),
        (lambda: EDM(sigma_max=math.nan), "sigma_max = nan"),
        (lambda: EDM(rho=0.0), "rho = 0.0"),
        (lambda: Discrete([0.5]), "1 entries; expected a 1-D table of at least 2"),
        (lambda: Discrete([]), "0 entries"),
        (lambda: Discrete([0.1, 0.5, 0.9]), "strictly decrease with the index"),
        (lambda: Discrete(torch.linspace(1e-4, 0.02, 10)), r"not the betas: Discrete\.from_betas\(betas\)"),
        (lambda: Discrete([1.0, 0.5]), r"values in \[0, 1\)"),
        (lambda: Discrete([0.5, -0.1]), r"values in \[0, 1\)"),
        (lambda: Discrete([0.9, math.nan, 0.1]), "strictly decrease"),
        (lambda: Discrete([0.9, 0.5, 0.5]), "strictly decrease"),
        (lambda: Discrete.from_betas([0.1, 1.5]), r"beta 1 is 1.5; expected 0 < beta <= 1"),
    ],
)
def test_bad_parameters_are_refused_with_what_was_expected(build: Callable[[], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "path",
    [CondOT(), CondOT(sigma_min=0.1), VP(), Discrete.linear(), Discrete.linear(50, clean=False), EDM(), Cosine()],
    ids=repr,
)
def test_the_time_of_a_share_is_that_of_its_log_snr(path: Path) -> None:
    """α/(α+σ) is the clock of the straight chart: at its ends exactly, between them by the inverse of λ."""
    t = torch.linspace(0.0, 1.0, 97, dtype=torch.float64)
    point = path.at(t)
    share = point.alpha / (point.alpha + point.sigma)
    found = path.time_of_share(share)
    slope = (share[2:] - share[:-2]) / (t[2:] - t[:-2])  # a rounding of the share moves the time by 1/slope of it
    assert float(found[0]) == 0.0 or float(point.alpha[0]) > 0.0
    assert ((found - t).abs()[1:-1] <= 16 * 2.2e-16 / slope.clamp(max=1.0) + 1e-12).all()
    singles = [path.time_of_share(float(s)) for s in share]
    torch.testing.assert_close(torch.tensor(singles, dtype=torch.float64), found, rtol=0, atol=1e-12)
    assert path.time_of_share(1.0) == 1.0
