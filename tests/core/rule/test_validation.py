"""A setting is checked against its annotation, and the message names it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

import lightning_optim
from lightning_optim.core.rule import check_value, nearest

Word = Literal["raise", "skip"]
ACCEPTED: list[tuple[Any, Any]] = [
    (1.5, float),
    (2, float),
    (np.float32(0.5), float),
    (3, int),
    (np.int64(3), int),
    (True, bool),
    ("a", str),
    ("skip", Word),
    (None, float | None),
    (0.5, float | None),
    (7, int | float),
    ((0.9, 0.99), tuple[float, float]),
    ([0.9, 0.99], tuple[float, float]),
    ((), tuple[float, ...]),
    ((1, 2, 3), tuple[int, ...]),
    (((1, 2), (3, 4)), int | tuple[int, ...] | tuple[tuple[int, int], ...] | None),
    ((8, 4, 4), int | tuple[int, ...] | tuple[tuple[int, int], ...] | None),
    (True, float | bool),
]
REFUSED: list[tuple[Any, Any, str]] = [
    ("1", float, "x must be a number, got '1'"),
    (True, float, "x must be a number, got True"),
    (1.0, int, "x must be an integer, got 1.0"),
    (True, int, "x must be an integer, got True"),
    (1, bool, "x must be True or False, got 1"),
    (1, str, "x must be a name, got 1"),
    (math.nan, float, "x must be a finite number >= 0, got nan"),
    (math.inf, float, "x must be a finite number >= 0, got inf"),
    (-1, int, "x must be a finite number >= 0, got -1"),
    ("skp", Word, "x: unknown value 'skp'; did you mean 'skip'?"),
    (None, float, "x must be a number, got None"),
    ("a", float | None, "x must be a number, got 'a'"),
    ((0.9,), tuple[float, float], r"x must be 2 numbers, got \(0.9,\)"),
    (0.9, tuple[float, float], "x must be 2 numbers, got 0.9"),
    ((0.9, "a"), tuple[float, float], "x must be a number, got 'a'"),
    ((1, -2), tuple[int, ...], "x must be a finite number >= 0, got -2"),
    ((1, 2.5), int | tuple[int, ...] | tuple[tuple[int, int], ...] | None, "x must be an integer, got 2.5"),
    (((1, 2), (3,)), int | tuple[int, ...] | tuple[tuple[int, int], ...] | None, "x must be 2 numbers, got "),
]


@pytest.mark.parametrize(("value", "hint"), ACCEPTED)
def test_values_that_fit(value: Any, hint: Any) -> None:
    check_value("x", value, hint)


@pytest.mark.parametrize(("value", "hint", "message"), REFUSED)
def test_values_that_do_not_fit(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message.replace('?', '[?]')}"):
        check_value("x", value, hint)


def test_signed_settings_may_be_negative_but_must_be_finite() -> None:
    check_value("x", -0.5, float, signed=True)
    check_value("x", (-1, 2), tuple[int, ...], signed=True)
    check_value("x", -3, int | None, signed=True)
    with pytest.raises(ValueError, match="^x must be a finite number, got -inf$"):
        check_value("x", -math.inf, float, signed=True)


def test_similar_names_are_suggested_likeliest_first_and_else_all_are_named() -> None:
    assert nearest("adamv", ["lion", "adamw", "adam"]) == "did you mean 'adam' or 'adamw'?"
    assert nearest("zzz", ["lion", "adam"]) == "known: adam, lion"


def test_every_known_name_is_listed_once():
    assert nearest("xyz", ["b", "a", "b"]) == "known: a, b"


@pytest.mark.parametrize(("cls", "policy"), [("Flora", "off_diagonal:0.3"), ("SophiaG", "lazy:10")])
def test_a_policy_that_cannot_decide_is_quoted_as_it_was_written(cls: str, policy: str):
    with pytest.raises(ValueError, match=f"refresh='{policy}'"):
        getattr(lightning_optim, cls)([torch.nn.Parameter(torch.ones(4, 4))], refresh=policy)
