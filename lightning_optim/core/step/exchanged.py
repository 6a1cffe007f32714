"""Steps of matrices that one rank owns: gradients are sent to the owners, and directions back."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from lightning_optim.core.matrix_views import bucket
from lightning_optim.core.parallel.exchange import Team, make_exchange
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.step.apply import Transaction, apply_direction, is_written_at_once
from lightning_optim.core.step.records import Backup, GroupStep, ParamStep, state_of
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler
from lightning_optim.core.step.stacked import chunks, needs_param, update_stack

Exchange = tuple[Sequence[ParamStep], Generator[None]]
Exchanges = Sequence[Exchange]
"""Parameters and exchanges that are under way, one per team and dtype; `finish_exchanges` ends them."""


def begin_exchanges(
    groups: Sequence[GroupStep],
    owners: Owners,
    refreshes: RefreshScheduler,
    max_temp_bytes: int,
    transaction: Transaction,
) -> Exchanges:
    """Begin to send the gradients of all matrices to their owners.

    Args:
        groups: of this step.
        owners: of the matrices.
        refreshes: decides which preconditioners are due.
        max_temp_bytes: bound for a stack and the temporaries of its update.
        transaction: keeps the parameters of an exchange that fails as they were.

    Returns:
        The exchanges.
    """
    out: list[Exchange] = []
    for group in groups:
        exchanged = [(s, s.plan.team) for s in group.params if s.plan.team is not None]
        for run in bucket(exchanged, lambda x: (x[1].ranks, x[0].plan.dtype)) if exchanged else ():
            if any(s.grad is not None for s, _ in run):  # on every rank, or on none
                steps, teams = [s for s, _ in run], [team for _, team in run]
                out.append((steps, _exchange(group, steps, teams, owners, refreshes, max_temp_bytes, transaction)))
    _advance(out, transaction)
    return out


def finish_exchanges(exchanges: Exchanges, transaction: Transaction) -> None:
    """Step the matrices that this rank owns, send their directions back, and apply those that come back.

    Args:
        exchanges: that were begun.
        transaction: keeps the parameters of an exchange that fails as they were.
    """
    _advance(exchanges, transaction)
    _advance(exchanges, transaction)


def _advance(exchanges: Exchanges, transaction: Transaction) -> None:
    for steps, exchange in exchanges:
        if transaction.is_disconnected:
            exchange.close()
        transaction.run(functools.partial(next, exchange, None), steps, collective=True)


def _exchange(
    group: GroupStep,
    steps: list[ParamStep],
    teams: list[Team],
    owners: Owners,
    refreshes: RefreshScheduler,
    max_temp_bytes: int,
    transaction: Transaction,
) -> Generator[None]:
    """Bring matrices to their owners and the directions back; yields while they are on their way.

    Splits are static: a parameter without a gradient sends zeros, and its direction is not applied.
    """
    comm_dtype = torch.bfloat16 if group.group["comm_dtype"] == "bf16" else None
    exchange = make_exchange(teams, [s.plan.shape for s in steps], [owners[s.plan.param] for s in steps])
    arriving = exchange.to_owners([s.gradient() for s in steps], comm_dtype)
    beside = exchange.to_owners([s.local() for s in steps]) if needs_param(group.rule) else None
    yield
    gradients = arriving()
    params = gradients if beside is None else beside()
    dtype = steps[0].plan.compute_dtype
    directions = {i: torch.zeros_like(g, dtype=dtype) for i, g in gradients.items()}
    at = {id(steps[i]): i for i in exchange.mine}

    def store(s: ParamStep, d: Tensor) -> None:
        directions[at[id(s)]] = d

    mine = [steps[i] for i in exchange.mine if steps[i].grad is not None]
    backups = {id(s): Backup(state_of(s)) for s in mine}
    try:
        refreshes.decide(group, mine, lambda s: gradients[at[id(s)]])
        for chunk in chunks(mine, max_temp_bytes):
            here = [at[id(s)] for s in chunk]
            update_stack(group, chunk, [params[i] for i in here], [gradients[i] for i in here], sink=store)
        returning = exchange.from_owners(directions, steps[0].local().new_empty((), dtype=dtype), comm_dtype)
        yield
        arrived = returning()
    except BaseException:  # of `close`, too
        for backup in backups.values():
            backup.restore()
        raise
    for s, d in zip(steps, arrived, strict=True):
        if s.grad is not None and not group.rule.skips_update(s.t):
            weights = tuple if is_written_at_once(group, s) else functools.partial(_local, s)
            work, communicates = functools.partial(_apply, group, s, d), group.plan.has_constraint
            transaction.run(work, [s], weights, collective=communicates)
            if id(s) in transaction.failed and id(s) in backups:
                backups[id(s)].restore()


def _local(step: ParamStep) -> list[Tensor]:
    return [step.local()]


def _apply(group: GroupStep, step: ParamStep, d: Tensor) -> None:
    apply_direction(group, step, d.view_as(step.local()))
