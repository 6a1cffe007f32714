"""Preconditioners are refreshed when their policy says so, in turns of equal cost, and each refresh is reported."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.records import Refresh
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler, _Pool, staleness
from lightning_optim.refresh import Staggered
from tests.helpers.rules import gradient


def run(optimizer: RuleOptimizer, steps: range) -> list[Refresh]:
    """Take steps; what was reported."""
    events: list[Refresh] = []
    optimizer.on_refresh = events.append
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for i, p in enumerate(params):
            p.grad = gradient(p, str(i), t)
        optimizer.step()
    return events


@dataclass(frozen=True)
class Counted(Staggered):
    """A policy that tells when it was asked."""

    asked: tuple[list[int], ...] = ([],)

    def next_step(self, t: int, phase: Callable[[int], int]) -> int:
        self.asked[0].append(t)
        return super().next_step(t, phase)


def test_a_periodic_policy_is_asked_once_per_interval() -> None:
    policy, pool = Counted(4, ([],)), _Pool((1.0, 1.0))
    due = [[t for t in range(2, 20) if pool.is_due(policy, rank, t)] for rank in range(2)]
    assert due == [[5, 9, 13, 17], [2, 6, 10, 14, 18]]
    assert policy.asked[0] == [2, 6, 10, 14, 18] + [2, 3, 7, 11, 15, 19]
    assert pool.is_due(policy, 0, 5)  # after going back, by loading a checkpoint: asked again
    assert policy.asked[0][-1] == 5


def test_staggered_refreshes_take_turns_of_equal_cost() -> None:
    shapes = [(12, 12), (6, 6), (6, 6), (6, 6), (6, 6), (6, 6), (6, 6), (6, 6), (6, 6)]
    made = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=made)) for shape in shapes]
    optimizer = RuleOptimizer([{"params": params, "rule": "soap", "refresh": "staggered:2", "name": "hidden"}])
    cost = {s.plan.name: s.plan.refresh_cost for s in optimizer.group_steps()[0].params}
    spent: defaultdict[int, float] = defaultdict(float)
    events = run(optimizer, range(1, 6))
    for event in events:
        spent[event.t] += cost[event.name]
    assert spent[1] == sum(cost.values())
    assert [spent[t] for t in range(2, 6)] == [sum(cost.values()) / 2] * 4
    for name in cost:
        ages = [event.age for event in events if event.name == name]
        assert ages[2:] == [2] * (len(ages) - 2) and len(ages) == 3


def test_each_refresh_is_reported() -> None:
    params = [Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))), Parameter(torch.ones(3))]
    optimizer = RuleOptimizer([{"params": params, "rule": "soap", "refresh": "fixed:3", "name": "hidden"}])
    first, second = run(optimizer, range(1, 5))
    assert first[:3] == ("hidden: parameter 0", 1, "first") and math.isnan(first.overlap)
    assert second[:4] == ("hidden: parameter 0", 4, "interval", 3)
    assert 0 <= second.overlap <= 1 and second.seconds > 0 and math.isnan(second.staleness)
    optimizer.on_refresh = None
    assert run(optimizer, range(5, 7)) == []


def test_a_policy_that_measures_refreshes_what_is_stale() -> None:
    p = Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    optimizer = RuleOptimizer([{"params": [p], "rule": "soap", "refresh": "off_diagonal:0.2:5"}])
    events = run(optimizer, range(1, 12))
    stale = [event for event in events if event.reason == "stale"]
    assert events[0].reason == "first" and len(stale) > 1
    assert all(0.2 < event.staleness <= 1 for event in stale)
    (group,) = optimizer.group_steps()
    assert p.grad is not None
    group.params[0].t = 12
    before = {key: t.clone() for key, t in optimizer.state[p].items()}
    assert 0 <= float(staleness(group, group.params[0], p.grad)) <= 1
    assert all(torch.equal(before[key], t) for key, t in optimizer.state[p].items())


@pytest.mark.parametrize("rule", ["lion", "muon"])
def test_nothing_is_due_without_preconditioners(rule: str) -> None:
    optimizer, scheduler = RuleOptimizer([{"params": [Parameter(torch.ones(3, 2))], "rule": rule}]), RefreshScheduler()
    groups = optimizer.group_steps()
    scheduler.begin_step(groups, None)
    scheduler.decide(groups[0], groups[0].params)
    assert [s.due for s in groups[0].params] == [""]
