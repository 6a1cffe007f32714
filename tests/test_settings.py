"""Settings as text."""

from typing import Any

import pytest

from lightning_optim.settings import parse_settings, split_at_commas

READ: dict[str, dict[str, Any]] = {
    "": {},
    "momentum=0.9, nesterov=False": {"momentum": 0.9, "nesterov": False},
    "a=true,b=False,c=None,d=none,e=null": {"a": True, "b": False, "c": None, "d": None, "e": None},
    "lr=-1e-4,x=1e3,n=-2,": {"lr": -1e-4, "x": 1e3, "n": -2},
    "betas=(0.9, 0.95), list=[1,2], map={'a': (1, 2)}": {"betas": (0.9, 0.95), "list": [1, 2], "map": {"a": (1, 2)}},
    "recipe=alice-130m,state_storage=int8": {"recipe": "alice-130m", "state_storage": "int8"},
    "refresh=fixed:10": {"refresh": "fixed:10"},
    "refresh='fixed:10', s=\"a, b\"": {"refresh": "fixed:10", "s": "a, b"},
    "refresh=any(staggered:5, off_diagonal:0.3), x=1": {"refresh": "any(staggered:5, off_diagonal:0.3)", "x": 1},
    "refresh=clamp(lazy:50,10,500)": {"refresh": "clamp(lazy:50,10,500)"},
    "overrides=[('lora_b', None, {'lr': 3.2e-3})]": {"overrides": [("lora_b", None, {"lr": 3.2e-3})]},
}


@pytest.mark.parametrize("text", READ)
def test_settings_are_read_as_they_are_written(text: str):
    assert parse_settings(text) == READ[text]


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "0.9": "must be name=value, .*got '0.9'",
        "momentum=": "got 'momentum='",
        "=3": "got '=3'",
        "a=1,,b=2": "got ''",
        "a-b=1": "got 'a-b=1'",
        "momentum=0.9, momentum=0.5": "gives momentum twice",
        "momentum=0.9)(nesterov=False": r"'\)' closes nothing",
        "momentum=0.9).x(nesterov=False": r"'\)' closes nothing",
        "x=(1, 2]": r"'\]' closes nothing",
        "x=[1, 2": r"'\[' is not closed",
        "refresh='fixed:10": "is not closed",
        "x=1 2": "x must be a number.*got '1 2'",
        "x=__import__('os').getcwd()": "x must be a number",
        "overrides=[(lora_b, None, {})]": "strings within brackets need quotes",
    }.items(),
)
def test_other_text_is_one_error_that_quotes_it(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_settings(text)


def test_text_is_split_outside_of_brackets_and_quotes():
    assert split_at_commas("a(b, c), 'd, e' ,[f, (g, h)]") == ["a(b, c)", "'d, e'", "[f, (g, h)]"]
    assert split_at_commas("  ") == []
