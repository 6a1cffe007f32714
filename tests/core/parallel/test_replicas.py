"""Replicas vote, average and leave their gradients unreduced; one process has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.core.parallel.replicas import leave_gradients, replicas_of
from tests.helpers.fake_mesh import fake_mesh
from tests.helpers.pool import Pool


def test_one_process_has_no_replicas() -> None:
    assert replicas_of(None) is None
    with fake_mesh(0, 1):
        assert replicas_of(None) is None
    with fake_mesh(2, 4) as mesh:
        replicas = replicas_of(mesh.get_group())
        assert replicas is not None and (replicas.ranks, replicas.rank, replicas.size) == ((0, 1, 2, 3), 2, 4)


def test_modules_that_cannot_leave_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the model in DistributedDataParallel, got Linear"):
        leave_gradients(nn.Linear(2, 2))
    with fake_mesh(0, 128), pytest.raises(ValueError, match="at most 127 ranks, got 128"):
        leave_gradients(DistributedDataParallel(nn.Linear(2, 2)))
    with fake_mesh(0, 127):
        assert leave_gradients(DistributedDataParallel(nn.Linear(2, 2))).size == 127


def voted(rank: int, world: int) -> dict[str, Any]:
    """Mean and vote of this rank's numbers."""
    replicas = replicas_of(None)
    assert replicas is not None
    x = torch.tensor([[1.0, -2.0, 0.0], [3.0, -4.0, 5.0]]) * (1 if rank == 0 else -0.5)
    x[:, 1] = -1.0
    kept = x.clone()
    turned = x.T  # not contiguous, so it is not written
    single, double = torch.tensor([1.0 + rank]), torch.tensor([[2.0 * rank], [4.0]], dtype=torch.float64)
    vote, mean = replicas.vote(x), replicas.mean(turned)
    unchanged = torch.equal(x, kept)
    replicas.average_([single, double])
    return {
        "vote": vote.tolist(),
        "mean": mean.T.tolist(),
        "dtype": vote.dtype,
        "unchanged": unchanged,
        "averages": (single.tolist(), double.tolist(), double.dtype),
    }


def unreduced(rank: int, world: int) -> tuple[list[float], list[float]]:
    """The gradient of this rank's batch, with DDP as it is, and after `leave_gradients`, twice."""
    out = []
    for leave in (False, True):
        module = DistributedDataParallel(nn.Linear(2, 1, bias=False))
        for _ in range(2 if leave else 0):
            assert leave_gradients(module).ranks == (0, 1)
        module(torch.tensor([[1.0, rank]])).sum().backward()
        out.append(module.module.weight.grad.flatten().tolist())
    return out[0], out[1]


@pytest.mark.dist
def test_votes_and_means_are_equal_on_every_rank(pool: Pool) -> None:
    first, second = pool.run("tests.core.parallel.test_replicas:voted", 2)
    assert first == second
    assert first["vote"] == [[0.0, -1.0, 0.0], [0.0, -1.0, 0.0]], "ranks that differ abstain"
    assert first["dtype"] == torch.float32 and first["unchanged"]
    assert first["mean"] == [[0.25, -1.0, 0.0], [0.75, -1.0, 1.25]]
    assert first["averages"] == ([1.5], [[1.0], [4.0]], torch.float64)


@pytest.mark.dist
def test_gradients_are_those_of_the_ranks_own_batch(pool: Pool) -> None:
    found = pool.run("tests.core.parallel.test_replicas:unreduced", 2)
    assert [reduced for reduced, _ in found] == [[1.0, 0.5]] * 2
    assert [own for _, own in found] == [[1.0, 0.0], [1.0, 1.0]]
