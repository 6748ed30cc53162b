"""DDPM and DDIM on the standard table of 1000 steps, against the formulas of their papers and against diffusers.

The formulas are written here in ᾱ and β as the papers have them, never in α, σ and λ as the package does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.noise import STEP, Noise, interval
from flowsolve.paths import Discrete
from flowsolve.problems import GaussianMixture
from flowsolve.solvers import DDIM, DDPM, ExactSDE

N = 1000
BETAS = torch.linspace(1e-4, 0.02, N, dtype=torch.float64)
BAR = torch.cumprod(1.0 - BETAS, 0)
ETAS = [0.0, 0.5, 1.0]


class Network(nn.Module):
    """A small random ε-network on (x, k), in float64: σ x, which suits N(0, I), and a hidden layer that feels k."""

    def __init__(self, dims: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(dims + 1, 16, generator=generator, dtype=torch.float64))
        self.last = nn.Parameter(torch.randn(16, dims, generator=generator, dtype=torch.float64) / 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        time = (k.to(x) / 500.0 - 1.0)[:, None]
        sigma = (1.0 - BAR[k.round().long()]).sqrt()[:, None]
        return sigma * x + torch.tanh(torch.cat((x, time), 1) @ self.first) @ self.last


def analytic(bar: Tensor = BAR) -> Callable[[Tensor, Tensor], Tensor]:
    """E[ε | x] of a mixture at an index of the table, written out: σ Σ r_k (x − αμ_k)/(α²s² + σ²)."""
    means = torch.tensor([[-1.0, 0.5, 0.2], [1.0, 1.0, -0.5]], dtype=torch.float64)
    share, std = torch.tensor([0.6, 0.4], dtype=torch.float64), 0.7

    def net(x: Tensor, k: Tensor) -> Tensor:
        a = bar[k.round().long()].reshape(-1, 1, 1).to(x)
        off = x[:, None] - a.sqrt() * means.to(x)
        variance = a * std**2 + 1 - a
        posterior = (share.log().to(x) - 0.5 * (off.square() / variance).sum(2)).softmax(1)
        return ((1 - a).sqrt() * posterior[..., None] * off / variance).sum(1)

    return net


NETWORKS = {"mlp": Network(), "mixture": analytic()}
network_cases = pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)


def flow_of(net: Callable[..., Tensor], bar: Tensor = BAR) -> fs.Flow:
    return fs.Flow(net, Discrete(bar), prediction="noise", time="native")


def states(k: int, dims: int = 3, batch: int = 4) -> Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def xi(k: int, like: Tensor, seed: int) -> Tensor:
    """The noise that belongs to the step that starts at entry k, by its address."""
    return Noise.of(seed, len(like)).normal(STEP, interval(time_of(k)), like)


def time_of(k: int) -> float:
    """Flow time of an index; −1 is the data."""
    return (N - 1 - k) / N


def ancestral(net: Callable[..., Tensor], x: Tensor, k: int, noise: Tensor) -> Tensor:
    """Ho et al. 2020, algorithm 2 with σ_t² = β̃_t, and equations 6, 7 and 15."""
    beta, bar = BETAS[k], BAR[k]
    before = BAR[k - 1] if k > 0 else torch.tensor(1.0, dtype=torch.float64)
    eps = net(x, torch.full((len(x),), float(k), dtype=torch.float64))
    clean = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    mean = before.sqrt() * beta / (1 - bar) * clean + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
    variance = (1 - before) / (1 - bar) * beta
    return mean + variance.sqrt() * noise if k > 0 else mean


def implicit(net: Callable[..., Tensor], x: Tensor, k: int, k_next: int, eta: float, noise: Tensor) -> Tensor:
    """Song, Meng & Ermon 2021, equations 12 and 16 (their α is ᾱ)."""
    a = BAR[k]
    b = BAR[k_next] if k_next >= 0 else torch.tensor(1.0, dtype=torch.float64)
    eps = net(x, torch.full((len(x),), float(k), dtype=torch.float64))
    sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return b.sqrt() * clean + (1 - b - sigma**2).sqrt() * eps + sigma * noise


def test_the_two_forms_of_ho_s_mean_agree() -> None:
    """The check of the check: algorithm 2's 1/√α (x − β/√(1−ᾱ) ε) is the posterior mean of equation 7."""
    for k in (1, 10, 500, 999):
        x = states(k)
        eps = NETWORKS["mlp"](x, torch.full((4,), float(k)))
        short = (x - BETAS[k] / (1 - BAR[k]).sqrt() * eps) / (1 - BETAS[k]).sqrt()
        torch.testing.assert_close(ancestral(NETWORKS["mlp"], x, k, torch.zeros(4, 3)), short, rtol=1e-10, atol=1e-11)


