"""A plan lasts as long as what it follows from, and says what that is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.plan import ParamPlan, step_cost
from lightning_optim.core.step.records import PlanCache


def plans_of(optimizer: RuleOptimizer, cache: PlanCache | None = None) -> list[ParamPlan]:
    """The plans of all parameters, as the next step would take them."""
    groups = (cache or PlanCache()).collect(optimizer.param_groups, optimizer.state)
    return [s.plan for group in groups for s in group.params]


def two_matrices(**settings: Any) -> RuleOptimizer:
    params = [Parameter(torch.ones(6, 4)), Parameter(torch.ones(6, 4))]
    return RuleOptimizer([{"params": params, "rule": "muon", "name": "hidden", **settings}])


def test_the_plan_stays_the_same_through_steps_and_schedules() -> None:
    optimizer, cache = two_matrices(), PlanCache()
    before = plans_of(optimizer, cache)
    group_plan = cache.collect(optimizer.param_groups, optimizer.state)[0].plan
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.25)
    again = cache.collect(optimizer.param_groups, optimizer.state)[0]
    assert again.plan is group_plan and (again.rule.lr, again.rule.weight_decay) == (0.5, 0.25)
    assert [s.plan is x for s, x in zip(again.params, before, strict=True)] == [True, True]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(6, 4)
    own = [s.plan for s in optimizer.group_steps()[0].params]
    optimizer.step()
    assert all(s.plan is x for s, x in zip(optimizer.group_steps()[0].params, own, strict=True))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"blocks": 2}, {"transposed": True}, {"lr_convention": "adamw"}, {"momentum": 0.5}], ids=str
)
def test_another_setting_makes_other_plans(change: dict[str, Any]) -> None:
    optimizer, cache = two_matrices(), PlanCache()
    before = plans_of(optimizer, cache)
    optimizer.param_groups[0].update(change)
    after = plans_of(optimizer, cache)
    assert not any(a is b for a, b in zip(before, after, strict=True))
    assert plans_of(optimizer, cache)[0] is after[0]
    dims = {"blocks": (2, 3, 4), "transposed": (1, 4, 6)}
    assert after[0].dims == dims.get(next(iter(change)), (1, 6, 4))


@pytest.mark.parametrize("what", ["shape", "dtype", "object"])
def test_another_tensor_makes_another_plan_of_that_parameter_alone(what: str) -> None:
    optimizer, cache = two_matrices(), PlanCache()
    first, second = plans_of(optimizer, cache)
    p = optimizer.param_groups[0]["params"][0]
    if what == "object":
        optimizer.param_groups[0]["params"][0] = p = Parameter(torch.ones(6, 4))
    else:
        p.data = torch.ones(8, 4) if what == "shape" else torch.ones(6, 4, dtype=torch.float64)
    new, same = plans_of(optimizer, cache)
    assert new is not first and same is second
    assert (new.param is p, new.shape, new.compute_dtype) == (True, p.shape, p.dtype)
    assert (new.stack_id == same.stack_id) == (what == "object")
    assert (new.kernel_id == same.kernel_id) == (what != "dtype")


def test_blocks_of_several_sizes_are_pieces_with_costs_factors_and_state_of_their_own() -> None:
    p = Parameter(torch.ones(16, 5))
    options: dict[str, Any] = {"blocks": (8, 4, 4), "lr_convention": "adamw"}
    (muon,) = plans_of(RuleOptimizer([{"params": [p], "rule": "muon", "scale": "none", **options}]))
    assert [x.dims for x in muon.block_plans] == [(1, 8, 5), (2, 4, 5)] and [
        x.block_index for x in muon.block_plans
    ] == [0, 1]
    assert [x.factor for x in muon.block_plans] == pytest.approx([0.2 * math.sqrt(8), 0.2 * math.sqrt(5)])
    assert muon.factor == muon.block_plans[0].factor and muon.dims == (1, 8, 5)
    assert step_cost(muon.blocks) == 8 * 5 * 5 + 2 * (4 * 5 * 4)

    (soap,) = plans_of(RuleOptimizer([{"params": [p], "rule": "soap", **options}]))
    assert [x.refresh_cost for x in soap.block_plans] == [8**3 + 5**3, 2 * (4**3 + 5**3)]
    assert soap.refresh_cost == sum(x.refresh_cost for x in soap.block_plans)
    shapes = {key: soap.formats[key].shape for key in ("exp_avg", "basis_left", "basis_left.1")}
    assert shapes == {"exp_avg": (16, 5), "basis_left": (8, 8), "basis_left.1": (2, 4, 4)}
    assert "exp_avg.1" not in soap.formats and soap.factor == 1.0


def test_rows_that_do_not_divide_are_refused_by_name() -> None:
    optimizer = two_matrices()
    optimizer.param_groups[0]["blocks"] = 4
    with pytest.raises(ValueError, match="hidden: parameter 0: 6 rows do not divide into 4 blocks"):
        plans_of(optimizer)
