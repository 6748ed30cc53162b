"""Classifier-free guidance and auto-guidance against Gaussians, whose guided estimate is known."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsolve as fs
from flowsolve import guidance, paths, solvers
from flowsolve.guidance import Autoguidance, ClassifierFree, Interval
from flowsolve.paths import CondOT, Discrete, Path
from flowsolve.predictions import PREDICTIONS, SingularEstimate
from flowsolve.problems import GaussianMixture
from tests.cases import PATHS
from tests.guidance.labelled import MEANS, labelled, states, truth

Y = torch.tensor([1, 2, 3, 1, 2])
NOTHING = {"y": 0}


def inner(path: Path, share: float) -> float:
    """A flow time within the path, away from its ends."""
    return path.time(-3.0 + 6.0 * share) if not isinstance(path, Discrete) else 0.05 + 0.85 * share


@given(
    st.sampled_from(list(PATHS)), st.sampled_from(list(PREDICTIONS)), st.floats(0.0, 1.0), st.floats(-2.0, 9.0),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_guided_estimate_of_gaussians(
    name: str, prediction: str, share: float, scale: float, batched: bool, seed: int
) -> None:
    """ẑ_u + w (ẑ_c − ẑ_u), whatever the prediction, the path and the number of calls."""
    path = PATHS[name]
    t = inner(path, share)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x = states(path, t, seed=seed)
    flow = ClassifierFree(labelled(path, prediction), scale, unconditional=NOTHING, batched=batched)
    found = flow.estimate(x, t, y=Y)
    weak, strong = truth(x, alpha, sigma, 0 * Y), truth(x, alpha, sigma, Y)
    expected = weak + scale * (strong - weak)
    torch.testing.assert_close(found.data, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.noise, (x - alpha * expected) / sigma, rtol=1e-7, atol=1e-7)
    at = torch.full((len(x),), t, dtype=torch.float64)
    torch.testing.assert_close(flow.data(x, at, y=Y), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_scale_one_is_the_conditional_flow_and_scale_zero_the_unconditional_one(name: str) -> None:
    path = PATHS[name]
    base, t = labelled(path), inner(path, 0.4)
    x = states(path, t)
    one = ClassifierFree(base, 1.0, unconditional=NOTHING)
    assert torch.equal(one.velocity(x, t, y=Y), base.velocity(x, t, y=Y))
    assert one.nfe_per_call == 1, "the unconditional estimate is not needed"
    zero = ClassifierFree(base, 0.0, unconditional=NOTHING)
    torch.testing.assert_close(zero.velocity(x, t, y=Y), base.velocity(x, t, y=0 * Y), rtol=1e-14, atol=1e-14)


SOLVES: list[tuple[Any, dict[str, Any]]] = [
    (solvers.DDIM(), {"nfe": 12}), (solvers.DDPM(), {"nfe": 12}), (solvers.UniPC(order=3), {"nfe": 12}),
    (solvers.DPMSolverPP(), {"nfe": 12}), (solvers.Heun(), {"nfe": 12}), (solvers.RK4(), {"nfe": 16}),
    (solvers.Dopri5(rtol=1e-7, atol=1e-7), {}), (solvers.EulerMaruyama(), {"nfe": 12}), ("auto", {"nfe": 20}),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "options"), SOLVES, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("path", [paths.VP(), paths.EDM()], ids=repr)
def test_every_solver_samples_the_gaussian_that_guidance_makes(path: Path, solver: Any, options: Any) -> None:
    """Two Gaussians of one width extrapolate to a third: N(m_u + w (m_c − m_u), s²), with a flow of its own."""
    means = torch.tensor([[0.5, -1.0], [-0.25, 1.0]], dtype=torch.float64)
    w = 2.5
    nets = [GaussianMixture(means[i : i + 1], 0.5).flow(path).net for i in (0, 1)]
    base = fs.Flow(lambda x, t, strong: torch.where(strong[:, None], nets[1](x, t), nets[0](x, t)), path)
    flow = ClassifierFree(base, w, unconditional={"strong": False})
    target = GaussianMixture((means[0] + w * (means[1] - means[0]))[None], 0.5).flow(path)
    doubled = {k: 2 * v for k, v in options.items()}
    cond = {"strong": torch.ones(4, dtype=torch.bool)}
    found = fs.sample(flow, (4, 2), solver=solver, cond=cond, dtype=torch.float64, **doubled)
    expected = fs.sample(target, (4, 2), solver=solver, dtype=torch.float64, **options)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.nfe, 2 * expected.nfe)


def test_a_density_under_guidance_is_that_of_the_guided_ode_and_the_flow_says_so() -> None:
    path, w = CondOT(), 3.0
    means = torch.tensor([[0.5, -1.0], [-0.25, 1.0]], dtype=torch.float64)
    nets = [GaussianMixture(means[i : i + 1], 0.5).flow(path).net for i in (0, 1)]
    base = fs.Flow(lambda x, t, strong: torch.where(strong[:, None], nets[1](x, t), nets[0](x, t)), path)
    flow = ClassifierFree(base, w, unconditional={"strong": False})
    x = torch.tensor([[0.3, 0.1], [-1.0, 4.0]], dtype=torch.float64)
    solver = solvers.Dopri5(1e-9, 1e-9)
    assert base.caveats == ()
    (caveat,) = guidance.Transformed(flow, guidance.Clip()).caveats
    assert "guided" in caveat
    assert "not p(x | y)" in caveat
    reading = {"solver": solver, "trace": "exact", "cond": {"strong": torch.ones(2, dtype=torch.bool)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which says what the caveat says
        out = fs.log_prob(flow, x, **reading)
    target = GaussianMixture((means[0] + w * (means[1] - means[0]))[None], 0.5)
    torch.testing.assert_close(out.log_prob, target.log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batched", [True, False])
def test_conditioning_of_any_shape_goes_where_it_belongs(batched: bool) -> None:
    """Rows a sample are joined, arguments for all are passed once; two calls see the same."""
    seen: list[dict[str, Any]] = []

    def net(x: Tensor, t: Tensor, text: Tensor, extra: dict[str, Any], table: Tensor, gain: float) -> Tensor:
        seen.append({"x": x, "text": text, "extra": extra, "table": table})
        return gain * (text.mean(1) + extra["size"] * table.sum() + extra["pair"][0] - x)

    generator = torch.Generator().manual_seed(0)
    text, null, size = (torch.randn(s, generator=generator) for s in ((3, 4, 2), (4, 2), (3, 1)))
    cond = {"text": text, "extra": {"size": size, "pair": [size, "kept"]}, "table": torch.ones(7), "gain": 0.5}
    x = torch.randn(3, 2, generator=generator)
    flow = ClassifierFree(fs.Flow(net, CondOT()), 4.0, unconditional={"text": null}, batched=batched)
    found = flow.velocity(x, 0.3, **cond)
    weak, strong = (net(x, torch.ones(3), **{**cond, "text": v}) for v in (null.expand(3, 4, 2), text))
    torch.testing.assert_close(found, weak + 4.0 * (strong - weak))
    assert len(seen[0]["x"]) == (6 if batched else 3)
    assert (
        len(seen[0]["text"]) == len(seen[0]["extra"]["size"]) == len(seen[0]["extra"]["pair"][0]) == len(seen[0]["x"])
    )
    assert torch.equal(seen[0]["table"], cond["table"])
    assert len(seen) == (1 if batched else 2) + 2


def test_rows_of_the_unconditional_side_are_given_in_the_solve() -> None:
    path, x = CondOT(), states(CondOT(), 0.5)
    flow = ClassifierFree(labelled(path), 2.0)
    negative = torch.tensor([2, 3, 1, 0, 0])
    found = flow.data(x, 0.5, y=Y, unconditional={"y": negative})
    weak, strong = (truth(x, 0.5, 0.5, y) for y in (negative, Y))
    torch.testing.assert_close(found, 2.0 * strong - weak)
    once = ClassifierFree(labelled(path), 2.0, unconditional=NOTHING)
    torch.testing.assert_close(once.data(x, 0.5, y=Y, unconditional={"y": negative}), found)
    whole = fs.sample(flow, start=x, interval=(0.5, 1.0), solver=solvers.Tsit5(), cond={
        "y": Y, "unconditional": {"y": negative}})  # fmt: skip
    few = fs.sample(flow, start=x, interval=(0.5, 1.0), solver=solvers.Tsit5(), batch=2, cond={
        "y": Y, "unconditional": {"y": negative}})  # fmt: skip
    torch.testing.assert_close(whole.x, few.x, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole.nfe, few.nfe)


def test_what_all_samples_share_is_not_taken_for_theirs_when_few_are_left() -> None:
    """In an adaptive solve samples leave; a table of 2 rows is one for all of them when 2 are left, too."""
    path = CondOT()
    net = labelled(path).net
    flow = ClassifierFree(
        fs.Flow(lambda x, t, y, table: net(x, t, y) + 0.0 * table[:2].sum(), path),
        3.0,
        unconditional=NOTHING,
        interval=(-1.0, 2.0),
    )
    sizes: set[int] = set()

    def watched(x: Tensor, t: Tensor, y: Tensor, table: Tensor) -> Tensor:
        assert table.shape == (2, 3)
        sizes.add(len(x))
        return net(x, t, y)

    flow.base.net = watched
    sol = fs.sample(flow, (5, 2), solver=solvers.Dopri5(), cond={"y": Y, "table": torch.ones(2, 3)})
    assert bool(sol.ok.all())
    assert {2, 3, 4} & sizes, "some samples must have been alone with others already gone"
    assert len(set(sol.nfe.tolist())) > 1


@pytest.mark.parametrize(
    ("cond", "null", "words"),
    [
        ({"y": 3}, {"y": 0}, r"'y' is 3 in cond and 0 in unconditional.*batched=False"),
        ({}, {"y": 0}, r"cond has no 'y'.*batched=False"),
        ({"y": torch.zeros(3, 4)}, {"y": torch.zeros(5)}, r"\(5,\).*expected \(4,\) or \(1, 4\)|cannot be one batch"),
        ({"y": torch.zeros(3, 4)}, {"y": torch.zeros(2, 4)}, r"has shape \(2, 4\).*Rows of their own go into cond"),
        ({"y": torch.zeros(3)}, None, r"needs the arguments that say that nothing is given"),
        ({"y": [torch.zeros(3)]}, {"y": torch.zeros(3)}, r"another structure.*batched=False"),
        ({"y": torch.zeros(3)}, {"y": None}, r"'y' is a tensor of shape \(3,\) in cond and None.*batched=False"),
    ],
)
def test_conditionings_that_one_call_cannot_take(cond: Any, null: Any, words: str) -> None:
    flow = ClassifierFree(fs.Flow(lambda x, t, y=None: -x, CondOT()), 2.0, unconditional=null)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        flow.velocity(torch.ones(3, 2), 0.5, **cond)


def test_two_calls_take_conditionings_that_one_cannot() -> None:
    flow = fs.Flow(lambda x, t, y=None: (0.0 if y is None else y) - x, CondOT())
    x = torch.ones(3, 2)
    for cond, null in (({"y": 3.0}, {"y": None}), ({"y": 3.0}, {"y": 0.0})):
        found = ClassifierFree(flow, 2.0, unconditional=null, batched=False).velocity(x, 0.5, **cond)
        torch.testing.assert_close(found, 6.0 - x)


class Small(nn.Module):
    """A network in a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert x.dtype == self.body.weight.dtype
        both = torch.cat((x, (t + y)[:, None].to(x)), 1)
        return self.body(both)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_are_guided_in_single(dtype: torch.dtype) -> None:
    base = fs.Flow(Small(dtype), paths.VP(), "noise")
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    flow = ClassifierFree(base, 7.5, unconditional={"y": 0}, batched=False)
    found = flow.noise(x, 0.4, y=y)
    weak, strong = (base.net(x.to(dtype), torch.full((4,), 0.4), v).float() for v in (0 * y, y))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weak + 7.5 * (strong - weak), rtol=1e-5, atol=1e-5)
    for made in (
        ClassifierFree(base, 7.5, unconditional={"y": 0}, rule=guidance.APG(norm_threshold=1.0), rescale=0.5),
        guidance.Transformed(flow, guidance.Threshold(0.9)),
    ):
        sol = fs.sample(made, (4, 3), solver=solvers.DDIM(), nfe=8, cond={"y": y})
        assert sol.x.dtype == torch.float32
        assert bool(sol.ok.all())


