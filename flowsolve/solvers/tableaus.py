r"""Butcher tableaus: explicit Runge–Kutta methods as data.

A method with stages $i = 1 … m$ computes

$$ k_i = f\bigl(s + c_i h,\; y + h\textstyle\sum_{j<i} a_{ij} k_j\bigr), \qquad y' = y + h\textstyle\sum_i b_i k_i, $$

and, where it has an embedded companion $\hat b$, the local error estimate $h\sum_i (b_i - \hat b_i)\,k_i$. If the last
row of $a$ is $b$, the last stage is the first of the next step ("first same as last"): a fixed step then needs one
evaluation less than the tableau has stages. Any tableau can be brought to that form by one more stage
(`Tableau.completed`): it costs nothing, since that slope opens the next step.

**Dense output.** Between s and s + h the solution is a polynomial in $\theta$, $0 \le \theta \le 1$,

$$ y(s + \theta h) = y + h\textstyle\sum_i b_i(\theta)\,k_i . $$

A tableau may bring the polynomials $b_i(\theta)$; the one of order 8 needs three more slopes for them, asked for only
in steps that are looked into. Without, they follow from what every method has: the cubic Hermite interpolant (order 3)
where the slope at the end is at hand, else the parabola with the right slope at the start (order 2).

Entries are Python floats, and rational ones are exact fractions until the last.

Sources: Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, chapter II (RK4's interpolant: II.6;
dop853: II.5, II.10 and their program); Dormand & Prince 1980; Bogacki & Shampine 1989; Tsitouras 2011; Ralston 1962;
Kutta 1901.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOSH3", "CLASSIC4", "DOP853", "DOPRI5", "EULER", "HEUN", "KUTTA3", "MIDPOINT", "RALSTON", "TSIT5", "Tableau",
    "Terms",
]  # fmt: skip

Vector = NDArray[np.float64]
Row = tuple[float, ...]
Terms = tuple[NDArray[np.int64], Vector]
"""A sum over stages: which ones, and a row of weights."""


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method.

    Attributes:
        name: the method's name.
        order: order of the solution that is carried on.
        c: nodes, one a stage.
        a: rows of the strictly lower triangle, the first one empty.
        b: weights of the solution.
        error: rows b − b̂, the weights of local error estimates: none, one, or two (see `flowsolve.solvers.adaptive`).
        error_order: order of the companion b̂, such that the estimate is O(h^(error_order + 1)).
        dense: coefficients of b_i(θ), one row a stage (the extra ones included), for θ, θ², …; empty for the default.
        dense_order: order of the interpolant.
        extra_c: nodes of the stages that only the interpolant needs.
        extra_a: their rows.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    error: tuple[Row, ...] = ()
    error_order: int = 0
    dense: tuple[Row, ...] = ()
    dense_order: int = 0
    extra_c: Row = ()
    extra_a: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        if not self.dense:
            dense, order = _hermite(self.b) if self.fsal else _parabola(self.b)
            object.__setattr__(self, "dense", dense)
            object.__setattr__(self, "dense_order", min(order, self.order))

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.c)

    @property
    def fsal(self) -> bool:
        """Whether the last stage is the first of the next step."""
        return self.b[-1] == 0.0 and self.a[-1] == self.b[:-1] and self.c[-1] == 1.0

    @property
    def evaluations(self) -> int:
        """Slopes needed for a step without error estimate."""
        return self.stages - self.fsal

    @property
    def completed(self) -> Tableau:
        """The same method with the slope at the end of the step as its last stage."""
        if self.fsal:
            return self
        if self.extra_c:
            raise ValueError(f"{self.name} has an interpolant with stages of its own; give the tableau in FSAL form")
        dense, order = (self.dense, self.dense_order) if self.dense_order > 2 else ((), 0)
        return replace(
            self,
            c=(*self.c, 1.0),
            a=(*self.a, self.b),
            b=(*self.b, 0.0),
            error=tuple((*row, 0.0) for row in self.error),
            dense=(*dense, (0.0,)) if dense else (),
            dense_order=order,
        )

    @cached_property
    def rows(self) -> tuple[Terms, ...]:
        """The rows of a without their zeros, those of the extra stages included."""
        return tuple(map(_terms, (*self.a, *self.extra_a)))

    @cached_property
    def solution(self) -> Terms:
        """b without its zeros."""
        return _terms(self.b)

    @cached_property
    def errors(self) -> tuple[Terms, ...]:
        """The rows of `error` without their zeros."""
        return tuple(map(_terms, self.error))

    @cached_property
    def sums(self) -> tuple[tuple[float, tuple[tuple[int, float], ...]], ...]:
        """For each stage its node, and its row of a as pairs (stage, weight) without zeros."""
        return tuple(zip(self.c, map(_pairs, self.a), strict=True))

    @cached_property
    def total(self) -> tuple[tuple[int, float], ...]:
        """b as pairs (stage, weight), without zeros."""
        return _pairs(self.b)

    @cached_property
    def nodes(self) -> Vector:
        """All nodes as an array, those of the extra stages included."""
        return np.array((*self.c, *self.extra_c))

    @cached_property
    def later(self) -> Vector:
        """The nodes of the stages after the first."""
        return np.array(self.c[1:])

    @cached_property
    def _polynomials(self) -> Vector:
        degree = max(map(len, self.dense))
        return np.array([[*row, *[0.0] * (degree - len(row))] for row in self.dense])

    def weights(self, theta: Vector) -> Vector:
        """b_i(θ), shape (P, stages) for θ of shape (P,)."""
        total: Vector = np.zeros((len(theta), len(self.dense)))
        for column in self._polynomials.T[::-1]:  # Horner's rule: a product of matrices would round by the batch's size
            total = (total + column) * theta[:, None]
        return total


def _pairs(row: Row) -> tuple[tuple[int, float], ...]:
    return tuple((i, w) for i, w in enumerate(row) if w != 0.0)


def _terms(row: Row) -> Terms:
    weights = np.array(row)
    stages = np.flatnonzero(weights)
    return stages, weights[stages][None]


def _hermite(b: Sequence[float]) -> tuple[tuple[Row, ...], int]:
    """θ²(3 − 2θ) b_i, with θ(1 − θ)² of the first slope and θ²(θ − 1) of the last."""
    rows = [[0.0, 3.0 * w, -2.0 * w] for w in b]
    for i, slope in ((0, (1.0, -2.0, 1.0)), (-1, (0.0, -1.0, 1.0))):
        rows[i] = [p + q for p, q in zip(rows[i], slope, strict=True)]
    return tuple(map(tuple, rows)), 3


def _parabola(b: Sequence[float]) -> tuple[tuple[Row, ...], int]:
    """θ² b_i, with θ(1 − θ) of the first slope."""
    rows = [[0.0, w] for w in b]
    rows[0] = [1.0, rows[0][1] - 1.0]
    return tuple(map(tuple, rows)), 2


def _rows(text: str) -> list[list[Fraction]]:
    """Rows of exact numbers, parted by semicolons."""
    return [[Fraction(v) for v in row.split()] for row in text.split(";")] if text.strip() else []


def _tableau(
    name: str,
    order: int,
    a: str,
    b: str,
    companions: str = "",
    error_order: int = 0,
    *,
    differences: str = "",
    extra: str = "",
    dense: tuple[Row, ...] = (),
    dense_order: int = 0,
) -> Tableau:
    """A tableau from text: the nodes are the row sums; companions are rows b̂, differences rows b − b̂."""
    rows, (weights,), more = [[], *_rows(a)], _rows(b), _rows(extra)
    errors = [[x - y for x, y in zip(weights, other, strict=True)] for other in _rows(companions)]
    return Tableau(
        name,
        order,
        c=_sums(rows),
        a=_floats(rows),
        b=tuple(map(float, weights)),
        error=_floats([*_rows(differences), *errors]),
        error_order=error_order,
        dense=dense,
        dense_order=dense_order,
        extra_c=_sums(more),
        extra_a=_floats(more),
    )


def _sums(rows: Sequence[Sequence[Fraction]]) -> Row:
    """Row sums; one that misses 1 by the last printed digit is 1, so that its stage sits at the end of the step."""
    sums = [float(sum(row)) for row in rows]
    return tuple(1.0 if abs(c - 1.0) < 1e-13 else c for c in sums)


def _floats(rows: Sequence[Sequence[Fraction]]) -> tuple[Row, ...]:
    return tuple(tuple(map(float, row)) for row in rows)


def _nested(b: str, d: str) -> tuple[Row, ...]:
    """Polynomials of Hairer's continuous extensions, one row of d for each F from F₃ on; with θ̄ = 1 − θ,

    y + θ(F₀ + θ̄(F₁ + θ(F₂ + θ̄(F₃ + θ(F₄ + …))))), F₀ = Δy, F₁ = h k₁ − Δy, F₂ = 2Δy − h(k₁ + k_m), F_j = h Σ d k,

    k_m being the slope at the end of the step.
    """
    (weights,), more = _rows(b), _rows(d)
    last = len(weights) - 1
    table = []
    for i in range(len(more[0])):
        delta = weights[i] if i <= last else Fraction(0)
        factors = [delta, (i == 0) - delta, 2 * delta - (i == 0) - (i == last), *(row[i] for row in more)]
        polynomial: list[Fraction] = []  # by powers of θ, from the innermost bracket outwards
        for j in range(len(factors) - 1, -1, -1):
            polynomial = [factors[j] + (polynomial[0] if polynomial else 0), *polynomial[1:]]
            shifted = [Fraction(0), *polynomial]
            if j % 2 == 0:  # times θ
                polynomial = shifted
            else:  # times 1 − θ
                polynomial = [p - q for p, q in zip([*polynomial, Fraction(0)], shifted, strict=True)]
        table.append(polynomial[1:])
    return _floats(table)


EULER = _tableau("euler", 1, "", "1")
MIDPOINT = _tableau("midpoint", 2, "1/2", "0 1")
HEUN = _tableau("heun", 2, "1", "1/2 1/2")
RALSTON = _tableau("ralston", 2, "2/3", "1/4 3/4")
KUTTA3 = _tableau("kutta3", 3, "1/2; -1 2", "1/6 2/3 1/6")
CLASSIC4 = _tableau(
    "rk4",
    4,
    "1/2; 0 1/2; 0 0 1",
    "1/6 1/3 1/3 1/6",
    dense=_floats(_rows("1 -3/2 2/3; 0 1 -2/3; 0 1 -2/3; 0 -1/2 2/3")),
    dense_order=3,
)
BOSH3 = _tableau("bosh3", 3, "1/2; 0 3/4; 2/9 1/3 4/9", "2/9 1/3 4/9 0", "7/24 1/4 1/3 1/8", 2)

_B5 = "35/384 0 500/1113 125/192 -2187/6784 11/84 0"
DOPRI5 = _tableau(
    "dopri5",
    5,
    """
    1/5;
    3/40 9/40;
    44/45 -56/15 32/9;
    19372/6561 -25360/2187 64448/6561 -212/729;
    9017/3168 -355/33 46732/5247 49/176 -5103/18656;
    35/384 0 500/1113 125/192 -2187/6784 11/84
    """,
    _B5,
    "5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40",
    4,
    dense=_nested(
        _B5,
        "-12715105075/11282082432 0 87487479700/32700410799 -10690763975/1880347072 701980252875/199316789632 "
        "-1453857185/822651844 69997945/29380423",
    ),
    dense_order=4,
)

_TSIT5 = "0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774"
TSIT5 = _tableau(
    "tsit5",
    5,
    f"""
    0.161;
    -0.008480655492356989 0.335480655492357;
    2.897153057105493 -6.359448489975075 4.362295432869581;
    5.325864828439257 -11.74888356406283 7.495539342889836 -0.09249506636175525;
    5.861455442946423 -12.92096931784711 8.159367898576159 -0.071584973281401 -0.02826905039406838;
    {_TSIT5}
    """,
    f"{_TSIT5} 0",
    error_order=4,
    differences="""
    -0.0017800110522257771 -0.0008164344596567469 0.007880878010261995 -0.1447110071732629 0.5823571654525552
      -0.45808210592918697 0.015151515151515152
    """,
    dense=_floats(
        _rows("""
        1 -2.763706197274826 2.9132554618219126 -1.0530884977290216;
        0 0.1317 -0.2234 0.1017;
        0 3.9302962368947516 -5.941033872131505 2.490627285651253;
        0 -12.411077166933676 30.33818863028232 -16.548102889244902;
        0 37.50931341651104 -88.1789048947664 47.37952196281928;
        0 -27.896526289197286 65.09189467479366 -34.87065786149661;
        0 1.5 -4 2.5
        """)
    ),
    dense_order=4,
)

# Hairer's dop853: order 8 with companions of orders 5 and 3, and a continuous extension of order 7.
_B8 = """
    0.05429373411656876223805357664 0 0 0 0 4.450312892752408881441139506 1.89151789931450038304281599
      -5.801203960010584781467211423 0.3111643669578198944089160624 -0.1521609496625160785561788068
      0.2013654008040303483747765375 0.0447106157277725905176885569
