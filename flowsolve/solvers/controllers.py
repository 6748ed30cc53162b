r"""Step-size control: from the errors of the last steps to the size of the next.

With $e_n$ the norm of the local error of a step in units of the tolerance, $e_{n-1}, e_{n-2}$ those of the two steps
accepted before it, and k one more than the order of the error estimate, a step is accepted where $e_n \le 1$ and

$$ h' = h \cdot \operatorname{clip}\bigl(\theta\; e_n^{-\beta_1/k}\, e_{n-1}^{-\beta_2/k}\, e_{n-2}^{-\beta_3/k},\;
   f_{\min},\, f_{\max}\bigr). $$

| controller | $\beta_1, \beta_2, \beta_3$ | |
|---|---|---|
| `I` | 1, 0, 0 | elementary control |
| `PI(beta)` | 1 − ¾β, −β, 0 | damps the sequence of steps (Gustafsson 1991; Hairer, Nørsett & Wanner IV.2) |
| `PID(p, i, d)` | p + i + d, −(p + 2d), d | digital filter (Söderlind 2003) |

After a rejection the elementary exponent is used, a step never grows, and neither does the step accepted next. The
first step is a guess, so the one after it may grow by more (`first_factor`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PI", "PID", "Controller", "I"]


@dataclass(frozen=True, kw_only=True)
class Controller:
    """What all controllers share; a subclass says its β.

    Attributes:
        safety: θ, below 1.
        min_factor: the most a step may shrink.
        max_factor: the most it may grow.
        first_factor: the most the first step may grow.
    """

    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    first_factor: float = 100.0

    def __post_init__(self) -> None:
        if not 0.0 < self.safety <= 1.0:
            raise ValueError(f"safety = {self.safety!r}; expected 0 < safety <= 1")
        if not 0.0 < self.min_factor < 1.0 < self.max_factor <= self.first_factor:
            raise ValueError(
                f"min_factor, max_factor, first_factor = {self.min_factor!r}, {self.max_factor!r}, "
                f"{self.first_factor!r}; expected 0 < min_factor < 1 < max_factor <= first_factor"
            )

    @property
    def betas(self) -> tuple[float, float, float]:
        """(β₁, β₂, β₃)."""
        raise NotImplementedError


@dataclass(frozen=True)
class I(Controller):  # noqa: E742 (the field's name)
    """Elementary (integral) control."""

    @property
    def betas(self) -> tuple[float, float, float]:
        """(1, 0, 0)."""
        return 1.0, 0.0, 0.0


@dataclass(frozen=True)
class PI(Controller):
    """Proportional-integral control.

    Attributes:
        beta: β, the weight of the previous error, in units of 1/k.
    """

    beta: float = 0.2

    @property
    def betas(self) -> tuple[float, float, float]:
        """(1 − ¾β, −β, 0)."""
        return 1.0 - 0.75 * self.beta, -self.beta, 0.0


@dataclass(frozen=True)
class PID(Controller):
    """Proportional-integral-derivative control.

    Attributes:
        p, i, d: the coefficients of the three parts, in units of 1/k.
    """

    p: float = 0.4
    i: float = 0.3
    d: float = 0.0

    @property
    def betas(self) -> tuple[float, float, float]:
        """(p + i + d, −(p + 2d), d)."""
        return self.p + self.i + self.d, -(self.p + 2.0 * self.d), self.d
