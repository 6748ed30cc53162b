"""Grids: strictly monotone, exact at their ends, and where the literature puts them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsolve import Flow, grids, sample, solvers
from flowsolve.grids import (
    WINDOW,
    At,
    Beta,
    Grid,
    Karras,
    LogSNR,
    Polyexponential,
    Quadratic,
    Shifted,
    Spacing,
    Timesteps,
    Uniform,
    dynamic_shift,
    resolve,
)
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP
from flowsolve.planning import plan
from flowsolve.problems import GaussianMixture
from tests.cases import PATHS

SPACINGS: dict[str, Spacing] = {
    "uniform": Uniform(), "log_snr": LogSNR(), "karras": Karras(), "karras-3": Karras(rho=3.0),
    "quadratic": Quadratic(), "polyexponential": Polyexponential(), "polyexponential-2": Polyexponential(rho=2.0),
    "beta": Beta(), "beta-skew": Beta(0.4, 1.5),
}  # fmt: skip
SHIFTS: dict[str, Spacing] = {
    "uniform-3": Shifted("uniform", 3.0), "uniform-0.3": Shifted("uniform", 0.3), "karras-3": Shifted(Karras(), 3.0),
    "quadratic-20": Shifted(Quadratic(), 20.0),
}  # fmt: skip
every_path = pytest.mark.parametrize("name", PATHS)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
infinite = pytest.mark.parametrize("name", ["CondOT", "Trig", "Discrete-zero-terminal"])  # λ infinite at both ends

# An interval that ends inside the path ends inside the log-SNR window too; one that does not is an error, tested below.
ends = st.tuples(st.one_of(st.just(0.0), st.floats(0.06, 0.45)), st.one_of(st.just(1.0), st.floats(0.55, 0.94)))


def grid(spacing: Spacing, path: Path, start: float, end: float, steps: int) -> list[float]:
    """The times, checked by Grid."""
    times = spacing.times(path, start, end, steps)
    return list(Grid(tuple(times), (1,) * steps).times)


@every_path
@every_spacing
@settings(max_examples=25)
@given(interval=ends, steps=st.integers(1, 60), backwards=st.booleans())
def test_any_grid_is_strictly_monotone_with_exact_ends_and_the_steps_asked(
    name: str, spacing: Spacing, interval: tuple[float, float], steps: int, backwards: bool
) -> None:
    start, end = interval[::-1] if backwards else interval
    times = spacing.times(PATHS[name], start, end, steps)
    assert len(times) == steps + 1
    assert times[0] == start
    assert times[-1] == end
    rising = times[::-1] if backwards else times
    assert all(a < b for a, b in pairwise(rising))
    Grid(tuple(times), (1,) * steps)


@every_path
@every_spacing
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.7), (0.3, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_smallest_grids_work(name: str, spacing: Spacing, interval: tuple[float, float], steps: int) -> None:
    forwards = grid(spacing, PATHS[name], *interval, steps)
    assert grid(spacing, PATHS[name], *interval[::-1], steps) == pytest.approx(forwards[::-1], abs=1e-15)
    if steps == 1:
        assert forwards == list(interval)


@every_path
@pytest.mark.parametrize(
    "spacing", [*SPACINGS.values(), *SHIFTS.values()], ids=[*SPACINGS, *(f"shifted-{n}" for n in SHIFTS)]
)
def test_every_number_of_steps_is_a_grid_on_every_path(name: str, spacing: Spacing) -> None:
    """diffusers' beta sigmas fail from 40 steps on, and Karras on a cosine table repeats a time step (ANCHORS.md)."""
    few = isinstance(spacing, Shifted) or (isinstance(spacing, Beta) and name != "CondOT")  # Beta's shares know no path
    for steps in [*range(1, 20), 39, 40, 41, 50, 99, 200] if few else range(1, 201):
        grid(spacing, PATHS[name], 0.0, 1.0, steps)


@every_path
@every_spacing
def test_a_thousand_steps_are_still_a_grid(name: str, spacing: Spacing) -> None:
    assert len(grid(spacing, PATHS[name], 0.0, 1.0, 1000)) == 1001


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49, 1000, 4099])
def test_uniform_times_are_correctly_rounded_fractions(steps: int) -> None:
    times = grid(Uniform(), CondOT(), 0.0, 1.0, steps)
    assert times == [float(Fraction(i, steps)) for i in range(steps + 1)]
    assert grid(Uniform(), CondOT(), 1.0, 0.0, steps) == times[::-1]