"""
_DOP853_D = """
    -8.428938276109012865135349114 0 0 0 0 0.5667149535193777696253178359 -3.068949945949891691279730473
      2.384667656512069828772814968 2.117034582445028276715514995 -0.8713915837779729920678990749
      2.240437430260788275854177165 0.6315787787694688181557024929 -0.0889903364513333108206981174
      18.14850552085472725665640496 -9.194632392478355400045198444 -4.4360363875948939664310572;
    10.42750864257913460341315101 0 0 0 0 242.2834917752581828843017532 165.2004517172702819850539489
      -374.5467547226902027951831215 -22.11366685312530603627093858 7.733432668472263838960389881
      -30.67408473108939818206121363 -9.332130526430227872956722171 15.69723812177084388613109108
      -31.13940321956517767728285041 -9.352924358844478386571386266 35.81684148639408375246589854;
    19.98505324200243382098765362 0 0 0 0 -387.0373087493517655510590174 -189.1781381951675688283083833
      527.8081592054236490056101669 -11.57390253995963012614187113 6.881232694696300016966692266
      -1.000605096691083840318386098 0.7777137798053443209286926574 -2.778205752353508406593200434
      -60.19669523126412075826738085 84.32040550667716101815990378 11.99229113618278932803513003;
    -25.69393346270374900331258613 0 0 0 0 -154.1897486902364337405399363 -231.5293791760454956753603911
      357.6391179106141237828534991 93.4053241836243100039076917 -37.45832313645163315687513935
      104.0996495089623004514724618 29.84029342666050312334436358 -43.53345659001114375443217506
      96.3245539591882829483949506 -39.17726167561543916523148617 -149.7268362579856258142212528
