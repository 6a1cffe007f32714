"""replicas."""

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
    """Ranks that have the same whole tensors and share out the work on them."""

    group: dist.ProcessGroup

    @property
    def ranks(self) -> tuple[int, ...]:
        """The team, by global rank."""
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def rank(self) -> int:
        """This process's place in the team."""
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

    def vote(self, x: Tensor) -> Tensor:
        """The sign that most replicas have; one byte per element travels.

        Args:
            x: what has the signs.

        Returns:
            1, 0 or -1 like `x`, equal on every rank.
        """
        signs = x.sign().to(torch.int8)
        dist.all_reduce(signs, group=self.group)
        return signs.sign_().to(x.dtype)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the replicas, in one reduction for each dtype.

        Args:
            tensors: of the same shapes and dtypes on every rank.
        """
        for same in bucket(tensors, lambda t: (t.dtype, t.device)):
            mean = self.mean(torch.cat([t.reshape(-1) for t in same]))
            for t, part in zip(same, mean.split([t.numel() for t in same]), strict=True):
                t.copy_(part.view(t.shape))


def leave_gradients(module: Any) -> Replicas:
    """Have a DistributedDataParallel module leave the gradients of each rank as they are.

    Args:
        module: the module.

    Returns:
        Its ranks.

    Raises:
        ValueError: another module, or more ranks than one byte can count.
    """
    if not isinstance(module, DistributedDataParallel):
        raise ValueError(f"compress needs the model in DistributedDataParallel, got {type(module).__name__}")
    found = Replicas(cast("dist.ProcessGroup", module.process_group))
    if found.size > 127:
        raise ValueError(f"compress counts votes in a byte: at most 127 ranks, got {found.size}")
    if module not in _left:
        module.register_comm_hook(None, noop_hook)
        _left.add(module)
    return found


_left: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
"""Modules that leave gradients already; they take one hook."""


def replicas_of(group: dist.ProcessGroup | None) -> Replicas | None:
    """The ranks of a process group, or all ranks.

    Returns:
        None for a process that is alone.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    found = Replicas(group or cast("dist.ProcessGroup", dist.group.WORLD))
    return found if found.size > 1 else None