@given(interval=ends, steps=st.integers(1, 500))
def test_uniform_times_of_any_interval_are_within_two_roundings(interval: tuple[float, float], steps: int) -> None:
    start, end = (Fraction(v) for v in interval)
    for i, t in enumerate(Uniform().times(VP(), *interval, steps)):
        assert abs(Fraction(t) - (start + (end - start) * Fraction(i, steps))) <= Fraction(3, 2**53)


@every_path
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_log_snr_times_are_equally_spaced_in_log_snr(name: str, steps: int) -> None:
    path = PATHS[name]
    lam = [path.log_snr(t) for t in grid(LogSNR(), path, 0.1, 0.9, steps)]
    width = (path.log_snr(0.9) - path.log_snr(0.1)) / steps
    assert [b - a for a, b in pairwise(lam)] == pytest.approx([width] * steps, rel=1e-9)


@pytest.mark.parametrize("path", [VP(), SubVP(), VE(), EDM(), Discrete.linear(40, clean=False)], ids=repr)
def test_log_snr_times_are_equally_spaced_over_a_whole_finite_path(path: Path) -> None:
    lam = [path.log_snr(t) for t in grid(LogSNR(), path, 0.0, 1.0, 10)]
    assert lam[0] == path.log_snr(0.0)
    assert lam[-1] == path.log_snr(1.0)
    # near the end of VP λ' is 5·10⁴, so the last bit of t moves λ by 1e-11
    assert [b - a for a, b in pairwise(lam)] == pytest.approx([(lam[-1] - lam[0]) / 10] * 10, rel=1e-9)


@pytest.mark.parametrize("path", [EDM(), EDM(0.01, 20.0, 3.0), VE(0.002, 80.0)], ids=repr)
@pytest.mark.parametrize("rho", [3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 9, 18])
def test_karras_times_are_the_sigmas_of_karras_et_al(path: EDM | VE, rho: float, steps: int) -> None:
    """Eq. 5: σ_i = (σ_max^(1/ρ) + i/(N−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ, i < N, here with N − 1 steps."""
    high, low = path.sigma_max ** (1 / rho), path.sigma_min ** (1 / rho)
    sigmas = [(high + i / steps * (low - high)) ** rho for i in range(steps + 1)]
    got = [path.sigma(t) for t in grid(Karras(rho=rho), path, 0.0, 1.0, steps)]
    assert got == pytest.approx(sigmas, rel=1e-11)


def test_uniform_times_of_edm_are_the_karras_grid() -> None:
    path = EDM(rho=5.0)
    assert grid(Uniform(), path, 0.0, 1.0, 20) == pytest.approx(grid(Karras(rho=5.0), path, 0.0, 1.0, 20), abs=1e-13)


@every_path
def test_karras_places_sigma_over_alpha_on_any_path(name: str) -> None:
    path = PATHS[name]
    roots = [(path.sigma(t) / path.alpha(t)) ** (1 / 7) for t in grid(Karras(), path, 0.1, 0.9, 8)]
    width = (roots[-1] - roots[0]) / 8
    assert [b - a for a, b in pairwise(roots)] == pytest.approx([width] * 8, rel=1e-9)


# --- where λ is infinite --------------------------------------------------------------------------------------------


def test_the_default_window_is_edms() -> None:
    assert pytest.approx((-math.log(80.0), math.log(500.0))) == WINDOW
    assert LogSNR().window == Karras().window == WINDOW


@infinite
@pytest.mark.parametrize("window", [WINDOW, (-2.0, 3.0)])
@pytest.mark.parametrize("spacing", [LogSNR, Karras])
def test_the_window_is_honoured_where_log_snr_is_infinite(
    name: str, window: tuple[float, float], spacing: type[LogSNR]
) -> None:
    """First and last steps go from the exact ends to the edges of the window; the rest divide it."""
    path = PATHS[name]
    times = grid(spacing(window=window), path, 0.0, 1.0, 12)
    lam = [path.log_snr(t) for t in times[1:-1]]
    assert (lam[0], lam[-1]) == pytest.approx(window, abs=1e-9)
    placed = lam if spacing is LogSNR else [math.exp(-v / 7) for v in lam]
    width = (placed[-1] - placed[0]) / 10
    assert [b - a for a, b in pairwise(placed)] == pytest.approx([width] * 10, rel=1e-8)


@infinite
@pytest.mark.parametrize("spacing", [LogSNR(), Karras()], ids=["log_snr", "karras"])
def test_each_infinite_end_has_its_own_window_edge(name: str, spacing: LogSNR) -> None:
    path = PATHS[name]
    middle = 0.5
    noise_side = grid(spacing, path, 0.0, middle, 6)
    assert path.log_snr(noise_side[1]) == pytest.approx(WINDOW[0], abs=1e-9)
    data_side = grid(spacing, path, middle, 1.0, 6)
    assert path.log_snr(data_side[-2]) == pytest.approx(WINDOW[1], abs=1e-9)
    backwards = grid(spacing, path, 1.0, middle, 6)
    assert backwards == pytest.approx(data_side[::-1], abs=1e-15)


