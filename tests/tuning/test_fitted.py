"""Fitted solvers and their files: the generic solver to the bit, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsolve as fs
from flowsolve.fingerprint import marks
from flowsolve.grids import At
from flowsolve.solvers import DEIS, IPNDM, DPMSolverPP, Fitted, Multistep, Tuned, UniPC, names
from flowsolve.solvers.fitted import content, entry, sealed

BASES = [DPMSolverPP(2), DEIS(3), UniPC(3), IPNDM(3), Multistep(2, 0.3, 2), Multistep(4, "straight", 4), DPMSolverPP(1)]
PATHS = [fs.paths.CondOT(), fs.paths.EDM(), fs.paths.Discrete.linear(1000), fs.paths.VP()]
MIXTURE = fs.problems.GaussianMixture([[-1.0, 0.3], [1.0, 0.5]], std=0.2)


class Net(nn.Module):
    """A network with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.gain * x


def flow_of(path: fs.paths.Path) -> fs.Flow:
    return MIXTURE.flow(path, "velocity" if path.at(0.0).alpha == 0.0 else "noise")


def times_of(solver: Multistep, flow: fs.Flow, n: int) -> tuple[float, ...]:
    _, grid = fs.solvers.Auto().choose(flow.path, n)
    assert grid is not None
    return tuple(grid.times(flow.path, 0.0, 1.0, n))


def zeros(n: int) -> tuple[tuple[float, ...], ...]:
    return tuple((0.0,) * (k + 1) for k in range(n))


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_weights_it_is_the_generic_solver_to_the_bit(base: Any, path: Any, dtype: torch.dtype) -> None:
    flow, n = flow_of(path), 6
    times = times_of(base, flow, n)
    options: dict[str, Any] = {"shape": (5, 2), "seed": 3, "dtype": dtype}
    expected = fs.sample(flow, solver=base, grid=At(t=times), **options)
    for weights in ((), zeros(n)):
        made = fs.sample(flow, solver=Fitted(base, times, weights, weights), **options)
        assert torch.equal(made.x, expected.x)
        assert torch.equal(made.nfe, expected.nfe)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_weights_of_the_estimates_add_what_the_formula_says(path: Any) -> None:
    """DDIM as DDIM of another end plus corrections, and a step that repeats an earlier estimate: both by hand."""
    flow = flow_of(path)
    times = times_of(DPMSolverPP(1), flow, 3)
    data, noise = ((0.1,), (-0.2, 0.3), (0.0, 0.05, -0.4)), ((0.2,), (0.1, -0.3), (0.25, 0.0, 0.15))
    start = path.prior_std * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, seen = start, []
    for n, (t, t_next) in enumerate(itertools.pairwise(times)):
        found = flow.estimate(x, t)
        seen.insert(0, found)
        there = path.at(t_next)
        x = there.alpha * found.data + there.sigma * found.noise
        for a, b, e in zip(data[n], noise[n], seen, strict=True):
            x = x + a * e.data + b * e.noise
    made = fs.sample(flow, start=start, solver=Fitted(DPMSolverPP(1), times, data, noise)).x
    torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12 * float(x.abs().max()))


@given(st.data())
def test_a_file_is_read_to_the_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    times = sorted(data.draw(st.sets(st.floats(0.0, 1.0, exclude_min=True), min_size=n + 1, max_size=n + 1)))
    rows = [tuple(tuple(data.draw(finite) for _ in range(k + 1)) for k in range(n)) for _ in range(2)]
    fit = Fitted(data.draw(st.sampled_from(BASES)), tuple(times), *rows)
    file = tmp_path_factory.mktemp("file") / "tuned.json"
    write(file, fit, {})
    read = fs.solvers.load(file).fits[0]
    assert read == fit
    assert repr([read.times, read.data, read.noise]) == repr([fit.times, fit.data, fit.noise])  # −0.0 too


def write(file: Path, fit: Fitted, found: dict[str, str]) -> None:
    told = sealed({"fingerprint": found, "provenance": {}, "solvers": [entry(fit)]})
    file.write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture
def kept(tmp_path: Path) -> tuple[fs.Flow, Path]:
    """A flow, and a file of a solver for 4 evaluations of it."""
    flow = fs.Flow(Net(), fs.paths.CondOT())
    file = tmp_path / "tuned.json"
    fit = Fitted(DEIS(2), times_of(DEIS(2), flow, 4), zeros(4), zeros(4))
    write(file, fit, marks(flow))
    return flow, file


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda told: told["solvers"][0]["times"].__setitem__(1, 0.123), "changed after it was written"),
    (lambda told: told["solvers"][0]["data"][1].__setitem__(0, 1e-9), "changed after it was written"),
    (lambda told: told.__setitem__("fingerprint", {}), "changed after it was written"),
    (lambda told: told.__setitem__("seal", "0"), "changed after it was written"),
    (lambda told: told.__setitem__("version", 2), "version 2"),
    (lambda told: told.__setitem__("format", "else"), "holds no tuned solver"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_file_that_was_changed_is_refused(kept: Any, change: Any, said: str) -> None:
    _, file = kept
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=said):
        fs.solvers.load(file)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00", "null"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"expected a file that fs\.tune"):
        content(file)


