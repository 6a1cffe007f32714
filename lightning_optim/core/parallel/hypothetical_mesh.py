"""Shardings over a mesh that need not exist, to say beforehand what falls on each of its ranks."""

from __future__ import annotations

from typing import cast

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from lightning_optim.core.parallel.sharding import Sharding


class _HypotheticalMesh:
    """Size of a one-dimensional mesh that need not exist."""

    ndim = 1

    def __init__(self, ranks: int):
        self.ranks = ranks

    def size(self, d: int) -> int:
        return self.ranks


def rows_over(ranks: int) -> Sharding:
    """Sharding of rows over a number of ranks as by `fully_shard`, to compute the bounds of shards without a mesh.

    Returns:
        A sharding without process groups, which cannot communicate.
    """
    return Sharding(cast("DeviceMesh", _HypotheticalMesh(ranks)), (Shard(0),))
