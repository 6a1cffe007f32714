"""Settings as text, `rank=128, betas=(0.9, 0.95), refresh=staggered:10`: one form for flags and command lines."""

from __future__ import annotations

import ast
import re
from typing import Any

_BRACKETS = {")": "(", "]": "[", "}": "{"}
_WORD = re.compile(r"[A-Za-z][\w.:+-]*(\(.*\))?", re.DOTALL)
"""A name, a path or a refresh policy: `int8`, `alice-130m`, `fixed:200`, `any(staggered:5, off_diagonal:0.3)`."""
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


def parse_settings(text: str | None, source: str = "optim_args") -> dict[str, Any]:
    """Read settings.

    Args:
        text: `name=value, name=value`. A value is whatever `parse_value` reads; commas within brackets and quotes
            belong to it, and spaces around it do not.
        source: what the text was given as, for messages.

    Returns:
        The values by name.

    Raises:
        ValueError: a part that is not `name=value`, a name given twice, brackets or quotes that do not close, or a
            value that is none; the message quotes the part.
    """
    values: dict[str, Any] = {}
    parts = split_at_commas(text or "", source)
    if parts and not parts[-1]:  # a comma at the end
        parts.pop()
    for part in parts:
        name, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise ValueError(f"{source} must be name=value, name=value, ...; got {part!r} in {text!r}")
        if name in values:
            raise ValueError(f"{source} gives {name} twice, in {text!r}")
        values[name] = parse_value(value, f"{source}: {name}")
    return values


def parse_value(text: str, source: str = "value") -> Any:
    """Read one value.

    Args:
        text: a number, string in quotes, tuple, list or mapping as Python writes them; `true`, `false` and `none` in
            any case; or a word, which is a string: a name, or a refresh policy with its numbers and parentheses.
        source: what it is the value of, for messages.

    Returns:
        The value.

    Raises:
        ValueError: text that is none of these.
    """
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        if _WORD.fullmatch(text):
            return text
    hint = "; strings within brackets need quotes" if re.search(r"[\[({].*[A-Za-z_]", text) else ""
    raise ValueError(f"{source} must be a number, string, tuple, list, mapping or word, got {text!r}{hint}")


def split_at_commas(text: str, source: str = "text") -> list[str]:
    """Split text at the commas that are outside of brackets and quotes.

    Args:
        text: any.
        source: what the text was given as, for messages.

    Returns:
        The parts, without the spaces around them; none for empty text.

    Raises:
        ValueError: brackets or quotes that do not close.
    """
    parts, start, closing, quote = [], 0, [], ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in _BRACKETS.values():
            closing.append(c)
        elif c in _BRACKETS and (not closing or closing.pop() != _BRACKETS[c]):
            raise ValueError(f"{source}: {c!r} closes nothing in {text!r}")
        elif c == "," and not closing:
            parts.append(text[start:i].strip())
            start = i + 1
    if closing or quote:
        raise ValueError(f"{source}: {quote or closing[-1]!r} is not closed in {text!r}")
    return [*parts, text[start:].strip()] if text.strip() else []
