"""Every family's pipeline, small: a Scheduler in it, `auto`, capture, a loaded directory and the command line.

The table of docs/pipelines.md is written from the same list, and a test holds it to that.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve import adapters

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from flowsolve.adapters.diffusers import Scheduler, capture  # noqa: E402
from flowsolve.adapters.diffusers.models import MODELS  # noqa: E402
from tests.adapters.families import FAMILIES, Family, latents  # noqa: E402
from tests.adapters.test_models import saved  # noqa: E402

TODAY = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 38)
pytestmark = pytest.mark.skipif(not TODAY, reason="the small networks have the options of today's classes")

STEPS = 5
CLOSE = 1e-3
"""Relative; float32 states and times, a few steps, through networks that amplify roundings."""
EVEN = {"DDPMScheduler": "DDIMScheduler", "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler"}
"""What stands for schedulers that draw noise."""
FIRST = {"DDIMScheduler": "ddim", "CogVideoXDDIMScheduler": "ddim", "PNDMScheduler": "ddim"}


@dataclass
class Held:
    """A family's pipeline, and its call with or without guidance."""

    family: Family
    pipe: Any
    call: dict[str, Any]

    @classmethod
    def of(cls, family: Family, guided: bool) -> Held:
        pipe, call = family.make(), family.call()
        kind = type(pipe.scheduler).__name__
        if kind in EVEN:
            pipe.scheduler = getattr(diffusers, EVEN[kind]).from_config(pipe.scheduler.config)
        names = inspect.signature(type(pipe).__call__).parameters
        if not guided:
            needed = {n for n, p in names.items() if p.default is inspect.Parameter.empty}
            call = {k: v for k, v in call.items() if not k.startswith("negative") or k in needed}
            scale = "true_cfg_scale" if "true_cfg_scale" in call else "max_guidance_scale"
            scale = scale if scale in call else "guidance_scale"
            neutral = 0.0 if type(pipe).__name__ in ("ZImagePipeline", "OmniGenPipeline") else 1.0
            call[scale] = 3.0 if not family.guided else neutral
        elif family.guided and not any("scale" in k for k in call):
            call["guidance_scale"] = 2.5
        return cls(family, pipe, call)

    @property
    def solver(self) -> str:
        """The name of the solver that the pipeline's scheduler is."""
        return "ddim" if self.family.solver == "ddpm" and "DDIM" in type(self.pipe.scheduler).__name__ else (
            "euler" if self.family.solver == "ddpm" else self.family.solver)  # fmt: skip

    def __call__(self, scheduler: Any = None, steps: int = STEPS) -> Tensor:
        """The latents with a scheduler in the place of its own."""
        own = self.pipe.scheduler
        self.pipe.scheduler = own if scheduler is None else scheduler
        try:
            out = self.pipe(**self.call, **self.rest(steps))
        finally:
            self.pipe.scheduler = own
        return latents(out).double()

    def rest(self, steps: int) -> dict[str, Any]:
        return {
            "num_inference_steps": steps, "generator": torch.Generator().manual_seed(7), "output_type": "latent",
        }  # fmt: skip

    def conditions(self, scheduler: Any) -> dict[str, Any]:
        """What the pipeline hands to its network beside state and time, on the first call."""
        seen: list[dict[str, Any]] = []
        net = getattr(self.pipe, self.family.part)
        model, signature = MODELS[self.family.net], inspect.signature(net.forward)

        def note(_: Any, args: Any, kwargs: Any) -> None:
            seen.append(dict(signature.bind(*args, **kwargs).arguments))

        with_hook = net.register_forward_pre_hook(note, with_kwargs=True)
        self(scheduler, 2)
        with_hook.remove()
        found = seen[0]
        state = found.pop(model.x)
        found.pop(model.time)
        found.pop("return_dict", None)
        if model.beside and net.config["in_channels"] != net.config["out_channels"]:
            found[model.beside] = state.narrow(model.axis, net.config["out_channels"],
                                               net.config["in_channels"] - net.config["out_channels"])  # fmt: skip
        for name in model.listed:
            found[name] = torch.stack(found[name])
        for name in model.layered:
            found[name] = found[name].transpose(0, 1)
        return {k: v for k, v in found.items() if v is not None and not (isinstance(v, dict) and not v)}


def off(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def once(scheduler: Any) -> Any:
    """A scheduler of diffusers without what is documented as different: a shift that is applied twice to the last level
    where a pipeline gives no levels, and times of flows that are truncated to whole steps.
    """
    kind: Any = type(scheduler)
    if kind.__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.use_dynamic_shifting:

        class Once(kind):  # type: ignore[misc]
            def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None,
                              mu: Any = None, timesteps: Any = None) -> None:  # fmt: skip
                if sigmas is None and timesteps is None:
                    sigmas = np.linspace(1.0, 1.0 / self.config.num_train_timesteps, num_inference_steps)
                super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

            def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
                return sample

    elif scheduler.config.get("use_flow_sigmas"):

        class Once(kind):  # type: ignore[misc,no-redef]
            def set_timesteps(self, num_inference_steps: Any = None, device: Any = None) -> None:
                super().set_timesteps(num_inference_steps, device)
                self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    else:
        return scheduler
    return Once.from_config(scheduler.config)


def names(family: Family) -> str:
    return family.pipeline


