"""Communication between the shards of matrices and the ranks that own them.

A rule that needs whole matrices steps each matrix on one rank, its owner. The team of a matrix is the group of ranks
that share it: those that hold its shards (`Sharding`), or replicas that shard the optimizer work (`Replicas`).
`Exchange` sends the shards of many tensors to their owners and the results back. `Broadcast` does the same for
replicas, to which only the results need to be sent. Both start asynchronous communication and return a function that
waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.parallel.sharding import Bounds, Sharding, within

Team = Sharding | Replicas


class Exchange:
    """One uneven all-to-all that sends the shards of many tensors to their owners, and its inverse."""

    def __init__(self, shardings: Sequence[Sharding], shapes: Sequence[Sequence[int]], owners: Sequence[int]):
        """Assign tensors to flat buffers.

        Args:
            shardings: sharding of each tensor, all over one team.
            shapes: shapes of the whole tensors.
            owners: index in the team of the rank that owns each tensor.
        """
        self.shardings, self.shapes, self.owners = shardings, [tuple(s) for s in shapes], owners
        self.team, self.rank = shardings[0], shardings[0].rank
        self.mine = [i for i, owner in enumerate(owners) if owner == self.rank]

    def _bounds(self, i: int, rank: int) -> Bounds:
        return self.shardings[i].shard_slices(self.shapes[i], rank)

    def _start(
        self, outgoing: list[list[Tensor]], sizes: list[int], like: Tensor, wire: torch.dtype | None
    ) -> Callable[[], Sequence[Tensor]]:
        send_sizes = [sum(t.numel() for t in row) for row in outgoing]
        flat = [t.reshape(-1) for row in outgoing for t in row]
        send_buffer = (torch.cat(flat) if flat else like.new_empty(0)).to(self.team.device, wire or like.dtype)
        buffer = send_buffer.new_empty(sum(sizes))
        handle = dist.all_to_all_single(buffer, send_buffer, sizes, send_sizes, group=self.team.group, async_op=True)

        def wait() -> Sequence[Tensor]:
            cast("dist.Work", handle).wait()
            return buffer.to(like.device, like.dtype).split(sizes)

        return wait

    def to_owners(self, shards: Sequence[Tensor], wire: torch.dtype | None = None) -> Callable[[], dict[int, Tensor]]:
        """Start to send every local shard to the owner of its tensor.

        Args:
            shards: this rank's shard of each tensor, all of one dtype.
            wire: dtype of the communication; that of the tensors by default.

        Returns:
            A function that waits and returns the whole tensors owned by this rank, by index.
        """
        ranks = range(self.team.size)
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        for shard, owner in zip(shards, self.owners, strict=True):
            outgoing[owner].append(shard)
        bounds = [[self._bounds(i, r) for i in self.mine] for r in ranks]
        wait = self._start(outgoing, [sum(map(_volume, row)) for row in bounds], shards[0], wire)

        def finish() -> dict[int, Tensor]:
            wholes = [shards[0].new_empty(self.shapes[i]) for i in self.mine]
            for row, flat in zip(bounds, wait(), strict=True):
                for whole, at, values in zip(wholes, row, flat.split([_volume(at) for at in row]), strict=True):
                    target = within(whole, at)
                    target.copy_(values.view(target.shape))
            return dict(zip(self.mine, wholes, strict=True))

        return finish

    def from_owners(
        self, wholes: dict[int, Tensor], like: Tensor, wire: torch.dtype | None = None
    ) -> Callable[[], list[Tensor]]:
        """Start to send every rank its shards of the tensors owned by this rank.

        Args:
            wholes: the whole tensors owned by this rank, by index.
            like: a tensor with the dtype and device to use on a rank that owns nothing.
            wire: dtype of the communication; that of the tensors by default.

        Returns:
            A function that waits and returns this rank's shard of each tensor.
        """
        outgoing = [[within(wholes[i], self._bounds(i, r)) for i in self.mine] for r in range(self.team.size)]
        theirs: list[list[int]] = [[] for _ in range(self.team.size)]
        for i, owner in enumerate(self.owners):
            theirs[owner].append(i)
        bounds = [self._bounds(i, self.rank) for i in range(len(self.shapes))]
        wait = self._start(outgoing, [sum(_volume(bounds[i]) for i in row) for row in theirs], like, wire)

        def finish() -> list[Tensor]:
            out: dict[int, Tensor] = {}
            for row, flat in zip(theirs, wait(), strict=True):
                shards = flat.split([_volume(bounds[i]) for i in row])
                out.update({i: t.view([b - a for a, b in bounds[i]]) for i, t in zip(row, shards, strict=True)})
            return [out[i] for i in range(len(self.shapes))]

        return finish


class Broadcast:
    """The counterpart of `Exchange` for replicas: every owner broadcasts its results, and nothing is sent to owners."""

    def __init__(self, team: Replicas, shapes: Sequence[Sequence[int]], owners: Sequence[int]):
        """Assign tensors to flat buffers.

        Args:
            team: the replicas.
            shapes: shapes of the tensors.
            owners: index in the team of the rank that owns each tensor.
        """
        self.team, self.shapes, self.owners = team, [tuple(s) for s in shapes], owners
        self.mine = [i for i, owner in enumerate(owners) if owner == team.rank]

    def to_owners(self, shards: Sequence[Tensor], wire: torch.dtype | None = None) -> Callable[[], dict[int, Tensor]]:
        """Select the tensors owned by this rank; nothing is communicated.

        Args:
            shards: all tensors, each whole.
            wire: unused.

        Returns:
            A function that returns the tensors owned by this rank, by index.
        """
        del wire
        return lambda: {i: shards[i] for i in self.mine}

    def from_owners(
        self, wholes: dict[int, Tensor], like: Tensor, wire: torch.dtype | None = None
    ) -> Callable[[], list[Tensor]]:
        """Start to broadcast the tensors owned by this rank.

        Args:
            wholes: the tensors owned by this rank, by index.
            like: a tensor with the dtype and device to use.
            wire: dtype of the communication; that of the tensors by default.

        Returns:
            A function that waits and returns every tensor.
        """
        handles, flats = [], []
        for index, source in enumerate(self.team.ranks):
            theirs = [i for i, owner in enumerate(self.owners) if owner == index]
            if index == self.team.rank:
                flat = torch.cat([like.new_empty(0), *(wholes[i].reshape(-1) for i in theirs)]).to(wire or like.dtype)
            else:
                flat = like.new_empty(sum(math.prod(self.shapes[i]) for i in theirs), dtype=wire)
            if flat.numel():
                handles.append(dist.broadcast(flat, source, group=self.team.group, async_op=True))
            flats.append((theirs, flat))

        def finish() -> list[Tensor]:
            for handle in handles:
                handle.wait()
            out: dict[int, Tensor] = {}
            for theirs, flat in flats:
                tensors = flat.to(like.dtype).split([math.prod(self.shapes[i]) for i in theirs])
                out.update({i: t.view(self.shapes[i]) for i, t in zip(theirs, tensors, strict=True)})
            return [out[i] for i in range(len(self.shapes))]

        return finish


def make_exchange(
    teams: Sequence[Team], shapes: Sequence[Sequence[int]], owners: Sequence[int]
) -> Exchange | Broadcast:
    """Make the communication that sends tensors to their owners and results back.

    Args:
        teams: team of each tensor, all with the same ranks.
        shapes: shapes of the whole tensors.
        owners: index in the team of the rank that owns each tensor.

    Returns:
        An exchange of shards, or broadcasts for replicas.
    """
    if isinstance(teams[0], Replicas):
        return Broadcast(teams[0], shapes, owners)
    return Exchange([team for team in teams if isinstance(team, Sharding)], shapes, owners)


def _volume(bounds: Bounds) -> int:
    return math.prod(end - first for first, end in bounds)
