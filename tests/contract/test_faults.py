"""Every failure in a step leaves each parameter as it was, or with the whole step, and says which."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import RuleOptimizer
from lightning_optim.core.rule import REGISTRY
from tests.helpers import rules
from tests.helpers.pool import Pool
from tests.helpers.rules import NAMES, SEARCHING, give, others_slow, params, refreshing

EVERY = [*NAMES, *SEARCHING]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"cautious_decay": 0.1, "constraint": "hyperball"},
    {"state_storage": "int8", "storage_min": 1, "storage_block": 16},
    {"param_rounding": "kahan", "state_storage": "bf16", "storage_min": 1},
]


class OutOfMemory(TorchDispatchMode):
    """Let one allocation fail: that of the operation with a number, counted from 1."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.count, self.failing = 0, failing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        if returned and str(returned[0].type).startswith("Tensor") and returned[0].alias_info is None:
            self.count += 1
            if self.count == self.failing:
                raise torch.OutOfMemoryError("out of memory, as the test wants it")
        return func(*args, **(kwargs or {}))


def trained(name: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[dict[str, Parameter], RuleOptimizer]:
    """An optimizer with AdamW beside a rule, after two steps."""
    mine = {k: p for k, p in params(name, dtype).items() if p.ndim >= 2}
    every = {"beside": Parameter(torch.ones(3))} | mine
    optimizer = RuleOptimizer([
        {"params": [every["beside"]], "rule": "adamw"},
        {"params": [*mine.values()], "rule": name, **refreshing(name), **options},
    ])
    for t in (1, 2):
        give(every, t)
        optimizer.step()
    return every, optimizer


def contents(every: dict[str, Parameter], optimizer: RuleOptimizer) -> dict[str, list[Tensor]]:
    """Weights, state and counts by parameter."""
    return {
        k: [x.detach().clone() for x in (p, *dict(sorted(optimizer.state[p].items())).values())]
        for k, p in every.items()
    }


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def outcome(name: str, dtype: torch.dtype, options: dict[str, Any], failing: int) -> tuple[Any, Any, str, int]:
    """Weights and state before and after a third step, its error, and the number of allocations."""
    every, optimizer = trained(name, dtype, options)
    give(every, 3)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    rules.show(optimizer)  # curvature is measured before the step
    before, error = contents(every, optimizer), ""
    with pytest.MonkeyPatch.context() as patch, OutOfMemory(failing) as mode:
        patch.setattr(rules, "feeding", False)
        try:
            optimizer.step()
        except RuntimeError as failure:
            error = str(failure)
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return before, contents(every, optimizer), error, mode.count


def check(name: str, dtype: torch.dtype, options: dict[str, Any], numbers: Callable[[int], list[int]]) -> int:
    """Let allocations fail in turn; how many did."""
    try:
        _, complete, error, count = outcome(name, dtype, options, 0)
    except ValueError:
        return 0  # the option is not for this rule
    assert not error
    for failing in numbers(count):
        before, after, error, _ = outcome(name, dtype, options, failing)
        unmoved = {k for k in before if same(before[k], after[k])}
        moved = {k for k in before if same(complete[k], after[k])}
        assert unmoved | moved == set(before), f"{name}, {options}, allocation {failing}: {error}"
        assert bool(unmoved) == bool(error), (failing, error)
        assert not moved or not error or "not updated" in error, error
    return len(numbers(count))


@pytest.mark.parametrize("name", others_slow(EVERY))
def test_memory_that_runs_out_leaves_every_parameter_whole(name: str) -> None:
    assert check(name, torch.float32, {}, lambda count: sorted({1 + count * k // 6 for k in range(6)} | {count}))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_every_allocation_fails_in_turn(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(name, dtype, options, lambda count: [*range(1, count, 1 + count // 150), count])


CODED: dict[str, Any] = {"state_storage": "int8", "storage_min": 1, "storage_block": 16}
COLLECTIVES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("muon", "fsdp2", 2, {}),
    ("adafactor", "tp", 2, {"clip_norm": 1.0}),
    ("adam_mini", "fsdp2+tp", 4, {"uw_floor": 0.1, "uw_floor_by": "row"}),
]


def check_ranks(pool: Pool, name: str, layout: str, world: int, settings: dict[str, Any]) -> None:
    """Let every collective call of a step fail in turn, on all ranks at once."""
    job = {"name": name, "layout": layout, "settings": settings}
    for outcomes in pool.run("tests.helpers.failing_collectives:everywhere", world, **job):
        assert all(not x.faults and x.error and x.seconds < 20 for x in outcomes), (name, layout, outcomes)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "layout", "world", "settings"), COLLECTIVES)
def test_a_collective_call_that_fails_leaves_every_parameter_whole(
    pool: Pool, name: str, layout: str, world: int, settings: dict[str, Any]
) -> None:
    check_ranks(pool, name, layout, world, settings)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", [n for n in NAMES if not REGISTRY[n].needs_all_gradients])
def test_every_collective_call_of_every_rule_fails_in_turn(pool: Pool, name: str) -> None:
    coded = CODED if REGISTRY[name].elementwise or REGISTRY[name].reduces else {}
    cases = [
        ("fsdp2", 2, {}),
        ("shared", 2, {"clip_norm": 1.0}),
        ("fsdp2+tp", 4, {"uw_floor": 0.1}),
        ("hsdp", 4, coded),
    ]
    for layout, world, settings in cases:
        check_ranks(pool, name, layout, world, settings)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "failing"), [("muon", 1), ("adafactor", 2)])
def test_ranks_do_not_wait_for_one_that_lost_its_connection_beyond_their_limit(
    pool: Pool, name: str, failing: int
) -> None:
    job = {"name": name, "layout": "fsdp2", "settings": {}, "failing": failing}
    for x in pool.run("tests.helpers.failing_collectives:on_one_rank", 2, **job):
        assert not x.faults and x.seconds < 20, x
