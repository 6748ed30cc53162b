r"""Where the other libraries do not do what they say, measured: reasons for ours to differ.

**3M.** With $D_2 = h^2 f[\lambda_0, \lambda_1, \lambda_2]$ the step through three nodes is

$$ x_b = \dots + \alpha_b\int_0^h e^{u-h}\bigl(f_0 + D_1\tfrac uh + D_2\tfrac{u^2}{h^2}\bigr)du, $$

whose last integral is twice the $\varphi_3$ that diffusers and k-diffusion put there (they take D₂ for a second
derivative, of which it is half). Their 3M is thus of order 2, in data form, in noise form and in the SDE's; diffusers'
single-step 3S has the factor. In its `sde-dpmsolver++` of three nodes a sign is wrong too: its weight does not vanish
with h, and the order is 1.

**Orders** are measured from λ = −1.5 to 1.5 on steps even in λ, after a start of short steps that costs no order.
Stochastic methods are given no noise: what is left is the drift of the SDE, an ODE like any other. The truth is that by
Dopri8, or by four nodes on a fine grid.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from flowsolve.paths import Path
from flowsolve.solvers import Dopri8, DPMSolverPP, Euler, Multistep, SDEDPMSolverPP
from flowsolve.solvers.exponential import Form, Update, update
from flowsolve.solvers.injection import Churn
from tests.peers.harness import (
    deviation,
    diffusers_levels,
    diffusers_solve,
    distinct,
    eased,
    edm_solve,
    even,
    k_solve,
    karras,
    ours,
    silence,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
FULL: dict[str, Any] = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
STEPS = (24, 36, 54)


@cache
def truth(eta: float) -> Tensor:
    """Where the drift of the member η of the family leads."""
    if eta == 0.0:
        return ours(Dopri8(adaptive=False), even(40))
    return ours(Multistep(4, eta=eta), eased(600), noise=silence)


def order(solve: Callable[[list[float]], Tensor], levels: Callable[[int], list[float]], eta: float) -> float:
    """The slope of log error over log steps."""
    errors = [deviation(solve(levels(n)), truth(eta)) for n in STEPS]
    found = -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])
    print(f"ORDER {found:.2f} {errors}")
    return found


def by_diffusers(name: str, **config: Any) -> Callable[[list[float]], Tensor]:
    return lambda levels: diffusers_solve(
        name, len(levels) - 1, levels=levels, noise=silence, **{"solver_order": 3, **FULL, **config}
    )[1]


def by_k(eta: float) -> Callable[[list[float]], Tensor]:
    return lambda levels: k_solve("dpmpp_3m_sde", levels, noise=silence, eta=eta)


def thirds(steps: int) -> list[float]:
    return even(3 * steps)


# --- 3M ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["data", "noise"])
def test_ours_through_three_nodes_is_of_order_3(form: str) -> None:
    solver = Multistep(3, form)
    assert order(lambda levels: ours(solver, levels), eased, 0.0) == pytest.approx(3.0, abs=0.2)


def test_ours_with_noise_is_of_order_3_in_the_drift() -> None:
    solver = SDEDPMSolverPP(3)
    assert order(lambda levels: ours(solver, levels, noise=silence), eased, 1.0) == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_diffusers_3m_is_of_order_2(algorithm: str) -> None:
    assert order(by_diffusers(MULTI, algorithm_type=algorithm), eased, 0.0) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_k_diffusion_s_3m_is_of_order_2(eta: float) -> None:
    assert order(by_k(eta), eased, eta) == pytest.approx(2.0, abs=0.2)


def test_diffusers_3s_is_of_order_3() -> None:
    """Where the factor is not missing."""
    for kind in ("midpoint", "heun"):
        assert order(by_diffusers(SINGLE, solver_type=kind), thirds, 0.0) == pytest.approx(3.0, abs=0.2)


class Halved(Multistep):
    """3M with half of the second difference: the moments of the kernel, with the parabola's value, slope and half its
    bend at the start of the step.
    """

    def update(self, path: Path, form: Form, a: float, b: float, nodes: tuple[float, ...]) -> Update:
        whole = update(path, form, a, b, nodes, eta=self.eta)
        if len(nodes) < 3:
            return super().update(path, form, a, b, nodes)
        lam = [path.log_snr(t) for t in nodes]
        first = update(path, form, a, b, nodes[:2], eta=self.eta).weights[1] * (lam[1] - lam[0])  # ∫ kernel (λ − λ₀)
        total = sum(whole.weights)
        slopes = [  # of the parabola at λ₀
            1 / (lam[0] - lam[1]) + 1 / (lam[0] - lam[2]),
            (lam[0] - lam[2]) / ((lam[1] - lam[0]) * (lam[1] - lam[2])),
            (lam[0] - lam[1]) / ((lam[2] - lam[0]) * (lam[2] - lam[1])),
        ]
        straight = [total * (i == 0) + first * s for i, s in enumerate(slopes)]
        halved = (0.5 * (w + v) for w, v in zip(whole.weights, straight, strict=True))
        return whole._replace(weights=tuple(halved))


@pytest.mark.parametrize(("algorithm", "form"), [("dpmsolver++", "data"), ("dpmsolver", "noise")])
def test_half_the_second_difference_is_all_that_diffusers_lacks(algorithm: str, form: str) -> None:
    levels, theirs = diffusers_solve(MULTI, 20, solver_order=3, algorithm_type=algorithm, **FULL)
    off = deviation(ours(Halved(3, form, rule="bh2"), levels), theirs)
    print(f"PEER {MULTI} 3 {algorithm} with half of D2: {off:.1e}")
    assert off < 1e-12
    assert deviation(ours(Multistep(3, form, rule="bh2"), levels), theirs) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_half_the_second_difference_is_all_that_k_diffusion_lacks(eta: float) -> None:
    levels = karras(12)
    theirs = k_solve("dpmpp_3m_sde", levels, eta=eta * eta)
    off = deviation(ours(Halved(3, eta=eta), levels), theirs)
    print(f"PEER k-diffusion dpmpp_3m_sde {eta} with half of D2: {off:.1e}")
    assert off < 1e-12
    assert deviation(ours(SDEDPMSolverPP(3, eta=eta, rule="exact"), levels), theirs) > 1e-3


# --- diffusers --------------------------------------------------------------------------------------------------------


def test_diffusers_sde_of_three_nodes_is_of_order_1() -> None:
    """A sign: (1 − e^(−2h) − 2h)/(2h)² − ½ tends to −1, not to 0, and multiplies the second difference."""
    assert order(by_diffusers(MULTI, algorithm_type="sde-dpmsolver++"), eased, 1.0) == pytest.approx(1.0, abs=0.2)
    two = by_diffusers(MULTI, algorithm_type="sde-dpmsolver++", solver_order=2)
    assert order(two, eased, 1.0) == pytest.approx(2.0, abs=0.2)


def test_so_is_its_single_step() -> None:
    solve = by_diffusers(SINGLE, algorithm_type="sde-dpmsolver++", solver_type="heun")
    assert order(solve, thirds, 1.0) == pytest.approx(1.0, abs=0.2)


def test_diffusers_sde_in_noise_form_has_no_order_3() -> None:
    with pytest.raises(UnboundLocalError):
        diffusers_solve(MULTI, 8, solver_order=3, algorithm_type="sde-dpmsolver", **FULL)


def test_nor_has_the_sde_of_its_edm_schedulers() -> None:
    with pytest.raises(UnboundLocalError):
        edm_solve("EDMDPMSolverMultistepScheduler", 8, solver_order=3, algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (MULTI, {"final_sigmas_type": "sigma_min"}), ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DEISMultistepScheduler", {}), ("SASolverScheduler", {}),
    ],
)  # fmt: skip
def test_diffusers_last_step_on_karras_levels_goes_nowhere(name: str, config: dict[str, Any]) -> None:
    """The table's lowest level stands there twice: one evaluation in vain."""
    levels = diffusers_levels(name, 8, use_karras_sigmas=True, **config)
    assert len(levels) == 9
    assert len(distinct(levels)) == 8


def test_diffusers_churn_asks_before_it_adds_the_noise() -> None:
    """Algorithm 2 of EDM asks at the raised level; a scheduler that is handed the output cannot."""
    config: dict[str, Any] = {"use_karras_sigmas": True, "step_options": {"s_churn": 4.0}}
    levels, theirs = diffusers_solve("EulerDiscreteScheduler", 20, **config)
    found = ours(Churn(Euler(), 4.0), levels, chart="noise")
    assert deviation(found, theirs) > 1e-2
    assert deviation(found, k_solve("euler", levels, s_churn=4.0)) < 1e-12


def test_a_wrong_weight_would_be_noticed() -> None:
    """The power of this folder's comparisons: the other published weight of the second node, on the same levels."""
    levels, theirs = diffusers_solve(MULTI, 20, solver_order=2, **FULL)
    assert deviation(ours(DPMSolverPP(2, rule="bh2"), levels), theirs) < 1e-12
    for rule in ("bh1", "exact"):
        assert deviation(ours(DPMSolverPP(2, rule=rule), levels), theirs) > 1e-3
