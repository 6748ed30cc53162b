"""What a command line declares of a checkpoint: KEY=VALUE, where a value is a literal, a path or a word."""

from __future__ import annotations

import ast
from importlib import import_module
from typing import Any

__all__ = ["declared"]

KINDS = ("path", "transform")


def declared(options: list[str]) -> dict[str, Any]:
    """{key: value} of options such as "schedule=cosine", "steps=4000" and "path=VP(beta_max=16)".

    Raises:
        ValueError: an option without "=", or a path or transform that does not exist or takes no such arguments.
    """
    said = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--declare {option!r}; expected KEY=VALUE, such as schedule=cosine")
        said[key.strip()] = _made(key.strip(), text) if key.strip() in KINDS else _literal(text)
    return said


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _made(key: str, text: str) -> Any:
    """A path or transform by its name, with constants as its arguments; nothing else is evaluated."""
    home = import_module(f"flowsolve.{key}s")
    known = [name for name in home.__all__ if name not in ("Path", "Point")] if key == "path" else ["Range", "Latent"]
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, args, keywords = (call.func, call.args, call.keywords) if isinstance(call, ast.Call) else (call, [], [])
        if not isinstance(name, ast.Name) or name.id not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        options = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
        return getattr(home, name.id)(*[ast.literal_eval(a) for a in args], **options)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{key}={text!r} is no {key}: {error}") from None
