"""What crosses a process, a convention or a dtype: pickles, trees, half precision, names, seeds, files of numbers."""

from __future__ import annotations

import math
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import runs, solvers
from flowsolve.compat import torchdiffeq as compat

PATH = fs.paths.CondOT()


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 (what was just pickled)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data", "v"])
@pytest.mark.parametrize("time", ["flow", "native"])
def test_a_flow_survives_a_pickle(prediction: str, time: str) -> None:
    flow = fs.Flow(Timed(), fs.paths.VP(), prediction, time=time)
    x = torch.randn(3, 2)
    assert torch.equal(again(flow).velocity(x, 0.4), flow.velocity(x, 0.4))
    guided = fs.guidance.Autoguidance(flow, flow, 2.0)
    assert torch.equal(again(guided).velocity(x, 0.4), guided.velocity(x, 0.4))


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) + t[:, None]


def test_so_do_errors_densities_and_weights() -> None:
    with pytest.raises(fs.SolverError) as caught:
        fs.solve(lambda t, y: math.nan * y, torch.ones(2, 2), 0.0, 1.0, solver=solvers.Dopri5())
    copy = again(caught.value)
    assert (str(copy), copy.samples) == (str(caught.value), [0, 1])
    density, weight = again(fs.training.times.logit_normal(0.5)), again(fs.training.weights.min_snr(3.0))
    draw = torch.Generator().manual_seed(0)
    right = fs.training.times.logit_normal(0.5)(4, torch.Generator().manual_seed(0))
    assert torch.equal(density(4, draw), right)
    point = PATH.at(torch.tensor([0.2, 0.9]))
    assert torch.equal(weight(point), fs.training.weights.min_snr(3.0)(point))


def fails(seed: int) -> None:
    """A solve that meets NaN, in whatever process."""
    flow = fs.Flow(lambda x, t: x / 0.0 * 0.0, PATH)
    fs.sample(flow, (2, 1), solver="dopri5", seed=seed)


def test_a_failure_in_a_pool_reaches_its_parent() -> None:
    failure = pytest.raises(fs.SolverError, match="2 of 2 samples did not reach the end")
    with multiprocessing.get_context("spawn").Pool(2) as pool, failure as caught:
        pool.map_async(fails, [0, 1]).get(timeout=120)
    assert caught.value.solution.status.tolist() == [1, 1]


def test_trees_say_how_they_differ_and_keep_their_dtypes() -> None:
    y, common = torch.ones(2, 2), {"solver": solvers.RK4(), "nfe": 8}
    with pytest.raises(ValueError, match=r"returned \[\(2, 2\), \(2, 2\)\]; expected .* \(\(2, 2\), \(2, 2\)\)"):
        fs.solve(lambda t, y: [y[0], y[1]], (y, y), 0.0, 1.0, **common)
    with pytest.raises(ValueError, match=r"returned \{'b': .*, 'c': .*\}; expected .* \{'a': .*, 'b': .*\}"):
        fs.solve(lambda t, y: {"b": y["b"], "c": y["a"]}, {"a": y, "b": y}, 0.0, 1.0, **common)
    found = fs.solve(lambda t, y: y, {"x": y, "z": y.double(), "h": y.bfloat16()}, 0.0, 1.0, **common).x
    assert [v.dtype for v in found.values()] == [torch.float32, torch.float64, torch.float32]


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_states_without_numbers(solver: str, shape: tuple[int, ...]) -> None:
    options = {"nfe": 8} if solver == "rk4" else {}
    for sol in (
        fs.solve(lambda t, y: y, torch.ones(shape), 0.0, 1.0, solver=solver, **options),
        fs.sample(fs.Flow(lambda x, t: x, PATH), start=torch.ones(shape), solver=solver, **options),
    ):
        assert sol.x.shape == shape
        assert bool(sol.ok.all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fields_of_half_precision_are_fed_it(dtype: torch.dtype) -> None:
    """The state is float32 between the calls, only the field rounds: eps of a slope below 1, in a time of 1."""
    net = nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        net.weight.copy_(-torch.eye(2))

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            assert t.dtype == y.dtype == dtype
            return self.net(y + 0 * t)

    y, field, bound = torch.ones(3, 2), Field(), 2 * torch.finfo(dtype).eps
    runge = {"solver": solvers.RK4(), "nfe": 16}
    for found in (
        fs.solve(Field(), y, 0.0, 1.0, **runge).x,
        fs.solve(lambda t, v: field(t, v), y.to(dtype), 0.0, 1.0, **runge).x,
        compat.odeint(Field(), y.to(dtype), torch.tensor([0.0, 1.0]), method="dopri5", rtol=1e-2, atol=1e-2)[-1],
    ):
        assert (found.double() - math.exp(-1)).abs().max() < bound + 1e-2


def test_times_that_the_state_s_dtype_cannot_tell_apart() -> None:
    t = torch.tensor([1e8, 1e8 + 1], dtype=torch.float64)
    with pytest.raises(ValueError, match="float32 numbers that f reads as t"):
        compat.odeint(lambda t, y: -y, torch.ones(2), t)
    compat.odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float64), t)


