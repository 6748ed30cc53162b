"""Couplings: scipy's optimum, marginals, labels, generators, and what a plan over the batch does to classes."""

from __future__ import annotations

import itertools
import math
import pickle
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowsolve.flow import Flow
from flowsolve.paths import CondOT
from flowsolve.training import Objective, couplings, named

F64 = torch.float64
optimize = pytest.importorskip("scipy.optimize")
needs_pot = pytest.mark.skipif(find_spec("ot") is None, reason="POT is not installed")
ALL: dict[str, couplings.Coupling] = {
    "independent": couplings.Independent(),
    "fixed": couplings.Fixed(),
    "exact": couplings.Exact(),
    "sinkhorn": couplings.Sinkhorn(0.1),
    "unbalanced": couplings.Unbalanced(0.1, 2.0),
    "by label": couplings.ByLabel(),
}
every = pytest.mark.parametrize("name", ALL)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int, shape: tuple[int, ...] = (2,), seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Noise, and data that lie to the right of it."""
    noise = torch.randn(n, *shape, generator=rng(seed), dtype=dtype)
    return noise, 1.5 + 2.0 * torch.randn(n, *shape, generator=rng(seed + 1), dtype=dtype)


@given(n=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_exact_is_the_best_of_all_permutations(n: int, seed: int) -> None:
    noise, data = batch(n, seed=seed)
    order = couplings.Exact().pair(noise, data).source
    assert order is not None
    assert sorted(order.tolist()) == list(range(n))
    best = min(float(couplings.cost(noise[list(p)], data)) for p in itertools.permutations(range(n)))
    assert float(couplings.cost(noise[order], data)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16])
def test_exact_is_scipy_s_optimum_for_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise, data = batch(64, shape, dtype=dtype)
    flat = [v.double().reshape(64, -1) for v in (noise, data)]
    costs = (flat[1][:, None] - flat[0][None]).square().sum(2).numpy()
    rows, columns = optimize.linear_sum_assignment(costs)
    optimum = float(costs[rows, columns].mean())
    pairing = couplings.Exact().pair(noise, data)
    source, same = pairing.apply(noise, data)
    assert torch.equal(same, data)
    assert torch.equal(source.sort(0).values, noise.sort(0).values)
    # float32 sums of D products: an assignment may be second best by as much as its costs are rounded
    slack = 1e-12 if dtype == F64 else 1e-5
    assert float(couplings.cost(source.double(), data.double())) == pytest.approx(optimum, rel=slack)


@needs_pot
@every
def test_pairs_are_valid_and_reproducible(name: str) -> None:
    coupling = ALL[name]
    noise, data = batch(96, (2, 2))
    labels = torch.arange(96) % 3
    pairings = [coupling.pair(noise, data, labels=labels, generator=rng(s)) for s in (5, 5, 6)]
    ordered = [p.apply(noise, data) for p in pairings]
    assert all(torch.equal(a, b) for a, b in zip(ordered[0], ordered[1], strict=True))
    before = torch.get_rng_state()
    coupling.pair(noise, data, labels=labels, generator=rng())
    assert torch.equal(before, torch.get_rng_state())
    if name in ("sinkhorn", "unbalanced"):
        assert not torch.equal(ordered[0][0], ordered[2][0])
    source, paired = ordered[0]
    if name != "unbalanced":
        assert torch.equal(paired, data)  # order and labels
    if name in ("independent", "fixed", "exact", "by label"):
        assert torch.equal(source.flatten(1).sort(0).values, noise.flatten(1).sort(0).values)  # no replacement
    independent = float(couplings.cost(noise, data))
    assert float(couplings.cost(source, paired)) <= independent * (1.0 + 1e-12)
    again = pickle.loads(pickle.dumps(coupling))  # noqa: S301
    assert again == coupling


@needs_pot
@every
def test_any_device(name: str, device: torch.device) -> None:
    """Plans are made on the host; the pairs stay where the data are, and are those of the host."""
    noise, data = batch(32, (1, 4), dtype=torch.float32)
    labels = torch.arange(32) % 2
    here = ALL[name].pair(noise, data, labels=labels, generator=rng(1)).apply(noise, data)
    there = noise.to(device), data.to(device)
    found = ALL[name].pair(*there, labels=labels.to(device), generator=rng(1)).apply(*there)
    for a, b in zip(here, found, strict=True):
        assert b.device.type == device.type
        torch.testing.assert_close(a, b.cpu())


@needs_pot
def test_sinkhorn_keeps_both_marginals_and_lies_between() -> None:
    """Each source point is used once on average; ε → 0 is the exact plan, ε → ∞ independent pairs."""
    noise, data = batch(40)
    draws = 2000
    count = torch.zeros(40)
    for seed in range(draws // 40):
        order = couplings.Sinkhorn(0.2).pair(noise, data, generator=rng(seed)).source
        assert order is not None
        count += torch.bincount(order, minlength=40)
    runs = draws // 40
    assert float((count - runs).abs().max()) < 5.0 * math.sqrt(runs)

    def cost(coupling: couplings.Coupling) -> float:
        return (
            sum(
                float(couplings.cost(*coupling.pair(noise, data, generator=rng(s)).apply(noise, data)))
                for s in range(5)
            )
            / 5
        )

    exact = float(couplings.cost(*couplings.Exact().pair(noise, data).apply(noise, data)))
    every_pair = float((data[:, None] - noise[None]).square().sum(2).mean())
    found = [cost(couplings.Sinkhorn(e, iterations=3000)) for e in (0.005, 0.1, 1.0, 100.0)]
    assert exact - 1e-9 <= found[0] <= 1.05 * exact
    assert found == sorted(found)
    assert found[3] == pytest.approx(every_pair, rel=0.05)
    with pytest.warns(RuntimeWarning, match="2 iterations of Sinkhorn are too few"):
        couplings.Sinkhorn(0.005, iterations=2).pair(noise, data, generator=rng())
    absolute = couplings.Sinkhorn(0.1 * every_pair, relative=False)
    assert cost(absolute) == pytest.approx(found[1], rel=1e-9)


@needs_pot
def test_unbalanced_leaves_outliers_out_and_labels_follow() -> None:
    noise, data = batch(80)
    data[:4] += 60.0
    labels = torch.arange(80)
    pairing = couplings.Unbalanced(0.05, 0.05).pair(noise, data, generator=rng())
    assert pairing.data is not None
    assert int((pairing.data < 4).sum()) == 0
    seen = {}

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen["label"] = label
        return x

    objective = Objective("velocity", coupling=couplings.Unbalanced(0.05, 0.05))
    draw = objective.draw(Flow(net, CondOT()), data, noise=noise, generator=rng(2), cond={"label": labels}, t=0.5)
    assert torch.equal(draw.data, data[draw.cond["label"]])
    objective.compare(Flow(net, CondOT()), draw)
    assert torch.equal(seen["label"], draw.cond["label"])


def test_a_plan_over_the_batch_moves_the_noise_of_a_class_and_one_within_classes_does_not() -> None:
    """What hurts conditional models: class 1 lies to the right, and gets the right half of the noise (z-scores)."""
    n, steps = 128, 40
    moved: dict[str, list[Tensor]] = {"exact": [], "by label": []}
    gain = {}
    for step in range(steps):
        labels = torch.arange(n) % 2
        noise = torch.randn(n, 2, generator=rng(2 * step), dtype=F64)
        data = torch.randn(n, 2, generator=rng(2 * step + 1), dtype=F64) * 0.3
        data[:, 0] += 4.0 * labels - 2.0
        for name in moved:
            source, _ = ALL[name].pair(noise, data, labels=labels).apply(noise, data)
            moved[name].append(source[labels == 1, 0])
            gain[name] = float(couplings.cost(source, data) / couplings.cost(noise, data))
    z, means = {}, {}
    for name, found in moved.items():
        x = torch.cat(found)
        means[name] = float(x.mean())
        z[name] = means[name] * math.sqrt(len(x))
    assert means["exact"] == pytest.approx(math.sqrt(2.0 / math.pi), abs=0.08)  # E|ε|: the right half of the noise
    assert z["exact"] > 30.0
    assert abs(z["by label"]) < 5.0
    assert gain["exact"] < gain["by label"] < 1.0


def test_conditional_flows_sample_their_class_only_with_a_coupling_by_label() -> None:
    """The best field of each class (least squares), integrated from all of the noise: its mean and spread."""
    n, batches = 256, 60
    flow = Flow(lambda x, t: x, CondOT())
    error = {}
    for name in ("exact", "by label"):
        drawn = []
        for step in range(batches):
            labels = torch.arange(n) % 2
            data = 0.3 * torch.randn(n, 1, generator=rng(step), dtype=F64) + (4.0 * labels - 2.0)[:, None]
            objective = Objective("velocity", coupling=ALL[name])
            drawn.append(objective.draw(flow, data, labels=labels, generator=rng(1000 + step)))
        one = torch.cat([labels == 1] * batches)
        t, x, u = (torch.cat([getattr(d, k) for d in drawn])[one] for k in ("t", "x", "target"))
        order = t.argsort()
        t, x, u = t[order], x[order], u[order]
        state = torch.randn(4000, 1, generator=rng(7), dtype=F64)
        parts = 16  # of the time, in each of which the field is a cubic in x
        for part in range(parts):
            inside = (t >= part / parts) & (t < (part + 1) / parts)
            powers = torch.cat([x[inside] ** k for k in range(2)], 1)
            weights = torch.linalg.lstsq(powers, u[inside]).solution
            state = state + torch.cat([state**k for k in range(2)], 1) @ weights / parts
        error[name] = abs(float(state.std()) - 0.3) / 0.3
    assert error["by label"] < 0.25
    assert error["exact"] > 1.5 * error["by label"]


def test_the_objective_reports_the_cost() -> None:
    flow, (_, data) = Flow(lambda x, t: x, CondOT()), batch(64)
    costs = {}
    for coupling in (couplings.Independent(), couplings.Exact()):
        draw = named.flow_matching(coupling).draw(flow, data, generator=rng(3))
        costs[type(coupling).__name__] = float(draw.cost)
        assert float(draw.cost) == pytest.approx(float((draw.data - draw.noise).square().sum(1).mean()))
    assert costs["Exact"] < costs["Independent"]


def test_errors() -> None:
    noise, data = batch(4)
    with pytest.raises(ValueError, match="source has shape"):
        couplings.Exact().pair(noise[:3], data)
    with pytest.raises(ValueError, match="needs labels"):
        couplings.ByLabel().pair(noise, data)
    with pytest.raises(ValueError, match="labels have shape"):
        couplings.ByLabel().pair(noise, data, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="non-finite"):
        couplings.Exact().pair(noise, data * math.nan)
    with pytest.raises(ValueError, match="regularisation"):
        couplings.Sinkhorn(0.0)
    assert couplings.Exact().pair(noise[:0], data[:0]).source is None
