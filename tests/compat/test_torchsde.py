"""`flowsolve.compat.torchsde` beside torchsde, on the same increments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.compat.torchsde import (
    BrownianInterval,
    SDEIto,
    SDEStratonovich,
    brownian_interval_like,
    sdeint,
    sdeint_adjoint,
)

torchsde = pytest.importorskip("torchsde")

Y0 = torch.linspace(0.2, 1.2, 12, dtype=torch.float64).reshape(4, 3)
TS = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
CHANNELS = {"diagonal": 3, "scalar": 1, "additive": 2, "general": 2}
EPS = 2.0**-52


class Model(nn.Module):
    """An SDE with a parameter, of any kind of noise."""

    def __init__(self, noise_type: str, sde_type: str) -> None:
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y.sin() * (1 + t)

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return -y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        if self.noise_type == "diagonal":
            return (0.4 + 0.1 * y.cos() * self.rate) * (1 + t)
        if self.noise_type == "scalar":
            return (0.4 * y.cos() * (1 + t)).unsqueeze(-1)
        if self.noise_type == "additive":
            return (1 + t) * 0.3 * torch.ones(*y.shape, 2, dtype=y.dtype)
        return torch.stack((y * (1 + t), 0.3 * y.cos()), -1)


def motion(noise_type: str, area: str = "space-time") -> BrownianInterval:
    size = (4, CHANNELS[noise_type])
    return BrownianInterval(0.0, 1.0, size=size, dtype=torch.float64, entropy=5, levy_area_approximation=area)


def cases() -> list[Any]:
    found = []
    for kind, methods in (
        ("ito", ("euler", "milstein", "srk")),
        ("stratonovich", ("milstein", "euler_heun", "heun", "midpoint", "reversible_heun")),
    ):
        for noise in CHANNELS:
            for method in methods:
                if noise == "general" and method in ("milstein", "srk"):
                    continue
                if method == "srk" and noise != "additive":
                    continue  # another tableau
                found.append((noise, kind, method))
    return found


@pytest.mark.parametrize(("noise_type", "sde_type", "method"), cases())
def test_the_same_increments_give_the_same_states(noise_type: str, sde_type: str, method: str) -> None:
    """To rounding: 32 steps of some 20 operations."""
    sde, bm = Model(noise_type, sde_type), motion(noise_type)
    with torch.no_grad():
        theirs = torchsde.sdeint(sde, Y0, TS, bm=bm, method=method, dt=1 / 32)
        ours = sdeint(sde, Y0, TS, bm=bm, method=method, dt=1 / 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=32 * 20 * 4 * EPS)


@pytest.mark.parametrize("method", ["euler", "srk", "heun"])
def test_torchsdes_own_motion_serves(method: str) -> None:
    sde = Model("additive", "stratonovich" if method == "heun" else "ito")
    bm = torchsde.BrownianInterval(
        0.0, 1.0, size=(4, 2), dtype=torch.float64, entropy=3, levy_area_approximation="space-time"
    )
    with torch.no_grad():
        theirs = torchsde.sdeint(sde, Y0, TS, bm=bm, method=method, dt=1 / 16)
        torch.testing.assert_close(sdeint(sde, Y0, TS, bm=bm, method=method, dt=1 / 16), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar"])
def test_srk_is_as_good_as_theirs(noise_type: str) -> None:
    """Geometric Brownian motion on one path: both of order 1.5, with errors within a factor of 2."""

    class Geometric(SDEIto):
        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.3 * y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.5 * (y if noise_type == "diagonal" else y.unsqueeze(-1))

    y0 = torch.ones(200, 2, dtype=torch.float64)
    channels = 2 if noise_type == "diagonal" else 1
    bm = BrownianInterval(size=(200, channels), dtype=torch.float64, entropy=0, levy_area_approximation="space-time")
    truth = torch.exp((0.3 - 0.125) + 0.5 * bm(0.0, 1.0)) * y0
    errors = {}
    for solve in (sdeint, torchsde.sdeint):
        errors[solve.__module__] = [
            float((solve(Geometric(noise_type), y0, [0.0, 1.0], bm=bm, method="srk", dt=1 / n)[-1] - truth).norm())
            for n in (16, 64)
        ]
    ours, theirs = errors[sdeint.__module__], errors[torchsde.sdeint.__module__]
    print(noise_type, ours, theirs)
    assert math.log(ours[0] / ours[1]) / math.log(4) == pytest.approx(1.5, abs=0.25)
    assert ours[1] < 2 * theirs[1]


def test_milstein_for_scalar_noise_is_not_their_transpose() -> None:
    """dX = A X ∘ dW has X = exp(A W) X₀. Theirs takes (∂g/∂y)ᵀ g, and does not converge to it at order 1."""
    a = torch.tensor([[0.0, 1.0], [0.3, 0.2]], dtype=torch.float64)

    class Linear(SDEStratonovich):
        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.0 * y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return (y @ a.T).unsqueeze(-1)

    y0 = torch.ones(200, 2, dtype=torch.float64)
    bm = BrownianInterval(size=(200, 1), dtype=torch.float64, entropy=1)
    truth = (torch.linalg.matrix_exp(bm(0.0, 1.0)[:, :, None] * a) @ y0[:, :, None]).squeeze(-1)
    for solve, order in ((sdeint, 1.0), (torchsde.sdeint, None)):
        errors = []
        for n in (16, 128):
            x = solve(Linear("scalar"), y0, [0.0, 1.0], bm=bm, method="milstein", dt=1 / n)[-1].detach()
            errors.append(float((x - truth).norm()))
        slope = math.log(errors[0] / errors[1]) / math.log(8)
        print(f"MILSTEIN {solve.__module__} {slope:.2f} {errors[-1]:.1e}")
        assert slope == pytest.approx(order, abs=0.2) if order else slope < 0.5


def test_differences_in_place_of_derivatives() -> None:
    """The same for Itô's equation; for Stratonovich's, a central difference has order 1, theirs ½ (arctan problem)."""
    sde, bm = Model("diagonal", "ito"), motion("diagonal")
    given: dict[str, Any] = {"bm": bm, "method": "milstein", "dt": 1 / 32, "options": {"grad_free": True}}
    with torch.no_grad():
        torch.testing.assert_close(
            sdeint(sde, Y0, TS, **given), torchsde.sdeint(sde, Y0, TS, **given), rtol=0, atol=1e-12
        )

    class Tangent(SDEStratonovich):
        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.0 * y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.6 * y.cos() ** 2

    y0 = torch.full((200, 2), 0.7, dtype=torch.float64)
    bm = BrownianInterval(size=(200, 2), dtype=torch.float64, entropy=1)
    truth = torch.atan(0.6 * bm(0.0, 1.0) + y0.tan())
    for solve, order in ((sdeint, 1.0), (torchsde.sdeint, 0.5)):
        errors = []
        for n in (16, 128):
            given = {"bm": bm, "method": "milstein", "dt": 1 / n, "options": {"grad_free": True}}
            errors.append(float((solve(Tangent("diagonal"), y0, [0.0, 1.0], **given)[-1].detach() - truth).norm()))
        slope = math.log(errors[0] / errors[1]) / math.log(8)
        print(f"GRAD_FREE {solve.__module__} {slope:.2f} {errors[-1]:.1e}")
        assert slope == pytest.approx(order, abs=0.2)


def test_times_between_steps() -> None:
    sde, bm = Model("diagonal", "ito"), motion("diagonal")
    fine = sdeint(sde, Y0, [0.0, 0.3, 0.77, 1.0], bm=bm, dt=1 / 512)
    coarse = sdeint(sde, Y0, [0.0, 0.3, 0.77, 1.0], bm=bm, dt=1 / 16)
    torch.testing.assert_close(coarse, fine, rtol=0, atol=2e-3)
    torch.testing.assert_close(coarse[-1], sdeint(sde, Y0, [0.0, 1.0], bm=bm, dt=1 / 16)[-1])
    uneven = sdeint(sde, Y0, [0.0, 1.0], bm=bm, dt=0.3)  # the last step is shorter
    assert uneven.shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("method", "sde_type"), [("reversible_heun", "stratonovich"), ("midpoint", "stratonovich"), ("srk", "ito")]
)
def test_adjoint_gradients_are_those_of_the_steps(method: str, sde_type: str) -> None:
    found = []
    for solve in (sdeint, sdeint_adjoint, torchsde.sdeint):
        if (method, solve) == ("srk", torchsde.sdeint):
            continue
        sde, y0 = Model("diagonal", sde_type), Y0.clone().requires_grad_()
        solve(sde, y0, TS, bm=motion("diagonal"), method=method, dt=1 / 16).square().sum().backward()
        found.append((sde.rate.grad, y0.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise_type", ["diagonal", "general"])
def test_the_log_ratio_is_theirs(noise_type: str) -> None:
    kind, method = ("ito", "euler") if noise_type == "diagonal" else ("stratonovich", "midpoint")
    sde = Model(noise_type, kind)
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(4, 4 if noise_type == "diagonal" else 2), dtype=torch.float64,
                                   entropy=3)  # fmt: skip
    given = (lambda ta, tb: bm(ta, tb)[:, :3]) if noise_type == "diagonal" else bm  # the last moves nothing
    with torch.no_grad():
        theirs = torchsde.sdeint(sde, Y0, TS, bm=bm, method=method, dt=1 / 16, logqp=True)
        ours = sdeint(sde, Y0, TS, bm=given, method=method, dt=1 / 16, logqp=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_adaptive_steps() -> None:
    """Along one path: closer to the limit of many steps than the tolerance by little, and gradients in both ways."""
    fine = sdeint(Model("diagonal", "ito"), Y0, TS, bm=motion("diagonal"), method="srk", dt=1 / 512).detach()
    found = []
    for solve in (sdeint, sdeint_adjoint):
        sde = Model("diagonal", "ito")
        x = solve(sde, Y0, TS, bm=motion("diagonal"), method="srk", adaptive=True, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.detach(), fine, rtol=0, atol=2e-3)
        x.sum().backward()
        found.append(sde.rate.grad)
    torch.testing.assert_close(*found)
    assert sdeint(Model("general", "stratonovich"), Y0, TS, dt=0.1).shape == fine.shape


def test_the_interval() -> None:
    bm = motion("diagonal")
    w, u = bm(0.25, 0.75, return_U=True)
    torch.testing.assert_close(bm(0.25, 0.5) + bm(0.5, 0.75), w, rtol=0, atol=1e-14)
    left, mid = bm(0.25, 0.5, return_U=True)[1], bm(0.5, 0.75, return_U=True)[1]
    torch.testing.assert_close(left + mid + 0.25 * bm(0.25, 0.5), u, rtol=0, atol=1e-14)
    torch.testing.assert_close(bm(0.5), bm(0.0, 0.5), rtol=0, atol=0)
    assert bm.shape == bm.size() == (4, 3)
    assert "entropy=5" in repr(bm)
    smaller = BrownianInterval(0.0, 1.0, size=(2, 3), dtype=torch.float64, entropy=5)
    assert torch.equal(smaller(0.0, 0.7), bm(0.0, 0.7)[:2])  # the same rows in any batch
    assert brownian_interval_like(Y0).dtype == torch.float64
    assert BrownianInterval(size=())(0.0, 1.0).shape == ()
    torch.manual_seed(0)
    first = sdeint(Model("diagonal", "ito"), Y0, TS, dt=0.25)
    torch.manual_seed(0)
    assert torch.equal(sdeint(Model("diagonal", "ito"), Y0, TS, dt=0.25), first)


def test_names_and_joint_functions() -> None:
    class Other:
        noise_type, sde_type = "diagonal", "ito"

        def drift(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def spread(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.1 * y

    class Joint:
        noise_type, sde_type = "diagonal", "ito"

        def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return -y, 0.1 * y

    class Products:
        noise_type, sde_type = "diagonal", "ito"

        def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return -y, 0.1 * y * v

    bm = motion("diagonal")
    a = sdeint(Other(), Y0, TS, bm=bm, dt=0.25, names={"drift": "drift", "diffusion": "spread"})
    assert torch.equal(a, sdeint(Joint(), Y0, TS, bm=bm, dt=0.25))
    assert torch.equal(a, sdeint(Products(), Y0, TS, bm=bm, dt=0.25))
    with pytest.raises(ValueError, match="give bm="):
        sdeint(Products(), Y0, TS, dt=0.25)


def test_products_with_general_noise() -> None:
    whole = Model("general", "stratonovich")

    class Products:
        noise_type, sde_type, f = "general", "stratonovich", whole.f

        def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
            return (whole.g(t, y) @ v.unsqueeze(-1)).squeeze(-1)

    bm = motion("general")
    torch.testing.assert_close(
        sdeint(Products(), Y0, TS, bm=bm, dt=0.1), sdeint(whole, Y0, TS, bm=bm, dt=0.1), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"adaptive": True}, ValueError, "strong order 1"),
        ({"adaptive": True, "bm": lambda a, b: torch.zeros(4, 3)}, NotImplementedError, "or bm=None"),
        ({"extra": True}, NotImplementedError, "extra= is not here"),
        ({"method": "log_ode"}, NotImplementedError, "log_ode"),
        ({"method": "rk4"}, ValueError, "expected one of euler, milstein"),
        ({"options": {"step": 1}}, TypeError, "holds 'step'"),
        ({"dt": 0.0}, ValueError, "positive step size"),
        ({"ts": [0.0, 0.0]}, ValueError, "strictly rising"),
        ({"y0": Y0[0]}, ValueError, r"\(batch, channels\)"),
        ({"bm": lambda a, b: torch.zeros(4, 2)}, ValueError, r"bm gave increments of shape \(4, 2\)"),
    ],
)
def test_what_is_not_here_says_so(options: dict[str, Any], error: Any, match: str) -> None:
    given = {"y0": Y0, "ts": TS, "dt": 0.25, "method": "euler", **options}
    with pytest.raises(error, match=match):
        sdeint(Model("diagonal", "ito"), **given)


def test_errors_of_other_kinds() -> None:
    with pytest.raises(NotImplementedError, match="return_A"):
        motion("diagonal")(0.0, 1.0, return_A=True)
    with pytest.raises(ValueError, match="none, space-time, davie, foster"):
        BrownianInterval(size=(1, 1), levy_area_approximation="pairs")
    with pytest.raises(ValueError, match="levy_area_approximation"):
        sdeint(Model("diagonal", "ito"), Y0, TS, bm=motion("diagonal", "none"), method="srk", dt=0.25)
    with pytest.raises(ValueError, match=r"flowsolve\.solve_sde"):
        sdeint(Model("diagonal", "ito"), Y0, TS, method="heun", dt=0.25)
    with pytest.raises(ValueError, match="the sde has no g"):
        sdeint(type("S", (), {"noise_type": "diagonal", "sde_type": "ito", "f": lambda s, t, y: y})(), Y0, TS)
    with pytest.raises(ValueError, match="no attribute noise_type"):
        sdeint(object(), Y0, TS)
    with pytest.warns(UserWarning, match="adjoint_method"):
        sdeint_adjoint(Model("diagonal", "ito"), Y0, TS, dt=0.25, adjoint_method="euler")
    with pytest.raises(fs.SolverError, match="not finite"):
        sdeint(Model("diagonal", "ito"), Y0 * math.inf, TS, dt=0.25)