@pytest.mark.parametrize("key", ["x", "t", "clock"])
def test_names_that_the_network_is_given_already(key: str) -> None:
    flow = fs.Flow(lambda x, t, **cond: -x, PATH)
    with pytest.raises(ValueError, match=f"cond has '{key}'"):
        fs.sample(flow, (2, 2), nfe=8, cond={key: torch.ones(2)})


def test_a_network_of_the_other_order_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"a network net\(t, x\)\?"):
        fs.sample(fs.Flow(lambda t, x: -x, PATH), (3, 2), nfe=8)


def test_seeds_of_numpy() -> None:
    flow = fs.Flow(lambda x, t: -x, PATH)
    assert torch.equal(fs.sample(flow, (2, 2), nfe=8, seed=np.int64(3)).x, fs.sample(flow, (2, 2), nfe=8, seed=3).x)
    several = fs.sample(flow, (2, 2), nfe=8, seed=[np.int64(3), 4]).x
    assert torch.equal(several, fs.sample(flow, (2, 2), nfe=8, seed=[3, 4]).x)


def test_conditions_of_losses_and_checks_are_given_as_to_sample() -> None:
    flow = fs.Flow(lambda x, t, y: -x * y[:, None], PATH)
    z, y = torch.randn(8, 2), torch.linspace(0, 1, 8)
    for loss in (fs.training.cfm_loss, fs.training.dsm_loss):
        one, other = (
            loss(flow, z, generator=torch.Generator().manual_seed(0), **c) for c in ({"cond": {"y": y}}, {"y": y})
        )
        assert torch.equal(one, other)
        with pytest.raises(TypeError, match="'y' is given in cond= and beside it"):
            loss(flow, z, cond={"y": y}, y=y)
    assert flow.check(z, cond={"y": y}).errors == flow.check(z, y=y).errors


@pytest.mark.parametrize(
    "name", ["euler_a", "dpmpp_2m", "dpmpp_2m_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"]
)
def test_names_of_other_libraries(name: str) -> None:
    """Each is the solver that is compared with k-diffusion's function of that name (`tests.peers`)."""
    same = {
        "euler_a": solvers.DDPM(), "dpmpp_2m": solvers.DPMSolverPP(2), "dpmpp_2m_sde": solvers.SDEDPMSolverPP(2),
        "dpm_2_ancestral": solvers.Ancestral(solvers.DPMSolver(2)),
        "dpmpp_2s_ancestral": solvers.Ancestral(solvers.DPMSolverPPS(2)), "dpmpp_sde": solvers.DPMSolverPPS(2, eta=1.0),
    }[name]  # fmt: skip
    flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.VP())
    found, right = (fs.sample(flow, (4, 1), solver=s, nfe=10, seed=1).x for s in (name, same))
    assert torch.equal(found, right)


def test_names_wherever_a_solver_is_taken() -> None:
    flow, x = fs.Flow(lambda x, t: -x, PATH), torch.ones(3, 2)
    assert torch.equal(fs.encode(flow, x, solver="rk4", nfe=8).x, fs.encode(flow, x, solver=solvers.RK4(), nfe=8).x)
    fs.round_trip(flow, x, solver="heun", nfe=8)
    fs.log_prob(flow, x, solver="dopri5:rtol=1e-3,atol=1e-3")
    fs.sample_log_prob(flow, (3, 2), solver="rk4", nfe=8)
    fs.solve(lambda t, y: -y, x, 0.0, 1.0, solver="tsit5")
    list(fs.batching.sample(flow, (3, 2), solver="unipc", batch=2, nfe=8))
    for call in (
        lambda: fs.sample(flow, (3, 2), solver="unipcc", nfe=8),
        lambda: fs.log_prob(flow, x, solver="unipcc", nfe=12),
        lambda: fs.solve(lambda t, y: -y, x, 0.0, 1.0, solver="unipcc"),
    ):
        with pytest.raises(ValueError, match="Did you mean 'unipc'"):
            call()


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "<u2", ">u4", "uint64"])
def test_arrays_of_any_integers(tmp_path: Path, dtype: str) -> None:
    flow, images = fs.Flow(lambda x, t: -x, PATH), np.arange(12).reshape(3, 1, 2, 2) * 20
    np.save(tmp_path / "images.npy", images.astype(dtype))
    report = runs.nll(flow, tmp_path / "images.npy", tmp_path / "out", nfe=12)
    assert report is not None
    truth = fs.bits_per_dim(flow, torch.from_numpy(images), nfe=12)
    assert report["mean"] == pytest.approx(truth.mean, rel=1e-12)


