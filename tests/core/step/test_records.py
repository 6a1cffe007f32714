"""A step takes the parameters that are trained, and sees at once whether their state is complete."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import SOAP, RuleOptimizer, TailEMA
from lightning_optim.core.step.records import ParamStep, count_steps, number_steps


def test_only_trainable_parameters_with_elements_are_collected() -> None:
    trained, fixed, empty = Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2)), Parameter(torch.ones(0, 2))
    fixed.requires_grad_(False)
    given, unused = torch.ones(4), torch.ones(4)  # no Parameters: they take part once they have a gradient
    given.grad = torch.ones(4)
    optimizer = RuleOptimizer([{"params": [trained, fixed, empty, given, unused], "rule": "lion"}])
    assert [s.plan.param is p for s, p in zip(optimizer.group_steps()[0].params, (trained, given), strict=True)] == [
        True,
        True,
    ]
    every = optimizer.group_steps(frozen=True)[0].params
    assert [id(s.plan.param) for s in every] == [id(p) for p in (trained, fixed, given, unused)]
    assert all(s.grad is None for s in every)
    assert [s.plan.index for s in every] == [0, 1, 3, 4]
    fixed.requires_grad_(True)
    assert len(optimizer.group_steps()[0].params) == 3


def broken(state: dict[str, Tensor], how: str) -> None:
    """Take something from the state of a parameter, or replace it."""
    if how == "missing":
        del state["exp_avg"]
    else:
        state["exp_avg"] = state["exp_avg"].bfloat16() if how == "dtype" else torch.zeros(3, 3)


@pytest.mark.parametrize("how", ["popped", "missing", "dtype", "shape"])
def test_state_is_complete_from_the_first_step_until_something_is_replaced(how: str) -> None:
    params = [Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2))]
    optimizer = RuleOptimizer([{"params": params[:1], "rule": "adamw"}, {"params": params[1:], "rule": "adamw"}])
    for p in params:
        p.grad = torch.ones(3, 2)
    assert [group.is_complete for group in optimizer.group_steps()] == [False, False]
    optimizer.step()
    assert [group.is_complete for group in optimizer.group_steps()] == [True, True]
    if how == "popped":
        optimizer.state.pop(params[0])
    else:
        broken(optimizer.state[params[0]], how)
    assert [group.is_complete for group in optimizer.group_steps()] == [False, True]
    if how == "shape":
        return
    optimizer.step()
    assert [group.is_complete for group in optimizer.group_steps()] == [True, True]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[params[0]]["step"] == (1 if how == "popped" else 2)


def test_steps_are_counted_per_parameter() -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = RuleOptimizer([{"params": params, "rule": "lion"}])
    groups = optimizer.group_steps()
    optimizer.allocate_state(groups)
    one, both = groups[0].params[1:], groups[0].params
    count_steps(one)
    count_steps(one)
    count_steps(both)
    number_steps(both)  # the coming one is not counted yet
    assert [s.t for s in both] == [2, 4]
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 3]
    count_steps([])


def test_a_gradient_of_another_shape_is_refused_by_name() -> None:
    p = Parameter(torch.ones(3, 2))
    optimizer = RuleOptimizer([{"params": [("weight", p)], "rule": "lion", "name": "hidden"}])
    p.grad = torch.ones(3, 2)
    p.data = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match=r"hidden: weight has shape \(4, 2\), its gradient \(3, 2\)") as caught:
        optimizer.step()
    assert "nothing was updated" in str(caught.value) and p.eq(1).all() and not optimizer.state


def test_a_step_splits_into_sizes_that_share_the_memory_of_its_state() -> None:
    p = Parameter(torch.ones(16, 5))
    optimizer = RuleOptimizer([{"params": [p], "rule": "soap", "blocks": (8, 4, 4)}])
    groups = optimizer.group_steps()
    optimizer.allocate_state(groups)
    (step,) = groups[0].params
    step.t, step.due = 7, "interval"
    pieces: list[ParamStep] = step.split(groups[0].rule)
    assert [(x.t, x.due, x.plan.dims) for x in pieces] == [(7, "interval", (1, 8, 5)), (7, "interval", (2, 4, 5))]
    assert pieces[1].state["basis_left"] is optimizer.state[p]["basis_left.1"]
    assert pieces[0].state["exp_avg"] is pieces[1].state["exp_avg"] is optimizer.state[p]["exp_avg"]
    assert [tuple(x.shape) for x in step.refresh_records()] == [(1, 5), (2, 5)]
    assert step.gradient().eq(0).all()
    p.grad = torch.full((16, 5), 2.0)
    (step,) = optimizer.group_steps()[0].params
    assert step.gradient() is p.grad
    step.clip = 0.25
    assert step.gradient().eq(0.5).all() and p.grad.eq(2).all()


def test_state_beside_the_rule_s_that_goes_missing_is_allocated_again() -> None:
    params = [Parameter(torch.randn(8, 8).bfloat16()) for _ in range(2)]
    optimizer = RuleOptimizer([{"params": params, "rule": "adamw", "lr": 0.1, "param_rounding": "kahan"}])
    for t in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        if t == 1:
            optimizer.state[params[1]].pop("compensation")
    assert "compensation" in optimizer.state[params[1]]
    averaged = Parameter(torch.randn(4, 4))
    optimizer = RuleOptimizer([{"params": [averaged], "rule": "adamw", "lr": 0.1}]).with_averaging(TailEMA(start=0))
    for t in range(3):
        averaged.grad = torch.ones_like(averaged)
        optimizer.step()
        if t == 1:
            optimizer.state[averaged].pop("tail")
    assert "tail" in optimizer.state[averaged]


def test_a_parameter_that_was_replaced_is_not_kept_alive() -> None:
    optimizer = RuleOptimizer([Parameter(torch.randn(4, 4)) for _ in range(2)], {"rule": "adamw", "lr": 0.1})
    params = optimizer.param_groups[0]["params"]

    def replaced() -> weakref.ref[Parameter]:
        new = params[1] = Parameter(torch.randn(9, 9))
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        params[1] = Parameter(torch.randn(9, 9), requires_grad=False)
        optimizer.state.pop(new)
        return weakref.ref(new)

    reference = replaced()
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    gc.collect()
    assert reference() is None


def test_steps_are_counted_beyond_the_integers_of_float32() -> None:
    """Refreshes and stochastic rounding follow the count, which an earlier checkpoint has in float32."""
    p, refreshed = Parameter(torch.ones(4, 4)), []
    optimizer = SOAP([p], refresh="fixed:10")
    p.grad = torch.eye(4)
    optimizer.step()
    optimizer.state[p]["step"] = torch.tensor(2.0**24 - 3)
    optimizer.on_refresh = lambda refresh: refreshed.append(refresh.t)
    for _ in range(30):
        optimizer.step()
    assert optimizer.state[p]["step"] == 2**24 + 27 and len(refreshed) == 3
