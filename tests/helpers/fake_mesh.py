"""Device meshes of ranks that need not exist: shapes, placements and indices without communication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_optim.core.parallel import sharding


@contextmanager
def fake_mesh(rank: int, *sizes: int) -> Iterator[DeviceMesh]:
    """A mesh of these sizes, as one of its ranks sees it; collective calls do nothing."""
    world = int(torch.tensor(sizes).prod())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", sizes)
    finally:
        dist.destroy_process_group()
        sharding.team_of.cache_clear()  # a process has one rank, except here


def cut(whole: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """The tensor as the rank of the mesh has it, cut by torch."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)
