"""EDM networks against Table 1 of Karras et al. 2022, written out here for all four preconditionings."""

from __future__ import annotations

import math
import pickle
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import adapters
from flowsolve.adapters.networks import Preconditioned, Preconditioning, preconditioned
from flowsolve.paths import EDM

BETA_D, BETA_MIN, STEPS = 19.9, 0.1, 1000


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)) + 0.01 * c[:, None, None, None]


class Denoiser(nn.Module):
    """D(x; σ) = c_skip x + c_out F(c_in x, c_noise), with the columns of Table 1."""

    label_dim = 0

    def __init__(self) -> None:
        super().__init__()
        self.model = Raw()

    def columns(self, sigma: Tensor) -> tuple[Any, Any, Any, Any]:
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.to(x.dtype)
        skip, out, scale, noise = self.columns(sigma)
        broad = [v if not isinstance(v, Tensor) else v[:, None, None, None] for v in (skip, out, scale)]
        return broad[0] * x + broad[1] * self.model(broad[2] * x, noise)  # type: ignore[no-any-return]

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


class VPPrecond(Denoiser):
    sigma_min, sigma_max = 0.0033, 152.0

    def columns(self, sigma: Tensor) -> tuple[Any, Any, Any, Any]:
        t = ((BETA_MIN**2 + 2 * BETA_D * (1 + sigma**2).log()).sqrt() - BETA_MIN) / BETA_D
        return 1.0, -sigma, (1 + sigma**2).rsqrt(), (STEPS - 1) * t


class VEPrecond(Denoiser):
    sigma_min, sigma_max = 0.02, 100.0

    def columns(self, sigma: Tensor) -> tuple[Any, Any, Any, Any]:
        return 1.0, sigma, 1.0, (0.5 * sigma).log()


class iDDPMPrecond(Denoiser):
    sigma_min, sigma_max = 0.0064, 80.9

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.logspace(math.log10(80.9), math.log10(0.0064), STEPS))

    def columns(self, sigma: Tensor) -> tuple[Any, Any, Any, Any]:
        index = (sigma[:, None] - self.u).abs().argmin(1)
        return 1.0, -sigma, (1 + sigma**2).rsqrt(), (STEPS - 1 - index).to(sigma.dtype)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.u[(sigma[:, None] - self.u).abs().argmin(1)]  # type: ignore[no-any-return]


class EDMPrecond(Denoiser):
    sigma_min, sigma_max, sigma_data, label_dim = 0.0, math.inf, 0.5, 10

    def columns(self, sigma: Tensor) -> tuple[Any, Any, Any, Any]:
        norm = (sigma**2 + self.sigma_data**2).sqrt()
        return self.sigma_data**2 / norm**2, sigma * self.sigma_data / norm, 1 / norm, sigma.log() / 4


RANGES = {VPPrecond: (0.0033, 152.0), VEPrecond: (0.02, 100.0), iDDPMPrecond: (0.0064, 80.9), EDMPrecond: (0.002, 80.0)}


@pytest.mark.parametrize("kind", RANGES, ids=lambda k: k.__name__)
def test_denoisers(kind: type[Denoiser]) -> None:
    """Path, clock and data estimate are the denoiser's own, at every σ of its range."""
    net = kind()
    finding = adapters.inspect(net)
    assert (finding.format, finding.confidence, finding.prediction.name) == ("edm", 1.0, "data")  # type: ignore[union-attr]
    low, high = RANGES[kind]
    assert finding.path == EDM(low, high)
    assert finding.native == pytest.approx((high, low))
    flow = finding.flow()
    assert flow.path.prior_std == high
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for i in range(11):
        sigma = (high ** (1 / 7) + i / 10 * (low ** (1 / 7) - high ** (1 / 7))) ** 7  # their eq. 5
        with torch.no_grad():
            expected = net(sigma * x, torch.full((3,), sigma))
            estimate = flow.estimate(sigma * x, i / 10)
        torch.testing.assert_close(estimate.data, expected, rtol=1e-5, atol=1e-6 * (1 + sigma))


