"""Flow: one network call an estimate, dtypes and clocks as promised, errors that say what to do."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowsolve import Flow
from flowsolve._batch import Context, linear, per_sample
from flowsolve.paths import EDM, VP, CondOT, Cosine, Discrete, Path, Trig
from flowsolve.predictions import Estimate, Prediction, Row, SingularEstimate
from tests.cases import PATHS

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
SHAPES = [(3,), (3, 3), (3, 5), (3, 1, 4, 4), (3, 2, 2, 3, 2)]


class Spy(nn.Module):
    """Returns gain · x in its own dtype, and remembers what it was given."""

    def __init__(self, dtype: torch.dtype | None = torch.float32, gain: float = 0.5) -> None:
        super().__init__()
        self.gain: Any = gain if dtype is None else nn.Parameter(torch.tensor(gain, dtype=dtype))
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls.append((x, t, cond))
        return self.gain * x


def state(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float", "0-d", "batch"])
def test_any_shape_and_any_kind_of_time(shape: tuple[int, ...], kind: str) -> None:
    x = state(*shape)
    t: Any = {"float": 0.3, "0-d": torch.tensor(0.3), "batch": torch.tensor([0.3] * 3, dtype=torch.float64)}[kind]
    net = Spy(torch.float64)
    flow = Flow(net, VP(), "noise")
    estimate = flow.estimate(x, t)
    assert isinstance(estimate, Estimate)
    point = flow.path.at(float(torch.tensor(0.3)) if kind == "0-d" else 0.3)
    torch.testing.assert_close(estimate.noise, 0.5 * x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(estimate.data, (x - point.sigma * 0.5 * x) / point.alpha, rtol=1e-12, atol=1e-12)
    ((_, time, _),) = net.calls
    assert time.shape == (3,)
    torch.testing.assert_close(time, torch.full((3,), 0.3, dtype=torch.float64), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_has_its_own_time_even_when_the_batch_is_as_long_as_the_features(shape: tuple[int, ...]) -> None:
    x = state(*shape)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    flow = Flow(lambda x, t: 0.3 * x, Trig(), "v")
    for what in ("data", "noise", "velocity", "score"):
        together = getattr(flow, what)(x, t)
        assert together.shape == x.shape
        for i in range(3):
            alone = getattr(flow, what)(x[i : i + 1], float(t[i]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["velocity", "score", "noise", "data"])
def test_one_network_call_a_question(what: str) -> None:
    net = Spy(torch.float64)
    flow, x = Flow(net, CondOT()), state(3, 2)
    estimate = flow.estimate(x, 0.5)
    assert len(net.calls) == 1
    expected = getattr(estimate, what)
    _ = estimate.data, estimate.noise, estimate.velocity, estimate.score, estimate.v
    assert len(net.calls) == 1
    assert torch.equal(getattr(flow, what)(x, 0.5), expected)
    assert len(net.calls) == 2


@every_path
def test_the_estimate_of_a_perfect_network_is_the_truth(path: Path) -> None:
    z, eps = state(2, 3), torch.ones(2, 3, dtype=torch.float64)
    p = path.at(0.6)
    outputs = {"data": z, "noise": eps, "score": -eps / p.sigma, "velocity": p.alpha_dot * z + p.sigma_dot * eps,
               "v": p.alpha * eps - p.sigma * z}  # fmt: skip
    for name, output in outputs.items():
        flow = Flow(lambda x, t, output=output: output, path, name)
        x = path.interpolate(z, eps, 0.6)
        torch.testing.assert_close(flow.data(x, 0.6), z, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(flow.noise(x, 0.6), eps, rtol=1e-11, atol=1e-11)


def test_conditioning_reaches_the_network_unchanged() -> None:
    net, labels = Spy(), torch.tensor([1, 2])
    flow = Flow(net, CondOT())
    for _ in range(6):
        flow.estimate(state(2, 2), 0.5, labels=labels, scale=3.0)
    assert torch.equal(net.calls[0][2]["labels"], labels)
    assert net.calls[0][2]["scale"] == 3.0
    assert net.calls[-1][2]["labels"] is labels  # the first calls are made with copies (`flowsolve._guard`)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "network", "fed", "time", "result"),
    [
        (torch.float64, torch.float64, torch.float64, torch.float64, torch.float64),
        (torch.float64, None, torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.bfloat16, torch.float32, torch.float64),
        (torch.float64, torch.float32, torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("t", [0.3, torch.tensor([0.3, 0.3])])
def test_dtypes(
    given: torch.dtype, network: torch.dtype | None, fed: torch.dtype, time: torch.dtype, result: torch.dtype, t: Any
) -> None:
    net = Spy(network)
    estimate = Flow(net, VP(), "noise").estimate(state(2, 3, dtype=given), t)
    assert net.calls[0][0].dtype == fed
    assert net.calls[0][1].dtype == time
    for what in ("data", "noise", "velocity", "score", "v", "x", "output"):
        assert getattr(estimate, what).dtype == result


def test_the_network_dtype_is_that_of_its_first_floating_parameter() -> None:
    net = nn.Module()
    net.register_parameter("index", nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False))
    net.register_parameter("weight", nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
    assert Flow(net, CondOT()).dtype == torch.bfloat16
    assert Flow(nn.Identity(), CondOT()).dtype is None
    assert Flow(lambda x, t: x, CondOT()).dtype is None
    assert Flow(Spy(torch.float32), CondOT(), dtype=torch.float16).dtype == torch.float16


def test_float64_accuracy_reaches_the_result() -> None:
    x, t = state(2, 3), 1.0 / 3.0
    flow = Flow(lambda x, t: x * t.reshape(-1, 1), CondOT())
    torch.testing.assert_close(flow.velocity(x, t), x / 3.0, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("t", [750.0, torch.tensor([750.0, 752.0])])
def test_under_autocast_time_still_reaches_the_network_in_float32(t: Any) -> None:
    path = Discrete.linear()
    net = Spy()
    flow = Flow(net, path, "noise", time="native")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        when = path.time_from_native(t.double() if isinstance(t, Tensor) else t)
        out = flow.noise(state(2, 3, dtype=torch.float32), when)
    assert net.calls[0][1].dtype == torch.float32
    assert net.calls[0][1].tolist() == (t.tolist() if isinstance(t, Tensor) else [t, t])
    assert out.dtype == torch.float32


def test_under_autocast_a_networks_bfloat16_output_is_read_in_float32() -> None:
    layer = nn.Linear(3, 3)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Flow(net, CondOT()).estimate(state(2, 3, dtype=torch.float32), 0.5).data.dtype == torch.float32


# --- clocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "0-d", "batch"])
@pytest.mark.parametrize(
    ("path", "time", "expected"),
    [
        (VP(), "flow", 0.25),
        (VP(tau_min=1e-3), "native", 1.0 - 0.999 * 0.25),
        (Trig(), "native", 0.75 * math.pi / 2),
        (EDM(), "native", EDM().sigma(0.25)),
        (Discrete.linear(1000), "native", 749.0),
        (Discrete.linear(1000, clean=False), "native", 749.25),
        (CondOT(), lambda t: 1000.0 * (1.0 - t), 750.0),
    ],
)
def test_the_clock_of_the_network(path: Path, time: Any, expected: float, kind: str) -> None:
    t: Any = {"float": 0.25, "0-d": torch.tensor(0.25), "batch": torch.full((2,), 0.25, dtype=torch.float64)}[kind]
    net = Spy(torch.float64)
    Flow(net, path, time=time).estimate(state(2, 3), t)
    got = net.calls[0][1]
    assert got.shape == (2,)
    assert got.dtype == torch.float64
    rel = 1e-6 if kind == "0-d" else 1e-14  # a float32 time knows no better
    assert got.tolist() == pytest.approx([expected, expected], rel=rel)


def test_every_entry_of_a_table_reaches_a_float32_network_as_its_integer() -> None:
    path, net = Discrete.linear(), Spy()
    flow = Flow(net, path, "noise", time="native")
    x = torch.zeros(1000, 1)
    k = torch.arange(1000, dtype=torch.float64)
    flow.estimate(x, path.time_from_native(k))
    assert torch.equal(net.calls[0][1], k.float())
    for i in range(0, 1000, 37):
        flow.estimate(x[:1], path.time_from_native(float(i)))
        assert net.calls[-1][1].tolist() == [float(i)]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Flow(3, CondOT()), TypeError, r"net is a int; expected a callable net\(x, t, \*\*cond\)"),
        (lambda: Flow(nn.Identity(), "vp"), TypeError, r"path is 'vp'; expected .*such as CondOT\(\) or VP\(\)"),
        (lambda: Flow(nn.Identity(), VP), TypeError, "expected a flowsolve.paths object"),
        (lambda: Flow(nn.Identity(), VP(), "epsilon"), ValueError, "'epsilon' is not known; expected one of"),
        (lambda: Flow(nn.Identity(), VP(), time="index"), ValueError, "time = 'index'; expected 'flow', 'native'"),
    ],
)
def test_a_flow_that_cannot_be_is_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_prediction_that_repeats_the_state_is_refused() -> None:
    with pytest.raises(SingularEstimate, match=r"'echo' prediction .* repeats what x already says"):
        Flow(nn.Identity(), VP(), Prediction("echo", lambda p: Row(p.alpha, p.sigma)))


@pytest.mark.parametrize("shape", [(1,), (2,), (4, 1), (1, 4), (4, 4)])
def test_a_time_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    net = Spy()
    with pytest.raises(ValueError, match=r"t has shape \(.*\); expected a float or one time a sample, \(4,\)"):
        Flow(net, CondOT()).estimate(state(4, 2), torch.full(shape, 0.5))
    assert not net.calls


@pytest.mark.parametrize("t", [-0.1, 1.5, 750, math.nan, torch.tensor(750), torch.tensor([0.5, math.nan])])
def test_a_time_outside_the_path_is_refused_before_the_network_is_called(t: Any) -> None:
    net = Spy()
    with pytest.raises(ValueError, match=r"outside the path.*path\.time_from_native"):
        Flow(net, VP()).estimate(state(2, 3), t)
    assert not net.calls


@pytest.mark.parametrize("output", [SimpleNamespace(sample=torch.zeros(2, 3)), (torch.zeros(2, 3),), None])
def test_an_output_that_is_no_tensor_is_refused_with_the_wrapper_to_write(output: Any) -> None:
    name = type(output).__name__
    with pytest.raises(TypeError, match=rf"returned a {name}; expected a tensor.*net\(x, t\)\.sample"):
        Flow(lambda x, t: output, CondOT()).estimate(state(2, 3), 0.5)


def test_a_complex_output_is_refused() -> None:
    with pytest.raises(TypeError, match=r"returned torch.complex64 for x of torch.float32; expected a real tensor"):
        Flow(lambda x, t: 1j * x, CondOT()).estimate(state(2, 3).float(), 0.5)


def test_a_diffusers_output_is_refused_with_the_wrapper_to_write() -> None:
    output = pytest.importorskip("diffusers.utils").BaseOutput(sample=torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"net\(x, t\)\.sample"):
        Flow(lambda x, t: output, CondOT()).estimate(state(2, 3), 0.5)


def test_a_learned_variance_is_recognised() -> None:
    flow = Flow(lambda x, t: torch.cat((x, x), dim=1), VP(), "noise")
    with pytest.raises(
        ValueError, match=r"shape \(2, 6, 4, 4\) for x of shape \(2, 3, 4, 4\).*learned variance.*first half"
    ):
        flow.estimate(state(2, 3, 4, 4), 0.5)


@pytest.mark.parametrize("output", [torch.zeros(2, 4), torch.zeros(2), torch.zeros(1, 3), torch.zeros(())])
def test_an_output_of_another_shape_is_refused_and_never_broadcast(output: Tensor) -> None:
    with pytest.raises(ValueError, match="expected the same shape") as e:
        Flow(lambda x, t: output, CondOT()).estimate(state(2, 3), 0.5)
    assert "learned variance" not in str(e.value)


@pytest.mark.parametrize("t", [0.0, torch.tensor([0.0, 0.5], dtype=torch.float64)])
@pytest.mark.parametrize("prediction", ["noise", "score"])
@pytest.mark.parametrize("path", [CondOT(), Cosine(), Trig()], ids=lambda p: type(p).__name__)
def test_a_noise_prediction_at_pure_noise_is_an_error_that_suggests_a_start(
    path: Path, prediction: str, t: Any
) -> None:
    net = Spy()
    flow = Flow(net, path, prediction)
    with pytest.raises(SingularEstimate, match=r"at α = 0 the state is all noise .*start after it") as e:
        flow.estimate(state(2, 3), t)
    assert not net.calls
    suggested = float(str(e.value).split("interval=(")[1].split(",")[0])
    assert bool(torch.isfinite(flow.data(state(2, 3), suggested)).all())


@pytest.mark.parametrize("path", [CondOT(), Trig(), Discrete.linear()], ids=lambda p: type(p).__name__)
def test_a_data_prediction_at_pure_data_is_an_error_that_suggests_an_end(path: Path) -> None:
    flow = Flow(lambda x, t: 0.5 * x, path, "data")
    with pytest.raises(SingularEstimate, match=r"at σ = 0 the state is the data .*end before it") as e:
        flow.estimate(state(2, 3), 1.0)
    suggested = float(str(e.value).split("interval=(…, ")[1].split(")")[0])
    assert bool(torch.isfinite(flow.noise(state(2, 3), suggested)).all())


def test_require_names_who_asked() -> None:
    flow = Flow(nn.Identity(), CondOT(), "noise")
    flow.require(0.5)
    with pytest.raises(SingularEstimate, match=r"^the grid asks a 'noise' prediction at t = 0"):
        flow.require(0.0)
    with pytest.raises(SingularEstimate, match=r"^the interval asks"):
        flow.require(0.0, "the interval")


def test_repr_says_what_it_is() -> None:
    assert repr(Flow(Spy(), CondOT(), "v")) == "Flow(Spy, CondOT(sigma_min=0.0), prediction='v')"


# --- coefficients and batches (flowsolve._batch) --------------------------------------------------------------------


def test_conditioning_is_cut_to_the_samples_asked() -> None:
    cond = {"labels": torch.tensor([10, 11, 12]), "scale": torch.tensor(2.0), "table": torch.zeros(5, 2), "name": "a"}
    context = Context(cond, 3)
    assert context.tree is cond
    cut = context.select(np.array([2, 0])).tree
    assert cut["labels"].tolist() == [12, 10]
    assert all(cut[k] is cond[k] for k in ("scale", "table", "name"))


def test_what_is_a_sample_s_own_is_settled_when_the_batch_is_made() -> None:
    """A table of 2 rows beside 3 samples is no sample's own, not even when 2 samples are left."""
    context = Context({"labels": torch.tensor([10, 11, 12]), "table": torch.arange(2)}, 3)
    two = context.select(np.array([0, 2]))
    one = two.select(np.array([1]))
    assert one.tree["labels"].tolist() == [12]
    assert one.tree["table"].tolist() == [0, 1]
    joined = two.joined(one).tree
    assert joined["labels"].tolist() == [10, 12, 12]
    assert joined["table"].tolist() == [0, 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a", [0.0, 1.0, -2.5, torch.tensor([0.0, 1.0, 2.0])])
@pytest.mark.parametrize("b", [0.0, 1.0, 0.5, torch.tensor(0.5), torch.tensor([1.0, 0.0, -3.0])])
def test_linear_is_a_weighted_sum(shape: tuple[int, ...], a: Any, b: Any) -> None:
    x, y = state(*shape, dtype=torch.float32), torch.ones(shape)
    for i in range(3):
        weights = [float(w[i] if isinstance(w, Tensor) and w.ndim else w) for w in (a, b)]
        torch.testing.assert_close(linear(a, x, b, y)[i], weights[0] * x[i] + weights[1] * y[i])


def test_a_coefficient_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\) met a batch of 3 samples"):
        per_sample(torch.zeros(4), torch.zeros(3, 4))


