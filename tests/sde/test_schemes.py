"""Strong and weak orders against closed forms on the same Brownian path, and the order conditions of the tableaus."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.sde import (
    SRK,
    BrownianPath,
    EulerHeun,
    EulerMaruyama,
    Midpoint,
    Milstein,
    ReversibleHeun,
    Scheme,
    StochasticHeun,
)
from flowsolve.sde.schemes import SRA1, SRI1, Tableau

B = 400
STEPS = [16, 32, 64, 128]
Y0 = torch.full((B, 2), 0.7, dtype=torch.float64)
PATH = BrownianPath.of(0.0, 1.0, seed=11, samples=B)


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    """Paths are many normals: the compiled kernels, whose bits are the same."""
    with kernels.use("fused"):
        yield


def slope(steps: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


A, S = 0.3, 0.5  # of geometric Brownian motion


def geometric(kind: str, w: Tensor) -> Tensor:
    return Y0 * torch.exp((A - S * S / 2 if kind == "ito" else A) + S * w)


def tangent(kind: str, w: Tensor) -> Tensor:
    """X = arctan(p W + tan X₀), the solution of dX = p cos² X ∘ dW: no linear noise (Kloeden & Platen 1992, 4.4)."""
    return torch.atan(P * w + torch.tan(Y0))


P = 0.6
PROBLEMS: dict[str, tuple[Any, Any, Callable[[str, Tensor], Tensor]]] = {
    "geometric": (lambda kind: lambda t, y: A * y, lambda t, y: S * y, geometric),
    "tangent": (
        lambda kind: lambda t, y: -(P**2) * y.sin() * y.cos() ** 3 if kind == "ito" else 0.0 * y,
        lambda t, y: P * y.cos() ** 2,
        tangent,
    ),
}
ORDERS: list[tuple[Scheme, float]] = [
    (EulerMaruyama(), 0.5), (Milstein(), 1.0), (Milstein(derivatives=False), 1.0), (EulerHeun(), 1.0),
    (StochasticHeun(), 1.0), (Midpoint(), 1.0), (SRK(), 1.5),
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("noise_type", ["diagonal", "scalar"])
@pytest.mark.parametrize("kind", ["ito", "stratonovich"])
@pytest.mark.parametrize(("scheme", "order"), ORDERS, ids=repr)
def test_strong_order(scheme: Scheme, order: float, kind: str, noise_type: str, problem: str) -> None:
    """Either calculus, by every scheme: one of the other calculus is given the corrected drift."""
    drift, g, solution = PROBLEMS[problem]
    w = PATH(0.0, 1.0, Y0 if noise_type == "diagonal" else Y0[:, :1])
    truth = solution(kind, w)
    errors = [
        rms(
            fs.solve_sde(
                drift(kind), g, Y0, 0.0, 1.0, steps=n, solver=scheme, noise_type=noise_type, sde_type=kind, noise=PATH
            ).x
            - truth
        )
        for n in STEPS
    ]
    print(f"STRONG {scheme!r:32} {problem} {noise_type} {kind} {slope(STEPS, errors):.3f} {errors[-1]:.1e}")
    assert abs(slope(STEPS, errors) - order) <= 0.2, errors


def additive_truth(w: Tensor) -> Tensor:
    """X = (X₀ + b (t + a W)) / √(1 + t) solves dX = (b/√(1 + t) − X/(2 (1 + t))) dt + a b/√(1 + t) dW."""
    return (Y0 + 0.8 * (1.0 + 0.7 * w)) / math.sqrt(2.0)


@pytest.mark.parametrize(
    ("scheme", "order"), [(EulerMaruyama(), 1.0), (Milstein(), 1.0), (StochasticHeun(), 2.0), (SRK(), 2.0)], ids=repr
)
@pytest.mark.parametrize("form", ["element", "matrix"])
def test_strong_order_with_additive_noise(scheme: Scheme, order: float, form: str) -> None:
    """No term keeps SRA1 at 1.5 where f″ = 0, or Heun's scheme at 1 where the solution depends on W(1) alone."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return 0.8 / (1 + t).sqrt() - y / (2 * (1 + t))

    def g(t: Tensor, y: Tensor) -> Tensor:
        scale = 0.7 * 0.8 / (1 + t).sqrt()
        return scale if form == "element" else scale * torch.eye(2, dtype=torch.float64).expand(1, 2, 2)

    truth = additive_truth(PATH(0.0, 1.0, Y0))
    errors = [
        rms(fs.solve_sde(f, g, Y0, 0.0, 1.0, steps=n, solver=scheme, noise_type="additive", noise=PATH).x - truth)
        for n in STEPS
    ]
    print(f"STRONG {scheme!r:32} additive {form} {slope(STEPS, errors):.3f} {errors[-1]:.1e}")
    assert abs(slope(STEPS, errors) - order) <= 0.2, errors


