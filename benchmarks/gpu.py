r"""What flowsolve costs beside the network on an accelerator, against its peers, all in one process.

    python benchmarks/gpu.py                      # 4 minutes on an H100 or H200; small, and marked so, on a CPU
    python benchmarks/gpu.py --only eager noise   # these parts only

| part | what is measured | target |
|---|---|---|
| `eager` | overhead of an evaluation on a fixed grid, (4096, 2), beside the network alone | 1/3 of the peer's |
| `adaptive` | the same of Dopri5 at 1e-5, on y' = −y/2 of three sizes and on a small flow | 1/3 of torchdiffeq's |
| `noise` | the noise of a step over `torch.randn` | 1.2 |
| `crossings` | copies to the device and back, of a fixed grid and of an attempt (the profiler's count) | |
| `captured` | a recorded solve over as many replays of the recorded network, a small one | 1.1 |
| | the same for a UNet of 36 M in bfloat16 at batch 64 | 1.02 |
| | a recorded adaptive solve over the eager one, small network | 1/2 |
| `likelihood` | bits/dim of 512 digits, recorded over eager | 1/3 |
| `patches` | evaluations against error on photographs (`networks/patches-condot`), ours and diffusers' | |
| `cold` | a first Dopri5 solve of 50 evaluations in a new process, ours over torchdiffeq's | 1 |

Cases of a part take turns, after one run of each; the device is waited for after each case; times have their quartiles
and ratios are taken repetition by repetition. Peers that are not installed are left out. The record (JSON) says which
targets were met.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sections.measure import interleaved, quartiles, ratio, target
from sections.peers import available, facts
from sections.samplers import Ask, peers
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import kernels
from flowsolve.adapters import bundled, load
from flowsolve.bench.record import environment
from flowsolve.capture import Recording
from flowsolve.noise import Noise
from flowsolve.problems import digits

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
STEPS = 50
Found = dict[str, Any]


class Small(nn.Module):
    """A network whose kernels are short: 2 → 64 → 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(3, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.leave(nn.functional.silu(self.enter(torch.cat((x, t[:, None]), 1))))
        return out


def waited(f: Callable[[], Any]) -> Callable[[], Any]:
    """A case that ends when the device has."""

    def run() -> None:
        f()
        if CUDA:
            torch.cuda.synchronize()

    return run


def timed(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every case; three runs of each come first, in which what is compiled gets compiled."""
    ready = {name: waited(f) for name, f in cases.items()}
    for f in ready.values():
        f()
        f()
    return interleaved(ready, repeats)


def row(name: str, ours: list[float], theirs: list[float] | None, limit: float | None, unit: float = 1e6) -> Found:
    """A line of the record: ours, the peer's, their ratio and the target."""
    found: Found = {"name": name, "ours": quartiles([unit * v for v in ours])}
    if theirs is not None:
        found["peer"] = quartiles([unit * v for v in theirs])
        found["ratio"] = ratio(ours, theirs)
        if limit is not None:
            found["target"] = target(name, found["ratio"]["median"], limit)
    return found


def eager(quick: bool) -> list[Found]:
    """Microseconds of overhead for each evaluation."""
    net, x = Small().to(DEVICE).eval(), torch.randn(4096, 2, device=DEVICE)
    t = torch.full((len(x),), 0.5, device=DEVICE)
    straight = fs.Flow(net, fs.paths.CondOT(), "velocity")
    table = fs.Flow(net, fs.paths.Discrete.linear(), "noise")
    diffusers, torchdiffeq = available("diffusers"), available("torchdiffeq")

    def ours(flow: fs.Flow, solver: Any) -> Callable[[], Any]:
        return lambda: fs.sample(flow, start=x, solver=solver, nfe=STEPS)

    def scheduled(name: str) -> Callable[[], Any] | None:
        if diffusers is None:
            return None
        scheduler = getattr(diffusers, name)()

        def loop() -> None:
            scheduler.set_timesteps(STEPS, device=DEVICE)
            y = x
            for k in scheduler.timesteps:
                y = scheduler.step(net(y, k.expand(len(y)).float()), k, y).prev_sample

        return loop

    span = torch.tensor([0.0, 1.0], device=DEVICE)
    options = {"step_size": 1.0 / STEPS}
    theirs = None
    if torchdiffeq is not None:
        theirs = lambda: torchdiffeq.odeint(  # noqa: E731
            lambda t, y: net(y, t.expand(len(y))), x, span, method="euler", options=options
        )
    cases = {
        "Euler | torchdiffeq": (ours(straight, "euler"), theirs),
        "DDIM | diffusers": (ours(table, "ddim"), scheduled("DDIMScheduler")),
        "DPM-Solver++ | diffusers": (ours(table, "dpmpp_2m"), scheduled("DPMSolverMultistepScheduler")),
        "UniPC | diffusers": (ours(table, "unipc"), scheduled("UniPCMultistepScheduler")),
        "auto | diffusers' UniPC": (ours(table, "auto"), scheduled("UniPCMultistepScheduler")),
        "DDPM | diffusers": (ours(table, "ddpm"), scheduled("DDPMScheduler")),
        "SA-Solver | diffusers": (ours(table, fs.solvers.SASolver()), scheduled("SASolverScheduler")),
    }
    found = []
    with kernels.use("fused"):
        for name, (mine, peer) in cases.items():
            group: dict[str, Callable[[], Any]] = {"ours": mine, "net": lambda: [net(x, t) for _ in range(STEPS)]}
            if peer is not None:
                group["peer"] = peer
            seconds = timed(group, 5 if quick else 15)
            less = [v / STEPS for v in seconds["net"]]
            each = {
                k: [max(v / STEPS - n, 1e-9) for v, n in zip(seconds[k], less, strict=True)]
                for k in group
                if k != "net"
            }
            found.append(row(f"eager {name}, µs an evaluation", each["ours"], each.get("peer"), 1 / 3))
    return found


def adaptive(quick: bool) -> list[Found]:
    """Microseconds of overhead for each evaluation of Dopri5."""
    peer, found = available("torchdiffeq"), []
    span, solver = torch.tensor([0.0, 1.0], device=DEVICE), fs.solvers.Dopri5(1e-5, 1e-5)
    shapes = [(256, 2), (64, 3, 32, 32), *([] if quick else [(256, 3, 64, 64)])]
    for shape in shapes:
        y = torch.randn(shape, device=DEVICE)
        calls = int(fs.solve(lambda t, y: -0.5 * y, y, 0.0, 1.0, solver=solver).nfe.max())
        counted = [0]

        def field(t: Any, y: Tensor, counted: list[int] = counted) -> Tensor:
            counted[0] += 1
            return -0.5 * y

        group: dict[str, Callable[[], Any]] = {
            "ours": lambda y=y: fs.solve(lambda t, y: -0.5 * y, y, 0.0, 1.0, solver=solver),
            "field": lambda y=y: [-0.5 * y for _ in range(100)],
        }
        if peer is not None:
            peer.odeint(field, y, span, method="dopri5", rtol=1e-5, atol=1e-5)
            group["peer"] = lambda y=y, f=field: peer.odeint(f, y, span, method="dopri5", rtol=1e-5, atol=1e-5)
        theirs = counted[0]
        with kernels.use("fused"):
            seconds = timed(group, 5 if quick else 15)
        alone = [v / 100 for v in seconds["field"]]
        mine = [max(v / calls - a, 1e-9) for v, a in zip(seconds["ours"], alone, strict=True)]
        other = None
        if theirs:
            other = [max(v / theirs - a, 1e-9) for v, a in zip(seconds["peer"], alone, strict=True)]
        found.append(row(f"Dopri5 {shape} | torchdiffeq, µs an evaluation", mine, other, 1 / 3))
    return found


def noise(quick: bool) -> list[Found]:
    """The noise of a step over torch.randn."""
    found = []
    for shape in [(16, 2), (64, 3072)]:
        like, source = torch.empty(shape, device=DEVICE), Noise.of(0, shape[0])
        with kernels.use("fused"):
            seconds = timed(
                {
                    "ours": lambda like=like, source=source: [
                        source.step(i / STEPS, (i + 1) / STEPS, like) for i in range(STEPS)
                    ],
                    "peer": lambda shape=shape: [torch.randn(shape, device=DEVICE) for _ in range(STEPS)],
                },
                5 if quick else 31,
            )
        mine, theirs = ([v / STEPS for v in seconds[k]] for k in ("ours", "peer"))
        found.append(row(f"noise {shape} | randn, µs", mine, theirs, 1.2))
    return found


def crossings(quick: bool) -> list[Found]:
    """Copies between host and device, and launches, by the profiler."""
    if not CUDA:
        return []
    from torch.profiler import ProfilerActivity, profile

    net = Small().to(DEVICE).eval()
    flow, x = fs.Flow(net, fs.paths.CondOT(), "velocity"), torch.randn(256, 2, device=DEVICE)

    def counted(f: Callable[[], Any]) -> dict[str, int]:
        f()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            waited(f)()
        events = {e.key: e.count for e in trace.key_averages()}
        return {
            "to the device": sum(n for k, n in events.items() if k.startswith("Memcpy HtoD")),
            "to the host": sum(n for k, n in events.items() if k.startswith("Memcpy DtoH")),
            "launches": sum(n for k, n in events.items() if "Launch" in k and k.startswith("cu")),
        }

    found = []
    with kernels.use("fused"):
        for name in ("euler", "ddpm", "unipc"):
            counts = [
                counted(lambda n=n, name=name: fs.sample(flow, start=x, solver=name, nfe=n, interval=(0.0, 0.99)))
                for n in (20, 60)
            ]
            each = {k: (counts[1][k] - counts[0][k]) / 40 for k in counts[0]}
            found.append({"name": f"crossings of an evaluation, {name}", "each": each, "of 20": counts[0]})
        runs = []
        for step in (0.1, 0.025):
            solver = fs.solvers.Dopri5(max_step=step)
            made = fs.sample(flow, start=x, solver=solver)
            tries = int((made.accepted + made.rejected).max())
            runs.append((counted(lambda s=solver: fs.sample(flow, start=x, solver=s)), tries))
        (few, n), (many, m) = runs
        each = {k: (many[k] - few[k]) / (m - n) for k in few}
        found.append({"name": "crossings of an attempt, Dopri5", "each": each})
    return found


def captured(quick: bool) -> list[Found]:
    """Recorded solves over replays of the recorded network alone, and over eager solves."""
    if not CUDA:
        return []
    found = []
    diffusers = available("diffusers")
    cases: list[tuple[str, Any, tuple[int, ...], torch.dtype, float]] = [
        ("small network", Small(), (4096, 2), torch.float32, 1.1)
    ]
    if diffusers is not None:
        unet = diffusers.UNet2DModel(
            sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        )  # fmt: skip
        cases.append(("UNet, bfloat16", unet, (64, 3, 32, 32), torch.bfloat16, 1.02))
    for name, net, shape, dtype, limit in cases:
        net = net.to(DEVICE, dtype).eval()
        call = net if isinstance(net, Small) else _sampled(net)
        flow, x = fs.Flow(call, fs.paths.Discrete.linear(), "noise", time="native"), torch.randn(shape, device=DEVICE)
        t = torch.full((len(x),), 500.0, device=DEVICE)
        alone = Recording(lambda v, call=call, dtype=dtype: [call(v[0].to(dtype), v[1]).float()], [x, t])
        group = {
            "network": lambda alone=alone: [alone.replay() for _ in range(STEPS)],
            "captured": lambda f=flow, x=x: fs.sample(f, start=x, solver="unipc", nfe=STEPS, capture=True),
            "ddim": lambda f=flow, x=x: fs.sample(f, start=x, solver="ddim", nfe=STEPS, capture=True),
            "eager": lambda f=flow, x=x: fs.sample(f, start=x, solver="unipc", nfe=STEPS),
        }
        with kernels.use("fused"):
            seconds = timed(group, 5)
        made = {"captured UniPC": "captured", "captured DDIM": "ddim"}
        for what, key in made.items():
            if key in seconds:
                found.append(row(f"{what}, {name} | replays of it, ms", seconds[key], seconds["network"], limit, 1e3))
        found.append(row(f"eager UniPC, {name} | replays of it, ms", seconds["eager"], seconds["network"], None, 1e3))
    flow, x = fs.Flow(Small().to(DEVICE).eval(), fs.paths.CondOT(), "velocity"), torch.randn(4096, 2, device=DEVICE)
    solver = fs.solvers.Dopri5(1e-5, 1e-5)
    with kernels.use("fused"):
        seconds = timed(
            {
                "captured": lambda: fs.sample(flow, start=x, solver=solver, capture=True),
                "eager": lambda: fs.sample(flow, start=x, solver=solver),
            },
            5 if quick else 15,
        )
    found.append(row("captured Dopri5, small network | eager, ms", seconds["captured"], seconds["eager"], 0.5, 1e3))
    return found


def _sampled(net: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t).sample
        return out

    return _Wrapped(net, call)


class _Wrapped(nn.Module):
    """A network of diffusers that returns its tensor."""

    def __init__(self, net: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(x, t)


def likelihood(quick: bool) -> list[Found]:
    """Bits/dim of digits, recorded and eager."""
    flow = load(bundled("digits-condot"))
    flow.net.to(DEVICE)
    images = digits.load("all").images[: 32 if quick else 512].to(DEVICE)

    def run(capture: bool) -> Callable[[], Any]:
        return lambda: fs.bits_per_dim(flow, images, levels=17, nfe=48, capture=capture)

    seconds = timed({"eager": run(False), **({"captured": run(True)} if CUDA else {})}, 3)
    if not CUDA:
        return [row("bits/dim of digits, eager, s", seconds["eager"], None, None, 1.0)]
    gap = float((run(True)().bpd - run(False)().bpd).abs().max())
    made = row("bits/dim of 512 digits, captured | eager, s", seconds["captured"], seconds["eager"], 1 / 3, 1.0)
    return [{**made, "largest difference, bits/dim": gap}]


@torch.no_grad()
def patches(quick: bool) -> list[Found]:
    """The median relative error of 8 samples of photographs, against evaluations."""
    flow = load(str(HERE / "networks" / "patches-condot"))
    flow.net.to(DEVICE)
    x = torch.randn(2 if quick else 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = fs.sample(flow, start=x, solver=fs.solvers.Dopri5(1e-5, 1e-5), throw=False).x

    def error(y: Tensor) -> float:
        off = (y.float() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        return float(off.median())

    solvers = {
        "auto": ("auto", None), "UniPC, karras": ("unipc", "karras"), "UniPC, log_snr": ("unipc", "log_snr"),
        "DPM-Solver++, karras": ("dpmpp_2m", "karras"), "Euler": ("euler", None),
    }  # fmt: skip
    found = []
    for nfe in (5, 10) if quick else (5, 8, 10, 15, 20, 40):
        ours = {}
        for name, (solver, grid) in solvers.items():
            ours[name] = error(fs.sample(flow, start=x, solver=solver, grid=grid, nfe=nfe).x)
        theirs = {}
        for peer in peers(flow):
            if peer.library == "diffusers":
                try:
                    theirs[peer.name] = error(peer.run(Ask(flow, torch.float32), x, nfe))
                except Exception as problem:  # of another's sampler, whatever it is
                    theirs[peer.name] = str(problem)[:80]
        found.append({"name": f"patches-condot, {nfe} evaluations", "ours": ours, "diffusers": theirs})
    return found


COLD = """
import time, torch
torch.set_grad_enabled(False)
y = torch.randn(256, 2, device={device!r})
(y + 1).sum().item()
begin = time.perf_counter()
{body}
{wait}
print(time.perf_counter() - begin)
"""
BODIES = {
    "ours": "import flowsolve as fs\n"
    "fs.solve(lambda t, y: -0.5 * y, y, 0.0, 1.0, solver=fs.solvers.Dopri5(1e-9, 1e-9), throw=False)",
    "peer": "import torchdiffeq\n"
    "torchdiffeq.odeint(lambda t, y: -0.5 * y, y, torch.tensor([0.0, 1.0]).to(y), method='dopri5', rtol=1e-9, "
    "atol=1e-9)",
}


def cold(quick: bool) -> list[Found]:
    """The first solve of a process, import included."""
    seconds: dict[str, list[float]] = {name: [] for name in BODIES if name == "ours" or available("torchdiffeq")}
    for _ in range(2 if quick else 5):
        for name, times in seconds.items():
            wait = "torch.cuda.synchronize()" if CUDA else ""
            text = COLD.format(device=DEVICE, body=BODIES[name], wait=wait)
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
            times.append(float(done.stdout.split()[-1]))
    return [row("first Dopri5 solve of a process | torchdiffeq, s", seconds["ours"], seconds.get("peer"), 1.0, 1.0)]


PARTS: dict[str, Callable[[bool], list[Found]]] = {
    "eager": eager, "adaptive": adaptive, "noise": noise, "crossings": crossings, "captured": captured,
    "likelihood": likelihood, "patches": patches, "cold": cold,
}  # fmt: skip


def line(found: Found) -> str:
    """A row of the record as it is printed."""
    if "diffusers" in found:
        best = (
            min((v, k) for k, v in found["diffusers"].items() if isinstance(v, float)) if found["diffusers"] else None
        )
        return f"{found['name']}: {found['ours']}; best of {len(found['diffusers'])}: {best}"
    if "ours" not in found or "median" not in found["ours"]:
        return f"{found['name']}: " + json.dumps({k: v for k, v in found.items() if k != "name"})
    text = f"{found['name']:<62}{found['ours']['median']:9.2f}"
    if "peer" in found:
        text += f" |{found['peer']['median']:9.2f}{found['ratio']['median']:8.3f}"
    if "target" in found:
        text += f" <= {found['target']['limit']:.3f} {'met' if found['target']['met'] else 'MISSED'}"
    return text


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--quick", action="store_true", help="small and few, for a test of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    record: Found = {
        "environment": {**environment(), **facts()}, "quick": given.quick, "accelerator": CUDA, "parts": {},
    }  # fmt: skip
    for name in given.only:
        begin = time.perf_counter()
        try:
            rows = PARTS[name](given.quick)
        except Exception as problem:  # one part does not cost the others
            rows = [{"name": name, "failed": f"{type(problem).__name__}: {problem}"[:500]}]
        record["parts"][name] = {"seconds": round(time.perf_counter() - begin, 1), "rows": rows}
        print(f"\n{name} ({record['parts'][name]['seconds']} s)", *map(line, rows), sep="\n", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
