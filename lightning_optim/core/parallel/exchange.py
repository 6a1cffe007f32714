"""Who works on which matrix, and how matrices and directions travel.

A matrix that is cut (`layout.Sharding`), or whole on several ranks that share out the work (`Replicas`), is worked on
by one owner in a team of ranks. `Exchange` brings shards of many tensors to their owners and the results back,
`Broadcast` does the same for replicas, which have everything but the results. Both begin to communicate; what they
return waits.
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
    """One uneven all-to-all that brings the shards of many tensors to their owners, and its mirror."""

    def __init__(self, cuts: Sequence[Sharding], shapes: Sequence[Sequence[int]], owners: Sequence[int]):
        """Lay out the flat buffers.

        Args:
            cuts: how each tensor is cut, all over one team.
            shapes: of the whole tensors.
            owners: the place in the team of the rank that works on each tensor.
        """
        self.cuts, self.shapes, self.owners = cuts, [tuple(s) for s in shapes], owners
        self.team, self.rank = cuts[0], cuts[0].rank
        self.mine = [i for i, owner in enumerate(owners) if owner == self.rank]

    def _box(self, i: int, rank: int) -> Bounds:
        return self.cuts[i].shard_slices(self.shapes[i], rank)

    def _start(
        self, pieces: list[list[Tensor]], sizes: list[int], like: Tensor, wire: torch.dtype | None
    ) -> Callable[[], Sequence[Tensor]]:
        send = [sum(t.numel() for t in row) for row in pieces]
        flat = [t.reshape(-1) for row in pieces for t in row]
        outgoing = (torch.cat(flat) if flat else like.new_empty(0)).to(self.team.device, wire or like.dtype)
        incoming = outgoing.new_empty(sum(sizes))
        started = dist.all_to_all_single(incoming, outgoing, sizes, send, group=self.team.group, async_op=True)

        def wait() -> Sequence[Tensor]:
            cast("dist.Work", started).wait()
            return incoming.to(like.device, like.dtype).split(sizes)

        return wait

    def to_owners(self, parts: Sequence[Tensor], wire: torch.dtype | None = None) -> Callable[[], dict[int, Tensor]]:
        """Begin to send every local part to the owner of its tensor.

        Args:
            parts: this rank's part of each tensor, of one dtype.
            wire: the dtype in which they travel, if another.

        Returns:
            Waits, and gives index to whole tensor for the tensors owned here.
        """
        ranks = range(self.team.size)
        pieces: list[list[Tensor]] = [[] for _ in ranks]
        for part, owner in zip(parts, self.owners, strict=True):
            pieces[owner].append(part)
        boxes = [[self._box(i, r) for i in self.mine] for r in ranks]
        wait = self._start(pieces, [sum(map(_volume, row)) for row in boxes], parts[0], wire)

        def finish() -> dict[int, Tensor]:
            wholes = [parts[0].new_empty(self.shapes[i]) for i in self.mine]
            for row, flat in zip(boxes, wait(), strict=True):
                for whole, box, piece in zip(wholes, row, flat.split([_volume(box) for box in row]), strict=True):
                    here = within(whole, box)
                    here.copy_(piece.view(here.shape))
            return dict(zip(self.mine, wholes, strict=True))

        return finish

    def from_owners(
        self, wholes: dict[int, Tensor], like: Tensor, wire: torch.dtype | None = None
    ) -> Callable[[], list[Tensor]]:
        """Begin to send every rank its parts of the tensors owned here.

        Args:
            wholes: index to whole tensor, for the tensors owned here.
            like: gives dtype and device to a rank that owns nothing.
            wire: the dtype in which they travel, if another.

        Returns:
            Waits, and gives this rank's part of each tensor.
        """
        pieces = [[within(wholes[i], self._box(i, r)) for i in self.mine] for r in range(self.team.size)]
        theirs: list[list[int]] = [[] for _ in range(self.team.size)]
        for i, owner in enumerate(self.owners):
            theirs[owner].append(i)
        boxes = [self._box(i, self.rank) for i in range(len(self.shapes))]
        wait = self._start(pieces, [sum(_volume(boxes[i]) for i in row) for row in theirs], like, wire)

        def finish() -> list[Tensor]:
            out: dict[int, Tensor] = {}
            for row, flat in zip(theirs, wait(), strict=True):
                parts = flat.split([_volume(boxes[i]) for i in row])
                out.update({i: t.view([b - a for a, b in boxes[i]]) for i, t in zip(row, parts, strict=True)})
            return [out[i] for i in range(len(self.shapes))]

        return finish


class Broadcast:
    """What replicas need instead of an `Exchange`: every owner sends its results to all; nothing goes to owners."""

    def __init__(self, team: Replicas, shapes: Sequence[Sequence[int]], owners: Sequence[int]):
        """Lay out the flat buffers.

        Args:
            team: the replicas.
            shapes: of the tensors.
            owners: the place in the team of the rank that works on each tensor.
        """
        self.team, self.shapes, self.owners = team, [tuple(s) for s in shapes], owners
        self.mine = [i for i, owner in enumerate(owners) if owner == team.rank]

    def to_owners(self, parts: Sequence[Tensor], wire: torch.dtype | None = None) -> Callable[[], dict[int, Tensor]]:
        """The tensors owned here.

        Args:
            parts: all tensors.
            wire: of no use here.

        Returns:
            Gives index to tensor.
        """
        del wire
        return lambda: {i: parts[i] for i in self.mine}

    def from_owners(
        self, wholes: dict[int, Tensor], like: Tensor, wire: torch.dtype | None = None
    ) -> Callable[[], list[Tensor]]:
        """Begin to send all ranks the tensors owned here.

        Args:
            wholes: index to tensor, for the tensors owned here.
            like: gives dtype and device.
            wire: the dtype in which they travel, if another.

        Returns:
            Waits, and gives every tensor.
        """
        started, flats = [], []
        for place, source in enumerate(self.team.ranks):
            theirs = [i for i, owner in enumerate(self.owners) if owner == place]
            if place == self.team.rank:
                flat = torch.cat([like.new_empty(0), *(wholes[i].reshape(-1) for i in theirs)]).to(wire or like.dtype)
            else:
                flat = like.new_empty(sum(math.prod(self.shapes[i]) for i in theirs), dtype=wire)
            if flat.numel():
                started.append(dist.broadcast(flat, source, group=self.team.group, async_op=True))
            flats.append((theirs, flat))

        def finish() -> list[Tensor]:
            for work in started:
                work.wait()
            out: dict[int, Tensor] = {}
            for theirs, flat in flats:
                parts = flat.to(like.dtype).split([math.prod(self.shapes[i]) for i in theirs])
                out.update({i: t.view(self.shapes[i]) for i, t in zip(theirs, parts, strict=True)})
            return [out[i] for i in range(len(self.shapes))]

        return finish


def make_exchange(
    teams: Sequence[Team], shapes: Sequence[Sequence[int]], owners: Sequence[int]
) -> Exchange | Broadcast:
    """What brings tensors to their owners and results back.

    Args:
        teams: of each tensor, all with the same ranks.
        shapes: of the whole tensors.
        owners: the place in the team of the rank that works on each tensor.

    Returns:
        An exchange of shards, or broadcasts for replicas.
    """
    if isinstance(teams[0], Replicas):
        return Broadcast(teams[0], shapes, owners)
    return Exchange([team for team in teams if isinstance(team, Sharding)], shapes, owners)


def _volume(box: Bounds) -> int:
    return math.prod(end - first for first, end in box)
