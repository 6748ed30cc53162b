r"""Guidance by a gradient: of a classifier's log-probability, or of the likelihood of a measurement of ẑ.

By Bayes' rule $\nabla\log p_t(x\mid y) = \nabla\log p_t(x) + \nabla\log p_t(y\mid x)$, and with score $-\hat
\varepsilon/\sigma$ that is

$$ \hat\varepsilon' = \hat\varepsilon - w\,\sigma\,\nabla_x\log p_t(y\mid x), \qquad
   \hat z' = \hat z + w\,\tfrac{\sigma^2}{\alpha}\,\nabla_x\log p_t(y\mid x) $$

(Dhariwal & Nichol 2021; exact for w = 1 and the true classifier). The gradient is with respect to the state as the path
scales it. `Posterior` puts $\log p(y\mid\hat z(x, t))$ in its place (diffusion posterior sampling, Chung et al. 2023;
universal guidance, Bansal et al. 2023): an approximation, through the network's own Jacobian.

At α = 0 the state holds nothing of the data, and its gradient says nothing of ẑ. There the flow must not be guided:
give an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import MARK, per_sample, send, take
from flowsolve._surroundings import bare
from flowsolve.conditioning import plain
from flowsolve.flow import Flow, network_time
from flowsolve.guidance.base import STRAIGHT, Guided, Interval, Schedule, host, moved, require_flow, straight
from flowsolve.guidance.conditioning import own, select
from flowsolve.predictions import Row, SingularEstimate

__all__ = ["Classifier", "Posterior"]

NOISE = Row(0.0, 1.0)


class _Gradient(Guided):
    """ε̂ − w σ g, with g the gradient of a log-probability that a subclass gives."""

    keyword: str
    """The keyword of `cond` that holds the function's own arguments."""

    def __init__(
        self, flow: Flow, log_prob: Callable[..., Tensor], scale: Any, interval: Any, evaluations: int
    ) -> None:
        require_flow(flow)
        if not callable(log_prob):
            raise TypeError(f"log_prob is a {type(log_prob).__name__}; expected a function of shape (B, *S) to (B,)")
        if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 0:
            raise ValueError(f"evaluations = {evaluations!r}; expected an integer >= 0")
        self.log_prob, self.evaluations = log_prob, evaluations
        self.schedule = Schedule.of(scale, interval, off=0.0)
        least, most = flow.nfe_range
        if not self.schedule.constant:
            most += evaluations
        elif self.schedule.scale != 0.0:
            least, most = least + evaluations, most + evaluations
        super().__init__(flow, STRAIGHT, (least, most))

    def cost(self, t: Any) -> Any:
        """Network evaluations that an estimate at flow time t costs: an int, or int64 of t's shape for a tensor."""
        t = host(t)
        total = self.base.cost(t) + (np.asarray(self.schedule.weight(self.path, t)) != 0.0) * self.evaluations
        return total.astype(np.int64) if isinstance(t, Tensor) else int(total)

    @property
    def nets(self) -> tuple[Any, ...]:
        """Every callable that an estimate may call."""
        return (*self.base.nets, self.log_prob)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        return {**self.schedule.settings, "log_prob": self.log_prob, "evaluations": self.evaluations}

    def require(self, t: float, what: str = "the grid") -> None:
        """Raise SingularEstimate unless an estimate exists at flow time t, and is not guided at α = 0."""
        super().require(t, what)
        if self.path.at(t).alpha == 0.0 and self.schedule.weight(self.path, t) != 0.0:
            raise SingularEstimate(_at_noise(what, t, self))

    def call(self, x: Tensor, t: float | Tensor, *, clock: Callable[[Any], Any] | None = None, **cond: Any) -> Tensor:
        """The output at (x, t) in the straight row, in x's dtype (float32 at least)."""
        marks = cond.pop(MARK, None)
        if marks is None:
            marks, cond = own(cond, len(x)), plain(cond)
        given, cond = cond.get(self.keyword, {}), {k: v for k, v in cond.items() if k != self.keyword}
        its, marks = marks.get(self.keyword, {}), {k: v for k, v in marks.items() if k != self.keyword}
        weights = self.schedule.weight(self.path, t if self.schedule.constant else host(t))
        guided = np.flatnonzero(weights) if isinstance(weights, np.ndarray) else None
        if (len(guided) if guided is not None else weights) == 0:
            return self._plain(x, t, clock, cond, marks)
        if guided is None or len(guided) == len(x):
            return self._guided(x, t, weights, clock, cond, marks, given)
        rest = np.flatnonzero(weights == 0.0)
        assert isinstance(t, Tensor)
        alone = self._plain(take(x, rest), take(t, rest), clock, select(cond, marks, rest), marks)
        here, when, some = take(x, guided), take(t, guided), select(cond, marks, guided)
        made = self._guided(here, when, weights[guided], clock, some, marks, select(given, its, guided))
        order = send(torch.from_numpy(np.argsort(np.concatenate((rest, guided)))), x)
        return torch.cat((alone, made)).index_select(0, order)

    def _plain(self, x: Tensor, t: Any, clock: Any, cond: dict[str, Any], marks: Any) -> Tensor:
        """The straight output of the flow itself."""
        output = self.base.call(x, t, clock=clock, **cond, **{MARK: marks})
        return straight(self.base, x, output, self.path.at(t))

    def _guided(
        self, x: Tensor, t: Any, weights: Any, clock: Any, cond: dict[str, Any], marks: Any, given: Any
    ) -> Tensor:
        point = self.path.at(t)
        if _is_zero(point.alpha):
            raise SingularEstimate(_at_noise("t", t, self))
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__} differentiates, which inference_mode forbids; use no_grad instead"
            )
        recording = torch.is_grad_enabled()

        def ask(state: Tensor) -> Tensor:
            return self.base.call(state, t, clock=clock, **cond, **{MARK: marks})

        def total(here: Tensor) -> tuple[Tensor, Tensor]:
            output, value = self._value(here, x, t, point, ask, given, recording)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"log_prob returned {got}; expected one number a sample, shape ({len(x)},)")
            return value.sum(), output

        if not bare():  # torch.func and forward mode see through a transform, not through a graph
            slope, output = torch.func.grad(total, has_aux=True)(x)
        else:
            with torch.enable_grad():
                here = x if recording and x.requires_grad else x.detach().requires_grad_()
                value, output = total(here)
                slope = None
                if value.requires_grad:
                    (slope,) = torch.autograd.grad(value, here, create_graph=recording, allow_unused=True)
                if slope is None:
                    raise ValueError(
                        "log_prob does not depend on its argument for autograd, so there is no gradient to follow; "
                        "remove no_grad, detach or NumPy from it"
                    )
            output = output if recording else output.detach()
        weights = torch.from_numpy(weights) if isinstance(weights, np.ndarray) else weights
        change = per_sample(weights, output) * per_sample(point.sigma, output) * slope.to(output.dtype)
        return moved(output, point, NOISE, -change)

    def _value(
        self, here: Tensor, x: Tensor, t: Any, point: Any, ask: Callable[[Tensor], Tensor], given: Any, recording: bool
    ) -> tuple[Tensor, Tensor]:
        """The straight output, and the log-probability as a function of `here`.

        Args:
            here: the state x, to be differentiated by.
            ask: the flow's own output at a state.
            given: arguments of log_prob.
            recording: whether the output's own graph is wanted.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        name = getattr(self.log_prob, "__name__", type(self.log_prob).__name__)
        return f"{type(self).__name__}({self.base!r}, {name}, {self.schedule})"


class Classifier(_Gradient):
    """Classifier guidance (Dhariwal & Nichol 2021): ε̂ − w σ ∇ log p(y | x, t).

    Args:
        flow: the flow, unconditional or not.
        log_prob: log p(y | x, t), from x of shape (B, *S), scaled as the path scales it, and t of shape (B,), to (B,).
            Keyword arguments of its own, such as labels, go into the solve: cond={…, "classifier": {"y": …}}.
        scale: w, a number or a function of the log-SNR λ; 0 is the flow itself.
        interval: log-SNRs (low, high) within which the flow is guided, or an `Interval`. On a path that starts at
            α = 0 it must begin after that.
        time: the clock that log_prob reads: "flow", "native" (the path's), or a function of flow time.
        evaluations: what a call of log_prob counts in NFE: 1 for a network, 0 for a formula.

    Raises:
        ValueError, TypeError: settings as above.
        SingularEstimate: guidance at α = 0.

    Examples:
        >>> flow = fs.problems.GaussianMixture([[-1.0], [1.0]], std=0.2).flow(fs.paths.VP())
        >>> right = lambda x, t: torch.nn.functional.logsigmoid(4.0 * x[:, 0])
        >>> sol = fs.sample(fs.guidance.Classifier(flow, right, 3.0, evaluations=0), (64, 1), nfe=20)
        >>> bool((sol.x > 0).float().mean() > 0.9)
        True
    """

    keyword = "classifier"

    def __init__(
        self,
        flow: Flow,
        log_prob: Callable[..., Tensor],
        scale: float | Callable[[float], float] = 1.0,
        *,
        interval: tuple[float, float] | Interval | None = None,
        time: str | Callable[[Any], Any] = "flow",
        evaluations: int = 1,
    ) -> None:
        super().__init__(flow, log_prob, scale, interval, evaluations)
        clocks = {"flow": lambda t: t, "native": flow.path.native_time}
        if not callable(time) and time not in clocks:
            raise ValueError(f"time = {time!r}; expected 'flow', 'native' or a function of flow time")
        self._reads: Callable[[Any], Any] = time if callable(time) else clocks[time]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything, beside `base`, that its estimates depend on."""
        return {**super().settings, "time": [float(self._reads(t)) for t in (0.25, 0.5, 0.75)]}

    def _value(
        self, here: Tensor, x: Tensor, t: Any, point: Any, ask: Callable[[Tensor], Tensor], given: Any, recording: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(recording):
            output = straight(self.base, x, ask(x), point)
        return output, self.log_prob(here, network_time(self._reads(t), x), **given)


class Posterior(_Gradient):
    """Guidance by a measurement y of the data (Chung et al. 2023): ε̂ − w σ ∇ log p(y | ẑ(x, t)).

    Args:
        flow: the flow; autograd must see through its network.
        log_prob: log p(y | z), from z of shape (B, *S) to (B,): minus a loss. Keyword arguments of its own go into the
            solve: cond={…, "measurement": {…}}.
        scale, interval: as for `Classifier`.
        evaluations: what a call of log_prob counts in NFE; the pass back through the network counts nothing.

    Raises:
        ValueError, TypeError: settings as above.
        SingularEstimate: guidance at α = 0.
    """

    keyword = "measurement"

    def __init__(
        self,
        flow: Flow,
        log_prob: Callable[..., Tensor],
        scale: float | Callable[[float], float] = 1.0,
        *,
        interval: tuple[float, float] | Interval | None = None,
        evaluations: int = 0,
    ) -> None:
        super().__init__(flow, log_prob, scale, interval, evaluations)

    def _value(
        self, here: Tensor, x: Tensor, t: Any, point: Any, ask: Callable[[Tensor], Tensor], given: Any, recording: bool
    ) -> tuple[Tensor, Tensor]:
        found = self.base.read(here, ask(here), point)
        return straight(self.base, here, found.output, point), self.log_prob(found.data, **given)


def _is_zero(alpha: Any) -> bool:
    """Whether any of it is 0; a tensor on a device is not read (where it is 0 there is no guidance)."""
    if isinstance(alpha, Tensor):
        return alpha.is_cpu and bool((alpha == 0.0).any())
    return bool(alpha == 0.0)


def _at_noise(what: str, t: Any, flow: Guided) -> str:
    low = max(flow.path.log_snr(0.0), -7.0)
    when = "some t" if isinstance(t, Tensor) else f"t = {t:g}"
    return (
        f"{what} asks for guidance by a gradient at {when} of {flow.path!r}, where α = 0: the state is all "
        f"noise and its gradient says nothing of the data; give the guidance an interval, such as ({low:g}, inf)"
    )