@infinite
def test_two_steps_meet_in_the_middle_of_the_window(name: str) -> None:
    path = PATHS[name]
    assert path.log_snr(grid(LogSNR(), path, 0.0, 1.0, 2)[1]) == pytest.approx(sum(WINDOW) / 2, abs=1e-9)


@pytest.mark.parametrize("name", ["VP", "EDM", "VE", "SubVP"])
def test_the_window_is_ignored_where_log_snr_is_finite(name: str) -> None:
    path = PATHS[name]
    assert grid(LogSNR(window=(-0.1, 0.1)), path, 0.0, 1.0, 5) == grid(LogSNR(), path, 0.0, 1.0, 5)


@pytest.mark.parametrize("interval", [(0.0, 0.01), (0.01, 0.0), (0.999, 1.0)])
def test_an_interval_outside_the_window_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"log-SNR window .* leaves nothing of the interval .*widen it"):
        LogSNR().times(CondOT(), *interval, 4)
    assert len(grid(LogSNR(window=(-12.0, 12.0)), CondOT(), *interval, 4)) == 5


# --- spacings by other formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_quadratic_times_are_squares_of_equal_steps_from_the_data(steps: int) -> None:
    times = grid(Quadratic(), CondOT(), 0.0, 1.0, steps)
    assert times == [float(1 - Fraction(steps - i, steps) ** 2) for i in range(steps + 1)]
    assert grid(Quadratic(), CondOT(), 1.0, 0.0, steps) == times[::-1]
    # DDIM's sub-sequence τ_i = c i² of a table
    table = Discrete.linear(100)
    entries = [100 * (1 - t) for t in grid(Quadratic(), table, 0.0, 1.0, steps)]
    assert entries == pytest.approx([100 * (i / steps) ** 2 for i in range(steps, -1, -1)], abs=1e-9)


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_polyexponential_sigmas_are_k_diffusions(rho: float) -> None:
    """σ_i = exp(u^ρ (log σ_max − log σ_min) + log σ_min) with u from 1 to 0."""
    path, steps = EDM(), 12
    got = [path.sigma(t) for t in grid(Polyexponential(rho=rho), path, 0.0, 1.0, steps)]
    ramp = [(1 - i / steps) ** rho for i in range(steps + 1)]
    expected = [math.exp(u * (math.log(80.0) - math.log(0.002)) + math.log(0.002)) for u in ramp]
    assert got == pytest.approx(expected, rel=1e-11)
    if rho == 1.0:
        assert got == pytest.approx([path.sigma(t) for t in grid(LogSNR(), path, 0.0, 1.0, steps)], rel=1e-12)


@infinite
@pytest.mark.parametrize("window", [WINDOW, (-2.0, 3.0)])
def test_polyexponential_has_the_window_of_log_snr(name: str, window: tuple[float, float]) -> None:
    path = PATHS[name]
    lam = [path.log_snr(t) for t in grid(Polyexponential(window=window, rho=2.0), path, 0.0, 1.0, 12)[1:-1]]
    assert (lam[0], lam[-1]) == pytest.approx(window, abs=1e-9)
    roots = [math.sqrt(max(window[1] - v, 0.0)) for v in lam]
    assert roots[:-1] == pytest.approx([roots[0] * (1 - i / 10) for i in range(10)], rel=1e-8)


