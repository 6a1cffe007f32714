"""Checks of settings against their type annotations, with messages that name the setting and suggest similar names."""

from __future__ import annotations

import difflib
import math
import numbers
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal


def check_value(what: str, value: Any, hint: Any, *, signed: bool = False) -> None:
    """Check a setting against its annotation.

    Args:
        what: name of the setting, for the message.
        value: its value.
        hint: its annotation: float, int, bool, str, Literal, tuple of these, or a union.
        signed: whether numbers may be negative.

    Raises:
        ValueError: the value has another type, is not finite, or is negative.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return
        candidates = [x for x in args if _fits(value, x)] or [x for x in args if x is not type(None)][:1]
        check_value(what, value, next((x for x in candidates if _fits_items(value, x)), candidates[0]), signed=signed)
    elif origin is Literal:
        if value not in args:
            raise ValueError(f"{what}: unknown value {value!r}; {nearest(str(value), [str(x) for x in args])}")
    elif origin is tuple:
        if args[1:] == (Ellipsis,) and isinstance(value, (tuple, list)):
            args = args[:1] * len(value)
        if not isinstance(value, (tuple, list)) or len(value) != len(args):
            count = "a tuple of" if args[1:] == (Ellipsis,) else len(args)
            raise ValueError(f"{what} must be {count} numbers, got {value!r}")
        for x, item_hint in zip(value, args, strict=True):
            check_value(what, x, item_hint, signed=signed)
    elif not _fits(value, hint):
        names = {float: "a number", int: "an integer", bool: "True or False", str: "a name"}
        raise ValueError(f"{what} must be {names.get(hint, hint)}, got {value!r}")
    elif hint in (float, int) and not (math.isfinite(value) and (signed or value >= 0)):
        raise ValueError(f"{what} must be a finite number{'' if signed else ' >= 0'}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    abstract_types = {float: numbers.Real, int: numbers.Integral}
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str)
    if hint in abstract_types:
        return isinstance(value, abstract_types[hint]) and not isinstance(value, bool)
    return isinstance(value, hint)


def _fits_items(value: Any, hint: Any) -> bool:
    """Whether the items of a tuple of any length fit its annotation."""
    args = typing.get_args(hint)
    if not isinstance(value, (tuple, list)):
        return False
    return args[1:] != (Ellipsis,) or all(_fits(x, args[0]) for x in value)


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of an error message about an unknown name.

    Returns:
        The most similar names, or all of them.
    """
    known = sorted(set(names))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"
