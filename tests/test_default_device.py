"""torch's default device decides nothing here: tables and grids are the host's, what has the size of data is with them.

`meta` stands for any other device: a tensor that is made there by mistake has no values, and whatever reads it raises.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import flowsolve as fs
from flowsolve import training
from flowsolve.adapters.diffusers import Scheduler
from flowsolve.compat import torchdiffeq as compat
from flowsolve.noise import Noise
from flowsolve.paths import EDM, VP, CondOT, Discrete

FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.body(torch.cat((x, t[:, None].to(x)), 1)))
        return out


NET, X, TABLE = Net(), torch.linspace(-1.0, 1.0, 15).reshape(5, 3), Discrete.linear()
FLOWS = {"condot": (CondOT(), "velocity"), "table": (TABLE, "noise"), "vp": (VP(), "v"), "edm": (EDM(), "data")}


def flow(name: str = "table") -> fs.Flow:
    return fs.Flow(NET, *FLOWS[name])


def scheduled() -> Tensor:
    scheduler = Scheduler.from_config(DDPMScheduler().config, solver="unipc")
    scheduler.set_timesteps(5)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(NET(x, t.expand(5).float()), t, x).prev_sample
    return x


def loss(make: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: make(flow(), X, generator=torch.Generator("cpu").manual_seed(0))


CASES: dict[str, Callable[[], Any]] = {
    **{f"sample {n}": lambda n=n: fs.sample(flow(n), (5, 3), nfe=6, solver="heun", interval=(0, 0.9)) for n in FLOWS},
    **{
        f"sample {s}": lambda s=s: fs.sample(flow(), (5, 3), nfe=8, solver=s)
        for s in ("auto", "ddim", "ddpm", "unipc", "dpmpp_2m", "sa_solver", "euler_a")
    },
    "sample dopri5": lambda: fs.sample(flow(), (5, 3), solver="dopri5"),
    "sample in batches": lambda: fs.sample(flow(), (5, 3), solver="dopri5", batch=2),
    "sample by seeds, brownian": lambda: fs.sample(flow(), (5, 3), nfe=4, solver="ddpm", seed=[1, 2, 3, 4, 5]),
    "brownian": lambda: fs.sample(flow(), (5, 3), nfe=4, solver="ddpm", noise="brownian"),
    "sample t_eval": lambda: fs.sample(flow("condot"), start=X, solver="dopri5", t_eval=[0.2, 0.5]),
    "final": lambda: fs.sample(flow(), (5, 3), nfe=6, solver="unipc", final="denoise", grid="karras"),
    "encode": lambda: fs.encode(flow(), X, nfe=6, solver="heun"),
    "round_trip": lambda: fs.round_trip(flow("condot"), X, nfe=6, solver="heun"),
    "log_prob": lambda: fs.log_prob(flow("condot"), X, nfe=16),
    "log_prob exact": lambda: fs.log_prob(flow("vp"), X, nfe=16, trace="exact"),
    "log_prob dopri5": lambda: fs.log_prob(flow("condot"), X, solver="dopri5"),
    "log_prob xtrace": lambda: fs.log_prob(flow("condot"), X, nfe=16, trace="xtrace", probes=4),
    "sample_log_prob": lambda: fs.sample_log_prob(flow("condot"), (5, 3), nfe=16),
    "bits_per_dim": lambda: fs.bits_per_dim(flow("condot"), (X * 100 + 120).to(torch.uint8), nfe=16),
    "variational_bound": lambda: fs.variational_bound(flow("vp"), (X * 100 + 120).to(torch.uint8), draws=4),
    "solve": lambda: fs.solve(lambda t, y: -y * t, X, 0.0, 1.0, solver="dopri5"),
    "solve rk4": lambda: fs.solve(lambda t, y: -y * t, X, 0.0, 1.0, solver="rk4", nfe=8, t_eval=[0.5, 1.0]),
    "solve tree": lambda: fs.solve(lambda t, y: {"a": -y["a"]}, {"a": X}, 0.0, 1.0, solver="dopri8"),
    "compat": lambda: compat.odeint(lambda t, y: -y * t, X, torch.tensor([0.0, 1.0], device="cpu")),
    "stream": lambda: list(fs.batching.encode(flow(), [X, X[:2]], batch=3, solver="heun", nfe=4)),
    "cfm_loss": loss(training.cfm_loss),
    "dsm_loss": loss(training.dsm_loss),
    "Scheduler": scheduled,
    "noise": lambda: Noise.of(3, 5).normal(0, 1, X),
    "guided": lambda: (
        fs.sample(fs.guidance.rescaled(flow(), 0.5), (5, 3), nfe=4, solver="ddim")
        if hasattr(fs.guidance, "rescaled")
        else X
    ),
}


@pytest.mark.filterwarnings("ignore:the images use few")
@pytest.mark.parametrize("case", CASES)
def test_every_entry_gives_the_same_bits(case: str) -> None:
    expected = CASES[case]()
    with torch.device("meta"):
        found = CASES[case]()
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a result."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            assert leaf.device.type == "cpu"
            yield leaf
        elif hasattr(leaf, "__dataclass_fields__"):
            yield from leaves([getattr(leaf, name) for name in leaf.__dataclass_fields__])


def test_every_tensor_that_is_made_names_its_device() -> None:
    wrong = []
    for file in sorted(Path(fs.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            ours = isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES
            if ours and not any(k.arg in ("device", None) for k in node.keywords):
                wrong.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
