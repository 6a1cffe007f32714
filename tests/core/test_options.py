"""Options of a group: types and descriptions, those that belong together, and those that contradict each other."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core import options
from lightning_optim.core.options import OPTION_TYPES, OPTIONS, TOGETHER, expand_options
from lightning_optim.core.rule import check_value


def test_every_option_has_a_type_that_its_default_fits_and_a_description() -> None:
    assert OPTIONS.keys() == OPTION_TYPES.keys()
    for key, default in OPTIONS.items():
        check_value(key, default, OPTION_TYPES[key])
    (tree,) = ast.parse(inspect.getsource(options.Options)).body
    assert isinstance(tree, ast.ClassDef)
    documented = [
        field.target.id
        for field, doc in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    ]
    assert documented == list(OPTIONS)
    assert {*options.CONSTRAINTS} < {*OPTIONS} and {x for names in TOGETHER.values() for x in names.values()} < {
        *OPTIONS
    }


def test_a_mapping_stands_for_the_options_one_by_one() -> None:
    given = {
        "lr": 0.1,
        "constraint": {"name": "hyperball", "uw_floor": 0.1, "uw_floor_by": "row"},
        "state_storage": {"format": "int8", "block": 128, "min": 1},
        "cautious_decay": {"rate": True},
    }
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    one_by_one = {
        "lr": 0.1,
        "constraint": "hyperball",
        "uw_floor": 0.1,
        "uw_floor_by": "row",
        "state_storage": "int8",
        "storage_block": 128,
        "storage_min": 1,
        "cautious_decay": True,
    }
    assert expand_options(given) == expand_options(one_by_one) == one_by_one
    assert given == kept and expand_options(one_by_one) is not one_by_one
    found = RuleOptimizer([{"params": [Parameter(torch.ones(2, 2))], "rule": "adamw", **given}]).param_groups[0]
    assert {key: found[key] for key in one_by_one} == one_by_one


def test_unknown_keys_and_options_that_are_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="^state_storage has no setting 'blok'; did you mean 'block'"):
        expand_options({"state_storage": {"blok": 128}})
    with pytest.raises(ValueError, match=r"^storage_min is given twice: by itself, and as state_storage\['min'\]"):
        expand_options({"storage_min": 2, "state_storage": {"min": 1}})


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("adamw", {"constraint": "hyperball", "pin": True}, "constraint='hyperball' sets the norms"),
    ("adamw", {"constraint": "hyperball", "uw_floor": 0.1}, "leave out pin and uw_floor, or give uw_floor_by='row'"),
    ("lbfgs", {"clip_norm": 1.0}, "so clip_norm has no gradient to clip"),
    ("lbfgs", {"pin": True}, "so constraint, uw_floor, .* are not for it"),
    ("lbfgs", {"cautious_decay": 0.1}, "so constraint, uw_floor, .* are not for it"),
    ("adam", {"cautious_decay": True, "weight_decay": 0.1}, "adam applies weight_decay itself"),
]


@pytest.mark.parametrize(("rule", "settings", "message"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused(rule: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^group 'mine': .*{message}"):
        RuleOptimizer([{"params": [Parameter(torch.ones(2, 2))], "rule": rule, "name": "mine", **settings}])


def test_whether_norms_influence_the_step() -> None:
    assert not options.has_constraint(OPTIONS | {"uw_floor_by": "row", "cautious_decay": 0.1, "clip_norm": 1.0})
    for change in ({"constraint": "hyperball"}, {"uw_floor": 0.1}, {"radial_damping": 0.5}, {"pin": True}):
        assert options.has_constraint(OPTIONS | change)