@pytest.mark.parametrize("dtype", ["complex64", [("a", "i4"), ("b", "i4")], "S4", "M8[s]"], ids=str)
def test_arrays_of_no_numbers_are_named(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "images.npy", np.zeros((3, 1, 2, 2), dtype=dtype))
    with pytest.raises(ValueError, match=r"images\.npy cannot be read as an array: it holds .*; expected integers"):
        runs.nll(fs.Flow(lambda x, t: -x, PATH), tmp_path / "images.npy", tmp_path / "out", nfe=12)


def test_the_name_that_a_flow_prints_is_one_that_it_takes() -> None:
    """−u, the velocity towards the noise, is what SD 3 and FLUX predict, and what loading them prints as `flow`."""
    x = torch.randn(3, 2)
    towards_noise = fs.Flow(lambda x, t: x.sin(), PATH, "flow")
    towards_data = fs.Flow(lambda x, t: -x.sin(), PATH, "velocity")
    assert "prediction='flow'" in repr(towards_noise)
    torch.testing.assert_close(towards_noise.velocity(x, 0.3), towards_data.velocity(x, 0.3))
    flow = fs.Flow(Timed(), PATH, "flow")
    assert torch.equal(again(flow).velocity(x, 0.3), flow.velocity(x, 0.3))
    with pytest.raises(ValueError, match="expected one of data, noise, score, velocity, v, flow"):
        fs.Flow(lambda x, t: x, PATH, "epsilon")


def test_a_network_that_asks_for_labels_says_which() -> None:
    def net(x: Tensor, t: Tensor, y: Tensor, *, scale: float) -> Tensor:
        return -x * scale + y[:, None]

    class Wrapped(nn.Module):
        def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return net(x, t, **cond)

    x, y = torch.ones(2, 3), torch.zeros(2)
    for made in (net, Wrapped()):
        flow = fs.Flow(made, PATH)
        for call in (fs.sample, fs.encode, fs.log_prob):
            given = {"start": x} if call is fs.sample else {"x": x}
            with pytest.raises(TypeError, match=r"the network asks for 'y'.*Pass it in cond=\{…\}"):
                call(flow, **given, nfe=16, cond={"scale": 1.0})
            with pytest.raises(TypeError, match=r"the network asks for 'scale', .*net\(x, t, y=…\)"):
                call(flow, **given, nfe=16, cond={"y": y})
        assert fs.sample(flow, start=x, nfe=4, cond={"y": y, "scale": 1.0}).ok.all()
    broken = fs.Flow(lambda x, t: x + "1", PATH)
    with pytest.raises(TypeError, match=r"unsupported operand|must be Tensor"):
        fs.sample(broken, start=x, nfe=4)


def test_the_keys_of_a_tree_may_come_in_another_order() -> None:
    y0 = {"a": torch.ones(2, 1), "b": [torch.zeros(2, 1), {"c": torch.ones(2, 2), "d": torch.ones(2, 1)}]}

    def straight(t: Any, y: Any) -> Any:
        return {"a": -y["a"], "b": [y["a"], {"c": -2 * y["b"][1]["c"], "d": y["b"][1]["d"]}]}

    def crossed(t: Any, y: Any) -> Any:
        return {"b": [y["a"], {"d": y["b"][1]["d"], "c": -2 * y["b"][1]["c"]}], "a": -y["a"]}

    one, other = (fs.solve(f, y0, 0.0, 1.0, solver="dopri5").x for f in (straight, crossed))
    assert torch.equal(one["b"][1]["c"], other["b"][1]["c"])
    assert list(other) == ["a", "b"]
    with pytest.raises(ValueError, match="expected the structure of y0"):
        fs.solve(lambda t, y: {"a": -y["a"], "x": y["b"]}, y0, 0.0, 1.0, solver="dopri5")
