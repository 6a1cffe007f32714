"""Checkpoints that do not fit change nothing, older ones load, and copies of an optimizer go on as it does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import Muon, RuleOptimizer, TailEMA
from lightning_optim.core.momentum_alias import ParamGroup
from tests.helpers.rules import gradient


def trained(*shapes: tuple[int, ...], steps: int = 3, **settings: Any) -> RuleOptimizer:
    """Muon after some steps."""
    made = torch.Generator().manual_seed(0)
    optimizer = Muon([Parameter(torch.randn(s, generator=made)) for s in shapes], **settings)
    take_steps(optimizer, range(1, steps + 1))
    return optimizer


def take_steps(optimizer: RuleOptimizer, steps: range) -> None:
    for t in steps:
        for i, p in enumerate(params(optimizer)):
            p.grad = gradient(p, str(i), t)
        optimizer.step()


def params(optimizer: RuleOptimizer) -> list[Parameter]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def contents(optimizer: RuleOptimizer) -> Any:
    """A copy of settings, weights and state."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    tensors = [[p, *optimizer.state[p].values()] for p in params(optimizer)]
    return copy.deepcopy(groups), [[x.detach().clone() for x in xs] for xs in tensors]


def assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    for xs, ys in zip(a[1], b[1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def changed(saved: dict[str, Any], group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with other settings of its first group, or other state of its second parameter."""
    out = copy.deepcopy(saved)
    out["param_groups"][0] |= group
    out["state"][1] |= state
    return out


MISFITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"momentum_buffer": torch.ones(5, 3)}, r"the checkpoint's 'momentum_buffer' has shape \(5, 3\), expected"),
    ({}, {"momentum_buffer": None}, "the checkpoint has no 'momentum_buffer'; was it another optimizer's"),
    ({"rule": "adamw"}, {}, "group 'muon' runs 'muon', the checkpoint's 'adamw'"),
    ({"momentum": 1.5}, {}, "momentum"),
    ({"average_step": 3}, {}, "give this one the same averaging"),
    ({"storage_block": 100}, {}, "storage_block must be a power of two"),
]


@pytest.mark.parametrize(("group", "state", "message"), MISFITS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    group: dict[str, Any], state: dict[str, Any], message: str
) -> None:
    saved = changed(trained((3, 4), (2, 5), lr=0.5).state_dict(), group, state)
    optimizer = trained((3, 4), (2, 5), lr=0.25, steps=2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(contents(optimizer), before)
    take_steps(optimizer, range(3, 4))
    assert_same(contents(optimizer), contents(trained((3, 4), (2, 5), lr=0.25)))


def test_checkpoints_of_another_number_of_parameters_are_refused() -> None:
    optimizer = trained((3, 4), steps=2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(trained((3, 4), (2, 5)).state_dict())
    assert_same(contents(optimizer), before)


def test_an_option_is_loaded_by_its_earlier_name_and_missing_ones_stay() -> None:
    saved = trained((3, 4)).state_dict()
    (group,) = saved["param_groups"]
    del group["comm_dtype"], group["seed"]
    group["traffic"] = "bf16"
    optimizer = trained((3, 4), steps=0, seed=7)
    optimizer.load_state_dict(saved)
    (found,) = optimizer.param_groups
    assert found["comm_dtype"] == "bf16" and "traffic" not in found and found["seed"] == 7
    assert optimizer.state_dict()["param_groups"][0]["comm_dtype"] == "bf16"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_goes_on_as_the_optimizer_does(way: Callable[[Any], Any]) -> None:
    optimizer = trained((3, 4), (2, 5))
    optimizer.total_steps, optimizer.max_temp_bytes = 11, 2**20
    again = way(optimizer)
    assert (again.total_steps, again.max_temp_bytes) == (11, 2**20)
    assert all(type(g) is ParamGroup for g in again.param_groups) and bool(again.known_params)
    assert_same(contents(again), contents(optimizer))
    for each in (optimizer, again):
        take_steps(each, range(4, 6))
    assert_same(contents(again), contents(optimizer))


def test_state_of_parameters_that_are_gone_is_not_saved_and_averaging_is_given_once() -> None:
    optimizer = trained((3, 4), (2, 5))
    gone = optimizer.param_groups[0]["params"].pop()
    assert gone in optimizer.state
    saved = optimizer.state_dict()
    assert list(saved["state"]) == [0] and gone not in optimizer.state
    assert type(saved["param_groups"][0]) is dict
    averaging = trained((3, 4), steps=0).with_averaging(TailEMA())
    with pytest.raises(ValueError, match="with_averaging: give everything in one call"):
        averaging.with_averaging(TailEMA())
