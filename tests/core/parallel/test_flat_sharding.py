"""Every rank has a run of elements, whatever the shape; rows that runs share are put together by sums."""

from __future__ import annotations

import pytest
import torch

from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.element_positions import (
    bounds_of_rows,
    first_element,
    part_of_rows,
    start_of,
    whole_rows,
)
from lightning_optim.core.parallel.flat_sharding import FlatSharding
from lightning_optim.core.parallel.fragment import Fragment
from tests.helpers.fake_mesh import fake_mesh

RUNS = [(0, 0), (0, 5), (5, 6), (6, 15)]


@pytest.mark.parametrize("shape", [(3, 5), (15,), (5, 3, 1), (1, 15)])
def test_runs_are_shards_and_whole_rows(shape: tuple[int, ...]) -> None:
    whole, total = torch.arange(15.0).view(shape), torch.zeros(shape)
    for rank, (start, stop) in enumerate(RUNS):
        with fake_mesh(rank, len(RUNS)) as mesh:
            cut = FlatSharding(RUNS, mesh.get_group())
            p = sharding.place(whole, cut)
            assert isinstance(p, Fragment) and sharding.sharding_of(p) is cut is sharding.placement_of(p)
            assert sharding.local(p).tolist() == list(range(start, stop)) and sharding.place(p, cut) is p
            assert first_element(p) == start_of(p) == start and sharding.num_shards(p) == 4
            assert cut.ranks == (0, 1, 2, 3) and cut.rank == rank and cut.by_rows is cut
            rows = whole_rows(p, sharding.local(p))
            assert rows.shape[1:] == shape[1:] and (stop > start or not rows.numel())
            total[tuple(slice(*x) for x in bounds_of_rows(p))] += rows
            assert torch.equal(part_of_rows(p, rows), sharding.local(p))
            ones = torch.ones([1] * len(shape))
            assert part_of_rows(p, ones).shape == (stop - start,)
    assert torch.equal(total, whole)


def test_equal_runs_are_equal_placements() -> None:
    with fake_mesh(0, 2) as mesh:
        group = mesh.get_group()
        assert FlatSharding([(0, 1), (1, 2)], group) == FlatSharding([(0, 1), (1, 2)], group)
        assert FlatSharding([(0, 1), (1, 2)], group) != FlatSharding([(0, 2), (2, 2)], group)
