"""Whole matrices are stepped in stacks: which parameters share one, and what a stack leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.rule import REGISTRY
from lightning_optim.core.step.records import ParamStep, number_steps
from lightning_optim.core.step.stacked import chunks, needs_param, update_stack
from tests.helpers.rules import gradient


def made(*shapes: tuple[int, ...]) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_parameters_of_one_size_step_and_decision_share_a_stack() -> None:
    params = made((6, 4), (4, 6), (6, 4), (6, 4), (6, 4))
    steps = RuleOptimizer([{"params": params, "rule": "muon"}]).group_steps()[0].params

    def batches(limit: int) -> list[list[int]]:
        place = {id(s): i for i, s in enumerate(steps)}
        return [[place[id(s)] for s in run] for run in chunks(steps, limit)]

    assert batches(2**20) == [[0, 2, 3, 4], [1]]
    assert batches(2 * 24 * 16) == [[0, 2], [3, 4], [1]]
    steps[2].t = 5
    steps[4].due = "interval"
    assert batches(2**20) == [[0, 3], [1], [2], [4]]


@pytest.mark.parametrize("rule", ["muon", "soap", "adafactor"])
def test_steps_do_not_depend_on_the_size_of_stacks(rule: str) -> None:
    settings: dict[str, Any] = {"rule": rule, "lr": 0.05} | ({"refresh": "fixed:2"} if rule == "soap" else {})
    runs = []
    for limit in (1, 2**25):
        params = made((6, 4), (6, 4), (6, 4))
        optimizer = RuleOptimizer([{"params": params, **settings}], max_temp_bytes=limit)
        for t in range(1, 4):
            for i, p in enumerate(params):
                p.grad = gradient(p, str(i), t)
            optimizer.step()
        runs.append(params)
    for one, many, start in zip(*runs, made((6, 4), (6, 4), (6, 4)), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
        assert (one - start).abs().max() > 0.01


def test_a_sink_takes_the_directions_of_all_blocks_and_no_weight_is_written() -> None:
    (p,) = made((16, 5))
    start = p.detach().clone()
    options: dict[str, Any] = {"rule": "muon", "scale": "none", "lr_convention": "adamw", "ns_dtype": "float32"}
    optimizer = RuleOptimizer([{"params": [p], "blocks": (8, 4, 4), **options}])
    p.grad = gradient(p, "p", 1)
    (group,) = optimizer.group_steps()
    optimizer.allocate_state([group])
    number_steps(group.params)
    taken: list[tuple[ParamStep, Tensor]] = []
    update_stack(group, group.params, [p.detach()], [p.grad], sink=lambda s, d: taken.append((s, d)))
    ((step, d),) = taken
    assert step is group.params[0] and torch.equal(p, start) and d.shape == p.shape
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], p.grad * 0.05)
    # each block is orthogonal, and has the length that its own size asks for once it is multiplied by the first factor
    rms = [
        (d[rows] * step.plan.factor).square().mean().sqrt().item() for rows in (slice(8), slice(8, 12), slice(12, 16))
    ]
    assert rms == pytest.approx([0.2 * (5 / 5) ** 0.5, *[0.2 * (4 / 4) ** 0.5] * 2], rel=0.3)
    alone = made((16, 5))[0].detach()[12:].clone().requires_grad_()
    alone.grad = p.grad[12:].clone()
    other = RuleOptimizer([{"params": [alone], "lr": 1.0, **options}])
    before = alone.detach().clone()
    other.step()
    torch.testing.assert_close(before - alone.detach(), d[12:] * step.plan.factor, rtol=1e-3, atol=1e-4)


def test_which_rules_get_the_weights() -> None:
    assert needs_param(REGISTRY["adafactor"]())
    assert not needs_param(REGISTRY["muon"](weight_decay=0.1))  # pyright: ignore[reportCallIssue]
    for decay in (0.0, 0.1):
        rule = REGISTRY["sgd"](weight_decay=decay)  # pyright: ignore[reportCallIssue]
        assert needs_param(rule) == (decay > 0)


def test_a_skipped_step_updates_state_alone() -> None:
    (p,) = made((6, 4))
    start = p.detach().clone()
    optimizer = RuleOptimizer([{"params": [p], "rule": "soap", "weight_decay": 0.5}])
    p.grad = gradient(p, "p", 1)
    optimizer.step()
    assert torch.equal(p, start)
    torch.testing.assert_close(optimizer.state[p]["factor_left"], 0.05 * p.grad @ p.grad.T)
    assert optimizer.state[p]["refreshed"][..., 0].eq(1).all()
    optimizer.step()
    assert not torch.equal(p, start) and optimizer.state[p]["refreshed"][..., 0].eq(2).all()
