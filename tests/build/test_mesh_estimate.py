"""What a mesh holds, sends and works on, by counting bytes and elements by hand."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import AdamW, Muon, RuleOptimizer
from lightning_optim.build.mesh_estimate import MeshEstimate, estimate_mesh
from lightning_optim.core.parallel.hypothetical_mesh import rows_over
from tests.helpers.rules import gradient, make

SHAPES = ((7, 4), (5, 3), (9,))


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters without memory."""
    return [Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


def rows(shape: tuple[int, ...], ranks: int, rank: int) -> int:
    first, end = rows_over(ranks).shard_slices(shape[:1], rank)[0]
    return end - first


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "soap"])
@pytest.mark.parametrize("settings", [{}, {"state_storage": "int8", "storage_min": 1, "storage_block": 16}], ids=str)
def test_one_process_holds_what_an_optimizer_really_allocates(name: str, settings: dict[str, Any]) -> None:
    ps = [Parameter(torch.ones(12, 8)), Parameter(torch.ones(8, 20))]
    optimizer: RuleOptimizer = make(name, ps, **settings)
    said = estimate_mesh(optimizer, "ddp", 1)
    for i, p in enumerate(ps):
        p.grad = gradient(p, str(i), 1)
    optimizer.step()
    tensors: list[Tensor] = [t for p in ps for t in optimizer.state[p].values()]
    assert said.state == [sum(t.nbytes for t in tensors)]
    assert (said.sent, said.summed, said.work, said.imbalance, said.bound) == ([0], 0, [], 1.0, 1.0)


def test_elementwise_state_is_cut_by_rows_and_nothing_is_sent() -> None:
    said = estimate_mesh(AdamW(params(*SHAPES)), "fsdp2", 4)
    for rank in range(4):
        elements = sum(rows(shape, 4, rank) * math.prod(shape[1:]) for shape in SHAPES)
        assert said.state[rank] == 2 * 4 * elements + 8 * len(SHAPES), "two moments, and step counts"
    assert sum(said.state) == 2 * 4 * (28 + 15 + 9) + 4 * 8 * len(SHAPES)
    assert said.sent == [0] * 4 and said.summed == 0 and said.work == []
    replicated = estimate_mesh(AdamW(params(*SHAPES)), "ddp", 4)
    assert replicated.state == [2 * 4 * (28 + 15 + 9) + 8 * len(SHAPES)] * 4


@pytest.mark.parametrize("comm_dtype", ["exact", "bf16"])
def test_whole_matrices_travel_to_their_owner_and_back(comm_dtype: Literal["exact", "bf16"]) -> None:
    """One matrix, so one owner, which is rank 0: the others send their rows, and get as many back."""
    said = estimate_mesh(Muon(params((7, 4), dtype=torch.bfloat16), comm_dtype=comm_dtype), "fsdp2", 3)
    elements = [4 * rows((7, 4), 3, rank) for rank in range(3)]
    back = 2 if comm_dtype == "bf16" else 4
    assert said.sent == [back * (elements[1] + elements[2]), 2 * elements[1], 2 * elements[2]]
    assert [size > 8 for size in said.state] == [True, False, False]
    assert said.work[0] == said.largest > 0 and said.work[1:] == [0.0, 0.0]
    assert said.imbalance == said.bound == 3.0


def test_replicas_that_share_the_work_broadcast_directions() -> None:
    optimizer = Muon(params((8, 4), (8, 4), (8, 4)))
    alone, shared = (estimate_mesh(optimizer, "ddp", 2, shard_work=x) for x in (False, True))
    assert alone.sent == [0, 0] and alone.work == [] and alone.state == [3 * (8 + 4 * 32)] * 2
    assert shared.sent == [2 * 4 * 32, 4 * 32] and shared.state == [24 + 2 * 4 * 32, 24 + 4 * 32]
    assert shared.imbalance == pytest.approx(4 / 3) and shared.bound == 1.0


def test_a_node_is_a_team_and_ranks_make_whole_nodes() -> None:
    optimizer = AdamW(params(*SHAPES))
    nodes, alone = estimate_mesh(optimizer, "hsdp", 8, node_size=4), estimate_mesh(optimizer, "fsdp2", 4)
    assert nodes == MeshEstimate("hsdp", 8, alone.state, alone.sent, alone.summed)
    for world, size in ((6, 4), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"^hsdp: {world} ranks are not a multiple of a node's {size}"):
            estimate_mesh(optimizer, "hsdp", world, node_size=size)
