"""Who works on which matrix, and how matrices and directions travel.

A matrix that is cut (`layout.Cut`), or whole on several ranks that share out the work (`Replicas`), is worked on by
one owner in a team of ranks. `Exchange` brings shards of many tensors to their owners and the results back, `Broadcast`
does the same for replicas, which have everything but the results. Both begin to communicate; what they return waits.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.core.chunks import bucket
from lightning_optim.core.layout import Box, Cut, within


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


Team = Cut | Replicas


def replicas(group: dist.ProcessGroup | None) -> Replicas | None:
    """The ranks of a process group, or all ranks.

    Returns:
        None for a process that is alone.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    found = Replicas(group or cast("dist.ProcessGroup", dist.group.WORLD))
    return found if found.size > 1 else None


class Exchange:
    """One uneven all-to-all that brings the shards of many tensors to their owners, and its mirror."""

    def __init__(self, cuts: Sequence[Cut], shapes: Sequence[Sequence[int]], owners: Sequence[int]):
        """Lay out the flat buffers.

        Args:
            cuts: how each tensor is cut, all over one team.
            shapes: of the whole tensors.
            owners: the place in the team of the rank that works on each tensor.
        """
        self.cuts, self.shapes, self.owners = cuts, [tuple(s) for s in shapes], owners
        self.team, self.rank = cuts[0], cuts[0].rank
        self.mine = [i for i, owner in enumerate(owners) if owner == self.rank]

    def _box(self, i: int, rank: int) -> Box:
        return self.cuts[i].box(self.shapes[i], rank)

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


def exchange(teams: Sequence[Team], shapes: Sequence[Sequence[int]], owners: Sequence[int]) -> Exchange | Broadcast:
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
    return Exchange([team for team in teams if isinstance(team, Cut)], shapes, owners)


def assign_owners(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Spread matrices over ranks: largest first, each to the rank with the least work.

    Args:
        costs: of each matrix.
        loads: work each rank already has; increased.

    Returns:
        Rank of each matrix; equal on every rank that calls it with equal arguments.
    """
    owners = [0] * len(costs)
    queue = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(queue)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[i] = queue[0]
        heapq.heapreplace(queue, (load + costs[i], owners[i]))
    for load, rank in queue:
        loads[rank] = load
    return owners


def fingerprint(bits: Iterable[bool]) -> int:
    """A 52-bit hash of a sequence of bits.

    Returns:
        An integer that a float64 holds exactly.
    """
    return int.from_bytes(hashlib.blake2b(bytes(bits), digest_size=8).digest(), "big") >> 12


class Meeting:
    """A rendezvous before a collective outside a training step, so that a call on one rank raises and never hangs."""

    def __init__(self, timeout: timedelta = timedelta(seconds=120)):
        """Set the patience.

        Args:
            timeout: how long to wait for the other ranks.
        """
        self.timeout = timeout

    def attend(self, ranks: Sequence[int], what: str, content: str) -> None:
        """Wait until every rank makes the call it has made as often as this one.

        Args:
            ranks: who is to come, by global rank.
            what: the collective call that follows, for the error message.
            content: describes the optimizer, equally on every rank; calls of different optimizers do not mix.

        Raises:
            RuntimeError: not every rank came in time; the call does not count then.
        """
        store, place = _store(), _digest(repr((what, content, tuple(ranks))))
        calls = f"lightning_optim/{place}/{dist.get_rank()}"
        key = f"lightning_optim/{place}/call/{store.add(calls, 1)}"
        try:
            self._gather(store, key, len(ranks))
        except RuntimeError as error:
            store.add(calls, -1)
            raise RuntimeError(
                f"{what} is a collective call: make it on every rank, then save on one (where replicas share the work, "
                "consolidate() on every rank lets one call it alone)"
            ) from error

    def compare(self, ranks: Sequence[int], lines: Sequence[str]) -> None:
        """Check that every rank describes its param groups alike.

        Args:
            ranks: who is to come, by global rank.
            lines: one per group.

        Raises:
            RuntimeError: on every rank, when not all do, or not every rank comes in time.
        """
        store, place = _store(), _digest(repr(tuple(ranks)))
        calls = store.add(f"lightning_optim/groups/{place}/{dist.get_rank()}", 1)
        key = f"lightning_optim/groups/{place}/call/{calls}"
        own = f"{key}/{_digest(repr(lines))}"
        if dist.get_rank() == ranks[0]:
            store.set(f"{key}/first", "\n".join(lines))
        store.add(own, 1)
        try:
            self._gather(store, key, len(ranks))
        except RuntimeError as error:
            raise RuntimeError("not every rank came to the optimizer's first step") from error
        if store.add(own, 0) == len(ranks):
            return
        first = store.get(f"{key}/first").decode().split("\n")
        wrong = next(
            (k for k in range(max(len(first), len(lines))) if first[k : k + 1] != list(lines)[k : k + 1]), None
        )
        said = "this rank's are those of the first" if wrong is None else f"here {lines[wrong : wrong + 1]}"
        there = "" if wrong is None else f", on rank {ranks[0]} {first[wrong : wrong + 1]}"
        raise RuntimeError(f"param groups differ between ranks; nothing was updated: {said}{there}")

    def _gather(self, store: Any, key: str, count: int) -> None:
        """Wait until so many have come."""
        if store.add(key, 1) == count:
            store.set(f"{key}/all", "1")
        try:
            store.wait([f"{key}/all"], self.timeout)
        except RuntimeError:
            store.add(key, -1)
            raise


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _volume(box: Box) -> int:
    return math.prod(end - first for first, end in box)
