"""A parameter whose state is that of another shape is refused by name, and nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer, TailEMA
from lightning_optim.core.state.checks import note_complete, validate_shapes
from tests.helpers.rules import gradient


def trained(rule: str, **settings: Any) -> tuple[RuleOptimizer, Parameter, Parameter]:
    """Two parameters after a step, the first of which will be resized."""
    made = torch.Generator().manual_seed(0)
    p, q = Parameter(torch.randn(8, 4, generator=made)), Parameter(torch.randn(8, 4, generator=made))
    named = [("embedding", p), ("weight", q)]
    optimizer = RuleOptimizer([{"params": named, "rule": rule, "name": "hidden", **settings}])
    stepped(optimizer)
    return optimizer, p, q


def stepped(optimizer: RuleOptimizer) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = gradient(p, str(i), 1)
    optimizer.step()


def everything(optimizer: RuleOptimizer) -> list[Tensor]:
    """Copies of all weights and all state."""
    params = optimizer.param_groups[0]["params"]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


def assert_refused(optimizer: RuleOptimizer, message: str) -> None:
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=message) as caught:
        stepped(optimizer)
    assert "nothing was updated" in str(caught.value)
    after = everything(optimizer)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("resized", ["first", "second"])
@pytest.mark.parametrize("rule", ["adamw", "muon", "soap", "adafactor"])
def test_a_resized_parameter_is_refused_by_name_with_both_shapes(rule: str, resized: str) -> None:
    optimizer, p, q = trained(rule)
    one, name = (p, "embedding") if resized == "first" else (q, "weight")
    one.data = torch.ones(10, 4)
    key, was, now = {
        "muon": ("momentum_buffer", r"\(8, 4\)", r"\(10, 4\)"),
        "adafactor": ("row_var", r"\(8, 1\)", r"\(10, 1\)"),
    }.get(rule, ("exp_avg", r"\(8, 4\)", r"\(10, 4\)"))
    assert_refused(
        optimizer,
        rf"hidden: {name} has shape \(10, 4\), and .*: '{key}' has {was}, expected {now}; nothing was updated",
    )
    optimizer.state.pop(one)
    stepped(optimizer)
    assert optimizer.state[one]["step"] == 1 and optimizer.state[q if one is p else p]["step"] == 2


def test_a_setting_that_shapes_the_state_is_refused() -> None:
    optimizer, *_ = trained("soap")
    optimizer.param_groups[0]["blocks"] = 2
    assert_refused(optimizer, r"'factor_left' has \(8, 8\), expected \(2, 4, 4\)")
    optimizer.param_groups[0]["blocks"] = None
    stepped(optimizer)


def test_what_is_kept_beside_is_checked_too() -> None:
    optimizer, p, _ = trained("sgd")  # no state of its own
    optimizer.with_averaging(TailEMA())
    stepped(optimizer)
    p.data = torch.ones(10, 4)
    assert_refused(optimizer, r"embedding has shape \(10, 4\), and .*: 'tail' has \(8, 4\), expected \(10, 4\)")
    optimizer, p, _ = trained("lion", constraint="hyperball", blocks=2)
    (group,) = optimizer.group_steps()
    step = group.params[0]
    step.state["radius"], step.plan.stored = torch.ones(3), None
    with pytest.raises(RuntimeError, match=r"'radius' has \(3,\), expected \(2,\)"):
        validate_shapes([group], ())


def test_scales_of_other_blocks_are_refused() -> None:
    optimizer, p, _ = trained("lion", state_storage="int8", storage_min=1, storage_block=16)
    optimizer.param_groups[0]["storage_block"] = 8
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="hidden: embedding: storage_block was changed while there is 'exp_avg'"):
        stepped(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))


def test_complete_state_is_only_compared() -> None:
    optimizer, p, _ = trained("adamw")
    step = optimizer.group_steps()[0].params[0]
    note_complete(step)
    shape, dtype = torch.Size([8, 4]), torch.float32
    assert step.plan.stored is not None and sorted(step.plan.stored) == [
        ("exp_avg", shape, dtype),
        ("exp_avg_sq", shape, dtype),
        ("step", torch.Size([]), torch.float64),
    ]
    p.data, p.grad = torch.ones(10, 4), None
    validate_shapes([optimizer.group_steps()[0].only([step])], ())  # was complete, so it is not looked at again
    (group,) = optimizer.group_steps()
    with pytest.raises(RuntimeError, match="embedding .* is that of another shape"):
        validate_shapes([group], ())
