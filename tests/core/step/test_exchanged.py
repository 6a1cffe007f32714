"""Matrices that one rank owns: gradients go there, directions come back, and all exchanges overlap."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.step.apply import Transaction
from lightning_optim.core.step.exchanged import begin_exchanges, finish_exchanges
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import make


def test_nothing_is_exchanged_by_one_process() -> None:
    p = Parameter(torch.ones(6, 4))
    p.grad = torch.ones(6, 4)
    optimizer = RuleOptimizer([{"params": [p], "rule": "soap"}])
    groups = optimizer.group_steps()
    assert begin_exchanges(groups, Owners(), RefreshScheduler(), 2**20, Transaction()) == []
    finish_exchanges([], Transaction())
    assert p.eq(1).all() and not optimizer.state


def test_every_matrix_is_computed_before_the_first_direction_is_waited_for() -> None:
    log: list[str] = []

    def exchange(name: str) -> Generator[None]:
        log.append(f"send {name}")
        yield
        log.append(f"compute {name}")
        yield
        log.append(f"apply {name}")

    exchanges = [((), exchange("a")), ((), exchange("b"))]
    for _, x in exchanges:
        next(x)
    finish_exchanges(exchanges, Transaction())
    assert log == ["send a", "send b", "compute a", "compute b", "apply a", "apply b"]


def owned(rank: int, world: int, name: str) -> Any:
    """Three steps by two replicas that share the work; whole weights, and the elements of state held for each."""
    model = jobs.Model(name)
    optimizer = make(name, model.parameters())
    optimizer.shard_work()
    jobs.take_steps(model, optimizer, range(1, 4), {1: "odd"})
    state = {k: sum(t.numel() for t in optimizer.state[p].values()) for k, p in model.named_parameters()}
    return jobs.weights(model), state


@pytest.mark.dist
@pytest.mark.parametrize("name", ["muon", "soap"])  # soap's first step moves nothing
def test_two_ranks_share_the_matrices_and_move_them_alike(pool: Pool, name: str) -> None:
    model = jobs.Model(name)
    optimizer = make(name, model.parameters())
    jobs.take_steps(model, optimizer, range(1, 4), {1: "odd"})
    (first, here), (second, there) = pool.run("tests.core.step.test_exchanged:owned", 2, name=name)
    for key, p in model.named_parameters():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], p.detach(), rtol=1e-5, atol=1e-6)
        whole = sum(t.numel() for t in optimizer.state[p].values())
        assert sorted([here[key], there[key]]) == [1, whole], key  # its owner has all state, the other its counter
