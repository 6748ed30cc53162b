"""k-diffusion's wrappers, run side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowsolve import adapters
from flowsolve.paths import EDM, Trig
from tests.adapters.wrappers import load

external, layers = load("external"), load("layers")

TABLE = (1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()


class Inner(nn.Module):
    """A network with its own table, called as a module, as CompVis calls it, and with a learned variance."""

    def __init__(self, double: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(2, 4 if double else 2, 1)
        self.register_buffer("alphas_cumprod", TABLE)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen.append(t)
        return torch.tanh(self.mix(x)) + 1e-3 * t.to(x.dtype)[:, None, None, None]

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self(x, t)  # type: ignore[no-any-return]


class Diffusion:
    alphas_cumprod = TABLE.double().numpy()


def wrappers() -> dict[str, Any]:
    return {
        "eps": external.DiscreteEpsDDPMDenoiser(Inner(), TABLE, quantize=False),
        "eps-quantized": external.DiscreteEpsDDPMDenoiser(Inner(), TABLE, quantize=True),
        "openai": external.OpenAIDenoiser(Inner(double=True), Diffusion()),
        "compvis": external.CompVisDenoiser(Inner()),
        "v": external.DiscreteVDDPMDenoiser(Inner(), TABLE, quantize=False),
        "v-quantized": external.DiscreteVDDPMDenoiser(Inner(), TABLE, quantize=True),
        "v-continuous": external.VDenoiser(Inner()),
        "karras": layers.Denoiser(Inner(), sigma_data=0.7),
    }


@pytest.mark.parametrize("name", ["eps", "eps-quantized", "openai", "compvis", "v", "v-quantized", "karras"])
def test_denoised_states_and_times(name: str) -> None:
    """ẑ is the wrapper's, to 1e-6, and the network inside is told the wrapper's own time."""
    wrapper = wrappers()[name]
    said = {"sigma_min": 0.01, "sigma_max": 80.0} if name == "karras" else {}
    finding = adapters.inspect(wrapper, **said)
    assert (finding.format, finding.confidence) == ("k-diffusion", 1.0)
    low, high = (0.01, 80.0) if name == "karras" else (float(wrapper.sigmas[0]), float(wrapper.sigmas[-1]))
    assert finding.path == EDM(low, high)
    flow = finding.flow()
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    for t in (0.0, 0.31, 0.7, 0.97, 1.0):
        sigma = flow.path.sigma(t)
        with torch.no_grad():
            expected = wrapper(sigma * x, torch.full((2,), sigma))
            estimate = flow.estimate(sigma * x, t)
        inner = wrapper.inner_model.seen
        torch.testing.assert_close(inner[-1], inner[-2], rtol=0, atol=0)
        torch.testing.assert_close(estimate.data, expected, rtol=1e-5, atol=1e-6 * (1.0 + sigma))


def test_v_denoiser_is_the_circle() -> None:
    """VDenoiser at σ = tan(π(1 − t)/2) on z + σε is a v on sin(πt/2) z + cos(πt/2) ε at time 1 − t."""
    wrapper = wrappers()["v-continuous"]
    flow = adapters.load(wrapper)
    assert flow.path == Trig()
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    for t in (0.1, 0.5, 0.9):
        point = flow.path.at(t)
        sigma = point.sigma / point.alpha
        with torch.no_grad():
            expected = wrapper(x / point.alpha, torch.full((2,), sigma))
            torch.testing.assert_close(flow.data(x, t), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wrapper.inner_model.seen[-1], wrapper.inner_model.seen[-2], rtol=1e-5, atol=1e-6)


def test_a_karras_denoiser_needs_its_levels() -> None:
    with pytest.raises(adapters.Unrecognised, match=r"k-diffusion.*declare sigma_min= .*, and sigma_max="):
        adapters.load(wrappers()["karras"])