"""
DOP853 = _tableau(
    "dop853",
    8,
    f"""
    0.05260015195876773187855875445;
    0.01972505698453789945445953292 0.05917517095361369836337859875;
    0.02958758547680684918168929938 0 0.08876275643042054754506789813;
    0.2413651341592666855023697987 0 -0.8845494793282860853448649627 0.9248340032617920031157379665;
    0.03703703703703703703703703704 0 0 0.1708286087294738712796044822 0.1254676875668224250166918141;
    0.037109375 0 0 0.1702522110195440393149780603 0.06021653898045596068502193973 -0.017578125;
    0.03709200011850479271087793198 0 0 0.1703839257122399938102140547 0.1072620304463732846518091992
      -0.01531943774862440175279361582 0.00827378916381402288758473766;
    0.6241109587160757171144295778 0 0 -3.360892629446941294068571098 -0.8682193468417260068181898915
      27.59209969944670830494156008 20.1540675504778934086186789 -43.48988418106995884773662551;
    0.4776625364382643658904339085 0 0 -2.488114619971667641926425865 -0.5902908268368429963714464757
      21.23005144818119423472889499 15.27923363288242358325969229 -33.28821096898486291944532656
      -0.02033120170850862613582229286;
    -0.9371424300859873257170402166 0 0 5.186372428844063708300238532 1.091437348996729578185002547
      -8.149787010746926125139972674 -18.52006565999695986415661807 22.73948709935050428189700567
      2.493605552679652389870893968 -3.046764471898219500382366902;
    2.273310147516538207923597684 0 0 -10.53449546673725019840666899 -2.000872058224862499096757184
      -17.95893186311879891727659505 27.94888452941996005084998088 -2.858998277135023694740655087
      -8.872856933530629544335492893 12.36056717579430306472662015 0.643392746015763530355970484;
    {_B8}
    """,
    f"{_B8} 0",
    """
    0.244094488188976377952755905512 0 0 0 0 0 0 0 0.733846688281611857341361741547 0 0
      0.0220588235294117647058823529412 0
    """,
    7,
    differences="""
    0.01312004499419488073250102996 0 0 0 0 -1.225156446376204440720569753 -0.4957589496572501915214079952
      1.664377182454986536961530415 -0.350328848749973681688648729 0.3341791187130174790297318841
      0.08192320648511571246570742613 -0.02235530786388629525884427845 0
    """,
    extra="""
    0.05616750228304795233929092197 0 0 0 0 0 0.2535002102166248110887947653 -0.2462390374708024899174414754
      -0.1241914232638163604690101406 0.1532917982787656973120632268 0.008201052295634689884916666021
      0.007567897660545699761386035896 -0.008298;
    0.03183464816350214050607684733 0 0 0 0 0.02830090967236677552883229614 0.05354198830743856762237973844
      -0.05492374857139098846465693403 0 0 -0.000108347328697249322858509316994
      0.000382571090835658412954920192323 -0.000340465008687404560802977114492 0.1413124436746325002780746184;
    -0.4288963015837919234085735387 0 0 0 0 -4.697621415361163843144494472 7.683421196062599041842409539
      4.068989818397110079702135543 0.356727187455281109270669543 0 0 0 -0.001399024165159014621294180097
      2.947514789152772338955627215 -9.150958472179870010818701871
    """,
    dense=_nested(f"{_B8} 0", _DOP853_D),
    dense_order=7,
)
