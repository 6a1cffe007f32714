"""Norms, sums and maxima are equal on every rank and count each element once; one process communicates nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_optim.core.parallel import collectives
from lightning_optim.core.parallel.sharding import local
from tests.helpers.pool import Pool


def test_norms_in_one_process_are_those_of_all_elements() -> None:
    made = torch.Generator().manual_seed(0)
    wide, narrow = (torch.randn(4, 3, generator=made).to(t) for t in (torch.float64, torch.bfloat16))
    p = torch.zeros(4, 3)
    found = collectives.total_norms([[(p, wide), (p, narrow)], [(p, None)], [(p, narrow)]])
    each = [torch.cat([x.double().flatten() for x in xs]).norm().item() for xs in ([wide, narrow], [narrow])]
    assert found == pytest.approx([each[0], 0.0, each[1]], rel=1e-6)
    assert collectives.total_norms([[], []]) == [0.0, 0.0]
    huge = torch.full((2,), 2e4, dtype=torch.float16)
    assert collectives.norm(p, huge).item() == pytest.approx(2e4 * 2**0.5, rel=1e-6), "its square overflows float16"


def test_a_gradient_that_shares_memory_is_scaled_alone() -> None:
    a, b = (torch.zeros(3, requires_grad=True) for _ in range(2))
    a.grad = shared = torch.ones(3)
    b.grad = shared.view(3)
    collectives.scale_gradient(a, torch.tensor(0.5))
    assert a.grad.tolist() == [0.5] * 3 and b.grad.tolist() == [1.0] * 3
    alone = torch.zeros(3)
    collectives.scale_gradient(alone, torch.tensor(0.5))
    assert alone.grad is None


def test_one_process_is_its_own_maximum_sum_and_mean() -> None:
    x = torch.tensor([1.0, 2.0])
    collectives.sum_([x])
    collectives.average_([x])
    assert x.tolist() == [1.0, 2.0] and collectives.world_size() == 1
    assert collectives.agree_times([0.25], [x], None) == collectives.all_reduce_max([0.25], [x]) == [0.25]
    assert collectives.ranks_of([x]) == () and not collectives.is_replicated(x)


def reduced(rank: int, world: int) -> dict[str, Any]:
    """What every function gives on this rank."""
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    sharded, replicated = distribute_tensor(whole, mesh, [Shard(0)]), distribute_tensor(whole, mesh, [Replicate()])
    pairs = {k: (p, local(p)) for k, p in {"sharded": sharded, "replicated": replicated}.items()}
    summed, averaged = (torch.tensor([1.0 + rank, 5.0]) for _ in range(2))
    collectives.sum_([summed])
    collectives.average_([averaged])
    try:
        collectives.agree_times([0.1], [whole], None)
        said = ""
    except RuntimeError as error:
        said = str(error)
    return {
        "norms": collectives.total_norms([
            [pairs["sharded"]],
            [pairs["replicated"]],
            [*pairs.values(), (whole, whole)],
        ]),
        "norm": collectives.norm(*pairs["sharded"]).item(),
        "whole": whole.double().norm().item(),
        "max": collectives.all_reduce_max([rank, -rank, 3.0], [sharded]),
        "max of replicas": collectives.agree_times([0.5 * rank], [whole], dist.group.WORLD),
        "said": said,
        "sum": summed.tolist(),
        "mean": averaged.tolist(),
        "ranks": (collectives.ranks_of([whole, sharded]), collectives.is_replicated(whole)),
    }


@pytest.mark.dist
def test_two_ranks_agree(pool: Pool) -> None:
    first, second = pool.run("tests.core.parallel.test_collectives:reduced", 2)
    assert first == second
    whole = first["whole"]
    assert first["norms"] == pytest.approx([whole, whole, 3**0.5 * whole], rel=1e-6), "replicas count once"
    assert first["norm"] == pytest.approx(whole, rel=1e-6)
    assert first["max"] == [1.0, 0.0, 3.0] and first["max of replicas"] == [0.5]
    assert "set optimizer.process_group" in first["said"], "clocks differ, and nobody says who takes part"
    assert first["sum"] == [3.0, 10.0] and first["mean"] == [1.5, 5.0]
    assert first["ranks"] == ((0, 1), True)
