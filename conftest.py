"""Names that the package's doctests may use without importing them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

TRITON = ["flowsolve/kernels/cuda.py", "flowsolve/kernels/philox_cuda.py"]
DIFFUSERS = ["flowsolve/adapters/diffusers/pipeline.py", "flowsolve/adapters/diffusers/scheduler.py"]
collect_ignore = [] if find_spec("triton") else TRITON
collect_ignore += [] if find_spec("diffusers") else DIFFUSERS


@pytest.fixture(autouse=True)
def _doctest_names(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        import torch

        import flowsolve

        namespace: dict[str, Any] = request.getfixturevalue("doctest_namespace")
        namespace.update(fs=flowsolve, torch=torch)
