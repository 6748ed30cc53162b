"""Optional packages: imported where they are used, and named together with the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["require"]


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional module, or say how to install it.

    Args:
        module: its dotted name, such as "sklearn.datasets".
        extra: the extra of flowsolve that depends on it.
        purpose: what needs it, as the subject of a sentence.

    Raises:
        ImportError: the package is not installed. A module missing *inside* an installed package is reported
            as it is.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install 'flowsolve[{extra}]'",
            name=package,
        ) from error
