"""Every rank saves what it has, and owners stay owners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim import Lion, Muon
from lightning_optim.core.parallel.flat_sharding import FlatSharding
from lightning_optim.core.parallel.fragment import Fragment
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.state.rank_checkpoint import keep_own, restore_runs
from tests.helpers.fake_mesh import fake_mesh


def test_a_rank_saves_runs_and_the_matrices_that_it_owns() -> None:
    with fake_mesh(1, 2) as mesh:
        cut = FlatSharding([(0, 7), (7, 12)], mesh.get_group())
        for kind, owner, saved in (
            (Muon, 1, {"step", "momentum_buffer"}),
            (Muon, 0, {"step"}),
            (Lion, 0, {"step", "exp_avg"}),
        ):
            flat = torch.arange(5.0)
            optimizer = kind([torch.nn.Parameter(torch.ones(4, 3))])
            p = Fragment((4, 3), flat, 0, cut)
            optimizer.param_groups[0]["params"] = [p.requires_grad_(True)]
            groups, owners = optimizer.group_steps(frozen=True), Owners()
            owners.give(p, cut, owner, 1.0)
            whole = kind is Muon and owner == 1
            value = torch.ones(4, 3) if whole else torch.ones(0, 4, 3) if kind is Muon else p.like(flat)
            key = "momentum_buffer" if kind is Muon else "exp_avg"
            state: dict[Tensor, dict[str, Tensor]] = {p: {"step": torch.zeros(()), key: value}}
            keep_own(groups, state, owners)
            assert set(state[p]) == saved
            if kind is Lion:
                assert torch.equal(state[p][key], flat) and not isinstance(state[p][key], Fragment)
                loaded: dict[int, Mapping[str, Any]] = {id(p): state[p]}
                restore_runs(groups, loaded)
                assert isinstance(loaded[id(p)][key], Fragment) and loaded[id(p)][key].shape == (4, 3)
