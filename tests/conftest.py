"""How the tests run: reproducible property tests, one thread, slow tests on request, GPU tests where there is a GPU.

`HYPOTHESIS_PROFILE=thorough pytest` searches with fresh random examples; the other profiles repeat the same ones.
`FLOWSOLVE_TEST_THREADS=2` lets torch sum on two threads, which rounds otherwise (`make portability`).
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ.get("FLOWSOLVE_TEST_THREADS", "1")))
# Plain torch kernels, unless a test says otherwise: when compiled ones would be loaded depends on the tests before.
os.environ.setdefault("FLOWSOLVE_KERNELS", "torch")

_SLOW_FIRST_CALL = [HealthCheck.too_slow]  # the first torch or numba call of a process takes seconds
settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=50, suppress_health_check=_SLOW_FIRST_CALL
)
settings.register_profile("ci", settings.get_profile("default"), print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        absent = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(absent)
    if config.getoption("--slow") or "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is: the CPU, and CUDA where available."""
    return torch.device(request.param)
