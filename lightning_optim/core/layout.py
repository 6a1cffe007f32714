"""Where a parameter lies, on which rank its matrices are worked on, and how they get there.

Plain tensors are whole: every rank that has one does all the work. A DTensor cut along its first dimension (FSDP2, and
HSDP, whose replicas repeat the work) is worked on in one of three ways:

- elementwise rules take the local shard;
- rules that only reduce get a DTensor around each stack (`StackLayout`), so torch.distributed adds the sums;
- every other rule needs whole matrices: `Exchange` brings each to one owner and the directions back.

Nothing outside this module asks whether a tensor is a DTensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_optim.core.chunks import Dims
from lightning_optim.core.rule import Slot
from lightning_optim.core.storage import Form, allocate


def local(t: Tensor) -> Tensor:
    """The part of a tensor on this rank.

    Returns:
        The shard of a DTensor (shared memory), or the tensor itself.
    """
    return t.to_local() if isinstance(t, DTensor) else t


def local_gradient(p: Tensor) -> Tensor | None:
    """The gradient of a parameter on this rank, in the parameter's placement.

    Returns:
        The local gradient, or None.
    """
    g = p.grad
    if not isinstance(g, DTensor) or not isinstance(p, DTensor):
        return g
    return (g if g.placements == p.placements else g.redistribute(p.device_mesh, p.placements)).to_local()


@dataclass(frozen=True)
class Cut:
    """A DTensor cut into row ranges, by `torch.chunk`'s rule, over the ranks of one process group."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    group: dist.ProcessGroup

    def rows(self, total: int, rank: int) -> tuple[int, int]:
        """The row range of one rank.

        Returns:
            (first, one past the last).
        """
        step = -(-total // dist.get_world_size(self.group))
        return min(rank * step, total), min((rank + 1) * step, total)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return dist.get_world_size(self.group)

    def shard(self, whole_shape: Sequence[int], part: Tensor, dim: int = 0) -> Tensor:
        """Wrap this rank's part of a tensor that is cut along `dim`.

        Returns:
            A DTensor of shape `whole_shape`.
        """
        placements = [Shard(dim) if isinstance(x, Shard) else x for x in self.placements]
        return _wrap(self.mesh, placements, whole_shape, part)


def _wrap(mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], part: Tensor) -> DTensor:
    stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def cut_of(p: Tensor, name: str = "parameter") -> Cut | None:
    """How a parameter is cut into rows.

    Args:
        p: the parameter.
        name: for the error message.

    Returns:
        None for a tensor that is whole on this rank.

    Raises:
        ValueError: a DTensor with another placement than rows over one mesh dimension.
    """
    if not isinstance(p, DTensor):
        return None
    cut = [d for d, x in enumerate(p.placements) if not isinstance(x, Replicate)]
    if not cut:
        return None
    if len(cut) > 1 or type(p.placements[cut[0]]) is not Shard or not p.placements[cut[0]].is_shard(0):
        raise ValueError(
            f"{name}: placements {p.placements} are not supported for rules that need whole matrices or sums, "
            "or for 8-bit state; shard rows (dimension 0) over one mesh dimension, as fully_shard does"
        )
    return Cut(p.device_mesh, tuple(p.placements), p.device_mesh.get_group(cut[0]))


def first_element(p: Tensor) -> int | None:
    """Global index of the first element of this rank's part, where the part is one contiguous run of elements.

    Returns:
        The index in row-major order, or None where the part is not such a run (`element_index` then).
    """
    if not local(p).is_contiguous():
        return None
    if not isinstance(p, DTensor):
        return 0
    if any(local(p).shape[d] != p.shape[d] for d in range(1, p.ndim)):
        return None
    return start_of(p)


def start_of(p: Tensor) -> int:
    """Global row-major index of the first element of this rank's rows.

    Returns:
        The index.
    """
    return _offset(p)[0] * math.prod(p.shape[1:]) if p.ndim else 0