def test_ornstein_and_uhlenbeck_along_its_path() -> None:
    """X(1) = e^{−θ} X₀ + σ ∫ e^{−θ(1−s)} dW, the integral by parts of W and its integrals on 2¹⁰ intervals."""
    theta, sigma, n = 1.5, 0.8, 256
    nodes = [i / n for i in range(n + 1)]
    total = torch.zeros_like(Y0)
    for (w, area), s in zip(PATH.drives(nodes, Y0, area=True), nodes, strict=False):
        assert area is not None
        # e^{θ(s − 1)} is linear on the interval to (θh)²/8: ∫ (u + v (r − s)) dW = (u + v h/2) W − v h H.
        left, right = math.exp(theta * (s - 1)), math.exp(theta * (s + 1 / n - 1))
        total += 0.5 * (left + right) * w - (right - left) * area
    truth = math.exp(-theta) * Y0 + sigma * total
    errors = []
    for steps in STEPS[:3]:
        sol = fs.solve_sde(
            lambda t, y: -theta * y, lambda t, y: sigma, Y0, 0.0, 1.0, steps=steps, noise_type="additive", noise=PATH
        )
        errors.append(rms(sol.x - truth))
    assert (slope(STEPS[:3], errors)) == pytest.approx(2.0, abs=0.5)  # linear: the terms of order 1.5 vanish in part
    assert errors[-1] < 1e-4


def test_general_noise() -> None:
    """Two states turned by one motion and stretched by another: matrices that commute, so Heun's order is 1.

    dX = (R ∘ dW₁ + D ∘ dW₂) X with R = [[0, −1], [1, 0]] and D = ½ I has X = e^{W₂/2} rotation(W₁) X₀.
    """
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)

    def g(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y @ turn.T, 0.5 * y), -1)

    w1, w2 = PATH(0.0, 1.0, Y0).unbind(-1)
    c, s = w1.cos(), w1.sin()
    truth = (w2 / 2).exp()[:, None] * torch.stack((c * Y0[:, 0] - s * Y0[:, 1], s * Y0[:, 0] + c * Y0[:, 1]), -1)
    for scheme, order in ((EulerMaruyama(), 0.5), (StochasticHeun(), 1.0), (Midpoint(), 1.0), (EulerHeun(), 1.0)):
        errors = [
            rms(
                fs.solve_sde(
                    lambda t, y: 0 * y, g, Y0, 0.0, 1.0, steps=n, solver=scheme, noise_type="general",
                    sde_type="stratonovich", noise=PATH,
                ).x
                - truth
            )
            for n in STEPS
        ]  # fmt: skip
        print(f"STRONG {scheme!r:32} general {slope(STEPS, errors):.3f}")
        assert abs(slope(STEPS, errors) - order) <= 0.2, errors


