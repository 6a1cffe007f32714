"""Elementwise rules: kernels, and blocks that stay in cache, give what the formula gives for every element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.matrix_views import BLOCK
from lightning_optim.core.step.apply import Transaction
from lightning_optim.core.step.elementwise import portions, step_elementwise
from lightning_optim.core.step.records import GroupStep, number_steps


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def begun(optimizer: RuleOptimizer) -> GroupStep:
    """The only group at its next step."""
    (group,) = optimizer.group_steps()
    optimizer.allocate_state([group])
    number_steps(group.params)
    return group


def taken(optimizer: RuleOptimizer) -> None:
    group = begun(optimizer)
    with torch.no_grad():
        step_elementwise(group, group.params, 2**20, Transaction())


def test_a_walk_in_blocks_reaches_every_element_once() -> None:
    x, g = drawn(3, BLOCK - 7), drawn(3, BLOCK - 7, seed=1)
    p = Parameter(x.clone())
    p.grad = g
    optimizer = RuleOptimizer([{"params": [p], "rule": "lion", "lr": 0.5, "weight_decay": 0.0}])
    taken(optimizer)
    assert torch.equal(p, x - 0.5 * g.sign())
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.01 * g)


@pytest.mark.parametrize("layout", ["transposed gradient", "float64", "int8 state"])
def test_what_a_kernel_cannot_take_is_walked_over_alike(layout: str) -> None:
    x, g = drawn(40, 30), drawn(40, 30, seed=1)
    plain, other = Parameter(x.clone()), Parameter(x.double() if layout == "float64" else x.clone())
    plain.grad, other.grad = g, g.to(other.dtype)
    if layout == "transposed gradient":
        other.grad = g.T.contiguous().T
        assert not other.grad.is_contiguous()
    options = {"state_storage": "int8", "storage_min": 1} if layout == "int8 state" else {}
    optimizers = [
        RuleOptimizer([{"params": [plain], "rule": "adamw", "lr": 0.1}]),
        RuleOptimizer([{"params": [other], "rule": "adamw", "lr": 0.1, **options}]),
    ]
    for optimizer in optimizers:
        taken(optimizer)
    torch.testing.assert_close(other.to(torch.float32), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.detach().float(), x * (1 - 0.1 * 0.01) - 0.1 * g.sign(), rtol=1e-4, atol=1e-4)
    for key in ("exp_avg", "exp_avg_sq") if layout != "int8 state" else ():
        torch.testing.assert_close(
            optimizers[1].state[other][key].float(), optimizers[0].state[plain][key], rtol=1e-5, atol=1e-7
        )


def test_clipped_gradients_are_copied_in_portions_and_stay_as_they_are() -> None:
    params = [Parameter(torch.zeros(100)) for _ in range(5)]
    for p in params:
        p.grad = torch.ones(100)
    optimizer = RuleOptimizer([{"params": params, "rule": "sgd", "lr": 1.0}])
    group = begun(optimizer)

    def sizes(limit: int) -> list[int]:
        return [len(run) for run in portions(group.params, limit)]

    assert sizes(1) == [5]
    for s in group.params[1:]:
        s.clip = 0.5
    assert sizes(1) == [1] * 5 and sizes(800) == [3, 2] and sizes(2**20) == [5]
    with torch.no_grad():
        step_elementwise(group, group.params, 800, Transaction())
    assert [p.unique().tolist() for p in params] == [[-1.0], *[[-0.5]] * 4]
    assert all(p.grad is not None and p.grad.eq(1).all() for p in params)


def test_bfloat16_weights_are_rounded_alike_in_any_layout() -> None:
    x, g = drawn(500, 300).bfloat16(), drawn(500, 300, seed=1).bfloat16()
    params = [Parameter(x.clone()), Parameter(x.T.contiguous().T)]
    for p in params:
        p.grad = g
        taken(RuleOptimizer([{"params": [p], "rule": "lion", "lr": 1e-3, "seed": 3}]))
    assert torch.equal(*params) and params[0].dtype == torch.bfloat16
    exact = x.float() - 1e-3 * g.float().sign()
    assert ((params[0].float() - exact).abs() <= exact.abs() * 2.0**-7).all()
    assert abs((params[0].float() - exact).mean().item()) < 1e-4
