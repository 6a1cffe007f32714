"""Bounds of shards are those of torch's own cuts, and loaded tensors come into the placement of their parameter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.sharding import Sharding
from tests.helpers.fake_mesh import cut, fake_mesh

SEVERAL: list[tuple[Placement, ...]] = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(2), Replicate()),
    (Replicate(), Shard(1)),
]


@pytest.mark.parametrize("placements", SEVERAL, ids=str)
def test_every_rank_of_a_mesh_has_the_elements_that_torch_gives_it(placements: tuple[Placement, ...]) -> None:
    whole = torch.arange(7 * 5 * 3).view(7, 5, 3)
    held, copies = torch.zeros_like(whole), 0
    for rank in range(6):
        with fake_mesh(rank, 2, 3) as mesh:
            p = cut(whole, mesh, *placements)
            found = sharding.sharding_of(p)
            assert found is not None and found.ranks[found.rank] == rank
            assert sharding.num_shards(p) == found.size == len(found.ranks)
            assert torch.equal(sharding.within(whole, sharding.local_bounds(p)), sharding.local(p))
            held, copies = held + torch.isin(whole, sharding.local(p)), 6 // found.size
    assert (held == copies).all(), "each element once per replica"


def test_a_dimension_that_tensor_parallelism_has_cut_before() -> None:
    """FSDP2 cuts the parts of the inner mesh dimension, and names that a strided placement."""
    whole = torch.arange(11)
    with fake_mesh(0, 2, 3) as mesh:
        cuts = Sharding(mesh, (_StridedShard(0, split_factor=3), Shard(0)))
        assert not cuts.is_plain and cuts.is_by_rows
        for rank, (outer, inner) in enumerate(itertools.product(range(2), range(3))):
            expected = whole.chunk(3)[inner].chunk(2)[outer]
            assert torch.equal(sharding.within(whole, cuts.shard_slices(whole.shape, rank)), expected)


def test_a_whole_tensor_is_placed_like_its_parameter() -> None:
    whole, value = torch.zeros(5, 4), torch.randn(5, 4)
    with fake_mesh(1, 2) as mesh:
        p = cut(whole, mesh, Shard(0))
        placed = sharding.place_like(value, p)
        assert sharding.placement_of(placed) == sharding.placement_of(p) and placed.shape == (5, 4)
        assert torch.equal(sharding.local(placed), value[3:])
        sharding.local(placed).zero_()
        assert value[3:].all(), "it has memory of its own"
        everywhere = sharding.place_like(value, cut(whole, mesh, Replicate()))
        assert sharding.local(everywhere) is not everywhere and torch.equal(sharding.local(everywhere), value)
    assert sharding.place_like(value, whole) is value and sharding.local_bounds(whole) == ((0, 5), (0, 4))


def test_sums_that_are_still_to_be_added_are_refused() -> None:
    with fake_mesh(0, 2) as mesh:
        partial = sharding.to_dtensor(mesh, [Partial()], (3, 2), torch.ones(3, 2))
        with pytest.raises(ValueError, match="head: placements .*neither Shard nor Replicate"):
            sharding.sharding_of(partial, "head")
        assert sharding.sharding_of(cut(torch.ones(3, 2), mesh, Replicate())) is None
