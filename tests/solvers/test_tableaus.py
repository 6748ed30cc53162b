"""Tableaus against the order conditions of the rooted trees, which are written here on their own.

A method has order p if Σ_i b_i Φ_i(τ) = 1/γ(τ) for every rooted tree τ of at most p nodes. With a tree written as the
multiset of its branches, Φ_i([τ_1, …, τ_m]) = Π_l Σ_j a_ij Φ_j(τ_l) and γ([τ_1, …, τ_m]) = |τ| Π_l γ(τ_l)
(Butcher 1963; Hairer, Nørsett & Wanner II.2).
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np
import pytest

from flowsolve import solvers
from flowsolve.solvers import tableaus
from flowsolve.solvers.tableaus import (
    BOSH3,
    CLASSIC4,
    DOP853,
    DOPRI5,
    EULER,
    HEUN,
    KUTTA3,
    MIDPOINT,
    RALSTON,
    TSIT5,
    Tableau,
)  # fmt: skip

Tree = tuple["Tree", ...]

RATIONAL = [EULER, MIDPOINT, HEUN, RALSTON, KUTTA3, CLASSIC4, BOSH3, DOPRI5]
ALL = [*RATIONAL, TSIT5, DOP853]
CLAIMED = {
    "euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "kutta3": 3, "rk4": 4, "bosh3": 3, "dopri5": 5, "tsit5": 5,
    "dop853": 8,
}  # fmt: skip
tableau_cases = pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)
rational_cases = pytest.mark.parametrize("tableau", RATIONAL, ids=lambda tableau: tableau.name)


def partitions(total: int, most: int) -> list[list[int]]:
    if total == 0:
        return [[]]
    return [[k, *rest] for k in range(min(total, most), 0, -1) for rest in partitions(total - k, k)]


def trees(nodes: int) -> set[Tree]:
    """All rooted trees with that many nodes."""
    found: set[Tree] = set()
    for sizes in partitions(nodes - 1, nodes - 1):
        forests: list[tuple[Tree, ...]] = [()]
        for size in sorted(set(sizes)):
            several = list(combinations_with_replacement(sorted(trees(size)), sizes.count(size)))
            forests = [(*forest, *more) for forest in forests for more in several]
        found |= {tuple(sorted(forest)) for forest in forests}
    return found


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


def density(tree: Tree) -> int:
    return size(tree) * math.prod(map(density, tree))


def weights(tree: Tree, a: list[list[Fraction]]) -> list[Fraction]:
    """Φ_i of a tree for every stage i."""
    branches = [weights(branch, a) for branch in tree]
    return [
        math.prod((sum((x * phi for x, phi in zip(row, branch, strict=False)), Fraction(0)) for branch in branches),
                  start=Fraction(1))
        for row in a
    ]  # fmt: skip


def exact(values: tuple[float, ...]) -> list[Fraction]:
    """The fractions that the floats stand for; every denominator in use is below 400 000."""
    fractions = [Fraction(v).limit_denominator(400_000) for v in values]
    assert all(float(f) == v for f, v in zip(fractions, values, strict=True))
    return fractions


def residuals(tableau: Tableau, b: list[Fraction], order: int) -> list[Fraction]:
    a = [exact(row) for row in tableau.a]
    return [
        abs(
            sum((w * phi for w, phi in zip(b, weights(tree, a), strict=True)), Fraction(0)) - Fraction(1, density(tree))
        )
        for tree in sorted(trees(order))
    ]


def test_there_are_as_many_trees_as_cayley_counted() -> None:
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert sorted(map(density, trees(4))) == [4, 8, 12, 24]


def test_every_tableau_is_listed_here() -> None:
    known = {id(v) for v in vars(tableaus).values() if isinstance(v, Tableau)}
    assert known == {id(t) for t in ALL}
    assert {t.name: t.order for t in ALL} == CLAIMED


@rational_cases
def test_order_conditions_hold_exactly_up_to_the_order_and_not_beyond(tableau: Tableau) -> None:
    b = exact(tableau.b)
    for order in range(1, tableau.order + 1):
        assert residuals(tableau, b, order) == [0] * len(trees(order)), order
    assert max(residuals(tableau, b, tableau.order + 1)) > 0


def matrix(tableau: Tableau) -> np.ndarray:
    """a as a square matrix, with the rows of the extra stages."""
    rows = (*tableau.a, *tableau.extra_a)
    a = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    return a


def elementary(tree: Tree, a: np.ndarray) -> np.ndarray:
    """Φ_i of a tree for every stage i, in float arithmetic."""
    phi = np.ones(len(a))
    for branch in tree:
        phi = phi * (a @ elementary(branch, a))
    return phi


def defect(b: np.ndarray, a: np.ndarray, order: int, theta: float = 1.0) -> float:
    """The largest |Σ b_i Φ_i(τ) − θ^n/γ(τ)| over trees of `order` nodes."""
    return max(abs(b @ elementary(tree, a) - theta**order / density(tree)) for tree in trees(order))


@tableau_cases
def test_order_conditions_hold_in_float_arithmetic(tableau: Tableau) -> None:
    a, b = matrix(tableau)[: tableau.stages, : tableau.stages], np.array(tableau.b)
    for order in range(1, tableau.order + 1):
        assert defect(b, a, order) < 1e-13, order
    if tableau.order < 8:  # there are 286 trees of nine nodes
        assert defect(b, a, tableau.order + 1) > 1e-5


@pytest.mark.parametrize("tableau", [BOSH3, DOPRI5, TSIT5, DOP853], ids=lambda tableau: tableau.name)
def test_companions_have_their_order_and_no_more(tableau: Tableau) -> None:
    """b̂ = b − error: of order 2, 4 and 4; of dop853 the fifth and the third."""
    a = matrix(tableau)[: tableau.stages, : tableau.stages]
    orders = {"bosh3": [2], "dopri5": [4], "tsit5": [4], "dop853": [5, 3]}[tableau.name]
    assert len(tableau.error) == len(orders)
    for row, order in zip(tableau.error, orders, strict=True):
        companion = np.array(tableau.b) - np.array(row)
        assert all(defect(companion, a, n) < 1e-13 for n in range(1, order + 1))
        assert defect(companion, a, order + 1) > 1e-5
    # e ~ h^(error_order + 1): the fifth's h⁶ squared over the third's h⁴ is h⁸
    expected = orders[0] if len(orders) == 1 else 2 * (orders[0] + 1) - (orders[1] + 1) - 1
    assert tableau.error_order == expected


@tableau_cases
def test_interpolants_have_their_order_and_meet_both_ends(tableau: Tableau) -> None:
    """Σ b_i(θ) Φ_i(τ) = θ^|τ|/γ(τ) up to the order of the interpolant, for any θ."""
    a = matrix(tableau)
    assert tableau.dense_order == {8: 7, 5: 4, 4: 3, 3: 3 if tableau.fsal else 2}.get(tableau.order, tableau.order)
    for theta in (0.2, 0.5, 0.9):
        b = tableau.weights(np.array([theta]))[0]
        stages = len(b)
        for order in range(1, tableau.dense_order + 1):
            assert defect(b, a[:stages, :stages], order, theta) < 1e-12, (theta, order)
    assert defect(b, a[:stages, :stages], tableau.dense_order + 1, theta) > 1e-6
    ends = tableau.weights(np.array([0.0, 1.0]))
    assert (ends[0] == 0.0).all()
    assert ends[1][: tableau.stages] == pytest.approx(tableau.b, abs=1e-12)
    assert ends[1][tableau.stages :] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("tableau", [EULER, HEUN, CLASSIC4, BOSH3, DOPRI5], ids=lambda tableau: tableau.name)
def test_completion_adds_the_slope_at_the_end_and_changes_nothing_else(tableau: Tableau) -> None:
    done = tableau.completed
    assert done.fsal
    assert done.completed is done
    assert (done is tableau) == tableau.fsal
    assert done.b[: tableau.stages] == tableau.b
    assert done.evaluations == tableau.evaluations
    assert done.dense_order >= tableau.dense_order
    a = matrix(done)
    for theta in (0.3, 0.8):
        b = done.weights(np.array([theta]))[0]
        assert all(defect(b, a, order, theta) < 1e-13 for order in range(1, done.dense_order + 1))


@tableau_cases
def test_shape_and_row_sums(tableau: Tableau) -> None:
    assert len(tableau.a) == len(tableau.b) == len(tableau.c) == tableau.stages
    assert [len(row) for row in tableau.a] == list(range(tableau.stages))
    for row, node in zip(tableau.a, tableau.c, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
        if tableau in RATIONAL:
            assert sum(exact(row), Fraction(0)) == exact((node,))[0]


def test_dopri5_s_companion_is_the_one_of_the_paper() -> None:
    """Dormand & Prince 1980, table 2."""
    companion = [Fraction(v) for v in ["5179/57600", "0", "7571/16695", "393/640", "-92097/339200", "187/2100", "1/40"]]
    for weight, hat, difference in zip(exact(DOPRI5.b), companion, DOPRI5.error[0], strict=True):
        assert float(weight - hat) == difference


@pytest.mark.parametrize(
    ("tableau", "fsal", "evaluations"),
    [
        (EULER, False, 1),
        (MIDPOINT, False, 2),
        (HEUN, False, 2),
        (KUTTA3, False, 3),
        (CLASSIC4, False, 4),
        (RALSTON, False, 2),
        (BOSH3, True, 3),
        (DOPRI5, True, 6),
        (TSIT5, True, 6),
        (DOP853, True, 12),
    ],
    ids=lambda v: v.name if isinstance(v, Tableau) else "",
)
def test_first_same_as_last_is_derived_from_the_numbers(tableau: Tableau, fsal: bool, evaluations: int) -> None:
    derived = tableau.b[-1] == 0 and tableau.c[-1] == 1 and tableau.a[-1] == tableau.b[:-1]
    assert tableau.fsal is derived is fsal
    assert tableau.evaluations == evaluations


@pytest.mark.parametrize(
    ("solver", "tableau"),
    [
        (solvers.Euler(), EULER), (solvers.Midpoint(), MIDPOINT), (solvers.Heun(), HEUN),
        (solvers.Ralston(), RALSTON), (solvers.RK4(), CLASSIC4), (solvers.Bosh3(), BOSH3), (solvers.Dopri5(), DOPRI5),
        (solvers.Tsit5(), TSIT5), (solvers.Dopri8(), DOP853),
    ],
)  # fmt: skip
def test_solvers_use_their_tableau_and_its_evaluations(solver: solvers.RungeKutta, tableau: Tableau) -> None:
    assert solver.tableau is tableau
    assert solver.evaluations == tableau.evaluations
