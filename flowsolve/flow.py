r"""Flow: a trained network, the path it was trained on, and what it predicts.

`Flow` is the only object that calls a network, and it calls it once for each estimate. Three declarations make any
checkpoint usable:

* **path**, the curve of the noised data (`flowsolve.paths`);
* **prediction**, the row the output stands for (`flowsolve.predictions`);
* **time**, the clock the network reads: `"flow"` (t from noise 0 to data 1), `"native"` (the path's own: a table's
  index, a diffusion time, σ), or any function of flow time.

Dtypes: the state is float32 or float64; a float16 or bfloat16 network is fed and read in its own dtype, and time
reaches it in float32 at least (bfloat16 cannot tell step 750 from 752).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from flowsolve._batch import MARK, send, state_dtype
from flowsolve._guard import Guard
from flowsolve._surroundings import within
from flowsolve.checks import CheckReport, check
from flowsolve.conditioning import plain
from flowsolve.paths import Path, Point
from flowsolve.predictions import Estimate, Prediction, SingularEstimate, resolve
from flowsolve.transforms import Latent, Range, Transform

__all__ = ["Flow", "clock_of", "clocked", "network_time", "tabled"]

LACKING = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)")
TABLE = 1 << 22  # the most numbers that a table of times may have
_table: ContextVar[Mapping[float, Tensor] | None] = ContextVar("times", default=None)


class Flow:
    """A network that moves noise to data along a Gaussian path.

    Args:
        net: any callable net(x, t, **cond) that takes x of shape (B, *S) and t of shape (B,) and returns (B, *S).
        path: the Gaussian path it was trained on.
        prediction: what it outputs: "velocity", "noise", "score", "data", "v", "flow" (−velocity), or a `Prediction`.
        time: the clock it reads: "flow", "native" (`path.native_time`), or a function from flow time (a float or a
            tensor of shape (B,)) to the network's time.
        dtype: the floating dtype it is fed; by default that of its first parameter, or of x if it has none. Time is
            of the same dtype, float32 at least.
        data_range: short for `transform=Range(*data_range)`: the interval that holds the levels of integer data; by
            default (−1, 1).
        transform: how integer data become the states the flow models, for `bits_per_dim` and for writing pictures, or
            the scale of the codes it models; see `flowsolve.transforms`.
        nfe_per_call: network evaluations that one call costs (2 for guidance that runs the network twice).

    Raises:
        ValueError: unknown prediction, or one that can nowhere be solved for data and noise.
        TypeError: path is not a Path or net is not callable.

    Examples:
        >>> flow = fs.Flow(lambda x, t: -x, fs.paths.CondOT(), prediction="velocity")
        >>> estimate = flow.estimate(torch.ones(2, 3), 0.25)
        >>> float(estimate.data[0, 0]), float(estimate.noise[0, 0])  # x + (1 − t) u and x − t u
        (0.25, 1.25)
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        path: Path,
        prediction: str | Prediction = "velocity",
        *,
        time: str | Callable[[Any], Any] = "flow",
        dtype: torch.dtype | None = None,
        data_range: tuple[float, float] | None = None,
        transform: Transform | Latent | None = None,
        nfe_per_call: int = 1,
    ) -> None:
        if not callable(net):
            raise TypeError(f"net is a {type(net).__name__}; expected a callable net(x, t, **cond)")
        if not isinstance(path, Path):
            raise TypeError(f"path is {path!r}; expected a flowsolve.paths object such as CondOT() or VP()")
        self.net = net
        self._guard = Guard(net, "the network")
        self.path = path
        self.prediction = resolve(prediction)
        if isinstance(time, str):
            clocks = {"flow": _flow_time, "native": path.native_time}
            if time not in clocks:
                raise ValueError(f"time = {time!r}; expected 'flow', 'native' or a function of flow time")
            self.clock: Callable[[Any], Any] = clocks[time]
        elif callable(time):
            self.clock = time
        else:
            raise TypeError(f"time = {time!r}; expected 'flow', 'native' or a function of flow time")
        if transform is not None and not isinstance(transform, Transform | Latent):
            raise TypeError(f"transform is {transform!r}; expected a flowsolve.transforms object such as Range(-1, 1)")
        if transform is not None and data_range is not None:
            raise TypeError(f"data_range = {data_range!r} and transform = {transform!r} say the same; give one")
        if nfe_per_call < 1:
            raise ValueError(f"nfe_per_call = {nfe_per_call!r}; expected at least 1")
        self._dtype = dtype
        self._first: tuple[Any, Any] | None = None  # the network and its first float parameter
        self.transform = transform or Range()
        if data_range is not None:
            self.data_range = data_range
        self.nfe_range = (nfe_per_call, nfe_per_call)
        if self.prediction.singular(path.at(0.5)):
            raise SingularEstimate(
                f"a {self.prediction.name!r} prediction on {path!r} repeats what x already says, so data and noise "
                "cannot be told apart; check the row of the prediction"
            )

    @property
    def nfe_per_call(self) -> int:
        """Network evaluations that an estimate costs at every time. Raises ValueError where that varies: see `cost`."""
        least, most = self.nfe_range
        if least != most:
            raise ValueError(f"an estimate of {self!r} costs {least} to {most} evaluations; ask flow.cost(t)")
        return least

    def cost(self, t: Any) -> Any:
        """Network evaluations that an estimate at flow time t costs: an int, or int64 of t's shape for a tensor."""
        return np.full(t.shape, self.nfe_per_call) if isinstance(t, Tensor) and t.ndim else self.nfe_per_call

    @property
    def nets(self) -> tuple[Any, ...]:
        """Every callable that an estimate may call."""
        return (self.net,)

    @property
    def guard(self) -> Guard:
        """What calls the network (`flowsolve._guard`)."""
        if self._guard.f is not self.net:
            self._guard = Guard(self.net, "the network")
        return self._guard

    def arm(self, armed: bool = True) -> None:
        """A solve begins (or none does): the next call must find that the network is a function of its arguments."""
        if not is_compiling():
            self.guard.armed, self._first = armed, None

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a density read from this flow is not; empty for a network's own flow."""
        return ()

    def conditioned(self, cond: Mapping[str, Any], count: int) -> dict[str, Any]:
        """A batch's keyword arguments as they will be given with each of its samples; `count` of them."""
        return dict(cond)

    def __repr__(self) -> str:
        return f"Flow({type(self.net).__name__}, {self.path!r}, prediction={self.prediction.name!r})"

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype the network is fed; None feeds it that of x."""
        if self._dtype is not None or not isinstance(self.net, nn.Module):
            return self._dtype
        if self._first is None or self._first[0] is not self.net:
            first = next((p for p in self.net.parameters() if p.dtype.is_floating_point), None)
            self._first = self.net, first
        return None if self._first[1] is None else self._first[1].dtype

    @property
    def data_range(self) -> tuple[float, float]:
        """Lowest and highest state that the transform gives to data; setting it declares `Range(low, high)`."""
        return self.transform.ends()

    @data_range.setter
    def data_range(self, ends: tuple[float, float]) -> None:
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise ValueError(f"data_range = {ends!r}; expected (low, high) with low < high")
        self.transform = Range(*ends)

    def require(self, t: float, what: str = "the grid") -> None:
        """Raise SingularEstimate unless an estimate exists at flow time t."""
        if self.prediction.singular(self.path.at(t)):
            raise SingularEstimate(_singular_message(self, what, t))

    def estimate(self, x: Tensor, t: float | Tensor, **cond: Any) -> Estimate:
        """The estimate of data and noise at (x, t), by one network call.

        Args:
            x: state of shape (B, *S), scaled as the path scales it.
            t: flow time, a float or a tensor of shape (B,).
            **cond: passed to the network unchanged.

        Returns:
            An `Estimate` in x's dtype (float32 at least), whatever dtype the network computes in.

        Raises:
            SingularEstimate: the estimate does not exist at t.
            ValueError: t outside [0, 1], or of a wrong shape; the network's output has not the shape of x.
        """
        point = self._point(x, t)
        return self.read(x, self.call(x, t, **cond), point)

    def call(self, x: Tensor, t: float | Tensor, *, clock: Callable[[Any], Any] | None = None, **cond: Any) -> Tensor:
        """The network's output at (x, t), in x's dtype (float32 at least), with t read by the flow's clock."""
        return self.output(x, (clock or self.clock)(t), cond)

    def output(self, x: Tensor, native: Any, cond: dict[str, Any]) -> Tensor:
        """The network's output at x and its own time, a float or of shape (B,), in x's dtype (float32 at least)."""
        own = x.dtype
        if not own.is_floating_point:
            raise TypeError(f"x has dtype {own}; expected floating-point numbers (scaled, dequantised data)")
        feed = self.dtype or own
        fed = x if feed is own else x.to(feed)
        if cond:
            cond = plain({k: v for k, v in cond.items() if k != MARK})
        time = network_time(native, fed)
        try:
            output = self.net(fed, time, **cond) if is_compiling() else self.guard(fed, time, cond)
        except TypeError as error:
            if lacking := LACKING.search(str(error)):
                given = "".join(f", {k}=…" for k in cond)
                raise TypeError(
                    f"the network asks for {lacking[1]}, which it was not given: net(x, t{given}). Pass it in "
                    "cond={…}, a tensor with a row a sample (class labels, for example) or what the network takes as "
                    f"it is ({error})"
                ) from error
            raise
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the network returned a {type(output).__name__}; expected a tensor. Wrap it, for example "
                "Flow(lambda x, t: net(x, t).sample, ...)"
            )
        if output.is_complex():
            raise TypeError(
                f"the network returned {output.dtype} for x of {x.dtype}; expected a real tensor of its shape, since "
                "the imaginary part would be lost"
            )
        if output.shape != x.shape:
            hint = ""
            if output.ndim == x.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
                hint = "; twice the channels looks like a learned variance: keep the first half"
            elif output.shape == x.shape[:1]:
                hint = " (that of t: a network net(t, x)? Give lambda x, t, **cond: net(t, x, **cond))"
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}; "
                f"expected the same shape{hint}"
            )
        wide = state_dtype(x)
        return output if output.dtype is wide else output.to(wide)

    def read(self, x: Tensor, output: Tensor, point: Point) -> Estimate:
        """The estimate that an output already at hand stands for."""
        state = x if x.dtype is output.dtype else x.to(output.dtype)
        return Estimate(state, output, point, self.prediction.row(point))

    def _point(self, x: Tensor, t: float | Tensor) -> Point:
        if isinstance(t, Tensor) and t.ndim == 0:
            t = float(t)
        if not isinstance(t, Tensor):
            single: Point = self.path.remembered((self.prediction, t), lambda: self._regular(t))
            return single
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; expected a float or one time a sample, ({x.shape[0]},)")
        return self._regular(t)

    def _regular(self, t: float | Tensor) -> Point:
        point = self.path.at(t)
        if (not isinstance(t, Tensor) or t.device.type == "cpu") and self.prediction.singular(point):
            raise SingularEstimate(_singular_message(self, "t", t))
        return point

    def velocity(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """u(x, t) = α̇ ẑ + σ̇ ε̂, shape (B, *S), per unit of flow time."""
        return self.estimate(x, t, **cond).velocity

    def score(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """∇ log p_t(x) = −ε̂/σ, shape (B, *S)."""
        return self.estimate(x, t, **cond).score

    def noise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """ε̂(x, t), shape (B, *S)."""
        return self.estimate(x, t, **cond).noise

    def data(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """ẑ(x, t), shape (B, *S)."""
        return self.estimate(x, t, **cond).data

    def check(
        self,
        data: Tensor,
        *,
        seed: int = 0,
        slack: float = 1.05,
        cond: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> CheckReport:
        """Test path, prediction and time on a few data points, and say which convention fits better.

        The arguments and the result are those of `flowsolve.checks.check`.
        """
        return check(self, data, seed=seed, slack=slack, cond=cond, **more)


def _flow_time(t: Any) -> Any:
    return t


def network_time(native: Any, x: Tensor) -> Tensor:
    """A network's time, a float or of shape (B,), as it is fed beside x: one a sample, float32 at least."""
    when = state_dtype(x)
    if isinstance(native, Tensor) and native.ndim:
        return send(native, x, when)
    table = _table.get()
    if table is not None:
        row = table.get(native)
        if row is not None and row.shape[0] == x.shape[0] and row.dtype is when and row.device == x.device:
            return row
    return torch.full((x.shape[0],), float(native), device=x.device, dtype=when)


@contextmanager
def clocked(flow: Flow, times: Sequence[float], x: Tensor) -> Iterator[None]:
    """A block in which the network's times for a batch like x are rows of one table, sent to its device at once.

    Args:
        flow: whose clock.
        times: flow times that the block will ask about; of others, times are made one by one.
        x: shape (B, *S).
    """
    if not 1 < len(times) * len(x) <= TABLE or within() is not None:
        yield
        return
    natives = clock_of(flow, times)
    with tabled(natives, send(torch.tensor(natives, dtype=torch.float64, device="cpu"), x, state_dtype(x)), x):
        yield


def clock_of(flow: Flow, times: Sequence[float]) -> list[float]:
    """The network's times at some flow times, each once."""
    return list(dict.fromkeys(float(flow.clock(t)) for t in times))


@contextmanager
def tabled(natives: Sequence[float], column: Tensor, x: Tensor) -> Iterator[None]:
    """A block in which the network's times for a batch like x are rows made of a column of them on its device."""
    rows = column.to(state_dtype(x)).unsqueeze(1).expand(-1, len(x)).contiguous().unbind()
    token = _table.set(dict(zip(natives, rows, strict=True)))
    try:
        yield
    finally:
        _table.reset(token)


def _singular_message(flow: Flow, what: str, t: float | Tensor) -> str:
    name, path = flow.prediction.name, flow.path
    if name == "data":
        edge = path.time(min(path.log_snr(1.0), 7.0))
        why = "at σ = 0 the state is the data and says nothing of the noise"
        mend = f"end before it, for example interval=(…, {edge:.6g})"
    else:
        edge = path.time(max(path.log_snr(0.0), -7.0))
        why = "at α = 0 the state is all noise and says nothing of the data"
        mend = f"start after it, for example interval=({edge:.6g}, …) with start = {path.sigma(edge):.6g} * noise"
    where = "some t" if isinstance(t, Tensor) else f"t = {float(t):g}"
    return f"{what} asks a {name!r} prediction at {where} of {path!r}, but {why}; {mend}"
