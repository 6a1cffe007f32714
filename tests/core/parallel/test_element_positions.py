"""Every element has the index on its rank that it has in the whole parameter."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Placement, Replicate, Shard

from lightning_optim.core.parallel.element_positions import divided_blocks, element_index, first_element, start_of
from lightning_optim.core.parallel.sharding import local
from tests.helpers.fake_mesh import cut, fake_mesh


@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(2))], ids=str)
def test_indices_are_those_of_the_whole_tensor(placements: tuple[Placement, ...]) -> None:
    whole = torch.arange(7 * 5 * 3, dtype=torch.int32).view(7, 5, 3)
    for rank in range(6):
        with fake_mesh(rank, 2, 3) as mesh:
            p = cut(whole, mesh, *placements)
            found = element_index(p)
            assert found.dtype == torch.int32 and torch.equal(found, local(p))


def test_a_shard_of_rows_is_one_range() -> None:
    whole = torch.arange(7 * 5).view(7, 5)
    for rank in range(3):
        with fake_mesh(rank, 3) as mesh:
            p = cut(whole, mesh, Shard(0))
            assert first_element(p) == start_of(p) == local(p)[0, 0].item()
            assert first_element(cut(whole, mesh, Shard(1))) is None


def test_8_bit_state_is_sharded_by_rows_only() -> None:
    with fake_mesh(0, 3) as mesh:
        p = cut(torch.zeros(7, 5), mesh, Shard(1))
        with pytest.raises(ValueError, match=r"head: 8-bit state is sharded by rows.*choose state_storage='bf16'"):
            start_of(p, "head")


def test_plain_tensors_begin_at_zero() -> None:
    p = torch.zeros(3, 4)
    assert first_element(p) == start_of(p) == 0 and first_element(p.T) is None
    assert torch.equal(element_index(p), torch.arange(12, dtype=torch.int32).view(3, 4))
    scalar = torch.tensor(1.0)
    assert first_element(scalar) == 0 and element_index(scalar).item() == 0 and element_index(scalar).shape == ()


def test_a_cut_in_the_middle_of_a_block_divides_it() -> None:
    with fake_mesh(1, 3) as mesh:
        p = cut(torch.zeros(7, 5), mesh, Shard(0))  # rows 0-2, 3-5 and 6: cuts at 15 and 30
        assert divided_blocks(p, 16) == (0, 1) and divided_blocks(p, 64) == (0,)
        assert divided_blocks(p, 5) == divided_blocks(p, 15) == ()
        assert divided_blocks(cut(torch.zeros(1, 5), mesh, Shard(0)), 16) == ()  # the other ranks have nothing
    assert divided_blocks(torch.zeros(7, 5), 16) == ()
