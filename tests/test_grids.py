"""Grids: strictly monotone, exact at their ends, and where the literature puts them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsolve import Flow, solvers
from flowsolve.grids import WINDOW, Grid, Karras, LogSNR, Spacing, Uniform, resolve
from flowsolve.paths import EDM, VE, VP, CondOT, Discrete, Path, SubVP
from flowsolve.planning import plan
from tests.cases import PATHS

SPACINGS: dict[str, Spacing] = {
    "uniform": Uniform(), "log_snr": LogSNR(), "karras": Karras(), "karras-3": Karras(rho=3.0),
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
    assert [resolve(n) for n in ("uniform", "log_snr", "karras")] == [Uniform(), LogSNR(), Karras(rho=7.0)]
    assert resolve(Karras(rho=3.0)) == Karras(rho=3.0)


@pytest.mark.parametrize("wrong", ["linear", "", "Uniform"])
def test_an_unknown_grid_is_an_error_that_lists_the_names(wrong: str) -> None:
    with pytest.raises(ValueError, match="not known; expected one of uniform, log_snr, karras, a spacing, or explicit"):
        resolve(wrong)


@pytest.mark.parametrize("wrong", [3, None, 0.5])
def test_something_else_as_a_grid_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"grid is a .*; expected a name, a spacing or a sequence of times"):
        resolve(wrong)


def test_a_grid_may_be_handed_back_as_explicit_times() -> None:
    steps = Grid((0.0, 0.5, 1.0), (1, 1))
    assert resolve(steps.times) == [0.0, 0.5, 1.0]