@pytest.mark.parametrize("noise_type", ["diagonal", "additive"])
def test_strong_order_of_a_coupled_drift(noise_type: str) -> None:
    """A drift through which elements act on each other, to the limit to which Milstein's scheme goes as well."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((-y[:, 0] + y[:, 0] * y[:, 1], y[:, 0].sin() - 0.5 * y[:, 1]), 1) * (1 + 0.5 * t)

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.4 * (1 - 0.3 * t) * ((1 + y.square()).sqrt() if noise_type == "diagonal" else 2.0)

    def at(n: int, scheme: Scheme) -> Tensor:
        return fs.solve_sde(f, g, Y0, 0.0, 1.0, steps=n, solver=scheme, noise_type=noise_type, noise=PATH).x

    truth, steps = at(512, SRK()), [8, 16, 32, 64]
    others = [(Milstein(), 1.0), (StochasticHeun(), 1.0)] if noise_type == "additive" else [(Milstein(), 1.0)]
    for scheme, order in [(SRK(), 1.5), *others]:
        errors = [rms(at(n, scheme) - truth) for n in steps]
        print(f"STRONG {scheme!r:32} coupled {noise_type} {slope(steps, errors):.3f} {errors[-1]:.1e}")
        assert abs(slope(steps, errors) - order) <= 0.2, errors


def test_reversible_heun_converges() -> None:
    """Order 1 with additive noise, ½ at least with other noise (Kidger et al. 2021)."""
    for problem, kind in (("geometric", "stratonovich"), ("tangent", "stratonovich")):
        drift, g, solution = PROBLEMS[problem]
        truth = solution(kind, PATH(0.0, 1.0, Y0))
        errors = [
            rms(
                fs.solve_sde(
                    drift(kind), g, Y0, 0.0, 1.0, steps=n, solver=ReversibleHeun(), sde_type=kind, noise=PATH
                ).x
                - truth
            )
            for n in STEPS
        ]
        assert slope(STEPS, errors) > 0.45, errors


# --- weak orders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "order"), [(EulerMaruyama(), 1.0), (Milstein(), 1.0), (StochasticHeun(), 2.0), (SRK(), 2.0)], ids=repr
)
def test_weak_order_of_additive_noise(scheme: Scheme, order: float) -> None:
    """Ornstein and Uhlenbeck's process is Gaussian, a step x' = a x + b W + c H: variances exactly, unsampled."""
    theta, sigma = 1.5, 0.8

    def coefficients(n: int) -> tuple[float, float]:
        """a, and the variance that a step adds, read off the scheme's own step."""
        from flowsolve.sde.problem import Problem

        y, h = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64), 1 / n
        p = Problem(lambda t, y: -theta * y, lambda t, y: sigma, y, "additive", "ito")
        p.begin(0.0, y, scheme.kind)
        w = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        (x, *_) = scheme.step(p, scheme.begin(p, 0.0, y), 0.0, h, (w, w.roll(1, 0)))
        a, b, c = x[:, 0].tolist()
        return a, b * b * h + c * c * h / 12

    def variance(n: int) -> float:
        a, added = coefficients(n)
        total = 0.3
        for _ in range(n):
            total = a * a * total + added
        return total

    truth = math.exp(-2 * theta) * 0.3 + sigma**2 * (1 - math.exp(-2 * theta)) / (2 * theta)
    errors = [abs(variance(n) - truth) for n in (32, 64, 128)]
    print(f"WEAK {scheme!r:32} OU {slope([32, 64, 128], errors):.3f}")
    assert abs(slope([32, 64, 128], errors) - order) <= 0.2, errors


@pytest.mark.parametrize("scheme", [EulerMaruyama(), Milstein(), Milstein(derivatives=False), SRK()], ids=repr)
def test_moments_of_geometric_brownian_motion(scheme: Scheme) -> None:
    """E X = e^a and E X² = e^{2a + s²}, to five standard errors (of 40,000 numbers) and the exact bias of the steps.

    All these schemes' means are those of their drifts: (1 + ah)ⁿ, and for SRK (1 + ah + (ah)²/2)ⁿ.
    """
    n, count = 16, 20_000
    y0 = torch.ones(count, 2, dtype=torch.float64)
    x = fs.solve_sde(lambda t, y: A * y, lambda t, y: S * y, y0, 0.0, 1.0, steps=n, solver=scheme, seed=5).x
    h = 1 / n
    growth = 1 + A * h + (0.5 * (A * h) ** 2 if isinstance(scheme, SRK) else 0.0)
    mean, second = growth**n, math.exp(2 * A + S * S)
    error = math.sqrt((second - math.exp(2 * A)) / x.numel())
    print(f"MEAN {scheme!r:32} z {(float(x.mean()) - mean) / error:.2f}")
    assert abs(float(x.mean()) - mean) < 5 * error


