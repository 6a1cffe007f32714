"""Checkpoints of engines that save one file per rank with what the rank has, as DeepSpeed ZeRO does.

A rank has the whole state of the matrices that it owns, and of state that is shaped like a parameter and stepped in
place the run of elements in its flat tensors. Read back on the same ranks, every owner stays the owner, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.matrix_views import bucket
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.state.formats import scale_key
from lightning_optim.core.step.plan import step_cost
from lightning_optim.core.step.records import GroupStep, ParamStep


def _steps_by_rank(groups: Iterable[GroupStep]) -> list[ParamStep]:
    """The parameters of which every rank saves what it has."""
    of = ((s, sharding.sharding_of(s.plan.param, s.plan.name)) for group in groups for s in group.params)
    return [s for s, cut in of if cut is not None and cut.is_saved_by_rank]


def keep_own(groups: Sequence[GroupStep], state: dict[Tensor, dict[str, Tensor]], owners: Owners) -> None:
    """Leave out of state to be saved what other ranks save, and turn fragments into the runs they hold.

    Args:
        groups: with all parameters.
        state: by parameter, changed.
        owners: of the matrices.
    """
    for s in _steps_by_rank(groups):
        p, team = s.plan.param, s.plan.team
        elsewhere = set()
        if team is not None and p in owners and not owners.owns(p, team):
            elsewhere = {*s.plan.formats, *map(scale_key, s.plan.formats)}
        if p in state:
            state[p] = {k: sharding.local(v) for k, v in state[p].items() if k not in elsewhere}


def restore_runs(groups: Sequence[GroupStep], loaded_of: dict[int, Mapping[str, Any]]) -> None:
    """Turn loaded runs of elements into fragments.

    Args:
        groups: with all parameters.
        loaded_of: loaded state by the identity of its parameter, changed.
    """
    for s in _steps_by_rank(groups):
        p, loaded = s.plan.param, loaded_of.get(id(s.plan.param))
        if loaded is None:
            continue
        count = sharding.local(p).numel()
        loaded_of[id(p)] = {
            k: sharding.placed_like(v, p)
            if isinstance(v, Tensor) and v.ndim == 1 and k != "step" and v.shape != p.shape and v.numel() == count
            else v
            for k, v in loaded.items()
        }


def keep_owners(groups: Sequence[GroupStep], loaded_of: Mapping[int, Mapping[str, Any]], owners: Owners) -> set[int]:
    """Let every matrix belong to the rank that has loaded its state. A collective call.

    Args:
        groups: with all parameters.
        loaded_of: loaded state by the identity of its parameter.
        owners: of the matrices, changed.

    Returns:
        Identities of parameters whose state another rank has loaded.
    """
    steps, elsewhere = [(s, s.plan.team) for s in _steps_by_rank(groups) if s.plan.team is not None], set()
    for same_team in bucket(steps, lambda x: x[1].ranks):
        team = same_team[0][1]
        mine = [any(key in s.plan.formats for key in loaded_of.get(id(s.plan.param), ())) for s, _ in same_team]
        by_rank: list[Any] = [None] * team.size
        dist.all_gather_object(by_rank, mine, group=team.group)
        for (s, _), here, *on_ranks in zip(same_team, mine, *by_rank, strict=True):
            if sum(on_ranks) == 1:
                owners.give(s.plan.param, team, on_ranks.index(True), step_cost(s.plan.blocks))
                elsewhere |= set() if here else {id(s.plan.param)}
    return elsewhere
