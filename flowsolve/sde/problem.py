r"""An SDE as schemes see it: its drift, its noise, products of the two with increments, and the other calculus.

**How noise enters.** With y of shape (B, *S), g returns

| `noise_type` | g(t, y) | Brownian motions of a sample | g dW |
|---|---|---|---|
| `"diagonal"` | (B, *S), whose entry i depends on $y_i$ alone | one an element | $g_i\,dW_i$ |
| `"scalar"` | (B, *S) | one | $g\,dW$ |
| `"additive"` | as diagonal, or (B, *S, m); does not depend on y | one an element, or m | $g\,dW$ |
| `"general"` | (B, *S, m) | m | $\sum_j g_j\,dW_j$ |

What additive and diagonal noise return may be smaller and broadcast, and additive noise may be a number.

**The other calculus.** The Stratonovich equation $dy = f\,dt + g\circ dW$ and the Itô equation with

$$ \tilde f = f + \tfrac12 c, \qquad c = \sum_j \frac{\partial g_j}{\partial y}\,g_j $$

have the same solution. A scheme of the other calculus than the equation's is given $f \pm \tfrac12 c$. Derivatives of g
are forward-mode products, m of them for general noise, and none where the noise is additive, for which c = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowsolve._guard import Guard
from flowsolve._surroundings import bare

__all__ = ["NOISE_TYPES", "SDE_TYPES", "Problem"]

NOISE_TYPES = ("diagonal", "scalar", "additive", "general")
SDE_TYPES = ("ito", "stratonovich")


class Problem:
    """An SDE for a batch of samples.

    Args:
        f, g: drift and diffusion, functions of (t, y, *args).
        like: a state, shape (B, *S).
        noise_type, sde_type: see the module.
        args: further arguments of f and g.
        clock: times that are known as tensors already.

    Attributes:
        calls: how often the drift was asked for.
        counting: whether that is counted.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        g: Callable[..., Any],
        like: Tensor,
        noise_type: str,
        sde_type: str,
        args: Sequence[Any] = (),
        clock: Mapping[float, Tensor] | None = None,
    ) -> None:
        self.args = tuple(args)
        self._host = getattr(f, "host_time", False)  # of `FlowSDE`: times stay on the host, in float64
        self.raw = g if not self.args else lambda t, y: g(t, y, *self.args)
        self._f = Guard(f if not self.args else lambda t, y: f(t, y, *self.args), "f")
        self._g = Guard(self.raw, "g")
        self._f.armed = self._g.armed = True
        self.noise_type, self.sde_type = noise_type, sde_type
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.clock = clock if clock is not None else {}
        self.calls, self.counting = 0, True
        self.matrix = noise_type == "general"
        self._shift = 0.0
        self.width: Tensor | None = None  # the lengths of a step, where samples have their own
        self._usual: Any = None  # the shape that g has every time

    def begin(self, t: Any, y: Tensor, kind: str) -> Tensor:
        """Look at g once, for a scheme of a calculus ("ito", "stratonovich", or "" for either).

        Returns:
            An empty tensor of the shape of a drive: (B, *S), (B, 1, …, 1) or (B, m).

        Raises:
            ValueError: g returns something else than its kind of noise does.
        """
        with torch.no_grad():
            g = self._g(self.time(t), y.detach())
        count, rank = len(y), len(self.shape)
        if self.noise_type == "additive":
            self.matrix = isinstance(g, Tensor) and g.ndim == rank + 1
        self._expect(g)
        self._usual = g.shape if isinstance(g, Tensor) else None
        if kind and kind != self.sde_type and self.noise_type != "additive":
            self._shift = 0.5 if kind == "ito" else -0.5
        if self.matrix:
            return y.new_empty(count, g.shape[-1])
        return y.new_empty(count, *[1] * (rank - 1)) if self.noise_type == "scalar" else torch.empty_like(y)

    def size(self, t: Any, t_next: Any) -> Any:
        """The length of a step: a number, or (B, 1, …, 1) where samples have their own."""
        return t_next - t if self.width is None else self.width

    def time(self, t: Any) -> Tensor:
        """A time as f and g are given it: 0-dimensional, or (B, 1, …, 1), in the state's dtype."""
        if isinstance(t, Tensor):
            return t
        if self._host:
            return torch.tensor(t, dtype=torch.float64, device="cpu")
        found = self.clock.get(t)
        return found if found is not None else torch.full((), t, dtype=self.dtype, device=self.device)

    def f(self, t: Any, y: Tensor) -> Tensor:
        """The drift, in the calculus of the scheme."""
        drift = self.own(t, y)
        return drift if not self._shift else drift.add(self.correction(t, y), alpha=self._shift)

    def own(self, t: Any, y: Tensor) -> Tensor:
        """The drift as it is given."""
        self.calls += self.counting
        drift = self._f(self.time(t), y)
        if drift.__class__ is Tensor and drift.shape == self.shape and drift.dtype is self.dtype:
            return drift
        if not isinstance(drift, Tensor) or drift.shape != self.shape or drift.is_complex():
            raise ValueError(f"f(t, y) returned {_said(drift)} for y of shape {tuple(self.shape)}; expected the same")
        return drift if drift.dtype is self.dtype else drift.to(self.dtype)

    def g(self, t: Any, y: Tensor) -> Any:
        """The diffusion: a tensor, or a number where additive noise is one."""
        return self._checked(self._g(self.time(t), y))

    def product(self, g: Any, w: Tensor) -> Tensor:
        """g w, of y's shape, for w of the shape of a drive."""
        if self.matrix and g.shape[-1] == 1:
            return g.squeeze(-1) * w.reshape(-1, *[1] * (len(self.shape) - 1))  # type: ignore[no-any-return]
        if self.matrix:
            found: Tensor = (g.reshape(len(g), -1, g.shape[-1]) @ w.unsqueeze(-1)).reshape(self.shape)
            return found
        return g * w  # type: ignore[no-any-return]

    def added(self, y: Tensor, g: Any, w: Tensor) -> Tensor:
        """y + g w."""
        if not self.matrix and isinstance(g, Tensor):
            return torch.addcmul(y, g, w)
        return y + self.product(g, w)

    def slope(self, t: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """g and (∂g/∂y) g, for diagonal and scalar noise."""
        if self.noise_type == "diagonal":  # g_i depends on y_i alone: one pass gives both
            g, along = (self._own if bare() and not torch.is_grad_enabled() else self._along)(t, y, torch.ones_like(y))
            return g, g * along
        g = self.g(t, y)
        return g, self._along(t, y, g.expand(self.shape))[1]

    def correction(self, t: Any, y: Tensor) -> Tensor:
        """c = Σ_j (∂g_j/∂y) g_j."""
        if not self.matrix:
            return self.slope(t, y)[1]
        g = self.g(t, y)
        total = torch.zeros_like(y)
        for j in range(g.shape[-1]):
            total = total + self._along(t, y, g[..., j])[1][..., j]
        return total

    def _own(self, t: Any, y: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        """g and the derivative of each element in its own: by reverse mode, at less cost, where no graph is wanted."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            g = self._checked(self.raw(self.time(t), leaf))  # type: ignore[no-untyped-call]
            if not g.requires_grad:
                return g, torch.zeros_like(g)
            (found,) = torch.autograd.grad(g.expand(self.shape), leaf, ones, allow_unused=True)
        return g.detach(), torch.zeros_like(y) if found is None else found

    def _along(self, t: Any, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """g and its derivative at y along v."""
        time = self.time(t)
        try:
            if bare():
                with forward_ad.dual_level():
                    dual = self.raw(time, forward_ad.make_dual(y, v))  # type: ignore[no-untyped-call]
                    g, found = forward_ad.unpack_dual(dual)
                along = found if found is not None else torch.zeros_like(g)
            else:
                g, along = torch.func.jvp(lambda x: self.raw(time, x), (y,), (v,))  # type: ignore[misc, no-untyped-call]
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"g has no forward-mode derivative here ({error}); use a scheme that needs none, such as "
                "Milstein(derivatives=False), with sde_type as the scheme has it"
            ) from error
        return self._checked(g), along

    def _checked(self, g: Any) -> Any:
        if g.__class__ is Tensor and g.shape == self._usual and g.dtype is self.dtype:
            return g
        self._expect(g)
        return g.to(self.dtype) if isinstance(g, Tensor) and g.dtype is not self.dtype else g

    def _expect(self, g: Any) -> None:
        """Raise ValueError unless g is what its kind of noise returns."""
        shape = tuple(self.shape)
        free = self.noise_type in ("additive", "diagonal") and not self.matrix
        if self.noise_type == "additive" and isinstance(g, int | float):
            return
        if isinstance(g, Tensor) and not g.is_complex():
            if g.shape == self.shape and not self.matrix:
                return
            if self.matrix and g.ndim == len(shape) + 1 and g.shape[1:-1] == self.shape[1:]:
                if len(g) == shape[0] or (len(g) == 1 and self.noise_type == "additive"):
                    return
            elif free and _broadcasts(g.shape, shape):
                return
        expected = {
            "diagonal": f"{shape}, a noise for each element",
            "scalar": f"{shape}, which one noise a sample multiplies",
            "additive": f"{shape}, or {(*shape, 'm')} for m noises a sample",
            "general": f"{(*shape, 'm')}, for m noises a sample",
        }[self.noise_type]
        raise ValueError(f"g(t, y) returned {_said(g)}; with noise_type={self.noise_type!r} expected {expected}")


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _said(v: Any) -> str:
    return f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