OTHERS: list[tuple[Path, str]] = [
    (paths.VP(), "noise"), (paths.VE(), "score"), (paths.EDM(), "data"), (CondOT(), "velocity"), (paths.SubVP(), "v"),
    (Discrete.linear(), "noise"),
]  # fmt: skip


@pytest.mark.parametrize(("weak_path", "weak_prediction"), OTHERS, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize(("path", "prediction"), OTHERS, ids=lambda v: repr(v)[:12])
def test_autoguidance_across_paths_and_predictions(
    path: Path, prediction: str, weak_path: Path, weak_prediction: str
) -> None:
    """E[z | x] of the weak model is at the same σ/α, where x of one path is x of another times α'/α."""
    strong = GaussianMixture(MEANS, 0.3)
    weak = GaussianMixture(MEANS * 0.8, 0.7)
    flow = Autoguidance(strong.flow(path, prediction), weak.flow(weak_path, weak_prediction), 2.2)
    times = [path.time(v) for v in (-1.5, 0.0, 1.0)]
    for t in times:
        x, point = states(path, t), path.at(t)
        direct = weak.data(x, point)  # the mixture's own formula on the first path
        expected = direct + 2.2 * (strong.data(x, point) - direct)
        found = flow.estimate(x, t)
        torch.testing.assert_close(found.data, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(point.alpha * found.data + point.sigma * found.noise, x, rtol=1e-9, atol=1e-9)
        many = torch.full((len(x),), t, dtype=torch.float64)
        torch.testing.assert_close(flow.data(x, many), expected, rtol=1e-6, atol=1e-6)


def test_autoguidance_is_off_where_the_weak_path_knows_no_such_noise_level() -> None:
    """CondOT begins and ends beyond EDM's σ/α from 80 to 0.002; there only the flow itself runs."""
    strong, weak = GaussianMixture(MEANS, 0.3), GaussianMixture(MEANS, 0.7)
    base = strong.flow(CondOT())
    flow = Autoguidance(base, weak.flow(paths.EDM(), "data"), 2.0)
    x = states(CondOT(), 0.5)
    for t in (0.0, 0.01, 0.9985, 1.0):
        assert flow.cost(t) == 1
        torch.testing.assert_close(flow.velocity(x, t), base.velocity(x, t), rtol=1e-12, atol=1e-12)
    for t in (0.0125, 0.5, 0.9975):
        assert flow.cost(t) == 2
    assert fs.sample(flow, (3, 2), solver=solvers.Heun(), nfe=20).nfe.tolist() == [20] * 3, "11 estimates"


def test_a_weak_flow_that_cannot_be_asked_is_named_before_anything_runs() -> None:
    strong, weak = GaussianMixture(MEANS, 0.3), GaussianMixture(MEANS, 0.7)
    flow = Autoguidance(strong.flow(CondOT()), weak.flow(CondOT(), "noise"), 2.0)
    with pytest.raises(SingularEstimate, match=r"guidance, through the grid, asks a 'noise' prediction at t = 0"):
        fs.sample(flow, (3, 2), solver=solvers.Euler(), nfe=8)
    late = Autoguidance(strong.flow(CondOT()), weak.flow(CondOT(), "noise"), 2.0, interval=(-5.0, 5.0))
    assert bool(fs.sample(late, (3, 2), solver=solvers.Euler(), nfe=8).ok.all())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda f: ClassifierFree(f, "4"), TypeError, "scale is a str; expected a number"),
        (lambda f: ClassifierFree(f, float("nan")), ValueError, "finite"),
        (lambda f: ClassifierFree(f, 4.0, unconditional=0), TypeError, "unconditional is a int; expected a mapping"),
        (lambda f: ClassifierFree(f, 4.0, interval=3.0), TypeError, r"interval = 3.0; expected log-SNRs"),
        (lambda f: ClassifierFree(f, 4.0, interval=(2.0, 1.0)), ValueError, r"expected log-SNRs low < high"),
        (lambda f: Interval.sigma(3.0, 1.0), ValueError, "0 <= low < high"),
        (lambda f: ClassifierFree(f, 4.0, rescale=1.5), ValueError, "between 0"),
        (lambda f: ClassifierFree(f, 4.0, rescale_in="x"), ValueError, "rescale_in = 'x'; expected one of data"),
        (lambda f: ClassifierFree(f, 4.0, rule="apg"), TypeError, "rule is 'apg'"),
        (lambda f: ClassifierFree(f.net, 4.0), TypeError, "flow is a function; expected a flowsolve.Flow"),
        (lambda f: Autoguidance(f, f.net, 2.0), TypeError, "weak is a function"),
        (lambda f: ClassifierFree(f, 4.0, guidance_rescale=0.7), TypeError, "guidance_rescale"),
    ],
)
def test_bad_settings_say_what_is_wrong(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(fs.Flow(lambda x, t: -x, CondOT()))


def test_flows_say_what_they_are() -> None:
    base = fs.Flow(lambda x, t: -x, CondOT())
    name = "Flow(function, CondOT(sigma_min=0.0), prediction='velocity')"
    made = guidance.Transformed(ClassifierFree(base, 4.0, interval=(-1.0, 2.0), rescale=0.7), guidance.Threshold(0.99))
    assert repr(made).startswith(f"Transformed(ClassifierFree({name}, scale=4, interval=(-1, 2), rescale=0.7")
    assert "Threshold(quantile=0.99" in repr(made)
    assert repr(Autoguidance(base, base, 2.0)) == f"Autoguidance({name}, {name}, scale=2)"


def test_the_convention_of_the_network_is_checked_beneath_the_guidance() -> None:
    base = GaussianMixture(MEANS, 0.3).flow(CondOT())
    flow = guidance.Transformed(Autoguidance(base, base, 9.0), guidance.Clip())
    data = GaussianMixture(MEANS, 0.3).sample(16, seed=0)
    assert flow.check(data).ok
