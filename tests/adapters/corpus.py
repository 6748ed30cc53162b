"""Checkpoints in every format, generated tiny, and what is to be found of each."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flowsolve.adapters.diffusers import alphas_cumprod
from flowsolve.paths import EDM, VE, VP, CondOT, Discrete, SubVP, Trig
from flowsolve.paths import Path as Curve
from tests.adapters import tiny
from tests.adapters.test_edm import EDMPrecond, VPPrecond
from tests.adapters.test_exported import Net, Turned, program
from tests.adapters.wrappers import load

diffusers = pytest.importorskip("diffusers")
external, layers = load("external"), load("layers")

ONE = torch.ones(1)
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def discrete(
    schedule: str = "linear", steps: int = 1000, zero: bool = False, ends: tuple[float, float] = (1e-4, 0.02)
) -> Curve:
    return Discrete(
        alphas_cumprod(
            {
                "num_train_timesteps": steps,
                "beta_schedule": schedule,
                "beta_start": ends[0],
                "beta_end": ends[1],
                "rescale_betas_zero_snr": zero,
            }
        )
    )


LATENT = discrete("scaled_linear", ends=(0.00085, 0.012))


@dataclass
class Case:
    """How to make a checkpoint; what is to be found: format, path, prediction, native time at both ends; or refused.

    `load` is what makes it load where its files do not say enough; without, `refused` is in the message.
    """

    make: Callable[[Path], Any]
    format: str
    path: Curve | None = None
    prediction: str | None = None
    native: tuple[float, float] | None = None
    said: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None


def pipeline(part: str, model: Callable[[], Any], scheduler: Callable[[], Any], name: str = "Pipeline") -> Any:
    def make(root: Path) -> Path:
        model().save_pretrained(root / part)
        scheduler().save_pretrained(root / "scheduler")
        (root / "model_index.json").write_text(json.dumps({"_class_name": name, part: ["diffusers", "X"]}))
        return root

    return make


def torch_file(content: Callable[[], Any], name: str = "model.pt") -> Any:
    def make(root: Path) -> Path:
        root.mkdir()
        torch.save(content(), root / name)
        return root / name

    return make


def tensors_file(tensors: Callable[[], Any], metadata: dict[str, str] | None = None) -> Any:
    def make(root: Path) -> Path:
        root.mkdir()
        save_file({k: v.clone() for k, v in tensors().items()}, str(root / "model.safetensors"), metadata)
        return root / "model.safetensors"

    return make


def pickled(net: Callable[[], Any]) -> Any:
    def make(root: Path) -> Path:
        root.mkdir()
        (root / "network.pkl").write_bytes(pickle.dumps({"ema": net()}))
        return root / "network.pkl"

    return make


def exported(net: Callable[[], Any]) -> Any:
    def make(root: Path) -> Path:
        root.mkdir()
        torch.export.save(program(net()), root / "net.pt2")
        return root / "net.pt2"

    return make


def live(make: Callable[[], Any]) -> Any:
    return lambda root: make()


def karras() -> Any:
    return layers.Denoiser(nn.Identity(), sigma_data=0.5)


def scheduler(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**options)


def score_file() -> dict[str, Any]:
    net = tiny.NCSNpp()
    return {"optimizer": {}, "model": net.state_dict(), "ema": {"shadow_params": list(net.parameters())}, "step": 1}


def training_file(**args: Any) -> dict[str, Any]:
    state = tiny.DiT().state_dict()
    return {"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(**args)}


def config(sde: str, **model: float) -> Any:
    return SimpleNamespace(training=SimpleNamespace(sde=sde), model=SimpleNamespace(**model), data=None)


TABLE = LATENT.alphas_cumprod  # type: ignore[attr-defined]
SIGMAS = (((1 - torch.tensor(TABLE)) / torch.tensor(TABLE)) ** 0.5).tolist()  # in float32, as the wrappers do
V = "v behind preconditioning, sigma_data = 1"
K: tuple[float, float] = (999.0, 0.0)
FLOW_NET: dict[str, Any] = {"path": CondOT(), "prediction": "velocity", "time": "flow"}

CORPUS: dict[str, Case] = {
    # diffusers: pixels
    "ddpm": Case(pipeline("unet", tiny.unet, scheduler("DDPMScheduler")), "diffusers", discrete(), "noise", K),
    "ddim-cosine-v": Case(
        pipeline(
            "unet",
            tiny.unet,
            scheduler("DDIMScheduler", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        ),
        "diffusers",
        discrete("squaredcos_cap_v2"),
        "v",
        K,
    ),
    "ddpm-sample": Case(
        pipeline("unet", tiny.unet, scheduler("DDPMScheduler", prediction_type="sample", num_train_timesteps=100)),
        "diffusers",
        discrete(steps=100),
        "data",
        (99.0, 0.0),
    ),
    "ddpm-sigmoid": Case(
        pipeline("unet", tiny.unet, scheduler("DDPMScheduler", beta_schedule="sigmoid")),
        "diffusers",
        discrete("sigmoid"),
        "noise",
        K,
    ),
    "trained-betas": Case(
        pipeline("unet", tiny.unet, scheduler("DDIMScheduler", num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])),
        "diffusers",
        Discrete.from_betas([0.1, 0.2, 0.3]),
        "noise",
        (2.0, 0.0),
    ),
    "ncsnpp-ve": Case(
        pipeline("unet", lambda: tiny.unet(time_embedding_type="fourier"), scheduler("ScoreSdeVeScheduler")),
        "diffusers",
        VE(0.01, 1348.0),
        "score",
        (1348.0, 0.01),
    ),
    "score-sde-vp": Case(
        pipeline("unet", tiny.unet, lambda: __import__("diffusers.schedulers", fromlist=["x"]).ScoreSdeVpScheduler()),
        "diffusers",
        VP(),
        "noise",
        refused="time= ",
    ),
    "edm-euler": Case(
        pipeline("unet", tiny.unet, scheduler("EDMEulerScheduler")),
        "diffusers",
        EDM(),
        "F behind preconditioning, sigma_data = 0.5",
        (80.0, 0.002),
    ),
    "edm-exponential": Case(
        pipeline("unet", tiny.unet, scheduler("EDMDPMSolverMultistepScheduler", sigma_schedule="exponential")),
        "diffusers",
        VE(0.002, 80.0),
        "F behind preconditioning, sigma_data = 0.5",
        (80.0, 0.002),
    ),
    "flow-unet": Case(
        pipeline("unet", tiny.unet, scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)),
        "diffusers",
        CondOT(),
        "flow",
        (1000.0, 0.0),
    ),
    "flow-inverted": Case(
        pipeline("unet", tiny.unet, scheduler("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)),
        "diffusers",
        CondOT(),
        "velocity",
        (0.0, 1000.0),
    ),
    "flow-sigmas": Case(
        pipeline(
            "unet",
            tiny.unet,
            scheduler("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"),
        ),
        "diffusers",
        CondOT(),
        "flow",
        (1000.0, 0.0),
    ),
    # diffusers: latents
    "sd1": Case(
        pipeline("unet", tiny.unet_condition, scheduler("PNDMScheduler", **SD)), "diffusers", LATENT, "noise", K
    ),
    "sd2-v": Case(
        pipeline("unet", tiny.unet_condition, scheduler("DDIMScheduler", **SD, prediction_type="v_prediction")),
        "diffusers",
        LATENT,
        "v",
        K,
    ),
    "sdxl-ztsnr": Case(
        pipeline(
            "unet",
            lambda: tiny.unet_condition(xl=True),
            scheduler("EulerDiscreteScheduler", **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        ),
        "diffusers",
        discrete("scaled_linear", zero=True, ends=(0.00085, 0.012)),
        "v",
        K,
    ),
    "video-continuous": Case(
        pipeline(
            "unet",
            tiny.unet_condition,
            scheduler(
                "EulerDiscreteScheduler",
                prediction_type="v_prediction",
                timestep_type="continuous",
                sigma_min=0.002,
                sigma_max=700.0,
            ),
        ),
        "diffusers",
        EDM(0.002, 700.0),
        V,
        (700.0, 0.002),
    ),
    "dit": Case(pipeline("transformer", tiny.dit, scheduler("DDIMScheduler")), "diffusers", discrete(), "noise", K),
    "pixart": Case(
        pipeline("transformer", tiny.pixart, scheduler("DPMSolverMultistepScheduler")),
        "diffusers",
        discrete(),
        "noise",
        K,
    ),
    "sd3": Case(
        pipeline("transformer", tiny.sd3, scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)),
        "diffusers",
        CondOT(),
        "flow",
        (1000.0, 0.0),
    ),
    "flux": Case(
        pipeline("transformer", tiny.flux, scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)),
        "diffusers",
        CondOT(),
        "flow",
        (1000.0, 0.0),
    ),
    # diffusers: refused
    "lcm": Case(
        pipeline("unet", tiny.unet_condition, scheduler("LCMScheduler")), "diffusers", refused="jump to the data"
    ),
    "tcd": Case(
        pipeline("unet", tiny.unet_condition, scheduler("TCDScheduler")), "diffusers", refused="jump to the data"
    ),
    "consistency": Case(
        pipeline("unet", tiny.unet, scheduler("CMStochasticIterativeScheduler")),
        "diffusers",
        refused="jump to the data",
    ),
    "lcm-network": Case(
        pipeline("unet", lambda: tiny.unet_condition(time_cond_proj_dim=8), scheduler("DDIMScheduler")),
        "diffusers",
        refused="time_cond_proj_dim",
    ),
    "sdxl-turbo": Case(
        pipeline("unet", lambda: tiny.unet_condition(xl=True), scheduler("EulerAncestralDiscreteScheduler")),
        "diffusers",
        refused="its name says turbo",
    ),
    # EDM
    "edm-pickle": Case(
        pickled(EDMPrecond), "edm", said={"trust_pickle": True}, path=EDM(), prediction="data", native=(80.0, 0.002)
    ),
    "edm-vp-pickle": Case(
        pickled(VPPrecond),
        "edm",
        said={"trust_pickle": True},
        path=EDM(0.0033, 152.0),
        prediction="data",
        native=(152.0, 0.0033),
    ),
    "edm-live": Case(live(EDMPrecond), "edm", EDM(), "data", (80.0, 0.002)),
    # k-diffusion
    "k-eps": Case(
        live(lambda: external.DiscreteEpsDDPMDenoiser(nn.Identity(), torch.tensor(TABLE), True)),
        "k-diffusion",
        EDM(SIGMAS[0], SIGMAS[-1]),
        "noise",
        (SIGMAS[-1], SIGMAS[0]),
    ),
    "k-v": Case(
        live(lambda: external.DiscreteVDDPMDenoiser(nn.Identity(), torch.tensor(TABLE), False)),
        "k-diffusion",
        EDM(SIGMAS[0], SIGMAS[-1]),
        V,
        (SIGMAS[-1], SIGMAS[0]),
    ),
    "k-v-continuous": Case(live(lambda: external.VDenoiser(nn.Identity())), "k-diffusion", Trig(), "v", (1.0, 0.0)),
    "k-karras": Case(
        live(karras),
        "k-diffusion",
        EDM(0.01, 50.0),
        "F behind preconditioning, sigma_data = 0.5",
        (50.0, 0.01),
        said={"sigma_min": 0.01, "sigma_max": 50.0},
    ),
    # score_sde
    "score-vp": Case(
        torch_file(score_file), "score_sde", VP(), "noise", (999.0, 999e-5), {"sde": "vp", "net": tiny.NCSNpp()}
    ),
    "score-subvp": Case(
        torch_file(score_file), "score_sde", SubVP(), "noise", (999.0, 999e-5), {"sde": "subvp", "net": tiny.NCSNpp()}
    ),
    "score-ve-live": Case(
        live(lambda: tiny.NCSNpp(divide=True)), "score_sde", VE(), "score", (50.0, 0.01), {"sde": "ve"}
    ),
    "score-configured": Case(
        live(lambda: tiny.NCSNpp(config("vesde", sigma_min=0.01, sigma_max=90.0))),
        "score_sde",
        VE(0.01, 90.0),
        "score",
        (90.0, 0.01),
    ),
    # guided-diffusion
    "adm-linear": Case(
        torch_file(lambda: tiny.ADM().state_dict()),
        "guided-diffusion",
        discrete(),
        "noise",
        K,
        {"schedule": "linear", "net": tiny.ADM()},
    ),
    "adm-cosine-rescaled": Case(
        tensors_file(lambda: tiny.ADM(4).state_dict()),
        "guided-diffusion",
        discrete("squaredcos_cap_v2", steps=4000),
        "noise",
        (999.75, 0.0),
        {"schedule": "cosine", "steps": 4000, "rescale_timesteps": True, "net": tiny.ADM(4)},
    ),
    "adm-without-variance": Case(
        torch_file(lambda: tiny.ADM(learned=False).state_dict()),
        "guided-diffusion",
        discrete(),
        "noise",
        K,
        {"schedule": "linear", "net": tiny.ADM(learned=False), "format": "guided-diffusion"},
    ),
    # DiT and SiT
    "dit-weights": Case(
        torch_file(lambda: tiny.DiT().state_dict()), "dit", discrete(), "noise", K, {"format": "dit", "net": tiny.DiT()}
    ),
    "sit-weights": Case(
        torch_file(lambda: tiny.SiT().state_dict()),
        "sit",
        CondOT(),
        "velocity",
        (0.0, 1.0),
        {"format": "sit", "path_type": "Linear", "prediction": "velocity", "net": tiny.SiT()},
    ),
    "sit-args": Case(
        torch_file(lambda: training_file(path_type="GVP", prediction="noise")),
        "sit",
        Trig(),
        "noise",
        (0.0, 1.0),
        {"net": tiny.SiT()},
    ),
    "dit-args": Case(
        torch_file(lambda: training_file(model="DiT-XL/2")),
        "dit",
        discrete(),
        "noise",
        K,
        {"format": "dit", "net": tiny.DiT()},
    ),
    # velocity networks
    "torchcfm-file": Case(
        torch_file(lambda: {"net_model": Net().state_dict(), "ema_model": Net().state_dict(), "step": 1}),
        "torchcfm",
        CondOT(),
        "velocity",
        (0.0, 1.0),
        {"path": CondOT(), "net": Net()},
    ),
    "flow-matching-live": Case(
        live(Turned), "flow_matching", CondOT(), "velocity", (0.0, 1.0), {"format": "flow_matching", "path": CondOT()}
    ),
    # torch.export
    "pt2": Case(exported(Net), "export", CondOT(), "velocity", (0.0, 1.0), {**FLOW_NET, "trust_pickle": True}),
    "program": Case(live(lambda: program(Turned())), "export", CondOT(), "velocity", (0.0, 1.0), FLOW_NET),
    # single files
    "sd1-file": Case(
        tensors_file(tiny.ldm, {"modelspec.prediction_type": "epsilon"}),
        "stable-diffusion",
        LATENT,
        "noise",
        K,
        {"net": nn.Identity()},
    ),
    "sd2-file": Case(
        tensors_file(lambda: tiny.ldm(1024)),
        "stable-diffusion",
        LATENT,
        "v",
        K,
        {"prediction": "v", "net": nn.Identity()},
    ),
    "sdxl-ztsnr-file": Case(
        tensors_file(lambda: tiny.ldm(2048, v_pred=ONE, ztsnr=ONE)),
        "stable-diffusion",
        discrete("scaled_linear", zero=True, ends=(0.00085, 0.012)),
        "v",
        K,
        {"net": nn.Identity()},
    ),
    "playground-file": Case(
        tensors_file(lambda: tiny.ldm(2048, edm_mean=ONE, edm_std=ONE)),
        "stable-diffusion",
        EDM(),
        "F behind preconditioning, sigma_data = 0.5",
        (80.0, 0.002),
        {"net": nn.Identity()},
    ),
    "flux-file": Case(
        tensors_file(lambda: {"double_blocks.0.x": ONE, "img_in.weight": ONE, "guidance_in.in_layer.weight": ONE}),
        "stable-diffusion",
        CondOT(),
        "flow",
        (1.0, 0.0),
        {"net": nn.Identity()},
    ),
    "schnell-file": Case(
        tensors_file(lambda: {"double_blocks.0.x": ONE, "img_in.weight": ONE}),
        "stable-diffusion",
        refused="schnell",
        said={"net": nn.Identity()},
    ),
    "model-file": Case(
        tensors_file(lambda: tiny.unet().state_dict()),
        "diffusers",
        refused="give the directory that holds them",
    ),
    # nothing known
    "unknown-weights": Case(
        torch_file(lambda: nn.Linear(3, 2).state_dict()),
        "plain",
        VP(),
        "noise",
        (1.0, 1e-5),
        {"path": VP(), "prediction": "noise", "time": "native", "net": nn.Linear(3, 2)},
    ),
    "unknown-callable": Case(
        live(lambda: lambda x, t: x),
        "plain",
        CondOT(),
        "velocity",
        (0.0, 1.0),
        {"path": CondOT(), "prediction": "velocity"},
    ),
}