@pytest.mark.parametrize(
    ("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.3, 2.0), (5.0, 0.5), (2.0, 2.0), (0.05, 0.05), (0.6, 100.0)]
)
@pytest.mark.parametrize("steps", [1, 2, 40, 200])
def test_beta_times_are_quantiles(a: float, b: float, steps: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    times = Beta(a, b).times(CondOT(), 0.0, 1.0, steps)
    left = [1 - t for t in times[1:-1]]
    expected = [float(stats.beta.ppf(1 - i / steps, a, b)) for i in range(1, steps)]
    assert left == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert Beta(1.0, 1.0).times(VP(), 0.2, 0.9, steps) == pytest.approx(Uniform().times(VP(), 0.2, 0.9, steps))


def test_a_beta_too_steep_for_its_steps_is_an_error_in_words() -> None:
    with pytest.raises(ValueError, match=r"grid times 0 and 1 are 0\.0 and 0\.0; .*fewer steps, or another spacing"):
        grid(Beta(0.6, 0.001), CondOT(), 0.0, 1.0, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beta(0.0, 1.0), r"a = 0\.0; expected 0 < a <= 100"),
        (lambda: Beta(1.0, math.nan), r"b = nan; expected 0 < b"),
        (lambda: Karras(rho=0.0), r"rho = 0\.0; expected a finite number > 0"),
        (lambda: Polyexponential(rho=-1.0), r"rho = -1\.0; expected a finite number > 0"),
        (lambda: Timesteps("middle"), r"kind = 'middle'; expected one of leading, trailing, linspace"),
        (lambda: Timesteps("trailing", steps_offset=1), r"steps_offset = 1 moves the entries of 'leading'"),
        (lambda: Shifted("uniform", 0.0), r"shift = 0\.0; expected a finite number > 0"),
        (lambda: Shifted(Shifted("uniform", 3.0), 2.0), r"shifted already, and the shift is applied once.*shift=6"),
        (lambda: Shifted(At(t=[0.0, 1.0]), 2.0), "explicit times say where the steps are"),
        (lambda: dynamic_shift(0), r"tokens = 0; expected a number > 0"),
        (lambda: dynamic_shift(9, kind="cubic"), r"kind = 'cubic'; expected 'exponential' or 'linear'"),
        (lambda: dynamic_shift(1, (256, -1.0), kind="linear"), r"1 tokens give a shift of -1\.1.*expected one > 0"),
    ],
)
def test_a_spacing_says_what_is_wrong_with_its_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- a resolution shift, once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("name", SPACINGS)
def test_a_shift_on_the_straight_path_is_sd3s(name: str, shift: float) -> None:
    base, steps = SPACINGS[name], 17
    tau = [1 - t for t in base.times(CondOT(), 0.0, 1.0, steps)]
    got = [1 - t for t in grid(Shifted(base, shift), CondOT(), 0.0, 1.0, steps)]
    assert got == pytest.approx([shift * v / (1 + (shift - 1) * v) for v in tau], abs=1e-13)


@every_path
@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_a_shift_moves_log_snrs_on_any_path(name: str, shift: float) -> None:
    path, steps = PATHS[name], 9
    moved = [path.log_snr(t) + math.log(shift) for t in grid(Shifted(LogSNR(), shift), path, 0.0, 1.0, steps)][1:-1]
    first, last = path.log_snr(0.0), path.log_snr(1.0)
    lo = WINDOW[0] if path.alpha(0.0) == 0.0 else first + max(math.log(shift), 0.0)
    hi = WINDOW[1] if path.sigma(1.0) == 0.0 else last + min(math.log(shift), 0.0)
    nodes = steps + 1 - (path.alpha(0.0) == 0.0) - (path.sigma(1.0) == 0.0)
    base = [lo + (hi - lo) * i / (nodes - 1) for i in range(nodes)]
    base = base if path.alpha(0.0) == 0.0 else base[1:]
    base = base if path.sigma(1.0) == 0.0 else base[:-1]
    assert moved == pytest.approx(base, abs=1e-7)
    backwards = Shifted(LogSNR(), shift).times(path, 1.0, 0.0, steps)
    assert backwards[::-1] == grid(Shifted(LogSNR(), shift), path, 0.0, 1.0, steps)


def test_a_shift_beyond_the_interval_is_an_error_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"a shift of 1e\+06 moves log-SNRs by -13\.82, and the interval \[0, 1\] holds only"
    ):
        Shifted("uniform", 1e6).times(EDM(), 0.0, 1.0, 5)


@pytest.mark.parametrize("steps", [1, 2, 20, 28])
def test_shifts_are_diffusers_given_unshifted_sigmas(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    plain = [1 - i / steps for i in range(steps)]  # what its SD3 and Flux pipelines hand over
    for kind in ("exponential", "linear"):
        for tokens in (256, 1024, 4096, 9000):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
            mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
            scheduler.set_timesteps(sigmas=plain, mu=mu)
            times = Shifted("uniform", dynamic_shift(tokens, kind=kind)).times(CondOT(), 0.0, 1.0, steps)
            assert [1 - t for t in times] == pytest.approx(scheduler.sigmas.tolist(), abs=2e-6)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=plain)
    times = Shifted("uniform", 3.0).times(CondOT(), 0.0, 1.0, steps)
    assert [1 - t for t in times] == pytest.approx(scheduler.sigmas.tolist(), abs=2e-6)