def test_sealed_nonsense_is_refused(kept: Any) -> None:
    _, file = kept
    told = json.loads(file.read_text())
    bad: list[tuple[Any, Any, str]] = [
        ("times", [0.0, 0.5, 0.5, 0.7, 1.0], "rising"),
        ("times", [0.0, 0.5, 1.0], "weights for"),
        ("data", [[0.0] * 9] * 4, "longer than the history|weights for"),
        ("base", {"class": "DDIM"}, "no multistep solver"),
        ("base", {"class": "DEIS", "odd": 1}, "no solver that this version knows"),
        ("base", {"class": "SDEDPMSolverPP", "order": 2}, "without noise|no solver that this version"),
    ]
    for key, value, said in bad:
        entries = [{**told["solvers"][0], key: value}]
        file.write_text(json.dumps(sealed({**told, "solvers": entries})))
        with pytest.raises(ValueError, match=said):
            fs.solvers.load(file)


def test_another_checkpoint_is_refused_unless_told_otherwise(kept: Any) -> None:
    flow, file = kept
    solver = fs.solvers.load(file)
    assert fs.sample(flow, (2, 3), solver=solver).nfe.tolist() == [4, 4]
    assert fs.sample(flow, (2, 3), solver=str(file), nfe=4).nfe.tolist() == [4, 4]
    other = fs.Flow(Net(), fs.paths.CondOT())
    assert fs.sample(other, (2, 3), solver=solver).ok.all()  # the same weights are the same checkpoint
    with torch.no_grad():
        flow.net.gain.add_(1e-6)
    slower = fs.Flow(Net(), fs.paths.CondOT(), time=lambda t: 1.0 - t)
    for stranger in (flow, fs.Flow(Net(), fs.paths.VP(), "noise"), slower):
        with pytest.raises(ValueError, match=r"fitted to a checkpoint with another .*any_checkpoint=True"):
            fs.sample(stranger, (2, 3), solver=solver)
    free = fs.solvers.load(file, any_checkpoint=True)
    assert fs.sample(flow, (2, 3), solver=free).ok.all()
    assert names.solver(f"{file}:any_checkpoint=true") == free
    with pytest.raises(ValueError, match="no option 'order'"):
        names.solver(f"{file}:order=2")


def test_budgets_grids_and_directions_that_it_has_not(kept: Any) -> None:
    flow, file = kept
    solver = fs.solvers.load(file)
    with pytest.raises(ValueError, match="tuned for 4 estimates"):
        fs.sample(flow, (2, 3), solver=solver, nfe=5)
    with pytest.raises(ValueError, match="fitted to the times"):
        fs.sample(flow, (2, 3), solver=solver, nfe=4, grid="karras")
    with pytest.raises(ValueError, match="no way back"):
        fs.encode(flow, torch.zeros(2, 3), solver=solver)
    with pytest.raises(TypeError, match="has no chart"):
        fs.sample(flow, (2, 3), solver=solver, chart="data")
    fit = solver.fits[0]
    for other in ((), (fit, fit)):
        with pytest.raises(ValueError, match="expected one for each"):
            Tuned(fits=other)
    with pytest.raises(TypeError, match="without noise"):
        replace(fit, base=fs.solvers.SDEDPMSolverPP(2))
    with pytest.raises(ValueError, match="not finite"):
        replace(fit, data=((float("nan"),), *zeros(4)[1:]))


def test_a_solve_is_stopped_and_continued_to_the_bit(tmp_path: Path) -> None:
    flow = flow_of(fs.paths.CondOT())
    rows = tuple(tuple(0.01 * (k + j + 1) for j in range(k + 1)) for k in range(5))
    solver = Fitted(UniPC(2), times_of(UniPC(2), flow, 5), rows, rows)
    shots: list[fs.Snapshot] = []
    whole = fs.sample(flow, (3, 2), solver=solver, callback=shots.append)
    for shot in shots:
        shot.save(tmp_path / "shot.pt")
        more = fs.sample(flow, resume=fs.Snapshot.load(tmp_path / "shot.pt"), solver=solver)
        assert torch.equal(more.x, whole.x)


def test_samples_are_the_same_in_any_batch() -> None:
    flow = flow_of(fs.paths.CondOT())
    rows = tuple(tuple(0.02 for _ in range(k + 1)) for k in range(4))
    solver = Fitted(DEIS(2), times_of(DEIS(2), flow, 4), rows, rows)
    whole = fs.sample(flow, (7, 2), solver=solver, dtype=torch.float64)
    parts = fs.sample(flow, (7, 2), solver=solver, dtype=torch.float64, batch=3)
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-12, atol=1e-12)
