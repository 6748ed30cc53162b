"""What a command line declares of a checkpoint: KEY=VALUE, where a value is a literal, a path or a word."""

from __future__ import annotations

import ast
from typing import Any

__all__ = ["declared"]


def declared(options: list[str]) -> dict[str, Any]:
    """{key: value} of options such as "schedule=cosine", "steps=4000" and "path=VP(beta_max=16)".

    Raises:
        ValueError: an option without "=", or a path that does not exist or takes no such arguments.
    """
    said = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--declare {option!r}; expected KEY=VALUE, such as schedule=cosine")
        said[key.strip()] = _path(text) if key.strip() == "path" else _literal(text)
    return said


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _path(text: str) -> Any:
    """A path by its name, with constants as its arguments; nothing else is evaluated."""
    from flowsolve import paths

    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, args, keywords = (call.func, call.args, call.keywords) if isinstance(call, ast.Call) else (call, [], [])
        known = [n for n in paths.__all__ if n not in ("Path", "Point")]
        if not isinstance(name, ast.Name) or name.id not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        options = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
        return getattr(paths, name.id)(*[ast.literal_eval(a) for a in args], **options)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"path={text!r} is no path: {error}") from None