def test_diffusers_own_static_grid_ends_at_a_shift_applied_twice() -> None:
    """diffusers#13243: the sigmas it is made with are not those of as many steps; the last is shifted by 9, not 3."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = scheduler.sigmas.tolist()
    once, twice = 3 * 0.001 / (1 + 2 * 0.001), 9 * 0.001 / (1 + 8 * 0.001)
    assert made[-1] == pytest.approx(once, rel=1e-5)
    scheduler.set_timesteps(1000)
    if scheduler.sigmas[-2].item() == pytest.approx(made[-1], rel=1e-5):
        pytest.skip("this diffusers shifts once")
    assert scheduler.sigmas[-2].item() == pytest.approx(twice, rel=1e-5)
    times = Shifted("uniform", 3.0).times(CondOT(), 0.0, 1.0, 1000)
    assert [1 - t for t in times[:-1]] == pytest.approx(made, abs=1e-6)


# --- the entries of a table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 50])
@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_timesteps_are_diffusers_but_for_its_rounding(name: str, kind: str, size: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    euler = name == "EulerDiscreteScheduler"
    spacing = Timesteps(kind, whole=not (euler and kind == "linspace"))
    scheduler = getattr(diffusers, name)(num_train_timesteps=size, timestep_spacing=kind)
    path, extra = Discrete.linear(size), []
    for steps in range(1, min(size, 300) + 1):
        scheduler.set_timesteps(steps)
        theirs, mine = scheduler.timesteps.tolist(), spacing.entries(path, steps)
        assert len(mine) == steps
        if kind == "linspace" and steps == 1:
            assert (theirs, mine) == ([0], [size - 1])  # theirs asks about pure noise as if it were data
            continue
        if len(theirs) > steps:
            assert (kind, theirs.pop()) == ("trailing", -1)  # no entry of the table
            extra.append(steps)
        if not spacing.whole:
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-4)
            continue
        for i, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            if a != b:  # halfway between two entries, where float rounding decides there
                exact = (
                    Fraction(size * (steps - i), steps) - 1
                    if kind == "trailing"
                    else Fraction(size - 1, steps - 1) * (steps - 1 - i)
                )
                assert exact.denominator == 2
                assert abs(a - exact) == abs(b - exact) == Fraction(1, 2)
    if size == 1000:
        assert extra[:3] == ([61, 103, 121] if kind == "trailing" else [])


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 20, 50, 999, 1000])
def test_steps_start_at_the_entries_and_end_in_clean_data(kind: str, steps: int) -> None:
    path, spacing = Discrete.linear(), Timesteps(kind)
    start, end = spacing.span(path, steps)
    times = grid(spacing, path, start, end, steps)
    assert end == times[-1] == 1.0
    assert [path.native_time(t) for t in times[:-1]] == spacing.entries(path, steps)
    if kind != "leading" or steps == 1000:
        assert start == 0.0
    if steps < 1000 and not (kind == "linspace" and steps > 1):
        edge = path.window[1]
        if spacing.entries(path, steps)[-1] > 0:
            assert grid(spacing, path, edge, start, steps) == [*times[:-1], edge][::-1]


def test_the_last_steps_of_a_table_may_be_stable_diffusions() -> None:
    """SD 1: leading with offset 1, and a last step that ends at entry 0 (set_alpha_to_one = False)."""
    path, spacing = Discrete.linear(), Timesteps("leading", steps_offset=1)
    entries = spacing.entries(path, 50)
    assert entries == [float(k) for k in range(981, 0, -20)]
    times = grid(spacing, path, path.time_from_native(981.0), path.window[1], 50)
    assert [path.native_time(t) for t in times] == [*entries, 0.0]


@pytest.mark.parametrize(
    ("spacing", "path", "interval", "steps", "message"),
    [
        (
            Timesteps("trailing"),
            VP(),
            (0.0, 1.0),
            5,
            r"'trailing' visits the entries of a discrete table and VP\(.* has none",
        ),
        (
            Timesteps("trailing"),
            Discrete.linear(20),
            (0.0, 1.0),
            21,
            "21 steps on a table of 20 entries; expected 1 to 20",
        ),
        (
            Timesteps("leading"),
            Discrete.linear(),
            (0.0, 1.0),
            20,
            r"starts at entry 950, t = 0\.049.*give interval=\(0\.049.*'trailing'",
        ),
        (Timesteps("leading", 60), Discrete.linear(), (0.0, 1.0), 20, r"asks for entries 1010 … 60; expected 0 … 999"),
        (
            Timesteps("linspace"),
            Discrete.linear(20, clean=False),
            (0.0, 1.0),
            5,
            r"the last at entry 0, t = 1, and the interval ends at t = 1",
        ),
    ],
)
def test_where_entries_make_no_grid(
    spacing: Timesteps, path: Path, interval: tuple[float, float], steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spacing.times(path, *interval, steps)


def test_the_peers_failures_are_no_failures_here() -> None:
    """The squared cosine table of 1000 entries with Karras sigmas and ten steps; a beta grid of 40 and more."""
    s, n = 0.008, 1000
    f = [math.cos((k / n + s) / (1 + s) * math.pi / 2) ** 2 for k in range(n + 1)]
    cosine = Discrete.from_betas([min(1 - f[k + 1] / f[k], 0.999) for k in range(n)])
    for path in (cosine, Cosine()):
        for steps in (10, 40, 60, 200):
            for spacing in (Karras(), Beta(), Polyexponential(rho=3.0)):
                flow = Flow(lambda x, t: x, path, "v")
                assert plan(solvers.Euler(), flow, (0.0, 1.0), spacing, steps).nfe == steps


# --- nodes in other coordinates -------------------------------------------------------------------------------------


@every_path
def test_nodes_in_any_coordinate_are_the_same_times(name: str) -> None:
    path = PATHS[name]
    times = [0.1, 0.35, 0.62, 0.875]
    lam = [path.log_snr(t) for t in times]
    for at in (
        At(t=times),
        At(log_snr=lam),
        At(sigma=[math.exp(-v) for v in lam]),
        At(timesteps=torch.tensor([path.native_time(t) for t in times], dtype=torch.float64)),
    ):
        assert at.on(path) == pytest.approx(times, abs=1e-9)
        assert at.span(path) == (at.on(path)[0], at.on(path)[-1])
    assert At(log_snr=lam[::-1]).on(path) == pytest.approx(times[::-1], abs=1e-9)


@every_path
def test_the_ends_of_a_path_have_values_in_every_coordinate(name: str) -> None:
    path = PATHS[name]
    first, last = path.at(0.0), path.at(1.0)
    high = math.inf if first.alpha == 0 else first.sigma / first.alpha
    low = last.sigma / last.alpha
    middle = math.sqrt(min(high, 100.0) * max(low, 0.01))
    assert At(sigma=[high, middle, low]).on(path)[::2] == [0.0, 1.0]
    assert At(sigma=torch.tensor([high, middle, low], dtype=torch.float32)).on(path)[::2] == [0.0, 1.0]
    assert At(log_snr=[-math.inf if math.isinf(high) else -math.log(high), -math.log(low) if low else math.inf]).on(
        path
    ) == [0.0, 1.0]
    clean = isinstance(path, Discrete) and path.clean
    assert At(timesteps=[path.native_time(0.0), -1.0 if clean else path.native_time(1.0)]).on(path) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda: At(), None, r"At\(\) was given nothing; expected one of t, log_snr, sigma, timesteps"),
        (lambda: At(t=[0, 1], sigma=[1, 0]), None, r"At\(\) was given t, sigma; expected one"),
        (lambda: At(sigma=[3.0]), None, r"At\(sigma=…\) has 1 values; expected at least 2"),
        (
            lambda: At(sigma=[3.0, 1.0, 1.0, 0.0]),
            None,
            r"values 1 and 2 are 1\.0 and 1\.0; expected strictly decreasing",
        ),
        (
            lambda: At(log_snr=[0.0, math.nan, 1.0]),
            None,
            "values 0 and 1 are 0.0 and nan; expected strictly increasing",
        ),
        (
            lambda: At(sigma=[80.0, 1.0, 0.0]),
            EDM(),
            r"value 2 is 0\.0; expected σ/α between 80 and 0\.002.*final='denoise'",
        ),
        (lambda: At(sigma=[100.0, 1.0]), EDM(), r"value 0 is 100\.0; expected σ/α between 80 and 0\.002"),
        (lambda: At(sigma=[1.0, -1.0]), CondOT(), r"value 1 is -1\.0; expected σ/α between inf and 0"),
        (lambda: At(log_snr=[-9.0, 0.0]), EDM(), r"value 0 is -9\.0; expected λ between -4\.38"),
        (
            lambda: At(timesteps=[1000, 0]),
            Discrete.linear(),
            r"value 0 is 1000\.0; expected native times of .* from 999 to 0, and -1",
        ),
        (
            lambda: At(timesteps=[100.0, 1.0]),
            EDM(),
            r"value 0 is 100\.0; expected native times of .* from 80 to 0\.002",
        ),
        (lambda: At(t=[0.0, 1.5]), VP(), r"value 1 is 1\.5; expected flow times in \[0, 1\]"),
    ],
)
def test_nodes_that_no_path_passes_are_errors_in_words(make: Any, path: Path | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().on(path)


def test_nodes_say_where_a_solve_starts_and_ends() -> None:
    flow = GaussianMixture([[-1.0], [1.0]], std=0.3).flow(EDM())
    noise = torch.linspace(-80.0, 80.0, 5)[:, None]
    sigmas = [80.0, 20.0, 3.0, 0.5, 0.05]
    got = sample(flow, start=noise, solver=solvers.Euler(), grid=At(sigma=sigmas))
    times = [EDM().time(-math.log(s)) for s in sigmas]
    expected = sample(flow, start=noise, solver=solvers.Euler(), grid=times, interval=(0.0, times[-1]))
    assert torch.equal(got.x, expected.x)
    assert got.t.tolist() == [times[-1]] * 5
    assert got.nfe.tolist() == [4] * 5
    assert sample(flow, start=noise, solver=solvers.Heun(), grid=At(sigma=sigmas), nfe=8).nfe.tolist() == [8] * 5
    with pytest.raises(ValueError, match=r"run from 0\.0 to 0\.8.*the interval from 0\.0 to 1\.0; give interval="):
        sample(flow, start=noise, solver=solvers.Euler(), grid=At(sigma=sigmas), interval=(0.0, 1.0))
    near = (0.0, times[-1] + 1e-12)  # the same to rounding
    assert (
        sample(flow, start=noise, solver=solvers.Euler(), grid=At(sigma=sigmas), interval=near).t.tolist()
        == [near[1]] * 5
    )


def test_a_leading_grid_wants_to_be_told_its_state() -> None:
    flow = GaussianMixture([[-1.0], [1.0]], std=0.3).flow(Discrete.linear())
    with pytest.raises(ValueError, match=r"the interval of grid='leading' starts at t = 0\.049.*give start= a state"):
        sample(flow, (2, 1), solver=solvers.DDIM(), nfe=20, grid="leading")
    sol = sample(flow, start=torch.ones(2, 1), solver=solvers.DDIM(), nfe=20, grid="leading")
    assert sol.nfe.tolist() == [20, 20]
    assert sol.t.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
def test_ddim_on_a_table_is_diffusers_ddim(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    path = Discrete.linear()
    flow = GaussianMixture([[-1.0], [1.0]], std=0.3).flow(path)
    start = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)[:, None]
    sol = sample(flow, start=start, solver=solvers.DDIM(), nfe=25, grid=kind)
    scheduler = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing=kind)  # its steps end at the next entry
    scheduler.set_timesteps(25)
    visited = [int(k) for k in scheduler.timesteps]
    assert visited == Timesteps(kind).entries(path, 25)
    bars, x = scheduler.alphas_cumprod.double().tolist(), start
    for k, after in zip(visited, [*visited[1:], None], strict=True):
        noise = flow.noise(x, path.time_from_native(float(k)))
        bar, bar_next = bars[k], 1.0 if after is None else bars[after]
        clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        x = math.sqrt(bar_next) * clean + math.sqrt(1 - bar_next) * noise
    torch.testing.assert_close(sol.x, x, rtol=1e-4, atol=1e-5)  # its table is float32


# --- explicit times and validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "needs at least 2 times"),
        ([0.5], r"needs at least 2 times, got \[0\.5\]"),
        ([0.0, 0.6, 0.4, 1.0], r"times 1 and 2 are 0\.6 and 0\.4; expected strictly increasing times"),
        ([1.0, 0.4, 0.6, 0.0], r"times 1 and 2 are 0\.4 and 0\.6; expected strictly decreasing times"),
        ([0.0, 0.5, 0.5, 1.0], r"times 1 and 2 are 0\.5 and 0\.5; expected strictly increasing"),
        ([0.5, 0.5], "expected strictly"),
        ([0.0, 0.5, 0.0], "expected strictly"),
        ([-0.1, 1.0], r"grid time 0 is -0\.1; expected flow times in \[0, 1\]"),
        ([999.0, 500.0, 0.0], r"grid time 0 is 999\.0; expected flow times in \[0, 1\], noise at 0 and data at 1"),
        ([0.0, math.nan, 1.0], "grid time 1 is nan"),
        ([0.0, math.inf], "grid time 1 is inf"),
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_explicit_times_that_are_no_grid_are_refused(times: list[float], message: str, tensor: bool) -> None:
    given_times: Any = torch.tensor(times, dtype=torch.float64) if tensor else times
    listed = resolve(given_times)
    assert isinstance(listed, list)
    with pytest.raises(ValueError, match=message):
        Grid(tuple(listed), (1,) * max(len(listed) - 1, 0))


def test_explicit_times_are_kept_to_the_bit() -> None:
    times = [0.0, 0.1, 1.0 / 3.0, 1.0]
    assert resolve(times) == times
    assert resolve(tuple(times)) == times
    assert resolve(torch.tensor(times, dtype=torch.float64)) == times
    steps = plan(solvers.Euler(), Flow(lambda x, t: x, CondOT()), (0.0, 1.0), grid=times)
    assert list(steps.times) == times
    assert steps.nfe == 3


def test_a_grid_counts_its_evaluations() -> None:
    steps = Grid((0.0, 0.5, 1.0), (1, 4))
    assert (steps.steps, steps.nfe) == (2, 5)
    assert steps.intervals == [(0.0, 0.5, 1), (0.5, 1.0, 4)]
    with pytest.raises(ValueError, match="2 steps but 3 evaluation counts"):
        Grid((0.0, 0.5, 1.0), (1, 1, 1))


def test_spacings_are_known_by_name_and_are_themselves() -> None:
    assert [resolve(n) for n in grids.SPACINGS] == [
        Uniform(), LogSNR(), Karras(rho=7.0), Quadratic(), Polyexponential(rho=1.0), Beta(0.6, 0.6),
        grids.Logistic(), grids.Arctan(), Timesteps("leading"), Timesteps("trailing"), Timesteps("linspace"),
    ]  # fmt: skip
    assert resolve(Karras(rho=3.0)) == Karras(rho=3.0)
    assert resolve(At(t=[0.0, 1.0])) == At(t=[0.0, 1.0])
    assert resolve(Grid((0.0, 0.5, 1.0), (1, 1))) == [0.0, 0.5, 1.0]
    with pytest.raises(TypeError, match=r"grid is the class Karras; pass an instance, Karras\(…\)"):
        resolve(Karras)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["linear", "", "Uniform"])
def test_an_unknown_grid_is_an_error_that_lists_the_names(wrong: str) -> None:
    match = "not known; expected one of uniform, log_snr, karras, quadratic, .*, linspace, a spacing, or explicit"
    with pytest.raises(ValueError, match=match):
        resolve(wrong)


@pytest.mark.parametrize("wrong", [3, None, 0.5])
def test_something_else_as_a_grid_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"grid is a .*; expected a name, a spacing or a sequence of times"):
        resolve(wrong)


def test_a_grid_may_be_handed_back_as_explicit_times() -> None:
    steps = Grid((0.0, 0.5, 1.0), (1, 1))
    assert resolve(steps.times) == [0.0, 0.5, 1.0]


# --- spacings that are dense in the middle ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kappa", [0.3, 1.0, 4.0])
def test_logistic_has_equal_steps_of_its_clock(name: str, kappa: float) -> None:
    path = PATHS[name]
    end = path.window[1]
    times = grids.Logistic(kappa=kappa).times(path, 0.0, end, 13)
    clock = [path.alpha(t) / (kappa * path.alpha(t) + path.sigma(t)) for t in times]
    assert np.diff(clock) == pytest.approx(np.full(13, (clock[-1] - clock[0]) / 13), rel=1e-6)


def test_logistic_on_the_straight_path_is_a_shifted_uniform_grid() -> None:
    path, shift = CondOT(), 3.0
    found = grids.Logistic(kappa=shift).times(path, 0.0, 1.0, 10)
    assert found == pytest.approx(grids.Shifted(grids.Uniform(), shift).times(path, 0.0, 1.0, 10), abs=1e-12)


@pytest.mark.parametrize("name", ["VP", "EDM", "Discrete"])
def test_arctan_has_equal_steps_of_it(name: str) -> None:
    path = PATHS[name]
    times = grids.Arctan(center=0.5, width=2.0).times(path, 0.0, path.window[1], 11)
    angle = [math.atan((path.log_snr(t) - 0.5) / 2.0) for t in times]
    assert np.diff(angle) == pytest.approx(np.full(11, (angle[-1] - angle[0]) / 11), rel=1e-7)


@pytest.mark.parametrize("spacing", [grids.Logistic, grids.Arctan])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 12])
def test_since_and_until_place_the_outermost_nodes(spacing: Any, steps: int) -> None:
    path = CondOT()
    times = spacing(since=-3.0, until=4.0).times(path, 0.0, 1.0, steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in pairwise(times))
    if steps >= 3:
        assert path.log_snr(times[1]) == pytest.approx(-3.0)
        assert path.log_snr(times[-2]) == pytest.approx(4.0)
    inside = spacing(since=-3.0, until=4.0).times(path, path.time(-1.0), path.time(2.0), steps)
    assert inside == spacing().times(path, path.time(-1.0), path.time(2.0), steps)
