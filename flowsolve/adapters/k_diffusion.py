r"""k-diffusion's wrappers: the class of the wrapper is the convention.

All of them are denoisers on $x = z + \sigma\varepsilon$. The network inside is asked as its wrapper asks it, with
$c_{in}\,x$ at the wrapper's own time (`sigma_to_t`, rounded to the table where the wrapper says `quantize`), and its
output is read by its own row:

| wrapper | path | output |
|---|---|---|
| `DiscreteEpsDDPMDenoiser`, `OpenAIDenoiser`, `CompVisDenoiser` | `EDM` between the ends of its table | ε |
| `DiscreteVDDPMDenoiser`, `CompVisVDenoiser` | the same | v behind preconditioning, $\sigma_d = 1$ |
| `VDenoiser` | `Trig`, time $\tfrac2\pi\arctan\sigma = 1 - t$ | v |
| `Denoiser` | `EDM`, with `sigma_min` and `sigma_max` declared | F behind preconditioning, its $\sigma_d$ |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flowsolve._batch import per_sample
from flowsolve.adapters.clocks import Linear
from flowsolve.adapters.files import Source
from flowsolve.adapters.finding import Finding
from flowsolve.adapters.networks import Wrapper, place, preconditioned
from flowsolve.paths import EDM, Trig
from flowsolve.predictions import PREDICTIONS
from flowsolve.transforms import Range

__all__ = ["DECLARES", "NAMES", "recognise"]

NAMES = ("k-diffusion",)
DECLARES = ("sigma_min", "sigma_max", "rho")


class Scaled(Wrapper):
    """The network inside a wrapper, at c_in x and the wrapper's time for σ."""

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        wrapper: Any = self.net
        fed = per_sample(wrapper.get_scalings(sigma)[-1], x) * x
        if not hasattr(wrapper, "sigma_to_t"):
            return wrapper.inner_model(fed, sigma, **cond)  # type: ignore[no-any-return]
        ask = wrapper.get_eps if hasattr(wrapper, "get_eps") else wrapper.get_v
        return ask(fed, wrapper.sigma_to_t(sigma), **cond)  # type: ignore[no-any-return]


def recognise(source: Source, said: Mapping[str, Any], asked: bool) -> Finding | None:
    """One of k-diffusion's wrappers."""
    if source.kind != "object" or not isinstance(source.given, nn.Module):
        return None
    net: Any = source.given
    known = [c.__name__ for c in type(net).__mro__ if "k_diffusion" in c.__module__.split(".")]
    kinds = ("DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser", "VDenoiser", "Denoiser")
    kind = next((k for k in kinds if k in known), None)
    if kind is None:
        return None
    name = type(net).__name__
    rho = float(said.get("rho", 7.0))
    common: dict[str, Any] = {"parameters": sum(p.numel() for p in net.parameters()), "transform": Range(-1.0, 1.0)}

    def network(device: Any, dtype: Any) -> Any:
        return Scaled(place(net, device, dtype)).eval()

    if kind == "VDenoiser":
        return Finding(
            f"a {name}", NAMES[0], 1.0, (f"class {name} of k-diffusion",), Trig(), PREDICTIONS["v"],
            Linear(1.0, falling=True), "1 − t = (2/π) arctan σ",
            network=lambda device, dtype: place(net.inner_model, device, dtype), **common,
        )  # fmt: skip
    if kind == "Denoiser":
        data = float(net.sigma_data)
        ends: list[Any] = [said.get(k) for k in ("sigma_min", "sigma_max")]
        return Finding(
            f"a {name}", NAMES[0], 1.0, (f"class {name} of k-diffusion, sigma_data = {data:g}",),
            EDM(float(ends[0]), float(ends[1]), rho) if None not in ends else None, preconditioned(data), "native", "σ",
            missing=tuple(f"{k}= (the noise levels it was trained on)" for k in DECLARES[:2] if said.get(k) is None),
            network=network, **common,
        )  # fmt: skip
    table = net.sigmas
    low, high = (float(said.get(k) or v) for k, v in zip(DECLARES, (table[0], table[-1]), strict=False))
    rounding = "rounded to whole numbers" if net.quantize else "interpolated in log σ"
    return Finding(
        f"a {name}", NAMES[0], 1.0,
        (f"class {name} of k-diffusion", f"its table of {len(table)} σ, {float(table[0]):.4g} … {float(table[-1]):.4g}",
         f"quantize = {net.quantize}: its index is {rounding}"),
        EDM(low, high, rho), PREDICTIONS["noise"] if kind == kinds[0] else preconditioned(1.0, v=True), "native",
        "σ, which the wrapper turns into its index", network=network, **common,
    )  # fmt: skip
