r"""Quantiles of the Beta distribution, in plain floats.

For $x \le \tfrac12$ the regularised incomplete beta function is summed from a series of positive terms (DLMF 8.17.8),

$$ I_x(a, b) = \frac{x^a (1-x)^b}{a\,B(a, b)} \sum_{n \ge 0} \frac{(a+b)_n}{(a+1)_n}\,x^n , $$

and beyond by $I_x(a, b) = 1 - I_{1-x}(b, a)$. In $\log x$ its logarithm has the slope $a/((1-x)\,\Sigma)$, which
rises throughout for $b < 1$ and falls throughout for $b > 1$, so that Newton's iteration, begun on the right side, goes
to the root without overshooting.
"""

from __future__ import annotations

import math

__all__ = ["beta_quantile"]

TERMS = 4000
ITERATIONS = 60


def beta_quantile(below: int, above: int, a: float, b: float) -> tuple[float, float]:
    """(x, 1 − x) for the x with P(X ≤ x) = below/(below + above), X ~ Beta(a, b); the smaller to full precision."""
    if below <= math.exp(_log_cdf(math.log(0.5), a, b)[0]) * (below + above):
        x = _lower(below / (below + above), a, b)
        return x, 1.0 - x
    x = _lower(above / (below + above), b, a)
    return 1.0 - x, x


def _lower(p: float, a: float, b: float) -> float:
    """The quantile of p where it is at most 1/2."""
    target = math.log(p)
    # The series' first term alone is the asymptote of log I: right of the root where log I is convex, else left of it.
    y = min((target + math.log(a) + _log_beta(a, b)) / a, math.log(0.5))
    for _ in range(ITERATIONS):
        value, slope = _log_cdf(y, a, b)
        step = (target - value) / slope
        y = min(y + step, math.log(0.5))
        if abs(step) <= 4e-16 * max(1.0, abs(y)):
            break
    return math.exp(y)


def _log_cdf(y: float, a: float, b: float) -> tuple[float, float]:
    """log I_x(a, b) at log x = y, x ≤ 1/2, and its slope."""
    x, total, term = math.exp(y), 1.0, 1.0
    for n in range(TERMS):
        term *= (a + b + n) / (a + 1.0 + n) * x
        total += term
        if term <= 1e-17 * total:
            break
    value = a * y + b * math.log1p(-x) - math.log(a) - _log_beta(a, b) + math.log(total)
    return value, a / ((1.0 - x) * total)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
