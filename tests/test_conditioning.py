"""Whose a conditioning tensor is: decided once for a call, and kept whatever becomes of its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowsolve as fs
from flowsolve._batch import Context
from flowsolve.conditioning import plain, rows_of, settled

PATH = fs.paths.CondOT()
BASE = fs.problems.GaussianMixture([[-1.0, 0.5], [1.0, -0.3]], std=0.3, dtype=torch.float64).flow(PATH)
CODE = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SHIFT = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)[:, None]
COUNT, TIGHT = 7, fs.solvers.Dopri5(1e-5, 1e-5)


def net(x: Tensor, t: Tensor, code: Tensor, shift: Tensor, extra: dict[str, Any] | None = None) -> Tensor:
    """A code that all share, whole, and a shift for each sample."""
    assert code.shape == (4, 3)
    assert len(shift) == len(x)
    if extra is not None:
        assert extra["code"].shape == (4, 3)
        assert len(extra["shift"]) == len(x)
    return BASE.velocity(x, t) + 0.05 * code.sum() + shift * (1 + 0.1 * x)


FLOW = fs.Flow(net, PATH)
SOLVERS = {"adaptive": (TIGHT, {}), "fixed": (fs.solvers.Heun(), {"nfe": 20}), "auto": ("auto", {"nfe": 16})}
every_solver = pytest.mark.parametrize(("solver", "options"), SOLVERS.values(), ids=SOLVERS)


@every_solver
@pytest.mark.parametrize("batch", [None, 3, 4])
def test_a_sample_is_what_it_is_alone(solver: Any, options: dict[str, Any], batch: int | None) -> None:
    cond = {"code": CODE, "shift": SHIFT, "extra": {"code": CODE, "shift": SHIFT}}
    found = fs.sample(FLOW, (COUNT, 2), solver=solver, cond=cond, batch=batch, dtype=torch.float64, **options).x
    for i in range(COUNT):
        own = {**cond, "shift": SHIFT[i : i + 1], "extra": {"code": CODE, "shift": SHIFT[i : i + 1]}}
        alone = fs.sample(FLOW, (1, 2), solver=solver, cond=own, samples=[i], dtype=torch.float64, **options).x
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("solver", [TIGHT, "auto"], ids=["adaptive", "auto"])
def test_so_is_a_density(solver: Any, batch: int | None) -> None:
    x = torch.linspace(-1, 1, 2 * COUNT, dtype=torch.float64).reshape(COUNT, 2)
    cond = {"code": CODE, "shift": SHIFT}
    found = fs.log_prob(FLOW, x, solver=solver, trace="exact", cond=cond, batch=batch).log_prob
    for i in range(COUNT):
        own = {"code": CODE, "shift": SHIFT[i : i + 1]}
        alone = fs.log_prob(FLOW, x[i : i + 1], solver=solver, trace="exact", cond=own).log_prob
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-11, atol=1e-11)


def test_as_many_samples_as_the_code_has_rows() -> None:
    """By its size it would have a row a sample, and be cut; marked, it is whole."""
    cond = {"code": fs.shared(CODE), "shift": SHIFT[:4]}
    found = fs.sample(FLOW, (4, 2), solver=TIGHT, cond=cond, batch=3, dtype=torch.float64).x
    for i in range(4):
        own = {"code": CODE, "shift": SHIFT[i : i + 1]}
        alone = fs.sample(FLOW, (1, 2), solver=TIGHT, cond=own, samples=[i], dtype=torch.float64).x
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    there = fs.encode(FLOW, found, solver=TIGHT, cond=cond, batch=3).x
    torch.testing.assert_close(fs.sample(FLOW, start=there, solver=TIGHT, cond=cond).x, found, rtol=1e-3, atol=1e-3)


def test_a_guided_flow_keeps_whose_it_is() -> None:
    guided = fs.guidance.ClassifierFree(FLOW, 2.0, unconditional={"shift": torch.zeros(1, dtype=torch.float64)})
    cond = {"code": fs.shared(CODE), "shift": SHIFT[:4]}
    whole = fs.sample(guided, (4, 2), solver=TIGHT, cond=cond, dtype=torch.float64).x
    pieces = fs.sample(guided, (4, 2), solver=TIGHT, cond=cond, batch=3, dtype=torch.float64).x
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        guided.velocity(whole, 0.5, **cond),
        2.0 * FLOW.velocity(whole, 0.5, **plain(cond)) - FLOW.velocity(whole, 0.5, code=CODE, shift=0.0 * SHIFT[:4]),
    )


def test_marks_are_for_direct_calls_too() -> None:
    x = torch.ones(4, 2, dtype=torch.float64)
    marked = FLOW.velocity(x, 0.5, code=fs.shared(CODE), shift=fs.per_sample(SHIFT[:4]))
    assert torch.equal(marked, FLOW.velocity(x, 0.5, code=CODE, shift=SHIFT[:4]))


@pytest.mark.parametrize("mark", [fs.per_sample, fs.shared])
def test_a_stream_asks_where_a_size_could_be_either(mark: Any) -> None:
    cond = {"code": CODE, "shift": SHIFT}
    with pytest.raises(ValueError, match=r"cond\['code'\].*shared\(tensor\).*per_sample"):
        next(fs.batching.sample(FLOW, (COUNT, 2), batch=4, nfe=8, cond=cond))
    with pytest.raises(ValueError, match=r"cond\['shift'\]"):
        next(fs.batching.sample(FLOW, (COUNT, 2), batch=3, nfe=8, cond=cond))
    cond = {"code": fs.shared(CODE), "shift": fs.per_sample(SHIFT)}
    right = fs.sample(FLOW, (COUNT, 2), nfe=8, cond=cond, dtype=torch.float64).x
    for batch in (3, 4):
        parts = fs.batching.sample(FLOW, (COUNT, 2), batch=batch, nfe=8, cond=cond, dtype=torch.float64)
        torch.testing.assert_close(torch.cat([p.x for p in parts]), right, rtol=1e-12, atol=1e-12)
    x = right.split([3, 1, 3])
    found = torch.cat([p.x for p in fs.batching.encode(FLOW, x, batch=4, nfe=8, cond=cond)])
    torch.testing.assert_close(found, fs.encode(FLOW, right, nfe=8, cond=cond).x, rtol=1e-12, atol=1e-12)


def test_pairs_of_a_stream_that_share_different_things_are_not_mixed() -> None:
    flow = fs.Flow(lambda x, t, y: -x * y, PATH)
    x = torch.ones(3, 2)
    same = [(x, {"y": 3.0}), (x, {"y": 3.0})]
    for solver in (fs.solvers.Dopri5(), fs.solvers.Euler()):
        options = {} if isinstance(solver, fs.solvers.Dopri5) else {"nfe": 8}
        list(fs.batching.encode(flow, same, solver=solver, batch=4, **options))
        with pytest.raises(ValueError, match=r"3\.0 and 5\.0"):
            list(fs.batching.encode(flow, [same[0], (x, {"y": 5.0})], solver=solver, batch=4, **options))
        with pytest.raises(ValueError, match="other keyword arguments"):
            list(fs.batching.encode(flow, [same[0], (x, {"y": torch.ones(3, 1)})], solver=solver, batch=4, **options))
        own = [(x, {"y": torch.full((3, 1), v)}) for v in (3.0, 5.0)]
        found = [p.x for p in fs.batching.encode(flow, own, solver=solver, batch=4, **options)]
        for part, (_, cond) in zip(found, own, strict=True):
            torch.testing.assert_close(part, fs.encode(flow, x, solver=solver, cond=cond, **options).x)


@pytest.mark.parametrize(
    ("cond", "key"),
    [
        ({"y": [0, 1, 2]}, r"cond\['y'\] is a list or tuple of numbers"),
        ({"y": (0.5, 1.0)}, r"cond\['y'\] is a list or tuple of numbers"),
        ({"y": [torch.tensor(1), torch.tensor(2)]}, r"cond\['y'\] is a list or tuple of numbers"),
        ({"y": np.arange(3)}, r"cond\['y'\] is a numpy array"),
        ({"extra": {"size": [1, 2]}}, r"cond\['extra'\]\['size'\] is a list or tuple of numbers"),
        ({"extra": {"size": np.ones(3)}}, r"cond\['extra'\]\['size'\] is a numpy array"),
    ],
)  # fmt: skip
def test_what_is_no_tensor_is_refused_by_its_key(cond: dict[str, Any], key: str) -> None:
    flow, x = fs.Flow(lambda x, t, **cond: -x, PATH), torch.zeros(3, 2)
    images = torch.tensor([[0, 255]] * 3, dtype=torch.uint8)
    for call in (
        lambda: fs.sample(flow, (3, 2), nfe=8, cond=cond),
        lambda: fs.encode(flow, x, nfe=8, cond=cond),
        lambda: fs.round_trip(flow, x, nfe=8, cond=cond),
        lambda: fs.log_prob(flow, x, nfe=12, cond=cond),
        lambda: fs.sample_log_prob(flow, (3, 2), nfe=12, cond=cond),
        lambda: fs.bits_per_dim(flow, images, nfe=12, cond=cond),
        lambda: fs.variational_bound(flow, images, cond=cond),
        lambda: next(fs.batching.sample(flow, (3, 2), nfe=8, batch=2, cond=cond)),
        lambda: next(fs.batching.log_prob(flow, [x], nfe=12, batch=2, cond=cond)),
    ):
        with pytest.raises(TypeError, match=key):
            call()


def test_marks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"cond\['shift'\] is marked per_sample.*\(7, 1\).*4 samples"):
        fs.sample(FLOW, (4, 2), nfe=8, cond={"code": CODE, "shift": fs.per_sample(SHIFT)})
    with pytest.raises(TypeError, match="got a float"):
        fs.per_sample(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without dimensions"):
        fs.per_sample(torch.tensor(1.0))
    with pytest.raises(ValueError, match="number 2 has none"):
        rows_of(settled({"y": fs.per_sample(torch.ones(2))}, 2), [1, 2])


def test_what_networks_take_as_lists_and_mappings_passes() -> None:
    """ControlNet's residuals are a tuple of tensors; a size for all is shared as it is."""
    seen: list[Any] = []
    residuals, size = (torch.ones(3, 4), torch.ones(3, 2)), (64, 64)

    def control(x: Tensor, t: Tensor, residuals: Any, size: Any, kind: str) -> Tensor:
        seen.append((residuals, size, kind))
        return -x

    cond = {"residuals": residuals, "size": fs.shared(size), "kind": "x"}
    fs.sample(fs.Flow(control, PATH), (3, 2), nfe=8, batch=2, cond=cond)
    assert all(isinstance(r, tuple) and len(r[0]) == len(r[1]) <= 2 for r, _, _ in seen)
    assert all(s == (64, 64) and k == "x" for _, s, k in seen)


def test_a_context_marks_itself() -> None:
    context = Context({"a": fs.shared(torch.ones(2)), "b": torch.ones(2, 1), "c": 3}, 2)
    again = Context(context.marked, 5)  # a count that no tensor has
    assert [len(v) for v in (again.select(np.array([1])).tree[k] for k in "ab")] == [2, 1]
    assert again.tree["c"] == 3
