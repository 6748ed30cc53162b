"""Tableaus against the order conditions of the rooted trees, which are written here on their own.

A method has order p if Σ_i b_i Φ_i(τ) = 1/γ(τ) for every rooted tree τ of at most p nodes. With a tree written as the
multiset of its branches, Φ_i([τ_1, …, τ_m]) = Π_l Σ_j a_ij Φ_j(τ_l) and γ([τ_1, …, τ_m]) = |τ| Π_l γ(τ_l)
(Butcher 1963; Hairer, Nørsett & Wanner II.2).
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest

from flowsolve import solvers
from flowsolve.solvers import tableaus
from flowsolve.solvers.tableaus import CLASSIC4, DOPRI5, EULER, HEUN, KUTTA3, MIDPOINT, Tableau

Tree = tuple["Tree", ...]

ALL = [EULER, MIDPOINT, HEUN, KUTTA3, CLASSIC4, DOPRI5]
CLAIMED = {"euler": 1, "midpoint": 2, "heun": 2, "kutta3": 3, "rk4": 4, "dopri5": 5}
tableau_cases = pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)


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
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    assert sorted(map(density, trees(4))) == [4, 8, 12, 24]


def test_every_tableau_is_listed_here() -> None:
    known = {id(v) for v in vars(tableaus).values() if isinstance(v, Tableau)}
    assert known == {id(t) for t in ALL}
    assert {t.name: t.order for t in ALL} == CLAIMED


@tableau_cases
def test_order_conditions_hold_exactly_up_to_the_order_and_not_beyond(tableau: Tableau) -> None:
    b = exact(tableau.b)
    for order in range(1, tableau.order + 1):
        assert residuals(tableau, b, order) == [0] * len(trees(order)), order
    assert max(residuals(tableau, b, tableau.order + 1)) > 0


@tableau_cases
def test_order_conditions_hold_in_float_arithmetic(tableau: Tableau) -> None:
    def phi(tree: Tree) -> list[float]:
        branches = [phi(branch) for branch in tree]
        return [
            math.prod(sum(x * p for x, p in zip(row, branch, strict=False)) for branch in branches) for row in tableau.a
        ]

    for order in range(1, tableau.order + 1):
        for tree in trees(order):
            total = sum(w * p for w, p in zip(tableau.b, phi(tree), strict=True))
            assert total == pytest.approx(1.0 / density(tree), abs=1e-14)


@tableau_cases
def test_shape_and_row_sums(tableau: Tableau) -> None:
    assert len(tableau.a) == len(tableau.b) == len(tableau.c) == tableau.stages
    assert [len(row) for row in tableau.a] == list(range(tableau.stages))
    for row, node in zip(tableau.a, tableau.c, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
        assert sum(exact(row), Fraction(0)) == exact((node,))[0]


def test_the_embedded_companion_has_order_four_and_no_more() -> None:
    b, companion = exact(DOPRI5.b), [Fraction(v) for v in DOPRI5_COMPANION.split()]
    for weight, hat, difference in zip(b, companion, DOPRI5.error, strict=True):
        assert float(weight - hat) == difference
    for order in range(1, 5):
        assert residuals(DOPRI5, companion, order) == [0] * len(trees(order))
    assert max(residuals(DOPRI5, companion, 5)) > 0
    assert DOPRI5.error_order == 4
    assert abs(sum(DOPRI5.error)) < 1e-14


DOPRI5_COMPANION = "5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40"  # Dormand & Prince 1980, table 2


@pytest.mark.parametrize(
    ("tableau", "fsal", "evaluations"),
    [
        (EULER, False, 1),
        (MIDPOINT, False, 2),
        (HEUN, False, 2),
        (KUTTA3, False, 3),
        (CLASSIC4, False, 4),
        (DOPRI5, True, 6),
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
        (solvers.RK4(), CLASSIC4), (solvers.Dopri5(), DOPRI5),
    ],
)  # fmt: skip
def test_solvers_use_their_tableau_and_its_evaluations(solver: solvers.RungeKutta, tableau: Tableau) -> None:
    assert solver.tableau is tableau
    assert solver.evaluations == tableau.evaluations
