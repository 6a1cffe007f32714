"""Sharding of parameters by runs of elements, whatever their shapes: that of DeepSpeed ZeRO's flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.parallel.fragment import Fragment
from lightning_optim.core.parallel.sharding import Bounds, Sharding


@dataclass(frozen=True, init=False)
class FlatSharding(Sharding):
    """The run `[start, stop)` of a parameter's elements, in row-major order, that each rank of a process group has.

    `shard_slices` therefore gives bounds of one dimension for parameters of any shape.
    """

    runs: tuple[tuple[int, int], ...]
    """By rank; together they are the whole parameter."""
    process_group: Any

    def __init__(self, runs: Sequence[tuple[int, int]], process_group: Any):
        """Note who has what.

        Args:
            runs: first element and one past the last, by rank of the process group.
            process_group: the ranks.
        """
        values = {"mesh": None, "placements": (), "runs": tuple(runs), "process_group": process_group}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the team."""
        return tuple(dist.get_process_group_ranks(self.process_group))

    @property
    def rank(self) -> int:
        """Index of this process in the team."""
        return dist.get_rank(self.process_group)

    @property
    def size(self) -> int:
        """Number of ranks in the team."""
        return len(self.runs)

    @property
    def group(self) -> dist.ProcessGroup:
        """Process group of the team."""
        return cast("dist.ProcessGroup", self.process_group)

    @property
    def device(self) -> torch.device:
        """Device from which tensors can be sent; ZeRO-Offload has them on the CPU."""
        is_on_host = dist.get_backend(self.process_group) == "gloo"
        return torch.device("cpu" if is_on_host else torch.accelerator.current_accelerator() or "cpu")

    @property
    def by_rows(self) -> Sharding:
        """This sharding: checkpoints of engines have one file per rank, which holds what the rank has."""
        return self

    @property
    def is_by_rows(self) -> bool:
        """True: every shard is one contiguous range of elements."""
        return True

    @property
    def is_saved_by_rank(self) -> bool:
        """True: checkpoints of engines have one file per rank."""
        return True

    @property
    def is_plain(self) -> bool:
        """False: the shards are not those of `torch.chunk`."""
        return False

    def shard_slices(self, shape: Sequence[int], rank: int) -> Bounds:
        """The run of one rank.

        Returns:
            First element and one past the last, as bounds of one dimension.
        """
        return (self.runs[rank],)

    def shard(self, whole_shape: Sequence[int], shard: Tensor) -> Tensor:
        """Wrap this rank's run of a tensor.

        Returns:
            A fragment of shape `whole_shape`.
        """
        return Fragment(whole_shape, shard.reshape(-1), 0, self)
