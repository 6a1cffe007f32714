"""What the registry of rules says of itself: what each rule works on, its state, and its documentation.

`python -m lightning_optim list`, the README's table, the docstrings of the optimizer classes and the benchmarks use it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Literal

from lightning_optim.core.rule import Rule

Kind = Literal["elements", "sums", "matrices", "all"]


def kind(rule: type[Rule]) -> Kind:
    """What a rule works on.

    Returns:
        Single `elements`, `sums` over rows, columns or parameters, whole `matrices`, or `all` parameters at once.
    """
    if rule.curvature_input == "loss":
        return "all"
    return "elements" if rule.elementwise else "sums" if rule.reduces else "matrices"


def state_formula(rule: type[Rule]) -> str:
    """The number of state elements of an m x n matrix at the rule's defaults.

    Returns:
        A sum such as `2mn` or `m + n`; `0` without state.
    """
    specs = rule().state_specs(1024, 1024).values()
    letters = ["".join(sorted(spec.letters.replace("1", ""))) for spec in specs]
    constant = sum(math.prod(map(int, spec.letters)) for spec in specs if spec.letters.isdigit())
    terms = [x if letters.count(x) == 1 else f"{letters.count(x)}{x}" for x in dict.fromkeys(letters) if x.isalpha()]
    return " + ".join([*terms, *([str(constant)] if constant else [])]) or "0"


def state_bytes(rule: type[Rule], m: int = 1024, n: int = 1024) -> float:
    """Bytes of state per element of an m x n float32 matrix at the rule's defaults.

    Returns:
        Bytes per element.
    """
    size = 0
    for spec in rule().state_specs(m, n).values():
        rows, columns = spec.shape(m, n)
        size += rows * columns * (spec.dtype.itemsize if spec.dtype else 4)
    return size / (m * n)


def summary(rule: type[Rule]) -> str:
    """The first line of a rule's docstring.

    Returns:
        One line without its closing full stop.
    """
    return (rule.__doc__ or "").strip().splitlines()[0].rstrip(".")


def documentation(rule: type[Rule]) -> str:
    """What an editor shows for a rule's optimizer class.

    Returns:
        The rule's docstring, its hyperparameters with their defaults, and its source.
    """
    text = inspect.cleandoc(rule.__doc__ or "")
    fields = sorted(dataclasses.fields(rule), key=lambda f: bool(f.kw_only))  # pyright: ignore[reportArgumentType]
    settings = ", ".join(f"{f.name}={f.default!r}" for f in fields)
    out = f"{text}\n\nHyperparameters: {settings}."
    return out if "Source: " in text else f"{out}\n\nSource: {rule.source}."
