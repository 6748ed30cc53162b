"""What a benchmark record must say of the machine it was made on."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy
import torch

from flowsolve._version import __version__

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions, processor, threads and device, for the head of a record."""
    return {
        "flowsolve": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
