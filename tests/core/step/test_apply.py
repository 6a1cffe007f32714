"""Weights move by p - lr wd p - lr factor d, and narrow ones lose or repeat no rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.apply import apply_by_rows, apply_direction, apply_directions
from lightning_optim.core.step.records import GroupStep

LR, DECAY = 0.25, 0.5


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ready(params: list[Parameter], rule: str, **settings: Any) -> GroupStep:
    """A group whose state is allocated, at its first step."""
    optimizer = RuleOptimizer([{"params": params, "rule": rule, "lr": LR, **settings}])
    groups = optimizer.group_steps()
    optimizer.allocate_state(groups)
    return groups[0]


def apply(group: GroupStep, directions: list[Tensor], how: str) -> None:
    """By one of the ways that a step of whole matrices takes."""
    with torch.no_grad():
        if how == "together":
            apply_directions(group, group.params, directions)
            return
        for step, d in zip(group.params, directions, strict=True):
            if how == "alone":
                apply_direction(group, step, d)
            else:
                stacked = d.view(step.plan.dims)
                apply_by_rows(group, step, lambda run, stacked=stacked: stacked[:, run])


@pytest.mark.parametrize("how", ["together", "alone", "rows"])
@pytest.mark.parametrize(
    ("rule", "settings", "factor", "after"),
    [
        ("muon", {"scale": "none", "lr_convention": "adamw"}, 0.2 * 6**0.5, False),
        ("muon", {"scale": "none"}, 1.0, False),
        ("soap", {"normalize_grads": True, "lr_convention": "adamw"}, 0.2, True),
        ("soap", {}, 1.0, True),
    ],
)
def test_decay_before_or_after_the_step(
    rule: str, settings: dict[str, Any], factor: float, after: bool, how: str
) -> None:
    starts, directions = [drawn(6, 4, seed=i) for i in range(2)], [drawn(6, 4, seed=i) for i in (2, 3)]
    params = [Parameter(x.clone()) for x in starts]
    apply(ready(params, rule, weight_decay=DECAY, **settings), directions, how)
    for p, x, d in zip(params, starts, directions, strict=True):
        keep, step = 1 - LR * DECAY, LR * factor * d
        torch.testing.assert_close(p.detach(), (x - step) * keep if after else x * keep - step)


def test_decay_that_is_part_of_the_gradient_is_not_applied_again() -> None:
    p = Parameter(drawn(6, 4))
    start, d = p.detach().clone(), drawn(6, 4, seed=1)
    apply(ready([p], "sgd", weight_decay=DECAY), [d], "alone")
    torch.testing.assert_close(p.detach(), start - LR * d)


def test_cautious_decay_spares_weights_that_move_away_from_zero() -> None:
    p = Parameter(torch.tensor([2.0, 2.0, -2.0, -2.0]))
    apply(ready([p], "lion", cautious_decay=DECAY), [torch.tensor([1.0, -1.0, 1.0, -1.0])], "alone")
    kept = 2 * (1 - LR * DECAY)
    assert p.tolist() == [kept - LR, 2 + LR, -2 - LR, -kept + LR]


def test_kahan_summation_keeps_the_rounding_error_of_the_weights() -> None:
    start = drawn(40, 10, dtype=torch.bfloat16)
    p, lost = Parameter(start.clone()), Parameter(start.clone())
    kahan = ready([p], "lion", param_rounding="kahan")
    nearest = ready([lost], "lion", param_rounding="nearest")
    d = torch.full((40, 10), 2.0**-12)
    for _ in range(64):
        apply(kahan, [d], "alone")
        apply(nearest, [d], "alone")
    exact = start.float() - 64 * LR * d
    error = kahan.params[0].state["compensation"].float()
    assert kahan.params[0].state["compensation"].dtype == torch.bfloat16
    torch.testing.assert_close(p.float() + error, exact, rtol=0, atol=1e-4)
    spacing = (exact.abs() * 2.0**-7).clamp(min=1e-4)
    assert ((p.float() - exact).abs() <= spacing).all()
    large = start.abs() > 0.125
    assert torch.equal(lost[large], start[large]) and (p[large] != start[large]).any()


def rounded(seed: int, t: int, direction: float = 2.0**-10) -> Tensor:
    p = Parameter(torch.ones(1000, 40, dtype=torch.bfloat16))
    group = ready([p], "lion", seed=seed)
    group.params[0].t = t
    apply(group, [torch.full((1000, 40), direction)], "alone")
    return p.detach().float()


def test_stochastic_rounding_is_reproducible_and_has_no_bias() -> None:
    first = rounded(0, 1)
    assert torch.equal(first, rounded(0, 1))
    assert not torch.equal(first, rounded(1, 1)) and not torch.equal(first, rounded(0, 2))
    assert first.unique().tolist() == [1 - 2.0**-8, 1.0]
    moved = (1 - first).mean().item() / (LR * 2.0**-10)  # 2500 of 40000 weights are expected to move
    assert abs(moved - 1) < 0.1
    assert rounded(0, 1, 0.0).eq(1).all()