def test_ode_is_theirs() -> None:
    """Euler in σ on dx/dσ = (x − D)/σ (their algorithm 1 without the correction) is DDIM on the path."""
    net = EDMPrecond()
    flow = adapters.load(net)
    n = 8
    start = 80.0 * torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    sol = fs.sample(flow, start=start, solver=fs.solvers.DDIM(), grid="uniform", nfe=n, interval=(0.0, 1.0))
    sigmas = [(80 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n + 1)]
    x = start
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            x = x + (after - now) * (x - net(x, torch.full((2,), now))) / now
    torch.testing.assert_close(sol.x, x, rtol=1e-4, atol=1e-4)


def test_the_row_of_a_raw_network() -> None:
    """F behind preconditioning, read by its row, is D = c_skip x + c_out F; its negative is a v."""
    net = EDMPrecond()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for sign in (1.0, -1.0):
        raw = Preconditioned(lambda y, c, sign=sign: sign * net.model(y, c), Preconditioning(0.5))
        flow = fs.Flow(raw, EDM(), preconditioned(0.5, v=sign < 0), time="native")
        for t in (0.0, 0.5, 1.0):
            sigma = EDM().sigma(t)
            with torch.no_grad():
                data = flow.data(sigma * x, t)
                torch.testing.assert_close(
                    data, net(sigma * x, torch.full((3,), sigma)), rtol=1e-4, atol=1e-5 * (1 + sigma)
                )


def test_declared_levels_and_data() -> None:
    assert adapters.load(EDMPrecond(), sigma_min=0.01, sigma_max=50.0, rho=5.0).path == EDM(0.01, 50.0, 5.0)
    with pytest.raises(TypeError, match="edm takes no schedule; it takes path, prediction"):
        adapters.load(EDMPrecond(), schedule="linear")


def test_pickles_need_trust(tmp_path: Path) -> None:
    """Refused with the risk named; with trust, the 'ema' entry is the network."""
    net = EDMPrecond()
    file = tmp_path / "edm-cifar10.pkl"
    file.write_bytes(pickle.dumps({"ema": net, "augment_pipe": None}))
    finding = adapters.inspect(file)
    assert (finding.format, finding.ready) == ("edm", False)
    assert "EDMPrecond" in " ".join(finding.evidence)
    with pytest.raises(adapters.Unrecognised, match=r"trust_pickle=True \(reading it runs code that is in the file"):
        adapters.load(file)
    flow = adapters.load(file, trust_pickle=True)
    assert flow.path == EDM()
    x = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(flow.net(x, torch.ones(2)), net(x, torch.ones(2)))
    file.write_bytes(pickle.dumps({"G": net}))
    with pytest.raises(ValueError, match=r"edm-cifar10.pkl holds G; expected an entry 'ema'"):
        adapters.load(file, trust_pickle=True)


def test_pickles_that_carry_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published files are: a rebuilding function of torch_utils with the class's name in its arguments."""
    built = []

    def rebuild(meta: dict[str, Any]) -> nn.Module:
        built.append(meta["class_name"])
        return EDMPrecond()

    module, package = types.ModuleType("torch_utils.persistence"), types.ModuleType("torch_utils")
    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = rebuild  # type: ignore[attr-defined]
    package.persistence = module  # type: ignore[attr-defined]

    class Stored:
        def __reduce__(self) -> Any:
            return rebuild, ({"type": "class", "module_src": "import os", "class_name": "EDMPrecond", "state": {}},)

    file = tmp_path / "edm.pkl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch_utils", package)
        patch.setitem(sys.modules, "torch_utils.persistence", module)
        file.write_bytes(pickle.dumps({"ema": Stored()}))
        finding = adapters.inspect(file)
        assert (finding.format, finding.confidence, built) == ("edm", 0.95, [])
        assert adapters.load(file, trust_pickle=True).path == EDM()
        assert built == ["EDMPrecond"]
    with pytest.raises(ValueError, match=r"edm.pkl needs the module 'torch_utils' of the repository that wrote it"):
        adapters.load(file, trust_pickle=True)
