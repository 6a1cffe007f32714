"""What the processes of the pool do where a collective call fails: every parameter keeps, or takes, a whole step."""

from __future__ import annotations

import dataclasses
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import RuleOptimizer
from lightning_optim.core.parallel.sharding import local
from tests.helpers import jobs, rules
from tests.helpers.rules import gradient, make


class Failing(TorchDispatchMode):
    """Let one collective call fail, on this rank: the one with a number, counted from 1."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.count, self.failing = 0, failing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.count += 1
            if self.count == self.failing:
                raise RuntimeError("connection lost, as the test wants it")
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass
class Outcome:
    """Of one step on one rank."""

    error: str
    count: int
    seconds: float
    faults: list[str]


def contents(model: jobs.Model, optimizer: RuleOptimizer) -> dict[str, list[Tensor]]:
    """Weights, state and counts on this rank, by parameter."""
    out = {}
    for key, p in model.named_parameters():
        state = optimizer.state[p]
        out[key] = [local(t).detach().clone() for t in (p, *(state[k] for k in sorted(state)))]
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bitwise equality."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def third_step(name: str, layout: str, world: int, settings: dict[str, Any], failing: int) -> tuple[Any, ...]:
    """Take two steps, and one in which a collective call fails."""
    model = jobs.lay_out(jobs.Model(name), layout, world)
    optimizer = make(name, model.parameters(), **settings)
    if layout == "shared":
        optimizer.shard_work()
    jobs.take_steps(model, optimizer, range(1, 3))
    for key, p in model.named_parameters():
        p.grad = jobs.placed(gradient(torch.empty(p.shape, dtype=p.dtype), key, 3), p)
    rules.show(optimizer)
    before, error, began = contents(model, optimizer), "", time.monotonic()
    rules.feeding = False
    mode = Failing(failing)
    try:
        with mode:
            optimizer.step()
    except RuntimeError as failure:
        error = str(failure)
    finally:
        rules.feeding = True
    return before, contents(model, optimizer), error, mode.count, time.monotonic() - began


def everywhere(rank: int, world: int, name: str, layout: str, settings: dict[str, Any]) -> list[Outcome]:
    """Every collective call of a step fails in turn, on all ranks."""
    _, complete, _, count, _ = third_step(name, layout, world, settings, 0)
    out = []
    for failing in range(1, count + 1):
        before, after, error, _, seconds = third_step(name, layout, world, settings, failing)
        faults = [k for k in before if not same(before[k], after[k]) and not same(complete[k], after[k])]
        out.append(Outcome(error, count, seconds, faults))
    return out


def on_one_rank(rank: int, world: int, name: str, layout: str, settings: dict[str, Any], failing: int) -> Outcome:
    """One collective call fails on the first rank; the others wait no longer than their group's limit."""
    _, complete, _, count, _ = third_step(name, layout, world, settings, 0)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5))
    before, after, error, _, seconds = third_step(name, layout, world, settings, failing if rank == 0 else 0)
    faults = [k for k in before if not same(before[k], after[k]) and not same(complete[k], after[k])]
    return Outcome(error, count, seconds, faults)
