"""`flowsolve doctor`: what is installed, which kernels serve, and whether the package is right on this machine."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from flowsolve._optional import EXTRAS, install, require
from flowsolve._version import __version__
from flowsolve.cli._terminal import say

typer: Any = require("typer", "cli", "the command line")

__all__ = ["doctor"]

PACKAGES = {
    "": ("torch", "numpy", "numba", "safetensors", "triton"),
    "cli": ("typer", "rich", "tqdm"),
    "diffusers": ("diffusers", "accelerate"),
    "runs": ("matplotlib", "pillow", "pyarrow"),
    "train": ("scikit-learn",),
    "bridges": ("torchdiffeq", "torchsde"),
    "ot": ("POT", "scipy"),
    "bench": ("scikit-image",),
}
"""The core's packages, and what each extra adds."""

Check = tuple[str, bool, str]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is installed and which kernels serve, and test the package; exit status 1 if it fails."""
    packages = {name: _version(name) for names in PACKAGES.values() for name in names}
    tests = [_tried(name, test) for name, test in TESTS.items()]
    right = all(ok for _, ok, _ in tests)
    if as_json:
        told = {
            "flowsolve": __version__,
            "machine": _machine(),
            "packages": packages,
            "tests": [list(t) for t in tests],
        }
        say(*json.dumps(told, indent=1, ensure_ascii=False).split("\n"), whole=True)
        raise typer.Exit(0 if right else 1)
    say(f"flowsolve {__version__}", *(f"  {k:<10} {v}" for k, v in _machine().items()), "packages")
    for extra, names in PACKAGES.items():
        found = ", ".join(f"{n} {packages[n] or 'missing'}" for n in names)
        say(f"  {extra or 'core':<10} {found}")
        needed = [n for n in names if packages[n] is None and n != "triton"]
        if needed and extra:
            say(f"  {'':<10} for {EXTRAS[extra]}: {install(extra)}")
    say("tests", *(f"  {'ok' if ok else 'FAILED':<10} {name}: {what}" for name, ok, what in tests))
    raise typer.Exit(0 if right else 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    import torch

    from flowsolve import kernels

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": f"{platform.python_version()} on {sys.platform}, {platform.machine()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "CUDA": device,
        "kernels": f"{kernels.mode()} (FLOWSOLVE_KERNELS={os.environ.get('FLOWSOLVE_KERNELS', 'unset')})",
    }


def _tried(name: str, test: Callable[[], tuple[bool, str]]) -> Check:
    """A test, its outcome, and what was seen; whatever it raises is an outcome."""
    start = time.perf_counter()
    try:
        ok, seen = test()
    except Exception as error:  # what a broken installation may raise is not to be foreseen
        ok, seen = False, f"{type(error).__name__}: {error}"
    return name, ok, f"{seen} ({time.perf_counter() - start:.1f} s)"


def _flow() -> tuple[Any, Any]:
    import torch

    import flowsolve as fs

    mixture = fs.problems.GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], std=0.5, dtype=torch.float64)
    return mixture, mixture.flow(fs.paths.CondOT())


def _sampled(mode: str) -> tuple[bool, str]:
    """Dopri5 against a tighter solve by a method of order 8."""
    import torch

    import flowsolve as fs

    _, flow = _flow()
    known: dict[str, Any] = {"seed": 0, "dtype": torch.float64}
    with fs.kernels.use(mode):
        found = fs.sample(flow, (64, 2), solver=fs.solvers.Dopri5(1e-6, 1e-6), **known).x
    right = fs.sample(flow, (64, 2), solver=fs.solvers.Dopri8(1e-10, 1e-10), **known).x
    off = float((found - right).abs().max())
    return off < 1e-4, f"Dopri5 at 1e-6 is {off:.0e} from a tight solve"


def _read() -> tuple[bool, str]:
    import flowsolve as fs

    mixture, flow = _flow()
    x = mixture.sample(64, seed=1)
    off = float((fs.log_prob(flow, x, nfe=64, trace="exact").log_prob - mixture.log_prob(x)).abs().max())
    return off < 1e-2, f"log p of 64 evaluations is {off:.0e} nats from its closed form"


def _drawn() -> tuple[bool, str]:
    """Both kernels against each other: noise has the same bits everywhere."""
    import torch

    from flowsolve import kernels
    from flowsolve.noise import START, Noise

    blank = torch.empty(64, 3, 8, 8, device="cpu")
    made = []
    for mode in ("torch", "fused"):
        with kernels.use(mode):
            made.append(Noise.of(0, 64).normal(START, 0, blank))
    same = torch.equal(*made)
    mean = float(made[0].double().mean())
    return same and abs(mean) < 4.0 / math.sqrt(blank.numel()), f"fused and plain {'agree' if same else 'DIFFER'}"


TESTS: dict[str, Callable[[], tuple[bool, str]]] = {
    "sampling, plain kernels": lambda: _sampled("torch"),
    "sampling, fused kernels": lambda: _sampled("fused"),
    "likelihood": _read,
    "noise": _drawn,
}
