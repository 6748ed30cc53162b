"""Settings as text: a name, and options behind a colon, `name:key=value,key=value`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

__all__ = ["known", "parsed", "plain"]


def plain(name: str) -> str:
    """A name in lower case and without punctuation; `+` is `p`, so that dpm-solver++ is dpmsolverpp."""
    return "".join(c for c in name.lower().replace("+", "p") if c.isalnum())


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options; values are Python literals, true, false and none, or words.

    Raises:
        ValueError: an option without a key or "=".
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{part!r} in {text!r} is no option; expected name:key=value,key=value")
        options[key.strip()] = _value(value.strip())
    return name.strip(), options


def known(kind: Any, name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless a dataclass has all these options."""
    has = [f.name for f in fields(kind) if f.init]
    for key in options:
        if key not in has:
            raise ValueError(f"{name} has no option {key!r}; expected one of {', '.join(has) or 'none'}")


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
