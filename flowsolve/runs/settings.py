"""What decides a result, as plain values (`flowsolve.fingerprint`), and with what it was computed."""

from __future__ import annotations

import torch

from flowsolve._version import __version__
from flowsolve.fingerprint import fingerprint, spell
from flowsolve.identity import digest

__all__ = ["digest", "fingerprint", "spell", "versions"]


def versions() -> dict[str, str]:
    """What computes: other versions may round otherwise."""
    return {"flowsolve": __version__, "torch": str(torch.__version__)}
