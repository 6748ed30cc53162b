"""The final step: where the steps end, what is returned, and that its evaluation is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import flowsolve as fs
from flowsolve import capture
from flowsolve.grids import At, Final, Timesteps
from flowsolve.passage import Passage
from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path
from flowsolve.solvers import DDIM, DDPM, RK4, Dopri5, Euler, ExactSDE, Heun, Solver, Tsit5

PATHS: dict[str, Path] = {
    "CondOT": CondOT(), "VP": VP(), "VE": VE(), "EDM": EDM(), "Cosine": Cosine(), "Discrete": Discrete.linear(),
}  # fmt: skip
FIXED: dict[str, Solver] = {
    "Euler": Euler(), "Heun": Heun(), "RK4": RK4(), "DDIM": DDIM(), "DDPM": DDPM(), "ExactSDE": ExactSDE(0.5),
    "Dopri5": Dopri5(adaptive=False),
}  # fmt: skip
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_solver = pytest.mark.parametrize("solver", FIXED.values(), ids=FIXED)
asking = pytest.mark.parametrize("policy", ["denoise", "tweedie"])


def mixture(path: Path) -> fs.Flow:
    return fs.problems.GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], std=0.2).flow(path)


def counted(path: Path, calls: list[Any]) -> fs.Flow:
    """The mixture's flow, noting how many samples each call of the network had, and when."""
    inner = mixture(path)

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append((len(x), float(t[0])))
        return inner.net(x, t)

    return fs.Flow(net, path, inner.prediction)


def stop(path: Path) -> float:
    return min(path.window[1], path.time(math.log(500.0)))


@every_path
@every_solver
@pytest.mark.parametrize("nfe", [2, 9, 20])
@pytest.mark.parametrize("policy", ["path", "sigma_min", "denoise", "tweedie"])
def test_the_budget_is_spent_exactly_whatever_the_policy(path: Path, solver: Solver, nfe: int, policy: str) -> None:
    calls: list[Any] = []
    sol = fs.sample(counted(path, calls), (3, 2), solver=solver, nfe=nfe, seed=1, final=policy)
    assert sol.nfe.tolist() == [nfe] * 3
    assert [n for n, _ in calls] == [3] * nfe
    assert sol.t.tolist() == [stop(path) if policy == "sigma_min" else 1.0] * 3
    assert bool(torch.isfinite(sol.x).all())
    if policy != "path":
        assert calls[-1][1] <= stop(path) + 1e-6


@every_path
@every_solver
def test_sigma_min_is_the_state_where_the_steps_end(path: Path, solver: Solver) -> None:
    flow = mixture(path)
    sol = fs.sample(flow, (4, 2), solver=solver, nfe=12, seed=3, final="sigma_min")
    end = stop(path)
    plain = fs.sample(flow, (4, 2), solver=solver, nfe=12, seed=3, interval=(0.0, end))
    assert torch.equal(sol.x, plain.x)
    assert math.exp(-path.log_snr(end)) >= 0.002 * (1 - 1e-9)


def test_the_noise_level_is_ones_own_and_ends_at_the_paths() -> None:
    flow = mixture(CondOT())
    sol = fs.sample(flow, (2, 2), solver=Euler(), nfe=5, final=Final("sigma_min", sigma=0.25))
    assert sol.t.tolist() == pytest.approx([0.8, 0.8])
    for path, end in ((VE(sigma_min=0.01), 1.0), (EDM(), 1.0), (Discrete.linear(), 0.999)):
        sol = fs.sample(mixture(path), (2, 2), solver=Euler(), nfe=5, final="sigma_min")
        assert sol.t.tolist() == [end, end]
    sol = fs.sample(flow, (2, 2), solver=Euler(), nfe=5, final="sigma_min", interval=(0.0, 0.5))
    assert sol.t.tolist() == [0.5, 0.5]


@every_path
@every_solver
@asking
def test_the_estimate_where_the_steps_end_is_returned(path: Path, solver: Solver, policy: str) -> None:
    flow = mixture(path)
    before = fs.sample(flow, (4, 2), solver=solver, nfe=11, seed=3, final="sigma_min")
    sol = fs.sample(flow, (4, 2), solver=solver, nfe=12, seed=3, final=policy)
    data = flow.data(before.x, stop(path))
    torch.testing.assert_close(sol.x, data if policy == "denoise" else path.alpha(1.0) * data)


def test_tweedies_mean_is_the_state_and_its_score() -> None:
    """x + σ² ∇ log p = α ẑ, of an interval that stops early; denoise is that over α."""
    flow = mixture(VP())
    options: dict[str, Any] = {"solver": Heun(), "seed": 2, "interval": (0.0, 0.7), "dtype": torch.float64}
    x = fs.sample(flow, (5, 2), nfe=10, **options).x
    mean = x + flow.path.sigma(0.7) ** 2 * flow.score(x, 0.7)
    torch.testing.assert_close(fs.sample(flow, (5, 2), nfe=11, final="tweedie", **options).x, mean)
    denoised = fs.sample(flow, (5, 2), nfe=11, final="denoise", **options).x
    torch.testing.assert_close(denoised * flow.path.alpha(0.7), mean)


