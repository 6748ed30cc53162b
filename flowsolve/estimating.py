r"""What answers a solver's queries about a flow: for the estimate, or for the slope in a chart.

In a chart $y = x/c$ with clock s, the slope is a combination of the state and of the network's output,

$$ \frac{dy}{ds} = a\,\hat z + b\,\hat\varepsilon = k_x\, x + k_o\, o(x, t), \qquad x = c\,y, $$

with numbers c, k_x, k_o and a network's time that depend on s alone. The samples of an adaptive solve have times of
their own; those of all stages of an attempt are known when it begins (`Nodes`). So these numbers are computed for all
of them at once, on the host in float64, and sent to the device as one tensor, of which each query takes its rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowsolve._batch import hosted, linear, send, state_dtype
from flowsolve._surroundings import array, within
from flowsolve.charts import Chart
from flowsolve.drivers import Ask
from flowsolve.flow import Flow
from flowsolve.planning import varies
from flowsolve.predictions import Estimate
from flowsolve.solvers.base import Query, charted

__all__ = ["Estimator"]

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class _Rows(NamedTuple):
    """What the queries of an attempt need, each with one entry a query: floats, or tensors that multiply a state."""

    times: Tensor
    clock: Any
    scale: Any
    state: Any
    output: Any


class Estimator:
    """Answers queries by one call of a flow's network each.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow, self._counted = flow, varies(flow)
        self._direct = type(flow).call is Flow.call  # which takes the network's own time

    def __call__(self, query: Query, context: Any) -> Estimate:
        """The estimate at (x, t)."""
        flow, cond = self.flow, context["cond"]
        if self._counted:
            query.cost = flow.cost(query.t)
        if query.point is None:
            return flow.estimate(query.x, query.t, **cond)
        return flow.read(query.x, flow.call(query.x, query.t, **cond), query.point)

    def slopes(self, chart: Chart) -> Ask:
        """What answers queries about (y, s) by dy/ds in a chart."""

        def answer(query: Query, context: Any) -> Tensor:
            if query.nodes is not None:
                return self._tabled(query, chart, context["cond"])
            outer = charted(query, chart, self.flow.path)
            found = self(outer, context)
            query.cost = outer.cost
            return found.combine(*chart.row(found.point, query.t))

        return answer

    def _tabled(self, query: Query, chart: Chart, cond: dict[str, Any]) -> Tensor:
        nodes, i, y, flow = query.nodes, query.row, query.x, self.flow
        assert nodes is not None
        rows: _Rows = nodes.once((id(chart), id(self)), lambda clock: self._rows(chart, clock, y, nodes.recorded))
        if self._counted:
            query.cost = flow.cost(rows.times[i])
        c, k_x, k_o = (v if isinstance(v, float) else v[i] for v in rows[2:])
        x = y if isinstance(c, float) and c == 1.0 else c * y
        output = flow.output(x, rows.clock[i], cond) if self._direct else flow.call(x, rows.times[i], **cond)
        if isinstance(k_x, float) and isinstance(k_o, float):
            return linear(k_x, x, k_o, output)
        if isinstance(k_x, float) and k_x == 0.0:
            return k_o * output
        return k_x * x + k_o * output

    def _rows(self, chart: Chart, clock: Tensor, y: Tensor, recorded: bool) -> _Rows:
        """The numbers of all queries of an attempt at times of the chart, (n, B).

        In a recorded solve they are computed on the device, and nothing is asked of it.
        """
        flow, path = self.flow, self.flow.path
        times = chart.time(path, clock.flatten()).reshape(clock.shape)
        times = times if recorded else torch.from_numpy(array(times))
        points = path.at(times)
        known = Estimate(y, y, points, flow.prediction.row(points))
        numbers = chart.scale(points), *known.coefficients(*chart.row(points, clock))
        seen = recorded or within() is not None  # then no tensor is one of the host, to be looked at
        whole: list[Any] = [(None if seen else _same(v)) if isinstance(v, Tensor) else float(v) for v in numbers]
        sent = [v for v, w in zip(numbers, whole, strict=True) if w is None]
        when = state_dtype(y) if flow.dtype is None else torch.promote_types(flow.dtype, torch.float32)
        native: Any = None
        if self._direct:
            native = hosted(flow.clock(times.flatten())).reshape(clock.shape)
            if when is y.dtype:
                sent = [native.to(torch.float64), *sent]
        if sent:
            if seen:
                table = torch.stack([v.expand(clock.shape) for v in sent]).to(y.dtype)
                table = table if recorded else send(table, y)
            else:  # in numpy, which starts no threads: on a machine with many cores they cost more than this
                packed = np.stack([v.expand(clock.shape).numpy() for v in sent]).astype(NUMPY[y.dtype])
                table = send(torch.from_numpy(packed), y)
            if len(sent) > sum(w is None for w in whole):
                native, table = table[0], table[1:]
            each = iter(table.reshape(*table.shape, *[1] * (y.ndim - 1)).unbind())
            whole = [next(each) if w is None else w for w in whole]
        return _Rows(times, native, *whole)


def _same(v: Tensor) -> float | None:
    """The number that all entries of a coefficient of the host are, if it is 0 or 1."""
    numbers = v.numpy().ravel()
    first = float(numbers[0]) if len(numbers) else 0.0
    return first if first in (0.0, 1.0) and bool((numbers == first).all()) else None
