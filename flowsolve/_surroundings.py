r"""What may surround a solve: transforms of `torch.func`, forward-mode derivatives, and `torch.compile`.

A solve decides its steps by numbers that it reads on the host. Inside a transform those numbers lie behind wrappers,
one for each level: `plain` looks behind them. Under `torch.func.vmap` there are many solves behind one tensor, and they
share what is decided: it is decided for the worst of them.

`torch.compile` cannot trace what is decided by numbers; an `eager` function is one that it runs as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeGuard, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["array", "bare", "eager", "mapped", "moving", "plain", "recorded", "refuse", "within"]

F = TypeVar("F", bound=Callable[..., Any])
functorch = torch._C._functorch
within = functorch.maybe_current_level  # the level of the innermost transform, or None
_outside = cache(torch.compiler.disable)


def bare() -> bool:
    """Whether no transform and no level of forward-mode derivatives surrounds us."""
    return within() is None and forward_ad._current_level < 0


def recorded() -> bool:
    """Whether a reverse-mode transform (grad, vjp, jacrev, …) surrounds us."""
    return within() is not None and any(
        level.key() == functorch.TransformType.Grad for level in functorch.get_interpreter_stack()
    )


def refuse(what: str, mend: str) -> None:
    """Raise NotImplementedError if a transform, or a level of forward-mode derivatives, surrounds us."""
    if not bare():
        around = "forward-mode derivatives" if within() is None else "a transform of torch.func"
        raise NotImplementedError(f"{what} is called within {around}; {mend}")


def plain(v: Tensor) -> Tensor:
    """The numbers of a tensor behind all wrappers, without derivatives; along mapped axes the largest of them."""
    if within() is None:
        return v.detach()
    axes = []
    with torch._C._DisableFuncTorch():
        while functorch.is_functorch_wrapped_tensor(v):
            axes.append(functorch.maybe_get_bdim(v))
            v = functorch.get_unwrapped(v)
        v = v.detach()
        for axis in reversed(axes):
            v = v if axis < 0 else v.amax(axis)
    return v


def array(v: Tensor) -> NDArray[Any]:
    """`plain` as an array on the host."""
    if within() is None:
        return v.detach().cpu().numpy()
    with torch._C._DisableFuncTorch():
        return plain(v).cpu().numpy()


def mapped(v: Tensor) -> bool:
    """Whether there are many tensors behind this one, by `torch.func.vmap`."""
    while functorch.is_functorch_wrapped_tensor(v):
        if functorch.is_batchedtensor(v):
            return True
        v = functorch.get_unwrapped(v)
    return False


def moving(v: Any) -> TypeGuard[Tensor]:
    """Whether derivatives, of any mode, may be asked for with respect to v."""
    if not isinstance(v, Tensor):
        return False
    if v.requires_grad and torch.is_grad_enabled():
        return True
    if functorch.is_functorch_wrapped_tensor(v):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(v).tangent is not None


def eager(f: F) -> F:
    """A function that `torch.compile` runs as it stands, with all that it calls."""

    @wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Asked at each call: what switches the compiler off is slow to import, and there if the compiler is.
        return _outside(f)(*args, **kwargs) if torch.compiler.is_compiling() else f(*args, **kwargs)

    return call  # type: ignore[return-value]
