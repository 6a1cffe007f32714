"""Ranks that hold the same whole parameters: to shard optimizer work over (ZeRO-1), or to compress communication."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.core.matrix_views import bucket


@dataclass(frozen=True)
class Replicas:
    """Ranks that have the same whole tensors, and among which optimizer work and state are sharded."""

    group: dist.ProcessGroup

    @property
    def is_saved_by_rank(self) -> bool:
        """False: one replica saves what all have."""
        return False

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the team."""
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def rank(self) -> int:
        """Index of this process in the team."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks in the team."""
        return dist.get_world_size(self.group)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the replicas.

        Args:
            x: overwritten, if it is contiguous.

        Returns:
            The mean, equal on every rank.
        """
        out = x.contiguous()
        dist.all_reduce(out, group=self.group)
        return out.div_(self.size)

    def vote(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Majority vote on signs, with one byte of communication per element.

        Args:
            x: the tensor whose signs count.
            out: memory that a process alone would use.

        Returns:
            1, 0 or -1 in the dtype of `x`, equal on every rank.
        """
        del out
        signs = x.sign().to(torch.int8)
        dist.all_reduce(signs, group=self.group)
        return signs.sign_().to(x.dtype)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the replicas, by one reduction per dtype and device.

        Args:
            tensors: of the same shapes and dtypes on every rank.
        """
        for same in bucket(tensors, lambda t: (t.dtype, t.device)):
            mean = self.mean(torch.cat([t.reshape(-1) for t in same]))
            for t, values in zip(same, mean.split([t.numel() for t in same]), strict=True):
                t.copy_(values.view(t.shape))


def leave_gradients(module: Any) -> Replicas:
    """Make a DistributedDataParallel module leave the gradients of each rank unreduced.

    Args:
        module: the module.

    Returns:
        Its ranks.

    Raises:
        ValueError: the module is no DistributedDataParallel, or has more ranks than one byte can count.
    """
    if not isinstance(module, DistributedDataParallel):
        raise ValueError(f"compress needs the model in DistributedDataParallel, got {type(module).__name__}")
    replicas = Replicas(cast("dist.ProcessGroup", module.process_group))
    if replicas.size > 127:
        raise ValueError(f"compress counts votes in a byte: at most 127 ranks, got {replicas.size}")
    if module not in _unreduced:
        module.register_comm_hook(None, noop_hook)
        _unreduced.add(module)
    return replicas


_unreduced: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
"""Modules that leave gradients unreduced already; DDP accepts one hook per module."""


def replicas_of(group: dist.ProcessGroup | None) -> Replicas | None:
    """The ranks of a process group, or all ranks.

    Returns:
        None for a single process.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    replicas = Replicas(group or cast("dist.ProcessGroup", dist.group.WORLD))
    return replicas if replicas.size > 1 else None