def element_index(p: Tensor) -> Tensor:
    """Global row-major index of every element of this rank's part.

    Returns:
        int32 (wrapped around), shaped like the local part.
    """
    part = local(p)
    index = torch.zeros(part.shape, dtype=torch.int64, device=part.device)
    for d, start in enumerate(_offset(p)):
        steps = torch.arange(start, start + part.shape[d], device=part.device) * math.prod(p.shape[d + 1 :])
        index += steps.view([-1 if k == d else 1 for k in range(p.ndim)])
    return index.to(torch.int32)


def _offset(p: Tensor) -> Sequence[int]:
    if not isinstance(p, DTensor):
        return [0] * p.ndim
    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1]


def _axis(p: Tensor, dims: Dims, transposed: bool) -> str:
    """Which axis of the stack `[b, m, n]` a row cut of the parameter falls on."""
    if p.ndim < 2:
        return "n"
    if p.ndim == 2 and transposed:
        return "n"
    return "m" if dims[0] == 1 and p.ndim != 3 and p.shape[0] == dims[1] else "b"


class StackLayout:
    """How the tensors of a reducing rule are cut: the identity for whole parameters, DTensors for row shards."""

    def __init__(self, p: Tensor, dims: Dims, name: str = "parameter", transposed: bool = False):
        """Read the cut of a parameter.

        Args:
            p: the parameter.
            dims: of the whole parameter as a stack of matrices.
            name: for error messages.
            transposed: whether the matrices are stored columns x rows.

        Raises:
            ValueError: blocks of rows that straddle shards.
        """
        self.cut = cut_of(p, name)
        self.param, self.dims, self.axis = p, dims, _axis(p, dims, transposed)
        self.local_dims = dims
        if self.cut is not None:
            part, (_, m, n) = local(p), dims
            if self.axis == "n":
                self.local_dims = (1, m, part.shape[0])
            elif self.axis == "m":
                self.local_dims = (1, part.shape[0], n)
            else:
                per_block = m * n
                row = math.prod(p.shape[1:])
                bounds = [self.cut.rows(p.shape[0], r)[1] * row for r in range(self.cut.size)]
                if any(end % per_block for end in bounds):
                    raise ValueError(f"{name}: blocks of {m} rows straddle the shards {self.cut.placements}")
                self.local_dims = (part.numel() // per_block, m, n)

    @property
    def stackable(self) -> bool:
        """Whether parameters of one shape may share a stack."""
        return self.cut is None or self.axis != "b"

    def allocate(self, form: Form) -> Tensor:
        """A slot's tensor at its start value, cut like the parameter where its letters are.

        Returns:
            A DTensor where the slot is cut, else a plain tensor that is equal on all ranks.
        """
        whole, part, dim = form.shape, local(self.param), self._rest_dim(form.slot)
        if self.cut is None or dim is None:
            return allocate(form, part, whole)
        shape = list(whole)
        blocks_of_rows = self.axis == "b" and self.param.ndim == 2
        shape[dim] = self.local_dims[0] if blocks_of_rows else part.shape[0]
        return self.cut.shard(whole, allocate(form, part, shape), dim)

    def place(self, slot: Slot, value: Tensor) -> Tensor:
        """Bring a loaded slot into the placement `allocate` would give it.

        Returns:
            A DTensor where the slot is cut, else a plain tensor.
        """
        return place(value, self.cut, self._rest_dim(slot))

    def _rest_dim(self, slot: Slot) -> int | None:
        if self.axis == "b" or slot.letters == "mn":
            return 0  # between matrices, or like the parameter
        return slot.letters.index(self.axis) if self.axis in slot.letters else None

    def _placements(self, cut: Cut, letters: str) -> tuple[Placement, ...]:
        dim = letters.index(self.axis) + 1 if self.axis in letters else None
        stacked = Replicate() if dim is None else Shard(dim)
        return tuple(stacked if isinstance(x, Shard) else x for x in cut.placements)

    def wrap(self, part: Tensor, letters: str = "mn") -> Tensor:
        """A local stack as the rule sees it.

        Returns:
            The stack itself, or a DTensor around it whose sums run over all ranks.
        """
        if self.cut is None or self.axis == "b":
            return part
        whole = {"m": self.dims[1], "n": self.dims[2]}[self.axis]
        shape = [part.shape[0], *(whole if x == self.axis else k for x, k in zip(letters, part.shape[1:], strict=True))]
        wrapped = _wrap(self.cut.mesh, self._placements(self.cut, letters), shape, part)
        return wrapped.full_tensor() if whole == 1 else wrapped  # one element broadcasts, which no shard may in place

    def part(self, whole: Tensor, letters: str) -> Tensor:
        """This rank's part of a stack that every rank has whole.

        Returns:
            A plain tensor.
        """
        if self.cut is None or (self.axis != "b" and self.axis not in letters):
            return whole
        first, end = self.cut.rows(self.param.shape[0], self.cut.rank)
        if self.axis != "b":
            return whole.narrow(letters.index(self.axis) + 1, first, end - first)
        start = first * math.prod(self.param.shape[1:]) // (self.dims[1] * self.dims[2])
        return whole.narrow(0, start, self.local_dims[0])  # parameters cut between matrices share no stack

    def unwrap(self, value: Tensor, letters: str = "mn") -> Tensor:
        """The local part of what a rule returned.

        Returns:
            A plain tensor.
        """
        if self.cut is None or not isinstance(value, DTensor):
            if self.cut is None or self.axis == "b" or self.axis not in letters:
                return value
            return value.narrow(letters.index(self.axis) + 1, 0, self.local_dims["bmn".index(self.axis)])
        placements = self._placements(self.cut, letters)
        return (value if value.placements == placements else value.redistribute(None, placements)).to_local()


def place(value: Tensor, cut: Cut | None, dim: int | None) -> Tensor:
    """Bring a loaded state tensor into the placement in which it rests.

    Args:
        value: a whole tensor, equal on all ranks, or a DTensor.
        cut: of the parameter it belongs to.
        dim: the dimension of `value` that is cut like the parameter's rows; None if it is whole on every rank.

    Returns:
        A DTensor where `dim` says so, else a plain tensor.
    """
    if cut is None or dim is None:
        return value.full_tensor() if isinstance(value, DTensor) else value
    placements = [Shard(dim) if isinstance(x, Shard) else x for x in cut.placements]
    return place_as(value, cut.mesh, placements)


def place_like(value: Tensor, p: Tensor) -> Tensor:
    """Bring a loaded tensor of a parameter's shape into the parameter's placement.

    Returns:
        A DTensor for a DTensor, else a plain tensor.
    """
    if not isinstance(p, DTensor):
        return place(value, None, None)
    return place_as(value, p.device_mesh, p.placements)


def wrapped_like(part: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor of a parameter's shape, in the parameter's placement.

    Returns:
        A DTensor for a DTensor, else the part itself.
    """
    return _wrap(p.device_mesh, p.placements, p.shape, part) if isinstance(p, DTensor) else part


def place_as(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Cut a whole tensor, or cut a DTensor anew.

    Returns:
        A DTensor whose local part owns its storage.
    """
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placed = value.redistribute(mesh, placements)
    part = placed.to_local().clone()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=placed.shape, stride=placed.stride())


class Exchange:
    """One uneven all-to-all that brings row shards of many tensors to their owners, and its mirror."""

    def __init__(self, cut: Cut, shapes: Sequence[Sequence[int]], owners: Sequence[int]):
        """Lay out the flat buffers.

        Args:
            cut: how all the tensors are cut.
            shapes: of the whole tensors; rows are dimension 0.
            owners: group rank that works on each tensor.
        """
        self.cut, self.shapes, self.owners = cut, [tuple(s) for s in shapes], owners
        self.mine = [i for i, owner in enumerate(owners) if owner == cut.rank]

    def _part(self, i: int, rank: int) -> tuple[int, ...]:
        first, end = self.cut.rows(self.shapes[i][0], rank)
        return (end - first, *self.shapes[i][1:])

    def _all_to_all(self, pieces: list[list[Tensor]], sizes: list[int], like: Tensor) -> list[Tensor]:
        send = [sum(t.numel() for t in row) for row in pieces]
        flat = [t.reshape(-1) for row in pieces for t in row]
        outgoing = torch.cat(flat) if flat else like.new_empty(0)
        incoming = outgoing.new_empty(sum(sizes))
        dist.all_to_all_single(incoming, outgoing, sizes, send, group=self.cut.group)
        return list(incoming.split(sizes))

    def to_owners(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Send every local part to the owner of its tensor.

        Args:
            parts: this rank's rows of each tensor, of one dtype.

        Returns:
            Index to whole tensor, for the tensors owned here.
        """
        ranks = range(self.cut.size)
        pieces = [[parts[i] for i, owner in enumerate(self.owners) if owner == r] for r in ranks]
        sizes = [sum(math.prod(self._part(i, r)) for i in self.mine) for r in ranks]
        received = self._all_to_all(pieces, sizes, parts[0])
        split = [t.split([math.prod(self._part(i, r)) for i in self.mine]) for r, t in enumerate(received)]
        return {i: torch.cat([split[r][k] for r in ranks]).view(self.shapes[i]) for k, i in enumerate(self.mine)}

    def from_owners(self, wholes: dict[int, Tensor], like: Tensor) -> list[Tensor]:
        """Send every rank its rows of the tensors owned here.

        Args:
            wholes: index to whole tensor, for the tensors owned here.
            like: gives dtype and device to a rank that owns nothing.

        Returns:
            This rank's rows of each tensor.
        """
        ranks = range(self.cut.size)
        pieces = [[wholes[i][slice(*self.cut.rows(self.shapes[i][0], r))] for i in self.mine] for r in ranks]
        here = self.cut.rank
        by_owner = [[i for i, owner in enumerate(self.owners) if owner == r] for r in ranks]
        sizes = [sum(math.prod(self._part(i, here)) for i in row) for row in by_owner]
        received = self._all_to_all(pieces, sizes, like)
        out: dict[int, Tensor] = {}
        for row, flat in zip(by_owner, received, strict=True):
            parts = flat.split([math.prod(self._part(i, here)) for i in row]) if row else ()
            out.update({i: t.view(self._part(i, here)) for i, t in zip(row, parts, strict=True)})
        return [out[i] for i in range(len(self.shapes))]


def assign_owners(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Spread matrices over ranks: largest first, each to the rank with the least work.

    Args:
        costs: of each matrix.
        loads: work each rank already has; increased.

    Returns:
        Rank of each matrix; equal on every rank that calls it with equal arguments.
    """
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def fingerprint(bits: Iterable[bool]) -> int:
    """A 52-bit hash of a sequence of bits.

    Returns:
        An integer that a float64 holds exactly.
    """
    return int.from_bytes(hashlib.blake2b(bytes(bits), digest_size=8).digest(), "big") >> 12


def agree_max(values: Sequence[float], params: Iterable[Tensor]) -> list[float]:
    """The largest of each value over all ranks that share the parameters; no communication without a mesh.

    Args:
        values: one per question.
        params: the parameters concerned.

    Returns:
        The maxima, equal on every rank.
    """
    meshes = {p.device_mesh: p.to_local().device for p in params if isinstance(p, DTensor)}
    out = torch.tensor(values, dtype=torch.float64)
    for mesh, device in meshes.items():
        moved = out.to(device)
        for d in range(mesh.ndim):
            dist.all_reduce(moved, dist.ReduceOp.MAX, group=mesh.get_group(d))
        out = moved.cpu()
    return out.tolist()


def total_norms(sets: Sequence[Sequence[tuple[Tensor, Tensor | None]]]) -> list[float]:
    """The norm of each of several sets of gradients, over the whole mesh; one synchronisation per device.

    Args:
        sets: pairs of a parameter and its gradient on this rank, None where there is none.

    Returns:
        One norm per set, equal on every rank; replicas count once.
    """
    squares: dict[tuple[torch.device, DeviceMesh | None, tuple[int, ...]], Tensor] = {}
    for i, pairs in enumerate(sets):
        for p, g in pairs:
            mesh = p.device_mesh if isinstance(p, DTensor) else None
            cut = tuple(d for d, x in enumerate(p.placements) if not x.is_replicate()) if isinstance(p, DTensor) else ()
            where = local(p).device, mesh, cut
            if where not in squares:
                squares[where] = torch.zeros(len(sets), dtype=torch.float64, device=where[0])
            if g is not None:
                exact = torch.promote_types(g.dtype, torch.float32)
                squares[where][i] += torch.linalg.vector_norm(g, dtype=exact).double().square()
    by_device: dict[torch.device, Tensor] = {}
    for (device, mesh, cut), sums in squares.items():
        for d in cut:
            dist.all_reduce(sums, group=cast("DeviceMesh", mesh).get_group(d))
        by_device[device] = by_device.get(device, 0) + sums
    totals = [found.tolist() for found in by_device.values()]
    return [math.sqrt(sum(x)) for x in zip(*totals, strict=True)] if totals else [0.0] * len(sets)


def agree_times(seconds: Sequence[float], params: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[float]:
    """Measured times that all ranks doing the same work share: the largest.

    Args:
        seconds: measured on this rank.
        params: the parameters concerned.
        group: of replicas, for parameters that are whole on every rank.

    Returns:
        The times, equal on every rank.

    Raises:
        RuntimeError: replicas that may drift apart, because nothing says which ranks they are.
    """
    out = agree_max(seconds, params)
    if group is not None:
        moved = torch.tensor(out, dtype=torch.float64, device=local(params[0]).device)
        dist.all_reduce(moved, dist.ReduceOp.MAX, group=group)
        return moved.tolist()
    whole = any(not isinstance(p, DTensor) for p in params)
    if whole and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            "refresh='time_budget' measures time, which differs between replicas; set optimizer.process_group to "
            "the group of the replicas, or choose another policy"
        )
    return out


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors that are whole on every rank by their mean over all ranks, in place.

    Args:
        tensors: of the same shapes on every rank.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for t in tensors:
            dist.all_reduce(t)
            t /= dist.get_world_size()


class Meeting:
    """A rendezvous before a collective outside a training step, so that a call on one rank raises and never hangs."""

    def __init__(self, timeout: timedelta = timedelta(seconds=120)):
        """Set the patience.

        Args:
            timeout: how long to wait for the other ranks.
        """
        self.timeout = timeout

    def attend(self, cut: Cut, what: str, content: str) -> None:
        """Wait until every rank of the group makes the call it has made as often as this one.

        Args:
            cut: gives the process group.
            what: the collective call that follows, for the error message.
            content: describes the optimizer, equally on every rank; calls of different optimizers do not mix.

        Raises:
            RuntimeError: not every rank came in time; the call does not count then.
        """
        store = dist.distributed_c10d._get_default_store()
        ranks = dist.get_process_group_ranks(cut.group)
        place = hashlib.blake2b(repr((what, content, ranks)).encode(), digest_size=8).hexdigest()
        calls = f"lightning_optim/{place}/{dist.get_rank()}"
        key = f"lightning_optim/{place}/call/{store.add(calls, 1)}"
        if store.add(key, 1) == len(ranks):
            store.set(f"{key}/all", "1")
        try:
            store.wait([f"{key}/all"], self.timeout)
        except RuntimeError as error:
            store.add(key, -1)
            store.add(calls, -1)
            raise RuntimeError(f"{what} is a collective call: make it on every rank, then save on one") from error
