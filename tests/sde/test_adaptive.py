"""Adaptive steps of SDEs: draws on the dyadic tree, errors under tolerances, and every sample for itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import kernels
from flowsolve.sde import SRK, BrownianPath, EulerHeun, EulerMaruyama, Midpoint, Milstein, Scheme, StochasticHeun
from flowsolve.sde.adaptive import Control, _Nodes, _Walk
from flowsolve.sde.problem import Problem

B = 100
Y0 = torch.full((B, 2), 0.7, dtype=torch.float64)
PATH = BrownianPath.of(0.0, 1.0, seed=11, samples=B)
P = 0.6


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    """Paths are many normals: the compiled kernels, whose bits are the same."""
    with kernels.use("fused"):
        yield


def drift(t: Tensor, y: Tensor) -> Tensor:
    return -(P**2) * y.sin() * y.cos() ** 3


def spread(t: Tensor, y: Tensor) -> Tensor:
    return P * y.cos() ** 2


def truth(w: Tensor, y0: Tensor = Y0) -> Tensor:
    return torch.atan(P * w + torch.tan(y0))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def walk(like: Tensor, path: BrownianPath, scheme: Scheme | None = None) -> _Walk:
    p = Problem(drift, spread, like, "diagonal", "ito")
    p.begin(path.t0, like, "ito")
    return _Walk(p, scheme or SRK(), path, like, Control(1e-3, 1e-3))


def test_going_down_the_tree_is_the_path() -> None:
    """(W, H) of nodes and of their halves against the sums of `BrownianPath`, to some roundings a level."""
    path, like = BrownianPath.of(1.0, 3.0, seed=2, samples=6), torch.zeros(6, 3, dtype=torch.float64)
    level, index = np.array([0, 1, 3, 7, 10, 30]), np.array([0, 1, 5, 77, 1000, 12345678])
    found = walk(like, path)._halved(_Nodes(level, index))
    for i in range(6):
        h = 2.0 / 2.0 ** level[i]
        a = 1.0 + h * index[i]
        for (lo, hi), (w, area) in zip(((a, a + h), (a, a + h / 2), (a + h / 2, a + h)), found, strict=True):
            v, k = path.drive(lo, hi, like)
            assert area is not None
            assert k is not None
            for one, other in ((w[i], v[i]), (area[i], k[i])):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(SRK(), "ito"), (Milstein(), "ito"), (Milstein(False), "stratonovich"), (StochasticHeun(), "stratonovich"),
     (Midpoint(), "ito"), (EulerHeun(), "stratonovich")],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("noise_type", ["diagonal", "scalar"])
def test_the_error_follows_the_tolerance(scheme: Scheme, kind: str, noise_type: str) -> None:
    f = drift if kind == "ito" else lambda t, y: 0.0 * y
    target = truth(PATH(0.0, 1.0, Y0 if noise_type == "diagonal" else Y0[:, :1]))
    errors, steps = [], []
    for tol in (1e-2, 1e-3):
        sol = fs.solve_sde(
            f, spread, Y0, 0.0, 1.0, rtol=0.0, atol=tol, steps=1, solver=scheme, noise_type=noise_type, sde_type=kind,
            noise=PATH,
        )  # fmt: skip
        errors.append(rms(sol.x - target))
        steps.append(float(sol.accepted.double().mean()))
    print(f"ADAPTIVE {scheme!r:32} {noise_type} {kind} errors {errors} steps {steps}")
    assert errors[1] < errors[0] / 2 < 1.5e-2
    assert errors[1] < 5e-3
    assert steps[1] > steps[0]


def test_steps_go_where_the_work_is() -> None:
    """A drift that is fast for a tenth of the time: fewer evaluations than equal steps need for the same error."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -200.0 * torch.exp(-(((t - 0.5) / 0.02) ** 2)) * (y - torch.cos(6 * t))

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * torch.ones_like(t)

    def at(**options: Any) -> fs.Solution:
        return fs.solve_sde(f, g, Y0[:20], 0.0, 1.0, noise_type="additive", noise=path, **options)

    path = BrownianPath.of(0.0, 1.0, seed=11, samples=20)
    reference = at(steps=4096).x
    sol = at(rtol=0.0, atol=1e-4, steps=1)
    error = rms(sol.x - reference)
    same = next(n for n in (256, 512, 1024, 2048, 4096) if rms(at(steps=n).x - reference) <= error)
    print(f"ADAPTIVE error {error:.1e} nfe {float(sol.nfe.double().mean()):.0f} equal steps {2 * same}")
    assert float(sol.nfe.double().mean()) < 2 * same
    assert error < 1e-3


def test_a_sample_is_the_same_in_any_batch() -> None:
    def at(index: list[int], **options: Any) -> fs.Solution:
        return fs.solve_sde(drift, spread, Y0[index], 0.0, 1.0, rtol=1e-3, atol=1e-3, samples=index, seed=4, **options)

    whole, part = at(list(range(8))), at([5, 2])
    torch.testing.assert_close(whole.x[[5, 2]], part.x, rtol=1e-13, atol=1e-13)
    for name in ("nfe", "accepted", "rejected", "status"):
        assert torch.equal(getattr(whole, name)[[5, 2]], getattr(part, name))
    assert len(set(at(list(range(30))).accepted.tolist())) > 1  # each has its own steps
    looked = at(list(range(8)), t_eval=[0.3, 0.5, 1.0])
    assert torch.equal(looked.x[-1], whole.x)


