"""Every configuration of diffusers' schedulers: the real scheduler is built from it, and its tables and its noising are
compared with the path that is read from the same configuration.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from flowsolve.adapters.diffusers import FLOW, TABLE_SCHEDULERS, alphas_cumprod, as_flow, completed, convention, options
from flowsolve.adapters.diffusers.convention import DISTILLED, EDM_SCHEDULERS, SUPPORTED
from flowsolve.paths import EDM, VE, CondOT, Discrete, Trig

diffusers = pytest.importorskip("diffusers")

SIGMA_SPACE = (  # schedulers whose add_noise and step work on z + σε, whatever their networks read
    *("DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
)
SIGMOID = ("DDPMScheduler", "DDPMParallelScheduler", "RePaintScheduler")
MULTISTEP = ("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")
LAPLACE = ("DDPMScheduler",)


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(getattr(diffusers, name).__init__).parameters


@st.composite
def table_configs(draw: Any) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(TABLE_SCHEDULERS))
    kinds = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    kinds += ["sigmoid"] * (name in SIGMOID) + ["laplace"] * (name in LAPLACE)
    steps = draw(st.integers(10, 1200))
    config: dict[str, Any] = {"num_train_timesteps": steps}
    if takes(name, "beta_start"):
        first = draw(st.floats(1e-5, 2e-3))
        config |= {"beta_start": first, "beta_end": first + draw(st.floats(1e-3, 0.02))}
        config["beta_schedule"] = draw(st.sampled_from(kinds))
    if takes(name, "trained_betas") and name != "RePaintScheduler" and draw(st.booleans()):
        config["trained_betas"] = (
            draw(st.lists(st.floats(1e-4, 0.1), min_size=steps, max_size=steps)) if steps < 60 else None
        )
    if takes(name, "rescale_betas_zero_snr"):
        config["rescale_betas_zero_snr"] = draw(st.booleans())
    if takes(name, "snr_shift_scale"):
        config["snr_shift_scale"] = draw(st.sampled_from([1.0, 3.0]))
    for option in ("use_karras_sigmas", "thresholding"):
        if takes(name, option):
            config[option] = draw(st.booleans())
    if takes(name, "timestep_spacing") and name != "DDIMInverseScheduler":
        config["timestep_spacing"] = draw(st.sampled_from(["linspace", "leading", "trailing"]))
    if takes(name, "prediction_type"):
        kinds = ["epsilon", "sample"] if name == "UnCLIPScheduler" else ["epsilon", "v_prediction"]
        config["prediction_type"] = draw(st.sampled_from(kinds))
    return name, config


@given(table_configs())
def test_tables(drawn: tuple[str, dict[str, Any]]) -> None:
    """ᾱ_k of the real scheduler is ours, and the path passes through it with the network's time k."""
    name, config = drawn
    scheduler = getattr(diffusers, name)(**config)
    found = convention(completed(scheduler))
    assert isinstance(found.path, Discrete)
    theirs = scheduler.alphas_cumprod.double()
    ours = torch.tensor(found.path.alphas_cumprod, dtype=torch.float64)
    zero = bool(config.get("rescale_betas_zero_snr"))
    if zero:  # some put 2⁻²⁴ for the 0
        assert float(ours[-1]) == 0.0
        assert float(theirs[-1]) <= 2.0**-24 + 1e-12
        ours, theirs = ours[:-1], theirs[:-1]
    # float32 products of N factors are off by up to N roundings, relative; rescaling subtracts the last root
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if not zero else 2e-3, atol=2e-6 if zero else 1e-9)
    k = torch.tensor([0, len(ours) // 2, len(ours) - 1])
    t = found.path.time_from_native(k.double())
    assert torch.equal(found.path.native_time(t), k.double())
    torch.testing.assert_close(found.path.alpha(t).square(), ours[k], rtol=1e-9, atol=1e-12)
    expected = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
    assert found.prediction.name == expected[config.get("prediction_type", "epsilon")]


@given(table_configs(), st.integers(0, 10_000))
def test_noising(drawn: tuple[str, dict[str, Any]], place: int) -> None:
    """add_noise of the real scheduler is the path's interpolation, up to its scaling of the state by 1/α."""
    name, config = drawn
    config["num_train_timesteps"] = min(config["num_train_timesteps"], 200)
    for option in ("trained_betas", "use_karras_sigmas", "rescale_betas_zero_snr"):
        config.pop(option, None)
    multistep = name.startswith(("DEIS", "DPMSolverM", "DPMSolverSing", "UniPC", "SASolver"))
    if multistep and takes(name, "timestep_spacing"):
        config["timestep_spacing"] = "trailing"
    scheduler = getattr(diffusers, name)(**config)
    assume(hasattr(scheduler, "add_noise") and name != "RePaintScheduler")  # it has one that only raises
    n = config["num_train_timesteps"]
    k = place % n
    if multistep:  # before set_timesteps their σ run the other way than their timesteps
        scheduler.set_timesteps(n)
        k = int(scheduler.timesteps[place % len(scheduler.timesteps)])
    path = convention(completed(scheduler)).path
    z, noise = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    t = path.time_from_native(float(k))
    ours = path.interpolate(z, noise, t)
    theirs = scheduler.add_noise(z, noise, torch.tensor([k]))
    if name in SIGMA_SPACE:
        theirs = theirs * path.alpha(t)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@given(
    st.sampled_from(["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"]),
    st.floats(1e-3, 0.5),
    st.floats(5.0, 500.0),
    st.floats(0.1, 2.0),
    st.floats(2.0, 12.0),
    st.sampled_from(["karras", "exponential"]),
    st.sampled_from(["epsilon", "v_prediction"]),
)
def test_preconditioned(name: str, low: float, high: float, data: float, rho: float, schedule: str, kind: str) -> None:
    """σ of uniform flow times, c_in, c_noise and the denoised state are those of the scheduler."""
    scheduler = getattr(diffusers, name)(
        sigma_min=low, sigma_max=high, sigma_data=data, rho=rho, sigma_schedule=schedule, prediction_type=kind
    )
    scheduler.set_timesteps(9)
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            seen.append((x, t))
            return type("Output", (), {"sample": 0.3 * x + 0.1})()

    flow = as_flow(Net(), scheduler)
    assert isinstance(flow.path, EDM if schedule == "karras" else VE)
    sigmas = flow.path.sigma(torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas[:9], rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(flow.path.alpha(0.4), 1.0)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for i in (0, 4, 8):
        sigma = float(sigmas[i])
        state = x * math.hypot(sigma, data)
        estimate = flow.estimate(state, i / 8)
        fed, when = seen[-1]
        torch.testing.assert_close(fed, scheduler.precondition_inputs(state, sigma), rtol=1e-5, atol=1e-6)
        expected = scheduler.precondition_noise(torch.tensor([sigma])).expand(2)
        torch.testing.assert_close(when, expected.to(when.dtype), rtol=1e-5, atol=1e-5)
        denoised = scheduler.precondition_outputs(state, 0.3 * fed + 0.1, sigma)
        torch.testing.assert_close(estimate.data, denoised, rtol=1e-4, atol=1e-5 * (1.0 + sigma))
        torch.testing.assert_close(estimate.noise, (state - denoised) / sigma, rtol=1e-3, atol=1e-3)


@given(
    st.sampled_from(["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]),
    st.integers(10, 2000),
    st.floats(0.3, 8.0),
    st.booleans(),
)
def test_flow_matching(name: str, steps: int, shift: float, dynamic: bool) -> None:
    """Whatever the shift, the network's time is N σ and the state (1 − σ) z + σ ε."""
    options: dict[str, Any] = {"num_train_timesteps": steps, "shift": shift}
    if name == "FlowMatchEulerDiscreteScheduler":
        options["use_dynamic_shifting"] = dynamic
    scheduler = getattr(diffusers, name)(**options)
    found = convention(completed(scheduler))
    assert found.path == CondOT()
    assert found.prediction is FLOW
    z, noise = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    time: Any = found.time
    for i in (0, steps // 2, steps - 1):
        sigma, k = scheduler.sigmas[i].double(), scheduler.timesteps[i]
        torch.testing.assert_close(time(1.0 - sigma), k.double(), rtol=1e-5, atol=1e-5)
        if name == "FlowMatchEulerDiscreteScheduler":
            theirs = scheduler.scale_noise(z, k[None], noise)
            torch.testing.assert_close(
                found.path.interpolate(z, noise, max(1.0 - float(sigma), 0.0)), theirs, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    "name",
    [
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample"])
def test_flow_sigmas_of_multistep_schedulers(name: str, kind: str) -> None:
    """With use_flow_sigmas the data estimate at their own σ and timestep is ours."""
    if not takes(name, "use_flow_sigmas"):
        pytest.skip("this diffusers has no flow sigmas")
    options = {"algorithm_type": "dpmsolver++"} if name.startswith("DPM") else {}
    scheduler = getattr(diffusers, name)(use_flow_sigmas=True, flow_shift=3.0, prediction_type=kind, **options)
    scheduler.set_timesteps(6)
    flow = as_flow(nn.Identity(), scheduler)
    assert flow.path == CondOT()
    x, output = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    for i in range(1, 6):
        scheduler._step_index = i
        sigma = scheduler.sigmas[i].double().item()
        assert abs(float(flow.clock(1.0 - sigma)) - float(scheduler.timesteps[i])) < 1.0  # theirs are whole numbers
        converted = scheduler.convert_model_output(output, sample=x)
        estimate = flow.read(x, output, flow.path.at(1.0 - sigma))
        ours = estimate.noise if name.startswith("DEIS") else estimate.data
        torch.testing.assert_close(ours, converted, rtol=1e-4, atol=1e-4)


def test_inverted_sigmas() -> None:
    """With invert_sigmas (Mochi) their σ is flow time: an Euler step of theirs is one of ours."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    flow = as_flow(nn.Identity(), scheduler)
    scheduler.set_timesteps(8)
    x, output = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    for i, k in enumerate(scheduler.timesteps):
        t, after = scheduler.sigmas[i].double().item(), scheduler.sigmas[i + 1].double().item()
        assert after > t
        assert abs(float(flow.clock(t)) - float(k)) < 1e-3
        velocity = flow.read(x, output, flow.path.at(t)).velocity
        theirs = scheduler.step(output, k, x).prev_sample
        torch.testing.assert_close(x + (after - t) * velocity, theirs, rtol=1e-5, atol=1e-6)


def test_continuous_euler_v_prediction() -> None:
    """Stable Video's convention: x/√(σ² + 1) at ¼ log σ, a v; an Euler step of theirs is DDIM of ours."""
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
        timestep_spacing="leading",
    )
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            seen.append((x, t))
            return type("Output", (), {"sample": 0.5 * x})()

    flow = as_flow(Net(), scheduler)
    assert flow.path == EDM(0.002, 700.0)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(
        flow.path.sigma(torch.linspace(0, 1, 7, dtype=torch.float64)).float(),
        scheduler.sigmas[:7],
        rtol=1e-4,
        atol=1e-6,
    )
    x = 700.0 * torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for i, k in enumerate(scheduler.timesteps[:-1]):
        fed = scheduler.scale_model_input(x, k)
        estimate = flow.estimate(x, i / 6)
        torch.testing.assert_close(seen[-1][0], fed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[-1][1], k.expand(1), rtol=1e-4, atol=1e-4)
        theirs = scheduler.step(0.5 * fed, k, x).prev_sample
        after = flow.path.at((i + 1) / 6)
        torch.testing.assert_close(estimate.combine(after.alpha, after.sigma), theirs, rtol=1e-3, atol=1e-3)
        x = theirs


def test_score_sde_ve() -> None:
    """Its σ run geometrically from sigma_max to sigma_min, and the network is told σ and returns the score."""
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0, sampling_eps=1e-9)
    found = convention(completed(scheduler))
    assert found.path == VE(0.01, 50.0)
    assert found.prediction.name == "score"
    assert found.data_range == (0.0, 1.0)
    scheduler.set_sigmas(11)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(
        found.path.native_time(t).flip(0).float(), scheduler.discrete_sigmas, rtol=1e-4, atol=1e-6
    )


def test_dance_diffusion() -> None:
    """IPNDM's circle: its ε from a v, and its timesteps, at its own angles."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(10)
    flow = as_flow(nn.Identity(), scheduler)
    assert flow.path == Trig()
    x, output = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    for i, k in enumerate(scheduler.timesteps):
        t = 1.0 - k.double().item()
        point = flow.path.at(t)
        assert abs(float(flow.clock(t)) - float(k)) < 1e-7
        torch.testing.assert_close(point.alpha, float(scheduler.alphas[i]), rtol=1e-4, atol=1e-4)
        theirs = x * scheduler.betas[i] + output * scheduler.alphas[i]
        torch.testing.assert_close(flow.read(x, output, point).noise, theirs, rtol=1e-4, atol=1e-4)


def test_every_scheduler_of_diffusers_is_read_or_refused() -> None:
    """No scheduler class falls between: it is supported, or refused by name."""
    import diffusers.schedulers as module

    names = sorted({n for n in dir(module) if n.endswith("Scheduler") and n != "KarrasDiffusionSchedulers"})
    for name in names:
        if name in SUPPORTED:
            continue
        with pytest.raises(
            ValueError, match="jump to the data" if name in DISTILLED else "is not supported; supported"
        ):
            completed({"_class_name": name})


def test_schedulers_with_the_same_options_share_their_convention_or_are_told_apart() -> None:
    """A configuration without a class is that of the only kind with its options, and refused if one is distilled."""
    import diffusers.schedulers as module

    alike: dict[frozenset[str], list[str]] = {}
    for name in sorted(n for n in dir(module) if n.endswith("Scheduler")):
        options = set(inspect.signature(getattr(module, name)).parameters) - {"args", "kwargs"}
        alike.setdefault(frozenset(options), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1 and set(names) & set(SUPPORTED)]
    assert len(groups) >= 5
    for names in groups:
        known = next(n for n in names if n in SUPPORTED)
        config = {k: v for k, v in completed({"_class_name": known}).items() if k != "_class_name"}
        if set(names) <= set(SUPPORTED):
            each = [convention(completed({**config, "_class_name": n})) for n in names]
            assert len({(repr(c.path), c.prediction.name, c.clock) for c in each}) == 1
            assert completed(config)["_class_name"] in names
        else:
            assert set(names) - set(SUPPORTED) <= set(DISTILLED)
            with pytest.raises(ValueError, match="its configuration has no _class_name"):
                completed(config)


def test_refusals() -> None:
    config = completed(diffusers.UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="prediction_type = 'flow_prediction' is not supported"):
        convention({**config, "prediction_type": "flow_prediction"})
    with pytest.raises(ValueError, match="use_flow_sigmas and prediction_type = 'v_prediction' is not supported"):
        convention({**config, "prediction_type": "v_prediction", "use_flow_sigmas": True})
    with pytest.raises(ValueError, match="does not say which time its network reads"):
        as_flow(nn.Identity(), {"_class_name": "ScoreSdeVpScheduler"})
    with pytest.raises(ValueError, match="trained_betas is not supported"):
        convention(completed(diffusers.IPNDMScheduler(trained_betas=[0.1, 0.2])))
    for name in EDM_SCHEDULERS:
        edm = completed({"_class_name": name})
        with pytest.raises(ValueError, match="prediction_type = 'sample' is not supported"):
            convention({**edm, "prediction_type": "sample"})
    with pytest.raises(ValueError, match="beta_schedule = 'quadratic' is not supported"):
        alphas_cumprod({"num_train_timesteps": 10, "beta_schedule": "quadratic"})


def test_an_option_of_a_newer_version_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the named class has, but the installed version not yet, is read; what no class is known to have is left."""
    monkeypatch.setattr(options, "parameters", lambda name: {"num_train_timesteps": 1000})
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "an_option_to_come": 3}
    config = completed({"_class_name": "UniPCMultistepScheduler", **told})
    assert convention(config).path == CondOT()
    assert config["an_option_to_come"] == 3


def test_a_configuration_is_read_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the table of options, which is that of the installed version where that knows no more."""
    with_it = {n: completed({"_class_name": n}) for n in SUPPORTED}
    monkeypatch.setitem(sys.modules, "diffusers", None)
    without = {n: completed({"_class_name": n}) for n in SUPPORTED}
    for name in SUPPORTED:
        assert with_it[name].keys() >= without[name].keys()
        assert convention(without[name]).prediction.name == convention(with_it[name]).prediction.name
    if tuple(int(v) for v in diffusers.__version__.split(".")[:2]) == (0, 42):
        assert without == with_it