def test_the_table() -> None:
    path = Discrete.linear()
    for k in (0, 1, 17, 500, 998, 999):
        assert path.alpha(time_of(k)) ** 2 == pytest.approx(float(BAR[k]), rel=1e-12)
        assert path.native_time(time_of(k)) == k


@network_cases
def test_ddpm_is_the_ancestral_update_at_every_index(net: Callable[..., Tensor]) -> None:
    flow = flow_of(net)
    for k in range(N) if net is NETWORKS["mlp"] else [*range(0, N, 19), N - 1]:
        x = states(k)
        out = fs.sample(flow, start=x, interval=(time_of(k), time_of(k - 1)), solver=DDPM(), nfe=1, seed=k)
        torch.testing.assert_close(
            out.x, ancestral(net, x, k, xi(k, x, k)), rtol=1e-12, atol=1e-12, msg=lambda m, k=k: f"k = {k}: {m}"
        )


@network_cases
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("stride", [1, 20, 137])
def test_ddim_is_equation_twelve(net: Callable[..., Tensor], eta: float, stride: int) -> None:
    flow = flow_of(net)
    for k in [*range(stride - 1, N, 29), stride - 1, N - 1]:
        k_next, x = k - stride, states(k)
        out = fs.sample(flow, start=x, interval=(time_of(k), time_of(k_next)), solver=DDIM(eta=eta), nfe=1, seed=k)
        expected = implicit(net, x, k, k_next, eta, xi(k, x, k))
        torch.testing.assert_close(out.x, expected, rtol=1e-12, atol=1e-12, msg=lambda m, k=k: f"k = {k}: {m}")


@pytest.mark.parametrize("solver", [DDPM(), ExactSDE(eta=1.0)], ids=repr)
def test_a_whole_run_visits_every_entry_and_gives_each_step_its_own_noise(solver: Any) -> None:
    seen: list[float] = []

    def net(x: Tensor, k: Tensor) -> Tensor:
        seen.append(k[0].item())
        return NETWORKS["mlp"](x, k)

    start = states(0)
    out = fs.sample(flow_of(net), start=start, solver=solver, nfe=N, seed=5)
    x = start
    for k in range(N - 1, -1, -1):
        x = ancestral(NETWORKS["mlp"], x, k, xi(k, x, 5))
    assert seen == list(range(N - 1, -1, -1))
    torch.testing.assert_close(out.x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", ETAS)
def test_a_strided_run_is_equation_twelve(eta: float) -> None:
    start = states(1)
    out = fs.sample(flow_of(NETWORKS["mlp"]), start=start, solver=DDIM(eta=eta), nfe=50, seed=7)
    x = start
    for k in range(N - 1, -1, -20):
        x = implicit(NETWORKS["mlp"], x, k, k - 20, eta, xi(k, x, 7))
    torch.testing.assert_close(out.x, x, rtol=1e-10, atol=1e-10)


def test_predictions_and_the_exact_flow_give_the_same_update() -> None:
    """ε, v, score, z and velocity networks of one mixture: one update."""
    problem = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, 1.0]], dtype=torch.float64), 0.7)
    path, x = Discrete.linear(), states(3, dims=2)
    results = [
        fs.sample(problem.flow(path, name), start=x, solver=DDPM(), nfe=40, seed=1).x
        for name in ("noise", "v", "score", "data", "velocity")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


# --- diffusers: its own step code runs; only the table's dtype, the noise and the network come from here -------------

COMMON = {
    "num_train_timesteps": N, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "timestep_spacing": "trailing", "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip


@pytest.fixture(params=["float32 table", "float64 table"])
def table(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[Any], Tensor], float]]:
    """How to read a scheduler's table, and the agreement to expect.

    diffusers keeps ᾱ in float32 and takes 1 − ᾱ in float32 too, which costs it four digits at the data end. With its
    own table both sides use the same ᾱ and 1e-5 is asked for; with the table replaced by the float64 one, rounding.
    """
    if request.param == "float64 table":

        def prepare(scheduler: Any) -> Tensor:
            scheduler.alphas_cumprod = BAR.clone()
            for name in ("one", "final_alpha_cumprod"):
                if hasattr(scheduler, name):
                    setattr(scheduler, name, getattr(scheduler, name).double())
            return BAR

        yield prepare, 1e-9
    else:
        yield lambda scheduler: scheduler.alphas_cumprod.double(), 1e-5


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@network_cases
@pytest.mark.parametrize("eta", ETAS)
def test_ddim_is_that_of_diffusers(
    net: Callable[..., Tensor], eta: float, table: tuple[Callable[[Any], Tensor], float]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**COMMON, set_alpha_to_one=True)
    prepare, tolerance = table
    bar = prepare(scheduler)
    scheduler.set_timesteps(50)
    start = x = states(11)
    for k in scheduler.timesteps:
        eps = net(x, torch.full((len(x),), float(k)))
        x = scheduler.step(eps, k, x, eta=eta, variance_noise=xi(int(k), x, 3) if eta else None).prev_sample
    out = fs.sample(flow_of(net, bar), start=start, solver=DDIM(eta=eta), nfe=50, seed=3)
    assert relative(out.x, x) < tolerance


