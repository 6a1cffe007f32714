"""The axes of a stack that a mesh cuts, where state is cut with it, and sums over ranks that are those of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from lightning_optim.core import matrix_views
from lightning_optim.core.matrix_views import split_blocks
from lightning_optim.core.parallel.sharding import local_bounds, sharding_of, within
from lightning_optim.core.parallel.stack_sharding import StackSharding, axes_of, stored_sharding, sums_on_shards
from lightning_optim.core.rule import zeros
from tests.helpers.fake_mesh import cut, fake_mesh
from tests.helpers.pool import Pool

ONE: list[tuple[tuple[int, ...], int, bool, tuple[str, ...] | None]] = [
    ((9,), 0, False, ("n",)),
    ((6, 4), 0, False, ("m",)),
    ((6, 4), 1, False, ("n",)),
    ((6, 4), 0, True, ("n",)),
    ((6, 4), 1, True, ("m",)),
    ((4, 6, 3), 0, False, ("b",)),
    ((4, 6, 3), 1, False, ("m",)),
    ((4, 6, 3), 2, True, ("m",)),
    ((8, 3, 2, 2), 0, False, ("m",)),
    ((8, 3, 2, 2), 1, False, None),
]


@pytest.mark.parametrize(("shape", "dim", "transposed", "expected"), ONE)
def test_axis_of_a_dimension(
    shape: tuple[int, ...], dim: int, transposed: bool, expected: tuple[str, ...] | None
) -> None:
    blocks = split_blocks(shape, None, transposed=transposed)
    with fake_mesh(0, 2) as mesh:
        p = cut(torch.zeros(shape), mesh, Shard(dim))
        found = sharding_of(p)
        assert found is not None
        assert axes_of(p, found, blocks[0].dims, transposed) == expected
        assert sums_on_shards(p, blocks, transposed) == (expected is not None)


def test_blocks_of_rows_that_straddle_shards_are_exchanged() -> None:
    """Six rows are two blocks of three: two ranks have one each, three ranks have two thirds."""
    dims = matrix_views.stack_shape((6, 4), blocks=2)
    for ranks, expected in ((2, ("b",)), (3, None)):
        with fake_mesh(0, ranks) as mesh:
            p = cut(torch.zeros(6, 4), mesh, Shard(0))
            found = sharding_of(p)
            assert found is not None and axes_of(p, found, dims, False) == expected
    with fake_mesh(1, 2) as mesh:
        stack = StackSharding(cut(torch.zeros(6, 4), mesh, Shard(0)), dims)
        assert stack.local_dims == (1, 3, 4) and not stack.stackable
        whole = torch.arange(2.0).view(2, 1, 1)
        assert torch.equal(stack.part(whole, "11"), whole[1:])


def test_state_is_cut_along_the_axes_that_it_shares() -> None:
    with fake_mesh(3, 2, 2) as mesh:
        p = cut(torch.zeros(7, 5), mesh, Shard(0), Shard(1))
        found = sharding_of(p)
        assert found is not None
        axes = axes_of(p, found, (1, 7, 5), False)
        assert axes is not None and axes == ("m", "n")
        expected: dict[str, tuple[Placement, ...]] = {
            "mn": (Shard(0), Shard(1)),
            "m1": (Shard(0), Replicate()),
            "1n": (Replicate(), Shard(1)),
        }
        for letters, placements in expected.items():
            stored = stored_sharding(found, axes, zeros(letters), 2)
            assert stored is not None and stored.placements == placements
        assert stored_sharding(found, axes, zeros("11"), 2) is None, "whole on every rank"
        assert StackSharding(p, (1, 7, 5)).local_dims == (1, 3, 2)


def sums(rank: int, world: int, dim: int) -> dict[str, Tensor]:
    """Row, column and total sums of a wrapped stack, unwrapped and put beside their place in the whole."""
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = Parameter(distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(dim)]))
    stack = StackSharding(p, (1, 7, 5))
    x = stack.to_dtensor(within(whole, local_bounds(p))[None])
    out = {"mn": 2 * x, "m1": x.sum(-1, keepdim=True), "1n": x.sum(-2, keepdim=True), "11": x.sum((1, 2), keepdim=True)}
    expected = {"mn": 2 * whole, "m1": whole.sum(1, keepdim=True), "1n": whole.sum(0, keepdim=True)}
    expected["11"] = whole.sum().view(1, 1)
    for letters, value in out.items():
        part = stack.part(expected[letters][None], letters)
        torch.testing.assert_close(stack.to_local(value, letters), part, rtol=1e-14, atol=1e-14)
    return {k: stack.to_local(value, k) for k, value in out.items()}


@pytest.mark.dist
@pytest.mark.parametrize("dim", [0, 1])
def test_sums_run_over_all_ranks(pool: Pool, dim: int) -> None:
    first, second = pool.run("tests.core.parallel.test_stack_sharding:sums", 2, dim=dim)
    cut_letter = "mn"[dim]
    for letters in first:
        if cut_letter not in letters:
            assert torch.equal(first[letters], second[letters]), letters
        else:
            size = {"m": 7, "n": 5}[cut_letter]
            assert first[letters].shape[1 + dim] + second[letters].shape[1 + dim] == size
