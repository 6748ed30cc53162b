"""guided-diffusion state dicts against the schedules of Ho et al. 2020 and Nichol & Dhariwal 2021, written out here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from flowsolve import adapters
from flowsolve.paths import Discrete
from tests.adapters.tiny import ADM


def table(schedule: str, steps: int) -> list[float]:
    if schedule == "linear":
        s = 1000 / steps
        betas = [s * 1e-4 + i * (s * 0.02 - s * 1e-4) / (steps - 1) for i in range(steps)]
    else:

        def bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)]
    product, found = 1.0, []
    for beta in betas:
        product *= 1.0 - beta
        found.append(product)
    return found


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("schedule", "steps", "rescale"), [("linear", 1000, False), ("cosine", 4000, True)])
def test_state_dicts(tmp_path: Path, channels: int, schedule: str, steps: int, rescale: bool) -> None:
    """Table, time and ε: half of the output's channels, however many there are."""
    net = ADM(channels)
    file = tmp_path / "model.pt"
    torch.save(net.state_dict(), file)
    blank = ADM(channels)
    for p in blank.parameters():
        torch.nn.init.zeros_(p)
    flow = adapters.load(file, net=blank, schedule=schedule, steps=steps, rescale_timesteps=rescale)
    expected = table(schedule, steps)
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    for k in (0, steps // 3, steps - 1):
        t = flow.path.time_from_native(float(k))
        assert flow.path.alpha(t) ** 2 == pytest.approx(expected[k], rel=1e-9)
        told = k * 1000.0 / steps if rescale else float(k)
        assert float(flow.clock(t)) == pytest.approx(told, rel=1e-9, abs=1e-9)
        with torch.no_grad():
            output = net(x, torch.full((2,), told))
            ours = flow.noise(x, t)
        assert output.shape[1] == 2 * channels
        torch.testing.assert_close(ours, output[:, :channels], rtol=1e-4, atol=1e-5)


def test_what_the_weights_do_not_say(tmp_path: Path) -> None:
    file = tmp_path / "64x64_diffusion.pt"
    torch.save(ADM(classes=10).state_dict(), file)
    with pytest.raises(adapters.Unrecognised, match=r"like guided-diffusion.*net= .*schedule='linear' or 'cosine'"):
        adapters.load(file)
    finding = adapters.inspect(file)
    assert "3 channels in, 6 out: a learned variance" in finding.evidence
    assert "label_emb: conditioned on y" in finding.evidence
    with pytest.raises(ValueError, match="schedule = 'sigmoid'; expected 'linear' or 'cosine'"):
        adapters.load(file, net=ADM(classes=10), schedule="sigmoid")


def test_the_names_alone_are_not_enough_without_a_learned_variance(tmp_path: Path) -> None:
    """torchcfm's networks have the same layers: the format must be said."""
    file = tmp_path / "model.pt"
    torch.save(ADM(learned=False).state_dict(), file)
    with pytest.raises(adapters.Unrecognised, match="declare format='guided-diffusion', if that is what it is"):
        adapters.load(file, net=ADM(learned=False), schedule="linear")
    flow = adapters.load(file, net=ADM(learned=False), schedule="linear", format="adm")
    assert flow.prediction.name == "noise"


def test_mismatched_weights_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(ADM(3).state_dict(), file)
    with pytest.raises(ValueError, match=r"model.pt holds 'input_blocks.0.0.weight' of shape \(8, 3, 3, 3\); this"):
        adapters.load(file, net=ADM(4), schedule="linear")
    with pytest.raises(ValueError, match=r"weights of .*model.pt do not belong to this ADM: .*label_emb.weight"):
        adapters.load(file, net=ADM(3, classes=5), schedule="linear")
    with pytest.raises(TypeError, match="net is a function; expected the torch module"):
        adapters.load(file, net=lambda x, t: x, schedule="linear")


def test_a_declared_table(tmp_path: Path) -> None:
    """path= in place of schedule=: the clock is the index of that table, scaled where it is rescaled."""
    file = tmp_path / "model.pt"
    torch.save(ADM().state_dict(), file)
    path = Discrete.linear(250)
    flow = adapters.load(file, net=ADM(), path=path)
    assert float(flow.clock(path.time_from_native(100.0))) == 100.0
    flow = adapters.load(file, net=ADM(), path=path, steps=250, rescale_timesteps=True)
    assert float(flow.clock(path.time_from_native(100.0))) == pytest.approx(400.0)


def test_a_network_in_memory() -> None:
    """Known by the package that its class is of; the schedule is asked for all the same."""

    class UNetModel(ADM):
        pass

    UNetModel.__module__ = "guided_diffusion.unet"
    with pytest.raises(adapters.Unrecognised, match=r"class UNetModel of guided_diffusion.*declare schedule="):
        adapters.load(UNetModel())
    flow = adapters.load(UNetModel(), schedule="linear")
    assert flow.path == Discrete.linear()
    assert flow.noise(torch.zeros(2, 3, 4, 4), 0.5).shape == (2, 3, 4, 4)