def grid(sample: int, tol: float, scheme: Scheme) -> list[float]:
    """The nodes that one sample's accepted half steps end at."""
    found = BrownianPath(0.0, 1.0, PATH.noise.select(torch.tensor([sample])))
    y = Y0[[sample]]
    w = walk(y, found, scheme)
    w.control = Control(tol, tol)
    with torch.no_grad():
        _, _, taken = w.search(y, ())
    nodes = [0.0]
    for node in taken:
        h = 2.0 ** -float(node.level[0])
        nodes += [float(node.index[0]) * h + h / 2, float(node.index[0] + 1) * h]
    return nodes


@pytest.mark.parametrize("mode", ["direct", "checkpoint"])
def test_states_and_gradients_are_those_of_the_grid_that_was_found(mode: str) -> None:
    """The same sample on the nodes of its accepted steps, given as a grid, with looks between them."""
    looks = [0.0, 0.1, 0.5, 0.77, 1.0]
    results = []
    for sample in (None, 3, 17):
        theta, index = torch.tensor(P, dtype=torch.float64, requires_grad=True), [3, 17] if sample is None else [sample]
        y0 = Y0[index].clone().requires_grad_()
        path = BrownianPath(0.0, 1.0, PATH.noise.select(torch.tensor(index)))
        options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
        if sample is not None:
            options = {"steps": grid(sample, 1e-3, SRK())}
        sol = fs.solve_sde(
            lambda t, y, a: -(a**2) * y.sin() * y.cos() ** 3, lambda t, y, a: a * y.cos() ** 2, y0, 0.0, 1.0,
            args=(theta,), noise=path, t_eval=looks, gradient=mode, solver=SRK(), **options,
        )  # fmt: skip
        sol.x.square().sum().backward()
        results.append((sol.x.detach(), theta.grad, y0.grad))
    both, one, other = results
    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(both[0], torch.cat((one[0], other[0]), 1), **close)
    torch.testing.assert_close(both[1], one[1] + other[1], **close)
    torch.testing.assert_close(both[2], torch.cat((one[2], other[2])), **close)


def test_evaluations_and_statuses() -> None:
    calls = 0

    def counted(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert t.shape == (1, 1)
        return drift(t, y)

    sol = fs.solve_sde(counted, spread, Y0[:1], 0.0, 1.0, rtol=1e-3, atol=1e-3, t_eval=[0.2, 1.0])
    assert int(sol.nfe[0]) == 6 * int(sol.accepted[0] + sol.rejected[0]) + 2  # 3 steps of 2 each, and a look
    assert calls in (int(sol.nfe[0]), int(sol.nfe[0]) + 1)  # one more asks whether a gradient is recorded
    short = fs.solve_sde(drift, spread, Y0[:3], 0.0, 1.0, rtol=1e-6, atol=1e-6, max_steps=9, throw=False)
    assert (short.status == fs.Status.MAX_STEPS).all()
    assert ((short.t > 0.0) & (short.t < 1.0)).all()
    y0 = torch.tensor([[1.0], [0.1]], dtype=torch.float64)
    blown = fs.solve_sde(
        lambda t, y: 3 * y**3, lambda t, y: 0.01, y0, 0.0, 1.0, rtol=1e-3, atol=1e-3, noise_type="additive", throw=False
    )
    assert blown.ok.tolist() == [False, True]
    assert 0.1 < float(blown.t[0]) < 0.25  # 1/y² = 1 − 6 t


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rtol": 1e-3, "solver": EulerMaruyama()}, ValueError, "strong order 1"),
        ({"rtol": 1e-3, "solver": fs.sde.ReversibleHeun()}, ValueError, "carries the state alone"),
        ({"rtol": 0.0}, ValueError, "both 0"),
        ({"rtol": -1.0}, ValueError, "rtol = -1.0"),
        ({"rtol": math.nan}, ValueError, "rtol = nan"),
        ({"atol": 1e-3, "steps": [0.0, 1.0]}, ValueError, "least number of steps"),
        ({"atol": 1e-3, "max_steps": 0}, ValueError, "max_steps = 0"),
        ({}, ValueError, "steps is missing"),
        ({"atol": 1e-3, "noise": BrownianPath.of(0.0, 2.0, seed=0, samples=B)}, ValueError, "and no more"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        fs.solve_sde(drift, spread, Y0, 0.0, 1.0, **options)


def test_a_flow_is_solved_on_a_grid() -> None:
    sde = fs.sde.FlowSDE(fs.problems.GaussianMixture([[0.0]], std=1.0).flow(fs.paths.CondOT()))
    with pytest.raises(TypeError, match="give steps="):
        fs.solve_sde(sde.f, sde.g, torch.zeros(1, 1), 0.1, 0.9, rtol=1e-3, noise_type="additive")
