"""k-diffusion's own wrapper modules, loaded without the image libraries that its package imports first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor


def append_dims(x: Tensor, dims: int) -> Tensor:
    return x[(..., *[None] * (dims - x.ndim))]


def load(name: str) -> Any:
    """The real k_diffusion.<name>; skips the test where the package is absent."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        pytest.skip("k-diffusion is not installed", allow_module_level=True)
    parent, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    parent.__path__ = [str(Path(spec.origin).parent)]
    utils.append_dims = append_dims  # type: ignore[attr-defined]
    parent.utils = utils  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", parent)
        patch.setitem(sys.modules, "k_diffusion.utils", utils)
        for absent in [n for n in ("dctorch", "einops") if importlib.util.find_spec(n) is None]:
            stub = types.ModuleType(absent)
            stub.functional = stub.rearrange = stub.repeat = None  # type: ignore[attr-defined]
            patch.setitem(sys.modules, absent, stub)
        before = set(sys.modules)
        try:
            module = importlib.import_module(f"k_diffusion.{name}")
        except ModuleNotFoundError as error:
            pytest.skip(f"k-diffusion without {error.name}", allow_module_level=True)
        for added in set(sys.modules) - before:
            if added.startswith("k_diffusion"):
                del sys.modules[added]
    return module
