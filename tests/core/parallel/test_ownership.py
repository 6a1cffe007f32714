"""Owners balance the work of a team, are the same on every rank, and stay."""

from __future__ import annotations

import random

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from lightning_optim.core.parallel.ownership import Owners, assign_owners
from lightning_optim.core.parallel.sharding import sharding_of
from tests.helpers.fake_mesh import cut, fake_mesh


def test_no_rank_has_more_than_its_share_and_one_matrix() -> None:
    drawn = random.Random(0)
    for ranks in (1, 2, 5):
        costs = [drawn.uniform(1, 9) for _ in range(17)]
        loads = [0.0] * ranks
        owners = assign_owners(costs, loads)
        assert loads == pytest.approx([
            sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)
        ])
        assert max(loads) - min(loads) <= max(costs)
        assert owners == assign_owners(list(costs), [0.0] * ranks), "equal inputs give equal owners"


def test_the_costliest_come_first_and_ties_go_by_index() -> None:
    assert assign_owners([1.0, 5.0, 1.0, 3.0], [0.0, 0.0]) == [1, 0, 1, 1]
    assert assign_owners([1.0, 1.0, 1.0, 1.0], [0.0, 0.0]) == [0, 1, 0, 1]
    loads = [10.0, 0.0]
    assert assign_owners([3.0, 4.0], loads) == [1, 1] and loads == [10.0, 7.0], "what ranks already have counts"
    assert assign_owners([], loads) == [] and loads == [10.0, 7.0]


def test_owners_stay_and_later_parameters_go_where_there_is_room() -> None:
    with fake_mesh(1, 2) as mesh:
        ps = [cut(torch.zeros(4, 3), mesh, Shard(0)) for _ in range(4)]
        team = sharding_of(ps[0])
        assert team is not None
        owners = Owners()
        assert not owners.owns(ps[0], team) and ps[0] not in owners
        owners.assign([(ps[0], team, 5.0), (ps[1], team, 2.0)], ps)
        assert [owners[p] for p in ps[:2]] == [0, 1]
        assert owners.owns(ps[1], team) and not owners.owns(ps[0], team), "this is rank 1"
        owners.assign([(p, team, 2.0) for p in ps], ps)
        assert [owners[p] for p in ps] == [0, 1, 1, 1], "the loads were 5 and 2, then 5 and 4"
        owners.assign([(ps[0], team, 1.0)], [])
        assert all(p in owners for p in ps), "nothing new, so nothing is dropped"
        new = cut(torch.zeros(4, 3), mesh, Shard(0))
        owners.assign([(new, team, 1.0)], [new, ps[2]])
        assert [p in owners for p in (*ps, new)] == [False, False, True, False, True]


def test_each_team_is_balanced_by_itself() -> None:
    with fake_mesh(0, 2, 2) as mesh:
        cuts = [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0))]
        ps = [cut(torch.zeros(4, 4), mesh, *x) for x in cuts]
        teams = [team for p in ps if (team := sharding_of(p)) is not None]
        assert [team.ranks for team in teams] == [(0, 1, 2, 3), (0, 1, 2, 3), (0, 2), (0, 1)]
        owners = Owners()
        owners.assign([(p, team, 1.0) for p, team in zip(ps, teams, strict=True)], ps)
        assert [owners[p] for p in ps] == [0, 1, 0, 0], "the same ranks are one team, however they are cut"
