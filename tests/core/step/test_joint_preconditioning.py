"""K-FAC sees the gradients of all its layers at once, biases with their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.apply import Transaction
from lightning_optim.core.step.joint_preconditioning import precondition_jointly
from lightning_optim.core.step.records import GroupStep, count_steps, number_steps
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler

LR, DAMPING = 0.1, 0.25


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begun(*groups: dict[str, Any]) -> list[GroupStep]:
    """Groups of K-FAC at their first step; factors are identities."""
    optimizer = RuleOptimizer([{"rule": "kfac", "lr": LR, "damping": DAMPING, "kl_clip": None, **g} for g in groups])
    steps = optimizer.group_steps()
    optimizer.allocate_state(steps)
    number_steps([s for group in steps for s in group.params])
    return steps


def preconditioned(groups: list[GroupStep], bias_of: dict[Tensor, Tensor] | None = None) -> list[Tensor]:
    refreshes = RefreshScheduler()
    refreshes.begin_step(groups, None)
    with torch.no_grad():
        precondition_jointly(groups, bias_of or {}, refreshes, Transaction())
    return [s.gradient() for group in groups for s in group.params]


def layer(rows: int, columns: int, seed: int) -> Parameter:
    p = Parameter(drawn(rows, columns, seed=seed))
    p.grad = drawn(rows, columns, seed=seed + 100)
    return p


def test_gradients_are_replaced_in_the_step_and_not_in_the_parameter() -> None:
    p, q = layer(4, 3, 0), layer(5, 2, 1)
    kept = [p.grad.clone(), q.grad.clone()] if p.grad is not None and q.grad is not None else []
    groups = begun({"params": [p]}, {"params": [q], "damping": 1.0, "transposed": True})
    groups[0].params[0].clip = 0.5
    found = preconditioned(groups)
    torch.testing.assert_close(found[0], 0.5 * kept[0] / (1 + DAMPING))
    torch.testing.assert_close(found[1], kept[1] / 2)
    assert groups[0].params[0].clip == 1.0
    assert torch.equal(p.grad, kept[0]) and torch.equal(q.grad, kept[1])  # pyright: ignore[reportArgumentType]


def test_one_factor_clips_the_layers_of_all_groups() -> None:
    p, q = layer(4, 3, 0), layer(5, 2, 1)
    assert p.grad is not None and q.grad is not None
    groups = begun({"params": [p], "kl_clip": 1e-3}, {"params": [q], "kl_clip": 1e-3})
    size = LR**2 * sum(float((x.grad.square() / (1 + DAMPING)).sum()) for x in (p, q) if x.grad is not None)
    nu = (1e-3 / size) ** 0.5
    assert nu < 1
    for d, g in zip(preconditioned(groups), (p.grad, q.grad), strict=True):
        torch.testing.assert_close(d, nu * g / (1 + DAMPING))


@pytest.mark.parametrize("known", [True, False])
def test_a_bias_is_divided_with_its_weight(known: bool) -> None:
    weight, bias = layer(4, 3, 0), Parameter(drawn(4, seed=2))
    bias.grad = drawn(4, seed=3)
    groups = begun({"params": [weight, bias]})
    state = groups[0].params[0].state
    state["input_factor"].copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)))
    found = preconditioned(groups, {weight: bias} if known else {})
    assert weight.grad is not None
    torch.testing.assert_close(found[0], weight.grad / (torch.tensor([1.0, 2.0, 3.0]) + DAMPING))
    torch.testing.assert_close(found[1], bias.grad / (4 + DAMPING) if known else bias.grad)


def test_factors_are_decomposed_when_they_are_due_and_stored() -> None:
    p = layer(4, 3, 0)
    groups = begun({"params": [p], "refresh": "fixed:2", "storage_min": 1, "state_storage": "int8"})
    state = groups[0].params[0].state
    values = torch.arange(1.0, 5.0, dtype=torch.float64)
    state["output_factor"].copy_(torch.diag(values))
    preconditioned(groups)
    torch.testing.assert_close(state["output_values"].flatten().sort()[0], values)
    state["output_factor"].mul_(2)
    count_steps(groups[0].params)
    count_steps(groups[0].params)
    number_steps(groups[0].params)  # step 3 is due
    preconditioned(groups)
    torch.testing.assert_close(state["output_values"].flatten().sort()[0], 2 * values)
    count_steps(groups[0].params)
    number_steps(groups[0].params)
    state["output_factor"].mul_(2)
    preconditioned(groups)
    torch.testing.assert_close(state["output_values"].flatten().sort()[0], 2 * values)


def test_other_rules_keep_their_gradients() -> None:
    p = layer(4, 3, 0)
    groups = RuleOptimizer([{"params": [p], "rule": "soap"}]).group_steps()
    (found,) = preconditioned(groups)
    assert found is p.grad and groups[0].params[0].due == ""
