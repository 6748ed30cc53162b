"""The record of measured orders: the script on small cases, its list, and the tables of the solvers' page."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from flowsolve import solvers
from flowsolve.solvers import Solver

ROOT = Path(__file__).parents[2]
BASES = {"Adaptive", "EstimateSolver", "RungeKutta", "Solver"}
NO_ORDER = {"Fitted", "RePaint", "Restart"}
"""Of one checkpoint and budget; and what goes back along a trajectory, whose steps are the inner solver's."""


@pytest.fixture
def orders(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("orders")


@pytest.fixture
def record(orders):
    return json.loads(orders.RESULTS.read_text())


def test_every_solver_is_in_the_list(orders):
    exported = {name for name in solvers.__all__ if isinstance(kind := getattr(solvers, name), type)
                and issubclass(kind, Solver)}  # fmt: skip
    assert exported - BASES - NO_ORDER == {type(entry.solver).__name__ for entry in orders.ENTRIES}


def test_a_name_makes_its_solver(orders):
    for entry in orders.ENTRIES:
        assert eval(entry.name, vars(solvers)) == entry.solver  # noqa: S307
    assert len({entry.name for entry in orders.ENTRIES}) == len(orders.ENTRIES)


def test_the_record_is_of_the_list(orders, record):
    assert not record["quick"]
    for row, entry in zip(record["rows"], orders.ENTRIES, strict=True):
        assert {**row, **orders.described(entry)} == row
        assert set(row["measured"]) - {"plain"} == set(row["claimed"])


def test_what_is_claimed_was_measured(orders, record):
    assert [line for row in record["rows"] for line in orders.short_of(row)] == []


def test_a_loss_of_order_is_told(orders, record):
    row = next(row for row in record["rows"] if row["solver"] == "RK4()")
    lost = {**row, "claimed": {"order": 5}}
    (line,) = orders.short_of(lost)
    assert line.startswith("RK4(): order 5 claimed, 3.")


def test_the_page_is_in_step_with_the_record(orders, record):
    page = orders.PAGE.read_text()
    assert orders.written(page, record) == page, "run benchmarks/orders.py --docs --keep"


def test_truth_does_not_depend_on_the_path(orders):
    """x/(α+σ) ends where it does on every path: the truth is a flow's own, solved to 1e-12."""
    import flowsolve as fs

    for path in orders.PATHS.values():
        start, end, x, truth = orders.case(path)
        sol = fs.sample(
            orders.mixture().flow(path), start=x, interval=(start, end), solver=solvers.Dopri8(rtol=1e-12, atol=1e-12)
        )
        assert float((sol.x - truth).abs().max()) < 1e-10 * (path.alpha(end) + path.sigma(end))


def test_the_script_runs(orders, tmp_path, capsys):
    """Quick orders are near those of the record, where the regime begins early; the table has a line for each."""
    out = tmp_path / "orders.json"
    some = ["Heun", "DPMSolverPP", "DPMSolver12", "IPNDM", "StochasticHeun", "Churn"]
    orders.main(["--quick", "--out", str(out), "--only", *some])
    found = {row["solver"]: row["measured"] for row in json.loads(out.read_text())["rows"]}
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)
    assert found["Heun()"]["order"]["slopes"]["VP"] == pytest.approx(2.0, abs=0.1)
    assert found["DPMSolverPP(2)"]["ramp"]["slopes"]["VP"] == pytest.approx(2.0, abs=0.1)
    assert found["StochasticHeun()"]["weak"]["slopes"]["VP"] == pytest.approx(2.0, abs=0.2)
    assert found["DPMSolver12()"]["control"]["slopes"]["VP"] == pytest.approx(2.0, abs=0.1)
    orders.main(["--quick", "--out", str(out), "--only", "Euler"])  # what was measured before is kept
    again = {row["solver"]: row["measured"] for row in json.loads(out.read_text())["rows"]}
    assert set(again) == {*found, "Euler()"}
    assert all(again[name] == found[name] for name in found)


@pytest.mark.slow
def test_the_record_can_be_made_again(orders, record):
    """Slopes of a few entries, as recorded to 0.02."""
    for name in ("UniPC(3)", "SDEDPMSolverPP(2)", "EulerMaruyama()"):
        entry = next(entry for entry in orders.ENTRIES if entry.name == name)
        row = next(row for row in record["rows"] if row["solver"] == name)
        for kind, found in orders.measure(replace(entry, mixture=None))["measured"].items():
            assert found["slopes"] == pytest.approx(row["measured"][kind]["slopes"], abs=0.02)