def test_a_network_cast_after_it_was_wrapped_is_fed_its_new_dtype() -> None:
    net = Spy(torch.float32)
    flow = Flow(net, CondOT())
    net.double()
    flow.estimate(state(2, 3), 0.5)
    assert net.calls[0][0].dtype == torch.float64


def test_integers_are_not_taken_for_a_state() -> None:
    with pytest.raises(TypeError, match=r"x has dtype torch.int64; expected floating-point"):
        Flow(Spy(), CondOT()).estimate(torch.ones(2, 3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"time": 1000}, TypeError, "time = 1000; expected 'flow', 'native' or a function"),
        ({"data_range": (1.0, -1.0)}, ValueError, "low < high"),
        ({"nfe_per_call": 0}, ValueError, "at least 1"),
    ],
)
def test_declarations_are_checked_when_the_flow_is_built(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Flow(Spy(), CondOT(), **options)


def test_conditioning_in_containers_is_cut_with_its_samples() -> None:
    rows = torch.arange(3.0)
    cut = Context({"a": {"b": rows, "c": 1}, "d": [rows, torch.ones(2)]}, 3).select(np.array([2, 0])).tree
    assert cut["a"]["b"].tolist() == [2.0, 0.0]
    assert cut["a"]["c"] == 1
    assert cut["d"][0].tolist() == [2.0, 0.0]
    assert cut["d"][1].tolist() == [1.0, 1.0]