@pytest.mark.parametrize("name", ["CondOT", "VE", "EDM", "Discrete", "VP", "Cosine"])
def test_denoise_and_tweedie_are_the_same_at_the_end_of_a_path(name: str) -> None:
    assert PATHS[name].alpha(1.0) == pytest.approx(1.0, abs=2e-6)


def test_edms_sampler_ends_in_a_denoising_step() -> None:
    """Karras et al. 2022, algorithm 1 with Euler steps: σ_N = 0, and the step there from σ_min is D(x; σ_min)."""
    flow = mixture(EDM())
    sigmas = [80.0, 30.0, 8.0, 2.0, 0.5, 0.1, 0.002]
    start = 80.0 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = start
    for s, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        slope = (x - flow.data(x, flow.path.time(-math.log(s)))) / s
        x = x + (after - s) * slope
    sol = fs.sample(flow, start=start, solver=Euler(), grid=At(sigma=sigmas), final="denoise")
    torch.testing.assert_close(sol.x, x)
    assert sol.nfe.tolist() == [len(sigmas)] * 6


# --- adaptive solvers, batches, gradients, graphs -------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("solver", [Dopri5(1e-4, 1e-4), Tsit5(1e-3, 1e-3)], ids=["Dopri5", "Tsit5"])
@asking
def test_an_adaptive_solve_ends_with_the_estimate_too(path: Path, solver: Solver, policy: str) -> None:
    flow = mixture(path)
    before = fs.sample(flow, (4, 2), solver=solver, seed=3, final="sigma_min")
    assert before.t.tolist() == [stop(path)] * 4
    sol = fs.sample(flow, (4, 2), solver=solver, seed=3, final=policy)
    data = flow.data(before.x, stop(path))
    torch.testing.assert_close(sol.x, data if policy == "denoise" else path.alpha(1.0) * data)
    assert sol.nfe.tolist() == [n + 1 for n in before.nfe.tolist()]
    assert sol.t.tolist() == [1.0] * 4


def test_the_final_step_is_within_an_adaptive_budget() -> None:
    flow = mixture(CondOT())
    needed = int(fs.sample(flow, (1, 2), solver=Dopri5(), final="denoise").nfe)
    assert fs.sample(flow, (1, 2), solver=Dopri5(), nfe=needed, final="denoise").nfe.tolist() == [needed]
    short = fs.sample(flow, (1, 2), solver=Dopri5(), nfe=needed - 1, final="denoise", throw=False)
    assert short.ok.tolist() == [False]
    assert int(short.nfe) <= needed - 1


@pytest.mark.parametrize("solver", [Heun(), Dopri5(1e-4, 1e-4)], ids=["Heun", "Dopri5"])
def test_batches_of_any_size_give_the_same(solver: Solver) -> None:
    flow = mixture(Discrete.linear())
    options: dict[str, Any] = {"solver": solver, "nfe": None if solver.chooses_steps else 9, "final": "denoise"}
    whole, parts = fs.sample(flow, (7, 2), **options), fs.sample(flow, (7, 2), batch=3, **options)
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-5, atol=1e-6)
    assert parts.nfe.tolist() == whole.nfe.tolist()


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_gradients_pass_through_the_final_step(gradient: str) -> None:
    flow = mixture(CondOT())
    found = {}
    for mode in ("direct", gradient):
        x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
        sol = fs.sample(flow, start=x, solver=RK4(), nfe=161, final="denoise", gradient=mode)
        found[mode] = torch.autograd.grad(sol.x.square().sum(), x)[0]
    # an adjoint has errors of its own
    torch.testing.assert_close(found[gradient], found["direct"], rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("policy", ["sigma_min", "denoise", "tweedie"])
@pytest.mark.parametrize("path", [CondOT(), Discrete.linear()], ids=["CondOT", "Discrete"])
def test_a_recording_has_the_final_step(path: Path, policy: str) -> None:
    net = torch.nn.Linear(2, 2)
    flow = fs.Flow(lambda x, t: net(x) * t[:, None], path, "v")

    def traced(solve: Any, inputs: list[Tensor]) -> Any:
        return make_fx(solve, tracing_mode="fake", _allow_non_fake_inputs=True)(inputs)

    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eager = fs.sample(flow, start=x, solver=Heun(), nfe=6, final=policy)
        plan = Passage(flow, (0.0, 1.0), solver=Heun(), nfe=6, final=policy)
        found = capture.captured(plan, x, {}, torch.arange(3), traced)
        plain = Passage(flow, (0.0, 1.0), solver=Heun(), nfe=6).key()
        same = isinstance(path, Discrete) and policy != "sigma_min"  # a closing step to clean data is the estimate
        assert (plain == plan.key()) == same
    torch.testing.assert_close(found.x, eager.x, rtol=1e-6, atol=1e-6)
    assert (found.nfe.tolist(), found.t.tolist()) == (eager.nfe.tolist(), eager.t.tolist())


def test_a_guided_evaluation_counts_what_it_costs() -> None:
    inner = mixture(CondOT())
    flow = fs.Flow(inner.net, CondOT(), inner.prediction, nfe_per_call=2)
    assert fs.sample(flow, (2, 2), solver=Heun(), nfe=10, final="denoise").nfe.tolist() == [10, 10]


def test_a_final_estimate_that_is_not_finite_is_a_failure_of_its_sample() -> None:
    edge = CondOT().time(math.log(500.0))

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t[:, None] >= edge - 1e-6) & (x > 0), torch.nan, torch.zeros_like(x))

    start = torch.tensor([[-1.0], [1.0]])
    sol = fs.sample(fs.Flow(net, CondOT()), start=start, solver=Euler(), nfe=4, final="denoise", throw=False)
    assert sol.ok.tolist() == [True, False]
    assert sol.nfe.tolist() == [4, 4]


