"""Parameters become stacks of bounded size, and what a rule leaves in a stack is stored where it belongs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.matrix_views import STACK_LIMIT
from lightning_optim.core.step.stacks import (
    copy_aliased,
    quantized_views,
    stack,
    stacked_state,
    stacks,
    store_stack,
    version,
    with_values,
)


def test_a_state_that_becomes_another_state_is_copied_before_it_is_stored() -> None:
    before = {"prev": torch.zeros(2, 3), "cur": torch.ones(2, 3), "other": torch.full((2, 3), 5.0)}
    assert copy_aliased(before, before) is before
    after = {"prev": before["cur"], "cur": torch.full((2, 3), 2.0), "other": before["other"]}
    out = copy_aliased(before, after)
    assert out["other"] is before["other"] and out["cur"] is after["cur"]
    for key in ("cur", "prev"):  # in the order in which an alias would see the new value
        store_stack([before[key]], out[key])
    assert before["prev"].eq(1).all() and before["cur"].eq(2).all()
    swapped = copy_aliased(before, {**before, "prev": before["cur"][:], "cur": before["prev"]})
    store_stack([before["prev"]], swapped["prev"])
    store_stack([before["cur"]], swapped["cur"])
    assert before["prev"].eq(2).all() and before["cur"].eq(1).all()


@pytest.mark.parametrize(
    ("elements", "beside", "limit", "sizes"),
    [
        (100, (), 3 * 100 * 16, [3, 3, 3, 1]),
        (100, (), 3 * 100 * 16 - 1, [2, 2, 2, 2, 2]),
        (100, (50, 50), 4 * 200 * 16, [4, 4, 2]),
        (100, (), 1, [1] * 10),
        (STACK_LIMIT, (), 2**40, [1] * 10),
        (100, (STACK_LIMIT,), 2**40, [1] * 10),
        (0, (), 2**20, [10]),
    ],
)
def test_stacks_stay_within_max_temp_bytes(
    elements: int, beside: tuple[int, ...], limit: int, sizes: list[int]
) -> None:
    runs = list(stacks(range(10), elements, limit, beside))
    assert [len(run) for run in runs] == sizes
    assert [i for run in runs for i in run] == list(range(10))


def test_one_tensor_is_stacked_as_a_view_and_several_are_stored_back() -> None:
    a, b = torch.arange(6.0).view(3, 2), torch.arange(6.0, 12.0).view(3, 2)
    alone = stack([a], (1, 3, 2), torch.float32)
    assert alone.data_ptr() == a.data_ptr() and alone.shape == (1, 3, 2)
    seen = version(a)
    store_stack([a], alone)
    assert version(a) == seen
    both = stack([a, b], (1, 3, 2), torch.float64)
    assert both.shape == (2, 3, 2) and both.dtype == torch.float64
    store_stack([a, b], both.neg())
    assert torch.equal(a, -torch.arange(6.0).view(3, 2)) and torch.equal(b, -torch.arange(6.0, 12.0).view(3, 2))
    with torch.inference_mode():
        assert version(torch.ones(2)) is None


def test_the_state_of_parameters_of_one_size_is_one_stack_per_tensor() -> None:
    params = [Parameter(torch.full((3, 2), float(i))) for i in range(2)]
    optimizer = RuleOptimizer([{"params": params, "rule": "soap"}])
    groups = optimizer.group_steps()
    optimizer.allocate_state(groups)
    optimizer.state[params[1]]["factor_left"].fill_(4.0)
    chunk = groups[0].params
    entries, stacked = stacked_state(chunk, chunk[0].plan.specs, chunk[0].plan.dims)
    assert stacked["exp_avg"].shape == (2, 3, 2) and stacked["factor_right"].shape == (2, 2, 2)
    assert stacked["factor_left"].mean((1, 2)).tolist() == [0.0, 4.0]
    assert [x is optimizer.state[p]["exp_avg"] for x, p in zip(entries["exp_avg"], params, strict=True)] == [True, True]


def test_rules_see_the_values_of_quantized_state_and_the_stored_ones_stay() -> None:
    p = Parameter(torch.ones(8, 8))
    optimizer = RuleOptimizer([{"params": [p], "rule": "lion", "state_storage": "int8", "storage_min": 1}])
    p.grad = torch.full((8, 8), 3.0)
    optimizer.step()
    (group,) = optimizer.group_steps()
    (step,) = group.params
    views = quantized_views(group, step)
    seen = with_values(step, views)
    assert list(views) == ["exp_avg"] and seen is not step
    torch.testing.assert_close(seen.state["exp_avg"], torch.full((8, 8), 0.03))
    assert step.state["exp_avg"].dtype == torch.uint8 and seen.state["step"] is step.state["step"]
    assert with_values(step, {}) is step
