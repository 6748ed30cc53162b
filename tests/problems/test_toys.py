"""The toys: supports, densities and moments against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from flowsolve.problems import checkerboard, eight_gaussians, moons


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.7])
def test_checkerboard_density(scale: float) -> None:
    board = checkerboard(scale)
    x = board.sample(20_000, seed=3, dtype=torch.float64)
    torch.testing.assert_close(board.log_prob(x), torch.full((len(x),), -board.entropy, dtype=torch.float64))
    cells = (x / scale).floor().long() + 2
    counts = torch.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert int((counts > 0).sum()) == 8
    assert float((counts[counts > 0] - 2500).abs().max()) < 5.0 * math.sqrt(2500 * 7 / 8)
    centres = scale * (torch.arange(-40, 40, dtype=torch.float64) + 0.5) / 16.0
    grid = torch.cartesian_prod(centres, centres)
    integral = float(board.log_prob(grid).exp().sum()) * (scale / 16.0) ** 2
    assert integral == pytest.approx(1.0, abs=1e-12)


def test_checkerboard_floor_is_log_32() -> None:
    assert checkerboard().entropy == pytest.approx(math.log(32.0))
    assert checkerboard().entropy == pytest.approx(3.466, abs=5e-4)
    assert float(checkerboard().sample(1000).abs().max()) <= 4.0


def test_moons_moments() -> None:
    noise = 0.1
    problem = moons(noise)
    x = problem.sample(100_000, seed=2, dtype=torch.float64)
    error = x.std(0) / math.sqrt(len(x))
    assert float(((x.mean(0) - torch.tensor(problem.mean)).abs() / error).max()) < 5.0
    clean = moons(0.0).sample(1000, dtype=torch.float64)
    upper = (clean.square().sum(1) - 1.0).abs()
    lower = ((clean - torch.tensor([1.0, 0.5])).square().sum(1) - 1.0).abs()
    assert float(torch.minimum(upper, lower).max()) < 1e-12


def test_eight_gaussians() -> None:
    problem = eight_gaussians(radius=4.0, std=0.3)
    torch.testing.assert_close(problem.mean, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(problem.cov, (8.0 + 0.09) * torch.eye(2), atol=1e-4, rtol=0)
    assert problem.sample(5).dtype == torch.float32


@pytest.mark.parametrize("problem", [checkerboard(), moons(), eight_gaussians()], ids=repr)
def test_samples_are_a_function_of_n_and_seed(problem: object) -> None:
    draw = problem.sample  # type: ignore[attr-defined]
    assert draw(7, 1).shape == (7, 2)
    assert torch.equal(draw(7, 1), draw(7, 1))
    assert not torch.equal(draw(7, 1), draw(7, 2))


def test_boundary_errors() -> None:
    with pytest.raises(ValueError, match="scale"):
        checkerboard(0.0)
    with pytest.raises(ValueError, match="noise"):
        moons(-1.0)