# --- explicit times and errors --------------------------------------------------------------------------------------


@asking
def test_explicit_times_end_where_they_end(policy: str) -> None:
    flow, times = mixture(CondOT()), [0.0, 0.3, 0.6, 0.9]
    x = fs.sample(flow, (3, 2), solver=Euler(), grid=times, interval=(0.0, 0.9), seed=1).x
    sol = fs.sample(flow, (3, 2), solver=Euler(), grid=times, interval=(0.0, 0.9), seed=1, final=policy)
    torch.testing.assert_close(sol.x, flow.data(x, 0.9) * (1.0 if policy == "denoise" else 0.9))
    assert sol.nfe.tolist() == [4] * 3
    named = fs.sample(flow, (3, 2), solver=Euler(), grid=At(t=times), nfe=4, seed=1, final=policy)
    assert torch.equal(named.x, sol.x)
    # an Euler step to clean data is the same as the estimate there
    path = fs.sample(flow, (3, 2), solver=Euler(), grid=[*times, 1.0], seed=1)
    if policy == "denoise":
        torch.testing.assert_close(path.x, sol.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": "clean"}, r"final = 'clean' is not known; expected one of path, sigma_min, denoise, tweedie"),
        ({"final": "denoise", "nfe": 1}, r"nfe = 1; expected at least 2: 1 of them for the final step"),
        (
            {"final": "denoise", "nfe": 1, "solver": Dopri5()},
            r"nfe = 1; expected at least 2: one of them for the final",
        ),
        ({"final": "denoise", "nfe": None, "grid": [0.0, 0.5, 1.0]}, r"end at t = 1, .*drop the last of them"),
        (
            {"final": "denoise", "nfe": None, "grid": [0.0, 0.5]},
            r"from 0\.0 to 0\.5, the interval from 0\.0 to 1\.0; give",
        ),
        (
            {"final": "denoise", "nfe": 5, "grid": At(t=[0.0, 0.5, 0.9])},
            r"5 estimates, .*spends 2 .*and the final step 1",
        ),
        ({"final": Final("denoise", 1e3)}, r"starts after t = 0\.00.*, or lower sigma=1000"),
    ],
)
def test_what_no_final_step_can_follow(options: dict[str, Any], message: str) -> None:
    start = {"start": torch.ones(2, 2)} if isinstance(options["final"], Final) else {"shape": (2, 2)}
    interval = {"interval": (0.1, 1.0)} if "start" in start else {}
    with pytest.raises(ValueError, match=message):
        fs.sample(mixture(CondOT()), **{"solver": Euler(), "nfe": 4, **start, **interval, **options})


def test_what_a_final_step_is_not() -> None:
    flow = mixture(CondOT())
    with pytest.raises(ValueError, match="final='denoise' is for the way to the data; drop it"):
        fs.sample(flow, start=torch.ones(2, 2), solver=Euler(), nfe=4, interval=(0.9, 0.0), final="denoise")
    with pytest.raises(TypeError, match="final is a int; expected one of path"):
        fs.sample(flow, (2, 2), solver=Euler(), nfe=4, final=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sigma = 0\.0; expected a finite noise level σ/α > 0"):
        Final("denoise", sigma=0.0)
    with pytest.raises(ValueError, match=r"\(0\.9, 1\.0\) starts after t = 0\.8"):
        fs.sample(
            flow, start=torch.ones(2, 2), solver=Euler(), nfe=4, interval=(0.9, 1.0), final=Final("sigma_min", 0.25)
        )


def test_a_table_ends_at_its_entry_zero() -> None:
    """Stable Diffusion 1's grid (leading, offset 1, last step to entry 0) and then the estimate there."""
    path = Discrete.linear()
    flow, spacing = mixture(path), Timesteps("leading", steps_offset=1)
    start = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
    x = fs.sample(flow, start=start, solver=DDIM(), nfe=20, grid=spacing, final="sigma_min")
    assert x.t.tolist() == [path.window[1]] * 3
    sol = fs.sample(flow, start=start, solver=DDIM(), nfe=21, grid=spacing, final="denoise")
    torch.testing.assert_close(sol.x, flow.data(x.x, path.window[1]))
    assert sol.nfe.tolist() == [21] * 3