@pytest.mark.parametrize(("net", "steps"), [("mlp", 50), ("mixture", 50), ("mlp", 1000)])
def test_ddpm_is_that_of_diffusers(
    net: str, steps: int, table: tuple[Callable[[Any], Tensor], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[net]
    diffusers = pytest.importorskip("diffusers")
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = diffusers.DDPMScheduler(**COMMON, variance_type="fixed_small")
    prepare, tolerance = table
    bar = prepare(scheduler)
    scheduler.set_timesteps(steps)
    start = x = states(12)
    drawn: list[int] = []

    def randn(shape: Any, **_: Any) -> Tensor:
        drawn.append(now)  # nothing is drawn at index 0
        return xi(now, x, 4)

    monkeypatch.setattr(module, "randn_tensor", randn)
    for k in scheduler.timesteps:
        now = int(k)
        eps = network(x, torch.full((len(x),), float(k)))
        x = scheduler.step(eps, k, x).prev_sample
    assert drawn == [k for k in scheduler.timesteps.tolist() if k > 0]
    out = fs.sample(flow_of(network, bar), start=start, solver=DDPM(), nfe=steps, seed=4)
    assert relative(out.x, x) < tolerance


def test_float32_states_agree_with_float64_to_single_precision() -> None:
    start = states(13)
    net = NETWORKS["mixture"]
    wide = fs.sample(flow_of(net), start=start, solver=DDIM(eta=0.5), nfe=50, seed=3).x
    narrow = fs.sample(flow_of(net), start=start.float(), solver=DDIM(eta=0.5), nfe=50, seed=3).x
    assert narrow.dtype == torch.float32
    assert relative(narrow.double(), wide) < 2e-5


def test_zero_terminal_snr_is_refused_for_noise_and_served_for_v() -> None:
    bar = BAR.clone()
    bar[-1] = 0.0
    problem = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, 1.0]], dtype=torch.float64), 0.7)
    path = Discrete(bar)
    with pytest.raises(ValueError, match="α = 0"):
        fs.sample(problem.flow(path, "noise"), start=states(1, 2), solver=DDPM(), nfe=10)
    out = fs.sample(problem.flow(path, "v"), start=states(1, 2), solver=DDPM(), nfe=10)
    assert bool(out.x.isfinite().all())
    assert math.isfinite(float(out.t[0]))