def first_order(held: Held) -> Scheduler:
    """A scheduler of order 1, whose nodes are those of the pipeline's own."""
    return Scheduler.from_config(held.pipe.scheduler, solver=FIRST.get(type(held.pipe.scheduler).__name__, "euler"))


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_a_scheduler_is_its_own_scheduler(family: Family) -> None:
    held = Held.of(family, guided=True)
    theirs = once(held.pipe.scheduler)
    own = held(theirs)
    ours = Scheduler.from_config(held.pipe.scheduler, solver=held.solver)
    if held.solver == "unipc":  # theirs begins at σ = 1 − 1e-6 on a flow, which their second step remembers
        nodes = [1.0 - float(v) for v in theirs.sigmas]
        ours = Scheduler.from_config(held.pipe.scheduler, solver=fs.solvers.UniPC(2, cooldown=True), grid=nodes)
    assert off(held(ours), own) < CLOSE
    other = held(Scheduler.from_config(held.pipe.scheduler, solver="heun"))
    assert off(other, own) > CLOSE


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_auto_converges(family: Family) -> None:
    """24 steps of `auto` are nearer to the ODE's solution than as many of order 1, whose nodes are the pipeline's.

    As far as the solution is known: to what the half of its steps changes.
    """
    held = Held.of(family, guided=True)
    fine = Scheduler.from_config(held.pipe.scheduler, solver="heun", grid="log_snr")
    true, known = held(fine, 120), held(fine, 60)
    found = held(Scheduler.from_config(held.pipe.scheduler, solver="auto"), 24)
    rough = held(first_order(held), 24)
    assert off(found, true) < off(rough, true) + off(known, true)


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_captured(family: Family) -> None:
    """On the nodes of the pipeline, a solve of the captured flow is the pipeline's run."""
    held = Held.of(family, guided=True)
    s = first_order(held)
    own = held(s)
    net = capture(held.pipe, **held.call, **held.rest(STEPS))
    found = solved(net.flow, net, s, net.cond)
    assert off(latents(net.decode(found)).double(), own) < CLOSE
    net.close()


def solved(flow: Any, net: Any, s: Scheduler, cond: Any) -> Tensor:
    nodes, plan = s.nodes, s._table.plan
    sol = fs.sample(
        flow, start=net.start, interval=(nodes[0], nodes[-1] if plan.closing is None else 1.0), solver=plan.solver,
        grid=nodes, cond=cond, final="path" if plan.closing is None else "denoise",
    )  # fmt: skip
    return sol.x


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_loaded(family: Family, tmp_path: Path) -> None:
    """The loaded directory, given what the pipeline gives to its network, makes what the pipeline makes."""
    held = Held.of(family, guided=False)
    if MODELS[family.net].unshifted:
        place = directory(held, tmp_path)
        with pytest.raises(ValueError, match=r"before the shift.*capture\(pipe, prompt"):
            adapters.load(place)
        return
    s = first_order(held)
    cond = {k: v if isinstance(v, Tensor | dict) else fs.shared(v) for k, v in held.conditions(s).items()}
    own = held(s)
    net = capture(held.pipe, **held.call, **held.rest(STEPS))
    flow = adapters.load(directory(held, tmp_path))
    assert off(latents(net.decode(solved(flow, net, s, cond))).double(), own) < CLOSE
    net.close()


def directory(held: Held, root: Path) -> Path:
    net = getattr(held.pipe, held.family.part)
    return saved(root / "net", held.family.part, net, held.pipe.scheduler, held.family.pipeline)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not MODELS[f.net].unshifted], ids=names)
def test_from_the_command_line(family: Family, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from flowsolve.cli.sample import sample

    app = typer.Typer()
    app.command()(sample)
    held = Held.of(family, guided=False)
    s = first_order(held)
    given, shape = held.conditions(s), tuple(held(s, 2).shape)
    np.savez(tmp_path / "cond.npz", **dict(flat(given)))
    place, out = directory(held, tmp_path), tmp_path / "out"
    result = CliRunner().invoke(app, [
        str(place), "--out", str(out), "-n", "1", "--shape", ",".join(map(str, shape[1:])), "--cond",
        str(tmp_path / "cond.npz"), "--solver", "euler", "--nfe", "3", "--raw", "--no-progress", "--device", "cpu",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    cond = {k: v if isinstance(v, Tensor | dict) else fs.shared(v) for k, v in given.items()}
    sol = fs.sample(adapters.load(place), shape=(1, *shape[1:]), solver="euler", nfe=3, seed=0, cond=cond)
    torch.testing.assert_close(torch.from_numpy(np.load(out / "samples.npz")["x"]), sol.x, rtol=1e-4, atol=1e-4)


def flat(tree: Any, at: str = "") -> Any:
    """(dotted name, array) pairs."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in parts:
        if isinstance(value, dict | list | tuple):
            yield from flat(value, f"{at}{name}.")
        elif value is not None:
            yield f"{at}{name}", value.numpy() if isinstance(value, Tensor) else np.asarray(value)


# --- the table in the documentation -----------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs/pipelines.md"


def row(family: Family) -> str:
    """The family in the table: every cell is one of the tests above, which has either outcome and no third."""
    own = EVEN.get(family.scheduler[0], family.scheduler[0]).removesuffix("Scheduler")
    alone = MODELS[family.net].unshifted
    cells = [
        f"`{family.pipeline}`",
        f"`{family.net}`",
        own,
        "yes",
        *(["refused: `capture`"] * 2 if alone else ["yes"] * 2),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_documented_table() -> None:
    found = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and "Scheduler" not in line
    ]
    assert sorted(row(f) for f in FAMILIES) == sorted(line for line in found if line.count("|") == 7)


if __name__ == "__main__":
    print("\n".join(map(row, FAMILIES)))