# --- order conditions ------------------------------------------------------------------------------------------------


def matrices(t: Tableau) -> list[np.ndarray]:
    n = len(t.alpha)
    out = []
    for rows in (t.a0, t.b0, t.a1, t.b1):
        m = np.zeros((n, n))
        for i, row in enumerate(rows):
            m[i, : len(row)] = row
        out.append(m)
    return out


def test_order_conditions_of_the_diagonal_tableau() -> None:
    """Those of `flowsolve.sde.schemes`, and the nodes as the matrices' row sums."""
    t = SRI1
    a0, b0, a1, b1 = matrices(t)
    beta, e, alpha = np.array(t.beta), np.ones(4), np.array(t.alpha)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-14}
    np.testing.assert_allclose(a0 @ e, t.c0, **close)
    np.testing.assert_allclose(a1 @ e, t.c1, **close)
    np.testing.assert_allclose(beta @ e, [1, 0, 0, 0], **close)
    np.testing.assert_allclose(beta @ b1 @ e, [0, 1, 0, 0], **close)
    np.testing.assert_allclose(beta @ a1 @ e, [1, 0, -1, 0], **close)
    np.testing.assert_allclose(beta @ (b1 @ e) ** 2, [1, 0, -1, 2], **close)
    np.testing.assert_allclose(beta @ b1 @ b1 @ e, [0, 0, 0, 1], **close)
    np.testing.assert_allclose([alpha @ e, alpha @ a0 @ e, alpha @ b0 @ e, alpha @ (b0 @ e) ** 2], [1, 0.5, 1, 1.5])
    np.testing.assert_allclose(beta[0] @ a1 @ b0 @ e / 2 + beta[2] @ a1 @ b0 @ e / 3, 0, **close)


def test_order_conditions_of_the_additive_tableau() -> None:
    t = SRA1
    a0, b0, _, _ = matrices(t)
    beta, e, alpha, c1 = np.array(t.beta), np.ones(2), np.array(t.alpha), np.array(t.c1)
    np.testing.assert_allclose(a0 @ e, t.c0)
    np.testing.assert_allclose([alpha @ e, alpha @ a0 @ e, alpha @ b0 @ e, alpha @ (b0 @ e) ** 2], [1, 0.5, 1, 1.5])
    np.testing.assert_allclose([beta[0] @ e, beta[2] @ e, beta[0] @ c1, beta[2] @ c1], [1, 0, 1, -1])


def test_one_step_meets_the_expansion_of_ito_and_taylor() -> None:
    """The step of SRK and Taylor's of strong order 1.5, by hand for f = sin y, g = cos y / 2: apart by O(h²)."""
    from flowsolve.sde.problem import Problem

    y = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)[:, None]
    w, k = torch.randn(2, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    gaps = []
    for h in (0.04, 0.02, 0.01):
        i1, i10 = w * h**0.5, h * (0.5 * w * h**0.5 + k * (h / 12) ** 0.5)
        f, f1, f2 = y.sin(), y.cos(), -y.sin()
        g, g1, g2 = y.cos() / 2, -y.sin() / 2, -y.cos() / 2
        i01 = i1 * h - i10
        taylor = (
            y + f * h + g * i1 + g * g1 * (i1**2 - h) / 2 + f1 * g * i10 + (f * g1 + g2 * g * g / 2) * i01
            + (f * f1 + f2 * g * g / 2) * h * h / 2 + g * (g * g2 + g1 * g1) * (i1**3 - 3 * h * i1) / 6
        )  # fmt: skip
        p = Problem(lambda t, y: y.sin(), lambda t, y: y.cos() / 2, y, "diagonal", "ito")
        p.begin(0.0, y, "ito")
        (x,) = SRK().step(p, (y,), 0.0, h, (i1, i10 / h - 0.5 * i1))
        gaps.append(rms(x - taylor))
    assert slope([1, 2, 4], gaps) == pytest.approx(2.0, abs=0.2)
